"""Seam: how depths travel from the engine core to the API process, and where they come out.

`EngineCoreOutput` has no room for what a plugin adds, so depths ride in `routed_experts`, an array
per output that only mixture-of-experts models fill: here the tokens' notes (`step_output.py`). vLLM
already trims it to the tokens kept when a stop string is found. What a step's passes did rides in
an output for a request id that nobody has; vLLM drops it, we read it on the way.

In the API process `install()` makes every `CompletionOutput` carry `depths`, `loops_run`, `drafts`,
`drafts_dropped` and `exit_cdf`, aligned with `token_ids`, and `loops`, which is empty unless the
request asked for it; and `IterationStats` carry `ouro`, a `DepthReport`, for the metrics.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from ouro_runtime.config import DepthError, LoopConfig
from ouro_runtime.engine import features, guesses
from ouro_runtime.engine.admission import hold_to_pool
from ouro_runtime.engine.config_hook import runs_on_cpu
from ouro_runtime.engine.pin import SeamError, check_parameters
from ouro_runtime.engine.step_output import COUNTS, unpack_cdf
from ouro_runtime.pace import Pace
from ouro_runtime.reports import PARTS, Delivery, DepthReport, Finished, StepReport

REPORT_ID = "ouro-step-report"
AUDIT_ID = "ouro-audit-"
"""How the ids of requests begin that are the server's own: no statistics count them."""
OF_TOKENS = (*COUNTS, "exit_cdf", "loops")
"""What a `CompletionOutput` says of its tokens, beside their ids."""


def pack_report(report: StepReport) -> EngineCoreOutput:
    """An output that no request owns; `unpack_report` says what its numbers are."""
    numbers = [
        report.tokens,
        len(report.pass_rows),
        len(report.kv_pages),
        *(round(1e6 * report.seconds.get(part, 0.0)) for part in PARTS),
        *report.pass_rows,
        *report.kv_pages,
        *report.rows_by_loop,
    ]
    return EngineCoreOutput(REPORT_ID, [], routed_experts=np.array(numbers, np.int64))


def unpack_report(numbers: np.ndarray) -> StepReport:
    """The inverse of `pack_report`, with times to a microsecond."""
    tokens, passes, loops, *rest = numbers.tolist()
    micros, rest = rest[: len(PARTS)], rest[len(PARTS) :]
    return StepReport(
        pass_rows=rest[:passes],
        kv_pages=rest[passes : passes + loops],
        rows_by_loop=rest[passes + loops :],
        tokens=tokens,
        seconds={part: 1e-6 * value for part, value in zip(PARTS, micros, strict=True)},
    )


def is_ouro(vllm_config: Any) -> bool:
    """Whether the served model is run by this plugin."""
    model = vllm_config.model_config
    return model is not None and model.architecture == "OuroForCausalLM"


def install() -> None:
    """Wrap vLLM's classes of the API process, once per process."""
    if getattr(OutputProcessor, "_ouro_installed", False):
        return
    check_parameters(InputProcessor.process_inputs, "params", "resumable")
    check_parameters(InputProcessor.process_inputs, "priority", "lora_request")
    check_parameters(InputProcessor.resolve_watermarking, "params")
    check_parameters(OutputProcessor.process_outputs, "engine_core_outputs", "iteration_stats")
    check_parameters(RequestState._new_completion_output, "token_ids", "finish_reason")
    check_parameters(RequestOutput.add, "next_output", "aggregate")
    if "routed_experts_chunks" not in RequestState.__init__.__code__.co_names:
        raise SeamError("RequestState no longer collects routed_experts_chunks")
    check_parameters(convert_ids_list_to_tokens, "tokenizer", "token_ids")
    if "tokenizer" not in LogprobsProcessor.__dataclass_fields__:
        raise SeamError("LogprobsProcessor no longer has a tokenizer")
    _validate_requests()
    _read_reports()
    _attach_depths()
    _merge_depths()
    OutputProcessor._ouro_installed = True


def _validate_requests() -> None:
    """What a request asks for and would not get is refused before it reaches the engine."""
    process_inputs = InputProcessor.process_inputs
    signature = inspect.signature(process_inputs)

    def checked(self: Any, request_id: str, prompt: Any, params: Any, *a: Any, **k: Any) -> Any:
        if isinstance(params, SamplingParams) and is_ouro(self.vllm_config):
            given = signature.bind(self, request_id, prompt, params, *a, **k).arguments
            features.check(
                params,
                LoopConfig.of(self.vllm_config),
                resumable=bool(given.get("resumable")),
                open_args=bool(self.vllm_config.model_config.logits_processors),
                on_cpu=runs_on_cpu(self.vllm_config),
                unheard_priority=bool(given.get("priority"))
                and self.vllm_config.scheduler_config.policy != "priority",
            )
        request = process_inputs(self, request_id, prompt, params, *a, **k)
        if is_ouro(self.vllm_config) and request.lora_request is not None:
            # vLLM's prefix cache knows an adapter by its name and path, which another id may have
            # again, with other weights.
            request.cache_salt = f"{request.cache_salt or ''}@{request.lora_request.lora_int_id}"
        if is_ouro(self.vllm_config):
            config, parallel = self.vllm_config, self.vllm_config.parallel_config
            hold_to_pool(
                request,
                LoopConfig.of(config),
                config.cache_config,
                engines=parallel.data_parallel_size,
                max_model_len=config.model_config.max_model_len,
            )
        return request

    InputProcessor.process_inputs = checked

    resolve_watermarking = InputProcessor.resolve_watermarking

    def refusing(self: Any, params: Any) -> bool:
        """vLLM warns in the log, and samples without a watermark."""
        if params.watermarking and is_ouro(self.vllm_config):
            raise DepthError("watermarking", features.NO_WATERMARK)
        return resolve_watermarking(self, params)

    InputProcessor.resolve_watermarking = refusing


def _read_reports() -> None:
    """Collect what an iteration brought in `IterationStats.ouro`."""
    process_outputs = OutputProcessor.process_outputs

    def reading(
        self: Any,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: Any = None,
        *a: Any,
        **k: Any,
    ) -> Any:
        report = DepthReport()
        self._ouro_report = report
        own = [o for o in engine_core_outputs if o.request_id == REPORT_ID]
        if own:
            engine_core_outputs = [o for o in engine_core_outputs if o.request_id != REPORT_ID]
            report.steps = [unpack_report(o.routed_experts) for o in own]
        engine_core_outputs, audits = _apart(self, engine_core_outputs)
        states = {
            o.request_id: self.request_states.get(o.request_id)
            for o in engine_core_outputs
            if o.routed_experts is not None
        }
        before = {i: len(_notes(s).depths) for i, s in states.items() if s is not None}
        result = process_outputs(
            self, engine_core_outputs, engine_core_timestamp, iteration_stats, *a, **k
        )
        if audits:
            quiet = process_outputs(self, audits, engine_core_timestamp, None, *a, **k)
            result.request_outputs += quiet.request_outputs
            result.reqs_to_abort += quiet.reqs_to_abort
        if iteration_stats is not None:
            now = time.monotonic()
            for request_id, count in before.items():
                state = states[request_id]
                notes = _notes(state)
                depths = notes.depths[count:]
                report.depths += depths
                report.loops_run += notes.loops_run[count:]
                report.drafts += notes.drafts[count:]
                report.drafts_dropped += sum(notes.drafts_dropped[count:])
                if depths:
                    seconds = notes.pace.deliver(now, len(depths))
                    if seconds is not None:
                        report.deliveries.append(Delivery(request_id, seconds, len(depths)))
                if request_id not in self.request_states:
                    total, tokens = sum(notes.depths), len(notes.depths)
                    report.finished.append(Finished(total, tokens, notes.pace.seconds_per_token))
            iteration_stats.ouro = report
        return result

    OutputProcessor.process_outputs = reading


def _apart(
    processor: Any, outputs: list[EngineCoreOutput]
) -> tuple[list[EngineCoreOutput], list[EngineCoreOutput]]:
    """Users' outputs, and those of audits. A processor that traces needs statistics of all."""
    if processor.tracing_enabled or not any(o.request_id.startswith(AUDIT_ID) for o in outputs):
        return outputs, []
    users = [o for o in outputs if not o.request_id.startswith(AUDIT_ID)]
    return users, [o for o in outputs if o.request_id.startswith(AUDIT_ID)]


@dataclass
class _Notes:
    """What is known of a request's tokens so far, beside their ids; one entry per token, in `loops`
    none unless the request asked."""

    depths: list[int] = field(default_factory=list)
    loops_run: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    drafts_dropped: list[int] = field(default_factory=list)
    exit_cdf: list[list[float]] = field(default_factory=list)
    loops: list[list[list[dict[str, Any]]]] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)


def _notes(state: Any) -> _Notes:
    """The notes of a `RequestState`, with the chunks that it collected since the last call."""
    if not hasattr(state, "_ouro_notes"):
        state._ouro_notes = _Notes()
    notes = state._ouro_notes
    for packed in state.routed_experts_chunks:
        for place, name in enumerate(COUNTS):
            getattr(notes, name).extend(packed[:, place].tolist())
        notes.exit_cdf += unpack_cdf(packed)
        notes.loops += [
            [_with_texts(state, loop) for loop in token] for token in guesses.unpack(packed)
        ]
    state.routed_experts_chunks = []
    return notes


def _with_texts(state: Any, pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
    """A loop's guesses, likeliest first; texts are None without a tokenizer."""
    tokenizer = state.logprobs_processor.tokenizer
    ids = [token for token, _ in pairs]
    texts = [None] * len(ids) if tokenizer is None else convert_ids_list_to_tokens(tokenizer, ids)
    return [
        {"token": text, "token_id": token, "logprob": logprob}
        for text, (token, logprob) in zip(texts, pairs, strict=True)
    ]


def _attach_depths() -> None:
    """Give each CompletionOutput the depths of its tokens, and no routed experts."""
    new_completion_output = RequestState._new_completion_output

    def attaching(self: Any, token_ids: list[int], finish_reason: Any, *a: Any, **k: Any) -> Any:
        notes = _notes(self)
        output = new_completion_output(self, token_ids, finish_reason, *a, **k)
        start = 0
        if self.output_kind == RequestOutputKind.DELTA:
            start = len(notes.depths) - len(output.token_ids)
        for name in OF_TOKENS:
            setattr(output, name, getattr(notes, name)[start:])
        return output

    RequestState._new_completion_output = attaching


def _merge_depths() -> None:
    """Outputs that vLLM aggregates while a client is slow keep the depths of all their tokens."""
    add = RequestOutput.add

    def merging(self: Any, next_output: Any, aggregate: bool) -> None:
        if aggregate:
            held = {o.index: o for o in self.outputs}
            for newer in next_output.outputs:
                older: CompletionOutput | None = held.get(newer.index)
                if older is not None and hasattr(older, "depths"):
                    for name in OF_TOKENS:
                        setattr(older, name, getattr(older, name) + getattr(newer, name))
        add(self, next_output, aggregate)

    RequestOutput.add = merging
