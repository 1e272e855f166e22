"""The rows of a group's later layers are fetched behind the layers before: the schedule."""

import threading
from types import SimpleNamespace

import pytest
import torch

from sglang_ess.attention import passes
from sglang_ess.tiers import HotCache

SLOTS, LAYERS = 40, 4
CANARY = passes.Canary(1.0)
SECONDS = 20  # a wait that never ends fails


class Recorded:
    """A group's cache whose fetches are logged, and may be held until a layer attends.

    log: ("fetch" | "fetched" | "attend" | "attended", layer) in order
    behind: layer -> the layer whose attention must be under way before its fetch may end
    """

    def __init__(self, rows=24, behind=()):
        host = torch.arange(LAYERS * SLOTS).view(LAYERS, SLOTS, 1).expand(-1, -1, 4).contiguous()
        self.host, self.cache = list(host), HotCache(list(host), rows)
        self.log, self._lock = [], threading.Lock()
        self._attends = [threading.Event() for _ in range(LAYERS)]
        self._behind, self._fetch = dict(behind), self.cache.fetch
        self.cache.fetch = self.fetch

    def note(self, what, layer):
        with self._lock:
            self.log.append((what, layer))

    def fetch(self, plan, layer=0):
        self.note("fetch", layer)
        if layer in self._behind:
            assert self._attends[self._behind[layer]].wait(SECONDS), "nothing attends meanwhile"
        self._fetch(plan, layer)
        self.note("fetched", layer)

    def step(self, topk, written=(), fetches=None):
        """One decode step: each layer writes, attends and is checked, in turn."""
        slots = torch.tensor(written, dtype=torch.int64)
        blocks = topk if isinstance(topk, list) else [topk]
        step = passes.GroupStep(self.cache, blocks, fetches or passes.EarlyFetch(), CANARY)
        for layer, host in enumerate(self.host):
            rows = torch.index_select(host, 0, slots)
            if layer == 0:
                self.cache.install(slots, rows)
            else:
                self.cache.refill(layer, rows)
            for index, block in enumerate(blocks):
                for plan in step.passes(index, layer, layer):
                    self.note("attend", layer)
                    self._attends[layer].set()
                    read = plan.rows >= 0
                    got = self.cache.arena.layers[layer][plan.rows[read].long()]
                    assert torch.equal(got, host[block[plan.queries][read].long()])
                    self.note("attended", layer)

    def order(self, *events):
        places = [self.log.index(event) for event in events]
        assert places == sorted(places), self.log


def topk_of(*slots):
    return torch.tensor([slots], dtype=torch.int32)


def test_a_fetch_is_in_flight_while_the_layers_before_attend():
    """Held until the layer before attends: a fetch that waited for its own layer never ended."""
    recorded = Recorded(behind={1: 0, 2: 1, 3: 2})
    recorded.step(topk_of(1, 2, 3, 4), written=[5])
    for layer in range(1, LAYERS):
        recorded.order(("attend", layer - 1), ("fetched", layer), ("attend", layer))
    # One link: in the order of the layers, one after another.
    fetches = [event for event in recorded.log if event[0].startswith("fetch")]
    assert fetches == [(what, layer) for layer in range(LAYERS) for what in ("fetch", "fetched")]


def test_all_fetches_may_end_before_the_first_layer_attends_to_the_end():
    """Only the first is waited for on the way to a layer's attention."""
    recorded = Recorded(behind={1: 0, 2: 0, 3: 0})
    recorded.step(topk_of(1, 2, 3, 4))
    recorded.order(("fetched", 0), ("attend", 0), ("fetched", 1), ("fetched", 2), ("fetched", 3))


def test_no_miss_starts_no_fetch():
    recorded = Recorded()
    recorded.step(topk_of(1, 2, 3, 4))
    recorded.log.clear()
    started = []
    fetches = SimpleNamespace(start=lambda *_: started.append(1), wait=lambda layer: None)
    recorded.step(topk_of(4, 3, 2, 1), fetches=fetches)
    assert not started


@pytest.mark.parametrize(
    ("rows", "topk", "written"),
    [
        pytest.param(4, [topk_of(1, 2, 3, 4, 5, 6)], [7], id="several passes"),
        pytest.param(24, [topk_of(1, 2, 3), topk_of(3, 4, 5)], [7], id="several blocks"),
        pytest.param(4, [topk_of(1, 2, 3, 4)], [7], id="a written slot lost its row"),
        pytest.param(4, [topk_of(7, 1, 2)], [1, 2, 3, 7, 8], id="a written slot got no row"),
    ],
)
def test_no_fetch_is_early_where_a_layer_must_write_or_pass_first(rows, topk, written):
    recorded, started = Recorded(rows), []
    fetches = SimpleNamespace(start=lambda *_: started.append(1), wait=lambda layer: None)
    recorded.step(topk, written, fetches)
    assert not started
    for layer in range(1, LAYERS):
        recorded.order(("attended", layer - 1), ("fetch", layer), ("attend", layer))


def test_an_abandoned_step_is_waited_for():
    """Its copies use the buffers of the next step."""
    recorded, fetches = Recorded(behind={2: 0}), passes.EarlyFetch()
    recorded.cache.install(torch.empty(0, dtype=torch.int64), torch.empty(0, 4).long())
    fetches.start(recorded.cache, recorded.cache.plan(topk_of(1, 2, 3, 4)))
    threading.Timer(0.05, recorded._attends[0].set).start()
    fetches.drop()
    assert recorded.log[-1] == ("fetched", LAYERS - 1)


def test_a_failed_copy_of_an_abandoned_step_is_logged(caplog):
    def fetch(plan, layer):
        raise MemoryError(f"layer {layer}")

    fetches = passes.EarlyFetch()
    fetches.start(SimpleNamespace(num_layers=2, fetch=fetch), None)
    fetches.drop()
    assert [record.getMessage().partition("failed: ")[2] for record in caplog.records] == [
        "MemoryError: layer 0", "MemoryError: layer 1",
    ]  # fmt: skip
