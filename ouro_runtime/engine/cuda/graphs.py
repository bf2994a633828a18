"""Seam: CUDA graphs of a step's pieces, one per piece and bucket, in vLLM's graph memory pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.parallel_state import graph_capture
from vllm.platforms import current_platform
from vllm.utils.torch_utils import current_stream

from ouro_runtime.engine.cuda.buckets import bucket_for


class StepGraphs:
    """Captured pieces by name and number of lanes. Without any, every `replay` says no.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buckets: tuple[int, ...] = ()
        self._graphs: dict[tuple[str, int], Any] = {}

    def width(self, lanes: int) -> int:
        """Lanes to run for `lanes` of them: their bucket, or as many where none holds them."""
        return bucket_for(self.buckets, lanes) or lanes

    def replay(self, piece: str, lanes: int) -> bool:
        """Run the graph of a piece over exactly `lanes` lanes; False if there is none."""
        graph = self._graphs.get((piece, lanes))
        if graph is None:
            return False
        graph.replay()
        return True

    def capture(self, buckets: Sequence[int], pieces: Mapping[str, Callable[[int], None]]) -> None:
        """Capture each piece for each bucket, the largest first so that the pool is shared.

        Args:
            pieces: in the order of a step.
        """
        self.release()
        with graph_capture(device=self.device):
            for lanes in sorted(buckets, reverse=True):
                # Two steps: kernels are compiled and cuBLAS picks its algorithms outside of it.
                for run in (*pieces.values(), *pieces.values()):
                    run(lanes)
                torch.cuda.synchronize(self.device)
                for name, run in pieces.items():
                    self._graphs[name, lanes] = self._record(run, lanes)
        self.buckets = tuple(sorted(buckets))

    def _record(self, run: Callable[[int], None], lanes: int) -> Any:
        """A graph of what `run(lanes)` launches, which is not run."""
        graph = torch.cuda.CUDAGraph()
        pool = current_platform.get_global_graph_pool()
        with torch.cuda.graph(graph, pool, stream=current_stream()):
            run(lanes)
        return graph

    def release(self) -> None:
        """Drop all graphs, and with them their hold on the memory pool."""
        self._graphs.clear()
        self.buckets = ()
