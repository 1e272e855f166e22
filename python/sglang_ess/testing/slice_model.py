"""`python -m sglang_ess.slice_model`: write a slice of DeepSeek-V3.2 for `--load-format dummy`.

Every layer has DeepSeek-V3.2's dimensions (sim/data/models/deepseek-v3.2.toml). Layers, experts
and vocabulary are few, so that one GPU can hold them. The slice is a config.json and the tiny
tokenizer, without weights: SGLang fills them with uniform numbers
(model_loader/weight_utils.py:1740). So the costs of a layer are true (attention, indexer, latent
rows, projections), but its text is not. The costs outside the layers are smaller than in the real
model: lm_head and sampling have 320 tokens and not 129280 (--vocab 129280 gives the true one), and
a step has 4 layers and not 61.

8 experts are one GPU's share of 256 experts on 32 GPUs. Here each token takes all 8. So an expert
gets as many tokens as it would there, where 32 GPUs each send it an eighth of their choices.

--weights fp8 is DeepSeek's own format, so that GEMMs are as in production. DeepGEMM's sm_90 kernels
need rows in multiples of 64 and columns in multiples of 128, which all of DeepSeek's are
(srt/layers/quantization/fp8_utils.py:1459). The CPU platform serves bf16 only.

SGLang 0.5.23's CUDA path has these conditions on a model's shape, and DeepSeek's meets them (files
are those of site-packages/sglang unless named otherwise):
- 32 or 64 index heads on sm_90: decode hands them to DeepGEMM as they are (its
  csrc/apis/attention.hpp, fp8_fp4_paged_mqa_logits), prefill pads to 32
  (srt/layers/attention/dsa/dsa_indexer.py:1174). index_head_dim 128, pages of 64
  (srt/mem_cache/memory_pool.py:5346, dsa_indexer.py:1247).
- index_topk 2048: sgl-kernel's top-k in prefill, and HiSparse's in decode (sgl_kernel/top_k.py:36,
  71 and 146; the fused one of decode takes 1 to 2048).
- kv_lora_rank 512 and rope 64: the 656-byte fp8 row, the query's absorbed form
  (kernels/ops/quantization/dsa_quant_k_cache.py:53, kernels/jit/csrc/elementwise/
  concat_mla.cuh:194).
- heads: padded to 64 or 128 over fp8 rows; over bf16 rows a divisor of 64 is padded to it
  (srt/layers/attention/dsa_backend.py:588 and 2819).
- nope + rope in (128, 192] and v in (96, 128], or the two equal: FA3, in dense prefill up to
  SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD tokens (dsa_backend.py:4064, sgl_kernel's
  flash_ops).
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_ess.sim.inputs.specs import Model, load
from sglang_ess.testing.tiny_config import TinyModelConfig, choice, count, field_problems
from sglang_ess.testing.tiny_model import (
    model_config,
    prepare_directory,
    run_command,
    write_small_files,
)

MARKER = "slice_model.json"
TRUE_CONTEXT = 163_840
YARN_FACTOR = 40  # DeepSeek-V3.2's config.json: 4096 tokens unscaled
GROUPS, TOPK_GROUPS = 8, 4  # n_group and topk_group of the same file, for 256 experts
# quantization_config of the same file. Its scales are powers of two, stored as float32.
FP8_BLOCK = 128
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}


@dataclass(frozen=True)
class SliceConfig:
    """The size of a slice. Raises: ValueError, one line that names every field out of range."""

    layers: int = count(4)
    dense_layers: int = count(1, low=0, help="leading layers with a dense MLP")
    experts: int = count(8, low=2, help="routed experts of each other layer")
    context: int = count(TRUE_CONTEXT, low=4096, step=64, help="max_position_embeddings, in tokens")
    vocab: int = count(320, low=320, step=64, help="DeepSeek-V3.2 has 129280")
    weights: str = choice("bf16", ("bf16", "fp8"), "bf16, or fp8 as DeepSeek publishes them")

    def __post_init__(self):
        problems = [*field_problems(self)]
        if not problems and self.context > TRUE_CONTEXT:
            problems = [f"context must be <= {TRUE_CONTEXT}: got {self.context}"]
        if problems:
            raise ValueError("; ".join(problems))
        _ = self.shape  # TinyModelConfig checks its rules too

    @property
    def model(self) -> Model:
        """The slice as a Model of the simulator."""
        true = load("model", "deepseek-v3.2")
        return replace(
            true,
            layers=self.layers,
            dense_layers=min(self.dense_layers, self.layers),
            experts=self.experts,
            experts_per_token=min(self.experts, true.experts_per_token),
            vocabulary=self.vocab,
            max_context=self.context,
            weight_bytes=1.0 if self.weights == "fp8" else 2.0,
        )

    @property
    def shape(self) -> TinyModelConfig:
        """The slice as the config from which config.json is written.

        With 16 experts or more, in a multiple of 8, there are DeepSeek's 8 groups, of which a
        token may use 4. Otherwise all experts are one group.
        """
        model = self.model
        grouped = self.experts % GROUPS == 0 and self.experts >= 2 * GROUPS
        return TinyModelConfig(
            layers=self.layers, dense_layers=self.dense_layers, heads=model.heads,
            hidden=model.hidden, intermediate=model.dense_width,
            moe_intermediate=model.expert_width, experts=self.experts,
            experts_per_token=model.experts_per_token, groups=GROUPS if grouped else 1,
            topk_groups=TOPK_GROUPS if grouped else 1, index_heads=model.index_heads,
            index_topk=model.topk, q_lora_rank=model.q_lora_rank, nope_dim=model.nope_dim,
            v_dim=model.v_dim, context=TRUE_CONTEXT, yarn_factor=YARN_FACTOR,
        )  # fmt: skip


def slice_config(config: SliceConfig, token_ids: dict[str, int]) -> dict:
    """Return config.json. A shorter context allows fewer positions and leaves rope unchanged."""
    content = model_config(config.shape, config.vocab, token_ids)
    content["max_position_embeddings"] = config.context
    return content | ({"quantization_config": FP8} if config.weights == "fp8" else {})


def parameter_bytes(config: SliceConfig) -> dict[str, int]:
    """Return the device bytes of the parameters by part, as SGLang allocates them.

    kv_b_proj counts twice: as stored, and absorbed into query and output, in bf16
    (srt/models/deepseek_common/deepseek_weight_loader.py:779). Norms and the router's bias, under
    0.1 MiB a layer, are left out.
    """
    m, of = config.model, _matrix_bytes(config.weights == "fp8")
    sparse = m.layers - m.dense_layers
    head_dim, latent = m.nope_dim + m.rope_dim, m.kv_lora_rank
    projections = [
        (m.q_lora_rank + latent + m.rope_dim, m.hidden),
        (m.heads * head_dim, m.q_lora_rank),
        (m.heads * (m.nope_dim + m.v_dim), latent),
        (m.hidden, m.heads * m.v_dim),
    ]

    def mlp(width: int) -> int:
        return of(2 * width, m.hidden) + of(m.hidden, width)

    indexer = of(m.index_heads * m.index_dim, m.q_lora_rank) + of(m.index_dim, m.hidden)
    return {
        "embedding and lm_head": 2 * 2 * m.vocabulary * m.hidden,
        "attention": m.layers * sum(of(*one) for one in projections),
        "absorbed kv_b_proj": m.layers * 2 * m.heads * (m.nope_dim + m.v_dim) * latent,
        "indexer": m.layers * (indexer + 2 * m.index_heads * m.hidden),
        "dense MLP": m.dense_layers * mlp(m.dense_width),
        "routed experts": sparse * m.experts * mlp(m.expert_width),
        "shared experts": sparse * m.shared_experts * mlp(m.expert_width),
        "router": sparse * 2 * m.experts * m.hidden,
    }


def _matrix_bytes(fp8: bool):
    """Return a function (out, in) -> bytes of one linear weight with its float32 scales."""
    if not fp8:
        return lambda out, into: 2 * out * into
    return lambda out, into: out * into + 4 * -(-out // FP8_BLOCK) * -(-into // FP8_BLOCK)


def write_slice(out_dir: str | os.PathLike, config: SliceConfig) -> Path:
    """Write config.json, generation_config.json and the tokenizer into out_dir.

    Returns: out_dir.  Raises: ValueError if it holds anything but an earlier slice.
    """
    out = prepare_directory(out_dir, MARKER, config)
    from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS

    write_small_files(out, slice_config(config, TOKEN_IDS))
    return out


def report(path: Path, config: SliceConfig) -> str:
    """Return the text to print: the slice, and the GiB that it takes on a device."""
    parts = parameter_bytes(config)
    lines = [f"wrote {path}: {config.layers} layers, {config.experts} experts, {config.weights}"]
    lines += [f"  {size / 2**30:8.3f} GiB  {name}" for name, size in parts.items()]
    lines.append(f"  {sum(parts.values()) / 2**30:8.3f} GiB  all parameters on the device")
    m = config.model
    rows = f"{m.layers * m.row_bytes} B (fp8) or {m.layers * 2 * (m.kv_lora_rank + m.rope_dim)} B"
    lines.append(f"a token's rows: {rows}; its index keys: {m.layers * m.index_bytes} B")
    lines.append(f"serve it with --model-path {path} --load-format dummy")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    def write(out: str, config: SliceConfig) -> str:
        return report(write_slice(out, config), config)

    what = "Write a slice of DeepSeek-V3.2 (true dimensions, few layers) for --load-format dummy."
    return run_command("slice_model", what, SliceConfig, write, argv)


if __name__ == "__main__":
    sys.exit(main())
