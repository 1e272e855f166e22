"""Drafts of the tiny model are accepted, not all of them, and only if the draft layer reads what
it should; the context still matters to the target."""

from types import SimpleNamespace

import pytest
import torch

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from sglang_ess.testing.tiny_tokenizer import NUM_BYTES
from tests.support.draft_chain import DraftChain
from tests.support.drafts import eagle
from tests.support.oracle import reference_model, summed_otherwise
from tests.support.tier_scripts import engine

PROMPT, NEW = 400, 150
MODELS = {
    "v32": dict(arch="v32"),
    "glm": dict(arch="glm"),
    "glm, one top-k": dict(arch="glm", index_share_for_mtp_iteration=1),
    "v32, bfloat16": dict(arch="v32", dtype="bfloat16"),
    "glm, one top-k, bfloat16": dict(arch="glm", index_share_for_mtp_iteration=1, dtype="bfloat16"),
}
FAST = ("v32", "glm, one top-k, bfloat16")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in MODELS]
)
float32 = pytest.mark.parametrize("name", ["v32", pytest.param("glm", marks=pytest.mark.slow)])


def config(dtype="float32", **options) -> TinyModelConfig:
    return TinyModelConfig(mtp_layers=1, drafts="right", dtype=dtype, **options)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """name -> (DraftChain, what its target continues a prompt of random bytes with), once."""
    root, made = tmp_path_factory.mktemp("drafts"), {}

    def make(name):
        if name not in made:
            recipe = config(**MODELS[name])
            path = write_tiny_model(root / name.replace(", ", "-").replace(" ", "-"), recipe)
            chain = DraftChain(path, getattr(torch, recipe.dtype))
            made[name] = chain, chain.greedy(random_bytes(PROMPT), NEW)
        return made[name]

    return make


def random_bytes(count):
    return torch.randint(0, NUM_BYTES, (count,), generator=torch.Generator().manual_seed(7))


def mean(lengths):
    return sum(lengths) / len(lengths)


@every_model
def test_most_drafts_are_accepted_and_some_are_not(chains, name):
    chain, ids = chains(name)
    two, four = (mean(chain.accept_lengths(ids, PROMPT, count)) for count in (2, 4))
    print(f"{name}: accept length {two:.2f} of 2, {four:.2f} of 4")
    assert 1.55 < two < 1.95
    assert 2.0 < four < 3.5


@float32
def test_a_draft_needs_its_rows_and_the_target_s_state(chains, name):
    chain, ids = chains(name)
    right = mean(chain.accept_lengths(ids, PROMPT, 4))
    without_state = mean(chain.accept_lengths(ids, PROMPT, 4, hidden=torch.zeros_like))
    chain.topk = torch.arange(8)
    other_rows = mean(chain.accept_lengths(ids, PROMPT, 4))
    chain.topk = None
    print(f"{name}: {right:.2f}; no state {without_state:.2f}; other rows {other_rows:.2f}")
    assert without_state < right - 0.3
    assert other_rows < right - 0.5


@pytest.mark.parametrize("name", [pytest.param("v32", marks=pytest.mark.slow), "glm, one top-k"])
def test_sglang_accepts_what_transformers_does(tmp_path, name):
    """Over one tier and two. The engine's last step may end early, which no list here does."""
    path = write_tiny_model(tmp_path / "m", config(**MODELS[name]))
    prompt = random_bytes(PROMPT).tolist()
    found = []
    for hot_ratio in (None, 0.3):
        with engine(path, hot_ratio, **eagle(4)) as served:
            (output,) = served.generate([prompt], NEW)
        found.append((output.token_ids, output.meta["spec_verify_ct"]))
    assert found[0] == found[1]
    tokens, steps = found[0]
    ids = torch.tensor([*prompt, *tokens])
    expected = mean(DraftChain(path).accept_lengths(ids, PROMPT, 4))
    print(f"{name}: {(NEW - 1) / steps:.2f}, in transformers {expected:.2f}")
    assert (NEW - 1) / steps == pytest.approx(expected, abs=0.15)


def test_random_drafts_are_not_accepted(tmp_path):
    recipe = TinyModelConfig(mtp_layers=1, dtype="float32")
    chain = DraftChain(write_tiny_model(tmp_path / "m", recipe))
    ids = chain.greedy(random_bytes(PROMPT), 60)
    assert mean(chain.accept_lengths(ids, PROMPT, 2)) < 1.2


@float32
def test_the_output_does_not_repeat_itself(chains, name):
    _, ids = chains(name)
    triples = ids[PROMPT:].unfold(0, 3, 1)
    assert len({tuple(one) for one in triples.tolist()}) > len(triples) / 2


@float32
@torch.no_grad()
def test_the_context_matters(chains, name):
    """As test_tiny_model.py asks of random weights: one byte far back, and the top-k of a layer."""
    model = chains(name)[0].target
    ids = random_bytes(1100)[None]

    def logprobs(ids):
        return model(ids, use_cache=False).logits[0, -200:].log_softmax(-1)[:, :NUM_BYTES]

    base, changed = logprobs(ids), ids.clone()
    changed[0, 99] = (changed[0, 99] + 1) % NUM_BYTES
    effect = (logprobs(changed) - base)[-1].abs().max().item()
    with summed_otherwise(SimpleNamespace(model=model, layers=model.model.layers)):
        floor = (logprobs(ids) - base)[-1].abs().max().item()
    assert effect > 0.01 and effect > 100 * floor, (effect, floor)
    for block in model.model.layers:
        indexer = block.self_attn.indexer
        if indexer is None:
            continue
        topk, indexer.index_topk = indexer.index_topk, ids.shape[1]
        dense = (logprobs(ids) - base).abs().amax(-1).median().item()
        indexer.index_topk = topk
        print(f"{name}: one layer dense: {dense:.2f}")
        assert dense > 0.1


def test_equal_configs_give_equal_bytes(tmp_path):
    paths = [write_tiny_model(tmp_path / one, config()) for one in ("one", "two")]
    first, second = ((path / "model.safetensors").read_bytes() for path in paths)
    assert first == second


def test_a_plain_target_has_the_same_names(tmp_path):
    _, info = reference_model(write_tiny_model(tmp_path / "m", config()), output_loading_info=True)
    assert all(one.startswith("model.layers.4.") for one in info.pop("unexpected_keys"))
    assert not any(info.values()), info


@pytest.mark.parametrize(
    "options, message",
    [
        ({"drafts": "right"}, "drafts must be random without an MTP layer: got 'right'"),
        (
            {"drafts": "right", "mtp_layers": 1, "arch": "hy4"},
            "drafts must be random for arch hy4: got 'right'",
        ),
        ({"drafts": "wrong"}, "drafts must be random or right: got 'wrong'"),
    ],
)
def test_bad_config_is_refused(options, message):
    with pytest.raises(ValueError) as caught:
        TinyModelConfig(**options)
    assert str(caught.value) == message
