"""How far an engine is from the oracle: in what it decided, and in what it computed.

Every figure is a ratio to a yardstick of the same run: what the oracle differs from itself, with
the same decisions, when it is disturbed by as much as rounding may (Setup.disturbed). An engine
that computes the same thing is within it on any machine; the engine and the oracle may both err.
"""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from sglang_ess.cpu.ops.rows import FP8_MAX
from sglang_ess.layout import LATENT_DIM, SCALE_GROUP
from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support import oracle as oracles
from tests.support.engine import EngineProcess
from tests.support.oracle import Decisions
from tests.support.pooled_oracle import PooledOracle

# What is not a row or its place is as narrow as it can be: most of an engine's time else.
NARROW = dict(
    heads=2, nope_dim=32, v_dim=32, index_heads=2, hidden=64, q_lora_rank=32, intermediate=64,
    moe_intermediate=32, experts=4,
)  # fmt: skip
RECORD = "tests.support.recorder:install"
PATCHES = (RECORD, RECORD + "_experts", "tests.support.switches:chunk")
FAULTS = "tests.support.faults:install"
UNIT = {"bfloat16": 2.0**-8, "fp8_e4m3": 2.0**-4}  # unit roundoff
MARGIN = 2  # yardsticks: the engine and the oracle may each be off by one
# A step of e4m3 is 1/8 to 1/16 of a number. One off by at most 2^-10 of it, 2^-11 on average, is
# rounded to the other side in 1 of 128 to 256 cases.
INDEX_DISTURBANCE = 2.0**-10
E4M3_LEAST = 2.0**-9  # spacing of the numbers next to 0


@dataclass(frozen=True)
class Setup:
    """One way to run a model, and the oracle that stands for it.

    kv_cache_dtype: if it rounds rows, the oracle uses the engine's
    rounds_index: whether the oracle's index keys are rounded as the engine's
    """

    dtype: str = "float32"
    index_dtype: str = "float32"
    kv_cache_dtype: str = "auto"
    rounds_index: bool = True

    @property
    def rounds_rows(self) -> bool:
        return self.kv_cache_dtype != "auto"

    def engine(self, model, faults=(), ess=None, **server_args) -> EngineProcess:
        """faults: patches whose faults EngineProcess.switched(fault=...) wakes."""
        # The recorders come last: they see what faults have done.
        patches = [*faults, *PATCHES] + [RECORD + "_rows"] * self.rounds_rows
        return EngineProcess(
            model,
            ess={"index_dtype": self.index_dtype} | (ess or {}),
            patches=patches,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            **server_args,
        )

    def rounded(self, oracle, disturbance=0.0):
        rounds = self.index_dtype == "fp8" and self.rounds_index
        return oracles.fp8_index(oracle, disturbance) if rounds else nullcontext()

    @contextmanager
    def disturbed(self, model):
        """The oracle as far off as this format's rounding may carry it.

        A bfloat16 model rounds every activation: transformers does so in bfloat16. Of index keys
        and queries in fp8, errors of float32 turn over the rounding of one element in 10,000, by a
        whole step: too few in a run to see how much a score may move. INDEX_DISTURBANCE turns
        over about one in every key and query.
        """
        oracle = oracle_of(model, getattr(torch, self.dtype))
        rounding = self.dtype == "bfloat16"
        otherwise = nullcontext() if rounding else oracles.summed_otherwise(oracle)
        with self.rounded(oracle, INDEX_DISTURBANCE), otherwise:
            yield oracle


EXACT = Setup()
FP8_INDEX = Setup(index_dtype="fp8")
BF16_ROWS = Setup(kv_cache_dtype="bfloat16")
FP8_ROWS = Setup(kv_cache_dtype="fp8_e4m3")
FP8_BOTH = Setup(index_dtype="fp8", kv_cache_dtype="fp8_e4m3")
BF16_MODEL = Setup(dtype="bfloat16")


@dataclass
class Part:
    """Differences of one kind: the engine's from the oracle, and the disturbed oracle's."""

    engine: np.ndarray
    yardstick: np.ndarray

    def ratio(self, of=np.max) -> float:
        found = of(self.engine) if len(self.engine) else 0.0
        if found <= 0:
            return 0.0  # none, or a tie
        return float(found / of(self.yardstick))


@dataclass
class Difference:
    """Engine against oracle, over every scored token of some sequences.

    logprob: |difference| by token, the oracle making the engine's decisions
    selection: by query, how far the selection is from the oracle's top-k, in standard deviations
        of the query's scores: 0 if it is one, whichever of equal scores it took (_gaps). The
        yardstick is the largest error of two scores: one may be too high, the other too low.
    experts: the same by token, of the router's scores
    rows: by element of a stored row, how far beyond a rounding it is from the oracle's
    free_logprob: |difference| by token, the oracle making its own decisions and rounding nothing
    missed, selected: positions selected outside the oracle's top-k, and all, where sparse
    """

    logprob: Part
    selection: Part
    experts: Part
    rows: Part
    free_logprob: np.ndarray
    missed: int
    selected: int

    @property
    def overlap(self) -> float:
        return 1 - self.missed / self.selected

    def ratios(self) -> dict[str, float]:
        """Each kind's largest difference (logprobs: also the mean and a quantile) / yardstick's."""
        return {
            "logprob mean": self.logprob.ratio(np.mean),
            "logprob p99": self.logprob.ratio(lambda values: np.quantile(values, 0.99)),
            **{
                one.name: getattr(self, one.name).ratio()
                for one in fields(self)
                if one.type is Part
            },
        }


def check(ratios) -> None:
    """Raises: AssertionError that names every kind of difference beyond MARGIN yardsticks."""
    beyond = {kind: ratio for kind, ratio in ratios.items() if not ratio <= MARGIN}
    assert not beyond, f"differences must be <= {MARGIN} yardsticks: got {beyond}"


def prompts_of(lengths, seed=1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


@cache
def oracle_of(model: Path, dtype=torch.float32) -> oracles.Oracle:
    kind = json.loads((model / "config.json").read_text())["model_type"]
    return (PooledOracle if kind == "glm5_next" else oracles.Oracle)(model, dtype)


def decisions_of(engine, rids) -> dict[str, Decisions]:
    """What the engine decided on each request, where its patches recorded it."""
    found = {rid: Decisions() for rid in rids}
    for kind in ("selection", "experts", "rows"):
        for (rid, layer), values in engine.recorded(kind).items():
            if rid in found:
                getattr(found[rid], kind)[layer] = values
    return found


@contextmanager
def one_thread():
    """Matrices this small gain little by two, and wait long where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def compare(setup, model, sequences, with_free=False) -> Difference:
    """Judge sequences: (token ids, engine logprobs of the last tokens, its Decisions).

    Only positions that the engine computed count: at others the two oracles decide as they like.
    """
    oracle = oracle_of(model)
    parts = {name: ([], []) for name in ("logprob", "selection", "experts", "rows")}
    free, missed, selected = [], 0, 0
    for token_ids, logprobs, decisions in sequences:
        chosen = {n: oracle.selection_of(found) for n, found in decisions.selection.items()}
        decisions = replace(decisions, selection=chosen)
        with setup.rounded(oracle):
            verdict = oracle.judge(token_ids, decisions)
        _check_complete(decisions, verdict, setup.rounds_rows, len(token_ids) - 1)
        with setup.disturbed(model) as other:
            disturbed = other.judge(token_ids, decisions)
        scored = slice(-len(logprobs), None)
        difference = np.abs(logprobs - verdict.logprobs[scored])
        own = np.abs(disturbed.logprobs[scored] - verdict.logprobs[scored])
        _add(parts["logprob"], difference, own)
        for layer, selection in decisions.selection.items():
            scores, others = verdict.scores[layer], disturbed.scores[layer]
            gaps, error, outside, all_of = _selection(scores, others, selection, oracle)
            _add(parts["selection"], gaps, error)
            missed, selected = missed + outside, selected + all_of
        for layer, experts in decisions.experts.items():
            routing, others = verdict.routing[layer], disturbed.routing[layer]
            _add(parts["experts"], *_routing(routing, others, experts, oracle.config))
        for layer, rows in decisions.rows.items():
            exact, others = verdict.rows[layer], disturbed.rows[layer]
            _add(parts["rows"], *_rounding(exact, others, rows, setup.kv_cache_dtype))
        if with_free:
            free.append(np.abs(logprobs - oracle.judge(token_ids).logprobs[scored]))
    return Difference(
        **{name: Part(*map(_joined, lists)) for name, lists in parts.items()},
        free_logprob=_joined(free),
        missed=missed,
        selected=selected,
    )


def _check_complete(decisions, verdict, rounds_rows, tokens) -> None:
    """Raises: AssertionError where a decision was not recorded, and so would not be judged."""
    expected = {"selection": verdict.scores, "experts": verdict.routing}
    expected |= {"rows": verdict.rows} if rounds_rows else {}
    for kind, layers in expected.items():
        found = getattr(decisions, kind)
        missing = [
            layer for layer in layers if not set(range(tokens)) <= found.get(layer, {}).keys()
        ]
        assert not missing, (
            f"{kind} of all {tokens} tokens must be recorded: not in layers {missing}"
        )


def _add(lists, *values) -> None:
    for found, one in zip(lists, values, strict=True):
        found.append(one)


def _joined(arrays) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0)


def _selection(scores, disturbed, selection, oracle):
    """Gaps and yardstick of one layer's selection {query: positions}; missed and selected.

    scores, disturbed [S, S], or [S, pools] where a pool of positions has one key. A selection that
    is not of top-k (or all) visible ones has an infinite gap. Queries that see no more than top-k
    have no choice, and no part in the rest.
    """
    topk, pool = oracle.topk, oracle.pool
    known = {query: found for query, found in selection.items() if query < len(scores)}
    sees = {query: (query + 1) // pool for query in known}
    wrong = sum(
        len(np.unique(found)) != min(topk, sees[query]) or (found >= sees[query]).any()
        for query, found in known.items()
    )
    queries = [query for query in known if sees[query] > topk and len(known[query]) == topk]
    if wrong or not queries:
        return np.full(wrong, np.inf), np.empty(0), 0, 0
    chosen = torch.from_numpy(np.stack([known[query] for query in queries])).long()
    at, visible = torch.tensor(queries), torch.tensor([sees[query] for query in queries])
    seen = torch.arange(scores.shape[1]) < visible[:, None]
    of, error = scores[at], (disturbed[at] - scores[at]).abs().masked_fill(~seen, 0)
    mean = of.masked_fill(~seen, 0).sum(1, keepdim=True) / visible[:, None]
    spread = ((of - mean).square().masked_fill(~seen, 0).sum(1) / (visible - 1)).sqrt()
    gaps, missed = _gaps(of.masked_fill(~seen, -torch.inf), chosen)
    return (gaps / spread).numpy(), (2 * error.amax(1) / spread).numpy(), missed, chosen.numel()


def _gaps(scores, chosen):
    """How far scores [T, N] are from saying chosen [T, k], by row; how many are not theirs.

    Below the k-th best lies the least that was chosen, or above it the best that was not (as
    another of the k-th's size can be chosen in its place); 0 where chosen is a top-k, ties or not.
    """
    border = scores.topk(chosen.shape[1]).values[:, -1:]
    taken = scores.gather(1, chosen)
    left = scores.scatter(1, chosen, -torch.inf).amax(1, keepdim=True)
    gaps = torch.maximum(border - taken.amin(1, keepdim=True), left - border).squeeze(1)
    return gaps.clamp_min(0), int((taken < border).sum())


def _routing(routing, disturbed, experts, config):
    """Gaps and yardstick of one layer's routing {token: expert ids}."""
    scores, groups = routing
    tokens = [token for token in experts if token < len(scores)]
    chosen = torch.from_numpy(np.stack([experts[token] for token in tokens])).long()
    chosen = chosen[:, : config.num_experts_per_tok]
    scores, groups = scores[tokens], groups[tokens]
    of_group = scores.shape[1] // groups.shape[1]
    # The groups that were used, and the best of the others: among their experts it chose.
    used = torch.zeros_like(groups, dtype=torch.bool).scatter(1, chosen // of_group, True)
    best = groups.topk(config.topk_group).values[:, -1:]
    group_gap = (best - groups).masked_fill(~used, -np.inf).amax(1)
    allowed = groups.masked_fill(used, np.inf).topk(config.topk_group).indices
    allowed = torch.zeros_like(used).scatter(1, allowed, True).repeat_interleave(of_group, 1)
    gap, _ = _gaps(scores.masked_fill(~allowed, -np.inf), chosen)
    gap[used.sum(1) > config.topk_group] = np.inf
    gap[(chosen.sort(1).values.diff(dim=1) == 0).any(1)] = np.inf
    errors = [(a - b)[tokens].abs().amax(1) for a, b in zip(routing, disturbed, strict=True)]
    return torch.maximum(gap, group_gap).numpy(), 2 * torch.maximum(*errors).numpy()


def _rounding(exact, disturbed, rows, dtype):
    """How much farther than a rounding the rows {position: [576]} are from exact [S, 576]; and
    the yardstick, by element.

    Rounding to nearest is off by the format's unit roundoff of a number at most, or by half
    the spacing next to 0 in e4m3, which has a scale for each group of latents.
    """
    positions = [position for position in rows if position < len(exact)]
    stored = torch.from_numpy(np.stack([rows[position] for position in positions]))
    exact, disturbed = exact[positions], disturbed[positions]
    allowed = exact.abs() * UNIT["bfloat16"]
    if dtype == "fp8_e4m3":
        groups = exact[:, :LATENT_DIM].abs().view(len(exact), -1, SCALE_GROUP)
        least = groups.amax(2, keepdim=True) / FP8_MAX * (E4M3_LEAST / 2)
        fp8 = torch.maximum(groups * UNIT[dtype], least).flatten(1)
        allowed = torch.cat([fp8, allowed[:, LATENT_DIM:]], 1)
    excess, error = (stored - exact).abs() - allowed, (disturbed - exact).abs()
    return excess.numpy().ravel(), error.numpy().ravel()


def scored(engine, prompts, new_tokens=8, start=0, donor=None):
    """Generate, and give compare()'s sequences. donor: the request a shared prefix is of."""
    outputs = engine.generate(prompts, max_new_tokens=new_tokens, start=start)
    rids = [output.rid for output in outputs]
    decisions = decisions_of(engine, rids + [donor] * bool(donor))
    sequences = []
    for prompt, output in zip(prompts, outputs, strict=True):
        own = decisions[output.rid]
        if donor:
            _take_prefix(own, decisions[donor], output.cached_tokens)
        logprobs = np.concatenate([output.prompt_logprobs, output.logprobs])
        sequences.append((prompt + output.token_ids, logprobs, own))
    return outputs, sequences


def _take_prefix(own: Decisions, donor: Decisions, cached: int) -> None:
    for kind in fields(Decisions):
        before = getattr(donor, kind.name)
        for layer, values in getattr(own, kind.name).items():
            for position in range(cached):
                values[position] = before[layer][position]


def write_model(directory: Path, **options) -> Path:
    return write_tiny_model(directory, TinyModelConfig(**options))
