"""Hook bodies that let SGLang's own code run on a CPU. patches/ess_patches declares the hooks."""

from typing import Any

import torch
import torch.nn.functional as F

# The longest that a step waits for an idle rank. An idle server's ranks meet that often, too.
IDLE_RANK_MS = 5


def device_capability(original, device=None):
    """torch.cuda.get_device_capability, which would raise: (0, 0), older than any device."""
    return 0, 0


def gated_norm(original, norm, x, g, residual=None, prenorm=False, residual_in_fp32=False):
    """FusedRMSNormGated.forward in torch: RMSNorm(x) * activation(g), computed in float32.

    x, g [..., D]. Raises: NotImplementedError for a residual, which no model here has.
    """
    if residual is not None or prenorm:
        raise NotImplementedError("the gated norm must have no residual on the CPU platform.")
    activation = torch.sigmoid if norm.activation == "sigmoid" else F.silu
    normed = F.rms_norm(x.float(), x.shape[-1:], None, norm.eps)
    if norm.weight is not None:
        normed = normed * norm.weight.float()
    return (normed * activation(g.float())).to(x.dtype)


def clamped_silu(original, dtype):
    """_jit_silu_and_mul_clamp_module in torch: an object whose run() is the kernel."""
    return _ClampedSilu


class _ClampedSilu:
    @staticmethod
    def run(gate_up, out, limit: float) -> None:
        """out [T, N] = silu(min(gate, limit)) * clamp(up, -limit, limit); gate_up [T, 2 * N]."""
        out.copy_(_swiglu(gate_up, limit))


def _swiglu(gate_up, limit: float | None):
    """SwiGLU of gate_up [T, 2 * N] whose inputs a model may bound: [T, N]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None:
        return F.silu(gate) * up
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def without_pinning(original, batch) -> None:
    """ScheduleBatch.prepare_for_decode, in which Tensor.pin_memory gives the tensor itself."""
    tensors: Any = torch.Tensor
    pin = tensors.pin_memory
    tensors.pin_memory = lambda tensor, device=None: tensor
    try:
        original(batch)
    finally:
        tensors.pin_memory = pin


def sizes_without_pinning(original, batch, runner) -> None:
    """ForwardBatch.prepare_mlp_sync_batch, in which torch.tensor leaves memory unpinned."""
    module: Any = torch
    make = module.tensor
    module.tensor = lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)
    try:
        original(batch, runner)
    finally:
        module.tensor = make


def gather_tokens(group, output, input) -> None:
    """GroupCoordinator.all_gather_into_tensor: output [ranks * T, ...] from each input [T, ...]."""
    group._all_gather_into_tensor(output, input)


def exchange_logits(group, output, input) -> None:
    """GroupCoordinator.all_to_all_single: output [ranks * N], part i of which is from rank i."""
    group._all_to_all_single(output, input)


def copy_tokens(dst, src, dim, offset, sz, offset_src) -> None:
    """dp_attention.memcpy: rows [offset, offset + sz) of dst from src, or of src into dst."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    memcpy_cpu(dst, src, dim, offset, sz, offset_src)


def sleep_briefly(sleeper) -> None:
    """IdleSleeper.maybe_sleep of a rank that others may need: until a request, or a moment."""
    sleeper.poller.poll(IDLE_RANK_MS)


def dsa_kv_cache_dtype(original, view) -> dict:
    """_dsa_kv_cache_dtype_default: keep "auto", so that KV rows have the model's dtype.

    Upstream sets bfloat16 for devices before Blackwell, which would round a float32 model's rows.
    """
    return {} if view.kv_cache_dtype == "auto" else original(view)


def rope_without_scaling(original, *args, **kwargs):
    """get_rope_cpu: plain rope for a model without scaling, where upstream's assertion fails."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    bound = dict(zip(_ROPE_PARAMETERS, args, strict=False), **kwargs)
    if bound.get("rope_scaling") is not None:
        return original(**bound)
    bound.pop("device", None)
    return get_rope(**bound)


_ROPE_PARAMETERS = (
    "head_size",
    "rotary_dim",
    "max_position",
    "base",
    "is_neox_style",
    "rope_scaling",
    "dtype",
    "partial_rotary_factor",
    "device",
)


def moe_of_rank(original, layer, x, topk_output, moe_runner_config):
    """moe_forward_native: with the model's limit on SwiGLU's inputs, and with expert parallelism,
    where the id of another rank's expert is -1. Upstream's has neither.

    x [T, hidden]. Returns [T, hidden] in x's dtype, this rank's share; experts are summed in
    float32. Raises: NotImplementedError for experts of other ranks that are not plain SwiGLU.
    """
    limit = moe_runner_config.swiglu_limit
    weights, chosen, _ = topk_output
    if limit is None and bool((chosen >= 0).all()):
        return original(layer, x, topk_output, moe_runner_config)
    alpha, bias = moe_runner_config.gemm1_alpha, getattr(layer, "w2_weight_bias", None)
    if moe_runner_config.activation != "silu" or (alpha, bias) != (None, None):
        raise NotImplementedError("experts must be SwiGLU without bias with --ep-size on the CPU.")
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in chosen[chosen >= 0].unique().tolist():
        token, place = torch.where(chosen == expert)
        inner = _swiglu(F.linear(x[token], layer.w13_weight[expert]), limit)
        result = F.linear(inner, layer.w2_weight[expert])
        out.index_add_(0, token, result.float() * weights[token, place, None])
    return out.to(x.dtype)
