"""benchmarks/sim/beat_ess.py on curves of a closed form: the steps of the gain, and their basis."""

import numpy as np
import pytest

from benchmarks.sim.beat_ess import MIN_ROWS, QUERIES, Setting
from benchmarks.sim.published import BASELINES, K
from sglang_ess.sim.model.locality import Locality
from sglang_ess.tiers.balance.ghost_cache import MissCurve

LOCALITY = Locality.load("deepseek-v3.2")
ROWS = np.array([2048, 3000, 4500, 6500, 9000, 13000, 20000, 32768])


def curves(scales):
    return [
        MissCurve(tuple(ROWS), tuple(s * 4000 * np.exp(-ROWS / 2000)), 4096.0, 0, 1) for s in scales
    ]


UNEQUAL = curves(np.geomspace(0.1, 4, 61))


def setting(charges="paper", lines=UNEQUAL):
    return Setting(LOCALITY, 32 * K, charges, lines)


@pytest.fixture(scope="module")
def found():
    return {charges: setting(charges).steps() for charges in ("paper", "ours")}


def test_the_baseline_is_the_papers():
    base = next(row for row in BASELINES if (row.context, row.queries) == (32 * K, QUERIES))
    assert setting().baseline == pytest.approx(base.throughput, rel=0.01)


def test_each_step_is_at_least_the_one_before(found):
    for steps in found.values():
        values = [point.tokens_per_s for point in steps.values()]
        # Batches come in steps of 1 %, so a best one may lie between two of them.
        assert (np.diff(values) >= -0.01 * values[0]).all()
        assert values[-1] > 1.05 * values[0]


def test_our_own_memory_never_gains_more(found):
    for name, point in found["ours"].items():
        assert point.tokens_per_s <= found["paper"][name].tokens_per_s


def test_what_is_chosen_fits_the_memory(found):
    for charges, steps in found.items():
        one = setting(charges)
        for point in steps.values():
            assert sum(point.budgets) <= point.rows * 61
            rows = point.batch * sum(point.budgets) / 61
            assert one.memory.device_used(point.batch, 32 * K, rows) <= one.memory.device_bytes
            assert point.rows >= MIN_ROWS * 2048


def test_budgets_miss_less_than_equal_rows_where_layers_differ():
    one = setting()
    by_layer, same = one.at(160, "layerwise", one.curves), one.at(160, "layerwise", None)
    assert by_layer.misses.sum() < 0.9 * same.misses.sum()
    alike = setting(lines=curves(np.ones(61)))
    assert alike.at(160, "layerwise", alike.curves).misses.sum() == pytest.approx(
        alike.at(160, "layerwise", None).misses.sum(), rel=0.02
    )


def test_misses_that_something_hides_cost_next_to_nothing():
    one = setting()
    exposed = one.exposed_curves(160)[-1]
    costs = np.array(exposed.misses)
    assert costs[-1] < 1 and costs[0] > 100  # us: of a few misses, of thousands
    assert (np.diff(costs) <= 0).all()
