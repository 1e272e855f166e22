"""tools/predict_gpu: a planted host's steps are predicted; a wrong one's are not."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks.harness import Report
from sglang_ess.sim.model.decode_tiers import Sampling, measure
from sglang_ess.sim.model.locality import Locality
from tools import predict_gpu
from tools.gpu_serving.figures import METRICS
from tools.gpu_serving.grid import SYSTEMS
from tools.predict_gpu import fit, judge
from tools.predict_gpu_files import FREE, OVERLAPS, RESIDENT, Host, Point, Served, _gpu_file

LAYERS, CARD = 2, "NVIDIA H100 80GB HBM3"
CONTEXTS, BATCHES = (8192, 16384, 32768), (2, 8, 32)
STREAM = "deepseek-v3.2@8000,16000"
PLAYED = {8192: 8000, 16384: 16000}
HOT = {8192: 3000, 16384: 4500}  # rows a request
FETCHED = (8, 2)  # batches that ESS is served with, and one of which all rows are hot
# The planted host, in seconds of a step: see steps_of.
STEP, LAYER, REQUEST, TOKEN = 900e-6, 320e-6, 4e-6, 80e-12
GROWN = 400  # tokens, of a request while it is measured, beside its prompt
PLAN, EARLY, EMPTY, HALVING, LINK = 45e-6, 20e-6, 6e-6, 50e-6, 30e9
ATTENTION = 1.5e-6  # of a request
ESS = ("ess off", "ess da", "ess dba")


def exposed(system, batch, tokens, misses):
    """What ESS adds to a layer."""
    fetch = PLAN + batch * misses * 656 / LINK
    hits = batch * ATTENTION * (1 - misses / 2048)
    if system == "ess off":
        return max(0.0, fetch - EARLY)
    if system == "ess da":
        return max(0.0, fetch - EARLY - hits) + EMPTY
    half = batch * tokens * TOKEN / 2  # of the indexer
    return max(0.0, max(fetch / 2, half) + fetch / 2 - half - EARLY - hits) + EMPTY + HALVING


def steps_of(system, batch, tokens, layers, misses):
    layer = LAYER + REQUEST * batch + TOKEN * batch * tokens
    if system in OVERLAPS:
        layer += exposed(system, batch, tokens, misses)
    return STEP + layers * layer


@pytest.fixture(scope="module")
def true_misses():
    """{(context, batch): rows a request and layer}, of other streams of the same profile."""
    locality = Locality.load("deepseek-v3.2")
    layers = locality.spread(LAYERS)
    return {
        (context, batch): measure(
            locality, PLAYED[context], batch, HOT[context], Sampling(layers=layers, seed=7)
        ).mean
        for context in PLAYED
        for batch in FETCHED
    }


@dataclass
class Files:
    """kernels.json and gpu_serving.json of the planted host, to be changed before they are read."""

    kernels: dict
    serving: dict
    folder: object

    @property
    def paths(self):
        for name in ("kernels", "serving"):
            (self.folder / f"{name}.json").write_text(json.dumps(getattr(self, name)))
        return self.folder / "kernels.json", self.folder / "serving.json"

    def judged(self, seed=0) -> Report:
        kernels, serving = self.paths
        report, served = Report(machine={}), Served.read(serving)
        judge(report, served, Host.read(kernels, served), seed, quick=True)
        return report

    def decode(self, metric):
        return [row for row in self.serving["rows"] if row["metric"] == metric]


def row(name, config, metric, median, **more):
    return {"name": name, "kind": "measured", "config": config, "metric": metric,
            "median": median, **more}  # fmt: skip


def kernels_json(link=LINK):
    rates = [("h2d", 55.0), ("d2h", 56.0)]
    rows = [row("pcie_peak", {"direction": d}, "time", 1.0, gb_per_s=r) for d, r in rates]
    for batch in (16, 160):
        at = {"system": "cuda", "row_bytes": 656, "batch": batch, "misses": 256}
        rows.append(row("fetch", at, "time", 1.0, gb_per_s=link / 1e9))
        at = {"kernel": "flashmla_fp8", "batch": batch, "heads": 128, "row_bytes": 656}
        rows.append(row("attention", at | {"topk": 2048}, "time", batch * ATTENTION * 1e6))
        for misses, slower in ((2, 0.9), (256, 1.0), (2048, 1.5)):
            at = {"system": "cuda", "topk": 2048, "batch": batch, "misses": misses}
            rows.append(row("plan", at, "time", PLAN * 1e6 * slower))
    costs = {"empty_us": EMPTY * 1e6, "halving_us": HALVING * 1e6}
    config = {"preattn_us": EARLY * 1e6}
    return {"machine": {"gpu": CARD}, "config": config, "rows": rows, "overlap_costs": costs}


def serving_json(true_misses, noise=0.0):
    random, rows = np.random.default_rng(1), []

    def add(system, context, batch, misses=None, **more):
        tokens = context + GROWN
        layers = LAYERS // 2 if system == "resident" else LAYERS  # so that more rows fit
        step = steps_of(system, batch, tokens, layers, misses) * random.normal(1, noise)
        at = {"system": system, "context": context, "batch": batch, "layers": layers} | more
        found = {"step": 1e3 * step, "running": batch, "tokens": tokens, "misses": misses}
        rows.extend(row("decode", at, m, v) for m, v in found.items() if v is not None)

    for context in CONTEXTS:
        for batch in BATCHES:
            system = "one-tier" if batch * context <= 8 * 16384 else "resident"
            add(system, context, batch, hot_rows=None)
    for (context, batch), misses in {(8192, 1): 0.0, **true_misses}.items():
        rows_each = HOT[context] if misses else context
        for system in ESS:
            add(system, context, batch, misses, hot_rows=rows_each * batch, topk_stream=STREAM)
    recipe = {"layers": LAYERS, "dense_layers": 1, "experts": 8, "context": 32768, "vocab": 320,
              "weights": "fp8"}  # fmt: skip
    return {"config": {"slice": recipe, "row_bytes": 656, "card": {"gpu": CARD}}, "rows": rows}


@pytest.fixture
def files(true_misses, tmp_path):
    return Files(kernels_json(), serving_json(true_misses), tmp_path)


def ess_errors(report):
    return [report.summary[f"mean_abs_error_{name.replace(' ', '_')}"] for name in ESS]


def test_a_planted_host_is_predicted(files):
    found = files.judged().summary
    assert found["mean_abs_error"] < 0.003 and found["max_abs_error"] < 0.01
    assert found["misses_mean_abs_error"] < 0.1 * found["misses_most"]
    assert found["predicted_points"] == 4 + 15 and found["fitted_points"] == 5
    # The rule for one token's key: 132 B of HBM and 64 heads x 128 of fp8, at 0.85 of the peaks.
    rule = (132 / 3350e9 + 2 * 64 * 128 / 1979e12) / 0.85
    assert found["scan_ratio"] == pytest.approx(TOKEN / rule, rel=0.2)
    assert found["step_us"] == pytest.approx(STEP * 1e6, rel=0.1)
    assert found["attention_tflops"] == pytest.approx(2048 * 2 * 128 * 1088 / ATTENTION / 1e12)


def test_noise_shows_in_the_error_and_no_more(true_misses, tmp_path):
    found = Files(kernels_json(), serving_json(true_misses, noise=0.02), tmp_path).judged(3).summary
    assert 0.005 < found["mean_abs_error"] < 0.05


def test_a_wrong_link_is_a_large_error(files):
    files.kernels = kernels_json(LINK / 8)
    found = files.judged()
    assert min(ess_errors(found)) > 0.1
    assert found.summary["mean_abs_error_one-tier"] < 0.01


def test_wrong_misses_are_a_large_error_and_told_apart(files):
    for one in files.serving["rows"]:
        if one["config"]["system"] in ESS:
            one["config"]["hot_rows"] *= 0.7
    found = files.judged()
    assert max(ess_errors(found)) > 0.1
    assert found.summary["mean_abs_error_with_measured_misses"] < 0.01
    assert found.summary["misses_mean_abs_error"] > 0.5 * found.summary["misses_most"]


def test_what_is_predicted_is_not_fitted(files):
    """Predicted steps that take twice as long are errors of half, and leave the fit as it was."""
    before = files.judged()
    fitted = {
        (r["config"]["context"], r["config"]["batch"])
        for r in before.rows
        if r["config"]["half"] == "fitted"
    }
    for one in files.decode("step"):
        at = one["config"]
        if at["system"] in ESS or (at["context"], at["batch"]) not in fitted:
            one["median"] *= 2
    after = files.judged()
    assert {n: after.summary[n] for n in FREE} == {n: before.summary[n] for n in FREE}
    assert after.summary["mean_abs_error"] == pytest.approx(0.5, abs=0.02)
    point = Point("ess da", 8192, 2, 2.0, 8000.0, LAYERS, 1.0, STREAM, 1.0, None)
    with pytest.raises(ValueError, match="every row on the device"):
        fit([point], None, None)


def test_rows_and_tables(files, capsys):
    report = files.judged()
    predicted = [r for r in report.rows if r["config"]["half"] == "predicted"]
    errors = [r["error"] for r in predicted if "error" in r and r["metric"] == "step"]
    assert len(errors) == report.summary["predicted_points"]
    assert report.summary["mean_abs_error"] == pytest.approx(np.abs(errors).mean())
    assert report.summary["max_abs_error"] == pytest.approx(np.abs(errors).max())
    one = [r for r in predicted if r["config"]["system"] == "ess da" and r["config"]["batch"] == 8]
    values = {(r["config"]["context"], r["metric"], r["kind"]): r["median"] for r in one}
    step = values[8192, "step", "simulated"]
    assert values[8192, "decode_tokens_per_s", "simulated"] == pytest.approx(8e3 / step)
    assert values[8192, "misses", "measured"] > 0 and values[8192, "misses", "simulated"] > 0
    predict_gpu.print_tables(report)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [x.split() for x in lines if x.split()[:4] == ["ess", "da", "8192", "8"]]
    assert float(line[7]) == pytest.approx(step, rel=0.01)


def test_other_rounds_and_systems_are_left_out(files):
    clean = files.judged().summary
    again = [json.loads(json.dumps(one)) for one in files.serving["rows"][:8]]
    for one in again:
        one["config"]["round"], one["median"] = 1, 1e6
    other = [json.loads(json.dumps(one)) for one in files.serving["rows"][:8]]
    for one in other:
        one["config"]["system"] = "hisparse"
    missed = {"name": "decode", "kind": "failed", "config": {}, "metric": "step", "median": None}
    files.serving["rows"] += [*again, *other, missed]
    assert files.judged().summary == clean


def without(rows, **config):
    return [one for one in rows if not config.items() <= one["config"].items()]


def one_batch(rows):
    """One-tier at one batch and 4 contexts."""
    at = {"system": "one-tier", "batch": 2, "layers": LAYERS, "hot_rows": None}
    return [one for one in rows if one["config"]["system"] in ESS] + [
        row("decode", at | {"context": 8192 * n}, metric, 2.0)
        for n in range(1, 5)
        for metric in ("step", "running", "tokens")
    ]


def as_stream(files, stream):
    for one in files.serving["rows"]:
        if one["config"]["system"] in ESS:
            one["config"]["topk_stream"] = stream


CHANGES = {
    "no rows": lambda f: f.serving.pop("rows"),
    "no slice": lambda f: f.serving["config"].update(slice=None),
    "another slice": lambda f: f.serving["config"]["slice"].update(hidden=1),
    "no ess": lambda f: f.serving.update(
        rows=[r for r in f.serving["rows"] if r["config"]["system"] in RESIDENT]
    ),
    "no resident": lambda f: f.serving.update(
        rows=[r for r in f.serving["rows"] if r["config"]["system"] in ESS]
    ),
    "no hot rows": lambda f: [r["config"].update(hot_rows=None) for r in f.serving["rows"]],
    "one batch": lambda f: f.serving.update(rows=one_batch(f.serving["rows"])),
    "another card": lambda f: f.serving["config"].update(card={"gpu": "NVIDIA H200"}),
    "no link": lambda f: f.kernels.update(rows=without(f.kernels["rows"], direction="h2d")),
    "interpreted": lambda f: [r.update(kind="interpreted") for r in f.kernels["rows"]],
    "no attention": lambda f: f.kernels.update(rows=without(f.kernels["rows"], heads=128)),
    "no costs": lambda f: f.kernels.pop("overlap_costs"),
    "no preattn": lambda f: f.kernels["config"].clear(),
    "unknown card": lambda f: (
        f.kernels["machine"].update(gpu="TPU"),
        f.serving["config"].update(card={}),
    ),
    "no stream": lambda f: as_stream(f, ""),
    "recorded stream": lambda f: as_stream(f, "x.npz"),
    "long stream": lambda f: as_stream(f, "deepseek-v3.2@100000"),
}
MESSAGES = {
    "no rows": "must hold decode rows",
    "no slice": "must hold decode rows, and the slice",
    "another slice": "unexpected keyword argument 'hidden'",
    "no ess": "must hold steps of ESS",
    "no resident": "must hold steps of ESS, and of one-tier or resident",
    "no hot rows": "must hold decode rows",
    "one batch": "fitted points must differ in batch",
    "another card": "both files must be of one card: got 'NVIDIA H100 80GB HBM3' and 'NVIDIA H200'",
    "no link": "must hold rows pcie_peak and fetch",
    "interpreted": "must hold rows pcie_peak and fetch",
    "no attention": "must hold rows attention (128 heads, rows of 656 B) and plan",
    "no costs": "must hold rows pcie_peak and fetch and a cost table",
    "no preattn": "preattn_us",
    "unknown card": "--gpu must be given for 'TPU'",
    "no stream": "served with a locality profile: got topk_stream ''",
    "recorded stream": "served with a locality profile: got topk_stream 'x.npz'",
    "long stream": "topk_stream must have a context of at most",
}


@pytest.mark.parametrize("case", CHANGES)
def test_refusals_are_one_line(case, files, capsys):
    CHANGES[case](files)
    kernels, serving = map(str, files.paths)
    assert predict_gpu.main(["--kernels", kernels, "--serving", serving, "--quick"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("predict_gpu:")]
    assert MESSAGES[case] in line


def test_the_command_line(files, tmp_path, capsys):
    kernels, serving = map(str, files.paths)
    out, plot = tmp_path / "out.json", tmp_path / "a.png"
    argv = ["--kernels", kernels, "--serving", serving, "--quick", "--json", str(out)]
    assert predict_gpu.main([*argv, "--plot", str(plot), "--gpu", "h100"]) == 0
    found = json.loads(out.read_text())
    assert found["summary"]["max_abs_error"] < 0.03 and found["config"]["gpu"] == CARD
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "mean_abs_error" in capsys.readouterr().out
    assert predict_gpu.main(["--kernels", kernels, "--serving", str(tmp_path / "none")]) == 2
    assert "must be JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "file"),
    [(CARD, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
     ("NVIDIA A100-SXM4-80GB", "a100-80gb")],
)  # fmt: skip
def test_cards_have_their_files(card, file):
    assert _gpu_file(card) == file


def test_the_names_are_those_of_the_benchmark_that_writes_them():
    assert {*RESIDENT, *OVERLAPS} == {*SYSTEMS} - {"hisparse"}
    assert {"step", "running", "tokens", "misses"} <= METRICS.keys()
