"""Two tiers over a long time: memory pressure, retraction, aborts, prefix hits, slot reuse."""

import pytest

from tests.support import parity
from tests.support.drafts import eagle, ngram
from tests.support.engine import EngineProcess
from tests.support.retraction import Resume, Slots, events

PATCHES = [
    "tests.support.retraction:record",
    "tests.support.soak:install",
    "tests.support.tiers:expose",
]
SHAPE = dict(arch="v32", index_topk=32, layers=2)
ARGS = dict(max_total_tokens=3840, schedule_conservativeness=0.0, chunked_prefill_size=512)
WIDTH = 4
EAGLE = eagle(WIDTH)
# A small corpus: SGLang's default takes 2 GiB, and grows by some 29 MiB in 100 of these requests.
NGRAM = ngram(WIDTH) | dict(speculative_ngram_capacity=20_000)
TIE = 1e-3  # nats: closer than this, rounding may choose either token


def soaked(model, count, canary_rate, index_dtype="fp8", **args):
    """Run `count` requests, check what is left of them, and give soak.Soaked.

    SGLang's own leak check is on, at every step (tests/support/retraction.py). A canary that finds
    a hot row unlike its host row ends the engine.
    """
    ess = {"hot_ratio": 0.1, "canary_rate": canary_rate, "index_dtype": index_dtype}
    with EngineProcess(model, ess=ess, patches=PATCHES, **ARGS, **args) as engine:
        result = engine.call("_soak", count, 1, seconds=100 + 2 * count)
        assert result.finished + result.aborted == count
        assert result.incomplete == 0
        assert result.aborted > count // 20
        resumes = events(engine, Resume)
        print({**vars(result), "answers": len(result.answers)}, f"{len(resumes)} resumes")
        assert len(resumes) > count // 100, "no memory pressure: the test is of no use"
        # How many depends on timing: what is short of memory evicts short prompts whole.
        assert any(resume.cached > 0 for resume in resumes)
        before = engine.call("_hot_counters")
        assert all(layer["evictions"] > 0 for layer in before)
        engine.flush()
        (slots,) = set(events(engine, Slots))  # each rank's
        assert slots.free == slots.total
        assert [layer["occupied"] for layer in engine.call("_hot_counters")] == [0, 0]
        if count >= 1000:  # the first tenths fill caches and buffers
            assert max(result.rss_mib[3:]) - result.rss_mib[2] < 64
    return result


@pytest.mark.slow
@pytest.mark.parametrize("count", [150, 2000])
def test_soak(tmp_path, count):
    soaked(parity.write_model(tmp_path / "m", **SHAPE, heads=4), count, 0.1)


@pytest.mark.slow
def test_soak_with_drafts_in_bfloat16(tmp_path):
    shape = SHAPE | dict(heads=4, mtp_layers=1, drafts="right")
    soaked(parity.write_model(tmp_path / "m", **shape), 150, 1.0, **EAGLE)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [EAGLE, NGRAM], ids=["eagle", "ngram"])
def test_soak_with_drafts(tmp_path, algorithm):
    """Every answer looked at is what one tier gives without drafts and without disturbance."""
    shape = SHAPE | parity.NARROW | dict(mtp_layers=1, hidden=256, drafts="right")
    model = parity.write_model(tmp_path / "m", **shape)
    result = soaked(model, 1000, 1.0, "float32", dtype="float32", **algorithm)
    print(f"{result.accepted:.2f} tokens a step")
    assert result.accepted > (1.5 if algorithm is EAGLE else 1)
    assert len(result.answers) > 30
    one_tier = {"enabled": False, "index_dtype": "float32"}
    with EngineProcess(model, ess=one_tier, dtype="float32") as engine:
        wrong = [answer for answer in result.answers if not given_by(engine, *answer)]
    assert wrong == []


@pytest.mark.slow
def test_soak_of_ranks(tmp_path):
    """Two TP ranks on one host tier, a canary on each; every answer looked at is one tier's."""
    shape = SHAPE | parity.NARROW | dict(heads=4, hidden=256)
    model = parity.write_model(tmp_path / "m", **shape)
    result = soaked(model, 500, 1.0, "float32", dtype="float32", tp_size=2)
    assert len(result.answers) > 15
    one_tier = {"enabled": False, "index_dtype": "float32"}
    with EngineProcess(model, ess=one_tier, dtype="float32", tp_size=2) as engine:
        wrong = [answer for answer in result.answers if not given_by(engine, *answer)]
    assert wrong == []


def given_by(engine, prompt, answer) -> bool:
    """Whether an engine gives this answer, but for a choice that rounding may make either way."""
    (alone,) = engine.generate([prompt], len(answer), -1)
    if alone.token_ids == answer:
        return True
    pairs = zip(alone.token_ids, answer, strict=True)
    first = next(i for i, (one, other) in enumerate(pairs) if one != other)
    (scored,) = engine.generate([prompt + answer[: first + 1]], 1, len(prompt) - 1)
    return abs(alone.logprobs[first] - scored.prompt_logprobs[-1]) < TIE
