"""Any order of operations on the tiers, chosen by hypothesis, against an OrderedDict."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.tiers.model import Driver, random_topk

NUM_LAYERS = 4
MIN_AGES = (None, 0, 1, 2, 5, 1000)  # None: invalidate
SLOW_STEPS = 100_000
# Of a server that just starts, and of one whose steps pass what an int32 and a uint32 hold.
FIRST_STEPS = (0, 2**31 - 5, 2**32 - 5)

layers = st.integers(0, NUM_LAYERS - 1)
seeds = st.integers(0, 2**31)


class TierMachine(RuleBasedStateMachine):
    """Every rule does its operation on both sides and compares them (tests/tiers/model.py).

    Large arguments come from a drawn seed and drawn sizes: drawing each slot costs more
    time than the operation, and hypothesis limits how much one example may draw.
    """

    steps = 0  # of all examples, for the slow run's count
    passes = 0  # the most that one plan took

    @initialize(
        num_slots=st.integers(1, 64),
        sizes=st.tuples(*[st.integers(1, 64)] * NUM_LAYERS),
        first_step=st.sampled_from(FIRST_STEPS),
    )
    def start(self, num_slots, sizes, first_step):
        rows = [min(size, num_slots) for size in sizes]
        self.driver = Driver(num_slots, rows, first_step=first_step)
        self.num_slots = num_slots

    def _count(self, passes: int = 0) -> None:
        TierMachine.steps += 1
        TierMachine.passes = max(TierMachine.passes, passes)

    @rule(
        layer=layers,
        seed=seeds,
        shape=st.tuples(st.integers(0, 6), st.integers(0, 40)),
        span=st.integers(1, 64),
    )
    def plan(self, layer, seed, shape, span):
        topk = random_topk(np.random.default_rng(seed), self.num_slots, *shape, span)
        self._count(self.driver.plan(layer, topk))

    @rule(layer=layers, slots=st.lists(st.integers(-1, 63), min_size=1, max_size=6))
    def plan_one(self, layer, slots):
        self._count(self.driver.plan(layer, np.minimum([slots], self.num_slots - 1)))

    @rule(layer=layers, seed=seeds, similarity=st.sampled_from((0.3, 0.6, 0.9)))
    def plan_again(self, layer, seed, similarity):
        """A step like the last one, as decode makes them: part of its slots are new."""
        rng = np.random.default_rng(seed)
        topk = getattr(self, "last", np.zeros((3, 12), np.int32))
        fresh = random_topk(rng, self.num_slots, *topk.shape, self.num_slots)
        self.last = np.where(rng.random(topk.shape) < similarity, topk, fresh)
        self.last = np.minimum(self.last, self.num_slots - 1)
        self._count(self.driver.plan(layer, self.last))

    @rule(
        slots=st.lists(st.integers(0, 63), max_size=8),
        min_ages=st.tuples(*[st.sampled_from(MIN_AGES)] * NUM_LAYERS),
    )
    def write(self, slots, min_ages):
        """New content, whoever owned these slots before."""
        self._count()
        self.driver.write([min(slot, self.num_slots - 1) for slot in slots], list(min_ages))

    @rule(seed=seeds, count=st.integers(0, 64), min_age=st.sampled_from(MIN_AGES))
    def write_many(self, seed, count, min_age):
        """A prefill: more rows than a hot tier may have."""
        self._count()
        slots = np.random.default_rng(seed).permutation(self.num_slots)[:count]
        self.driver.write(slots.tolist(), [min_age] * NUM_LAYERS)

    @rule(layer=layers, slots=st.lists(st.integers(0, 63), min_size=1, max_size=4))
    def read_then_reuse(self, layer, slots):
        """Make slots hot, give them to another owner, read them at once."""
        self._count()
        slots = np.minimum(slots, self.num_slots - 1)
        self.driver.plan(layer, slots[None])
        self.driver.write(slots.tolist(), [None, 0, 2, 1000])
        self.driver.plan(layer, slots[None])

    @rule(layer=layers, seed=seeds, shape=st.tuples(st.integers(0, 6), st.integers(0, 40)))
    def warm(self, layer, seed, shape):
        self._count()
        rng = np.random.default_rng(seed)
        self.driver.warm(layer, random_topk(rng, self.num_slots, *shape))

    @rule(
        layer=layers, seed=seeds, shape=st.tuples(st.integers(0, 4), st.integers(0, 20)),
        most=st.integers(0, 8), min_age=st.sampled_from((0, 1, 2, 5)),
    )  # fmt: skip
    def fetch_ahead(self, layer, seed, shape, most, min_age):
        self._count()
        rng = np.random.default_rng(seed)
        slots = random_topk(rng, self.num_slots, *shape)
        self.driver.fetch_ahead(layer, slots, most, min_age)

    @rule(layer=layers, picks=st.lists(st.integers(0, 2**40), max_size=4))
    def check_rows(self, layer, picks):
        self._count()
        self.driver.check_rows(layer, picks)

    @rule(layer=layers, num_rows=st.integers(1, 64))
    def resize(self, layer, num_rows):
        """Rows that one layer gives up are there for the others."""
        self._count()
        self.driver.resize(layer, num_rows)

    @rule()
    def clear(self):
        self._count()
        self.driver.clear()


def run(max_examples: int, step_count: int, **options) -> None:
    TierMachine.steps = TierMachine.passes = 0
    run_state_machine_as_test(
        TierMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=step_count,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_short():
    run(max_examples=70, step_count=40, derandomize=True, database=None)
    assert TierMachine.steps >= 600, TierMachine.steps
    assert TierMachine.passes >= 10, TierMachine.passes  # far more slots than rows was tried


@pytest.mark.slow
def test_long():
    run(max_examples=700, step_count=200, print_blob=True)
    assert TierMachine.steps >= SLOW_STEPS, TierMachine.steps
