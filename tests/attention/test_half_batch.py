"""slice_metadata on SGLang's own metadata: it cuts all that the indexer reads by query."""

import ast
import dataclasses
import inspect
import textwrap

import pytest
import torch
from sglang.kernels.ops.attention.dsv4 import topk as dsv4_topk
from sglang.srt.layers.attention.dsa import dsa_indexer, dsa_topk_backend
from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DSAMetadata

from sglang_ess.attention import half_batch

BATCH = 5
# Fields that slice_metadata cuts by name, besides PER_QUERY.
CUT = {
    "dsa_extend_seq_lens_list",
    "cu_seqlens_q",
    "topk_v2_plan",
    "paged_mqa_schedule_metadata",
    "paged_mqa_ctx_lens_2d",
}
# The same for every query of a batch.
SHARED = {"page_size"}
# Of a prompt's tokens: None in decode, or (cu_seqlens_k) read with row_starts only.
PREFILL = {"topk_indices_offset", "token_to_batch_idx", "cu_seqlens_k"}


@pytest.fixture
def plans(monkeypatch):
    """The lengths that plan_topk_v2 is asked for; its plan is their sum."""
    asked = []

    def plan_topk_v2(seq_lens, static_threshold=-1, *, out=None):
        asked.append(seq_lens.clone())
        return seq_lens.new_full((len(seq_lens) + 1, 2), int(seq_lens.sum()))

    monkeypatch.setattr(dsv4_topk, "plan_topk_v2", plan_topk_v2)
    return asked


def metadata(batch=BATCH, **changes) -> DSAIndexerMetadata:
    """Of a decode batch: query i has length 100 + i and pages 10 i, 10 i + 1, ..."""
    lengths = 100 + torch.arange(batch, dtype=torch.int32)
    pages = 10 * torch.arange(batch, dtype=torch.int32)[:, None] + torch.arange(
        4, dtype=torch.int32
    )
    edges = torch.arange(batch + 1, dtype=torch.int32)
    whole = DSAMetadata(
        page_size=64,
        cache_seqlens_int32=lengths,
        max_seq_len_q=1,
        max_seq_len_k=256,
        cu_seqlens_q=edges,
        cu_seqlens_k=edges * 100,
        page_table_1=pages.repeat_interleave(2, 1),
        real_page_table=pages,
        dsa_cache_seqlens_int32=lengths - 50,
        dsa_cu_seqlens_q=edges,
        dsa_cu_seqlens_k=edges,
        dsa_extend_seq_lens_list=[1] * batch,
        dsa_seqlens_expanded=lengths + 1,
        paged_mqa_schedule_metadata=torch.zeros(7),
        paged_mqa_ctx_lens_2d=lengths[:, None],
        topk_v2_plan=torch.zeros(batch + 1, 2, dtype=torch.int32),
        indexer_seq_lens=lengths.long(),
    )
    whole = dataclasses.replace(whole, **changes)
    return DSAIndexerMetadata(
        attn_metadata=whole,
        topk_transform_method=TopkTransformMethod.PAGED,
        topk_backend=DSATopKBackend.SGL_KERNEL,
        paged_mqa_schedule_metadata=whole.paged_mqa_schedule_metadata,
        paged_mqa_ctx_lens_2d=whole.paged_mqa_ctx_lens_2d,
    )


@pytest.mark.parametrize("queries", [slice(0, 2), slice(2, 5)], ids=["first", "second"])
def test_a_half_is_the_metadata_of_its_queries_alone(plans, queries):
    whole, count = metadata(), queries.stop - queries.start
    half = half_batch.slice_metadata(whole, queries)
    lengths = whole.get_seqlens_int32()[queries]
    assert torch.equal(half.get_seqlens_int32(), lengths)
    assert torch.equal(half.get_seqlens_expanded(), lengths + 1)
    assert torch.equal(half.get_page_table_64(), whole.get_page_table_64()[queries])
    assert torch.equal(half.get_logical_page_table(), whole.get_page_table_64()[queries])
    assert torch.equal(half.get_page_table_1(), whole.get_page_table_1()[queries])
    assert torch.equal(half.get_indexer_seq_len(), lengths.long())
    assert half.get_dsa_extend_len_cpu() == [1] * count
    assert half.attn_metadata.cu_seqlens_q.tolist() == list(range(count + 1))
    assert torch.equal(half.attn_metadata.dsa_cache_seqlens_int32, lengths - 50)
    assert half.topk_transform_method is TopkTransformMethod.PAGED
    assert half.topk_backend is DSATopKBackend.SGL_KERNEL


def test_the_whole_batchs_schedule_is_left_out_and_its_lengths_are_cut(plans):
    half = half_batch.slice_metadata(metadata(), slice(2, 5))
    for part in (half, half.attn_metadata):
        assert part.paged_mqa_schedule_metadata is None
    assert half.paged_mqa_ctx_lens_2d.tolist() == [[102], [103], [104]]
    assert half.paged_mqa_ctx_lens_2d.is_contiguous()


def test_the_topk_plan_is_made_anew_for_the_lengths_of_the_half(plans):
    half = half_batch.slice_metadata(metadata(), slice(2, 5))
    assert [lengths.tolist() for lengths in plans] == [[103, 104, 105]]
    assert half.attn_metadata.topk_v2_plan.tolist() == [[312, 312]] * 4
    assert (
        half_batch.slice_metadata(
            metadata(topk_v2_plan=None), slice(2, 5)
        ).attn_metadata.topk_v2_plan
        is None
    )
    assert len(plans) == 1


def test_the_whole_stays_as_it_was_and_the_parts_share_its_memory(plans):
    whole = metadata()
    before = {f.name: getattr(whole.attn_metadata, f.name) for f in dataclasses.fields(DSAMetadata)}
    half = half_batch.slice_metadata(whole, slice(2, 5))
    for name, value in before.items():
        assert getattr(whole.attn_metadata, name) is value, name
    whole.attn_metadata.cache_seqlens_int32.add_(1)  # as a graph's metadata is refreshed
    assert half.get_seqlens_int32().tolist() == [103, 104, 105]


def test_a_dropped_table_stays_dropped(plans):
    half = half_batch.slice_metadata(
        metadata(page_table_1=None, indexer_seq_lens=None), slice(0, 2)
    )
    assert half.get_page_table_1() is None and half.get_indexer_seq_len() is None


def test_queries_without_metadata_cannot_be_cut(plans):
    assert half_batch.slice_metadata(metadata(batch=3), slice(2, 4)) is None
    assert half_batch.slice_metadata(metadata(batch=3), slice(0, 3)) is not None


def test_every_field_that_is_cut_is_one_of_sglangs():
    names = {field.name for field in dataclasses.fields(DSAMetadata)}
    assert names >= set(half_batch.PER_QUERY + half_batch.PER_REQUEST) | CUT | SHARED | PREFILL


# --- several queries a request ------------------------------------------------------------

LISTS = 3


def verify_metadata(captured: bool, native: bool, requests=4) -> DSAIndexerMetadata:
    """Of a verification of drafts, as SGLang makes it: query i of request r sees 100 r + i + 1.

    captured: for a CUDA graph, where each query is a prompt of one token
    native: lengths as DeepGEMM takes them on sm_100, a row for each request
    """
    whole = metadata(requests * LISTS)
    lengths = (100 * torch.arange(requests)[:, None] + torch.arange(1, LISTS + 1)).int()
    totals, flat = lengths[:, -1].contiguous(), lengths.view(-1)
    context = totals[:, None].expand(-1, LISTS).contiguous() if native else flat[:, None]
    changes = dict(
        cache_seqlens_int32=totals,
        dsa_seqlens_expanded=flat,
        dsa_cache_seqlens_int32=flat,
        dsa_extend_seq_lens_list=[1] * len(flat) if captured else [LISTS] * requests,
        indexer_seq_lens=None if captured else totals.long() - LISTS,
        topk_v2_plan=torch.zeros(len(flat) + 1, 2, dtype=torch.int32),
    )
    attn = dataclasses.replace(whole.attn_metadata, **changes)
    return dataclasses.replace(whole, attn_metadata=attn, paged_mqa_ctx_lens_2d=context)


@pytest.mark.parametrize("native", [False, True], ids=["a row a query", "a row a request"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("requests", [slice(0, 1), slice(1, 4)], ids=["first", "second"])
def test_a_half_of_a_verification_has_whole_requests(plans, captured, native, requests):
    whole = verify_metadata(captured, native)
    queries = slice(requests.start * LISTS, requests.stop * LISTS)
    half = half_batch.slice_metadata(whole, queries, LISTS)
    count = requests.stop - requests.start
    assert torch.equal(half.get_seqlens_int32(), whole.get_seqlens_int32()[requests])
    assert torch.equal(half.get_seqlens_expanded(), whole.get_seqlens_expanded()[queries])
    assert torch.equal(half.get_page_table_64(), whole.get_page_table_64()[queries])
    # The indexer divides their sum by the requests, and takes the native path at this shape.
    assert sum(half.get_dsa_extend_len_cpu()) == count * LISTS
    shape = (count, LISTS) if native else (count * LISTS, 1)
    assert half.paged_mqa_ctx_lens_2d.shape == shape
    rows = requests if native else queries
    assert torch.equal(half.paged_mqa_ctx_lens_2d, whole.paged_mqa_ctx_lens_2d[rows])
    assert [len(lengths) for lengths in plans] == [count * LISTS]
    if not captured:
        assert torch.equal(half.get_indexer_seq_len(), whole.get_indexer_seq_len()[requests])


def test_tokens_behind_the_last_request_cannot_be_cut(plans):
    whole = verify_metadata(captured=False, native=False)
    assert half_batch.slice_metadata(whole, slice(6, 12), LISTS) is not None
    assert half_batch.slice_metadata(whole, slice(6, 14), LISTS) is None


# --- what upstream reads ------------------------------------------------------------------


def reads(source, base: str) -> set[str]:
    """Names n for which the source has base.n or getattr(base, "n", ...)."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source)))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == base:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            if ast.unparse(node.args[0]) == base:
                found.add(node.args[1].value)
    return found


def test_the_indexer_reads_no_other_part_of_its_metadata():
    direct = reads(dsa_indexer.Indexer._get_topk_paged, "metadata")
    methods = {name for name in direct if callable(getattr(DSAIndexerMetadata, name, None))}
    assert direct - methods == {"paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d"}
    assert "topk_transform" in methods and "get_page_table_64" in methods
    fields = reads(dsa_topk_backend, "attn_metadata")
    for name in methods:
        fields |= reads(getattr(DSAIndexerMetadata, name), "self.attn_metadata")
        for called in reads(getattr(DSAIndexerMetadata, name), "self"):
            method = getattr(DSAIndexerMetadata, called, None)
            fields |= reads(method, "self.attn_metadata") if inspect.isfunction(method) else set()
    assert fields >= {"real_page_table", "topk_v2_plan", "dsa_seqlens_expanded", "page_table_1"}
    assert fields <= set(half_batch.PER_QUERY + half_batch.PER_REQUEST) | CUT | SHARED | PREFILL
