"""benchmarks/serving/capacity: sizes against bytes counted by hand, and whose code decides them.

It runs in a process of its own: SGLang's platform is chosen once, and here it is no plugin's.
"""

import dataclasses
import json
from unittest import mock

import pytest

from benchmarks.harness import ROOT
from sglang_ess.config import ENV_VAR
from tools.worker import Worker

GIB, PAGE, K = 1 << 30, 64, 1024
BUDGET = 40 * GIB
# Bytes of a token by hand: latents of all layers; index keys of the layers that select; of all.
BYTES = {
    "v32": (61 * 656, 61 * 132, 61 * 132),
    "glm51": (78 * 656, 78 * 132, 78 * 132),
    "glm52": (78 * 656, 21 * 132, 78 * 132),
    "hy4": (34 * 656, 10 * 132, 34 * 132),
}
GROUPS = {"v32": 61, "glm51": 78, "glm52": 21, "hy4": 10}
LAYERS = {model: latents // 656 for model, (latents, _, _) in BYTES.items()}
ROWS = 4096 + PAGE  # of a request under HiSparse: twice the top-k, and a page for new tokens


class Sizes:
    """The benchmark's functions, in a Worker."""

    def __init__(self):
        from benchmarks.serving import capacity

        self.benchmark = capacity

    def size(self, system, point, *options, **named):
        return getattr(self.benchmark, system)(self.benchmark.Point(*point), *options, **named)

    def corrupted(self, target, wrong, *call):
        """size(*call) with SGLang's function `target` replaced. wrong: a dict of changed fields of
        its result, or another result."""
        from sglang.srt.mem_cache.sparsity import parse_hisparse_config

        def replacement(**_):
            if not isinstance(wrong, dict):
                return wrong
            return dataclasses.replace(parse_hisparse_config(), **wrong)

        with mock.patch(target, replacement):
            return self.size(*call)

    def decided(self, point, hot_ratio):
        """(slots, hot rows) that ESS's hook on SGLang's configurator decides on a GPU."""
        from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

        from sglang_ess.config import EssConfig
        from sglang_ess.mem_cache import capacity

        env, benchmark = EssConfig(hot_ratio=hot_ratio).to_env(), self.benchmark
        # This host's memory is no limit, and no graphs are captured.
        parts = {"host_limit_bytes": lambda *_: benchmark.NO_LIMIT, "_largest_graph": lambda: None}
        with (
            benchmark.published(),
            mock.patch.dict("os.environ", env),
            mock.patch.multiple(capacity, **parts),
        ):
            configurator = benchmark.MetaConfigurator(benchmark.Point(*point))
            original = KVCacheConfigurator.config_from_budget
            capacity.config_from_budget(original, configurator, point[2])
            return capacity.decided().slots, capacity.decided().hot_rows

    def summary(self, point):
        report = self.benchmark.harness.Report()
        self.benchmark.compare(report, self.benchmark.Point(*point))
        return report.summary

    def main(self, *arguments):
        self.benchmark.main(list(arguments))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    log = tmp_path_factory.mktemp("capacity") / "log"
    env = dict.fromkeys((ENV_VAR, "SGLANG_USE_CPU_ENGINE", "SGLANG_PLATFORM"))
    with Worker(Sizes, env=env, log=log) as worker:
        yield worker


def whole_pages(slots):
    return slots // PAGE * PAGE


def test_the_bytes_by_hand():
    assert BYTES["v32"][:2] == (40_016, 8_052)
    assert BYTES["glm52"] == (51_168, 2_772, 10_296)


@pytest.mark.parametrize("model", BYTES)
class TestSizes:
    def test_one_tier(self, sizes, model):
        latents, index, _ = BYTES[model]
        found = sizes.call("size", "one_tier", (model, 32 * K, BUDGET))
        slots = whole_pages(BUDGET // (latents + index))
        assert (found["slots"], found["prompt"]) == (slots, slots)
        assert (found["requests"], found["rows"]) == (slots // (32 * K), 32 * K)
        assert (found["host"], found["beyond"]) == (0, 0)

    @pytest.mark.parametrize(("ratio", "context"), [(None, 8 * K), (10, 32 * K), (10, 1024 * K)])
    def test_hisparse(self, sizes, model, ratio, context):
        """It keeps the index keys of all layers, for each token on the host."""
        latents, _, index = BYTES[model]
        found = sizes.call("size", "hisparse", (model, context, BUDGET), ratio)
        times = ratio or 2
        rows = whole_pages(BUDGET // (latents + times * index))
        assert (found["slots"], found["prompt"], found["rows"]) == (times * rows, rows, ROWS)
        requests = min(times * rows // context, rows // ROWS)
        assert found["requests"] == requests
        assert found["host"] * GIB == (times * rows + PAGE) * latents
        # Of each request and layer: token, place (4 B) of each row, order of use (2 B); of each
        # request: row (8 B), and the host's place of each token (8 B).
        requests += 1  # SGLang's padding
        buffers = requests * (LAYERS[model] * (ROWS * 8 + 4096 * 2) + ROWS * 8 + context * 8)
        mapping = times * rows * 8
        assert buffers + mapping < found["beyond"] * GIB < 1.1 * (buffers + mapping)

    def test_ess(self, sizes, model):
        latents, index, _ = BYTES[model]
        found = sizes.call("size", "ess", (model, 32 * K, BUDGET), 0.1)
        slots, maps = found["slots"], 4 * (GROUPS[model] + 1)
        assert slots % PAGE == 0
        # Row states are below 32 B a row and group, staging and plans below 0.3 GiB.
        least = slots * (index + maps + latents / 10)
        assert least < BUDGET < least + slots * 0.1 * 32 * (GROUPS[model] + 1) + 0.3 * GIB
        assert found["requests"] == slots // (32 * K)
        assert found["rows"] == round(0.1 * 32 * K)
        assert found["host"] * GIB == (slots + PAGE) * latents

    def test_one_tier_with_an_mtp_layer(self, sizes, model):
        """SGLang keeps its row and index key of every slot."""
        latents, index, _ = BYTES[model]
        found = sizes.call("size", "one_tier", (model, 32 * K, BUDGET, 1))
        assert found["slots"] == whole_pages(BUDGET // (latents + index + 656 + 132))

    @pytest.mark.parametrize("hot_ratio", [None, 0.1])
    @pytest.mark.parametrize("mtp_layers", [0, 1])
    def test_ess_is_what_a_server_decides(self, sizes, model, hot_ratio, mtp_layers):
        point = model, 128 * K, BUDGET, mtp_layers
        found = sizes.call("size", "ess", point, hot_ratio)
        slots, rows = sizes.call("decided", point, hot_ratio)
        assert found["slots"] == slots
        assert found["rows"] == round(rows / slots * 128 * K)


def test_hisparse_is_sglangs(sizes):
    """Other defaults of SGLang's give other sizes."""
    point, latents, index = ("glm52", 32 * K, BUDGET), *BYTES["glm52"][::2]
    target = "sglang.srt.mem_cache.sparsity.parse_hisparse_config"
    wrong = {"host_to_device_ratio": 3, "device_buffer_size": 8192}
    found = sizes.call("corrupted", target, wrong, "hisparse", point)
    rows = whole_pages(BUDGET // (latents + 3 * index))
    assert (found["slots"], found["rows"]) == (3 * rows, 8192 + PAGE)
    assert found["requests"] == min(3 * rows // (32 * K), rows // (8192 + PAGE))


def test_one_tier_is_sglangs(sizes):
    """It elides the index keys of layers that share theirs, and ESS does where it does."""
    point, (latents, _, index) = ("glm52", 32 * K, BUDGET), BYTES["glm52"]
    target = "sglang.srt.mem_cache.kv_cache_configurator._should_elide_dsa_index_k"
    found = sizes.call("corrupted", target, False, "one_tier", point)
    assert found["slots"] == whole_pages(BUDGET // (latents + index))
    kept = sizes.call("corrupted", target, False, "ess", point, 0.1)
    elided = sizes.call("size", "ess", point, 0.1)
    assert kept["slots"] < 0.6 * elided["slots"]


def test_the_command(sizes, tmp_path):
    json_path, png_path = tmp_path / "out.json", tmp_path / "out.png"
    sizes.call("main", "--quick", "--json", str(json_path), "--plot", str(png_path))
    data = json.loads(json_path.read_text())
    summary = data["summary"]
    assert {row["kind"] for row in data["rows"]} == {"computed"}
    assert len(data["rows"]) == 4 * 2 * 3 * 6  # models, settings, systems, metrics
    assert data["quick"] and data["config"]["device_gib"] == 40
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert summary["glm52_vs_hisparse"] >= 1.8
    assert summary["glm52_batch_vs_best_hisparse"] >= 1.8
    assert 0.95 < summary["v32_vs_hisparse"] < 1
    assert summary["glm52_hisparse_vs_one_tier"] == pytest.approx(3.5, abs=0.01)
    assert 6.6 < summary["glm52_vs_one_tier"] < 6.84  # without maps and states it were 6.84
    for model, least in (("v32", 3.7), ("glm52", 6.2)):
        assert least < summary[f"{model}_mtp_vs_one_tier"] < summary[f"{model}_vs_one_tier"]
        assert summary[f"{model}_mtp_batch_vs_one_tier"] > least
    for model in ("v32", "glm51"):
        assert summary[f"{model}_maps_states"] == summary[f"{model}_maps_states_before"]
    for model in ("glm52", "hy4"):
        assert summary[f"{model}_maps_states"] < summary[f"{model}_maps_states_before"] / 3
    assert summary["glm52_hisparse_beyond_gib"] > 10  # at 4,096 requests, SGLang's default
    published = json.loads((ROOT / "results" / "capacity.json").read_text())["summary"]
    assert summary == pytest.approx(published), "results/capacity.json is stale: write it again"


def test_a_budget_without_a_request_has_no_ratio(sizes):
    """0.2 GiB hold no request of 32K: no figure becomes a division by zero."""
    summary = sizes.call("summary", ("v32", 32 * K, GIB // 5))
    assert "v32_batch_vs_hisparse" not in summary and summary["v32_vs_hisparse"] > 0
