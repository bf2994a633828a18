"""A recipe small enough to train within a test."""

import pytest
import torch
from tokenizers import Tokenizer

from ouro_runtime.training.recipe import Recipe, corpus
from ouro_runtime.training.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in one order, and no fight over cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        num_heads=2,
        rows=4,
        warmup_steps=5,
        length=128,
        corpus_problems=150,
        stage2_tokens=400,
        stage2_steps=150,
    )


@pytest.fixture(scope="session")
def tok(recipe: Recipe) -> Tokenizer:
    return train_tokenizer(corpus(recipe), recipe.vocab_size)
