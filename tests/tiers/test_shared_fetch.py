"""Ranks that fetch a share of the missed rows each: the same hot rows as if each fetched all."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from sglang_ess.attention import passes
from sglang_ess.tiers import HotCache, RowCorruption, lru
from sglang_ess.tiers.shared_fetch import FIRST_ROWS, HEADER, FetchMismatch, SharedFetch
from sglang_ess.tiers.tier_group import TierGroup
from tests.support import parity
from tests.support.forked import ForkedNode
from tests.support.ranks import on_two_ranks

SLOTS, HOT_ROWS, LAYERS, WIDTH, STEPS, QUERIES, TOPK = 400, 150, 3, 82, 12, 3, 64


# --- in one process: any number of ranks and misses ---------------------------------------


class Wire:
    """Gathers of `size` ranks, each in a thread. altered(rank, message) may change a message."""

    def __init__(self, size, altered=lambda rank, message: message):
        self._altered, self._barrier = altered, Barrier(size, timeout=20)
        self._messages, self.sizes = [None] * size, []

    def of(self, rank):
        def gather(message):
            self._messages[rank] = self._altered(rank, message.copy())
            self._barrier.wait()
            assert len({len(one) for one in self._messages}) == 1, "gathers need one size"
            found = np.stack(self._messages)
            self.sizes.append(len(message))
            self._barrier.wait()
            return found

        return gather


def fetch_together(size, slots, rows, wire=None, other_slots=None):
    """Every rank's hot rows [rows, WIDTH] after one shared fetch, or the exception it raised."""
    host = np.random.default_rng(0).integers(1, 2**60, (SLOTS, WIDTH))
    wire = wire or Wire(size)

    def run(rank):
        sharing, hot = SharedFetch(rank, size, wire.of(rank)), np.zeros((HOT_ROWS, WIDTH), np.int64)
        wanted = other_slots if rank and other_slots is not None else slots
        places = rows[: len(wanted)]
        own = sharing.share(len(wanted))
        lru.copy_rows(host, hot, wanted[own], places[own], len(places[own]))
        try:
            sharing.exchange(hot, wanted, places)
        except FetchMismatch as error:
            return error
        return hot

    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(run, range(size)))
    whole = np.zeros((HOT_ROWS, WIDTH), np.int64)
    lru.copy_rows(host, whole, slots, rows, len(slots))
    return found, whole


def misses(count):
    random = np.random.default_rng(count)
    slots = random.permutation(SLOTS).astype(np.int32)
    return slots[:count], random.permutation(HOT_ROWS)[:count].astype(np.int32)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 2 * FIRST_ROWS, 2 * FIRST_ROWS + 1, 150])
def test_every_rank_has_every_row(size, count):
    slots, rows = misses(count)
    found, whole = fetch_together(size, slots, rows)
    for hot in found:
        np.testing.assert_array_equal(hot, whole)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_the_misses_once(size):
    one = SharedFetch(0, size, None)
    for count in range(60):
        places = [list(range(count))[one.share(count, rank)] for rank in range(size)]
        assert sum(places, []) == list(range(count))
        assert max(map(len, places)) == -(-count // size)


def test_few_misses_take_one_message_and_no_more_rows_than_its_size():
    wire = Wire(2)
    slots, rows = misses(2 * FIRST_ROWS)
    fetch_together(2, slots, rows, wire)
    assert set(wire.sizes) == {HEADER + FIRST_ROWS * WIDTH}
    slots, rows = misses(2 * FIRST_ROWS + 9)
    fetch_together(2, slots, rows, wire := Wire(2))
    assert set(wire.sizes) == {HEADER + FIRST_ROWS * WIDTH, 5 * WIDTH}


@pytest.mark.parametrize("other", [0, 39, 40])
def test_ranks_that_plan_otherwise_are_stopped(other):
    """Another number of misses, none, or as many others: all ranks raise, in one line."""
    slots, rows = misses(40)
    others = slots[:other] if other < 40 else np.roll(slots, 1)
    found, _ = fetch_together(2, slots, rows, other_slots=others)
    for error in found:
        assert isinstance(error, FetchMismatch) and "\n" not in str(error)
        assert "rank 0 has fetch 1 of 40 rows, crc32 " in str(error)
        assert f"rank 1 has fetch 1 of {other} rows, crc32 " in str(error)


def test_a_rank_by_itself_is_refused():
    with pytest.raises(ValueError, match="--ess-fetch-share must be off for a rank that has"):
        SharedFetch.over_gloo(TierGroup())


# --- two processes over gloo --------------------------------------------------------------


class Bytes:
    """A link that only counts what it carried."""

    def __init__(self):
        self.carried_bytes = 0

    def carried(self, num_bytes, seconds):
        self.carried_bytes += num_bytes


def decode(rank, shares, fault=None):
    """Decode steps of two index groups, a canary on every plan.

    fault: "planned otherwise", "a wrong share" or "a changed row", of rank 1
    Returns (checksums of the hot rows after each step, counters, bytes copied from the host).
    """
    from sglang_ess.mem_cache.host_share import tier_group

    random, link = np.random.default_rng(1), Bytes()
    host = torch.from_numpy(random.integers(0, 256, (LAYERS, SLOTS, 656), np.uint8))
    caches = [HotCache(list(host[:2]), HOT_ROWS, link=link), HotCache(host[2], 70, link=link)]
    if shares:
        sharing = SharedFetch.over_gloo(tier_group())
        for cache in caches:
            cache.sharing = sharing
        if rank == 1 and fault:
            break_it(sharing, fault)
    fetches, canary, found = passes.EarlyFetch(), passes.Canary(1.0), []
    for step in range(STEPS):
        new = torch.arange(step * 5, step * 5 + QUERIES)
        for group, cache in enumerate(caches):
            topk = torch.from_numpy(random.integers(-1, SLOTS, (QUERIES, TOPK)).astype(np.int32))
            if rank == 1 and fault == "planned otherwise" and step == 4:
                topk[0, 0] = (topk[0, 0] + 1) % SLOTS
            layers = [group * 2 + layer for layer in range(cache.num_layers)]
            cache.install(new, host[layers[0], new])
            run = passes.GroupStep(cache, [topk], fetches, canary)
            for layer in range(cache.num_layers):
                if layer:
                    cache.refill(layer, host[layers[layer], new])
                for plan in run.passes(0, layer, layers[layer]):
                    used = plan.rows.numpy()
                    rows = cache.arena.layers[layer].numpy()[used[used >= 0]]
                    found.append((len(plan.miss_slots), rows.tobytes()))
        fetches.drop()
    for cache in caches:
        cache.check_integrity()
    return found, [cache.counters for cache in caches], link.carried_bytes


def break_it(sharing, fault):
    if fault == "a wrong share":  # it copies and sends its neighbour's rows
        share = sharing.share
        sharing.share = lambda misses, rank=None: share(misses, 0 if rank is None else rank)
    if fault == "a changed row":
        gather = sharing._gather

        def changed(message):
            message[-1] ^= 1
            return gather(message)

        sharing._gather = changed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return decode(0, shares=False)


def test_hot_rows_are_those_of_ranks_that_fetch_all(tmp_path, alone):
    found, counters, whole = alone
    counts = [count for count, _ in found]
    assert min(counts) < 2 * FIRST_ROWS < max(counts), "one message, and two"
    ranks = on_two_ranks(decode, tmp_path, True)
    for theirs, theirs_counters, num_bytes in ranks:
        assert theirs == found and theirs_counters == counters
        assert 0.45 * whole < num_bytes < 0.55 * whole
    assert sum(num_bytes for _, _, num_bytes in ranks) == whole


def refused(rank, fault):
    """What stops a rank, and after how many seconds."""
    since = time.monotonic()
    try:
        decode(rank, True, fault)
    except (FetchMismatch, RowCorruption, RuntimeError) as error:
        return type(error).__name__, str(error), time.monotonic() - since
    return None


@pytest.mark.parametrize(
    ("fault", "stops"),
    [
        ("planned otherwise", ("FetchMismatch", "FetchMismatch")),
        ("a wrong share", ("RowCorruption", None)),
        ("a changed row", ("RowCorruption", None)),
    ],
)
def test_a_fault_of_one_rank_is_caught(tmp_path, fault, stops):
    found = on_two_ranks(refused, tmp_path, fault)
    for one, name in zip(found, stops, strict=True):
        if name is not None:
            assert one is not None and one[0] == name, found
    if fault == "planned otherwise":
        assert "ranks that share fetches must miss the same rows: got rank 0" in found[0][1]


def leave(rank):
    """Rank 1 ends before the fetch: seconds until rank 0 knows."""
    from sglang_ess.mem_cache.host_share import tier_group

    sharing = SharedFetch.over_gloo(tier_group())
    slots, rows = misses(40)
    if rank == 1:
        return None
    since = time.monotonic()
    with pytest.raises(RuntimeError):
        sharing.exchange(np.zeros((HOT_ROWS, WIDTH), np.int64), slots, rows)
    return time.monotonic() - since


def test_a_rank_that_ends_ends_the_fetch(tmp_path):
    assert on_two_ranks(leave, tmp_path)[0] < 20


# --- served -------------------------------------------------------------------------------

PROMPTS = parity.prompts_of([20, 130, 300, 640], seed=8)
FLAGS = (
    "--dtype", "float32", "--max-total-tokens", "8192", "--random-seed", "1", "--tp-size", "2",
    "--ess-hot-ratio", "0.02", "--ess-canary-rate", "1", "--ess-index-dtype", "float32",
    "--decode-log-interval", "5",
)  # fmt: skip
SHARES = "2 ranks fetch a share of the missed rows each"


def answers(model, log, *flags):
    """(tokens of each prompt, misses a step by ESS's log line, log) of a server of two ranks."""
    given = ("--model-path", str(model), *FLAGS, *flags)
    with ForkedNode("sglang_ess.launch_server", *given, log=log) as server:
        server.wait_ready()
        found = [server.generate(prompt, 12) for prompt in PROMPTS]
        assert all(status == 200 for status, _ in found), found
    text = log.read_text()
    misses = [float(count) for count in re.findall(r"([\d.]+) misses/step", text)]
    return [answer["output_ids"] for _, answer in found], misses, text


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["v32", "glm"])
def test_a_server_of_two_ranks_answers_as_without_shares(tmp_path, arch):
    """glm's layers share lists, so that a thread fetches while the ranks' other collectives run."""
    shape = dict(layers=5, sharing="FFSSS") if arch == "glm" else dict(layers=4)
    shape |= dict(arch=arch, index_topk=128, **parity.NARROW | dict(heads=4))
    model = parity.write_model(tmp_path / arch, **shape)
    tokens, misses, log = answers(model, tmp_path / "each")
    shared_tokens, shared_misses, shared_log = answers(
        model, tmp_path / "share", "--ess-fetch-share", "on"
    )
    assert shared_tokens == tokens
    assert shared_misses == misses and max(misses) > 2 * FIRST_ROWS, misses
    assert SHARES in shared_log and SHARES not in log
