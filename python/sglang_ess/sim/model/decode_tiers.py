"""Decode over two tiers, row by row: the production HotCache under generated top-k streams.

Layers share no rows, so a few can stand for all. Each simulated layer has its own stream and its
own hot tier, and runs on its own thread; the kernels release Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from sglang_ess.layout import PAGE_SLOTS, PLAN_QUERIES_CUDA
from sglang_ess.sim.model.locality import RECENT_QUERIES, Locality, TopkStream
from sglang_ess.sim.model.slots import whole_pages
from sglang_ess.tiers import HotCache, PlanBuffers

T = TypeVar("T")
WARMUPS = ("cold", "recent", "settled")
NO_ROWS = torch.empty(0)  # a HotCache without row contents reads none


class OutOfSlots(RuntimeError):
    """The host tier has too few free slots for a request. The caller must make room first."""


class _Layer:
    """One layer: its stream, and either one shared hot tier or one for each request."""

    def __init__(self, stream: TopkStream, rows: int, num_slots: int, shared: bool, requests: int):
        self.stream, self.rows = stream, rows
        self._buffers = PlanBuffers()
        self._share = rows // requests if shared else rows
        self._shared: HotCache | None = None
        if shared:
            self._shared = HotCache(None, min(rows, num_slots), num_slots, self._buffers)
        self._own: list[HotCache | None] = [None] * requests
        self.topk = np.zeros((0, 0), np.int32)  # of the last step

    def cache(self, row: int) -> HotCache:
        """The hot tier of the request in this row."""
        found = self._shared or self._own[row]
        assert found is not None, f"no request in row {row}"
        return found

    def begin(
        self, row: int, tokens: int, slots: np.ndarray, warmup: str, rows: int | None
    ) -> None:
        self.stream.begin(row, tokens)
        if self._shared is None:
            size = slots.shape[1]
            self._own[row] = HotCache(None, min(rows or self.rows, size), size, self._buffers)
        if warmup == "settled":
            # No more than its share, so that the rows of other requests stay.
            share = self._share if self._shared is not None else self.cache(row).num_rows
            topk = slots[row, self.stream.by_recency(row)[-share:]].reshape(-1, 1)
        elif warmup == "recent":
            one, length = np.array([row]), np.array([tokens])
            topk = self.stream.next(one, length, slots, RECENT_QUERIES)
        else:
            return
        self.cache(row).warm(torch.from_numpy(topk))

    def end(self, row: int, slots: torch.Tensor) -> None:
        if self._shared is not None:
            self._shared.invalidate(slots)
        else:
            self._own[row] = None

    def step(
        self, rows: np.ndarray, lengths: np.ndarray, slots: np.ndarray, new_slots: torch.Tensor,
        queries: int,
    ) -> np.ndarray:  # fmt: skip
        """Plan one decode step. Returns the rows fetched for each request [rows] int64."""
        topk = self.topk = self.stream.next(rows, lengths, slots, queries)
        if self._shared is not None:
            self._shared.install(new_slots, NO_ROWS)
            fetched: np.ndarray = _fetched(self._shared, topk).reshape(len(rows), queries).sum(1)
            return fetched
        misses = np.empty(len(rows), np.int64)
        parts = new_slots.reshape(len(rows), -1)
        for i, row in enumerate(rows):
            cache = self.cache(row)
            cache.install(parts[i], NO_ROWS)
            misses[i] = _fetched(cache, topk[i * queries : (i + 1) * queries]).sum()
        return misses


def _fetched(cache: HotCache, topk: np.ndarray) -> np.ndarray:
    """Plan one step of a layer as the server does. Returns rows fetched by query [queries]."""
    misses = np.empty(len(topk), np.int64)
    for first in range(0, len(topk), PLAN_QUERIES_CUDA):
        block = torch.from_numpy(topk[first : first + PLAN_QUERIES_CUDA])
        start: tuple[int, int] | None = (0, 0)
        while start is not None:
            start = cache.plan(block, start, same_step=first > 0).stop
        misses[first : first + PLAN_QUERIES_CUDA] = cache.query_misses
    return misses


class TierSizes(NamedTuple):
    """Slots of the host tier; most requests at once; most tokens of one request."""

    num_slots: int
    max_requests: int
    max_tokens: int


class DecodeTiers:
    """The decode requests of one rank and the tiers that hold their rows.

    locality   profile of the streams; layers: its layers to simulate (None: all)
    rows       hot rows of each simulated layer, or one number for all. If shared, all requests
               share them. Otherwise each request has that many, as in ESS (ratio x context) and
               HiSparse (a constant), unless join gives it another number.
    sizes      see TierSizes
    queries    of a request in one step, which with MTP is 1 + draft tokens
    A request enters by join and goes by leave. No step moves its slots.
    Raises: ValueError for sizes that are not positive; OutOfSlots when slots run out.
    """

    def __init__(
        self,
        locality: Locality,
        rows: int | Sequence[int],
        sizes: TierSizes,
        *,
        layers: Sequence[int] | None = None,
        queries: int = 1,
        shared: bool = True,
        seed: int = 0,
    ):
        self.layers = tuple(range(locality.num_layers) if layers is None else layers)
        rows = [rows] * len(self.layers) if isinstance(rows, int | np.integer) else list(rows)
        for name, value in {"queries": queries, "rows": min(rows), **sizes._asdict()}.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive: got {value}.")
        if len(rows) != len(self.layers):
            raise ValueError(
                f"rows must be one number or one for each of {len(self.layers)} layers: "
                f"got {len(rows)}."
            )
        self.locality, self.queries = locality, queries
        num_slots, max_requests, max_tokens = sizes
        max_tokens = whole_pages(max_tokens)
        self._free_pages = list(range(num_slots // PAGE_SLOTS))[::-1]
        self._slots = np.zeros((max_requests, max_tokens), np.int32)
        # Slots as the hot tier sees them: a request's own tier uses its positions.
        self._keys = self._slots
        if not shared:
            self._keys = np.tile(np.arange(max_tokens, dtype=np.int32), (max_requests, 1))
        self._tokens = np.zeros(max_requests, np.int64)
        self._pages: dict[int, list[int]] = {}  # row -> its pages
        self._rows: dict[int, int] = {}  # request id -> row
        self._free_rows = list(range(max_requests))[::-1]
        self._layers = [
            _Layer(
                TopkStream(locality, layer, max_requests, max_tokens, seed),
                int(count), num_slots, shared, max_requests,
            )
            for layer, count in zip(self.layers, rows, strict=True)
        ]  # fmt: skip
        self._threads = ThreadPoolExecutor(min(len(self.layers), os.cpu_count() or 1))
        self.request_misses: dict[int, int] = {}

    @property
    def free_slots(self) -> int:
        return len(self._free_pages) * PAGE_SLOTS

    @property
    def requests(self) -> tuple[int, ...]:
        """Ids of the requests that have joined, oldest first."""
        return tuple(self._rows)

    def join(
        self, request: int, tokens: int, warmup: str = "recent", rows: int | None = None
    ) -> None:
        """Add a request of `tokens` tokens: it takes slots, and hot rows by its warm-up.

        warmup  cold: no hot rows; recent: those that its prompt's last 32 queries select, as in
                ESS; settled: as if it had been decoding for long
        rows    its own hot rows in each layer, if the tier is not shared
        Raises: ValueError for an unknown warm-up or too many tokens; OutOfSlots.
        """
        if warmup not in WARMUPS:
            raise ValueError(f"warmup must be one of {', '.join(WARMUPS)}: got {warmup!r}.")
        if tokens > self._slots.shape[1]:
            raise ValueError(f"tokens must be at most {self._slots.shape[1]}: got {tokens}.")
        if not self._free_rows or -(-tokens // PAGE_SLOTS) > len(self._free_pages):
            raise OutOfSlots(f"request {request} needs {tokens} slots: {self.free_slots} are free.")
        row = self._free_rows.pop()
        self._rows[request], self._pages[row], self._tokens[row] = row, [], 0
        self._grow(row, tokens)
        self._each(lambda layer: layer.begin(row, tokens, self._keys, warmup, rows))

    def leave(self, request: int) -> None:
        """Remove a request. Its slots become free, and none of them stays hot."""
        row = self._rows.pop(request)
        slots = torch.from_numpy(self._slots[row, : self._tokens[row]].astype(np.int64))
        self._each(lambda layer: layer.end(row, slots))
        self._free_pages += self._pages.pop(row)[::-1]
        self._free_rows.append(row)

    def step(self, tokens: int = 1) -> np.ndarray:
        """Run one decode step of all requests, each of which first grows by `tokens`.

        Returns the rows fetched in each simulated layer [layers] int64. Effect: request_misses
        has them by request, all simulated layers together.
        Raises: OutOfSlots, before anything changes.
        """
        if not self._rows:
            return np.zeros(len(self.layers), np.int64)
        rows = np.fromiter(self._rows.values(), np.int64)
        before = self._tokens[rows]
        pages = -(-(before + tokens) // PAGE_SLOTS) - -(-before // PAGE_SLOTS)
        if pages.sum() > len(self._free_pages):
            raise OutOfSlots(f"{len(rows)} requests need {pages.sum()} pages more.")
        if (before + tokens).max() > self._slots.shape[1]:
            raise OutOfSlots(f"a request is at its limit of {self._slots.shape[1]} tokens.")
        for row in rows:
            self._grow(row, tokens)
        places = before[:, None] + np.arange(tokens)
        new_slots = torch.from_numpy(self._keys[rows[:, None], places].astype(np.int64).ravel())
        lengths, queries = self._tokens[rows], self.queries
        misses = self._each(lambda one: one.step(rows, lengths, self._keys, new_slots, queries))
        by_request = np.sum(misses, axis=0)
        self.request_misses = dict(zip(self._rows, by_request.tolist(), strict=True))
        return np.array([one.sum() for one in misses])

    def counters(self) -> list[dict[str, int]]:
        """HotCache.counters of each simulated layer. Only for a shared tier."""
        return [layer.cache(0).counters for layer in self._layers]

    def last_topk(self, index: int, count: int) -> np.ndarray:
        """Return what the oldest requests selected in the last step of the index-th layer.

        Shape: [min(count, requests), queries * K] int32
        """
        topk = self._layers[index].topk
        return topk.reshape(-1, self.queries * topk.shape[1])[:count]

    def _grow(self, row: int, tokens: int) -> None:
        """Add tokens to a row, and the pages that they need."""
        have, need = len(self._pages[row]), -(-(self._tokens[row] + tokens) // PAGE_SLOTS)
        for page in range(have, int(need)):
            taken = self._free_pages.pop()
            self._pages[row].append(taken)
            first = page * PAGE_SLOTS
            self._slots[row, first : first + PAGE_SLOTS] = taken * PAGE_SLOTS + np.arange(
                PAGE_SLOTS
            )
        self._tokens[row] += tokens

    def _each(self, work: Callable[[_Layer], T]) -> list[T]:
        """Return work(layer) for all layers, which run at once."""
        if len(self._layers) == 1:
            return [work(self._layers[0])]
        return list(self._threads.map(work, self._layers))


@dataclass(frozen=True)
class Measured:
    """Steady misses.

    misses [layers]: rows fetched per request and step; lookups: of the whole measurement
    """

    layers: tuple[int, ...]
    misses: np.ndarray
    lookups: int

    @property
    def mean(self) -> float:
        return float(self.misses.mean())


@dataclass(frozen=True)
class Sampling:
    """How steady misses are measured.

    steps         counted decode steps; warmup_steps: steps before them
    queries       of a request in one step
    layers        of the locality; None: all
    seed          of the streams
    """

    steps: int = 40
    warmup_steps: int = 40
    queries: int = 1
    layers: Iterable[int] | None = None
    seed: int = 0

    def layers_of(self, locality: Locality) -> tuple[int, ...]:
        return tuple(range(locality.num_layers) if self.layers is None else self.layers)


def measure(
    locality: Locality,
    context: int,
    requests: int,
    rows: float | Sequence[float],
    sampling: Sampling | None = None,
    *,
    shared: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure the steady misses of `requests` requests of one context length.

    rows    hot rows per request: one number, or one for each layer. A shared tier has
            `requests` times as many.
    progress: called after every step of a layer
    """
    sampling = sampling or Sampling()
    chosen, steps, queries = sampling.layers_of(locality), sampling.steps, sampling.queries
    all_steps = sampling.warmup_steps + steps
    each = np.broadcast_to(np.asarray(rows, float), len(chosen))
    tokens = context + all_steps + PAGE_SLOTS

    def one(index: int) -> float:
        tiers = DecodeTiers(
            locality, int(round(each[index] * (requests if shared else 1))) or 1,
            TierSizes(requests * whole_pages(tokens), requests, tokens),
            layers=[chosen[index]], queries=queries, shared=shared, seed=sampling.seed,
        )  # fmt: skip
        for request in range(requests):
            tiers.join(request, context, "settled")
        total = 0
        for step in range(all_steps):
            fetched = int(tiers.step()[0])
            total += fetched if step >= sampling.warmup_steps else 0
            progress()
        return total / steps / requests

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        misses = list(threads.map(one, range(len(chosen))))
    lookups = len(chosen) * all_steps * requests * queries * locality.topk
    return Measured(chosen, np.array(misses), lookups)


def miss_curves(
    locality: Locality,
    context: int,
    rows: Sequence[int],
    sampling: Sampling | None = None,
    *,
    requests: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Measure steady misses per request and step [layers, rows] at each size.

    rows: hot rows of a request. All sizes see the same streams.
    sampling: by default 60 steps after 10
    progress: called after every request of a layer
    """
    sampling = sampling or Sampling(60, 10)
    warmup_steps, steps = sampling.warmup_steps, sampling.steps

    def one(layer: int) -> np.ndarray:
        stream = TopkStream(locality, layer, 1, context, sampling.seed)
        positions = np.arange(context, dtype=np.int32)[None]
        misses, buffers = np.zeros(len(rows)), PlanBuffers()
        which, length = np.array([0]), np.array([context])
        for _ in range(requests):
            stream.begin(0, context)
            order = torch.from_numpy(stream.by_recency(0)).view(-1, 1)
            caches = [HotCache(None, int(min(n, context)), context, buffers) for n in rows]
            for cache in caches:
                cache.warm(order[-cache.num_rows :])
            for step in range(warmup_steps + steps):
                topk = stream.next(which, length, positions, sampling.queries)
                fetched = [_fetched(cache, topk).sum() for cache in caches]
                misses += fetched if step >= warmup_steps else 0
            progress()
        return misses / (requests * steps)

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return np.array(list(threads.map(one, sampling.layers_of(locality))))
