"""Many requests over a store that is smaller than their documents."""

import random

import psutil
import pytest

from tests.support import parity
from tests.support.third_tier import over_store
from tests.support.tier_scripts import all_same

PAGE = 64
SHAPE = dict(arch="glm", index_topk=32, layers=3, sharing="FFS", **parity.NARROW)
DOCUMENTS, SLOTS = 16, 1536  # about 80 pages; the slots hold 24, the store a third of all
LENGTHS = [random.Random(7).randrange(200, 460) for _ in range(DOCUMENTS)]
LIMIT = 12 << 20
REQUESTS = 1000
TAIL = [1, 2, 3]
GROWTH = 64 << 20  # bytes of memory in the second half: far below one a request


def disk_bytes(store) -> int:
    """What the store takes, with its directories."""
    found = 0
    for path in [store, *store.rglob("*")]:
        try:
            found += path.lstat().st_blocks * 512
        except FileNotFoundError:  # evicted meanwhile
            continue
    return found


def resident_bytes(served) -> int:
    processes = psutil.Process(served._process.pid).children(recursive=True)
    return sum(process.memory_info().rss for process in processes)


@pytest.mark.slow
def test_a_store_below_the_working_set(tmp_path):
    """It never takes more than its limit; what is loaded whole gives the same output; memory
    stays as it is.
    """
    model, store = parity.write_model(tmp_path / "glm", **SHAPE), tmp_path / "store"
    prompts, rng, memory = parity.prompts_of(LENGTHS), random.Random(1), []
    whole = [length // PAGE for length in LENGTHS]
    with over_store(model, store, limit=LIMIT, max_total_tokens=SLOTS) as served:
        expected = {}
        for i, prompt in enumerate(prompts):
            served.together(f"fill {i}", [prompt], 1)
            expected[i] = served.together(f"warm {i}", [prompt + TAIL], 4)
        hits = 0
        for number in range(REQUESTS):
            # A few are asked for often, so that the store has something to keep.
            i = min(int(rng.expovariate(0.25)), DOCUMENTS - 1)
            outputs = served.together(f"soak {number}", [prompts[i] + TAIL], 4)
            if outputs[0].cached_tokens // PAGE == whole[i]:
                hits += 1
                assert all_same({"hit": outputs}, {"hit": expected[i]})
            assert disk_bytes(store) <= LIMIT
            memory.append(resident_bytes(served))
        figures = served.call("_store_figures")
    assert hits > REQUESTS / 4 and figures["loaded_pages"] > REQUESTS / 8
    assert not figures["failures"] or set(figures["failures"]) == {"missing"}  # evicted meanwhile
    assert memory[-1] - memory[REQUESTS // 2] < GROWTH
