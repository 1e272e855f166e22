"""Each architecture of SGLang's is_deepseek_dsa that the CPU platform serves, in both ways.

The judge is transformers where it has the model (tests/support/parity.py), else one tier judges
two; docs/compatibility.md has the whole table. DeepSeek-V3.2 and GLM-5 have more tests, in
test_parity.py, test_two_tier.py and test_index_groups.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_ess.testing.tiny_model import TinyModelConfig
from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.oracle import summed_otherwise

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
    """GLM in one tier is slow: test_two_tier.py compares it with two, which are here."""
    for name in ARCHS:
        if "passes" not in name:
            marks = [pytest.mark.slow] if name == "glm" else []
            yield pytest.param((name, "one tier"), marks=marks)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FP8_INDEX", "BF16_ROWS", "BF16_MODEL"])
def test_hy4_as_servers_run_it(kind, tmp_path):
    """fp8 rows are left out: SGLang refuses them beside attention sinks."""
    model, setup = parity.write_model(tmp_path / "m", **shape("hy4")), getattr(parity, kind)
    with setup.engine(model, ess={"hot_ratio": 0.1}, max_total_tokens=SLOTS) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of([16, 33, 300]))
    parity.check(parity.compare(setup, model, sequences).ratios())


# --- LongCat: transformers' has no indexer ----------------------------------------------------

GATHER = "tests.support.gather:install"
NO_FETCH = "tests.support.two_tier_faults:no_fetch"
LONGCAT = dict(
    arch="longcat", index_topk=TOPK, **parity.NARROW | dict(layers=4, heads=4, hidden=128)
)


@pytest.fixture(scope="module")
def longcat(tmp_path_factory):
    return parity.write_model(tmp_path_factory.mktemp("model") / "longcat", **LONGCAT)


def longcat_outputs(model, patches=(), **ess):
    """Outputs of prompts at most as long as top-k and of longer ones; misses, bytes of keys."""
    with EngineProcess(
        model,
        ess={"index_dtype": "float32", "admission": "off"} | ess,
        patches=[GATHER, EXPOSE, *patches],
        dtype="float32",
        max_total_tokens=SLOTS,
    ) as engine:
        short = engine.together("short", parity.prompts_of([9, TOPK - 4]), 4, start=0)
        long = engine.together("long", parity.prompts_of([33, 700, 310], seed=2), 16, start=0)
        misses = sum(one["misses"] for one in engine.call("_hot_counters"))
        return short, long, misses, engine.call("_index_key_bytes")


@pytest.fixture(scope="module")
def one_tier(longcat):
    return longcat_outputs(longcat, enabled=False)


def same(outputs, others) -> bool:
    return all(
        one.token_ids == other.token_ids
        and (one.logprobs == other.logprobs).all()
        and (one.prompt_logprobs == other.prompt_logprobs).all()
        for one, other in zip(outputs, others, strict=True)
    )


def test_longcat_in_two_tiers_is_longcat_in_one(longcat, one_tier):
    short, long, misses, keys = longcat_outputs(longcat, hot_ratio=0.03, canary_rate=1.0)
    assert same(short + long, one_tier[0] + one_tier[1])
    assert misses > 0
    assert [size > 0 for size in keys] == [True, False, True, False]  # cli_factor 2


def test_longcat_without_its_fetches_is_noticed(longcat, one_tier):
    _, long, _, _ = longcat_outputs(longcat, [NO_FETCH], hot_ratio=0.03, canary_rate=0.0)
    assert not same(long, one_tier[1])


def test_longcat_up_to_topk_tokens_is_transformers_dense_longcat(longcat, one_tier):
    """Where top-k has every token, what is left to judge is everything but the selection."""
    config = json.loads((longcat / "config.json").read_text())
    config["rope_parameters"] = config.pop("rope_scaling")  # two names for one thing
    for derived in ("num_hidden_layers", "model_type"):
        config.pop(derived)
    dense = AutoModelForCausalLM.from_pretrained(
        longcat,
        config=AutoConfig.for_model("longcat_flash", **config),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()

    @torch.no_grad()
    def logprobs(tokens):
        ids = torch.tensor([tokens])
        found = dense(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        return found.gather(1, ids[0, 1:, None])[:, 0].numpy()

    for prompt, output in zip(parity.prompts_of([9, TOPK - 4]), one_tier[0], strict=True):
        tokens = prompt + output.token_ids
        expected = logprobs(tokens)
        with summed_otherwise(SimpleNamespace(model=dense, layers=dense.model.layers)):
            yardstick = np.abs(logprobs(tokens) - expected).max()
        ours = np.concatenate([output.prompt_logprobs, output.logprobs])
        assert np.abs(ours - expected).max() <= parity.MARGIN * yardstick
