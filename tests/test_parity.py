"""The engine against transformers' deepseek_v32 and glm_moe_dsa on the same checkpoints.

Bounds are a few times what benchmarks/parity.py measures, and the corruptions at the end
show that one wrong row of a query's selection exceeds every one of them.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from tests.support import parity
from tests.support.parity import BF16_MODEL, BF16_ROWS, EXACT, FP8_INDEX, FP8_ROWS, Setup

MODELS = {
    "v32": dict(arch="v32", index_topk=32, heads=4),
    "v32-wide": dict(
        arch="v32", index_topk=64, heads=16, layers=2, hidden=192, index_heads=4, rope="plain",
        experts=16, experts_per_token=4, groups=4, topk_groups=2, moe_intermediate=64,
    ),
    "glm": dict(arch="glm", index_topk=32, heads=4, layers=5, topk_freq=3),
    "glm-odd": dict(
        arch="glm", index_topk=48, heads=6, layers=3, hidden=320, index_heads=16, rope="yarn",
        experts=5, experts_per_token=1, dense_layers=2, q_lora_rank=64,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """What a setup may differ by: logprobs (mean, 99th percentile, largest) and selection.

    Near-ties within float32 rounding fall either way; exact ties (scores of 0 where every
    head's relu is) fall where a sort puts them, several ranks off.
    """

    setup: Setup
    mean: float
    p99: float
    largest: float = math.inf
    overlap: float = 1 - 2e-4
    overshoot: int = 8


BOUNDS = {
    "exact": Bound(EXACT, 8e-6, 3e-5, 6e-5),
    "fp8 index": Bound(FP8_INDEX, 8e-6, 3e-5, 6e-5),
    # A difference of 1e-7 may carry a value over a rounding boundary of the row, and that
    # may turn a router's choice: rare, and then large.
    "bf16 rows": Bound(BF16_ROWS, 3e-3, 1e-2, overlap=1 - 1e-3),
    "fp8 rows": Bound(FP8_ROWS, 9e-3, 5e-2, overlap=1 - 1e-3),
    # bfloat16 rounds every activation, and turns routers' choices more often.
    "bf16 model": Bound(BF16_MODEL, 0.18, 1.5, overlap=0.97, overshoot=300),
}


def check(difference, bound) -> None:
    assert difference.logprob.mean() <= bound.mean
    assert np.quantile(difference.logprob, 0.99) <= bound.p99
    assert difference.logprob.max() <= bound.largest
    assert difference.overlap >= bound.overlap
    assert difference.overshoot <= bound.overshoot


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: parity.write_model(root / name, **shape) for name, shape in MODELS.items()}


def lengths(topk):
    """Below, at and just past top-k, odd ones between, and over 16 times top-k."""
    return [topk // 2, topk, topk + 1, 3 * topk + 5, 16 * topk + 19]


@pytest.mark.parametrize("chunk", [128, 4096])
@pytest.mark.parametrize("name", MODELS)
def test_exact_parity(models, name, chunk):
    """A cold batch of mixed lengths, decode after it, then prefix hits on its longest."""
    topk, bound = MODELS[name]["index_topk"], BOUNDS["exact"]
    prompts = parity.prompts_of(lengths(topk))
    with EXACT.engine(models[name], chunked_prefill_size=chunk) as engine:
        outputs, cold = parity.scored(engine, prompts)
        assert [output.cached_tokens for output in outputs] == [0] * len(prompts)
        check(parity.compare(EXACT, models[name], cold), bound)

        shared = 5 * topk + 7
        suffixes = parity.prompts_of([3, 2 * topk, 70], seed=2)
        again = [prompts[-1][:shared] + suffix for suffix in suffixes]
        outputs, warm = parity.scored(engine, again, start=shared, donor=outputs[-1].rid)
        assert all(output.cached_tokens == shared // 64 * 64 for output in outputs)
        check(parity.compare(EXACT, models[name], warm), bound)


@pytest.mark.parametrize("name", ["v32", "glm"])
@pytest.mark.parametrize("kind", ["fp8 index", "bf16 rows", "fp8 rows", "bf16 model"])
def test_format_parity(models, name, kind):
    bound = BOUNDS[kind]
    with bound.setup.engine(models[name]) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of(lengths(32)))
        check(parity.compare(bound.setup, models[name], sequences), bound)


def test_production_formats_together(models):
    """fp8 index keys and fp8 rows at once, chunked, as a server runs them."""
    setup = Setup(index_dtype="fp8", kv_cache_dtype="fp8_e4m3", rounding="fp8_rows")
    with setup.engine(models["v32"], chunked_prefill_size=256) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of(lengths(32)))
        difference = parity.compare(setup, models["v32"], sequences)
        assert difference.logprob.mean() <= BOUNDS["fp8 rows"].mean
        assert difference.overlap >= 0.95  # against an oracle that does not round its keys


def test_prefix_hit_equals_cold(models):
    """The same prompt cold and as a prefix hit gives the same tokens and logprobs."""
    prompt = parity.prompts_of([700])[0]
    with FP8_ROWS.engine(models["glm"]) as engine:
        cold = engine.generate([prompt], max_new_tokens=6, start=-1)[0]
        warm = engine.generate([prompt], max_new_tokens=6, start=-1)[0]
        engine.flush()
        flushed = engine.generate([prompt], max_new_tokens=6, start=-1)[0]
    assert (cold.cached_tokens, warm.cached_tokens, flushed.cached_tokens) == (0, 640, 0)
    assert cold.token_ids == warm.token_ids == flushed.token_ids
    assert abs(cold.logprobs - warm.logprobs).max() <= BOUNDS["fp8 rows"].p99
    assert abs(cold.logprobs - flushed.logprobs).max() == 0


@pytest.mark.parametrize("kind", ["exact", "bf16 rows", "fp8 rows", "bf16 model"])
@pytest.mark.parametrize("fault", ["swap_neighbour", "read_foreign_row"])
def test_one_wrong_row_is_noticed(models, kind, fault):
    bound = BOUNDS[kind]
    with bound.setup.engine(models["v32"], faults=[fault]) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of([90, 310, 320]))
        difference = parity.compare(bound.setup, models["v32"], sequences)
    assert difference.logprob.mean() > 2 * bound.mean
    with pytest.raises(AssertionError):
        check(difference, bound)


@pytest.mark.parametrize("kind", ["exact", "fp8 index"])
@pytest.mark.parametrize("fault", ["shift_index_page", "forget_last_key"])
def test_one_wrong_index_key_is_noticed(models, kind, fault):
    """Logprobs follow the wrong selection exactly; the selection check must see it."""
    bound = BOUNDS[kind]
    with bound.setup.engine(models["glm"], faults=[fault]) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of([90, 310, 320]), new_tokens=24)
        difference = parity.compare(bound.setup, models["glm"], sequences)
    assert difference.logprob.max() <= bound.largest  # so only the selection tells
    with pytest.raises(AssertionError):
        check(difference, bound)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["v32", "glm"])
def test_exact_parity_of_the_default_model(tmp_path, arch):
    """The model users get, at 16 times its top-k."""
    model = parity.write_model(tmp_path / arch, arch=arch)
    with EXACT.engine(model) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of([128, 129, 2200]))
        check(parity.compare(EXACT, model, sequences), BOUNDS["exact"])
