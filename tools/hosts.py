"""Hosts on one machine: namespaces that a bridge joins, for tests and scripts/cluster.sh.

A host has a network and a /dev/shm of its own: SGLang takes ranks that share the latter for ranks
of one node. Files, processes, cores and memory are the machine's. Linux and root only.

Nothing has a name that outlives its owner: the namespaces are held by processes that end with this
one, even by SIGKILL, and a namespace takes its interfaces with it.
"""

from __future__ import annotations

import os
import random
import subprocess
from typing import NamedTuple

INTERFACE = "eth0"  # of each host
PORT_FILE = "/sys/class/net/ess"  # and the number: this machine's interface to some hosts
PREFIX_BITS = 24
# A holder writes a line once its namespaces are made, and ends when its standard input closes.
MOUNTS = "mount -t tmpfs tmpfs /dev/shm && mount -t sysfs sysfs /sys"
UNSHARE = ("unshare", "--net", "--mount", "sh", "-c")
HOLD = (*UNSHARE, f"{MOUNTS} && echo && exec cat")


def unavailable() -> str | None:
    """Why this process cannot make hosts; None if it can."""
    if os.geteuid():
        return f"hosts in network namespaces need root: got user {os.geteuid()}"
    tried = subprocess.run([*UNSHARE, MOUNTS], capture_output=True, text=True)
    if tried.returncode:
        return f"hosts in network namespaces need {' '.join(UNSHARE[:3])}: got {tried.stderr}"
    return None


class Host(NamedTuple):
    """address: its own; command: what to write before a command to run it there, as its pid"""

    address: str
    command: tuple[str, ...] = ()


LOOPBACK = Host("127.0.0.1")


class Hosts:
    """`count` hosts with addresses 198.18.x.1, .2, ...; this machine has .254. A context manager.

    198.18.0.0/15 is the range for tests of networks (RFC 2544): no real host is hidden.
    Raises: OSError or subprocess.CalledProcessError where unavailable() says why
    """

    def __init__(self, count: int):
        number = random.choice([n for n in range(256) if not os.path.exists(f"{PORT_FILE}{n}")])
        subnet = f"198.18.{number}"
        self.holders: list[subprocess.Popen] = []
        self.hosts: list[Host] = []
        try:
            # One more holds the bridge, so that it goes, too.
            self.switch, *pids = [self._hold() for _ in range(1 + count)]
            _ip(self.switch, "link add bridge type bridge", "link set bridge up")
            self._join(f"ess{number}", None, f"{subnet}.254")
            for index, pid in enumerate(pids):
                self._join(INTERFACE, pid, f"{subnet}.{1 + index}")
        except BaseException:
            self.close()
            raise

    def _hold(self) -> int:
        """Pid of a process in a new namespace. It ends when its standard input is closed."""
        pipe = subprocess.PIPE
        # In a session of its own: a Ctrl-C must not cut the hosts off before they have ended.
        holder = subprocess.Popen(HOLD, stdin=pipe, stdout=pipe, start_new_session=True)
        self.holders.append(holder)
        holder.stdout.readline()
        return holder.pid

    def _join(self, interface: str, pid: int | None, address: str) -> None:
        """Give a holder's namespace, or this process's, an interface plugged into the bridge."""
        port = f"port-{address.rpartition('.')[2]}"
        where = os.getpid() if pid is None else pid
        _ip(self.switch, f"link add {port} type veth peer name {interface} netns {where}")
        _ip(self.switch, f"link set {port} master bridge up")
        _ip(pid, f"addr add {address}/{PREFIX_BITS} dev {interface}", f"link set {interface} up")
        if pid is not None:
            _ip(pid, "link set lo up")
            self.hosts.append(Host(address, _inside(pid)))

    def cut(self, host: int) -> None:
        """Lose a host's link at the switch."""
        _ip(self.switch, f"link set port-{1 + host} down")

    def unplug(self, host: int) -> None:
        """Lose a host's link at the host itself, whose kernel then drops its routes."""
        _ip(self.holders[1 + host].pid, f"link set {INTERFACE} down")

    def mend(self, host: int) -> None:
        """Undo cut() and unplug()."""
        _ip(self.switch, f"link set port-{1 + host} up")
        _ip(self.holders[1 + host].pid, f"link set {INTERFACE} up")

    def close(self) -> None:
        """Remove the hosts. A process that still runs on one keeps a namespace with no network."""
        for holder in self.holders:
            holder.kill()
            holder.communicate()
        self.holders.clear()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _inside(pid: int) -> tuple[str, ...]:
    return "nsenter", f"--target={pid}", "--net", "--mount", "--wd"


def _ip(pid: int | None, *commands: str) -> None:
    """Run `ip COMMAND` in the namespace of a process, by default in this one's."""
    prefix = () if pid is None else _inside(pid)
    for command in commands:
        subprocess.run([*prefix, "ip", *command.split()], check=True, capture_output=True)
