"""A small DeepSeek-V3.2 model that is trained to find facts in long documents."""

from sglang_ess.testing.tiny_config import TinyModelConfig

# Four heads look back at four bytes, so two such layers see 16; see network.py.
SHAPE = TinyModelConfig(
    arch="v32",
    layers=4,
    dense_layers=4,  # its MTP layer has experts: SGLang expects them there
    heads=4,
    hidden=256,
    intermediate=192,
    moe_intermediate=64,
    experts=4,
    experts_per_token=2,
    groups=1,
    topk_groups=1,
    index_heads=4,
    index_topk=128,
    mtp_layers=1,
)
