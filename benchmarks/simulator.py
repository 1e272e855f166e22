"""How fast the simulator is, and what sampling layers costs in accuracy.

    python -m benchmarks.simulator [--quick] [--json PATH] [--plot PATH]

ESS's largest run at 32K: 160 requests, 61 layers, 200 steps, 2 queries each, production HotCaches
of 6,881 rows a request (ratio 0.21). lookups_per_s: top-k rows generated and planned in a second
of one core, one layer of the median reach, starts of requests included; the others use all cores.
The sampled run simulates --layers of the 61 and takes their mean for all; its error is against
the whole run's misses.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from benchmarks.common import Report, arguments, save_figure, simulated, table
from sglang_ess.sim.model.decode_tiers import DecodeTiers
from sglang_ess.sim.model.locality import Locality

PROFILE, CONTEXT, QUERIES, ROWS = "deepseek-v3.2", 32768, 2, 6881
REQUESTS, STEPS, SETTLE = 160, 200, 20


def run(
    locality: Locality, layers: Iterable[int], requests: int, threads: int, label: str
) -> tuple[np.ndarray, float]:
    """(misses per request and step of each layer, seconds), `threads` layers at a time."""

    def one(layer: int) -> float:
        tiers = DecodeTiers(
            locality, ROWS * requests, requests * (CONTEXT + 256), max_requests=requests,
            max_tokens=CONTEXT + 256, layers=[layer], queries=QUERIES,
        )  # fmt: skip
        for request in range(requests):
            tiers.join(request, CONTEXT, "settled")
        fetched = [int(tiers.step()[0]) for _ in range(STEPS)]
        progress.update()
        return float(np.mean(fetched[SETTLE:])) / requests

    layers, since = list(layers), time.perf_counter()
    with (
        tqdm(total=len(layers), desc=label, file=sys.stderr, disable=None) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        misses = np.array(list(pool.map(one, layers)))
    return misses, time.perf_counter() - since


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6, help="that stand for all [6]")
    parser.add_argument("--requests", type=int, default=None, help=f"[{REQUESTS}; quick: 16]")
    options = parser.parse_args()
    requests = options.requests or (16 if options.quick else REQUESTS)
    locality, report = Locality.load(PROFILE), Report()
    run(locality, [0], 1, 1, "compile")
    middle = locality.spread(1)
    _, core_seconds = run(locality, middle, requests, 1, "one core")
    sampled_layers, cores = locality.spread(options.layers), os.cpu_count() or 1
    sampled, sampled_seconds = run(locality, sampled_layers, requests, cores, "sampled")
    whole, seconds = run(locality, range(locality.num_layers), requests, cores, "all layers")
    lookups = requests * QUERIES * locality.topk * STEPS
    report.summarise("lookups_per_s", lookups / core_seconds)
    report.summarise("seconds", seconds)
    report.summarise("sampled_seconds", sampled_seconds)
    report.summarise("misses", whole.mean())
    report.summarise("sampled_misses", sampled.mean())
    report.summarise("sampling_error", sampled.mean() / whole.mean() - 1)
    for layer, value in enumerate(whole):
        report.add(simulated("layer", {"layer": layer}, "misses", "rows", [value]))
    print(table(["", "value"], [[k, f"{v:,.3f}"] for k, v in report.summary.items()]))
    print(
        f"{requests} requests, {STEPS} steps; sampled layers {', '.join(map(str, sampled_layers))}"
    )
    if options.json:
        report.write(options.json, options.seed, quick=options.quick, requests=requests)
    if options.plot:
        save_figure(options.plot, lambda axes: draw(axes, whole, sampled_layers, sampled), panels=1)


def draw(axes, whole, sampled_layers, sampled) -> None:
    axes.plot(whole, label="all layers")
    axes.plot(sampled_layers, sampled, "o", label="sampled")
    axes.set(
        xlabel="layer", ylabel="misses per request and step", title=f"{REQUESTS} requests at 32K"
    )
    axes.legend()


if __name__ == "__main__":
    main()
