"""sglang.srt.layers.attention on a GPU: the decode graphs and the indexer's top-k."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.layers.attention.graph_variants.create_attention_graph_variants",
        kind="after",
        signature="(hf_config)",
        body="sglang_ess.platforms.cuda:graph_variants",
        reason="A captured decode graph has one order of transfer and attention in it; upstream "
        "captures variants for other models, and picks one a step, but gives DSA on CUDA none.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
    Hook(
        target="sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_paged",
        kind="around",
        signature="(self, forward_batch, layer_id, q_fp8, weights, metadata)",
        body="sglang_ess.platforms.cuda:topk_selected",
        reason="Private, but the one place between `top-k known` and the work that the fetch can "
        "hide behind; an attention backend hears of top-k only when that work is done.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
)
