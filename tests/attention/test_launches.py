"""How many launches ESS adds to a layer, counted in EssDsaBackend over the small pool.

Of the backend's methods all launches count: kernels, copies, fills. What stands in for SGLang (the
indexer, attention over one tier) counts nothing.
"""

from collections import Counter

import pytest
from torch.utils._python_dispatch import _disable_current_modes

from ess_kernels.checks import interpreted
from tests.support import small_backend
from tests.support.launches import count_launches
from tests.support.small_backend import Run, Upstream

PASS, TOPK, EXTEND, DECODE = "init_forward_metadata", "select", "forward_extend", "forward_decode"
MOST_OF_A_PREFILL_LAYER = 15

pytestmark = pytest.mark.skipif(not interpreted(), reason="counts interpreted launches")


def uncounted(function):
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@pytest.fixture
def counted(monkeypatch):
    """counted(run): a list of (method, Counter), to which each call by SGLang adds one."""
    for name in ("_attend", PASS):
        monkeypatch.setattr(Upstream, name, uncounted(getattr(Upstream, name)))

    def start(run):
        calls = []

        def count(name):
            method = getattr(run.backend, name)

            def call(*args, **kwargs):
                if name == TOPK:
                    args = (uncounted(args[0]), *args[1:])
                with count_launches(monkeypatch) as launched:
                    out = method(*args, **kwargs)
                del launched["fill_"]  # main_ready, which the kernel itself sets on a GPU
                calls.append((name, launched))
                return out

            monkeypatch.setattr(run.backend, name, call)

        for name in (PASS, TOPK, EXTEND, DECODE):
            count(name)
        return calls

    return start


@pytest.fixture
def step(monkeypatch, counted):
    """step(**of the backend): the calls of a decode step of two requests, after some others."""

    def decode(**options):
        run = Run(small_backend.builder(monkeypatch)(hot_rows=100, **options))
        run.prefill({1: 9, 2: 5})
        for _ in range(2):
            run.decode([1, 2])
        calls = counted(run)
        run.decode([1, 2])
        return calls

    return decode


# The copies of a few groups' top-k to the host: of 4 groups in all, so in small of each.
SAMPLED = Counter(copy_=1)
WRITTEN = Counter(_pack_write_kernel=1)
PARTS = Counter(_sparse_mla_kernel=2, nan_to_num=2, cat=1, merge_state_kernel=1)


def test_two_launches_a_layer_without_overlap(step):
    first, *layers = step(overlap="off", sizes=(1, 1, 1))
    assert first == (PASS, Counter())
    reserved = Counter(install=1)  # for all groups
    assert [of for name, of in layers if name == TOPK] == [
        reserved + Counter(plan_fetch=1),
        Counter(plan_fetch=1),
        Counter(plan_fetch=1),
    ]
    assert [of for name, of in layers if name == DECODE] == [WRITTEN + SAMPLED] * 3


def test_a_groups_later_layers_fetch_and_write(step):
    """Two tiers, of groups of three layers and of one: a launch of install each."""
    calls = step(overlap="off", sizes=(3, 1, 3))
    planned = [of for name, of in calls if name == TOPK]
    three, one = Counter(plan_fetch=1, fetch=2), Counter(plan_fetch=1)
    assert planned == [three + Counter(install=2), one, three]
    written = [of for name, of in calls if name == DECODE]
    first, later = WRITTEN + SAMPLED, WRITTEN
    assert written == [first, later, later, first, first, later, later]


@pytest.mark.parametrize(
    ("overlap", "planned"),
    [("da", Counter(plan_fetch=1, fetch=1)), ("dba", Counter(plan_fetch=2, fetch=2, cat=1))],
)
def test_what_overlap_adds(step, overlap, planned):
    """A fetch of its own, and attention in two parts; in DBA the plans of both halves."""
    calls = step(overlap=overlap, sizes=(1, 1))
    of_topk = [of for name, of in calls if name == TOPK]
    assert of_topk == [planned + Counter(install=1), planned]
    of_layers = [of for name, of in calls if name == DECODE]
    assert of_layers == [WRITTEN + SAMPLED + PARTS] * 2


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1)], ids=["layers", "groups"])
@pytest.mark.parametrize("overlap", ["off", "da", "dba"])
def test_a_verification_launches_what_a_decode_step_does(
    monkeypatch, counted, step, overlap, sizes
):
    run = Run(small_backend.builder(monkeypatch)(overlap, hot_rows=100, drafts=3, sizes=sizes))
    run.prefill({1: 9, 2: 5})
    for _ in range(2):
        run.verify({1: 2, 2: 1})
    calls = counted(run)
    run.verify({1: 1, 2: 3})
    as_decode = [(DECODE if name == EXTEND else name, of) for name, of in calls]
    assert as_decode == step(overlap=overlap, sizes=sizes)


@pytest.mark.parametrize(("tokens", "plans"), [(1, 1), (3, 2)])
def test_a_prefill_layer_of_eight_prompts(monkeypatch, counted, tokens, plans):
    """plans: of the warm-up, which takes as many as the hot rows allow."""
    run = Run(small_backend.builder(monkeypatch)(hot_rows=115, max_queries=24))
    prompts = range(1, 9)
    run.prefill(dict.fromkeys(prompts, 6))
    calls = counted(run)
    run.prefill(dict.fromkeys(prompts, tokens))
    (_, begin), *layers = calls
    assert begin["install"] == begin["fetch"] == 1
    assert begin.total() <= MOST_OF_A_PREFILL_LAYER
    every = Counter(
        _pack_write_kernel=1, _scatter_kernel=2, _gather_rows_kernel=2, _to_copy=1, cat=1,
        plan_fetch=plans,
    )  # fmt: skip
    places, prefetch = Counter(index_put_=1), Counter(fetch=1)
    assert layers == [(EXTEND, every + places + prefetch), (EXTEND, every)]
    assert max(of.total() for _, of in layers) <= MOST_OF_A_PREFILL_LAYER
