"""Connections between the launchers of a server's nodes: when one node ends, the others end too.

SGLang's ranks alone would wait for a lost node until torch's timeout, half an hour by default. Here
node 0's launcher listens on the port below that of --dist-init-addr, and the other launchers
connect to it. SGLang does not use that port: its own are that of --dist-init-addr, those 1 to 6 and
13 above it, and near 65535 those 2 to 7 below it (PortArgs in server_args.py). Each side greets
once. Then a connection carries nothing but a byte before an ordered end; the kernel tells the rest.
It closes the connections of a launcher that ends, and its keepalive probes find a cut link.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import select
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from sglang_ess.errors import Refusal
from sglang_ess.launch.startup import progress

SILENCE_SECONDS = 15  # without an answer to a probe: the link is cut
PROBE_SECONDS = 3  # between two probes
WAIT_SECONDS = 1800  # for all nodes to come, without --dist-timeout: torch's default
TELL_SECONDS = 60.0  # between two lines that say who has not come
RETRY_SECONDS = 1.0
GREETING_SECONDS = 5.0
GREETING = re.compile(rb"sglang-ess node (\d+) of (\d+)\n")
GREETING_BYTES = 64  # more than any greeting has
# What a launcher learns of another node: it was asked to end, it has lost a process, or it is gone.
ASKED, FAILED, GONE = b"a", b"f", b""
WORDS = {
    ASKED: "a signal on node {}",
    FAILED: "the end of a process of node {}",
    GONE: "the end of node {}",
}
OPTIONS = ("nnodes", "node_rank", "dist_init_addr", "nccl_init_addr", "dist_timeout")


class Place(NamedTuple):
    """A node among its server's. host, port: where node 0's launcher listens.

    wait_seconds: time for all nodes to come
    """

    nodes: int
    node: int
    host: str
    port: int
    wait_seconds: int

    @classmethod
    def of(cls, argv: list[str], file: Mapping[str, Any]) -> Place | None:
        """From SGLang's arguments and the options of its --config file.

        None for a server of one node, and for values that SGLang refuses later.
        Raises: Refusal if the port of --dist-init-addr leaves none below it
        """
        parser = argparse.ArgumentParser(add_help=False)
        for name in OPTIONS:
            parser.add_argument(f"--{name.replace('_', '-')}", nargs="?")
        found = vars(parser.parse_known_args(argv)[0])
        given = {str(name).replace("-", "_"): value for name, value in file.items()}
        given |= {name: value for name, value in found.items() if value is not None}
        numbers = [given.get(name, 0) for name in ("nnodes", "node_rank", "dist_timeout")]
        where = str(given.get("dist_init_addr") or given.get("nccl_init_addr") or "")
        host, _, port = where.removeprefix("tcp://").rpartition(":")
        if not all(str(value).isdigit() for value in (*numbers, port)):
            return None
        nodes, node, seconds = map(int, numbers)
        if nodes < 2 or node >= nodes:
            return None
        if not 2 <= int(port) <= 65535:
            raise Refusal(
                "--dist-init-addr must have a port from 2 to 65535, as ESS uses the one below it: "
                f"got {where}. Choose another."
            )
        return cls(nodes, node, host.strip("[]"), int(port) - 1, seconds or WAIT_SECONDS)


class News(NamedTuple):
    """What a launcher learns of other nodes. word: ASKED, FAILED or GONE; got: in words"""

    word: bytes
    got: str
    advice: str


class Peers:
    """The connections of one launcher. Poll fileno(), then read().

    Raises: Refusal on node 0 if it cannot listen
    """

    def __init__(self, place: Place):
        self.place = place
        self.links: dict[int, socket.socket] = {}  # node: the connection to it
        self._missing = set(range(1, place.nodes)) if place.node == 0 else {0}
        self._problem = ""  # of the last attempt to connect
        self._news: list[News] = []
        self._wake, self._woken = os.pipe()
        self._listener = _listen(place) if place.node == 0 else None

    def start(self) -> None:
        """Connect and watch, in a thread. Call it in the launcher, after the fork."""
        threading.Thread(target=self._run, daemon=True).start()

    def fileno(self) -> int:
        return self._wake

    def read(self) -> News:
        """The oldest news. Call it when fileno() is readable."""
        os.read(self._wake, 1)
        return self._news.pop(0)

    def tell(self, word: bytes) -> None:
        """Tell the other nodes how this one ends. word: ASKED or FAILED"""
        for link in list(self.links.values()):
            try:
                link.send(word)
            except OSError:  # the thread hears of it too
                pass

    def close(self) -> None:
        """Give up the port in the forked child, which must not hold it."""
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        since, next_line = time.monotonic(), 0.0
        while self._missing or self.links:
            waited = time.monotonic() - since
            names = " and ".join(f"node {node}" for node in sorted(self._missing))
            left = self.place.wait_seconds - waited
            if names and left <= 0:
                got = f"no greeting from {names} for {waited:.0f} s (--dist-timeout)"
                self._add(News(FAILED, f"{got}{self._problem}", "Start it, or check the network"))
                return
            if names and waited >= next_line:
                next_line = waited + TELL_SECONDS
                progress(
                    f"node {self.place.node} of {self.place.nodes} waits for {names} on "
                    f"{self.place.host} port {self.place.port}, {left:.0f} s at most "
                    f"(--dist-timeout){self._problem}"
                )
            if names and self._listener is None:
                self._connect()
            self._hear()

    def _connect(self) -> None:
        address = (self.place.host, self.place.port)
        try:
            self._greet(socket.create_connection(address, GREETING_SECONDS))
        except OSError as error:  # it has not started, or its name is not known yet
            self._problem = f"; got {error.strerror or error}"

    def _hear(self) -> None:
        """Take what comes within RETRY_SECONDS."""
        listening = [self._listener] if self._listener is not None and self._missing else []
        ready, _, _ = select.select([*listening, *self.links.values()], [], [], RETRY_SECONDS)
        if self._listener is not None and self._listener in ready:
            try:
                self._greet(self._listener.accept()[0])
            except OSError as error:  # the other side has given up, or too many files are open
                self._problem = f"; got {error.strerror}"
                time.sleep(RETRY_SECONDS)
        for node in [node for node, link in self.links.items() if link in ready]:
            self._take(node)

    def _greet(self, link: socket.socket) -> None:
        """Greet on a new connection. Keep it if the other side is a missing node of this server."""
        place, line = self.place, b""
        link.settimeout(GREETING_SECONDS)
        try:
            link.sendall(f"sglang-ess node {place.node} of {place.nodes}\n".encode())
            while not line.endswith(b"\n") and len(line) < GREETING_BYTES:
                if not (byte := link.recv(1)):
                    break
                line += byte
        except OSError:
            pass
        found = GREETING.fullmatch(line)
        node, nodes = map(int, found.groups()) if found else (-1, 0)
        if nodes != place.nodes or node not in self._missing:
            self._problem = f"; got {f'node {node} of {nodes}' if found else 'no greeting'} there"
            link.close()
            return
        link.settimeout(None)
        _probe(link)
        self.links[node] = link
        self._missing.remove(node)

    def _take(self, node: int) -> None:
        try:
            word = self.links[node].recv(1)
        except ConnectionResetError:
            word = GONE
        except OSError as error:
            del self.links[node]
            got = f"no answer from node {node} for {SILENCE_SECONDS} s ({error.strerror})"
            self._add(News(FAILED, got, "Check the network between them"))
            return
        if word == GONE:
            del self.links[node]
        self._add(News(word, WORDS[word].format(node), "The log of that node says why"))

    def _add(self, news: News) -> None:
        self._news.append(news)
        os.write(self._woken, b"1")


def use_interface(place: Place) -> None:
    """Let gloo, and SGLang, use the interface that leads to node 0.

    gloo takes the address of the host's name otherwise, which may be another interface's, or the
    loopback's, where no other node reaches it. Waits while node 0's name is not known.
    Effect: sets GLOO_SOCKET_IFNAME and SGLANG_HOST_IP for the children, unless they are set.
    """
    while (found := _interface_to(place)) is None:
        time.sleep(RETRY_SECONDS)
    name, address = found
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("SGLANG_HOST_IP", address)


def _interface_to(place: Place) -> tuple[str, str] | None:
    """(name, own address) of the interface that leads to node 0; None if there is none yet."""
    import psutil

    try:
        (family, kind, proto, _, address), *_ = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_DGRAM
        )
        with socket.socket(family, kind, proto) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name, own
    return None


def _listen(place: Place) -> socket.socket:
    """On the address of node 0; on all where its name is not known yet, or a proxy's."""
    try:
        try:
            (family, *_, address), *_ = socket.getaddrinfo(
                place.host, place.port, type=socket.SOCK_STREAM
            )
            return socket.create_server(address[:2], family=family)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", place.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise Refusal(
            "--dist-init-addr must have a port above one that is free on node 0: got "
            f"{place.port} ({error.strerror}). Choose another on every node."
        ) from None


def _probe(link: socket.socket) -> None:
    """Let the kernel close a connection whose other side no longer answers."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        link.setsockopt(socket.IPPROTO_TCP, option, PROBE_SECONDS)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)
