"""`python -m sglang_ess.tiny_model`: writes a random-weight DSA checkpoint, small and complete.

The directory loads with SGLang's ordinary loader and with transformers
(`AutoModelForCausalLM`, `AutoTokenizer`), so the two can be compared on one set of weights.
Everything that costs bytes is small; everything a DSA kernel fixes keeps its real size:
index_head_dim 128, kv_lora_rank 512 and qk_rope_head_dim 64 give SGLang's 656-byte fp8 row.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

KV_LORA_RANK, QK_ROPE_HEAD_DIM, INDEX_HEAD_DIM = 512, 64, 128
ROUTED_SCALING_FACTOR = 2.5  # DeepSeek-V3.2 and GLM-5
# transformers norms the two MLA latents and the indexer key with 1e-6 whatever the config says;
# SGLang uses rms_norm_eps for the latents. GLM-5's 1e-5 would make the two differ.
RMS_NORM_EPS = 1e-6
MARKER = "tiny_model.json"  # the recipe; its presence is what makes a directory ours to overwrite


@dataclass(frozen=True)
class _Arch:
    architecture: str
    model_type: str
    rope: str
    rope_theta: int
    groups: int
    topk_groups: int
    topk_freq: int


ARCHS = {
    "v32": _Arch("DeepseekV32ForCausalLM", "deepseek_v32", "yarn", 10_000, 2, 1, 1),
    "glm": _Arch("GlmMoeDsaForCausalLM", "glm_moe_dsa", "plain", 1_000_000, 1, 1, 2),
}


def count(default: int | None, low: int = 1, step: int = 1, help: str = "") -> Any:
    """An integer field that must be a multiple of step and at least low."""
    return field(default=default, metadata={"low": low, "step": step, "help": help})


def choice(default: str | None, choices: tuple[str, ...], help: str) -> Any:
    return field(default=default, metadata={"choices": choices, "help": help})


def field_problems(config: Any) -> Iterator[str]:
    """What is wrong with a dataclass whose fields are counts and choices, one line each."""
    for one in fields(config):
        value, rule = getattr(config, one.name), one.metadata
        if value is None:
            continue  # arch is unknown, which is reported
        if "choices" in rule:
            if value not in rule["choices"]:
                yield f"{one.name} must be {' or '.join(rule['choices'])}: got {value!r}"
        elif type(value) is not int or value < rule["low"] or value % rule["step"]:
            kind = f"a multiple of {rule['step']}" if rule["step"] > 1 else "an integer"
            yield f"{one.name} must be {kind} >= {rule['low']}: got {value!r}"


@dataclass(frozen=True)
class TinyModelConfig:
    """Shape of a tiny model; None means "as the architecture has it" and is resolved on creation.

    topk_freq (glm) is index_topk_freq: from layer 1 on, only every topk_freq-th layer runs an
    indexer; the others reuse the choice of the layer before.
    rope: SGLang's own CPU backend knows only "yarn"; this project's CPU platform serves both.
    dtype: a float32 checkpoint is served as float16 unless SGLang is told --dtype float32.
    Raises: ValueError, one line, naming every field that is out of range.
    """

    # Multiples of 32 and 64 are what SGLang's packed CPU GEMM and KV pages want. Two indexer
    # heads are the least that keep scores from tying at 0.
    arch: str = choice("v32", tuple(ARCHS), "v32: DeepSeek-V3.2; glm: GLM-5")
    layers: int = count(4)
    dense_layers: int = count(1, low=0, help="leading layers with a dense MLP")
    heads: int = count(8)
    hidden: int = count(256, low=64, step=64)
    intermediate: int = count(512, low=32, step=32)
    moe_intermediate: int = count(128, low=32, step=32)
    experts: int = count(8, low=2)
    experts_per_token: int = count(2)
    groups: int | None = count(None, help="expert groups")
    topk_groups: int | None = count(None, help="expert groups a token may use")
    index_heads: int = count(8, low=2)
    index_topk: int = count(128, help="KV rows each query attends to")
    topk_freq: int | None = count(None, help="glm: one indexer every N layers")
    q_lora_rank: int = count(128, low=32, step=32)
    # FA3, which SGLang's dense prefill of short prompts takes on a GPU, wants DeepSeek's 128 and
    # 128 (or another pair of its list): "Q/K headdim in (128, 192] and V headdim in (96, 128]".
    nope_dim: int = count(64, low=32, step=32, help="a head's query and key part without rope")
    v_dim: int = count(64, low=32, step=32, help="a head's value")
    context: int = count(16_384, low=256, step=64, help="max_position_embeddings, in tokens")
    rope: str | None = choice(None, ("yarn", "plain"), "yarn or plain")
    # DeepSeek-V3.2 has 40; 4 keeps the unscaled part of a 16k context at 4k
    yarn_factor: int = count(4, low=2, help="context / its unscaled part")
    dtype: str = choice("bfloat16", ("bfloat16", "float32"), "bfloat16 or float32")
    seed: int = count(0, low=0)

    def __post_init__(self):
        for name in ("rope", "groups", "topk_groups", "topk_freq"):
            if getattr(self, name) is None and self.arch in ARCHS:
                object.__setattr__(self, name, getattr(ARCHS[self.arch], name))
        problems = [*field_problems(self)] or [*self._relation_problems()]
        if problems:
            raise ValueError("; ".join(problems))

    def _relation_problems(self):
        per_group = self.experts // self.groups
        reachable = per_group * self.topk_groups
        if self.experts % self.groups or per_group < 2:
            yield (
                f"experts must split into groups of 2 or more: "
                f"got {self.experts} experts in {self.groups} groups"
            )
        elif self.topk_groups > self.groups:
            yield f"topk_groups must be <= groups {self.groups}: got {self.topk_groups}"
        elif self.experts_per_token > reachable:
            yield (
                f"experts_per_token must be <= {reachable} (topk_groups {self.topk_groups} "
                f"x {per_group} experts): got {self.experts_per_token}"
            )
        if self.index_topk > self.context:
            yield f"index_topk must be <= context {self.context}: got {self.index_topk}"
        if self.context % self.yarn_factor:
            yield f"yarn_factor must divide context {self.context}: got {self.yarn_factor}"
        if self.dense_layers > self.layers:
            yield f"dense_layers must be <= layers {self.layers}: got {self.dense_layers}"
        if self.arch == "v32" and self.topk_freq != 1:
            yield f"topk_freq must be 1 for arch v32 (it shares no indexer): got {self.topk_freq}"

    @property
    def indexer_types(self) -> list[str]:
        """Per layer "full" or "shared", for index_skip_topk_offset 2 (both libraries' default)."""
        return ["shared" if max(i - 1, 0) % self.topk_freq else "full" for i in range(self.layers)]

    @property
    def attention_mscale(self) -> float:
        """What yarn multiplies the softmax scale by, in both libraries: (0.1 ln factor + 1)^2."""
        return (0.1 * math.log(self.yarn_factor) + 1) ** 2 if self.rope == "yarn" else 1.0


def rope_parameters(config: TinyModelConfig) -> dict:
    """config.json's rope block, in the form transformers 5 and (through it) SGLang read.

    mscale == mscale_all_dim, as DeepSeek-V3.2 has it: cos and sin then stay unscaled and the
    softmax scale alone carries the factor. With mscale_all_dim 0 or absent transformers and
    SGLang compute different cos. factor x original length is exactly the context, because
    SGLang's table ends there.
    """
    theta = ARCHS[config.arch].rope_theta
    if config.rope == "plain":
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": config.yarn_factor,
        "original_max_position_embeddings": config.context // config.yarn_factor,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def model_config(config: TinyModelConfig, vocab_size: int, token_ids: dict[str, int]) -> dict:
    """config.json. token_ids: bos_token_id, eos_token_id, pad_token_id."""
    arch = ARCHS[config.arch]
    result = {
        "architectures": [arch.architecture],
        "model_type": arch.model_type,
        "dtype": config.dtype,
        "vocab_size": vocab_size,
        **token_ids,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.intermediate,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_NORM_EPS,
        "tie_word_embeddings": False,
        "max_position_embeddings": config.context,
        "rope_parameters": rope_parameters(config),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "attention_bias": False,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": KV_LORA_RANK,
        "qk_rope_head_dim": QK_ROPE_HEAD_DIM,
        "qk_nope_head_dim": config.nope_dim,
        "v_head_dim": config.v_dim,
        "index_head_dim": INDEX_HEAD_DIM,
        "index_n_heads": config.index_heads,
        "index_topk": config.index_topk,
        "first_k_dense_replace": config.dense_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config.moe_intermediate,
        "n_routed_experts": config.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": config.experts_per_token,
        "n_group": config.groups,
        "topk_group": config.topk_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": ROUTED_SCALING_FACTOR,
        "ep_size": 1,
    }
    if config.arch == "glm":
        # transformers hard-codes GLM's interleaved indexer rope; SGLang asks the config.
        result["indexer_rope_interleave"] = True
        result["index_topk_freq"] = config.topk_freq
        result["index_skip_topk_offset"] = 2
        result["indexer_types"] = config.indexer_types
    return result


def write_tiny_model(out_dir: str | os.PathLike, config: TinyModelConfig) -> Path:
    """Writes config, weights, tokenizer and chat template into out_dir (created if need be).

    Equal configs give equal bytes on one machine. An earlier tiny model in out_dir is overwritten.
    Returns: out_dir.  Raises: ValueError if out_dir holds anything else.
    """
    out = claim(out_dir, MARKER, config)
    # Imported here: a refused command line should not wait for torch.
    from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE
    from sglang_ess.testing.tiny_weights import write_weights

    write_weights(out / "model.safetensors", config, VOCAB_SIZE)
    write_small_files(out, model_config(config, VOCAB_SIZE, TOKEN_IDS))
    return out


def claim(out_dir: str | os.PathLike, marker: str, recipe: Any) -> Path:
    """out_dir, created if need be, with the dataclass recipe in its file `marker`.

    Raises: ValueError if out_dir is a file, or holds anything without such a marker.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory: {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        kind = marker.removesuffix(".json").replace("_", " ")
        raise ValueError(f"out must be empty or an earlier {kind}: {out} has no {marker}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / marker, asdict(recipe))  # first: an interrupted write stays ours
    return out


def write_small_files(out: Path, config: dict) -> None:
    """The tokenizer, config.json and generation_config.json of a model_config()."""
    from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS, write_tokenizer

    write_tokenizer(out, model_max_length=config["max_position_embeddings"])
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", TOKEN_IDS)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_command(
    name: str, description: str, recipe: type, write: Callable[[str, Any], str],
    argv: list[str] | None,
) -> int:  # fmt: skip
    """A command line with --out and one option for each field of the dataclass `recipe`.

    write(out, recipe): does the work and says what it wrote
    A refusal is one line on stderr and exit status 2.
    """
    parser = argparse.ArgumentParser(prog=f"python -m sglang_ess.{name}", description=description)
    parser.add_argument("--out", required=True, help="directory to write")
    for one in fields(recipe):
        default = "as the arch has it" if one.default is None else one.default
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=str if "choices" in one.metadata else int,
            default=one.default,
            help=f"{one.metadata['help']} [{default}]".strip(),
        )

    def fail(message: str) -> NoReturn:
        print(f"{name}: {message}", file=sys.stderr)
        raise SystemExit(2)

    parser.error = fail  # argparse would print its usage as well
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    try:
        print(write(out, recipe(**options)))
    except (ValueError, OSError) as error:
        fail(str(error))
    return 0


def main(argv: list[str] | None = None) -> int:
    def write(out: str, config: TinyModelConfig) -> str:
        path = write_tiny_model(out, config)
        size_mib = (path / "model.safetensors").stat().st_size / 2**20
        return f"wrote {path} ({size_mib:.1f} MiB of weights)"

    what = "Write a random-weight DSA model that SGLang and transformers load."
    return run_command("tiny_model", what, TinyModelConfig, write, argv)


if __name__ == "__main__":
    sys.exit(main())
