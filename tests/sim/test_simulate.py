"""`python -m sglang_ess.simulate`: scenario files, their errors, tables, JSON, pictures."""

import json

import pytest

from sglang_ess.sim.cli import simulate
from sglang_ess.sim.engine.simulation import Simulation, workload_of
from sglang_ess.sim.inputs.scenario import read_scenario, scenario_names, with_settings
from sglang_ess.sim.model.locality import Locality

TINY = """\
title = "tiny"
model = "deepseek-v3.2"
gpu = "h200"
link = "pcie5"
deployment = "node-8"
locality = "deepseek-v3.2"
systems = ["ess", "no-admission", "one-tier"]

[arrivals]
kind = "poisson"
rate = 4.0
requests = 6

[input_tokens]
kind = "uniform"
low = 2000
high = 3000

[output_tokens]
kind = "constant"
tokens = 12

[server]
decode_ranks = 1
prefill_ranks = 4
max_running = 8

[memory]
slots = 65536

[run]
misses = 5.0
"""
SHORT = ("run.misses=50", "run.steps=6", "run.settle_steps=1")  # no hot tier, in no time


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def run(capsys, *argv):
    """(exit status, stdout, stderr)"""
    status = simulate.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out, err


# --- the command ------------------------------------------------------------------------


def test_a_table_has_the_systems_side_by_side(capsys, scenario):
    status, out, err = run(capsys, scenario)
    assert (status, err) == (0, "")
    for words in ("tiny", "ESS, no", "one tier", "tokens/s per GPU", "TTFT", "link in use"):
        assert words in out
    assert "simulated: deepseek-v3.2, h200, pcie5, node-8" in " ".join(out.split())
    line = next(line for line in out.splitlines() if "finished / unfinished" in line)
    assert line.split()[-9:] == ["6", "/", "0"] * 3


def test_json_and_png(capsys, scenario, tmp_path):
    out = tmp_path / "out"
    argv = (scenario, "--json", out / "r.json", "--plot", out / "r.png", "--seed", "3")
    assert run(capsys, *argv)[0] == 0
    document = json.loads((out / "r.json").read_text())
    assert document["kind"] == "simulated" and document["seed"] == 3
    assert document["scenario"]["arrivals"]["rate"] == 4.0
    names = [system["system"] for system in document["systems"]]
    assert names == ["ess", "no-admission", "one-tier"]
    for system in document["systems"]:
        assert system["kind"] == "simulated" and system["output_tokens"] == 72
        assert len(system["series"]["batch"]) == system["steps"]
        requests = sum(system["series"]["batch"])
        assert system["fetched_bytes"] == system["misses"] * requests * 61 * 656
    ess, one_tier = document["systems"][0], document["systems"][2]
    assert ess["misses"] == 5 and one_tier["misses"] == 0
    assert ess["step_seconds"] > one_tier["step_seconds"]
    assert ess["host_gib"] == pytest.approx(65536 * 61 * 656 / 2**30)
    assert one_tier["host_gib"] == 0
    assert (out / "r.png").read_bytes().startswith(b"\x89PNG")


def test_settings_layers_and_seeds(scenario):
    first, again, other = (
        simulate.simulate(with_settings(read_scenario(scenario), ["systems=['ess']"]), seed)[0]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    changed = with_settings(read_scenario(scenario), ["arrivals.requests=2"])
    assert simulate.simulate(changed)[0].requests == 2


def test_rows_are_simulated_where_no_misses_are_given(capsys, tmp_path):
    """Cold, and with a hot tier for all: each row is fetched once at most."""
    path = tmp_path / "rows.toml"
    text = TINY.replace("misses = 5.0", "layers = 1").replace("requests = 6", "requests = 2")
    text = text.replace("[server]", "[server]\nwarmup = false").replace(', "one-tier"', "")
    path.write_text(text)
    ess, off = simulate.simulate(read_scenario(path))
    for result in (ess, off):
        rows = result.fetched_bytes / 61 / 656
        assert 2 * 2000 < rows < 2 * 3012 and result.finished == 2
    status = run(capsys, path, "--layers", "1", "--json", tmp_path / "r.json")[0]
    document = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and document["systems"][0]["misses"] == ess.misses


def test_the_list(capsys):
    status, out, _ = run(capsys, "--list")
    assert status == 0
    for name in scenario_names():
        assert name in out
    assert {"ess-paper-32k", "ess-paper-128k", "pd-h200", "thrash", "glm-5", "glm-5.2"} <= {
        *scenario_names()
    }


# --- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('title = "tiny"', "title = 3", ":1: title must be text: got 3"),
        ('gpu = "h200"', "", ":1: gpu must be given"),
        ("rate = 4.0", "rate = -4.0", ":11: arrivals.rate must be more than 0: got -4.0"),
        ("rate = 4.0", "rate = 4.0\nburst = 3", ":12: arrivals.burst must be a known field"),
        ("rate = 4.0", "", "arrivals is refused: rate must be given for kind 'poisson'"),
        ('kind = "uniform"', 'kind = "zipf"', ":15: input_tokens.kind must be one of constant"),
        ("high = 3000", "high = 1000", ":14: input_tokens is refused: high must be low"),
        ("max_running = 8", "max_running = 0", "server.max_running must be 1 or more: got 0"),
        ("misses = 5.0", "steps = 4\nsettle_steps = 4", "run is refused: settle_steps must be"),
        ('["ess", ', '["fast", ', ":7: systems must be one of ess, no-admission, one-tier"),
        ('[output_tokens]\nkind = "constant"\ntokens = 12', "", "output_tokens must be given"),
        ("[run]", "[run", ":31: file must be TOML"),
        ('gpu = "h200"', 'gpu = "h300"', "gpus must hold h300: got "),
        ('locality = "deepseek-v3.2"', 'locality = "none"', "localities must hold none"),
        ("slots = 65536", "slots = 65536000", "memory must hold slots and a top-k of hot rows"),
        ("slots = 65536", "slots = 65536\nhot_rows = 99", "99 hot rows"),
        ("high = 3000", "high = 300000", "must be at most deepseek-v3.2's max_context of 163840"),
        ("decode_ranks = 1", 'overlap = "all"', ":24: server.overlap must be one of off, da"),
    ],
)
def test_a_bad_scenario_is_one_line_with_file_line_and_field(capsys, scenario, old, new, where):
    assert old in TINY
    text = TINY.replace(old, new, 1)
    scenario.write_text(text.replace("misses = 5.0", "") if "none" in new else text)
    status, out, err = run(capsys, scenario)
    assert (status, out) == (2, "")
    assert err.startswith("sglang-ess: ") and err.count("\n") == 1
    assert where in err
    if where.startswith(":"):
        assert f"{scenario}{where}" in err


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("rate", "--set must be FIELD=VALUE: got 'rate'"),
        ("rate=3", "field must be one of title, model, gpu"),
        ("arrivals.pace=3", "field must be one of kind, requests, rate"),
        ("arrivals.rate=fast", "must be float: got 'fast'"),
        ("arrivals.rate=-1", "rate must be more than 0: got -1.0"),
        ("server.max_running=1.5", "max_running must be int: got 1.5"),
        ("server.warmup=1", "must be bool: got 1"),
        ("systems=['one']", "systems must be one of"),
        ("title.x=1", "title must be a table"),
        ("arrivals=1", "arrivals must be Arrivals: got 1"),
    ],
)
def test_a_bad_setting_is_one_line(capsys, scenario, setting, rule):
    status, out, err = run(capsys, scenario, "--set", setting)
    assert (status, out) == (2, "")
    assert rule in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (("nowhere",), "scenarios must hold nowhere: got ess-paper-128k"),
        (("/nowhere.toml",), "/nowhere.toml must be a readable TOML file"),
        ((), "scenario must be given"),
    ],
)
def test_no_scenario(capsys, argv, rule):
    status, _, err = run(capsys, *argv)
    assert status == 2 and rule in err and err.count("\n") == 1


def test_a_bad_trace_is_refused_with_its_line(capsys, scenario, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"time": 0, "input_tokens": 50}\n')
    start, _, rest = TINY.partition("[arrivals]")
    rest = rest[rest.index("[server]") :]
    scenario.write_text(f'{start}[arrivals]\nkind = "trace"\npath = "t.jsonl"\n\n{rest}')
    status, _, err = run(capsys, scenario)
    assert status == 2 and f"{tmp_path}/t.jsonl:1: output_tokens: must be given" in err
    row = {"time": 0, "input_tokens": 50, "output_tokens": 2}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert run(capsys, scenario)[0] == 0, "its path is relative to the scenario's"


# --- those that come with ESS -----------------------------------------------------------


@pytest.mark.parametrize("name", scenario_names())
def test_scenarios_run(name):
    """A few steps: every file fits its model, its memory and its load."""
    scenario = with_settings(read_scenario(name), SHORT)
    assert Locality.load(scenario.locality).topk == 2048
    for result in simulate.simulate(scenario):
        assert result.steps >= 5  # a rank may not have had a request yet
        assert result.refused == 0 and result.batch_max >= 1
        assert result.misses == (0 if result.system == "one-tier" else 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", scenario_names())
def test_two_tiers_serve_more_than_one(name):
    """The scenarios that come with ESS, with one layer for all and as many steps as show it."""
    settings = ["run.layers=1"]
    if "paper" in name:
        settings += ["run.steps=60", "run.settle_steps=30"]
    ess, *others = simulate.simulate(with_settings(read_scenario(name), settings))
    one_tier = others[-1]
    assert ess.hit_rate > 0.85 and ess.host_gib > 0
    if name == "thrash":
        assert ess.tokens_per_second > 1.3 * others[0].tokens_per_second
        assert ess.itl.p99 < 0.3 * others[0].itl.p99
    else:
        assert ess.tokens_per_second > 1.1 * one_tier.tokens_per_second
        assert ess.batch_mean > 1.3 * one_tier.batch_mean


def test_the_table_says_what_early_fetches_save(capsys):
    """Of one step with the same misses: what layers wait for, and the whole of what they would."""
    more = ("run.misses=400", "run.steps=6", "server.max_running=60")
    settings = [word for setting in (*SHORT[2:], *more) for word in ("--set", setting)]
    status, out, _ = run(capsys, "glm-5.2", *settings)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    waits, late = (
        next(float(words[at]) for words in lines if words[:1] == [first])
        for first, at in (("transfer", 1), ("without", 3))
    )
    assert 0 < waits < late
    off = with_settings(read_scenario("glm-5.2"), [*more, "server.early_fetch=false"])
    found = simulate.simulate(off)[0]
    assert found.in_turn_seconds == pytest.approx(found.step_parts["transfer"])
    assert 1000 * found.in_turn_seconds == pytest.approx(late, rel=0.1)


def test_settings_are_typed(scenario):
    record = with_settings(
        read_scenario(scenario), ["arrivals.rate=2", "memory.kv_gib = 40.5", "title=a b"]
    )
    assert (record.arrivals.rate, record.memory.kv_gib, record.title) == (2.0, 40.5, "a b")
    assert isinstance(record.arrivals.rate, float)


def test_settings_are_checked_together(scenario):
    settled = with_settings(read_scenario(scenario), ["run.settle_steps=9", "run.steps=10"])
    assert (settled.run.steps, settled.run.settle_steps) == (10, 9)


def test_a_share_of_the_link_takes_longer(scenario):
    settings = ["systems=['ess']", "run.misses=1000"]
    half, whole = (
        simulate.simulate(with_settings(read_scenario(scenario), [*settings, *more]))[0]
        for more in (["memory.link_share=0.5", "server.overlap=off"], ["server.overlap=off"])
    )
    assert half.step_parts["transfer"] == pytest.approx(2 * whole.step_parts["transfer"], rel=0.05)
    assert whole.fetched_bytes > 0 and half.link_utilisation > whole.link_utilisation


def test_one_workload_for_all_systems(scenario):
    tiny = read_scenario(scenario)
    workload = workload_of(tiny, 0)
    before = [column.copy() for column in vars(workload).values()]
    for system in tiny.systems:
        Simulation(tiny, system, workload, 0).run()
    assert all((a == b).all() for a, b in zip(before, vars(workload).values(), strict=True))
