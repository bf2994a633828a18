"""The `vllm.endpoint_plugins` entry point: our routes and handlers on vLLM's OpenAI app."""

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from ouro_runtime.config import DepthError, LoopConfig
from ouro_server.errors import handle_depth_error
from ouro_server.ready import announce_when_ready
from ouro_server.routes import build_router, guard_others
from ouro_server.serving import (
    DepthServingChat,
    DepthServingCompletion,
    DepthServingResponses,
    adopt,
    read_token_ids,
)

PARSING = (
    "openai_serving_chat",
    "openai_serving_chat_batch",
    "openai_serving_responses",
    "anthropic_serving_messages",
)
"""Handlers on vLLM's app state that split reasoning from the answer."""


class DepthEndpoints:
    """vLLM's `EndpointPlugin`: depth on chat completions, completions and Responses."""

    name = "ouro_depth"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Replace vLLM's routes; vLLM drops its own of the same path and method."""
        app.state.depth_config = None
        app.add_exception_handler(DepthError, handle_depth_error)  # type: ignore[arg-type]
        app.include_router(build_router())
        guard_others(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put depth on the handlers vLLM built, if the served model has loops."""
        vllm_config = engine_client.vllm_config
        if getattr(vllm_config.model_config.hf_config, "total_ut_steps", None) is None:
            return
        config = LoopConfig.of(vllm_config)
        state.depth_config = config
        state.depth_model = state.openai_serving_models.base_model_paths[0].name
        state.openai_serving_chat = adopt(state.openai_serving_chat, DepthServingChat, config)
        state.openai_serving_completion = adopt(
            state.openai_serving_completion, DepthServingCompletion, config
        )
        state.openai_serving_responses = adopt(
            state.openai_serving_responses, DepthServingResponses, config
        )
        for name in PARSING:
            read_token_ids(getattr(state, name))
        if vllm_config.parallel_config._api_process_rank == 0:
            # Kept on the state: the event loop holds only a weak reference to a task.
            state.ready_task = asyncio.create_task(announce_when_ready(state, args))
