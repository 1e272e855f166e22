"""PageStore in one process: what is stored, found, limited, refused and survived."""

import errno
import logging
import os
import resource
import stat
import threading
import time

import numpy as np
import pytest

from sglang_ess.errors import Refusal
from sglang_ess.store import object_file, page_store
from sglang_ess.store.page_store import PageStore, StoreDamage, StoreMiss
from sglang_ess.store.store_directory import StoreDirectory
from tests.store.objects import PARTS, disk_bytes, files, page, store, used

KEYS = [f"key {number}" for number in range(12)]


@pytest.fixture
def opened(tmp_path):
    with store(tmp_path / "store") as found:
        yield found


def read_all(found, key):
    buffers = [np.zeros(size, np.uint8) for size in PARTS]
    found.read(key, range(len(PARTS)), buffers)
    return buffers


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# What is stored is read.


def test_a_page_comes_back(opened):
    assert opened.write("a", page("a"))
    assert same(read_all(opened, "a"), page("a"))
    stats = opened.stats()
    assert (stats.objects_written, stats.parts_read, stats.bytes_read) == (1, 5, sum(PARTS))


def test_some_parts_in_any_order(opened):
    opened.write("a", page("a"))
    for numbers in ([3], [4, 0], [1, 2, 4], [2, 1, 0]):
        buffers = [np.zeros(PARTS[number], np.uint8) for number in numbers]
        opened.read("a", numbers, buffers)
        assert same(buffers, [page("a")[number] for number in numbers])


def test_strided_chunks_are_the_same_part(opened):
    """Written from rows of one array, read into the rows of another; rows may be of any length."""
    parts = page("a")
    host = np.zeros((64, 100), np.uint8)
    host[:, :50] = parts[1][:3200].reshape(64, 50)
    assert PARTS[1] == 64 * 50
    assert opened.write("a", [parts[0], [row[:50] for row in host], *parts[2:]])
    target = np.zeros((32, 128), np.uint8)
    opened.read("a", [1], [[row[:100] for row in target]])
    assert np.array_equal(target[:, :100].ravel(), parts[1])
    assert not target[:, 100:].any()


def test_more_chunks_than_one_call_takes(tmp_path):
    chunks = [np.full(3, number % 251, np.uint8) for number in range(2500)]
    with store(tmp_path / "s", parts=[7500]) as found:
        assert found.write("a", [chunks])
        target = [np.zeros(3, np.uint8) for _ in chunks]
        found.read("a", [0], [target])
        assert same(target, chunks)


def test_a_call_that_stops_within_a_chunk_goes_on(opened, monkeypatch):
    def short(call):
        def few(file, views, offset):
            return call(file, [views[0][: max(1, views[0].nbytes // 2)]], offset)

        return few

    monkeypatch.setattr(object_file.os, "pwritev", short(os.pwritev))
    monkeypatch.setattr(object_file.os, "preadv", short(os.preadv))
    assert opened.write("a", page("a"))
    assert same(read_all(opened, "a"), page("a"))


@pytest.mark.parametrize(
    ("numbers", "sizes", "message"),
    [
        ([5], [1], "numbered 0 to 4: got 5"),
        ([0], [9], f"Part 0 has {PARTS[0]} bytes: got 9"),
    ],
)
def test_buffers_that_do_not_fit(opened, numbers, sizes, message):
    opened.write("a", page("a"))
    with pytest.raises(ValueError, match=message):
        opened.read("a", numbers, [np.zeros(size, np.uint8) for size in sizes])


def test_buffers_of_another_kind(opened):
    with pytest.raises(ValueError, match="must be writable"):
        opened.read("a", [0], [bytes(PARTS[0])])
    with pytest.raises(ValueError, match="contiguous: got strides"):
        opened.read("a", [0], [np.zeros(2 * PARTS[0], np.uint8)[::2]])
    with pytest.raises(ValueError, match="has 5 parts: got 1"):
        opened.write("a", [bytes(PARTS[0])])


def test_contains_is_a_prefix(opened):
    for key in ("a", "b", "d"):
        opened.write(key, page(key))
    assert opened.contains(["a", "b", "c", "d"]) == 2
    assert opened.contains(["c", "a"]) == 0
    assert opened.contains([]) == 0
    assert opened.contains(["d", "b", "a"]) == 3


def test_a_second_write_writes_nothing(opened):
    assert opened.write("a", page("a"))
    assert not opened.write("a", page("b"))
    assert same(read_all(opened, "a"), page("a"))
    assert opened.stats().already_there == 1


def test_it_survives_a_restart_and_other_identities_see_nothing(tmp_path):
    with store(tmp_path) as found:
        found.write("a", page("a"))
    for other in ({"identity": "other weights"}, {"parts": [*PARTS[:-1], PARTS[-1] + 1]}):
        with store(tmp_path, **other) as found:
            assert found.contains(["a"]) == 0
            with pytest.raises(StoreMiss):
                found.read("a", [0], [np.zeros(PARTS[0], np.uint8)])
    with store(tmp_path) as found:
        assert same(read_all(found, "a"), page("a"))


def test_reset_deletes_this_identity_alone(tmp_path):
    with store(tmp_path) as first, store(tmp_path, identity="b") as second:
        first.write("a", page("a"))
        second.write("a", page("b"))
        first.reset()
        assert (first.contains(["a"]), second.contains(["a"])) == (0, 1)
        assert first.stats().used_bytes == used(1)


# Damage.


def only_file(directory):
    (found,) = files(directory)
    return found


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("offset", [0, 9, 20, 60, 100, 130, 4096, 4096 + sum(PARTS) - 1])
def test_a_flipped_bit_is_never_served(tmp_path, offset, caplog):
    with store(tmp_path) as found:
        found.write("a", page("a"))
        flip(only_file(tmp_path), offset)
        with pytest.raises(StoreDamage, match="a"):
            read_all(found, "a")
        assert (found.contains(["a"]), found.stats().damaged, found.stats().used_bytes) == (
            0,
            1,
            used(0),
        )
        assert found.write("a", page("a")) and same(read_all(found, "a"), page("a"))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("size", [0, 50, 4095, 4096, 5000, 4096 + sum(PARTS) - 1])
def test_a_truncated_file_is_never_served(tmp_path, size):
    with store(tmp_path) as found:
        found.write("a", page("a"))
        os.truncate(only_file(tmp_path), size)
        with pytest.raises(StoreDamage):
            read_all(found, "a")
        assert found.contains(["a"]) == 0


def test_a_part_that_is_whole_is_served_beside_one_that_is_not(tmp_path):
    with store(tmp_path) as found:
        found.write("a", page("a"))
        flip(only_file(tmp_path), 4096 + sum(PARTS) - 1)
        buffer = np.zeros(PARTS[0], np.uint8)
        found.read("a", [0], [buffer])
        assert np.array_equal(buffer, page("a")[0])


def test_the_bytes_of_another_page_are_caught(tmp_path):
    """A whole file under another's name, and one part of another page in a sound file."""
    with store(tmp_path) as found:
        found.write("a", page("a"))
        first = only_file(tmp_path)
        found.write("b", page("b"))
        (second,) = set(files(tmp_path)) - {first}
        donor, own = second.read_bytes(), first.read_bytes()
        start = 4096 + PARTS[0]
        mixed = own[:start] + donor[start : start + PARTS[1]] + own[start + PARTS[1] :]
        for damaged, what in ((donor, "another key"), (mixed, "wrong checksum of part 1")):
            first.write_bytes(damaged)
            with pytest.raises(StoreDamage, match=what):
                read_all(found, "a")
            assert found.write("a", page("a"))
        assert same(read_all(found, "b"), page("b"))


def test_a_part_moved_within_its_page_is_caught(tmp_path):
    """Parts 2 and 3 have one size and here the same bytes: only their number tells them apart."""
    with store(tmp_path, parts=[64, 64]) as found:
        found.write("a", [bytes(64), bytes([1] * 64)])
        path = only_file(tmp_path)
        own = bytearray(path.read_bytes())
        own[4096:4160], own[4160:4224] = own[4160:4224], own[4096:4160]
        path.write_bytes(own)
        with pytest.raises(StoreDamage, match="part 0"):
            found.read("a", [0, 1], [bytearray(64), bytearray(64)])


# The limit.


def age(directory, seconds):
    """Make every object's last use older, so that the next touch counts."""
    for path in files(directory):
        used_at = path.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(used_at, used_at))


def test_what_was_unused_for_longest_goes_first(tmp_path):
    with store(tmp_path, objects=3) as found:
        for key in ("a", "b", "c"):
            found.write(key, page(key))
            age(tmp_path, 10)
        assert found.contains(["a"]) == 1
        assert found.write("d", page("d"))
        assert [found.contains([key]) for key in "abcd"] == [1, 0, 1, 1]
        assert found.stats().evicted == 1


def test_what_is_used_while_others_are_evicted_stays(tmp_path, monkeypatch):
    with store(tmp_path, objects=3) as found:
        for key in ("a", "b", "c"):
            found.write(key, page(key))
            age(tmp_path, 10)
        scan = StoreDirectory.scan

        def scan_then_hit(*arguments):
            objects = list(scan(*arguments))
            assert found.contains(["a"]) == 1
            return objects

        monkeypatch.setattr(StoreDirectory, "scan", scan_then_hit)
        assert found.write("d", page("d"))
        assert [found.contains([key]) for key in "abcd"] == [1, 0, 1, 1]


def test_the_order_survives_a_restart(tmp_path):
    with store(tmp_path, objects=3) as found:
        for key in ("a", "b", "c"):
            found.write(key, page(key))
            age(tmp_path, 10)
        found.contains(["a"])
    with store(tmp_path, objects=3) as found:
        found.write("d", page("d"))
        assert [found.contains([key]) for key in "abcd"] == [1, 0, 1, 1]


def test_the_end_of_a_prefix_goes_before_its_beginning(tmp_path):
    with store(tmp_path, objects=4) as found:
        for key in "abcd":
            found.write(key, page(key))
        age(tmp_path, 10)
        assert found.contains(["a", "b", "c", "d"]) == 4
        found.write("e", page("e"))
        assert [found.contains([key]) for key in "abcd"] == [1, 1, 1, 0]


def test_the_files_never_take_more_than_the_limit(tmp_path):
    with store(tmp_path, objects=5) as found:
        for key in KEYS * 3:
            found.write(key, page(key))
            assert disk_bytes(tmp_path) <= found.stats().limit_bytes
            assert found.stats().used_bytes == used(len(files(tmp_path)))
        assert len(files(tmp_path)) == 5


def test_other_models_make_room(tmp_path):
    with store(tmp_path, objects=3) as old:
        for key in "abc":
            old.write(key, page(key))
    with store(tmp_path, objects=3, identity="new") as new:
        for key in "abc":
            assert new.write(key, page(key))
        assert new.contains(list("abc")) == 3
        assert len(os.listdir(tmp_path / "objects")) == 1


def test_a_lower_limit_holds_from_the_start(tmp_path):
    with store(tmp_path, objects=6) as found:
        for key in KEYS[:6]:
            found.write(key, page(key))
    with store(tmp_path, objects=2) as found:
        assert len(files(tmp_path)) <= 2
        assert found.stats().used_bytes <= found.stats().limit_bytes


def test_empty_folders_are_not_left(tmp_path):
    """They take a block each, which no object pays for."""
    with store(tmp_path) as found:
        found.write("a", page("a"))
        os.truncate(only_file(tmp_path), 5)
        with pytest.raises(StoreDamage):
            read_all(found, "a")
        assert os.listdir(tmp_path / "objects") == []
    (tmp_path / "objects" / "0123-8192" / "ab").mkdir(parents=True)  # a killed writer's
    with store(tmp_path):
        assert os.listdir(tmp_path / "objects") == []


def test_opening_counts_again(tmp_path):
    """Whatever the number in use was: a process may die before it is lowered."""
    with store(tmp_path) as found:
        for key in "abc":
            found.write(key, page(key))
        files(tmp_path)[0].unlink()
        (tmp_path / "tmp" / "00.0.12345").write_bytes(b"left by a dead process")
        assert found.stats().used_bytes == used(3)
        with store(tmp_path) as second:
            assert second.stats().used_bytes == found.stats().used_bytes == used(2)
        assert not os.listdir(tmp_path / "tmp")


# Directories.


def test_only_the_owner_may_read(opened, tmp_path):
    old = os.umask(0)
    try:
        opened.write("a", page("a"))
    finally:
        os.umask(old)
    root = tmp_path / "store"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def refusal(directory, **options):
    with pytest.raises(Refusal) as caught, store(directory, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "has no file ess-store, but 1 others, 'thesis.tex' first" in refusal(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_store_of_another_version_is_refused(tmp_path):
    (tmp_path / "ess-store").write_bytes(b"ESS-PAGE-STORE-9" + bytes(8))
    assert "store of this version" in refusal(tmp_path)


def test_a_directory_that_others_may_write_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o770)
    assert "has mode 0770. Run chmod 700" in refusal(tmp_path / "s")


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert f"must belong to user 4242: {tmp_path} is of user" in refusal(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "got File exists for" in refusal(tmp_path / "file")
    assert "got Not a directory for" in refusal(tmp_path / "file" / "s")


def test_a_limit_below_one_object_is_refused(tmp_path):
    said = refusal(tmp_path, limit_bytes=used(1) - 1)
    assert f"at least {used(1)} bytes, for one object: got {used(1) - 1}" in said


def test_a_limit_above_the_disk_is_said(tmp_path, caplog):
    with store(tmp_path, limit_bytes=1 << 60):
        assert "1073741824.0 GiB, and" in caplog.text


# Faults.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_write_that_fails_is_skipped(opened, tmp_path, monkeypatch, caplog, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(object_file.os, "pwritev", fails)
        assert [opened.write(key, page(key)) for key in KEYS] == [False] * 12
    assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == 1
    assert os.strerror(number) in caplog.text
    stats = opened.stats()
    assert (stats.write_errors, stats.used_bytes) == (12, used(0))
    assert not os.listdir(tmp_path / "store" / "tmp")
    assert opened.write("a", page("a"))


def test_a_disk_that_is_full_after_half_an_object(opened, tmp_path):
    """The kernel writes what fits and refuses the rest, here by the process's limit of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        assert not opened.write("a", page("a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (opened.stats().write_errors, opened.stats().used_bytes) == (1, used(0))
    assert not os.listdir(tmp_path / "store" / "tmp") and not files(tmp_path / "store")


def test_a_read_that_fails_is_a_miss(opened, monkeypatch, caplog):
    opened.write("a", page("a"))

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(object_file.os, "preadv", fails)
        for _ in range(3):
            with pytest.raises(StoreMiss, match="Input/output error"):
                read_all(opened, "a")
    assert (opened.stats().read_errors, len(caplog.records)) == (3, 1)
    assert same(read_all(opened, "a"), page("a"))


def test_a_directory_that_vanishes(opened, tmp_path, caplog):
    """Everything misses, nothing is written, least of all into a new directory of that name."""
    opened.write("a", page("a"))
    (tmp_path / "store").rename(tmp_path / "gone")
    os.system(f"rm -r {tmp_path / 'gone'}")
    (tmp_path / "store").mkdir()
    assert opened.contains(["a"]) == 0
    with pytest.raises(StoreMiss):
        read_all(opened, "a")
    assert [opened.write(key, page(key)) for key in KEYS] == [False] * 12
    assert os.listdir(tmp_path / "store") == []
    assert opened.stats().write_errors == 12
    assert len(caplog.records) == 1


# Threads.


def test_futures(opened):
    writes = [opened.submit_write(key, page(key)) for key in KEYS]
    assert [each.result() for each in writes] == [True] * 12
    targets = {key: [np.zeros(size, np.uint8) for size in PARTS] for key in KEYS}
    reads = [opened.submit_read(key, range(5), targets[key]) for key in KEYS]
    assert all(each.result() is None for each in reads)
    assert all(same(targets[key], page(key)) for key in KEYS)
    with pytest.raises(StoreMiss):
        opened.submit_read("none", [0], [np.zeros(PARTS[0], np.uint8)]).result()


def test_a_slow_disk_never_blocks_who_submits(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = page_store.ObjectFormat.write

    def slow(*arguments):
        assert go_on.wait(30)
        write(*arguments)

    monkeypatch.setattr(page_store.ObjectFormat, "write", slow)
    with store(tmp_path, max_pending_writes=3) as found:
        start = time.monotonic()
        futures = [found.submit_write(key, page(key)) for key in KEYS[:5]]
        assert time.monotonic() - start < 10
        assert (found.stats().pending_writes, found.stats().skipped_busy) == (3, 2)
        assert [each.result() for each in futures[3:]] == [False, False]
        go_on.set()
        assert [each.result() for each in futures[:3]] == [True] * 3
        assert found.submit_write("last", page("last")).result()


def test_a_closed_store_does_nothing(tmp_path):
    with store(tmp_path) as found:
        found.write("a", page("a"))
    found.close()
    assert found.contains(["a"]) == 0
    assert not found.write("b", page("b"))
    with pytest.raises(StoreMiss):
        read_all(found, "a")
    assert found.stats().used_bytes == 0
    assert not os.listdir(tmp_path / "live")
    assert PageStore(tmp_path, 1 << 20, "model", PARTS).contains(["a"]) == 1
