"""Host memory is really populated, with huge pages or not, and where a system call is refused."""

import errno
import gc
import logging
import mmap
import os
import time

import pytest
import torch

from sglang_ess.layout import MIB
from sglang_ess.tiers import host_memory, numa
from sglang_ess.tiers.host_memory import HostMemory, HostMemoryError, Residence

PAGE, SIZE = mmap.PAGESIZE, 16 * MIB
HALVES = [range(0, SIZE // 2), range(SIZE // 2, SIZE)]
counts_pages = pytest.mark.skipif(
    not (host_memory.PROC / "numa_maps").exists(), reason="a kernel without numa_maps"
)
has_huge_pages = pytest.mark.skipif(
    host_memory.huge_page_bytes() == 0, reason="a kernel without transparent huge pages"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 2 * MIB)


@pytest.fixture
def advice(monkeypatch):
    """advice(number, error): madvise fails so for this advice. Returns the calls of each."""
    calls, real = [], host_memory._madvise

    def give(number, error):
        def madvise(address, num_bytes, asked):
            calls.append((asked, num_bytes))
            return error if asked == number else real(address, num_bytes, asked)

        monkeypatch.setattr(host_memory, "_madvise", madvise)
        return calls

    return give


def pages_of(memory) -> int:
    """Bytes of its pages that there are."""
    return sum(memory.residence().node_bytes.values())


def flags_of(memory) -> set[str]:
    """The kernel's flags of the mapping that begins at the memory."""
    lines, found = iter((host_memory.PROC / "smaps").read_text().splitlines()), ""
    for line in lines:
        if line.startswith(f"{memory.address:x}-"):
            found = next(line for line in lines if line.startswith("VmFlags:"))
    return set(found.split()[1:])


def filled(memory) -> torch.Tensor:
    assert list(memory.populate(HALVES)) == HALVES
    return memory.view(0, (SIZE,), torch.uint8)


@counts_pages
@pytest.mark.parametrize("threads", [None, 1, 5])
def test_every_page_is_there_before_anyone_writes(threads):
    memory = HostMemory(SIZE, threads=threads)
    assert pages_of(memory) == 0
    rows = filled(memory)
    assert pages_of(memory) == memory.residence().num_bytes == SIZE
    assert not rows.any()


@counts_pages
@pytest.mark.parametrize("error", host_memory.NOT_SUPPORTED)
def test_a_kernel_that_cannot_populate_has_the_pages_touched(advice, error):
    calls = advice(host_memory.MADV_POPULATE_WRITE, error)
    memory = HostMemory(SIZE, threads=1)
    rows = filled(memory)
    assert pages_of(memory) == SIZE and not rows.any()
    assert [asked for asked, _ in calls].count(host_memory.MADV_POPULATE_WRITE) == 1


@has_huge_pages
def test_huge_pages():
    memory = HostMemory(SIZE)
    assert memory.address % host_memory.huge_page_bytes() == 0
    assert {"hg", "dc"} <= flags_of(memory)  # MADV_HUGEPAGE, MADV_DONTFORK
    filled(memory)
    residence = memory.residence()
    assert 0 < residence.huge_bytes <= SIZE
    assert f"{residence.huge_bytes / SIZE:.0%} in huge pages" in residence.text


def test_it_begins_at_a_huge_page(monkeypatch):
    """Whatever its size: newer kernels align a mapping to pages of 2 MiB, and to no larger ones."""
    huge = 64 * MIB
    monkeypatch.setattr(host_memory, "huge_page_bytes", lambda is_shared=False: huge)
    for memory in [HostMemory(huge + PAGE) for _ in range(3)]:
        assert memory.address % huge == 0
        assert memory.view(PAGE, (huge,), torch.uint8).data_ptr() == memory.address + PAGE


@pytest.mark.parametrize("file", ["always madvise [never]", None])
def test_a_kernel_without_huge_pages(monkeypatch, tmp_path, file):
    if file:
        (tmp_path / "enabled").write_text(file)
        (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(host_memory, "THP", tmp_path)
    assert host_memory.huge_page_bytes() == 0
    memory = HostMemory(SIZE)
    assert "hg" not in flags_of(memory) and not filled(memory).any()


@has_huge_pages
def test_a_refusal_of_huge_pages_is_told_and_no_more(advice, caplog):
    advice(mmap.MADV_HUGEPAGE, errno.EINVAL)
    with caplog.at_level(logging.INFO, host_memory.__name__):
        memory = HostMemory(SIZE)
    assert "no huge pages for host memory: madvise: Invalid argument" in caplog.text
    assert not filled(memory).any()


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("word", ["always", "within_size", "advise", "never", "deny", "force"])
def test_memory_that_ranks_share_has_a_switch_of_its_own(
    monkeypatch, tmp_path, caplog, word, has_gpu
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    words = "always within_size advise never deny force".replace(word, f"[{word}]")
    (tmp_path / "enabled").write_text("always madvise [never]")
    (tmp_path / "shmem_enabled").write_text(words)
    (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(host_memory, "THP", tmp_path)
    gives = word not in ("never", "deny")
    assert host_memory.shared_huge_pages() == word
    assert host_memory.huge_page_bytes(is_shared=True) == (2 * MIB if gives else 0)
    assert host_memory.huge_page_bytes() == 0
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, SIZE)
    memory, again = (HostMemory(SIZE, shared=descriptor) for _ in range(2))
    os.close(descriptor)
    assert ("hg" in flags_of(memory)) == gives
    told = f"got {word} in {tmp_path / 'shmem_enabled'}. Set it to advise."
    assert (told in caplog.text) == (has_gpu and not gives)
    filled(memory).fill_(3)
    assert again.view(0, (SIZE,), torch.uint8).eq(3).all()


def test_less_than_a_huge_page_does_not_grow_to_one():
    memory = HostMemory(3 * PAGE)
    assert list(memory.populate([range(0, 3 * PAGE)])) == [range(0, 3 * PAGE)]
    assert "hg" not in flags_of(memory)
    assert memory.residence().huge_bytes == 0


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EFAULT])
def test_a_kernel_without_memory_is_one_line_and_the_rest_is_left(advice, error):
    calls = advice(host_memory.MADV_POPULATE_WRITE, error)
    with pytest.raises(HostMemoryError) as caught:
        list(HostMemory(SIZE, threads=1).populate(HALVES))
    line = str(caught.value)
    assert "\n" not in line and "of 0.02 GiB" in line and "lower --ess-host-gib" in line
    assert f"got {host_memory.os.strerror(error)} from the kernel at 0.00 GiB" in line
    assert [asked for asked, _ in calls].count(host_memory.MADV_POPULATE_WRITE) == 1


def test_a_chunk_that_does_not_fit_is_not_touched(advice, monkeypatch):
    """The kernel would kill the process for it."""
    calls = advice(None, 0)
    left = [3 * 2 * MIB]

    def free():
        left[0] -= 2 * MIB
        return left[0] + 2 * MIB

    monkeypatch.setattr(host_memory, "free_host_bytes", free)
    with pytest.raises(HostMemoryError, match="got 0.00 GiB left"):
        list(HostMemory(SIZE, threads=1).populate(HALVES))
    populated = [size for asked, size in calls if asked == host_memory.MADV_POPULATE_WRITE]
    assert populated == [2 * MIB] * 3


def test_a_caller_that_stops_ends_the_rest(advice):
    calls = advice(None, 0)
    memory = HostMemory(SIZE, threads=1)
    parts = memory.populate([range(i, i + PAGE) for i in range(0, SIZE, PAGE)])
    assert next(parts) == range(0, PAGE)
    parts.close()
    time.sleep(0.1)
    assert len(calls) < SIZE // PAGE // 2


def test_no_addresses():
    with pytest.raises(HostMemoryError, match="must have addresses: got Cannot allocate memory"):
        HostMemory(1 << 60)


def test_views_keep_the_memory():
    memory = HostMemory(SIZE)
    filled(memory)
    views = [memory.view(i * PAGE, (8, 16), torch.float32) for i in range(3)]
    del memory
    gc.collect()
    for i, view in enumerate(views):
        view.fill_(i)
    assert [float(view.mean()) for view in views] == [0, 1, 2]
    assert views[1].data_ptr() - views[0].data_ptr() == PAGE


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 2 * MIB), (PAGE, 7 * MIB), (2 * MIB, 4 * MIB), (5, 2 * MIB + 5)]
)
def test_chunks_end_at_multiples_so_that_no_huge_page_is_split(start, stop):
    chunks = list(host_memory._chunks(range(start, stop)))
    assert chunks[0].start == start and chunks[-1].stop == stop
    assert all(a.stop == b.start for a, b in zip(chunks, chunks[1:], strict=False))
    assert all(chunk.start % (2 * MIB) == 0 for chunk in chunks[1:])
    assert all(0 < len(chunk) <= 2 * MIB for chunk in chunks)


@pytest.mark.parametrize(("spare", "strict"), [(1, True), (0, False), (-1, False)])
def test_a_node_is_the_only_source_while_it_has_room(monkeypatch, spare, strict):
    bound = []
    free = host_memory.NODE_SPARE_BYTES + spare
    monkeypatch.setattr(numa, "free_bytes", lambda node: free if node == 5 else 0)
    monkeypatch.setattr(numa, "bind", lambda *call, strict: bound.append((*call, strict)))
    memory = HostMemory(SIZE, nodes=[5])
    filled(memory)
    starts = range(memory.address, memory.address + SIZE, 2 * MIB)
    assert sorted(bound) == [(start, 2 * MIB, (5,), strict) for start in starts]
    assert memory.unbound == ""


def test_a_refused_binding_is_asked_for_once(monkeypatch):
    asked = []

    def bind(*call, strict):
        asked.append(call)
        return "mbind: EPERM (Operation not permitted)"

    monkeypatch.setattr(numa, "bind", bind)
    memory = HostMemory(SIZE, nodes=[0], threads=1)
    assert not filled(memory).any()
    assert len(asked) == 1 and "EPERM" in memory.unbound


@counts_pages
@pytest.mark.skipif(numa._libnuma() is None, reason="no libnuma")
@pytest.mark.parametrize(("free", "policy"), [(1 << 60, "bind"), (0, "prefer")])
def test_the_kernel_has_the_policy(monkeypatch, free, policy):
    monkeypatch.setattr(numa, "free_bytes", lambda node: free)
    memory = HostMemory(SIZE, nodes=[0])
    filled(memory)
    if memory.unbound:
        pytest.skip(memory.unbound)
    lines = (host_memory.PROC / "numa_maps").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{memory.address:x} ")]
    assert line.split()[1].startswith(policy) and line.split()[1].endswith(":0")
    assert memory.residence().node_bytes == {0: SIZE}


def test_residence_as_text():
    assert Residence(8, 8, {1: 8}).text == "100% in huge pages, all on NUMA node 1"
    two = Residence(4 << 30, 1 << 30, {0: 1 << 30, 1: 3 << 30})
    assert two.text == "25% in huge pages, 1.00 GiB on NUMA node 0, 3.00 GiB on NUMA node 1"
    assert Residence(8, 0).text == "0% in huge pages"


def test_residence_of_one_mapping_among_others(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "PROC", tmp_path)
    memory = HostMemory(SIZE)
    assert memory.residence() == Residence(SIZE, 0)  # neither file
    start, end = memory.address, memory.address + SIZE
    blocks = (
        (start - PAGE, start, 9),
        (start, start + PAGE, 4),
        (start + PAGE, end, 8),
        (end, end + 1, 1),
    )
    (tmp_path / "smaps").write_text(
        "".join(
            f"{a:x}-{b:x} rw-p 00000000 00:00 0\nRss: 7 kB\nAnonHugePages: {kb - 1} kB\n"
            "ShmemPmdMapped: 1 kB\n"
            for a, b, kb in blocks
        )
    )
    maps = ((start - PAGE, "N0=9"), (start, "N0=2 N1=3"), (start + PAGE, "N1=4"), (end, "N0=5"))
    (tmp_path / "numa_maps").write_text(
        "".join(f"{a:x} default anon=9 {nodes} kernelpagesize_kB=4\n" for a, nodes in maps)
    )
    assert memory.residence() == Residence(SIZE, 12 * 1024, {0: 2 * 4096, 1: 7 * 4096})
