"""pack_write against SGLang's own quantisation, bit for bit, and what it compiles to."""

import re
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from ess_kernels import pack_write as module
from ess_kernels.checks import interpreted
from ess_kernels.pack_write import _pack_write_kernel, pack_write
from sglang_ess.cpu.ops.rows import pack_fp8_rows, unpack_rows
from sglang_ess.layout import FP8_ROW_BYTES, LATENT_DIM, ROPE_DIM, ROW_DIM, SCALE_GROUP
from tests.support.rows import BF16, FP8, as_bytes, random_rows, sparse_rows
from tests.support.triton_compile import compile_for_hopper

# 1 / 0 and 0 x infinity are part of SGLang's arithmetic for groups of zeros.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

PAGE = 64
FLOAT32 = ((ROW_DIM,), torch.float32)


def upstream_rows(nope, rope):
    """[n, 656] uint8 by SGLang's Triton kernel, interpreted where there is no GPU."""
    from sglang.kernels.ops.quantization.dsa_quant_k_cache import quantize_k_cache_separate

    return torch.cat(quantize_k_cache_separate(nope, rope), -1).flatten(1)


def plain_rows(nope, rope):
    return torch.cat([nope.flatten(1), rope.flatten(1)], 1)


@dataclass
class Tiers:
    """Slots in two tiers, every second one hot, in rows that lie apart on the host and the device.

    expected: copies of both tiers, for what pack_write should make of them
    """

    row: tuple
    num_slots: int
    device: torch.device
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        (width,), dtype = self.row
        apart = 16 // dtype.itemsize

        def rows(num, left):
            wide = random_rows(num, ((width + left,), dtype), generator)
            return wide[:, None, left:]

        self.host = rows(self.num_slots, apart)
        self.hot = rows(self.num_slots // 2, 3 * apart).to(self.device)
        if self.device.type == "cuda":
            self.host = self.host.pin_memory()
        self.slot_row = torch.full((self.num_slots,), -1, dtype=torch.int32)
        slots = torch.randperm(self.num_slots, generator=generator)
        hot = slots[: self.num_slots // 2]
        self.slot_row[hot] = torch.randperm(len(hot), generator=generator).int()
        self.slot_row[slots[len(hot) :: 2]] = -3  # claims of a plan are negative too
        self.slot_row = self.slot_row.to(self.device)
        self.expected = self.host.clone(), self.hot.clone()

    def expect(self, slots, rows, first_slot=0, hot_only=False):
        """What rows [n, width] written at slots leave in the tiers."""
        host, hot = self.expected
        saved = slots.cpu() >= first_slot
        slots, rows = (
            slots.cpu()[saved].long(),
            rows[saved.to(rows.device)].view(-1, *host.shape[1:]),
        )
        if not hot_only:
            host[slots] = rows.to(host.device)
        found = self.slot_row[slots.to(self.device)]
        hot[found[found >= 0].long()] = rows.to(self.device)[found >= 0]

    def check(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for got, want in zip((self.host, self.hot), self.expected, strict=True):
            assert torch.equal(as_bytes(got.contiguous()), as_bytes(want.contiguous()))


def latents(n, row, device, seed=0, dtype=torch.bfloat16):
    """nope [n, 1, 512] and rope [n, 1, 64]: parts of wider rows, as a projection gives them."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(n, 1, 96 + ROW_DIM, generator=generator) * 3
    wide = wide.to(row[1] if row[1].is_floating_point else dtype).to(device)
    return wide[..., 32 : 32 + LATENT_DIM], wide[..., 64 + LATENT_DIM : 64 + ROW_DIM]


@dataclass(frozen=True)
class Case:
    name: str
    row: tuple = FP8
    n: int = 37
    padding: int = 0
    index: torch.dtype = torch.int64
    packed: bool = True
    hot_only: bool = False


CASES = [
    Case("fp8"),
    Case("bf16", row=BF16),
    Case("float32", row=FLOAT32),
    Case("int32 slots", index=torch.int32),
    Case("nothing packed", packed=False),
    Case("nothing packed, bf16", row=BF16, packed=False),
    Case("one row", n=1),
    Case("one row, bf16", n=1, row=BF16),
    Case("no rows", n=0),
    Case("padding", padding=11),
    Case("padding, bf16", padding=11, row=BF16),
    Case("nothing but padding", n=5, padding=5),
    Case("a rank that reads", hot_only=True, padding=11, packed=False),
    Case("a rank that reads, bf16", hot_only=True, row=BF16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(2))
def test_both_tiers_and_the_packed_rows(case, seed, device):
    tiers = Tiers(case.row, 3 * PAGE, device, seed)
    nope, rope = latents(case.n, case.row, device, seed)
    order = torch.randperm(2 * PAGE, generator=torch.Generator().manual_seed(seed)) + PAGE
    slots = order[: case.n].to(device, case.index)
    slots[case.n - case.padding :] = 0
    packed = None
    if case.packed:
        packed = torch.empty(case.n, 1, *case.row[0], dtype=case.row[1], device=device)

    pack_write(
        nope, rope, slots, tiers.slot_row, tiers.hot, tiers.host, first_slot=PAGE, packed=packed,
        hot_only=case.hot_only, publishes=True,
    )  # fmt: skip

    fp8 = case.row is FP8 and case.n
    rows = (upstream_rows if fp8 else plain_rows)(nope, rope)
    if case.n:
        tiers.expect(slots, rows, PAGE, case.hot_only)
    tiers.check()
    if case.packed and case.n:
        assert torch.equal(as_bytes(packed), as_bytes(rows))


@pytest.mark.parametrize("row", [FP8, BF16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("n, rows_per_step", [(8 * 32 + 1, 8), (8_192 - 5, 128)])
def test_several_steps_of_every_program(row, n, rows_per_step, device, monkeypatch):
    """rows_per_step: interpreted, 8,187 rows in steps of 8 would take half a minute."""
    if interpreted():
        monkeypatch.setattr(module, "ROWS_PER_STEP", rows_per_step)
    tiers = Tiers(row, n + PAGE, device)
    nope, rope = latents(n, row, device)
    slots = torch.randperm(n + PAGE, generator=torch.Generator().manual_seed(0))[:n].to(device)

    pack_write(nope, rope, slots, tiers.slot_row, tiers.hot, tiers.host)

    if row is BF16:
        rows = plain_rows(nope, rope)
    elif interpreted():
        rows = pack_fp8_rows(nope.flatten(1), rope.flatten(1))
    else:
        rows = upstream_rows(nope, rope)
    tiers.expect(slots, rows)
    tiers.check()


@pytest.mark.skipif(not interpreted(), reason="a GPU does not say where its lanes store")
@pytest.mark.parametrize("row", [FP8, BF16], ids=["fp8", "bf16"])
def test_lanes_begin_at_the_start_of_a_host_line(row, device, monkeypatch):
    store, first_lanes = interpreter.InterpreterBuilder.create_masked_store, []
    tiers, (nope, rope) = Tiers(row, PAGE, device), latents(20, row, device)
    begin = tiers.host.data_ptr()
    end = begin + tiers.host.stride(0) * PAGE * tiers.host.itemsize

    def noted(builder, pointers, value, mask, *rest):
        addresses = pointers.data[mask.data.any(axis=(1, 2))]
        if ((addresses >= begin - 128) & (addresses < end)).all():
            first_lanes.extend(addresses[:, 0, 0] % 128)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", noted)
    slots = torch.arange(20, device=device)
    pack_write(nope, rope, slots, tiers.slot_row, tiers.hot, tiers.host)
    assert first_lanes == [0] * 20


def packed_rows(nope, rope, width=FP8_ROW_BYTES):
    """[n, width] uint8: what pack_write packs, none of it saved."""
    n, device = len(nope), nope.device
    tier = torch.zeros(PAGE, width, dtype=torch.uint8, device=device)
    packed = torch.empty(n, width, dtype=torch.uint8, device=device)
    slots = torch.zeros(n, dtype=torch.int64, device=device)
    slot_row = torch.full((PAGE,), -1, dtype=torch.int32, device=device)
    pack_write(nope, rope, slots, slot_row, tier, tier, first_slot=PAGE, packed=packed)
    assert not tier.any()
    return packed


def group_of(values) -> torch.Tensor:
    """[512] bf16: values, each once in every group, the rest their first."""
    group = torch.full((SCALE_GROUP,), values[0])
    group[: len(values)] = torch.tensor(values)
    return group.repeat(LATENT_DIM // SCALE_GROUP).bfloat16()


E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
TIES = ((E4M3[:-1] + E4M3[1:]) / 2).tolist()
EDGES = {
    "one value": group_of([0.7]),
    "signs": group_of([1.0, -1.0, -0.0, 0.5]),
    "largest": group_of([torch.finfo(torch.bfloat16).max, -3.0e38, 1.0]),
    "smallest normal scale": group_of([448 * 2.0**-126, 2.0**-120, -(2.0**-122)]),
    "subnormal scale": group_of([2.0**-118, -(2.0**-119), 3 * 2.0**-122]),
    "ties": group_of([448.0, *TIES]),
    "negative ties": group_of([448.0, *[-tie for tie in TIES]]),
    "powers of two": group_of([448.0, *[2.0**-e for e in range(20)]]),
    "what one group has left is not another's": torch.arange(LATENT_DIM).exp2().clamp(max=3e38),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_values_are_those_of_upstream_and_of_the_cpu_platform(name, device):
    nope = EDGES[name].bfloat16()[None].to(device)
    rope = torch.full((1, ROPE_DIM), -0.0, dtype=torch.bfloat16, device=device)
    got = packed_rows(nope, rope)
    assert torch.equal(got, upstream_rows(nope, rope))
    if interpreted():  # a GPU's division is not IEEE's
        assert torch.equal(got, pack_fp8_rows(nope, rope))


def test_ties_go_to_even():
    rope = torch.zeros(1, ROPE_DIM, dtype=torch.bfloat16)
    codes = packed_rows(EDGES["ties"][None], rope)[0, 1:SCALE_GROUP]
    lower = torch.arange(126)
    assert torch.equal(codes[:126].long(), lower + lower % 2)


@pytest.mark.parametrize("largest", [0.0, 2.0**-133], ids=["zeros", "a scale without inverse"])
def test_a_scale_that_cannot_be_inverted(largest, device):
    """1 / scale is infinite: upstream stores what its clamp makes of infinities and NaN."""
    nope = torch.zeros(1, LATENT_DIM, dtype=torch.bfloat16, device=device)
    nope[0, 3], nope[0, -1] = largest, -largest
    rope = torch.ones(1, ROPE_DIM, dtype=torch.bfloat16, device=device)
    got = packed_rows(nope, rope)
    assert torch.equal(got, upstream_rows(nope, rope))
    values = unpack_rows(got.cpu())
    assert values.isfinite().all() and values[:, :LATENT_DIM].abs().max() <= largest
    assert torch.equal(values[:, LATENT_DIM:], rope.cpu().float())


def test_float32_latents_of_the_cpu_platform(device):
    nope, rope = latents(9, FP8, device, dtype=torch.float32)
    want = pack_fp8_rows(nope.flatten(1).cpu(), rope.flatten(1).cpu())
    got = packed_rows(nope, rope.bfloat16()).cpu()
    assert torch.equal(got, want) if interpreted() else torch.equal(got[:, 528:], want[:, 528:])


def test_a_model_without_rope(device):
    nope, rope = latents(9, FP8, device)
    assert torch.equal(packed_rows(nope, rope[..., :0], 528), upstream_rows(nope, rope)[:, :528])
    plain = torch.zeros(PAGE, LATENT_DIM, dtype=torch.bfloat16, device=device)
    packed = torch.empty(9, LATENT_DIM, dtype=torch.bfloat16, device=device)
    slots = torch.arange(9, device=device)
    hot = torch.full((PAGE,), -1, dtype=torch.int32, device=device)
    pack_write(nope, rope[..., :0], slots, hot, plain, plain, packed=packed)
    assert torch.equal(packed, nope.flatten(1)) and torch.equal(plain[:9], packed)


def test_slots_and_hot_rows_past_two_to_the_31_bytes(device, tmp_path):
    rows = 2**31 // FP8_ROW_BYTES + 100
    host = sparse_rows(tmp_path / "host", rows, FP8_ROW_BYTES, device)
    hot = sparse_rows(tmp_path / "hot", rows, FP8_ROW_BYTES, device)
    slot_row = torch.full((rows,), -1, dtype=torch.int32, device=device)
    slot_row[rows - 1] = rows - 2
    nope, rope = latents(2, FP8, device)

    slots = torch.tensor([rows - 1, rows - 3], device=device)
    pack_write(nope, rope, slots, slot_row, hot, host)

    want = upstream_rows(nope, rope)
    assert torch.equal(host[-1], want[0]) and torch.equal(host[-3], want[1])
    assert torch.equal(hot[-2], want[0])
    assert not hot[-1].any() and not hot[-3].any() and not host[-2].any()


def test_the_clock_at_the_end(device):
    ready = torch.zeros(1, dtype=torch.int64, device=device)
    tiers, (nope, rope) = Tiers(FP8, PAGE, device), latents(20, FP8, device)
    slots, times = torch.arange(20, device=device), [0]
    for n in (20, 1, 0):
        pack_write(nope[:n], rope[:n], slots[:n], tiers.slot_row, tiers.hot, tiers.host,
                   main_ready=ready)  # fmt: skip
        times.append(int(ready))
    assert times[0] < times[1] < times[2] == times[3]


@triton.jit
def _of_the_neighbour(group, of_0, of_1, of_2, of_3):
    low = tl.where(group == 0, of_1, of_0)
    high = tl.where(group == 2, of_3, of_2)
    return tl.where(group < 2, low, high)


@triton.jit
def _row_of_any_slot(slot_row_ptr, slot, saved):
    return tl.load(slot_row_ptr + slot, mask=saved, other=-1).to(tl.int64) * saved


@pytest.mark.skipif(not interpreted(), reason="a compiled kernel has its helpers inside")
@pytest.mark.parametrize(
    "name, faulty", [("_of_group", _of_the_neighbour), ("_hot_row", _row_of_any_slot)]
)
def test_a_faulty_kernel_is_noticed(name, faulty, device, monkeypatch):
    """The scale of the neighbouring group; hot row 0 for a padding slot, which is not hot."""
    case = next(case for case in CASES if case.name == "padding")
    test_both_tiers_and_the_packed_rows(case, 0, device)
    monkeypatch.setattr(module, name, faulty)
    with pytest.raises(AssertionError):
        test_both_tiers_and_the_packed_rows(case, 0, device)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"nope": torch.zeros(3, 500).bfloat16()}, r"nope must have shape \[any, 512\]: got"),
        ({"nope": torch.zeros(3, 512).half()}, "nope must be torch.bfloat16 or torch.float32"),
        ({"rope": torch.zeros(3, 64)}, "rope must be torch.bfloat16: got torch.float32"),
        ({"rope": torch.zeros(3, 32).bfloat16()}, r"32 rope keys must be 592 .*uint8: got \[656"),
        ({"rope": torch.zeros(2, 64).bfloat16()}, r"rope must have shape \[3, any\]"),
        ({"nope": torch.zeros(3, 516).bfloat16()[:, :512]}, "stride of nope must be a multiple"),
        ({"nope": torch.zeros(3, 1024).bfloat16()[:, ::2]}, "row of nope must be dense"),
        ({"slots": torch.zeros(3)}, "slots must be torch.int32 or torch.int64"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots must have shape \[3\]"),
        ({"slot_row": torch.zeros(8, dtype=torch.int32)}, r"slot_row must have shape \[9\]"),
        ({"slot_row": torch.zeros(9, dtype=torch.int64)}, "slot_row must be torch.int32"),
        ({"hot_rows": torch.zeros(9, 656, dtype=torch.int8)}, "rows of host_rows must be like"),
        ({"hot_rows": torch.zeros(9, 672, dtype=torch.uint8)}, "rows of host_rows must be like"),
        ({"first_slot": -1}, "first_slot must not be negative: got -1"),
        ({"packed": torch.zeros(2, 656, dtype=torch.uint8)}, r"packed must have shape \[3, 656\]"),
        ({"main_ready": torch.zeros(1)}, "main_ready must be torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(changed, told, device):
    given = {
        "nope": torch.zeros(3, LATENT_DIM, dtype=torch.bfloat16),
        "rope": torch.zeros(3, ROPE_DIM, dtype=torch.bfloat16),
        "slots": torch.arange(3),
        "slot_row": torch.zeros(9, dtype=torch.int32),
        "hot_rows": torch.zeros(9, FP8_ROW_BYTES, dtype=torch.uint8),
        "host_rows": torch.zeros(9, FP8_ROW_BYTES, dtype=torch.uint8),
    } | changed
    on_device = {k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=told):
        pack_write(**on_device)


def compiled(fp8: bool, publishes=False, hot_only=False, **pointers):
    """The kernel for strides of V3.2's fused projection, with packed and main_ready or without."""
    rows, wide = ("*u8", 4224) if fp8 else ("*i64", 528)
    width = FP8_ROW_BYTES if fp8 else 2 * ROW_DIM // 8
    return compile_for_hopper(
        _pack_write_kernel,
        signature={
            "nope_ptr": "*bf16" if fp8 else rows,
            "rope_ptr": rows,
            "slots_ptr": "*i64",
            "slot_row_ptr": "*i32",
            "hot_ptr": rows,
            "host_ptr": rows,
            "num_rows": "i32",
            "first_slot": "i32",
            "lead": "i32",
            **{name: kind for name, kind in pointers.items() if kind},
        },
        constexprs={
            "NOPE_STRIDE": wide // 2 if fp8 else wide,
            "ROPE_STRIDE": wide,
            "HOT_STRIDE": width,
            "HOST_STRIDE": width,
            "PACKED_STRIDE": width,
            "NOPE_PIECES": 32 if fp8 else 64,
            "ROW_PIECES": 41 if fp8 else 72,
            "BLOCK_PIECES": 64 if fp8 else 128,
            "ROWS_PER_STEP": module.ROWS_PER_STEP,
            "FP8": fp8,
            "STORES_HOT": True,
            "STORES_HOST": not hot_only,
            "PUBLISHES": publishes,
            **{name: None for name, kind in pointers.items() if not kind},
        },
        num_warps=module.WARPS,
    )


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("served", [True, False], ids=["prefill", "decode"])
def test_hopper_code_moves_16_bytes_at_a_time(fp8, served):
    packed, ready = (("*u8" if fp8 else "*i64"), "*i64") if served else (None, None)
    asm = compiled(fp8, packed_ptr=packed, ready_ptr=ready)
    wide = "v4.b32" if fp8 else "v2.b64"
    # a thread's pieces of a step: one of fp8, from two accesses to its latents, two of bf16
    loads, stores = (3, 2 + served) if fp8 else (4, 2 * (2 + served))
    assert re.findall(r"\bld\.global\S*\.v\S+", asm["ptx"]) == [f"ld.global.{wide}"] * loads
    assert re.findall(r"\bst\.global\S+", asm["ptx"]) == [f"st.global.{wide}"] * stores
    assert asm["spill_bytes"] == 0 and asm["stack_bytes"] == 0 and asm["shared_bytes"] <= 128
    assert asm["registers"] <= 65_536 // (32 * module.WARPS)
    # slot_row is read once: by no load, by one atomic
    assert not re.findall(r"\bld\.(?:volatile\.)?global\.b32", asm["ptx"])
    assert re.findall(r"\batom\.global\S+", asm["ptx"]) == [
        "atom.global.gpu.relaxed.add.u32",
        *["atom.global.gpu.relaxed.max.s64"] * served,
    ]
    assert len(re.findall(r"%globaltimer\b", asm["ptx"])) == served


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_every_thread_fences_its_stores_before_the_clock(fp8):
    asm = compiled(fp8, publishes=True, packed_ptr=None, ready_ptr="*i64")
    order = r"\b(st\.global|fence\.\S+|atom\.global\.gpu\.relaxed\.max)"
    *stores, fence, clock = re.findall(order, asm["ptx"])
    assert len(stores) == (2 if fp8 else 4) and set(stores) == {"st.global"}
    assert (fence, clock) == ("fence.acq_rel.sys;", "atom.global.gpu.relaxed.max")
    line = next(line for line in asm["ptx"].splitlines() if "fence.acq_rel.sys" in line)
    assert line.strip().startswith("fence"), "no thread is predicated off"
    assert "fence" not in compiled(fp8, packed_ptr=None, ready_ptr="*i64")["ptx"]


def test_a_rank_that_reads_stores_no_host_rows():
    asm = compiled(True, hot_only=True, packed_ptr=None, ready_ptr="*i64")
    assert len(re.findall(r"\bst\.global", asm["ptx"])) == 1


def test_hopper_code_has_upstreams_arithmetic():
    """The same instructions in the same order, so the same bits of the same values."""
    from sglang.kernels.ops.quantization.dsa_quant_k_cache import _quantize_k_cache_fast_kernel

    pointers = {
        "output_nope_q_ptr": "*fp8e4nv",
        "output_nope_s_ptr": "*fp32",
        "output_rope_ptr": "*bf16",
        "k_nope_ptr": "*bf16",
        "k_rope_ptr": "*bf16",
    }
    strides = [f"{name.removesuffix('_ptr')}_stride_0" for name in pointers]
    theirs = compile_for_hopper(
        _quantize_k_cache_fast_kernel,
        signature=pointers | dict.fromkeys(strides, "i32"),
        constexprs={"NUM_NOPE_BLOCKS": 4, "GROUP_SIZE": SCALE_GROUP, "DIM_NOPE": LATENT_DIM,
                    "DIM_ROPE": ROPE_DIM, "FP8_MIN": -448.0, "FP8_MAX": 448.0},
        num_warps=4,
    )  # fmt: skip
    ours = compiled(True, packed_ptr=None, ready_ptr=None)
    arithmetic = r"^\s*((?:div|rcp|mul|fma|min|max|cvt)\.\S*(?:f32|e4m3x2)\S*)"

    def operations(asm):
        found = re.findall(arithmetic, asm["ptx"], re.MULTILINE)
        return list(dict.fromkeys(found))

    assert operations(theirs) == operations(ours)
    assert "div.full.f32" in operations(ours) and "mul.f32" in operations(ours)
