"""`OuroForCausalLM` for vLLM: embedding, looped block, read-out."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from ouro_runtime.model.attention import ON_CPU
from ouro_runtime.model.block import LoopBlock

if ON_CPU:
    from ouro_runtime.model.quantized import check_loaded


class OuroForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """A looped language model. The engine runs the loops; `forward` alone is one pass."""

    hf_to_vllm_mapper = LoopBlock.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.loops = config.total_ut_steps
        self.quantized = vllm_config.quant_config is not None
        self.model = LoopBlock(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [N, H] of token ids [N]; no scaling."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass from the embeddings: what vLLM's warm-up runs. Returns [N, H]."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, _ = self.model(hidden, positions)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [M, vocab] of normed states [M, H] of any loop."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = AutoWeightsLoader(self).load_weights(weights)
        if ON_CPU and self.quantized:
            check_loaded(self)
        return loaded
