"""Each GPU fetches all missed rows, or a share of them: seconds by hand, and where a share pays."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import Report
from sglang_ess.sim.inputs.specs import Link, Node, changed, load
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.fetch_ways import EACH, GATHER, PUSH, FetchWays, link_gb_s
from tools import shared_fetch as benchmark

PUBLISHED = Path(__file__).parents[2] / "results" / "shared_fetch.json"
# Round numbers: a row of 1000 bytes takes 20 ns on the link and 5 or 10 ns over NVLink.
NODE = Node(
    sockets=2, dram_gb_s=200, socket_gb_s=150, gather_us=30, gather_gb_s=200, push_us=9,
    push_gb_s=100,
)  # fmt: skip
LINK = Link(nominal_gb_s=64, gather_gb_s=50, scatter_gb_s=50)
FETCH = FetchWays(NODE, 50.0, 4, 1000)
US = 1e-6


def test_seconds_of_each_way_by_hand():
    """4000 rows of 4 GPUs: 80 us alone; 1000 rows of its own in 20 us, 3000 of the peers."""
    assert FETCH.each(4000) == pytest.approx(80 * US)
    assert FETCH.gather(4000) == pytest.approx((20 + 30 + 15) * US)
    assert FETCH.gather(4000, capacity=40_000) == pytest.approx((20 + 30 + 150) * US)
    assert FETCH.push(4000) == pytest.approx((9 + 30) * US)  # NVLink takes longer than the link
    quick = FetchWays(replace(NODE, push_gb_s=300), 50.0, 4, 1000)
    assert quick.push(4000) == pytest.approx((9 + 20) * US)  # the pushes hide behind the fetch
    many = np.array([0.0, 4000.0])
    for way in (EACH, GATHER, PUSH):
        found = getattr(FETCH, way)(many)
        assert found[0] == 0 and found[1] == pytest.approx(getattr(FETCH, way)(4000))


@pytest.mark.parametrize("way", [GATHER, PUSH])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_way_pays_from_where_it_is_as_fast_as_each(way, gpus):
    fetch = FetchWays(NODE, 50.0, gpus, 1000)
    rows = fetch.pays_from(way)
    seconds = getattr(fetch, way)
    assert seconds(rows) == pytest.approx(fetch.each(rows))
    assert seconds(0.9 * rows) > fetch.each(0.9 * rows)
    assert seconds(1.1 * rows) < fetch.each(1.1 * rows)


def test_thresholds_by_hand():
    """4 GPUs: a row costs 20 ns alone; 5 + 3.75 gathered; 7.5 pushed."""
    assert FETCH.pays_from(GATHER) == pytest.approx(30_000 / (20 - 8.75))
    assert FETCH.pays_from(PUSH) == pytest.approx(9_000 / (20 - 7.5))
    slow = FetchWays(replace(NODE, push_gb_s=30), 50.0, 4, 1000)
    assert slow.pays_from(PUSH) == float("inf")  # 25 ns a row
    with pytest.raises(ValueError, match="way must be gather or push: got 'each'"):
        FETCH.pays_from(EACH)


@pytest.mark.parametrize(
    ("gpus", "dram", "socket", "rate"),
    [
        (2, 200, 150, 50),  # the link
        (4, 160, 1, 40),  # one socket's memory; nothing crosses
        (8, 200, 150, 50),
        (8, 160, 150, 40),  # both sockets' memory
        (8, 200, 80, 40),  # half of 320 GB/s crosses, 80 in each direction
    ],
)
def test_memory_and_the_link_between_sockets_bound_the_links(gpus, dram, socket, rate):
    node = replace(NODE, dram_gb_s=dram, socket_gb_s=socket)
    assert link_gb_s(node, LINK, gpus, 8) == rate
    assert link_gb_s(node, LINK, gpus, 8, ratio=2.0) == rate / 2
    assert link_gb_s(node, replace(LINK, own_memory=True), gpus, 8) == 50


def test_a_step_of_a_rank_takes_the_seconds_of_a_push():
    node8 = load("deployment", "node-8")
    specs = load("model", "deepseek-v3.2"), load("gpu", "h200"), load("link", "pcie5")
    rank = changed(node8, tensor_parallel=8, overlap="off")
    each, share = (CostModel(*specs, changed(rank, share_fetch=on)) for on in (False, True))
    assert share.fetch_seconds(20_000) == share.fetch.push(20_000) < each.fetch_seconds(20_000)
    slow, fast = (model.step(77, 32768, 202.0).parts["transfer"] for model in (each, share))
    calibration = each.calibration
    hidden = 61 * (calibration.plan_us - calibration.early_us) * US
    assert slow == pytest.approx(61 * 77 * 202 * 656 / 37e9 * calibration.transfer_ratio + hidden)
    assert fast == pytest.approx(61 * (8.5 * US + 77 * 202 * 656 * 7 / 8 / 214e9) + hidden)
    alone = changed(node8, share_fetch=True, overlap="off")  # a rank of one GPU has no peers
    without = CostModel(*specs, changed(alone, share_fetch=False))
    assert CostModel(*specs, alone).fetch_seconds(99) == without.fetch_seconds(99)


def test_pcie_6_is_bound_by_the_memory_of_the_node():
    node = load("node", "hgx")
    rates = [link_gb_s(node, load("link", name), 8, 8) for name in benchmark.LINKS]
    assert rates == [20, 37, 46]  # 2 x 184 GB/s for 8 links


def test_the_result_file_is_what_the_model_gives():
    found, report = json.loads(PUBLISHED.read_text())["summary"], Report()
    benchmark.add_thresholds(report)
    for name, value in report.summary.items():
        assert found[name] == pytest.approx(value), name
    assert 500 < found["push_pays_from_tp8_pcie5"] < 600
