"""vLLM's list of models, with the aliases of adapters (see `serving.py`)."""

from copy import copy
from pathlib import Path
from typing import Any

from ouro_server.served import ServedDepth
from ouro_server.vllm_api import OpenAIServingModels


class DepthServingModels(OpenAIServingModels):
    """The list of models. An adapter that is loaded has an alias for every preset."""

    depth: ServedDepth

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        """As vLLM, whose prefix cache knows an adapter by its name and folder: what a folder holds
        by now may be another one, so each time it is written in another way."""
        name, place = request.lora_name, request.lora_path
        if Path(place).expanduser().is_dir():
            place = spelled(place, self.depth.loads[name, place])
            self.depth.loads[name, request.lora_path] += 1
        asked = copy(request)
        asked.lora_path = place
        return await super().load_lora_adapter(asked, base_model_name)

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


def spelled(folder: str, number: int) -> str:
    """A folder's path, written as no other number has it; itself for 0."""
    return folder + (f"{number:b}".replace("0", "/.").replace("1", "//.") if number else "")
