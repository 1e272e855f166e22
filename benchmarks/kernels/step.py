"""Layer steps without overlap, in DA and in DBA.

A step is what one layer of one decode step does through TwoTierDecode, with stand-ins for the
work around it: `indexer` before the plan, which DBA splits along the batch, and `preattn` between
plan and attention, behind which every mode may fetch. The stand-ins read device memory for stated
microseconds, are measured as rows of their own, and do nothing else.
"""

from __future__ import annotations

import torch

from benchmarks.kernels.attention import CHECKED_QUERIES, check_output, make_kernel
from benchmarks.kernels.points import Run, Steady, overwrite
from benchmarks.kernels.timing import Bench, Subject, nothing
from ess_kernels.plan_fetch import fetch
from sglang_ess.attention.mla_kernels import PREFERRED
from sglang_ess.attention.overlap import Mode
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.layout import FP8_ROW_BYTES, ROW_DIM
from sglang_ess.tiers.hot_cache_cuda import DeviceTier
from sglang_ess.tiers.transfer_stream import TransferStream

READ_BYTES_PER_US = 2_500_000  # first guess of a stand-in's speed, then corrected


def step_kernels(run: Run) -> list[str]:
    """Decode kernels that take parts of lists here, as preferred, less what failed alone."""
    names = []
    for kernel in PREFERRED:
        try:
            make_kernel(kernel.name, run.bench.device, run.host.dtype, run.sizes.heads[0], True)
        except Exception:  # the failed row of measure_attention says why
            continue
        names.append(kernel.name)
    alone = run.bench.report.select("attention")
    ran = {row["config"]["kernel"] for row in alone if row["kind"] != "failed"}
    return [name for name in names if not alone or name in ran]


def load_merge():
    """SGLang's merge_state: its own choice with sgl_kernel installed, else its Triton kernel."""
    try:
        from sglang.srt.layers.attention.merge_state import merge_state
    except ImportError:
        from sglang.kernels.ops.attention.merge_state import merge_state_triton as merge_state
    return merge_state


class StandIn:
    """Reads of device memory that take about target_us for a whole batch, by query."""

    def __init__(self, bench: Bench, batch: int, target_us: float):
        self._device, self.batch = bench.device, batch
        self._size(target_us * READ_BYTES_PER_US if bench.on_cuda else 64 * batch)
        if bench.on_cuda:
            self.run(0, batch)
            replay = bench.captured(lambda: self.run(0, batch))
            took = sorted(bench.events(nothing, replay) for _ in range(5))[2]
            self._size(self._data.nbytes * target_us / took)

    def _size(self, num_bytes: float) -> None:
        columns = max(1, int(num_bytes / 4 / self.batch))
        self._data = torch.ones(self.batch, columns, device=self._device)
        self._sums = torch.empty(self.batch, device=self._device)

    def run(self, first: int, last: int) -> None:
        torch.sum(self._data[first:last], 1, out=self._sums[first:last])

    def halves(self) -> None:
        self.run(0, self.batch // 2)
        self.run(self.batch // 2, self.batch)


class Step:
    """One layer of a decode step of a steady point, in every mode; sets are layers."""

    def __init__(self, steady: Steady, host_rows, kernel, heads: int, stand_ins, seed: int):
        device, sizes, batch = steady.device, steady.sizes, steady.batch
        generator = torch.Generator(device).manual_seed(seed)
        self.steady, self.host = steady, host_rows[: batch * sizes.context]
        self._indexer, self._preattn = stand_ins
        layers = [self.host] * steady.sets
        self.tier = DeviceTier(layers, steady.num_rows, sizes.topk, batch, device)
        self._transfer = TransferStream(device)
        late = kernel
        if not kernel.stops_early:  # as the server's backend does
            late = make_kernel("triton", device, host_rows.dtype, heads, split=True)
        self._decode = TwoTierDecode(
            self.tier, self._transfer, kernel.attend, load_merge(), late.attend
        )
        self._kernel, self._late = kernel, late
        shape = batch, heads, ROW_DIM
        self.q = torch.randn(shape, generator=generator, device=device).bfloat16()
        self.out = None
        overwrite(self.tier.state, steady.before)
        rows = torch.arange(steady.num_rows, dtype=torch.int32, device=device)
        for index in range(steady.sets):
            self._fill(index, rows)

    def _fill(self, index: int, rows: torch.Tensor) -> None:
        """Fill rows [n] int32 of set `index` as the state before the step has them."""
        count = torch.tensor([len(rows)], dtype=torch.int32, device=rows.device)
        slots = self.steady.before.row_slot[index][rows.long()]
        fetch(self.host, self.tier.rows[index], slots, rows, count)

    def before(self) -> None:
        for index in range(self.steady.sets):
            taken = self.tier.state.row_slot[index] != self.steady.before.row_slot[index]
            self._fill(index, taken.nonzero().flatten().int())
        overwrite(self.tier.state, self.steady.before)

    def subject(self, mode: Mode, around: bool = True) -> Subject:
        """around: with the stand-ins."""
        ops = [lambda i=i: self._run(i, mode, around) for i in range(self.steady.sets)]
        return Subject(ops, self.before, self._check)

    def _run(self, layer: int, mode: Mode, around: bool) -> None:
        topk, batch = self.steady.topk[layer], self.steady.batch
        step = self._decode.layer(layer)
        if mode is Mode.DBA:
            for first, last in ((0, batch // 2), (batch // 2, batch)):
                if around:
                    self._indexer.run(first, last)
                self._decode.plan_half(step, topk[first:last], first, batch)
        elif around:
            self._indexer.run(0, batch)
        self._decode.start(step, topk, mode)
        if around:
            self._preattn.run(0, batch)
        self.out = self._decode.finish(self.q, step, mode)
        if layer == self.steady.sets - 1:
            self._transfer.join()

    def _check(self, last: int) -> None:
        n = min(CHECKED_QUERIES, self.steady.batch)
        slots = self.steady.topk[last][:n]
        rows = self.host[slots.flatten().long().to(self.host.device)].to(self.q.device)
        indices = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        check_output(self.out, self.q[:n], rows, indices.view_as(slots))

    def empty_subject(self) -> Subject:
        """What a DA step adds if nothing is late: attention to no row, and the merge."""
        rows, indices = self.tier.rows[0], self.steady.topk[0] * 0
        full = torch.full((len(indices),), indices.shape[1], dtype=torch.int32, device=rows.device)
        none = torch.zeros_like(full)
        early = self._kernel.attend(self.q, rows, indices, full)

        def op():
            self._decode.merge(early, self._late.attend(self.q, rows, indices, none))

        return Subject([op])


def measure_first(run: Run) -> None:
    """Steps with the preferred decode kernel."""
    for name in step_kernels(run)[:1]:
        measure_steps(run, name, run.step_points)


def measure_others(run: Run) -> None:
    """Steps with the other decode kernels, at the largest batch."""
    points = [point for point in run.step_points if point[0] == max(run.sizes.batches)]
    for name in step_kernels(run)[1:]:
        measure_steps(run, name, points)


def measure_steps(run: Run, name: str, points) -> None:
    """Steps with decode kernel `name` at points (batch, misses)."""
    bench, heads, stand_ins = run.bench, run.sizes.heads[0], {}
    for batch, misses in points:
        config = {"kernel": name, "batch": batch, "misses": misses, "row_bytes": FP8_ROW_BYTES}
        bench.begin(f"layer steps {config}")
        try:
            if batch not in stand_ins:
                stand_ins = {batch: _stand_ins(run, batch)}
            kernel = make_kernel(name, bench.device, run.host.dtype, heads, split=True)
            steady = run.steady(batch, misses)
            step = Step(steady, run.host, kernel, heads, stand_ins[batch], run.seed)
        except Exception as error:
            bench.fail("step", config, error)
            continue
        # One request cannot be halved. Without misses and stand-ins: what the step itself costs.
        runs = [(mode, True) for mode in Mode if mode is not Mode.DBA or batch > 1]
        runs += [(Mode.OFF, False), (Mode.DA, False)] if misses == 0 else []
        for mode, around in runs:
            bench.time("step", config | {"mode": mode.value, "bare": not around},
                       lambda s=step, m=mode, a=around: s.subject(m, a))  # fmt: skip
        if misses == 0:
            bench.time("empty", config, step.empty_subject)


def _stand_ins(run: Run, batch: int) -> tuple[StandIn, StandIn]:
    """(indexer, preattn) of a batch, and their rows. Run.us in proportion, a tenth at least."""
    share = max(batch / max(run.sizes.batches), 0.1)
    indexer, preattn = (StandIn(run.bench, batch, share * full) for full in run.us)
    for name, config, call in (
        ("indexer", {"parts": 1}, lambda: indexer.run(0, batch)),
        ("indexer", {"parts": 2}, indexer.halves),
        ("preattn", {}, lambda: preattn.run(0, batch)),
    ):
        run.bench.time(name, {"batch": batch} | config, lambda c=call: Subject([c]))
    return indexer, preattn
