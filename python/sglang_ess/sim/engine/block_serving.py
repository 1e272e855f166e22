"""Iterations of a SparseServe-like server: hybrid batches over a block cache.

One iteration runs a decode step of a batch and up to a chunk of prefill tokens. The cache is a
production HotCache for one sampled head; its misses times the heads are the loaded blocks. The
production WorkingSetWindow measures working sets and WorkingSets estimates them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_ess.admission.working_set import WorkingSets, WorkingSetWindow
from sglang_ess.sim.engine.blocks import BlockStreams, DenseModel, Roofline, Setting
from sglang_ess.tiers.hot_cache import HotCache

MAX_REQUESTS = 64  # in decode and prefill at once; no setting reaches vLLM's limit of 256


@dataclass(frozen=True)
class System:
    """The parts of SparseServe that a server has. Each part needs the ones before it.

    sparse: block selection in decode; offload: blocks live in host memory; flash: the fast
    transfers; control: working-set-aware batches; segmented: prefill layer by layer
    """

    name: str
    sparse: bool = False
    offload: bool = False
    flash: bool = False
    control: bool = False
    segmented: bool = False


SYSTEMS = tuple(
    System(name, *(i < count for i in range(5)))
    for count, name in enumerate(("vLLM", "+SA", "+Offload", "+FT", "+WC", "+LP"))
)


class BlockCache:
    """One head's block cache and the streams of the requests that use it.

    rows: blocks of one head that the device holds. The metadata of running requests and the
    blocks of a prompt in chunked prefill take rows too, because every step uses them.
    """

    def __init__(self, setting: Setting, model: DenseModel, rows: int, seed: int):
        sparse = setting.sparse
        self._block_tokens, self._share = sparse.block_tokens, sparse.metadata_share
        most = -(-model.max_prompt_tokens // sparse.block_tokens)
        self._stride = most + -(-most // round(1 / sparse.metadata_share))
        self._max_blocks = most
        num_slots = MAX_REQUESTS * self._stride
        self.cache = HotCache(None, min(rows, num_slots), num_slots)
        self.streams = BlockStreams(sparse, MAX_REQUESTS, most, seed)
        self.window = WorkingSetWindow(num_slots, MAX_REQUESTS, sparse.topk)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def metadata_rows(self, tokens: int) -> int:
        return int(np.ceil(self.blocks(tokens) * self._share))

    def leave(self, stream: int) -> None:
        """Free the rows of a request that is done."""
        first = stream * self._stride
        self.cache.invalidate(torch.arange(first, first + self._stride))

    def slots(self, stream: int, first: int, last: int) -> np.ndarray:
        """Slots of blocks [first, last) of a stream."""
        return np.arange(first, last) + stream * self._stride

    def metadata(self, stream: int, tokens: int) -> np.ndarray:
        first = self._max_blocks
        return self.slots(stream, first, first + self.metadata_rows(tokens))

    def step(self, active: np.ndarray, pinned: list[np.ndarray]) -> tuple[int, np.ndarray]:
        """Run a decode step of the n streams `active`. Returns loaded blocks and top-k [n, K].

        pinned: slots that must be there too; the device writes them, so none is loaded
        """
        topk = self.streams.topk
        chosen = self.streams.step(active)
        rows = np.where(chosen < 0, -1, chosen + (active * self._stride)[:, None])
        flat = np.concatenate([*pinned, np.zeros(0, np.int64)])
        padded = np.full(-(-len(flat) // topk) * topk, -1, np.int64)
        padded[: len(flat)] = flat
        table = np.concatenate([rows, padded.reshape(-1, topk)]).astype(np.int32)
        start = (0, 0) if len(table) else None
        while start is not None:
            start = self.cache.plan(torch.from_numpy(table), start).stop
        return int(self.cache.query_misses[: len(rows)].sum()), table[: len(rows)]


@dataclass
class Request:
    """One request's way through the server. Times are in seconds since the start."""

    number: int
    arrival: float
    prompt: int
    output: int
    stream: int = -1
    prefilled: int = 0
    generated: int = 0
    scheduled: float = math.nan
    first_token: float = math.nan
    last_token: float = 0.0


@dataclass
class Result:
    """Result of one run, in seconds, blocks of all heads, and tokens.

    tbt [n] seconds between tokens; loads: blocks loaded per iteration with a decode batch
    """

    ttft: np.ndarray
    queue: np.ndarray
    tbt: np.ndarray
    loads: float
    tokens_per_second: float
    mean_batch: float


@dataclass
class BlockServer:
    """One system under one load. run() returns the Result."""

    setting: Setting
    model: DenseModel
    system: System
    requests: list[Request]
    seed: int = 0
    now: float = 0.0
    progress: Callable[[int], None] | None = None
    _running: list[Request] = field(default_factory=list)
    _prefilling: list[Request] = field(default_factory=list)
    _tbt: list[float] = field(default_factory=list)
    _loads: list[int] = field(default_factory=list)
    _batches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        setting, model = self.setting, self.model
        self._cost = Roofline(setting.machine, model, setting.sparse)
        self._waiting: deque[Request] = deque()
        self._coming = deque(sorted(self.requests, key=lambda r: r.arrival))
        self._free = list(range(MAX_REQUESTS - 1, -1, -1))
        self._topk = setting.sparse.topk
        machine = setting.machine
        self._load_rate = (
            machine.flash_h2d_bytes_per_second
            if self.system.flash
            else machine.memcpy_bytes_per_second
        )
        self._save_rate = (
            machine.flash_d2h_bytes_per_second
            if self.system.flash
            else machine.memcpy_save_bytes_per_second
        )
        cache_bytes = setting.cache_bytes(model)
        if self.system.segmented:  # one layer of the longest prompt stays outside the cache
            cache_bytes -= model.max_prompt_tokens * model.token_bytes / model.layers
        self._block_bytes = setting.block_bytes(model)
        self._rows = int(cache_bytes / model.heads / self._block_bytes)
        self._sets = WorkingSets(self._topk)
        self._cache = BlockCache(setting, model, self._rows, self.seed)

    # --- one run ------------------------------------------------------------------------

    def run(self) -> Result:
        """Run until every request is done."""
        done = 0
        while done < len(self.requests):
            while self._coming and self._coming[0].arrival <= self.now:
                self._waiting.append(self._coming.popleft())
            if not (self._running or self._prefilling or self._waiting):
                self.now = self._coming[0].arrival
                continue
            done += self._iterate()
            if self.progress is not None:
                self.progress(done)
        return self._result()

    def _result(self) -> Result:
        ordered = sorted(self.requests, key=lambda r: r.number)
        generated = sum(r.output for r in ordered)
        return Result(
            ttft=np.array([r.first_token - r.arrival for r in ordered]),
            queue=np.array([r.scheduled - r.arrival for r in ordered]),
            tbt=np.array(self._tbt),
            loads=float(np.mean(self._loads)) if self._loads else 0.0,
            tokens_per_second=generated / (self.now - ordered[0].arrival),
            mean_batch=float(np.mean(self._batches)) if self._batches else 0.0,
        )

    def _iterate(self) -> int:
        """Run one iteration. Returns how many requests ended."""
        batch, prefills = self._select()
        loads = self._touch(batch, prefills) if self.system.offload else 0
        self.now += self._seconds(batch, prefills, loads)
        if batch:
            self._loads.append(loads)
            self._batches.append(len(batch))
        for request, tokens in prefills:
            request.prefilled += tokens
            if request.prefilled == request.prompt:
                self._prefilling.remove(request)
                self._running.append(request)
                request.first_token = request.last_token = self.now
                request.generated = 1
        for request in batch:
            request.generated += 1
            self._tbt.append(self.now - request.last_token)
            request.last_token = self.now
        ended = [r for r in self._running if r.generated >= r.output]
        for request in ended:
            self._running.remove(request)
            if self.system.offload:
                self._cache.leave(request.stream)
            self._free.append(request.stream)
        return len(ended)

    # --- what runs ----------------------------------------------------------------------

    def _select(self) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Choose the decode batch and prefills with their tokens, first come, first served."""
        batch, used = self._batch()
        budget = self.setting.sparse.chunk_tokens - len(batch)
        prefills: list[tuple[Request, int]] = []
        for request in [*self._prefilling, *itertools.islice(self._waiting, len(self._free))]:
            if budget <= 0:
                break
            tokens = min(budget, request.prompt - request.prefilled)
            need = self._prefill_rows(request, tokens)
            if (batch or prefills) and not self._admits(request, used + need):
                break
            if request.stream < 0:
                if not self._free:
                    break
                self._begin(request)
            prefills.append((request, tokens))
            budget, used = budget - tokens, used + need
        return batch, prefills

    def _begin(self, request: Request) -> None:
        request.stream = self._free.pop()
        request.scheduled = self.now
        self._waiting.popleft()
        self._prefilling.append(request)
        if self.system.offload:
            self._cache.streams.join(request.stream, self._cache.blocks(request.prompt))

    def _batch(self) -> tuple[list[Request], float]:
        """Choose who decodes: all, or under control those that fit (Algorithm 1).

        Returns them and the rows that they use.
        """
        used = float(
            sum(self._cache.metadata_rows(r.prompt) for r in self._running + self._prefilling)
        )
        if not self.system.control:
            return list(self._running), used
        batch: list[Request] = []
        for request in self._running:
            rows = self._sets.estimate(self._cache.blocks(request.prompt))
            if not batch or used + rows <= self._rows:
                batch.append(request)
                used += rows
        return batch, used

    def _prefill_rows(self, request: Request, tokens: int) -> float:
        """Working set of a prefill. Segmented needs no rows; a chunk needs all blocks so far."""
        if self.system.segmented:
            return 0.0
        return float(self._cache.blocks(request.prefilled + tokens))

    def _admits(self, request: Request, used: float) -> bool:
        """Whether device and host memory have room for one more prefill."""
        active = self._running + self._prefilling
        tokens = sum(r.prompt + r.output for r in active if r is not request)
        tokens += request.prompt + request.output
        model, machine = self.model, self.setting.machine
        if not self.system.offload:
            share = 1 + self.setting.sparse.metadata_share * self.system.sparse
            return tokens * model.token_bytes * share <= self.setting.cache_bytes(model)
        if tokens * model.token_bytes > machine.dram_bytes:
            return False
        return used <= self._rows

    # --- what it costs ------------------------------------------------------------------

    def _touch(self, batch: list[Request], prefills: list[tuple[Request, int]]) -> int:
        """Run the cache. Returns the loaded blocks of all heads."""
        cache = self._cache
        pinned = [cache.metadata(r.stream, r.prompt) for r in self._running]
        if not self.system.segmented:
            pinned += [
                cache.slots(request.stream, 0, cache.blocks(request.prefilled + tokens))
                for request, tokens in prefills
            ]
        active = np.array([r.stream for r in batch], np.int64)
        misses, rows = cache.step(active, pinned)
        counts = cache.window.add(rows, [r.number for r in batch])
        if counts is not None and counts.rows:
            blocks = {r.number: cache.blocks(r.prompt) for r in batch}
            pairs = [(blocks[n], rows) for n, rows in counts.rows.items() if n in blocks]
            self._sets.observe(pairs, counts.sharing, len(batch))
        return misses * self.model.heads

    def _seconds(
        self, batch: list[Request], prefills: list[tuple[Request, int]], loads: int
    ) -> float:
        """Seconds of an iteration that loads `loads` blocks."""
        cost = self._cost
        tokens = sum(tokens for _, tokens in prefills)
        seconds = cost.linear(len(batch) + tokens)
        for request, part in prefills:
            # Segmented, the prompt attends once, layer by layer; this iteration has a share of it.
            seconds += (
                cost.prefill_attention(request.prompt, 0) * part / request.prompt
                if self.system.segmented
                else cost.prefill_attention(part, request.prefilled)
            )
        if batch:
            contexts = np.array([r.prompt + r.generated for r in batch], float)
            seconds += cost.decode_attention(contexts, self.system.sparse)
        seconds += loads * self._block_bytes / self._load_rate
        if self.system.offload:
            seconds = max(seconds, tokens * self.model.token_bytes / self._save_rate)
        return seconds


def load(setting: Setting, model: DenseModel, count: int, rate: float, seed: int) -> list[Request]:
    """Draw `count` Poisson arrivals at `rate` requests a second with the setting's lengths.

    Arrivals and lengths have their own random streams, so another rate changes no length.
    """
    prompts, outputs = setting.draw(count, model.max_prompt_tokens, seed)
    gaps = np.random.default_rng(seed + 1).exponential(1.0, count)
    times = np.cumsum(gaps) / rate
    return [Request(i, float(times[i]), int(prompts[i]), int(outputs[i])) for i in range(count)]
