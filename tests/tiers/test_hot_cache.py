"""One hot tier, case by case. tests/tiers/test_state_machine.py does the combinations."""

import zlib

import numpy as np
import pytest
import torch

from sglang_ess.tiers import HotCache, RowCorruption, lru
from tests.tiers.model import Driver, random_topk

FORMATS = [((1, 656), torch.uint8), ((1, 576), torch.bfloat16), ((576,), torch.float32)]


def host_rows(num_slots, shape=(1, 24), dtype=torch.uint8):
    made = torch.randint(0, 255, (num_slots, *shape), generator=torch.Generator().manual_seed(1))
    return made.to(dtype)


def slots_of(*slots, dtype=torch.int64):
    return torch.tensor(slots, dtype=dtype)


def use(cache, *queries):
    """One step of these queries in one pass, fetched. Returns the missed slots."""
    plan = cache.plan(torch.tensor(queries, dtype=torch.int32))
    cache.fetch(plan)
    assert plan.stop is None
    cache.check_integrity()
    return plan.miss_slots.tolist()


def hot(cache):
    """Hot slots, least recently used first."""
    slots = np.flatnonzero(cache.slot_row >= 0)
    return slots[np.argsort(cache.row_place[cache.slot_row[slots]])].tolist()


class TestPlan:
    @pytest.mark.parametrize("shape, dtype", FORMATS)
    def test_every_row_format(self, shape, dtype):
        driver = Driver(20, [6, 20], shape, dtype)
        rng = np.random.default_rng(0)
        for _ in range(10):
            driver.plan(0, random_topk(rng, 20))
            driver.plan(1, random_topk(rng, 20))
            driver.write(rng.integers(20, size=3).tolist(), [0, None])

    def test_least_recently_used_goes_first(self):
        cache = HotCache(host_rows(20), 4)
        assert use(cache, [1, 2, 3, 4]) == [1, 2, 3, 4]
        assert use(cache, [1, -1, -1, 3]) == []
        assert use(cache, [5, 6]) == [5, 6]
        assert hot(cache) == [1, 3, 5, 6]

    def test_repeats_are_fetched_once(self):
        cache = HotCache(host_rows(20), 4)
        plan = cache.plan(torch.tensor([[1, 2, 1], [2, -1, 3]], dtype=torch.int32))
        assert plan.miss_slots.tolist() == [1, 2, 3]
        rows = plan.rows.numpy()
        assert rows[0, 0] == rows[0, 2] and rows[0, 1] == rows[1, 0] and rows[1, 1] == -1
        assert cache.query_misses.tolist() == [2, 1]

    def test_counters(self):
        cache = HotCache(host_rows(20), 2)
        use(cache, [1, 2, -1])  # step 1
        use(cache, [2, -1, -1])  # step 2
        use(cache, [3, 4, 3])  # step 3: evicts 1, unused for 2 steps, and 2, for 1
        assert cache.counters == {
            "lookups": 6, "misses": 4, "evictions": 2, "evicted_age": 3, "installs": 0,
            "skipped": 0, "early": 0, "early_used": 0,
        }  # fmt: skip
        assert cache.occupied == 2
        cache.clear()
        assert cache.occupied == 0 and not any(cache.counters.values())
        assert use(cache, [3]) == [3]

    def test_queries_that_fit_are_whole(self):
        cache = HotCache(host_rows(20), 5)
        topk = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.int32)
        passes, start = [], (0, 0)
        while start is not None:
            plan = cache.plan(topk, start)
            cache.fetch(plan)
            passes.append((plan.queries, (plan.rows >= 0).all().item()))
            start = plan.stop
        assert passes == [(slice(0, 1), True), (slice(1, 2), True), (slice(2, 3), True)]
        assert cache.counters["lookups"] == 9

    def test_a_query_that_does_not_fit_is_split(self):
        cache = HotCache(host_rows(20), 2)
        topk = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.int32)
        first = cache.plan(topk)
        assert first.stop == (0, 2) and (first.rows >= 0).tolist() == [[True] * 2 + [False] * 3]
        second = cache.plan(topk, first.stop)
        assert second.stop == (0, 4)
        assert (second.rows >= 0).tolist() == [[False] * 2 + [True] * 2 + [False]]
        third = cache.plan(topk, second.stop)
        assert third.stop is None and (third.rows >= 0).tolist() == [[False] * 4 + [True]]

    def test_one_row(self):
        driver = Driver(8, [1])
        assert driver.plan(0, np.array([[3, 3, -1], [3, -1, 3]])) == 1
        # Neither query is whole in a pass that begins within the other: slot 3 comes twice.
        assert driver.plan(0, np.array([[1, 2, 3], [3, 2, 1]])) == 6
        driver.write([3, 4], [0])
        driver.warm(0, np.array([[5, 6], [7, 3]]))

    def test_a_row_for_every_slot(self):
        driver, rng = Driver(30, [30]), np.random.default_rng(0)
        for _ in range(50):
            assert driver.plan(0, random_topk(rng, 30)) == 1
        counters = driver.caches[0].counters
        assert counters["evictions"] == 0 and counters["misses"] <= 30

    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
    def test_nothing_to_look_up(self, shape):
        cache = HotCache(host_rows(20), 2)
        plan = cache.plan(torch.zeros(shape, dtype=torch.int32))
        assert plan.stop is None and plan.rows.shape == shape and not len(plan.miss_slots)

    def test_the_queue_is_compacted(self):
        """Thousands of uses and no eviction: the queue stays short, the order exact."""
        cache = HotCache(host_rows(20), 6)
        use(cache, [1, 2, 3, 4, 5, 6])
        for _ in range(1000):
            use(cache, [2, 5])
            use(cache, [5, 3])
        assert len(cache.queue) == lru.queue_length(6)
        assert hot(cache) == [1, 4, 6, 2, 5, 3]
        assert use(cache, [7, 8, 9]) == [7, 8, 9]
        assert hot(cache) == [2, 5, 3, 7, 8, 9]
        # 1, 4 and 6 were last used 2001 steps ago, whatever moved since
        assert cache.counters["evicted_age"] == 3 * 2001

    def test_layers_share_buffers(self):
        driver = Driver(40, [5, 20, 40])
        buffers = driver.caches[0].buffers
        assert all(cache.buffers is buffers for cache in driver.caches)
        driver.plan(0, np.arange(40).reshape(4, 10))
        assert buffers.nbytes == 3 * 40 * 4
        driver.plan(2, np.arange(12).reshape(2, 6))
        assert buffers.nbytes == 3 * 40 * 4


class TestWrites:
    def write(self, cache, slots, value, **options):
        cache.host_rows[slots] = value
        count = cache.install(slots, cache.host_rows[slots], **options)
        cache.check_integrity()
        return count

    def test_a_hot_slot_is_updated_in_place(self):
        cache = HotCache(host_rows(20), 4)
        use(cache, [1, 2, 3, 4])
        row = cache.slot_row[2]
        assert self.write(cache, slots_of(2), 77, min_age=1000) == 1
        assert cache.slot_row[2] == row and (cache.rows[row] == 77).all()
        assert hot(cache) == [1, 3, 4, 2] and cache.counters["evictions"] == 0

    def test_min_age(self):
        cache = HotCache(host_rows(20), 2)
        use(cache, [1, 2])
        use(cache, [2])
        assert self.write(cache, slots_of(3), 1, min_age=2) == 0  # slot 1 is one step old
        assert hot(cache) == [1, 2] and cache.counters["skipped"] == 1
        assert self.write(cache, slots_of(3), 1, min_age=1) == 1
        assert hot(cache) == [2, 3]
        assert self.write(cache, slots_of(4, 5), 2, min_age=0) == 2
        assert self.write(cache, slots_of(6, 7, 8), 3, min_age=0) == 2  # not its own rows
        assert hot(cache) == [6, 7] and cache.counters["installs"] == 5

    def test_invalidate_then_reuse(self):
        cache = HotCache(host_rows(20), 4)
        use(cache, [1, 2, 3])
        cache.host_rows[2] = 99
        cache.invalidate(slots_of(2, 2, 17))
        cache.check_integrity()
        assert hot(cache) == [1, 3] and cache.occupied == 2
        assert use(cache, [2]) == [2]
        assert (cache.rows[cache.slot_row[2]] == 99).all()

    def test_no_slots(self):
        cache = HotCache(host_rows(20), 4)
        assert self.write(cache, slots_of(), 1) == 0
        cache.invalidate(slots_of())
        assert cache.occupied == 0


class TestWarm:
    def test_in_order(self):
        cache = HotCache(host_rows(20), 4)
        topk = torch.tensor([[1, 2, -1], [3, 1, 4], [5, -1, 2]], dtype=torch.int32)
        assert cache.warm(topk) == 4  # slot 2 came, went for slot 5, and came again
        cache.check_integrity()
        assert hot(cache) == [1, 4, 5, 2]
        assert cache.counters["lookups"] == cache.counters["misses"] == 0
        assert use(cache, [5, 2, 1, 4]) == []

    def test_more_slots_than_rows(self):
        cache = HotCache(host_rows(20), 3)
        assert cache.warm(torch.arange(10, dtype=torch.int32).view(1, 10)) == 3
        assert hot(cache) == [0, 1, 2]  # one step's: what is in stays
        assert cache.warm(torch.arange(10, dtype=torch.int32).view(10, 1)) == 3
        assert hot(cache) == [7, 8, 9]  # ten steps': the last ones stay
        cache.check_integrity()


class TestPolicyAlone:
    def test_same_decisions_as_with_rows(self):
        """Without rows, as the simulator and the planner run it."""
        rng = np.random.default_rng(3)
        caches = HotCache(host_rows(50), 12), HotCache(None, 12, num_slots=50)
        for _ in range(300):
            topk, kind = torch.from_numpy(random_topk(rng, 50)), rng.integers(4)
            slots = torch.from_numpy(rng.permutation(50)[:4])
            seen = []
            for cache in caches:
                seen.append([])
                if kind == 0:
                    seen[-1].append(cache.install(slots, cache_rows(cache, slots), 2))
                elif kind == 1:
                    cache.invalidate(slots)
                    seen[-1].append(cache.warm(topk[:1]))
                start = (0, 0)
                while start is not None:
                    plan = cache.plan(topk, start)
                    cache.fetch(plan)
                    seen[-1] += [plan.rows.tolist(), plan.miss_slots.tolist(), plan.stop]
                    start = plan.stop
                seen[-1] += [cache.counters, hot(cache), cache.query_misses.tolist()]
                cache.check_integrity()
                cache.check_rows(np.arange(12), "layer 0")
            assert seen[0] == seen[1]
        assert caches[0].nbytes - caches[1].nbytes == 12 * 24 and caches[1].rows is None


def cache_rows(cache, slots):
    return cache.host_rows[slots] if cache.host_rows is not None else torch.zeros(len(slots), 1)


class TestRefusals:
    @pytest.mark.parametrize("num_rows", [0, -1, 21])
    def test_sizes_without_rows(self, num_rows):
        with pytest.raises(ValueError, match=f"1 to 20, .*: got {num_rows}"):
            HotCache(None, num_rows, num_slots=20)

    def test_no_size_at_all(self):
        with pytest.raises(ValueError, match="1 to 0"):
            HotCache(None, 4)

    def test_odd_rows(self):
        with pytest.raises(ValueError, match="multiple of 8 bytes: got 12"):
            HotCache(host_rows(20, (1, 12)), 4)

    def test_strides_that_would_take_a_copy(self):
        with pytest.raises(RuntimeError, match="view"):
            HotCache(host_rows(20, (4, 24))[:, ::2], 4)

    def test_rows_within_wider_ones_are_no_copy(self):
        wide = host_rows(20, (48,))
        cache = HotCache(wide[:, :24], 4)
        wide[3] = 5
        use(cache, [3])
        assert (cache.rows[cache.slot_row[3]] == 5).all()


class TestChecks:
    @pytest.mark.parametrize("shape, dtype", FORMATS)
    def test_a_flipped_byte_is_found(self, shape, dtype):
        cache = HotCache(host_rows(20, shape, dtype), 8)
        use(cache, [4, 5, 6, 7, 11])
        cache.check_rows(np.arange(8), "layer 3")
        row = int(cache.slot_row[11])
        cache.rows[row].view(torch.uint8).view(-1)[-1] ^= 1
        cache.check_rows(np.array([row + 1, row + 7]), "layer 3")  # others
        with pytest.raises(RowCorruption) as caught:
            cache.check_rows(np.array([row + 1, row + 8 * 10**9]), "layer 3")
        hot, host = (self.crc(rows) for rows in (cache.rows[row], cache.host_rows[11]))
        for part in ("layer 3", "slot 11", f"hot row {row}", f"crc32 {hot:08x}", f"{host:08x}"):
            assert part in str(caught.value)
        with pytest.raises(RuntimeError, match="must equal its host row"):
            cache.check_integrity()

    @staticmethod
    def crc(row):
        return zlib.crc32(row.contiguous().view(torch.uint8).numpy().tobytes())

    @pytest.mark.parametrize(
        "rule, corrupt",
        [
            ("map back", lambda c, row: c.slot_row.__setitem__(9, row)),  # one row, two slots
            ("map back", lambda c, row: c.slot_row.__setitem__(1, -1)),  # a lost slot
            ("map back", lambda c, row: c.row_slot.__setitem__(row, 2)),  # two rows, one slot
            ("free or owned", lambda c, row: c.free.__setitem__(0, row)),
            ("free or owned", lambda c, row: c.free.__setitem__(0, c.free[1])),
            ("free or owned", lambda c, row: c.free.__setitem__(0, 99)),
            ("free or owned", lambda c, row: c.state.__setitem__(lru.FREE, 1)),
            ("no place", lambda c, row: c.row_place.__setitem__(c.free[0], 1)),
            ("one live place", lambda c, row: c.row_place.__setitem__(row, 99)),
            ("one live place", lambda c, row: c.row_place.__setitem__(row, c.row_place[row] + 1)),
            ("one live place", lambda c, row: c.state.__setitem__(lru.HEAD, 2)),
            ("one live place", lambda c, row: c.state.__setitem__(lru.TAIL, 1)),
            ("equal its host row", lambda c, row: c.host_rows[1].add_(1)),
        ],
    )
    def test_each_corruption_is_named(self, rule, corrupt):
        cache = HotCache(host_rows(20), 6)
        use(cache, [1, 2, 3])
        corrupt(cache, int(cache.slot_row[1]))
        with pytest.raises(RuntimeError, match=rule):
            cache.check_integrity()


def test_more_queries_of_one_step_do_not_age_rows():
    cache = HotCache(None, 4, num_slots=10)
    topk = torch.tensor([[1, 2]], dtype=torch.int32)
    cache.plan(topk)
    begun = int(cache.state[lru.STEP])
    cache.plan(topk, same_step=True)
    assert cache.state[lru.STEP] == begun
    cache.plan(topk)
    assert cache.state[lru.STEP] == begun + 1
