"""install: give hot rows to slots that were just written, as far as there is room.

    targets[i] = the row of slots[i] if it is hot, else a free row, else the least recently used
                 row if its last use was min_age ticks ago or more, else -1

`scatter_rows` then copies the new rows to these targets. Bytes moved: as in plan.py, per slot.
"""

from __future__ import annotations

import torch

from ess_kernels.checks import check_tensor
from ess_kernels.hot_state import HotState
from ess_kernels.plan import INSTALL, INSTALL_WIDTH, InstallLimits, PlanBuffers, run_plan


def install(
    state: HotState,
    slots: torch.Tensor,
    buffers: PlanBuffers,
    min_age: int = 0,
    advance: bool = False,
    first_slot: int = 0,
) -> torch.Tensor:
    """Hot rows for slots [n] int32 or int64. Returns targets [n] int32, a view of the buffers.

    targets[i] is -1 where slot i got no row or is below first_slot. SGLang points the padding of a
    batch at its first page, which nobody reads, so first_slot excludes that page.
    min_age: a slot may evict only a row whose last use is at least that many ticks ago
    advance: end the tick, as in plan. Without it the rows carry the tick of the next plan, which
    therefore does not evict them.
    Effect: asynchronous on the current stream; buffers.rows is overwritten.
    Raises: ValueError for a wrong dtype, or for more slots than the buffers or the tier hold.
    """
    check_tensor("slots", slots, (torch.int32, torch.int64), (None,))
    n, limit = len(slots), min(buffers.rows.numel(), state.num_rows)
    if n > limit:
        raise ValueError(f"install must get at most {limit} slots at a time: got {n}.")
    targets = buffers.rows.view(-1)[:n]
    if n:
        width = min(INSTALL_WIDTH, n)
        limits = InstallLimits(min_age, first_slot)
        run_plan(state, slots.contiguous(), width, buffers, INSTALL.value, advance, limits)
    return targets
