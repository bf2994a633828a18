"""The model to beat: a looped model as vLLM 0.26 ran it, on the vLLM of today.

One `Attention` module, and so one K/V cache entry, per (loop, layer); all T loops inside `forward`;
vLLM's own compilation, scheduler and runner. It always runs every loop. Nothing here uses the
engine of this project; only the config class is shared, since the checkpoint format is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

ARCHITECTURE = "OuroBaselineForCausalLM"


class BaselineAttention(nn.Module):
    """Attention of one layer, with T cache entries."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        ranks = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads // ranks
        kv_heads = max(1, config.num_key_value_heads // ranks)
        size = config.head_dim
        self.sizes = [heads * size, kv_heads * size, kv_heads * size]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.layers.{layer}.self_attn.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.layers.{layer}.self_attn.o_proj",
        )
        self.rotary_emb = get_rope(
            size,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        # vLLM finds a cache entry by the one integer in its module's name.
        self.attn = nn.ModuleList(
            Attention(
                heads,
                size,
                size**-0.5,
                num_kv_heads=kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.layers.{loop * config.num_hidden_layers + layer}.self_attn.attn",
            )
            for loop in range(config.total_ut_steps)
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, loop: int) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn[loop](q, k, v))
        return output


class BaselineMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class BaselineLayer(nn.Module):
    """A sandwich-norm layer in vLLM's idiom: residual additions are fused into the norms."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = BaselineAttention(vllm_config, layer, prefix)
        self.mlp = BaselineMLP(vllm_config, f"{prefix}.layers.{layer}.mlp")
        for name in (
            "input_layernorm",
            "input_layernorm_2",
            "post_attention_layernorm",
            "post_attention_layernorm_2",
        ):
            self.add_module(name, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        loop: int,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden, loop)
        hidden = self.input_layernorm_2(hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        hidden = self.mlp(hidden)
        return self.post_attention_layernorm_2(hidden), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class BaselineModel(nn.Module):
    """Embedding and all T loops in one traced forward."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.loops = config.total_ut_steps
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            BaselineLayer(vllm_config, layer, prefix) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for loop in range(self.loops):
            residual = None
            for layer in self.layers:
                hidden, residual = layer(positions, hidden, loop, residual)
            hidden, _ = self.norm(hidden, residual)
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=["early_exit_gate."])
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)


class OuroBaselineForCausalLM(nn.Module):
    """The stock looped model; reads the same checkpoints, without the gate."""

    hf_to_vllm_mapper = BaselineModel.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = BaselineModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
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
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


def register() -> dict[str, list[str]]:
    """Register the baseline with vLLM; returns the `hf_overrides` that select it."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from ouro_runtime.checkpoint_config import OuroConfig

    _CONFIG_REGISTRY["ouro"] = OuroConfig
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{OuroBaselineForCausalLM.__name__}")
    return {"architectures": [ARCHITECTURE]}
