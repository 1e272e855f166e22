"""Admission in SGLang's own scheduler: who waits, who goes back, and that no token changes."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.managers.overlap_utils import FutureMap, RelayPayload
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative import eagle_disaggregation, spec_utils
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_ess import scheduler_gate
from sglang_ess.admission.feed import OBSERVED_STEPS
from sglang_ess.admission.policy import HOT_TIER, LINK
from sglang_ess.admission.working_set import WINDOW
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache.allocator import EssPagedAllocator
from sglang_ess.tiers.topk_sample import SAMPLES, TopkSample
from tests.support import parity, retraction
from tests.support.scheduling import Decode

KEPT = ("topk_p", "topk_index", "hidden_states", "bonus_tokens")  # of an EagleDraftInput
PATCH = "tests.support.scheduling:"
SLOTS, REQUESTS, NEW_TOKENS = 8192, 8, 48
# A decode step of all requests selects 8 x 128 rows a layer; this holds two and a half of them.
HOT_ROWS = 320
# 1.1 KB rows: one request that misses all its rows takes 12 ms a layer.
SLOW_LINK = {"link_gib": 0.0125}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers, top-k 128."""
    shape = dict(arch="v32", layers=2, context=4096, index_topk=128, mtp_layers=1)
    return parity.write_model(tmp_path_factory.mktemp("models") / "v32", **shape)


def serve(model, *patches, options=None, **ess):
    """(token ids of each prompt, the decode steps) of one engine that gets all prompts at once.

    options: SGLang's
    """
    ess = {"hot_ratio": HOT_ROWS / SLOTS} | ess
    with parity.EngineProcess(
        model,
        ess=ess | {"index_dtype": "float32"},
        patches=[PATCH + name for name in ("record", *patches)],
        dtype="float32",
        max_total_tokens=SLOTS,
        **(options or {}),
    ) as engine:
        outputs = engine.generate(parity.prompts_of([600] * REQUESTS), NEW_TOKENS, start=-1)
        return [output.token_ids for output in outputs], retraction.events(engine, Decode)


@pytest.fixture(scope="module")
def ungated(model):
    """Admission off: all run together."""
    tokens, steps = serve(model, admission="off")
    assert max(step.running for step in steps) == REQUESTS
    return tokens


def test_requests_wait_for_the_hot_tier(model, ungated):
    tokens, steps = serve(model, "cautious", **SLOW_LINK)
    assert tokens == ungated
    most = max(step.running for step in steps)
    assert 1 <= most < REQUESTS and steps[-1].deferred[HOT_TIER] > 0
    assert steps[-1].preempted == 0
    # Measured, not the prior of three top-k's, and within the rows a request has.
    assert 128 <= steps[-1].working_set_rows <= 650


def test_requests_do_not_wait_where_misses_cost_nothing(model, ungated):
    """This machine's memory is its link: fetching all rows takes a fraction of a step."""
    tokens, steps = serve(model)
    assert tokens == ungated
    assert max(step.running for step in steps) == REQUESTS


def test_a_thrashing_hot_tier_sheds_requests_and_they_resume(model, ungated):
    tokens, steps = serve(model, "blind", **SLOW_LINK)
    assert tokens == ungated
    assert steps[-1].preempted > 0
    running = [step.running for step in steps]
    assert min(running[running.index(max(running)) :]) < max(running)


DRAFTS = {"speculative_num_draft_tokens": 3}
EAGLE = {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 1, "speculative_num_steps": 2}
NGRAM = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1}


WITH_DRAFTS = pytest.mark.parametrize(
    "options",
    [pytest.param(EAGLE | DRAFTS, marks=pytest.mark.slow, id="eagle"),
     pytest.param(NGRAM | DRAFTS, id="ngram")],
)  # fmt: skip


@WITH_DRAFTS
def test_requests_with_drafts_wait_for_the_hot_tier(model, ungated, options):
    """A working set has the lists of all queries: two fit into the hot tier, and two run."""
    hot_rows = 1100
    tokens, steps = serve(
        model, "cautious", options=options, hot_ratio=hot_rows / SLOTS, **SLOW_LINK
    )
    assert tokens == ungated
    most = max(step.running for step in steps)
    assert most == 2 and steps[-1].deferred[HOT_TIER] > 0 and steps[-1].preempted == 0
    assert 2 * steps[-1].working_set_rows <= hot_rows < 3 * steps[-1].working_set_rows
    assert (steps[-1].accept_length > 1.1) == (options["speculative_algorithm"] == "NGRAM")
    assert steps[-1].accept_length <= 3


@pytest.mark.slow
@WITH_DRAFTS
def test_requests_with_drafts_are_shed_and_resume(model, ungated, options):
    tokens, steps = serve(model, "blind", options=options, **SLOW_LINK)
    assert tokens == ungated
    assert steps[-1].preempted > 0


@pytest.mark.slow
def test_requests_wait_for_the_link(model, ungated):
    """With the hot tier out of the question: the steps alone are predicted too long."""
    tokens, steps = serve(model, "blind", itl_ms=60, **SLOW_LINK)
    assert tokens == ungated
    assert steps[-1].deferred[LINK] > 0 and max(step.running for step in steps) < REQUESTS


# --- the allocator --------------------------------------------------------------------------


class Pool:
    """What the allocator needs of a pool; remembers which slots were written."""

    def __init__(self):
        self.dropped = []

    def invalidate_slots(self, slots):
        self.dropped += slots.view(-1).tolist()


@pytest.fixture
def allocator(monkeypatch):
    monkeypatch.setattr("sglang_ess.mem_cache.allocator.EssTokenToKVPool", Pool)
    Pool.empty_hot_tier = lambda self: self.dropped.append("all")
    return EssPagedAllocator(1024, 64, torch.uint8, "cpu", Pool(), need_sort=False)


def test_freed_slots_are_dropped_from_the_hot_tier_once(allocator):
    slots = allocator.alloc(256)
    allocator.get_kvcache().dropped.clear()
    allocator.free(slots[:64])
    assert allocator.get_kvcache().dropped == slots[:64].tolist()
    allocator.free_group_begin()
    allocator.free(slots[64:128])
    allocator.free_page_ids(slots[128:192:64] // 64)
    allocator.free_group_end()
    assert sorted(allocator.get_kvcache().dropped) == sorted(slots[:192].tolist())
    allocator.clear()
    assert allocator.get_kvcache().dropped[-1] == "all"


def test_no_more_requests_than_may_go_on(allocator):
    step = {"num_tokens": 0, "tree_cache": None}
    assert allocator.check_decode_capacity(**step, requests=[1, 2, 3])
    allocator.keep_running = 2
    assert not allocator.check_decode_capacity(**step, requests=[1, 2, 3])
    assert allocator.check_decode_capacity(**step, requests=[1, 2])
    assert allocator.keep_running is None
    assert not allocator.check_decode_capacity(num_tokens=2048, tree_cache=None, requests=[1])


def test_alone_a_request_needs_no_reserve(allocator):
    too_much = {"full_budget_tokens": 100, "swa_budget_tokens": None}
    assert not allocator.prealloc_fits(None, 200, 0, **too_much)
    allocator.is_idle = True
    assert allocator.prealloc_fits(None, 200, 0, **too_much)
    assert not allocator.prealloc_fits(None, 200, 0, **too_much), "the second one is not alone"


@pytest.mark.parametrize(
    ("prompt", "asked", "given"), [(800, 50, 50), (800, 500, 127), (990, 50, None), (990, 0, 0)]
)
def test_a_prompt_that_leaves_no_token_is_refused(allocator, prompt, asked, given):
    """1,024 slots: the prompt's pages, a page and a token are kept. None is a 400."""
    assert max_new_tokens(allocator, prompt, asked) == given


@pytest.mark.parametrize(("drafts", "given"), [(4, 127), (32, 127), (33, 126), (40, 112)])
def test_a_step_that_drafts_has_slots_beyond_the_end(allocator, drafts, given):
    """SGLang gives each step twice its drafts; 65 slots are kept in any case."""
    options = dict(speculative_algorithm="NGRAM", speculative_num_draft_tokens=drafts)
    assert max_new_tokens(allocator, 800, 500, **options) == given


def max_new_tokens(allocator, prompt, asked, **options):
    """With 1,024 slots and SGLang's options."""
    from sglang.srt.runtime_context import get_context

    limits = {"token_capacity": 1024, "sliding_window_size": None, "chunk_size": None}
    with get_context().override_server_args(page_size=64, **options):
        return allocator.max_new_tokens_for_memory(prompt, asked, **limits)


# --- parking --------------------------------------------------------------------------------


def request(name, done=False):
    return SimpleNamespace(
        rid=name, finished=lambda: done, output_ids=[0] * int(name), retracted_stain=False
    )


class Batch:
    spec_algorithm = SpeculativeAlgorithm.NONE

    def __init__(self, reqs):
        self.reqs, self.batch_is_full = reqs, True

    def _get_decode_retraction_order(self, reqs):
        return sorted(range(len(reqs)), key=lambda i: -len(reqs[i].output_ids))

    def filter_batch(self, keep_indices):
        self.reqs = [self.reqs[i] for i in keep_indices]


@pytest.mark.parametrize("overlap", [False, True])
def test_parking_takes_in_the_step_under_way_and_leaves_the_finished(overlap):
    done, batch = [], Batch([request("3"), request("9", done=True), request("1"), request("5")])
    scheduler = SimpleNamespace(
        enable_overlap=overlap, last_batch=batch, result_queue=deque([("batch", "result")]),
        process_batch_result=lambda *result: done.append(result),
    )  # fmt: skip
    parked = scheduler_gate.park(scheduler, batch, keep=1)
    assert [req.rid for req in parked] == ["3", "1"]
    assert [req.rid for req in batch.reqs] == ["9", "5"]
    assert all(req.retracted_stain for req in parked) and not batch.batch_is_full
    assert done == ([("batch", "result")] if overlap else [])
    assert (scheduler.last_batch is None) == overlap


@pytest.mark.parametrize("overlap", [False, True])
def test_parked_requests_draft_from_where_they_are(overlap, monkeypatch):
    """By SGLang's own draft input: the parked rejoin with what the batch has for them now."""
    monkeypatch.setattr(spec_utils, "spec_need_hidden_states", lambda: True)
    spec = SimpleNamespace(
        speculative_eagle_topk=1, enable_multi_layer_eagle=False,
        speculative_use_rejection_sampling=False,
    )  # fmt: skip
    monkeypatch.setattr(eagle_disaggregation, "get_spec", lambda: spec)
    table, width, hidden = torch.zeros(8, 100, dtype=torch.int32), 5, 6
    future_map = FutureMap(
        torch.device("cpu"), SpeculativeAlgorithm.EAGLE, SimpleNamespace(req_to_token=table)
    )
    batch, rows = Batch([request(name) for name in ("3", "1", "2")]), torch.tensor([4, 2, 7])
    batch.spec_algorithm = SpeculativeAlgorithm.EAGLE
    for req, row in zip(batch.reqs, rows.tolist(), strict=True):
        req.kv = SimpleNamespace(req_pool_idx=row)
        # As a transfer left them.
        req.output_topk_p = torch.ones(1)
        req.output_topk_index = torch.tensor([99])
        req.hidden_states_tensor = torch.full((hidden,), 99.0)
        req.output_dsa_topk_indices = torch.arange(width)
    now = EagleDraftInput(
        topk_p=torch.tensor([[0.3], [0.1], [0.2]]), topk_index=torch.tensor([[3], [1], [2]]),
        hidden_states=torch.arange(3 * hidden).view(3, hidden).float(),
        bonus_tokens=torch.tensor([13, 11, 12]),
        dsa_topk_indices=torch.arange(3 * width).view(3, width).int(),
    )  # fmt: skip
    batch.spec_info = now
    if overlap:
        future_map.stash(rows, RelayPayload.from_draft_input(now))
        batch.spec_info = EagleDraftInput(future_indices=rows)
    scheduler = SimpleNamespace(enable_overlap=False, last_batch=None, future_map=future_map)
    parked = scheduler_gate.park(scheduler, batch, keep=1)
    assert [req.rid for req in parked] == ["1", "2"]
    expected = {name: getattr(now, name)[1:].clone() for name in vars(now) if name in KEPT}
    now.topk_index.zero_()  # the batch goes on
    future_map.hidden_states_buf is None or future_map.hidden_states_buf.zero_()
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["none"]), vocab_size=100)
    again = eagle_disaggregation.build_eagle_disagg_draft_input(
        SimpleNamespace(reqs=parked, device="cpu", model_config=config, enable_overlap=False),
        torch.tensor([11, 12]), future_map,
    )  # fmt: skip
    for name, tensor in expected.items():
        assert torch.equal(getattr(again, name), tensor), name
    assert again.dsa_topk_indices is None


# --- speculative decoding -------------------------------------------------------------------


class Observer:
    """An Admission that keeps what it is told of steps and of working sets."""

    def __init__(self):
        self.steps, self.sets = [], []
        self.observe = self.steps.append
        self.observe_working_sets = lambda *args: self.sets.append(args)
        self.keep, self.link = lambda running: running, lambda bytes_per_second: None


def gate_of_drafts(queries, num_slots=4096, topk=4):
    """A gate over SGLang's own counters, a real sample and the queries that a pool knows of."""
    reporter = SimpleNamespace()
    SchedulerMetricsReporter.reset_metrics(reporter)
    scheduler = SimpleNamespace(metrics_reporter=reporter, last_batch=None)
    scheduler.attn_tp_cpu_group = SimpleNamespace(size=lambda: 1)
    geometry = SimpleNamespace(topk=topk, layers=2, row_bytes=656, queries=queries)
    pool = SimpleNamespace(
        capacity=SimpleNamespace(hot_rows=1000, slots=num_slots, geometry=geometry),
        sample=TopkSample(1, topk, width=queries), host_tier=SimpleNamespace(num_slots=num_slots),
        measure_link=lambda: 1e9, totals=lambda: (0, 0, 0),
    )  # fmt: skip
    gate = scheduler_gate.SchedulerGate(scheduler, pool, EssConfig(itl_ms=40))
    assert gate.admission.limits.queries == queries
    gate.admission = gate._feed._admission = Observer()
    return gate, scheduler, pool


def test_the_policy_learns_of_all_lists_and_of_the_tokens_of_a_step():
    """Ten requests, three queries each; the result of a step is there one round later."""
    queries, topk, count = 3, 4, 10
    gate, scheduler, pool = gate_of_drafts(queries, topk=topk)
    reqs = [SimpleNamespace(rid=f"r{i}", seqlen=100 + i) for i in range(count)]
    batch = ScheduleBatch(reqs, spec_algorithm=SpeculativeAlgorithm.EAGLE)
    batch.forward_mode = ForwardMode.DECODE
    gate.keep(batch)
    assert gate.admission.steps == []
    accept_lens = np.random.default_rng(0).integers(1, queries + 1, (WINDOW, count))
    # Request i selects 4 of its own 100 slots by query; each step shifts them by one.
    first = 100 * torch.arange(count).view(-1, 1, 1) + 10 * torch.arange(queries).view(1, -1, 1)
    for step in range(WINDOW):
        scheduler.last_batch = batch
        lists = (first + torch.arange(topk) + step).view(-1, topk).int()
        pool.sample.decode_topk(0, lists)
        gate.keep(batch)
        tokens = int(accept_lens[step].sum())
        SchedulerMetricsReporter.update_spec_metrics(
            scheduler.metrics_reporter, count, tokens - count, num_accept_tokens=tokens
        )
    assert [step.running for step in gate.admission.steps] == [count] * (WINDOW // OBSERVED_STEPS)
    means = [1.0, *accept_lens.mean(1)[:-1]]  # before the first result a step has one token
    expected = np.mean(np.reshape(means, (-1, OBSERVED_STEPS)), axis=1)
    assert [step.tokens for step in gate.admission.steps] == pytest.approx(expected)
    ((sizes, sharing, growth),) = gate.admission.sets
    # 12 steps move four neighbours by 11: 15 of each query, of which 5 are the next query's too.
    assert sizes == [(100 + i, 35) for i in range(SAMPLES)] and sharing == 1
    assert growth[0] == SAMPLES * queries * topk and growth[-1] == SAMPLES * 35


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.IDLE, ForwardMode.PREBUILT])
def test_no_other_pass_is_a_decode_step(mode):
    gate, scheduler, _ = gate_of_drafts(2)
    reqs = [SimpleNamespace(rid="r", seqlen=9)]
    scheduler.last_batch = SimpleNamespace(reqs=reqs, forward_mode=mode)
    for _ in range(2 * OBSERVED_STEPS):
        assert gate.keep(SimpleNamespace(reqs=reqs)) is None
    assert gate.admission.steps == gate.admission.sets == []


# --- the head of the queue ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_decode_server", "places", "free", "most"),
    [(False, 8, 350, 3), (False, 2, 350, 2), (False, 0, 350, 0), (True, 4, 0, 4)],
)
def test_a_larger_batch_is_planned_with_those_only_who_can_join(
    is_decode_server, places, free, most
):
    """Five of 100 tokens wait, three run. A tenth of the free slots are in the radix tree."""
    gate = object.__new__(scheduler_gate.SchedulerGate)
    gate._is_decode_server = is_decode_server
    gate._scheduler = SimpleNamespace(
        waiting_queue=[SimpleNamespace(seqlen=100) for _ in range(5)],
        max_running_requests=3 + places,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free * 9 // 10),
        tree_cache=SimpleNamespace(evictable_size=lambda: free // 10),
    )
    assert gate._max_joining(3) == most
