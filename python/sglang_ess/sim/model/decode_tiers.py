"""Decode over two tiers, row by row: the production HotCache under generated top-k streams.

Layers do not see each other's rows, so a few stand for all: each simulated layer has its own
stream and hot tier. They run on a thread each; the kernels hold no lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from sglang_ess.layout import PAGE_SLOTS, PLAN_QUERIES_CUDA
from sglang_ess.sim.model.locality import RECENT_QUERIES, Locality, TopkStream
from sglang_ess.sim.model.slots import whole_pages
from sglang_ess.tiers import HotCache, PlanBuffers

WARMUPS = ("cold", "recent", "settled")


class OutOfSlots(RuntimeError):
    """The host tier has no slots for a request: whoever joins or grows it must make room."""


class _Layer:
    """One layer: its stream, and one hot tier, or one for each request."""

    def __init__(self, stream: TopkStream, rows: int, num_slots: int, shared: bool, requests: int):
        self.stream, self.rows = stream, rows
        self._buffers = PlanBuffers()
        self._share = rows // requests if shared else rows
        self._shared = None
        if shared:
            self._shared = HotCache(None, min(rows, num_slots), num_slots, self._buffers)
        self._own: list[HotCache | None] = [None] * requests
        self.topk = np.zeros((0, 0), np.int32)  # of the last step

    def cache(self, row: int) -> HotCache:
        return self._shared or self._own[row]

    def begin(
        self, row: int, tokens: int, slots: np.ndarray, warmup: str, rows: int | None
    ) -> None:
        self.stream.begin(row, tokens)
        if self._shared is None:
            size = slots.shape[1]
            self._own[row] = HotCache(None, min(rows or self.rows, size), size, self._buffers)
        if warmup == "settled":
            # No more than its share: the others' rows are to stay.
            share = self._share if self._shared is not None else self._own[row].num_rows
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

    def step(self, rows, lengths, slots, new_slots, queries) -> np.ndarray:
        """Rows fetched for each request [rows] int64."""
        topk = self.topk = self.stream.next(rows, lengths, slots, queries)
        if self._shared is not None:
            self._shared.install(new_slots, None)
            return _fetched(self._shared, topk).reshape(len(rows), queries).sum(1)
        misses = np.empty(len(rows), np.int64)
        parts = new_slots.reshape(len(rows), -1)
        for i, row in enumerate(rows):
            self._own[row].install(parts[i], None)
            misses[i] = _fetched(self._own[row], topk[i * queries : (i + 1) * queries]).sum()
        return misses


def _fetched(cache: HotCache, topk: np.ndarray) -> np.ndarray:
    """One step of a layer, as the server plans it. Returns rows fetched by query [queries]."""
    misses = np.empty(len(topk), np.int64)
    for first in range(0, len(topk), PLAN_QUERIES_CUDA):
        block = torch.from_numpy(topk[first : first + PLAN_QUERIES_CUDA])
        start: tuple[int, int] | None = (0, 0)
        while start is not None:
            start = cache.plan(block, start, same_step=first > 0).stop
        misses[first : first + PLAN_QUERIES_CUDA] = cache.query_misses
    return misses


class DecodeTiers:
    """The decode requests of one rank, and the tiers that hold their rows.

    locality, layers   whose streams; layers: the simulated ones (None: all)
    rows               hot rows: of each simulated layer, or one number for all. Shared: of the
                       tier. Otherwise of each request, as ESS (ratio x context) and HiSparse
                       (a constant) have them; join may give a request its own
    num_slots          of the host tier; max_tokens: of one request
    queries            of a request in one step (MTP verifies so many)
    States of a request: out -> join -> in -> leave -> out. No step moves a request's slots.
    Raises: ValueError for sizes that are not positive; OutOfSlots when slots run out.
    """

    def __init__(
        self,
        locality: Locality,
        rows: int | Sequence[int],
        num_slots: int,
        *,
        max_requests: int,
        max_tokens: int,
        layers: Sequence[int] | None = None,
        queries: int = 1,
        shared: bool = True,
        seed: int = 0,
    ):
        self.layers = tuple(range(locality.num_layers) if layers is None else layers)
        rows = [rows] * len(self.layers) if np.ndim(rows) == 0 else list(rows)
        sizes = {"queries": queries, "max_requests": max_requests, "max_tokens": max_tokens}
        for name, value in {**sizes, "rows": min(rows), "num_slots": num_slots}.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive: got {value}.")
        if len(rows) != len(self.layers):
            raise ValueError(
                f"rows must be one number or one for each of {len(self.layers)} layers: "
                f"got {len(rows)}."
            )
        self.locality, self.queries = locality, queries
        max_tokens = whole_pages(max_tokens)
        self._free_pages = list(range(num_slots // PAGE_SLOTS))[::-1]
        self._slots = np.zeros((max_requests, max_tokens), np.int32)
        # What a hot tier is keyed by: a request's own has its positions for slots.
        self._keys = self._slots
        if not shared:
            self._keys = np.tile(np.arange(max_tokens, dtype=np.int32), (max_requests, 1))
        self._tokens = np.zeros(max_requests, np.int64)
        self._pages: dict[int, list[int]] = {}  # of a row
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
        """Those that are in, oldest first."""
        return tuple(self._rows)

    def join(
        self, request: int, tokens: int, warmup: str = "recent", rows: int | None = None
    ) -> None:
        """A request of so many tokens takes its slots and, by its warm-up, hot rows.

        warmup  cold: none hot; recent: what its prompt's last 32 queries select (ESS's); settled:
                as if it had been decoding for long
        rows    its own hot rows a layer, where the tier is not shared
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
        """Its slots are free, and none of them is hot."""
        row = self._rows.pop(request)
        slots = torch.from_numpy(self._slots[row, : self._tokens[row]].astype(np.int64))
        self._each(lambda layer: layer.end(row, slots))
        self._free_pages += self._pages.pop(row)[::-1]
        self._free_rows.append(row)

    def step(self, tokens: int = 1) -> np.ndarray:
        """One decode step of all requests, each `tokens` longer than before.

        Returns the rows fetched in each simulated layer [layers] int64; request_misses has them
        by request, all simulated layers together.
        Raises: OutOfSlots, before anything has changed.
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
        """HotCache.counters of each simulated layer; of a shared tier only."""
        return [layer.cache(0).counters for layer in self._layers]

    def last_topk(self, index: int, count: int) -> np.ndarray:
        """[min(count, requests), queries * K] int32: what the last step's oldest requests
        selected in the index-th simulated layer.
        """
        topk = self._layers[index].topk
        return topk.reshape(-1, self.queries * topk.shape[1])[:count]

    def _grow(self, row: int, tokens: int) -> None:
        have, need = len(self._pages[row]), -(-(self._tokens[row] + tokens) // PAGE_SLOTS)
        for page in range(have, int(need)):
            taken = self._free_pages.pop()
            self._pages[row].append(taken)
            first = page * PAGE_SLOTS
            self._slots[row, first : first + PAGE_SLOTS] = taken * PAGE_SLOTS + np.arange(
                PAGE_SLOTS
            )
        self._tokens[row] += tokens

    def _each(self, work: Callable) -> list:
        """work(layer) of all layers, at once."""
        if len(self._layers) == 1:
            return [work(self._layers[0])]
        return list(self._threads.map(work, self._layers))


@dataclass(frozen=True)
class Measured:
    """Steady misses: rows fetched per request and step in each simulated layer [layers]."""

    layers: tuple[int, ...]
    misses: np.ndarray
    lookups: int

    @property
    def mean(self) -> float:
        return float(self.misses.mean())


def measure(
    locality: Locality,
    context: int,
    requests: int,
    rows: float | Sequence[float],
    *,
    queries: int = 1,
    steps: int = 40,
    warmup_steps: int = 40,
    layers: Iterable[int] | None = None,
    shared: bool = True,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Measured:
    """Steady misses of `requests` requests of one context length.

    rows  hot rows for each request and layer, or one number for each layer. Shared: of all
          requests together so many times as many
    warmup_steps: steps before those that count; progress: called after every step of a layer
    """
    chosen = tuple(range(locality.num_layers) if layers is None else layers)
    rows = np.broadcast_to(np.asarray(rows, float), len(chosen))
    tokens = context + warmup_steps + steps + PAGE_SLOTS
    misses, lookups = [], 0

    def one(index: int) -> float:
        tiers = DecodeTiers(
            locality, int(round(rows[index] * (requests if shared else 1))) or 1,
            requests * whole_pages(tokens), max_requests=requests,
            max_tokens=tokens, layers=[chosen[index]], queries=queries, shared=shared, seed=seed,
        )  # fmt: skip
        for request in range(requests):
            tiers.join(request, context, "settled")
        total = 0
        for step in range(warmup_steps + steps):
            fetched = int(tiers.step()[0])
            total += fetched if step >= warmup_steps else 0
            progress()
        return total / steps / requests

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        misses = list(threads.map(one, range(len(chosen))))
    lookups = len(chosen) * (warmup_steps + steps) * requests * queries * locality.topk
    return Measured(chosen, np.array(misses), lookups)


def miss_curves(
    locality: Locality,
    context: int,
    rows: Sequence[int],
    *,
    queries: int = 1,
    requests: int = 1,
    steps: int = 60,
    warmup_steps: int = 10,
    layers: Iterable[int] | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Steady misses per request and step at each size: [layers, rows], hot rows a request.

    All sizes see the same streams. progress: called after every request of a layer
    """
    chosen = tuple(range(locality.num_layers) if layers is None else layers)

    def one(layer: int) -> np.ndarray:
        stream = TopkStream(locality, layer, 1, context, seed)
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
                topk = stream.next(which, length, positions, queries)
                fetched = [_fetched(cache, topk).sum() for cache in caches]
                misses += fetched if step >= warmup_steps else 0
            progress()
        return misses / (requests * steps)

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return np.array(list(threads.map(one, chosen)))
