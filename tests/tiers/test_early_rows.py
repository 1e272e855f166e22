"""Rows that are fetched ahead: which give way, what becomes of them, and a wrong one is seen."""

import numpy as np
import pytest
import torch

from sglang_ess.tiers import HotCache, RowCorruption
from sglang_ess.tiers.early_rows import EarlyRows
from sglang_ess.tiers.throttled_link import ThrottledLink

SLOTS = 40


def host_rows(layers=1):
    made = torch.Generator().manual_seed(1)
    shape = SLOTS, 24
    return [torch.randint(256, shape, generator=made, dtype=torch.uint8) for _ in range(layers)]


def use(cache, slots):
    plan = cache.plan(torch.tensor([slots], dtype=torch.int32))
    for layer in range(cache.num_layers):
        cache.fetch(plan, layer)
    return plan.miss_slots.tolist()


def ahead(cache, *lists, most=8, **options):
    return cache.fetch_ahead(np.array(lists, np.int32), most, **options)


def hot(cache):
    return set(np.flatnonzero(cache.slot_row >= 0).tolist())


def figures(cache):
    return cache.counters["early"], cache.counters["early_used"]


def test_the_best_of_each_request_come_first():
    cache = HotCache(host_rows(), 6)
    use(cache, [1, 2, 3])
    assert ahead(cache, [1, 10, -1, 11, 12], [20, 21, 22, 10, 23], most=2) == 3  # three were free
    assert hot(cache) == {1, 2, 3, 10, 20, 21}
    cache.check_integrity()


def test_rows_of_the_last_step_and_of_a_later_warm_up_stay():
    cache = HotCache(host_rows(), 6)
    use(cache, [1, 2])
    use(cache, [3, 4])
    cache.warm(torch.tensor([[5, 6]], dtype=torch.int32))
    assert ahead(cache, list(range(10, 18))) == 0
    use(cache, [3, 4])
    assert ahead(cache, list(range(10, 18))) == 2  # 1 and 2 gave way
    assert hot(cache) == {3, 4, 5, 6, 10, 11}


def test_early_rows_are_the_first_to_be_evicted_the_worst_of_them_first():
    cache = HotCache(host_rows(), 6)
    use(cache, [1, 2])
    assert ahead(cache, [10, 11, 12, 13]) == 4
    assert use(cache, [20, 21]) == [20, 21]
    assert hot(cache) == {1, 2, 10, 11, 20, 21}


def test_only_plans_count_as_uses():
    cache = HotCache(host_rows(), 10)
    assert ahead(cache, [1, 2, 3, 4, 5]) == 5
    rows = cache.host_rows
    cache.install(torch.tensor([1]), rows[[1]])
    cache.warm(torch.tensor([[2]], dtype=torch.int32))
    cache.invalidate(torch.tensor([3]))
    assert use(cache, [1, 2, 3, 4]) == [3]
    assert figures(cache) == (5, 1)
    use(cache, [5, 4])
    use(cache, [5, 4])
    assert figures(cache) == (5, 2)


def test_a_slot_that_is_written_or_freed_has_no_stale_row():
    rows = host_rows()
    cache = HotCache(rows, 10)
    ahead(cache, [1, 2])
    rows[0][1] = 7
    cache.install(torch.tensor([1]), rows[0][[1]])
    rows[0][2] = 8
    cache.invalidate(torch.tensor([2]))
    cache.check_integrity()
    ahead(cache, [2])
    cache.check_integrity()


def test_a_row_for_every_slot_needs_none_ahead():
    assert ahead(HotCache(host_rows(), SLOTS), [1, 2]) == 0


def test_a_group_gets_the_rows_of_all_its_layers_over_the_link():
    rows = host_rows(3)
    link = ThrottledLink(1e12)
    carried = []
    link.carried = lambda num_bytes, seconds: carried.append(num_bytes)
    cache = HotCache(rows, 6, link=link)
    ahead(cache, [4, 9])
    assert carried == [2 * 24] * 3
    cache.check_integrity()


@pytest.mark.parametrize("check", ["canary", "integrity"])
def test_a_copy_of_a_wrong_row_is_noticed(check, monkeypatch):
    right = EarlyRows.fetch

    def wrong(self, *args):
        slots, rows = right(self, *args)
        return np.roll(slots, 1), rows

    monkeypatch.setattr(EarlyRows, "fetch", wrong)
    cache = HotCache(host_rows(), 6)
    assert ahead(cache, [4, 9]) == 2
    with pytest.raises(RowCorruption if check == "canary" else RuntimeError):
        if check == "canary":
            cache.check_rows(np.arange(6), "layer 0")
        else:
            cache.check_integrity()
