"""The decode kernels' plumbing, with the GPU's part played by a fake that checks and computes.

FlashMLA's Python and SGLang's over it run as they are: only the compiled operators below them are
fakes, which refuse what the C++ refuses and return what it would, from the float64 definition.
"""

import inspect
import math
import sys
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ess_kernels.sparse_mla import sparse_mla_reference
from sglang_ess.attention import mla_kernels
from sglang_ess.attention.mla_kernels import (
    KERNELS,
    FlashInferMemory,
    FlashInferMla,
    FlashMlaBf16,
    FlashMlaFp8,
    Need,
    TritonMla,
    TrtllmSparseMla,
    choose,
)
from sglang_ess.cpu.ops.rows import pack_fp8_rows

SCALE = 0.05
CPU = torch.device("cpu")
FP8, BF16 = torch.uint8, torch.bfloat16
# out is rounded to bfloat16 once, of values below 4; lse is float32 all the way.
OUT_TOLERANCE, LSE_TOLERANCE = 4 * 2.0**-9, 1e-5


def inputs(dtype, heads, queries=5, columns=70, num_rows=128, packed=False, seed=0):
    """(q, rows, indices, lengths): a full list, an empty one, one of length 1; rows behind a
    list's length are real rows, which must not be attended."""
    g = torch.Generator().manual_seed(seed)
    latent, rope = torch.randn(num_rows, 576, generator=g).split([512, 64], -1)
    rows = pack_fp8_rows(latent, rope) if dtype == FP8 else torch.cat([latent, rope], -1).bfloat16()
    q = torch.randn(queries, heads, 576, generator=g).bfloat16()
    indices = torch.randint(0, num_rows, (queries, columns), generator=g).int()
    lengths = torch.tensor([columns, 0, 1, 33, 64][:queries], dtype=torch.int32)
    if not packed:
        indices[:, ::7] = -1
        indices[2, 0] = 5
    return q, rows, indices, lengths


def assert_right(got, q, rows, indices, lengths):
    out, lse = got
    expected_out, expected_lse = sparse_mla_reference(q, rows, indices, SCALE, lengths)
    assert out.shape == expected_out.shape and out.dtype == BF16 and out.is_contiguous()
    assert lse.shape == expected_lse.shape and lse.dtype == torch.float32 and lse.is_contiguous()
    assert torch.equal(lse.isinf(), expected_lse.isinf()) and not (lse == math.inf).any()
    assert (out - expected_out).abs().max() <= OUT_TOLERANCE
    finite = expected_lse.isfinite()
    assert (lse - expected_lse)[finite].abs().max() <= LSE_TOLERANCE * expected_lse[finite].max()


class FakeOps:
    """flash_mla's compiled operators: what sgl-project/FlashMLA's csrc/api checks and returns."""

    def __init__(self):
        self.heads = []

    def sparse_decode_fwd(
        self, q, kv, indices, topk_length, attn_sink, meta, splits,
        extra_kv, extra_indices, extra_length, d_v, sm_scale, kv_format,
    ):  # fmt: skip
        batch, s_q, heads, d_qk = q.shape
        assert q.dtype == BF16 and q.stride(-1) == 1 and d_qk == 576 and s_q == 1
        assert heads in (64, 128) and d_v == 512 and kv_format == "V32"
        assert kv.dtype == FP8 and kv.shape[1:] == (64, 1, 656) and kv.stride(1) == 656
        assert indices.dtype == torch.int32 and indices.shape[:2] == (batch, s_q)
        assert indices.stride(-1) == 1 and indices.shape[2] % 64 == 0
        assert topk_length is None, "V3.2 does not support dynamic topk length"
        assert all(x is None for x in (attn_sink, extra_kv, extra_indices, extra_length))
        assert meta is None and splits is None  # its own schedule for each call
        self.heads.append(heads)
        out, lse = sparse_mla_reference(q[:, 0], kv.reshape(-1, 656), indices[:, 0], sm_scale)
        lse = lse.masked_fill(lse.isinf(), math.inf).float().unsqueeze(1)
        return out.bfloat16().unsqueeze(1), lse.transpose(1, 2), torch.zeros(1), torch.zeros(1)

    def sparse_prefill_fwd(
        self, q, kv, indices, sm_scale, d_v, attn_sink, topk_length, log2, with_lse
    ):
        queries, heads, d_qk = q.shape
        assert q.dtype == kv.dtype == BF16 and d_qk == 576 and d_v == 512
        assert heads in (64, 128) and kv.shape[1:] == (1, 576)
        assert q.stride(-1) == kv.stride(-1) == indices.stride(-1) == 1 and attn_sink is None
        assert indices.shape[:2] == (queries, 1) and indices.shape[2] % 128 == 0
        assert topk_length.dtype == indices.dtype == torch.int32
        assert topk_length.shape == (queries,) and topk_length.is_contiguous()
        assert (topk_length >= 1).all() and with_lse
        # Rows behind the length may reach the output if they hold NaN.
        behind = torch.arange(indices.shape[2]) >= topk_length[:, None]
        assert (indices[:, 0][behind] == -1).all()
        self.heads.append(heads)
        out, lse = sparse_mla_reference(q, kv[:, 0], indices[:, 0], sm_scale, topk_length)
        lse = lse.masked_fill(lse.isinf(), math.inf) / (math.log(2) if log2 else 1)
        return out.bfloat16(), lse.float(), lse.float()


@pytest.fixture
def ops(monkeypatch):
    """flash_mla over fake operators: the wheel's Python is imported again without its libraries."""
    interface = "sglang.kernels.ops.attention.flash_mla_interface"
    for name in [n for n in sys.modules if n == interface or n.split(".")[0] == "flash_mla"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    fake = FakeOps()
    loader = types.ModuleType("flash_mla._loader")

    def get_ops(use_legacy):
        assert use_legacy  # the current kernels know neither Hopper nor the V3.2 format
        return fake

    loader.get_ops, loader.has_legacy = get_ops, lambda: True
    monkeypatch.setitem(sys.modules, "flash_mla._loader", loader)
    package = sys.modules.get("sglang.kernels.ops.attention")
    if package is not None and hasattr(package, "flash_mla_interface"):
        monkeypatch.delattr(package, "flash_mla_interface")
    yield fake
    for name in set(sys.modules) - before:
        if name == interface or name.split(".")[0] == "flash_mla":
            del sys.modules[name]
    package = sys.modules.get("sglang.kernels.ops.attention")
    if package is not None and hasattr(package, "flash_mla_interface"):
        del package.flash_mla_interface


@pytest.mark.parametrize("kernel", [FlashMlaFp8, FlashMlaBf16])
@pytest.mark.parametrize(("heads", "capability", "padded"), [
    (16, (9, 0), 64), (64, (9, 0), 64), (80, (9, 0), 128), (128, (9, 0), 128), (16, (10, 0), None),
])  # fmt: skip
def test_flash_mla(kernel, heads, capability, padded, ops):
    dtype = FP8 if kernel is FlashMlaFp8 else BF16
    q, rows, indices, lengths = inputs(dtype, heads, columns=130)
    attend = kernel(Need(dtype, capability, heads), SCALE, CPU).attend
    given = indices.clone()
    assert_right(attend(q, rows, indices, lengths), q, rows, indices, lengths)
    assert torch.equal(indices, given)
    # SGLang pads to 128 on Blackwell where it runs the bfloat16 kernel, else to what there is.
    assert ops.heads == [padded or (64 if kernel is FlashMlaFp8 else 128)]


def test_flash_mla_wants_whole_pages(ops):
    q, rows, indices, lengths = inputs(FP8, 16)
    with pytest.raises(ValueError, match="whole pages of 64: got 100"):
        FlashMlaFp8(Need(FP8, (9, 0), 16), SCALE, CPU).attend(q, rows[:100], indices, lengths)


def fake_trtllm(signature, seen):
    def fake(**arguments):
        a = signature.bind(**arguments).arguments
        queries, s_q, heads, dim = a["query"].shape
        pages, one, page, width = a["kv_cache"].shape
        assert (s_q, dim, one, page, width) == (1, 576, 1, 64, 576)
        assert a["query"].dtype == a["kv_cache"].dtype == BF16 and a["kv_cache"].is_contiguous()
        assert a["sparse_mla_top_k"] % 4 == 0
        assert a["block_tables"].shape == (queries, 1, a["sparse_mla_top_k"])
        assert a["block_tables"].dtype == a["seq_lens"].dtype == torch.int32
        assert a["lse"].shape == (queries, heads) and a["lse"].dtype == torch.float32
        assert (a["backend"], a["return_lse"], a["return_lse_base"]) == (
            "trtllm-gen",
            True,
            "basee",
        )
        needed = (128 << 20) + queries * heads * 2048
        assert a["workspace_buffer"].dtype == FP8 and len(a["workspace_buffer"]) >= needed
        topk, lens = a["block_tables"][:, 0], a["seq_lens"]
        inside = torch.arange(topk.shape[1]) < lens[:, None]
        assert (topk[inside] >= 0).all(), "packed before any -1"
        out, lse = sparse_mla_reference(
            a["query"][:, 0], a["kv_cache"].view(-1, 576), topk, a["bmm1_scale"], lens
        )
        out[lens == 0] = math.nan  # what the kernel leaves there is not defined
        lse[lens == 0] = 123.0
        seen.append(a)
        a["lse"].copy_(lse)
        return out.bfloat16().unsqueeze(1), a["lse"]

    return fake


@pytest.mark.parametrize("heads", [16, 128])
def test_trtllm(heads, monkeypatch):
    import flashinfer.decode

    upstream, seen = flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla, []
    fake = fake_trtllm(inspect.signature(upstream), seen)
    monkeypatch.setattr(flashinfer.decode, upstream.__name__, fake)
    given = inputs(BF16, heads, packed=True)
    kernel = TrtllmSparseMla(Need(BF16, (10, 0), heads), SCALE, CPU, max_queries=5)
    assert_right(kernel.attend(*given), *given)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="got 6, limit 5"):
        kernel.attend(torch.zeros(6, heads, 576), *given[1:])


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (10, 0)])
def test_flashinfer(flashinfer_module, capability):
    kernel = FlashInferMla(Need(BF16, capability, 16), SCALE, CPU)
    q, rows, indices, _ = inputs(BF16, 16, packed=True)
    with pytest.raises(ValueError, match=r"Call plan\(\) once a step"):
        kernel.attend(q, rows, indices, None)
    for lengths in ([70, 70, 70, 70, 70], [70, 3, 1, 33, 64]):
        kernel.plan(lengths, 70)
        assert kernel._wrapper._backend == ("fa3" if capability == (9, 0) else "fa2")
        for layer in range(2):  # another layer, other lists, the same plan
            lists = indices.roll(layer, 0)
            got = kernel.attend(q, rows, lists, None)
            assert_right(got, q, rows, lists, torch.tensor(lengths))
    with pytest.raises(ValueError, match="1 to 70: got 0.*dual attention"):
        kernel.plan([70, 0, 1, 33, 64], 70)
    with pytest.raises(ValueError, match="1 to 70: got 71"):
        kernel.plan([70, 71, 1, 33, 64], 70)
    with pytest.raises(ValueError, match=r"got \(4, 70\)"):
        kernel.attend(q[:4], rows, indices[:4], None)


def test_a_captured_flashinfer_step_follows_the_next_plan(flashinfer_module):
    """A CUDA graph keeps the arguments of the captured launch, and nothing of FlashInfer's host."""
    kernel = FlashInferMla(Need(BF16, (9, 0), 16), SCALE, CPU)
    q, rows, indices, _ = inputs(BF16, 16, packed=True)
    kernel.plan([1] * 5, 70)
    out, lse = kernel.attend(q, rows, indices, None)  # the capture
    places, kv_indices = kernel._places, kernel._kv_indices
    lengths = torch.tensor([70, 3, 1, 33, 64])
    kernel.plan(lengths, 70)
    torch.index_select(indices.view(-1), 0, places, out=kv_indices)
    flashinfer_module.replay(flashinfer_module.runs[0])
    assert_right((out, lse), q, rows, indices, lengths)


def test_flashinfer_asks_the_device_nothing_in_a_captured_step(flashinfer_module, monkeypatch):
    """Between plan() and the launch no tensor becomes a Python value, in FlashInfer neither."""
    asked, launched = [], []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if not launched:
                asked.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    kernel = FlashInferMla(Need(BF16, (9, 0), 16), SCALE, CPU)
    q, rows, indices, _ = inputs(BF16, 16, packed=True)
    kernel.plan([70, 3, 1, 33, 64], 70)
    monkeypatch.setattr(flashinfer_module, "run", lambda *args: launched.append(args))
    with Watch():
        kernel.attend(q, rows, indices, None)
    host = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "equal"}
    assert launched and "index_select" in asked and not host & set(asked)


def test_flashinfer_wrappers_share_their_memory(flashinfer_module):
    memory = FlashInferMemory(CPU)
    need = Need(BF16, (9, 0), 16)
    q, rows, indices, _ = inputs(BF16, 16, packed=True)
    kernels = {n: FlashInferMla(need, SCALE, CPU, memory) for n in (5, 2, 4)}
    for _ in range(2):
        for n, kernel in kernels.items():
            kernel.plan([70, 3, 1, 33, 64][:n], 70)
            got = kernel.attend(q[:n], rows, indices[:n], None)
            assert_right(got, q[:n], rows, indices[:n], torch.tensor([70, 3, 1, 33, 64][:n]))
    first = kernels[5]
    assert all(
        one._kv_indices.data_ptr() == first._kv_indices.data_ptr() for one in kernels.values()
    )
    assert all(one._places.data_ptr() == first._places.data_ptr() for one in kernels.values())


def test_flashinfer_plans_the_largest_step(flashinfer_module):
    """512 queries of 2,048 rows: the device makes the million places from two numbers a query."""
    kernel = FlashInferMla(Need(BF16, (9, 0), 128), SCALE, CPU)
    lengths = torch.arange(512) * 4 + 1
    kernel.plan(lengths, 2048)
    wanted = [t * 2048 + j for t, length in enumerate(lengths.tolist()) for j in range(length)]
    assert kernel._places[: len(wanted)].tolist() == wanted


@pytest.mark.parametrize("dtype", [FP8, BF16])
def test_triton(dtype, monkeypatch):
    q, rows, indices, lengths = inputs(dtype, 8, queries=3, columns=40)
    kernel = choose(Need(dtype, None, 8, split_lists=True, pads_anywhere=True), SCALE, CPU)
    assert isinstance(kernel, TritonMla)
    out, lse = kernel.attend(q, rows, indices, lengths.clamp_max(40))
    expected, expected_lse = sparse_mla_reference(q, rows, indices, SCALE, lengths.clamp_max(40))
    assert (out - expected).abs().max() <= 2 * OUT_TOLERANCE  # its weights are bfloat16 as well
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    monkeypatch.setattr(mla_kernels, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="triton needs a GPU, or TRITON_INTERPRET=1"):
        choose(Need(dtype, None, 8), SCALE, CPU)


# dtype, capability, heads, pads anywhere -> first preferred, all that fit
TABLE = [
    (FP8, (9, 0), 16, True, ["flashmla_fp8", "triton"]),
    (FP8, (9, 0), 128, False, ["flashmla_fp8", "triton"]),
    (FP8, (9, 0), 160, False, ["triton"]),
    (FP8, (10, 0), 128, False, ["flashmla_fp8", "triton"]),
    (FP8, (8, 9), 8, False, ["triton"]),
    (FP8, (8, 0), 8, False, []),
    (FP8, (12, 0), 8, False, ["triton"]),
    (BF16, (9, 0), 8, True, ["flashmla_bf16", "triton"]),
    (BF16, (9, 0), 128, False, ["flashmla_bf16", "triton"]),
    (BF16, (10, 0), 128, False, ["trtllm", "flashmla_bf16", "triton"]),
    (BF16, (10, 0), 128, True, ["flashmla_bf16", "triton"]),
    (BF16, (8, 0), 64, True, ["triton"]),
    (BF16, (7, 5), 64, False, []),
    (torch.float32, None, 64, True, ["triton"]),
]


@pytest.mark.parametrize(("dtype", "capability", "heads", "anywhere", "fitting"), TABLE, ids=str)
def test_choice(dtype, capability, heads, anywhere, fitting, monkeypatch):
    for kernel in KERNELS.values():  # no wheel is needed to choose
        monkeypatch.setattr(kernel, "__init__", lambda self, need, sm_scale, device: None)
    need = Need(dtype, capability, heads, split_lists=True, pads_anywhere=anywhere)
    for name in KERNELS:
        if name in fitting:
            assert choose(need, SCALE, CPU, name).name == name
        else:
            with pytest.raises(ValueError, match=f"must fit Need.*: {name} "):
                choose(need, SCALE, CPU, name)
    if fitting:
        assert choose(need, SCALE, CPU).name == fitting[0]
    else:
        with pytest.raises(
            ValueError, match="flashmla_fp8 .*; trtllm .*; flashmla_bf16 .*; triton"
        ):
            choose(need, SCALE, CPU)


def test_flashinfer_is_taken_on_request_for_whole_lists(monkeypatch):
    monkeypatch.setattr(FlashInferMla, "__init__", lambda self, need, sm_scale, device: None)
    need = Need(BF16, (9, 0), 128)
    assert choose(need, SCALE, CPU, "flashinfer").name == "flashinfer"
    with pytest.raises(ValueError, match="flashinfer wants lengths on the host"):
        choose(Need(BF16, (9, 0), 128, split_lists=True), SCALE, CPU, "flashinfer")
    with pytest.raises(ValueError, match="one of flashmla_fp8, .*: got 'fa4'"):
        choose(need, SCALE, CPU, "fa4")


def test_short_lists_get_a_kernel_that_stops_at_their_length():
    """Dual attention's second part on Hopper: FlashMLA would compute all its empty columns."""
    need = Need(torch.uint8, (9, 0), 128, split_lists=True, pads_anywhere=True)
    kernel = choose(need, 0.1, torch.device("cpu"), short_lists=True)
    assert kernel.name == "triton" and kernel.stops_early
    with pytest.raises(ValueError, match="flashmla_fp8 computes every column"):
        choose(need, 0.1, torch.device("cpu"), "flashmla_fp8", short_lists=True)
