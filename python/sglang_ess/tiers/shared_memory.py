"""Memory that the processes of a TierGroup share: anonymous, without a name anywhere.

A memfd belongs to no file system: the kernel frees it when the last process that maps it is gone,
however that process ended, and neither /dev/shm nor its size limit (64 MiB in a docker container)
is concerned. Its pages are zero, are taken at their first touch, and count as Shmem, for a cgroup
too. Source: memfd_create(2), unix(7) on SCM_RIGHTS and SO_PEERCRED, fcntl(2) on seals.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import struct

from sglang_ess.layout import GIB
from sglang_ess.tiers.host_memory import HostMemoryError
from sglang_ess.tiers.tier_group import TierGroup

CONNECT_SECONDS = 60.0  # the ranks meet in a collective just before
CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def shared_descriptor(group: TierGroup, num_bytes: int) -> int:
    """A descriptor of the same zeroed memory on every rank of the group; the caller closes it.

    The writer makes the memory and passes the descriptor through a unix socket, which has a random
    abstract name: it exists in no directory and is gone with the process.
    Raises: HostMemoryError or PeerRefusal, on every rank.
    """
    made = listener = None
    try:
        with group.together():
            if group.is_writer:
                made = _make(num_bytes)
                listener = _listen(group.size)
        name = group.exchange(listener.getsockname() if listener else None)[0]
        with group.together():
            if made is None or listener is None:
                return _receive(name, num_bytes)
            _give(listener, made, group.size - 1)
        return made
    except BaseException:
        if made is not None:
            os.close(made)
        raise
    finally:
        if listener is not None:
            listener.close()


def _make(num_bytes: int) -> int:
    fd = -1
    try:
        fd = os.memfd_create("ess-host-tier", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        # Nobody can cut it: a touch beyond the end would kill a rank by SIGBUS.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        advice = "Allow the call in the container's seccomp profile"
        if error.errno == errno.EFBIG:
            advice = "Raise the limit on a file's size: ulimit -f unlimited"
        raise HostMemoryError(
            "host memory that ranks share must be had by memfd_create: got "
            f"{os.strerror(error.errno or 0)} for {num_bytes / GIB:.2f} GiB. {advice}."
        ) from error


def _listen(size: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.settimeout(CONNECT_SECONDS)
    listener.bind(f"\0ess-host-tier-{secrets.token_hex(16)}")
    listener.listen(size)
    return listener


def _give(listener: socket.socket, fd: int, readers: int) -> None:
    """Pass fd to so many processes of this user; any process may find an abstract socket."""
    while readers:
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise HostMemoryError(
                f"ranks that share a host tier must ask for it within {CONNECT_SECONDS:.0f} s: "
                f"got none from {readers}. Start them on one node, in one network namespace."
            ) from error
        with connection:
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            if CREDENTIALS.unpack(raw)[1] == os.getuid():
                socket.send_fds(connection, [b"\0"], [fd])
                readers -= 1


def _receive(name: bytes, num_bytes: int) -> int:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(name)
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError as error:
        raise HostMemoryError(
            "host tier must be passed on by the rank that made it: got "
            f"{error.strerror or error}. Start the ranks of a node in one network namespace."
        ) from error
    if not fds or os.fstat(fds[0]).st_size != num_bytes:
        found = os.fstat(fds[0]).st_size if fds else 0
        for fd in fds:
            os.close(fd)
        raise HostMemoryError(
            f"host tier must have {num_bytes} B on every rank of a node: got {found} B. Start all "
            "ranks with the same options."
        )
    return fds[0]
