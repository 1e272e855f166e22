"""Every input the launcher refuses: exit status 2 and one line on stderr for each reason."""

import errno
import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_ess import launch_server, plugin, preflight
from sglang_ess.config import ENV_VAR, EssConfig
from tests.support.server import Server

DSA = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_topk": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


class Started(Exception):
    """run_server was reached: nothing was refused."""


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path, port):
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


@pytest.mark.parametrize(
    "change", [{"architectures": ["LlamaForCausalLM"]}, {"index_topk": None}, {"architectures": []}]
)
def test_models_without_sparse_attention(launch, change):
    model = {**DSA, **change}
    refused(launch(model=model), "sparse attention", "index_topk", "--disable-ess")
    assert launch("--disable-ess", model=model)[1] == []
    refused(launch(model={}), "architectures None")


def test_overrides_and_text_config_count(launch):
    override = json.dumps({"index_topk": 64})
    model = {**DSA, "index_topk": None}
    assert launch("--json-model-override-args", override, model=model)[1] == []
    nested = {"architectures": DSA["architectures"], "text_config": DSA}
    assert launch(model=nested)[1] == []
    refused(launch("--json-model-override-args", "{"), "--json-model-override-args must be JSON")


def test_hisparse(launch):
    refused(launch("--enable-hisparse"), "--enable-hisparse", "--disable-ess")
    refused(launch("--enable-hisparse", accelerator="cuda"), "--enable-hisparse", "--disable-ess")
    assert launch("--enable-hisparse", "--disable-ess", accelerator="cuda")[1] == []


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("--device", "cuda", "unset or cpu"),
        ("--tp-size", "2", "1"),
        ("--pp-size", "2", "1"),
        ("--dp-size", "2", "1"),
        ("--ep-size", "2", "1"),
        ("--attn-dp-size", "2", "1"),
        ("--nnodes", "2", "1"),
        ("--enable-dp-attention", None, "off"),
        ("--speculative-algorithm", "EAGLE", "unset"),
        ("--quantization", "fp8", "unset or unquant"),
        ("--enable-hierarchical-cache", None, "off"),
        ("--enable-lora", None, "unset or off"),
        ("--enable-two-batch-overlap", None, "off"),
        ("--kv-cache-dtype", "fp8_e5m2", "auto or bf16 or bfloat16 or fp8_e4m3"),
        ("--page-size", "1", "unset or 64"),
        ("--attention-backend", "fa3", "unset or dsa or nsa"),
    ],
)
def test_the_cpu_platforms_limits(launch, flag, value, limit):
    given = [flag] if value is None else [flag, value]
    got = "on" if value is None else value
    refused(launch(*given), f"{flag} must be {limit} on the CPU platform: got {got}.")
    rules = {rule[1] for rule in preflight.ESS_RULES + preflight.CUDA_RULES}
    lines = launch(*given, accelerator="cuda")[1]
    assert (" with ESS: got " in "".join(lines)) if flag in rules else lines == []
    assert launch(*given, "--disable-ess", accelerator="cuda")[1] == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-cache-dtype", "fp8_e4m3", "--page-size", "64", "--attention-backend", "dsa"],
        ["--disaggregation-mode", "decode"],
        ["--disaggregation-mode", "decode", "--disable-ess"],
        ["--disaggregation-mode", "prefill"],
        ["--ess-link-gib", "0.5", "--ess-itl-ms", "80", "--ess-admission", "off"],
        ["--ess-hot-ratio", "0.3", "--ess-host-gib", "0.5", "--ess-device-gib", "0.25"],
        ["--ess-device-gib", "0.25", "--disable-ess"],
    ],
)
def test_what_the_cpu_platform_takes(launch, flags):
    assert launch(*flags)[1] == []


def test_dense_models_keep_sglangs_own_choices_on_the_cpu_platform(launch):
    flags = ("--page-size", "1", "--attention-backend", "torch_native", "--disable-ess")
    assert launch(*flags, model={"architectures": ["LlamaForCausalLM"]})[1] == []


def test_a_quantized_checkpoint_on_the_cpu_platform(launch):
    model = {**DSA, "quantization_config": {"quant_method": "fp8"}}
    refused(launch(model=model), "quant_method 'fp8'", "bfloat16 checkpoint")
    assert launch(model=model, accelerator="cuda")[1] == []


@pytest.mark.parametrize("accelerator", [None, "cuda"])
def test_the_fp8_row_has_one_shape(launch, accelerator):
    model = {**DSA, "kv_lora_rank": 128, "qk_rope_head_dim": 32}
    flags = ("--kv-cache-dtype", "fp8_e4m3")
    refused(launch(*flags, model=model, accelerator=accelerator), "656-byte row", "got 128 and 32")
    assert launch(model=model, accelerator=accelerator)[1] == []


def test_float32_indexer_keys_off_the_cpu_platform(launch):
    flags = ("--ess-index-dtype", "float32")
    refused(launch(*flags, accelerator="cuda"), "--ess-index-dtype must be fp8", "float32")
    assert launch(*flags, "--ess-platform", "cpu", accelerator="cuda")[1] == []


RULE_CASES = {
    "disaggregation_transfer_backend": ["--disaggregation-transfer-backend", "mori"],
    "disaggregation_decode_enable_offload_kvcache": [
        "--disaggregation-decode-enable-offload-kvcache"
    ],
    "disaggregation_decode_host_receive_threshold": [
        "--disaggregation-decode-host-receive-threshold",
        "0.5",
    ],
    "disaggregation_decode_retraction_backup": [
        "--disaggregation-decode-retraction-backup",
        "host_pool",
    ],
    "enable_pd_role_switch": ["--enable-pd-role-switch"],
    "enable_memory_saver": ["--enable-memory-saver"],
    "enable_unified_memory": ["--enable-unified-memory"],
    "enable_hisparse": ["--enable-hisparse"],
    "enable_hierarchical_cache": ["--enable-hierarchical-cache"],
    "enable_lmcache": ["--enable-lmcache"],
    "enable_flexkv": ["--enable-flexkv"],
    "speculative_algorithm": ["--speculative-algorithm", "EAGLE"],
    "pp_size": ["--pp-size", "2"],
    "dcp_size": ["--dcp-size", "2"],
    "attn_cp_size": ["--attn-cp-size", "2"],
    "enable_two_batch_overlap": ["--enable-two-batch-overlap"],
    "enable_single_batch_overlap": ["--enable-single-batch-overlap"],
    "enable_pdmux": ["--enable-pdmux"],
    "attention_backend": ["--attention-backend", "flashmla"],
    "prefill_attention_backend": ["--prefill-attention-backend", "fa3"],
    "decode_attention_backend": ["--decode-attention-backend", "flashmla"],
}


@pytest.mark.parametrize(("name", "flag", "allowed"), preflight.ESS_RULES)
def test_what_two_tiers_do_not_serve(launch, name, flag, allowed):
    """One line each, also where the CPU platform has a rule of its own for it."""
    given = RULE_CASES[name]
    assert given[0] == flag
    refused(launch(*given), f"{flag} must be ")
    ours = name not in {rule[0] for rule in preflight.CPU_RULES} | {"enable_hisparse"}
    if ours:
        refused(launch(*given), " with ESS: got ", "Drop it or add --disable-ess")
    assert (launch(*given, "--disable-ess")[0] != 2) == ours
    refused(launch(*given, accelerator="cuda"), f"{flag} must be ")


@pytest.mark.parametrize(("name", "flag", "allowed"), preflight.CUDA_RULES)
def test_what_two_tiers_do_not_serve_on_a_gpu(launch, name, flag, allowed):
    given = RULE_CASES[name]
    assert given[0] == flag
    refused(launch(*given, accelerator="cuda"), f"{flag} must be ", "with ESS", "add --disable-ess")
    assert launch(*given, "--disable-ess", accelerator="cuda")[1] == []


def test_overlap_and_its_costs(launch, tmp_path):
    refused(launch("--ess-overlap", "da"), "--ess-overlap and", "CPU platform", "one stream")
    assert launch("--ess-overlap", "da", accelerator="cuda")[1] == []
    refused(launch("--ess-overlap", "on"), "--ess-overlap", "auto, off, da, dba", "'on'")
    costs = tmp_path / "kernels.json"
    flags = ("--ess-overlap-costs", str(costs))
    refused(launch(*flags, accelerator="cuda"), "must hold a cost table", "FileNotFoundError")
    costs.write_text("{}")
    refused(launch(*flags, accelerator="cuda"), "overlap_costs", "benchmarks.kernels")


def test_device_gib_off_the_cpu_platform(launch):
    flags = ("--ess-device-gib", "1.5")
    refused(
        launch(*flags, accelerator="cuda"), "--ess-device-gib", "got 1.5", "mem-fraction-static"
    )
    refused(launch(*flags, "--disable-ess", accelerator="cuda"), "--ess-device-gib must not")
    assert launch(*flags, "--ess-platform", "cpu", accelerator="cuda")[1] == []


def test_a_host_tier_larger_than_memory(launch):
    refused(launch("--ess-host-gib", "1e6"), "--ess-host-gib must fit", "got 1e+06 GiB", "limit ")
    assert launch("--ess-host-gib", "1e6", "--disable-ess")[1] == []


def test_a_trace_that_could_not_be_written(launch, tmp_path):
    gone = str(tmp_path / "gone" / "trace.ess")
    refused(launch("--ess-trace", gone), "--ess-trace must name a file", repr(gone))
    refused(launch("--ess-trace", str(tmp_path)), "--ess-trace must name a file")
    assert launch("--ess-trace", str(tmp_path / "trace.ess"))[1] == []
    assert launch("--ess-trace", gone, "--disable-ess")[1] == []
    flags = ("--ess-trace", str(tmp_path / "trace.ess"))
    refused(launch(*flags, accelerator="cuda"), "--ess-trace must be left out", "--ess-platform")


def test_all_reasons_are_collected(launch):
    status, lines = launch(
        "--tp-size", "2", "--enable-lora", "--enable-hisparse", "--page-size", "1",
        "--kv-cache-dtype", "fp8_e4m3", model={**DSA, "kv_lora_rank": 128},
    )  # fmt: skip
    assert status == 2
    named = [line.split()[1] for line in lines]
    assert named == [
        "--kv-cache-dtype", "--page-size", "--enable-hisparse", "--tp-size", "--enable-lora",
    ]  # fmt: skip


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
        assert free != taken and preflight.port_reasons(host, free) == []


def test_a_port_just_closed_can_be_taken_again(launch, port):
    """SO_REUSEADDR: a connection in TIME_WAIT does not hold the port."""
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

    monkeypatch.setattr(preflight, "_bind", bind)
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


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--max-total-tokens", "40000", "--ess-hot-ratio", "0.0001"],
            ["hot tier must hold 64 rows", "got 4 for 40000 slots", "--ess-hot-ratio to 0.0016"],
        ),
        pytest.param(
            ["--ess-device-gib", "0.0001"],
            ["memory must hold one page of 64 slots", "got 0.10 MiB of device", "--ess-device-gib"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sizes_that_only_the_scheduler_can_judge(tiny_v32, tmp_path, flags, parts):
    """A real start: it ends by itself, with one line of ours and no traceback at all."""
    with Server(tiny_v32, *flags, log=tmp_path / "log") as server:
        status = server.process.wait(300)
    text = server.log.read_text()
    lines = [line for line in text.splitlines() if line.startswith("sglang-ess: ")]
    refused((status, lines), *parts)
    assert "Traceback" not in text and "ready after" not in text


def test_a_bad_path_is_refused_in_a_moment_without_a_traceback():
    """The whole command, and before SGLang is imported."""
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
