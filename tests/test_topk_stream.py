"""--ess-topk-stream: its table, what it plays, who refuses it, and who is told."""

import json
import logging
import logging.config
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor import forward_context
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from ess_kernels.replay_topk import replay_topk_reference
from ess_patches import all_hooks, contract
from sglang_ess import plugin
from sglang_ess.config import ENV_VAR, EssConfig
from sglang_ess.cuda import attention_backend, halves, hooks
from sglang_ess.sim.locality import Locality, TopkStream
from sglang_ess.tiers import HotCache
from sglang_ess.tiers.trace import Record, read_trace
from sglang_ess.topk_stream import __main__ as command
from sglang_ess.topk_stream import announce, playback, spec
from sglang_ess.topk_stream.recorded import from_trace
from sglang_ess.topk_stream.table import (
    SEAM_POWERS,
    StreamTable,
    default_contexts,
    device_bytes,
    generate,
    scaled,
    seam,
)
from tests.cuda.test_halves import metadata as decode_metadata
from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.launching import DSA, refused
from tests.support.server import Server

PROFILE = "deepseek-v3.2"
TOPK, CONTEXTS, STEPS = 32, (160, 512), 12
PAGE = 64


@pytest.fixture(scope="module")
def small() -> StreamTable:
    return generate(scaled(Locality.load(PROFILE), TOPK), CONTEXTS, 3, streams=2, steps=STEPS)


@pytest.fixture
def asked(monkeypatch, tmp_path, small):
    """asked(text): this process has --ess-topk-stream text; the small table's file by default."""
    file = tmp_path / "small.npz"
    small.save(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    playback.playback.cache_clear()

    def put(text=str(file), **config):
        config = EssConfig(topk_stream=text, unsafe=bool(text), **config)
        monkeypatch.setenv(ENV_VAR, config.to_env()[ENV_VAR])
        return text

    yield put
    playback.playback.cache_clear()


@pytest.fixture(autouse=True)
def unmarked():
    """What marks log lines goes with the test."""
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


# --- the table ----------------------------------------------------------------------------


def test_a_table_comes_back_from_its_file(small, tmp_path):
    small.save(tmp_path / "t.npz")
    again = StreamTable.load(tmp_path / "t.npz")
    assert (again.contexts, again.note) == (small.contexts, small.note)
    for one, other in ((again.steps, small.steps), (again.seams, small.seams)):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["t.npz"]


def test_device_bytes_are_those_of_the_tensors(small):
    table = small.on("cpu")
    assert small.device_bytes == table.nbytes == device_bytes(CONTEXTS, 3, TOPK, 2, STEPS)
    assert device_bytes((8192, 32768, 65536, 131072), 4) < 40 * 2**20
    assert device_bytes((32768,), 4) == pytest.approx(7.0 * 2**20, rel=0.001)


def test_the_same_seed_gives_the_same_table_and_another_does_not():
    locality = scaled(Locality.load(PROFILE), TOPK)
    one, same, other = (generate(locality, (160,), 2, steps=3, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one.steps[0], same.steps[0])
    assert not np.array_equal(one.steps[0], other.steps[0])


def test_layers_are_spread_over_the_localitys_and_repeat_past_them():
    locality = Locality.load("glm-5.1")  # which has one
    table = generate(scaled(locality, TOPK), (160,), 3, steps=2)
    assert table.layers == 3 and '"layers": [0, 0, 0]' in table.note
    many = generate(scaled(Locality.load(PROFILE), TOPK), (160,), 4, steps=2)
    assert str(list(Locality.load(PROFILE).spread(4))) in many.note


def test_scaling_keeps_contexts_alike():
    full, small = Locality.load(PROFILE), scaled(Locality.load(PROFILE), 128)
    assert default_contexts(2048) == (8192, 32768, 65536, 131072)
    assert default_contexts(128)[1] == 2048
    assert small.reach(5, 2048) == pytest.approx(full.reach(5, 32768) / 16)
    assert scaled(full, 2048) is full


def broken(small, **changes):
    fields = {name: getattr(small, name) for name in ("contexts", "steps", "seams", "note")}
    return StreamTable(**fields | changes)


def test_broken_tables_are_refused(small):
    steps, seams = [array.copy() for array in small.steps], [array.copy() for array in small.seams]
    steps[0][0, 0, 0, 0] = CONTEXTS[0] - 1
    with pytest.raises(ValueError, match="must select positions 0 to 158, each once"):
        broken(small, steps=tuple(steps))
    steps[0][0, 0, 0, 0] = steps[0][0, 0, 0, 1]
    with pytest.raises(ValueError, match="each once"):
        broken(small, steps=tuple(steps))
    seams[1][0, 0, 0] = seams[1][0, 0, 1]
    with pytest.raises(ValueError, match="a seam must have each of 511 positions once"):
        broken(small, seams=tuple(seams))
    with pytest.raises(ValueError, match="must ascend from top-k . 2, 34: got 512, 160"):
        broken(small, contexts=CONTEXTS[::-1])
    with pytest.raises(ValueError, match="must be int32 of shapes"):
        broken(small, steps=tuple(array.astype(np.int64) for array in small.steps))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", None], ids=["empty", "no zip", "gone"])
def test_files_that_are_no_table_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "x.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz must be a table of top-k streams[^\n]*$"):
        StreamTable.load(file)


def test_a_seam_lays_the_last_order_over_the_first():
    random = np.random.default_rng(1)
    order = random.permutation(40)
    steps = np.stack([random.permutation(40)[:5] for _ in range(6)])
    found = seam(order, steps)
    stack = order.tolist()
    for selected in steps:  # of one step's, the order before all steps
        stack = [p for p in stack if p not in selected] + [p for p in order if p in selected]
    assert [found[position] for position in order[:-5]] == stack[:-5]
    assert set(found[order[-5:]]) == set(stack[-5:])
    both = np.intersect1d(order[-5:], stack[-5:])
    assert np.array_equal(found[both], both)


# --- what is played -----------------------------------------------------------------------


def misses(cache, topk):
    """Of one step of one request, topk [K] positions that are slots."""
    start = (0, 0)
    while start is not None:
        start = cache.plan(torch.from_numpy(topk[None].astype(np.int32)), start).stop
    return int(cache.query_misses[0])


@pytest.mark.parametrize(("ratio", "error"), [(0.2, 0.03), (0.5, 0.05)])
def test_the_hot_tier_misses_as_on_the_generators_own_stream(ratio, error):
    """32K, one layer, rounds past the table's end: each round, and all against the generator."""
    context, steps, rounds, locality = 32768, 128, 4, Locality.load(PROFILE)
    table = generate(locality, (context,), 1, steps=steps, seed=3)
    layer = locality.spread(1)[0]
    stream = TopkStream(locality, layer, 1, context + 1024, seed=3)
    begun = TopkStream(locality, layer, 1, context - 1, seed=3)  # as the table's
    rows, device_table = int(ratio * context), table.on("cpu")
    pages = torch.arange(600, dtype=torch.int32)[None]  # the first hashes to step 0
    caches = [HotCache(None, rows, context + 1024) for _ in range(2)]
    for cache, one in zip(caches, (stream, begun), strict=True):
        one.begin(0, context - 1)  # both begin where the generator has them settled
        cache.warm(torch.from_numpy(one.by_recency(0)[-rows:, None].copy()))
    slots = np.arange(context + 1024, dtype=np.int32)[None]
    counts = np.zeros((2, rounds * steps))
    for step in range(rounds * steps):
        length = torch.tensor([context + step], dtype=torch.int32)
        own = stream.next(np.array([0]), length.numpy().astype(np.int64), slots, 1)[0]
        topk = torch.empty(1, 2048, dtype=torch.int32)
        replay_topk_reference(topk, length, pages, device_table, 0, PAGE, True)
        for i, selected in enumerate((own, topk[0].numpy())):
            caches[i].install(length.long() - 1, None)
            counts[i, step] = misses(caches[i], selected)
    by_round = counts[1].reshape(rounds, steps).mean(1)
    assert by_round[1:] == pytest.approx(by_round[0], rel=0.01)
    assert counts[1].mean() == pytest.approx(counts[0].mean(), rel=error)


def test_a_deeper_model_plays_the_layers_again(small):
    one = playback.Playback(small, "cpu")
    lengths, pages = torch.tensor([600], dtype=torch.int32), torch.arange(10).int()[None]
    topk = torch.zeros(3, 1, TOPK, dtype=torch.int32)
    for out, layer in zip(topk, (1, 1 + small.layers, 2), strict=True):
        one.replace(out, lengths, pages, layer, as_slots=False)
    assert torch.equal(topk[0], topk[1]) and not torch.equal(topk[0], topk[2])


# --- recordings ---------------------------------------------------------------------------


@dataclass
class Recorded:
    """Of a tiers.trace.Trace, what from_trace reads."""

    layers: int
    topk: int
    records: list
    path: Path = Path("x.trace")

    def __iter__(self):
        return iter(self.records)


def recording(length=100, steps=9, layers=2, topk=8, requests=("a", "b")):
    """What a trace of so many decode steps looks like; the newest position always selected."""
    random = np.random.default_rng(2)
    records = []
    for step in range(steps):
        for name in requests:
            for layer in range(layers):
                seen = length + step + (7 if name == "b" else 0)
                chosen = random.choice(seen - 1, topk - 1, replace=False)
                positions = np.sort(np.append(chosen, seen - 1)).astype(np.int32)
                records.append(Record(layer, step, name, seen, positions))
    return Recorded(layers, topk, records), records


def test_a_recording_is_played_as_it_was_recorded():
    trace, records = recording()
    table = from_trace(trace, streams=2, steps=8)
    assert table.contexts == (100,) and (table.streams, table.layers) == (2, 2)
    for stream, name in enumerate(("b", "a")):  # the longest first
        for layer in range(2):
            taken = [r for r in records if (r.request_id, r.layer) == (name, layer)][1:]
            for record, row in zip(taken, table.steps[0][stream, layer], strict=True):
                kept = record.positions[record.positions < 99]
                assert set(kept) <= set(row) and len(set(row)) == 8 and row.max() < 99


def test_a_recording_with_too_few_steps_is_refused():
    with pytest.raises(ValueError, match="1 requests of more than 9 decode steps .* got 0"):
        from_trace(recording()[0], streams=1, steps=9)


# --- the command and the cache ------------------------------------------------------------


def test_the_command_writes_what_the_flag_takes(tmp_path, capsys, asked):
    file = tmp_path / "made.npz"
    argv = ["--out", str(file), "--contexts", "64,96", "--layers", "2", "--top-k", "16"]
    assert command.main([*argv, "--streams", "2", "--steps", "4", "--seed", "9"]) == 0
    assert "contexts 64, 96, 2 streams, 2 layers, 4 steps, top-k 16" in capsys.readouterr().out
    assert spec.table_for(str(file), 16, 61).contexts == (64, 96)
    with pytest.raises(ValueError, match=r"must have the model's top-k 32: got 16.*--top-k 32"):
        spec.table_for(str(file), 32, 61)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--locality", "llama"], "localities must hold llama"),
        (["--contexts", "96,64"], "must ascend"),
        (["--out", "x.txt"], "--out must end in .npz"),
        (["--from-trace", "/nowhere.trace"], "No such file"),
        (["--steps", "0"], "steps must be at least 1: got 0"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, flags, part):
    argv = ["--out", str(tmp_path / "x.npz"), "--top-k", "16", "--contexts", "64", *flags]
    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line and list(tmp_path.iterdir()) == []


def test_a_profile_is_generated_once(asked, tmp_path, monkeypatch):
    name = f"{PROFILE}@64,96"
    table = spec.table_for(name, 16, 61)
    assert table.contexts == (64, 96) and table.layers == spec.MAX_LAYERS
    (file,) = (tmp_path / "sglang_ess" / "topk_streams").iterdir()
    monkeypatch.setattr(spec, "generate", None)  # a second one would fail
    again = spec.table_for(name, 16, 61)
    assert np.array_equal(again.steps[1], table.steps[1])
    file.write_bytes(b"cut off")
    with pytest.raises(TypeError):
        spec.table_for(name, 16, 61)


# --- refusals -----------------------------------------------------------------------------

UNSAFE = "--ess-unsafe"


def stream(text):
    return ("--ess-topk-stream", text, UNSAFE)


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
    assert launch(*stream(f"{PROFILE}@512"), *flags, accelerator=accelerator)[1] == []


def test_it_is_taken_with_hisparse(launch):
    flags = ("--enable-hisparse", "--disable-ess", *stream(PROFILE))
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
    refused(launch(*stream(text)), "--ess-topk-stream: ", part)


def test_models_and_options_without_one_query_a_request(launch, asked):
    llama = {"architectures": ["LlamaForCausalLM"]}
    given = stream(f"{PROFILE}@512")
    refused(launch(*given, "--disable-ess", model=llama), "DeepSeek sparse attention", "Llama")
    refused(launch(*given, model={**DSA, "index_kpool": 2}), "index_kpool 2")
    refused(launch(*stream(asked())), "small.npz must have the model's top-k 64: got 32")
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
    plugin._arm(EssConfig(enabled=False))
    plugin._arm(EssConfig(enabled=False, topk_stream=PROFILE, unsafe=True))
    plugin._arm(EssConfig(topk_stream=PROFILE, unsafe=True))
    none, stream_alone, ess = registered
    assert none == [] and [row.body for row in stream_alone] == [
        "sglang_ess.cuda.hooks:topk_selected"
    ]
    assert len(ess) == sum(row.applies("cuda") for row in all_hooks())


@pytest.fixture
def decode(monkeypatch, asked, small):
    """decode(...): what the hook gives one layer of a decode batch, in SGLang's own metadata."""
    asked()
    pool = SimpleNamespace(layer_num=3)
    monkeypatch.setattr(forward_context, "get_token_to_kv_pool", lambda: pool)
    monkeypatch.setattr(attention_backend, "active", None)
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

        monkeypatch.setattr(attention_backend, "active", backend)
        batch = SimpleNamespace(forward_mode=mode)
        return hooks.topk_selected(get_topk, None, batch, 1, None, None, whole)

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
            planned.append(get_topk(q_fp8, weights, halves.of(metadata, queries)))
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


# --- log lines ----------------------------------------------------------------------------


@pytest.fixture
def marked(capsys):
    """Log lines are marked; afterwards logging is as before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    announce.mark_log_lines()
    announce.mark_log_lines()
    yield
    root.handlers[:], root.level = handlers, level


def test_every_line_is_marked_whatever_logging_is_configured_to(marked, capsys):
    logging.basicConfig(level="INFO", format="[%(asctime)s TP0] %(message)s", force=True)
    logging.getLogger("sglang.srt.x").info("100%% of %d", 7)
    logging.getLogger("y").info({"a": 1})
    format_only = {"version": 1, "disable_existing_loggers": False}
    plain = {"f": {"format": "%(name)s %(message)s"}}
    handler = {"h": {"class": "logging.StreamHandler", "formatter": "f"}}
    root = {"handlers": ["h"], "level": "INFO"}
    logging.config.dictConfig(
        format_only | {"formatters": plain, "handlers": handler, "root": root}
    )
    logging.getLogger("z").info("a % sign")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[.* TP0\] \[UNSAFE top-k stream\] 100% of 7", lines[0])
    assert lines[1].endswith("[UNSAFE top-k stream] {'a': 1}")
    assert lines[2:] == ["z [UNSAFE top-k stream] a % sign"]


def test_uvicorns_access_lines_are_marked_too(marked, capsys):
    from sglang.srt.utils.common import set_uvicorn_logging_configs
    from uvicorn.config import LOGGING_CONFIG
    from uvicorn.logging import AccessFormatter

    set_uvicorn_logging_configs(None)
    handler = logging.StreamHandler()
    handler.setFormatter(AccessFormatter(LOGGING_CONFIG["formatters"]["access"]["fmt"]))
    logger = logging.getLogger(announce.ACCESS_LOGGER)
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        logger.info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/x", "1.1", 200)
    finally:
        logger.removeHandler(handler)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "GET" in x][:1]
    assert "[UNSAFE top-k stream] 1.2.3.4:5" in line and line.count(announce.MARK) == 1


def test_both_entry_points_mark_the_process(marked, monkeypatch, asked):
    asked()
    for entry in (plugin.activate_cpu_platform, plugin.register):
        logging.setLogRecordFactory(logging.LogRecord)
        monkeypatch.setattr(plugin, "_arm", lambda config: [])
        monkeypatch.setattr(plugin, "registered", False)
        entry()
        record = logging.getLogger("x").makeRecord("x", 20, "f", 1, "text", (), None)
        assert record.getMessage() == f"{announce.MARK} text"


# --- a real engine ------------------------------------------------------------------------

GATHER, RECORD = "tests.support.gather:install", "tests.support.recorder:install"
LENGTHS, NEW = [40, 150, 520, 900, 300], 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = dict(arch="v32", index_topk=TOPK, heads=4, layers=3)
    return parity.write_model(tmp_path_factory.mktemp("model") / "v32", **shape)


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    small.save(tmp_path_factory.mktemp("stream") / "small.npz")
    return next(tmp_path_factory.getbasetemp().glob("stream*/small.npz"))


def serve(model, file, **ess):
    if file is not None:
        ess |= {"topk_stream": str(file), "unsafe": True}
    ess = {"index_dtype": "float32", "admission": "off"} | ess
    args = dict(dtype="float32", max_total_tokens=8192, chunked_prefill_size=512)
    with EngineProcess(model, ess=ess, patches=[GATHER, RECORD], **args) as engine:
        outputs = engine.together("r", parity.prompts_of(LENGTHS), NEW, start=0)
        return outputs, engine.selections()


def rounds(table, context, layer) -> dict[tuple[int, int], set[int]]:
    """{(stream, step): selected positions} of a table, to the round at which it begins again."""
    found = {}
    for stream in range(table.streams):
        seam = table.seams[context][stream, layer]
        place = np.arange(len(seam))
        for turn in range(2**SEAM_POWERS):
            for step, row in enumerate(table.steps[context][stream, layer]):
                found[stream, turn * table.num_steps + step] = set(place[row].tolist())
            place = seam[place]
    return found


def played(selections, rid, layer, length, known, count) -> bool:
    """Are the decode steps of a request those of a table, in order, each with the newest?"""
    rows = [set(selections[rid, layer][length + step].tolist()) for step in range(count)]
    lengths = [length + step + 1 for step in range(count)]
    if any(len(row) != TOPK or n - 1 not in row for row, n in zip(rows, lengths, strict=True)):
        return False
    total = max(step for _, step in known) + 1
    return any(
        all(
            row - {n - 1} <= known[stream, (step + i) % total]
            for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
        )
        for stream, step in known
    )


@pytest.fixture(scope="module")
def served(model, file):
    """(outputs, selections) by server: one-tier and two, with the stream; one-tier without."""
    return {
        "one-tier": serve(model, file, enabled=False),
        "two-tier": serve(model, file, hot_ratio=0.05, canary_rate=1.0),
        "no stream": serve(model, None, enabled=False),
    }


@pytest.mark.slow
def test_two_tiers_give_one_tiers_output_under_the_stream_too(served):
    for one, two in zip(served["one-tier"][0], served["two-tier"][0], strict=True):
        assert one.token_ids == two.token_ids
        assert np.array_equal(one.logprobs, two.logprobs)
        assert np.array_equal(one.prompt_logprobs, two.prompt_logprobs)


@pytest.mark.slow
def test_decode_of_long_requests_plays_the_table_and_nothing_else_does(served, small):
    outputs, selections = served["one-tier"]
    own, _ = served["no stream"]
    for output, without, length in zip(outputs, own, LENGTHS, strict=True):
        assert np.array_equal(output.prompt_logprobs, without.prompt_logprobs)
        long = length + NEW > CONTEXTS[0]
        assert (output.token_ids != without.token_ids) == long
        if not long:
            continue
        first = max(length, CONTEXTS[0] - 1)  # the step that reaches the first context
        context = int(length + 1 >= CONTEXTS[1])
        for layer in range(3):
            known, count = rounds(small, context, layer), length + NEW - 1 - first
            assert played(selections, output.rid, layer, first, known, count), (length, layer)
            other = rounds(small, context, (layer + 1) % 3)
            assert not played(selections, output.rid, layer, first, other, count)


@pytest.mark.slow
def test_a_recorded_trace_becomes_a_stream(model, tmp_path):
    trace = tmp_path / "t.trace"
    serve(model, None, hot_ratio=0.5, trace=str(trace))
    table = from_trace(read_trace(trace), streams=2, steps=16)
    assert table.contexts == (521,) and table.layers == 3
    table.save(tmp_path / "recorded.npz")
    outputs, selections = serve(model, tmp_path / "recorded.npz", enabled=False)
    assert played(selections, outputs[3].rid, 2, 900, rounds(table, 0, 2), NEW - 1)


# --- a real server ------------------------------------------------------------------------


@pytest.mark.slow
def test_every_log_line_of_every_process_is_marked(model, tmp_path):
    """By a logging configuration that names the process; the start's block says it too."""
    logging_file = tmp_path / "logging.json"
    line = {"f": {"format": "LINE %(processName)s %(message)s"}}
    handler = {"h": {"class": "logging.StreamHandler", "formatter": "f"}}
    logging_file.write_text(
        json.dumps(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "formatters": line,
                "handlers": handler,
                "root": {"handlers": ["h"], "level": "DEBUG"},
            }
        )
    )
    env = {"SGLANG_LOGGING_CONFIG_PATH": str(logging_file), "XDG_CACHE_HOME": str(tmp_path)}
    flags = ("--max-total-tokens", "4096", *stream(f"{PROFILE}@128,256"))
    with Server(model, *flags, log=tmp_path / "log", env=env) as server:
        server.wait_ready()
        body = {"input_ids": list(range(200)), "sampling_params": {"max_new_tokens": 8}}
        assert server.post("/generate", body)[0] == 200
        info = server.get("/server_info")
        server.wait_for(lambda: "    URL " in server.log.read_text(), 10, "summed up")
        text = server.log.read_text()
    assert info["ess"]["topk_stream"] == f"{PROFILE}@128,256"
    lines = [line for line in text.splitlines() if line.startswith("LINE ")]
    processes = {line.split()[1] for line in lines}
    assert [line[:200] for line in lines if announce.MARK not in line] == []
    assert len(processes) == 3  # scheduler, detokenizer, and the launcher's with the tokenizer
    ours = [line for line in text.splitlines() if "[sglang-ess]" in line]
    assert all(line.startswith(announce.MARK) for line in ours)
    assert any("outputs are wrong" in line for line in ours)
    assert re.search(r"^    top-k stream    .*outputs are wrong", text, re.M)
