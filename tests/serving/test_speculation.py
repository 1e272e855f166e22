"""Speculative decoding over one tier and two: the tokens are those of decoding without drafts.

The oracle is SGLang without speculation, which the parity tests compare with transformers.
"""

import numpy as np
import pytest

from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.parity import NARROW

TOPK, SLOTS = 32, 4096
EAGLE = dict(speculative_algorithm="EAGLE", speculative_eagle_topk=1)
NGRAM = dict(speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1)


def drafts(algorithm, width):
    """SGLang's options for `width` queries a request and step."""
    more = {"speculative_num_draft_tokens": width}
    if algorithm is EAGLE:
        more["speculative_num_steps"] = width - 1
    return algorithm | more


@pytest.fixture(scope="module", params=["v32", "glm"])
def model(request, tmp_path_factory):
    shape = dict(arch=request.param, layers=3, index_topk=TOPK, mtp_layers=1, **NARROW)
    return parity.write_model(tmp_path_factory.mktemp("model") / "tiny", **shape)


def outputs(model, prompts, ess, **options):
    args = dict(dtype="float32", max_total_tokens=SLOTS, chunked_prefill_size=128, **options)
    with EngineProcess(model, ess={"index_dtype": "float32"} | ess, **args) as engine:
        return engine.generate(prompts, 24)


ONE_TIER, TWO_TIERS = {"enabled": False}, {"hot_ratio": 0.05, "canary_rate": 1.0}


@pytest.mark.parametrize(
    "options", [drafts(EAGLE, 2), drafts(EAGLE, 4), drafts(NGRAM, 4)], ids=["2", "4", "ngram"]
)
def test_greedy_output_does_not_change(model, options):
    prompts = parity.prompts_of([300, 77, 190], seed=3)
    plain = outputs(model, prompts, ONE_TIER)
    for ess in (ONE_TIER, TWO_TIERS):
        found = outputs(model, prompts, ess, **options)
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
        for one, other in zip(found, plain, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
