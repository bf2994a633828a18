"""Seam: CUDA graphs of a step's pieces, one per piece and bucket, in vLLM's graph memory pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from vllm.distributed.parallel_state import graph_capture
from vllm.platforms import current_platform
from vllm.utils.torch_utils import current_stream

from ouro_runtime.engine.cuda.buckets import bucket_for

Pieces = Mapping[str, Callable[[int], None]]


class StepGraphs:
    """Captured pieces by name and number of lanes. Without any, every `replay` says no.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buckets: tuple[int, ...] = ()
        self.draft_buckets: tuple[int, ...] = ()
        self._graphs: dict[tuple[str, int], Any] = {}

    def width(self, lanes: int, drafts: bool = False) -> int:
        """Lanes to run for `lanes` of them: their bucket, or as many where none holds them.

        Args:
            drafts: in a step with drafts, whose pieces are others.
        """
        return bucket_for(self.draft_buckets if drafts else self.buckets, lanes) or lanes

    def replay(self, piece: str, lanes: int) -> bool:
        """Run the graph of a piece over exactly `lanes` lanes; False if there is none."""
        graph = self._graphs.get((piece, lanes))
        if graph is None:
            return False
        graph.replay()
        return True

    def capture(
        self,
        buckets: Sequence[int],
        pieces: Pieces,
        draft_buckets: Sequence[int] = (),
        draft_pieces: Pieces | None = None,
    ) -> None:
        """Capture each piece for each bucket, the largest first so that the pool is shared.

        Args:
            pieces: in the order of a step. draft_buckets, draft_pieces: of steps with drafts.
        """
        self.release()
        every = [(lanes, pieces) for lanes in buckets]
        every += [(lanes, draft_pieces or {}) for lanes in draft_buckets]
        with graph_capture(device=self.device):
            for lanes, of_step in sorted(every, key=itemgetter(0), reverse=True):
                # Two steps: kernels are compiled and cuBLAS picks its algorithms outside of it.
                for run in (*of_step.values(), *of_step.values()):
                    run(lanes)
                torch.cuda.synchronize(self.device)
                for name, run in of_step.items():
                    self._graphs[name, lanes] = self._record(run, lanes)
        self.buckets, self.draft_buckets = tuple(sorted(buckets)), tuple(sorted(draft_buckets))

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
        self.buckets = self.draft_buckets = ()
