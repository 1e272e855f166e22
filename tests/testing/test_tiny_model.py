"""The tiny checkpoint: both libraries load it, its tokenizer round-trips, its context matters."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sglang_ess.testing.tiny_model import (
    ARCHS,
    TinyModelConfig,
    main,
    sharing_fields,
    write_tiny_model,
)
from sglang_ess.testing.tiny_tokenizer import NUM_BYTES, SPECIAL_TOKENS, VOCAB_SIZE
from tests.support import forked
from tests.support.oracle import reference_model, summed_otherwise

TOKENS = 1100
CHANGED = TOKENS - 1 - 1000
# One of each model that transformers has: others of the same reference have its weights.
OF_REFERENCE = {arch.reference: name for name, arch in reversed(ARCHS.items()) if arch.reference}
referenced = pytest.mark.parametrize("arch", list(OF_REFERENCE.values()))
# GLM-5.3-Flash has tensors and widths of its own: test_tiny_glm5_next.py
every_arch = pytest.mark.parametrize("arch", [name for name in ARCHS if name != "glm5_next"])


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """{arch: directory} of the default model of each architecture."""
    root = tmp_path_factory.mktemp("tiny")
    return {arch: write_tiny_model(root / arch, TinyModelConfig(arch=arch)) for arch in ARCHS}


@pytest.fixture(scope="session")
def tokenizer(paths):
    return AutoTokenizer.from_pretrained(paths["v32"])


@pytest.fixture(scope="session")
def models(paths):
    """{arch: transformers model in float32}"""
    return {arch: load(paths[arch]) for arch in OF_REFERENCE.values()}


@pytest.fixture(scope="session")
def prompt():
    return torch.randint(0, NUM_BYTES, (1, TOKENS), generator=torch.Generator().manual_seed(7))


def load(path, **config):
    """The model in float32; fails unless the checkpoint has exactly the model's tensors."""
    model, info = reference_model(
        path, config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logprobs(model, ids):
    """[tokens, vocab] of a batch of one."""
    return model(ids, use_cache=False).logits[0].log_softmax(-1)


def tensors(path):
    """{name: (shape, dtype)} as stored."""
    with safe_open(path / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}


# Files


@referenced
def test_transformers_loads_it(models, arch):
    assert type(models[arch]).__name__ == ARCHS[arch].architecture


@every_arch
def test_names_and_dtypes_are_those_of_a_hub_checkpoint(paths, arch):
    stored = tensors(paths[arch])
    layer = "model.layers.1."
    if "stacked" in ARCHS[arch].parts:
        assert stored[layer + "mlp.experts.gate_up_proj"] == ([8, 256, 256], "BF16")
        assert stored[layer + "mlp.experts.down_proj"] == ([8, 256, 128], "BF16")
    else:
        for part in ("gate", "up"):
            assert stored[f"{layer}mlp.experts.7.{part}_proj.weight"] == ([128, 256], "BF16")
        assert stored[layer + "mlp.experts.7.down_proj.weight"] == ([256, 128], "BF16")
    pairs = "pairs" in ARCHS[arch].parts
    attention = [f"{i // 2}.self_attn.{i % 2}" if pairs else f"{i}.self_attn" for i in range(4)]
    first, router = f"model.layers.{attention[0]}.", "mlp.router" if pairs else "mlp.gate"
    assert stored[f"{layer}{router}.e_score_correction_bias"] == ([8], "F32")
    assert stored[first + "kv_a_proj_with_mqa.weight"] == ([512 + 64, 256], "BF16")
    assert stored[first + "indexer.wk.weight"] == ([128, 256], "BF16")
    assert stored[first + "indexer.k_norm.bias"] == ([128], "BF16")
    float32 = re.compile(r"correction|classifier|\.hc_|sink")
    assert {t for name, (_, t) in stored.items() if not float32.search(name)} == {"BF16"}
    with_indexer = [any(f"layers.{one}.indexer." in name for name in stored) for one in attention]
    assert with_indexer == [one == "full" for one in TinyModelConfig(arch=arch).indexer_types]


@pytest.mark.parametrize(
    "arch", [name for name, one in ARCHS.items() if OF_REFERENCE.get(one.reference, name) != name]
)
def test_archs_of_one_reference_have_its_weights(paths, arch):
    one, other = paths[OF_REFERENCE[ARCHS[arch].reference]], paths[arch]
    assert tensors(one) == tensors(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        dict(topk_freq=4, skip_offset=3, layers=9),
        dict(topk_freq=3, skip_offset=1, layers=7),
        dict(sharing="FSSFFSSS", layers=8),
    ],
    ids=str,
)
def test_every_way_to_say_sharing_says_the_same(options):
    """As freq and offset or as a pattern, without the list: SGLang and transformers agree."""
    from sglang.srt.configs.model_config import dsa_layer_skips_topk

    config = TinyModelConfig(arch="glm", **options)
    fields = sharing_fields(config)
    reference = AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=config.layers, **fields)
    assert reference.indexer_types == config.indexer_types
    read = SimpleNamespace(architectures=["GlmMoeDsaForCausalLM"], index_topk=1, **fields)
    layers = range(config.layers)
    skipped = ["shared" if dsa_layer_skips_topk(read, i) else "full" for i in layers]
    assert skipped == config.indexer_types


def test_equal_seeds_give_equal_bytes(paths, tmp_path):
    again = write_tiny_model(tmp_path / "again", TinyModelConfig())
    other = write_tiny_model(tmp_path / "other", TinyModelConfig(seed=1))
    for file in paths["v32"].iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    first = (paths["v32"] / "model.safetensors").read_bytes()
    assert first != (other / "model.safetensors").read_bytes()


def test_weights_are_readable_by_others(paths):
    assert (paths["v32"] / "model.safetensors").stat().st_mode & 0o777 == (
        paths["v32"] / "config.json"
    ).stat().st_mode & 0o777


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1, "heads": 1, "index_heads": 2, "hidden": 64, "q_lora_rank": 32},
        {"layers": 2, "dense_layers": 0, "heads": 16, "index_heads": 3, "rope": "plain"},
        {"layers": 1, "nope_dim": 128, "v_dim": 96, "yarn_factor": 8},
        {"layers": 1, "nope_dim": 32},
        {"layers": 3, "dense_layers": 3, "index_topk": 16, "context": 256},
        {"experts": 16, "groups": 4, "topk_groups": 2, "experts_per_token": 8, "layers": 2},
        {"arch": "glm", "layers": 6, "topk_freq": 4, "rope": "yarn"},
        {"arch": "glm", "layers": 2, "topk_freq": 1, "dtype": "float32", "index_topk": 512},
        {"arch": "glm", "layers": 2, "experts": 6, "experts_per_token": 6},
        {"arch": "glm", "layers": 5, "sharing": "FSSFS"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_variations_load_and_run(tmp_path, prompt, changes):
    path = write_tiny_model(tmp_path / "model", TinyModelConfig(**changes))
    result = logprobs(load(path), prompt[:, :200])
    assert result.shape == (200, VOCAB_SIZE) and result.isfinite().all()


# What the weights do


@pytest.fixture(scope="session")
def runs(models, prompt):
    """{arch: what one pass over the prompt computed}"""
    return {arch: observe(model, prompt) for arch, model in models.items()}


@torch.no_grad()
def observe(model, ids):
    """logprobs [tokens, vocab]; for each layer the heads' largest weight, mean over the last 200
    queries; the index scores of the last query by full layer; the experts layer 2 chose."""
    scores, experts, topk = [], [], torch.Tensor.topk

    def recording(self, *args, **kwargs):
        if self.shape == (1, TOKENS, TOKENS):  # not the router's
            scores.append(self[0, -1])
        return topk(self, *args, **kwargs)

    gate = model.model.layers[2].mlp.gate
    handle = gate.register_forward_hook(lambda module, args, out: experts.append(out[2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", recording)
        result = model(ids, use_cache=False, output_attentions=True)
    handle.remove()
    peaks = [weights[0, :, -200:].amax(-1).mean().item() for weights in result.attentions]
    return SimpleNamespace(
        logprobs=result.logits[0].log_softmax(-1), peaks=peaks, scores=scores, experts=experts[0]
    )


@referenced
def test_next_token_is_uncertain_but_far_from_uniform(runs, arch):
    result = runs[arch].logprobs
    entropy = -(result.exp() * result).sum(-1).mean().item()
    assert 2.5 < entropy < 4.5  # uniform over bytes is 5.5 nats
    assert 1.5 < result[:, :NUM_BYTES].std(-1).mean() < 3
    assert result[:, NUM_BYTES:].exp().sum(-1).max() < 1e-2  # control tokens, all together
    assert result.argmax(-1).unique().numel() > 100


@referenced
def test_attention_is_peaked(runs, arch):
    assert all(0.1 < peak < 0.6 for peak in runs[arch].peaks), runs[arch].peaks


@referenced
def test_one_token_1000_back_changes_the_next(models, runs, prompt, arch):
    base = runs[arch].logprobs[-1, :NUM_BYTES]

    def shift(model, ids):
        return (logprobs(model, ids)[-1, :NUM_BYTES] - base).abs().max().item()

    changed = prompt.clone()
    changed[0, CHANGED] = (changed[0, CHANGED] + 1) % NUM_BYTES
    effect = shift(models[arch], changed)
    oracle = SimpleNamespace(model=models[arch], layers=models[arch].model.layers)
    with summed_otherwise(oracle):
        floor = shift(models[arch], prompt)
    print(f"{arch}: effect {effect:.3f}, floor {floor:.2g}")
    assert effect > 0.02 and effect > 100 * floor


@referenced
def test_topk_restricts_attention(paths, runs, prompt, arch):
    dense = load(paths[arch], index_topk=16_384)
    difference = (runs[arch].logprobs - logprobs(dense, prompt))[:, :NUM_BYTES].abs().amax(-1)
    print(f"{arch}: top-k 128 against dense, last 200 queries: {difference[-200:].median():.2f}")
    assert difference[:128].max() < 1e-3  # all rows are selected while there are at most 128
    assert difference[-200:].median() > 0.2


@referenced
def test_index_scores_do_not_tie(runs, arch):
    """relu gives scores of 0; between two of them, any row on the top-k border is right."""
    scores = runs[arch].scores
    assert len(scores) == TinyModelConfig(arch=arch).indexer_types.count("full")
    for row in scores:
        assert row.unique().numel() > TOKENS - 5
        assert row.std() > 0.1


@referenced
def test_every_expert_is_used(models, runs, arch):
    share = torch.bincount(runs[arch].experts.flatten(), minlength=8) / runs[arch].experts.numel()
    assert share.min() > 0.02 and share.max() < 0.4, share
    assert (models[arch].model.layers[2].mlp.gate.e_score_correction_bias > 0).all()


# Tokenizer


@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if not any(token in text for token in SPECIAL_TOKENS):
        assert ids == list(text.encode())


def test_long_mixed_text_round_trips(tokenizer):
    piece = (
        "  Straße,  你好 مرحبا नमस्ते 👩‍👩‍👧\r\n\t x' don't . ! <|user|> \x00\u00a0\ufeff\U0010ffff "
    )
    text = piece * 500
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, VOCAB_SIZE - 1)))
def test_any_ids_decode(tokenizer, ids):
    """Random models emit broken UTF-8 and control tokens."""
    ascii_ids = [i for i in ids if i < 128 or i >= NUM_BYTES]
    assert isinstance(tokenizer.decode(ids), str)
    text = tokenizer.decode(ascii_ids, skip_special_tokens=True)
    assert text == bytes(i for i in ascii_ids if i < 128).decode()


def test_vocabulary_has_no_gap(paths, tokenizer):
    config = AutoConfig.from_pretrained(paths["v32"])
    assert len(tokenizer) == config.vocab_size == VOCAB_SIZE and VOCAB_SIZE % 64 == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert tokenizer.eos_token_id == config.eos_token_id == 257
    assert GenerationConfig.from_pretrained(paths["v32"]).eos_token_id == 257


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "image"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": " d\n"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>s<|user|>a b<|assistant|>c<|eos|><|assistant|><|eos|>"
        "<|user|> d\n<|assistant|>"
    )
    ids = tokenizer.apply_chat_template(messages[:1], return_dict=False)
    assert ids == [256, 259, ord("s")]


# SGLang


@every_arch
def test_sglang_reads_the_config(paths, arch):
    from sglang.srt.configs.model_config import (
        ModelConfig,
        dsa_layer_skips_topk,
        is_deepseek_dsa,
    )
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(str(paths[arch]), trust_remote_code=False)
    assert is_deepseek_dsa(config)
    skipped = ["shared" if dsa_layer_skips_topk(config, i) else "full" for i in range(4)]
    assert skipped == TinyModelConfig(arch=arch).indexer_types
    assert getattr(config, "indexer_rope_interleave", False) != ARCHS[arch].indexer_halves
    model = ModelConfig(str(paths[arch]))
    assert (model.dtype, model.context_len) == (torch.bfloat16, 16_384)
    assert (model.kv_lora_rank, model.qk_rope_head_dim, model.index_head_dim) == (512, 64, 128)
    assert model.hf_eos_token_id == {257}


@referenced
def test_sglang_uses_our_chat_template(paths, arch):
    from sglang.srt.entrypoints.openai.chat_encoding import resolve_chat_encoding_spec
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    config = AutoConfig.from_pretrained(paths[arch])
    tokenizer = get_tokenizer(str(paths[arch]))
    assert resolve_chat_encoding_spec(hf_config=config, tokenizer=tokenizer) is None
    assert tokenizer.decode(tokenizer.encode(" a  é . ")) == " a  é . "


@referenced
@pytest.mark.parametrize("rope", ["yarn", "plain"])
def test_rope_and_softmax_scale_agree(tmp_path, arch, rope, monkeypatch):
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.layers.rotary_embedding.factory import get_rope, get_rope_cpu

    # Off CUDA, SGLang's rope asks for vLLM's kernel unless it takes the host for a CPU one.
    monkeypatch.setattr(base, "_is_cpu", True)
    path = write_tiny_model(tmp_path / "m", TinyModelConfig(arch=arch, rope=rope, layers=1))
    reference = load(path).model
    parameters = dict(reference.config.rope_parameters)
    arguments = (64, 64, 16_384, parameters["rope_theta"], True)
    if rope == "yarn":
        scaling = parameters | {"rope_type": "deepseek_yarn"}  # as the model code renames it
        theirs = get_rope_cpu(*arguments, scaling, torch.float32, device="cpu")
    else:
        theirs = get_rope(*arguments, None, torch.float32)
    cos, sin = reference.rotary_emb(torch.zeros(1), torch.arange(16_384)[None])
    assert torch.equal(theirs.cos_sin_cache, torch.cat([cos[0, :, :32], sin[0, :, :32]], -1))
    attention_scale = reference.layers[0].self_attn.scaling
    assert ModelConfig(str(path)).scaling == pytest.approx(attention_scale, rel=1e-12)


# Refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "gpt"}, f"arch must be {' or '.join(ARCHS)}: got 'gpt'"),
        ({"layers": 0}, "layers must be an integer >= 1: got 0"),
        ({"hidden": 100}, "hidden must be a multiple of 64 >= 64: got 100"),
        ({"context": 100}, "context must be a multiple of 64 >= 256: got 100"),
        ({"experts": 9}, "got 9 experts in 2 groups"),
        ({"experts": 8, "groups": 8}, "got 8 experts in 8 groups"),
        ({"experts_per_token": 5}, "experts_per_token must be <= 4 (topk_groups 1 x 4 experts)"),
        ({"topk_groups": 3}, "topk_groups must be <= groups 2: got 3"),
        ({"index_topk": 20_000}, "index_topk must be <= context 16384: got 20000"),
        ({"yarn_factor": 5}, "yarn_factor must divide context 16384: got 5"),
        ({"arch": "longcat", "layers": 5}, "layers must be even for arch longcat: got 5"),
        ({"dense_layers": 5}, "dense_layers must be <= layers 4: got 5"),
        ({"topk_freq": 2}, "topk_freq must be 1 and sharing all F for arch v32"),
        ({"sharing": "FFSF"}, "for arch v32 (it shares no indexer): got 1 and 'FFSF'"),
        ({"arch": "glm", "sharing": "SFSF"}, "sharing must be F and S, F first: got 'SFSF'"),
        ({"arch": "glm", "sharing": "FS"}, "sharing must have 4 letters, one a layer: got 'FS'"),
        ({"rope": "linear"}, "rope must be yarn or plain: got 'linear'"),
        ({"dtype": "float16"}, "dtype must be bfloat16 or float32: got 'float16'"),
    ],
)
def test_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        TinyModelConfig(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="layers .*; heads .*; dtype "):
        TinyModelConfig(layers=0, heads=-1, dtype="int8")


def refusal(capsys, *argv):
    """The one line on stderr of a refused command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in argv])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_command_line_refusals(capsys, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    assert "has no tiny_model.json" in refusal(capsys, "--out", tmp_path)
    assert "is a file" in refusal(capsys, "--out", tmp_path / "letter.txt")
    assert "layers must be" in refusal(capsys, "--out", tmp_path / "m", "--layers", 0)
    assert "invalid int value" in refusal(capsys, "--out", tmp_path / "m", "--layers", "two")
    assert "--out" in refusal(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_command_line_writes_and_overwrites(tmp_path):
    log = tmp_path / "log"
    assert forked.run("sglang_ess.tiny_model", "--out", str(tmp_path / "m"), log=log) == 0
    assert re.fullmatch(r"wrote .*\n", log.read_text())
    small = "--layers 2 --experts 4 --topk-groups 2 --index-topk 64".split()
    assert main(["--out", str(tmp_path / "m"), *small]) == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["index_topk"]) == (2, 64)
    assert max(int(name.split(".")[2]) for name in tensors(tmp_path / "m") if "layers" in name) == 1
