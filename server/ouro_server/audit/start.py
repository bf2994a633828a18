"""Puts audits on an engine client."""

from collections.abc import Callable
from typing import Any

from ouro_server.audit import tap
from ouro_server.audit.auditor import Auditor
from ouro_server.audit.pick import Picker
from ouro_server.audit.room import Room
from ouro_server.served import ServedDepth

LONGEST_BESIDE = 2048
"""Tokens of an audit that may be read beside requests, however much fits into a step."""


def start_audits(engine_client: Any, generate: Callable[..., Any], served: ServedDepth) -> Auditor:
    """An auditor that hears of every request of `engine_client`; its `run` is to be started.

    Args:
        generate: the client's own, which nobody listens to.
        served: with its metrics, and the steering whose agreement the audits are for.
    """
    config = engine_client.vllm_config
    agreement = served.steering.agreement if served.steering else None
    assert served.metrics is not None
    auditor = Auditor(
        generate,
        room_of(config),
        served.metrics.audits,
        served.loops,
        config.model_config.max_model_len,
        agreement,
        served.adapters,
    )
    picker = Picker(
        served.audit_share,
        served.loops,
        served.defaults,
        agreement,
        open_logits=bool(config.model_config.logits_processors),
        raw=config.model_config.logprobs_mode == "raw_logprobs",
    )
    tap.listen(engine_client, picker, auditor)
    return auditor


def room_of(config: Any) -> Room:
    """This API process's share of the engines' seats, and what fits into a step of one beside the
    others' tokens: half of what is scheduled at once."""
    scheduler, parallel = config.scheduler_config, config.parallel_config
    seats = scheduler.max_num_seqs * parallel.data_parallel_size // parallel._api_process_count
    step = min(scheduler.max_num_batched_tokens // 2, LONGEST_BESIDE)
    # vLLM's limit on what a step reads of one prompt, 0 for none.
    most = scheduler.long_prefill_token_threshold or step
    return Room(max(1, seats), min(step, most))
