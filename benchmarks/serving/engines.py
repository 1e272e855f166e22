"""The systems that the CPU benchmarks compare, each an object for a Worker.

SGLang runs as an sglang.Engine: the server without its HTTP and its text, which transformers'
generate() lacks too. Its scheduler's process writes one line a pass: what ran, when, and what the
hot tier counted. Each engine needs a process of its own: the platform and the thread waiting are
read from the environment before torch and sglang are imported.
"""

from __future__ import annotations

import asyncio
import functools
import json
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sglang_ess.cpu import set_thread_defaults
from tools.forks import fork_children

RECORD_VAR = "ESS_BENCH_RECORD"
SPLIT = ("indexer", "topk", "attention")  # the operations that a timed scheduler times
POLL_SECONDS = 0.02
SETTLED_PASSES = 6  # decode passes in a row: every request that can be admitted has been
# Passes of a window that do not count: the first ones after a stop find cold caches, and the very
# first was under way.
DROPPED_PASSES = 3
FILL_SECONDS = 400


def run_recorded_scheduler(*args, **kwargs) -> None:
    """SGLang's scheduler process; each of its passes appends a JSON line to the record."""
    _run_scheduler({}, *args, **kwargs)


def run_timed_scheduler(*args, **kwargs) -> None:
    """The same, with the seconds of each operation of SPLIT in every line."""
    _run_scheduler(dict.fromkeys(SPLIT, 0.0), *args, **kwargs)


def _run_scheduler(spent: dict[str, float], *args, **kwargs) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if spent:
        _install_clocks(spent)
    _install_record(os.environ[RECORD_VAR], spent)
    run_scheduler_process(*args, **kwargs)


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function of this process by make(function), which measures it.

    owner: a module, or a class of SGLang's: neither offers a hook for the clock.
    """
    function = getattr(owner, name)
    setattr(owner, name, functools.wraps(function)(make(function)))


def _install_clocks(spent: dict[str, float]) -> None:
    """Two clock reads around each operation: microseconds in a step of milliseconds."""
    from sglang_ess.cpu import attention_backend, indexer

    def clocked(part):
        def make(function):
            def call(*args, **kwargs):
                start = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    spent[part] += time.perf_counter() - start

            return call

        return make

    wrap(indexer, "index_scores_paged", clocked("indexer"))
    wrap(indexer, "index_scores_dense", clocked("indexer"))
    wrap(indexer, "topk_select", clocked("topk"))
    wrap(attention_backend, "sparse_mla", clocked("attention"))


def _install_record(path: str, spent: dict[str, float]) -> None:
    """Of several ranks, the first one writes the passes; each writes where its host tier is.

    spent: seconds by operation; a pass sets them to zero before it runs.
    """
    import torch
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import get_parallel

    file, retracted = open(path, "a", buffering=1), 0

    def counted(retract_decode):
        def call(self, *args, **kwargs):
            nonlocal retracted
            result = retract_decode(self, *args, **kwargs)
            retracted += len(result[0])
            return result

        return call

    def recorded(run_batch):
        def call(self, batch, *args, **kwargs):
            if get_parallel().tp_rank:
                return run_batch(self, batch, *args, **kwargs)
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            result = run_batch(self, batch, *args, **kwargs)
            line = {"start": start, "end": time.perf_counter(), "mode": batch.forward_mode.name}
            line |= {"batch": batch.batch_size(), "tokens": batch.extend_num_tokens or 0}
            line |= {"context_tokens": int(batch.seq_lens.sum()), "retracted": retracted}
            line |= {"threads": torch.get_num_threads(), "kept": line["batch"]}
            if (accepted := getattr(result, "accept_lens", None)) is not None:
                line["kept"] = int(accepted.sum())  # the target's own tokens are among them
            pool = self.token_to_kv_pool_allocator.get_kvcache()
            file.write(json.dumps(line | _hot_tier(pool) | spent) + "\n")
            return result

        return call

    def facts(scheduler, pool):
        sizes = {"slots": scheduler.max_total_num_tokens} | pool_bytes(pool)
        if scheduler.draft_worker is not None:
            drafts = scheduler.draft_worker.draft_worker.draft_runner.token_to_kv_pool
            sizes["device_bytes"] += pool_bytes(drafts)["device_bytes"]
        if hasattr(pool, "host_tier"):
            spans = [(rows.data_ptr(), rows.nbytes) for rows in pool.host_tier.rows]
            spot = Path(f"{path}.rank{get_parallel().tp_rank}")
            spot.write_text(json.dumps({"pid": os.getpid(), "spans": spans}))
        return sizes

    wrap(ScheduleBatch, "retract_decode", counted)
    wrap(Scheduler, "run_batch", recorded)
    wrap(Scheduler, "get_init_info", with_facts(facts))


def with_facts(facts: Callable[[Any, Any], dict]) -> Callable:
    """For the scheduler's handshake: adds a key "bench_pool", what facts(scheduler, pool) gives."""

    def make(get_init_info):
        def call(self):
            pool = self.token_to_kv_pool_allocator.get_kvcache()
            found = {"pid": os.getpid()} | facts(self, pool)
            return {**get_init_info(self), "bench_pool": found}

        return call

    return make


def _hot_tier(pool: Any) -> dict[str, list[int]]:
    """Lookups and misses since the start, by layer; empty lists one-tier."""
    counters = [cache.counters for cache in getattr(pool, "hot_caches", ())]
    return {key: [c[key] for c in counters] for key in ("lookups", "misses")}


def pool_bytes(pool: Any) -> dict[str, int]:
    """Bytes of a pool in each memory, counted by its buffers; hot_rows: of a layer."""
    if hasattr(pool, "hot_caches"):
        device, host = pool.device_bytes, pool.host_tier.nbytes
        hot_rows = pool.hot_caches[0].num_rows
    else:
        buffers = [*pool.index_k_with_scale_buffer, *pool.kv_buffer]
        device, host, hot_rows = sum(buffer.nbytes for buffer in buffers), 0, 0
    return {"device_bytes": device, "host_bytes": host, "hot_rows": hot_rows,
            "row_bytes": pool.kv_buffer[0][0].nbytes}  # fmt: skip


def page_frames(pagemap: Any, start: int, size: int) -> list[int]:
    """The numbers of the physical pages behind whole pages of [start, start + size)."""
    first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
    pagemap.seek(first * 8)
    entries = np.frombuffer(pagemap.read((last - first) * 8), np.uint64)
    frames = entries[entries >> np.uint64(63) == 1] & np.uint64((1 << 55) - 1)
    if len(frames) and not frames.any():
        raise PermissionError("page numbers must be readable: got 0 for all. Run as root.")
    return frames.tolist()


def greedy(new_tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}


class RecordedEngine:
    """An sglang.Engine whose scheduler's process is `scheduler`.

    record: file to which it appends a line a pass; server_args: of the Engine
    fork: its children need not import SGLang again (12 s each); CUDA does not survive a fork
    """

    def __init__(self, record: str, server_args: dict[str, Any], scheduler: Callable, fork=True):
        os.environ[RECORD_VAR] = record
        Path(record).touch()
        import sglang.srt.entrypoints.engine as engine_module

        if fork:
            fork_children()

        class Engine(engine_module.Engine):
            run_scheduler_process_func = staticmethod(scheduler)

        # An idle scheduler polls at full speed, on a core that another engine needs, unless it
        # sleeps. A scheduler that is held must not look hung.
        fixed = {"skip_tokenizer_init": True, "sleep_on_idle": True, "log_level": "error"}
        self._engine = Engine(**(fixed | {"watchdog_timeout": 3600} | server_args))
        self._record = open(record)
        self._sizes = self._engine.get_server_info()["bench_pool"]

    def sizes(self) -> dict[str, Any]:
        """What the scheduler's process said of its pool."""
        return self._sizes

    def generate(
        self, prompts, new_tokens: int, fresh=True, logprobs=False, stop: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Run the prompts as one batch. fresh: empty the radix cache before; stop: token ids
        that end an answer before new_tokens.

        Returns passes (one dict each), submitted (perf_counter), token_ids, cached (tokens) and,
        if asked for, logprobs of each request's first new token.
        """
        if fresh:
            self._engine.flush_cache()
        self._passes()
        sampling = greedy(new_tokens)
        if stop:
            sampling |= {"stop_token_ids": list(stop), "ignore_eos": False}
        submitted = time.perf_counter()
        answers = self._engine.generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=logprobs
        )
        metas = [answer["meta_info"] for answer in answers]
        return {
            "submitted": submitted,
            "passes": self._passes(),
            "token_ids": [list(answer["output_ids"]) for answer in answers],
            "logprobs": [meta["output_token_logprobs"][0][0] for meta in metas if logprobs],
            "cached": sum(meta["cached_tokens"] for meta in metas),
        }

    def resident_host_bytes(self) -> int:
        """Bytes of the ranks' host tiers that the kernel has given memory, shared pages once.

        Source: Documentation/admin-guide/mm/pagemap.rst of Linux; page numbers need root
        Raises: PermissionError without it
        """
        found: set[int] = set()
        for spot in Path(self._record.name).parent.glob(f"{Path(self._record.name).name}.rank*"):
            rank = json.loads(spot.read_text())
            with open(f"/proc/{rank['pid']}/pagemap", "rb") as pagemap:
                for start, size in rank["spans"]:
                    found.update(page_frames(pagemap, start, size))
        return len(found) * mmap.PAGESIZE

    def _passes(self) -> list[dict]:
        """The passes recorded since the last call."""
        found = []
        while line := self._record.readline():
            if not line.endswith("\n"):  # being written
                self._record.seek(self._record.tell() - len(line))
                break
            found.append(json.loads(line))
        return found

    def close(self) -> None:
        self._engine.shutdown()


class TimedEngine(RecordedEngine):
    """A RecordedEngine whose passes have the seconds of each operation of SPLIT.

    waits: "ours" sets the thread waiting that launch_server sets, "libgomp" leaves the default
    """

    def __init__(self, record: str, server_args: dict[str, Any], waits: str):
        if waits == "ours":
            set_thread_defaults()
        super().__init__(record, server_args, run_timed_scheduler)


class HeldEngine(RecordedEngine):
    """A RecordedEngine that can be stopped between two steps.

    fill() submits requests and holds the engine once it runs as many as it can; window() lets it
    make some more decode steps; drain() ends the requests.
    sizes(): device_bytes, host_bytes, slots, hot_rows, row_bytes of its pool; the draft model's
        bytes are among the first
    """

    def __init__(self, record: str, server_args: dict[str, Any]):
        set_thread_defaults()
        super().__init__(record, server_args, run_recorded_scheduler)
        self._scheduler = psutil.Process(self._sizes["pid"])
        self._requests: list[asyncio.Task] = []

    def fill(self, prompts, new_tokens: int, flush: bool = True) -> list[dict]:
        """Submit the prompts; hold once no more of them can be admitted. Returns the passes.

        flush: empty the radix cache before, or prompts served before are prefix hits
        Raises: TimeoutError after FILL_SECONDS; what a request raised.
        """
        if flush:
            self._engine.flush_cache()
        self._passes()
        loop = self._engine.loop
        self._requests = [loop.create_task(self._request(p, new_tokens)) for p in prompts]
        passes = loop.run_until_complete(self._settled())
        self._scheduler.suspend()
        return passes

    def window(self, steps: int) -> list[dict]:
        """Resume for this many decode steps. Returns their passes and the one after them."""
        self._passes()
        resumed = time.perf_counter()
        self._scheduler.resume()
        try:
            passes: list[dict] = []
            need = steps + DROPPED_PASSES + 1
            while len(passes) < need:
                if time.perf_counter() - resumed > FILL_SECONDS:
                    raise TimeoutError(f"{need} passes must take {FILL_SECONDS} s: {len(passes)}")
                time.sleep(POLL_SECONDS)
                passes += self._passes()
        finally:
            self._scheduler.suspend()
        # The pass that was under way when the engine was stopped contains the stop.
        passes = [one for one in passes if one["start"] > resumed]
        return passes[DROPPED_PASSES - 1 :][: steps + 1]

    def drain(self) -> None:
        """Resume and abort everything."""
        self._scheduler.resume()
        self._engine.loop.run_until_complete(self._aborted())
        self._requests = []

    async def _request(self, prompt: list[int], new_tokens: int) -> None:
        await self._engine.async_generate(input_ids=prompt, sampling_params=greedy(new_tokens))

    async def _settled(self) -> list[dict]:
        passes: list[dict] = []
        until = time.perf_counter() + FILL_SECONDS
        while not is_settled(passes):
            await asyncio.sleep(POLL_SECONDS)
            passes += self._passes()
            for request in self._requests:
                if request.done():  # it failed, or asks for too few tokens
                    request.result()
                    raise RuntimeError("a request must outlast the windows: one ended")
            if time.perf_counter() > until:
                raise TimeoutError(f"requests must run within {FILL_SECONDS} s: {len(passes)}")
        return passes

    async def _aborted(self) -> None:
        self._engine.tokenizer_manager.abort_request(abort_all=True)
        await asyncio.wait_for(asyncio.gather(*self._requests, return_exceptions=True), 60)

    def close(self) -> None:
        if self._requests:
            self._scheduler.resume()
        super().close()


def is_settled(passes: list[dict]) -> bool:
    last = passes[-SETTLED_PASSES:]
    return len(last) == SETTLED_PASSES and all(one["mode"] == "DECODE" for one in last)


class TheirModel:
    """transformers' model in its default configuration."""

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
        """Prepare a cache for decode(): the prompts without their last token.

        One prompt is prefilled and its cache repeated, a copy for each request: a batch of whole
        prompts takes 34 GB at 16 x 2048 (the indexer copies the keys for each query). The last
        tokens differ, so the requests differ from the first step on.
        """
        ids = self._torch.tensor(prompts)
        self._cache = self._model(ids[:1, :-1], use_cache=True).past_key_values
        self._cache.batch_repeat_interleave(len(prompts))
        self._ids = self._torch.cat([ids[:1, :-1].expand(len(prompts), -1), ids[:, -1:]], 1)

    def decode(self, steps: int) -> list[float]:
        """Seconds of each of the next steps; the next call continues there."""
        self._ids, stamps = self._generate(self._ids, steps + 1, past_key_values=self._cache)
        return np.diff(stamps).tolist()

    def _generate(self, ids, new_tokens: int, **cache):
        """Run generate(). Returns all ids, and when (perf_counter) each new token was there."""
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
