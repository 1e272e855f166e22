"""SaveRing: every row of every step in the host tier, in order, with a slow or failing thread."""

import threading

import pytest
import torch

from ess_kernels.save import SaveRing, save_reference
from ess_kernels.scatter import scatter_rows
from tests.support.rows import FP8, random_rows

BF16 = ((1, 576), torch.bfloat16)
LAYERS = 3
SLOTS = 61
PATIENCE = 10.0  # seconds until a test takes a blocked thread for a deadlock


def same_bytes(ours, theirs) -> bool:
    return all(
        torch.equal(a.flatten(1).view(torch.uint8), b.flatten(1).view(torch.uint8))
        for a, b in zip(ours, theirs, strict=True)
    )


def host_tier(row, generator) -> list[torch.Tensor]:
    return [random_rows(SLOTS, row, generator) for _ in range(LAYERS)]


@pytest.fixture
def open_ring(device):
    rings = []

    def build(host_rows, max_rows=7, depth=2) -> SaveRing:
        rings.append(SaveRing(host_rows, max_rows, depth, device))
        return rings[-1]

    yield build
    for ring in rings:
        if ring._failure is None:
            ring.close()


def shut_gate(ring, monkeypatch) -> threading.Event:
    """The thread scatters a step only when the event is set."""
    opened = threading.Event()
    scatter = ring._save

    def save_when_open(stage):
        assert opened.wait(PATIENCE)
        scatter(stage)

    monkeypatch.setattr(ring, "_save", save_when_open)
    return opened


def failure_of(call) -> str:
    """What the RuntimeError of a call says that would else block for ever."""
    told = []

    def note_failure():
        try:
            call()
        except RuntimeError as failure:
            told.append(str(failure))

    caller = threading.Thread(target=note_failure, daemon=True)
    caller.start()
    caller.join(PATIENCE)
    assert told, "the call blocks or does not fail"
    return told[0]


def random_slots(n: int, generator) -> torch.Tensor:
    """Distinct slots, the last one often, with some of them made padding."""
    slots = torch.randperm(SLOTS, generator=generator)[:n]
    if n and SLOTS - 1 not in slots:
        slots[0] = SLOTS - 1
    slots[torch.rand(n, generator=generator) < 0.3] = -1
    return slots


def one_step(ring, slots, rows, device) -> int:
    ring.begin(slots.to(device))
    for layer, new in enumerate(rows):
        ring.rows(layer, len(slots)).copy_(new)
    return ring.submit()


@pytest.mark.parametrize("row", [FP8, BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_many_steps_equal_the_reference(row, depth, open_ring, device):
    generator = torch.Generator().manual_seed(depth)
    host = host_tier(row, generator)
    expected = [rows.clone() for rows in host]
    ring = open_ring(host, max_rows=7, depth=depth)
    for step in range(1, 24):
        n = int(torch.randint(0, 8, (), generator=generator))
        slots = random_slots(n, generator)
        rows = [random_rows(n, row, generator) for _ in range(LAYERS)]
        assert one_step(ring, slots, rows, device) == step == ring.submitted
        assert step - depth <= ring.saved <= step
        if step % 5 == 0:
            ring.wait(step - 1)
            assert ring.saved >= step - 1
        save_reference(expected, slots, rows)
    ring.drain()
    assert ring.saved == 23
    assert same_bytes(host, expected)


def test_saved_is_counted_after_the_rows_are_there(open_ring, monkeypatch, device):
    generator = torch.Generator().manual_seed(0)
    host = host_tier(FP8, generator)
    before = [rows.clone() for rows in host]
    ring = open_ring(host)
    gate = shut_gate(ring, monkeypatch)
    rows = [random_rows(2, FP8, generator) for _ in range(LAYERS)]
    one_step(ring, torch.tensor([60, 0]), rows, device)
    assert ring.saved == 0 and same_bytes(host, before)
    gate.set()
    ring.wait(1)
    assert ring.saved == 1 and torch.equal(host[2][[60, 0]], rows[2])


def test_padding_given_often_is_not_saved_and_the_later_of_two_rows_stays(open_ring, device):
    generator = torch.Generator().manual_seed(0)
    host = host_tier(BF16, generator)
    before = [rows.clone() for rows in host]
    ring = open_ring(host)
    rows = [random_rows(6, BF16, generator) for _ in range(LAYERS)]
    one_step(ring, torch.tensor([-1, 4, -1, -1, 4, -1]), rows, device)
    ring.drain()
    for layer in range(LAYERS):
        before[layer][4] = rows[layer][4]
    assert same_bytes(host, before)


def test_rows_go_in_by_address_for_a_graph(open_ring, device):
    generator = torch.Generator().manual_seed(1)
    host = host_tier(FP8, generator)
    expected = [rows.clone() for rows in host]
    ring = open_ring(host, max_rows=5, depth=3)
    targets, places = ring.targets[:4], [ring.ring_rows(layer) for layer in range(LAYERS)]
    for _ in range(7):
        slots = random_slots(4, generator)
        rows = [random_rows(4, FP8, generator) for _ in range(LAYERS)]
        ring.begin(slots.to(device))
        for new, place in zip(rows, places, strict=True):
            scatter_rows(new.to(device), targets, place)
        ring.submit()
        save_reference(expected, slots, rows)
    ring.drain()
    assert same_bytes(host, expected)


def test_a_full_ring_blocks_begin_until_a_step_is_saved(open_ring, monkeypatch, device):
    generator = torch.Generator().manual_seed(2)
    host = host_tier(FP8, generator)
    expected = [rows.clone() for rows in host]
    ring = open_ring(host, depth=2)
    gate = shut_gate(ring, monkeypatch)
    steps = [[random_rows(3, FP8, generator) for _ in range(LAYERS)] for _ in range(3)]
    slots = torch.tensor([5, -1, 9])
    for rows in steps[:2]:
        one_step(ring, slots, rows, device)
    arguments = (ring, slots, steps[2], device)
    third = threading.Thread(target=one_step, args=arguments, daemon=True)
    third.start()
    third.join(0.2)
    assert third.is_alive() and ring.submitted == 2 and ring.saved == 0
    gate.set()
    third.join(PATIENCE)
    assert not third.is_alive()
    ring.wait(3)
    for rows in steps:
        save_reference(expected, slots, rows)
    assert same_bytes(host, expected)


def test_a_failed_save_is_told_by_every_later_call(open_ring, monkeypatch, device):
    def fail(stage):
        raise OSError("no space left")

    generator = torch.Generator().manual_seed(3)
    ring = open_ring(host_tier(FP8, generator))
    rows = [random_rows(1, FP8, generator) for _ in range(LAYERS)]
    one_step(ring, torch.tensor([1]), rows, device)
    ring.drain()
    monkeypatch.setattr(ring, "_save", fail)
    one_step(ring, torch.tensor([2]), rows, device)
    next_slots = torch.tensor([3]).to(device)
    calls = (ring.drain, lambda: ring.wait(2), lambda: ring.begin(next_slots), ring.submit)
    for call in (*calls, ring.close):
        assert failure_of(call) == "step 2 could not be saved to the host tier: no space left"
    assert ring.saved == 1


def test_a_failure_wakes_a_blocked_begin(open_ring, monkeypatch, device):
    release = threading.Event()

    def fail_late(stage):
        assert release.wait(PATIENCE)
        raise OSError("no space left")

    generator = torch.Generator().manual_seed(4)
    ring = open_ring(host_tier(FP8, generator), depth=1)
    monkeypatch.setattr(ring, "_save", fail_late)
    one_step(ring, torch.tensor([1]), [random_rows(1, FP8, generator)] * LAYERS, device)
    threading.Timer(0.1, release.set).start()
    told = failure_of(lambda: ring.begin(torch.tensor([2]).to(device)))
    assert told.startswith("step 1 could not be saved")


def test_a_slot_outside_the_tier_is_a_failed_save(open_ring, device):
    generator = torch.Generator().manual_seed(5)
    host = host_tier(FP8, generator)
    before = [rows.clone() for rows in host]
    ring = open_ring(host)
    one_step(ring, torch.tensor([2, SLOTS]), [random_rows(2, FP8, generator)] * LAYERS, device)
    assert "a slot must be in the host tier: got 61, limit 60" in failure_of(ring.drain)
    assert same_bytes(host, before)


def test_calls_out_of_order_are_refused(open_ring, device):
    ring = open_ring(host_tier(FP8, torch.Generator()))
    slots = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="begun before it is submitted"):
        ring.submit()
    with pytest.raises(ValueError, match="step begun: got n=1, its rows None"):
        ring.rows(0, 1)
    with pytest.raises(ValueError, match="step must be submitted: got 1, limit 0"):
        ring.wait(1)
    with pytest.raises(ValueError, match="got 8, limit 7"):
        ring.begin(slots.new_zeros(8))
    with pytest.raises(ValueError, match="slots must be torch.int64"):
        ring.begin(slots.int())
    ring.begin(slots)
    with pytest.raises(ValueError, match="step begun: got n=4, its rows 3"):
        ring.rows(0, 4)
    with pytest.raises(ValueError, match="submitted before the next begins"):
        ring.begin(slots)
    ring.submit()
    ring.close()
    for call in (lambda: ring.begin(slots), ring.submit):
        with pytest.raises(ValueError, match="it was closed"):
            call()


@pytest.mark.parametrize(
    "rows, sizes, told",
    [
        ([], (1, 1), "layers must be at least 1: got 0"),
        ([(4, 656)], (0, 1), "max_rows must be at least 1: got 0"),
        ([(4, 656)], (1, 0), "depth must be at least 1: got 0"),
        ([(4, 656), (4, 1152)], (1, 1), "one row format"),
        ([(4, 24)], (1, 1), "multiple of 16 bytes: got 24"),
    ],
)
def test_a_ring_that_cannot_be_is_refused(rows, sizes, told, device):
    with pytest.raises(ValueError, match=told):
        SaveRing([torch.zeros(shape, dtype=torch.uint8) for shape in rows], *sizes, device)
