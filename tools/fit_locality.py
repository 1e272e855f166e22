"""Fit the localities of the simulator to published misses, with the production HotCache.

    python -m tools.fit_locality [--write] [--quick] [--json PATH] [--plot PATH]

deepseek-v3.2: three numbers for all layers (two make the uniform misses of a layer a power of its
misses at ratio 0.2; one is the growth of reach with the context) and a reach for each layer, which
its own entry of ESS figure 5 decides. Of churn 0.3, 0.34 and 0.38, 0.3 had the least error.
glm-5.1: churn, uniform and reach, fitted to six miss rates of HiSparse.
--write replaces the files in python/sglang_ess/sim/data/localities/.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import brentq, least_squares, minimize

from benchmarks.harness import (
    ROOT,
    Panel,
    Report,
    argument_parser,
    finish,
    print_table,
    simulated,
)
from benchmarks.sim.published import FIGURE5, FIGURE9, HISPARSE, LAYER_17, LAYER_17_AT_02, RATIOS
from sglang_ess.sim.model.decode_tiers import Sampling, miss_curves
from sglang_ess.sim.model.locality import Layers, Locality, TopkStream, similarity
from sglang_ess.sim.policies import misses as policy_misses

TOPK, CHURN, QUERIES, CONTEXT = 2048, 0.3, 2, 32768
REACHES = np.array([150, 500, 1500, 3000, 4500, 6000, 8000, 11000, 15000, 20000, 27000, 36000])
UNIFORMS = np.array([0.01, 0.03, 0.06, 0.1, 0.16, 0.24, 0.34])
MEAN_MISSES = 190.0  # of a layer at ratio 0.2: where the uniform share is anchored
LAYER_17_WEIGHT = 0.7  # the line of one layer; the others are means of 61
LOCAL_SHARE = 0.9  # the most of a layer's misses that is uniform: low layers have locality too
HISPARSE_CONTEXT = 65536  # not stated; it only decides how soon the uniform part falls
FOLDER = ROOT / "python" / "sglang_ess" / "sim" / "data" / "localities"


def surface(context: int, requests: int, steps: int) -> RegularGridInterpolator:
    """(ln reach, uniform) -> misses at each ratio, measured on the grid."""
    grid = [(r, u) for r in REACHES for u in UNIFORMS]
    layers = Layers(CHURN, tuple(float(u) for _, u in grid), tuple(float(r) for r, _ in grid))
    flat = Locality(TOPK, context, 0.0, layers)
    rows = [int(context * ratio) for ratio in RATIOS]
    curves = miss_curves(flat, context, rows, Sampling(steps, 10, QUERIES), requests=requests)
    values = curves.reshape(len(REACHES), len(UNIFORMS), len(rows))
    return RegularGridInterpolator(
        (np.log(REACHES), UNIFORMS), values, bounds_error=False, fill_value=None
    )


def layers_of(surfaces, scale: float, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """Each layer's (ln reach, uniform): its misses at ratio 0.2 are those of figure 5."""
    misses = FIGURE5
    entering = TOPK * CHURN * QUERIES
    at_02 = RATIOS.index(0.2)
    uniform = scale * (misses / MEAN_MISSES) ** exponent
    uniform = np.minimum(uniform, LOCAL_SHARE * misses / (1 - 0.2)) / entering
    lows, highs = np.log(REACHES[0]), np.log(REACHES[-1])
    reaches = []
    for target, share in zip(misses, uniform, strict=True):

        def over(reach, target=target, share=share):
            return surfaces[CONTEXT]([reach, share])[0][at_02] - target

        low, high = over(lows), over(highs)
        reaches.append(lows if low > 0 else highs if high < 0 else brentq(over, lows, highs))
    return np.array(reaches), uniform


def predicted(surfaces, parameters) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """({context: misses [layers, ratios]}, ln reach, uniform)."""
    scale, exponent, growth = parameters
    reaches, uniform = layers_of(surfaces, scale, exponent)
    found = {
        context: surfaces[context](
            np.stack([reaches + growth * np.log(context / CONTEXT), uniform], 1)
        )
        for context in surfaces
    }
    return found, reaches, uniform


def errors(found: dict[int, np.ndarray]) -> np.ndarray:
    """ln(ours / published) of figure 9's points and of layer 17's line."""
    pairs = [
        (ours, FIGURE9[context].get(ratio), 1.0)
        for context in FIGURE9
        for ratio, ours in zip(RATIOS, found[context].mean(0), strict=True)
    ]
    pairs += [
        (ours, theirs, LAYER_17_WEIGHT)
        for ours, theirs in zip(found[CONTEXT][17], LAYER_17, strict=True)
    ]
    return np.array([w * np.log(ours / theirs) for ours, theirs, w in pairs if theirs is not None])


def fit_deepseek(quick: bool) -> Locality:
    steps, requests = (20, 1) if quick else (60, 2)
    surfaces = {context: surface(context, requests, steps) for context in FIGURE9}
    fit = least_squares(
        lambda p: errors(predicted(surfaces, p)[0]), (130.0, 0.6, 0.3), diff_step=0.02
    )
    _, reaches, uniform = predicted(surfaces, fit.x)
    layers = Layers(
        CHURN,
        tuple(round(float(u), 4) for u in uniform),
        tuple(round(float(np.exp(r)), 0) for r in reaches),
    )
    return Locality(TOPK, CONTEXT, round(float(fit.x[2]), 3), layers)


def one_request(locality: Locality, layer: int, context: int) -> tuple[TopkStream, Any, Any, Any]:
    """(stream, which, length, slots) of a request with slots 0 to context."""
    stream = TopkStream(locality, layer, 1, context)
    stream.begin(0, context)
    slots = np.arange(context, dtype=np.int32)[None]
    return stream, np.array([0]), np.array([context]), slots


def hisparse(locality: Locality, steps: int) -> dict[tuple[str, int], float]:
    """Missed lookups in % by policy and rows of HISPARSE. The first half is not counted."""
    stream, which, length, slots = one_request(locality, 0, HISPARSE_CONTEXT)
    topk = np.stack([stream.next(which, length, slots, 1) for _ in range(steps)])
    return {
        (policy, rows): 100
        * policy_misses(policy, topk, rows, HISPARSE_CONTEXT)[steps // 2 :].mean()
        / TOPK
        for policy, rows in HISPARSE
    }


def one_layer(churn: float, uniform: float, log_reach: float) -> Locality:
    layers = Layers(churn, (uniform,), (round(float(np.exp(log_reach)), 0),))
    return Locality(TOPK, HISPARSE_CONTEXT, 0.0, layers)


def fit_glm(quick: bool) -> Locality:
    def loss(p) -> float:
        if not (0 < p[0] <= 1 and 0 <= p[1] <= 1):
            return 10.0
        found = hisparse(one_layer(*p), 120 if quick else 240)
        return sum(np.log(found[key] / value) ** 2 for key, value in HISPARSE.items())

    start = (0.4, 0.2, np.log(4800))
    fit = minimize(loss, start, method="Nelder-Mead", options={"maxfev": 20 if quick else 80})
    churn, uniform, log_reach = fit.x
    return one_layer(round(churn, 3), round(uniform, 3), log_reach)


def as_toml(locality: Locality, source: str) -> str:
    layers = locality.layers
    lists = "\n".join(
        f"{name} = [\n"
        + "".join(f"    {value:g},  # layer {i}\n" for i, value in enumerate(getattr(layers, name)))
        + "]"
        for name in ("uniform", "reach")
    )
    return (
        f"# Fitted by tools/fit_locality.py, {time.strftime('%Y-%m-%d')}, {source}\n"
        f"topk = {locality.topk}\n"
        f"reference_tokens = {locality.reference_tokens}\n"
        f"context_exponent = {locality.context_exponent:g}\n\n[layers]\n"
        f"churn = {layers.churn:g}  # of the top-k, per query\n{lists}\n"
    )


def check_deepseek(report: Report, locality: Locality, quick: bool) -> None:
    """Measure the fitted locality again and add a row for every published figure."""
    steps, requests = (20, 1) if quick else (60, 2)
    found = {}
    for context in FIGURE9:
        rows = [int(context * ratio) for ratio in RATIOS]
        found[context] = miss_curves(
            locality, context, rows, Sampling(steps, 10, QUERIES, seed=1), requests=requests
        )
        for ratio, ours in zip(RATIOS, found[context].mean(0), strict=True):
            config = {"context": context, "ratio": ratio}
            add(report, "figure 9", config, ours, FIGURE9[context].get(ratio))
    at_02 = RATIOS.index(0.2)
    for layer, theirs in enumerate(FIGURE5):
        add(report, "figure 5", {"layer": layer}, found[CONTEXT][layer, at_02], theirs)
    for ratio, ours, theirs in zip(RATIOS, found[CONTEXT][17], LAYER_17, strict=True):
        add(report, "figure 5, layer 17", {"ratio": ratio}, ours, theirs)
    for context, theirs in LAYER_17_AT_02.items():
        name = "figure 8, layer 17, not fitted"
        add(report, name, {"context": context}, found[context][17, at_02], theirs)


def add(report: Report, name: str, config: dict, ours: float, theirs: float | None) -> None:
    if theirs is not None:
        error = {"published": float(theirs), "error": float(ours / theirs - 1)}
        report.add(simulated(name, config, "misses", "rows", [ours], **error))


def mean_similarity(locality: Locality) -> float:
    """Of steps QUERIES apart, over eight layers. Nothing here was fitted to it."""
    shares = []
    for layer in locality.spread(8):
        stream, which, length, slots = one_request(locality, layer, CONTEXT)
        topk = [stream.next(which, length, slots, QUERIES)[-1] for _ in range(20)]
        shares.append(similarity(topk))
    return float(np.mean(shares))


def panels(report: Report) -> list[Panel]:
    axes = {"title": "figure 9: lines ours, circles ESS's", "yscale": "log",
            "xlabel": "hot rows / context", "ylabel": "misses"}  # fmt: skip
    return [
        Panel(report.select("figure 9"), "ratio", series="context", points="published", axes=axes),
        Panel(report.select("figure 5"), "layer", points="published",
              axes={"title": "figure 5", "xlabel": "layer", "ylabel": "misses at ratio 0.2"}),
    ]  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="replace the files in data/localities")
    args = parser.parse_args()
    report = Report()
    deepseek, glm = fit_deepseek(args.quick), fit_glm(args.quick)
    if args.write:
        write("deepseek-v3.2", as_toml(deepseek, "to figures 5 and 9 of ESS."))
        write("glm-5.1", as_toml(glm, "to the miss rates of HiSparse; one layer for all."))
    check_deepseek(report, deepseek, args.quick)
    rates = hisparse(glm, 240)
    for (policy, rows), value in HISPARSE.items():
        add(report, "HiSparse", {"policy": policy, "rows": rows}, rates[policy, rows], value)
    for name, keys in (("figure 9", ("context", "ratio")), ("HiSparse", ("policy", "rows"))):
        columns = {key: key for key in keys}
        columns |= {"published": "published", "ours": "median:.1f", "error": "error:+.1%"}
        print_table(report.select(name), columns, name)
    for name in ("figure 9", "figure 5", "HiSparse"):
        off = [abs(row["error"]) for row in report.select(name)]
        key = name.replace(" ", "_").lower()
        report.summarise(f"{key}_mean_abs_error", np.mean(off))
        report.summarise(f"{key}_max_abs_error", np.max(off))
    report.summarise("similarity", mean_similarity(deepseek))
    finish(report, args, *panels(report))


def write(name: str, text: str) -> None:
    path: Path = FOLDER / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
