"""Hook bodies that let SGLang's own code run on a CPU. patches/ess_patches declares the hooks."""


def device_capability(original, device=None):
    """torch.cuda.get_device_capability, which would raise: (0, 0), older than any device."""
    return 0, 0


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
