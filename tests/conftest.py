"""What many tests share: real servers, a cluster, the fork server, a quick interpreter.

A real server takes 15 to 40 s to start, most of it imports. So each starts before its tests come,
with the first test of their group.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import sglang_ess
from sglang_ess.cpu import set_thread_defaults

set_thread_defaults()  # or threads that wait would keep a core from the servers and engines
import torch  # noqa: E402

if not torch.cuda.is_available():  # read when a kernel is defined: before any import of one
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ess_kernels.checks import interpreted  # noqa: E402
from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model  # noqa: E402
from tests.disagg import cluster  # noqa: E402
from tests.support import engine, groups, interpreter, launching, leftovers  # noqa: E402
from tests.support.cuda_host import host  # noqa: E402
from tests.support.forked import ForkedNode  # noqa: E402
from tests.support.server import Server, free_port  # noqa: E402

if interpreted():
    interpreter.make_fast()
    host.stand_in()

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sglang_ess.__file__).parent
COMPILED_VAR = "ESS_TEST_COMPILED"  # the file with the results of the process that compiled
TORCH_THREADS = torch.get_num_threads()  # a server's, on this machine
COMPILING = pytest.StashKey[subprocess.Popen]()
SLOTS = 40_000  # SGLang's default is most of the machine's memory
GUARDED = ("ESS", "SGLANG", "NUMBA", "OMP", "GOMP")  # variables that later engines would read


@pytest.fixture(autouse=True)
def leaves_environment():
    """A test leaves no variable behind, or a later one fails where nobody looks for the reason."""
    before = _guarded()
    yield
    after = _guarded()
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    changed = sorted(name for name, _ in before.items() ^ after.items())
    names = ", ".join(dict.fromkeys(changed))
    assert not changed, f"a test must leave os.environ as it was: got another {names}. Use setenv."


def _guarded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(GUARDED)}


@pytest.fixture(scope="session")
def tiny_v32(tmp_path_factory):
    """Directory of the default tiny DeepSeek-V3.2."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "v32", TinyModelConfig())


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: groups.order(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """One thread for torch in this process, whatever the test before it did (numba sets it too).

    Two threads wait for each other at every operator while another process has a core: 160 s, not
    15 s, for 150 tokens of a tiny model. Servers, engines and forks have their own number.
    """
    torch.set_num_threads(1)


def pytest_sessionstart(session):
    """In a fresh clone one process compiles the CPU kernels, before several would, 15 s each.

    What it computes meanwhile is the first result of kernel_runs.
    """
    several = getattr(session.config.option, "numprocesses", None)
    if several and not any(PACKAGE.rglob("*.nbi")):
        os.environ[COMPILED_VAR] = file = str(Path(tempfile.mkdtemp(prefix="ess-test-")) / "a.npz")
        code = f"from tests.support import kernel_results; kernel_results.main({file!r})"
        code += "; from sglang_ess.launch.compile_kernels import warm_up; warm_up()"
        session.config.stash[COMPILING] = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """No process runs a test before the kernels are compiled; all import while they are."""
    if COMPILING in node.config.stash:
        node.config.stash[COMPILING].wait()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process gets one group after the other, in their order."""
    return groups.scheduler(config, log)


@pytest.fixture(scope="session", autouse=True)
def imports_early(request):
    modules = {item.module for item in request.session.items}
    if any({"EngineProcess", "parity"} & vars(module).keys() for module in modules):
        engine.start_importing()


@pytest.fixture(scope="module", autouse=True)
def starts_early(request):
    """What tests of this group will need."""
    group = groups.of(request.node.nodeid)
    items = [item for item in request.session.items if groups.of(item.nodeid) == group]
    for name in ("starting_server", "starting_pair", "starting_cluster", "kernel_runs"):
        if any(name in item.fixturenames for item in items):
            request.getfixturevalue(name)


@pytest.fixture(scope="session")
def kernel_runs(tmp_path_factory):
    """() -> results of two processes, waited for: the first compiles, the second loads."""
    root = tmp_path_factory.mktemp("kernels")
    compiled, loaded = os.environ.get(COMPILED_VAR), root / "loaded.npz"
    files = [Path(compiled or root / "compiled.npz"), loaded]
    run = f"{shlex.quote(sys.executable)} -m tests.support.kernel_results"
    runs = files[1:] if compiled else files
    process = subprocess.Popen(
        ["sh", "-c", " && ".join(f"{run} {shlex.quote(str(file))}" for file in runs)],
        env=os.environ | ({} if compiled else {"NUMBA_CACHE_DIR": str(root / "cache")}),
        stderr=subprocess.PIPE,
        text=True,
    )

    def wait():
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
        return files

    yield wait
    process.kill()


@pytest.fixture(scope="session")
def pd_model(tmp_path_factory):
    return cluster.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def starting_cluster(pd_model, tmp_path_factory):
    """Of tests/disagg/test_pd_serving.py."""
    with cluster.start(pd_model, tmp_path_factory.mktemp("pd"), node=ForkedNode) as starting:
        yield starting


@pytest.fixture(scope="session")
def starting_server(tiny_v32, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--max-total-tokens", str(SLOTS), "--enable-cache-report")
    with Server(tiny_v32, *flags, log=log) as starting:
        yield starting


@pytest.fixture(scope="session")
def starting_pair(tiny_v32, tmp_path_factory):
    """Of two tokenizer workers; of tests/launch/test_shutdown_server.py, which end it."""
    with leftovers.start(tiny_v32, tmp_path_factory.mktemp("pair") / "log", workers=2) as starting:
        yield starting


@pytest.fixture(scope="session")
def server(starting_server):
    """The one server of the group "server" (groups.py)."""
    starting_server.wait_ready()
    yield starting_server
    assert starting_server.stop() == 0, starting_server.tail()


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path, port):
    yield from launching.launcher(monkeypatch, capsys, tmp_path, port)
