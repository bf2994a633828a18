"""What the server logs of its own, beside what vLLM's app brings along."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from vllm.entrypoints.serve.sagemaker.api_router import attach_router

from ouro_server.audit import auditor


def test_warnings_are_heard_beside_the_routes_of_sagemaker() -> None:
    level = logging.root.level
    attach_router(FastAPI(), ("generate",))
    try:
        assert not logging.getLogger("another").isEnabledFor(logging.WARNING)
        assert auditor.logger.isEnabledFor(logging.WARNING)
    finally:
        logging.root.setLevel(level)
