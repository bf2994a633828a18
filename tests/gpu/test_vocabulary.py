"""Whose product with the vocabulary a read-out is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ouro_runtime.engine.cuda import engine
from ouro_runtime.engine.cuda.engine import Vocabulary

VOCAB, H = 5, 4
THEIRS = torch.full((2, VOCAB), 7.0)


def model(**options: Any) -> Any:
    settings = {"method": UnquantizedEmbeddingMethod(), "head_dtype": torch.float32} | options
    weight = torch.randn(VOCAB + 3, H)  # vLLM pads the vocabulary
    return SimpleNamespace(
        model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight)),
        lm_head=SimpleNamespace(quant_method=settings["method"], weight=weight),
        logits_processor=SimpleNamespace(head_dtype=settings["head_dtype"]),
        config=SimpleNamespace(vocab_size=VOCAB),
        read_out=lambda hidden: THEIRS,
        embed_input_ids=lambda tokens: THEIRS[:, :H],
    )


@pytest.mark.parametrize(
    ("options", "processes", "ours"),
    [
        ({}, 1, True),
        ({"head_dtype": None}, 1, True),
        ({"head_dtype": torch.bfloat16}, 1, False),
        ({"method": object()}, 1, False),
        ({}, 2, False),
    ],
)
def test_ours_where_it_is_a_product_in_the_models_dtype_and_nothing_else(
    options: dict[str, Any], processes: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "get_tensor_model_parallel_world_size", lambda: processes)
    served = model(**options)
    vocabulary = Vocabulary(served)
    assert vocabulary.alone == (processes == 1)
    hidden, read = torch.randn(2, H), torch.tensor([True, False])
    logits = vocabulary.logits(hidden, read)
    if not ours:
        assert logits is THEIRS
        return
    assert logits.shape == (2, VOCAB)
    torch.testing.assert_close(logits[0], served.lm_head.weight[:VOCAB] @ hidden[0])
    assert not logits[1].any()


def test_a_spread_vocabulary_embeds_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, numbers = torch.tensor([3, 1]), torch.tensor([0, 1])
    for processes in (1, 2):
        monkeypatch.setattr(engine, "get_tensor_model_parallel_world_size", lambda n=processes: n)
        served = model()
        table, rows = Vocabulary(served).embedding(tokens, numbers)
        wanted = served.lm_head.weight[tokens] if processes == 1 else THEIRS[:, :H]
        assert torch.equal(table[rows], wanted)
