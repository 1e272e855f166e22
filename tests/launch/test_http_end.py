"""How HTTP servers end, with uvicorn itself and a small application."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.server import free_port
from tests.tools.test_processes import poll

APP = """
import asyncio, atexit, sys, time
from sglang_ess.launch import http_end

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if WORKERS > 1:
            atexit.register(time.sleep, 600)  # as long as modules may take
        return await send({"type": "lifespan.shutdown.complete"})
    begun = scope["path"] == "/begun"
    if begun:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await asyncio.sleep(float(scope["query_string"] or 0))
    if not begun:
        await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"b"})

WORKERS = int(sys.argv[-1])

if __name__ == "__main__":
    import uvicorn
    http_end.bound(1.0)
    uvicorn.run("served:app", port=int(sys.argv[1]), workers=WORKERS)
"""


@pytest.fixture(params=[1, 2], ids=["one worker", "two"])
def served(request, tmp_path):
    """(the server's process, ask(path) which sends a request and returns the connection)."""
    (tmp_path / "served.py").write_text(APP)
    port, log = free_port(), tmp_path / "log"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "served.py"), str(port), str(request.param)],
            env=env, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

    def ask(path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", path)
        return connection

    def answers():
        try:
            return ask("/").getresponse().status == 200
        except OSError:
            return False

    process.log = log
    try:
        poll(answers)
        yield process, ask
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def test_a_request_is_finished_or_answered_with_503(served):
    process, ask = served
    quick, slow, begun = ask("/?0.5"), ask("/?600"), ask("/begun?600")
    assert begun.getresponse().status == 200
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    poll(lambda: not accepted(ask))
    assert quick.getresponse().read() == b"b"
    answer = slow.getresponse()
    error = json.loads(answer.read())["error"]
    assert answer.status == error["code"] == 503 and "1 s after the signal" in error["message"]
    assert process.wait(20) == 0
    assert "Traceback" not in process.log.read_text()


def accepted(ask):
    try:
        ask("/")
    except OSError:
        return False
    return True


def test_what_is_no_request_is_cancelled_as_ever():
    from sglang_ess.launch.http_end import answering

    async def app(scope, receive, send):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(answering(app, 1)({"type": "websocket"}, None, None))
