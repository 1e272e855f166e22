"""A small DeepSeek-V3.2 model that is trained to find facts in long documents."""

from sglang_ess.testing.tiny_config import TinyModelConfig

# Eight heads of the first layer begin by looking back at eight bytes; see network.py.
SHAPE = TinyModelConfig(
    arch="v32",
    layers=4,
    dense_layers=4,  # its MTP layer has experts: SGLang expects them there
    heads=8,
    hidden=256,
    intermediate=256,
    nope_dim=32,
    v_dim=32,
    moe_intermediate=64,
    experts=4,
    experts_per_token=2,
    groups=1,
    topk_groups=1,
    index_heads=4,
    index_topk=128,
    mtp_layers=1,
)
