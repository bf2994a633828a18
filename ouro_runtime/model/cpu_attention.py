"""Seam: vLLM's CPU attention kernels, both in one operation per layer and pass.

vLLM's own way is two operations a layer, each of which looks up the layer, its metadata and its
slots and takes a view of the cache. Between two passes over a model's weights that code has left
the processor's caches, and at small batches it shows. Nothing of it changes from one layer to the
next: here a pass's metadata is one object, and the views are made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from ouro_runtime.cache.standin import fill, probe_layout, raw

LIBRARY = torch.library.Library("ouro", "FRAGMENT")


@dataclass
class Cells:
    """What attention needs to know of a pass, in every layer.

    Attributes:
        attention: vLLM's metadata. debts: [D, 3] int64, as `StandIns.due` returns them.
        seconds: what filling stand-ins took so far.
    """

    attention: CPUAttentionMetadata
    debts: np.ndarray
    seconds: float = 0.0


class CellAttention:
    """The views of one layer's cache, and attention on them.

    Args:
        layer: vLLM's attention layer; it is not kept.
        pages: [num_pages, kv_heads, block_size, 2 * head_size].
    """

    def __init__(self, layer: Any, pages: torch.Tensor) -> None:
        impl = layer.impl
        assert type(impl) is CPUAttentionBackendImpl, type(impl)
        assert layer.query_quant is None, "this backend takes queries as they are"
        assert impl.sinks is None and impl.alibi_slopes is None, "Ouro has neither"
        count, heads, block_size, _ = pages.shape
        self.keys, self.values = pages.view(count, heads, 2 * block_size, -1).chunk(2, dim=2)
        self._raw = raw(pages)

        def write(
            key: torch.Tensor, value: torch.Tensor, page: torch.Tensor, slot: torch.Tensor
        ) -> None:
            impl.do_kv_cache_update(layer, key, value, page, slot)

        self._places = probe_layout(write, block_size, layer.head_size, pages.dtype).numpy()
        fill(self._raw, self._places, np.zeros((0, 3), np.int64))  # compiles

    def __call__(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        cells: Cells,
    ) -> None:
        """Fill stand-ins, write K and V of the pass's cells, attend; the rest as `attend_cells`."""
        if len(cells.debts):
            began = perf_counter()
            fill(self._raw, self._places, cells.debts)
            cells.seconds += perf_counter() - began
        impl, metadata = layer.impl, cells.attention
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            self.keys,
            self.values,
            metadata.slot_mapping,
            layer.isa,
            layer._k_scale_float,
            layer._v_scale_float,
            impl.kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.keys,
            value_cache=self.values,
            output=output,
            query_start_loc=metadata.query_start_loc,
            seq_lens=metadata.seq_lens,
            scale=impl.scale,
            causal=metadata.causal,
            alibi_slopes=None,
            sliding_window=impl.sliding_window,
            block_table=metadata.block_table,
            softcap=impl.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            s_aux=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=impl.kv_cache_dtype,
        )


def attend_cells(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """One layer's attention of a pass's N cells.

    Args:
        query, output: [N, heads, head_size]. key, value: [N, kv_heads, head_size].
        layer_name: of a layer with a `CellAttention`.
    """
    context = get_forward_context()
    if context.attn_metadata:  # nothing while vLLM warms up
        layer = context.no_compile_layers[layer_name]
        layer.attend(layer, query, key, value, output, context.attn_metadata)


def _shapes_only(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """For tracing."""


direct_register_custom_op(
    op_name="attend_cells",
    op_func=attend_cells,
    mutates_args=["output"],
    fake_impl=_shapes_only,
    target_lib=LIBRARY,
    dispatch_key="CPU",
)
