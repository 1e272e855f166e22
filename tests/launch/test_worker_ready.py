"""The summary appears once each of several tokenizer workers is ready, with uvicorn itself."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sglang_ess.launch import startup
from tests.support.server import free_port
from tests.tools.test_processes import poll

SERVED = """
import os, sys, time, types
from pathlib import Path
from types import SimpleNamespace
from sglang_ess.launch import http_end, startup

FOLDER, PORT = Path(sys.argv[1]), int(sys.argv[2])

def is_ready():
    # The first of the workers is ready at once, the other when the test wants it.
    if (FOLDER / "go").exists():
        return True
    try:
        os.symlink(str(os.getpid()), FOLDER / "first")
    except FileExistsError:
        pass
    return os.readlink(FOLDER / "first") == str(os.getpid())

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        return await send({"type": "lifespan.startup.complete"})
    # As if the ready worker took each connection.
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

manager = SimpleNamespace(is_ready=is_ready, all_worker_ipcs={"a", "b"})
state = SimpleNamespace(tokenizer_manager=manager, scheduler_info={})
sys.modules[startup.HTTP_SERVER] = types.ModuleType(startup.HTTP_SERVER)
sys.modules[startup.HTTP_SERVER].get_global_state = lambda: state

if __name__ == "__main__":
    import uvicorn
    import sglang_ess.mem_cache.host_share  # the summary would import it, and torch
    http_end.bound(1.0)
    args = SimpleNamespace(
        model_path="m", url=lambda: f"http://127.0.0.1:{PORT}", api_key=None, node_rank=0,
        tokenizer_worker_num=2, enable_http2=False,
    )
    with startup.announced(args, time.monotonic()):
        uvicorn.run("served:app", port=PORT, workers=2, log_level="error")
"""


@pytest.fixture
def served(tmp_path):
    """The server's process. Its second worker waits for tmp_path/go; it writes tmp_path/log."""
    (tmp_path / "served.py").write_text(SERVED)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "served.py"), str(tmp_path), str(free_port())],
            env=env, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ready_of(process) -> list[int]:
    """The workers whose title says that they are ready."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [one.pid for one in children if startup.READY in " ".join(one.cmdline())]


def test_the_summary_waits_for_the_slowest_worker(served, tmp_path):
    poll(lambda: ready_of(served), 90)  # imports, on a busy machine
    time.sleep(1.0)  # the launcher looks ten times
    assert ready_of(served) == [int(os.readlink(tmp_path / "first"))]
    assert " ready after " not in (tmp_path / "log").read_text()
    (tmp_path / "go").touch()
    poll(lambda: " ready after " in (tmp_path / "log").read_text(), 30)
    assert len(ready_of(served)) == 2
