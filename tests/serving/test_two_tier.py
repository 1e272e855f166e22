"""Two tiers give one tier's output, bit for bit, whatever the hot tier's size.

Every engine of a comparison runs the same script of requests, admitted in the same batches
(tests/support/gather.py), with the same number of slots: only the place of the rows differs.
"""

import time

import numpy as np
import pytest

from sglang_ess.trace.trace import read_trace
from tests.support import parity
from tests.support.engine import EngineProcess

GATHER = "tests.support.gather:install"
EXPOSE = "tests.support.tiers:expose"
FAULT = "tests.support.two_tier_faults:"
SLOTS = 16384
SAMPLES = "samples"
MIN_ROWS = 64  # capacity.MIN_HOT_ROWS
RATIOS = {"all": 1.0, "quarter": 0.25, "tenth": 0.1, "minimum": MIN_ROWS / SLOTS}
SHAPES = {
    "v32": dict(arch="v32", index_topk=32, layers=3, **parity.NARROW),
    "glm": dict(arch="glm", index_topk=32, layers=5, sharing="FFSSS", **parity.NARROW),
}
FIRST_LAYERS = [0, 1]  # of glm's index groups
FORMATS = {"bf16": "bfloat16", "fp8": "fp8_e4m3"}
THREADS = {"v32": 1, "glm": None}  # None: as many as a server has


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    wide = SHAPES["glm"] | dict(index_topk=128)  # index groups of one layer and of three
    pairs = SHAPES["glm"] | dict(layers=6, sharing="FSFSFS")
    shapes = SHAPES | {"wide": wide, "pairs": pairs}
    return {name: parity.write_model(root / name, **shape) for name, shape in shapes.items()}


def engine(model, ratio=None, faults=(), ess=None, patches=(), **server_args):
    """One-tier without a ratio. float32, so that a wrong row cannot hide in rounding."""
    tiers = {"enabled": False} if ratio is None else {"hot_ratio": ratio, "canary_rate": 1.0}
    tiers |= {"admission": "off"}  # the same batches as one-tier, and so the same rounding
    return EngineProcess(
        model,
        ess={"index_dtype": "float32"} | tiers | (ess or {}),
        patches=[
            GATHER,
            *([EXPOSE] if ratio else []),
            *(FAULT + fault for fault in faults),
            *patches,
        ],
        **{"dtype": "float32", "max_total_tokens": SLOTS, "chunked_prefill_size": 512}
        | server_args,
    )


def script(served) -> dict[str, list]:
    """Outputs of a life of an engine: cold, shared prefixes, samples, aborts, reused slots."""
    lengths = [20, 33, 400, 1500, 640]  # below top-k, past it, several chunks
    prompts = parity.prompts_of(lengths)
    outputs = {"cold": served.together("cold", prompts, 16, start=0)}
    follow_ups = [prompt + tail for prompt in prompts[2:] for tail in ([1, 2, 3], [4] * 70)]
    outputs["shared"] = served.together("shared", follow_ups, 16)
    outputs[SAMPLES] = served.together("samples", [prompts[3]], 16, n=3)
    served.abort(parity.prompts_of([3000, 900], seed=2), 0.15, 500)  # in prefill, or soon after
    served.abort(parity.prompts_of([300, 90], seed=3), 0.5, 4000)  # in decode
    outputs["after aborts"] = served.together("after aborts", prompts[1:4], 16)
    served.flush()
    # Others' slots now, and their hot rows: SGLang hands out freed pages again.
    outputs["reused"] = served.together("reused", parity.prompts_of(lengths, 4), 16, start=0)
    outputs["again"] = served.together("again", parity.prompts_of([2500, 700], 5), 16)
    return outputs


def long_script(served) -> dict[str, list]:
    """One request of 8K tokens among short ones, then a prefix hit of 8K."""
    long, short = parity.prompts_of([8000, 100], seed=6)
    outputs = {"long": served.together("long", [long, short, short[:50]], 16)}
    return outputs | {"hit": served.together("hit", [long + short, short], 16)}


_baselines: dict = {}


def baseline(model, run, **server_args) -> dict[str, list]:
    """The one-tier server's outputs of a script; each is computed once.

    server_args: EngineProcess's
    """
    key = (model, run, tuple(sorted(server_args.items())))
    if key not in _baselines:
        with engine(model, **server_args) as served:
            _baselines[key] = run(served)
    return _baselines[key]


def differences(outputs, expected) -> list[float]:
    """Largest difference in logprobs of each request, prompt and output; inf: other tokens."""
    found = []
    for name in expected:
        for one, other in zip(outputs[name], expected[name], strict=True):
            if one.token_ids != other.token_ids:
                found.append(np.inf)
                continue
            pairs = [(one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)]
            difference = max(np.abs(a - b).max(initial=0) for a, b in pairs)
            # Samples get rids of SGLang's own, so their batches are not gathered.
            found.append(difference if name != SAMPLES or difference > 1e-5 else 0.0)
    return found


def all_same(outputs, expected) -> bool:
    return max(differences(outputs, expected)) == 0.0


FAST = [("v32", "bf16", "minimum"), ("glm", "fp8", "quarter")]


def grid():
    """Every architecture, row format and hot ratio. The fast suite takes FAST: glm's passes, in a
    tier as small as v32's here, are in test_index_groups.py.
    """
    for arch in SHAPES:
        for rows in FORMATS:
            for ratio in RATIOS:
                fast = (arch, rows, ratio) in FAST
                yield pytest.param(arch, rows, ratio, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("arch", "rows", "ratio"), grid())
def test_same_output(models, arch, rows, ratio):
    args = dict(kv_cache_dtype=FORMATS[rows], threads=THREADS[arch])
    expected = baseline(models[arch], script, **args)
    with engine(models[arch], RATIOS[ratio], **args) as served:
        outputs = script(served)
        counters = served.call("_hot_counters")
    assert all_same(outputs, expected)
    assert all(output.cached_tokens > 0 for output in outputs["shared"] + outputs[SAMPLES])
    misses = sum(layer["misses"] for layer in counters)
    assert (misses == 0) == (ratio == "all")


@pytest.mark.parametrize("ratio", ["tenth", pytest.param("minimum", marks=pytest.mark.slow)])
def test_same_output_at_8k(models, ratio):
    """A prompt longer than the whole hot tier."""
    expected = baseline(models["v32"], long_script)
    with engine(models["v32"], RATIOS[ratio]) as served:
        assert all_same(long_script(served), expected)


def test_a_query_larger_than_the_hot_tier(models):
    """Top-k 128 and 64 hot rows: passes, whose merging rounds, so transformers is the judge."""
    with engine(models["wide"], RATIOS["minimum"], patches=parity.PATCHES) as served:
        _, sequences = parity.scored(served, parity.prompts_of([129, 1500, 640]), new_tokens=16)
        counters = served.call("_hot_counters")
    parity.check(parity.compare(parity.EXACT, models["wide"], sequences).ratios())
    assert all(layer["misses"] > 0 for layer in counters)


def test_a_batch_of_more_than_one_plan(models):
    """70 requests: 64 queries are planned at once (layout.PLAN_QUERIES_CPU)."""

    def run(served):
        return {"many": served.together("many", parity.prompts_of([40] * 70), 8)}

    with engine(models["v32"]) as served:
        expected = run(served)
    with engine(models["v32"], 0.1) as served:
        assert all_same(run(served), expected)


@pytest.mark.parametrize(
    ("arch", "run"),
    [pytest.param("v32", script, marks=pytest.mark.slow), ("pairs", long_script)],
)
def test_same_output_while_rows_move_between_layers(models, arch, run):
    """Hot rows change their index group at random every few steps, checked before each."""
    expected = baseline(models[arch], run)
    patches = [GATHER, "tests.support.rebalances:at_random"]
    ess = {"index_dtype": "float32", "hot_ratio": 0.02, "canary_rate": 1.0, "admission": "off"}
    args = dict(dtype="float32", max_total_tokens=SLOTS, chunked_prefill_size=512)
    with EngineProcess(models[arch], ess=ess, patches=patches, **args) as served:
        assert all_same(run(served), expected)
        found = served.call("_rebalances")
    assert found["rebalances"] > 4 and found["rows_moved"] > 1000
    assert len(set(found["rows"])) > 1


@pytest.mark.slow
def test_warm_up_changes_misses_and_no_output(models):
    expected = baseline(models["v32"], script)
    misses = {}
    for warmup in ("on", "off"):
        # Small enough that prefill's own rows do not stay.
        with engine(models["v32"], 0.02, ess={"warmup": warmup}) as served:
            assert all_same(script(served), expected)
            misses[warmup] = sum(one["misses"] for one in served.call("_hot_counters"))
    assert misses["on"] < misses["off"]


@pytest.mark.parametrize(
    ("fault", "ratio"),
    [
        ("host_row_forgotten", "minimum"),  # noticed once the row is evicted
        ("stale_hot_row", "tenth"),
        ("one_row_for_two_slots", "tenth"),
        ("no_fetch", "tenth"),
    ],
)
def test_a_broken_invariant_is_noticed(models, fault, ratio):
    """Host first, no stale copy, one row each: broken one at a time; and a fetch left out."""
    expected = baseline(models["v32"], script)
    ess = {"canary_rate": 0.0}  # it would notice first: the next test
    with engine(models["v32"], RATIOS[ratio], [fault], ess) as served:
        found = differences(script(served), expected)
    assert max(found) > 1e-2


@pytest.mark.parametrize("fault", ["stale_hot_row", "no_fetch"])
def test_the_canary_stops_a_server_with_wrong_rows(models, fault):
    with engine(models["v32"], RATIOS["tenth"], [fault]) as served:
        with pytest.raises((RuntimeError, EOFError)):
            script(served)


def test_the_trace_is_what_the_indexer_selected(models, tmp_path):
    file = tmp_path / "topk.trace"
    patch = "tests.support.recorder:install"
    args = dict(dtype="float32", max_total_tokens=SLOTS)
    ess = {"hot_ratio": 0.1, "trace": str(file)}
    prompts = parity.prompts_of([40, 300])
    with EngineProcess(models["glm"], ess=ess, patches=[patch], **args) as served:
        outputs = served.generate(prompts, max_new_tokens=12)
        selections = served.selections()
        wait_for(lambda: len(list(read_trace(file))) == 2 * len(FIRST_LAYERS) * 11, seconds=20)
    rids = {output.rid for output in outputs}
    records = list(read_trace(file))
    assert {record.request_id for record in records} == rids
    for record in records:
        layer = FIRST_LAYERS[record.layer]  # a trace's layers are index groups
        selected = selections[record.request_id, layer][record.length - 1]
        assert np.array_equal(np.sort(selected), record.positions)


def wait_for(condition, seconds) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
