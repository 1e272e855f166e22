"""--ess-trace-scores in a server: each score is what float64 makes of the stored index keys."""

import time
from typing import NamedTuple

import numpy as np
import pytest

from sglang_ess.trace.trace import Record, read_trace
from tests.support import parity, scored
from tests.support.drafts import eagle
from tests.support.engine import EngineProcess
from tests.support.tier_scripts import SLOTS

TOPK, RUNNER_UPS, TOKENS = 32, 24, 12
SHAPES = {
    "v32": dict(arch="v32", layers=3),
    "glm": dict(arch="glm", layers=5, sharing="FFSSS"),
}
FIRST_LAYERS = {"v32": [0, 1, 2], "glm": [0, 1]}  # of the index groups, which a trace calls layers
ROWS = {"float32": dict(dtype="float32"), "bf16": dict(kv_cache_dtype="bfloat16"),
        "fp8": dict(kv_cache_dtype="fp8_e4m3")}  # fmt: skip
# Model, rows, index keys, queries a request
CASES = [("glm", "fp8", "fp8", 3), ("v32", "bf16", "fp8", 1), ("v32", "float32", "float32", 4),
         ("glm", "bf16", "float32", 1)]  # fmt: skip


class Case(NamedTuple):
    records: list[Record]
    right: list  # of scored.read
    layers: list[int]


def run(root, arch, rows, keys, width, patches=("install",)) -> Case:
    shape = SHAPES[arch] | dict(index_topk=TOPK, mtp_layers=1) | parity.NARROW
    model = parity.write_model(root / "model", **shape)
    trace = root / "t.trace"
    ess = dict(hot_ratio=0.1, index_dtype=keys, trace=str(trace), trace_scores=RUNNER_UPS)
    args = ROWS[rows] | (eagle(width) if width > 1 else {}) | dict(max_total_tokens=SLOTS)
    named = [f"tests.support.scored:{name}" for name in patches]
    with EngineProcess(model, ess=ess, patches=named, **args) as served:
        served.generate(parity.prompts_of([20, 50, 300]), max_new_tokens=TOKENS)
        right, deadline = scored.read(f"{trace}.scores"), time.monotonic() + 20
        while len(list(read_trace(trace))) < len(right):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    return Case(list(read_trace(trace)), right, FIRST_LAYERS[arch])


def wrong(case: Case) -> int:
    """Records whose scores are not those of their positions, or not the best ones."""
    assert len(case.records) == len(case.right)
    found = 0
    for record, (layer, rid, length, right) in zip(case.records, case.right, strict=True):
        assert (case.layers[record.layer], record.request_id, record.length) == (layer, rid, length)
        assert len(record.positions) == min(length, TOPK)
        assert len(record.runner_ups) == min(length, TOPK + RUNNER_UPS) - len(record.positions)
        slack = 2.0**-11 * np.abs(right).max()  # the bytes', and float32's of the sum
        chosen = np.concatenate([record.positions, record.runner_ups])
        in_list, below = np.split(right[chosen], [len(record.positions)])
        rest = np.delete(right, chosen)
        found += not (
            len(set(chosen.tolist())) == len(chosen) == len(record.scores)
            and (np.abs(record.scores - right[chosen]) <= slack).all()
            and in_list.min() >= below.max(initial=-np.inf) - slack
            and below.min(initial=np.inf) >= rest.max(initial=-np.inf) - slack
        )
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with index groups, verify steps and fp8 keys."""
    return run(tmp_path_factory.mktemp("scores"), *CASES[0])


def test_scores_are_those_of_float64(served):
    assert wrong(served) == 0
    lengths = [record.length for record in served.records]
    assert min(lengths) < TOPK < TOPK + RUNNER_UPS < max(lengths)
    spread = np.array(
        [np.ptp(record.scores) / np.abs(record.scores).max() for record in served.records]
    )
    assert (spread > 0.01).mean() > 0.9  # scores of one value would say nothing


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:]])
def test_scores_of_other_models_and_formats(tmp_path, case):
    assert wrong(run(tmp_path, *case)) == 0


def shifted(records):
    return [r._replace(scores=np.roll(r.scores, 1)) for r in records]


def of_the_query_before(records):
    before = records[-1:] + records[:-1]
    return [r._replace(scores=b.scores) for r, b in zip(records, before, strict=True)]


def other_runner_ups(records):
    """Positions that came after rank k + m."""

    def rest(r):
        chosen = np.concatenate([r.positions, r.runner_ups])
        return np.setdiff1d(np.arange(r.length), chosen)[: len(r.runner_ups)]

    return [r if r.length < 300 else r._replace(runner_ups=rest(r)) for r in records]


@pytest.mark.parametrize("fault", [shifted, of_the_query_before, other_runner_ups])
def test_a_fault_in_a_trace_is_noticed(served, fault):
    assert wrong(served._replace(records=fault(served.records))) > len(served.records) / 4


@pytest.mark.slow
def test_a_fault_in_the_server_is_noticed(tmp_path):
    case = run(tmp_path, *CASES[0], patches=("install", "shift_scores"))
    assert wrong(case) > len(case.records) / 2
