"""The files beside a checkpoint's weights: tokenizer, chat template, defaults of requests.

vLLM reads them when the first request needs them; what is wrong in them would then be the client's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ouro_runtime.checkpoint_config import Rule, is_integer, is_number, or_null
from ouro_runtime.model.checkpoint import CheckpointError, read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template"
EOS = "eos_token_id"


def _number(allowed: str, low: float, high: float) -> Rule:
    return or_null(Rule(allowed, lambda v: is_number(v) and low <= v <= high))


_PENALTY = _number("a number from -2 to 2", -2, 2)

DEFAULTS: Mapping[str, Rule] = {
    "temperature": _number("a number of 0 or more", 0, float("inf")),
    "top_p": or_null(Rule("a number above 0, up to 1", lambda v: is_number(v) and 0 < v <= 1)),
    "top_k": or_null(Rule("an integer of -1 or more", lambda v: is_integer(v) and v >= -1)),
    "min_p": _number("a number from 0 to 1", 0, 1),
    "repetition_penalty": or_null(Rule("a number above 0", lambda v: is_number(v) and v > 0)),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "max_new_tokens": or_null(Rule("an integer of 1 or more", lambda v: is_integer(v) and v >= 1)),
}
"""What vLLM takes from `generation_config.json` for requests that do not say it, with the bounds
that it holds requests to."""


def check_beside(folder: Path, config: Mapping[str, Any], unread: Collection[str] = ()) -> None:
    """Check the files that are there; a tokenizer has other forms too.

    Args:
        config: the checkpoint's `config.json`.
        unread: what is not checked, since nobody reads it: of TOKENIZER, TEMPLATE and GENERATION.

    Raises:
        CheckpointError: naming the file, and the field where one is to blame.
    """
    vocab = config.get("vocab_size")
    check_ends("config.json", config, vocab)
    if GENERATION not in unread:
        check_generation(folder, vocab)
    if TOKENIZER in unread:
        return
    for name in (TOKENIZER_CONFIG, TOKENIZER):
        _content(folder, name)
    if (folder / TOKENIZER).exists():
        try:
            Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library raises no narrower one
            raise CheckpointError(f"{TOKENIZER} is no tokenizer ({error})") from None
    for name, template in () if TEMPLATE in unread else chat_templates(folder):
        check_template(name, template)


def check_generation(folder: Path, vocab: int | None) -> None:
    """Check what a folder's `generation_config.json` says, if it has one, as `check_beside`.

    Args:
        vocab: the model's tokens, if they are known.
    """
    said = _content(folder, GENERATION)
    for name, rule in DEFAULTS.items():
        if name in said and not rule.holds(said[name]):
            raise CheckpointError(
                f"{GENERATION}: {name} must be {rule.allowed}, got {said[name]!r:.80}"
            )
    check_ends(GENERATION, said, vocab)


def check_ends(name: str, said: Mapping[str, Any], vocab: int | None) -> None:
    """CheckpointError unless the tokens that end an answer are the model's: `min_tokens` would look
    for them among the logits."""
    ends = said.get(EOS)
    for token in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not is_integer(token) or token < 0 or (vocab is not None and token >= vocab):
            allowed = "a token id" if vocab is None else f"a token id under {vocab}"
            raise CheckpointError(
                f"{name}: {EOS} must be {allowed} or a list of them, or null, got {ends!r:.80}"
            )


def chat_templates(folder: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, template) of what tokenizers find as chat templates in a folder."""
    said = _content(folder, TOKENIZER_CONFIG).get(TEMPLATE)
    if isinstance(said, list):
        for one in said:
            named = isinstance(one, dict) and "name" in one
            yield TOKENIZER_CONFIG, one.get("template") if named else None
    elif isinstance(said, dict):  # by name
        for template in said.values():
            yield TOKENIZER_CONFIG, template
    elif said is not None:
        yield TOKENIZER_CONFIG, said
    files = [
        folder / f"{TEMPLATE}.jinja",
        *sorted((folder / f"additional_{TEMPLATE}s").glob("*.jinja")),
    ]
    for file in files:
        if file.exists():
            try:
                yield file.relative_to(folder).as_posix(), file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file.name} cannot be read ({error})") from None


def check_template(name: str, template: Any) -> None:
    """CheckpointError unless it is a text that compiles as transformers compiles it."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if not isinstance(template, str):
        raise CheckpointError(f"{name}: {TEMPLATE} must be a text, or a list of them with names")
    try:
        _compile_jinja_template(template)
    except jinja2.TemplateError as error:
        where = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise CheckpointError(f"{name}: {TEMPLATE} is no Jinja ({error.message}{where})") from None


def _content(folder: Path, name: str) -> dict[str, Any]:
    """What a file of JSON holds; nothing if there is none."""
    return read_json(folder / name) if (folder / name).exists() else {}
