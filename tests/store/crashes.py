"""Processes that use a store and are killed, and what is left of it: for test_crashes.py.

    python -m tests.store.crashes random DIRECTORY ROUNDS    kill -9 at random, files damaged
    python -m tests.store.crashes each DIRECTORY             kill -9 before each system call in turn
    python -m tests.store.crashes together DIRECTORY SECONDS two servers, and one that is restarted

Prints what has happened as JSON. Has no threads when it forks.
"""

import fcntl
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import wait

import numpy as np

from sglang_ess.store import object_file, store_directory
from sglang_ess.store.page_store import StoreDamage, StoreMiss
from tests.store.objects import disk_bytes, files, page, store, used

PARTS = [60_000, 100_000, 3_000]
OBJECTS = 12  # what the store has room for
KEYS = [f"page {number}" for number in range(40)]
PAGES = {key: page(key, PARTS) for key in KEYS}
PAD_START, PAD_END = 200, 4096  # zeros after the header, which no one reads


def opened(directory, objects=OBJECTS):
    """The store of every process here; twice its threads' writes may wait."""
    limit_bytes = used(objects, PARTS)
    return store(directory, parts=PARTS, limit_bytes=limit_bytes, max_pending_writes=4)


def read(found, key):
    """Whether an object was served. Raises: AssertionError for a wrong byte; StoreDamage."""
    buffers = [np.empty(size, np.uint8) for size in PARTS]
    try:
        found.read(key, range(len(PARTS)), buffers)
    except StoreMiss:
        return False
    same = all(np.array_equal(a, b) for a, b in zip(buffers, PAGES[key], strict=True))
    assert same, f"{key} was served with wrong bytes"
    return True


def fork(work, *arguments):
    """Process id of a child that does some work; its exit status is 0 if nothing was wrong."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(pid, expected):
    """Wait for a child. expected: minus the signal that ended it, or its exit status."""
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == expected, f"got status {status}"


def serve(directory, seed, seconds):
    """Look keys up, read what is there, write what is not, in threads of the store and here."""
    rng, end_at = random.Random(seed), time.monotonic() + seconds
    with opened(directory) as found:
        while time.monotonic() < end_at:
            futures = []
            for key in rng.sample(KEYS, 4):
                if found.contains([key]):
                    read(found, key)
                else:
                    futures.append(found.submit_write(key, PAGES[key]))
            wait(futures)
            assert not any(future.exception() for future in futures)
        stats = found.stats()
    assert (stats.damaged, stats.write_errors, stats.read_errors) == (0, 0, 0), stats
    assert stats.objects_written and stats.parts_read, stats


def check(directory, hurt=()):
    """Open what is left: nothing wrong is served, nothing sound is lost, all is counted."""
    torn = len(os.listdir(os.path.join(directory, "tmp")))
    objects = len(files(directory))
    counts = Counter(torn=torn, objects=objects)
    with opened(directory) as found:
        assert not os.listdir(os.path.join(directory, "tmp"))
        assert found.stats().used_bytes == used(objects, PARTS)
        assert disk_bytes(directory) <= found.stats().limit_bytes
        for key in KEYS:
            try:
                counts["served"] += read(found, key)
            except StoreDamage:
                counts["damaged"] += 1
        assert counts["served"] + counts["damaged"] == objects, counts
        assert counts["damaged"] <= len(hurt), "a kill alone must damage nothing"
        assert found.stats().used_bytes == used(counts["served"], PARTS)
    return counts


def damage(directory, rng):
    """Hurt one object's file as a failing disk or a power failure would; returns its path."""
    found = files(directory)
    if not found:
        return []
    path = rng.choice(found)
    content = bytearray(path.read_bytes())
    kind = rng.choice(("truncate", "flip", "zero", "swap"))
    if kind == "truncate":
        del content[rng.randrange(len(content)) :]
    elif kind == "flip":
        place = rng.choice((rng.randrange(PAD_START - 100), rng.randrange(PAD_END, len(content))))
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        start = rng.randrange(0, len(content), 4096)
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    else:
        other = rng.choice(found)
        start = rng.randrange(PAD_END, len(content) - 5000)
        content[start : start + 5000] = other.read_bytes()[start : start + 5000]
        if other == path:
            return []
    path.write_bytes(content)
    return [path]


def is_writing(directory):
    try:
        return bool(os.listdir(os.path.join(directory, "tmp")))
    except FileNotFoundError:
        return False


def random_kills(directory, rounds):
    rng, total = random.Random(0), Counter()
    for number in range(rounds):
        pid = fork(serve, directory, number, 60)
        time.sleep(rng.uniform(0.002, 0.03))
        until = time.monotonic() + (0.2 if number % 4 else 0)  # most kills find a write under way
        while time.monotonic() < until and not is_writing(directory):
            pass
        os.kill(pid, signal.SIGKILL)
        end(pid, -signal.SIGKILL)
        if os.path.exists(os.path.join(directory, "tmp")):
            hurt = damage(directory, rng) if number % 2 else []
            total += check(directory, hurt) + Counter(hurt=len(hurt), kills=1)
    return total


class DyingOs:
    """The module os, until so many of its functions have been called: then kill -9."""

    def __init__(self, calls):
        self.left = calls

    def __getattr__(self, name):
        value = getattr(os, name)
        if not callable(value):
            return value

        def call(*arguments, **options):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return value(*arguments, **options)

        return call


def evict_and_write(directory, calls):
    object_file.os = store_directory.os = DyingOs(calls)
    with opened(directory, 2) as found:
        found.contains(KEYS[:1])
        assert found.write(KEYS[2], PAGES[KEYS[2]])
        assert found.write(KEYS[3], PAGES[KEYS[3]])
    object_file.os = store_directory.os = os


def each_call(directory):
    """Another server has the store open while one dies before its first, second, ... call."""
    total = Counter()
    for calls in range(10_000):
        with opened(directory, 2) as alive:
            alive.reset()
            for key in KEYS[:2]:
                assert alive.write(key, PAGES[key])
            pid = fork(evict_and_write, directory, calls)
            _, status = os.waitpid(pid, 0)
            writing = len(os.listdir(os.path.join(directory, "tmp")))
            on_disk = used(len(files(directory)) + writing, PARTS)
            assert alive.stats().used_bytes >= on_disk, calls
            total["too high"] += alive.stats().used_bytes > on_disk
            # The survivor is still within the limit when it writes on.
            alive.write(KEYS[4], PAGES[KEYS[4]])
            assert disk_bytes(directory) <= alive.stats().limit_bytes, calls
        total += check(directory)
        if os.waitstatus_to_exitcode(status) == 0:
            return total + Counter(calls=calls)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, calls
    raise AssertionError("never came to the end")


def together(directory, seconds):
    """Two servers, a third that is killed and restarted, and samples of what the disk holds."""
    with opened(directory) as found:
        limit_bytes = found.stats().limit_bytes
    servers = [fork(serve, directory, seed, seconds) for seed in (1, 2)]
    rng, total, end_at = random.Random(0), Counter(), time.monotonic() + seconds
    with open(os.path.join(directory, "ess-store"), "rb") as marker:
        while time.monotonic() < end_at:
            third = fork(serve, directory, total["kills"], 60)
            until = time.monotonic() + rng.uniform(0.02, 0.2)
            while time.monotonic() < until:
                fcntl.flock(marker, fcntl.LOCK_EX)  # no one creates or deletes meanwhile
                taken = disk_bytes(directory)
                fcntl.flock(marker, fcntl.LOCK_UN)
                assert taken <= limit_bytes, (taken, limit_bytes)
                total += Counter(samples=1, full=taken > used(OBJECTS - 2, PARTS))
                time.sleep(0.002)
            os.kill(third, signal.SIGKILL)
            end(third, -signal.SIGKILL)
            total["kills"] += 1
    for pid in servers:
        end(pid, 0)
    return total + check(directory)


if __name__ == "__main__":
    assert threading.active_count() == 1
    mode, directory, *count = sys.argv[1:]
    logging.disable()  # of each damaged file
    modes = {"random": random_kills, "each": each_call, "together": together}
    print(json.dumps(modes[mode](directory, *map(int, count))))
