"""Speculative decoding: which of SGLang's kinds two tiers and the CPU platform serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_ess.config import EssConfig
from sglang_ess.launch.option_rules import Rules, rule_reasons

WITH_DRAFT_MODEL = ("EAGLE", "NEXTN")
ALGORITHMS = (*WITH_DRAFT_MODEL, "NGRAM")
# Chains of as many drafts in each step: sparse attention sees the slots before a query, and a
# tree's other branches are among them.
CHAIN_RULES: Rules = (
    ("speculative_adaptive", "--speculative-adaptive", (False,)),
    ("enable_multi_layer_eagle", "--enable-multi-layer-eagle", (False,)),
)
EAGLE_RULES: Rules = (("speculative_eagle_topk", "--speculative-eagle-topk", (None, 1)),)
NGRAM_RULES: Rules = (
    ("speculative_ngram_max_bfs_breadth", "--speculative-ngram-max-bfs-breadth", (1,)),
    # SGLang hands a decode server nothing to draft from: its scheduler ends at the first request.
    ("disaggregation_mode", "--disaggregation-mode", ("null",)),
)
CPU_RULES: Rules = (
    # SGLang has a Triton kernel alone for these two.
    ("speculative_use_rejection_sampling", "--speculative-use-rejection-sampling", (False,)),
    ("speculative_use_block_verification", "--speculative-use-block-verification", (False,)),
    ("speculative_draft_attention_backend", "--speculative-draft-attention-backend", (None, "dsa")),
    ("speculative_draft_kv_cache_dtype", "--speculative-draft-kv-cache-dtype", (None,)),
)


def early_fetch_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool
) -> list[str]:
    """Why --ess-early-fetch could not be obeyed: one line, or none."""
    pool, got = model.get("index_kpool") or 1, f"got {config.early_fetch}"
    broken = {
        f"be left out off the CPU platform: {got}. On a GPU, SGLang's fused top-k keeps no score, "
        "so nothing says which rows just missed a list": not on_cpu,
        f"come with --speculative-algorithm: {got} without. No drafts are computed": (
            server_args.speculative_algorithm is None
        ),
        "be left out for a model whose index keys stand for several tokens: got index_kpool "
        f"{pool}": pool > 1,
        f"not come with --ess-topk-stream, whose lists no indexer has scored: {got}": (
            bool(config.topk_stream)
        ),
    }
    reasons = [
        f"--ess-early-fetch must {rule}. Drop it." for rule, is_so in broken.items() if is_so
    ]
    return reasons[:1] if config.enabled and config.early_fetch else []


def speculation_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool, sparse: bool
) -> list[str]:
    """Why this model cannot be served with SGLang's options for speculative decoding.

    sparse: whether it has DeepSeek sparse attention
    """
    given = server_args.speculative_algorithm
    two_tiers = config.enabled and server_args.disaggregation_mode != "prefill"
    if given is None or not (on_cpu or two_tiers):
        return []
    where = "on the CPU platform" if on_cpu else "with ESS"
    remedy = "Drop or change it" if on_cpu else "Drop it or add --disable-ess"
    algorithm = given.upper()
    if on_cpu and (not sparse or model.get("linear_attn_config")):
        return [
            "--speculative-algorithm must be unset on the CPU platform for a model whose layers "
            f"are not all of DeepSeek sparse attention: got {given}. {remedy}."
        ]
    if algorithm not in ALGORITHMS:
        return [
            f"--speculative-algorithm must be unset or {' or '.join(ALGORITHMS)} {where}: got "
            f"{given}. {remedy}."
        ]
    rules = CHAIN_RULES + (NGRAM_RULES if algorithm == "NGRAM" else EAGLE_RULES)
    rules += CPU_RULES if on_cpu else ()
    reasons = rule_reasons(server_args, rules, f"with speculative decoding {where}", remedy)
    path = server_args.speculative_draft_model_path
    own = path is None or path == server_args.model_path
    if algorithm in WITH_DRAFT_MODEL and own and not model.get("num_nextn_predict_layers"):
        reasons.append(
            f"--speculative-algorithm {given} must have a model with a draft layer: got "
            f"num_nextn_predict_layers {model.get('num_nextn_predict_layers')} in config.json. "
            "Serve one that has it, name another by --speculative-draft-model-path, or use NGRAM "
            "with --speculative-ngram-max-bfs-breadth 1."
        )
    return reasons
