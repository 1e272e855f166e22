"""A trained model's answers: right, those of one tier, and others once the hot tier errs."""

import numpy as np
import pytest

from benchmarks.serving.recall_changes import NONE, STALE, WRONG_BEST, WRONG_RANDOM
from sglang_ess.testing.recall.model import write_recall_model
from tests.support import recall

FEW, MANY = 2, 34  # documents; six questions each
COUNT = 200  # of the questions on MANY
RIGHT = 0.9  # of the questions about facts; quotes are right less often (docs/recall_model.md)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_recall_model(tmp_path_factory.mktemp("recall") / "model")


@pytest.fixture(scope="module")
def one_tier(model):
    with recall.engine(model, enabled=False) as served:
        yield served


@pytest.fixture(scope="module")
def two_tiers(model):
    with recall.engine(model, hot_ratio=0.1) as served:
        yield served


def facts_right(asked, found) -> float:
    """Share of right answers about facts."""
    kinds = [question.kind for document in asked for question in document.questions]
    pairs = zip(kinds, recall.right(asked, found), strict=True)
    return float(np.mean([right for kind, right in pairs if kind != "quote"]))


def faulty(served, asked, expected, faults) -> dict[str, int]:
    """Answers that each fault changes. Stale rows outlast their fault: they come last."""
    found = {}
    for fault in faults:
        with served.switched(fault=fault):
            answers = recall.answers(served, asked, f"{len(asked)} {fault}")
        found[fault] = int(np.sum(recall.changed(answers, expected)[:COUNT]))
    return found


def test_answers_are_right_those_of_one_tier_and_changed_by_faults(one_tier, two_tiers):
    asked = recall.documents(FEW)
    expected = recall.answers(one_tier, asked, "few")
    assert facts_right(asked, expected) >= RIGHT
    counts = faulty(two_tiers, asked, expected, (NONE, WRONG_BEST))
    assert counts[NONE] == 0
    assert counts[WRONG_BEST] >= 1


@pytest.mark.slow
def test_faults_change_many_of_200_answers(model):
    asked = recall.documents(MANY)
    with recall.engine(model, enabled=False) as served:
        expected = recall.answers(served, asked, "many")
    assert facts_right(asked, expected) >= RIGHT
    with recall.engine(model, hot_ratio=0.5) as served:
        counts = faulty(served, asked, expected, (NONE, WRONG_BEST, WRONG_RANDOM, STALE))
    print(counts)
    assert counts[NONE] == 0
    assert counts[WRONG_BEST] >= 20 and counts[STALE] >= 20
