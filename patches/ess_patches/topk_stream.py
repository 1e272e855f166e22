"""The hooks of the test-only switch --ess-topk-stream; `all_hooks` leaves them out.

`sglang_ess.plugin` registers them only when the switch is given, and names nothing of
`sglang_ess.testing` itself: all of it is reached by the strings below.
"""

from ess_patches.contract import Hook

# Called first in every process, so that each log line says that outputs are wrong.
MARK_LOG_LINES = "sglang_ess.testing.topk_stream.announce:mark_log_lines"

HOOKS = (
    Hook(
        target="sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_paged",
        kind="after",
        signature="(self, forward_batch, layer_id, q_fp8, weights, metadata)",
        body="sglang_ess.testing.topk_stream.hooks:play_on_cuda",
        reason="The stream replaces the result before ESS's own hook on this method plans it.",
        when="cuda",
        test="tests/testing/topk_stream/test_hooks.py",
    ),
    Hook(
        target="sglang_ess.cpu.indexer.decode_slots",
        kind="after",
        signature="(layer_id, metadata, query, weights, topk)",
        body="sglang_ess.testing.topk_stream.hooks:play_on_cpu",
        reason="The CPU platform's indexer is ours, so the hook is on our own function.",
        when="cpu",
        test="tests/testing/topk_stream/test_serving.py",
    ),
)
