"""Does ESS help this deployment, and with which settings? A search over batches by the cost model.

More hot rows never miss more, so each batch takes all the device memory that its slots leave.
What remains to choose is the batch. One tier is among the choices, so the best choice is never
slower than it. Every layer has as many hot rows, as on a GPU. To find why ESS does not help, the
planner asks again with one limit lifted: device memory, host memory, the link.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from sglang_ess.layout import GIB
from sglang_ess.sim.inputs.specs import Calibration, Deployment, Gpu, Link, Model
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.memory import Memory
from sglang_ess.sim.model.miss_table import MissTable

MIN_GAIN = 0.02  # in tokens/s over one tier; a smaller gain does not count as help
HOT_GIB_STEP = 0.01  # --ess-hot-gib is printed with two decimals
FAST_LINK = 1e6  # factor on the link's rates that makes it free
MAX_REQUESTS = 4096  # of one GPU, where nothing else limits them
MS = 1000


class QuestionError(ValueError):
    """One line for the operator: a question that has no answer."""


@dataclass(frozen=True)
class Question:
    """What the user asks. The specs are those of sim/inputs/specs.py.

    context      tokens of a request in a decode step, on average
    longest      its tokens at the end, for which its slots are counted; None: as context
    itl_seconds  target for the mean time between two tokens of a request, which is a step's
                 time / accepted_tokens
    max_requests  that one decode rank will ever serve at once; None: as many as fit
    Raises: QuestionError for a value outside its limits.
    """

    model: Model
    gpu: Gpu
    link: Link
    deployment: Deployment
    context: int
    itl_seconds: float
    longest: int | None = None
    max_requests: int | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        longest = self.longest if self.longest is not None else self.context
        limits = (
            ("context", self.context, 1, self.model.max_context, "tokens"),
            ("longest request", longest, self.context, self.model.max_context, "tokens"),
            ("inter-token latency", self.itl_seconds * MS, 0.01, 1e6, "ms"),
            ("requests", self.max_requests, 1, 1e6, "a GPU"),
        )
        for name, value, low, high, unit in limits:
            if value is not None and not low <= value <= high:
                raise QuestionError(f"{name} must be {low:g} to {high:g} {unit}: got {value:g}.")

    @property
    def slots_tokens(self) -> int:
        return self.longest if self.longest is not None else self.context


@dataclass(frozen=True)
class Advice:
    """One way to serve on one decode rank. All figures are simulated.

    tier         "ess" or "one-tier"
    hot_rows     of a layer, all requests together; ratio: hot_rows / slots
    batch        requests of the rank, which has tensor_parallel GPUs
    hot_gib      device memory of the hot rows; draft_gib: of the MTP layers' rows and keys;
                 device_gib: of the whole KV pool, with both. Each GPU of the rank has as much
    host_gib     host memory of the latent rows: one host tier, which the GPUs of a node share
    tokens_per_second  of one GPU
    step_ms      one decode step; itl_ms: step_ms / accepted tokens; parts: of the step, in ms
    in_turn_ms   the part "transfer", if no fetch were issued before its layer's turn
    misses       mean of rows fetched per request, layer and step
    """

    tier: str
    batch: int
    hot_rows: int
    ratio: float
    hot_gib: float
    device_gib: float
    host_gib: float
    step_ms: float
    itl_ms: float
    tokens_per_second: float
    tokens_per_second_per_node: float
    misses: float
    parts: dict[str, float] = field(default_factory=dict)
    in_turn_ms: float = 0.0
    draft_gib: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What the planner answers. Each advice is None if none keeps the target.

    best      the one to follow; ess: the best with ESS; one_tier: the best without
    helps     whether best is ess; it must gain MIN_GAIN or more, or be the only one that fits
    gain      ess over one_tier in tokens/s, minus 1; None if either is missing
    limit     what keeps ESS from helping, one of LIMITS; reason: the same with numbers
    """

    best: Advice | None
    ess: Advice | None
    one_tier: Advice | None
    helps: bool
    gain: float | None
    limit: str | None
    reason: str | None


LIMITS = REQUESTS, LATENCY, COMPUTE, CONTEXT, HOST, LINK, NONE_FITS = (
    "requests", "latency", "compute", "context", "host memory", "link", "nothing fits",
)  # fmt: skip


def batches(most: int) -> Iterator[int]:
    """Yield the batches to try. A wider limit tries the same ones and more, so it never loses."""
    batch = 1
    while batch <= most:
        yield batch
        batch += 1 if batch < 256 else 8 if batch < 1024 else 32


class Planner:
    """Answers one question.

    misses: table for the question's context and queries a step
    Raises: QuestionError if the table is for another context or other index groups.
    """

    def __init__(self, question: Question, misses: MissTable):
        groups = question.model.groups
        if misses.context != question.context or misses.sizes != groups.sizes:
            raise QuestionError(
                f"miss table must be of {groups.layers} layers in {len(groups)} index groups and "
                f"{question.context} tokens: got {sum(misses.sizes)} in {len(misses.sizes)} and "
                f"{misses.context}."
            )
        self.question, self._misses = question, misses
        self._cost = CostModel(
            question.model, question.gpu, question.link, question.deployment,
            question.calibration,
        )  # fmt: skip
        self._memory = Memory.of(question.model, question.gpu, question.deployment)
        # A request's hot rows: at least the rows of one query, at most all of its tokens.
        self._min_rows = min(question.context, max(question.model.topk, misses.floor))

    # --- the candidates -----------------------------------------------------------------

    def one_tier(self) -> Advice | None:
        """The best without ESS, all rows on the device; None if none keeps the target."""
        return self._best(self.one_tier_candidates())

    def ess(self) -> Advice | None:
        """The best with two tiers; None if none keeps the target."""
        return self._best(self.ess_candidates())

    def one_tier_candidates(self) -> Iterator[Advice]:
        """One for each batch that the device holds, whatever its latency."""
        most = self._memory.resident_batch(self.question.slots_tokens)
        return (self._resident(batch) for batch in batches(self._capped(most)))

    def ess_candidates(self) -> Iterator[Advice]:
        """One for each batch that both memories hold."""
        most = self._memory.max_batch(self.question.slots_tokens)
        tried = (self._two_tier(batch) for batch in batches(self._capped(most)))
        return (advice for advice in tried if advice is not None)

    def _capped(self, most: int) -> int:
        return min(most, self.question.max_requests or most)

    def _best(self, found: Iterable[Advice]) -> Advice | None:
        """The most tokens/s within the target. The first of equals has the fewest requests."""
        kept = [advice for advice in found if advice.itl_ms <= self.question.itl_seconds * MS]
        return max(kept, key=lambda advice: advice.tokens_per_second, default=None)

    def _resident(self, batch: int) -> Advice:
        slots = self._memory.slots(batch, self.question.slots_tokens)
        device, misses = slots * self._memory.resident_bytes, np.zeros(self.question.model.layers)
        return self._advice("one-tier", batch, int(slots), misses, device, 0.0)

    def _two_tier(self, batch: int) -> Advice | None:
        """None if a request would have fewer hot rows than one query reads."""
        memory, question = self._memory, self.question
        longest = question.slots_tokens
        step = HOT_GIB_STEP * GIB
        row_bytes = memory.charges.hot_row_bytes
        rows = memory.hot_rows(batch, longest)
        if rows < batch * longest:  # as --ess-hot-gib gives them, with two decimals
            rows = int(math.floor(rows * row_bytes / step) * step // row_bytes)
        share = min(rows / batch, question.context)
        if share < self._min_rows:
            return None
        device, host = memory.device_used(batch, longest, rows), memory.host_used(batch, longest)
        return self._advice("ess", batch, rows, self._misses.uniform(share), device, host)

    def _advice(
        self, tier: str, batch: int, rows: int, misses: np.ndarray, device_bytes: float,
        host_bytes: float,
    ) -> Advice:  # fmt: skip
        question, deployment = self.question, self.question.deployment
        step = self._cost.step(batch, question.context, misses)
        per_gpu = batch * deployment.accepted_tokens / step.seconds / deployment.tensor_parallel
        slots = self._memory.slots(batch, question.slots_tokens)
        hot_bytes = rows * self._memory.charges.hot_row_bytes if tier == "ess" else 0.0
        return Advice(
            tier=tier,
            batch=batch,
            hot_rows=rows,
            ratio=rows / slots,
            hot_gib=hot_bytes / GIB,
            device_gib=device_bytes / GIB,
            host_gib=host_bytes / GIB,
            step_ms=step.seconds * MS,
            itl_ms=step.seconds / deployment.accepted_tokens * MS,
            tokens_per_second=per_gpu,
            tokens_per_second_per_node=self._cost.node_tokens_per_second(batch, step.seconds),
            misses=float(np.mean(misses)),
            parts={name: seconds * MS for name, seconds in step.parts.items()},
            in_turn_ms=step.in_turn * MS,
            draft_gib=slots * self._memory.charges.draft_bytes / GIB,
        )

    # --- answer -------------------------------------------------------------------------

    def advise(self) -> Answer:
        """Find the best advice, and what limits ESS where it does not help."""
        ess, one_tier = self.ess(), self.one_tier()
        gain = None
        if ess and one_tier:
            gain = ess.tokens_per_second / one_tier.tokens_per_second - 1
        if ess and (gain is None or gain >= MIN_GAIN):
            return Answer(ess, ess, one_tier, True, gain, None, None)
        limit, reason = self._why_not(ess, one_tier)
        return Answer(one_tier or ess, ess, one_tier, False, gain, limit, reason)

    def _why_not(self, ess: Advice | None, one_tier: Advice | None) -> tuple[str, str]:
        """(limit, reason): the first limit without which ESS would help, else another cause."""
        question = self.question
        target = question.itl_seconds * MS
        if not ess and not one_tier:
            return NONE_FITS, self._nothing_fits(target)
        resident = self._memory.resident_batch(question.slots_tokens)
        if one_tier and question.max_requests and question.max_requests <= resident:
            return REQUESTS, (
                f"everything fits on the device: {question.max_requests} requests of "
                f"{question.slots_tokens} tokens a GPU, room for {resident}."
            )
        free = self._all_on_device()
        if one_tier and (not free or not self._gains(free, one_tier)):
            return self._bound(free, one_tier, resident, target)
        if question.context <= 2 * question.model.topk:
            selected = min(question.model.topk, question.context)
            return CONTEXT, (
                f"the context is too short: a query selects {selected} of {question.context} "
                "rows, so nearly all of them must be hot."
            )
        return self._which_link_or_host(ess, one_tier)

    def _nothing_fits(self, target: float) -> str:
        alone = self._resident(1).itl_ms
        if alone > target:
            return f"one request alone takes {alone:.1f} ms a token, target {target:g} ms."
        fastest = min(self.ess_candidates(), key=lambda advice: advice.itl_ms, default=None)
        if fastest:
            return (
                f"what fits is too slow: a batch of {fastest.batch}, with {fastest.misses:.0f} "
                f"misses a request and layer, takes {fastest.itl_ms:.1f} ms a token, target "
                f"{target:g} ms."
            )
        need = self._memory.host_used(1, self.question.slots_tokens) / GIB
        return (
            f"no request of {self.question.slots_tokens} tokens fits: got "
            f"{self._memory.device_bytes / GIB:.1f} GiB of device memory for KV and "
            f"{self._memory.host_bytes / GIB:.1f} GiB of host memory; its rows alone are "
            f"{need:.1f} GiB."
        )

    def _bound(
        self, free: Advice | None, one_tier: Advice, resident: int, target: float
    ) -> tuple[str, str]:
        """(limit, reason) where device memory is not the limit: latency, or compute."""
        after = self._resident(one_tier.batch + 1)
        if after.itl_ms > target:
            return LATENCY, (
                f"the latency target is reached before memory is full: {one_tier.batch} "
                f"requests take {one_tier.itl_ms:.1f} ms a token and one more "
                f"{after.itl_ms:.1f} ms, target {target:g} ms; the device has room for {resident}."
            )
        best = (free or one_tier).tokens_per_second / one_tier.tokens_per_second - 1
        return COMPUTE, (
            f"larger batches gain nothing here: {best:.1%} in tokens/s even with all rows on the "
            f"device, over {one_tier.batch} requests that fit without ESS."
        )

    def _which_link_or_host(self, ess: Advice | None, one_tier: Advice | None) -> tuple[str, str]:
        question = self.question
        more_host = replace(question, deployment=replace(question.deployment, host_gib=1e9))
        wide = Planner(more_host, self._misses).ess()
        if wide and (one_tier is None or self._gains(wide, one_tier)):
            return HOST, (
                f"host memory is too small: got {self._memory.host_bytes / GIB:g} GiB, "
                f"{wide.batch} requests of {question.slots_tokens} tokens take "
                f"{wide.host_gib:.0f} GiB (--ess-host-gib is for all GPUs of a node) and gain "
                f"{self._percent(wide, one_tier)} tokens/s."
            )
        rates = ("nominal_gb_s", "gather_gb_s", "scatter_gb_s")
        fast = {name: getattr(question.link, name) * FAST_LINK for name in rates}
        quick = Planner(replace(more_host, link=Link(**fast, own_memory=True)), self._misses).ess()
        if quick and (one_tier is None or self._gains(quick, one_tier)):
            worst = self._worst_transfer(quick)
            return LINK, (
                f"the link is too slow: at {question.link.gather_gb_s:g} GB/s a batch of "
                f"{quick.batch} waits {worst:.1f} ms a step for missed rows; without that it "
                f"would gain {self._percent(quick, one_tier)} tokens/s."
            )
        if ess is None:
            return COMPUTE, "index keys, maps and staging leave too little for hot rows."
        return COMPUTE, (
            "index keys, maps and staging take what hot rows would save: the best with ESS gains "
            f"{self._percent(ess, one_tier)} tokens/s, less than {MIN_GAIN:.0%}."
        )

    def _all_on_device(self) -> Advice | None:
        """The best without ESS if the device had any amount of memory."""
        most = self._capped(MAX_REQUESTS)
        return self._best(self._resident(batch) for batch in batches(most))

    def _worst_transfer(self, advice: Advice) -> float:
        """Milliseconds that a step of this batch waits for missed rows on the real link."""
        share = min(advice.hot_rows / advice.batch, self.question.context)
        misses = self._misses.uniform(share)
        step = self._cost.step(advice.batch, self.question.context, misses)
        return step.parts["transfer"] * MS

    def _gains(self, advice: Advice, base: Advice) -> bool:
        return advice.tokens_per_second >= (1 + MIN_GAIN) * base.tokens_per_second

    def _percent(self, advice: Advice, base: Advice | None) -> str:
        if base is None:
            return "all"
        return f"{advice.tokens_per_second / base.tokens_per_second - 1:+.1%}"
