"""--ess-store in real servers: metrics, a kill while saving, a disk that is full, no directory."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.support import parity
from tests.support.pd import fixed_port
from tests.support.server import Server
from tests.support.third_tier import objects, wait_for_objects

pytestmark = pytest.mark.slow

PAGE = 64
SHAPE = dict(arch="glm", index_topk=32, layers=5, sharing="FFSSS", **parity.NARROW)
FLAGS = (
    *("--max-total-tokens", "8192", "--skip-tokenizer-init", "--enable-metrics"),
    *("--skip-server-warmup", "--ess-hot-ratio", "0.2", "--random-seed", "1"),
)
LENGTHS = [700, 330, 500, 650]
TAIL = [1, 2, 3]
DISK = "64m"
KILLED_AT = 11  # pages, of 15 that are being saved


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return parity.write_model(tmp_path_factory.mktemp("model") / "glm", **SHAPE)


def server_of(model, store, log):
    return Server(model, "--ess-store", f"{store}:32MiB", *FLAGS, log=log, port=fixed_port())


def ask(server, prompt, count=12):
    """(token ids and logprobs, cached tokens)"""
    params = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
    status, text = server.post("/generate", body)
    assert status == 200, text[:200]
    meta = json.loads(text)["meta_info"]
    return [one[:2] for one in meta["output_token_logprobs"]], meta["cached_tokens"]


def series(server, name):
    """One of the store's series, all labels together; None if it is not there."""
    with server.open("/metrics") as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith(f"sglang:ess_store_{name}{{")]
    return sum(float(line.split()[-1]) for line in found) if found else None


def flush(server):
    server.wait_for(lambda: server.post("/flush_cache", {})[0] == 200, 60, "flushed")


def hits(server):
    return [ask(server, prompt + TAIL) for prompt in parity.prompts_of(LENGTHS)]


def test_a_restart_after_a_kill_while_saving(model, tmp_path):
    """What was whole is loaded, the rest is computed, and the answers are the same."""
    store = tmp_path / "store"
    with server_of(model, store, tmp_path / "log") as server:
        server.wait_ready()
        for prompt in parity.prompts_of(LENGTHS):
            ask(server, prompt, 1)
        expected = hits(server)
        pages = [length // PAGE for length in LENGTHS]
        assert [cached // PAGE for _, cached in expected] == pages
        wait_for_objects(store, sum(pages))
        shutil.rmtree(store / "objects")
        os.mkdir(store / "objects", 0o700)
        flush(server)
        for prompt in parity.prompts_of(LENGTHS)[:2]:
            ask(server, prompt, 1)
        while len(objects(store)) < KILLED_AT:
            time.sleep(0.001)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    before = objects(store)
    assert KILLED_AT <= len(before) <= sum(pages[:2])
    with server_of(model, store, tmp_path / "log") as server:  # on another port, at once
        server.wait_ready()
        found = hits(server)
        assert 0 < series(server, "loaded_pages_total") <= len(before)
        # A prompt whose pages are all there is a hit as before; others round otherwise.
        for (output, cached), (warm, whole) in zip(found, expected, strict=True):
            assert cached < whole or output == warm
        assert series(server, "failures_total") in (None, 0)
        flush(server)
        assert [output for output, _ in hits(server)] == [warm for warm, _ in expected]


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """A server whose store has a small disk of its own."""
    disk = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system of its own takes root")
    try:
        with server_of(model, disk / "store", disk.parent / "log") as server:
            server.wait_ready()
            server.store = disk / "store"
            yield server
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_metrics(served):
    for prompt in parity.prompts_of(LENGTHS):
        ask(served, prompt, 1)
    pages = sum(length // PAGE for length in LENGTHS)
    wait_for_objects(served.store, pages)
    flush(served)
    served.expected = hits(served)
    served.wait_for(lambda: series(served, "loaded_pages_total") == pages, 20, "counted")
    assert series(served, "saved_pages_total") >= pages
    assert series(served, "hit_pages_total") >= pages
    assert series(served, "loaded_bytes_total") > 0
    size = sum(one.stat().st_size for one in objects(served.store))
    served.wait_for(lambda: series(served, "used_bytes") >= size, 20, "measured")
    assert series(served, "limit_bytes") == 32 << 20
    assert series(served, "load_seconds_count") == len(LENGTHS)


def logged(server, text):
    return [line for line in server.log.read_text(errors="replace").splitlines() if text in line]


def test_a_full_disk(served):
    """Nothing is saved, everything is served, and the log says so once."""
    room = shutil.disk_usage(served.store).free
    ballast = served.store.parent / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room - (room % 4096))
    count = len(objects(served.store))
    try:
        for seed in (21, 22):
            for prompt in parity.prompts_of([400, 300], seed=seed):
                assert len(ask(served, prompt, 4)[0]) == 4
        served.wait_for(lambda: series(served, "write_errors_total"), 30, "counted")
        assert len(objects(served.store)) == count
        assert len(logged(served, "No space left")) == 1
    finally:
        ballast.unlink()
    flush(served)
    assert hits(served) == served.expected


def test_the_directory_goes(served):
    shutil.rmtree(served.store)
    flush(served)
    computed = hits(served)
    # Each is computed with its own tail in one pass, so only the first pages are the prompt's.
    assert [cached for _, cached in computed] == [0] * len(LENGTHS)
    again = hits(served)
    assert [cached // PAGE for _, cached in again] == [length // PAGE for length in LENGTHS]
    time.sleep(1)
    assert served.is_ready() and served.process.poll() is None
