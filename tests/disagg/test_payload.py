"""The warm-up payload against a reader written from its table, and against hostile bytes."""

import random
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sglang_ess.disagg import payload as payload_module
from sglang_ess.disagg.payload import (
    HEADER,
    ITEM_BYTES,
    MAX_LAYERS,
    RULES,
    PayloadError,
    decode,
    encode,
    layer_budget,
)

ROOM = 0x0102030405060708
AGES = ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32))
FIELDS = ("magic", "version", "layers", "tokens", "room", "size", "crc", "reserved")


def new_item():
    """An item full of an earlier request's bytes."""
    return np.full(ITEM_BYTES, 0xEE, np.uint8)


def item_of(body, num_layers, num_tokens, **changes):
    """A short item around a body, its header right but for the changes."""
    values = (b"ESSW", 1, num_layers, num_tokens, ROOM, len(body), zlib.crc32(body), 0)
    header = dict(zip(FIELDS, values, strict=True)) | changes
    return np.frombuffer(HEADER.pack(*header.values()) + bytes(body), np.uint8)


def groups_of(topk):
    """Per layer the groups that encode must send if all fit, oldest first, as sorted lists."""
    layers = []
    for selected in topk:
        newest = {}
        for age, query in enumerate(selected[::-1] if selected.size else ()):
            for position in query.tolist():
                if position >= 0:
                    newest.setdefault(position, age)
        classes = [sorted(p for p, age in newest.items() if a <= age < b) for a, b in AGES]
        layers.append([group for group in classes[::-1] if group])
    return layers


def as_lists(layers):
    return [[group.tolist() for group in groups] for groups in layers]


class Broken(Exception):
    pass


def varint(record, place):
    """(value, the place after it) by the table; Broken if the record ends first."""
    value = 0
    for i in range(5):
        if place + i >= len(record):
            raise Broken
        value |= (record[place + i] & 127) << 7 * i
        if record[place + i] < 128:
            return value, place + i + 1
    raise Broken


def read_body(body, layers, tokens):
    """The layers of a body, oldest group first, by the table; Broken if there is none."""
    result, start, budget = [], 0, (ITEM_BYTES - 32) // layers
    for _ in range(layers):
        record = body[start : start + budget]
        if not record or record[0] > 6:
            raise Broken
        groups, place = [], 1
        for _ in range(record[0]):
            count, place = varint(record, place)
            group, position = [], -1
            if count > len(record):
                raise Broken
            for _ in range(count):
                gap, place = varint(record, place)
                position += gap + 1
                group.append(position)
            groups.append(group)
        sent = [position for group in groups for position in group]
        if len(set(sent)) < len(sent) or any(position >= tokens for position in sent):
            raise Broken
        result.append([group for group in groups[::-1] if group])
        start += place
    if start < len(body):
        raise Broken
    return result


def refusal(item, layers, tokens, room=ROOM):
    """The one line with which decode must refuse the item."""
    with pytest.raises(PayloadError) as error:
        decode(item, layers, tokens, room)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def check_body(body, layers, tokens):
    """decode and the table must agree on a body. Returns decode's refusal, None if it read it."""
    item = item_of(body, layers, tokens)
    try:
        expected = read_body(bytes(body), layers, tokens)
    except Broken:
        return refusal(item, layers, tokens)
    decoded = decode(item, layers, tokens, ROOM)
    assert as_lists(decoded) == expected
    for groups in decoded:
        sent = np.concatenate([np.zeros(0, np.int32), *groups])
        assert all(group.dtype == np.int32 and (np.diff(group) > 0).all() for group in groups)
        assert len(np.unique(sent)) == len(sent) and ((sent >= 0) & (sent < tokens)).all()
    return None


def round_trip(topk, tokens):
    items = np.concatenate([new_item(), new_item()])  # the next request's is its neighbour
    item, end = items[:ITEM_BYTES], HEADER.size + len(topk) * layer_budget(len(topk))
    used = encode(topk, tokens, ROOM, item)
    assert HEADER.size < used <= end and (items[end:] == 0xEE).all()
    body = item[HEADER.size : used].tobytes()
    decoded = as_lists(decode(item, len(topk), tokens, ROOM))
    assert decoded == read_body(body, len(topk), tokens)
    return decoded


# --- what is sent ---------------------------------------------------------------------------


GOLDEN_TOPK = [
    np.array([[5, 300, -1], [7, 5, -1], [299, 7, 7]], np.int32),
    np.zeros((0, 3), np.int32),
]
GOLDEN = bytes.fromhex(
    "45535357"  # ESSW
    "0100 0200"  # version 1, two layers
    "e8030000"  # 1000 tokens
    "0807060504030201"  # room
    "0b000000 6966f878 00000000"  # 11 bytes of body, their crc32
    "03"  # layer 0: three groups
    "02 07 a302"  # age 0: two positions, 7 and 7 + 1 + 291
    "01 05"  # age 1: one position, 5
    "01 ac02"  # age 2: one position, 300
    "00"  # layer 1: no groups
)


def test_golden_bytes():
    item = new_item()
    assert encode(GOLDEN_TOPK, 1000, ROOM, item) == len(GOLDEN) == 32 + 11
    assert item[: len(GOLDEN)].tobytes() == GOLDEN
    assert as_lists(decode(item, 2, 1000, ROOM)) == [[[300], [5], [7, 299]], []]


def test_each_age_is_in_its_class():
    """One position per query: position = age."""
    topk = [np.arange(32, dtype=np.int32)[::-1, None]]
    assert round_trip(topk, 32) == [[list(range(a, b)) for a, b in AGES[::-1]]]


def test_classes_without_positions_keep_their_place():
    selected = np.full((32, 2), -1, np.int32)
    selected[0] = 9, 4
    item = new_item()
    assert encode([selected], 10, ROOM, item) == 32 + 1 + 5 + 3
    assert item[32:41].tolist() == [6, 0, 0, 0, 0, 0, 2, 4, 4]
    assert as_lists(decode(item, 1, 10, ROOM)) == [[[4, 9]]]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), tokens=st.sampled_from([1, 63, 64, 300, 20_000, 2_200_000]))
def test_round_trip(data, tokens):
    shapes = st.tuples(st.integers(0, 32), st.integers(0, 6))
    values = st.integers(-1, tokens - 1)
    layer = shapes.flatmap(lambda shape: arrays(np.int32, shape, elements=values))
    topk = data.draw(st.lists(layer, min_size=1, max_size=4))
    assert round_trip(topk, tokens) == groups_of(topk)


def test_an_empty_layer_may_have_any_shape_and_all_may_be_empty():
    empty = [np.zeros(shape, np.int32) for shape in (0, (0, 4), (3, 0))]
    assert round_trip(empty, 0) == [[], [], []]


def test_one_compiled_version_serves_any_array():
    strided = np.arange(64, dtype=np.int32).reshape(8, 8)[:, ::2]
    frozen = np.ascontiguousarray(strided)
    frozen.flags.writeable = False
    assert round_trip([strided, frozen], 100) == groups_of([frozen, frozen])
    decode(item_of(b"\0", 1, np.int32(5)), 1, np.int32(5), ROOM)
    assert len(payload_module._write_layer.signatures) == 1
    assert len(payload_module._parse.signatures) == 1


def test_what_exceeds_the_budget_goes_from_the_oldest_end():
    """In each layer: whole newer groups, then the highest positions of one, as many as fit."""
    rng, tokens, layers = np.random.default_rng(3), 131_072, 122
    budget, cut_groups = layer_budget(layers), set()
    widths = (2048, 1100, 600, 300, 130, 60)  # the cut falls into different groups
    topk = [
        rng.integers(0, tokens, (32, widths[layer % len(widths)])).astype(np.int32)
        for layer in range(layers)
    ]
    for sent, full in zip(round_trip(topk, tokens), groups_of(topk), strict=True):
        cut_groups.add(len(sent))
        sent, full = sent[::-1], full[::-1]
        kept = len(sent[-1])
        assert sent[:-1] == full[: len(sent) - 1] and sent[-1] == full[len(sent) - 1][-kept:]
        assert kept < len(full[len(sent) - 1]) or len(sent) < len(full)
        more = sent[:-1] + [full[len(sent) - 1][-kept - 1 :]]
        if kept == len(full[len(sent) - 1]):
            more = sent + [full[len(sent)][-1:]]
        assert record_bytes(sent) <= budget < record_bytes(more)
    assert len(cut_groups) >= 3


def record_bytes(groups):
    """Bytes of a layer's record, by the table."""
    gaps = [
        gap for group in groups for gap in (len(group), group[0], *(np.diff(group) - 1).tolist())
    ]
    return 1 + sum(max(1, -(-int(gap).bit_length() // 7)) for gap in gaps)


def test_a_full_budget_of_each_size():
    """Budgets down to the least: the newest position always gets through, none overruns."""
    topk = np.array([[7, 90, 20_000, 80_000]] * 2 + [[8, 1000, 20_001, 99_999]], np.int32)
    for layers in (MAX_LAYERS, 15_000, 11_000, 9_000, 7_000):
        sent = round_trip([topk] * layers, 100_000)
        assert all(groups == sent[0] for groups in sent) and sent[0][-1][-1] == 99_999


@pytest.mark.parametrize(("layers", "positions"), [(61, 4293), (1, 262_108)])
def test_records_that_fill_their_budgets_exactly(layers, positions):
    """Without a byte for the empty older groups, nor for one position more."""
    topk = np.arange(positions + 1, dtype=np.int32)[None]
    assert round_trip([topk[:, :-1]] * layers, positions) == [[topk[0, :-1].tolist()]] * layers
    assert round_trip([topk] * layers, positions + 1) == [[topk[0, 1:].tolist()]] * layers


def test_nothing_older_than_a_cut_group_is_sent():
    """The two bytes left would hold position 7."""
    topk = np.array([[7, 7], [20_001, 99_999]], np.int32)
    assert round_trip([topk] * MAX_LAYERS, 100_000) == [[[99_999]]] * MAX_LAYERS


ONE = np.zeros((1, 1), np.int32)


@pytest.mark.parametrize(
    ("topk", "tokens", "room", "rule"),
    [
        ([np.zeros((33, 1), np.int32)], 9, ROOM, "at most 32 queries: got shape .33, 1."),
        ([np.zeros(4, np.int32)], 9, ROOM, "queries, K"),
        ([ONE, ONE.astype(np.int64)], 9, ROOM, "layer 1 must be int32: got int64"),
        ([ONE + 9], 9, ROOM, "got 9, limit 8"),
        ([ONE], 2**31, ROOM, "tokens must be 0 to 2147483647"),
        ([ONE], 9, 2**64, "room must be"),
        ([ONE], 9, -1, "room must be"),
        ([], 9, ROOM, "layers must be 1 to"),
        ([ONE] * (MAX_LAYERS + 1), 9, ROOM, f"layers must be 1 to {MAX_LAYERS}"),
    ],
)
def test_encode_refuses_and_leaves_no_payload(topk, tokens, room, rule):
    item = new_item()
    encode([ONE], 9, ROOM, item)
    with pytest.raises(ValueError, match=rule):
        encode(topk, tokens, room, item)
    assert decode(item, 1, 9, ROOM) is None


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(ITEM_BYTES - 1, np.uint8),
        np.zeros(ITEM_BYTES, np.int8),
        np.zeros(2 * ITEM_BYTES, np.uint8)[::2],
        np.frombuffer(bytes(ITEM_BYTES), np.uint8),
    ],
    ids=["short", "int8", "strided", "read-only"],
)
def test_encode_refuses_another_item(out):
    with pytest.raises(ValueError, match="contiguous writable uint8"):
        encode([ONE], 9, ROOM, out)


# --- what is refused ------------------------------------------------------------------------


def test_an_item_that_nothing_wrote_holds_no_payload():
    assert decode(np.zeros(ITEM_BYTES, np.uint8), 61, 1000, ROOM) is None
    cleared = np.frombuffer(bytes(4) + GOLDEN[4:], np.uint8)
    assert decode(cleared, 2, 1000, ROOM) is None


def test_every_length():
    golden = np.frombuffer(GOLDEN, np.uint8)
    for length in range(len(GOLDEN)):
        expected = "at least 32 bytes" if length < 32 else f"limit {length - 32}"
        assert expected in refusal(golden[:length], 2, 1000)
    assert decode(np.append(golden, golden), 2, 1000, ROOM) is not None
    assert "uint8" in refusal(golden.view(np.int8), 2, 1000)


def test_every_change_of_one_header_byte():
    for place in range(HEADER.size):
        for value in set(range(256)) - {GOLDEN[place]}:
            item = np.frombuffer(GOLDEN + bytes(600), np.uint8).copy()
            item[place] = value
            refusal(item, 2, 1000)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"magic": b"ESSV"}, "magic .* must be b'ESSW'"),
        ({"version": 2}, "version .* must be 1: got 2"),
        ({"layers": 3}, "layers .* must be 2: got 3"),
        ({"tokens": 999}, "tokens .* must be 1000: got 999"),
        ({"room": ROOM + 1}, "room .* must be"),
        ({"size": 12}, "got 12 bytes, limit 11"),
        ({"size": 2**32 - 1}, "limit 11"),
        ({"crc": 1}, "crc32 .* must be 0x00000001"),
        ({"reserved": 1}, "reserved word"),
    ],
)
def test_another_requests_header(changes, rule):
    item = item_of(GOLDEN[32:], 2, 1000, **changes)
    with pytest.raises(PayloadError, match=rule):
        decode(item, 2, 1000, ROOM)


@pytest.mark.parametrize(
    ("layers", "tokens", "rule"),
    [
        (0, 1000, "layers must be 1 to"),
        (MAX_LAYERS + 1, 1000, f"layers must be 1 to {MAX_LAYERS}"),
        (1, 2**31, "tokens must be 0 to 2147483647"),
    ],
)
def test_numbers_that_no_payload_has(layers, tokens, rule):
    assert rule in refusal(item_of(bytes(layers), layers, tokens), layers, tokens)


def test_a_record_ends_within_its_budget():
    layers = 5000
    budget = layer_budget(layers)
    for positions, fits in ((budget - 2, True), (budget - 1, False)):
        body = bytes([1, positions]) + bytes(positions) + bytes(layers - 1)
        told = check_body(body, layers, 1000)
        assert told is None if fits else "layer 0 of a warm-up payload must end within" in told


def test_a_body_beyond_all_budgets():
    body = bytes(layer_budget(1) + 1)
    assert f"limit {layer_budget(1)}" in refusal(item_of(body, 1, 1000), 1, 1000)


HOSTILE = {
    "count beyond the body": "01 05 00 00",
    "count of 2**32 - 1": "01 ffffffff0f 00",
    "count of 2**35 - 1": "01 ffffffff7f 00",
    "count of six bytes": "01 8080808080 00",
    "count that never ends": "01 ffffffffffffffffffff",
    "gap beyond the body": "01 02 00 80",
    "gap past the prompt": "01 01 ffffffff7f",
    "gaps whose sum is past the prompt": "01 02 f303 f403",
    "seven groups": "07 00000000000000",
    "255 groups": "ff",
    "a position in two groups": "02 01 05 01 05",
    "no record": "",
    "two records for one layer": "00 00",
    "first position past the prompt": "01 01 e807",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies(body):
    assert check_body(bytes.fromhex(body), 1, 1000)


def test_a_count_beyond_the_body_is_refused_before_any_position():
    assert "before byte 2 " in check_body(bytes.fromhex(HOSTILE["count beyond the body"]), 1, 1000)


def test_varints_of_five_bytes():
    assert check_body(bytes.fromhex("01 8180808000 8580808000"), 1, 1000) is None


def test_the_prompts_last_position_is_in_it():
    assert check_body(bytes.fromhex("01 01 e707"), 1, 1000) is None


# --- fuzz -----------------------------------------------------------------------------------


def changed(body, rng):
    """The body with a few bytes flipped, put in, taken out or set to a telling value."""
    body = bytearray(body)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(body))
        kind = rng.randrange(5)
        if kind == 0:
            body[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            body[place] = rng.choice([0, 1, 6, 7, 127, 128, 255])
        elif kind == 2:
            body.insert(place, rng.randrange(256))
        elif kind == 3 and len(body) > 1:
            del body[place]
        else:
            del body[place + 1 :]
    return bytes(body)


def fuzz(cases, seed=5):
    """Bodies that are nearly right, and random ones. Returns the refusals; None where read."""
    rng = random.Random(seed)
    outcomes = []
    for case in range(cases):
        layers, tokens = rng.randint(1, 4), rng.choice([40, 200, 5000])
        if case % 2:
            shapes = [(rng.randint(1, 32), rng.randint(1, 4)) for _ in range(layers)]
            draw = np.random.default_rng(case)
            topk = [draw.integers(-1, tokens, shape).astype(np.int32) for shape in shapes]
            item = new_item()
            used = encode(topk, tokens, ROOM, item)
            body = changed(item[HEADER.size : used].tobytes(), rng)
        else:
            most = rng.choice([2, 4, 256])
            body = bytes(rng.randrange(most) for _ in range(rng.randint(0, 24)))
        outcomes.append(check_body(body, layers, tokens))
    return outcomes


def test_fuzz():
    outcomes = fuzz(12_000)
    assert outcomes.count(None) > 300
    for rule in RULES.values():
        assert sum(rule in (told or "") for told in outcomes) > 20, rule


def test_fuzz_never_reads_out_of_bounds(monkeypatch):
    """The kernels as Python, in which a read past an array's end is an IndexError."""
    kernels = {k: v for k, v in vars(payload_module).items() if hasattr(v, "py_func")}
    space = dict(vars(payload_module))
    for name in ("_read_varint", "_read_group", "_parse"):
        space[name] = types.FunctionType(kernels[name].py_func.__code__, space, name)
    monkeypatch.setattr(payload_module, "_parse", space["_parse"])
    assert None in fuzz(600, seed=6)
    for body in HOSTILE.values():
        assert check_body(bytes.fromhex(body), 1, 1000)


def test_a_random_item_is_refused():
    rng = np.random.default_rng(0)
    for size in (0, 3, 31, 32, 33, 1000):
        for _ in range(50):
            refusal(rng.integers(1, 256, size).astype(np.uint8), 2, 1000)


def test_sglang_is_not_needed():
    script = "import sys; from sglang_ess.disagg import payload as p; "
    subprocess.run([sys.executable, "-c", script + "sys.exit('sglang' in sys.modules)"], check=True)
