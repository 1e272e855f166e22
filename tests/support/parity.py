"""How far an engine is from the oracle: in what it selected, and in what it computed."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from sglang_ess.tiny_model import TinyModelConfig, write_tiny_model
from tests.support import oracle as oracles
from tests.support.engine import EngineProcess

RECORD = "tests.support.recorder:install"
FAULT = "tests.support.faults:"


@dataclass(frozen=True)
class Setup:
    """One way to run a model, and the oracle's rounding that stands for it.

    rounding: None compares with the oracle as transformers computes it
    """

    dtype: str = "float32"
    index_dtype: str = "float32"
    kv_cache_dtype: str = "auto"
    rounding: str | None = None

    def engine(self, model, faults=(), **server_args) -> EngineProcess:
        return EngineProcess(
            model,
            ess={"index_dtype": self.index_dtype},
            patches=[RECORD, *(FAULT + fault for fault in faults)],
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            **server_args,
        )

    def rounded(self, oracle):
        return getattr(oracles, self.rounding)(oracle) if self.rounding else nullcontext()


EXACT = Setup()
FP8_INDEX = Setup(index_dtype="fp8", rounding="fp8_index")
BF16_ROWS = Setup(kv_cache_dtype="bfloat16", rounding="bf16_rows")
FP8_ROWS = Setup(kv_cache_dtype="fp8_e4m3", rounding="fp8_rows")
BF16_MODEL = Setup(dtype="bfloat16")


@dataclass
class Difference:
    """Engine against oracle, over every scored token of some sequences.

    logprob: |difference| by token, the oracle using the engine's selection
    free_logprob: the same, the oracle using its own selection and no rounding
    missed, selected: positions selected outside the oracle's top-k, and all, where sparse
    overshoot: how far below rank k the worst selected position is (0: none, or a near-tie)
    """

    logprob: np.ndarray
    free_logprob: np.ndarray
    missed: int
    selected: int
    overshoot: int

    @property
    def overlap(self) -> float:
        return 1 - self.missed / self.selected


def prompts_of(lengths, seed=1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=g).tolist() for n in lengths]


@cache
def oracle_of(model: Path) -> oracles.Oracle:
    return oracles.Oracle(model)


def selection_of(selections, rid) -> dict:
    """{layer: {query: positions}} of one request."""
    return {layer: rows for (owner, layer), rows in selections.items() if owner == rid}


def compare(setup, model, sequences, with_free=False) -> Difference:
    """Judge sequences: (token ids, engine logprobs of the last tokens, selection by layer)."""
    oracle = oracle_of(model)
    forced, free, missed, selected, overshoot = [], [], 0, 0, 0
    for token_ids, logprobs, selection in sequences:
        with setup.rounded(oracle):
            verdict = oracle.judge(token_ids, selection)
        forced.append(np.abs(logprobs - verdict.logprobs[-len(logprobs) :]))
        if with_free:
            free.append(np.abs(logprobs - oracle.judge(token_ids).logprobs[-len(logprobs) :]))
        for rows in verdict.ranks.values():
            for query, ranks in rows.items():
                visible = min(oracle.topk, query + 1)
                overshoot = max(overshoot, int(ranks.max()) + 1 - visible)
                if query >= oracle.topk:
                    missed += int((ranks >= oracle.topk).sum())
                    selected += len(ranks)
    return Difference(
        np.concatenate(forced),
        np.concatenate(free) if free else np.empty(0),
        missed,
        selected,
        overshoot,
    )


def scored(engine, prompts, new_tokens=8, start=0, donor=None):
    """Generate, and give compare()'s sequences. donor: selections of a shared prefix's owner."""
    outputs = engine.generate(prompts, max_new_tokens=new_tokens, start=start)
    selections = engine.selections()
    sequences = []
    for prompt, output in zip(prompts, outputs, strict=True):
        own = selection_of(selections, output.rid)
        if donor:
            before = selection_of(selections, donor)
            cached = range(output.cached_tokens)
            own = {
                layer: {query: before[layer][query] for query in cached} | rows
                for layer, rows in own.items()
            }
        logprobs = np.concatenate([output.prompt_logprobs, output.logprobs])
        sequences.append((prompt + output.token_ids, logprobs, own))
    return outputs, sequences


def write_model(directory: Path, **options) -> Path:
    return write_tiny_model(directory, TinyModelConfig(**options))
