"""The CUDA path at two ranks over one host tier, in real engines, gives one tier's output.

Rank 0 writes the rows of both; the canary compares each rank's hot rows with them at every step.
tests/mem_cache/test_pool_ranks.py shows what happens without the order of writes and reads.
"""

import pytest

from tests.serving.test_engine_cuda import MINIMUM, TOLERANCE, baseline, engine, script, worst
from tests.serving.test_engine_cuda import models as models
from tests.serving.test_engine_cuda import pytestmark as on_cpu

pytestmark = [pytest.mark.slow, on_cpu]
RANKS = {"tp_size": 2}


@pytest.mark.parametrize(
    ("shape", "mode", "ratio", "schedule"),
    [
        ("v32", "off", 0.2, "install_late"),
        ("v32", "off", MINIMUM, "install"),  # a step's new rows have no hot rows: ranks meet
        ("glm", "da", 0.2, "install"),
    ],
)
def test_two_ranks_give_the_output_of_one_tier(models, shape, mode, ratio, schedule):
    ess = {"hot_ratio": ratio, "overlap": mode, "canary_rate": 1.0}
    expected = baseline(models[shape], **RANKS)
    with engine(models[shape], ess, [schedule], **RANKS) as served:
        outputs, facts = script(served), served.call("_server_info")["ess"]
    assert (facts["node_host_tiers"], facts["host_tier_ranks"]) == (1, 2)
    assert worst(outputs, expected) < TOLERANCE
    assert mode != "off" or ratio == MINIMUM or worst(outputs, expected) == 0.0
