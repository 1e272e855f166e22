"""replay_topk against its reference, and the reference against what a table promises."""

import numpy as np
import pytest
import torch

from ess_kernels.replay_topk import (
    ReplayTable,
    _replay_topk_kernel,
    replay_topk,
    replay_topk_reference,
)
from tests.support.triton_compile import compile_for_hopper

PAGE = 64
TOPK = 20  # no power of two
CONTEXTS = (100, 300, 301)
STREAMS, LAYERS, STEPS, POWERS = 2, 3, 7, 3
ROUNDS = 2**POWERS


def table(device, contexts=CONTEXTS) -> ReplayTable:
    """A random table: seams are arbitrary permutations, with their true powers."""
    random = np.random.default_rng(0)
    steps, seams, starts = [], [], [0]
    for context in contexts:
        order = random.permuted(
            np.tile(np.arange(context - 1, dtype=np.int32), (STREAMS, LAYERS, STEPS, 1)), axis=-1
        )
        steps.append(order[..., :TOPK])
        powers = [random.permuted(order[:, :, 0], axis=-1)]
        for _ in range(POWERS - 1):
            powers.append(np.take_along_axis(powers[-1], powers[-1], axis=-1))
        seams.append(np.stack(powers, axis=2).ravel())
        starts.append(starts[-1] + len(seams[-1]))
    return ReplayTable(
        torch.tensor(contexts, dtype=torch.int32, device=device),
        torch.from_numpy(np.stack(steps)).to(device),
        torch.from_numpy(np.concatenate(seams)).to(device),
        torch.tensor(starts[:-1], device=device),
        POWERS,
    )


def queries(lengths, device, seed=0, padding=0):
    """(topk as an indexer left it, lengths, page table) of requests in random pages."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-max(lengths, default=0) // PAGE) + 1
    # A page table that is a part of a wider one, as in a captured graph.
    wide = torch.randperm(len(lengths) * pages * 3, generator=generator).int()
    page_table = wide.view(len(lengths), pages * 3)[:, :pages]
    topk = torch.arange((len(lengths) + padding) * TOPK).view(-1, TOPK).int() - 50
    topk[:, -3:] = -1
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return topk.to(device), lengths.to(device), page_table.to(device)


LENGTHS = {
    "none": [],
    "short requests": [1, 19, 99],
    "at the first context": [100],
    "between and past": [101, 299, 300, 301, 302, 5000],
    "short and long": [1, 500, 60, 310, 0],
}


@pytest.mark.parametrize("as_slots", [True, False], ids=["slots", "positions"])
@pytest.mark.parametrize("name", LENGTHS)
def test_matches_the_reference(device, name, as_slots):
    rows = table(device)
    for layer in range(LAYERS):
        topk, lengths, pages = queries(LENGTHS[name], device, layer, padding=2)
        expected = topk.clone()
        replay_topk(topk, lengths, pages, rows, layer, PAGE, as_slots)
        replay_topk_reference(expected, lengths, pages, rows, layer, PAGE, as_slots)
        assert torch.equal(topk, expected)


def test_later_steps_and_rounds_match_the_reference(device):
    """Lengths that cover every step of several rounds of the stream."""
    rows = table(device)
    lengths = [400 + step for step in range(0, STEPS * ROUNDS + 40, 5)]
    topk, lengths, pages = queries(lengths, device)
    expected = topk.clone()
    replay_topk(topk, lengths, pages, rows, 1, PAGE, False)
    replay_topk_reference(expected, lengths, pages, rows, 1, PAGE, False)
    assert torch.equal(topk, expected)


def test_a_half_of_a_batch_gets_what_the_whole_does(device):
    rows = table(device)
    whole, lengths, pages = queries(LENGTHS["between and past"], device)
    half = whole[3:].clone()
    replay_topk(whole, lengths, pages, rows, 2, PAGE, True)
    replay_topk(half, lengths[3:], pages[3:], rows, 2, PAGE, True)
    assert torch.equal(half, whole[3:])


def replayed(lengths, layer=0, as_slots=False, pages=None):
    topk, lengths, page_table = queries(lengths, "cpu")
    page_table = page_table if pages is None else pages
    replay_topk_reference(topk, lengths, page_table, table("cpu"), layer, PAGE, as_slots)
    return topk.numpy(), page_table.numpy()


def test_every_position_is_in_the_request_once_and_the_newest_is_there():
    lengths = [100, 131, 299, 300, 301, 450, 4000]
    for layer in range(LAYERS):
        topk, _ = replayed(lengths, layer)
        for row, length in zip(topk, lengths, strict=True):
            assert 0 <= row.min() and row.max() == length - 1 and len(set(row)) == TOPK


def test_slots_are_those_of_the_positions():
    lengths = [100, 450]
    positions, pages = replayed(lengths)
    slots, _ = replayed(lengths, as_slots=True)
    expected = np.take_along_axis(pages, positions // PAGE, axis=1) * PAGE + positions % PAGE
    assert np.array_equal(slots, expected)


def test_short_requests_and_padding_stay():
    topk, lengths, pages = queries([60, 99, 1], "cpu", padding=2)
    before = topk.clone()
    replay_topk_reference(topk, lengths, pages, table("cpu"), 0, PAGE, True)
    assert torch.equal(topk, before)


def test_a_step_is_the_next_row_and_a_round_goes_on_under_the_seam():
    """One request, token by token, follows the table from the step where its hash begins."""
    rows, context = table("cpu"), CONTEXTS[-1]
    count = 2 * STEPS * ROUNDS
    lengths = [context + step for step in range(count)]
    pages = torch.full((count, -(-(context + count) // PAGE)), 5, dtype=torch.int32)
    topk, _ = replayed(lengths, layer=1, pages=pages)
    seam_length = context - 1
    candidates = {}
    for stream in range(STREAMS):
        start = int(rows.seam_starts[-1]) + (stream * LAYERS + 1) * POWERS * seam_length
        seam = rows.seams[start : start + seam_length].numpy()
        place = np.arange(seam_length)
        for turn in range(ROUNDS):
            for step in range(STEPS):
                candidates[stream, turn * STEPS + step] = place[rows.steps[-1, stream, 1, step]]
            place = seam[place]

    def same(row, length, expected):
        return (row == expected).sum() >= TOPK - 1 and row[length % TOPK] == length - 1

    (found,) = [key for key, row in candidates.items() if same(topk[0], lengths[0], row)]
    stream, first = found
    for step, length in enumerate(lengths):
        expected = candidates[stream, (first + step) % (STEPS * ROUNDS)]
        assert same(topk[step], length, expected), step


@pytest.mark.parametrize("stride", [1, 513, 2056])
def test_requests_have_streams_and_steps_of_their_own(stride):
    """Evenly spaced first pages, as in a batch of requests of one length."""
    pages = 1 + stride * torch.arange(64, dtype=torch.int32)[:, None].repeat(1, 8)
    topk, _ = replayed([400] * 64, pages=pages)
    bins = STREAMS * STEPS * ROUNDS
    assert len({row.tobytes() for row in topk}) > 0.8 * bins * (1 - np.exp(-64 / bins))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layer=3), "layer must be 0 to 2: got 3"),
        (dict(lengths=torch.ones(2, dtype=torch.int64)), "lengths must be torch.int32"),
        (dict(topk=torch.zeros(2, 5, dtype=torch.int32)), "topk must have shape"),
        (dict(topk=torch.zeros(1, TOPK, dtype=torch.int32)), "a row per length"),
        (dict(topk=torch.zeros(2, 2 * TOPK, dtype=torch.int32)[:, ::2]), "must be contiguous"),
        (dict(page_table=torch.zeros(1, 4, dtype=torch.int32)), "page_table must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(device, change, message):
    given = dict(
        topk=torch.zeros(2, TOPK, dtype=torch.int32),
        lengths=torch.ones(2, dtype=torch.int32),
        page_table=torch.zeros(2, 4, dtype=torch.int32),
        layer=0,
    ) | change  # fmt: skip
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        replay_topk(table=table(device), page_slots=PAGE, as_slots=True, **given)


def test_it_compiles_for_hopper_without_spills():
    pointers = ("topk", "lengths", "page_table", "contexts", "steps", "seams")
    signature = {name: "*i32" for name in pointers} | {"seam_starts": "*i64"}
    signature |= {"layer": "i32", "page_stride": "i32"}
    shape = dict(NUM_CONTEXTS=4, STREAMS=1, LAYERS=4, STEPS=128, TOPK=2048, POWERS=6)
    compiled = compile_for_hopper(
        _replay_topk_kernel, signature=signature, num_warps=8,
        constexprs=shape | dict(PAGE_SLOTS=PAGE, AS_SLOTS=True, BLOCK=2048),
    )  # fmt: skip
    assert compiled["spill_bytes"] == 0 and "ld.global" in compiled["ptx"]
