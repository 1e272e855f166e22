"""sglang_ess.engine, SGLang's offline engine with ESS; and what SGLang's own engine prints."""

import multiprocessing
import os
import subprocess
import sys

import pytest

import sglang_ess
from sglang_ess import EngineRefused, EssConfig, plugin
from sglang_ess.config import ENV_VAR
from tests.support.engine import in_fork
from tools.forks import fork_children

PROMPTS = ["The quick brown fox jumps over the lazy dog. " * 8, "Hello"]
SAMPLING = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
SIZES = {"max_total_tokens": 4096, "random_seed": 1, "enable_deterministic_inference": False}
REFUSED = {
    "page_size": ({"page_size": 1}, ["--page-size must be unset or 64", "got 1."]),
    "two": ({"page_size": 1, "dcp_size": 2}, ["--page-size must", "\n--dcp-size must"]),
    "field": ({"no_such_field": 1}, ["no_such_field"]),
    "model": ({"model_path": "/nowhere"}, ["--model-path must", "'/nowhere'"]),
    "sglang": ({"chunked_prefill_size": 100}, ["chunked_prefill_size", "page_size"]),
    "tokenizer": ({"tokenizer_path": "/nowhere"}, ["--tokenizer-path must"]),
    "scheduler": ({"ess": EssConfig(device_gib=0.0001)}, ["its line", "stderr above"]),
}


def run(model, configs):
    """The tokens of PROMPTS from an engine of each config, and the message for each of REFUSED."""
    fork_children()
    tokens = []
    for ess in configs:
        with sglang_ess.engine(model, ess=ess, **SIZES) as llm:
            tokens.append([answer["output_ids"] for answer in llm.generate(PROMPTS, SAMPLING)])
    refused = {}
    for name, (given, _) in REFUSED.items():
        try:
            sglang_ess.engine(**{"model_path": str(model), **SIZES, **given}).shutdown()
        except EngineRefused as error:
            refused[name] = str(error)
    return tokens, refused, [process.name for process in multiprocessing.active_children()]


def test_two_tiers_write_what_one_writes_and_refusals_are_exceptions(tiny_v32):
    configs = [EssConfig(enabled=False), EssConfig(hot_ratio=0.1)]
    (one, two), refused, left = in_fork(run, tiny_v32, configs)
    assert left == []
    assert one == two and [len(tokens) for tokens in one] == [12, 12]
    for name, (_, parts) in REFUSED.items():
        assert [part for part in parts if part not in refused[name]] == [], refused[name]


def test_an_import_of_sglang_on_another_platform_is_refused(tiny_v32, monkeypatch):
    import sglang.srt.platforms

    monkeypatch.setenv(ENV_VAR, "{}")
    sglang.srt.platforms.current_platform.device_name  # noqa: B018  makes the choice
    with pytest.raises(EngineRefused, match=r"must come before SGLang's import.*Platform already"):
        sglang_ess.engine(tiny_v32, ess=EssConfig(platform="cpu"))


def test_the_import_is_light():
    heavy = "{'torch', 'numpy', 'sglang', 'numba'} & set(sys.modules)"
    code = f"import sys, sglang_ess; sglang_ess.engine; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("found", [True, False])
def test_a_plain_launch_without_a_platform_prints_what_to_do(monkeypatch, capsys, found):
    import sglang.srt.platforms
    from sglang.srt.platforms.cpu import CpuSRTPlatform
    from sglang.srt.platforms.interface import SRTPlatform

    monkeypatch.delenv(ENV_VAR, raising=False)
    platform = CpuSRTPlatform() if found else SRTPlatform()
    monkeypatch.setattr(sglang.srt.platforms, "_current_platform", platform)
    plugin.register()
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("sglang-ess: ")]
    assert len(lines) == (0 if found else 1)
    for part in () if found else ("sglang_ess.engine(", "sglang_ess.launch_server", ENV_VAR):
        assert part in lines[0]


@pytest.mark.parametrize(
    ("command", "platform", "num_lines"),
    [
        ("python -m sglang.bench_one_batch_server --base-url x", "", True),
        ("python -X dev -m sglang.benchmark.offline_throughput", "", True),
        ("python -m sglang.bench_one_batch_server --base-url x", "ess_cpu", False),
        ("python -m sglang.bench_serving", "", False),
        ("python script.py", "", False),
    ],
)
def test_a_client_prints_which_variable_is_missing(
    monkeypatch, capsys, command, platform, num_lines
):
    monkeypatch.delenv(ENV_VAR, raising=False)
    monkeypatch.setenv("SGLANG_PLATFORM", platform)
    monkeypatch.setattr(plugin, "accelerator", lambda: None)
    monkeypatch.setattr(sys, "orig_argv", command.split())
    plugin.activate_cpu_platform()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == num_lines and all("SGLANG_PLATFORM=ess_cpu" in line for line in lines)


SCRIPTS = {
    "unguarded": (
        "import sglang_ess\nsglang_ess.engine({model!r}, max_total_tokens=4096)\n",
        "EngineRefused: sglang_ess.engine must be called under `if __name__",
    ),
    "plain": (
        "import sglang\nprint('imported')\nif __name__ == '__main__':\n"
        "    sglang.Engine(model_path={model!r})\n",
        "sglang-ess: SGLang must have an accelerator",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(tiny_v32, tmp_path, name):
    code, line = SCRIPTS[name]
    (tmp_path / "script.py").write_text(code.format(model=str(tiny_v32)))
    env = {key: value for key, value in os.environ.items() if key != ENV_VAR}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and done.stderr.count(line) == 1, done.stderr
