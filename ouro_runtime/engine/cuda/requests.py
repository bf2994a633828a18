"""What the worker on CUDA remembers of requests, by slot and by name."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ouro_runtime.config import LoopConfig
from ouro_runtime.engine.cuda.draft_layout import DraftAsks, DraftLayout
from ouro_runtime.engine.cuda.lanes import STOPS, LaneParams
from ouro_runtime.engine.cuda.output import Flight, StepBill
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.engine.step_output import StepOutput
from ouro_runtime.loop.drafts import draft_rule
from ouro_runtime.loop.lanes import LaneBook, LanePlan
from ouro_runtime.loop.limits import last_readout, replayed

EVERYWHERE = 1 << 30
"""A position limit that stops nobody: a prompt's own positions are always run."""


class LaneRequests:
    """Requests by slot.

    Args:
        slots: request slots. config: the model's loops. longest: positions of a request at most.
    """

    def __init__(self, slots: int, config: LoopConfig, longest: int) -> None:
        self.config, self.longest = config, longest
        self.book = LaneBook(slots, config.loops)
        self.deepest = np.full(slots, config.loops)
        self.shared = np.zeros(slots, bool)
        self.limit = np.zeros(slots, np.int64)
        self.prompt = np.zeros(slots, np.int64)
        self.stops = np.full((slots, STOPS), -1, np.int32)
        # Of drafts: whether the request may be drafted at all, where, and whether it was last time.
        self.drafts, self.flying = np.zeros((2, slots), bool)
        low, high = np.zeros((2, slots), np.int32)
        self.asks = DraftAsks(np.zeros(slots, np.float32), low, high)
        self._flights: dict[str, Flight] = {}
        self._depths: dict[str, list[int]] = {}
        self._epoch: dict[str, int] = {}
        self._slot: dict[str, int] = {}
        self._noting = threading.Lock()

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._slot

    def add(self, slot: int, req_id: str, sampling: Any, prompt: int, known: int) -> None:
        """A request of `prompt` tokens enters `slot` with `known` tokens: it may be back from a
        preemption."""
        request = LoopRequest.of(sampling, prompt, self.config)
        self.book.add(slot, request.params, known - prompt, request.single)
        self.limit[slot] = last_readout(prompt, request.max_tokens, self.longest) + 1
        self.prompt[slot] = prompt
        self.deepest[slot], self.shared[slot] = request.deepest, request.shared
        rule = draft_rule(request.params, request.single, self.config.loops)
        self.drafts[slot], self.flying[slot] = rule is not None, False
        if rule is not None:
            self.asks.threshold[slot], self.asks.low[slot], self.asks.high[slot] = rule
        watched = sorted(request.stops)[:STOPS]
        self.stops[slot] = -1
        self.stops[slot, : len(watched)] = watched
        self._slot[req_id] = slot
        with self._noting:
            self._epoch[req_id] = self._epoch.get(req_id, 0) + 1
            self._flights.pop(req_id, None)
            depths = self._depths.setdefault(req_id, [])
            del depths[known - prompt :]

    def leave(self, req_id: str) -> None:
        """The request gave up its slot; it may come back."""
        self._slot.pop(req_id, None)

    def forget(self, req_ids: Any) -> None:
        """Requests that have ended."""
        with self._noting:
            for req_id in req_ids:
                self._depths.pop(req_id, None)
                self._epoch.pop(req_id, None)
                self._flights.pop(req_id, None)

    def epochs(self, req_ids: list[str]) -> list[int]:
        """Which admission of each request this is."""
        return [self._epoch[req_id] for req_id in req_ids]

    def note(self, req_id: str, epoch: int, depths: list[int]) -> None:
        """Depths of tokens that came back; void if the request has ended or was admitted anew.

        Called from the thread that waits for outputs, while requests come and end in another.
        """
        with self._noting:
            if self._epoch.get(req_id) == epoch:
                self._depths[req_id] += depths

    def params(
        self,
        slots: np.ndarray,
        decoding: np.ndarray,
        resumed: np.ndarray,
        plan: LanePlan,
        sampling: Any,
    ) -> LaneParams:
        """Of a step's lanes.

        Args:
            sampling: vLLM's `SamplingStates`.
            resumed: [R] bool: the lane is read out at the last position of what is filled in, and
                that is no prompt position: it leaves where its rule says.
        """
        book = self.book
        return LaneParams(
            threshold=book.threshold[slots],
            limit=np.where(decoding, self.limit[slots], EVERYWHERE),
            run_all=book.exact[slots] | (~decoding & ~resumed),
            once=~decoding | book.single[slots] | book.exact[slots],
            decoding=decoding,
            slot=slots,
            deepest=self.deepest[slots],
            temperature=sampling.temperature.np[slots],
            seed=sampling.seeds.np[slots],
            stops=self.stops[slots],
            low=plan.low,
            high=plan.high,
        )

    def layout(self, slots: np.ndarray, wanted: np.ndarray, rule: np.ndarray) -> DraftLayout | None:
        """The lanes of a step with drafts; None for one without. Remembers who was drafted.

        Args:
            slots: [R], of a step's requests. wanted: [R] bool, they are to be drafted if they may.
            rule: [R], see `DraftLayout`.
        """
        drafted = wanted & self.drafts[slots]
        again = self.flying[slots]
        self.flying[slots] = drafted
        if not drafted.any():
            return None
        self.book.drafted(slots[drafted])
        return DraftLayout.of(drafted, again, rule, self.config.loops)

    def land(self, bill: StepBill, output: StepOutput, tokens: list[list[int]]) -> None:
        """Settle what a request that was drafted had in flight when a step without drafts came,
        and remember what this one's left. Called as `note` is, before it.

        Args:
            tokens: of the step, by request.
        """
        with self._noting:
            for index, (req_id, epoch) in enumerate(zip(bill.req_ids, bill.epochs, strict=True)):
                if self._epoch.get(req_id) != epoch:
                    continue
                if (flight := bill.flight(index)) is not None:
                    self._flights[req_id] = flight
                elif tokens[index] and req_id in self._flights:
                    self._flights.pop(req_id).settle(output.notes[req_id][0], tokens[index][0])

    def row_stops(
        self,
        req_ids: list[str],
        slots: np.ndarray,
        start: np.ndarray,
        count: np.ndarray,
        known: np.ndarray,
        decoding: np.ndarray,
    ) -> np.ndarray | None:
        """[N] int32, the depth at which each row's position left when it was first computed.

        Positions of generated tokens that are filled in again after a preemption get the K/V they
        had: true up to that depth, stand-ins below. None if there are no such rows.

        Args:
            start, count: [R], positions of the step. known: [R], tokens that are filled in.
        """
        loops = self.config.loops
        stops = None
        first = np.cumsum(count) - count
        again = ~decoding & ~self.book.exact[slots] & (known > self.prompt[slots])
        for lane in np.nonzero(again)[0].tolist():
            prompt, begin = int(self.prompt[slots[lane]]), int(start[lane])
            end = begin + int(count[lane])
            depths = self._depths[req_ids[lane]]
            offset, before = replayed(depths, prompt, begin, end, int(known[lane]))
            if before and min(before) < loops:
                if stops is None:
                    stops = np.full(int(count.sum()), loops, np.int32)
                place = first[lane] + offset
                stops[place : place + len(before)] = before
        return stops
