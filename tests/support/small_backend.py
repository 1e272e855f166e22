"""EssDsaBackend in small, without a GPU, beside one tier that holds every row as float32.

SGLang's own attention is stood in for by Upstream, which reads exactly what upstream would: the
pool's get_key_buffer at the rows that the coordinator or the pool names. The tiers, staging, the
orders and the kernels are the real ones.
"""

from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend, DSAMetadata
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from ess_kernels.sparse_mla import sparse_mla_reference
from sglang_ess.attention import backend_cuda
from sglang_ess.attention.backend_cuda import EssDsaBackend
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import pool_cuda
from sglang_ess.platforms import cuda as cuda_hooks
from sglang_ess.tiers import HostTier
from sglang_ess.tiers.index_groups import IndexGroups

HEADS, SCALE, SLOTS, PAGE, TOPK = 4, 0.07, 120, 4, 8
HOT_ROWS, WARMUP_QUERIES = 40, 3
NOPE, ROPE = 512, 64
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order


class Pool(pool_cuda.CudaEssTokenToKVPool):
    """The pool's tiers over float32 rows, without SGLang's allocation.

    host_tier: HostTier with these layers' rows; default: this process's own
    """

    def __init__(self, sizes, hot_rows, staging_rows, queries=1, host_tier=None):
        self.groups = IndexGroups(sizes)
        layers = self.groups.layers
        self.device, self.start_layer, self.layer_num, self.page_size = "cpu", 0, layers, PAGE
        self.dtype = self.store_dtype = torch.float32
        self.kv_cache_dim, self.dsa_kv_cache_store_fp8 = NOPE + ROPE, False
        nan = float("nan")  # reading a row that nobody filled must show
        self.host_tier = host_tier or HostTier(layers, SLOTS, (1, NOPE + ROPE), torch.float32)
        self.kv_buffer = self.host_tier.rows
        for rows in self.kv_buffer if self.host_tier.group.is_writer else []:
            rows.fill_(nan)
        shape = SimpleNamespace(topk=TOPK, queries=queries)
        rows = {"hot_rows": hot_rows, "staging_rows": staging_rows}
        self.capacity = SimpleNamespace(geometry=shape, **rows)
        self._create_tiers()
        for rows in self.tier.rows:
            rows.fill_(nan)

    def get_key_buffer(self, layer_id):
        assert self._reading is not None, "upstream reads the host tier"
        return super().get_key_buffer(layer_id)


class Upstream(DeepseekSparseAttnBackend):
    """What EssDsaBackend takes from its base.

    coming: call the coordinator by keyword, as SGLang's coming protocol does
    """

    coming = False

    def __init__(self, model_runner):
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token
        self.device, self.device_capability, self.use_mha = "cpu", None, False
        self.dsa_prefill_impl = self.dsa_decode_impl = "flashmla_sparse"
        self.dsa_kv_cache_store_fp8, self.dsa_index_topk = False, TOPK
        self.num_q_heads = HEADS
        self.speculative_num_draft_tokens = model_runner.drafts
        self.use_fused_topk, self.dsa_topk_backend = True, DSATopKBackend.SGL_KERNEL
        self.in_upstream = []

    def init_forward_metadata(self, forward_batch):
        lists = self._lists(forward_batch.forward_mode)
        self.forward_metadata = metadata_of(len(forward_batch.seq_lens) * lists, lists)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        Upstream.init_forward_metadata(self, forward_batch)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None,
                       k_rope=None, topk_indices=None):  # fmt: skip
        assert not save_kv_cache or self.use_mha
        verifies = forward_batch is not None and forward_batch.forward_mode.is_target_verify()
        self.in_upstream.append("verify" if verifies else "extend")
        if self.use_mha:
            return q
        rows = self._pad_topk_indices(topk_indices, len(q))
        if self.hisparse_coordinator is not None:
            if verifies:
                requests, lists = len(forward_batch.seq_lens), self.speculative_num_draft_tokens
                ask, grouped = self.hisparse_coordinator.swap_in_selected_pages, (requests, lists)
                lengths = self.forward_metadata.dsa_seqlens_expanded
                rows = ask(
                    forward_batch.req_pool_indices, lengths, rows.view(*grouped, -1), layer.layer_id
                ).view(requests * lists, -1)
            else:
                rows = self.token_to_kv_pool.translate_loc_to_hisparse_device(rows)
        return self._attend(layer, q, q_rope, rows.to(torch.int32))

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None,
                       k_rope=None, topk_indices=None):  # fmt: skip
        assert not save_kv_cache
        self.in_upstream.append("decode")
        requests, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        ask = self.hisparse_coordinator.swap_in_selected_pages
        if self.coming:
            rows = ask(
                req_pool_indices=requests, compressed_seq_lens=lengths, top_k_result=topk_indices,
                layer_id=layer.layer_id,
            )  # fmt: skip
        else:
            rows = ask(requests, lengths, topk_indices, layer.layer_id)
        return self._attend(layer, q, q_rope, rows)

    def _attend(self, layer, q, q_rope, rows):
        q_all = torch.cat([q.view(-1, HEADS, NOPE), q_rope], dim=-1)
        kept = self.token_to_kv_pool.get_key_buffer(layer.layer_id).flatten(1)
        return sparse_mla_reference(q_all, kept, rows, layer.scaling)[0].float()


class Backend(EssDsaBackend, Upstream):
    """EssDsaBackend whose super() is Upstream."""


def metadata_of(rows: int, lists: int = 1) -> DSAMetadata:
    """Of a decode batch with `lists` queries a request, as SGLang makes it for an eager step.

    page_table_1 numbers the queries, for the fake indexer
    """
    counts, requests = torch.arange(rows, dtype=torch.int32), rows // lists
    edges = torch.arange(rows + 1, dtype=torch.int32)
    lengths = counts[:requests]
    return DSAMetadata(
        page_size=64, cache_seqlens_int32=lengths, max_seq_len_q=1, max_seq_len_k=SLOTS,
        cu_seqlens_q=edges, cu_seqlens_k=edges[: requests + 1], page_table_1=counts[:, None],
        real_page_table=counts[:, None], dsa_cache_seqlens_int32=counts, dsa_cu_seqlens_q=edges,
        dsa_cu_seqlens_k=edges, dsa_extend_seq_lens_list=[lists] * requests,
        dsa_seqlens_expanded=counts, paged_mqa_ctx_lens_2d=counts[:, None],
    )  # fmt: skip


def builder(monkeypatch):
    """build(overlap, ...): a Backend over a new pool, whose index groups have `sizes` layers.

    drafts: --speculative-num-draft-tokens; 0 without speculation
    parallel: SGLang's ParallelContext, or what stands for it; options: of EssConfig
    host_tier: as Pool
    """
    alone = SimpleNamespace(tp_size=1, attn_dp_enabled=False)

    def build(overlap="da", hot_rows=HOT_ROWS, staging_rows=SLOTS, max_queries=6, sizes=(1, 1),
              parallel=alone, drafts=0, host_tier=None, **options):  # fmt: skip
        monkeypatch.setattr(pool_cuda, "PLAN_QUERIES_CUDA", max_queries)
        for name, value in EssConfig(enabled=True, overlap=overlap, **options).to_env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(backend_cuda, "active", None)
        monkeypatch.setattr(backend_cuda, "get_parallel", lambda: parallel)
        monkeypatch.setattr("sglang_ess.tiers.warmup_window.WARMUP_QUERIES", WARMUP_QUERIES)
        torch.manual_seed(hot_rows)
        return Backend(
            SimpleNamespace(
                token_to_kv_pool=Pool(sizes, hot_rows, staging_rows, drafts or 1, host_tier),
                req_to_token=torch.zeros(12, SLOTS, dtype=torch.int32),
                model_config=SimpleNamespace(hf_config=SimpleNamespace(), scaling=SCALE),
                drafts=drafts,
            )
        )

    return build


class Run:
    """A server in small: requests, their slots, and one tier with every row."""

    def __init__(self, backend, seed=0):
        self.backend, self.random = backend, np.random.default_rng(seed)
        self.places = backend.token_to_kv_pool.groups.places
        self.rows = torch.full((len(self.places), SLOTS, NOPE + ROPE), float("nan"))
        self.free = self.random.permutation(np.arange(PAGE, SLOTS)).tolist()
        self.slots: dict[int, list[int]] = {}
        self.ahead: dict[int, list[int]] = {}  # slots behind a request's tokens, for drafts
        self.layers = [
            SimpleNamespace(layer_id=i, tp_q_head_num=HEADS, v_head_dim=NOPE, head_dim=NOPE + ROPE,
                            scaling=SCALE, tp_k_head_num=1) for i in range(len(self.places))
        ]  # fmt: skip
        self.halves_seen = 0

    def finish(self, request):  # its slots are the next to be given away
        slots = self.slots.pop(request) + self.ahead.pop(request, [])
        self.free += self.random.permutation(slots).tolist()

    def batch(self, mode, new: dict[int, int], padding=0):
        prefix = [len(self.slots.setdefault(request, [])) for request in new]
        for request, tokens in new.items():
            self.slots[request] += [self.free.pop() for _ in range(tokens)]
            self.backend.req_to_token[request, : len(self.slots[request])] = torch.tensor(
                self.slots[request], dtype=torch.int32
            )
        loc = [s for r, n in new.items() for s in self.slots[r][len(self.slots[r]) - n :]]
        seq_lens = torch.tensor([len(self.slots[r]) for r in new] + [1] * padding)
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(new) + padding,
            out_cache_loc=torch.tensor(loc + [0] * padding),
            req_pool_indices=torch.tensor([*new, *[0] * padding]),
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.clone(),
            extend_prefix_lens_cpu=prefix,
            extend_seq_lens_cpu=list(new.values()),
            contains_last_prefill_chunk=True,
        )

    def pick(self, seen, own=None):
        """Top-k among the slots seen, in no order, -1 pads anywhere."""
        picks = self.random.permutation(seen)[: TOPK - 1].tolist()
        if own is not None and own not in picks and self.random.random() < 0.8:
            picks.append(own)
        picks += [-1] * (TOPK - len(picks))
        return self.random.permutation(picks)

    def verify_batch(self, requests, padding=0, unpadded=0):
        """A verification of drafts, whose rows go to the slots behind the requests' tokens.

        padding: requests; unpadded: tokens past the last request, which no request has
        """
        lists, loc = self.backend.speculative_num_draft_tokens, []
        for request in requests:
            ahead = self.ahead.setdefault(request, [])
            ahead += [self.free.pop() for _ in range(lists - len(ahead))]
            slots = self.slots[request] + ahead
            self.backend.req_to_token[request, : len(slots)] = torch.tensor(slots).int()
            loc += ahead[:lists]
        lengths = torch.tensor([len(self.slots[r]) for r in requests] + [1] * padding)
        return SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(lengths),
            out_cache_loc=torch.tensor(loc + [0] * (padding * lists + unpadded)),
            req_pool_indices=torch.tensor([*requests, *[0] * padding]),
            seq_lens=lengths,
            seq_lens_cpu=None,  # acceptance is still on its way
        )

    def layer(self, batch, i, topk):
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
        batch = self.batch(ForwardMode.EXTEND, new)
        self.backend.init_forward_metadata(batch)
        for i, (_, position) in enumerate(self.places):
            if position == 0:
                rows = [
                    self.pick(self.slots[request][: end + 1], self.slots[request][end])
                    for request, tokens in new.items()
                    for end in range(len(self.slots[request]) - tokens, len(self.slots[request]))
                ]
            topk = torch.from_numpy(np.array(rows)).int()
            args, given, wanted = self.layer(batch, i, topk)
            out = self.backend.forward_extend(*args, **given)
            torch.testing.assert_close(out, wanted, **TOLERANCE)
            topk.fill_(0)  # a prefill graph's next layer has its own in the same buffer

    def begin(self, batch):
        """What SGLang calls before an eager decode step."""
        self.backend.init_forward_metadata(batch)

    def decode(self, requests, padding=0, shared=(), begin=True, unpadded=0):
        """One step. Groups in `shared` take the top-k of the one before, without an indexer.

        unpadded: rows of the padding that the indexer's metadata does not have
        """
        batch = self.batch(ForwardMode.DECODE, dict.fromkeys(requests, 1), padding)
        if begin:
            self.begin(batch)
        self.backend.forward_metadata = metadata_of(len(batch.seq_lens) - unpadded)
        seen = [self.slots[r] for r in requests]
        self.step(batch, seen, shared, self.backend.forward_decode)

    def verify(self, accepted, padding=0, begin=True, unpadded=0, exact=False):
        """One verification of drafts. accepted: {request: tokens that it keeps, 1 or more}.

        padding, unpadded: as verify_batch; exact: attention gives the one tier's very bits
        """
        lists = self.backend.speculative_num_draft_tokens
        batch = self.verify_batch(accepted, padding, unpadded)
        if begin:
            self.begin(batch)
        seen = [
            self.slots[r] + self.ahead[r][: i + 1] for r in accepted for i in range(lists)
        ]  # fmt: skip
        self.step(batch, seen, (), self.backend.forward_extend, exact)
        for request, tokens in accepted.items():
            self.slots[request] += self.ahead[request][:tokens]
            del self.ahead[request][:tokens]

    def step(self, batch, seen, shared, forward, exact=False):
        """All layers of a step whose real queries see these slots, the last one their own."""
        real, padding = len(seen), len(batch.out_cache_loc) - len(seen)
        for i, (group, position) in enumerate(self.places):
            selects = position == 0 and group not in shared
            if selects:
                rows = [self.pick(slots, slots[-1]) for slots in seen]
                rows += [np.array([0] + [-1] * (TOPK - 1))] * padding
                topk = torch.from_numpy(np.array(rows)).int()
            args, given, wanted = self.layer(batch, i, topk)
            if selects:
                given["topk_indices"] = topk = self.select(batch, i, topk)
            out = forward(*args, **given)
            assert out.shape == (len(topk), HEADS, NOPE) and out.dtype == torch.float32
            if exact:
                assert torch.equal(out[:real], wanted[:real]), "not close: other bits"
            torch.testing.assert_close(out[:real], wanted[:real], **TOLERANCE)
        assert not self.backend.step.layer and not self.backend.token_to_kv_pool._reading

    def select(self, batch, i, topk):
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


def serve(backend, seed=0, tokens=(9, 5)):
    """Prompts of these lengths, decode, an end and a reuse of its slots, a prefix that goes on."""
    run = Run(backend, seed)
    run.prefill(dict(enumerate(tokens, 1)))
    run.decode([1, 2])
    run.finish(1)
    run.prefill({3: 6, 2: 2})
    run.decode([2, 3], padding=1)
    run.decode([2, 3], shared=(1,))
    return run


def serve_drafts(backend, seed=0, exact=False):
    """As serve(), with verifications that keep all, some or one of their drafts.

    Two requests end with rejected rows behind them, and others get their slots.
    """
    run = Run(backend, seed)
    most = backend.speculative_num_draft_tokens
    run.prefill({1: 9, 2: 5})
    for first, second in ((1, most), (most, 1), (1, 2), (2, 1)):
        run.verify({1: first, 2: second}, exact=exact)
    run.finish(1)
    run.prefill({3: 6})
    run.verify({2: 1, 3: 1}, padding=1, exact=exact)
    run.verify({2: most, 3: 1}, exact=exact)
    run.finish(2)
    run.verify({3: 2}, exact=exact)
    run.prefill({4: 7})
    run.verify({4: 1, 3: most}, unpadded=1, exact=exact)
    return run
