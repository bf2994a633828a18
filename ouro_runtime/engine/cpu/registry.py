"""Seam: what vLLM asks of a model class before it serves it is asked in this process on CPU.

vLLM imports the class in a process of its own, seconds at the first start ever, so that nothing
touches a GPU too early; on CPU there is none.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from vllm.model_executor.models import registry

from ouro_runtime.engine.pin import check_parameters

check_parameters(registry._run_in_subprocess, "fn")


class HereInspected(registry._LazyRegisteredModel):
    """A model registered by name, imported where it is asked about."""

    def inspect_model_cls(self) -> Any:
        with mock.patch.object(registry, "_run_in_subprocess", lambda fn: fn()):
            return super().inspect_model_cls()


def register_model(architecture: str, model: str, on_cpu: bool) -> None:
    """Serve `model` ("module:class") for configs that name `architecture`."""
    known = registry.ModelRegistry
    known.register_model(architecture, model)
    if on_cpu:
        known.models[architecture] = HereInspected(*model.split(":"))
