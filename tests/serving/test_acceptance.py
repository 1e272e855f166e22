"""Drafts are accepted after retractions, prefix hits and chunks as often as without them.

The draft layer has a row for each slot, as the target has, so what keeps a slot keeps both.
"""

import pytest

from tests.mem_cache.test_retraction import FORCED, ROOMY, start
from tests.support import parity
from tests.support.drafts import eagle
from tests.support.retraction import Resume, Slots, events

EAGLE = eagle(4)
OPTIONS = EAGLE | dict(max_total_tokens=ROOMY)
PARAMS = [{"temperature": 0.0, "max_new_tokens": count} for count in FORCED[1]]


@pytest.fixture(scope="module", params=["v32", pytest.param("glm", marks=pytest.mark.slow)])
def model(request, tmp_path_factory):
    shape = dict(arch=request.param, index_topk=32, layers=3, mtp_layers=1, drafts="right")
    if request.param == "glm":
        shape |= dict(index_share_for_mtp_iteration=1)
    shape |= parity.NARROW | dict(hidden=256)
    return parity.write_model(tmp_path_factory.mktemp("models") / request.param, **shape)


def served(engine, prompts):
    """(tokens, verify steps) of each request."""
    outputs = engine.call("_generate_without_logprobs", prompts, PARAMS)
    return [(one.token_ids, one.meta["spec_verify_ct"]) for one in outputs]


@pytest.fixture(scope="module")
def undisturbed(model):
    """Of FORCED, first and as a prefix hit."""
    prompts = parity.prompts_of(FORCED[0])
    with start(model, **OPTIONS) as engine:
        found = served(engine, prompts)
        assert served(engine, prompts) == found, "a prefix hit starts from the same drafts"
        engine.flush()
        assert events(engine, Resume) == []
    steps = sum(count for _, count in found)
    assert steps < sum(FORCED[1]) / 1.5, "the drafts must be right for this test to be of use"
    return found


def disturbed(model, *patches):
    with start(model, "force", *patches, chunked_prefill_size=128, **OPTIONS) as engine:
        found = served(engine, parity.prompts_of(FORCED[0]))
        engine.flush()
        assert events(engine, Slots) == [Slots(total=ROOMY, free=ROOMY)]
        resumes = events(engine, Resume)
    assert len(resumes) > 10 and min(resume.cached for resume in resumes) > 0
    return found


def steps(found) -> int:
    return sum(count for _, count in found)


def test_retractions_and_chunks_cost_no_acceptance(model, undisturbed):
    """Retracted at every third step. A resume gives one token by itself: a step less, or none."""
    found = disturbed(model)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in undisturbed]
    assert steps(found) <= 1.03 * steps(undisturbed)


def test_a_lost_draft_row_costs_acceptance(model, undisturbed):
    """The control: a resume finds its slots' rows, and not those of the draft layer."""
    found = disturbed(model, "lose_draft_rows")
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in undisturbed]
    assert steps(found) > 1.1 * steps(undisturbed)
