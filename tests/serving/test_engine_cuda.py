"""The CUDA path inside a real engine gives one tier's output: every mode, size and schedule.

Its kernels run on the CPU, a GPU's two streams as one of two extremes; see
tests/support/device_tier.py for what is real here and what stands in.
"""

import numpy as np
import pytest
import torch

from tests.support import parity
from tests.support.drafts import eagle
from tests.support.engine import EngineProcess

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the kernels are compiled, not interpreted"
)

DEVICE = "tests.support.device_tier:"
PATCHES = ["tests.support.gather:install", "tests.support.tiers:expose"]
SLOTS, CHUNK, CONTEXT = 1024, 128, 512
MINIMUM = 64 / SLOTS  # capacity.MIN_HOT_ROWS
SHAPES = {
    "v32": dict(arch="v32", index_topk=16),
    "glm": dict(arch="glm", index_topk=16, layers=4, sharing="FFSS"),  # groups of 1 and 3 layers
    "wide": dict(arch="v32", index_topk=96),  # wider than the smallest hot tier
    "mtp": dict(arch="v32", index_topk=16, mtp_layers=1),
    "glm mtp": dict(
        arch="glm", index_topk=16, layers=4, sharing="FFSS", mtp_layers=1,
        index_share_for_mtp_iteration=1,
    ),
}  # fmt: skip
DRAFTS = eagle(3)
TOLERANCE = 1e-5  # float32; parts merged by log-sum-exp are summed in another order


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    small = dict(layers=2, heads=2, hidden=64, context=CONTEXT)
    return {name: parity.write_model(root / name, **small | one) for name, one in SHAPES.items()}


def engine(model, ess, patches=(), **server_args):
    return EngineProcess(
        model,
        ess={"index_dtype": "float32", "admission": "off"} | ess,
        patches=[*PATCHES, *(patch if ":" in patch else DEVICE + patch for patch in patches)],
        **{"dtype": "float32", "max_total_tokens": SLOTS, "chunked_prefill_size": CHUNK}
        | server_args,
    )


def short_script(served) -> dict[str, list]:
    """A chunked prompt, longer than a small hot tier, with a short one; prefix hits."""
    prompts = parity.prompts_of([300, 20])
    outputs = {"cold": served.together("cold", prompts, 4, start=0)}
    # 300 rows of prefix, twice, are more than a staging buffer holds: two groups of one batch.
    outputs["shared"] = served.together("shared", [prompts[0] + [1], prompts[0] + [2] * 9], 4)
    return outputs


def script(served) -> dict[str, list]:
    """Then a longer one; reused slots, six requests at a time."""
    outputs = short_script(served)
    outputs["longer"] = served.together("longer", parity.prompts_of([450], 2), 3)
    served.flush()
    # Others' slots now, and more than one pass of a small hot tier.
    outputs["reused"] = served.together("reused", parity.prompts_of([40] * 4 + [90, 17], 3), 3)
    return outputs


_baselines: dict = {}


def baseline(model, script=script, **server_args) -> dict[str, list]:
    """The one-tier server's outputs; each is computed once."""
    key = (model, script, tuple(sorted(server_args.items())))
    if key not in _baselines:
        with EngineProcess(
            model,
            ess={"index_dtype": "float32", "enabled": False},
            patches=PATCHES[:1],
            **{"dtype": "float32", "max_total_tokens": SLOTS, "chunked_prefill_size": CHUNK}
            | server_args,
        ) as served:
            _baselines[key] = script(served)
    return _baselines[key]


def worst(outputs, expected) -> float:
    """Largest difference in logprobs, prompt and output; inf: other tokens."""
    found = [0.0]
    for name in expected:
        for one, other in zip(outputs[name], expected[name], strict=True):
            if one.token_ids != other.token_ids:
                return np.inf
            for a, b in (
                (one.logprobs, other.logprobs),
                (one.prompt_logprobs, other.prompt_logprobs),
            ):
                found.append(np.abs(a - b).max(initial=0))
    return max(found)


def run(
    model, mode, ratio, patches, canary=1.0, warmup="on", script=script, **server_args
):  # fmt: skip
    """(outputs, counters of each layer) of a two-tier engine."""
    ess = {"hot_ratio": ratio, "overlap": mode, "canary_rate": canary, "warmup": warmup}
    with engine(model, ess, patches, **server_args) as served:
        return script(served), served.call("_hot_counters")


def check(outputs, expected, counters, mode, ratio) -> None:
    assert worst(outputs, expected) < TOLERANCE
    if mode == "off" and ratio > MINIMUM:
        assert worst(outputs, expected) == 0.0
    assert all(output.cached_tokens > 0 for output in outputs["shared"])
    seen = counters[0]
    assert seen["groups"] == 2
    assert (seen["plan_half"] > 0) == (mode == "dba")
    assert (seen["merge"] > 0) == (mode != "off")
    for layer in counters:
        assert layer["short"] == 0 and layer["lookups"] > 0
        assert (layer["misses"] == 0) == (ratio == 1.0)


@pytest.mark.parametrize(
    ("mode", "ratio", "schedule"),
    [
        ("dba", 0.2, "install_late"),
        ("off", 0.2, "install_late"),
        pytest.param("off", 1.0, "install", marks=pytest.mark.slow),
    ],
)
def test_same_output(models, mode, ratio, schedule):
    expected = baseline(models["v32"], short_script)
    outputs, counters = run(models["v32"], mode, ratio, [schedule], script=short_script)
    check(outputs, expected, counters, mode, ratio)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["install", "install_late"])
@pytest.mark.parametrize("ratio", [1.0, 0.2, MINIMUM])
@pytest.mark.parametrize("mode", ["off", "da", "dba"])
def test_same_output_everywhere(models, mode, ratio, schedule):
    outputs, counters = run(models["v32"], mode, ratio, [schedule])
    check(outputs, baseline(models["v32"]), counters, mode, ratio)
    assert (counters[0]["in_passes"] > 0) == (ratio == MINIMUM)


@pytest.mark.parametrize(
    ("shape", "mode", "ratio"),
    [
        ("mtp", "dba", 0.2),
        pytest.param("mtp", "off", 0.2, marks=pytest.mark.slow),
        pytest.param("mtp", "da", 0.2, marks=pytest.mark.slow),
        pytest.param("mtp", "off", MINIMUM, marks=pytest.mark.slow),
        pytest.param("glm mtp", "off", 0.2, marks=pytest.mark.slow),
        pytest.param("glm mtp", "dba", 0.2, marks=pytest.mark.slow),
    ],
)
def test_drafts_are_verified_as_by_one_tier(models, shape, mode, ratio):
    """In the smallest tier a request's three lists of 16 are a pass, and two requests' are not."""
    expected = baseline(models[shape], short_script, **DRAFTS)
    outputs, counters = run(
        models[shape], mode, ratio, ["install_late"], script=short_script, **DRAFTS
    )
    check(outputs, expected, counters, mode, ratio)
    assert (counters[0]["in_passes"] > 0) == (ratio == MINIMUM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "mode", "rows", "patches"),
    [
        # 96 lookups a query, 64 hot rows
        pytest.param("wide", "da", "auto", ["install_late"], id="query wider than the tier"),
        pytest.param("glm", "dba", "fp8_e4m3", ["install_late"], id="glm fp8"),
        pytest.param("v32", "dba", "auto", ["install", "triton_attention"], id="Triton attention"),
    ],
)
def test_other_shapes_and_formats(models, shape, mode, rows, patches):
    wide = shape == "wide"
    args = dict(kv_cache_dtype=rows, script=short_script)
    expected = baseline(models[shape], **args)
    ratio = MINIMUM if wide else 0.2
    args["warmup"] = "off" if wide else "on"  # a plan for each half query: minutes here
    outputs, counters = run(models[shape], mode, ratio, patches, **args)
    assert (counters[0]["in_passes"] > 0) == wide
    assert worst(outputs, expected) < TOLERANCE
    assert all(layer["misses"] > 0 and layer["short"] == 0 for layer in counters)


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        pytest.param("da", "attention_does_not_wait", marks=pytest.mark.slow),
        pytest.param("off", "staging_does_not_wait", marks=pytest.mark.slow),
        pytest.param("off", "slots_are_not_copied", marks=pytest.mark.slow),
        pytest.param("off", "a_prefix_is_taken_for_a_range", marks=pytest.mark.slow),
        pytest.param("off", "new_rows_stay_cold", marks=pytest.mark.slow),
        pytest.param("dba", "no_fetch", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_noticed(models, mode, fault):
    name, args = models["v32"], dict(script=script)
    if fault == "attention_does_not_wait":
        args = dict(script=short_script)
    outputs, _ = run(name, mode, 0.2, ["install_late", fault], canary=0.0, **args)
    assert worst(outputs, baseline(name, **args)) > 1e-2


@pytest.mark.slow
def test_the_canary_stops_an_engine_with_wrong_rows(models):
    with pytest.raises((RuntimeError, EOFError)):
        run(models["v32"], "off", 0.2, ["install_late", "no_fetch"])
