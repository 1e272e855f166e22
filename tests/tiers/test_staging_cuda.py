"""DeviceStaging against plain indexing: what attention would read for any slot of its group."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from ess_kernels.checks import interpreted
from sglang_ess.tiers import staging_cuda as staging_module
from sglang_ess.tiers.staging_cuda import DeviceStaging
from sglang_ess.tiers.transfer_stream import TransferStream
from tests.support import device_tier
from tests.support.launches import count_launches

pytestmark = pytest.mark.skipif(not interpreted(), reason="the CPU is the device of these tests")

LAYERS, SLOTS, CONTEXT = 3, 300, 120
FORMATS = {"fp8": ((1, 656), torch.uint8), "float32": ((1, 576), torch.float32)}


@pytest.fixture(params=["early", "late"])
def stream(request, monkeypatch):
    """The transfer stream, its copies at their earliest or at their latest."""
    if request.param == "early":
        return TransferStream("cpu")
    device_tier.launches_are_late(monkeypatch.setattr)
    return device_tier.LateStream("cpu")


def rows_of(count, fmt, seed):
    shape, dtype = FORMATS[fmt]
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 127, (count, *shape, dtype.itemsize), dtype=torch.uint8, generator=g)
    return bits.view(dtype).squeeze(-1)


@dataclass
class Batch:
    """Requests of (prefix, new) tokens; shared: tokens that all prefixes have in common."""

    sizes: list[tuple[int, int]]
    shared: int = 0
    seed: int = 0

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.seed)
        slots = torch.randperm(SLOTS, generator=g).int()
        common, self.tables = slots[: self.shared], torch.zeros(len(self.sizes), CONTEXT).int()
        next_slot, new = self.shared, []
        for table, (prefix, tokens) in zip(self.tables, self.sizes, strict=True):
            shared = min(self.shared, prefix)
            own = slots[next_slot : next_slot + prefix + tokens - shared]
            assert len(own) == prefix + tokens - shared
            next_slot += len(own)
            table[: prefix + tokens] = torch.cat([common[:shared], own])
            new.append(table[prefix : prefix + tokens].long())
        self.new = torch.cat(new)

    @property
    def begin_args(self):
        prefix, new = zip(*self.sizes, strict=True)
        return prefix, new, self.tables, self.new

    def topk(self, width) -> torch.Tensor:
        """[queries, width] slots that each query may see, -1 pads among them."""
        g, lists = torch.Generator().manual_seed(self.seed + 1), []
        for table, (prefix, tokens) in zip(self.tables, self.sizes, strict=True):
            for i in range(tokens):
                seen = prefix + i + 1
                picks = torch.randint(0, seen, (width,), generator=g)
                picks[0] = seen - 1
                found = table[picks]
                found[torch.rand(width, generator=g) < 0.2] = -1
                lists.append(found)
        return torch.stack(lists)


def staging_of(fmt="fp8", num_rows=100, seed=0, stream=None):
    host = [rows_of(SLOTS, fmt, seed + i) for i in range(LAYERS)]
    built = DeviceStaging(host, num_rows, "cpu", stream or TransferStream("cpu"))
    for buffer in built._buffers:
        buffer.fill_(255)  # no row is like this: reading one that was not brought shows
    return built, host


def read_layer(staging, host, batch, layer, topk, fmt, padding=None) -> int:
    """Check every group of a layer. Returns the number of rows compared.

    padding: tokens after the batch's; the rows are packed in their place where staging has one
    """
    new_rows, compared = rows_of(len(batch.new) + (padding or 0), fmt, 1000 + layer), 0
    place = None if padding is None else staging.place_for(layer, len(new_rows))
    expected = host[layer].clone()  # where no new row has been saved
    expected[batch.new] = new_rows[: len(batch.new)]
    if place is not None:
        new_rows = place.copy_(new_rows)
    for index, group in enumerate(staging.groups):
        staged = staging.rows(layer, index, new_rows)
        places = staging.translate(index, topk)[group.queries]
        real = topk[group.queries] >= 0
        assert torch.equal(places >= 0, real)
        whole = torch.zeros_like(topk)
        whole[group.queries] = places
        assert torch.equal(staging.translate(index, topk), whole)
        got = staged[places[real].long()].view(torch.uint8)
        want = expected[topk[group.queries][real].long()].view(torch.uint8)
        assert torch.equal(got, want), (layer, index)
        compared += len(got)
    return compared


def run_pass(staging, host, batch, fmt="fp8", width=7, padding=None) -> None:
    staging.begin(*batch.begin_args)
    topk = batch.topk(width)
    compared = [read_layer(staging, host, batch, i, topk, fmt, padding) for i in range(LAYERS)]
    assert compared == [int((topk >= 0).sum())] * LAYERS


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("sizes", "shared", "groups"),
    [
        pytest.param([(0, 9)], 0, 1, id="no prefix"),
        pytest.param([(0, 3), (0, 4)], 0, 1, id="no prefixes"),
        pytest.param([(40, 5), (0, 3), (17, 1)], 0, 1, id="one group"),
        pytest.param([(60, 5), (30, 20), (70, 2), (5, 5)], 0, 3, id="groups"),
        pytest.param([(50, 3), (40, 6), (30, 2)], 30, 2, id="shared prefix"),
        pytest.param([(30, 2), (30, 3)], 30, 1, id="nothing but a shared prefix"),
        pytest.param([(96, 4)], 0, 1, id="as long as the buffer"),
        pytest.param([(4, 2), (0, 100), (3, 3)], 0, 3, id="as long as the buffer, new"),
    ],
)
def test_a_pass_reads_every_layers_rows(stream, fmt, sizes, shared, groups):
    staging, host = staging_of(fmt, stream=stream)
    run_pass(staging, host, Batch(sizes, shared), fmt)
    assert len(staging.groups) == groups


@pytest.mark.parametrize("sizes", [[(0, 9)], [(40, 5), (0, 3), (17, 1)], [(60, 5), (70, 2)]])
@pytest.mark.parametrize("padding", [0, 5])
def test_new_rows_packed_in_their_place(stream, sizes, padding):
    staging, host = staging_of(stream=stream)
    run_pass(staging, host, Batch(sizes), padding=padding)
    fits = len(staging.groups) == 1
    assert (staging.place_for(0, sum(new for _, new in sizes)) is not None) == fits
    assert staging.place_for(0, 129) is None  # a buffer of two pages of 64 rows


def launches_of_layers(monkeypatch, staging, batch) -> list[Counter]:
    """What a pass launches in each layer to stage its rows and to translate its top-k."""
    staging.begin(*batch.begin_args)
    counts, topk = [], batch.topk(7)
    for layer in range(LAYERS):
        packed = staging.place_for(layer, len(batch.new))
        if packed is None:
            packed = rows_of(len(batch.new), "fp8", 9)
        with count_launches(monkeypatch) as launched:
            for index in range(len(staging.groups)):
                staging.rows(layer, index, packed)
                staging.translate(index, topk)
        counts.append(launched)
    return counts


def test_launches_of_a_layer_with_eight_prompts(monkeypatch):
    """The copy of the next layer's prefixes, and the translation. The first layer fills the map."""
    batch = Batch([(10 + i, 3 + i) for i in range(8)])
    layers = launches_of_layers(monkeypatch, staging_of(num_rows=SLOTS)[0], batch)
    steady = {"fetch": 1, "_gather_rows_kernel": 1}
    assert layers == [steady | {"index_put_": 1}, steady, {"_gather_rows_kernel": 1}]

    new = Batch([(0, 9)] * 8)
    layers = launches_of_layers(monkeypatch, staging_of(num_rows=SLOTS)[0], new)
    assert layers[1:] == [{"_gather_rows_kernel": 1}] * 2


def test_launches_of_a_layer_whose_prompts_take_two_groups(monkeypatch):
    """Each group has its buffer, so its copies, and the one map has to be filled for each."""
    batch = Batch([(10 + i, 3 + i) for i in range(8)])
    staging, _ = staging_of(num_rows=100)
    layers = launches_of_layers(monkeypatch, staging, batch)
    assert len(staging.groups) == 2
    names = ("fetch", "_gather_rows_kernel", "copy_", "index_put_")
    assert layers[:2] == [dict.fromkeys(names, 2)] * 2


def test_passes_one_after_another(stream):
    """Of other sizes, and over slots that changed owners."""
    staging, host = staging_of(stream=stream)
    for seed, sizes in enumerate([[(60, 5), (70, 2)], [(0, 30)], [(99, 1), (98, 2)], [(5, 5)]]):
        run_pass(staging, host, Batch(sizes, seed=seed))


@pytest.mark.parametrize("layers_done", [0, 1, 2])
def test_a_pass_that_was_given_up(stream, layers_done):
    """The next one begins anew, whatever is still on its way."""
    staging, host = staging_of(stream=stream)
    batch = Batch([(60, 5), (70, 2)], seed=3)
    staging.begin(*batch.begin_args)
    for layer in range(layers_done):
        read_layer(staging, host, batch, layer, batch.topk(7), "fp8")
    staging.rows(layers_done, 0, rows_of(len(batch.new), "fp8", 9))  # and not its second group
    run_pass(staging, host, Batch([(80, 3), (20, 9), (50, 1)], seed=4))


def test_a_layer_that_is_read_again_or_first(stream):
    """Not the order it is made for: slower, the same rows."""
    staging, host = staging_of(stream=stream)
    batch = Batch([(60, 5), (70, 2)])
    staging.begin(*batch.begin_args)
    for layer in (1, 1, 0, 2, 0):
        read_layer(staging, host, batch, layer, batch.topk(7), "fp8")


def test_a_request_longer_than_the_buffer(stream):
    staging, host = staging_of(stream=stream)
    with pytest.raises(ValueError, match="got 101 rows, limit 100"):
        staging.begin(*Batch([(4, 2), (98, 3)]).begin_args)
    run_pass(staging, host, Batch([(4, 2), (97, 3)]))


def test_where_slots_bound_the_buffer_more_context_is_no_advice():
    staging, _ = staging_of(num_rows=SLOTS)
    with pytest.raises(ValueError, match=f"limit {SLOTS}.*--max-total-tokens"):
        staging.begin([SLOTS], [1], torch.zeros(1, SLOTS + 1).int(), torch.zeros(1).long())


@pytest.mark.parametrize("failing", range(6))
def test_a_fetch_that_cannot_be_launched_leaves_nothing_behind(monkeypatch, failing):
    staging, host = staging_of()
    batch, calls, real = Batch([(60, 5), (70, 2)]), [], staging_module.fetch

    def fetch(*args, **options):
        calls.append(args)
        if len(calls) == failing + 1:
            raise RuntimeError("injected")
        real(*args, **options)

    monkeypatch.setattr(staging_module, "fetch", fetch)
    with pytest.raises(RuntimeError, match="injected"):
        run_pass(staging, host, batch)
    run_pass(staging, host, Batch([(80, 3), (20, 9), (50, 1)], seed=4))


def test_a_batch_without_requests(stream):
    staging, _ = staging_of(stream=stream)
    staging.begin([], [], torch.zeros(0, CONTEXT).int(), torch.zeros(0).long())
    assert staging.groups == []


@pytest.fixture
def late(monkeypatch):
    device_tier.launches_are_late(monkeypatch.setattr)
    return device_tier.LateStream("cpu")


def test_the_next_item_is_under_way_while_this_one_is_read(late):
    """What staging is for. Its rows come at any time and touch nothing that is read now."""
    staging, host = staging_of(stream=late)
    batch = Batch([(60, 5), (70, 2)])
    staging.begin(*batch.begin_args)
    assert late.pending == 1
    new_rows = rows_of(len(batch.new), "fp8", 9)
    for layer in range(LAYERS):
        for index in range(2):
            last = (layer, index) == (LAYERS - 1, 1)
            staged = staging.rows(layer, index, new_rows)
            assert late.pending == (0 if last else 1)
            before = staged.clone()
            late.join()
            assert torch.equal(staged, before)


def test_reading_without_waiting_is_noticed(late, monkeypatch):
    staging, host = staging_of(stream=late)
    monkeypatch.setattr(staging_module, "wait", lambda event: None)
    with pytest.raises(AssertionError):
        run_pass(staging, host, Batch([(60, 5), (70, 2)]))


def test_one_buffer_in_place_of_two_is_noticed(monkeypatch):
    """With copies at their earliest the next item's rows fall on those that are read."""
    staging, host = staging_of()
    staging._buffers[1] = staging._buffers[0]
    with pytest.raises(AssertionError):
        run_pass(staging, host, Batch([(60, 5), (70, 2)]))


def test_bytes(stream):
    staging, _ = staging_of(num_rows=100)
    assert staging.nbytes == 2 * 128 * 656 + SLOTS * 4  # buffers in whole pages of 64 rows
