"""Launchers of several nodes around stand-ins for SGLang: each way one node ends the others.

With real servers, on hosts of their own: tests/serving/test_nodes.py.
"""

import contextlib
import errno
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from sglang_ess.errors import Refusal
from sglang_ess.launch import peers
from sglang_ess.launch.peers import PROBE_SECONDS, SILENCE_SECONDS, WAIT_SECONDS, Peers, Place
from tests.launch.test_shutdown import SOON, StandIn
from tests.support.pd import fixed_port
from tests.support.stand_in import SCHEDULER
from tests.tools.test_processes import poll
from tools import hosts
from tools.hosts import LOOPBACK

TERM, KILL = signal.SIGTERM, signal.SIGKILL
LINE = "sglang-ess: all nodes of a server must live and reach each other: got "


class Node(StandIn):
    """The launcher of one node around a stand-in."""

    def __init__(self, log, node, init, nodes=2, behaviour="busy", timeout=100, host=LOOPBACK):
        where = ("--nnodes", nodes, "--node-rank", node, "--dist-init-addr", init)
        flags = map(str, (*where, "--dist-timeout", timeout))
        super().__init__(log, behaviour, *flags, host=host)
        self.node = node

    def line(self) -> str:
        """Its one line for the operator."""
        (line,) = [line for line in self.text().splitlines() if line.startswith("sglang-ess: ")]
        return line


@pytest.fixture
def start(tmp_path):
    """start(*nodes, **options): launchers on one port, started in this order."""
    started, init = [], f"127.0.0.1:{fixed_port()}"

    def start(*nodes, at=None, **options):
        begun = []
        for node in nodes:
            where = {} if at is None else {"host": at[node]}
            address = init if at is None else f"{at[0].address}:25000"
            log = tmp_path / f"{node}.log"
            begun.append(Node(log, node, address, **where, **options))
        started.extend(begun)
        return begun

    yield start
    for one in started:
        one.clear()
        one.process.wait()


def joined(*nodes):
    """Wait until all are connected: a launcher has one connection for each other node it knows."""
    hub = next(node for node in nodes if node.node == 0)
    poll(lambda: connections(hub.process.pid) == len(nodes) - 1)
    for node in nodes:
        node.wait_serving()


def connections(pid) -> int:
    """Established TCP connections of one process, in its own network."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()]
    return sum(row[3] == "01" and f"socket:[{row[9]}]" in inodes for row in rows)


@pytest.mark.parametrize(("order", "killed"), [((0, 1), 1), ((1, 0), 0)])
def test_a_launcher_that_is_killed_ends_the_other_node(start, order, killed):
    nodes = sorted(start(*order), key=lambda node: node.node)
    joined(*nodes)
    since = time.monotonic()
    nodes[killed].send(KILL)
    other = nodes[1 - killed]
    assert other.status() == 1 and time.monotonic() - since < SOON
    assert other.line().startswith(f"{LINE}the end of node {killed}. ")


def test_a_process_that_is_killed_ends_all_three_nodes(start):
    """Its own node names the process, node 0 that node, and the third one node 0."""
    hub, lost, third = start(0, 1, 2, nodes=3)
    joined(hub, lost, third)
    os.kill(lost.named(SCHEDULER)[0], KILL)
    assert [node.status() for node in (hub, lost, third)] == [1, 1, 1]
    assert f"got the end of {SCHEDULER} (process" in lost.line()
    assert hub.line().startswith(f"{LINE}the end of a process of node 1. ")
    assert third.line().startswith(f"{LINE}the end of node 0. ")


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_on_one_node_ends_both_when_the_requests_are_answered(start, asked):
    """The busy stand-in takes 0.7 s to end. Node 1's would end at once by itself, were it asked."""
    nodes = start(0, 1)
    joined(*nodes)
    since = time.monotonic()
    nodes[asked].send(TERM)
    assert [node.status() for node in nodes] == [0, 0]
    assert 0.7 < time.monotonic() - since < SOON
    assert "sglang-ess: " not in nodes[0].text() + nodes[1].text()


def test_the_signal_of_an_orchestrator_to_both_nodes_is_one(start):
    nodes = start(0, 1)
    joined(*nodes)
    nodes[1].send(TERM)
    time.sleep(0.6)  # more than what counts as the same signal on one node
    nodes[0].send(TERM)
    assert [node.status() for node in nodes] == [0, 0]


def test_a_second_signal_ends_at_once(start):
    nodes = start(0, 1, behaviour="hung")
    joined(*nodes)
    nodes[1].send(TERM)
    time.sleep(0.8)
    since = time.monotonic()
    nodes[1].send(TERM)
    assert nodes[1].status() == 128 + TERM and time.monotonic() - since < SOON


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_never_comes_is_waited_for_so_long(start, node):
    (alone,) = start(node, timeout=2)
    assert alone.status() == 1
    assert f"node {node} of 2 waits for node {1 - node} on 127.0.0.1 port" in alone.text()
    assert alone.line().startswith(f"{LINE}no greeting from node {1 - node} for 2 s")


def test_strangers_do_not_count(start):
    """Neither one that says nothing and goes, nor one of another server or place."""
    (hub,) = start(0, nodes=3)
    poll(lambda: "waits for" in hub.text())
    port = int(hub.text().partition(" port ")[2].partition(",")[0])
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"sglang-ess node 1 of 2\n",
                     b"sglang-ess node 0 of 3\n", b"x" * 100):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(100):  # our greeting, then the end
                    pass
    assert hub.process.poll() is None and connections(hub.process.pid) == 0


def test_a_taken_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "no-such-host.invalid"):
            with pytest.raises(Refusal, match=f"got {port} .Address already in use"):
                Peers(Place(2, 0, host, port, 1))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_node_0s_own_leaves_it_reachable(host):
    """The name of a host that has just started, or a proxy's address."""
    node_0 = Peers(Place(2, 0, host, fixed_port(), 1))
    socket.create_connection(("127.0.0.1", node_0.place.port)).close()
    node_0.close()


@pytest.mark.parametrize(
    ("argv", "file", "place"),
    [
        ([], {}, None),
        (["--nnodes", "1", "--dist-init-addr", "a:9"], {}, None),
        (["--nnodes", "2", "--node-rank", "2", "--dist-init-addr", "a:9"], {}, None),
        (["--nnodes", "x", "--dist-init-addr", "a:9"], {}, None),
        (["--nnodes=2", "--dist-init-addr", "a:9"], {}, Place(2, 0, "a", 8, WAIT_SECONDS)),
        (
            ["--nnodes", "4", "--node-r", "3", "--nccl-init-addr", "[::1]:65535"],
            {"nnodes": 2, "dist-timeout": 7},
            Place(4, 3, "::1", 65534, 7),
        ),
    ],
)
def test_the_place_is_that_of_sglangs_options(argv, file, place):
    """SGLang's parser takes beginnings of flags, and the command line before the file."""
    assert Place.of(argv, file) == place


def test_gloo_gets_the_interface_that_leads_to_node_0(monkeypatch):
    """Once node 0's name is known; what the user has set stays."""
    names, find = ["GLOO_SOCKET_IFNAME", "SGLANG_HOST_IP"], peers._interface_to
    found = iter([None, find(Place(2, 1, "no host", 9, 1)), find(Place(2, 1, "127.0.0.1", 9, 1))])
    monkeypatch.setattr(peers, "_interface_to", lambda _: next(found))
    monkeypatch.setattr(peers, "RETRY_SECONDS", 0)
    monkeypatch.setattr(os, "environ", {})
    peers.use_interface(Place(2, 1, "127.0.0.1", 9, 1))
    assert [os.environ[name] for name in names] == ["lo", "127.0.0.1"]
    monkeypatch.setattr(os, "environ", dict.fromkeys(names, "mine"))
    monkeypatch.setattr(peers, "_interface_to", lambda _: ("lo", "127.0.0.1"))
    peers.use_interface(Place(2, 1, "127.0.0.1", 9, 1))
    assert [os.environ[name] for name in names] == ["mine", "mine"]


def test_an_address_without_a_port_below_is_refused():
    with pytest.raises(Refusal, match="a port from 2 to 65535"):
        Place.of(["--nnodes", "2", "--dist-init-addr", "a:1"], {})


@pytest.mark.slow
@pytest.mark.skipif(hosts.unavailable() is not None, reason=str(hosts.unavailable()))
@pytest.mark.parametrize("cut", [hosts.Hosts.cut, hosts.Hosts.unplug])
def test_a_cut_link_ends_both_nodes_but_a_short_outage_does_not(start, cut):
    """In the switch, or at the host itself, whose kernel then knows it."""
    with hosts.Hosts(2) as made:
        nodes = start(0, 1, at=made.hosts)
        joined(*nodes)
        cut(made, 1)
        time.sleep(SILENCE_SECONDS / 2)
        made.mend(1)
        time.sleep(2 * PROBE_SECONDS)  # a probe is answered
        assert [node.process.poll() for node in nodes] == [None, None]
        since = time.monotonic()
        cut(made, 1)
        seconds = []
        for node in nodes:
            assert node.status() == 1
            seconds.append(time.monotonic() - since)
            other = 1 - node.node
            assert node.line().startswith(f"{LINE}no answer from node {other} for 15 s (")
        print(
            f"\nnode 0 ended after {seconds[0]:.1f} s, node 1 at {seconds[1]:.1f} s at the latest"
        )
        assert SILENCE_SECONDS - PROBE_SECONDS < min(seconds)
        assert max(seconds) < SILENCE_SECONDS + 2 * PROBE_SECONDS + SOON


def test_a_connection_that_cannot_be_taken_is_no_end_of_the_watch(monkeypatch):
    """Too many open files, say, or a stranger who has gone already."""
    monkeypatch.setattr(peers, "RETRY_SECONDS", 0.01)
    port = fixed_port()
    hub = Peers(Place(2, 0, "127.0.0.1", port, 100))
    listener, refusals = hub._listener, iter(["EMFILE", "ECONNABORTED"])

    class Listener:
        def fileno(self):
            return listener.fileno()

        def accept(self):
            if name := next(refusals, None):
                raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
            return listener.accept()

    hub._listener = Listener()
    other = Peers(Place(2, 1, "127.0.0.1", port, 100))
    for one in (hub, other):
        one.start()
    poll(lambda: hub.links and other.links)
    for link in (*hub.links.values(), *other.links.values()):
        link.close()
    listener.close()
