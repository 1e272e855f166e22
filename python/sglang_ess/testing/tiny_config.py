"""The shape of a tiny model: TinyModelConfig, its limits, and the widths that never change.

Everything that costs bytes is small. Everything that a kernel for DeepSeek sparse attention fixes
has its real size: index_head_dim 128, kv_lora_rank 512 and qk_rope_head_dim 64, which give
SGLang's 656-byte fp8 row.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KV_LORA_RANK, QK_ROPE_HEAD_DIM, INDEX_HEAD_DIM = 512, 64, 128
ROUTED_SCALING_FACTOR = 2.5  # DeepSeek-V3.2 and GLM-5
# transformers normalises the MLA latents and the indexer key with 1e-6, whatever the config says;
# SGLang uses rms_norm_eps for the latents. With GLM-5's 1e-5 the two would differ.
RMS_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Arch:
    """What sets an architecture apart, beside its sizes. tiny_model.py and tiny_weights.py read it.

    reference: the model_type of transformers that computes the same; None: it has none
    rope, groups, topk_groups, topk_freq, skip_offset: defaults of TinyModelConfig's fields
    shares: whether layers may read another layer's top-k
    indexer_halves: the indexer rotates (i, i + rope/2), and not (2i, 2i + 1) as attention does
    indexer_rope_last: the indexer's rope dimensions are the last of a head, not the first
    parts: tensors that the others lack: "gate" of attention's output, attention "sinks",
        "streams" (HC_STREAMS residual streams, mixed by hyper-connections); "stacked" experts:
        those of a layer are one tensor; "pairs": two layers of attention and MLP are one layer
        of the checkpoint, with the experts beside its second half
    mtp: the name of its MTP layer in a checkpoint; None: no such layer is written
    config: what config.json says in addition
    """

    architecture: str
    model_type: str
    reference: str | None
    help: str
    rope: str = "plain"
    rope_theta: int = 10_000
    groups: int = 1
    topk_groups: int = 1
    topk_freq: int = 1
    skip_offset: int = 2
    shares: bool = False
    indexer_halves: bool = True
    indexer_rope_last: bool = False
    parts: tuple[str, ...] = ()
    mtp: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


HC_STREAMS = 4
AFTER_THE_LAST = "model.layers.{layers}."
ARCHS = {
    "v32": Arch(
        "DeepseekV32ForCausalLM", "deepseek_v32", "deepseek_v32", "DeepSeek-V3.2",
        rope="yarn", groups=2, mtp=AFTER_THE_LAST,
    ),
    "v3": Arch(
        "DeepseekV3ForCausalLM", "deepseek_v3", "deepseek_v32", "DeepSeek-V3 with an indexer",
        rope="yarn", groups=2, mtp=AFTER_THE_LAST,
    ),
    "glm": Arch(
        "GlmMoeDsaForCausalLM", "glm_moe_dsa", "glm_moe_dsa", "GLM-5",
        rope_theta=1_000_000, topk_freq=2, shares=True, indexer_halves=False,
        mtp=AFTER_THE_LAST,
    ),
    "hy4": Arch(
        "HYV4ForCausalLM", "hy_v4", "hy_v4", "Hy4",
        rope_theta=10_000_000, topk_freq=4, shares=True, indexer_halves=False,
        indexer_rope_last=True, parts=("gate", "sinks", "streams", "stacked"),
        mtp="model.mtp_layers.0.",
        # The release's limit is 10, which no activation of a tiny model reaches.
        config={"hc_mult": HC_STREAMS, "hc_magnitude": 2.0, "hc_eps": 1e-6, "swiglu_limit": 2.0},
    ),
    "longcat": Arch(
        "LongcatFlashForCausalLM", "longcat_flash", None, "LongCat-Flash with an indexer",
        rope="yarn", rope_theta=10_000_000, topk_freq=2, skip_offset=1, shares=True,
        parts=("pairs",),
        # SGLang computes experts whose output is their input by a Triton kernel alone.
        config={"zero_expert_num": 0, "zero_expert_type": None},
    ),
    "glm5_next": Arch(  # see tiny_glm5_next.py
        "Glm5NextForConditionalGeneration", "glm5_next", None, "GLM-5.3-Flash",
    ),
}  # fmt: skip


def count(default: int | None, low: int = 1, step: int = 1, help: str = "") -> Any:
    """Return an integer field that must be at least `low` and a multiple of `step`."""
    return field(default=default, metadata={"low": low, "step": step, "help": help})


def flag(help: str) -> Any:
    """Return an integer field that is 0 or 1."""
    return field(default=0, metadata={"low": 0, "high": 1, "step": 1, "help": help})


def letters(help: str) -> Any:
    """Return a field for a word of F and S that begins with F, or None."""
    return field(default=None, metadata={"letters": True, "help": help})


def choice(default: str | None, choices: tuple[str, ...], help: str) -> Any:
    return field(default=default, metadata={"choices": choices, "help": help})


def field_problems(config: Any) -> Iterator[str]:
    """Yield one line for each field, made by the functions above, that breaks its own rule."""
    for one in fields(config):
        value, rule = getattr(config, one.name), one.metadata
        if value is None:
            continue  # arch is unknown, which has its own line; or an optional field
        if "letters" in rule:
            if not re.fullmatch("F[FS]*", str(value)):
                yield f"{one.name} must be F and S, F first: got {value!r}"
        elif "choices" in rule:
            if value not in rule["choices"]:
                yield f"{one.name} must be {' or '.join(rule['choices'])}: got {value!r}"
        elif "high" in rule:
            if type(value) is not int or not rule["low"] <= value <= rule["high"]:
                yield f"{one.name} must be {rule['low']} or {rule['high']}: got {value!r}"
        elif type(value) is not int or value < rule["low"] or value % rule["step"]:
            kind = f"a multiple of {rule['step']}" if rule["step"] > 1 else "an integer"
            yield f"{one.name} must be {kind} >= {rule['low']}: got {value!r}"


@dataclass(frozen=True)
class TinyModelConfig:
    """Shape of a tiny model. A field left None takes the architecture's value on creation.

    topk_freq, skip_offset (architectures that share): SGLang's index_topk_freq and
    index_skip_topk_offset. From layer skip_offset - 1 on, only every topk_freq-th layer runs an
    indexer, and the others reuse its choice.
    sharing: index_topk_pattern in their place, a letter for each layer: F runs an indexer
    rope: SGLang's own CPU backend serves only "yarn"; this project's CPU platform serves both.
    mtp_layers: 1: a layer of multi-token prediction, SGLang's draft for EAGLE, with an indexer of
        its own. The target's weights are those without it.
    drafts: "right": most of the MTP layer's drafts are accepted. Other weights differ too; see
        tiny_drafts.py.
    index_share_for_mtp_iteration: SGLang's: 1: all draft steps read the top-k of the first
    dtype: a float32 checkpoint is served as float16 unless SGLang is told --dtype float32.
    Raises: ValueError, one line, naming every field that is out of range.
    """

    # SGLang's packed CPU GEMM and KV pages need multiples of 32 and 64. With fewer than two
    # indexer heads many scores would tie at 0.
    arch: str = choice("v32", tuple(ARCHS), "; ".join(f"{n}: {a.help}" for n, a in ARCHS.items()))
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
    topk_freq: int | None = count(None, help="one indexer every N layers")
    skip_offset: int | None = count(None, help="the first layers that all have an indexer, plus 1")
    sharing: str | None = letters("FSSS...: F for each layer with an indexer")
    q_lora_rank: int = count(128, low=32, step=32)
    # On a GPU SGLang's dense prefill of short prompts uses FA3, which takes DeepSeek's 128 and
    # 128: "Q/K headdim in (128, 192] and V headdim in (96, 128]".
    nope_dim: int = count(64, low=32, step=32, help="a head's query and key part without rope")
    v_dim: int = count(64, low=32, step=32, help="a head's value")
    context: int = count(16_384, low=256, step=64, help="max_position_embeddings, in tokens")
    rope: str | None = choice(None, ("yarn", "plain"), "yarn or plain")
    # DeepSeek-V3.2 has 40; 4 keeps the unscaled part of a 16k context at 4k
    yarn_factor: int = count(4, low=2, help="context / its unscaled part")
    mtp_layers: int = flag("draft layers for speculative decoding")
    drafts: str = choice("random", ("random", "right"), "right: most of them are accepted")
    index_share_for_mtp_iteration: int = flag("1: one top-k for all draft steps")
    dtype: str = choice("bfloat16", ("bfloat16", "float32"), "bfloat16 or float32")
    seed: int = count(0, low=0)

    def __post_init__(self):
        for name in ("rope", "groups", "topk_groups", "topk_freq", "skip_offset"):
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
        if "pairs" in ARCHS[self.arch].parts and self.layers % 2:
            yield f"layers must be even for arch {self.arch}: got {self.layers}"
        if self.mtp_layers and ARCHS[self.arch].mtp is None:
            yield f"mtp_layers must be 0 for arch {self.arch}: got {self.mtp_layers}"
        elif self.mtp_layers and self.layers == 1:
            # SGLang reads the draft of a one-layer model from layer 0.
            yield "layers must be >= 2 with an MTP layer: got 1"
        if self.drafts == "right" and not self.mtp_layers:
            yield "drafts must be random without an MTP layer: got 'right'"
        elif self.drafts == "right" and "streams" in ARCHS[self.arch].parts:
            yield f"drafts must be random for arch {self.arch}: got 'right'"
        if self.index_share_for_mtp_iteration > self.mtp_layers:
            yield "index_share_for_mtp_iteration must be 0 without an MTP layer: got 1"
        if self.sharing and len(self.sharing) != self.layers:
            yield f"sharing must have {self.layers} letters, one a layer: got {self.sharing!r}"
        if not ARCHS[self.arch].shares and "shared" in self.indexer_types:
            yield (
                f"topk_freq must be 1 and sharing all F for arch {self.arch} (it shares no "
                f"indexer): got {self.topk_freq} and {self.sharing!r}"
            )

    @property
    def indexer_types(self) -> list[str]:
        """Give "full" or "shared" for each layer."""
        if self.sharing:
            return ["full" if letter == "F" else "shared" for letter in self.sharing]
        assert self.topk_freq is not None and self.skip_offset is not None, "set on creation"
        skipped = (max(i - self.skip_offset + 1, 0) % self.topk_freq for i in range(self.layers))
        return ["shared" if one else "full" for one in skipped]

    @property
    def attention_mscale(self) -> float:
        """Factor of yarn on the softmax scale, in both libraries: (0.1 ln factor + 1)^2."""
        return (0.1 * math.log(self.yarn_factor) + 1) ** 2 if self.rope == "yarn" else 1.0
