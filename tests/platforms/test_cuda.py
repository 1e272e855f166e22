"""The bodies of the CUDA hooks, and that SGLang has the names in their rows."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import attention_registry, dsa_backend, graph_variants
from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from ess_patches import all_hooks, contract, speculation
from sglang_ess.attention import backend_cuda
from sglang_ess.attention.backend_checks import check_mode, check_server
from sglang_ess.attention.backend_cuda import EssDsaBackend
from sglang_ess.attention.overlap import Mode
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache.allocator import EssPagedAllocator
from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool
from sglang_ess.platforms import cuda as cuda_hooks

ROWS = [row for row in all_hooks() if row.when == "cuda"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.target.rpartition(".")[2])
def test_a_row_holds_against_the_installed_sglang(row):
    assert contract.check([row]) == []


def test_hooked_functions_take_what_upstream_passes():
    bodies = {row.target.rpartition(".")[2]: row for row in ROWS if row.is_registered}
    assert set(bodies) == {
        "create_attention_graph_variants",
        "_get_topk_paged",
        "_resolve_kv_pool_class",
        "get_paged_allocator_cls",
        "_broadcast_reqs_across_ranks",
        "_local_prefill_cuda_graph_vote",
    }
    for row in bodies.values():
        assert row.body.startswith("sglang_ess.") and row.applies("cuda")
        assert not row.applies("cpu")


# --- the pool and the backend -------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    backends = dict(attention_registry.ATTENTION_BACKENDS)
    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", backends)
    return backends


@pytest.fixture
def role(monkeypatch):
    """role(mode, enabled, algorithm) sets this process's disaggregation mode, whether ESS is on,
    and the algorithm of speculative decoding.
    """

    def put(mode, enabled=True, algorithm=None):
        disagg = SimpleNamespace(disaggregation_mode=mode)
        monkeypatch.setattr("sglang.srt.runtime_context.get_disagg", lambda: disagg)
        drafts = SimpleNamespace(speculative_algorithm=algorithm)
        monkeypatch.setattr("sglang.srt.runtime_context.get_spec", lambda: drafts)
        for name, value in EssConfig(enabled=enabled).to_env().items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("kind", "draft", "device", "mode", "ours"),
    [
        ("dsa", False, "cuda", "null", True),
        ("dsa", False, "cuda", "decode", True),
        ("dsa", False, "cuda", "prefill", False),
        ("dsa", True, "cuda", "null", False),
        ("dsa", False, "cpu", "null", False),
        ("mla", False, "cuda", "null", False),
        ("mha", False, "cuda", "null", False),
    ],
)
def test_a_sparse_models_main_pool_and_its_backend_are_ours(
    registry, role, kind, draft, device, mode, ours
):
    role(mode)
    before = dict(registry)
    configurator = SimpleNamespace(is_draft_worker=draft, device=device)
    chosen = cuda_hooks.kv_pool_class(
        DSATokenToKVPool, configurator, kind=kind, default=DSATokenToKVPool
    )
    assert chosen is (CudaEssTokenToKVPool if ours else DSATokenToKVPool)
    changed = {name for name in registry if registry[name] is not before.get(name)}
    assert changed == ({"dsa", "nsa"} if ours else set())
    assert all(registry[name] is cuda_hooks.sparse_backend for name in changed)


@pytest.mark.parametrize(("algorithm", "hooked"), [("NGRAM", True), ("EAGLE", False)])
def test_drafts_of_ngram_are_made_chains(registry, role, monkeypatch, algorithm, hooked):
    role("null", algorithm=algorithm)
    registered = []
    monkeypatch.setattr(contract, "register_late", lambda *given: registered.append(given))
    configurator = SimpleNamespace(is_draft_worker=False, device="cuda")
    cuda_hooks.kv_pool_class(DSATokenToKVPool, configurator, kind="dsa", default=None)
    assert registered == ([(speculation.NGRAM_HOOKS, "cuda")] if hooked else [])


@pytest.mark.parametrize(("draft", "name"), [(False, "ours"), (True, "upstream's")])
def test_a_draft_model_keeps_upstreams_backend(monkeypatch, draft, name):
    for owner, attribute, built in (
        (backend_cuda, "EssDsaBackend", "ours"),
        (dsa_backend, "DeepseekSparseAttnBackend", "upstream's"),
    ):
        monkeypatch.setattr(owner, attribute, lambda runner, built=built: (built, runner))
    runner = SimpleNamespace(is_draft_worker=draft)
    assert cuda_hooks.sparse_backend(runner) == (name, runner)


@pytest.mark.parametrize(
    ("mode", "enabled", "ours"),
    [
        ("null", True, True),
        ("decode", True, True),
        ("prefill", True, False),
        ("null", False, False),
    ],
)
def test_the_allocator_over_it_is_ours(role, mode, enabled, ours):
    role(mode, enabled)
    assert cuda_hooks.paged_allocator_class(None, None) is (EssPagedAllocator if ours else None)
    assert cuda_hooks.paged_allocator_class(dict, None) is dict, "a platform's own stays"


# --- a graph for each mode ----------------------------------------------------------------


@pytest.fixture
def active(monkeypatch):
    """active(...) puts a backend in this process with the given modes, choice and select()."""

    def put(modes=tuple(Mode), chosen=Mode.OFF, select=None):
        backend = SimpleNamespace(
            policy=SimpleNamespace(modes=modes), chosen=chosen, select=select, indexer_metadata="m"
        )
        monkeypatch.setattr(backend_cuda, "active", backend)
        return backend

    monkeypatch.setattr(backend_cuda, "active", None)
    return put


def test_upstreams_variants_are_left_where_ess_is_not_or_where_there_are_any(active):
    assert cuda_hooks.graph_variants(None, None) is None
    active()
    theirs = graph_variants.DsaGraphVariants(2048)
    assert cuda_hooks.graph_variants(theirs, None) is theirs


def test_a_graph_for_each_mode_that_may_be_chosen(active):
    backend = active(chosen=Mode.DA)
    variants = cuda_hooks.graph_variants(None, None)
    assert variants.capture_labels == ("off", "da", "dba")
    # "dense" would make the indexer skip its logits: _should_skip_logits_computation.
    assert graph_variants.DSA_DENSE not in variants.capture_labels
    assert variants.select(None) == "da"
    backend.chosen = Mode.DBA
    assert variants.select(None) == "dba"


def test_a_mode_without_a_graph_takes_the_first_one(active):
    active(modes=(Mode.DA,), chosen=Mode.DBA)
    variants = cuda_hooks.graph_variants(None, None)
    assert variants.capture_labels == ("da",) and variants.select(None) == "da"


# --- top-k --------------------------------------------------------------------------------


def get_topk(indexer, forward_batch, layer_id, q_fp8, weights, metadata):
    return "upstream", indexer, forward_batch.forward_mode, layer_id, q_fp8, weights, metadata


def batch(mode):
    return SimpleNamespace(forward_mode=mode)


def test_top_k_without_a_backend_is_upstreams(active):
    out = cuda_hooks.topk_selected(get_topk, "indexer", batch(ForwardMode.DECODE), 3, "q", "w", "m")
    assert out == ("upstream", "indexer", ForwardMode.DECODE, 3, "q", "w", "m")


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.IDLE])
def test_top_k_of_other_than_decode_is_upstreams(active, mode):
    active(select=None)
    assert cuda_hooks.topk_selected(get_topk, "i", batch(mode), 3, "q", "w", "m")[2] is mode


@pytest.mark.parametrize(
    "mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2]
)
def test_top_k_of_a_draft_model_is_upstreams(active, mode):
    """Its layers have ids of the target's too; its backend gives metadata of its own."""
    active(select=None)
    assert cuda_hooks.topk_selected(get_topk, "i", batch(mode), 3, "q", "w", "draft")[2] is mode


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_top_k_of_a_decode_step_goes_through_select(active, mode):
    def select(upstream, forward_batch, layer_id, q_fp8, weights, metadata):
        assert (layer_id, q_fp8, weights, metadata) == (3, "q", "w", "m")
        return upstream("half q", "half w", "half m")

    active(select=select)
    out = cuda_hooks.topk_selected(get_topk, "indexer", batch(mode), 3, "q", "w", "m")
    assert out == ("upstream", "indexer", mode, 3, "half q", "half w", "half m")


# --- what the backend decides against upstream's own code ---------------------------------


def bare(**fields) -> EssDsaBackend:
    backend = object.__new__(EssDsaBackend)
    backend.hisparse_coordinator = "ours"
    vars(backend).update(fields)
    return backend


@pytest.mark.parametrize(
    ("prefix", "dense", "impl"),
    [([0, 0], True, "flashmla_auto"), ([0, 5], False, "flashmla_sparse")],
    ids=["no prefix", "a prefix"],
)
def test_dense_mha_is_for_prompts_without_a_prefix(monkeypatch, prefix, dense, impl):
    monkeypatch.setattr(dsa_backend, "is_dsa_enable_prefill_cp", lambda: False)
    backend = bare(
        _is_in_tc_piecewise_cuda_graph=lambda: False,
        _is_in_breakable_cuda_graph=lambda: False,
        _get_device_sm=lambda: 90,
        _is_blackwell=lambda: False,
        supports_mha_one_shot=True,
        token_to_kv_pool=SimpleNamespace(dtype=torch.bfloat16),
        enable_auto_select_prefill_impl=True,
        dsa_kv_cache_store_fp8=False,
        dsa_prefill_impl="flashmla_auto",
    )
    forward_batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        seq_lens_cpu=torch.tensor([20, 30]),
        extend_prefix_lens_cpu=prefix,
        get_max_chunk_capacity=lambda: 1000,
    )
    backend.set_dsa_prefill_impl(forward_batch)
    assert backend.use_mha is dense and backend.dsa_prefill_impl == impl
    assert backend.hisparse_coordinator == "ours"
    backend.set_dsa_prefill_impl(None)  # a decode graph's
    assert backend.use_mha is False


def test_decode_graphs_keep_no_table_of_every_slot(monkeypatch):
    monkeypatch.setattr(dsa_backend, "is_cuda", lambda: True)
    backend = bare(
        device="cpu",
        physical_page_size=64,
        speculative_num_draft_tokens=None,
        dsa_index_kpool=1,
        use_fused_topk=True,
        dsa_topk_backend=SimpleNamespace(should_use_topk_v2=lambda: True),
        dsa_index_topk=2048,
        req_to_token=torch.zeros(3, 200, dtype=torch.int32),
        _memory_saver_adapter=SimpleNamespace(region=lambda tag: torch.no_grad()),
        dsa_decode_impl="flashmla_sparse",
    )
    backend.init_cuda_graph_state(2, 2)
    assert backend.decode_cuda_graph_metadata["page_table"] is None
    assert backend.decode_cuda_graph_metadata["real_page_table"].shape == (2, 4)
    assert backend.hisparse_coordinator == "ours"


@pytest.mark.parametrize(
    "mode",
    [ForwardMode.DECODE, ForwardMode.IDLE, ForwardMode.EXTEND, ForwardMode.TARGET_VERIFY],
)
def test_top_k_gives_slots_in_every_mode(mode):
    backend = bare(
        use_fused_topk=True,
        dsa_topk_backend=DSATopKBackend.SGL_KERNEL,
        forward_metadata=SimpleNamespace(
            paged_mqa_schedule_metadata=None, paged_mqa_ctx_lens_2d=None
        ),
        dsa_kv_cache_store_fp8=True,
        dsa_prefill_impl="flashmla_sparse",
    )
    metadata = backend.get_indexer_metadata(0, batch(mode))
    assert metadata.topk_transform_method is TopkTransformMethod.PAGED
    assert not metadata.force_unfused_topk and metadata is backend.indexer_metadata
    upstream = dsa_backend.DeepseekSparseAttnBackend.get_indexer_metadata(backend, 0, batch(mode))
    assert upstream.force_unfused_topk == (mode is not ForwardMode.EXTEND)


def test_the_seed_of_a_draft_is_as_the_indexer_gave_it():
    """SGLang exports a top-k of slots as it is; only offsets need the pass's page table."""
    backend = bare(use_fused_topk=True, dsa_kv_cache_store_fp8=True)
    backend.dsa_prefill_impl = "flashmla_sparse"
    seed = torch.tensor([[3, 9, -1]], dtype=torch.int32)
    for mode in (ForwardMode.EXTEND, ForwardMode.TARGET_VERIFY):
        assert backend.prepare_mtp_seed_indices(seed, mode) is seed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"pool": object()}, "its own KV pool: got object"),
        ({"index_kpool": 4}, "index_kpool 4"),
        ({"use_fused_topk": False}, "SGLANG_DSA_FUSE_TOPK off"),
        ({"dsa_decode_impl": "trtllm"}, "DSA backend trtllm"),
        ({"dsa_prefill_impl": "trtllm"}, "DSA backend trtllm"),
        ({"dsa_prefill_impl": "flashmla_sparse_q8"}, "DSA backend flashmla_sparse_q8"),
        ({"glue": "1"}, "SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
        ({"plan_stream": "1"}, None),
        (
            {"plan_stream": "1", "speculative_num_draft_tokens": 2},
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM",
        ),
    ],
)
def test_what_the_backend_refuses(monkeypatch, changes, says):
    fields = {"use_fused_topk": True, "dsa_decode_impl": "fa3", "dsa_prefill_impl": "fa3"}
    fields["speculative_num_draft_tokens"] = None
    pool = changes.pop("pool", object.__new__(CudaEssTokenToKVPool))
    kpool = changes.pop("index_kpool", 1)
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", changes.pop("glue", "0"))
    monkeypatch.setenv("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", changes.pop("plan_stream", "0"))
    backend = SimpleNamespace(**fields | changes)
    if says is None:
        check_server(backend, pool, kpool)
        return
    with pytest.raises(RuntimeError, match=says) as refused:
        check_server(backend, pool, kpool)
    assert "\n" not in str(refused.value) and "got" in str(refused.value)


@pytest.mark.parametrize("mode", ForwardMode)
def test_a_draft_models_pass_is_refused(mode):
    if mode is ForwardMode.DRAFT_EXTEND_V2:
        with pytest.raises(RuntimeError, match="the target model only: got a pass DRAFT_EXTEND_V2"):
            check_mode(mode)
    else:
        check_mode(mode)
