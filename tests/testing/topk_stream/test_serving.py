"""--ess-topk-stream in real processes: what decode plays, and that log lines say so."""

import json
import logging
import logging.config
import re
import time

import numpy as np
import pytest

from sglang_ess import plugin
from sglang_ess.testing.topk_stream import announce
from sglang_ess.testing.topk_stream.from_trace import from_trace
from sglang_ess.testing.topk_stream.table import (
    SEAM_POWERS,
)
from sglang_ess.trace.trace import FLUSH_SECONDS, read_trace
from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.server import Server
from tests.testing.topk_stream import CONTEXTS, PROFILE, TOPK, stream_flags

# --- log lines ----------------------------------------------------------------------------


@pytest.fixture
def marked(capsys):
    """Log lines are marked; afterwards logging is as before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    announce.mark_log_lines()
    announce.mark_log_lines()
    yield
    root.handlers[:], root.level = handlers, level


def test_every_line_is_marked_whatever_logging_is_configured_to(marked, capsys):
    logging.basicConfig(level="INFO", format="[%(asctime)s TP0] %(message)s", force=True)
    logging.getLogger("sglang.srt.x").info("100%% of %d", 7)
    logging.getLogger("y").info({"a": 1})
    format_only = {"version": 1, "disable_existing_loggers": False}
    plain = {"f": {"format": "%(name)s %(message)s"}}
    handler = {"h": {"class": "logging.StreamHandler", "formatter": "f"}}
    root = {"handlers": ["h"], "level": "INFO"}
    logging.config.dictConfig(
        format_only | {"formatters": plain, "handlers": handler, "root": root}
    )
    logging.getLogger("z").info("a % sign")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[.* TP0\] \[UNSAFE top-k stream\] 100% of 7", lines[0])
    assert lines[1].endswith("[UNSAFE top-k stream] {'a': 1}")
    assert lines[2:] == ["z [UNSAFE top-k stream] a % sign"]


def test_uvicorns_access_lines_are_marked_too(marked, capsys):
    from sglang.srt.utils.common import set_uvicorn_logging_configs
    from uvicorn.config import LOGGING_CONFIG
    from uvicorn.logging import AccessFormatter

    set_uvicorn_logging_configs(None)
    handler = logging.StreamHandler()
    handler.setFormatter(AccessFormatter(LOGGING_CONFIG["formatters"]["access"]["fmt"]))
    logger = logging.getLogger(announce.ACCESS_LOGGER)
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        logger.info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/x", "1.1", 200)
    finally:
        logger.removeHandler(handler)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "GET" in x][:1]
    assert "[UNSAFE top-k stream] 1.2.3.4:5" in line and line.count(announce.MARK) == 1


def test_both_entry_points_mark_the_process(marked, monkeypatch, asked):
    asked()
    for entry in (plugin.activate_cpu_platform, plugin.register):
        logging.setLogRecordFactory(logging.LogRecord)
        monkeypatch.setattr(plugin, "_register_hooks", lambda config: [])
        monkeypatch.setattr(plugin, "registered", False)
        monkeypatch.setenv(plugin.APP_VAR, "")  # so that what register() sets is undone
        entry()
        record = logging.getLogger("x").makeRecord("x", 20, "f", 1, "text", (), None)
        assert record.getMessage() == f"{announce.MARK} text"


# --- a real engine ------------------------------------------------------------------------

GATHER, RECORD = "tests.support.gather:install", "tests.support.recorder:install"
STREAM = "tests.testing.topk_stream:register_hooks"
LENGTHS, NEW = [40, 150, 520, 900, 300], 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = dict(arch="v32", index_topk=TOPK, heads=4, layers=3)
    return parity.write_model(tmp_path_factory.mktemp("model") / "v32", **shape)


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    small.save(tmp_path_factory.mktemp("stream") / "small.npz")
    return next(tmp_path_factory.getbasetemp().glob("stream*/small.npz"))


def serve(model, file, **ess):
    patches = [GATHER, RECORD]
    if file is not None:
        ess |= {"topk_stream": str(file), "unsafe": True}
        patches.append(STREAM)
    ess = {"index_dtype": "float32", "admission": "off"} | ess
    args = dict(dtype="float32", max_total_tokens=8192, chunked_prefill_size=512)
    with EngineProcess(model, ess=ess, patches=patches, **args) as engine:
        outputs = engine.together("r", parity.prompts_of(LENGTHS), NEW, start=0)
        if "trace" in ess:  # the engine's end is a kill
            time.sleep(3 * FLUSH_SECONDS)
        return outputs, engine.selections()


def rounds(table, context, layer) -> dict[tuple[int, int], set[int]]:
    """{(stream, step): selected positions} of a table, to the round at which it begins again."""
    found = {}
    for stream in range(table.streams):
        seam = table.seams[context][stream, layer]
        place = np.arange(len(seam))
        for turn in range(2**SEAM_POWERS):
            for step, row in enumerate(table.steps[context][stream, layer]):
                found[stream, turn * table.num_steps + step] = set(place[row].tolist())
            place = seam[place]
    return found


def played(selections, rid, layer, length, known, count) -> bool:
    """Are the decode steps of a request those of a table, in order, each with the newest?"""
    rows = [set(selections[rid, layer][length + step].tolist()) for step in range(count)]
    lengths = [length + step + 1 for step in range(count)]
    if any(len(row) != TOPK or n - 1 not in row for row, n in zip(rows, lengths, strict=True)):
        return False
    total = max(step for _, step in known) + 1
    return any(
        all(
            row - {n - 1} <= known[stream, (step + i) % total]
            for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
        )
        for stream, step in known
    )


@pytest.fixture(scope="module")
def served(model, file):
    """(outputs, selections) by server: one-tier and two, with the stream; one-tier without."""
    return {
        "one-tier": serve(model, file, enabled=False),
        "two-tier": serve(model, file, hot_ratio=0.05, canary_rate=1.0),
        "no stream": serve(model, None, enabled=False),
    }


@pytest.mark.slow
def test_two_tiers_give_one_tiers_output_under_the_stream_too(served):
    for one, two in zip(served["one-tier"][0], served["two-tier"][0], strict=True):
        assert one.token_ids == two.token_ids
        assert np.array_equal(one.logprobs, two.logprobs)
        assert np.array_equal(one.prompt_logprobs, two.prompt_logprobs)


@pytest.mark.slow
def test_decode_of_long_requests_plays_the_table_and_nothing_else_does(served, small):
    outputs, selections = served["one-tier"]
    own, _ = served["no stream"]
    for output, without, length in zip(outputs, own, LENGTHS, strict=True):
        assert np.array_equal(output.prompt_logprobs, without.prompt_logprobs)
        long = length + NEW > CONTEXTS[0]
        assert (output.token_ids != without.token_ids) == long
        if not long:
            continue
        first = max(length, CONTEXTS[0] - 1)  # the step that reaches the first context
        context = int(length + 1 >= CONTEXTS[1])
        for layer in range(3):
            known, count = rounds(small, context, layer), length + NEW - 1 - first
            assert played(selections, output.rid, layer, first, known, count), (length, layer)
            other = rounds(small, context, (layer + 1) % 3)
            assert not played(selections, output.rid, layer, first, other, count)


@pytest.mark.slow
def test_a_recorded_trace_becomes_a_stream(model, tmp_path):
    trace = tmp_path / "t.trace"
    serve(model, None, hot_ratio=0.5, trace=str(trace))
    table = from_trace(read_trace(trace), streams=2, steps=16)
    assert table.contexts == (521,) and table.layers == 3
    table.save(tmp_path / "recorded.npz")
    outputs, selections = serve(model, tmp_path / "recorded.npz", enabled=False)
    assert played(selections, outputs[3].rid, 2, 900, rounds(table, 0, 2), NEW - 1)


# --- a real server ------------------------------------------------------------------------


@pytest.mark.slow
def test_every_log_line_of_every_process_is_marked(model, tmp_path):
    """By a logging configuration that names the process; the start's block says it too."""
    logging_file = tmp_path / "logging.json"
    line = {"f": {"format": "LINE %(processName)s %(message)s"}}
    handler = {"h": {"class": "logging.StreamHandler", "formatter": "f"}}
    logging_file.write_text(
        json.dumps(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": line,
                "handlers": handler,
                "root": {"handlers": ["h"], "level": "DEBUG"},
            }
        )
    )
    env = {"SGLANG_LOGGING_CONFIG_PATH": str(logging_file), "XDG_CACHE_HOME": str(tmp_path)}
    flags = ("--max-total-tokens", "4096", *stream_flags(f"{PROFILE}@128,256"))
    with Server(model, *flags, log=tmp_path / "log", env=env) as server:
        server.wait_ready()
        body = {"input_ids": list(range(200)), "sampling_params": {"max_new_tokens": 8}}
        assert server.post("/generate", body)[0] == 200
        info = server.get("/server_info")
        server.wait_for(lambda: "    URL " in server.log.read_text(), 10, "summed up")
        text = server.log.read_text()
    assert info["ess"]["topk_stream"] == f"{PROFILE}@128,256"
    lines = [line for line in text.splitlines() if line.startswith("LINE ")]
    processes = {line.split()[1] for line in lines}
    assert [line[:200] for line in lines if announce.MARK not in line] == []
    assert len(processes) == 3  # scheduler, detokenizer, and the launcher's with the tokenizer
    assert "top-k stream" in text and "plays in decode" in text, "the hooks are registered"
    ours = [line for line in text.splitlines() if "[sglang-ess]" in line]
    assert all(line.startswith(announce.MARK) for line in ours)
    assert any("outputs are wrong" in line for line in ours)
    assert re.search(r"^    top-k stream    .*outputs are wrong", text, re.M)
