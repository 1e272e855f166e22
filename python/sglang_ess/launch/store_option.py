"""--ess-store: what it says to SGLang's linker of an external store, and where it is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sglang_ess.config import LINKER_MODULE, EssConfig
from sglang_ess.errors import Refusal
from sglang_ess.launch.option_rules import Rules, rule_reasons
from sglang_ess.layout import GIB, MIB

UNITS = {"MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB}
AUTO_SHARE = 0.5  # of the file system, without a size

STORE_RULES: Rules = (
    ("disable_radix_cache", "--disable-radix-cache", (False,)),
    ("radix_cache_backend", "--radix-cache-backend", (None,)),
    ("enable_hierarchical_cache", "--enable-hierarchical-cache", (False,)),
    ("enable_lmcache", "--enable-lmcache", (False,)),
    ("enable_flexkv", "--enable-flexkv", (False,)),
    # --ess-store says these itself.
    (
        "enable_unified_cache_external_linker",
        "--enable-unified-cache-external-linker",
        (False,),
    ),
    ("unified_cache_external_linker_config", "--unified-cache-external-linker-config", (None,)),
    # An adapter's name does not say which weights it has.
    ("enable_lora", "--enable-lora", (None, False)),
    ("lora_paths", "--lora-paths", (None, [])),
    # Stages would find different prefixes, and SGLang compares within a stage only.
    ("pp_size", "--pp-size", (1,)),
    ("nnodes", "--nnodes", (1,)),
    ("enable_dp_attention", "--enable-dp-attention", (False,)),
    # SGLang looks nothing up on a decode server (mem_cache/unified_radix_cache.py,
    # _finalize_match_result), and on a prefill server nobody has tried it.
    ("disaggregation_mode", "--disaggregation-mode", ("null",)),
    # Not tried yet, or not finished: tests/serving/test_third_tier.py has what is.
    ("tp_size", "--tp-size", (1,)),
    ("dp_size", "--dp-size", (1,)),
    ("speculative_algorithm", "--speculative-algorithm", (None,)),
)


# They fill a layer's rows while earlier layers run, and the pool's buffers would wait for them in
# SGLang's own attention. Two tiers and the CPU platform read the rows elsewhere: too early.
OTHER_LINKER = (
    "--enable-unified-cache-external-linker must be off, or on with ESS's own linker: got another. "
    "Use --ess-store PATH[:SIZE], or drop it."
)


class StoreSpec(NamedTuple):
    """A store's directory and its largest size in bytes."""

    path: Path
    limit_bytes: int

    @classmethod
    def parse(cls, text: str) -> StoreSpec:
        """PATH[:SIZE]. Raises: Refusal for a size that is none, or no directory for the store."""
        path, size = text, None
        if found := re.fullmatch(r"(.+):(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text):
            path, number, unit = found.groups()
            size = int(float(number) * UNITS.get(unit, 0))
            if not size:
                raise Refusal(
                    "--ess-store must be PATH[:SIZE], with a size above 0 in MiB, GiB or TiB: got "
                    f"{text!r}. Write for example {path}:200GiB."
                )
        directory = Path(path).absolute()
        if not directory.parent.is_dir() or (directory.exists() and not directory.is_dir()):
            raise Refusal(
                "--ess-store must name a directory, or a new one in a directory that exists: got "
                f"{path!r}. Create its parent or correct the path."
            )
        whole = shutil.disk_usage(directory if directory.exists() else directory.parent).total
        if size is None:
            size = int(whole * AUTO_SHARE)
        elif size > whole:
            raise Refusal(
                f"--ess-store must fit into its file system: got {size / GIB:.2f} GiB, limit "
                f"{whole / GIB:.2f} GiB. Lower the size."
            )
        return cls(directory, size)


def linker_options(spec: StoreSpec) -> dict[str, Any]:
    """The options of SGLang by which it makes our linker: the long way to say --ess-store."""
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "EssLinker",
            "linker_module_path": LINKER_MODULE,
            "linker_extra_config": {"path": str(spec.path), "limit_bytes": spec.limit_bytes},
        },
    }


def apply(server_args: Any, config: EssConfig) -> None:
    """Set SGLang's options of the linker if --ess-store is given. Raises: Refusal."""
    if config.store:
        for name, value in linker_options(StoreSpec.parse(config.store)).items():
            setattr(server_args, name, value)


def _linker_module(server_args: Any) -> str | None:
    """The module of the linker that SGLang's own options ask for; None: they ask for none."""
    if not server_args.enable_unified_cache_external_linker:
        return None
    options = server_args.unified_cache_external_linker_config or {}
    options = json.loads(options) if isinstance(options, str) else options
    return str(options.get("linker_module_path"))


def store_reasons(
    server_args: Any, model: Mapping[str, Any] | None, config: EssConfig, on_cpu: bool
) -> list[str]:
    """Why --ess-store cannot be obeyed. server_args: before apply()"""
    if not config.store:
        is_ours = _linker_module(server_args) in (None, LINKER_MODULE)
        return [] if is_ours or not (config.enabled or on_cpu) else [OTHER_LINKER]
    reasons = []
    try:
        StoreSpec.parse(config.store)
    except Refusal as refusal:
        reasons.append(str(refusal))
    reasons += rule_reasons(server_args, STORE_RULES, "with --ess-store", "Drop one of the two")
    if not config.enabled and not on_cpu:
        reasons.append(
            "--ess-store must have two tiers on a GPU: got --disable-ess. Drop one of the two: "
            "nobody has measured latent rows that go from a GPU to files."
        )
    facts = model or {}
    if facts.get("linear_attn_config") or (facts.get("index_kpool") or 1) > 1:
        reasons.append(
            "--ess-store must have a model whose layers are all of DeepSeek sparse attention with "
            "an index key for each token: got "
            f"architectures {facts.get('architectures')}. Drop it."
        )
    return reasons
