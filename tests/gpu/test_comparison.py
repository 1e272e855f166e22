"""What tests/support/exactness.py says of outputs that differ in one known way."""

import numpy as np
import pytest

from tests.support import exactness
from tests.support.engine import Output

NOTHING = exactness.Difference("noise", 8, 8, 0.0, 0.0, 0.0, "none")


def output(tokens=range(8), logprobs=None, prompt=(0.0, 1.0, 2.0, 3.0, 4.0)):
    values = np.linspace(-3, -2, 8) if logprobs is None else logprobs
    return Output("rid", list(tokens), np.array(values), np.array(prompt), 0, {})


def judge(found, exact=True, yardstick=NOTHING, dtype="bfloat16"):
    exactness.check_same(found, dtype, yardstick, exact)


def moved(by, at=3):
    values = output().logprobs.copy()
    values[at] += by
    return output(logprobs=values)


def test_equal_outputs_pass():
    found = exactness.differences({"a": [output()]}, {"a": [output()]})
    assert found[0].is_none and found[0].first == "none"
    judge(found)
    assert exactness.summary(found) == "1 of 1 requests bit for bit"


def test_a_difference_has_its_place():
    (found,) = exactness.differences({"a": [moved(0.01)]}, {"a": [output()]})
    assert (found.where, found.first, found.agreed) == ("a[0]", "output token 3", 8)
    assert found.worst == pytest.approx(0.01) and found.mean == pytest.approx(0.01 / 8)
    prompt = np.arange(5.0)
    prompt[2] = 9
    (found,) = exactness.differences({"a": [output(prompt=prompt)]}, {"a": [output()]})
    assert found.first == "prompt token 3" and found.prompt == 7


def test_rounding_passes_where_it_may():
    found = exactness.differences({"a": [moved(0.01)]}, {"a": [output()]})
    judge(found, exact=False)
    with pytest.raises(AssertionError, match="differ not at all"):
        judge(found, exact=True)
    found = exactness.differences({"retract": [moved(0.01)]}, {"retract": [output()]})
    judge(found, exact=True)  # computed in other batches


def test_more_than_rounding_is_refused():
    for by in (0.05, -0.05):
        found = exactness.differences({"a": [moved(by)]}, {"a": [output()]})
        with pytest.raises(AssertionError, match=r"a\[0\]: 8 of 8 tokens agree"):
            judge(found, exact=False)
    everywhere = output(logprobs=output().logprobs + 0.01)  # each within what is allowed once
    with pytest.raises(AssertionError, match="0.01 on average"):
        judge(exactness.differences({"a": [everywhere]}, {"a": [output()]}), exact=False)
    prompt = output(prompt=np.arange(5.0) + 1e-6)
    with pytest.raises(AssertionError):  # prompts are never in parts
        judge(exactness.differences({"a": [prompt]}, {"a": [output()]}), exact=False)


def test_what_follows_another_token_is_not_compared():
    """A tie turned over by rounding: both tokens have nearly one logprob."""
    tokens, values = [*range(6), 99, 98], output().logprobs.copy()
    values[6] += 0.003
    values[7] += 5
    (found,) = exactness.differences(
        {"a": [output(tokens=tokens, logprobs=values)]}, {"a": [output()]}
    )
    assert found.agreed == 6 and found.worst == pytest.approx(0.003)
    judge([found], exact=False)
    other = output(tokens=[99, *range(1, 8)])
    early = exactness.differences({"a": [other]}, {"a": [output()]})
    with pytest.raises(AssertionError, match="half of the tokens must be comparable: got 0 of 8"):
        judge(early, exact=False)


def test_the_yardstick_is_one_tier_against_itself():
    found = exactness.differences({"a": [moved(0.05)]}, {"a": [output()]})
    yardstick = exactness.noise({"single": [moved(0.03)], "pair": [output(), output()]})
    judge(found, exact=False, yardstick=yardstick)
    yardstick = exactness.noise({"single": [moved(0.1)], "pair": [output(), output()]})
    with pytest.raises(AssertionError, match="one tier must agree with itself"):
        judge(found, exact=False, yardstick=yardstick)


def test_the_first_layer_that_differs_is_named():
    calls = [("EXTEND", 0, [1, 2], None), ("DECODE", 0, [5, 6], [7, 8])]
    same = exactness.first_layer(calls, list(calls))
    assert same == "all 2 recorded calls are the same"
    output_differs = [calls[0], ("DECODE", 0, [5, 9], [7, 8])]
    assert exactness.first_layer(output_differs, calls) == (
        "call 1 (DECODE, 2 queries), layer 0, query 1: the same selection, another output"
    )
    selection_differs = [calls[0], ("DECODE", 0, [9, 6], [9, 8])]
    assert "query 0: another selection, another output" in exactness.first_layer(
        selection_differs, calls
    )
    assert "was another one" in exactness.first_layer(calls[:1], calls)
    assert exactness.first_layer([], calls) == "layers were not recorded"
