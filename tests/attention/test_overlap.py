"""OverlapPolicy: the cheapest mode by the measured table and the live misses."""

import json

import numpy as np
import pytest

from ess_kernels import hot_state
from sglang_ess.attention.overlap import GAIN, CostTable, Mode, OverlapPolicy

# ESS figure 7, digitised: overhead in us at batch 160, 128K, MTP 2.
MISSES = (32, 64, 128, 256, 512)
FIGURE_7 = {
    Mode.OFF: (38, 80, 168, 333, 674),
    Mode.DA: (29, 29, 21, 63, 421),
    Mode.DBA: (38, 36, 29, 34, 152),
}
TABLE = CostTable(
    batches=(1, 160),
    misses=MISSES,
    us={mode: (tuple(us / 80 for us in row), row) for mode, row in FIGURE_7.items()},
    empty_us=5.0,
    halving_us=0.0,
    source="ESS figure 7",
)
TOPK = 2048


def policy(misses, layers=4, table=TABLE, **options):
    """A policy that has seen steps with `misses` a query in each layer."""
    made = OverlapPolicy(layers, table, **options)
    counters = np.zeros((layers, hot_state.NUM_COUNTERS), np.int64)
    for _ in range(2):
        made.observe(counters, TOPK)
        counters[:, hot_state.LOOKUPS] += TOPK * 100
        counters[:, hot_state.MISSES] += np.asarray(misses) * 100
    return made


@pytest.mark.parametrize(
    ("misses", "mode"), [(32, Mode.DA), (128, Mode.DA), (256, Mode.DBA), (512, Mode.DBA)]
)
def test_the_papers_rule_follows_from_the_papers_figures(misses, mode):
    """DA while few rows miss, DBA where many do; the crossover lies between 128 and 256."""
    assert policy(misses).choose(160).mode is mode


def test_one_request_with_few_misses_is_left_alone():
    table = CostTable(
        (1, 160), MISSES,
        {mode: (tuple(us + 20 * (mode is not Mode.OFF) for us in row), row)
         for mode, row in FIGURE_7.items()},
        empty_us=5.0, halving_us=0.0, source="",
    )  # fmt: skip
    assert policy(32, table=table).choose(1).mode is Mode.OFF


def test_layers_are_chosen_for_one_by_one():
    """DBA pays for the sum; where splitting would cost a layer more, it does not split."""
    us = {
        Mode.OFF: ((10.0, 300.0),),
        Mode.DA: ((40.0, 200.0),),
        Mode.DBA: ((40.0, 50.0),),
    }
    table = CostTable((160,), (0, 500), us, empty_us=3.0, halving_us=1.0, source="")
    choice = policy([0, 500, 500, 0], table=table).choose(160)
    assert choice.mode is Mode.DBA
    assert choice.split.tolist() == [False, True, True, False]


def test_what_halving_costs_counts():
    table = CostTable(TABLE.batches, MISSES, TABLE.us, 5.0, halving_us=200.0, source="")
    assert policy(256, table=table).choose(160).mode is Mode.DA


def test_noise_does_not_change_the_mode():
    made = policy(128)
    assert made.choose(160).mode is Mode.DA
    made._misses = np.full(4, 156.5)  # DBA is cheaper now, by less than GAIN
    costs = {mode: TABLE.cost(mode, 160, made.misses).sum() for mode in Mode}
    assert (1 - GAIN) * costs[Mode.DA] < costs[Mode.DBA] < costs[Mode.DA]
    assert made.choose(160).mode is Mode.DA
    made._misses = np.full(4, 300.0)
    assert made.choose(160).mode is Mode.DBA


def test_misses_are_those_of_the_last_steps():
    made = policy(32, layers=1)
    assert made.misses.tolist() == [32.0]
    counters = np.array([[0, 0, 0, 0, 0, 0, 0]], np.int64)
    counters[0, : hot_state.MISSES + 1] = 200 * TOPK, 3200
    for _ in range(40):
        counters[0, : hot_state.MISSES + 1] += TOPK, 400
        made.observe(counters, TOPK)
    assert 380 < made.misses[0] <= 400
    made.observe(counters, TOPK)  # an idle server: nothing to learn
    assert 380 < made.misses[0] <= 400


def test_without_a_table_nothing_is_overlapped():
    assert OverlapPolicy(3, None).choose(64).mode is Mode.OFF
    assert OverlapPolicy(3, None, [Mode.DA]).choose(64).mode is Mode.DA  # the operator's word


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"overlap_costs": TABLE.as_dict()}))
    assert CostTable.read(path) == TABLE
    for text in ("", "{}", '{"overlap_costs": {"batches": [1]}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="must hold a cost table"):
            CostTable.read(path)
    broken = TABLE.as_dict()
    broken["us"] = broken["us"] | {"da": [[1.0] * 5]}
    path.write_text(json.dumps({"overlap_costs": broken}))
    with pytest.raises(ValueError, match="2 x 5 finite figures for da"):
        CostTable.read(path)


def test_one_of_several_ranks_chooses_only_what_it_announces():
    made = policy(256, ranks=2)
    assert made.choose(160).mode is Mode.OFF and made.announcement() is Mode.DBA
    made.agree(Mode.DA)  # as another rank wants it
    assert made.choose(160).mode is Mode.DA and made.announcement() is Mode.DBA
    made.agree(Mode.DBA)
    assert made.choose(160).mode is Mode.DBA and made.announcement() is None
    alone = policy(256)
    assert alone.choose(160).mode is Mode.DBA and alone.announcement() is None
