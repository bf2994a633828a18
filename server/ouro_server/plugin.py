"""The `vllm.endpoint_plugins` entry point: our routes and handlers on vLLM's OpenAI app."""

import asyncio
import os
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from ouro_runtime.config import DepthError, LoopConfig
from ouro_runtime.engine.config_hook import reads_loops
from ouro_runtime.engine.stat_logger import listen
from ouro_server.agreement import Agreement, Rule
from ouro_server.audit.start import start_audits
from ouro_server.controller import Law
from ouro_server.depth_routes import build_depth_router
from ouro_server.door import open_door
from ouro_server.draining import (
    Drain,
    Draining,
    build_readiness_router,
    stop_when_drained,
    take_signals,
)
from ouro_server.errors import handle_depth_error
from ouro_server.fallback import complete_requests
from ouro_server.honest_status import HonestStatus
from ouro_server.metrics import ServerMetrics
from ouro_server.playground import attach_playground
from ouro_server.presets import SHIPPED, PresetBook
from ouro_server.ready import announce, until_serving
from ouro_server.routes import ask_for_key, build_router, drop_elastic, guard_others
from ouro_server.served import ServedDepth
from ouro_server.serving import (
    DepthServingBatch,
    DepthServingChat,
    DepthServingCompletion,
    adopt,
    read_token_ids,
)
from ouro_server.serving_messages import DepthServingMessages
from ouro_server.serving_models import DepthServingModels
from ouro_server.serving_responses import DepthServingResponses
from ouro_server.settings import Targets
from ouro_server.steering import Steering
from ouro_server.vllm_api import BaseModelPath

HANDLERS = {
    "openai_serving_chat": DepthServingChat,
    "openai_serving_chat_batch": DepthServingBatch,
    "openai_serving_completion": DepthServingCompletion,
    "openai_serving_responses": DepthServingResponses,
    "anthropic_serving_messages": DepthServingMessages,
}
"""vLLM's handlers on its app's state, and what becomes of them."""

PARSING = [name for name in HANDLERS if name != "openai_serving_completion"]
"""Those that split reasoning from the answer."""


class DepthEndpoints:
    """vLLM's `EndpointPlugin`: depth on chat completions, completions and Responses."""

    name = "ouro_depth"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Replace vLLM's routes; vLLM drops its own of the same path and method."""
        app.state.depth = None
        app.add_exception_handler(DepthError, handle_depth_error)  # type: ignore[arg-type]
        app.state.drain = Drain()
        app.add_middleware(HonestStatus)
        app.add_middleware(Draining, drain=app.state.drain)
        app.include_router(build_router())
        app.include_router(build_depth_router())
        app.include_router(build_readiness_router(app.state.drain))
        guard_others(app)
        drop_elastic(app)
        attach_playground(app)
        ask_for_key(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put depth on the handlers vLLM built, if the served model has loops."""
        if engine_client is None:  # vLLM's server that only renders
            return
        generate = engine_client.generate
        door = open_door(engine_client, await engine_client.get_supported_tasks())
        note_exits(engine_client, args)
        vllm_config = engine_client.vllm_config
        # Kept on the state: the event loop holds only a weak reference to a task.
        state.serving_task = asyncio.create_task(serve(state, args, vllm_config))
        if getattr(vllm_config.model_config.hf_config, "total_ut_steps", None) is None:
            return
        config = LoopConfig.of(vllm_config)
        book = PresetBook.load(getattr(args, "presets", SHIPPED), config.loops)
        models = state.openai_serving_models
        names = [base.name for base in models.base_model_paths]
        fixed = why_fixed(args, vllm_config.parallel_config._api_process_count)
        metrics = ServerMetrics(
            vllm_config.model_config.served_model_name, config.loops, book.presets, book.floors
        )
        served = ServedDepth.of(config, book, names, fixed)
        metrics.watch(served.defaults)
        steering = start_steering(engine_client, args, served, metrics)
        known = not vllm_config.model_config.logits_processors
        served = replace(
            served,
            metrics=metrics,
            steering=steering,
            reads_loops=reads_loops(),
            audit_share=targets_of(args).audit,
            known_xargs=known,
            adapters=models.lora_requests,
            loads=Counter((one.lora_name, one.lora_path) for one in models.lora_requests.values()),
        )
        state.depth = served
        if steering is not None:
            # Kept on the state: the event loop holds only a weak reference to a task.
            state.steering_task = asyncio.create_task(steering.run())
        if served.audit_share:
            auditor = start_audits(engine_client, generate, served)
            await auditor.warm_up()
            state.audit_task = asyncio.create_task(auditor.run(state.drain.told))
        list_aliases(models, served)
        state.openai_serving_models = adopt(models, DepthServingModels, served)
        complete_requests(engine_client, served)
        for name, handler in HANDLERS.items():
            setattr(state, name, adopt(getattr(state, name), handler, served))
        state.openai_serving_responses.door = door
        for name in PARSING:
            read_token_ids(getattr(state, name))


async def serve(state: State, args: Namespace, vllm_config: Any) -> None:
    """From when the HTTP server accepts connections until it was told to stop."""
    await until_serving(state)
    processes = vllm_config.parallel_config
    grace = vllm_config.shutdown_timeout
    if processes._api_process_count > 1:
        # vLLM's first process ends this one when the time is up.
        grace = max(0, grace - 1)
    take_signals(state.drain)
    if state.depth is not None and processes._api_process_rank == 0:
        announce(state, args)
    await stop_when_drained(state, grace)


def note_exits(engine_client: Any, args: Namespace) -> None:
    """Let `args.engine_exits` be the statuses of engine processes that were gone before they were
    told to go; the attribute is there as soon as the server serves."""
    args.engine_exits = []
    core = getattr(engine_client, "engine_core", None)
    resources, shutdown = getattr(core, "resources", None), getattr(engine_client, "shutdown", None)
    if resources is None or shutdown is None:
        return  # no engine in another process

    def noting(*given: Any, **options: Any) -> None:
        engine_client.shutdown = shutdown
        if resources.engine_dead and resources.engine_manager is not None:
            args.engine_exits += [p.exitcode for p in resources.engine_manager.processes]
        shutdown(*given, **options)

    engine_client.shutdown = noting


def targets_of(args: Namespace) -> Targets:
    """What the command line asks to hold; nothing on a server that was not started by it."""
    targets: Targets = getattr(args, "targets", Targets())
    return targets


def start_steering(
    engine_client: Any, args: Namespace, served: ServedDepth, metrics: ServerMetrics
) -> Steering | None:
    """What moves the defaults, listening to the engine; None unless there is a target.

    The command line has refused what cannot be steered (`launch.check_targets`).
    """
    targets, floors, agreement = targets_of(args), served.book.floors, None
    if targets.agreement is not None:
        defaults = served.defaults
        rule = Rule(targets.agreement)
        agreement = Agreement(rule, floors, defaults.base.exit_threshold, defaults.whole)
    if targets.tpot_ms is None and agreement is None:
        return None
    law = None if targets.tpot_ms is None else Law(targets.tpot_ms / 1000)
    steering = Steering(law, served.defaults, floors, metrics, agreement=agreement)
    if law is not None:
        listen(engine_client, steering.hear)
    return steering


def list_aliases(models: Any, served: ServedDepth) -> None:
    """Serve the aliases beside the names that vLLM serves the model under."""
    path = models.base_model_paths[0].model_path
    models.base_model_paths += [BaseModelPath(alias, path) for alias in served.aliases]
    # vLLM's registry, which answers /v1/models and checks names, reads the same list.
    assert all(models.is_base_model(alias) for alias in served.aliases), "aliases are not served"


def why_fixed(args: Namespace, processes: int) -> tuple[int, str] | None:
    """(HTTP status, reason) if defaults must not be changed over HTTP; None if they may."""
    if not any(args.api_key or [os.environ.get("VLLM_API_KEY")]):
        return 403, "defaults can be changed only on a server that was started with --api-key"
    if processes > 1:
        return 409, (
            f"this server has {processes} API processes and a change would reach only one of "
            "them; start it with --api-server-count 1 to change defaults while it serves"
        )
    return None
