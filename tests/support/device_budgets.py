"""Layer budgets on the device tier of an engine's process; after tests/support/device_tier.py's.

Each cache's counters also say how many rows it has, and how often rows have moved.
"""

from functools import partial

import numpy as np


def _moves() -> None:
    """A tier whose rows move, as capacity decides on a GPU; what came of it among the counters."""
    from sglang_ess.mem_cache import capacity
    from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache, DeviceTier

    capacity.CPU_TIER = capacity.GPU_TIER_THAT_MOVES
    counters, move = DeviceHotCache.counters.fget, DeviceTier.resize
    found = {"moves": -1, "rows_moved": 0}  # the first is the tier's own

    def counted(tier, sizes):
        found["moves"] += 1
        found["rows_moved"] += int(np.maximum(np.subtract(sizes, tier.sizes), 0).sum())
        return move(tier, sizes)

    DeviceTier.resize = counted
    DeviceHotCache.counters = property(
        lambda cache: counters(cache) | found | {"rows": cache.num_rows}
    )


def rows_move() -> None:
    """In every decode step each layer gets rows at random: what the step needs, or more."""
    from sglang_ess.tiers.balance import rebalance
    from sglang_ess.tiers.balance.budgets import Budgets

    _moves()
    random = np.random.default_rng(0)

    def draw(rebalancer, demand, snapshot=None):
        shares = random.dirichlet(np.ones(len(rebalancer.rows)))
        spread = sum(rebalancer.rows) - demand * len(rebalancer.rows)
        rows = demand + np.floor(shares * spread).astype(int)
        rows[random.integers(len(rows))] += sum(rebalancer.rows) - rows.sum()
        return rebalancer._moved(Budgets(tuple(rows.tolist()), 0.0))

    rebalance.AgeRebalancer.step = draw


def rows_move_by_age() -> None:
    """By the ages of rows, in rounds of a few steps; any gain is reason enough."""
    from sglang_ess.attention import backend_cuda
    from sglang_ess.tiers.balance import rebalance

    _moves()
    backend_cuda.MIRROR_STEPS = 1
    rebalance.AgeSchedule = partial(rebalance.AgeSchedule, warmup_steps=1, counted=4)
    rebalance.NOISE = rebalance.MIN_GAIN = 0.0
    rebalance.rebalanced = partial(rebalance.rebalanced, min_moved=0.0)


def any_size_will_do() -> None:
    """A fault: rows move whatever the step at hand needs."""
    from sglang_ess.tiers.hot_cache_cuda import DeviceTier

    DeviceTier.demand = lambda tier, num_queries: 1
