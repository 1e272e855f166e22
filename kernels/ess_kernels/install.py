"""install: slots just written become hot where there is room.

    a hot slot keeps its row; another takes a free row, else the least recently used if that
    was last used min_age ticks ago or more; else it gets none

The copy into the rows is `scatter_rows` with the targets that install hands out.
"""

from __future__ import annotations

import torch

from ess_kernels.checks import check_tensor
from ess_kernels.hot_state import HotState
from ess_kernels.plan import INSTALL, INSTALL_WIDTH, PlanBuffers, run_plan


def install(
    state: HotState,
    slots: torch.Tensor,
    buffers: PlanBuffers,
    min_age: int = 0,
    advance: bool = False,
    first_slot: int = 0,
) -> torch.Tensor:
    """Rows for slots [n] int32 or int64. Returns targets [n] int32, a view of the buffers.

    targets[i] is -1 where slot i got no row or is below first_slot: SGLang points the padding
    of a batch at its first page, which nobody reads.
    advance: as of plan. Without it the rows are safe from the next plan, whose tick they bear.
    Raises: ValueError for a wrong dtype, or more slots than the buffers or the tier hold.
    """
    check_tensor("slots", slots, (torch.int32, torch.int64), (None,))
    n, limit = len(slots), min(buffers.rows.numel(), state.num_rows)
    if n > limit:
        raise ValueError(f"install must have at most {limit} slots at a time: got {n}.")
    targets = buffers.rows.view(-1)[:n]
    if n:
        width = min(INSTALL_WIDTH, n)
        slots = slots.contiguous()
        run_plan(state, slots, n, width, buffers, INSTALL.value, advance, min_age, first_slot)
    return targets
