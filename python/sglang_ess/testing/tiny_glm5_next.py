"""A tiny GLM-5.3-Flash (Glm5NextForConditionalGeneration): its config.json and its weights.

Linear attention (KDA) and sparse attention take turns: layer 0 is linear, layer 1 sparse, and so
on. One index key stands for KPOOL tokens, there is no rope, and the residual is HC_MULT streams.
The vision tower is as small as it can be; no test feeds it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from sglang_ess.testing.tiny_config import (
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    RMS_NORM_EPS,
    TinyModelConfig,
)
from sglang_ess.testing.tiny_weights import (
    ATTENTION_GAIN,
    ATTENTION_LOGIT_STD,
    INDEXER_ALIKENESS,
    MLP_GAIN,
    Draws,
    blend,
    ends,
    head_signs,
    index_queries,
    mlp,
    moe,
)

KPOOL = 4
HC_MULT = 4
SWIGLU_LIMIT = 2.0  # 10 in the release, which no activation of a tiny model reaches
LINEAR_HEADS, LINEAR_HEAD_DIM, CONV_WIDTH = 2, 32, 4
FORGET_LOWER_BOUND = -5.0
# Logs of the decay of a token: -5 * sigmoid(about -4) forgets a tenth of the state.
FORGET_BIAS = -4.0
VISION: dict[str, Any] = {
    "model_type": "glm5_next_vision",
    "depth": 1,
    "hidden_size": 32,
    "hidden_act": "silu",
    "attention_bias": True,
    "num_heads": 2,
    "in_channels": 3,
    "image_size": 28,
    "patch_size": 14,
    "rms_norm_eps": RMS_NORM_EPS,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "intermediate_size": 32,
    "projection_intermediate_size": 32,
    "swiglu_limit": SWIGLU_LIMIT,
}


# SGLang looks for both when it starts; a test feeds neither.
PROCESSORS = {
    "preprocessor_config.json": {
        "image_processor_type": "Glm5NextImageProcessor",
        "processor_class": "Glm5NextProcessor",
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Glm5NextVideoProcessor",
        "processor_class": "Glm5NextProcessor",
    },
}


def is_linear(layer: int) -> bool:
    return layer % 2 == 0


def model_config(base: dict[str, Any], config: TinyModelConfig) -> dict[str, Any]:
    """Return config.json. base: the text model's fields that DeepSeek's models share."""
    layers = range(config.layers)
    text = base | {
        "model_type": "glm5_next_text",
        "num_hidden_layers": config.layers,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "swiglu_limit": SWIGLU_LIMIT,
        "mhc": True,
        "hc_mult": HC_MULT,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "index_kpool": KPOOL,
        "index_kpool_compress": True,
        "index_kpool_always_select_tail": True,
        "index_topk_freq": 1,
        "layer_types": ["linear_attention" if is_linear(i) else "full_attention" for i in layers],
        "mlp_layer_types": ["dense" if i < config.dense_layers else "sparse" for i in layers],
        "indexer_types": ["full" for _ in layers],
        "linear_attn_config": {
            "full_attn_layers": [i for i in layers if not is_linear(i)],
            "kda_layers": [i for i in layers if is_linear(i)],
            "head_dim": LINEAR_HEAD_DIM,
            "num_heads": LINEAR_HEADS,
            "short_conv_kernel_size": CONV_WIDTH,
            "gate_lower_bound": FORGET_LOWER_BOUND,
            "safe_gate": True,
        },
    }
    for name in ("architectures", "rope_parameters", "ep_size"):
        text.pop(name, None)
    tokens = {name: base[name] for name in base if name.endswith("_token_id")}
    return {
        "architectures": ["Glm5NextForConditionalGeneration"],
        "model_type": "glm5_next",
        "dtype": base["dtype"],
        "tie_word_embeddings": False,
        "max_position_embeddings": config.context,
        **tokens,
        "text_config": text,
        "vision_config": VISION | {"out_hidden_size": config.hidden},
    }


def checkpoint_tensors(
    config: TinyModelConfig, vocab_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (hub name, float32 values) of every tensor. Linear weights are [out, in]."""
    draws = Draws(config.seed, config.hidden)
    for name, values in (*ends(draws, vocab_size), *_layers(config, draws)):
        # The language model lies beside the vision tower.
        inner = name.startswith("model.")
        yield name.replace("model.", "model.language_model.", 1) if inner else name, values
    yield from vision(config, draws)


def _layers(config: TinyModelConfig, draws: Draws) -> Iterator[tuple[str, np.ndarray]]:
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", draws.norm(prefix + norm, config.hidden)
        yield from streams(config, draws, prefix)
        attention = linear_attention if is_linear(layer) else sparse_attention
        yield from attention(config, draws, prefix + "self_attn.")
        if layer < config.dense_layers:
            yield from mlp(config, draws, prefix + "mlp.", config.intermediate, MLP_GAIN)
        else:
            yield from moe(config, draws, prefix + "mlp.")


def streams(config: TinyModelConfig, draws: Draws, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the hyper-connections of one layer: how streams are read, written and mixed."""
    width = (2 + HC_MULT) * HC_MULT
    for half in ("attn", "ffn"):
        name = f"{prefix}hc_{half}"
        yield f"{name}_fn", draws.matrix(f"{name} fn", width, HC_MULT * config.hidden, gain=0.5)
        yield f"{name}_base", np.float32(0.5) * draws.normal(f"{name} base", width)
        yield f"{name}_scale", 1 + np.float32(0.1) * draws.normal(f"{name} scale", 3)


def linear_attention(
    config: TinyModelConfig, draws: Draws, name: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield one KDA layer."""
    width = LINEAR_HEADS * LINEAR_HEAD_DIM
    yield name + "q_proj.weight", draws.matrix(name + "q", width, config.hidden)
    yield name + "k_proj.weight", draws.matrix(name + "k", width, config.hidden)
    yield name + "v_proj.weight", draws.blind(name + "v", width)
    for part in "qkv":
        taps = draws.normal(f"{name}{part} conv", width, 1, CONV_WIDTH)
        yield f"{name}{part}_conv1d.weight", np.float32(CONV_WIDTH**-0.5) * taps
    yield name + "f_a_proj.weight", draws.matrix(name + "f_a", LINEAR_HEAD_DIM, config.hidden)
    yield name + "f_b_proj.weight", draws.matrix(name + "f_b", width, LINEAR_HEAD_DIM)
    yield name + "dt_bias", np.float32(FORGET_BIAS) + draws.normal(name + "dt", width)
    yield name + "A_log", np.float32(0.3) * draws.normal(name + "A", LINEAR_HEADS)
    yield name + "b_proj.weight", draws.matrix(name + "b", LINEAR_HEADS, config.hidden)
    yield name + "g_a_proj.weight", draws.matrix(name + "g_a", LINEAR_HEAD_DIM, config.hidden)
    yield name + "g_b_proj.weight", draws.matrix(name + "g_b", width, LINEAR_HEAD_DIM)
    yield name + "o_norm.weight", draws.norm(name + "o_norm", LINEAR_HEAD_DIM)
    yield (
        name + "o_proj.weight",
        draws.matrix(name + "o", config.hidden, width, gain=ATTENTION_GAIN),
    )


def sparse_attention(
    config: TinyModelConfig, draws: Draws, name: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield one DSA layer without rope. Its indexer agrees with its heads, as in tiny_weights."""
    q_rank, alike = config.q_lora_rank, min(config.nope_dim, INDEX_HEAD_DIM)
    kv_a = draws.blind(name + "kv_a", KV_LORA_RANK)
    index_k = draws.matrix(name + "index k", INDEX_HEAD_DIM, KV_LORA_RANK)
    index_q = index_queries(config, draws, name)
    q_b = draws.matrix(name + "q", config.heads, config.nope_dim, q_rank)
    even = index_q[::2]
    like = even[np.arange(config.heads) % len(even)]
    q_b[:, :alike] = blend(INDEXER_ALIKENESS, like[:, :alike], q_b[:, :alike])
    k_b = draws.matrix(name + "k", config.heads, config.nope_dim, KV_LORA_RANK)
    k_b[:, :alike] = blend(INDEXER_ALIKENESS, index_k[:alike], k_b[:, :alike])
    v_b = draws.matrix(name + "v", config.heads, config.v_dim, KV_LORA_RANK)
    yield name + "q_a_proj.weight", draws.matrix(name + "q_a", q_rank, config.hidden)
    yield name + "q_a_layernorm.weight", draws.norm(name + "q_a norm", q_rank)
    yield name + "q_b_proj.weight", (q_b * np.float32(ATTENTION_LOGIT_STD)).reshape(-1, q_rank)
    yield name + "kv_a_proj_with_mqa.weight", kv_a
    yield name + "kv_a_layernorm.weight", draws.norm(name + "kv_a norm", KV_LORA_RANK)
    yield name + "kv_b_proj.weight", np.concatenate([k_b, v_b], axis=1).reshape(-1, KV_LORA_RANK)
    width = config.heads * config.v_dim
    yield (
        name + "o_proj.weight",
        draws.matrix(name + "o", config.hidden, width, gain=ATTENTION_GAIN),
    )
    yield from indexer(config, draws, name + "indexer.", index_q, index_k @ kv_a)


def indexer(
    config: TinyModelConfig, draws: Draws, name: str, queries: np.ndarray, keys: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the indexer of one layer, and what weighs the keys of a pool against each other."""
    own = draws.matrix(name + "weights", config.index_heads, config.hidden, gain=0.1)
    yield name + "wq_b.weight", queries.reshape(-1, config.q_lora_rank)
    yield name + "wk.weight", keys
    yield name + "k_norm.weight", draws.norm(name + "k_norm", INDEX_HEAD_DIM)
    yield name + "k_norm.bias", np.float32(0.1) * draws.normal(name + "k_norm bias", INDEX_HEAD_DIM)
    # Every hidden state contains the mean of the embeddings, so a head's weight keeps its sign.
    signed = head_signs(config)[:, None] * draws.mean / config.hidden
    yield name + "weights_proj.weight", signed + own
    ape = np.float32(0.5) * draws.normal(name + "ape", KPOOL, INDEX_HEAD_DIM)
    yield name + "index_kpool_compress_ape", ape
    yield name + "index_kpool_compress_gate", draws.blind(name + "gate", INDEX_HEAD_DIM)


def vision(config: TinyModelConfig, draws: Draws) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the vision tower."""
    width, inner, out = VISION["hidden_size"], VISION["intermediate_size"], config.hidden
    patch = (width, 3, VISION["temporal_patch_size"], VISION["patch_size"], VISION["patch_size"])
    merged = (out, width, VISION["spatial_merge_size"], VISION["spatial_merge_size"])
    head = width // VISION["num_heads"]
    block = {
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "attn.q_norm.weight": (head,),
        "attn.k_norm.weight": (head,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.gate_proj.bias": (inner,),
        "mlp.up_proj.weight": (inner, width),
        "mlp.up_proj.bias": (inner,),
        "mlp.down_proj.weight": (width, inner),
        "mlp.down_proj.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": patch,
        "patch_embed.proj.bias": (width,),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "post_layernorm.weight": (width,),
        "downsample.weight": merged,
        "downsample.bias": (out,),
        "merger.proj.weight": (out, out),
        "merger.post_projection_norm.weight": (out,),
        "merger.post_projection_norm.bias": (out,),
        "merger.gate_proj.weight": (inner, out),
        "merger.up_proj.weight": (inner, out),
        "merger.down_proj.weight": (out, inner),
    }
    for name, shape in shapes.items():
        name = f"model.visual.{name}"
        yield name, np.float32(0.05) * draws.normal(name, *shape)
