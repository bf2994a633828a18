"""Kernels for a pass of the looped block: Triton on CUDA, plain PyTorch elsewhere.

A pass is one application of the block to N rows (cells); a cell is (request, position, loop).
Loops are 0-based everywhere in this package; a depth is a count, so a cell that leaves after
loop t has depth t + 1. A page holds the positions of one block at one loop; the page of request r's
n-th block at loop t is block_table[t, r, n], and a row's slot is page * block_size + offset. Loops
of a request may have one page for all: then each overwrites the last one's K/V. A row whose slot is
negative (or that is not active) is padding: nothing is written for it. No op reads anything back to
the host.
"""

from ouro_kernels.exit_gate import exit_gate
from ouro_kernels.loop_decode_attention import choose_splits, loop_decode_attention
from ouro_kernels.next_pass import next_pass
from ouro_kernels.read_out import read_out
from ouro_kernels.rope_kv_write import rope_kv_write
from ouro_kernels.sandwich_norm import loop_norm, rms_norm, sandwich_norm
from ouro_kernels.standin_fill import CacheTable, standin_fill

__all__ = [
    "CacheTable",
    "choose_splits",
    "exit_gate",
    "loop_decode_attention",
    "loop_norm",
    "next_pass",
    "read_out",
    "rms_norm",
    "rope_kv_write",
    "sandwich_norm",
    "standin_fill",
]
