"""The model as the V2 runner sees it: `forward` runs a whole step, where there is one."""

from __future__ import annotations

from typing import Any

import torch

from ouro_runtime.engine.cuda.step import LaneStep
from ouro_runtime.model.ouro import OuroForCausalLM


class OuroLaneModel(OuroForCausalLM):
    """`OuroForCausalLM`, registered in its place on CUDA.

    Attributes:
        lane_state: the `OuroModelState` that serves this model; set by it.
    """

    lane_state: Any = None

    @staticmethod
    def get_model_state_cls() -> type:
        """Asked by vLLM after loading."""
        from ouro_runtime.engine.cuda.state import OuroModelState

        return OuroModelState

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
        lane_step: LaneStep | None = None,
    ) -> torch.Tensor:
        """States [N, H]: after the passes of `lane_step`, else after one pass from the embeddings.

        One pass is what vLLM profiles, warms up and captures; it works in the buffers that a step's
        passes use, since captured pieces read their inputs from where they were captured.
        """
        if lane_step is not None:
            return lane_step.run()
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if self.lane_state is not None:
            rows, buffers = len(hidden), self.lane_state.buffers
            hidden = buffers.hidden[:rows].copy_(hidden)
            positions = buffers.row_positions[:rows].copy_(positions)
        hidden, _ = self.model(hidden, positions)
        return hidden

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, vocab] of normed states [M, H] of any loop."""
        return super().compute_logits(hidden)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Asked by the runner after a step: logits of what the step left to be sampled.

        At any other time, as in `OuroForCausalLM`.
        """
        if self.lane_state is not None and self.lane_state.stepping:
            return self.lane_state.late_logits()
        return self.read_out(hidden_states)
