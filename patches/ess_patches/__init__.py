"""The whole difference between ESS and SGLang, declared as rows (`contract.Hook`).

hooks              upstream functions that ESS changes
touch_points       upstream names that ESS uses unchanged, on any platform or on the CPU
touch_points_cuda  the same on a GPU
linear_attention   hooks for models with linear attention layers, speculation: for drafts,
attention_ranks    for data-parallel attention
stored_prefixes    touch points of loads from --ess-store
transfers          touch points of transfers between prefill and decode
topk_stream        hooks of the test-only switch --ess-topk-stream
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `python -m ess_patches.contract` must not find it imported already
    from ess_patches.contract import Hook


def all_hooks() -> tuple[Hook, ...]:
    """The rows that every server needs: hooks first, then touch points."""
    from ess_patches import hooks, stored_prefixes, touch_points, touch_points_cuda

    touched = touch_points.HOOKS + stored_prefixes.TOUCHED + touch_points_cuda.HOOKS
    return hooks.HOOKS + touched
