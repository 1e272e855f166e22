"""--ess-layer-budgets from the command line to the pool. tests/tiers has the parts.

That output stays one tier's while rows move is in tests/serving/test_two_tier.py.
"""

import argparse
import json
from types import SimpleNamespace

import pytest

from benchmarks import layer_budgets as benchmark
from sglang_ess.config import EssConfig
from sglang_ess.launch import preflight
from sglang_ess.layout import GIB
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.capacity import Geometry, choose_capacity
from sglang_ess.tiers.balance.rebalance import ghost_bytes
from sglang_ess.tiers.index_groups import IndexGroups
from tests.support import parity
from tests.support.engine import EngineProcess

GEOMETRY = Geometry(4, 656, 4 * 132, topk=64, context_tokens=1000, page_slots=64, ghosts=True)


def parsed(*flags):
    parser = argparse.ArgumentParser()
    EssConfig.add_cli_args(parser)
    return EssConfig.from_cli_args(parser.parse_args(flags))


def test_the_flag():
    assert parsed().layer_budgets is None
    assert parsed("--ess-layer-budgets", "auto").layer_budgets == "auto"
    with pytest.raises(ValueError, match="one of auto, uniform: got 'even'"):
        parsed("--ess-layer-budgets", "even")


@pytest.mark.parametrize("value", ["auto", "uniform", None])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_a_gpu_refuses_and_only_auto(value, on_cpu, monkeypatch):
    monkeypatch.setattr(preflight, "rule_reasons", lambda *_: [])
    ranks = dict(tp_size=1, pp_size=1, dp_size=1, nnodes=1, attn_dp_size=1)
    args = SimpleNamespace(
        enable_hisparse=False, disaggregation_mode="prefill", enable_dp_attention=False, **ranks
    )
    reasons = preflight.option_reasons(args, EssConfig(layer_budgets=value), on_cpu)
    assert len(reasons) == (value == "auto" and not on_cpu)


@pytest.mark.parametrize(
    "options, layers, moves",
    [({}, 4, True), ({"layer_budgets": "auto"}, 4, True), ({"layer_budgets": "uniform"}, 4, False),
     ({}, 1, False), ({"layer_budgets": "auto", "hot_ratio": 1.0}, 4, False)],
)  # fmt: skip
def test_when_rows_move(options, layers, moves):
    assert capacity.moves_rows(EssConfig(**options), IndexGroups.single(layers)) is moves


def test_ghosts_are_charged():
    plain = Geometry(**{**vars(GEOMETRY), "ghosts": False})
    more = GEOMETRY.device_bytes(6400, 640) - plain.device_bytes(6400, 640)
    assert more == 4 * ghost_bytes(6464)
    settled = choose_capacity(EssConfig(), GEOMETRY, 6400, 10_000_000, 100 * GIB)
    assert settled.geometry.ghosts and settled.device_bytes <= 10_000_000
    # A row for every slot: nothing is ever missed, whichever layer has the rows.
    assert not choose_capacity(EssConfig(), GEOMETRY, 6400, GIB, 100 * GIB).geometry.ghosts


def test_the_benchmark(tmp_path, monkeypatch, capsys):
    """All of it, on two layers: one that misses little and one that misses much."""
    point = {"context": 16384, "requests": 2, "ratio": 0.35}
    monkeypatch.setattr(benchmark, "QUICK_POINT", point)
    monkeypatch.setattr(benchmark, "QUICK_LAYERS", 2)
    files = tmp_path / "x.json", tmp_path / "x.png"
    benchmark.main(["--quick", "--json", str(files[0]), "--plot", str(files[1])])
    found = json.loads(files[0].read_text())
    assert files[1].stat().st_size > 1000 and "auto/uniform" in capsys.readouterr().out
    assert found["summary"]["miss_ratio"] < 1.01 and 0 < found["summary"]["ghost_share"] < 1
    kinds = {(row["name"], row["kind"]) for row in found["rows"]}
    assert {("misses", "simulated"), ("plan", "measured"), ("ghost", "measured")} <= kinds
    after = [row for row in found["rows"] if row["config"].get("when") == "after"]
    assert all(sum(row["rows"]) == 2 * int(0.35 * 32768) for row in after if "rows" in row)


@pytest.mark.slow
def test_a_server_moves_rows_by_its_own_ghosts(tmp_path):
    """In short rounds; 197 rows a layer, of which a step's three top-k's take up to 96."""
    model = parity.write_model(tmp_path / "m", arch="v32", index_topk=32, heads=4, layers=3)
    patches = ["tests.support.rebalances:often"]
    args = dict(dtype="float32", max_total_tokens=16384)
    with EngineProcess(model, ess={"hot_ratio": 0.012}, patches=patches, **args) as served:
        served.generate(parity.prompts_of([3000, 2500, 400]), max_new_tokens=80)
        found, hot_rows = served.call("_rebalances"), served.call("_server_info")["ess"]["hot_rows"]
    assert found["rebalances"] >= 1 and found["rows_moved"] > 0
    assert sum(found["rows"]) + found["spare"] == 3 * hot_rows
