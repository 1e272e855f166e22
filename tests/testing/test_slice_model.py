"""The slice of DeepSeek-V3.2: its published dimensions, its bytes, and that it is served."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sglang_ess.testing.slice_model import SliceConfig, main, parameter_bytes, write_slice
from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.launching import refused

# config.json of deepseek-ai/DeepSeek-V3.2-Exp, typed from it and not from our data file.
PUBLISHED = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000, "factor": 40, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
}  # fmt: skip
QUANTIZATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip


def read(path):
    return json.loads((path / "config.json").read_text())


def test_the_whole_model_has_the_published_numbers(tmp_path):
    whole = SliceConfig(layers=61, dense_layers=3, experts=256, vocab=129_280, weights="fp8")
    config = read(write_slice(tmp_path / "m", whole))
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED
    assert config["rope_parameters"] == YARN
    assert config["quantization_config"] == QUANTIZATION


def test_a_slice_differs_in_what_it_was_told_to(tmp_path):
    config = read(write_slice(tmp_path / "m", SliceConfig(layers=4, experts=8, context=32_768)))
    told = {
        "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 8,
        "vocab_size": 320, "max_position_embeddings": 32_768,
        "n_group": 1, "topk_group": 1,  # 8 of 8 cannot keep to half of the groups
    }  # fmt: skip
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED | told
    assert config["rope_parameters"] == YARN
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    ("experts", "groups", "usable", "each"),
    [(2, 1, 1, 2), (8, 1, 1, 8), (12, 1, 1, 8), (16, 8, 4, 8), (64, 8, 4, 8), (256, 8, 4, 8)],
)
def test_few_experts_still_can_be_chosen(experts, groups, usable, each, tmp_path):
    config = read(write_slice(tmp_path / "m", SliceConfig(experts=experts)))
    names = ("n_group", "topk_group", "num_experts_per_tok")
    assert tuple(config[name] for name in names) == (groups, usable, each)
    assert experts // groups * usable >= each


PARTS = {  # in the name of a parameter of transformers' model -> part
    "embed_tokens": "embedding and lm_head",
    "lm_head": "embedding and lm_head",
    ".indexer.": "indexer",
    ".self_attn.": "attention",
    ".shared_experts.": "shared experts",
    ".experts.": "routed experts",
    ".gate.weight": "router",
    ".mlp.": "dense MLP",
}


def counted(path):
    """{part: weights} of transformers' own model; None: norms and the router's bias."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    found = Counter()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1
        part = next((PARTS[key] for key in PARTS if key in name), None)
        found[part if is_matrix else None] += parameter.numel()
    return found


def test_bytes_are_those_of_another_librarys_model(tmp_path):
    config = SliceConfig(layers=3, dense_layers=1, experts=16)
    weights = counted(write_slice(tmp_path / "m", config))
    small = weights.pop(None)
    bf16 = parameter_bytes(config)
    # q, k and v of 128 heads: absorbed, they are kv_b_proj again.
    assert bf16.pop("absorbed kv_b_proj") == 3 * 2 * 512 * 128 * (128 + 128)
    assert bf16 == {part: 2 * count for part, count in weights.items()}
    assert 2 * small / 3 < 0.1 * 2**20

    fp8 = parameter_bytes(SliceConfig(layers=3, dense_layers=1, experts=16, weights="fp8"))
    for part in ("attention", "dense MLP", "routed experts", "shared experts"):
        assert weights[part] < fp8[part] < 1.001 * weights[part]  # 4 bytes for 128 x 128 weights
    for part in ("embedding and lm_head", "router"):
        assert fp8[part] == bf16[part]  # SGLang quantizes neither
    assert bf16["indexer"] - fp8["indexer"] < weights["indexer"] - 3 * 64 * 7168  # head weights


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "m"
    argv = "--layers 2 --experts 4 --weights fp8 --vocab 129280".split()
    assert main(["--out", str(out), *argv]) == 0
    printed = capsys.readouterr().out
    total = sum(parameter_bytes(SliceConfig(2, 1, 4, vocab=129_280, weights="fp8")).values())
    assert f"{total / 2**30:8.3f} GiB  all parameters" in printed
    assert read(out)["quantization_config"] == QUANTIZATION
    assert main(["--out", str(out)]) == 0  # an earlier slice is overwritten
    assert "quantization_config" not in read(out)
    assert len(AutoTokenizer.from_pretrained(out)) == 320
    assert sorted(file.suffix for file in out.iterdir()).count(".safetensors") == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "0"], "layers must be an integer >= 1: got 0"),
        (["--experts", "1"], "experts must be an integer >= 2: got 1"),
        (["--dense-layers", "5"], "dense_layers must be <= layers 4: got 5"),
        (["--context", "163904"], "context must be <= 163840: got 163904"),
        (["--vocab", "256"], "vocab must be a multiple of 64 >= 320: got 256"),
        (["--weights", "int4"], "weights must be bf16 or fp8: got 'int4'"),
    ],
)
def test_refusals_are_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path / "m"), *argv])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"slice_model: {message}\n"
    assert not (tmp_path / "m").exists()


def test_the_launcher_takes_bf16_and_refuses_fp8_without_a_gpu(launch, tmp_path):
    def found(weights):
        path = write_slice(tmp_path / weights, SliceConfig(weights=weights))
        flags = "--load-format", "dummy", "--ess-platform", "cpu"
        return launch("--model-path", str(path), *flags)

    assert found("bf16")[1] == []
    refused(found("fp8"), "must not be quantized on the CPU platform: got quant_method 'fp8'")


def test_other_directories_are_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "must be empty or an earlier slice model" in capsys.readouterr().err


# The longer prompt's rows are attended in passes, whose outputs are rounded to bf16 and merged: one
# dense layer moved a logprob by 0.015, and by 0.9 where nothing was fetched.
TOLERANCE = 0.1


def weights_that_matter() -> None:
    """In an engine's process: dummy weights as large as a model's.

    SGLang's, under 0.001 and its norms' too, leave so little of attention that bf16 cannot show
    which rows it read.
    """
    from sglang.srt.model_loader import loader

    def fill(model) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.state_dict().items():
            if weight.dim() < 2:
                weight.fill_(float("bias" not in name))
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)

    loader.initialize_dummy_weights = fill


def served(model, ess, faults=()):
    """Outputs of a few decoded tokens of two prompts, and each layer's counters."""
    patches = ["support.gather:install", "support.tiers:expose", *faults]
    with EngineProcess(
        model,
        ess={"admission": "off"} | ess,
        patches=[
            "tests.testing.test_slice_model:weights_that_matter",
            *(f"tests.{p}" for p in patches),
        ],
        load_format="dummy",
        max_total_tokens=512,
        chunked_prefill_size=128,
    ) as engine:
        outputs = engine.together("slice", parity.prompts_of([90, 300]), 4, start=0)
        return outputs, engine.call("_hot_counters") if ess.get("enabled", True) else []


def worst(outputs, others) -> float:
    """Largest difference in logprobs, prompt and output; nan if one is."""
    return max(
        np.abs(getattr(a, name) - getattr(b, name)).max()
        for a, b in zip(outputs, others, strict=True)
        for name in ("logprobs", "prompt_logprobs")
    )


@pytest.mark.slow
def test_a_slice_is_served_with_dummy_weights(tmp_path):
    """True dimensions, one dense and one sparse layer of two experts: 1.8 GiB."""
    model = write_slice(tmp_path / "m", SliceConfig(layers=2, experts=2, context=4096))
    one, _ = served(model, {"enabled": False})
    two, counters = served(model, {"hot_ratio": 0.25, "canary_rate": 1.0})
    assert [a.token_ids for a in one] == [b.token_ids for b in two]
    assert worst(one, two) < TOLERANCE
    assert all(layer["misses"] > 0 for layer in counters), counters
    bad, _ = served(model, {"hot_ratio": 0.25}, ["support.two_tier_faults:no_fetch"])
    assert worst(one, bad) > 4 * TOLERANCE  # a row that was not fetched shows
