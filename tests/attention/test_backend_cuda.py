"""EssDsaBackend without a GPU: every answer is that of one tier that holds every row.

SGLang's own attention is stood in for by Upstream, which reads exactly what upstream would: the
pool's get_key_buffer at the rows that the coordinator or the pool names. The tiers, staging, the
orders and the kernels are the real ones. On a LateStream a copy happens when somebody waits for
it, so that a missing wait shows; with no stream it happens when it is issued.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend, DSAMetadata
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner_utils import capture_mode
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

from ess_kernels.sparse_mla import sparse_mla_reference
from sglang_ess.attention import backend_cuda, half_batch
from sglang_ess.attention.backend_cuda import EssDsaBackend
from sglang_ess.attention.overlap import CostTable, Mode, OverlapPolicy
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import pool_cuda
from sglang_ess.platforms import cuda as cuda_hooks
from sglang_ess.tiers.contract import RowCorruption
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache
from sglang_ess.tiers.index_groups import IndexGroups
from tests.support.device_tier import launches_are_late

HEADS, SCALE, SLOTS, PAGE, LAYERS, TOPK = 4, 0.07, 120, 4, 2, 8
HOT_ROWS, WARMUP_QUERIES = 40, 3
NOPE, ROPE = 512, 64
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order


class Pool(pool_cuda.CudaEssTokenToKVPool):
    """The pool's tiers over float32 rows, without SGLang's allocation and packing kernels."""

    def __init__(self, hot_rows, staging_rows):
        self.device, self.start_layer, self.layer_num, self.page_size = "cpu", 0, LAYERS, PAGE
        self.dtype = self.store_dtype = torch.float32
        self.kv_cache_dim, self.dsa_kv_cache_store_fp8 = NOPE + ROPE, False
        nan = float("nan")  # reading a row that nobody filled must show
        self.kv_buffer = [torch.full((SLOTS, 1, NOPE + ROPE), nan) for _ in range(LAYERS)]
        shape = SimpleNamespace(topk=TOPK, tier=SimpleNamespace(moves=False))
        sizes = {"hot_rows": hot_rows, "staging_rows": staging_rows}
        self.capacity = SimpleNamespace(geometry=shape, **sizes)
        self.groups = IndexGroups.single(LAYERS)
        self._create_tiers()
        for rows in self.tier.rows:
            rows.fill_(nan)

    def pack(self, cache_k_nope, cache_k_rope):
        return torch.cat([cache_k_nope, cache_k_rope], dim=-1)

    def get_key_buffer(self, layer_id):
        assert self._reading is not None, "upstream reads the host tier"
        return super().get_key_buffer(layer_id)


class Upstream(DeepseekSparseAttnBackend):
    """What EssDsaBackend takes from its base."""

    def __init__(self, model_runner):
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token
        self.device, self.device_capability, self.use_mha = "cpu", None, False
        self.dsa_prefill_impl = self.dsa_decode_impl = "flashmla_sparse"
        self.dsa_kv_cache_store_fp8, self.dsa_index_topk = False, TOPK
        self.use_fused_topk, self.dsa_topk_backend = True, DSATopKBackend.SGL_KERNEL
        self.in_upstream = []

    def init_forward_metadata(self, forward_batch):
        self.forward_metadata = metadata_of(len(forward_batch.seq_lens))

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        self.forward_metadata = metadata_of(len(forward_batch.seq_lens))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None,
                       k_rope=None, topk_indices=None):  # fmt: skip
        assert not save_kv_cache or self.use_mha
        self.in_upstream.append("extend")
        if self.use_mha:
            return q
        rows = self.token_to_kv_pool.translate_loc_to_hisparse_device(topk_indices)
        return self._attend(layer, q, q_rope, rows.to(torch.int32))

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None,
                       k_rope=None, topk_indices=None):  # fmt: skip
        assert not save_kv_cache
        self.in_upstream.append("decode")
        rows = self.hisparse_coordinator.swap_in_selected_pages(
            forward_batch.req_pool_indices, forward_batch.seq_lens, topk_indices, layer.layer_id
        )
        return self._attend(layer, q, q_rope, rows)

    def _attend(self, layer, q, q_rope, rows):
        q_all = torch.cat([q.view(-1, HEADS, NOPE), q_rope], dim=-1)
        kept = self.token_to_kv_pool.get_key_buffer(layer.layer_id).flatten(1)
        return sparse_mla_reference(q_all, kept, rows, layer.scaling)[0].float()


class Backend(EssDsaBackend, Upstream):
    """EssDsaBackend whose super() is Upstream."""


def metadata_of(rows: int) -> DSAMetadata:
    """Of a decode batch; page_table_1 numbers the queries, for the fake indexer."""
    counts = torch.arange(rows, dtype=torch.int32)
    edges = torch.arange(rows + 1, dtype=torch.int32)
    return DSAMetadata(
        page_size=64, cache_seqlens_int32=counts, max_seq_len_q=1, max_seq_len_k=SLOTS,
        cu_seqlens_q=edges, cu_seqlens_k=edges, page_table_1=counts[:, None],
        real_page_table=counts[:, None], dsa_cache_seqlens_int32=counts, dsa_cu_seqlens_q=edges,
        dsa_cu_seqlens_k=edges, dsa_extend_seq_lens_list=[1] * rows, dsa_seqlens_expanded=counts,
        paged_mqa_ctx_lens_2d=counts[:, None],
    )  # fmt: skip


class Run:
    """A server in small: requests, their slots, and one tier with every row."""

    def __init__(self, backend, seed=0):
        self.backend, self.random = backend, np.random.default_rng(seed)
        self.rows = torch.full((LAYERS, SLOTS, NOPE + ROPE), float("nan"))
        self.free = self.random.permutation(np.arange(PAGE, SLOTS)).tolist()
        self.slots: dict[int, list[int]] = {}
        self.layers = [
            SimpleNamespace(layer_id=i, tp_q_head_num=HEADS, v_head_dim=NOPE, head_dim=NOPE + ROPE,
                            scaling=SCALE, tp_k_head_num=1) for i in range(LAYERS)
        ]  # fmt: skip
        self.halves_seen = 0

    def finish(self, request):  # its slots are the next to be given away
        self.free += self.random.permutation(self.slots.pop(request)).tolist()

    def _batch(self, mode, new: dict[int, int], padding=0):
        prefix = [len(self.slots.setdefault(request, [])) for request in new]
        for request, tokens in new.items():
            self.slots[request] += [self.free.pop() for _ in range(tokens)]
            self.backend.req_to_token[request, : len(self.slots[request])] = torch.tensor(
                self.slots[request], dtype=torch.int32
            )
        loc = [s for r, n in new.items() for s in self.slots[r][len(self.slots[r]) - n :]]
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(new) + padding,
            out_cache_loc=torch.tensor(loc + [0] * padding),
            req_pool_indices=torch.tensor([*new, *[0] * padding]),
            seq_lens=torch.tensor([len(self.slots[r]) for r in new] + [1] * padding),
            extend_prefix_lens_cpu=prefix,
            extend_seq_lens_cpu=list(new.values()),
            contains_last_prefill_chunk=True,
        )

    def _pick(self, seen, own=None):
        """Top-k among the slots seen, in no order, -1 pads anywhere."""
        picks = self.random.permutation(seen)[: TOPK - 1].tolist()
        if own is not None and own not in picks and self.random.random() < 0.8:
            picks.append(own)
        picks += [-1] * (TOPK - len(picks))
        return self.random.permutation(picks)

    def _layer(self, batch, i, topk):
        """Inputs of attention, whose rows go into the one tier, and what must come out."""
        tokens = len(batch.out_cache_loc)
        k, k_rope = torch.randn(tokens, 1, NOPE), torch.randn(tokens, 1, ROPE)
        self.rows[i, batch.out_cache_loc] = torch.cat([k, k_rope], dim=-1)[:, 0]
        self.rows[i, :PAGE] = 0  # padding's: nobody looks at the answer
        q, q_rope = torch.randn(tokens, HEADS * NOPE), torch.randn(tokens, HEADS, ROPE)
        q_all = torch.cat([q.view(tokens, HEADS, NOPE), q_rope], dim=-1)
        wanted = sparse_mla_reference(q_all, self.rows[i], topk, SCALE)[0].float()
        given = {"q_rope": q_rope, "k_rope": k_rope, "topk_indices": topk}
        return (q, k, k, self.layers[i], batch), given, wanted

    def prefill(self, new: dict[int, int]):
        batch = self._batch(ForwardMode.EXTEND, new)
        self.backend.init_forward_metadata(batch)
        for i in range(LAYERS):
            topk = []
            for request, tokens in new.items():
                seen = self.slots[request]
                for end in range(len(seen) - tokens, len(seen)):
                    topk.append(self._pick(seen[: end + 1], seen[end]))
            topk = torch.from_numpy(np.array(topk)).int()
            args, given, wanted = self._layer(batch, i, topk)
            out = self.backend.forward_extend(*args, **given)
            torch.testing.assert_close(out, wanted, **TOLERANCE)
            topk.fill_(0)  # a prefill graph's next layer has its own in the same buffer

    def decode(self, requests, padding=0, shared=(), begin=True, unpadded=0):
        """One step; layers in `shared` take the top-k of the one before, without an indexer.

        unpadded: rows of the padding that the indexer's metadata does not have
        """
        batch = self._batch(ForwardMode.DECODE, dict.fromkeys(requests, 1), padding)
        if begin:
            self.backend.init_forward_metadata(batch)
        self.backend.forward_metadata = metadata_of(len(batch.seq_lens) - unpadded)
        real = len(requests)
        for i in range(LAYERS):
            if i not in shared:
                rows = [self._pick(self.slots[r], self.slots[r][-1]) for r in requests]
                rows += [np.array([0] + [-1] * (TOPK - 1))] * padding
                topk = torch.from_numpy(np.array(rows)).int()
            args, given, wanted = self._layer(batch, i, topk)
            if i not in shared:
                given["topk_indices"] = self._select(batch, i, topk)
            out = self.backend.forward_decode(*args, **given)
            assert out.shape == (len(topk), HEADS, NOPE) and out.dtype == torch.float32
            torch.testing.assert_close(out[:real], wanted[:real], **TOLERANCE)
        assert not self.backend.step.layer and not self.backend.token_to_kv_pool._reading

    def _select(self, batch, i, topk):
        """The indexer, as the hook calls it: the metadata's rows say which queries it gets."""
        q_fp8 = torch.arange(len(topk))[:, None, None].expand(-1, 2, 3).contiguous()

        def get_topk(indexer, forward_batch, layer_id, q, weights, metadata):
            assert not metadata.force_unfused_topk
            assert metadata.topk_transform_method is TopkTransformMethod.PAGED
            assert weights.is_contiguous() and torch.equal(weights[:, 0], q[:, 0, :1])
            queries = metadata.get_page_table_1()[:, 0].long()
            assert queries.tolist() == q[: len(queries), 0, 0].tolist()
            self.halves_seen += len(q) < len(topk)
            return topk[q[:, 0, 0]]

        metadata = self.backend.get_indexer_metadata(i, batch)
        weights = q_fp8[:, :, :1].contiguous()
        return cuda_hooks.topk_selected(get_topk, None, batch, i, q_fp8, weights, metadata)


@pytest.fixture
def late(monkeypatch):
    launches_are_late(monkeypatch.setattr)


@pytest.fixture
def build(monkeypatch):
    def backend(overlap="da", hot_rows=HOT_ROWS, staging_rows=SLOTS, max_queries=6, **options):
        monkeypatch.setattr(pool_cuda, "PLAN_QUERIES_CUDA", max_queries)
        for name, value in EssConfig(enabled=True, overlap=overlap, **options).to_env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(backend_cuda, "active", None)
        monkeypatch.setattr("sglang_ess.tiers.warmup_window.WARMUP_QUERIES", WARMUP_QUERIES)
        torch.manual_seed(hot_rows)
        return Backend(
            SimpleNamespace(
                token_to_kv_pool=Pool(hot_rows, staging_rows),
                req_to_token=torch.zeros(12, SLOTS, dtype=torch.int32),
                model_config=SimpleNamespace(hf_config=SimpleNamespace()),
            )
        )

    return backend


def serve(backend, seed=0):
    """Prompts, decode, an end and a reuse of its slots, a prefix that goes on."""
    run = Run(backend, seed)
    run.prefill({1: 9, 2: 5})
    run.decode([1, 2])
    run.finish(1)
    run.prefill({3: 6, 2: 2})
    run.decode([2, 3], padding=1)
    run.decode([2, 3], shared=(1,))
    return run


@pytest.mark.parametrize("overlap", ["off", "da", "dba"])
def test_requests_come_and_go(build, late, overlap):
    backend = build(overlap)
    run = serve(backend)
    assert (run.halves_seen > 0) == (overlap == "dba")
    assert ("decode" in backend.in_upstream) == (overlap == "off")
    assert set(backend._kernels) == (set() if overlap == "off" else {False, True})
    for i, cache in enumerate(backend.token_to_kv_pool.hot_caches):
        counters = cache.counters
        assert 0 < counters["misses"] < counters["lookups"] and counters["short"] == 0
        cache.check_rows(np.arange(HOT_ROWS), f"layer {i}", first_slot=PAGE)


def test_without_a_stream(build):
    serve(build("dba"), seed=1)


@pytest.mark.parametrize(
    ("overlap", "hot_rows", "max_queries"),
    [("dba", 16, 6), ("off", 12, 6), ("da", 5, 6), ("dba", HOT_ROWS, 1)],
    ids=["no room to reserve", "two plans", "by columns", "queries of a plan"],
)
def test_a_tier_that_is_too_small_is_slower_never_wrong(
    build, late, overlap, hot_rows, max_queries
):
    backend = build(overlap, hot_rows=hot_rows, max_queries=max_queries, warmup="off")
    serve(backend, seed=3)
    for cache in backend.token_to_kv_pool.hot_caches:
        assert cache.counters["short"] == 0


def test_prompts_in_several_staging_groups_and_warmup(build, late):
    backend = build("da", staging_rows=20)
    run = Run(backend)
    run.prefill({1: 12, 2: 4, 3: 6})
    run.prefill({1: 5, 2: 1})
    assert backend.in_upstream == ["extend"] * LAYERS * (2 + 2)
    assert backend.step.warm_spans == [(2, 5), (5, 6)]
    run.decode([1, 2, 3])
    assert (
        backend.token_to_kv_pool.tier.parts[0][1].state.slot_row[:, :PAGE] < 0
    ).all()  # padding's


def test_a_chunk_in_the_middle_of_a_prompt_warms_nothing(build):
    backend = build("off")
    batch = Run(backend)._batch(ForwardMode.EXTEND, {1: 40})
    for last, spans in ((False, []), (True, [(40 - WARMUP_QUERIES, 40)])):
        batch.contains_last_prefill_chunk = last
        backend.init_forward_metadata(batch)
        assert backend.step.warm_spans == spans


def test_dense_mha_of_a_prompt_takes_no_staging(build):
    backend = build("da")
    backend.use_mha = True
    q = torch.randn(3, 5)
    assert backend.forward_extend(q, None, None, Run(backend).layers[0], None) is q


def test_an_empty_batch_and_an_idle_one(build):
    backend = build("da")
    run = Run(backend)
    batch = run._batch(ForwardMode.DECODE, {})
    backend.init_forward_metadata(batch)
    q, k, topk = torch.zeros(0, HEADS * NOPE), torch.zeros(0, 1, NOPE), torch.zeros(0, TOPK).int()
    assert run._select(batch, 0, topk).shape == (0, TOPK)
    out = backend.forward_decode(
        q, k, k, run.layers[0], batch, q_rope=torch.zeros(0, HEADS, ROPE), topk_indices=topk
    )
    assert out.shape == (0, HEADS, NOPE)
    steps = backend._steps
    backend.init_forward_metadata(run._batch(ForwardMode.IDLE, {}))
    assert backend._steps == steps and run._select(batch, 0, topk).shape == (0, TOPK)


def test_padding_that_the_metadata_lacks_is_not_cut(build, late):
    backend = build("dba")
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    run.decode([1, 2], padding=2)
    assert run.halves_seen == 2 * LAYERS
    run.decode([1, 2], padding=2, unpadded=2)
    assert run.halves_seen == 2 * LAYERS


# --- faults: each must show ---


def no_reserve(monkeypatch):
    monkeypatch.setattr(
        DeviceHotCache, "reserve", lambda cache, slots, _: torch.full_like(slots, -1)
    )


def claim_after_write(monkeypatch):
    reserve, write, waiting = TwoTierDecode.reserve, TwoTierDecode.write, []

    def later(decode, *args):
        waiting.append(args)
        return True

    def write_first(decode, *args):
        write(decode, *args)
        while waiting:
            reserve(decode, *waiting.pop())

    monkeypatch.setattr(TwoTierDecode, "reserve", later)
    monkeypatch.setattr(TwoTierDecode, "write", write_first)


def no_invalidate(monkeypatch):
    monkeypatch.setattr(DeviceHotCache, "invalidate", lambda cache, slots: None)


def written_row_is_early(monkeypatch):
    plan = DeviceHotCache.plan
    monkeypatch.setattr(
        DeviceHotCache, "plan", lambda *args, written=None, **given: plan(*args, **given)
    )


def no_wait(monkeypatch):
    monkeypatch.setattr(TwoTierDecode, "wait", lambda *_: None)


@pytest.mark.parametrize(
    ("fault", "overlap", "hot_rows", "needs_late"),
    [
        (no_reserve, "off", HOT_ROWS, False),
        (no_reserve, "da", HOT_ROWS, False),
        (claim_after_write, "da", HOT_ROWS, False),
        (no_invalidate, "da", 16, False),
        (written_row_is_early, "da", HOT_ROWS, True),
        (written_row_is_early, "dba", HOT_ROWS, True),
        (no_wait, "da", HOT_ROWS, True),
        (no_wait, "off", HOT_ROWS, True),
    ],
)
def test_a_fault_is_noticed(build, monkeypatch, fault, overlap, hot_rows, needs_late):
    if needs_late:
        launches_are_late(monkeypatch.setattr)
    fault(monkeypatch)
    # Out of bounds: rows of a plan that has not run yet.
    with pytest.raises((AssertionError, IndexError), match="not close|out of bounds"):
        serve(build(overlap, hot_rows=hot_rows, warmup="off"))


# --- a captured step ---


class NothingIsAsked(TorchFunctionMode):
    """The device is not asked for a value; kernels under the interpreter may be."""

    HOST = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "masked_select"}
    in_kernel = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        masks = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        assert self.in_kernel or not (name in self.HOST or masks), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overlap", ["da", "dba"])
def test_a_decode_step_asks_the_device_nothing(build, monkeypatch, overlap):
    backend, mode = build(overlap), NothingIsAsked()
    run = Run(backend)
    run.prefill({1: 12, 2: 12, 3: 12})
    run_kernel = interpreter.GridExecutor.__call__

    def launch(*args, **kwargs):
        mode.in_kernel = True
        run_kernel(*args, **kwargs)
        mode.in_kernel = False

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    batch = run._batch(ForwardMode.DECODE, {1: 1, 2: 1, 3: 1})
    backend.init_forward_metadata(batch)
    topk = torch.from_numpy(np.array([run._pick(run.slots[r]) for r in (1, 2, 3)])).int()
    monkeypatch.setattr(run, "_select", lambda *_: backend.select(
        lambda q, weights, metadata: topk[q], batch, i, torch.arange(3), torch.arange(3),
        backend.get_indexer_metadata(0, batch)))  # fmt: skip
    for i in range(LAYERS):
        args, given, wanted = run._layer(batch, i, topk)
        with mode:
            given["topk_indices"] = run._select()
            out = backend.forward_decode(*args, **given)
        torch.testing.assert_close(out, wanted, **TOLERANCE)


def test_a_graph_has_the_order_it_is_captured_for(build, monkeypatch):
    backend = build("off")
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    batch = run._batch(ForwardMode.DECODE, {})
    monkeypatch.setattr(capture_mode, "_capture_attention_variant", "dba")
    steps = backend._steps
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert backend.step.mode is Mode.DBA and backend.chosen is Mode.OFF
    assert backend._steps == steps
    cut, calls = half_batch.slice_metadata, []
    monkeypatch.setattr(
        half_batch, "slice_metadata", lambda *args: calls.append(args) or cut(*args)
    )
    run.decode([1, 2], begin=False)  # the warm-up
    run.decode([1, 2], begin=False)  # the capture: what it reads it must have made
    assert len(calls) == 4 and run.halves_seen == 4 * LAYERS
    backend.init_forward_metadata_out_graph(batch)  # a replay
    assert backend._steps == steps + 1


def test_a_step_takes_the_mode_chosen_in_the_step_before(build, monkeypatch):
    monkeypatch.setattr(backend_cuda, "MIRROR_STEPS", 2)
    backend = build("off", warmup="off")
    table = CostTable((1, 8), (0, 8), {mode: ((1.0,) * 2,) * 2 for mode in Mode}, 0.0, 0.0, "t")
    backend.policy = OverlapPolicy(LAYERS, table)
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    table.us[Mode.DBA] = ((0.5, 0.1),) * 2
    modes = []
    for _ in range(3):
        run.decode([1, 2])
        modes.append(backend.step.mode)
    assert modes == [Mode.OFF, Mode.OFF, Mode.DBA]


def test_the_canary_stops_a_hot_row_that_differs(build):
    backend = build("da", canary_rate=1.0)
    run = Run(backend)
    run.prefill({1: 30})
    run.decode([1])
    for rows in backend.token_to_kv_pool.tier.rows:
        rows += 1
    with pytest.raises(RowCorruption, match="hot row must equal its host row"):
        run.decode([1])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"overlap": "da"}, "Add --ess-overlap off, or"),
        ({"overlap": "da", "hot_rows": TOPK - 2}, "Add a larger hot tier"),
        ({"overlap": "off", "hot_rows": TOPK - 2}, "Add a larger hot tier"),
    ],
)
def test_a_sink_is_refused_with_advice_by_what_split_the_attention(build, options, advice):
    backend = build(**options)
    run = Run(backend)
    run.prefill({1: 9})
    backend.forward_decode = partial(backend.forward_decode, attn_sink=torch.zeros(HEADS))
    with pytest.raises(RuntimeError, match=f"no sink: got one. {advice}"):
        run.decode([1])
