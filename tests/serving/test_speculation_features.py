"""What requests ask for, while drafts are verified over two tiers: as without drafts.

Drafts are right more often than not, so that what ends a request falls into the middle of a step.
"""

import pytest

from tests.support import parity
from tests.support.drafts import eagle
from tests.support.tier_scripts import engine

CONTEXT, WIDTH = 512, 4
SPEC = eagle(WIDTH)
PROMPTS = parity.prompts_of([200, 77, 130], seed=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(engine without drafts, engine with), both in two tiers."""
    shape = dict(arch="v32", layers=3, index_topk=32, context=CONTEXT, mtp_layers=1)
    shape |= parity.NARROW | dict(hidden=256, drafts="right")
    model = parity.write_model(tmp_path_factory.mktemp("model") / "tiny", **shape)
    args = dict(skip_tokenizer_init=False, max_total_tokens=4096)
    with engine(model, 0.1, **args) as plain, engine(model, 0.1, **args, **SPEC) as drafting:
        yield plain, drafting


def tokens(served, new_tokens=32, prompts=PROMPTS, **sampling):
    return [one.token_ids for one in served.generate(prompts, new_tokens, -1, **sampling)]


def both(pair, *args, **kwargs):
    plain, drafting = (tokens(served, *args, **kwargs) for served in pair)
    assert plain == drafting
    return plain


def test_several_tokens_a_step_are_accepted(pair):
    outputs = pair[1].generate(PROMPTS, 64, -1)
    verified = sum(one.meta["spec_verify_ct"] for one in outputs)
    assert sum(len(one.token_ids) for one in outputs) > 1.5 * verified


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 5, 32])
def test_the_length_asked_for(pair, new_tokens):
    assert all(len(one) == new_tokens for one in both(pair, new_tokens))


def test_a_stop_token_in_the_middle_of_a_chain(pair):
    free = tokens(pair[0])
    for at in range(3, 12):
        stop = free[0][at]
        found = both(pair, stop_token_ids=[stop], ignore_eos=False)
        assert found[0] == free[0][: free[0].index(stop) + 1]


def test_the_end_of_sequence_is_respected_and_delayed(pair):
    free = tokens(pair[0])
    stop = free[1][5]
    delayed = both(pair, stop_token_ids=[stop], min_new_tokens=8, ignore_eos=False)
    assert len(delayed[1]) >= 8


def test_grammar(pair):
    for found in both(pair, 24, regex="[ab]{3,8}c", ignore_eos=False):
        assert found


def test_penalties_and_bias(pair):
    both(pair, logit_bias={"65": 30.0}, new_tokens=12)


@pytest.mark.parametrize("room", [3, 5, 18])
def test_the_end_of_the_context(pair, room):
    """A step's slots lie beyond it. SGLang keeps as many tokens free."""
    (found,) = both(pair, room, parity.prompts_of([CONTEXT - WIDTH - room], seed=4))
    assert len(found) == room


@pytest.mark.parametrize(
    "sampling",
    [
        dict(top_k=1),
        dict(top_p=1e-6),
    ],
    ids=str,
)
def test_a_distribution_of_one_token_is_greedy(pair, sampling):
    """Through the sampler of a verify step, which greedy requests never reach."""
    greedy = tokens(pair[0])
    assert tokens(pair[1], temperature=1.0, **sampling) == greedy


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        dict(top_p=0.9, top_k=20),
        dict(min_p=0.1),
        dict(repetition_penalty=1.2, frequency_penalty=0.5),
        dict(sampling_seed=4),
    ],
    ids=str,
)
def test_every_way_to_sample_is_served(pair, sampling):
    found = tokens(pair[1], temperature=1.0, **sampling)
    assert all(len(one) == 32 for one in found)


def test_samples_follow_the_targets_distribution(pair):
    """The two tokens after a prompt, 400 times: as frequent as decoding one by one has them."""
    prompts, found = [PROMPTS[1]] * 400, []
    for served in pair:
        samples = [tuple(one) for one in tokens(served, 2, prompts, temperature=1.0)]
        found.append({one: samples.count(one) / len(samples) for one in set(samples)})
    plain, drafting = found
    frequent = sorted(plain, key=plain.get)[-3:]
    for one in frequent:
        assert abs(plain[one] - drafting.get(one, 0)) < 5 * (0.5 * 0.5 * 2 / 400) ** 0.5
