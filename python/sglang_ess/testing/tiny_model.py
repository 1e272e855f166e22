"""`python -m sglang_ess.tiny_model`: write a small checkpoint of random weights with DSA.

SGLang's ordinary loader and transformers (`AutoModelForCausalLM`, `AutoTokenizer`) both load the
directory, so that they can be compared on one set of weights. tiny_config.py says which sizes
are small and which are DeepSeek's.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from sglang_ess.testing.tiny_config import (
    ARCHS,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    QK_ROPE_HEAD_DIM,
    RMS_NORM_EPS,
    ROUTED_SCALING_FACTOR,
    TinyModelConfig,
)

MARKER = "tiny_model.json"  # the recipe; a directory that holds it may be overwritten


def rope_parameters(config: TinyModelConfig) -> dict:
    """Return config.json's rope block, in the form that transformers 5 and SGLang read.

    mscale equals mscale_all_dim as in DeepSeek-V3.2. Then cos and sin stay unscaled, and only
    the softmax scale carries the factor. With mscale_all_dim 0 or absent, transformers and
    SGLang compute different cos. Factor times original length must be the context exactly,
    because SGLang's table ends there.
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
    """Return config.json. token_ids: bos_token_id, eos_token_id, pad_token_id."""
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
        **arch.config,
    }
    if not arch.indexer_halves:
        # transformers hard-codes the interleaved rope of GLM's indexer; SGLang reads it here.
        result["indexer_rope_interleave"] = True
    if "streams" in arch.parts:
        sparse = config.layers - config.dense_layers
        result["mlp_layer_types"] = ["dense"] * config.dense_layers + ["sparse"] * sparse
    result |= _mtp_fields(config)
    if "pairs" in arch.parts:
        result |= _pair_fields(config) | {"rope_scaling": result.pop("rope_parameters")}
    elif arch.shares:
        result |= sharing_fields(config) | {"indexer_types": config.indexer_types}
    if config.arch == "glm5_next":
        from sglang_ess.testing import tiny_glm5_next

        return tiny_glm5_next.model_config(result, config)
    return result


def _mtp_fields(config: TinyModelConfig) -> dict:
    """Return what a model without an MTP layer does not say."""
    layers = {"num_nextn_predict_layers": 1} if config.mtp_layers else {}
    shared = {"index_share_for_mtp_iteration": True} if config.index_share_for_mtp_iteration else {}
    return layers | shared


def _pair_fields(config: TinyModelConfig) -> dict:
    """Return LongCat's names of sizes. Its cli_factor counts layers of attention, two a layer."""
    return {
        "num_layers": config.layers // 2,
        "num_hidden_layers": config.layers // 2,
        "ffn_hidden_size": config.intermediate,
        "expert_ffn_hidden_size": config.moe_intermediate,
        "moe_topk": config.experts_per_token,
        "cli_factor": config.topk_freq,
        "rope_theta": ARCHS[config.arch].rope_theta,
    }


def sharing_fields(config: TinyModelConfig) -> dict:
    """Return what config.json says of sharing, beside the list indexer_types, which is the same."""
    if config.sharing:
        return {"index_topk_pattern": config.sharing}
    return {"index_topk_freq": config.topk_freq, "index_skip_topk_offset": config.skip_offset}


def write_tiny_model(out_dir: str | os.PathLike, config: TinyModelConfig) -> Path:
    """Write config, weights, tokenizer and chat template into out_dir, created if need be.

    Equal configs give equal bytes on one machine. An earlier tiny model in out_dir is overwritten.
    Returns: out_dir.  Raises: ValueError if out_dir holds anything else.
    """
    out = prepare_directory(out_dir, MARKER, config)
    # Imported here: a refused command line should not wait for torch.
    from sglang_ess.testing import tiny_drafts, tiny_glm5_next, tiny_mtp, tiny_weights
    from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE

    special = config.arch == "glm5_next"
    of_arch = tiny_glm5_next if special else tiny_weights
    tensors = dict(of_arch.checkpoint_tensors(config, VOCAB_SIZE))
    if config.mtp_layers:
        tensors |= tiny_mtp.mtp_tensors(config, VOCAB_SIZE)
    if config.drafts == "right":
        tensors |= tiny_drafts.changed_tensors(config, tensors)
    tiny_weights.write_weights(out / "model.safetensors", tensors.items(), config.dtype)
    write_small_files(out, model_config(config, VOCAB_SIZE, TOKEN_IDS))
    for name, content in tiny_glm5_next.PROCESSORS.items() if special else ():
        write_json(out / name, content)
    return out


def prepare_directory(out_dir: str | os.PathLike, marker: str, recipe: Any) -> Path:
    """Create out_dir if need be, write the dataclass `recipe` into its file `marker`, return it.

    Raises: ValueError if out_dir is a file, or is not empty and has no such marker.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory: {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        kind = marker.removesuffix(".json").replace("_", " ")
        raise ValueError(f"out must be empty or an earlier {kind}: {out} has no {marker}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / marker, asdict(recipe))  # first, so that an interrupted write can be repeated
    return out


def write_small_files(out: Path, config: dict) -> None:
    """Write tokenizer, config.json and generation_config.json; config: as model_config gives it."""
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
    """Run a command line with --out and one option for each field of the dataclass `recipe`.

    write(out, recipe): does the work and returns the text to print
    Returns 0. A refused option is one line on stderr and exit status 2.
    """
    parser = argparse.ArgumentParser(prog=f"python -m sglang_ess.{name}", description=description)
    parser.add_argument("--out", required=True, help="directory to write")
    for one in fields(recipe):
        default = "as the arch has it" if one.default is None else one.default
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=int if "low" in one.metadata else str,
            default=one.default,
            help=f"{one.metadata['help']} [{default}]".strip(),
        )

    def fail(message: str) -> NoReturn:
        print(f"{name}: {message}", file=sys.stderr)
        raise SystemExit(2)

    parser.error = fail  # type: ignore[method-assign]  # argparse would also print its usage
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
