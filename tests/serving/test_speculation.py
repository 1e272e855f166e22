"""Speculative decoding over one tier and two: the tokens are those of decoding without drafts.

The oracle is SGLang without speculation, which the parity tests compare with transformers. With
speculation, two tiers give one tier's output bit for bit.
"""

import numpy as np
import pytest

from tests.support import parity
from tests.support.drafts import eagle, ngram
from tests.support.tier_scripts import RATIOS, all_same, baseline, differences, engine, script

SHAPES = {
    "v32": dict(arch="v32", layers=3),
    "v3": dict(arch="v3", layers=3),
    "glm": dict(arch="glm", layers=5, sharing="FFSSS"),
    "glm-one-list": dict(arch="glm", layers=5, sharing="FSFSS", index_share_for_mtp_iteration=1),
    "hy4": dict(arch="hy4", layers=4),
}
FORMATS = {
    "float32": {},
    "bf16": dict(kv_cache_dtype="bfloat16"),
    "fp8": dict(kv_cache_dtype="fp8_e4m3"),
}
TIE = 1e-3  # nats: closer than this, rounding may choose either token

DRAFTS = {f"{kind.__name__}{n}": kind(n) for kind in (eagle, ngram) for n in (2, 3, 4, 6)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes each model when it is first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(name):
        if name not in made:
            shape = SHAPES[name] | dict(index_topk=32, mtp_layers=1) | parity.NARROW
            made[name] = parity.write_model(root / name, **shape)
        return made[name]

    return model


def unequal(outputs, expected) -> list[tuple]:
    """Requests whose tokens differ, but for a choice that rounding may make either way."""
    found = []
    for name, ones in expected.items():
        for one, other in zip(ones, outputs[name], strict=True):
            pairs = zip(one.token_ids, other.token_ids, strict=True)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if first is not None and abs(one.logprobs[first] - other.logprobs[first]) > TIE:
                found.append((name, first, one.logprobs[first], other.logprobs[first]))
    return found


FAST = {("v32", "float32", "eagle4"): "quarter"}
REFUSED = {("hy4", "fp8")}  # by SGLang, beside attention sinks


def grid():
    for arch in SHAPES:
        for rows in FORMATS:
            for drafts in DRAFTS:
                if (arch, rows) not in REFUSED:
                    fast = (arch, rows, drafts) in FAST
                    yield pytest.param(arch, rows, drafts, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("arch", "rows", "drafts"), grid())
def test_same_tokens_as_without_drafts_and_same_bits_in_two_tiers(models, arch, rows, drafts):
    """Chunks, shared prefixes, n samples, aborts and reused slots: tier_scripts.script."""
    model, args = models(arch), FORMATS[rows]
    plain = baseline(model, script, **args)
    one_tier = baseline(model, script, **args, **DRAFTS[drafts])
    assert unequal(one_tier, plain) == []
    # Hy4 in one pass: what its sinks leave of a head is rounded by vectors of as many queries.
    ratio = RATIOS[FAST.get((arch, rows, drafts), "quarter" if arch == "hy4" else "minimum")]
    with engine(model, ratio, **args, **DRAFTS[drafts]) as served:
        outputs = script(served)
        counters = served.call("_hot_counters")
    # NGRAM learns from aborted requests too, whose lengths are a matter of time: so are its drafts
    # from then on, and with them the batches.
    early = [name for name in one_tier if "ngram" not in drafts or name in ("cold", "shared")]
    assert all_same(outputs, {name: one_tier[name] for name in early})
    assert unequal(outputs, plain) == []
    assert max(differences(outputs, one_tier)) < TIE
    assert all(one.cached_tokens > 0 for one in outputs["shared"])
    assert all(group["misses"] > 0 for group in counters)
    met = [one.meta for ones in outputs.values() for one in ones]
    assert all(meta["spec_verify_ct"] > 0 for meta in met)


@pytest.mark.parametrize("shape", ["v32", pytest.param("glm", marks=pytest.mark.slow)])
def test_rows_fetched_ahead_change_no_bit(models, shape):
    """Every plan's rows are compared with their host rows (canary_rate 1)."""
    model, drafts = models(shape), DRAFTS["eagle4"]
    expected = baseline(model, script, **drafts)
    with engine(model, RATIOS["tenth"], ess={"early_fetch": 4}, **drafts) as served:
        assert all_same(script(served), expected)
        counters = served.call("_hot_counters")
    early, used = (sum(group[name] for group in counters) for name in ("early", "early_used"))
    assert 0 < used < early, counters


@pytest.mark.slow
def test_a_wrong_row_fetched_ahead_is_noticed(models):
    drafts, ess = DRAFTS["eagle4"], {"early_fetch": 4, "canary_rate": 0.0}
    expected = baseline(models("v32"), script, **drafts)
    wrong = ["wrong_row_ahead"]
    with engine(models("v32"), RATIOS["minimum"], wrong, ess, **drafts) as served:
        assert max(differences(script(served), expected)) > 1e-2


@pytest.mark.parametrize(
    ("fault", "ratio"),
    [
        ("rejected_row_stays_hot", "tenth"),
        pytest.param("drafts_write_the_targets_rows", "minimum", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_row_is_noticed(models, fault, ratio):
    """A rejected draft's row read as its successor's, and a draft layer's as the target's."""
    model, drafts = models("v32"), DRAFTS["eagle4"]
    expected = baseline(model, script, **drafts)
    with engine(model, RATIOS[ratio], [fault], {"canary_rate": 0.0}, **drafts) as served:
        assert max(differences(script(served), expected)) > 1e-2
    with engine(model, RATIOS["tenth"], [fault], **drafts) as served:  # rows stay hot, and differ
        with pytest.raises((RuntimeError, EOFError)):
            script(served)


def test_a_verify_step_is_one_step_of_the_hot_tier(models):
    """However many queries it has: ages, and the figures that divide by steps, count it once."""
    prompt = parity.prompts_of([300])
    with engine(models("v32"), RATIOS["minimum"], **DRAFTS["eagle4"]) as served:
        (output,) = served.generate(prompt, 40)
        counters = served.call("_hot_counters")
    assert {group["steps"] for group in counters} == {output.meta["spec_verify_ct"]}
    lookups = {group["lookups"] for group in counters}
    assert lookups == {4 * 32 * output.meta["spec_verify_ct"]}


def test_logprobs_do_not_change(models):
    prompts = parity.prompts_of([200, 77], seed=3)
    with engine(models("v32")) as plain, engine(models("v32"), 0.05, **DRAFTS["eagle4"]) as found:
        for one, other in zip(
            plain.generate(prompts, 20), found.generate(prompts, 20), strict=True
        ):
            np.testing.assert_allclose(other.logprobs, one.logprobs, atol=1e-4)
            np.testing.assert_allclose(other.prompt_logprobs, one.prompt_logprobs, atol=1e-4)
