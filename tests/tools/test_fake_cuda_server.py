"""A real ESS server on SGLang's CUDA path, over CUDA libraries whose kernels do nothing.

Proved: the path starts (options, memory, pools, Triton kernels compiled for sm_90 with their real
specialisations, others by nvcc); every launch has a legal configuration; decode graphs of off,
DA and DBA, those of verifications of drafts too, and breakable prefill graphs (SGLang's default)
are captured without a call that a capture forbids, end in one stream, and are replayed; no stream's
work runs beside a graph that it must not; requests, prefix hits and an abort take their way to the
end.

Not proved: any value or time. Memory keeps what was in it, tokens are zeros, no kernel runs. The
rules of capture are those of CUDA's documentation as csrc/ has them, not a driver's.
"""

import importlib
import json
import pkgutil
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import KernelInterface

import ess_kernels
from sglang_ess.attention.overlap import Mode
from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from sglang_ess.tiers.topk_sample import GROUPS
from tests.support.server import Server
from tools.fake_cuda import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.missing()), reason=f"needs {build.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here the real one is"),
]

BATCHES, SLOTS = (1, 2, 4), 40_000
PREFILL_TOKENS = (64, 4096)  # of the prefill graphs; a longer chunk runs without one
START_SECONDS = 900  # the first start compiles some twenty kernels
# DeepSeek-V3.2's own indexer and top-k, which the CUDA kernels ask for; the rest as small as goes.
SHAPE = {
    "heads": 16, "hidden": 1024, "index_heads": 32, "index_topk": 2048, "q_lora_rank": 256,
    "nope_dim": 128, "v_dim": 128,
}  # fmt: skip
# (model, layers, index groups, sizes of these, queries of a request in a decode step)
MODELS = {
    "v32": (TinyModelConfig(layers=2, **SHAPE), 2, 2, 1, 1),
    "sharing": (TinyModelConfig(arch="glm", layers=4, sharing="FFSS", **SHAPE), 4, 2, 2, 1),
    "mtp": (TinyModelConfig(layers=2, mtp_layers=1, **SHAPE), 2, 2, 1, 3),
    "shared mtp": (
        TinyModelConfig(
            arch="glm", layers=4, sharing="FFSS", mtp_layers=1, index_share_for_mtp_iteration=1,
            **SHAPE,
        ), 4, 2, 2, 3,
    ),
}  # fmt: skip
DRAFT_FLAGS = (
    "--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1",
    "--speculative-num-steps", "2", "--speculative-num-draft-tokens", "3",
    "--ess-hot-ratio", "0.7",  # 12 queries of top-k 2048: one pass
)  # fmt: skip
FLAGS = (
    "--kv-cache-dtype", "bfloat16", "--cuda-graph-backend-prefill", "breakable",
    "--cuda-graph-bs-prefill", *map(str, PREFILL_TOKENS), "--cuda-graph-bs-decode",
    *map(str, BATCHES), "--max-running-requests", str(BATCHES[-1]),
    "--max-total-tokens", str(SLOTS), "--ess-hot-ratio", "0.3", "--enable-cache-report",
)  # fmt: skip


def costs(lists: int) -> dict:
    """Made up, so that each batch takes another mode: the first off, the second DA, the third DBA.

    lists: queries of a request
    """
    return {
        "batches": [lists * batch for batch in BATCHES],
        "misses": [0, 2048],
        "us": {
            mode.value: [[10 if place == chosen else 90] * 2 for place in range(len(BATCHES))]
            for chosen, mode in enumerate(Mode)
        },
        "empty_us": 500,
        "halving_us": 0,
        "source": "made up",
    }


@dataclass(frozen=True)
class Run:
    """One server's life. lines: (kind, text) that the fake runtime logged; answers: by name.

    layers, groups, tiers: layers, index groups and their sizes, each size a tier, of its model
    lists: queries of a request in a decode step: above 1, drafts are verified
    """

    layers: int
    groups: int
    tiers: int
    lists: int
    lines: list[tuple[str, str]]
    answers: dict[str, list[dict]]
    status: int
    log: str


def generate(server, length, output, seed=0, **more):
    """The meta_info of one request."""
    ids = [3 + (seed * 7919 + i * (seed + 3)) % 200 for i in range(length)]
    sampling = {"max_new_tokens": output, "ignore_eos": True, "temperature": 0}
    body = {"input_ids": ids, "sampling_params": sampling, **more}
    status, text = server.post("/generate", body)
    assert status == 200, text
    # A stream's last event has the whole answer.
    last = [line for line in text.splitlines() if "meta_info" in line][-1]
    return json.loads(last.removeprefix("data: "))["meta_info"]


def together(server, count, length, output, seed):
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(generate, server, length + 7 * i, output, seed + i) for i in range(count)
        ]
        return [job.result() for job in jobs]


def aborted(server, output):
    """A request that is aborted once it is seen decoding."""

    def decoding():
        return "cuda graph: True" in server.log.read_text(errors="replace")[before:]

    before = len(server.log.read_text(errors="replace"))
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(generate, server, 50, output, 9, rid="aborted")
        server.wait_for(decoding, 60, "decoding")
        server.post("/abort_request", {"rid": "aborted"})
        return job.result()


def requests(server) -> dict[str, list[dict]]:
    found = {
        "short": [generate(server, 20, 8)],
        "long": [generate(server, 3000, 20, 5)],
        "again": [generate(server, 3000, 5, 5)],
        "two": together(server, 2, 100, 60, 50),
        "four": together(server, 4, 2400, 60, 70),
        "crowd": together(server, 8, 300, 20, 90),
        "aborted": [aborted(server, 10_000)],
    }
    # The scheduler may still have the aborted request's last step under way.
    server.wait_for(lambda: server.post("/flush_cache", b"")[0] == 200, 60, "an idle scheduler")
    return found | {"flushed": [generate(server, 3000, 5, 5)]}


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    config, *shape = MODELS[request.param]
    folder, kept = tmp_path_factory.mktemp("fake_cuda"), request.config.cache.mkdir("fake_cuda")
    model = write_tiny_model(folder / "model", config)
    (folder / "costs.json").write_text(json.dumps({"overlap_costs": costs(shape[-1])}))
    log = folder / "cuda.log"
    flags = (*FLAGS, "--ess-overlap-costs", str(folder / "costs.json"))
    flags += DRAFT_FLAGS if shape[-1] > 1 else ()
    env = build.environment(kept, log)
    with Server(model, *flags, log=folder / "server.log", env=env) as server:
        server.wait_ready(START_SECONDS)
        answers = requests(server)
        status = server.stop()
        text = server.log.read_text(errors="replace")
    lines = re.findall(r"^\d+ ([A-Z]+): (.*)$", log.read_text(errors="replace"), re.M)
    yield Run(*shape, lines, answers, status, text)


PLAN = "plan_fetch_kernel"  # in every decode graph, and in no other
FETCH = "fetch_kernel"


def graphs(run) -> list[SimpleNamespace]:
    return [SimpleNamespace(**json.loads(text)) for kind, text in run.lines if kind == "GRAPH"]


def times(counts, name) -> int:
    """How often a kernel of Triton's, or of C++ in namespace ess, is among these."""
    return sum(n for key, n in counts.items() if key == name or f"3ess{len(name)}{name}" in key)


def decode_graphs(run) -> list[SimpleNamespace]:
    return [graph for graph in graphs(run) if times(graph.kernels, PLAN)]


def prefill_graphs(run) -> list[SimpleNamespace]:
    first = decode_graphs(run)[0].id  # they are captured before
    return [graph for graph in graphs(run) if graph.id < first]


def draft_graphs(run) -> list[SimpleNamespace]:
    last = decode_graphs(run)[-1].id
    return [graph for graph in graphs(run) if graph.id > last]


def launches(run) -> Counter:
    """How often each graph was replayed, by its id."""
    return Counter(int(text) for kind, text in run.lines if kind == "LAUNCH")


def mode_of(run, graph) -> Mode:
    """What the graph's kernels say. Parts are merged in DA and DBA, in each group's first layer.

    Without overlap a group's plan copies the first layer's rows; else a fetch does. DBA plans
    and fetches each half.
    """
    plans, fetches = (times(graph.kernels, name) for name in (PLAN, FETCH))
    merges = sum(n for name, n in graph.kernels.items() if "merge" in name.lower())
    layers, groups = run.layers, run.groups
    return {
        (groups, layers - groups, 0): Mode.OFF,
        (groups, layers, groups): Mode.DA,
        (2 * groups, 2 * layers, groups): Mode.DBA,
    }[plans, fetches, merges]


def test_no_illegal_call_and_no_breach_of_order(run):
    harmless = {"GRAPH", "LAUNCH", "STUB", "MISSING"}
    assert [(kind, text[:300]) for kind, text in run.lines if kind not in harmless] == []


def test_each_mode_is_captured_for_each_batch(run):
    # One request cannot be halved: its DBA is DA.
    sizes = len(BATCHES)
    expected = {Mode.OFF: sizes, Mode.DA: sizes + 1, Mode.DBA: sizes - 1}
    assert Counter(mode_of(run, graph) for graph in decode_graphs(run)) == expected
    assert all(graph.streams >= 2 for graph in decode_graphs(run))


def test_each_mode_is_replayed(run):
    replayed = launches(run)
    modes = {mode_of(run, graph) for graph in decode_graphs(run) if replayed[graph.id]}
    assert modes == set(Mode)


def test_prefill_is_captured_in_parts_between_which_the_tiers_are_used(run):
    # A prefill graph breaks at each indexer and at each layer's attention.
    parts = run.layers + run.groups + 1
    assert len(prefill_graphs(run)) == parts * len(PREFILL_TOKENS)
    for graph in prefill_graphs(run):
        assert not has_ours(graph)
    replayed = Counter(bool(launches(run)[graph.id]) for graph in prefill_graphs(run))
    assert replayed == {True: parts * len(PREFILL_TOKENS)}
    assert re.search(r"Prefill batch, #new-seq: 1, .*cuda graph: True", run.log)
    assert re.search(r"Prefill batch, #new-seq: \d+, .*cuda graph: False", run.log)


def test_the_draft_models_graphs_do_not_touch_the_tiers(run):
    """A graph of its decode steps and one of its extend, for each batch, and no other variant."""
    drafts = draft_graphs(run)
    assert len(drafts) == (2 * len(BATCHES) if run.lists > 1 else 0)
    for graph in drafts:
        assert not has_ours(graph) and launches(run)[graph.id]


def test_verifications_accept_drafts(run):
    for answer in (*run.answers["two"], *run.answers["four"]):
        assert ("spec_verify_ct" in answer) == (run.lists > 1)
        if run.lists > 1:
            assert answer["spec_verify_ct"] < answer["completion_tokens"]


def has_ours(graph) -> bool:
    """Whether one of our kernels is in the graph."""
    return bool(kernel_names() & set(graph.kernels)) or any("3ess" in n for n in graph.kernels)


def kernel_names() -> set[str]:
    """The Triton kernels that touch the tiers."""
    names = set()
    for module in pkgutil.iter_modules(ess_kernels.__path__, "ess_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, KernelInterface):
                names.add(name)
    return names


def test_requests_are_answered(run):
    sizes = {"short": 8, "long": 20, "again": 5, "two": 60, "four": 60, "crowd": 20, "flushed": 5}
    for name, output in sizes.items():
        for answer in run.answers[name]:
            assert answer["finish_reason"]["type"] == "length", name
            assert answer["completion_tokens"] == output, name
    (stopped,) = run.answers["aborted"]
    assert stopped["finish_reason"]["type"] == "abort"
    assert stopped["completion_tokens"] < 10_000


def test_prefixes_hit(run):
    cached = {name: answers[0]["cached_tokens"] for name, answers in run.answers.items()}
    assert (cached["long"], cached["again"], cached["flushed"]) == (0, 2944, 0)


def test_the_server_ends_cleanly(run):
    assert run.status == 0
    assert "Traceback" not in run.log


def test_launches_and_edges_of_a_step_without_overlap(run):
    """Two launches a layer, a fork and a join, and once a step install and the stream's end.

    The sampled groups, in small all of them, also fork a copy of their top-k to the host.
    """
    sampled = min(GROUPS, run.groups)
    for graph in decode_graphs(run):
        if mode_of(run, graph) is not Mode.OFF:
            continue
        (transfer,) = [stream for stream, of in graph.nodes.items() if times(of, PLAN)]
        behind = graph.nodes[transfer]
        assert (times(behind, PLAN), times(behind, FETCH)) == (run.groups, run.layers - run.groups)
        assert behind["memcpyAsync"] == sampled
        assert sum(behind.values()) == run.layers + sampled
        ours = (PLAN, FETCH, "_pack_write_kernel")
        assert sum(times(graph.kernels, name) for name in ours) == 2 * run.layers
        assert times(graph.kernels, "install_kernel") == run.tiers
        ends = [tuple(edge.split()) for edge, n in graph.edges.items() for _ in range(n)]
        assert sum(end == transfer for _, end in ends) == run.groups + sampled
        assert sum(start == transfer for start, _ in ends) == run.layers + 1
