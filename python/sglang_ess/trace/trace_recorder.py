"""HotCaches that record their operations in a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_ess.tiers import lru
from sglang_ess.tiers.contract import COUNTERS
from sglang_ess.tiers.hot_cache import HotCache, Plan
from sglang_ess.tiers.topk_observer import PassQueries, TopkObserver
from sglang_ess.trace.codec import first_changes, runs_of
from sglang_ess.trace.format import NO_DATA, Entry, Kind, Queries
from sglang_ess.trace.scores import PlanScores
from sglang_ess.trace.trace import TraceWriter

# Where format.STATE's figures are in HotCache.state.
STATE_PLACES = np.array([lru.STEP, *(getattr(lru, name.upper()) for name in COUNTERS)])


class TraceRecorder(TopkObserver):
    """Writes the trace of one pool, and follows the slots of the requests in decode.

    The "layers" of a trace are the pool's index groups.

    Between begin_step and end_step the queries of plans are those of the step, in order, and plans
    are written as records of positions; the writer's thread finds them. A plan outside a step, or
    one whose positions do not reproduce its slots, is written as slots.

    path, layers, topk, slots, meta, options: as TraceWriter
    With runner_ups among the options, a plan is written with the scores that decode_scores was
    given of the same lists in the same pass; without scores if there are none.
    """

    def __init__(
        self,
        path: str | Path,
        layers: int,
        topk: int,
        slots: int,
        meta: dict[str, Any],
        **options: Any,
    ):
        self.writer = TraceWriter(path, layers, topk, slots, meta=meta, **options)
        self._scored: dict[int, tuple[np.ndarray, PlanScores]] = {}  # group -> lists, scores
        self._num_caches = 0
        self._step: tuple[tuple[str, ...], np.ndarray, np.ndarray] | None = None
        self._verifying = (0, 1)  # requests of the last step, queries of each
        # A copy of SGLang's request table as far as the file has it. Memory pages that no request
        # has reached stay unbacked.
        self._known, self._known_lengths = np.zeros((0, 0), np.int32), np.zeros(0, np.int64)

    @property
    def runner_ups(self) -> int | None:
        return self.writer.runner_ups if self.writer.recording else None

    def hot_cache(self, *args: Any, **kwargs: Any) -> RecordedHotCache:
        """Make the HotCache of the next layer; arguments as HotCache."""
        self._num_caches += 1
        return RecordedHotCache(self, self._num_caches - 1, *args, **kwargs)

    # --- decode steps -------------------------------------------------------------------

    def begin_step(
        self,
        request_ids: Sequence[str],
        req_rows: np.ndarray,
        lengths: np.ndarray,
        req_to_token: np.ndarray,
        width: int = 1,
    ) -> None:
        """Attribute the following plans to these queries.

        request_ids [T]; req_rows [T] int64 rows of the request table; lengths [T] int32
        positions each query sees; req_to_token [requests, context] int32, not a copy
        width: queries of each request, which adjoin; the last one sees most
        """
        self._scored.clear()
        self._step, self._verifying = None, (len(request_ids) // width, width)
        last = np.arange(width - 1, len(req_rows), width)  # of each request
        if self.writer.recording and self._slots(req_rows[last], lengths[last], req_to_token):
            self._step = tuple(request_ids), req_rows.copy(), lengths.copy()

    def begin_pass(self, request_ids: Sequence[str], queries: PassQueries) -> None:
        """Record the plans of a decode pass as those of its queries."""
        if queries.spans is not None:
            self.end_step()
            return
        arrays = queries.req_rows.numpy(), queries.lengths.numpy(), queries.req_to_token.numpy()
        of_queries = [name for name in request_ids for _ in range(queries.width)]
        self.begin_step(of_queries, *arrays, queries.width)

    def decode_scores(
        self, group: int, topk: torch.Tensor, runner_ups: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Keep the scores of a group's lists for its next plans. The tensors must not change."""
        self._scored[group] = topk.numpy(), PlanScores(runner_ups.numpy(), scores.numpy())

    def accepted(self, lengths: Sequence[int]) -> None:
        """Record how many tokens each request kept of the last decode pass.

        Call it once a verify step, when the drafts have been compared with the target's tokens:
        after the plans of the last layer and before the next begin_pass of the target model.
        lengths: one for each request of the pass, in its order; 1 to its queries a request. The
            target's own token counts, so it is never 0
        Raises: ValueError for lengths that do not fit the pass.
        """
        requests, width = self._verifying
        kept = np.asarray(lengths, np.int32).reshape(-1, 1)
        if len(kept) != requests or (requests and not 1 <= kept.min() <= kept.max() <= width):
            raise ValueError(
                f"accepted lengths must be 1 to {width} for each of {requests} requests: got "
                f"{kept.ravel().tolist()}."
            )
        self._verifying = (0, 1)
        if self.writer.recording and requests:
            self.writer.put(Entry(Kind.ACCEPTED, 0, width, data=kept))

    def end_step(self) -> None:
        """Stop attributing plans to the queries of begin_step, and scores to plans."""
        self._step = None
        self._scored.clear()

    def _slots(self, req_rows: np.ndarray, lengths: np.ndarray, req_to_token: np.ndarray) -> bool:
        """Record the new slots of these rows. Returns whether the file has all of them."""
        if self._known.shape != req_to_token.shape:
            self._known = np.zeros(req_to_token.shape, np.int32)
            self._known_lengths = np.zeros(len(req_to_token), np.int64)
        firsts = np.empty(len(req_rows), np.int64)
        first_changes(req_to_token, self._known, self._known_lengths, req_rows, lengths, firsts)
        triples = zip(req_rows.tolist(), firsts.tolist(), lengths.tolist(), strict=True)
        for row, first, length in triples:
            if first == length:
                continue
            new = req_to_token[row, first:length]
            runs = runs_of(new.astype(np.int64))
            if not self.writer.put(Entry(Kind.SLOTS, 0, row, data=runs, start=first)):
                return False
            self._known[row, first:length], self._known_lengths[row] = new, length
        return True

    # --- events of a layer --------------------------------------------------------------

    def event(
        self, cache: RecordedHotCache, kind: Kind, argument: int = 0, data: np.ndarray = NO_DATA
    ) -> None:
        """Append an event with the cache's counters after it."""
        counters = cache.state[STATE_PLACES]
        self.writer.put(Entry(kind, cache.layer, argument, counters, data))

    def plan(self, cache: RecordedHotCache, topk: np.ndarray, first: int, same_step: bool) -> None:
        """Append a plan of topk [queries, width] int32: the step's queries from `first` on."""
        queries = None
        if self._step is not None:
            block = slice(first, first + len(topk))
            request_ids, rows, lengths = self._step
            queries = Queries(request_ids[block], rows[block], lengths[block])
            if len(queries.rows) != len(topk):
                queries = None
        argument, counters = 2 * topk.shape[1] + same_step, cache.state[STATE_PLACES]
        scored = self._scores_of(cache.layer, topk, first)
        plan = Kind.PLAN_SLOTS, cache.layer, argument, counters, topk.copy(), queries
        self.writer.put(Entry(*plan, scored=scored))

    def _scores_of(self, group: int, topk: np.ndarray, first: int) -> PlanScores | None:
        """Return the scores of a plan's lists, if these are what decode_scores was given."""
        if group not in self._scored:
            return None
        block = slice(first, first + len(topk))
        lists, scored = self._scored[group]
        if not np.array_equal(lists[block], topk):
            return None
        return PlanScores(scored.runner_ups[block].copy(), scored.scores[block].copy())


class RecordedHotCache(HotCache):
    """A HotCache that writes each of its changes to a trace.

    recorder, layer: where, and as which (the index group); else as HotCache
    """

    def __init__(self, recorder: TraceRecorder, layer: int, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recorder, self.layer = recorder, layer
        self._planned = 0  # queries of the step that the plans so far have covered
        self._log(Kind.RESIZE, self.num_rows)

    def _log(self, kind: Kind, argument: int = 0, data: np.ndarray = NO_DATA) -> None:
        if self.recorder.writer.recording:
            self.recorder.event(self, kind, argument, data)

    def _log_slots(self, kind: Kind, slots: torch.Tensor, argument: int = 0) -> None:
        if self.recorder.writer.recording:
            self.recorder.event(self, kind, argument, runs_of(slots.numpy()))

    def plan(
        self, topk: torch.Tensor, start: tuple[int, int] = (0, 0), same_step: bool = False
    ) -> Plan:
        plan = super().plan(topk, start, same_step)
        if plan.stop is not None:  # its last pass records it
            return plan
        first = self._planned if same_step else 0
        self._planned = first + len(topk)
        if self.recorder.writer.recording:
            self.recorder.plan(self, topk.contiguous().numpy(), first, same_step)
        return plan

    def install(
        self, slots: torch.Tensor, rows: torch.Tensor | Sequence[torch.Tensor], min_age: int = 0
    ) -> int:
        count = super().install(slots, rows, min_age)
        self._log_slots(Kind.INSTALL, slots, min_age)
        return count

    def invalidate(self, slots: torch.Tensor) -> None:
        super().invalidate(slots)
        self._log_slots(Kind.INVALIDATE, slots)

    def warm(self, topk: torch.Tensor) -> int:
        count = super().warm(topk)
        self._log(Kind.WARM, 2 * topk.shape[1], topk.contiguous().numpy().copy())
        return count

    def clear(self) -> None:
        super().clear()
        self._log(Kind.CLEAR)

    def resize(self, num_rows: int) -> None:
        super().resize(num_rows)
        self._log(Kind.RESIZE, num_rows)
