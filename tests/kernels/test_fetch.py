"""fetch against its reference, bit for bit, and what it compiles to."""

import re
from dataclasses import dataclass

import pytest
import torch

from ess_kernels.checks import check_on_device, check_reachable, copy_tile, words
from ess_kernels.fetch import _fetch_kernel, fetch, fetch_reference
from tests.support.rows import BF16, FP8, as_bytes, random_rows, sparse_rows
from tests.support.triton_compile import compile_for_hopper

BF16_PAIR = ((1, 1152), torch.bfloat16)  # 2304 bytes, and SGLang's extra dimension
SMALL = ((48,), torch.uint8)


@dataclass(frozen=True)
class Case:
    name: str
    row: tuple = FP8
    slots: int = 97
    hot: int = 53
    capacity: int = 41
    misses: int = 29
    skipped: int = 0
    programs: int = 3


CASES = [
    Case("fp8", programs=2),
    Case("bf16", row=BF16),
    Case("pair", row=BF16_PAIR, misses=7, capacity=9),
    Case("small rows", row=SMALL, capacity=400, misses=391, hot=450, slots=401),
    Case("no miss", misses=0),
    Case("one miss", misses=1),
    Case("one miss, bf16", row=BF16, misses=1, capacity=1),
    Case("all of the list", misses=41),
    Case("more programs than misses", misses=5, programs=11),
    Case("one program, several steps", misses=39, programs=1),
    Case("some skipped", misses=33, skipped=9),
    Case("all skipped", misses=17, skipped=17),
    Case("count beyond the list", capacity=19, misses=1000),
    Case("empty list", capacity=0, misses=0),
]


def pinned(rows: torch.Tensor) -> torch.Tensor:
    return rows.pin_memory() if torch.cuda.is_available() else rows


def miss_list(case: Case, generator, device):
    """Slots with duplicates and the last slot, distinct rows; bad entries after the count."""
    slots = torch.randint(0, case.slots, (case.capacity,), generator=generator)
    rows = torch.randperm(case.hot, generator=generator)[: case.capacity]
    slots[:1] = case.slots - 1
    skipped = torch.randperm(min(case.misses, case.capacity), generator=generator)[: case.skipped]
    rows[skipped] = -1
    num_misses = torch.tensor([case.misses])
    return tuple(part.to(device, torch.int32) for part in (slots, rows, num_misses))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(2))
def test_fetch_equals_its_reference(case, seed, device):
    generator = torch.Generator().manual_seed(seed)
    host = pinned(random_rows(case.slots, case.row, generator))
    before = random_rows(case.hot, case.row, generator).to(device)
    misses = miss_list(case, generator, device)

    fetched = before.clone()
    fetch(host, fetched, *misses, max_programs=case.programs)
    expected = before.clone()
    fetch_reference(host, expected, *misses)

    assert torch.equal(as_bytes(fetched), as_bytes(expected))
    rows = misses[1][: case.misses].cpu().long()
    untouched = torch.ones(case.hot, dtype=torch.bool)
    untouched[rows[rows >= 0]] = False
    assert untouched.any()
    assert torch.equal(as_bytes(fetched)[untouched], as_bytes(before)[untouched])


def test_rows_may_lie_apart_and_start_anywhere_in_a_line(device):
    generator = torch.Generator().manual_seed(5)
    apart = random_rows(60, ((688,), torch.uint8), generator)
    host = pinned(apart)[1:, 16:672]  # an odd start, 32 bytes between rows
    hot = random_rows(20, ((672,), torch.uint8), generator).to(device)
    slots = torch.randperm(59, generator=generator)[:20].to(device, torch.int32)
    rows = torch.randperm(20, generator=generator).to(device, torch.int32)
    before = hot.clone()

    fetch(host, hot[:, :656], slots, rows, torch.tensor([20], dtype=torch.int32, device=device))

    assert torch.equal(hot[rows.long(), :656].cpu(), host[slots.cpu().long()])
    assert torch.equal(hot[:, 656:], before[:, 656:])


def test_a_slot_past_two_to_the_31_words(device, tmp_path):
    slots = 2**31 // 82 + 100  # 17 GB
    host = sparse_rows(tmp_path / "rows", slots, 656, device)
    host[-1] = torch.arange(656, device=device) % 251
    hot = torch.zeros((3, 656), dtype=torch.uint8, device=device)
    last, row, one = (
        torch.tensor([value], dtype=torch.int32, device=device) for value in (slots - 1, 1, 1)
    )

    fetch(host, hot, last, row, one)

    assert torch.equal(hot[1], host[-1])
    assert not hot[0].any() and not hot[2].any()


def arguments(device, **changed):
    one = torch.zeros(1, dtype=torch.int32, device=device)
    given = {
        "host_rows": pinned(torch.zeros((4, 656), dtype=torch.uint8)),
        "hot_rows": torch.zeros((4, 656), dtype=torch.uint8, device=device),
        "miss_slots": one,
        "miss_rows": one,
        "num_misses": one,
    }
    return given | changed


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"miss_slots": torch.zeros(1, dtype=torch.int64)}, "miss_slots must be torch.int32"),
        ({"miss_rows": torch.zeros(2, dtype=torch.int32)}, r"miss_rows must have shape \[1\]"),
        ({"num_misses": torch.zeros((), dtype=torch.int32)}, r"num_misses must have shape \[1\]"),
        (
            {"hot_rows": torch.zeros((4, 640), dtype=torch.uint8)},
            r"rows of hot_rows .* got \[640\]",
        ),
        ({"hot_rows": torch.zeros((4, 656), dtype=torch.int8)}, "got .* torch.int8"),
        ({"max_programs": 0}, "max_programs must be at least 1: got 0"),
    ],
)
def test_what_does_not_fit_is_refused(changed, told, device):
    on_device = {k: v.to(device) if torch.is_tensor(v) else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=told):
        fetch(**arguments(device, **on_device))


@pytest.mark.parametrize(
    "rows, told",
    [
        (torch.zeros((4, 40), dtype=torch.uint8), "multiple of 16 bytes: got 40"),
        (torch.zeros((4, 0), dtype=torch.uint8), "multiple of 16 bytes: got 0"),
        (torch.zeros((4, 32, 2), dtype=torch.uint8)[:, :, 0], "dense"),
        (torch.zeros((4, 40), dtype=torch.uint8)[:, 8:], "address of hot .* 16 bytes"),
        (torch.zeros((4, 40), dtype=torch.uint8)[:, :32], "stride of hot .* 16 bytes: got 0x28"),
    ],
)
def test_rows_that_are_no_words_are_refused(rows, told):
    with pytest.raises(ValueError, match=told):
        words(rows, "hot")


def test_words_are_the_same_memory():
    rows = torch.zeros((5, 1, 576), dtype=torch.bfloat16)
    words(rows, "rows")[3, 143] = -1
    assert words(rows, "rows").shape == (5, 144)
    assert rows[3, 0, 572:].isnan().all() and not rows[:3].any() and not rows[4].any()


def test_memory_no_kernel_reaches_is_refused(monkeypatch):
    monkeypatch.setattr("ess_kernels.checks.interpreted", lambda: False)
    pageable = torch.zeros((4, 656), dtype=torch.uint8)
    with pytest.raises(ValueError, match="hot_rows must be a CUDA tensor: got cpu"):
        check_on_device("hot_rows", pageable)
    with pytest.raises(ValueError, match="host_rows must be .* pinned .* pin_memory=True"):
        check_reachable("host_rows", pageable)


@pytest.mark.parametrize(
    "row_words",
    [
        pytest.param(82, id="fp8"),
        pytest.param(144, id="bf16", marks=pytest.mark.slow),
        pytest.param(288, id="pair", marks=pytest.mark.slow),
    ],
)
def test_hopper_code_keeps_four_16_byte_loads_in_flight(row_words):
    asm = compile_for_hopper(
        _fetch_kernel,
        signature={
            "host_ptr": "*i64",
            "hot_ptr": "*i64",
            "miss_slots_ptr": "*i32",
            "miss_rows_ptr": "*i32",
            "num_misses_ptr": "*i32",
            "capacity": "i32",
            "lead": "i32",
        },
        constexprs={"HOST_STRIDE": row_words, "HOT_STRIDE": row_words, **copy_tile(row_words)},
        num_warps=8,
    )
    accesses = re.findall(r"\b(?:ld|st)\.global\S*b64(?=\s)", asm["ptx"])
    assert accesses == ["ld.global.cg.v2.b64"] * 4 + ["st.global.v2.b64"] * 4
    assert asm["spill_bytes"] == 0 and asm["stack_bytes"] == 0 and asm["shared_bytes"] == 0
    assert asm["registers"] <= 64  # 8 warps of it leave half an SM's registers to others
