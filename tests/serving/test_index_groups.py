"""Layers that share one top-k over two tiers, against transformers' glm_moe_dsa.

The bounds are those of test_parity.py: transformers makes the engine's decisions, and what is left
is compared with what it differs from itself. Hot rows are so few that every step fetches some: one
request's step is one pass, whose rows are fetched early; a batch's step takes several passes.
"""

import pytest

from sglang_ess.testing.tiny_model import TinyModelConfig
from tests.support import parity
from tests.support.group_faults import FAULTS
from tests.support.parity import EXACT, FP8_BOTH, MARGIN, check

TOPK, SLOTS, HOT_ROWS = 32, 2048, 96
SHAPE = dict(arch="glm", index_topk=TOPK, **parity.NARROW)
SETUPS = {"exact": EXACT, "fp8": FP8_BOTH}
NOTICED = 5  # times MARGIN
# F has an indexer, S reads the list of the layer before.
PATTERNS = {
    "first of one": dict(sharing="FFSSS"),
    "GLM-5.2's first layers": dict(sharing="FFFSSSFSSS"),
    "one group": dict(sharing="FSSS"),
    "uneven": dict(sharing="FSSFSFSS"),
    "every fourth from layer 2 on": dict(layers=8, topk_freq=4, skip_offset=3),
    "every third": dict(layers=7, topk_freq=3),
}


def grid():
    for pattern in PATTERNS:
        for kind in SETUPS:
            fast = pattern == "first of one" and kind == "exact"
            yield pytest.param((pattern, kind), marks=[] if fast else pytest.mark.slow)


class Served:
    """sizes: layers of each index group"""

    def __init__(self, kind, model, types, engine):
        self.kind, self.model, self.engine = kind, model, engine
        letters = "".join(kind[0] for kind in types)
        self.sizes = [1 + len(part) for part in letters.split("f")[1:]]

    def ratios(self, lengths, seed=1, new_tokens=10) -> dict[str, float]:
        """Largest differences in the yardstick's units, by kind."""
        prompts = parity.prompts_of(lengths, seed)
        _, sequences = parity.scored(self.engine, prompts, new_tokens=new_tokens)
        return parity.compare(SETUPS[self.kind], self.model, sequences).ratios()


@pytest.fixture(scope="module", params=grid(), ids="-".join)
def served(request, tmp_path_factory):
    pattern, kind = request.param
    shape = SHAPE | PATTERNS[pattern]
    shape["layers"] = len(shape["sharing"]) if "sharing" in shape else shape["layers"]
    model = parity.write_model(tmp_path_factory.mktemp("model") / "glm", **shape)
    faults = ["tests.support.group_faults:install", "tests.support.tiers:expose"]
    ess = {"hot_ratio": HOT_ROWS / SLOTS, "canary_rate": 0.0, "admission": "off"}
    args = dict(max_total_tokens=SLOTS, chunked_prefill_size=256)
    with SETUPS[kind].engine(model, faults, ess, **args) as engine:
        yield Served(kind, model, TinyModelConfig(**shape).indexer_types, engine)


def test_parity_in_one_pass_and_in_several(served):
    check(served.ratios([310]))
    early = served.engine.call("_early_fetches")
    check(served.ratios([33, 150, 310, 95], seed=2))
    assert early > 0, "the rows of later layers must have been fetched early"
    counters = served.engine.call("_hot_counters")
    assert len(counters) == len(served.sizes)
    assert all(group["misses"] > 0 for group in counters)


def test_corruptions_are_noticed(served):
    for fault in FAULTS:
        if "third" in fault and max(served.sizes) < 3:
            continue
        with served.engine.switched(fault=fault):
            ratios = served.ratios([310], seed=3)
        assert ratios["logprob mean"] >= NOTICED * MARGIN, fault
    check(served.ratios([310], seed=3))  # and none of it stays


def test_sharing_layers_hold_no_index_keys(served):
    """Read back from the pool; SGLang's elision stays on under two tiers."""
    facts, groups = served.engine.call("_server_info")["ess"], len(served.sizes)
    layers = sum(served.sizes)
    assert (facts["latent_layers"], facts["index_key_layers"]) == (layers, groups)
    assert facts["index_groups"] == groups
    row, key = facts["latent_row_bytes"], facts["index_key_bytes"]
    assert facts["kv_bytes_per_token"] == layers * row + groups * key
