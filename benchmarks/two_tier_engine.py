"""An SGLang engine that a benchmark can hold still: two_tier's systems take turns, step by step.

The scheduler's process writes one line a pass: what ran, when, and what the hot tier counted.
Held means SIGSTOP: an engine that waits for its turn takes no core from the one that runs
(SGLang's own pause polls at full speed), with its requests in place.
"""

from __future__ import annotations

import asyncio
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from sglang_ess.cpu import set_thread_defaults

RECORD_VAR = "ESS_BENCH_RECORD"
POLL_SECONDS = 0.02
# Passes in a row with no prefill among them: whoever could be admitted has been.
SETTLED_PASSES = 6
# Of a window: the first passes after a stop find cold caches, the first was under way.
DROPPED_PASSES = 3
FILL_SECONDS = 400


# --- inside the scheduler's process -----------------------------------------------------


def run_recorded_scheduler(*args, **kwargs) -> None:
    """SGLang's scheduler process; each of its passes appends a JSON line to the record."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _install_record(os.environ[RECORD_VAR])
    run_scheduler_process(*args, **kwargs)


def _install_record(path: str) -> None:
    import torch
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    file = open(path, "a", buffering=1)
    run_batch, retract_decode = Scheduler.run_batch, ScheduleBatch.retract_decode
    retracted = 0

    @functools.wraps(retract_decode)
    def counted(self, *args, **kwargs):
        nonlocal retracted
        result = retract_decode(self, *args, **kwargs)
        retracted += len(result[0])
        return result

    @functools.wraps(run_batch)
    def recorded(self, batch, *args, **kwargs):
        start = time.perf_counter()
        result = run_batch(self, batch, *args, **kwargs)
        line = {"start": start, "end": time.perf_counter(), "mode": batch.forward_mode.name}
        line |= {"batch": batch.batch_size(), "tokens": batch.extend_num_tokens or 0}
        line |= {"context_tokens": int(batch.seq_lens.sum())}
        line |= {"retracted": retracted, "pid": os.getpid(), "threads": torch.get_num_threads()}
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        file.write(json.dumps(line | _hot_tier(pool)) + "\n")
        return result

    ScheduleBatch.retract_decode, Scheduler.run_batch = counted, recorded
    Scheduler.get_init_info = _with_sizes(Scheduler.get_init_info)


def _hot_tier(pool: Any) -> dict[str, list[int]]:
    """Lookups and misses since the start, by layer; nothing one-tier."""
    counters = [cache.counters for cache in getattr(pool, "hot_caches", ())]
    return {key: [c[key] for c in counters] for key in ("lookups", "misses")}


def _with_sizes(get_init_info: Callable) -> Callable:
    """The handshake with "bench_pool": what the pool's own buffers take, counted here."""

    @functools.wraps(get_init_info)
    def call(self):
        info = get_init_info(self)
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        sizes = {"slots": self.max_total_num_tokens, "pid": os.getpid()}
        return {**info, "bench_pool": sizes | pool_bytes(pool)}

    return call


def pool_bytes(pool: Any) -> dict[str, int]:
    """Bytes in each memory, from the buffers. One-tier: latent rows and index keys."""
    index_keys = sum(buffer.nbytes for buffer in pool.index_k_with_scale_buffer)
    latents = sum(buffer.nbytes for buffer in pool.kv_buffer)
    row_bytes = pool.kv_buffer[0][0].nbytes
    if not hasattr(pool, "hot_caches"):
        device = index_keys + latents
        return {"device_bytes": device, "host_bytes": 0, "hot_rows": 0, "row_bytes": row_bytes}
    hot_rows = pool.hot_caches[0].num_rows
    return {
        "device_bytes": pool.device_bytes,
        "host_bytes": pool.host_tier.nbytes,
        "hot_rows": hot_rows,
        "row_bytes": row_bytes,
    }


# --- in a Worker ------------------------------------------------------------------------


class RecordedEngine:
    """An sglang.Engine whose scheduler's process is `scheduler`; lives in a Worker.

    record: file to which it appends a line a pass; server_args: of the Engine
    fork: its children need not import SGLang again; not with CUDA, which a fork cannot use
    """

    def __init__(self, record: str, server_args: dict[str, Any], scheduler: Callable, fork=True):
        os.environ[RECORD_VAR] = record
        Path(record).touch()
        import sglang.srt.entrypoints.engine as engine_module

        if fork:  # the Engine would spawn its children: twice more 12 s of importing SGLang
            multiprocessing.set_start_method("fork", force=True)
            engine_module.mp.set_start_method = lambda *args, **kwargs: None

        class Engine(engine_module.Engine):
            run_scheduler_process_func = staticmethod(scheduler)

        # A held scheduler must not look hung. sleep_on_idle: see cpu_serving.
        fixed = {"skip_tokenizer_init": True, "sleep_on_idle": True, "log_level": "error"}
        self._engine = Engine(**(fixed | {"watchdog_timeout": 3600} | server_args))
        self._record = open(record)
        info = self._engine._scheduler_init_result.scheduler_infos[0]
        self._sizes = info["bench_pool"]

    def sizes(self) -> dict[str, Any]:
        """What the scheduler's process said of its pool."""
        return self._sizes

    def _passes(self) -> list[dict]:
        """The passes recorded since the last call."""
        return list(self._complete_lines())

    def _complete_lines(self) -> Iterator[dict]:
        while line := self._record.readline():
            if not line.endswith("\n"):  # being written
                self._record.seek(self._record.tell() - len(line))
                return
            yield json.loads(line)

    def close(self) -> None:
        self._engine.shutdown()


class HeldEngine(RecordedEngine):
    """A RecordedEngine that can be stopped between two steps.

    generate() runs prompts to their end. fill() submits requests and holds the engine once
    it runs as many as it can; window() lets it make some decode steps more; drain() ends it.
    sizes(): device_bytes, host_bytes, slots, hot_rows, row_bytes of its pool
    """

    def __init__(self, record: str, server_args: dict[str, Any]):
        set_thread_defaults()
        super().__init__(record, server_args, run_recorded_scheduler)
        self._scheduler = psutil.Process(self._sizes["pid"])
        self._requests: list[asyncio.Task] = []

    def generate(self, prompts, new_tokens: int) -> dict[str, Any]:
        """Run the prompts from an empty radix cache: token_ids, passes, submitted."""
        self._engine.flush_cache()
        self._passes()
        submitted = time.perf_counter()
        answers = self._engine.generate(input_ids=prompts, sampling_params=greedy(new_tokens))
        token_ids = [list(answer["output_ids"]) for answer in answers]
        return {"token_ids": token_ids, "passes": self._passes(), "submitted": submitted}

    def fill(self, prompts, new_tokens: int, flush: bool = True) -> list[dict]:
        """Submit the prompts; hold once no more of them can be admitted. Returns the passes.

        flush: empty the radix cache before, or prompts served before are prefix hits
        Raises: TimeoutError if that takes FILL_SECONDS; whatever a request raised.
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
        # The one that was under way when the engine was stopped has the stop in it.
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
        while not _is_settled(passes):
            await asyncio.sleep(POLL_SECONDS)
            passes += self._passes()
            for request in self._requests:
                if request.done():  # before the window: it failed, or asks for too few tokens
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


def greedy(new_tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}


def _is_settled(passes: list[dict]) -> bool:
    last = passes[-SETTLED_PASSES:]
    return len(last) == SETTLED_PASSES and all(one["mode"] == "DECODE" for one in last)
