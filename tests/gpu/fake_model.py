"""A golden checkpoint as the modules that the CUDA engine reads, on CPU tensors, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ouro_kernels import loop_decode_attention, loop_norm, rms_norm, rope_kv_write, sandwich_norm
from ouro_runtime.config import OuroConfig
from ouro_runtime.engine.gpu_backend import RowView
from ouro_runtime.engine.gpu_block import BlockParts, parts_of
from ouro_runtime.engine.gpu_lanes import LaneBuffers


class FakeModel:
    """Stands for `OuroLaneModel` with its caches bound.

    Args:
        folder: a golden checkpoint. blocks, block_size: of the cache; it starts as NaN, so that
            whoever reads a slot that nobody wrote is found out.
    """

    def __init__(self, folder: str | Path, blocks: int, block_size: int) -> None:
        folder = Path(folder)
        self.config = OuroConfig(**json.loads((folder / "config.json").read_text()))
        self.w = load_file(str(folder / "model.safetensors"))
        self.loops = self.config.total_ut_steps
        self.lane_state: Any = None
        c = self.config
        shape = (blocks * self.loops, c.num_key_value_heads, block_size, 2 * c.head_dim)
        exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        angle = torch.arange(c.max_position_embeddings)[:, None] / (
            c.rope_parameters["rope_theta"] ** exponent
        )
        self.cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1)
        gate = "model.early_exit_gate"
        self.model = SimpleNamespace(
            layers=[
                self._layer(i, torch.full(shape, torch.nan)) for i in range(c.num_hidden_layers)
            ],
            norm=SimpleNamespace(
                weight=self.w["model.norm.weight"], variance_epsilon=c.rms_norm_eps
            ),
            early_exit_gate=SimpleNamespace(
                weight=self.w[f"{gate}.weight"], bias=self.w[f"{gate}.bias"]
            ),
            embed_tokens=SimpleNamespace(weight=self.w["model.embed_tokens.weight"]),
        )

    def _layer(self, index: int, cache: torch.Tensor) -> Any:
        prefix, c = f"model.layers.{index}", self.config

        def weight(name: str) -> torch.Tensor:
            return self.w[f"{prefix}.{name}.weight"]

        def linear(matrix: torch.Tensor) -> Callable[[torch.Tensor], Any]:
            return lambda x: (x @ matrix.T, None)

        def swiglu(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up

        gate_up = torch.cat([weight(f"mlp.{name}_proj") for name in ("gate", "up")])
        packed = torch.cat([weight(f"self_attn.{name}_proj") for name in "qkv"])
        norms = (
            "input_layernorm",
            "input_layernorm_2",
            "post_attention_layernorm",
            "post_attention_layernorm_2",
        )
        return SimpleNamespace(
            self_attn=SimpleNamespace(
                qkv_proj=linear(packed),
                o_proj=linear(weight("self_attn.o_proj")),
                rotary_emb=SimpleNamespace(cos_sin_cache=self.cos_sin),
                attn=SimpleNamespace(
                    kv_cache=cache,
                    head_size=c.head_dim,
                    kv_cache_dtype="auto",
                    impl=SimpleNamespace(scale=c.head_dim**-0.5),
                ),
            ),
            mlp=SimpleNamespace(
                gate_up_proj=linear(gate_up),
                down_proj=linear(weight("mlp.down_proj")),
                act=swiglu,
            ),
            **{name: SimpleNamespace(weight=weight(name)) for name in norms},
        )

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return self.w["model.embed_tokens.weight"][ids.long()]

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.w["lm_head.weight"].T

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As in `OuroLaneModel`."""
        if self.lane_state.stepping:
            return self.lane_state.late_logits()
        return self.read_out(hidden)

    def parts(self, longest: int) -> BlockParts:
        return parts_of(self, self.loops, longest, None)


class FakeRows:
    """Stands for `RowPasses`: the same passes, each row on its own, by what the metadata says."""

    def __init__(self, model: FakeModel, tables: torch.Tensor) -> None:
        self.parts, self.tables = model.parts(model.config.max_position_embeddings), tables

    def run(self, batch: Any, buffers: LaneBuffers, view: RowView) -> None:
        parts, n = self.parts, view.rows
        first = torch.from_numpy(batch.query_start_loc_np[: batch.num_reqs + 1]).long()
        request = torch.repeat_interleave(torch.arange(batch.num_reqs), first.diff())
        # Row i of a run of q rows reads q - 1 - i positions less than its last row.
        back = first[1:][request] - 1 - torch.arange(n)
        lengths = (view.seq_lens[request] - back).clamp_min(0).to(torch.int32)
        hidden = buffers.hidden[: view.padded]
        pad = view.padded - n
        lengths = F.pad(lengths, (0, pad))
        loop = F.pad(view.loop[request], (0, pad)).to(torch.int32)
        owner = F.pad(request, (0, pad)).to(torch.int32)
        x = rms_norm(hidden, parts.layers[0].before_attention, parts.eps)
        for index, layer in enumerate(parts.layers):
            q = torch.zeros(view.padded, self.heads(layer), layer.k_cache.shape[3])
            rope_kv_write(
                layer.qkv(x),
                parts.cos_sin,
                view.positions,
                view.slots,
                layer.k_cache,
                layer.v_cache,
                q_out=q,
            )
            a = loop_decode_attention(
                q,
                layer.k_cache,
                layer.v_cache,
                self.tables,
                loop,
                # A row without a slot wrote nothing: what it would read of itself is not there.
                torch.where(view.slots >= 0, lengths, 0),
                parts.loops,
                parts.scale,
                row_to_request=owner,
            )
            x = sandwich_norm(
                layer.out(a.flatten(1)), hidden, layer.after_attention, layer.before_mlp, parts.eps
            )
            x = layer.mlp(x)
            if index + 1 < len(parts.layers):
                before = parts.layers[index + 1].before_attention
                x = sandwich_norm(x, hidden, layer.after_mlp, before, parts.eps)
        loop_norm(x, hidden, parts.layers[-1].after_mlp, parts.final_norm, parts.eps)

    def heads(self, layer: Any) -> int:
        width = layer.qkv(torch.zeros(1, layer.before_attention.shape[0])).shape[1]
        return width // layer.k_cache.shape[3] - 2 * layer.k_cache.shape[2]
