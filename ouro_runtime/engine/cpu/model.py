"""Seam: the model as vLLM's CPU runner sees it.

The runner asks for logits once a step, when the passes have run and their tokens are sampled: what
it needs then are those of the requests that wait for the host (grammars).
"""

from __future__ import annotations

import torch

from ouro_runtime.engine.cpu.gates import SKIPPED
from ouro_runtime.engine.cpu.step import CPUStep
from ouro_runtime.model.ouro import OuroForCausalLM


class OuroStepModel(OuroForCausalLM):
    """A looped model on CPU.

    Attributes:
        step: the step whose logits the runner asks for next; None once it has, and in runs that
            are no steps (warm-up, log-probabilities of prompts).
    """

    lora_skip_prefixes = (SKIPPED,)
    step: CPUStep | None = None

    def read_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [M, vocab] of normed states [M, H] of any loop."""
        logits = super().compute_logits(hidden_states)
        assert logits is not None
        return logits

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """What the runner asks for."""
        step, self.step = self.step, None
        if step is None:
            return self.read_out(hidden_states)
        return step.deferred_logits(self.config.vocab_size)
