"""Stand-in fill: a leaving row's K/V into the deeper loops' pages, all layers in one launch."""

from collections.abc import Sequence

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import check, check_optional, require


class CacheTable:
    """The K and V views of all layers, and their addresses as one device tensor.

    Views [pages, block_size, Hkv, D] of any strides, the same for every layer, D dense. Build it
    once, after the caches are bound: building copies the addresses to the device. The table keeps
    the views alive; it must not outlive the memory behind them: a re-bound cache needs a new table.
    """

    def __init__(self, k_caches: Sequence[torch.Tensor], v_caches: Sequence[torch.Tensor]) -> None:
        require(len(k_caches) > 0, "k_caches", "needs at least one layer")
        same_count = len(v_caches) == len(k_caches)
        require(same_count, "v_caches", f"{len(v_caches)} layers, k_caches {len(k_caches)}")
        first = k_caches[0]
        for name, caches, model in (
            ("k_caches", k_caches, first),
            ("v_caches", v_caches, v_caches[0]),
        ):
            for layer, cache in enumerate(caches):
                label = f"{name}[{layer}]"
                check(label, cache, (None, *first.shape[1:]), first.dtype, first.device)
                alike = cache.stride() == model.stride()
                require(alike, label, f"strides {cache.stride()}, layer 0 has {model.stride()}")
        self.k_caches, self.v_caches = list(k_caches), list(v_caches)
        pairs = zip(self.k_caches, self.v_caches, strict=True)
        addresses = [[k.data_ptr(), v.data_ptr()] for k, v in pairs]
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=first.device)
        width = first.element_size()
        strides = (*first.stride()[:3], *v_caches[0].stride()[:3])
        jumps = [address for pair in addresses for address in pair]
        jumps += [stride * width for stride in strides]
        # 16-byte accesses need every address, and every step between rows, on a 16-byte boundary.
        self.aligned = all(jump % 16 == 0 for jump in jumps)


def standin_fill(
    table: CacheTable,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    loop: torch.Tensor,
    copies: torch.Tensor,
    row_to_request: torch.Tensor | None = None,
) -> None:
    """Copy, in every layer, the K/V at a leaving row's slot to its deeper loops' pages.

    slot_mapping [N] int64, positions [N] int64 and loop [N] int32 are those of the pass that rows
    leave: loop = depth - 1. Targets are the same position of the same request (`row_to_request`
    int32 [N]; default the row's number) in the pages that block_table [T, R, max_blocks] int32 has
    for loops loop + 1 .. loop + copies (int32 [N]; 0 or less for rows that stay). Where that is the
    row's own page, and for rows with a negative slot, nothing is written.
    """
    device = table.addresses.device
    check("slot_mapping", slot_mapping, (None,), torch.int64, device)
    rows = slot_mapping.shape[0]
    check("block_table", block_table, (None, None, None), torch.int32, device)
    check("positions", positions, (rows,), torch.int64, device)
    check("loop", loop, (rows,), torch.int32, device)
    check("copies", copies, (rows,), torch.int32, device)
    check_optional("row_to_request", row_to_request, (rows,), torch.int32, device)
    backend("standin_fill", slot_mapping).standin_fill(
        table, block_table, slot_mapping, positions, loop, copies, row_to_request
    )
