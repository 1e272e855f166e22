"""The directory of a store: who may use it, how full it is, and what goes first.

    ess-store   magic and the bytes in use, u64; its lock guards that number and every name below
    evicting    its lock: one process evicts at a time
    live/       a locked file for each open store: a file whose lock is free is of a dead process
    tmp/        objects being written: <live file>.<number>.<bytes charged>
    objects/    <identity>-<bytes charged of each object>/<2 characters>/<30 characters>

The files are the index: an object exists if its file does, and its modification time is that of
its last use. So the order of eviction survives restarts and is common to all servers over a store.
The number of bytes in use grows before a temporary file is created and shrinks after a file is
gone, so a process that is killed may leave it too high, never too low. Opening a store deletes what
dead processes were writing and counts all files again, under the lock.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sglang_ess.errors import Refusal
from sglang_ess.layout import GIB, KIB

MAGIC = b"ESS-PAGE-STORE-1"
MARKER = "ess-store"
FOLDERS = ("live", "tmp", "objects")
OTHERS_MAY = stat.S_IWGRP | stat.S_IWOTH
EVICTED_SHARE = 50  # a round of eviction frees 1/50 of the limit: it reads the whole directory
OWN_BYTES = 64 * KIB  # charged for the files and folders that are there without any object
TRIES = 3  # of a writer for whom other writers take the room that an eviction made


class StoredObject(NamedTuple):
    """An object's file: nanoseconds of its last use, bytes charged, path below the store."""

    used_at: int
    charged_bytes: int
    path: str


class Reservation(NamedTuple):
    """An empty temporary file whose object's bytes are charged already.

    file: its descriptor, to write; the caller closes it
    """

    path: str
    file: int
    charged_bytes: int


class StoreDirectory:
    """An open directory of a store. All methods may be called from any thread.

    path: is created, for its owner alone, if it does not exist
    limit_bytes: the files of the store never take more, directories included
    Raises: Refusal for a directory that is not a store and not empty, or not the caller's alone.
    """

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int):
        self.path, self.limit_bytes = Path(path), limit_bytes
        self._thread_lock, self._evict_thread_lock = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        self._files: list[int] = []
        self._root = self._marker = self._evicting = -1
        self.num_evicted = 0  # objects, by this process
        try:
            self._open()
        except OSError as error:
            self.close()
            raise Refusal(
                f"The store's directory must be readable and writable, with file locks: got "
                f"{error.strerror} for {self.path}. Give another directory."
            ) from error
        except Refusal:
            self.close()
            raise

    def _open(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = self._keep(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self._refuse_what_is_not_ours()
        # Never O_TRUNC: another process may have it open and locked.
        self._marker = self._keep(self.create(MARKER, os.O_RDWR))
        self._evicting = self._keep(self.create("evicting", os.O_RDWR))
        with self._locked():
            head = os.pread(self._marker, len(MAGIC), 0)
            if not head:
                os.pwrite(self._marker, MAGIC + bytes(8), 0)
                os.fsync(self._marker)
            elif head != MAGIC:
                raise Refusal(
                    f"{self.path} must be a store of this version: its file {MARKER} begins with "
                    f"{head!r}. Delete the directory or give another."
                )
            for folder in FOLDERS:
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=self._root)
            writing = self._charged_for_writing(self._alive())
            for identity in self._entries("objects"):
                for fan in self._entries(f"objects/{identity}"):  # a killed writer leaves one
                    self._remove_empty(f"objects/{identity}/{fan}")
            stored = sum(found.charged_bytes for found in self.scan())
            self._set_used(OWN_BYTES + stored + writing)
            self._name = secrets.token_hex(8)
            file = self._keep(self.create(f"live/{self._name}", os.O_RDWR | os.O_EXCL))
            fcntl.flock(file, fcntl.LOCK_EX)
        self.make_room(0)

    def _refuse_what_is_not_ours(self) -> None:
        found = os.fstat(self._root)
        if found.st_uid != os.geteuid():
            raise Refusal(
                f"The store's directory must belong to user {os.geteuid()}: {self.path} is of user "
                f"{found.st_uid}. Give another directory."
            )
        if found.st_mode & OTHERS_MAY:
            raise Refusal(
                f"Only its owner may write to the store's directory: {self.path} has mode "
                f"{stat.S_IMODE(found.st_mode):04o}. Run chmod 700 on it."
            )
        names = set(os.listdir(self._root)) - {"lost+found"}
        if names and not self.exists(MARKER):
            raise Refusal(
                f"The store's directory must be empty or a store: {self.path} has no file "
                f"{MARKER}, but {len(names)} others, {sorted(names)[0]!r} first. Give another."
            )

    def _keep(self, file: int) -> int:
        self._files.append(file)
        return file

    # Names. All paths are relative to the directory that was opened: if someone moves or replaces
    # it, this process goes on in the one whose lock it has.

    def create(self, path: str, flags: int) -> int:
        """A descriptor of a file below the store, created for its owner alone."""
        return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._root)

    def open(self, path: str) -> int:
        """A descriptor of a file below the store, to read."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, dir_fd=self._root)

    def exists(self, path: str) -> bool:
        """Whether there is such a file. Raises: OSError other than that there is none."""
        return self.used_at(path) is not None

    def used_at(self, path: str) -> int | None:
        """Nanoseconds of a file's last use (time.time_ns), None if there is no such file."""
        try:
            return os.stat(path, dir_fd=self._root, follow_symlinks=False).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return None

    def touch(self, path: str, used_at: int) -> None:
        """Set the time of a file's last use. A file that is gone stays so."""
        with suppress(FileNotFoundError):
            os.utime(path, ns=(used_at, used_at), dir_fd=self._root)

    # Bytes in use.

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The one thread of the one process that may change names and the bytes in use."""
        with self._thread_lock:
            if self._marker < 0:
                raise OSError(errno.EBADF, "the store is closed")
            fcntl.flock(self._marker, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._marker, fcntl.LOCK_UN)

    def _used(self) -> int:
        return int.from_bytes(os.pread(self._marker, 8, len(MAGIC)), "little")

    def _set_used(self, used: int) -> None:
        os.pwrite(self._marker, max(used, 0).to_bytes(8, "little"), len(MAGIC))

    @property
    def used_bytes(self) -> int:
        """Bytes charged for all files of the store, of all processes."""
        with self._locked():
            return self._used()

    # An object's life.

    def reserve(self, charged_bytes: int) -> Reservation | None:
        """A temporary file for an object; None if there is no room. Evicts if need be.

        The caller writes and closes the file, then calls publish or discard once.
        Raises: OSError, with nothing charged.
        """
        for _ in range(TRIES):
            with self._locked():
                if (used := self._used() + charged_bytes) <= self.limit_bytes:
                    path = f"tmp/{self._name}.{next(self._numbers)}.{charged_bytes}"
                    self._set_used(used)
                    try:
                        file = self.create(path, os.O_WRONLY | os.O_EXCL)
                    except OSError:
                        self._set_used(used - charged_bytes)
                        raise
                    return Reservation(path, file, charged_bytes)
            self.make_room(charged_bytes)
        return None

    def publish(self, reservation: Reservation, path: str) -> bool:
        """Give a written file its name; False, with nothing done, if the object exists by now."""
        with self._locked():
            if self.exists(path):
                return False
            self._rename(reservation.path, path)
            return True

    def discard(self, reservation: Reservation) -> None:
        """Delete a temporary file and give back what was charged for it."""
        with self._locked():
            with suppress(FileNotFoundError):
                os.unlink(reservation.path, dir_fd=self._root)
            self._set_used(self._used() - reservation.charged_bytes)

    def _rename(self, temporary: str, path: str) -> None:
        for _ in range(2):
            with suppress(FileNotFoundError):
                os.rename(temporary, path, src_dir_fd=self._root, dst_dir_fd=self._root)
                return
            folder = os.path.dirname(path)
            for each in (os.path.dirname(folder), folder):
                with suppress(FileExistsError):
                    os.mkdir(each, 0o700, dir_fd=self._root)
        raise FileNotFoundError(f"{temporary} or {os.path.dirname(path)} is gone")

    def remove(self, path: str, charged_bytes: int) -> bool:
        """Delete an object; False if it was gone. Who reads it now reads it to the end."""
        with self._locked():
            try:
                os.unlink(path, dir_fd=self._root)
            except FileNotFoundError:
                return False
            self._set_used(self._used() - charged_bytes)
            self._remove_empty(os.path.dirname(path))
            return True

    def make_room(self, room: int) -> None:
        """Delete what was unused for longest until there is room.

        Reads the whole directory, so it frees at least 1/EVICTED_SHARE of the limit.
        """
        goal = self.limit_bytes - max(room, self.limit_bytes // EVICTED_SHARE)

        with self._evict_thread_lock:
            if self._evicting < 0:
                raise OSError(errno.EBADF, "the store is closed")
            fcntl.flock(self._evicting, fcntl.LOCK_EX)
            try:
                if self.used_bytes + room <= self.limit_bytes:
                    return  # another thread or process has made room
                for each in sorted(self.scan()):
                    if self.used_bytes <= goal:
                        break
                    if self.used_at(each.path) == each.used_at:  # not used since the scan
                        self.num_evicted += self.remove(each.path, each.charged_bytes)
            finally:
                fcntl.flock(self._evicting, fcntl.LOCK_UN)

    def _remove_empty(self, folder: str) -> None:
        """Delete a folder of objects and its identity's, if they are empty: both take a block."""
        with suppress(OSError):
            os.rmdir(folder, dir_fd=self._root)
            os.rmdir(os.path.dirname(folder), dir_fd=self._root)

    def scan(self, identity: str = "") -> Iterator[StoredObject]:
        """Every object of every identity, or of the one whose folder is given, in no order."""
        for folder in self._entries("objects"):
            charged = folder.rpartition("-")[2]
            if not charged.isdigit() or identity not in ("", folder):
                continue
            for fan in self._entries(f"objects/{folder}"):
                for name in self._entries(place := f"objects/{folder}/{fan}"):
                    path = f"{place}/{name}"
                    if (used_at := self.used_at(path)) is not None:
                        yield StoredObject(used_at, int(charged), path)

    def _entries(self, folder: str) -> list[str]:
        try:
            file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        try:
            return os.listdir(file)
        finally:
            os.close(file)

    # Processes.

    def _alive(self) -> set[str]:
        """Names of the other open stores over this directory; forgets those of dead processes."""
        alive = set()
        for name in self._entries("live"):
            file = self.create(f"live/{name}", os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(f"live/{name}", dir_fd=self._root)
            except BlockingIOError:
                alive.add(name)
            finally:
                os.close(file)
        return alive

    def _charged_for_writing(self, alive: set[str]) -> int:
        """Bytes charged for what live processes write. Deletes what dead ones have left."""
        charged_bytes = 0
        for name in self._entries("tmp"):
            owner, _, charged = name.split(".")
            if owner in alive:
                charged_bytes += int(charged)
            else:
                os.unlink(f"tmp/{name}", dir_fd=self._root)
        return charged_bytes

    def close(self) -> None:
        """Give up the directory: later calls raise OSError. May be called twice."""
        with self._evict_thread_lock, self._thread_lock:
            if hasattr(self, "_name"):
                with suppress(OSError):
                    os.unlink(f"live/{self._name}", dir_fd=self._root)
            # Never used again, since the numbers may soon be those of other files.
            self._root = self._marker = self._evicting = -1
            for file in self._files:
                os.close(file)
            self._files.clear()


def limit_warning(directory: StoreDirectory) -> str | None:
    """One line if the file system cannot hold the limit."""
    disk = os.statvfs(directory.path)
    most = disk.f_bavail * disk.f_frsize + directory.used_bytes
    if most >= directory.limit_bytes:
        return None
    return (
        f"The store's limit is {directory.limit_bytes / GIB:.1f} GiB, and {directory.path} has "
        f"room for {most / GIB:.1f} GiB: writes will fail when the disk is full."
    )
