"""The block over lanes, written with the project's kernels: one row per request.

Mixed batches (prompt chunks) go through vLLM's attention instead, see `cuda/rows.py`. Both read the
same modules and the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ouro_kernels import (
    CacheTable,
    choose_splits,
    loop_decode_attention,
    loop_norm,
    rms_norm,
    rope_kv_write,
    sandwich_norm,
)
from ouro_runtime.engine.cuda.lanes import LaneBuffers

Project = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class LayerParts:
    """A layer's projections (each [N, in] -> [N, out]), norm weights [H] and cache.

    `k_cache`, `v_cache`: [pages, block_size, kv_heads, head_dim]. The scales are fp32 scalars on
    the device for an fp8 cache, else None.
    """

    qkv: Project
    out: Project
    mlp: Project
    before_attention: torch.Tensor
    after_attention: torch.Tensor
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


@dataclass
class BlockParts:
    """The block: its layers, the final norm [H], and the numbers its kernels take.

    `cos_sin`: [positions, head_dim], see `rope_kv_write`. `longest`: positions of a request at
    most; the attention's grid follows from it, so that a captured graph serves every length.
    """

    layers: Sequence[LayerParts]
    final_norm: torch.Tensor
    eps: float
    cos_sin: torch.Tensor
    scale: float
    longest: int

    def cache_table(self) -> CacheTable:
        """The caches of all layers, for `standin_fill`."""
        return CacheTable(
            [layer.k_cache for layer in self.layers], [layer.v_cache for layer in self.layers]
        )


def lane_block(
    parts: BlockParts,
    buffers: LaneBuffers,
    lanes: int,
    block_table: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """One pass over the first `lanes` rows of `buffers.hidden`, in place: normed states after it.

    Every cell writes K/V into its own loop's slot and `fill_copies` deeper ones. Rows without a
    slot neither read nor write K/V; their states mean nothing.

    Args:
        block_table: [T, R, B] int32, by loop, the page of each request's n-th block.
        rows: [lanes] int32, each lane's row of the block table; None: its own number.
    """
    b = buffers
    hidden = b.hidden[:lanes]
    positions, slots = b.positions[:lanes], b.slots[:lanes]
    kv_heads = parts.layers[0].k_cache.shape[2]
    splits = choose_splits(lanes, kv_heads, parts.longest)
    x = rms_norm(hidden, parts.layers[0].before_attention, parts.eps)
    for index, layer in enumerate(parts.layers):
        q = rope_kv_write(
            layer.qkv(x),
            parts.cos_sin,
            positions,
            slots,
            layer.k_cache,
            layer.v_cache,
            layer.k_scale,
            layer.v_scale,
            fill_copies=b.fill_copies[:lanes],
            block_table=block_table,
            loop=b.loop[:lanes],
            row_to_request=rows,
        )
        attended = loop_decode_attention(
            q,
            layer.k_cache,
            layer.v_cache,
            block_table,
            b.loop[:lanes],
            b.seq_lens[:lanes],
            parts.scale,
            rows,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            num_splits=splits,
        )
        x = sandwich_norm(
            layer.out(attended.flatten(1)),
            hidden,
            layer.after_attention,
            layer.before_mlp,
            parts.eps,
        )
        x = layer.mlp(x)
        if index + 1 < len(parts.layers):
            before = parts.layers[index + 1].before_attention
            x = sandwich_norm(x, hidden, layer.after_mlp, before, parts.eps)
    loop_norm(x, hidden, parts.layers[-1].after_mlp, parts.final_norm, parts.eps)


def kv_views(
    cache: torch.Tensor, head_dim: int, fp8: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [pages, block_size, kv_heads, head_dim] of a bound cache.

    Args:
        cache: [pages, kv_heads, block_size, 2 * head_dim], each position's K, then its V.
        fp8: the dtype to read the bytes as, for a quantized cache.
    """
    cache = cache if fp8 is None else cache.view(fp8)
    key, value = cache.transpose(1, 2).split(head_dim, dim=-1)
    return key, value


def parts_of(model: Any, longest: int, fp8: torch.dtype | None) -> BlockParts:
    """The parts of an `OuroForCausalLM` whose caches are bound."""
    block = model.model

    def first(module: Any) -> Project:
        return lambda x: module(x)[0]

    def mlp(module: Any) -> Project:
        # Under vLLM's compilation its activations are plain torch, for the compiler to fuse; here
        # nothing is compiled, so its kernel is called by name.
        def run(x: torch.Tensor) -> torch.Tensor:
            act = module.act.forward_cuda if x.is_cuda else module.act
            return module.down_proj(act(module.gate_up_proj(x)[0]))[0]

        return run

    layers = []
    for layer in block.layers:
        attention = layer.self_attn
        inner = attention.attn
        key, value = kv_views(inner.kv_cache, inner.head_size, fp8)
        layers.append(
            LayerParts(
                qkv=first(attention.qkv_proj),
                out=first(attention.o_proj),
                mlp=mlp(layer.mlp),
                before_attention=layer.input_layernorm.weight.data,
                after_attention=layer.input_layernorm_2.weight.data,
                before_mlp=layer.post_attention_layernorm.weight.data,
                after_mlp=layer.post_attention_layernorm_2.weight.data,
                k_cache=key,
                v_cache=value,
                k_scale=inner._k_scale if fp8 is not None else None,
                v_scale=inner._v_scale if fp8 is not None else None,
            )
        )
    attention = block.layers[0].self_attn
    return BlockParts(
        layers=layers,
        final_norm=block.norm.weight.data,
        eps=block.norm.variance_epsilon,
        cos_sin=attention.rotary_emb.cos_sin_cache.to(block.norm.weight.dtype),
        scale=attention.attn.impl.scale,
        longest=longest,
    )
