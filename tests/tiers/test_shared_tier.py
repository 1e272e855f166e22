"""One host tier of several processes: the memory is there once, in order, and goes with them."""

import errno
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_ess.errors import Refusal
from sglang_ess.tiers import (
    HostTier,
    TierGroup,
    host_memory,
    host_tier,
    rank_order,
    shared_memory,
)
from tests.support.tier_ranks import bytes_of, mapped, resident_bytes, tier_ranks

LAYERS, SLOTS, ROW = 3, 5000, 656
PAGES = 4096
SOON = 30  # seconds: a look every 0.2 s, on a busy machine


def inode_of(tier):
    """The file whose mapping holds the tier's rows; it has no name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *name = line.split()
        first, _, end = span.partition("-")
        if int(first, 16) <= tier.rows[0].data_ptr() < int(end, 16):
            assert name == ["/memfd:ess-host-tier", "(deleted)"]
            return int(inode)
    raise AssertionError("rows must be in a mapping")


def a_rank(group, pipe):
    """Serve the commands of a test on one rank's tier."""
    tier = HostTier(LAYERS, SLOTS, (ROW,), torch.uint8, group)
    order, delays = tier.order, {}

    def fill(layer, slots, value):
        time.sleep(delays.pop("write", 0))
        tier.rows[layer][slots] = value

    def sleep_before(name, seconds):
        delays[name] = seconds

    def write(layer, slots, value):
        """All ranks call it; what this rank reads of the first slot right after."""
        order.write(fill, layer, slots, value)
        return int(tier.rows[layer][slots][0, 0])

    def read(layer, slots):
        return [int(value) for value in tier.rows[layer][slots][:, 0]]

    def next_pass(layer, slots, value, seconds=0):
        """Read, `seconds` later, what a pass reads; then begin the next, which writes."""
        time.sleep(seconds)
        seen = read(layer, slots)
        order.begin()
        return seen, write(layer, slots, value)

    def without_wait():
        order._wait = lambda *args, **kwargs: None

    def limit(seconds):
        order._group = replace(group, limit_seconds=seconds)

    commands = {
        "write": write, "read": read, "next_pass": next_pass, "begin": order.begin,
        "delay": sleep_before, "without_wait": without_wait, "limit": limit,
        "inode": lambda: inode_of(tier), "bytes": lambda: bytes_of(inode_of(tier)),
        "nbytes": lambda: tier.nbytes,
    }  # fmt: skip
    pipe.send((True, os.getpid()))
    while True:
        name, *args = pipe.recv()
        try:
            pipe.send((True, commands[name](*args)))
        except Exception as error:
            pipe.send((True, f"{type(error).__name__}: {error}"))


@pytest.fixture(params=[2, 3])
def many(request):
    with tier_ranks(a_rank, request.param) as ranks:
        ranks.pids = [ranks.answer(rank) for rank in range(request.param)]
        yield ranks


@pytest.fixture
def two():
    with tier_ranks(a_rank) as ranks:
        ranks.pids = [ranks.answer(rank) for rank in range(2)]
        yield ranks


def all_tell(ranks, *command):
    for rank in range(len(ranks.pids)):
        ranks.tell(rank, *command)
    return [ranks.answer(rank) for rank in range(len(ranks.pids))]


def test_the_memory_of_all_is_that_of_one(many):
    """By the tier's own figure and by the kernel's: each rank has a part of the same pages."""
    slots = list(range(0, SLOTS, 2))
    assert all_tell(many, "nbytes") == [LAYERS * SLOTS * ROW] * len(many.pids)
    assert len(set(all_tell(many, "inode"))) == 1
    # Pages are taken at the first touch: so far, those of the counters and of nothing else.
    assert all(found["Rss"] <= 2 * PAGES for found in all_tell(many, "bytes"))
    for layer in range(LAYERS):
        assert all_tell(many, "write", layer, slots, layer + 1) == [layer + 1] * len(many.pids)
    # Every rank touches every row: none has a copy of its own.
    for layer in range(LAYERS):
        wanted = [layer + 1 if slot in slots else 0 for slot in range(8)]
        assert all_tell(many, "read", layer, list(range(SLOTS)))[-1][:8] == wanted
    found = all_tell(many, "bytes")
    assert all(one["Rss"] >= LAYERS * SLOTS * ROW for one in found)
    total = sum(one["Pss"] for one in found)
    assert LAYERS * SLOTS * ROW <= total <= LAYERS * (SLOTS * ROW + 2 * PAGES) + 2 * PAGES
    alone = HostTier(LAYERS, SLOTS, (ROW,), torch.uint8)
    for rows in alone.rows:
        rows.fill_(1)
    assert total <= 1.01 * resident_bytes(alone.rows)


@pytest.mark.parametrize("killed", [[0], [1], [0, 1, 2]])
def test_nothing_is_left_after_a_kill(killed):
    before = set(os.listdir("/dev/shm"))
    with tier_ranks(a_rank, 3) as ranks:
        ranks.pids = [ranks.answer(rank) for rank in range(3)]
        all_tell(ranks, "write", 0, [1, 2], 7)
        inode = ranks.ask(0, "inode")
        assert sorted(mapped(inode)) == sorted(ranks.pids), "the test must find who maps it"
        ranks.kill(*killed)
        left = [pid for rank, pid in enumerate(ranks.pids) if rank not in killed]
        assert sorted(mapped(inode)) == sorted(left)
        if left:  # the others still have the rows
            assert ranks.ask(2, "read", 0, [1, 2]) == [7, 7]
    assert not mapped(inode)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "ess" in name}


def delayed_writer(ranks):
    """What each rank reads right after a write that the writer is late with."""
    all_tell(ranks, "write", 1, [5], 1)
    ranks.ask(0, "delay", "write", 0.4)
    return all_tell(ranks, "write", 1, [5], 2)


def delayed_reader(ranks):
    """What each rank reads in a pass; the writer goes on to the next pass, which reuses the slot,
    before a reader has read.
    """
    all_tell(ranks, "begin")
    all_tell(ranks, "write", 2, [9], 1)
    for rank in range(len(ranks.pids)):
        ranks.tell(rank, "next_pass", 2, [9], 2, 0.4 if rank else 0)
    return [ranks.answer(rank)[0] for rank in range(len(ranks.pids))]


def test_no_rank_reads_a_row_before_it_is_written(many):
    assert delayed_writer(many) == [2] * len(many.pids)


def test_no_row_is_overwritten_that_a_rank_still_reads(many):
    assert delayed_reader(many) == [[1]] * len(many.pids)


def test_without_the_waits_both_happen(two):
    """The tests above can fail: an old row is read, and one that a later pass has written."""
    two.ask(1, "without_wait")
    assert delayed_writer(two) == [2, 1]
    time.sleep(0.5)
    two.ask(0, "without_wait")
    assert delayed_reader(two) == [[1], [2]]


def test_a_pass_that_one_rank_gives_up_does_not_shift_the_next(two):
    all_tell(two, "begin")
    all_tell(two, "write", 0, [3], 1)
    two.ask(0, "write", 0, [3], 2)  # the other rank never comes to this one
    all_tell(two, "begin")
    two.ask(0, "delay", "write", 0.3)
    assert all_tell(two, "write", 0, [3], 4) == [4, 4]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_wait_for_a_rank_that_was_killed_ends_in_one_line(two, killed):
    other = 1 - killed
    two.ask(other, "begin")
    two.tell(other, "write", 0, [1], 1)
    assert not two.has_answered(other, 0.2)
    since = time.monotonic()
    two.kill(killed)
    line = two.answer(other)
    assert time.monotonic() - since < SOON
    assert "\n" not in line and line.startswith("RankLost: ranks that share a host tier must")
    assert f"no word from rank {killed} (process {two.pids[killed]}): it has ended" in line


def test_a_rank_that_hangs_ends_the_wait_too(two):
    two.ask(1, "limit", 0.5)
    line = two.ask(1, "write", 0, [1], 1)
    assert f"no word from rank 0 (process {two.pids[0]}): none for 0 s" in line


def a_rank_that_fails(group, pipe):
    """Build a tier after the test has said what fails on this rank; give the line it ends with."""
    (fault,) = pipe.recv()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOMEM, "no memory")

    if fault == "room":
        host_tier.free_host_bytes = lambda: 1000
    elif fault == "memfd":
        os.memfd_create = fail
    elif fault == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGES, resource.RLIM_INFINITY))
    elif fault == "map":
        host_memory.mmap.mmap = fail
    elif fault == "size":
        shared_memory.os.fstat = lambda fd: SimpleNamespace(st_size=4096)
    try:
        HostTier(LAYERS, SLOTS, (ROW,), torch.uint8, group)
    except Refusal as error:
        pipe.send((True, f"{type(error).__name__}: {error}"))
    else:
        pipe.send((True, "no error"))


@pytest.mark.parametrize(
    ("rank", "fault", "line"),
    [
        (0, "room", "host tier must fit into free host memory: got 0.01 GiB"),
        (0, "memfd", "host memory that ranks share must be had by memfd_create: got Cannot"),
        (
            0,
            "limit",
            "host memory that ranks share must be had by memfd_create: got File too large for 0.01 "
            "GiB. Raise the limit on a file's size: ulimit -f unlimited.",
        ),
        (0, "map", "host memory must have addresses: got Cannot allocate memory for 0.01 GiB"),
        (1, "map", "host memory must have addresses: got Cannot allocate memory for 0.01 GiB"),
        (1, "size", "host tier must have 9846784 B on every rank of a node: got 4096 B"),
    ],
)
def test_a_rank_that_cannot_build_its_tier_ends_the_others(rank, fault, line):
    """One rank says why, the others end by themselves and name it."""
    with tier_ranks(a_rank_that_fails, 3) as ranks:
        for i in range(3):
            ranks.tell(i, fault if i == rank else None)
        lines = [ranks.answer(i) for i in range(3)]
    own = lines.pop(rank)
    assert own.startswith(f"HostMemoryError: {line}") and "\n" not in own
    for other in lines:
        assert other.startswith("PeerRefusal: all 3 ranks that share a host tier must start: ")
        assert f"rank {rank} has failed (HostMemoryError: {line}" in other and "\n" not in other


def test_a_reader_without_room_of_its_own_needs_none():
    """Rank 0 looks for room, once: the pages are there once."""
    with tier_ranks(a_rank_that_fails) as ranks:
        ranks.tell(0, None)
        ranks.tell(1, "room")
        assert [ranks.answer(rank) for rank in range(2)] == ["no error"] * 2


def test_the_counters_have_a_cache_line_each():
    assert rank_order.RankOrder.num_bytes(8) == 9 * 64
    order, seen = rank_order.RankOrder(TierGroup()), []
    order.begin()
    order.write(seen.append, 5)
    assert seen == [5] and order.is_writer
