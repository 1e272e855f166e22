"""The published figures of index groups are what the planner gives today."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from sglang_ess.sim.planning.planner import Answer
from tools.plan_index_groups import EARLY, IN_TURN, answers

PUBLISHED = Path(__file__).parents[2] / "results" / "plan_index_groups.json"


@pytest.fixture(scope="module")
def found() -> dict[str, Answer]:
    asked = Namespace(gpu="h200", itl_ms=60.0, seed=0)
    return dict(answers("glm-5.2", 8, 131072, asked))


def test_the_result_file_is_what_the_planner_gives(found):
    summary = json.loads(PUBLISHED.read_text())["summary"]
    for fetches, word in ((EARLY, "early"), (IN_TURN, "in_turn")):
        answer = found[fetches]
        assert answer.gain == pytest.approx(summary[f"glm52_128k_gain_{word}"], rel=1e-6)
        transfer = answer.ess.parts["transfer"]
        assert transfer == pytest.approx(summary[f"glm52_128k_transfer_{word}"], rel=1e-6)


def test_early_fetches_pay(found):
    early, in_turn = found[EARLY], found[IN_TURN]
    assert early.helps and early.gain > in_turn.gain > 1
    assert early.ess.parts["transfer"] < 0.5 * early.ess.in_turn_ms
    assert early.one_tier == in_turn.one_tier
