"""Seam: all that a request may ask of vLLM, and who sees to it in a looped engine.

Each field of vLLM's request is on one of these lists. One that vLLM grows is on none, and importing
this fails: it must be decided where it is honoured, or that it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from ouro_runtime.config import (
    DEPTH_FIELDS,
    FORCED,
    GATE,
    RETURN_LOOPS,
    RULE,
    DepthError,
    LoopConfig,
    check_guesses,
)
from ouro_runtime.engine.pin import SeamError

SAMPLING = {
    "the sampler, row by row": """
        presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed
        logprobs logprob_token_ids logit_bias allowed_token_ids _bad_words_token_ids min_tokens
        structured_outputs thinking_token_budget _all_stop_token_ids
    """,
    "the step's planner": """
        max_tokens stop_token_ids ignore_eos _eos_token_id extra_args
    """,
    "vLLM's scheduler, on the tokens of a step": """
        repetition_detection skip_reading_prefix_cache
    """,
    "vLLM's runner, on a prompt's last states": """
        prompt_logprobs prompt_logprob_token_ids prompt_logprob_start
    """,
    "the API process, on what the engine delivers": """
        n stop detokenize skip_special_tokens spaces_between_special_tokens bad_words
        include_stop_str_in_output output_kind stream_interval flat_logprobs skip_clone
        output_text_buffer_length
    """,
    "nobody: it needs a server option that config_hook.refuse refuses": """
        _watermarking_skipped trace_decode_token_ids routed_experts_prompt_start
    """,
    "nobody: it is refused (outputs.py)": """
        watermarking
    """,
}
"""Fields of `SamplingParams` by who honours them."""

REQUEST = {
    "honoured": """
        request_id prompt_token_ids sampling_params arrival_time cache_salt data_parallel_rank
        client_index current_wave priority trace_headers external_req_id reasoning_ended
        reasoning_parser_kwargs abort_immediately session_id kv_hints lora_request
    """,
    "refused": """
        pooling_params prompt_embeds prompt_is_token_ids mm_features resumable
    """,
}
"""Fields of `EngineCoreRequest`; what is refused is so by the server's configuration (see
`config_hook.refuse`), or by `check`."""

TRANSFER = ("kv_transfer_params", "ec_transfer_params")
OWN = (*DEPTH_FIELDS, FORCED, RETURN_LOOPS)
NO_PRIORITY = "priority has no effect without --scheduling-policy priority; leave it out, or 0"
NO_WATERMARK = "watermarking is not supported: tokens are sampled without watermarks here"
VLLMS = ("kv_cache_report_mode",)
"""Keys of `extra_args`: for connectors, ours, and what vLLM's prefix cache reads."""


def check(
    params: Any,
    config: LoopConfig,
    *,
    resumable: bool,
    open_args: bool,
    on_cpu: bool,
    unheard_priority: bool = False,
) -> None:
    """Refuse what a request asks for and would not get.

    Args:
        params: vLLM's `SamplingParams`. config: the model's loops.
        resumable: whether the prompt may grow while the request runs.
        open_args: whether a logits processor of the user's may read other keys of `extra_args`.
        on_cpu: whether it is the CPU engine, which reads out what each loop left; on CUDA nothing
            comes back between two passes.
        unheard_priority: whether it has a priority that the scheduler does not ask for; vLLM says
            of its field that this is an error, and takes it.

    Raises:
        DepthError: naming the field.
    """
    if resumable:
        raise DepthError(
            "prompt",
            "streaming input is not supported: a prompt that grows would keep the K/V of answers, "
            "which not every loop has",
        )
    if unheard_priority:
        raise DepthError("priority", NO_PRIORITY)
    extra: Mapping[str, Any] = params.extra_args or {}
    for name in extra:
        if name in TRANSFER:
            raise DepthError(name, f"{name} is not supported: K/V is not transferred")
        if name not in (*OWN, *VLLMS) and not open_args:
            known = ", ".join(OWN)
            raise DepthError(str(name), f"unknown field {name!r} in extra_args; known are {known}")
    if extra.get(RETURN_LOOPS) is not None:
        check_guesses(extra[RETURN_LOOPS])
        if not on_cpu:
            raise DepthError(RETURN_LOOPS, f"{RETURN_LOOPS} is not supported on CUDA yet")
    asked = config.request(extra)
    if asked.exit_rule != GATE and not on_cpu:
        text = f"{RULE} {asked.exit_rule!r} is not supported on CUDA yet, only {GATE!r}"
        raise DepthError(RULE, text)


def check_lists(kind: str, lists: Mapping[str, str], found: tuple[str, ...]) -> None:
    """Raise SeamError unless each field of vLLM's class is on exactly one list."""
    known = [name for names in lists.values() for name in names.split()]
    new, gone = set(found) - set(known), set(known) - set(found)
    if new or gone or len(known) != len(set(known)):
        raise SeamError(f"{kind} of vLLM has new fields {sorted(new)}, and not {sorted(gone)}")


check_lists("SamplingParams", SAMPLING, SamplingParams.__struct_fields__)
check_lists("EngineCoreRequest", REQUEST, EngineCoreRequest.__struct_fields__)
