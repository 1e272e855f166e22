"""The architectures with DeepSeek sparse attention: how each was tried, and what is refused.

The list is that of SGLang's is_deepseek_dsa (sglang/srt/configs/model_config.py), which also wants
index_topk in config.json. docs/compatibility.md shows this table. Draft models (NextN) have no
row: each goes with its target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_ess.config import EssConfig


@dataclass(frozen=True)
class Architecture:
    """models: who has it; tried: how, with a tiny checkpoint; found: what came of it.

    missing: the missing piece, if it is not served
    """

    models: str
    tried: str
    found: str
    missing: str = ""


_LOADER = "SGLang's loader skips the indexer's weights (models/mistral_large_3.py: remapping)"
_BOTH_WAYS = "CPU platform, one tier and two"
_PARITY = "as transformers computes it, up to rounding"
ARCHITECTURES = {
    "DeepseekV32ForCausalLM": Architecture(
        "DeepSeek-V3.2", f"{_BOTH_WAYS}, against transformers' deepseek_v32", _PARITY
    ),
    "DeepseekV3ForCausalLM": Architecture(
        "DeepSeek-V3 with index_topk",
        f"{_BOTH_WAYS}, against transformers' deepseek_v32 on the same weights",
        _PARITY,
    ),
    "GlmMoeDsaForCausalLM": Architecture(
        "GLM-5, 5.1, 5.2, 5.3",
        f"{_BOTH_WAYS}, several ways to share top-k, against transformers' glm_moe_dsa",
        _PARITY,
    ),
    "HYV4ForCausalLM": Architecture(
        "Hy4",
        f"{_BOTH_WAYS}, against transformers' hy_v4",
        f"{_PARITY}, once its rope pairs dimensions as SGLang's does; no fp8 rows (SGLang refuses "
        "them beside attention sinks)",
    ),
    "LongcatFlashForCausalLM": Architecture(
        "LongCat with index_topk",
        f"{_BOTH_WAYS}, two against one; up to top-k tokens against transformers' longcat_flash, "
        "which has no indexer",
        "two tiers as one, bit for bit; only without zero experts, for which SGLang has a Triton "
        "kernel alone",
    ),
    "MistralLarge3ForCausalLM": Architecture(
        "Mistral Large 3 with index_topk",
        "an indexer's weights through SGLang's loader",
        "refused",
        _LOADER,
    ),
    "PixtralForConditionalGeneration": Architecture(
        "Mistral Large 3 with images and index_topk", "as the one above", "refused", _LOADER
    ),
    "Glm5NextForConditionalGeneration": Architecture(
        "GLM-5.3-Flash",
        f"{_BOTH_WAYS}, text alone, float32, against transformers' glm5_next",
        f"{_PARITY}; two tiers as one, bit for bit. No prefill and decode apart; refused with ESS "
        "on a GPU, whose backend has no pooled index keys",
    ),
    "Dots3NoteForCausalLM": Architecture(
        "dots3-note",
        "read, not run",
        "refused",
        "SGLang's model raises without CUDA (models/dots3_common/modeling.py: _require_cuda), and "
        "ESS has no pool of sliding and full layers",
    ),
}
# What the kernels of the CPU platform take (layout.py), where config.json says it.
CPU_SIZES = {"kv_lora_rank": (512,), "qk_rope_head_dim": (64, 0), "index_head_dim": (128,)}


def architecture_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool
) -> list[str]:
    """Why this model, which has sparse attention, cannot be served with two tiers or on the CPU."""
    if not (config.enabled or on_cpu):
        return []
    name = (model.get("architectures") or [None])[0]
    known = ARCHITECTURES.get(name)
    missing = known.missing if known else "it is not in docs/compatibility.md"
    remedy = "Serve another model" if on_cpu else "Add --disable-ess"
    if missing:
        return [f"--model-path must name an architecture that ESS serves: got {name}: {missing}. "
                f"{remedy}."]  # fmt: skip
    reasons = []
    sizes = {field: model[field] for field in CPU_SIZES if model.get(field) is not None}
    if on_cpu and any(size not in CPU_SIZES[field] for field, size in sizes.items()):
        rule = ", ".join(f"{field} {allowed[0]}" for field, allowed in CPU_SIZES.items())
        got = ", ".join(map(str, sizes.values()))
        reasons.append(f"--model-path must have {rule} on the CPU platform: got {got}. {remedy}.")
    if name == "LongcatFlashForCausalLM":
        reasons += _longcat_reasons(model, on_cpu, remedy)
    if model.get("learnable_sink", name == "HYV4ForCausalLM"):
        reasons += _sink_reasons(server_args, config, on_cpu)
    return reasons


def _longcat_reasons(model: Mapping[str, Any], on_cpu: bool, remedy: str) -> list[str]:
    reasons = []
    if not model.get("rope_scaling"):
        reasons.append(
            "--model-path must have rope_scaling in config.json: got none, with which SGLang's "
            f"LongCat fails to start (models/longcat_flash.py). {remedy}."
        )
    if on_cpu and (kind := model.get("zero_expert_type", "identity")) is not None:
        reasons.append(
            f"--model-path must have zero_expert_type null on the CPU platform: got {kind!r}, "
            f"which SGLang computes by a Triton kernel alone (models/longcat_flash.py). {remedy}."
        )
    return reasons


def _sink_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """What a model with attention sinks cannot have."""
    reasons = []
    if server_args.kv_cache_dtype == "fp8_e4m3":
        reasons.append(
            "--kv-cache-dtype must be auto or bfloat16 for a model with attention sinks: got "
            "fp8_e4m3, which SGLang refuses. Drop it."
        )
    if not on_cpu and (config.overlap in ("da", "dba") or config.overlap_costs):
        reasons.append(
            "--ess-overlap must be off for a model with attention sinks, which attention in parts "
            f"leaves out: got {config.overlap} and costs {config.overlap_costs!r}. Drop both."
        )
    if not on_cpu and config.attention != "sglang":
        reasons.append(
            "--ess-attention must be sglang for a model with attention sinks, which FlashInfer's "
            f"MLA kernels leave out: got {config.attention}. Drop it."
        )
    return reasons
