"""Seam: vLLM's block tables of all loops as one array on the device, in memory that never moves."""

from __future__ import annotations

from typing import Any

import torch


def join(block_tables: Any) -> torch.Tensor:
    """[T, max requests, B] int32: what vLLM gathers for a batch from the block tables of its
    groups. They are parts of it from now on.

    Args:
        block_tables: vLLM's `BlockTables`.
    """
    parts = block_tables.input_block_tables
    joined = torch.zeros(len(parts), *parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    block_tables.input_block_tables = list(joined.unbind())
    block_tables.init_block_table_layout_tensors()
    return joined


def share(
    joined: torch.Tensor, slots: torch.Tensor, requests: torch.Tensor, rows: torch.Tensor
) -> None:
    """Let every loop of some requests of a batch have the pages of the last one (`shared`).

    Args:
        joined: see `join`. slots: [T, N] int64, of the batch's rows by loop.
        requests, rows: [M] int64, their lines in the tables, and their rows.
    """
    joined[:-1, requests] = joined[-1, requests]
    slots[:-1, rows] = slots[-1, rows]
