"""PageStore: objects of pages in files, for every server over one directory.

Why own code. A file of SGLang's HiCacheFile has neither a checksum nor the format of its bytes, and
each rank evicts the files of its own name alone. sglang-fs-linker (0.1.0) stores by torch.save and
has no limit. diskcache copies values and pickles them. NIXL's POSIX plugin moves bytes between
registered memory and open files; names, limits, checksums and crashes are its caller's. xxhash, a
dependency of SGLang, gives the checksums here.

Durability: an object is written to a temporary name and renamed; nothing is flushed to the disk
(no fsync), because it can be computed again. What a power failure tears fails its checksum.

Page cache: it is used, with no advice. So host memory that is free caches the disk, and a restarted
server reads what it wrote from memory. O_DIRECT takes less CPU time for a cold object (python -m
benchmarks.store has both), but needs an aligned copy: a page's rows and keys are not aligned.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sglang_ess.errors import Refusal, in_one_line
from sglang_ess.store.object_file import DamagedObject, ObjectFormat, Part
from sglang_ess.store.store_directory import OWN_BYTES, StoreDirectory, limit_warning

logger = logging.getLogger(__name__)

WORKERS = 8
MAX_PENDING_WRITES = 64
TOUCH_NS = 10**9  # a last use is kept to this accuracy: a hot prefix is touched once a second


class StoreMiss(Exception):
    """The object is not there (any more), or its file cannot be read."""


class StoreDamage(Exception):
    """The object's bytes were not those that were written. It has been removed."""


class StoreStats(NamedTuple):
    """Counts since the store was opened, by this process; used_bytes is of all processes."""

    objects_written: int = 0
    bytes_written: int = 0
    parts_read: int = 0
    bytes_read: int = 0
    misses: int = 0
    damaged: int = 0
    already_there: int = 0
    skipped_full: int = 0
    skipped_busy: int = 0
    write_errors: int = 0
    read_errors: int = 0
    evicted: int = 0
    pending_writes: int = 0
    used_bytes: int = 0
    limit_bytes: int = 0


class PageStore:
    """Objects of fixed parts by key, at most limit_bytes of them on the disk.

    directory: empty, absent, or a store of this user; several processes may have it open at once,
        and should give it the same limit
    limit_bytes: of all files with headers and directories; what was unused for longest goes first
    identity: what makes bytes unfit for another server (model, revision or digest of the weights,
        format, page size, dtype); objects of another identity are never seen, only evicted
    parts: bytes of each part of an object, for example one layer's latent rows of a page
    workers: threads that read; half as many write
    max_pending_writes: further writes are skipped until one is done
    Every method may be called from any thread. A failing disk is a miss or a skipped write, counted
    and logged once.
    Raises: Refusal for a directory or a limit that cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        limit_bytes: int,
        identity: str,
        parts: Sequence[int],
        workers: int = WORKERS,
        max_pending_writes: int = MAX_PENDING_WRITES,
    ):
        if not parts or min(parts) < 1:
            raise ValueError(f"An object has parts of at least 1 byte: got {list(parts)}.")
        self._format = ObjectFormat(identity, parts)
        if limit_bytes < (least := OWN_BYTES + self._format.charged_bytes):
            raise Refusal(
                f"The store's limit must be at least {least} bytes, for one object: got "
                f"{limit_bytes}. Raise it."
            )
        self._directory = StoreDirectory(directory, limit_bytes)
        self._counts: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._max_pending_writes = max_pending_writes
        self._readers = ThreadPoolExecutor(workers, "ess-store-read")
        self._writers = ThreadPoolExecutor(max(1, workers // 2), "ess-store-write")
        if warning := limit_warning(self._directory):
            logger.warning(warning)

    # Lookup.

    def contains(self, keys: Sequence[str]) -> int:
        """How many keys from the first on are all there; they count as used now.

        A read may miss all the same: another process may evict between the two.
        """
        now = time.time_ns()
        for place, key in enumerate(keys):
            path = self._path(self._format.digest(key))
            try:
                if (used_at := self._directory.used_at(path)) is None:
                    return place
                if now - used_at > TOUCH_NS:
                    # The end of a prefix is older than its beginning: it goes first, and what is
                    # left can still be used.
                    self._directory.touch(path, now - place)
            except OSError as error:
                self._failed("read", error)
                return place
        return len(keys)

    # Reading.

    def read(self, key: str, part_numbers: Sequence[int], buffers: Sequence[Part]) -> None:
        """Fill a buffer from each part. After an exception the buffers have arbitrary bytes.

        buffers: for each part number a writable buffer, or a list of those that take it in turn.
        Parts with consecutive numbers are read by one call.
        Raises: StoreMiss; StoreDamage; ValueError for buffers that do not fit.
        """
        numbered = zip(part_numbers, buffers, strict=True)
        parts = [self._format.chunks(number, part, writable=True) for number, part in numbered]
        digest = self._format.digest(key)
        path = self._path(digest)
        try:
            self._read_file(path, digest, part_numbers, parts)
        except FileNotFoundError:
            self._count(misses=1)
            raise StoreMiss(f"no object {key}") from None
        except OSError as error:
            self._failed("read", error)
            raise StoreMiss(f"object {key}: {in_one_line(error)}") from error
        except DamagedObject as error:
            self._damaged(path, key, error)
            raise StoreDamage(f"object {key}: {error}") from error
        size = sum(self._format.parts[number] for number in part_numbers)
        self._count(parts_read=len(part_numbers), bytes_read=size)

    def _read_file(
        self, path: str, digest: bytes, numbers: Sequence[int], parts: list[list[memoryview]]
    ) -> None:
        file = self._directory.open(path)
        try:
            self._format.read(file, digest, numbers, parts)
        finally:
            os.close(file)

    def _damaged(self, path: str, key: str, damage: DamagedObject) -> None:
        self._count(damaged=1)
        self._warn("damage", f"object {key} {damage}. It is removed, and its page computed again")
        try:
            self._directory.remove(path, self._format.charged_bytes)
        except OSError as error:
            self._failed("write", error)

    def submit_read(
        self, key: str, part_numbers: Sequence[int], buffers: Sequence[Part]
    ) -> Future[None]:
        """read in a thread of the store. Reads start in the order in which they are submitted."""
        return self._readers.submit(self.read, key, part_numbers, buffers)

    # Writing.

    def write(self, key: str, buffers: Sequence[Part]) -> bool:
        """Store an object: one buffer, or list of buffers, for each part.

        False if nothing was written: it exists already, the store is full, or the disk fails.
        Raises: ValueError for buffers that do not fit.
        """
        if len(buffers) != len(self._format.parts):
            raise ValueError(f"An object has {len(self._format.parts)} parts: got {len(buffers)}.")
        parts = [self._format.chunks(number, part) for number, part in enumerate(buffers)]
        digest = self._format.digest(key)
        try:
            outcome = self._write_file(self._path(digest), digest, parts)
        except OSError as error:
            self._failed("write", error)
            return False
        self._count(**{outcome: 1})
        if outcome == "objects_written":
            self._count(bytes_written=self._format.file_bytes)
        return outcome == "objects_written"

    def _write_file(self, path: str, digest: bytes, parts: list[list[memoryview]]) -> str:
        """Write an object's file; returns what to count."""
        directory = self._directory
        if directory.exists(path):
            return "already_there"
        if (reservation := directory.reserve(self._format.charged_bytes)) is None:
            return "skipped_full"
        published = False
        try:
            try:
                self._format.write(reservation.file, digest, parts)
            finally:
                os.close(reservation.file)
            published = directory.publish(reservation, path)
        finally:
            if not published:
                directory.discard(reservation)
        return "objects_written" if published else "already_there"

    def submit_write(self, key: str, buffers: Sequence[Part]) -> Future[bool]:
        """write in a thread of the store. The buffers must stay as they are until it is done.

        Never blocks: False at once while max_pending_writes are under way.
        """
        with self._lock:
            is_busy = self._counts["pending_writes"] >= self._max_pending_writes
            self._counts["skipped_busy" if is_busy else "pending_writes"] += 1
        if is_busy:
            skipped: Future[bool] = Future()
            skipped.set_result(False)
            return skipped
        future = self._writers.submit(self.write, key, buffers)
        future.add_done_callback(lambda _: self._count(pending_writes=-1))
        return future

    # Counts and warnings.

    def stats(self) -> StoreStats:
        """What was done and refused so far."""
        with self._lock:
            counts = dict(self._counts)
        counts["evicted"] = self._directory.num_evicted
        try:
            used = self._directory.used_bytes
        except OSError:  # closed, or a failing disk
            used = 0
        return StoreStats(**counts, used_bytes=used, limit_bytes=self._directory.limit_bytes)

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def _failed(self, kind: str, error: OSError) -> None:
        self._count(**{f"{kind}_errors": 1})
        self._warn(kind, f"cannot {kind}: {in_one_line(error)}")

    def _warn(self, kind: str, text: str) -> None:
        """Log the first event of each kind."""
        with self._lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        logger.warning(
            "Store %s: %s. Requests go on without it; further ones are only counted.",
            self._directory.path,
            text,
        )

    def _path(self, digest: bytes) -> str:
        return f"objects/{self._format.path(digest)}"

    # The end.

    def reset(self) -> None:
        """Delete all objects of this identity. A write under way may still add its own."""
        try:
            for found in list(self._directory.scan(self._format.folder)):
                self._directory.remove(found.path, found.charged_bytes)
        except OSError as error:
            self._failed("write", error)

    def close(self) -> None:
        """Drop what is queued, wait for what is under way, give up the directory."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._directory.close()
