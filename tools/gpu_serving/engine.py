"""A decode server that gpu_serving fills with requests whose prompts nobody computes.

SGLang's fake transfer reports at once that a prompt's rows have arrived: the slots hold what they
held before, which costs a step what true rows would. A request's id says how many others it must
wait for and how the scheduler's process has to run their steps:

    <fill>.<batch>.<label+label+...>.<steps>.<number>

The requests of a fill join in one step. Its steps then go in windows of <steps>, the labels in
turn: each names the mode of overlap (off, da, dba), or "auto" for the server's own choice. One
engine with ESS on a GPU has a decode graph of every mode, so the modes are compared on one batch,
one hot tier and one minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.serving.engines import RECORD_VAR, RecordedEngine, greedy, with_facts, wrap
from sglang_ess.cpu import set_thread_defaults

FAKE_HOST = "2.2.2.2"  # sglang.srt.disaggregation.utils.FAKE_BOOTSTRAP_HOST; a test compares
AUTO = "auto"
LEAVE_SECONDS = 20  # for requests to end once they are aborted


class Fill(NamedTuple):
    """What a request's id says."""

    number: int
    batch: int
    labels: tuple[str, ...]
    steps: int

    @classmethod
    def of(cls, rid: str) -> Fill:
        number, batch, labels, steps, _ = rid.split(".")
        return cls(int(number), int(batch), tuple(labels.split("+")), int(steps))

    def rid(self, request: int) -> str:
        return f"{self.number}.{self.batch}.{'+'.join(self.labels)}.{self.steps}.{request}"

    def label(self, index: int) -> str:
        """Label of the fill's decode pass `index`."""
        return self.labels[index // self.steps % len(self.labels)]


# --- inside the scheduler's process -----------------------------------------------------


def run_decode_scheduler(*args, **kwargs) -> None:
    """SGLang's scheduler process; requests join together, each decode pass is recorded."""
    from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    record, force = os.environ[RECORD_VAR], _mode_switch()
    wrap(Scheduler, "process_decode_queue", together)
    wrap(Scheduler, "run_batch", lambda run_batch: recorded(run_batch, record, force))
    wrap(Scheduler, "get_init_info", with_facts(_facts))
    run_scheduler_process(*args, **kwargs)


def together(process_decode_queue: Callable) -> Callable:
    """Keep a fill in the queue of arrivals until all of it is there."""
    released = -1

    def call(self):
        nonlocal released
        waiting = self.disagg_decode_prealloc_queue.queue
        if waiting and (fill := Fill.of(waiting[0].req.rid)).number > released:
            if len(waiting) < fill.batch:
                return
            released = fill.number
        process_decode_queue(self)

    return call


def recorded(run_batch: Callable, record: str, force: Callable[[str, int], None]) -> Callable:
    """Each decode pass appends a line: its fill, its index there and its label, and when it was
    launched. The device is not asked: misses are the pool's last known total, or null.
    """
    file = open(record, "a", buffering=1)
    fill, index = None, 0

    def call(self, batch, *args, **kwargs):
        nonlocal fill, index
        if not (batch.forward_mode.is_decode() and batch.reqs):
            return run_batch(self, batch, *args, **kwargs)
        if (now := Fill.of(batch.reqs[0].rid)) != fill:
            fill, index = now, 0
        label = fill.label(index)
        force(label, len(batch.reqs))
        line = {"fill": fill.number, "index": index, "label": label, "batch": len(batch.reqs)}
        index += 1
        totals = getattr(self.token_to_kv_pool_allocator.get_kvcache(), "totals", lambda: None)()
        line |= {"start": time.perf_counter(), "misses": totals and totals[0]}
        file.write(json.dumps(line) + "\n")
        return run_batch(self, batch, *args, **kwargs)

    return call


def _mode_switch() -> Callable[[str, int], None]:
    """force(label, batch): the mode of the next steps. One tier and the CPU have none."""
    import torch

    if not torch.cuda.is_available():
        return lambda label, batch: None
    from sglang_ess.attention import backend_cuda
    from sglang_ess.attention.overlap import Mode

    def force(label: str, batch: int) -> None:
        if backend_cuda.active is not None:
            backend_cuda.active.force_mode(None if label == AUTO else Mode(label), batch)

    return force


def _facts(scheduler: Any, pool: Any) -> dict[str, Any]:
    """What the KV pool really holds, counted by its buffers."""
    allocator = scheduler.token_to_kv_pool_allocator
    coordinator = getattr(scheduler, "hisparse_coordinator", None)
    facts = {"slots": allocator.size} | memory_of(pool, coordinator)
    if coordinator is not None:
        facts["metadata_bytes"] += _nbytes(allocator)
    return facts


def memory_of(pool: Any, coordinator: Any = None) -> dict[str, Any]:
    """Bytes of a sparse model's pool by their use.

    latent_bytes: device rows; index_bytes: index keys; metadata_bytes: the rest on the device
    (maps, staging, plans; HiSparse's tables, which SGLang does not count); host_bytes: rows
    hot_rows: of a layer, on average; None if every slot has its device row
    """
    index = sum(buffer.nbytes for buffer in pool.index_k_with_scale_buffer)
    if hasattr(pool, "hot_caches"):
        layers = pool.hot_caches
        latents = sum(
            cache.num_rows * cache.num_layers * pool.host_tier.row_bytes for cache in layers
        )
        facts = {"metadata_bytes": pool.device_bytes - index - latents}
        facts |= {"host_bytes": pool.host_tier.nbytes}
        facts |= {"hot_rows": sum(cache.num_rows for cache in layers) / len(layers)}
    else:
        latents = sum(buffer.nbytes for buffer in pool.kv_buffer)
        facts = {"metadata_bytes": 0, "host_bytes": 0, "hot_rows": None}
    if coordinator is not None:
        facts["metadata_bytes"] += _nbytes(coordinator)
        host = coordinator.mem_pool_host
        facts["host_bytes"] = host.size * host.size_per_token
    return facts | {"latent_bytes": latents, "index_bytes": index}


def _nbytes(owner: Any) -> int:
    """Bytes of its tensors on a device."""
    import torch

    tensors = [value for value in vars(owner).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")


# --- in a Worker ------------------------------------------------------------------------


class DecodeEngine(RecordedEngine):
    """A RecordedEngine of disaggregated decode with the fake transfer.

    vocabulary: of the model; fork: see RecordedEngine
    """

    def __init__(self, record: str, server_args: dict[str, Any], vocabulary: int, fork: bool):
        set_thread_defaults()
        fixed = {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "fake"}
        super().__init__(record, fixed | server_args, run_decode_scheduler, fork)
        self._vocabulary, self._fills = vocabulary, 0

    def decode(
        self, batch: int, context: int, new_tokens: int, labels: Sequence[str], steps: int,
        seconds: float,
    ) -> list[dict]:  # fmt: skip
        """Decode `batch` requests of `context` tokens for new_tokens steps; their passes.

        Requests that did not fit are aborted when the first ones are done.
        Raises: TimeoutError if none is done in `seconds`; what a request raised.
        """
        self._passes()
        fill = Fill(self._fills, batch, tuple(labels), steps)
        self._fills += 1
        self._engine.loop.run_until_complete(self._run(fill, context, new_tokens, seconds))
        return [one for one in self._passes() if one["fill"] == fill.number]

    async def _run(self, fill: Fill, context: int, new_tokens: int, seconds: float) -> None:
        prompt = [(31 * i) % self._vocabulary for i in range(context)]
        tasks = [
            asyncio.ensure_future(self._engine.async_generate(
                input_ids=prompt, sampling_params=greedy(new_tokens), rid=fill.rid(i),
                bootstrap_host=FAKE_HOST, bootstrap_room=fill.number * 1_000_000 + i + 1,
            ))
            for i in range(fill.batch)
        ]  # fmt: skip
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=first)
        # All that joined in one step end in one step: their answers are under way.
        await asyncio.wait(tasks, timeout=0.5)
        self._engine.tokenizer_manager.abort_request(abort_all=True)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LEAVE_SECONDS)
        if not done:
            raise TimeoutError(f"{fill.batch} requests must decode {new_tokens} tokens within "
                               f"{seconds:.0f} s: none did")  # fmt: skip
        for task in done:
            task.result()
