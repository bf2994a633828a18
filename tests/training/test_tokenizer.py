"""The tokenizer as transformers loads it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ouro_runtime.training.recipe import Recipe, corpus
from ouro_runtime.training.tokenizer import SPECIAL, render, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tok")
    save_tokenizer(train_tokenizer(corpus(Recipe(corpus_problems=300)), 1024), folder, 2048)
    return AutoTokenizer.from_pretrained(folder)


def test_special_ids(tok: PreTrainedTokenizerBase) -> None:
    assert tok.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    assert set(SPECIAL) <= set(tok.all_special_tokens) | {
        t.content for t in tok.added_tokens_decoder.values() if t.special
    }
    assert tok.eos_token_id == 2 and tok.pad_token_id == 0


def test_digits_and_punctuation_are_single_tokens(tok: PreTrainedTokenizerBase) -> None:
    assert tok.tokenize("120+(33)") == list("120+(33)")


@pytest.mark.parametrize(
    "text",
    ["héllo wörld", "日本語", "a\tb\n\nc", "🙂🙃", "x" * 50, "\x00\x7f", "  two  spaces ", "½ ² ٣"],
)
def test_any_text_comes_back(tok: PreTrainedTokenizerBase, text: str) -> None:
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.decode(ids) == text


def test_template_is_what_training_renders(tok: PreTrainedTokenizerBase) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "1+1")]
    messages = [{"role": r, "content": c} for r, c in turns]
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        text = tok.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **kwargs
        )
        assert text == render(turns, reply=True)
    assert tok.apply_chat_template(messages, tokenize=False) == render(turns)


def test_no_default_system_turn(tok: PreTrainedTokenizerBase) -> None:
    text = tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
