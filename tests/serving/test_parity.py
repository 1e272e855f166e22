"""The engine against transformers' deepseek_v32 and glm_moe_dsa on the same checkpoints.

No bound here is a measured number. transformers makes the engine's decisions (what it attended
to, which experts it took, how rows were rounded), and each difference left is compared with what
transformers differs from itself, in the same run, when its sums are as badly rounded as float32
allows (tests.support.parity.compare; for a bfloat16 model, when it runs in bfloat16). The
corruptions show that one wrong row, key or expert is noticed with room to spare.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.parity import (
    BF16_MODEL,
    BF16_ROWS,
    EXACT,
    FP8_BOTH,
    FP8_INDEX,
    FP8_ROWS,
    MARGIN,
    check,
)

MODELS = {
    "v32": dict(arch="v32", index_topk=32, heads=4),
    "v32-wide": dict(
        arch="v32", index_topk=64, heads=16, layers=2, hidden=192, index_heads=4, rope="plain",
        experts=16, experts_per_token=4, groups=4, topk_groups=2, moe_intermediate=64,
    ),
    "glm": dict(arch="glm", index_topk=32, heads=4, layers=5, topk_freq=3),
    "glm-odd": dict(
        arch="glm", index_topk=48, heads=6, layers=3, hidden=320, index_heads=16, rope="yarn",
        experts=5, experts_per_token=1, dense_layers=2, q_lora_rank=64,
    ),
}  # fmt: skip
SETUPS = {
    "exact": EXACT,
    "fp8 index": FP8_INDEX,
    "bf16 rows": BF16_ROWS,
    "fp8 rows": FP8_ROWS,
    "fp8 both": FP8_BOTH,  # as a server runs them
    "bf16 model": BF16_MODEL,
}
# How many times MARGIN every corruption must exceed. Where index keys or activations are rounded to
# 4 or 8 bits, that rounding is the yardstick, and a wrong key is not as many times more.
NOTICED = {
    "exact": 1000,
    "fp8 index": 5,
    "bf16 rows": 1000,
    "fp8 rows": 1000,
    "fp8 both": 5,
    "bf16 model": 2,
}
CASES = [(name, "exact") for name in MODELS]
CASES += [(name, kind) for name in ("v32", "glm") for kind in SETUPS if kind != "exact"]
# The formats of rows and keys know nothing of shared top-k's: of glm, all of them once, together.
SLOW = [("glm", kind) for kind in SETUPS if kind not in ("exact", "fp8 both")]
SLOW += [("v32", "fp8 index"), ("v32", "fp8 rows")]  # each is part of "fp8 both"
# Tokens of a prompt that one pass computes at most.
CHUNKS = {"v32": [128, 4096], "glm": [128, 4096], "v32-wide": [128], "glm-odd": [128]}
# Each corruption (tests/support/faults.py), and where it must show. Where it is a decision, it
# shows only there, as the oracle makes the same.
FAULTS = {
    "swap_neighbour": "logprob mean",
    "read_foreign_row": "logprob mean",
    "shift_index_page": "selection",
    "forget_last_key": "selection",
    "next_expert": "experts",
    "cut_rows": "rows",
}


@dataclass
class Served:
    """An engine of one model and setup, with its corruptions asleep."""

    name: str
    kind: str
    model: Path
    engine: EngineProcess

    @property
    def topk(self) -> int:
        return MODELS[self.name]["index_topk"]

    def ratios(self, prompts, **options) -> dict[str, float]:
        """Largest differences in the yardstick's units, by kind."""
        return self.judge(parity.scored(self.engine, prompts, **options)[1])

    def judge(self, sequences) -> dict[str, float]:
        found = parity.compare(SETUPS[self.kind], self.model, sequences).ratios()
        print(self.name, self.kind, *(f"{key} {value:.3g}" for key, value in found.items()))
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: parity.write_model(root / name, **shape) for name, shape in MODELS.items()}


@pytest.fixture(scope="module")
def served(request, models):
    name, kind = request.param
    with SETUPS[kind].engine(models[name], faults=[parity.FAULTS]) as engine:
        yield Served(name, kind, models[name], engine)


def lengths(topk):
    """Below, at and just past top-k, odd ones between, and over 16 times top-k."""
    return [topk // 2, topk, topk + 1, 3 * topk + 5, 16 * topk + 19]


@pytest.mark.parametrize(
    "served",
    [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES],
    indirect=True,
    ids="-".join,
)
class TestEngine:
    """One engine for all of these: pytest runs the tests of a case together."""

    def test_parity(self, served):
        """A cold batch of mixed lengths, decode after it, then prefix hits on its longest."""
        prompts, shared = parity.prompts_of(lengths(served.topk)), 5 * served.topk + 7
        suffixes = parity.prompts_of([3, 2 * served.topk, 70], seed=2)
        again = [prompts[-1][:shared] + suffix for suffix in suffixes]
        chunks = CHUNKS[served.name]
        for chunk in chunks if served.kind == "exact" else chunks[:1]:
            with served.engine.switched(chunk=chunk):
                outputs, cold = parity.scored(served.engine, prompts)
                assert [output.cached_tokens for output in outputs] == [0] * len(prompts)
                check(served.judge(cold))

                donor = outputs[-1].rid
                outputs, warm = parity.scored(served.engine, again, start=shared, donor=donor)
                assert all(output.cached_tokens == shared // 64 * 64 for output in outputs)
                check(served.judge(warm))

    def test_parity_on_a_machine_that_rounds_otherwise(self, served):
        with served.engine.switched(fault="round_otherwise"):
            check(served.ratios(parity.prompts_of([served.topk + 1, 310], seed=3)))

    def test_corruptions_are_noticed(self, served):
        for fault, shows in FAULTS.items():
            if shows == "rows" and not SETUPS[served.kind].rounds_rows:
                continue
            with served.engine.switched(fault=fault):
                ratios = served.ratios(parity.prompts_of([80, 210]), new_tokens=12)
            assert ratios[shows] >= NOTICED[served.kind] * MARGIN, fault
            if shows == "selection":
                check({key: ratio for key, ratio in ratios.items() if key != shows})

    def test_the_same_work_gives_the_same_bits(self, served):
        """Cold, as a prefix hit (which test_parity judges), and cold again."""
        prompt, found = parity.prompts_of([300])[0], []
        for flush in (True, False, True):
            if flush:
                served.engine.flush()
            found += served.engine.generate([prompt], max_new_tokens=6, start=-1)
        assert [output.cached_tokens for output in found] == [0, 256, 0]
        assert found[0].token_ids == found[2].token_ids
        assert (found[0].logprobs == found[2].logprobs).all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["v32", "glm"])
def test_exact_parity_of_the_default_model(tmp_path, arch):
    """The model users get, at 16 times its top-k."""
    model = parity.write_model(tmp_path / arch, arch=arch)
    with EXACT.engine(model) as engine:
        _, sequences = parity.scored(engine, parity.prompts_of([128, 129, 2200]))
    check(parity.compare(EXACT, model, sequences).ratios())


# --- the checks themselves ----------------------------------------------------------------


def gap(positions, scores=(3.0, 1.0, 2.0, 1.0, 0.0), topk=3):
    """The last query's gap in standard deviations of its scores."""
    scores = torch.tensor(scores).expand(len(scores), -1)
    selection, oracle = {len(scores) - 1: np.array(positions)}, SimpleNamespace(topk=topk, pool=1)
    found = parity._selection(scores, scores, selection, oracle)
    return found[0].item()


def test_a_tie_is_no_fault_and_a_lower_score_is_one_by_its_size():
    assert gap([0, 2, 1]) == gap([0, 2, 3]) == 0
    assert gap([0, 2, 4]) == pytest.approx(1 / 1.3**0.5)  # of variance 1.3
    assert gap([2, 1, 3]) == pytest.approx(2 / 1.3**0.5)  # both of a tie, and not the best


@pytest.mark.parametrize("positions", [[0, 2], [0, 2, 2], [0, 2, 5]])
def test_a_selection_is_of_topk_visible_positions(positions):
    assert gap(positions) == np.inf
