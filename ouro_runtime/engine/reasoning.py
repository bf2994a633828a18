"""Seam (`--reasoning-parser ouro`): reasoning told from the answer by token id.

The released checkpoints mark reasoning with the special tokens `<think>` (3) and `</think>` (4).
Text that merely spells a tag is no tag, and an answer without tags is all content. vLLM's parser
engine does the splitting; what is ours is where a turn starts, and that a complete answer is split
by its token ids too, which vLLM does not hand to reasoning parsers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.parser.engine.events import EventType
from vllm.parser.engine.parser_engine import ParserEngine
from vllm.parser.engine.parser_engine_config import ParserEngineConfig, ParserState, Transition
from vllm.reasoning import ReasoningParserManager

START, END = "<think>", "</think>"

CONFIG = ParserEngineConfig(
    name="ouro",
    # No `terminals`: those would match the tags' text.
    token_id_terminals={"THINK_START": START, "THINK_END": END},
    transitions={
        (ParserState.CONTENT, "THINK_START"): Transition(
            ParserState.REASONING, (EventType.REASONING_START,)
        ),
        (ParserState.REASONING, "THINK_START"): Transition(ParserState.REASONING),
        (ParserState.REASONING, "THINK_END"): Transition(
            ParserState.CONTENT, (EventType.REASONING_END,)
        ),
        (ParserState.CONTENT, "THINK_END"): Transition(ParserState.CONTENT),
    },
    initial_state=ParserState.CONTENT,
    turn_boundary_tokens=frozenset(("<|im_start|>", "<|im_end|>")),
)


class OuroParserEngine(ParserEngine):
    """vLLM's parser engine for `CONFIG`."""

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        missing = {START, END} - tokenizer.get_vocab().keys()
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(sorted(missing))}")
        super().__init__(tokenizer, tools, parser_engine_config=CONFIG, **kwargs)


@ReasoningParserManager.register_module("ouro")
class OuroReasoningParser(ParserEngineReasoningAdapter):
    """Reasoning and content of one turn.

    Attributes:
        output_token_ids: ids of a complete output; set before `extract_reasoning`.
        tools_follow: whether content goes to a tool parser. If so this one steps aside as soon as
            content starts; else it reads the stream to the end.
    """

    _parser_engine_cls = OuroParserEngine

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        vocab = self.vocab
        self._start_id, self._end_id = vocab[START], vocab[END]
        self._initial = ParserState.CONTENT
        self._content_started = False
        self.output_token_ids: Sequence[int] = ()
        self.tools_follow = False

    @property
    def reasoning_start_str(self) -> str:
        return START

    @property
    def reasoning_end_str(self) -> str:
        return END

    def begin(self, prompt_token_ids: Sequence[int]) -> None:
        """Start a turn after this prompt: inside reasoning if the template has opened it."""
        closed = self.is_reasoning_end(prompt_token_ids)
        self._initial = ParserState.CONTENT if closed else ParserState.REASONING
        self._parser_engine.initialize_streaming(initial_state=self._initial)

    adjust_initial_state_from_prompt = begin

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self.tools_follow and (
            self._content_started or super().has_engine_confirmed_reasoning_end()
        )

    def extract_reasoning_streaming(self, *args: Any, **kwargs: Any) -> Any:
        delta = super().extract_reasoning_streaming(*args, **kwargs)
        self._content_started |= bool(delta and delta.content)
        return delta

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        reasoning, content, _ = self._parser_engine._single_pass_parse(
            model_output, self.output_token_ids, initial_state=self._initial
        )
        return reasoning, content

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        inside = self._initial is ParserState.REASONING
        count = 0
        for token_id in token_ids:
            if token_id in (self._start_id, self._end_id):
                inside = token_id == self._start_id
            else:
                count += inside
        return count


class LateText:
    """Token ids of a stream, held back until their text is there.

    Stop strings keep the end of a text back, so that it comes some tokens late, while vLLM's
    scanner looks for the text of special tokens beside their ids. Several tokens in a delta, and it
    takes one for another.

    Args:
        tokenizer: a fast one of transformers; with any other nothing is held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer: Any = getattr(tokenizer, "_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._waiting: deque[tuple[int, str]] = deque()
        self._text = ""

    def add(self, text: str, token_ids: Sequence[int], finished: bool) -> tuple[str, list[int]]:
        """The text and ids of the tokens that are complete with this delta."""
        if self._tokenizer is None:
            return text, list(token_ids)
        self._text += text
        for token_id in token_ids:
            self._waiting.append((token_id, self._piece(token_id)))
        ready: list[int] = []
        end = 0
        while self._waiting and self._text.startswith(self._waiting[0][1], end):
            token_id, piece = self._waiting.popleft()
            ready.append(token_id)
            end += len(piece)
        if self._waiting and not self._waiting[0][1].startswith(self._text[end:]):
            return self._give_up(ready)  # text that these ids do not spell
        # A stop string cuts the text: what comes after it is no part of the answer.
        end = len(self._text) if finished else end
        done, self._text = self._text[:end], self._text[end:]
        return done, ready

    def _piece(self, token_id: int) -> str:
        """The text that a token adds; none while a character is not whole yet."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # not Unicode: vLLM begins its stream anew as well
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._tokenizer, token_id) or ""

    def _give_up(self, ready: list[int]) -> tuple[str, list[int]]:
        """From here on as it comes."""
        ids = ready + [token_id for token_id, _ in self._waiting]
        text, self._text, self._tokenizer = self._text, "", None
        self._waiting.clear()
        return text, ids


def reading_ids(parser_cls: Any) -> Any:
    """A composed vLLM parser class that hands token ids to an `OuroReasoningParser`."""

    class IdParser(parser_cls):
        _late: LateText | None = None

        def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
            self._reasoning_parser.begin(prompt_token_ids)

        def parse(
            self,
            model_output: str,
            request: Any,
            enable_auto_tools: bool = False,
            model_output_token_ids: Sequence[int] = (),
        ) -> Any:
            self._reasoning_parser.output_token_ids = model_output_token_ids
            return super().parse(model_output, request, enable_auto_tools, model_output_token_ids)

        def parse_delta(
            self,
            delta_text: str,
            delta_token_ids: list[int],
            request: Any,
            prompt_token_ids: list[int] | None = None,
            *,
            finished: bool,
        ) -> Any:
            state, reasoning = self._stream_state, self._reasoning_parser
            if not state.prompt_reasoning_checked and prompt_token_ids is not None:
                # vLLM's own check would end the reasoning phase here for every prompt without an
                # open tag, and a tag that the model writes itself would be content.
                state.prompt_reasoning_checked = True
                reasoning.begin(prompt_token_ids)
                reasoning.tools_follow = (
                    self._tool_parser is not None
                    and bool(request.tools)
                    and request.tool_choice != "none"
                )
            if self._late is None:
                self._late = LateText(reasoning.model_tokenizer)
            text, ids = self._late.add(delta_text, delta_token_ids, finished)
            return super().parse_delta(text, ids, request, prompt_token_ids, finished=finished)

    is_ours = issubclass(parser_cls.reasoning_parser_cls or object, OuroReasoningParser)
    return IdParser if is_ours else parser_cls
