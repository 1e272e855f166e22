"""Every input the launcher refuses: exit status 2 and one line on stderr for each reason.

What it refuses to serve, by model, platform and feature: tests/launch/test_launch_rules.py.
"""

import errno
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_ess import errors, launch_server, plugin
from sglang_ess.config import TEMPLATE, EssConfig
from sglang_ess.launch import ports
from tests.support import dry
from tests.support.engine import in_fork, run_launcher
from tests.support.launching import refused
from tests.support.server import Server, free_port


def test_a_good_command_starts_with_the_environment_set(launch, monkeypatch):
    server_args, lines = launch("--tp-size", "1", "--ess-index-dtype", "float32")
    assert lines == [] and server_args.tp_size == 1
    assert EssConfig.from_env() == EssConfig(index_dtype="float32")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--ess-plat", "cpu"], ["--ess-plat.", "Did you mean --ess-platform?"]),
        (["--ess-indx-dtype=fp8"], ["--ess-indx-dtype", "--ess-index-dtype?"]),
        (["--disable-es"], ["Did you mean --disable-ess?"]),
        (["--ess-platform", "gpu"], ["--ess-platform", "auto, cpu, native", "'gpu'"]),
        (["--ess-platform"], ["--ess-platform", "expected one argument"]),
        (["--ess-hot-ratio", "1.5"], ["--ess-hot-ratio", "at most 1", "got 1.5"]),
        (["--ess-hot-gib", "0"], ["--ess-hot-gib", "more than 0"]),
        (["--ess-host-gib", "much"], ["--ess-host-gib", "invalid float value: 'much'"]),
        (["--ess-device-gib=-1"], ["--ess-device-gib", "more than 0", "got -1.0"]),
        (["--ess-canary-rate", "2"], ["--ess-canary-rate", "0 to 1", "got 2.0"]),
        (["--ess-warmup", "maybe"], ["--ess-warmup", "on, off", "'maybe'"]),
        (["--ess-hot-ratio", "0.5", "--ess-hot-gib", "1"], ["must not both", "Drop one"]),
        (["--config", "gone.yaml"], ["--config", "gone.yaml"]),
        (["--config"], ["--config must be given once"]),
    ],
)
def test_flags(launch, flags, parts):
    refused(launch(*flags), *parts)


def test_no_flag_of_sglang_is_taken_for_a_misspelt_one():
    parser = launch_server._full_parser()
    theirs = {option for action in parser._actions for option in action.option_strings}
    for option in theirs.difference(EssConfig.flags()):
        launch_server._refuse_misspelt(option)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/nowhere/model", ["'/nowhere/model'", "does not exist"]),
        ("gpt2", ["org/name", "'gpt2'"]),
        ("a/b/c", ["org/name", "'a/b/c'"]),
        ("..", ["directory with config.json", "'..'"]),
        (__file__, ["directory with config.json"]),
    ],
)
def test_model_paths(launch, monkeypatch, tmp_path, path, parts):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    (tmp_path / "config.json").unlink(missing_ok=True)
    if path == "..":
        path = str(tmp_path / "below")
        parts = [parts[0], repr(path)]
    refused(launch("--model-path", path), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["config.json must be JSON", "line 1 column 2"]),
        ("[]", ["config.json must be a JSON object", "got list"]),
        (b"\xff\xfe", ["config.json must be readable text"]),
    ],
)
def test_malformed_config_json(launch, tmp_path, text, parts):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(launch("--model-path", str(tmp_path / "m")), *parts)
    refused(launch("--model-path", str(tmp_path / "m"), "--disable-ess"), *parts)


def test_hub_names(launch, monkeypatch, tmp_path):
    import huggingface_hub

    def download(name, file, revision, cache_dir):
        if name == "org/typo":
            raise OSError("404 Client Error\nRepository Not Found")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refused(launch("--model-path", "org/typo"), "'org/typo'", "404 Client Error", "HF_TOKEN")
    assert launch("--model-path", "org/model")[1] == []


@pytest.mark.parametrize("number", ["0", "-1", "65536", "700000"])
def test_impossible_ports(launch, number):
    refused(launch("--port", number), "--port must be 1 to 65535", f"got {number}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use(launch, host):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        result = launch("--host", host, "--port", str(taken))
        refused(result, f"--port must be free on {host}: got {taken}", "Try --port ")
        free = int(result[1][0].rsplit("--port ", 1)[1].rstrip("."))
        assert free != taken and ports.port_reasons(host, free) == []


def test_a_port_just_closed_can_be_taken_again(launch, port):
    """A connection in TIME_WAIT does not block the port, because of SO_REUSEADDR."""
    with socket.create_server(("127.0.0.1", port)) as server:
        client = socket.create_connection(("127.0.0.1", port))
        connection, _ = server.accept()
        connection.close()
        client.close()
    assert launch("--port", str(port))[1] == []


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b"])
def test_a_host_that_is_none(launch, host):
    refused(launch("--host", host), "--host must be a name or address", host)


def test_an_address_of_another_machine(launch, monkeypatch):
    def bind(host, port):
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(ports, "_bind", bind)
    refused(launch("--host", "192.0.2.1"), "192.0.2.1:", "Cannot assign")


@pytest.mark.parametrize(
    ("name", "value", "flags", "parts"),
    [
        ("SGLANG_PLUGINS", "other", [], ["sglang_ess and ess_cpu", "['other']"]),
        ("SGLANG_PLATFORM", "vendor", [], ["unset or ess_cpu", "'vendor'"]),
        ("SGLANG_PLATFORM", "ess_cpu", ["--ess-platform", "native"], ["native"]),
    ],
)
def test_selectors_that_would_leave_ess_out(launch, monkeypatch, name, value, flags, parts):
    monkeypatch.setenv(name, value)
    refused(launch(*flags), *parts)


def test_a_plugin_that_sglang_did_not_load(launch, monkeypatch):
    monkeypatch.setattr(plugin, "registered", False)
    refused(launch(), "sglang-ess must be among SGLang's plugins")


def test_a_config_file(launch, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("context-length: 512\npage-size: 64\nenable-metrics: true\n")
    for flags in (["--config", str(file)], [f"--config={file}"]):
        server_args, lines = launch(*flags, "--context-length", "256")
        assert lines == []
        assert (server_args.context_length, server_args.page_size) == (256, 64)
        assert server_args.enable_metrics


def test_ess_options_in_a_config_file(launch, tmp_path):
    file = tmp_path / "server.yml"
    file.write_text("disable-ess: true\ness_platform: cpu\npage-size: 64\ncontext-length: 8\n")
    server_args, lines = launch("--config", str(file), "--context-length", "9", accelerator="cuda")
    assert lines == []
    assert (server_args.page_size, server_args.context_length) == (64, 9)
    assert EssConfig.from_env() == EssConfig(enabled=False, platform="cpu")
    assert launch("--config", str(file), "--ess-platform", "auto")[1] == []
    assert EssConfig.from_env().platform == "auto"
    file.write_text("disable-ess: false\n")
    assert launch("--config", str(file))[1] == []
    assert EssConfig.from_env() == EssConfig()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ess-platfrom: cpu", "Did you mean --ess-platform?"),
        ("ess-platform: gpu", "'gpu'"),
        ("- a", "must hold a mapping"),
        ("a: [", "must hold YAML"),
    ],
)
def test_bad_config_files(launch, tmp_path, text, part):
    (tmp_path / "bad.yaml").write_text(text)
    refused(launch("--config", str(tmp_path / "bad.yaml")), part)


def test_help_shows_both(launch, capsys):
    assert launch_server.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "ESS (sglang-ess):" in text and "--ess-index-dtype" in text
    assert "--chunked-prefill-size" in text


def test_the_children_are_ended_when_the_server_ends(launch, monkeypatch):
    import sglang.srt.utils

    ended = []
    monkeypatch.setattr(
        sglang.srt.utils, "kill_process_tree", lambda *a, **k: ended.append((a[0], k))
    )
    launch()
    assert ended == [(launch_server.os.getpid(), {"include_parent": False})]


# SGLang's own checks: of its parser, of one option, of options together, of files and of the model.
SGLANG_CHECKS = (
    (["--tp-size", "x"], ["Argument --tp-size/", "'x'", "--help"]),
    (["--no-such-flag"], ["Unrecognized arguments: --no-such-flag"]),
    (["--schedule-policy", "nonsense"], ["--schedule-policy", "'nonsense'"]),
    (["--tool-call-parser", "nonsense"], ["--tool-call-parser", "'nonsense'"]),
    (["--log-level", "nonsense"], ["--log-level must be one of debug, ", "'nonsense'"]),
    (["--log-level-http", "nonsense"], ["--log-level-http must be one of trace", "'nonsense'"]),
    (["--enable-deterministic-inference"], ["deterministic inference", "dsa"]),
    (["--chunked-prefill-size", "100"], ["chunked_prefill_size", "page_size"]),
    (["--enable-pdmux"], ["PD-Multiplexing", "chunked prefill"]),
    (["--context-length", "1000000"], ["context_length (1000000)"]),
    (["--tokenizer-path", "/nowhere"], ["--tokenizer-path must name", "'/nowhere'"]),
    (["--tokenizer-worker-num", "0"], ["--tokenizer-worker-num must be 1 to 256"]),
    (["--chat-template", "/nowhere.jinja"], ["SGLang refuses these options", "/nowhere.jinja"]),
    (["--ssl-certfile", "/nowhere.pem"], ["--ssl-keyfile"]),
    (["--preferred-sampling-params", "{"], ["--preferred-sampling-params", "'{'"]),
    (["--preferred-sampling-params", "1"], ["SGLang cannot start", "--log-level debug"]),
    (["--preferred-sampling-params", '{"a": 1}'], ["SGLang cannot start", "'a'"]),
    (["--gc-threshold", "1000000000000"], ["SGLang cannot start", "OverflowError"]),
)


def check_no_traceback(result, *parts):
    """The launcher refuses with one line of ours and without a traceback."""
    status, text = result
    lines = [line for line in text.splitlines() if line.startswith("sglang-ess: ")]
    refused((status, lines), *parts)
    assert "Traceback" not in text and "usage:" not in text


def test_what_sglang_itself_refuses(tiny_v32, port):
    cases = [flags for flags, _ in SGLANG_CHECKS]
    results = in_fork(dry.launch_dry, tiny_v32, port, [*cases, ["--max-running-requests", "4"]])
    for result, (flags, parts) in zip(results, SGLANG_CHECKS, strict=False):
        print(flags, result)
        check_no_traceback(result, *parts)
    assert results[-1][0] == dry.READY, results[-1][1]


CAUSED = "try:\n        {}\n    except Exception as error:\n        raise {} from error"
SCHEDULERS = {  # the body of an SGLang function: what make_scheduler does with what it raises
    "raise ValueError('--flag must be 1')": "--flag must be 1",
    "raise RuntimeError(\n        'Not enough memory')": "Not enough memory",
    "assert not x, (\n        'words for the operator'\n    )": "words for the operator",
    CAUSED.format("dict(a=1)['x']", "ValueError('no x')"): "no x",
    CAUSED.format("None.attribute", "RuntimeError('capture failed')"): None,
    "assert not x": None,
    "None.attribute": None,
    "int('x')": None,
}


@pytest.mark.parametrize("body", SCHEDULERS)
def test_a_check_in_the_scheduler_is_a_line_and_a_bug_a_traceback(tmp_path, capsys, body):
    file, names = tmp_path / "sglang" / "scheduler.py", {}
    file.parent.mkdir()
    file.write_text(f"def init(self, x):\n    {body}\n")
    exec(compile(file.read_text(), file, "exec"), names)
    with pytest.raises(BaseException) as caught:
        errors.make_scheduler(names["init"], None, True)
    printed = capsys.readouterr().err.splitlines()
    if SCHEDULERS[body] is None:
        assert not isinstance(caught.value, SystemExit) and printed == []
    else:
        assert caught.value.code == 2 and len(printed) == 1
        assert printed[0].startswith("sglang-ess: ") and SCHEDULERS[body] in printed[0]


def test_a_rank_that_ends_because_of_another_says_nothing(capsys, monkeypatch):
    """The other one prints its line, and has a moment to do so."""
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)

    def init(*args):
        raise errors.PeerRefusal("rank 1 has failed")

    with pytest.raises(SystemExit) as caught:
        errors.make_scheduler(init, None)
    assert caught.value.code == 2 and capsys.readouterr().err == "" and waited == [1.0]


def test_of_ranks_that_refuse_alike_the_first_says_why(tmp_path, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setattr(errors.tempfile, "gettempdir", lambda: str(tmp_path))

    def init(rank):
        raise errors.Refusal(f"rank {rank}")

    for template in ("ess-a-", "ess-b-"):  # of two servers
        monkeypatch.setenv(TEMPLATE, template)
        for rank in range(3):
            with pytest.raises(SystemExit):
                errors.make_scheduler(init, rank)
    assert capsys.readouterr().err == "sglang-ess: rank 0\n" * 2 and waited == [1.0] * 4
    assert {errors.refusal_mark("ess-a-"), errors.refusal_mark("ess-b-")} == set(tmp_path.iterdir())


@pytest.mark.slow
def test_no_value_of_any_flag_ends_in_a_traceback(tiny_v32, port):
    cases = in_fork(dry.generated_cases)
    assert len(cases) > 2500
    results = in_fork(dry.launch_dry, tiny_v32, port, cases, seconds=3600)
    for flags, (status, text) in zip(cases, results, strict=True):
        assert status in (2, dry.READY) and "Traceback" not in text, (flags, status, text[-2000:])


def test_the_traceback_is_there_for_who_asks(tiny_v32, port):
    flags = ["--preferred-sampling-params", "1", "--log-level", "debug"]
    ((status, text),) = in_fork(dry.launch_dry, tiny_v32, port, [flags])
    assert status == 2 and "Traceback" in text


SIZES = {
    "hot tier": (
        ["--max-total-tokens", "40000", "--ess-hot-ratio", "0.0001"],
        ["hot tier must hold 64 rows", "got 4 for 40000 slots", "--ess-hot-ratio to 0.0016"],
    ),
    "device": (
        ["--ess-device-gib", "0.0001"],
        ["memory must hold one page of 64 slots", "got 0.10 MiB of device", "--ess-device-gib"],
    ),
}


def check_refused_by_the_scheduler(status, log, parts):
    """It ended by itself, with one line of ours and without a traceback."""
    text = log.read_text()
    lines = [line for line in text.splitlines() if line.startswith("sglang-ess: ")]
    refused((status, lines), *parts)
    assert "Traceback" not in text and "ready after" not in text


@pytest.mark.parametrize("what", SIZES)
def test_sizes_that_only_the_scheduler_can_judge(tiny_v32, tmp_path, what):
    """Run the launcher and its scheduler in processes that need not import SGLang again."""
    (flags, parts), log = SIZES[what], tmp_path / "log"
    given = ["--model-path", str(tiny_v32), "--port", str(free_port()), *flags]
    check_refused_by_the_scheduler(run_launcher(given, log), log, parts)


@pytest.mark.slow
@pytest.mark.parametrize("what", SIZES)
def test_sizes_that_only_the_scheduler_can_judge_by_command(tiny_v32, tmp_path, what):
    flags, parts = SIZES[what]
    with Server(tiny_v32, *flags, log=tmp_path / "log") as server:
        status = server.process.wait(300)
    check_refused_by_the_scheduler(status, server.log, parts)


def test_a_bad_path_is_refused_in_a_moment_without_a_traceback():
    """The command refuses before it imports SGLang."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sglang_ess.launch_server"]
        + ["--model-path", str(Path("/nowhere/model"))],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [x for x in done.stderr.splitlines() if not x.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("sglang-ess: --model-path must be")
    assert " sglang\n" not in done.stderr and " torch\n" not in done.stderr
