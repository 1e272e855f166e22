"""The planner: what it recommends fits and is the best it knows, and why ESS does not help."""

import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest

from sglang_ess.config import EssConfig
from sglang_ess.layout import GIB
from sglang_ess.sim.cli import plan as command
from sglang_ess.sim.inputs.specs import changed, load
from sglang_ess.sim.model import miss_table
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.memory import Memory
from sglang_ess.sim.model.miss_table import MissTable
from sglang_ess.sim.model.trace_replay import curve
from sglang_ess.sim.planning import planner
from sglang_ess.sim.planning.planner import Planner, Question, QuestionError
from sglang_ess.tiers.balance.ghost_cache import MissCurve
from sglang_ess.trace.trace import read_trace

CONTEXT = 131072  # few batches: a quick search
GOLDEN = Path(__file__).parent / "golden.ess"
COMMAND = ["--model", "deepseek-v3.2", "--gpu", "h200", "--context", str(CONTEXT), "--itl-ms", "60"]


def table(context=CONTEXT, layers=61, scale=1.0, queries=2):
    """Misses as a power of the rows, of every third layer thrice as many."""
    most = min(2048 * queries, context)
    rows = (0, *(r for r in (2048, 4096, 6554, 13107, 32768) if r < context), context)
    curves = []
    for layer in range(layers):
        height = scale * (3 if layer % 3 == 0 else 1)
        inner = [min(most, height * 200 * (6554 / r) ** 1.5) for r in rows[1:-1]]
        curves.append(MissCurve(rows, (float(most), *inner, 0.0), most, most, 1))
    return MissTable(context, tuple(curves))


TABLE = table()


def question(context=CONTEXT, itl_ms=60.0, gpu="h200", link="pcie5", max_requests=None, **dep):
    deployment = changed(load("deployment", "node-8"), **dep)
    return Question(
        load("model", "deepseek-v3.2"), load("gpu", gpu), load("link", link), deployment, context,
        itl_ms / 1000, max_requests=max_requests,
    )  # fmt: skip


def advise(misses=TABLE, **kwargs):
    return Planner(question(**kwargs), misses).advise()


def speed(advice):
    return advice.tokens_per_second if advice else 0.0


# --- monotone ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        [{"itl_ms": ms} for ms in (10, 22, 25, 30, 40, 60, 100, 1000)],
        [{"link": link} for link in ("pcie4", "pcie5", "nvlink-c2c")],
        [{"kv_gib": gib} for gib in (2, 5, 10, 20, 40, 80, 160)],
        [{"host_gib": gib} for gib in (3, 10, 30, 60, 200, 1000)],
        [{"max_requests": n} for n in (1, 3, 5, 20, None)],
    ],
    ids=["itl", "link", "device", "host", "requests"],
)
def test_a_wider_limit_never_gives_fewer_tokens(changes):
    answers = [advise(**change) for change in changes]
    for name in ("ess", "one_tier"):
        speeds = [speed(getattr(answer, name)) for answer in answers]
        assert speeds == sorted(speeds), name
        assert name == "one_tier" or speeds[0] < speeds[-1]  # the limit did bind


def test_fewer_misses_never_give_fewer_tokens():
    speeds = [speed(advise(table(scale=scale)).ess) for scale in (4, 2, 1, 0.5, 0.0)]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


def test_batches_that_are_tried_do_not_depend_on_the_limit():
    tried = list(planner.batches(4096))
    assert tried[:256] == list(range(1, 257))
    assert all(list(planner.batches(n)) == [b for b in tried if b <= n] for n in (1, 300, 2000))


# --- what is recommended ----------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"gpu": "b200"}, {"link": "pcie4"}, {"kv_gib": 10.0}, {"host_gib": 50}],
)
def test_a_plan_fits_and_adds_up(kwargs):
    asked = question(**kwargs)
    answer = Planner(asked, TABLE).advise()
    advice, memory = answer.best, Memory.of(asked.model, asked.gpu, asked.deployment)
    assert answer.helps and advice is answer.ess
    charges = memory.charges
    slots = advice.batch * CONTEXT
    used = (slots + 64) * charges.slot_bytes + advice.hot_rows * charges.hot_row_bytes
    used += (CONTEXT + 64) * charges.staging_row_bytes + charges.fixed_bytes
    assert used == pytest.approx(advice.device_gib * GIB)
    assert used <= memory.device_bytes
    assert used > memory.device_bytes - 0.02 * GIB  # nor is memory left over
    assert slots * 61 * 656 == pytest.approx(advice.host_gib * GIB)
    assert advice.host_gib <= asked.deployment.host_gib
    assert advice.itl_ms <= 60 and advice.itl_ms == pytest.approx(advice.step_ms / 1.7)
    assert sum(advice.parts.values()) == pytest.approx(advice.step_ms)
    assert advice.tokens_per_second == pytest.approx(advice.batch * 1000 / advice.itl_ms)
    assert advice.ratio == pytest.approx(advice.hot_rows / slots)
    share = advice.hot_rows / advice.batch
    assert advice.misses == pytest.approx(TABLE.uniform(share).mean())


def test_no_batch_nearby_is_better():
    asked = Planner(question(), TABLE)
    best = asked.ess()
    others = {advice.batch: advice for advice in asked.ess_candidates()}
    assert set(others) >= {best.batch - 1, best.batch + 1}
    assert all(speed(advice) <= speed(best) for advice in others.values() if advice.itl_ms <= 60)


def test_one_tier_is_the_resident_batch():
    advice = advise().one_tier
    row = 62 * (656 + 132)  # the MTP layer's too, because the question has two queries
    memory = Memory.of(*(getattr(question(), name) for name in ("model", "gpu", "deployment")))
    assert advice.batch == memory.device_bytes // (CONTEXT * row)
    assert (advice.misses, advice.host_gib, advice.ratio) == (0, 0, 1)
    assert advice.device_gib == pytest.approx(62 * advice.draft_gib)
    assert advice.draft_gib * GIB == pytest.approx(advice.batch * CONTEXT * (656 + 132))
    alone = advise(queries=1, accepted_tokens=1.0).one_tier
    assert alone.draft_gib == 0


def test_longer_requests_take_more_memory_than_the_average_says():
    short, grown = question(), Question(**{**vars(question()), "longest": 160_000})
    found = [Planner(asked, TABLE).ess() for asked in (short, grown)]
    assert found[1].host_gib / found[1].batch > 1.2 * found[0].host_gib / found[0].batch


# --- where it does not help -------------------------------------------------------------


def test_latency_is_reached_before_the_memorys_end():
    answer = advise(itl_ms=24)
    assert (answer.helps, answer.limit) == (False, planner.LATENCY)
    assert answer.best is answer.one_tier
    assert "ms a token and one more" in answer.reason and "room for 4" in answer.reason


def test_all_requests_fit_on_the_device():
    answer = advise(max_requests=4)
    assert (answer.helps, answer.limit) == (False, planner.REQUESTS)
    assert "4 requests of 131072 tokens a GPU, room for 4" in answer.reason
    assert advise(max_requests=8).helps


def test_host_memory_is_too_small():
    answer = advise(host_gib=20)  # 4.9 GiB a request
    assert (answer.helps, answer.limit) == (False, planner.HOST)
    assert "got 20 GiB, " in answer.reason
    rank = advise(host_gib=20, tensor_parallel=8)  # the eight GPUs of a node share one tier
    assert rank.helps and 20 < rank.ess.host_gib <= 160


def test_the_link_is_too_slow(tmp_path):
    slow = tmp_path / "slow.toml"
    slow.write_text("nominal_gb_s = 0.03\ngather_gb_s = 0.02\nscatter_gb_s = 0.02\n")
    answer = advise(link=str(slow), itl_ms=36)
    assert (answer.helps, answer.limit) == (False, planner.LINK)
    assert "at 0.02 GB/s a batch of" in answer.reason
    assert advise(itl_ms=36).helps


def test_the_context_is_too_short():
    """Of 2,560 tokens a query selects 2,048: the hot rows cannot be much fewer than all."""
    kwargs = {"context": 2560, "itl_ms": 1000, "kv_gib": 6.0}
    answer = advise(table(2560), **kwargs)
    assert (answer.helps, answer.limit) == (False, planner.CONTEXT)
    assert "2048 of 2560 rows" in answer.reason


def test_larger_batches_gain_nothing():
    """Of so many tokens the indexer scans every one: the step grows with the batch."""
    answer = advise(itl_ms=1e5, kv_gib=20_000.0)
    assert (answer.helps, answer.limit) == (False, planner.COMPUTE)
    assert "larger batches gain nothing" in answer.reason


def test_nothing_keeps_the_target():
    answer = advise(itl_ms=5)
    assert (answer.best, answer.helps, answer.limit) == (None, False, planner.NONE_FITS)
    assert "one request alone takes" in answer.reason


def test_nothing_fits(tmp_path):
    answer = advise(kv_gib=4.0, host_gib=2.0)
    assert (answer.best, answer.limit) == (None, planner.NONE_FITS)
    assert "4.0 GiB of device memory for KV and 2.0 GiB of host memory" in answer.reason
    slow = tmp_path / "slow.toml"
    slow.write_text("nominal_gb_s = 0.03\ngather_gb_s = 0.02\nscatter_gb_s = 0.02\n")
    answer = advise(kv_gib=4.0, link=str(slow), itl_ms=30)
    assert (answer.best, answer.limit) == (None, planner.NONE_FITS)
    assert "what fits is too slow: a batch of 1, with" in answer.reason


def test_ess_serves_what_one_tier_cannot():
    answer = advise(kv_gib=4.0)  # a request of 128K tokens takes 5.9 GiB one-tier
    assert answer.one_tier is None and answer.helps and answer.gain is None


@pytest.mark.parametrize("itl_ms", [22, 36, 60])
@pytest.mark.parametrize("host_gib", [5, 20, 200])
def test_the_best_plan_is_never_below_one_tier(itl_ms, host_gib):
    answer = advise(itl_ms=itl_ms, host_gib=host_gib)
    assert speed(answer.best) >= speed(answer.one_tier)
    assert answer.helps == (speed(answer.ess) >= 1.02 * speed(answer.one_tier))
    assert (answer.reason is None) == answer.helps


# --- misses -----------------------------------------------------------------------------


def test_a_profiles_table_stands_for_every_layer(monkeypatch):
    monkeypatch.setattr(miss_table, "SIZES", (1.0, 2.0, 3.0))
    monkeypatch.setattr(miss_table, "STEPS", 8)
    monkeypatch.setattr(miss_table, "SETTLE", 2)
    locality = Locality.load("deepseek-v3.2")
    calls = []
    found = MissTable.from_profile(
        locality, 61, 8192, 2, sampled=2, progress=lambda: calls.append(1)
    )
    assert len(calls) == 2 * miss_table.REQUESTS
    assert len(found.curves) == 61 and len(set(found.curves)) == 2
    assert found.uniform(8192).tolist() == [0] * 61
    assert found.uniform(0).tolist() == [4096] * 61
    means = [found.uniform(rows).mean() for rows in (2048, 3000, 4096, 6000)]
    assert means == sorted(means, reverse=True) and means[0] > means[-1] > 0
    # A layer with a long reach stands for those with long reaches.
    reach = np.array(locality.layers.reach)
    misses = found.uniform(4096)
    assert reach[misses == misses.max()].mean() > reach[misses == misses.min()].mean()


def test_a_traces_table_is_its_replay():
    trace, checked = read_trace(GOLDEN), []
    context = 1 << 12
    found = MissTable.from_trace(trace, trace.layers, context, 1)
    records = sum(record.layer == 0 for record in trace)
    steps = len({record.step for record in trace if record.layer == 0})
    for scale, replayed in curve(trace, (0.5, 1.0, 2.0)).items():
        for layer, one in zip(replayed.layers, found.curves, strict=True):
            rows = round(layer.rows * steps / records)  # of one request
            misses = layer.misses_per_step * steps / records
            assert one.misses[one.rows.index(rows)] == pytest.approx(misses), scale
            checked.append(misses)
    assert len(checked) > 3 and max(checked) > min(checked)
    assert found.uniform(context).max() == 0
    with pytest.raises(ValueError, match=f"model's 61 layers: got {trace.layers}"):
        MissTable.from_trace(trace, 61, context, 1)


def test_a_table_of_another_question_is_refused():
    with pytest.raises(
        QuestionError, match="miss table must be of 61 layers in 61 index groups and 4096 t"
    ):
        Planner(question(context=4096), TABLE)


# --- index groups -----------------------------------------------------------------------

GLM = load("model", "glm-5.2")
GROUPS = MissTable(CONTEXT, table(layers=21).curves, GLM.groups)


def shared(early=True):
    deployment = changed(load("deployment", "node-8"), early_fetch=early)
    return Question(GLM, load("gpu", "h200"), load("link", "pcie5"), deployment, CONTEXT, 0.06)


def test_a_curve_stands_for_every_layer_of_its_group():
    misses = GROUPS.uniform(6554)
    assert len(misses) == 78
    assert [misses[i] for i in (0, 1, 2, 5, 6)] == [
        GROUPS.curves[group].at(6554) for group in (0, 1, 2, 2, 3)
    ]
    with pytest.raises(QuestionError, match="of 78 layers in 21 index groups.*: got 21 in 21 and"):
        Planner(shared(), table(layers=21))


def test_one_tier_holds_no_index_keys_of_layers_that_share():
    answer = Planner(shared(), GROUPS).advise()
    memory = Memory.of(GLM, shared().gpu, shared().deployment)
    assert answer.one_tier.batch == memory.device_bytes // (CONTEXT * (53940 + 788))
    assert answer.helps and answer.gain > 2
    ess = answer.ess
    assert 0 < ess.parts["transfer"] < ess.in_turn_ms


def test_without_early_fetches_layers_wait_longer():
    early, late = (Planner(shared(on), GROUPS).advise() for on in (True, False))
    assert early.ess.tokens_per_second > late.ess.tokens_per_second
    assert late.ess.in_turn_ms == late.ess.parts["transfer"]
    assert early.one_tier.step_ms == late.one_tier.step_ms
    tried = Planner(shared(), GROUPS).ess_candidates()
    same = next(one for one in tried if one.batch == late.ess.batch)
    assert same.in_turn_ms == pytest.approx(late.ess.in_turn_ms)


def test_the_command_says_what_early_fetches_save(monkeypatch, capsys):
    monkeypatch.setattr(command, "misses_of", lambda *_: GROUPS)
    asked = ["--model", "glm-5.2", *COMMAND[2:]]
    assert command.main(asked) == 0
    assert "without early fetches" in capsys.readouterr().out
    assert command.main([*asked, "--no-early-fetch"]) == 0
    assert "without early fetches" not in capsys.readouterr().out


# --- the command ------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """The command with a table that needs no measuring."""
    monkeypatch.setattr(command, "misses_of", lambda question, *_: table(question.context))


DRAFTS = "--speculative-algorithm NEXTN --speculative-eagle-topk 1".split()
DRAFTS += "--speculative-num-steps 1 --speculative-num-draft-tokens 2".split()


@pytest.mark.parametrize(("mtp", "steps"), [(1, None), (2, 1), (4, 3)])
def test_the_advice_drafts_as_many_tokens_as_were_asked_for(mtp, steps):
    """SGLang takes them: one chain of steps, and the token that is sure."""
    from sglang.srt.server_args import ServerArgs

    found = command._draft_flags(mtp)
    assert (found == []) == (steps is None)
    if found:
        parser = ArgumentParser()
        ServerArgs.add_cli_args(parser)
        args = parser.parse_args(["--model-path", "m", *found])
        assert args.speculative_num_steps == steps == args.speculative_num_draft_tokens - 1
        assert (args.speculative_algorithm, args.speculative_eagle_topk) == ("NEXTN", 1)


@pytest.mark.parametrize("more", [[], ["--overlap", "da"], ["--host-gib", "72.5"],
                                  ["--requests", "2"]])  # fmt: skip
def test_the_flags_are_the_servers(quick, more):
    parsed = command.argument_parser().parse_args([*COMMAND, *more])
    asked = command.ask(parsed)
    answer = Planner(asked, TABLE).advise()
    arguments = command.flags(asked, answer)
    parser = ArgumentParser()
    EssConfig.add_cli_args(parser)
    config, others = parser.parse_known_args(arguments)
    config = EssConfig.from_cli_args(config)
    if not answer.helps:
        assert arguments == ["--disable-ess", *DRAFTS] and not config.enabled
        return
    advice = answer.best
    assert others == ["--cuda-graph-max-bs-decode", str(advice.batch), *DRAFTS]
    hot_row = Memory.of(asked.model, asked.gpu, asked.deployment).charges.hot_row_bytes
    assert config.hot_gib * GIB // hot_row == advice.hot_rows
    host_gib = config.host_gib / asked.deployment.gpus_per_node  # the flag is for a node
    assert advice.host_gib <= host_gib <= asked.deployment.host_gib
    assert config.itl_ms == 60  # of a token: the server multiplies by the tokens of a step
    assert config.layer_budgets is None  # a GPU refuses auto


def test_json_and_plot(quick, tmp_path, capsys):
    paths = tmp_path / "plan.json", tmp_path / "plan.png"
    assert command.main([*COMMAND, "--json", str(paths[0]), "--plot", str(paths[1])]) == 0
    found = json.loads(paths[0].read_text())
    assert set(found) == {
        "kind", "command", "seed", "question", "best", "ess", "one_tier", "helps", "gain",
        "limit", "reason", "flags",
    }  # fmt: skip
    assert found["kind"] == "simulated" and found["helps"] is True
    assert found["best"] == found["ess"] and found["best"]["tier"] == "ess"
    assert set(found["best"]) == set(planner.Advice.__dataclass_fields__)
    assert found["question"]["deployment"]["queries"] == 2
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "ESS helps: +" in shown and " ".join(found["flags"]) in shown


@pytest.mark.parametrize(("size", "tiers"), [(1, 8), (2, 4), (8, 1)])
def test_host_memory_of_a_node_is_a_tier_for_each_rank(quick, size, tiers, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert command.main([*COMMAND, "--tp", str(size), "--json", str(path)]) == 0
    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    best, asked = found["best"], found["flags"]
    rows = best["batch"] * CONTEXT * 61 * 656  # once, however many GPUs read them
    assert best["host_gib"] == pytest.approx(rows / GIB)
    host_gib = float(asked[asked.index("--ess-host-gib") + 1])
    assert tiers * best["host_gib"] < host_gib <= tiers * (best["host_gib"] + 2)
    assert ("a rank of 8 GPUs" in shown) == (size == 8)
    assert ("host GiB a node" in shown) == (size < 8)


def test_the_reason_is_printed(quick, capsys):
    assert command.main([*COMMAND[:-1], "24"]) == 0
    shown = capsys.readouterr().out
    assert "ESS does not help here because the latency target" in shown
    assert "--disable-ess" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "gpt"], "deepseek-v3.2, glm-5"),
        (["--gpu", "h900"], "a100-40gb, a100-80gb, b200, h100, h200"),
        (["--link", "usb"], "nvlink-c2c, pcie4, pcie5"),
        (["--context", "0"], "context must be 1 to 163840 tokens: got 0"),
        (["--context", "200000"], "context must be 1 to 163840 tokens: got 200000"),
        (["--itl-ms", "0"], "inter-token latency must be 0.01 to 1e+06 ms: got 0"),
        (["--itl-ms", "nan"], "inter-token latency must be 0.01 to 1e+06 ms: got nan"),
        (["--requests", "0"], "requests must be 1 to 1e+06 a GPU: got 0"),
        (["--gpus", "0"], "--gpus must be 1 to 4096: got 0"),
        (["--host-gib", "-1"], "--host-gib must be more than 0: got -1"),
        (["--tp", "3"], "--tp must divide --gpus, 8: got 3"),
        (["--tp", "16"], "--tp must divide --gpus, 8: got 16"),
        (["--mtp", "3"], "--accept must be given for --mtp 3: known for 1, 2, 4"),
        (["--mtp", "0", "--accept", "1"], "queries must be 1 or more: got 0"),
        (["--accept", "3"], "accepted_tokens must be at most queries: got 3, limit 2"),
        (["--input", "5"], "lengths must be --context, or --input and --output"),
        (["--gpu", "a100-40gb"], "weights must fit into a GPU"),
    ],
)
def test_a_bad_question_is_one_line(quick, capsys, change, message):
    assert command.main([*COMMAND, *change]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == ""


def test_an_unknown_locality_is_one_line(capsys):
    assert command.main([*COMMAND, "--locality", "no-such"]) == 2
    assert (
        "--locality must be deepseek-v3.2, glm-5.1, glm-5.2, a .toml file or a trace: got no-such"
        in (capsys.readouterr().err)
    )


def test_input_and_output_are_lengths():
    options = [*COMMAND[:4], *COMMAND[6:], "--input", "8000", "--output", "1000"]
    asked = command.ask(command.argument_parser().parse_args(options))
    assert (asked.context, asked.slots_tokens) == (8500, 9000)


@pytest.mark.parametrize(("gpus", "remote", "ranks"), [(4, 0.75, 4), (8, 0.875, 8), (16, 0.5, 8)])
def test_gpus_are_those_the_experts_are_spread_over(gpus, remote, ranks):
    options = command.argument_parser().parse_args([*COMMAND, "--gpus", str(gpus)])
    deployment = command.ask(options).deployment
    assert (deployment.expert_gpus, deployment.gpus_per_node) == (gpus, ranks)
    assert deployment.remote_share == pytest.approx(remote)
    assert deployment.kv_gib is None


@pytest.mark.slow
def test_the_command_measures_misses_itself(capsys):
    assert command.main(COMMAND) == 0
    assert "ESS helps" in capsys.readouterr().out
