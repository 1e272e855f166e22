"""Staging against a direct gather: what a prefill pass reads, in any grouping and order."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.mem_cache.capacity import Geometry
from sglang_ess.tiers import staging as module
from sglang_ess.tiers.staging import Staging

SLOTS, CONTEXT, REQUESTS = 200, 60, 8
FORMATS = {"fp8": (656, torch.uint8), "bf16": (576, torch.bfloat16), "fp32": (576, torch.float32)}


def host_tier(layers=3, fmt="fp8", seed=0):
    """[slots, width] of each layer, every row different."""
    width, dtype = FORMATS[fmt]
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        shape = (layers, SLOTS, width)
        return list(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8))
    return list(torch.randn(layers, SLOTS, width, generator=g).to(dtype))


class Batch:
    """Requests of (prefix, new) tokens on slots of their own, but for prefixes in `shared`.

    shared: {request: other}: it has its prefix in common with the other's first tokens
    """

    def __init__(self, sizes, shared=None, seed=0):
        free = iter(np.random.default_rng(seed).permutation(SLOTS).tolist())
        self.table = torch.zeros(REQUESTS, CONTEXT, dtype=torch.int32)
        self.spans = []
        for i, (prefix, tokens) in enumerate(sizes):
            row = REQUESTS - 1 - i  # not the order of the batch
            slots = [next(free) for _ in range(prefix + tokens)]
            if shared and i in shared:
                slots[:prefix] = self.slots(shared[i])[:prefix]
            self.table[row, : len(slots)] = torch.tensor(slots).int()
            self.spans.append((row, prefix, tokens))

    def slots(self, i):
        row, prefix, tokens = self.spans[i]
        return self.table[row, : prefix + tokens].tolist()

    def topk(self, width, seed=0):
        """[queries, width] int32: slots of each query's own request, -1 pads anywhere."""
        g = np.random.default_rng(seed)
        rows = []
        for i, (_, _, tokens) in enumerate(self.spans):
            own = np.array([*self.slots(i), -1])
            rows += [own[g.integers(0, len(own), width)] for _ in range(tokens)]
        return torch.from_numpy(np.array(rows, np.int32).reshape(-1, width))

    def new_slots(self):
        return [s for i, (_, p, _) in enumerate(self.spans) for s in self.slots(i)[p:]]


def gather(rows, topk):
    """The direct way: the host rows of the top-k, zeros for pads."""
    found = rows[topk.clamp_min(0).long()].view(torch.uint8).clone()
    found[topk < 0] = 0
    return found


def run_pass(staging, host, batch, topk, write=None):
    """One prefill pass, each layer's new rows written just before it is read."""
    groups = staging.begin(batch.spans, batch.table)
    assert [g.queries.start for g in groups[1:]] == [g.queries.stop for g in groups[:-1]]
    for layer, rows in enumerate(host):
        if write is not None:
            rows[batch.new_slots()] = write[layer][batch.new_slots()]
        for i, group in enumerate(groups):
            check_group(staging, rows, layer, i, topk[group.queries])
    return groups


def check_group(staging, rows, layer, index, topk):
    buffer = staging.rows(layer, index)
    local = staging.places_of(index, topk)
    assert torch.equal(local < 0, topk < 0) and local.dtype == torch.int32
    assert torch.equal(gather(buffer, local), gather(rows, topk))
    if (topk >= 0).any():  # a row is where its slot is, and in no second place
        slots, places = topk[topk >= 0], local[topk >= 0]
        assert len(set(zip(slots.tolist(), places.tolist(), strict=True))) == len(slots.unique())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("sizes", "shared", "num_rows", "groups"),
    [
        ([(0, 5)], {}, 60, 1),
        ([(20, 5)], {}, 25, 1),  # to the last row
        ([(0, 5), (0, 7), (0, 1)], {}, 13, 1),
        ([(10, 5), (0, 7), (30, 1)], {}, 60, 1),
        ([(10, 5), (0, 7), (30, 1)], {}, 31, 2),
        ([(10, 5), (0, 7), (30, 1)], {}, 52, 2),
        ([(20, 5), (20, 5), (20, 5)], {}, 25, 3),
        ([(20, 5), (20, 7), (15, 2)], {1: 0, 2: 0}, 60, 2),
        ([(20, 5), (20, 7), (15, 2)], {1: 0, 2: 0}, 27, 3),
        ([(0, 20), (12, 3)], {}, 40, 1),
    ],
)
def test_a_pass_reads_what_a_gather_would(fmt, sizes, shared, num_rows, groups):
    host, batch = host_tier(fmt=fmt), Batch(sizes, shared)
    staging = Staging(host, num_rows)
    found = run_pass(staging, host, batch, batch.topk(9), write=host_tier(fmt=fmt, seed=1))
    assert len(found) == groups
    assert found[0].queries.start == 0 and found[-1].queries.stop == len(batch.new_slots())


def test_a_shared_prefix_is_staged_once():
    batch = Batch([(20, 5), (20, 7), (15, 2)], {1: 0, 2: 0})
    staging = Staging(host_tier(), 80)
    (group,) = staging.begin(batch.spans, batch.table)
    assert sorted(group.prefix.tolist()) == sorted(batch.slots(0)[:20])
    assert group.new.tolist() == batch.new_slots()


def test_a_request_longer_than_a_buffer_is_refused_and_the_next_pass_works():
    host, batch = host_tier(), Batch([(3, 2), (20, 6)])
    staging = Staging(host, 25)
    with pytest.raises(ValueError, match="got 26 rows, limit 25.*--context-length"):
        staging.begin(batch.spans, batch.table)
    small = Batch([(19, 6)], seed=4)
    run_pass(staging, host, small, small.topk(5))


def test_where_slots_bound_the_buffer_more_context_is_no_advice():
    staging = Staging(host_tier(), SLOTS)
    table = torch.arange(SLOTS + 1, dtype=torch.int32).view(1, -1)
    with pytest.raises(ValueError, match=f"limit {SLOTS}.*--max-total-tokens") as caught:
        staging.begin([(0, SLOTS, 1)], table)
    assert "--context-length" not in str(caught.value)


def test_no_requests():
    staging = Staging(host_tier(), 8)
    assert staging.begin([], torch.zeros(1, 1, dtype=torch.int32)) == []
    batch = Batch([(2, 3)])
    run_pass(staging, staging._host_rows, batch, batch.topk(4))


@pytest.fixture
def copies(monkeypatch):
    """[(address of the host rows, slots)] of every copy, in the order they are made."""
    made, real = [], module.copy_rows

    def recorded(source, indices, target):
        made.append((source.data_ptr(), indices.tolist()))
        real(source, indices, target)

    monkeypatch.setattr(module, "copy_rows", recorded)
    return made


def test_the_next_prefix_is_always_on_its_way(copies):
    """(layer, group) in order, each prefix once, one item ahead and nothing after the last."""
    host, batch = host_tier(layers=3), Batch([(10, 2), (12, 3)])
    staging = Staging(host, 20)
    groups = staging.begin(batch.spans, batch.table)
    items = [(layer, i) for layer in range(3) for i in range(2)]
    expected = [(host[layer].data_ptr(), groups[i].prefix.tolist()) for layer, i in items]
    for item, (layer, i) in enumerate(items):
        staging._pending[1].result()
        assert [c for c in copies if c in expected] == expected[: item + 1]
        staging.rows(layer, i)
        assert (host[layer].data_ptr(), groups[i].new.tolist()) in copies
    assert staging._pending is None
    assert [c for c in copies if c in expected] == expected
    assert len(copies) == 2 * len(items)


def test_a_prefetch_leaves_the_buffer_that_is_being_read(copies):
    host, batch = host_tier(), Batch([(30, 2)])
    staging = Staging(host, 40)
    staging.begin(batch.spans, batch.table)
    for layer in range(3):
        buffer = staging.rows(layer, 0)
        before = buffer.clone()
        if layer < 2:
            staging._pending[1].result()
        assert torch.equal(buffer, before)
    assert len({call[0] for call in copies}) == 3


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 0, 3, 3, 1], [1, 3], [3]])
def test_items_in_any_order(order):
    host, batch = host_tier(layers=2), Batch([(10, 2), (12, 3)])
    staging, topk = Staging(host, 20), batch.topk(6)
    groups = staging.begin(batch.spans, batch.table)
    for item in order:
        layer, i = divmod(item, 2)
        check_group(staging, host[layer], layer, i, topk[groups[i].queries])


@pytest.mark.parametrize("given_up", [0, 1, 2, 3])
def test_a_pass_given_up_leaves_nothing_behind(given_up):
    """The batch after it has other requests in the same slots, and the rows have changed."""
    host, first = host_tier(), Batch([(15, 2), (12, 3)])
    staging, topk = Staging(host, 20), first.topk(6)
    groups = staging.begin(first.spans, first.table)
    for item in range(given_up):
        layer, i = divmod(item, 2)
        check_group(staging, host[layer], layer, i, topk[groups[i].queries])
    second = Batch([(5, 9), (15, 1), (0, 3)], seed=1)
    for rows, values in zip(host, host_tier(seed=9), strict=True):
        rows.copy_(values)
    run_pass(staging, host, second, second.topk(6))


@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize("failing", range(8))
def test_a_failed_copy_is_reported_once_and_the_next_pass_works(
    monkeypatch, caplog, failing, asked_for
):
    """Copy `failing` of a pass of two groups and three layers: of prefixes and of new rows.

    asked_for: the pass goes on to where the failure shows; else it is given up as it sets off
    """
    host, batch, calls, real = host_tier(), Batch([(15, 2), (12, 3)]), [], module.copy_rows
    staging, topk = Staging(host, 20), batch.topk(6)

    def copy_rows(source, indices, target):
        calls.append(indices)
        if len(calls) == failing + 1:
            raise OSError("injected")
        real(source, indices, target)

    monkeypatch.setattr(module, "copy_rows", copy_rows)
    reported = 0
    groups = staging.begin(batch.spans, batch.table)
    for item in range(6):
        if not asked_for and staging._pending and staging._pending[1].exception():
            break
        layer, i = divmod(item, 2)
        try:
            check_group(staging, host[layer], layer, i, topk[groups[i].queries])
        except OSError:
            reported += 1
            break
    with caplog.at_level(logging.WARNING, module.__name__):
        run_pass(staging, host, batch, topk)
        run_pass(staging, host, batch, topk)
    assert reported + len(caplog.records) == 1
    assert all("OSError: injected" in record.getMessage() for record in caplog.records)


def test_the_same_slot_in_several_groups_and_passes():
    """Each group maps it to a place of its own: an earlier one's would be another row."""
    host, slot = host_tier(layers=1), 7
    staging = Staging(host, 12)
    table = torch.zeros(REQUESTS, CONTEXT, dtype=torch.int32)
    table[0, :11] = torch.tensor([*range(20, 30), slot])  # new: the last row
    table[1, :3] = torch.tensor([slot, 40, 41])  # prefix: the first row
    topk, places = torch.tensor([[slot, -1, slot]]).int(), []
    groups = staging.begin([(0, 10, 1), (1, 2, 1)], table)
    assert len(groups) == 2
    for i in (0, 1, 0):
        check_group(staging, host[0], 0, i, topk)
        places.append(staging.places_of(i, topk)[0, 0].item())
    assert places == [10, 0, 10]
    staging.begin([(1, 0, 3)], table)
    assert staging.places_of(0, topk).tolist() == [[0, -1, 0]]


def test_translate_keeps_order_and_pads():
    batch = Batch([(6, 2)])
    staging = Staging(host_tier(), 10)
    staging.begin(batch.spans, batch.table)
    row = {slot: i for i, slot in enumerate(sorted(batch.slots(0)[:6]) + batch.slots(0)[6:])}
    slots = batch.slots(0)
    topk = torch.tensor([[-1, slots[3], slots[7], slots[0], -1], [-1] * 5]).int()
    expected = [[-1, row[slots[3]], row[slots[7]], row[slots[0]], -1], [-1] * 5]
    assert staging.places_of(0, topk).tolist() == expected
    assert staging.places_of(0, topk[:0]).shape == (0, 5)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("num_rows", [10, 60])
def test_two_buffers_and_a_map_whatever_the_prompts(fmt, num_rows):
    """SparseServe's bound: no layer and no token more on the device than the longest needs."""
    host = host_tier(layers=5, fmt=fmt)
    staging = Staging(host, num_rows)
    width, dtype = FORMATS[fmt]
    row_bytes = width * dtype.itemsize
    bound = 2 * num_rows * row_bytes + 4 * SLOTS
    geometry = Geometry(5, row_bytes, 0, 8, num_rows - 1, 1)
    assert geometry.staging_bytes(SLOTS) == 2 * num_rows * row_bytes
    addresses = set()
    for sizes in ([(0, 1)], [(num_rows - 1, 1)], [(num_rows - 2, 2)] * 3):
        batch = Batch(sizes)
        groups = staging.begin(batch.spans, batch.table)
        for layer in range(5):
            for i in range(len(groups)):
                addresses.add(staging.rows(layer, i).data_ptr())
        assert staging.nbytes == bound
    assert len(addresses) == 2


sizes = st.lists(st.tuples(st.integers(0, 18), st.integers(1, 7)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=3), st.integers(25, 60))
def test_any_passes(passes, num_rows):
    host = host_tier(layers=2)
    staging = Staging(host, num_rows)
    for seed, (shape, sharing) in enumerate(passes):
        common = [i for i in range(1, len(shape)) if shape[i][0] <= shape[0][0]]
        batch = Batch(shape, {i: 0 for i in common} if sharing else {}, seed)
        run_pass(staging, host, batch, batch.topk(5, seed), write=host_tier(2, seed=seed + 5))


def test_the_gather_notices_a_wrong_map(monkeypatch):
    """Entries of an earlier group left in force."""
    host = host_tier()
    staging = Staging(host, 25)
    monkeypatch.setattr(Staging, "_put", lambda self, group: None)
    batch = Batch([(5, 3)])
    with pytest.raises((AssertionError, IndexError)):
        run_pass(staging, host, batch, batch.topk(5))


def test_the_gather_notices_new_rows_read_too_early(monkeypatch):
    """New rows staged with the prefix, before attention has written them."""
    host, batch = host_tier(), Batch([(5, 3)])
    staging, real = Staging(host, 25), module.copy_rows
    old = [rows.clone() for rows in host]
    early = {rows.data_ptr(): values for rows, values in zip(host, old, strict=True)}
    monkeypatch.setattr(
        module, "copy_rows", lambda source, *rest: real(early[source.data_ptr()], *rest)
    )
    with pytest.raises(AssertionError):
        run_pass(staging, host, batch, batch.topk(9), write=host_tier(seed=1))
