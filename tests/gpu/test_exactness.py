"""Two tiers give one tier's logprobs on a GPU: row formats, overlap, graphs, hits, retraction.

The same tests run on the CPU platform, and there on the CUDA path under Triton's interpreter
(tests/support/device_tier.py), so that what runs on a GPU has run before. Requests, comparison
and its tolerance: tests/support/exactness.py. Engines: tests/support/exactness_lab.py.
"""

import pytest
import torch

from tests.support import exactness
from tests.support.exactness_lab import DEVICE, Case

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NO_FETCH = DEVICE + "no_fetch"
# In the order of what each would tell. Without a canary nothing waits between two steps.
ON_A_GPU = [
    Case("ess off"),
    Case("ess off", graphs="eager"),
    Case("ess dba", canary_rate=0.0),
    Case("ess off", "bf16"),
    Case("ess da"),
    Case("ess dba", "bf16", canary_rate=0.0),
    Case("ess dba", graphs="eager"),
    Case("ess passes"),
    Case("ess resident"),
    Case("ess da", "bf16"),
    Case("ess dba", "bf16", "eager"),
    Case("ess dba", graphs="all graphs"),
    Case("ess passes", "bf16"),
]


def on(host, cases, *marks):
    return [pytest.param(host, case, marks=marks, id=f"{host}: {case.name}") for case in cases]


def answered(labs, host, case):
    """(result, baseline) of a case."""
    results = labs(host).result(case), labs(host).result(case.baseline)
    for result in results:
        assert not result.error, f"{result.case.name} must give outputs: got {result.error}"
    return results


def check(labs, host, case) -> None:
    result, expected = answered(labs, host, case)
    found = exactness.differences(result.outputs, expected.outputs)
    yardstick = exactness.noise(expected.outputs)
    print(f"{host}: {case.name}: {exactness.summary(found)}; {yardstick}")
    try:
        exactness.check_same(found, labs(host).host.dtype, yardstick, case.is_exact)
    except AssertionError as error:
        raise AssertionError(
            f"{case.name}: {error}\n{exactness.first_layer(result.layers, expected.layers)}"
        ) from None


@pytest.mark.parametrize(
    ("host", "case"),
    [
        *on("cuda", ON_A_GPU, *GPU),
        *on("cpu", [Case("ess off")]),
        *on("cpu", [Case("ess resident", "bf16")], pytest.mark.slow),
        *on("spawned", [Case("ess off", graphs="eager")], pytest.mark.slow),
        *on(
            "interpreted",
            [Case("ess dba", "bf16"), Case("ess passes")],
            pytest.mark.slow,
        ),
    ],
)
def test_one_tiers_logprobs(labs, host, case):
    result, _ = answered(labs, host, case)
    check(labs, host, case)
    resident = case.system == "ess resident"
    for output in result.outputs["shared"] + result.outputs["single"]:
        assert output.cached_tokens > 0
    assert sum(o.meta["num_retractions"] for o in result.outputs[exactness.RETRACT]) > 0
    for layer in result.counters:
        assert layer.get("short", 0) == 0 and layer["lookups"] > 0
        assert (layer["misses"] == 0) == (layer["evictions"] == 0) == resident
    if "merge" in result.counters[0]:
        calls, mode = result.counters[0], case.system.removeprefix("ess ")
        assert (calls["merge"] > 0) == (mode in ("da", "dba", "passes"))
        assert (calls["plan_half"] > 0) == (mode in ("dba", "passes"))
        assert (calls["in_passes"] > 0) == (mode == "passes")


@pytest.mark.parametrize(
    ("host", "case"),
    [
        *on("cuda", [Case("ess passes", "bf16", patch=NO_FETCH, canary_rate=0.0)], *GPU),
        *on(
            "interpreted",
            [Case("ess passes", patch=NO_FETCH, canary_rate=0.0)],
            pytest.mark.slow,
        ),
        *on(
            "cpu",
            [Case("ess off", patch="tests.support.two_tier_faults:no_fetch", canary_rate=0.0)],
        ),
    ],
)
def test_a_fault_is_noticed(labs, host, case):
    """By what judges the engines above, where it judges by rounding too."""
    with pytest.raises(AssertionError, match="logprobs must differ"):
        check(labs, host, case)


@pytest.mark.parametrize(
    ("host", "broken"),
    [
        *on("cuda", [Case("ess off", patch=NO_FETCH)], *GPU),
        *on("spawned", [Case("ess off", patch="tests.support.two_tier_faults:no_fetch")],
            pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_canary_stops_an_engine_with_wrong_rows(labs, host, broken):
    error = labs(host).result(broken).error
    assert "hot row must equal its host row" in error
