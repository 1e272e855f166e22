"""ESS's options: one frozen record, with its command-line flags and its environment variable.

To add an option, add a field to `EssConfig`. The flag, the help text and the checks come from the
field's metadata.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

ENV_VAR = "SGLANG_ESS_CONFIG"
TEMPLATE = "SGLANG_ESS_TEMPLATE"  # variable: prefix of the names of a server's temporary files
REFUSED = 2  # exit status of a process that refuses its options; argparse has the same
LINKER_MODULE = "sglang_ess.mem_cache.linker"  # what SGLang's option of a linker names


def _option(
    default: Any,
    flag: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    kind: type | None = None,
    limit: tuple[str, Callable[[Any], bool]] | None = None,
) -> Any:
    """A dataclass field with its flag. The flag of a bool field inverts the default.

    default: None for a value that is chosen at the start of the server
    kind: type of the value, if the default does not show it
    limit: (rule in words, check) for a value that is not None
    """
    metadata = {"flag": flag, "help": help, "choices": choices, "limit": limit}
    return field(default=default, metadata=metadata | {"kind": kind or type(default)})


_POSITIVE = ("more than 0", lambda value: 0 < value < float("inf"))


@dataclass(frozen=True)
class EssConfig:
    """What the operator asked of ESS. Every process of a server reads the same record.

    Raises: ValueError, one line with every reason, for values of a wrong type or out of range.
    """

    enabled: bool = _option(
        True,
        "--disable-ess",
        "Serve one-tier: SGLang without ESS, with any model. On a host with no accelerator "
        "SGLang still runs on ESS's CPU platform.",
    )
    platform: str = _option(
        "auto",
        "--ess-platform",
        "auto: ESS's CPU platform if the host has no accelerator; cpu: that platform in any "
        "case; native: never.",
        choices=("auto", "cpu", "native"),
    )
    index_dtype: str = _option(
        "fp8",
        "--ess-index-dtype",
        "Format of the indexer's keys. float32 is the exact reference for parity tests, on "
        "the CPU platform only.",
        choices=("fp8", "float32"),
    )
    hot_ratio: float | None = _option(
        None,
        "--ess-hot-ratio",
        "Hot rows of a layer as a share of the slots; 1 keeps every row on the device.",
        kind=float,
        limit=("more than 0 and at most 1", lambda value: 0 < value <= 1),
    )
    hot_gib: float | None = _option(
        None,
        "--ess-hot-gib",
        "GiB of device memory for the hot rows of all layers together, instead of a ratio.",
        kind=float,
        limit=_POSITIVE,
    )
    host_gib: float | None = _option(
        None,
        "--ess-host-gib",
        "GiB of host memory that the host tiers of all ranks on a node may use together.",
        kind=float,
        limit=_POSITIVE,
    )
    device_gib: float | None = _option(
        None,
        "--ess-device-gib",
        "GiB of memory that count as device memory for the KV pool, with ESS or one-tier; only "
        "on the CPU platform.",
        kind=float,
        limit=_POSITIVE,
    )
    link_gib: float | None = _option(
        None,
        "--ess-link-gib",
        "GiB/s of the simulated link between host and device: fetches are slowed down to it; only "
        "on the CPU platform.",
        kind=float,
        limit=_POSITIVE,
    )
    fetch_share: str = _option(
        "off",
        "--ess-fetch-share",
        "on: each rank of a TP group fetches its share of the missed rows, and the ranks give them "
        "to one another; off: each fetches all. Only on the CPU platform, where it is a proof and "
        "no gain.",
        choices=("on", "off"),
    )
    admission: str = _option(
        "on",
        "--ess-admission",
        "on: a request waits until its working set fits the hot tier and its misses fit the link "
        "(--ess-itl-ms); off: only free slots decide.",
        choices=("on", "off"),
    )
    itl_ms: float | None = _option(
        None,
        "--ess-itl-ms",
        "Inter-token latency in ms: a request is admitted only if the predicted decode step stays "
        "below it; left out: no limit.",
        kind=float,
        limit=_POSITIVE,
    )
    warmup: str = _option(
        "on",
        "--ess-warmup",
        "Whether the rows that a prompt's last 32 positions selected enter the hot tier before "
        "the first decode step.",
        choices=("on", "off"),
    )
    pd_warmup: str = _option(
        "on",
        "--ess-pd-warmup",
        "The same with prefill-decode disaggregation: a prefill server sends those positions, "
        "and the decode server warms its hot tier with them.",
        choices=("on", "off"),
    )
    overlap: str = _option(
        "auto",
        "--ess-overlap",
        "How decode on a GPU hides the fetch of missed rows. da: it attends to the hits meanwhile; "
        "dba: also, it plans the batch in halves; off: it waits; auto: the cheapest of these by "
        "current misses and --ess-overlap-costs, or off without that file.",
        choices=("auto", "off", "da", "dba"),
    )
    overlap_costs: str = _option(
        "",
        "--ess-overlap-costs",
        "JSON file with overlap costs measured on this GPU, for --ess-overlap auto; empty: none.",
    )
    attention: str = _option(
        "sglang",
        "--ess-attention",
        "Attention kernel of decode on a GPU where nothing is overlapped. sglang: that of "
        "--dsa-decode-backend; flashinfer: FlashInfer's MLA over lists of rows, for bf16 rows "
        "without overlap (not measured on a GPU).",
        choices=("sglang", "flashinfer"),
    )
    layer_budgets: str | None = _option(
        None,
        "--ess-layer-budgets",
        "auto, on the CPU platform only: hot rows move to the layers where they save the most "
        "misses, estimated by sampled ghost caches; layers that share a top-k move together. "
        "uniform: every layer has the same number. Left out: auto on the CPU platform; uniform on "
        "a GPU, which refuses auto.",
        choices=("auto", "uniform"),
        kind=str,
    )
    store: str = _option(
        "",
        "--ess-store",
        "PATH[:SIZE]: directory for prefixes that outlive the host memory and the server, and its "
        "largest size, for example /nvme/prefixes:2TiB (MiB, GiB or TiB; without a size: half of "
        "the file system). A prompt's pages found there are loaded, not computed. Empty: none.",
    )
    grace_seconds: float = _option(
        25.0,
        "--ess-grace-seconds",
        "Seconds that running requests have to finish after SIGTERM or SIGINT. Then they get an "
        "error, and all processes end at most 4 s later, before Kubernetes kills them (30 s). A "
        "second signal ends them at once.",
        limit=("0 or more, and finite", lambda value: 0 <= value < float("inf")),
    )
    trace: str = _option(
        "",
        "--ess-trace",
        "File for the top-k lists of decode, for `sglang-ess replay`; empty: none.",
    )
    trace_scores: int = _option(
        0,
        "--ess-trace-scores",
        "With --ess-trace: also the indexer's scores of each list and of this many slots that just "
        "missed it. 0: none.",
        limit=("0 to 65536", lambda value: 0 <= value <= 65536),
    )
    early_fetch: int = _option(
        0,
        "--ess-early-fetch",
        "With speculative decoding, on the CPU platform only: once a verify step is over, make so "
        "many rows of a request and top-k list hot that just missed the list of its last kept "
        "token. 0: none.",
        limit=("0 to 65536", lambda value: 0 <= value <= 65536),
    )
    canary_rate: float = _option(
        0.0,
        "--ess-canary-rate",
        "Share of plans after which a few hot rows are compared with their host rows, and share of "
        "writes after which a rank compares a shared host tier's rows with its own; a difference "
        "stops the server.",
        limit=("0 to 1", lambda value: 0 <= value <= 1),
    )
    topk_stream: str = _option(
        "",
        "--ess-topk-stream",
        "For measurements with dummy weights: outputs are wrong. Replaces decode's top-k lists by "
        "those of a locality profile (deepseek-v3.2, or deepseek-v3.2@32768 for that context "
        "only) or of a file that python -m sglang_ess.topk_stream wrote. Works with one tier and "
        "two; needs --ess-unsafe; empty: none.",
    )
    unsafe: bool = _option(
        False,
        "--ess-unsafe",
        "Allow --ess-topk-stream, whose outputs are wrong.",
    )

    def __post_init__(self) -> None:
        if reasons := _reasons(type(self), vars(self)):
            raise ValueError(" ".join(reasons))
        if self.hot_ratio is not None and self.hot_gib is not None:
            raise ValueError(
                "--ess-hot-ratio and --ess-hot-gib must not both be given: got "
                f"{self.hot_ratio:g} and {self.hot_gib:g} GiB. Drop one."
            )
        if self.trace_scores and (self.topk_stream or not self.trace):
            rule = "not come with --ess-topk-stream, whose lists no indexer has scored"
            raise ValueError(
                f"--ess-trace-scores must {rule if self.trace else 'come with --ess-trace'}: got "
                f"{self.trace_scores}. Drop it{'' if self.trace else ' or name a file'}."
            )
        if self.topk_stream and not self.unsafe:
            raise ValueError(
                "--ess-topk-stream must come with --ess-unsafe: got "
                f"{self.topk_stream!r} without. Its outputs are wrong: it makes dummy weights miss "
                "as a real model does, for measurements. Add --ess-unsafe, or drop it to serve."
            )
        if self.unsafe and not self.topk_stream:  # a script must not keep it for later commands
            raise ValueError(
                "--ess-unsafe must come with what it allows, --ess-topk-stream: got it alone. "
                "Drop it."
            )

    def to_env(self) -> dict[str, str]:
        """{ENV_VAR: JSON}, ready for os.environ.update()."""
        return {ENV_VAR: json.dumps(asdict(self))}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> EssConfig | None:
        """The record in ENV_VAR, or None when it is not set.

        Raises: ValueError (one line) for malformed JSON, unknown keys and bad values.
        """
        text = environ.get(ENV_VAR)
        if text is None:
            return None
        keys = tuple(f.name for f in fields(cls))
        remedy = f"Valid keys: {', '.join(keys)}. Correct {ENV_VAR} or unset it."
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{ENV_VAR} must be JSON: got {text!r} ({error}). {remedy}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{ENV_VAR} must be a JSON object: got {text!r}. {remedy}")
        reasons = []
        if unknown := sorted(set(values).difference(keys)):
            reasons.append(f"{ENV_VAR} must hold known keys: got {unknown}. {remedy}")
        reasons += _reasons(cls, {**asdict(cls()), **values})
        if reasons:
            raise ValueError(" ".join(reasons))
        return cls(**values)

    @classmethod
    def flags(cls) -> tuple[str, ...]:
        """ESS's command-line flags, in the order of the fields."""
        return tuple(f.metadata["flag"] for f in fields(cls))

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add the argument group "ESS (sglang-ess)". Values are checked by from_cli_args."""
        group = parser.add_argument_group("ESS (sglang-ess)")
        for f in fields(cls):
            flag, text, choices = (f.metadata[key] for key in ("flag", "help", "choices"))
            if isinstance(f.default, bool):
                action = "store_false" if f.default else "store_true"
                group.add_argument(flag, dest=_dest(f), action=action, help=text)
                continue
            group.add_argument(
                flag,
                dest=_dest(f),
                default=f.default,
                type=f.metadata["kind"],
                metavar="{" + ",".join(choices) + "}" if choices else None,
                help=f"{text} (default: {'automatic' if f.default is None else f.default})",
            )

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EssConfig:
        """The record of parsed flags. Raises: ValueError, one line with every reason."""
        return cls(**{f.name: getattr(args, _dest(f)) for f in fields(cls)})


def _dest(f: Field[Any]) -> str:
    # A prefix, because SGLang's parser has fields with the names of ours (`platform`).
    return f"ess_{f.name}"


def _reasons(cls: type[EssConfig], values: Mapping[str, Any]) -> list[str]:
    reasons = []
    for f in fields(cls):
        value = values[f.name]
        if value is None and f.default is None:
            continue
        if rule := _broken_rule(f, value):
            reasons.append(
                f"ESS option {f.name} ({f.metadata['flag']}) must be {rule}: got {value!r}."
            )
    return reasons


def _broken_rule(f: Field[Any], value: Any) -> str | None:
    """The rule, in words, that the value breaks; None if it breaks none."""
    kind, choices, limit = (f.metadata[key] for key in ("kind", "choices", "limit"))
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        return f"{'an' if kind is int else 'a'} {kind.__name__}"
    return limit[0] if limit and not limit[1](value) else None
