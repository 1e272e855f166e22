"""Two ranks with the same top-k do not have the same hot rows: nothing may depend on that.

Blocks of a launch race for rows (SCANNED, the stamps' compare-and-swap) and warps of a block for
tickets. So another schedule evicts other slots, and later steps miss others. What ranks do together
goes by other things: who writes the host tier by the rank, whether they meet in a step by shapes
(DeviceTier.has_room). A fetch that ranks share would have to go by slots that all of them miss.
"""

import pytest
import torch

from ess_kernels import cuda_build, hot_state
from tests.support.cuda_host import host
from tests.support.plan_check import Tier

SLOTS, ROWS, WIDTH, STEPS = 700, 300, 24, 12


def rank(seed: int, queries: int) -> tuple[Tier, list[set[int]]]:
    """A tier after the same steps under schedules by seed; the slots that each step fetched."""
    kernels = host.Seeded(host.load("plan_fetch"), seed=1000 * seed)
    generator, fetched = torch.Generator().manual_seed(5), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_build, "load", lambda name: kernels)
        tier = Tier("cpu", SLOTS, ROWS)
        for _ in range(STEPS):
            topk = torch.stack(
                [torch.randperm(SLOTS, generator=generator)[:WIDTH] for _ in range(queries)]
            ).int()
            buffers = tier.plan(topk)
            fetched.append(set(buffers.miss_slots[: int(buffers.num_misses)].tolist()))
            slots = topk.long()  # whatever is hot: what attention reads is the slot's own row
            assert torch.equal(tier.hot[buffers.rows.long()], tier.host[slots])
    return tier, fetched


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes its own schedules")
@pytest.mark.parametrize("queries", [1, 6])
def test_another_schedule_evicts_other_slots(queries):
    ranks = [rank(seed, queries) for seed in range(4)]
    rows = {tuple(tier.state.slot_row.tolist()) for tier, _ in ranks}
    hot = {tuple((tier.state.slot_row >= 0).tolist()) for tier, _ in ranks}
    assert len(rows) > 1, "the replacement has become the same: say so where ranks could use it"
    if queries == 1:  # one block: here only the rows that the slots are in differ
        return
    assert len(hot) > 1
    steps = list(zip(*(fetched for _, fetched in ranks), strict=True))
    assert all(one == steps[0][0] for one in steps[0]), "from the same state they miss the same"
    assert any(len({frozenset(one) for one in step}) > 1 for step in steps)
    lookups = {int(tier.state.counters[hot_state.LOOKUPS]) for tier, _ in ranks}
    assert lookups == {STEPS * queries * WIDTH}
