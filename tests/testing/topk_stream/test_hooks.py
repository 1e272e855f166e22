"""--ess-topk-stream: who refuses it, and what takes a top-k's place on CUDA."""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor import forward_context
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

from ess_kernels.replay_topk import replay_topk_reference
from ess_patches import all_hooks, contract, topk_stream
from sglang_ess import plugin
from sglang_ess.attention import backend_cuda, half_batch
from sglang_ess.config import ENV_VAR, EssConfig
from sglang_ess.testing.topk_stream import playback
from tests.attention.test_half_batch import metadata as decode_metadata
from tests.support.launching import DSA, refused
from tests.testing.topk_stream import PAGE, PROFILE, TOPK, UNSAFE, stream_flags

# --- refusals -----------------------------------------------------------------------------


def test_it_is_refused_without_unsafe_before_anything_loads(launch):
    result = launch("--ess-topk-stream", PROFILE)
    refused(result, "--ess-topk-stream must come with --ess-unsafe", "outputs are wrong", "dummy")
    refused(launch("--ess-topk-stream", PROFILE, "--disable-ess"), "--ess-unsafe")


def test_unsafe_alone_is_refused(launch):
    refused(launch(UNSAFE), "--ess-unsafe must come with", "got it alone")


def test_the_environment_is_held_to_it_too():
    with pytest.raises(ValueError, match="must come with --ess-unsafe"):
        EssConfig.from_env({ENV_VAR: json.dumps({"topk_stream": PROFILE})})


@pytest.mark.parametrize("flags", [(), ("--disable-ess",)], ids=["ess", "one-tier"])
@pytest.mark.parametrize("accelerator", [None, "cuda"])
def test_it_is_taken_by_all_servers_of_sparse_models(launch, flags, accelerator):
    assert launch(*stream_flags(f"{PROFILE}@512"), *flags, accelerator=accelerator)[1] == []


def test_it_is_taken_with_hisparse(launch):
    flags = ("--enable-hisparse", "--disable-ess", *stream_flags(PROFILE))
    assert launch(*flags, accelerator="cuda")[1] == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("llama", "localities must hold llama"),
        (f"{PROFILE}@65", "must ascend from top-k + 2, 66: got 65"),
        ("gone.npz", "gone.npz must be a table of top-k streams"),
    ],
)
def test_streams_that_are_not_there(launch, text, part):
    refused(launch(*stream_flags(text)), "--ess-topk-stream: ", part)


def test_models_and_options_without_one_query_a_request(launch, asked):
    llama = {"architectures": ["LlamaForCausalLM"]}
    given = stream_flags(f"{PROFILE}@512")
    refused(launch(*given, "--disable-ess", model=llama), "DeepSeek sparse attention", "Llama")
    refused(launch(*given, model={**DSA, "index_kpool": 2}), "index_kpool 2")
    refused(launch(*stream_flags(asked())), "small.npz must have the model's top-k 64: got 32")
    flags = ("--disable-ess", "--speculative-algorithm", "EAGLE")
    assert launch(*flags, accelerator="cuda")[1] == []
    refused(launch(*flags, *given, accelerator="cuda"), "unset with --ess-topk-stream: got EAGLE")
    flags = (*given, "--disable-ess", "--ess-platform", "native")
    refused(launch(*flags), "the CPU platform or a CUDA device: got none")


# --- hooks on CUDA ------------------------------------------------------------------------


def test_the_hook_is_in_force_one_tier_where_a_stream_is_played(monkeypatch, asked):
    registered = []
    monkeypatch.setattr(plugin, "active_platform", lambda: "cuda")
    monkeypatch.setattr(contract, "check", lambda rows: [])
    monkeypatch.setattr(contract, "register", lambda rows, platform: registered.append(rows))
    plugin._register_hooks(EssConfig(enabled=False))
    plugin._register_hooks(EssConfig(enabled=False, topk_stream=PROFILE, unsafe=True))
    plugin._register_hooks(EssConfig(topk_stream=PROFILE, unsafe=True))
    none, stream_alone, ess = registered
    assert none == [] and [row.body for row in stream_alone] == [
        "sglang_ess.testing.topk_stream.hooks:play_on_cuda"
    ]
    assert ess[:1] == stream_alone, "innermost: ESS's hook on the same method wraps it"
    assert ess[1:] == [row for row in all_hooks() if row.applies("cuda")]


def test_the_hooks_fit_what_they_are_on():
    assert contract.check(topk_stream.HOOKS) == []
    for row in topk_stream.HOOKS:
        body = inspect.signature(contract.pkgutil.resolve_name(row.body))
        assert len(body.parameters) == 1 + len(row.signature.split(",")), row.target


def in_force(get_topk):
    """SGLang's method under the hooks that this process would register on it."""
    rows, config = [], EssConfig.from_env()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "active_platform", lambda: "cuda")
        patch.setattr(contract, "check", lambda rows: [])
        patch.setattr(contract, "register", lambda due, platform: rows.extend(due))
        plugin._register_hooks(config)
    for row in rows:
        if row.target.endswith("._get_topk_paged"):
            body = contract.pkgutil.resolve_name(row.body)
            get_topk = _wrap_fn(get_topk, body, HookType(row.kind))
    return get_topk


@pytest.fixture
def decode(monkeypatch, asked, small):
    """decode(...): what the hook gives one layer of a decode batch, in SGLang's own metadata."""
    asked()
    pool = SimpleNamespace(layer_num=3)
    monkeypatch.setattr(forward_context, "get_token_to_kv_pool", lambda: pool)
    monkeypatch.setattr(backend_cuda, "active", None)
    lengths = torch.tensor([100, 170, 600], dtype=torch.int32)
    pages = torch.randperm(30, generator=torch.Generator().manual_seed(0)).int().view(3, 10)
    sglangs = decode_metadata(3)
    attention = replace(
        sglangs.attn_metadata,
        cache_seqlens_int32=lengths,
        real_page_table=pages,
        topk_v2_plan=None,
    )

    def run(unfused=False, mode=ForwardMode.DECODE, backend=None, method=TopkTransformMethod.PAGED):
        whole = replace(
            sglangs,
            attn_metadata=attention,
            force_unfused_topk=unfused,
            topk_transform_method=method,
        )

        def get_topk(indexer, forward_batch, layer_id, q_fp8, weights, metadata):
            queries = len(metadata.get_seqlens_int32())
            return torch.full((queries, TOPK), -7, dtype=torch.int32)

        if backend is not None:
            backend.indexer_metadata = whole
        monkeypatch.setattr(backend_cuda, "active", backend)
        batch = SimpleNamespace(forward_mode=mode)
        return in_force(get_topk)(None, batch, 1, None, None, whole)

    run.lengths, run.pages = lengths, pages
    return run


@pytest.mark.parametrize("unfused", [False, True], ids=["slots", "positions of HiSparse"])
def test_decode_gets_the_streams_rows_in_the_form_of_its_top_k(decode, small, unfused):
    expected = torch.full((3, TOPK), -7, dtype=torch.int32)
    replay_topk_reference(
        expected, decode.lengths, decode.pages, small.on("cpu"), 1, PAGE, not unfused
    )
    found = decode(unfused)
    assert torch.equal(found, expected)
    assert (found[0] == -7).all(), "shorter than the contexts: the indexer's own"
    assert (found[1:] >= 0).all()
    if unfused:
        assert found[2].max() == 599


def test_halves_of_a_batch_are_replaced_before_they_are_planned(decode):
    planned = []

    def select(get_topk, forward_batch, layer_id, q_fp8, weights, metadata):
        for queries in (slice(0, 2), slice(2, 3)):
            planned.append(get_topk(q_fp8, weights, half_batch.slice_metadata(metadata, queries)))
        return torch.cat(planned)

    whole = decode()
    assert torch.equal(decode(backend=SimpleNamespace(select=select)), whole)
    assert torch.equal(planned[1], whole[2:])


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.IDLE, ForwardMode.TARGET_VERIFY])
def test_other_passes_keep_the_indexers(decode, mode):
    assert (decode(mode=mode) == -7).all()


def test_without_the_flag_nothing_is_replaced(decode, asked):
    asked("")
    assert (decode() == -7).all()


def test_offsets_into_a_flattened_prefix_are_no_slots(decode):
    with pytest.raises(RuntimeError, match="must replace slots or positions: got RAGGED"):
        decode(method=TopkTransformMethod.RAGGED)


def test_no_table_is_loaded_in_a_capture(monkeypatch, asked):
    asked()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        playback.playback(TOPK, 3, torch.device("cuda"))
