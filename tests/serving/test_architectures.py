"""Each architecture of SGLang's is_deepseek_dsa that the CPU platform serves, in two tiers.

The judge is transformers where it has the model (tests/support/parity.py); docs/compatibility.md
has the whole table. DeepSeek-V3.2 and GLM-5 have more tests: test_parity.py, test_two_tier.py.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_ess.testing.tiny_model import TinyModelConfig
from tests.support import parity
from tests.support.engine import EngineProcess

SLOTS = 4096
EXPOSE = "tests.support.tiers:expose"
TOPK = 32
ARCHS = {
    "glm": dict(layers=7, topk_freq=4, skip_offset=3),  # as GLM-5.2: FFFSSSF
    "v3": dict(layers=2),
    "hy4": dict(layers=6),  # its own default: FFSSSF
    "hy4, several passes": dict(arch="hy4", layers=3, index_topk=96),  # more than MIN_ROWS
}
MIN_ROWS = 64  # capacity.MIN_HOT_ROWS
# What is corrupted beside attention and the index, by architecture (tests/support/faults.py).
OWN_FAULTS = {"hy4": {"no_sink": "logprob mean"}}
FAULTS = {"swap_neighbour": "logprob mean", "forget_last_key": "selection"}
NOTICED = 1000  # times MARGIN, as in test_parity.py


def shape(name) -> dict:
    return {"arch": name, "index_topk": TOPK, **parity.NARROW, **ARCHS[name]}


@dataclass
class Served:
    name: str
    model: Path
    engine: EngineProcess

    def judge(self, lengths, seed=1, **options) -> dict[str, float]:
        """Largest differences from the oracle, in units of the yardstick."""
        prompts = parity.prompts_of(lengths, seed)
        _, sequences = parity.scored(self.engine, prompts, **options)
        return parity.compare(parity.EXACT, self.model, sequences).ratios()


def grid():
    for name in ARCHS:
        if "passes" not in name:
            yield name, "one tier"
        yield name, "two tiers"


@pytest.fixture(scope="module", params=grid(), ids="-".join)
def served(request, tmp_path_factory):
    name, tiers = request.param
    model = parity.write_model(tmp_path_factory.mktemp("model") / "m", **shape(name))
    ratio = MIN_ROWS / SLOTS if "passes" in name else 0.1
    ess = {"enabled": False} if tiers == "one tier" else {"hot_ratio": ratio, "canary_rate": 1.0}
    with parity.EXACT.engine(
        model, faults=[EXPOSE, parity.FAULTS], ess=ess, max_total_tokens=SLOTS
    ) as engine:
        yield Served(name, model, engine)


def test_it_computes_what_transformers_does(served):
    topk = shape(served.name)["index_topk"]
    parity.check(served.judge([topk // 2, topk + 1, 700], new_tokens=16))


def test_corruptions_are_noticed(served):
    for fault, shows in {**FAULTS, **OWN_FAULTS.get(shape(served.name)["arch"], {})}.items():
        with served.engine.switched(fault=fault):
            ratios = served.judge([210], new_tokens=8)
        assert ratios[shows] >= NOTICED * parity.MARGIN, fault


def test_rows_were_missed(served):
    """The hot tier was too small for the prompts, so some of what was judged had to be fetched."""
    caches = served.engine.call("_hot_counters")
    assert not caches or sum(one["misses"] for one in caches) > 0


def test_only_layers_with_an_indexer_hold_index_keys(served):
    types = TinyModelConfig(**shape(served.name)).indexer_types
    held = served.engine.call("_index_key_bytes")
    assert [size > 0 for size in held] == [one == "full" for one in types]
