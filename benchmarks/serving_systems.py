"""The two systems that the CPU benchmarks compare, and how their clocks are read.

Each system is an object for a common.Worker.
OurEngine is an sglang.Engine: the scheduler, radix cache, pool and model processes of the
server without its HTTP and text, which generate() has not either. It needs a process of its
own, as the platform and the thread waiting are read from the environment before torch and
sglang are imported. Step times come from the scheduler's process (Engine lets its entry
function be replaced): two clock reads around an op, microseconds in a step of milliseconds.
"""

from __future__ import annotations

import functools
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sglang_ess.cpu import set_thread_defaults

RECORD_VAR = "ESS_BENCH_RECORD"
SPLIT = ("indexer", "topk", "attention")
PARTS = (*SPLIT, "rest")
WARMUP_STEPS = 4

# --- inside the engine's processes ------------------------------------------------------


def run_timed_scheduler(*args, **kwargs) -> None:
    """SGLang's scheduler process with clocks around its passes and around the three ops."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _install_clocks(os.environ[RECORD_VAR])
    run_scheduler_process(*args, **kwargs)


def _install_clocks(record: str) -> None:
    """Each pass appends one JSON line: mode, batch, tokens, start, end, seconds by op."""
    import torch
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.cpu import attention_backend, indexer

    spent: dict[str, float] = dict.fromkeys(SPLIT, 0.0)

    def clocked(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    indexer.index_scores_paged = clocked(indexer.index_scores_paged, "indexer")
    indexer.index_scores_dense = clocked(indexer.index_scores_dense, "indexer")
    indexer.topk_select = clocked(indexer.topk_select, "topk")
    attention_backend.sparse_mla = clocked(attention_backend.sparse_mla, "attention")
    file = open(record, "a", buffering=1)
    run_batch = Scheduler.run_batch

    @functools.wraps(run_batch)
    def timed(self, batch, *args, **kwargs):
        spent.update(dict.fromkeys(SPLIT, 0.0))
        start = time.perf_counter()
        result = run_batch(self, batch, *args, **kwargs)
        facts = {"mode": batch.forward_mode.name, "batch": batch.batch_size()}
        facts |= {"tokens": batch.extend_num_tokens or 0, "threads": torch.get_num_threads()}
        line = facts | {"start": start, "end": time.perf_counter()} | spent
        file.write(json.dumps(line) + "\n")
        return result

    Scheduler.run_batch = timed


class OurEngine:
    """An sglang.Engine; lives in a Worker. kv_cache_dtype "auto" follows the model: bf16."""

    def __init__(self, model: str, kv_cache_dtype: str, slots: int, record: str, waits: str):
        """waits: "ours" sets what launch_server sets, "libgomp" leaves libgomp's default."""
        if waits == "ours":
            set_thread_defaults()
        os.environ[RECORD_VAR] = record
        Path(record).touch()
        from sglang.srt.entrypoints.engine import Engine

        class TimedEngine(Engine):
            run_scheduler_process_func = staticmethod(run_timed_scheduler)

        # sleep_on_idle: an idle scheduler polls at full speed, on a core the other one needs.
        self._engine = TimedEngine(
            model_path=model,
            kv_cache_dtype=kv_cache_dtype,
            max_total_tokens=slots,
            skip_tokenizer_init=True,
            sleep_on_idle=True,
            log_level="error",
        )
        self._record = open(record)

    def generate(self, prompts, new_tokens: int, fresh=True, logprobs=False) -> dict[str, Any]:
        """Run the prompts as one batch; fresh: after emptying the radix cache.

        Returns passes (one dict each), submitted (perf_counter), token_ids, cached (tokens)
        and, if asked, logprobs of each request's first new token.
        """
        if fresh:
            self._engine.flush_cache()
        self._record.read()
        params = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
        submitted = time.perf_counter()
        answers = self._engine.generate(
            input_ids=prompts, sampling_params=params, return_logprob=logprobs
        )
        metas = [answer["meta_info"] for answer in answers]
        return {
            "submitted": submitted,
            "passes": [json.loads(line) for line in self._record.read().splitlines()],
            "token_ids": [list(answer["output_ids"]) for answer in answers],
            "logprobs": [meta["output_token_logprobs"][0][0] for meta in metas if logprobs],
            "cached": sum(meta["cached_tokens"] for meta in metas),
        }

    def close(self) -> None:
        self._engine.shutdown()


# --- inside transformers' process -------------------------------------------------------


class TheirModel:
    """transformers' model in its default configuration; lives in a Worker."""

    def __init__(self, model: str):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").eval()
        self._ids = self._cache = None

    def threads(self) -> int:
        return self._torch.get_num_threads()

    def logprobs(self, prompts, token_ids) -> list[float]:
        """Log-probability of each token_ids[i][0] after prompts[i]."""
        logits = self._model(self._torch.tensor(prompts)).logits[:, -1].float()
        first = self._torch.tensor(token_ids)[:, :1]
        return self._torch.log_softmax(logits, -1).gather(1, first)[:, 0].tolist()

    def prefill(self, prompts) -> float:
        """Seconds from the call to the first new token."""
        start = time.perf_counter()
        return self._generate(self._torch.tensor(prompts), 1)[1][0] - start

    def start(self, prompts) -> None:
        """Get a cache ready for decode(): the prompts, but for their last token.

        One prompt is prefilled and its cache repeated, every request with its own copy: a
        batch of whole prompts takes 34 GB at 16 x 2048 (the indexer copies the keys for each
        query). The last tokens differ, so the requests differ from the first step on.
        """
        ids = self._torch.tensor(prompts)
        self._cache = self._model(ids[:1, :-1], use_cache=True).past_key_values
        self._cache.batch_repeat_interleave(len(prompts))
        self._ids = self._torch.cat([ids[:1, :-1].expand(len(prompts), -1), ids[:, -1:]], 1)

    def decode(self, steps: int) -> list[float]:
        """Seconds of each of the next steps, going on where the last call stopped."""
        self._ids, stamps = self._generate(self._ids, steps + 1, past_key_values=self._cache)
        return np.diff(stamps).tolist()

    def _generate(self, ids, new_tokens: int, **cache):
        """generate(): (all ids, when (perf_counter) each new token was there)."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        stamps: list[float] = []
        done = self._torch.zeros(len(ids), dtype=self._torch.bool)

        class Clock(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                stamps.append(time.perf_counter())
                return done

        ids = self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
            **cache,
        )
        return ids, stamps


# --- reading the clocks -----------------------------------------------------------------


def _parts() -> dict[str, list[float]]:
    return {part: [] for part in PARTS}


@dataclass
class Timing:
    """Seconds of one or more runs of a point.

    prefill: one a run; steps: one a decode step, over all runs
    split[part], prefill_split[part]: how much of each of them went there
    """

    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    split: dict[str, list[float]] = field(default_factory=_parts)
    prefill_split: dict[str, list[float]] = field(default_factory=_parts)

    def __iadd__(self, other: Timing) -> Timing:
        self.prefill += other.prefill
        self.steps += other.steps
        for part in PARTS:
            self.split[part] += other.split[part]
            self.prefill_split[part] += other.prefill_split[part]
        return self


def read_run(run: dict, batch: int, context: int, fresh: bool = True) -> Timing:
    """Timing of one OurEngine.generate().

    Prefill lasts from the call to the end of the last extend pass. A step lasts from the
    start of a decode pass to the start of the next, so the scheduler's own work is in it;
    WARMUP_STEPS are dropped.
    Raises: ValueError if the run was not batch x context: a cached prefix, a retraction, or
    decode passes of another batch size.
    """
    extends = [p for p in run["passes"] if p["mode"] == "EXTEND"]
    decodes = [p for p in run["passes"] if p["mode"] == "DECODE"]
    tokens = sum(p["tokens"] for p in extends)
    if tokens + run["cached"] != batch * context or (fresh and run["cached"]):
        raise ValueError(
            f"a run must prefill {batch} x {context} tokens: got {tokens} "
            f"and {run['cached']} cached"
        )
    sizes = {p["batch"] for p in decodes}
    if sizes != {batch} or decodes[0]["start"] < extends[-1]["end"]:
        raise ValueError(f"every decode pass must have batch {batch}: got {sorted(sizes)}")
    timing = Timing()
    for this, following in zip(decodes[WARMUP_STEPS:], decodes[WARMUP_STEPS + 1 :], strict=False):
        timing.steps.append(following["start"] - this["start"])
        _add_split(timing.split, [this], timing.steps[-1])
    if fresh:
        timing.prefill.append(extends[-1]["end"] - run["submitted"])
        _add_split(timing.prefill_split, extends, timing.prefill[-1])
    return timing


def _add_split(split: dict[str, list[float]], passes: list[dict], total: float) -> None:
    spent = {part: sum(p[part] for p in passes) for part in SPLIT}
    for part in SPLIT:
        split[part].append(spent[part])
    split["rest"].append(total - sum(spent.values()))
