"""Row formats, page size, byte units and plan sizes. Imports nothing, so every room can read it.

A latent row is one token's MLA latent in one layer:

    fp8   656 B   [0, 512) 512 x e4m3, [512, 528) 4 x fp32 scale (one per 128 latents),
                  [528, 656) 64 x bf16 rope key, not quantised (FlashMLA's README, "FP8 KV cache")
    bf16  1152 B  512 latents, then 64 rope keys
    fp32  2304 B  the same

A model without rope (GLM-5.3-Flash) has the latents alone: 528, 1024 and 2048 B.

An index key is one token's key of the indexer in one layer:

    fp8   132 B   128 x e4m3 and one fp32 scale. A page of 64 slots holds its 64 keys first and its
                  64 scales after them (DeepGEMM's paged layout, which SGLang keeps)
    fp32  512 B   128 x fp32: the CPU platform's exact reference
"""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

LATENT_DIM = 512  # kv_lora_rank
ROPE_DIM = 64  # qk_rope_head_dim
ROW_DIM = LATENT_DIM + ROPE_DIM
SCALE_GROUP = 128  # latents per fp8 scale


def fp8_row_bytes(rope_dim: int) -> int:
    """Bytes of an fp8 latent row with rope_dim rope keys."""
    return LATENT_DIM + LATENT_DIM // SCALE_GROUP * 4 + rope_dim * 2


FP8_ROW_BYTES = fp8_row_bytes(ROPE_DIM)

INDEX_DIM = 128  # index_head_dim
INDEX_KEY_BYTES = INDEX_DIM + 4
INDEX_KEY_FP32_BYTES = INDEX_DIM * 4

# SGLang's page of a DSA pool, in slots. FlashMLA and TRTLLM-GEN read rows in the same pages, so
# the device allocates hot rows in whole pages too.
PAGE_SLOTS = 64

MAP_BYTES = 4  # an int32 per slot and layer: the slot's hot row
STAGING_BUFFERS = 2  # prefill fills one while attention reads the other

# One plan covers at most this many queries; a larger decode batch is planned in blocks.
PLAN_QUERIES_CPU = 64
PLAN_QUERIES_CUDA = 2048  # 512 requests, the most that SGLang captures, of 4 queries each
PLAN_LOOKUP_BYTES_CPU = 12  # buffers of a plan on the CPU, per lookup


def index_page_bytes(fp32: bool) -> int:
    """Bytes of one page of index keys: PAGE_SLOTS keys, fp32 or fp8 with scales."""
    return PAGE_SLOTS * (INDEX_KEY_FP32_BYTES if fp32 else INDEX_KEY_BYTES)
