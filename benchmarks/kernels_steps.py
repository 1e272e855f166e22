"""Attention alone, and whole layer steps without overlap, in DA and in DBA, of benchmarks/kernels.

A step is what one layer of one decode step does through TwoTierDecode, with stand-ins for the
work around it: `indexer` before the plan, which DBA splits along the batch, and `preattn` between
plan and attention, behind which every mode may fetch. The stand-ins read device memory for stated
microseconds, measured as rows of their own, and take part in nothing else.
"""

from __future__ import annotations

import torch

from benchmarks.kernels_copies import row_bytes_of
from benchmarks.kernels_points import PAGE, Sizes, Steady, make_rows
from benchmarks.kernels_timing import Bench, Subject, nothing, require
from ess_kernels.fetch import fetch
from ess_kernels.sparse_mla import sparse_mla_reference
from sglang_ess.attention.mla_kernels import KERNELS, PREFERRED, Need
from sglang_ess.attention.overlap import Mode
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.layout import ROPE_DIM, ROW_DIM
from sglang_ess.tiers.hot_cache_cuda import DeviceTier
from sglang_ess.tiers.transfer_stream import TransferStream

SM_SCALE = (128 + ROPE_DIM) ** -0.5  # of V3.2's heads before absorption
CHECKED_QUERIES = 4  # against the float64 reference
TOLERANCE = 2e-2  # |out - reference| / |reference|, bfloat16 operands
READ_BYTES_PER_US = 2_500_000  # first guess of a stand-in's speed, then corrected


def need_for(device: torch.device, rows_dtype, heads: int, split: bool) -> Need:
    """What a decode kernel of these tiers must do."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Need(rows_dtype, capability, heads, split_lists=split)


def make_kernel(name: str, device, rows_dtype, heads: int, split: bool = False):
    """A decode kernel by name. Raises: RuntimeError with its refusals, ImportError."""
    need = need_for(device, rows_dtype, heads, split)
    refusals = KERNELS[name].refusals(need)
    if refusals:
        raise RuntimeError(f"{name} {'; '.join(refusals)}")
    return KERNELS[name](need, SM_SCALE, device)


def step_kernels(device, rows_dtype, heads: int) -> list[str]:
    """Decode kernels that can be made here and take lists in parts, as preferred."""
    names = []
    for kernel in PREFERRED:
        try:
            make_kernel(kernel.name, device, rows_dtype, heads, split=True)
        except Exception:  # why: measure_attention's failed row says it
            continue
        names.append(kernel.name)
    return names


def load_merge():
    """SGLang's merge_state: its own choice where sgl_kernel is installed, else its Triton one."""
    try:
        from sglang.srt.layers.attention.merge_state import merge_state
    except ImportError:
        from sglang.kernels.ops.attention.merge_state import merge_state_triton as merge_state
    return merge_state


def check_output(out, q, rows, indices, lengths=None) -> None:
    """out against sparse_mla_reference, of the first queries. Raises: WrongResult."""
    n = min(CHECKED_QUERIES, len(q))
    lengths = None if lengths is None else lengths[:n]
    wanted, _ = sparse_mla_reference(q[:n], rows, indices[:n], SM_SCALE, lengths)
    error = ((out[:n].double() - wanted).norm() / wanted.norm()).item()
    require(error < TOLERANCE, f"attention is off by {error:.2g} of its norm")


class Attention:
    """Resident attention: every list inside the rows of a hot tier, `sets` lists."""

    def __init__(self, sizes: Sizes, batch: int, heads: int, row_bytes: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        num_rows = -(-batch * sizes.buffer // PAGE) * PAGE
        self.rows = make_rows(num_rows, row_bytes, device, generator)
        shape = batch, heads, ROW_DIM
        self.q = torch.randn(shape, generator=generator, device=device).bfloat16()
        picks = torch.rand(
            sizes.sets_of(batch), batch, sizes.buffer, generator=generator, device=device
        )
        first = torch.arange(batch, device=device)[:, None] * sizes.buffer
        self.indices = (picks.argsort(2)[:, :, : sizes.topk] + first).int().contiguous()
        self.lengths = torch.full((batch,), sizes.topk, dtype=torch.int32, device=device)
        self.out = None

    def subject(self, kernel) -> Subject:
        if hasattr(kernel, "plan"):  # FlashInfer's, once a step
            kernel.plan(self.lengths.tolist(), self.indices.shape[2])

        def op(index):
            self.out = kernel.attend(self.q, self.rows, self.indices[index], self.lengths)[0]

        def check(last):
            check_output(self.out, self.q, self.rows, self.indices[last])

        return Subject([lambda i=i: op(i) for i in range(len(self.indices))], check=check)


def measure_attention(bench: Bench, sizes: Sizes, row_bytes: int, batches, seed: int) -> None:
    """Each decode kernel alone, all rows resident."""
    dtype = torch.uint8 if row_bytes % (2 * ROW_DIM) else torch.bfloat16
    for batch in batches:
        for heads in sizes.heads if batch in (batches[0], batches[-1]) else sizes.heads[:1]:
            bench.check_time()
            config = {"batch": batch, "heads": heads, "row_bytes": row_bytes, "topk": sizes.topk}
            bench.progress(f"attention {config}")
            case = Attention(sizes, batch, heads, row_bytes, bench.device, seed)
            for name in KERNELS:
                bench.time(
                    "attention",
                    {"kernel": name} | config,
                    lambda k=name, c=case, h=heads: c.subject(
                        make_kernel(k, bench.device, dtype, h)
                    ),
                )


class StandIn:
    """Reads of device memory that take about target_us for a whole batch, by query."""

    def __init__(self, bench: Bench, batch: int, target_us: float):
        self._device, self.batch = bench.device, batch
        self._size(target_us * READ_BYTES_PER_US if bench.on_cuda else 64 * batch)
        if bench.on_cuda:
            replay = self._captured(bench)
            took = sorted(bench.events(nothing, replay) for _ in range(5))[2]
            self._size(self._data.nbytes * target_us / took)

    def _captured(self, bench):
        self.run(0, self.batch)
        return bench.captured(lambda: self.run(0, self.batch))

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
        steady.restore_into(self.tier.state)
        rows = torch.arange(steady.num_rows, dtype=torch.int32, device=device)
        for index in range(steady.sets):
            self._fill(index, *self._copies(index, rows))
        victims = [steady.victims(index) for index in range(steady.sets)]
        self._refills = [self._copies(i, rows) for i, rows in enumerate(victims)]

    def _copies(self, index: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A miss list that fills rows of set `index` as the state before the step has them."""
        count = torch.tensor([len(rows)], dtype=torch.int32, device=rows.device)
        return self.steady.row_slot_before(index)[rows.long()], rows, count

    def _fill(self, index: int, slots, rows, count) -> None:
        fetch(self.host, self.tier.rows[index], slots, rows, count)

    def before(self) -> None:
        self.steady.restore_into(self.tier.state)
        for index, copies in enumerate(self._refills):
            self._fill(index, *copies)

    def subject(self, mode: Mode, around: bool = True) -> Subject:
        """around: with the stand-ins."""
        ops = [lambda i=i: self._run(i, mode, around) for i in range(self.steady.sets)]
        return Subject(ops, self.before, self._check)

    def _run(self, layer: int, mode: Mode, around: bool) -> None:
        topk, batch = self.steady.topk[layer], self.steady.batch
        if mode is Mode.DBA:
            for first, last in ((0, batch // 2), (batch // 2, batch)):
                if around:
                    self._indexer.run(first, last)
                self._decode.plan_half(layer, topk[first:last], first, batch)
        elif around:
            self._indexer.run(0, batch)
        planned = self._decode.start(layer, topk)
        if around:
            self._preattn.run(0, batch)
        self.out = self._decode.finish(self.q, planned, mode)
        if layer == self.steady.sets - 1:
            self._transfer.join()

    def _check(self, last: int) -> None:
        n = min(CHECKED_QUERIES, self.steady.batch)
        slots = self.steady.topk[last][:n]
        rows = self.host[slots.flatten().long().to(self.host.device)].to(self.q.device)
        indices = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        check_output(self.out, self.q[:n], rows, indices.view_as(slots))

    def empty_subject(self) -> Subject:
        """What a DA step adds where nothing is late: attention to no row, and the merge."""
        rows, indices = self.tier.rows[0], self.steady.topk[0] * 0
        full = torch.full((len(indices),), indices.shape[1], dtype=torch.int32, device=rows.device)
        none = torch.zeros_like(full)
        early = self._kernel.attend(self.q, rows, indices, full)

        def op():
            self._decode.merge(early, self._late.attend(self.q, rows, indices, none))

        return Subject([op])


def modes_at(batch: int, misses: int) -> list[Mode]:
    return [mode for mode in Mode if mode is not Mode.DBA or batch > 1]


def measure_steps(bench: Bench, host_rows, sizes: Sizes, name: str, points, us, seed: int) -> None:
    """Steps with decode kernel `name` at points (batch, misses).

    us: (indexer, preattn) of the largest batch; smaller ones in proportion, a tenth at least
    """
    row_bytes, heads, stand_ins = row_bytes_of(host_rows), sizes.heads[0], {}
    for batch, misses in points:
        config = {"kernel": name, "batch": batch, "misses": misses, "row_bytes": row_bytes}
        bench.check_time()
        bench.progress(f"layer steps {config}")
        try:
            if batch not in stand_ins:
                stand_ins = {batch: _stand_ins(bench, sizes, batch, us)}
            steady = Steady(sizes, batch, misses, sizes.sets_of(batch), bench.device, seed)
            kernel = make_kernel(name, bench.device, host_rows.dtype, heads, split=True)
            step = Step(steady, host_rows, kernel, heads, stand_ins[batch], seed)
        except Exception as error:
            bench.fail("step", config, error)
            continue
        for mode in modes_at(batch, misses):
            bench.time(
                "step", config | {"mode": mode.value, "bare": False},
                lambda m=mode, s=step: s.subject(m),
            )  # fmt: skip
        if misses == 0:
            _measure_empty(bench, step, config)


def _measure_empty(bench: Bench, step: Step, config: dict) -> None:
    for mode in (Mode.OFF, Mode.DA):
        bench.time(
            "step", config | {"mode": mode.value, "bare": True},
            lambda m=mode: step.subject(m, around=False),
        )  # fmt: skip
    bench.time("empty", config, step.empty_subject)


def _stand_ins(bench: Bench, sizes: Sizes, batch: int, us) -> tuple[StandIn, StandIn]:
    """(indexer, preattn) of a batch, and their rows."""
    share = max(batch / max(sizes.batches), 0.1)
    indexer, preattn = (StandIn(bench, batch, share * full) for full in us)
    whole = Subject([lambda: indexer.run(0, batch)])
    bench.time("indexer", {"batch": batch, "parts": 1}, lambda: whole)
    bench.time("indexer", {"batch": batch, "parts": 2}, lambda: Subject([indexer.halves]))
    bench.time("preattn", {"batch": batch}, lambda: Subject([lambda: preattn.run(0, batch)]))
    return indexer, preattn
