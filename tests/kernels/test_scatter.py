"""scatter_rows against its reference, bit for bit, and what it compiles to."""

import re
from dataclasses import dataclass

import pytest
import torch

from ess_kernels.checks import copy_tile
from ess_kernels.scatter import _scatter_kernel, scatter_rows, scatter_rows_reference
from tests.support.rows import BF16, FP8, as_bytes, random_rows, sparse_rows
from tests.support.triton_compile import compile_for_hopper


@dataclass(frozen=True)
class Case:
    name: str
    row: tuple = FP8
    n: int = 37
    out: int = 59
    skipped: int = 0
    programs: int = 3
    index: torch.dtype = torch.int64
    to_host: bool = False


CASES = [
    Case("fp8"),
    Case("bf16", row=BF16),
    Case("int32 targets", index=torch.int32),
    Case("into host memory", to_host=True),
    Case("into host memory, bf16, int32", row=BF16, to_host=True, index=torch.int32),
    Case("no rows", n=0),
    Case("one row", n=1),
    Case("more programs than rows", n=5, programs=9),
    Case("one program, several steps", programs=1),
    Case("some skipped", skipped=11),
    Case("all skipped", skipped=37),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(2))
def test_scatter_equals_its_reference(case, seed, device):
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(case.n, case.row, generator).to(device)
    before = random_rows(case.out, case.row, generator)
    order = torch.randperm(case.out, generator=generator)
    last = (order == case.out - 1).nonzero().item()
    order[[0, last]] = order[[last, 0]]  # the last row of out is always written, unless skipped
    targets = order[: case.n].clone()
    targets[torch.randperm(case.n, generator=generator)[: case.skipped]] = -1
    targets = targets.to(device, case.index)

    out = before.clone()
    if device.type == "cuda":
        out = out.pin_memory() if case.to_host else out.to(device)
    expected = out.clone()
    scatter_rows(rows, targets, out, max_programs=case.programs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    scatter_rows_reference(rows, targets, expected)

    assert torch.equal(as_bytes(out), as_bytes(expected))
    kept = targets[targets >= 0].cpu().long()
    untouched = torch.ones(case.out, dtype=torch.bool)
    untouched[kept] = False
    assert untouched.any()
    assert torch.equal(as_bytes(out)[untouched], as_bytes(before)[untouched])
    assert torch.equal(as_bytes(out)[kept], as_bytes(rows[targets >= 0]))


def test_rows_may_lie_apart(device):
    generator = torch.Generator().manual_seed(7)
    rows = random_rows(21, ((3, 656), torch.uint8), generator).to(device)[:, 1]
    ring = random_rows(30, ((688,), torch.uint8), generator).to(device)
    targets = torch.randperm(30, generator=generator)[:21].to(device)
    before = ring.clone()

    scatter_rows(rows, targets, ring[:, 16:672])

    assert torch.equal(ring[targets, 16:672], rows)
    assert torch.equal(ring[:, :16], before[:, :16])
    assert torch.equal(ring[:, 672:], before[:, 672:])


def test_a_target_past_two_to_the_31_words(device, tmp_path):
    slots = 2**31 // 144 + 100  # 17 GB
    out = sparse_rows(tmp_path / "rows", slots, 1152, device)
    rows = (torch.arange(2 * 1152, device=device) % 253).to(torch.uint8).view(2, 1152)
    targets = torch.tensor([slots - 1, slots - 3], dtype=torch.int32, device=device)

    scatter_rows(rows, targets, out)

    assert torch.equal(out[-1], rows[0])
    assert not out[-2].any()
    assert torch.equal(out[-3], rows[1])


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"targets": torch.zeros(3, dtype=torch.int16)}, "targets must be torch.int32 or torch.in"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets must have shape \[3\]: got"),
        ({"out": torch.zeros((9, 48), dtype=torch.uint8)}, r"rows of out .* \[32\] .* got \[48\]"),
        ({"out": torch.zeros((9, 32), dtype=torch.int8)}, "got .* torch.int8"),
        ({"max_programs": 0}, "max_programs must be at least 1: got 0"),
    ],
)
def test_what_does_not_fit_is_refused(changed, told, device):
    given = {
        "rows": torch.zeros((3, 32), dtype=torch.uint8),
        "targets": torch.zeros(3, dtype=torch.int64),
        "out": torch.zeros((9, 32), dtype=torch.uint8),
    } | changed
    on_device = {k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=told):
        scatter_rows(**on_device)


def compiled(targets: str, publishes: bool = False):
    return compile_for_hopper(
        _scatter_kernel,
        signature={
            "rows_ptr": "*i64",
            "targets_ptr": targets,
            "out_ptr": "*i64",
            "num_rows": "i32",
            "lead": "i32",
        },
        constexprs={"ROWS_STRIDE": 82, "OUT_STRIDE": 82, **copy_tile(82), "PUBLISHES": publishes},
        num_warps=8,
    )


def test_every_thread_fences_its_stores():
    ptx = compiled("*i64", publishes=True)["ptx"]
    assert re.findall(r"\b(?:st\.global|fence\.\S+)", ptx)[-1] == "fence.acq_rel.sys;"
    assert "fence" not in compiled("*i64")["ptx"]


@pytest.mark.parametrize("targets", ["*i32", "*i64"])
def test_hopper_code_keeps_four_16_byte_loads_in_flight(targets):
    asm = compiled(targets)
    accesses = re.findall(r"\b(?:ld|st)\.global\S*v2\.b64(?=\s)", asm["ptx"])
    assert accesses == ["ld.global.cg.v2.b64"] * 4 + ["st.global.v2.b64"] * 4
    assert asm["spill_bytes"] == 0 and asm["stack_bytes"] == 0 and asm["shared_bytes"] == 0
