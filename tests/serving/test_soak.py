"""Two tiers over a long time: memory pressure, retraction, aborts, prefix hits, slot reuse."""

import pytest

from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.retraction import Resume, Slots, events

PATCHES = [
    "tests.support.retraction:record",
    "tests.support.soak:install",
    "tests.support.tiers:expose",
]


EAGLE = dict(
    speculative_algorithm="EAGLE", speculative_eagle_topk=1, speculative_num_steps=3,
    speculative_num_draft_tokens=4,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "drafts"), [(150, {}), (2000, {}), (150, EAGLE), (1000, EAGLE)],
    ids=["150", "2000", "150 drafting", "1000 drafting"],
)  # fmt: skip
def test_soak(tmp_path, count, drafts):
    """SGLang's own leak check is on, at every step (tests/support/retraction.py)."""
    shape = dict(arch="v32", index_topk=32, heads=4, layers=2)
    if drafts:
        shape |= dict(mtp_layers=1, drafts="right")
    model = parity.write_model(tmp_path / "m", **shape)
    args = dict(max_total_tokens=3840, schedule_conservativeness=0.0, chunked_prefill_size=512)
    args |= drafts
    ess = {"hot_ratio": 0.1, "canary_rate": 1.0 if drafts else 0.1}
    with EngineProcess(model, ess=ess, patches=PATCHES, **args) as engine:
        result = engine.call("_soak", count, 1, seconds=100 + count)
        assert result.finished + result.aborted == count
        assert result.incomplete == 0
        assert result.aborted > count // 20
        resumes = events(engine, Resume)
        print(result, f"{len(resumes)} resumes")
        assert len(resumes) > count // 100, "no memory pressure: the test is of no use"
        # How many depends on timing: what is short of memory evicts short prompts whole.
        assert any(resume.cached > 0 for resume in resumes)
        before = engine.call("_hot_counters")
        assert all(layer["evictions"] > 0 for layer in before)
        engine.flush()
        (slots,) = events(engine, Slots)
        assert slots.free == slots.total
        assert [layer["occupied"] for layer in engine.call("_hot_counters")] == [0, 0]
        if count >= 1000:  # the first tenths fill caches and buffers
            assert max(result.rss_mib[3:]) - result.rss_mib[2] < 64
