"""Prefill-decode disaggregation under load: SGLang one-tier against ESS on the decode server.

    python -m benchmarks.serving.pd_serving [--quick] [--json FILE] [--plot FILE]

Real processes and sockets: one prefill server, one decode server, sglang-router, Mooncake over
TCP; Poisson arrivals, token ids in and out, streamed, greedy.
 (A) Output: the decode server one-tier and with ESS, at the same --ess-device-gib, against request
     rate; saturation is all requests at once. summary.output_ratio is ESS over one-tier there.
 (B) Thrash: ESS decode with a hot tier far below the sum of the working sets, admission off
     and on, up to 3x saturation (the model: SparseServe, figure 1 and its ablation).
 (C) Warm-up across the hand-over, on and off: misses in a request's first 8 decode steps, and
     inter-token latency while requests keep joining.

So that prefill limits nothing, prompts are documents in the prefill server's radix cache: each
request computes its last page there and transfers all its rows. No two requests that decode
together have one document. In (B) and (C) --ess-link-gib slows fetches to LINK_SHARE of a core's
memory bandwidth, measured at start.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import OtherLoad, argument_parser, finish, measured
from benchmarks.serving import pd_figures, shared
from benchmarks.serving.pd_figures import ESS, OFF, ON, ONE_TIER
from benchmarks.serving.pd_load import SATURATED, Result, requests_of, run_load
from benchmarks.serving.shared import end_on_sigterm, prompts_of
from sglang_ess.layout import FP8_ROW_BYTES, GIB, INDEX_KEY_BYTES
from sglang_ess.layout import PAGE_SLOTS as PAGE
from tools.pd_cluster import Cores, Decode, Prefill, Router, decoding

REQUEST_SECONDS = 900  # after which a request counts as an error
SETTLE_SECONDS = 0.5  # between two looks at a server's counters
FIRST_STEPS = 8  # decode steps of (C)'s hand-over figure
LINK_SHARE = 55 / 3350  # GB/s: a H100's host-to-device link over its device memory
COPIED_BYTES, COPIES = 64 << 20, 20
ITL_TARGET_MS = 300.0


@dataclass(frozen=True)
class Scenario:
    """A model and what is asked of it.

    model: tiny_model's shape, where it is not the default
    prompt, outputs: tokens of a request, the second a range; documents: distinct prompts
    """

    model: dict[str, int]
    prompt: int
    outputs: tuple[int, int]
    documents: int

    @property
    def request_tokens(self) -> int:
        """What a request may take of the pool, to the end of its last page."""
        return -(-(self.prompt + self.outputs[1]) // PAGE) * PAGE + PAGE

    @property
    def mean_output(self) -> float:
        return sum(self.outputs) / 2

    def rates(self, saturated: Result, shares: Sequence[float]) -> list[float]:
        """Request rates as shares of that of a saturated load."""
        return [share * saturated.tokens_per_s / self.mean_output for share in shares]

    def server_flags(self) -> tuple[str, ...]:
        """Flags of both servers. The batch limit is never reached."""
        return "--context-length", str(self.request_tokens + PAGE), "--max-running-requests", "64"

    def prefill_flags(self) -> tuple[str, ...]:
        slots = (self.documents + 2) * self.request_tokens + 4096
        return "--max-total-tokens", str(slots), *self.server_flags()

    def decode_flags(self) -> tuple[str, ...]:
        """SGLang keeps 512 tokens free for each running request: more than any will write."""
        return "--num-reserved-decode-tokens", str(self.outputs[1]), *self.server_flags()


@dataclass(frozen=True)
class Grid:
    """What one run measures.

    burst: requests sent at once at saturation, in (A) and to find it in (B)
    shares, thrash_shares: request rates as shares of the saturated one; seconds: of arrivals
    handovers: requests of (C), each alone, whose misses are counted
    without_link: whether (B) has its row without a slowed link
    """

    burst: int
    shares: tuple[float, ...]
    seconds: float
    thrash_burst: int
    thrash_shares: tuple[float, ...]
    thrash_seconds: float
    handovers: int
    without_link: bool


# A model whose decode step costs by the step and not only by the request, as a real one's:
# two_tier's, with four times the experts' weights, as a step here has one core and its requests'
# share of it is larger. Two of four experts are active for a token, nearly all for a batch of 4.
OUTPUT = Scenario(
    model=dict(layers=6, dense_layers=0, hidden=1024, experts=4, moe_intermediate=4096,
               index_heads=4),
    prompt=4096, outputs=(96, 160), documents=18,
)  # fmt: skip
ONE_TIER_REQUESTS = 4.3  # what the device bytes hold one-tier; a fraction is never admitted
HOT_RATIO = 0.1
MIN_USED = 0.95  # of the device bytes
# A small model, so that a step costs little compared with its misses, and a top-k of most of the
# context, so that the working set of a request is nearly its whole context and stays that.
THRASH = Scenario(model=dict(layers=4, heads=2, index_topk=1024, index_heads=2), prompt=1536,
                  outputs=(96, 160), documents=30)  # fmt: skip
THRASH_REQUESTS = 24  # that the slots hold
THRASH_FITTING = 6  # whose whole contexts the hot tier holds
QUICK = Grid(burst=30, shares=(0.5,), seconds=15, thrash_burst=16,
             thrash_shares=(0.5, 1.0, 2.0, 3.0), thrash_seconds=8, handovers=3,
             without_link=False)  # fmt: skip
FULL = Grid(burst=60, shares=(0.25, 0.5, 0.75, 1.0), seconds=45, thrash_burst=32,
            thrash_shares=(0.25, 0.5, 0.75, 1.0, 2.0, 3.0), thrash_seconds=20, handovers=12,
            without_link=True)  # fmt: skip


class Bench(shared.Bench):
    """One run: a report, and servers as the parts need them.

    link_gib: GiB/s that count as the link in (B) and (C)
    """

    def __init__(self, grid: Grid, seed: int, directory: Path, link_gib: float):
        super().__init__(grid, seed, directory)
        self.link_gib, self.cores = link_gib, Cores.of_machine()

    @contextmanager
    def side(self, scenario: Scenario, name: str) -> Iterator[Side]:
        """A scenario's prefill server; the first decode server's requests warm it up."""
        model, log = self.model(name, **scenario.model), self.directory / f"{name}.prefill.log"
        flags = (*scenario.prefill_flags(), "--ess-pd-warmup", "on")
        with Prefill(model, *flags, log=log, cores=self.cores.front) as prefill:
            yield Side(self, scenario, model, prefill)


class Side:
    """One scenario's model, documents and prefill server."""

    def __init__(self, bench: Bench, scenario: Scenario, model: str, prefill: Prefill):
        self.bench, self.scenario, self.model, self.prefill = bench, scenario, model, prefill
        self.documents = prompts_of(bench.seed, scenario.documents, scenario.prompt)
        self._warm = False

    @contextmanager
    def system(self, name: str, *flags: str) -> Iterator[System]:
        bench = self.bench
        flags = (*self.scenario.decode_flags(), *flags)
        bench.progress(f"{name}: starting")
        with decoding(self.prefill, self.model, flags, bench.directory, bench.cores) as nodes:
            bench.progress(f"{name}: ready, {nodes[0].facts()['slots']} slots")
            system = System(self, *nodes)
            if not self._warm:
                result = system.load((2, 2), SATURATED, len(self.documents))
                if result.errors:
                    raise RuntimeError(f"prefill must warm up: {result.errors[0]}")
                bench.progress(f"prefill server has its documents after {result.seconds:.0f} s")
                self._warm = True
            system.load((2, 16), SATURATED, 4)
            yield system


class System:
    """A decode server with its router, and loads on them."""

    def __init__(self, side: Side, decode: Decode, router: Router):
        self.side, self.decode, self.router = side, decode, router
        self.bench = side.bench

    def load(self, outputs: tuple[int, int], rate: float, count: int) -> Result:
        requests = requests_of(self.side.documents, outputs, rate, count, self.bench.seed)
        return run_load(self.router.url, requests, REQUEST_SECONDS)

    def point(self, name: str, config: dict, rate: float, count: int) -> Result:
        """One load and its rows."""
        config = config | {"rate": pd_figures.rate_name(rate), "requests": count}
        decode, others = self.decode, OtherLoad()
        offset, before, spent = decode.log_offset(), decode.counters(), decode.cpu_seconds()
        result = self.load(self.side.scenario.outputs, rate, count)
        spent, after = decode.cpu_seconds() - spent, decode.counters()
        counted = {key: value - before.get(key, 0.0) for key, value in after.items()}
        batches = decode.batches(offset)
        rows = pd_figures.point_rows(name, config, result, batches, counted, spent)
        self.bench.add(rows, others)
        got = f"{len(result.errors)} errors"
        if result.completed:
            got += f", {result.tokens_per_s:.0f} tokens/s in {result.seconds:.0f} s"
        self.bench.progress(f"{name}, {config}: {got}")
        return result


def arrivals_in(seconds: float, rate: float) -> int:
    """Number of requests of a point; fewer than 6 would make no figure."""
    return max(round(rate * seconds), 6)


def device_gib() -> float:
    """What (A) gives to each decode server: ONE_TIER_REQUESTS of latent rows and index keys."""
    tokens = ONE_TIER_REQUESTS * (OUTPUT.request_tokens + OUTPUT.outputs[1]) + PAGE
    return tokens * OUTPUT.model["layers"] * (FP8_ROW_BYTES + INDEX_KEY_BYTES) / GIB


def output(bench: Bench) -> None:
    """Part (A), and (C) on the same prefill server. ESS first: its saturation sets the rates."""
    grid, size = bench.grid, ("--ess-device-gib", str(device_gib()))
    ess = (*size, "--ess-hot-ratio", str(HOT_RATIO))
    systems = {ESS: (*ess, "--ess-itl-ms", str(ITL_TARGET_MS)), ONE_TIER: (*size, "--disable-ess")}
    with bench.side(OUTPUT, "output") as side:
        rates: list[float] = []
        for name, flags in systems.items():
            with side.system(name, *flags) as system:
                record_sizes(bench, name, system.decode.facts())
                result = system.point("output", {"system": name}, SATURATED, grid.burst)
                rates = rates or OUTPUT.rates(result, grid.shares)
                for rate in rates:
                    count = min(arrivals_in(grid.seconds, rate), grid.burst)
                    system.point("output", {"system": name}, rate, count)
        for warm in (ON, OFF):
            flags = (*ess, "--ess-link-gib", str(bench.link_gib), "--ess-pd-warmup", warm)
            with side.system(f"warm-up {warm}", *flags) as system:
                warmup(system, {"pd_warmup": warm}, rates[-1])


def record_sizes(bench: Bench, name: str, facts: dict) -> None:
    """Add rows of the pool's sizes.

    Raises: RuntimeError if the pool takes more device bytes than it was given, or far fewer, as it
    does where host memory is short.
    """
    limit, found = device_gib() * GIB, facts["device_bytes"]
    if not MIN_USED * limit <= found <= limit:
        raise RuntimeError(
            f"{name} must take {MIN_USED:g} to 1 of its {limit:.0f} device bytes: got {found}. "
            "Free host memory."
        )
    for key, unit in (("device_bytes", "B"), ("host_bytes", "B"), ("slots", "")):
        bench.report.add(measured("output", {"system": name}, key, unit, [facts[key]]))


def warmup(system: System, config: dict, rate: float) -> None:
    """Part (C) on one decode server."""
    grid, report = system.bench.grid, system.bench.report
    misses = handover_misses(system, grid.handovers)
    report.add(measured("warmup", config, "handover_misses", "rows/layer", misses))
    system.point("warmup", config, rate, max(arrivals_in(grid.seconds, rate), 8))


def handover_misses(system: System, count: int) -> list[float]:
    """Misses a layer in the first FIRST_STEPS decode steps of requests that run alone."""
    found, layers = [], system.side.scenario.model["layers"]
    for document in system.side.documents[:count]:
        before = settled_counters(system.decode)
        requests = requests_of([document], (FIRST_STEPS + 1,) * 2, SATURATED, 1, 0)
        result = run_load(system.router.url, requests, REQUEST_SECONDS)
        if result.errors:
            raise RuntimeError(f"a request alone must complete: {result.errors[0]}")
        after = settled_counters(system.decode)
        found.append((after["misses"] - before["misses"]) / layers)
    return found


def settled_counters(decode: Decode, seconds: float = 30) -> dict[str, float]:
    """Counters once two readings agree: the scheduler publishes them when it is idle.

    Raises: RuntimeError if they never agree.
    """
    until, found = time.monotonic() + seconds, decode.counters()
    while time.monotonic() < until:
        time.sleep(SETTLE_SECONDS)
        again = decode.counters()
        if again == found:
            return found
        found = again
    raise RuntimeError(f"an idle decode server's counters must settle: got {found}")


def thrash_flags(*more: str) -> tuple[str, ...]:
    slots = THRASH_REQUESTS * (THRASH.request_tokens + THRASH.outputs[1])
    ratio = THRASH_FITTING * (THRASH.prompt + THRASH.mean_output) / slots
    return "--max-total-tokens", str(slots), "--ess-hot-ratio", f"{ratio:.4f}", *more


def thrash(bench: Bench) -> None:
    """Part (B). Admission on first: what it can do at saturation sets the rates of both."""
    grid, link = bench.grid, ("--ess-link-gib", str(bench.link_gib))
    with bench.side(THRASH, "thrash") as side:
        rates: list[float] = []
        for admission, linked in ((ON, True), (OFF, True), (OFF, False))[: 2 + grid.without_link]:
            flags = thrash_flags("--ess-admission", admission, *(link if linked else ()))
            config = {"admission": admission, "linked": linked}
            with side.system(f"admission {admission}, linked {linked}", *flags) as system:
                if not rates:
                    result = system.point("thrash", config, SATURATED, grid.thrash_burst)
                    rates = THRASH.rates(result, grid.thrash_shares)
                for rate in rates if linked else rates[-1:]:
                    system.point("thrash", config, rate, arrivals_in(grid.thrash_seconds, rate))


PARTS = {"output": output, "thrash": thrash}


def parser():
    options = argument_parser(__doc__)
    options.add_argument("--only", choices=PARTS, help="one part instead of all")
    options.add_argument("--link-gib", type=float, help="GiB/s of the link in (B) and (C) "
                         "[LINK_SHARE of one core's memory bandwidth]")  # fmt: skip
    return options


def memory_gib_per_s() -> float:
    """One core's, bytes read and written: the best of COPIES, as others may use the machine."""
    source = np.ones(COPIED_BYTES, np.uint8)
    target, seconds = np.empty_like(source), []
    for _ in range(COPIES):
        since = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - since)
    return 2 * COPIED_BYTES / min(seconds[1:]) / GIB  # the first one maps target's pages


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    grid = QUICK if options.quick else FULL
    end_on_sigterm()
    parts = [part for name, part in PARTS.items() if options.only in (None, name)]
    link_gib = options.link_gib or round(memory_gib_per_s() * LINK_SHARE, 3)
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as directory:
        bench = Bench(grid, options.seed, Path(directory), link_gib)
        os.sched_setaffinity(0, bench.cores.front)
        bench.run(parts)
    report, link = bench.report, f"link {link_gib:g} GiB/s"
    pd_figures.summarise(report, ITL_TARGET_MS)
    pd_figures.print_tables(report, link)
    finish(
        report, options, *pd_figures.panels(report, link), grid=asdict(grid),
        cores=asdict(bench.cores), decode_threads=len(bench.cores.decode), link_gib_per_s=link_gib,
        output=asdict(OUTPUT), thrash=asdict(THRASH), hot_ratio=HOT_RATIO, device_gib=device_gib(),
        itl_target_ms=ITL_TARGET_MS, minutes=bench.minutes(),
    )  # fmt: skip
    return 0 if report.summary else 1


if __name__ == "__main__":
    sys.exit(main())
