"""vLLM's list of models, with the aliases of adapters (see `serving.py`)."""

from typing import Any

from ouro_server.served import ServedDepth
from ouro_server.vllm_api import OpenAIServingModels


class DepthServingModels(OpenAIServingModels):
    """The list of models. An adapter that is loaded has an alias for every preset."""

    depth: ServedDepth

    async def show_available_models(self) -> Any:
        shown = await super().show_available_models()
        aliases = [
            card.model_copy(update={"id": f"{card.id}@{preset}"})
            for card in shown.data
            if card.id in self.depth.adapters
            for preset in self.depth.book.presets
        ]
        shown.data.extend(alias for alias in aliases if self.depth.alias(alias.id))
        return shown
