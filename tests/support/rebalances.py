"""Rounds of the rebalancer in an engine's process that are short, and what they come to."""

from functools import partial

import numpy as np


def at_random() -> None:
    """Every few decode steps each layer gets rows at random: its floor, or as many as there are.

    The arena is checked before every step.
    """
    from sglang_ess.tiers.balance import budgets as layer_budgets
    from sglang_ess.tiers.balance import rebalance

    random = np.random.default_rng(0)
    _rounds(counted=2)

    def draw(curves, current, floor, cap, **options):
        shares = random.dirichlet(np.ones(len(current)))
        spread = sum(current) - floor * len(current)
        rows = floor + np.floor(shares * spread).astype(int)
        rows[random.integers(len(rows))] += sum(current) - rows.sum()
        return layer_budgets.Budgets(tuple(np.minimum(rows, cap).tolist()), 0.0)

    step = rebalance.Rebalancer.step

    def checked(rebalancer):
        rebalancer.layers.check_integrity()
        return step(rebalancer)

    rebalance.rebalanced = draw
    rebalance.Rebalancer.step = checked


def often() -> None:
    """By the ghosts, in rounds of 23 steps; any gain is reason enough."""
    from sglang_ess.tiers.balance import rebalance

    _rounds(counted=20)
    rebalance.NOISE = rebalance.MIN_GAIN = 0.0
    rebalance.rebalanced = partial(rebalance.rebalanced, min_moved=0.0)


def _rounds(counted: int) -> None:
    """Short ones, and what came of them among what a scheduler says of itself."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.tiers.balance import rebalance
    from tests.support import engine as engines

    original = Scheduler.get_internal_state

    def with_rebalances(scheduler, request):
        answer = original(scheduler, request)
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        answer.internal_state["rebalances"] = {
            "rebalances": pool.rebalancers[0].rebalances,
            "rows_moved": pool.rebalancers[0].rows_moved,
            "rows": [cache.num_rows for cache in pool.hot_caches],
            "spare": pool.tier.spare,
        }
        return answer

    rebalance.Schedule = partial(rebalance.Schedule, warmup_steps=1, counted=2, rest=0)
    Scheduler.get_internal_state = with_rebalances
    engines._rebalances = _rebalances


def _rebalances(engine) -> dict:
    return engine.get_server_info()["internal_states"][0]["rebalances"]
