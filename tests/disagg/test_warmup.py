"""Warm-up ids from a prompt's end to a hot tier: recorded, sent, refused or used."""

import logging
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_ess.disagg import decode_side, prefill_side
from sglang_ess.disagg.metadata import EssMetadataBuffers
from sglang_ess.disagg.payload import HEADER, ITEM_BYTES, encode
from sglang_ess.disagg.prefill_side import PromptEndRecorder
from sglang_ess.mem_cache.pool import slots_at
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.tiers.topk_observer import PassQueries

GROUPS, TOPK, SLOTS, ROOM = 2, 4, 256, 99


def request(rid="a", tokens=40, row=1, index=0, room=ROOM):
    kv = SimpleNamespace(req_pool_idx=row)
    return SimpleNamespace(
        rid=rid, kv=kv, origin_input_ids=[0] * tokens, metadata_buffer_index=index,
        bootstrap_room=room, output_ids=[5], cached_tokens=0, cached_tokens_device=0,
        cached_tokens_host=0, cached_tokens_storage=0, get_mm_token_counts=lambda: (0, 0, 0),
        return_logprob=False, return_sampling_mask=False, hidden_states_tensor=None,
    )  # fmt: skip


@pytest.fixture
def table():
    """Request 1 has slots 100, 99, 98 ...: positions and slots differ."""
    table = np.zeros((3, 64), np.int32)
    table[1] = 100 - np.arange(64)
    return table


@pytest.fixture
def buffers():
    return EssMetadataBuffers(4, 8, torch.bfloat16, 16)


@pytest.fixture
def active(monkeypatch):
    monkeypatch.setattr(prefill_side, "active", PromptEndRecorder(GROUPS, SLOTS))
    return prefill_side.active


def record(active, table, positions, prefix=36, rid="a"):
    """One pass: the last four queries of a prompt of 40 select these positions, in each layer."""
    topk = 100 - np.array(positions, np.int32)
    lengths = torch.arange(prefix, prefix + len(topk), dtype=torch.int32) + 1
    rows, spans = torch.ones(len(topk), dtype=torch.int64), ((1, prefix, len(topk)),)
    active.begin_pass([rid], PassQueries(torch.from_numpy(table), rows, lengths, spans, 1))
    for group in range(GROUPS):
        active.prefill_topk(group, torch.from_numpy(topk))


POSITIONS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 12, 13, 14]]


def hot_pool():
    """Remembers what it is asked to warm, query by query."""
    pool = SimpleNamespace(warmed=[[] for _ in range(GROUPS)])
    pool.capacity = SimpleNamespace(geometry=SimpleNamespace(topk=TOPK))
    pool.groups = IndexGroups.single(GROUPS)

    def warm(table_row, positions):
        for warmed, queries in zip(pool.warmed, positions, strict=True):
            warmed += [row[row >= 0].tolist() for row in slots_at(table_row, queries).numpy()]

    pool.warm_request = warm
    return pool


def hand_over(prefill, decode):
    """What a transport does: the items of one node, byte for byte, into those of the other."""
    decode.warmup.copy_(prefill.warmup)
    decode.bootstrap_room.copy_(prefill.bootstrap_room)


def test_from_prompt_to_hot_tier(active, table, buffers):
    record(active, table, POSITIONS)
    buffers.set_buf(request())
    decode = EssMetadataBuffers(4, 8, torch.bfloat16, 16)
    hand_over(buffers, decode)
    decode.get_buf(0)
    pool, req = hot_pool(), request(row=2)
    warm_up = decode_side.RequestWarmup(pool, decode)
    assert warm_up.working_set(req) == 15
    slots = torch.zeros(3, 64, dtype=torch.int64)
    slots[2] = torch.arange(64) + 300  # of this request, on this node
    warm_up.warm(req, slots)
    for warmed in pool.warmed:
        flat = [slot - 300 for row in warmed for slot in row]
        assert sorted(flat) == list(range(15)), "each once"
        assert flat.index(4) < flat.index(8) < flat.index(0), "newest use last"
    warm_up.warm(req, slots)
    assert sum(map(len, pool.warmed[0])) == 15, "used up"


def test_a_chunk_after_another_replaces_it(active, table, buffers):
    record(active, table, [[30, 31, 32, 33]], prefix=35)
    record(active, table, POSITIONS)
    buffers.set_buf(request())
    decode = EssMetadataBuffers(4, 8, torch.bfloat16, 16)
    hand_over(buffers, decode)
    decode.get_buf(0)
    assert decode_side.RequestWarmup(hot_pool(), decode).working_set(request()) == 15


@pytest.mark.parametrize("rid", ["b", None])
def test_another_requests_row_is_not_sent(active, table, buffers, rid):
    """The row of the request table has a new owner, or nothing was recorded for it."""
    if rid:
        record(active, table, POSITIONS, rid=rid)
    buffers.warmup[0] = 1  # what the item's last owner left
    buffers.set_buf(request())
    assert not buffers.warmup[0, : HEADER.size].any()


def test_a_plain_prefill_node_sends_nothing_and_a_cleared_slot_is_empty(buffers):
    buffers.get_buf(0)
    assert not buffers.arrived
    warm_up = decode_side.RequestWarmup(hot_pool(), buffers)
    assert warm_up.working_set(request()) is None
    encode([np.zeros((1, 1), np.int32)] * GROUPS, 40, ROOM, buffers.warmup[1].numpy())
    buffers.clear_slot(1)
    buffers.get_buf(1)
    assert not buffers.arrived and warm_up.refused == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda item: item[4:6].__setitem__(slice(None), 9),  # version
        lambda item: item[40:].__setitem__(slice(None), 0),  # truncated
        lambda item: item.__setitem__(slice(None), 255),
        lambda item: item[20:24].__setitem__(slice(None), 255),  # longer than the item
    ],
)
def test_hostile_payloads_cost_one_warning_and_no_request(buffers, caplog, spoil):
    pool, warm_up = hot_pool(), None
    with caplog.at_level(logging.WARNING, logger="sglang_ess.disagg.decode_side"):
        warm_up = decode_side.RequestWarmup(pool, buffers)
        for room in (ROOM, ROOM + 1):
            positions = np.arange(12, dtype=np.int32).reshape(3, 4)
            encode([positions] * GROUPS, 40, room, buffers.warmup[0].numpy())
            spoil(buffers.warmup[0].numpy())
            buffers.bootstrap_room[0, 0] = room
            buffers.get_buf(0)
            warm_up.warm(request(room=room), torch.zeros(3, 64, dtype=torch.int64))
    assert warm_up.refused == 2 and pool.warmed == [[], []]
    assert len(caplog.records) == 1


def test_a_payload_of_another_request_is_refused(buffers):
    """Positions beyond its prompt would be another request's slots."""
    encode([np.array([[39]], np.int32)] * GROUPS, 40, ROOM, buffers.warmup[0].numpy())
    buffers.bootstrap_room[0, 0] = ROOM
    buffers.get_buf(0)
    warm_up = decode_side.RequestWarmup(hot_pool(), buffers)
    assert warm_up.working_set(request(tokens=20)) is None and warm_up.refused == 1


def test_what_never_starts_is_forgotten(buffers):
    for room in range(1, 9):
        buffers.bootstrap_room[0, 0] = room
        encode([np.zeros((1, 1), np.int32)] * GROUPS, 40, room, buffers.warmup[0].numpy())
        buffers.get_buf(0)
    assert list(buffers.arrived) == [5, 6, 7, 8], "no more than there are items"
    warm_up = decode_side.RequestWarmup(hot_pool(), buffers)
    req = request(room=8)
    assert warm_up.working_set(req) == 1 and warm_up.working_set(req) == 1
    groups = weakref.ref(getattr(req, decode_side.IDS)[0][0])
    assert groups() is not None
    del req
    assert groups() is None


def test_the_buffer_is_the_last_and_one_item_a_request(buffers):
    pointers, lengths, items = buffers.get_buf_infos()
    assert pointers[-1] == buffers.warmup.data_ptr() and items[-1] == ITEM_BYTES
    assert lengths[-1] == 4 * ITEM_BYTES and pointers[-2] == buffers.bootstrap_room.data_ptr()


def test_a_recorder_that_fails_costs_the_ids_only(active, buffers, caplog):
    """A position beyond the prompt: encode refuses it."""
    active._rows[1] = ("a", [np.array([[41]], np.int32)] * GROUPS)
    with caplog.at_level(logging.WARNING, logger="sglang_ess.disagg.prefill_side"):
        buffers.set_buf(request())
        active._rows[1] = ("a", [np.array([[41]], np.int32)] * GROUPS)
        buffers.set_buf(request())
    assert active.failures == 2 and len(caplog.records) == 1
    assert not buffers.warmup[0, : HEADER.size].any()
