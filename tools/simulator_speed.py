"""How fast the simulator is, and what sampling layers costs in accuracy.

    python -m tools.simulator_speed [--quick] [--json PATH] [--plot PATH]

The largest run of ESS at 32K: 160 requests, 61 layers, 200 steps, 2 queries each, production
HotCaches of 6,881 rows a request (ratio 0.21). lookups_per_s: top-k rows generated and planned per
second on one core, in one layer of median reach, starts of requests included. The other runs use
all cores. The sampled run simulates --layers of the 61 and takes their mean for all; its error is
against the misses of the whole run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from benchmarks.harness import Panel, Report, argument_parser, finish, simulated
from sglang_ess.sim.model.decode_tiers import DecodeTiers, TierSizes
from sglang_ess.sim.model.locality import Locality

PROFILE, CONTEXT, QUERIES, ROWS = "deepseek-v3.2", 32768, 2, 6881
REQUESTS, STEPS, WARMUP_STEPS = 160, 200, 20


def run(
    locality: Locality, layers: Iterable[int], requests: int, threads: int, label: str
) -> tuple[np.ndarray, float]:
    """(misses per request and step of each layer, seconds), `threads` layers at a time."""

    def one(layer: int) -> float:
        tiers = DecodeTiers(
            locality, ROWS * requests,
            TierSizes(requests * (CONTEXT + 256), requests, CONTEXT + 256),
            layers=[layer], queries=QUERIES,
        )  # fmt: skip
        for request in range(requests):
            tiers.join(request, CONTEXT, "settled")
        fetched = [int(tiers.step()[0]) for _ in range(STEPS)]
        progress.update()
        return float(np.mean(fetched[WARMUP_STEPS:])) / requests

    layers, since = list(layers), time.perf_counter()
    with (
        tqdm(total=len(layers), desc=label, file=sys.stderr, disable=None) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        misses = np.array(list(pool.map(one, layers)))
    return misses, time.perf_counter() - since


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--layers", type=int, default=6, help="layers that stand for all [6]")
    parser.add_argument("--requests", type=int, default=None, help=f"[{REQUESTS}; quick: 16]")
    args = parser.parse_args()
    requests = args.requests or (16 if args.quick else REQUESTS)
    locality, report = Locality.load(PROFILE), Report()
    run(locality, [0], 1, 1, "compile")
    _, core_seconds = run(locality, locality.spread(1), requests, 1, "one core")
    sampled_layers, cores = locality.spread(args.layers), os.cpu_count() or 1
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
        more = {"sampled": float(value)} if layer in sampled_layers else {}
        report.add(simulated("layer", {"layer": layer}, "misses", "rows", [value], **more))
    axes = {"xlabel": "layer", "ylabel": "misses per request and step"}
    panel = Panel(report.rows, "layer", points="sampled", axes=axes)
    finish(report, args, panel, requests=requests)


if __name__ == "__main__":
    main()
