"""The launcher in the test's own process: what it refuses, in lines; what it would start."""

import json
import logging

from sglang_ess import launch_server, plugin
from sglang_ess.config import ENV_VAR
from sglang_ess.launch import http_end, preflight, shutdown

DSA = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_topk": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


class Started(BaseException):
    """run_server was reached: nothing was refused."""


def in_this_process(monkeypatch):
    """The launcher neither forks nor changes uvicorn."""
    monkeypatch.setattr(shutdown, "supervised", lambda serve, *_: serve())
    monkeypatch.setattr(http_end, "bound", lambda grace_seconds: None)


def launcher(monkeypatch, capsys, tmp_path, port):
    """launch(*flags, model=..., accelerator=...) -> (exit status, our lines on stderr)."""
    import sglang.launch_server
    import sglang.srt.plugins
    import sglang.srt.utils

    started = []

    def run_server(server_args):
        started.append(server_args)
        raise Started

    for name in (ENV_VAR, "SGLANG_PLUGINS", "SGLANG_PLATFORM"):
        monkeypatch.setenv(name, "")  # so that what main() sets is undone after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(sglang.launch_server, "run_server", run_server)
    monkeypatch.setattr(sglang.srt.plugins, "load_plugins", lambda: None)
    monkeypatch.setattr(sglang.srt.utils, "kill_process_tree", lambda *a, **k: None)
    monkeypatch.setattr(plugin, "registered", True)
    in_this_process(monkeypatch)
    monkeypatch.setattr(preflight, "resolve", lambda server_args: None)  # there is no model
    handlers, level = logging.root.handlers[:], logging.root.level

    def call(*flags, model=DSA, accelerator=None):
        monkeypatch.setattr(plugin, "accelerator", lambda: accelerator)
        (tmp_path / "config.json").write_text(json.dumps(model))
        given = () if "--model-path" in flags else ("--model-path", str(tmp_path))
        given += () if "--port" in flags else ("--port", str(port))
        try:
            status = launch_server.main([*given, *flags])
        except Started:
            status = started.pop()
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if line.startswith("sglang-ess: ")]

    yield call
    logging.root.handlers[:], logging.root.level = handlers, level


def refused(result, *parts):
    """One reason, in one line that holds every part."""
    status, lines = result
    assert status == 2
    assert len(lines) == 1, lines
    assert [part for part in parts if part not in lines[0]] == []
