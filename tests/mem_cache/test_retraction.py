"""A retracted request resumes as a prefix hit, computes the same, and no slot is lost.

Every number of cached tokens here is of a resume: SGLang's own figure counts first admissions.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from sglang_ess.mem_cache import retraction
from tests.support import parity
from tests.support.retraction import Resume, Slots, events

PATCH = "tests.support.retraction:"
PAGE = 64
SLOTS = 1920

# Prompt lengths and output lengths, in the order of admission. The last request is retracted:
# it has the fewest output tokens, or the longer prompt.
BRIEF = ((64, 1280), (300, 300))  # the other one needs a page more, and then soon ends
LASTING = ((64, 64, 64, 64, 1024), (190, 190, 190, 190, 250))  # four need more than its output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = dict(arch="v32", index_topk=32, layers=2, **parity.NARROW)
    return parity.write_model(tmp_path_factory.mktemp("models") / "v32", **shape)


def start(model, *patches, **server_args):
    """An engine that admits as if running requests ended at once, so that memory runs short."""
    faults = [PATCH + name for name in (*patches, "record")]
    return parity.EngineProcess(
        model,
        ess={
            "index_dtype": "float32",
            "hot_ratio": 0.1,
            "canary_rate": 0.2,
            "admission": "off",
        },  # fmt: skip
        patches=faults,
        dtype="float32",
        schedule_conservativeness=0.0,
        **{"max_total_tokens": SLOTS} | server_args,
    )


def run(engine, prompt_lengths, output_lengths, logprobs=False):
    """Serve a batch; gives its outputs, each complete."""
    prompts = parity.prompts_of(prompt_lengths)
    params = [{"temperature": 0.0, "max_new_tokens": count} for count in output_lengths]
    if logprobs:
        outputs = engine.call("_generate", prompts, params, -1)
    else:
        outputs = engine.call("_generate_without_logprobs", prompts, params)
    assert [len(output.token_ids) for output in outputs] == list(output_lengths)
    assert all(output.meta["finish_reason"]["type"] == "length" for output in outputs)
    return outputs


def resumes_under_pressure(model, *patches):
    """The one resume of BRIEF and the one of LASTING; every slot is found again after each."""
    with start(model, *patches) as engine:
        for load in (BRIEF, LASTING):
            outputs = run(engine, *load)
            retracted = [output.meta["num_retractions"] for output in outputs]
            assert retracted == [0] * (len(outputs) - 1) + [1]
            engine.flush()
        assert events(engine, Slots) == [Slots(total=SLOTS, free=SLOTS)] * 2
        brief, lasting = events(engine, Resume)
    assert (brief.prompt, lasting.prompt) == (1280, 1024)
    assert brief.tokens > brief.prompt + 200 and lasting.tokens > lasting.prompt + 100
    return brief, lasting


def test_a_resume_is_a_prefix_hit(model):
    """It computes what was evicted, and the page of its last token, whose logits are needed."""
    brief, lasting = resumes_under_pressure(model)
    assert brief.tokens - brief.cached <= 4 * PAGE  # its output is kept
    assert lasting.prompt // 2 <= lasting.cached < lasting.prompt  # and here its prompt's head


@pytest.mark.parametrize(
    ("patch", "hits"),
    [
        ("without_hook", (1280, 0)),
        pytest.param("without_splitting", (1472, 0), marks=pytest.mark.slow),
    ],
)
def test_a_resume_is_colder_without(model, patch, hits):
    """The control: no output is kept, and the prompt is one node, gone as soon as a page is."""
    assert tuple(resume.cached for resume in resumes_under_pressure(model, patch)) == hits


FORCED = ((40, 100, 128, 300), (70, 70, 70, 70))
ROOMY = 40_000


@pytest.fixture(scope="module")
def undisturbed(model):
    """Outputs of FORCED without a retraction, with logprobs."""
    with start(model, max_total_tokens=ROOMY) as engine:
        outputs = run(engine, *FORCED, logprobs=True)
        engine.flush()
        assert events(engine, Resume) == []
    return outputs


def test_forced_retraction_changes_no_output(model, undisturbed):
    """Retracted at every third step, with logprobs and without; resumes come in chunks."""
    with start(model, "force", chunked_prefill_size=128, max_total_tokens=ROOMY) as engine:
        for logprobs in (True, False):
            outputs = run(engine, *FORCED, logprobs=logprobs)
            engine.flush()
            for output, expected in zip(outputs, undisturbed, strict=True):
                assert output.token_ids == expected.token_ids
                if logprobs:
                    assert np.abs(output.logprobs - expected.logprobs).max() <= 6e-5
        assert events(engine, Slots) == [Slots(total=ROOMY, free=ROOMY)] * 2
        resumes = events(engine, Resume)
    rids = {output.rid for output in outputs}
    warm = [resume for resume in resumes if resume.rid in rids]
    assert len(warm) > 10 and len(resumes) > len(warm) + 10
    assert all(resume.cached == (resume.tokens - 1) // PAGE * PAGE for resume in warm)


@pytest.mark.parametrize(
    ("how", "keeps_output"),
    [("preempt", True), pytest.param("pause", False, marks=pytest.mark.slow)],
)
def test_other_callers(model, how, keeps_output):
    """Preemption by priority keeps the output; a pause that asks for recomputation does not."""
    (prompt,) = parity.prompts_of([200])
    params = {"temperature": 0.0, "max_new_tokens": 200}
    priorities = dict(enable_priority_scheduling=True, max_running_requests=1)
    with start(model, max_total_tokens=ROOMY, **priorities) as engine:
        (expected,) = engine.call("_interrupt", prompt, params, None)
        engine.flush()
        output, *_ = engine.call("_interrupt", prompt, params, how)
        engine.flush()
        (resume,) = events(engine, Resume)
        assert events(engine, Slots) == [Slots(total=ROOMY, free=ROOMY)] * 2
    assert output.token_ids == expected.token_ids
    assert resume.tokens >= 300
    assert resume.cached == ((resume.tokens - 1) if keeps_output else 200) // PAGE * PAGE


@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("pages", range(70))
def test_cut_points(pages, page):
    cuts = retraction.cut_points(pages * page, page)
    ends = [pages * page, *cuts, 0]
    pieces = [(end - below) // page for end, below in zip(ends, ends[1:], strict=False)]
    if not pages:
        assert cuts == []
        return
    assert min(pieces) >= 1 and sum(pieces) == pages
    assert all(cut % page == 0 for cut in cuts)
    for wanted in range(1, pages + 1):
        taken = next(t for t in np.cumsum(pieces) if t >= wanted)
        assert taken < 2 * wanted


def a_request(**changes):
    values = dict(
        kv=SimpleNamespace(holds_kv=True, cache_protected_len=64),
        skip_radix_cache_insert=False,
        finished=lambda: False,
        to_finish=None,
        beam_group=None,
        is_dllm=lambda: False,
        session=None,
        owned_kv_len=lambda: 200,
    )
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv": SimpleNamespace(holds_kv=False, cache_protected_len=0)},
        {"skip_radix_cache_insert": True},
        {"finished": lambda: True},
        {"to_finish": object()},
        {"beam_group": object()},
        {"is_dllm": lambda: True},
        {"session": SimpleNamespace(streaming=True)},
        {"owned_kv_len": lambda: 63},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_requests_that_stay_upstreams(monkeypatch, changes):
    monkeypatch.setattr(retraction, "frees_on_demand", lambda tree: True)
    assert retraction.resumes_from_tree(a_request(), None, offload_kv=True)
    assert not retraction.resumes_from_tree(a_request(), None, offload_kv=False)
    assert not retraction.resumes_from_tree(a_request(**changes), None, offload_kv=True)


@pytest.fixture
def tree(monkeypatch):
    """A tree as our engines have it, as far as frees_on_demand asks."""
    from sglang.srt import runtime_context
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    disagg = SimpleNamespace(disaggregation_mode="null")
    monkeypatch.setattr(runtime_context, "get_disagg", lambda: disagg)
    tree = object.__new__(UnifiedRadixCache)
    tree.disable, tree.cache_controller, tree.linker = False, None, None
    tree.tree_components = (ComponentType.FULL,)
    return SimpleNamespace(tree=tree, disagg=disagg, kinds=ComponentType)


def test_trees_that_stay_upstreams(tree):
    assert retraction.frees_on_demand(tree.tree)
    for name, value in (
        ("disable", True),
        ("cache_controller", object()),
        ("linker", object()),
        ("tree_components", (tree.kinds.FULL, tree.kinds.MAMBA)),
        ("tree_components", (tree.kinds.FULL, tree.kinds.SWA)),
    ):
        before = getattr(tree.tree, name)
        setattr(tree.tree, name, value)
        assert not retraction.frees_on_demand(tree.tree), name
        setattr(tree.tree, name, before)
    tree.disagg.disaggregation_mode = "decode"
    assert not retraction.frees_on_demand(tree.tree)
    assert not retraction.frees_on_demand(object())
