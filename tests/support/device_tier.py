"""The CUDA path in a real engine without a GPU: installed over the CPU platform's own.

The pool, the tiers, staging, the kernels (CUDA sources compiled for the host, Triton's under its
interpreter), the overlap and EssDsaBackend are the ones that a GPU gets. What only a GPU has is
stood in for: SGLang's backend by CpuUpstream, its transfer stream by one of two extremes. With no
stream at all every copy happens when it is issued, as early as it ever could; on a LateStream
everything happens when somebody waits for it, as late as it ever could.
"""

from __future__ import annotations

from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from triton.runtime import interpreter

from ess_kernels.checks import interpreted
from sglang_ess.tiers.transfer_stream import TransferStream
from tests.support.cuda_host import host
from tests.support.interpreter import allow, make_fast, new_memory_is_garbage

# --- streams ------------------------------------------------------------------------------


class LateStream(TransferStream):
    """Kernels launched inside on_transfer_stream() run, in order, once somebody waits for them."""

    recording: LateStream | None = None

    def __init__(self, device):
        super().__init__("cpu")
        self._launches: deque = deque()
        self._issued = self._done = 0

    @contextmanager
    def on_transfer_stream(self):
        before, LateStream.recording = LateStream.recording, self
        try:
            yield
        finally:
            LateStream.recording = before

    def launch(self, run) -> None:
        self._launches.append(run)
        self._issued += 1

    def event(self):
        return self, self._issued

    def run_to(self, number: int) -> None:
        while self._done < number:
            self._launches.popleft()()
            self._done += 1

    def join(self) -> None:
        self.run_to(self._issued)

    @property
    def pending(self) -> int:
        return len(self._launches)


def wait_late(event) -> None:
    """two_tier_decode.wait for the events of a LateStream."""
    if event is not None:
        stream, number = event
        stream.run_to(number)


def launches_are_late(set_attribute=setattr) -> None:
    """Kernel launches inside a LateStream's on_transfer_stream() go to its queue.

    set_attribute: pytest's monkeypatch.setattr where it has to end
    """
    from sglang_ess.attention import two_tier_decode
    from sglang_ess.mem_cache import pool_cuda
    from sglang_ess.tiers import staging_cuda

    run_now = interpreter.GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        stream = LateStream.recording
        if stream is None:
            return run_now(executor, *args, **kwargs)
        stream.launch(lambda: run_now(executor, *args, **kwargs))

    def launch_operation(name, operation, args):
        stream = LateStream.recording
        if stream is None:
            return operation(*args)
        stream.launch(lambda: operation(*args))

    set_attribute(interpreter.GridExecutor, "__call__", launch)
    host.intercept(launch_operation, set_attribute)
    for module in (two_tier_decode, staging_cuda, pool_cuda):
        set_attribute(module, "wait", wait_late)
    set_attribute(pool_cuda, "TransferStream", LateStream)


# --- the engine's process -----------------------------------------------------------------


def install() -> None:
    """Put the device tiers into the CPU platform of this process; no stream."""
    if not interpreted():
        raise RuntimeError("Triton's interpreter must be on: got TRITON_INTERPRET unset.")
    allow()
    make_fast()
    new_memory_is_garbage()
    host.stand_in()
    import sglang_ess.cpu.indexer as indexer
    from sglang_ess.attention import backend_cpu, half_batch
    from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
    from sglang_ess.mem_cache import capacity
    from sglang_ess.platforms.cpu import CpuDsaPlatform

    pool_class = CpuDsaPlatform.get_kv_pool_cls

    def device_pool_class(platform, *, kind):
        chosen = pool_class(platform, kind=kind)
        return chosen if chosen in (None, CpuDsaTokenToKVPool) else interpreted_pool_class()

    CpuDsaPlatform.get_kv_pool_cls = device_pool_class
    capacity.CPU_TIER = capacity.GPU_TIER
    backend_cpu.CpuTwoTierBackend = backend_class()
    half_batch.slice_metadata = _cut
    _hook_topk(indexer)
    _scatter_pages()
    _count_calls()
    CpuDsaPlatform().init_backend()  # again: the fork server has registered the others


def install_late() -> None:
    """The same with a transfer stream that does nothing before somebody waits for it."""
    install()
    launches_are_late()


def interpreted_pool_class() -> type:
    """CudaEssTokenToKVPool on CPU tensors, with the CPU platform's index keys."""
    from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
    from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool

    class InterpretedPool(CudaEssTokenToKVPool, CpuDsaTokenToKVPool):
        pass

    return InterpretedPool


def _hook_topk(indexer) -> None:
    """topk_selected of platforms/cuda.py around the CPU platform's top-k of a decode step."""
    from sglang_ess.platforms import cuda

    forward, decode_slots, calls = indexer.indexer_forward, indexer.decode_slots, []

    def hooked_forward(module, x, q_lora, positions, forward_batch, layer_id, *args, **kwargs):
        calls.append((module, forward_batch, layer_id))
        try:
            return forward(module, x, q_lora, positions, forward_batch, layer_id, *args, **kwargs)
        finally:
            calls.pop()

    def hooked_slots(layer_id, metadata, query, weights, topk):
        def get_topk(module, forward_batch, layer_id, query, weights, metadata):
            return decode_slots(layer_id, metadata, query, weights, topk)

        return cuda.topk_selected(get_topk, *calls[-1], query, weights, metadata)

    indexer.indexer_forward, indexer.decode_slots = hooked_forward, hooked_slots


def _scatter_pages() -> None:
    """Pages are given out in no order, as after hours of service: no prompt's slots are a range."""
    from sglang_ess.mem_cache.allocator import EssPagedAllocator

    clear = EssPagedAllocator.clear

    def clear_and_scatter(allocator):
        clear(allocator)
        order = torch.randperm(
            len(allocator.free_pages), generator=torch.Generator().manual_seed(0)
        )
        allocator.free_pages = allocator.free_pages[order]

    EssPagedAllocator.clear = clear_and_scatter


def _count_calls() -> None:
    """Each cache's counters also say what all layers did: calls, and the most groups of a pass."""
    from sglang_ess.attention.two_tier_decode import TwoTierDecode
    from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache
    from sglang_ess.tiers.staging_cuda import DeviceStaging

    calls, counters = Counter(), DeviceHotCache.counters.fget

    def counted(owner, name):
        method = getattr(owner, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)

        setattr(owner, name, call)

    counted(TwoTierDecode, "plan_half")
    counted(TwoTierDecode, "in_passes")
    counted(TwoTierDecode, "merge")
    begin = DeviceStaging.begin

    def counting_begin(staging, *args):
        begin(staging, *args)
        calls["groups"] = max(calls["groups"], len(staging.groups))

    DeviceStaging.begin = counting_begin
    names = ("plan_half", "in_passes", "merge", "groups")
    DeviceHotCache.counters = property(
        lambda cache: counters(cache) | {name: calls[name] for name in names}
    )


def _cut(metadata, queries: slice, lists: int = 1):
    """half_batch.slice_metadata for the CPU indexer's metadata, which has a row for each query."""
    return replace(
        metadata,
        req_rows=metadata.req_rows[queries],
        lengths=metadata.lengths[queries],
        page_table=metadata.page_table[queries],
    )


def backend_class() -> type:
    """EssDsaBackend whose super() is CpuUpstream."""
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend
    from sglang.srt.runtime_context import get_spec

    from sglang_ess.attention.backend_cuda import EssDsaBackend
    from sglang_ess.cpu.attention_backend import (
        CpuSparseMlaBackend,
        SparseMetadata,
        attend_rows,
    )
    from sglang_ess.layout import LATENT_DIM

    @dataclass(frozen=True)
    class Metadata(SparseMetadata):
        force_unfused_topk: bool = True  # as upstream sets it for a coordinator

    class CpuUpstream(DeepseekSparseAttnBackend):
        """What EssDsaBackend takes from its base, on the CPU.

        Rows come through the three seams of SGLang's own: swap_in_selected_pages,
        translate_loc_to_hisparse_device and get_key_buffer.
        """

        def __init__(self, model_runner):
            self._cpu = CpuSparseMlaBackend(model_runner)
            self.req_to_token = self._cpu.req_to_token
            self.token_to_kv_pool = self._cpu.token_to_kv_pool
            self.kv_cache_dtype = self._cpu.kv_cache_dtype
            self.device, self.device_capability = "cpu", (0, 0)
            self.use_mha, self.use_fused_topk = False, True
            self.dsa_decode_impl = self.dsa_prefill_impl = "flashmla_kv"
            self.dsa_kv_cache_store_fp8 = self.token_to_kv_pool.dsa_kv_cache_store_fp8
            self.dsa_index_topk = self.token_to_kv_pool.capacity.geometry.topk
            self.speculative_num_draft_tokens = get_spec().speculative_num_draft_tokens

        def init_forward_metadata(self, forward_batch):
            self._cpu.init_forward_metadata(forward_batch)
            self.forward_metadata = Metadata(**vars(self._cpu.forward_metadata))

        def get_indexer_metadata(self, layer_id, forward_batch):
            return self.forward_metadata

        def _pad_topk_indices(self, topk_indices, num_tokens):
            assert len(topk_indices) == num_tokens
            return topk_indices

        def forward_extend(
            self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None,
            topk_indices=None, **kwargs,
        ):  # fmt: skip
            assert not save_kv_cache, "EssDsaBackend saves"
            places = topk_indices
            if self.hisparse_coordinator is not None:
                places = self.token_to_kv_pool.translate_loc_to_hisparse_device(topk_indices)
            return self._attend(layer, q, q_rope, places)

        def forward_decode(
            self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None,
            topk_indices=None, **kwargs,
        ):  # fmt: skip
            assert not save_kv_cache, "EssDsaBackend saves"
            rows = self.hisparse_coordinator.swap_in_selected_pages(
                forward_batch.req_pool_indices, forward_batch.seq_lens, topk_indices, layer.layer_id
            )
            return self._attend(layer, q, q_rope, rows)

        def _attend(self, layer, q, q_rope, indices):
            heads = layer.tp_q_head_num
            pool = self.token_to_kv_pool
            rows = pool.get_key_buffer(layer.layer_id).view(pool.store_dtype).flatten(1)
            q, q_rope = q.view(-1, heads, LATENT_DIM), q_rope.view(len(indices), heads, -1)
            return attend_rows(layer, q, q_rope, rows, indices)[0]

    class InterpretedBackend(EssDsaBackend, CpuUpstream):
        def _with_lse(self, layer, *args):
            self._layer = layer
            return super()._with_lse(layer, *args)

        def _attend_rows(self, short_lists, q_all, rows, indices, lengths):
            beyond = torch.arange(indices.shape[1]) >= lengths[:, None]
            nope, rope = q_all[..., :LATENT_DIM], q_all[..., LATENT_DIM:]
            indices = indices.masked_fill(beyond, -1)
            return attend_rows(self._layer, nope, rope, rows, indices)

    return InterpretedBackend


def triton_attention() -> None:
    """Decode's merged attention by the Triton kernel instead of the CPU platform's."""
    from ess_kernels.sparse_mla import sparse_mla
    from sglang_ess.attention import backend_cpu

    def attend(backend, short_lists, q_all, rows, indices, lengths):
        return sparse_mla(q_all, rows, indices, backend._layer.scaling, lengths)

    backend_cpu.CpuTwoTierBackend._attend_rows = attend


# --- faults: each must show in the output -------------------------------------------------


def attention_does_not_wait() -> None:
    """Decode reads hot rows before their fetch; needs install_late."""
    from sglang_ess.attention.two_tier_decode import TwoTierDecode

    TwoTierDecode.wait = lambda *_: None


def staging_does_not_wait() -> None:
    """Prefill reads its buffer before the prefix rows are in; needs install_late."""
    from sglang_ess.tiers import staging_cuda

    staging_cuda.wait = lambda event: None


def a_prefix_is_taken_for_a_range() -> None:
    """Staging reads a prompt's slots as if they followed the first one."""
    from sglang_ess.tiers.staging_cuda import DeviceStaging

    begin = DeviceStaging.begin

    def begin_with_ranges(staging, prefix, new, tables, loc):
        ranges = tables[:, :1] + torch.arange(tables.shape[1], dtype=tables.dtype)
        begin(staging, prefix, new, ranges.clamp(max=len(staging._place) - 1), loc)

    DeviceStaging.begin = begin_with_ranges


class _Uncopied(torch.Tensor):
    def clone(self):
        return self.as_subclass(torch.Tensor)


def slots_are_not_copied() -> None:
    """A prompt's saves read SGLang's slot tensor, which the next pass writes; install_late."""
    from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool

    begin = CudaEssTokenToKVPool.begin_prompts
    CudaEssTokenToKVPool.begin_prompts = lambda pool, prefix, new, tables, slots: begin(
        pool, prefix, new, tables, slots.as_subclass(_Uncopied)
    )


def new_rows_stay_cold() -> None:
    """A decode step's rows get to the host tier only: what is in their reserved rows stays."""
    from sglang_ess.attention import two_tier_decode

    pack_write = two_tier_decode.pack_write
    two_tier_decode.pack_write = lambda *args, **options: pack_write(
        *args, **options | {"keeps_cold": True}
    )


def no_fetch() -> None:
    """Missed rows are never copied: whatever was in the hot row is read."""
    from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache

    DeviceHotCache.fetch = lambda *_: None
    DeviceHotCache.plan_and_fetch = lambda cache, topk, **options: cache.plan(topk)
