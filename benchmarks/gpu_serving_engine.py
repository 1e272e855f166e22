"""A decode server that gpu_serving fills with requests whose prompts nobody computes.

SGLang's fake transfer says at once that a prompt's rows have arrived: the slots hold whatever
they held, which costs a step what true rows would. A request's id says how many others it must
wait for and how the scheduler's process has to run their steps:

    <fill>.<batch>.<label+label+...>.<steps>.<number>

The requests of a fill join in one step. Its steps then go in windows of <steps>, the labels in
turn: each names the mode of overlap (off, da, dba), or "auto" for the server's own choice, of
an engine with ESS on a GPU. One engine has a decode graph of every mode, so the modes are compared
on one batch, one hot tier and one minute.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.engines import RECORD_VAR, RecordedEngine, greedy
from sglang_ess.cpu import set_thread_defaults

MODES_VAR = "ESS_BENCH_MODES"  # labels that the engine needs decode graphs for
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
        labels = "+".join(self.labels)
        return f"{self.number}.{self.batch}.{labels}.{self.steps}.{request}"

    def label(self, index: int) -> str:
        """Of the fill's decode pass `index`."""
        return self.labels[index // self.steps % len(self.labels)]


# --- inside the scheduler's process -----------------------------------------------------


def run_decode_scheduler(*args, **kwargs) -> None:
    """SGLang's scheduler process; requests join together, each decode pass is recorded."""
    from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    force = _all_modes(os.environ[MODES_VAR].split("+"))
    Scheduler.process_decode_queue = _together(Scheduler.process_decode_queue)
    Scheduler.run_batch = _recorded(Scheduler.run_batch, os.environ[RECORD_VAR], force)
    Scheduler.get_init_info = _with_memory(Scheduler.get_init_info)
    run_scheduler_process(*args, **kwargs)


def _together(process_decode_queue: Callable) -> Callable:
    """Nothing of a fill leaves the queue of arrivals before all of it is there."""
    released = -1

    @functools.wraps(process_decode_queue)
    def call(self):
        nonlocal released
        waiting = self.disagg_decode_prealloc_queue.queue
        if waiting and (fill := Fill.of(waiting[0].req.rid)).number > released:
            if len(waiting) < fill.batch:
                return
            released = fill.number
        process_decode_queue(self)

    return call


def _recorded(run_batch: Callable, record: str, force: Callable[[str, int], None]) -> Callable:
    """Each decode pass appends a line: its fill, its number there and its label, and when it was
    launched. Nothing is asked of the device: misses are the pool's last known total, or null.
    """
    file = open(record, "a", buffering=1)
    fill, index = None, 0

    @functools.wraps(run_batch)
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


def _all_modes(labels: Sequence[str]) -> Callable[[str, int], None]:
    """switch_modes() where there is a card to overlap on; elsewhere a label changes nothing."""
    import torch

    if not torch.cuda.is_available():
        return lambda label, batch: None
    from sglang_ess.attention import backend_cuda

    return switch_modes(labels, lambda: backend_cuda.active)


def switch_modes(labels: Sequence[str], active: Callable[[], Any]) -> Callable[[str, int], None]:
    """Have an EssDsaBackend capture graphs of these modes; what this returns sets the mode
    of a batch's next steps.

    active: gives the process's backend, None one-tier. Effect: patches OverlapPolicy
    """
    from sglang_ess.attention.overlap import Choice, Mode, OverlapPolicy

    forced: Mode | None = None
    construct, choose = OverlapPolicy.__init__, OverlapPolicy.choose

    @functools.wraps(construct)
    def with_modes(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.modes = tuple(Mode) if AUTO in labels else tuple(map(Mode, labels))

    @functools.wraps(choose)
    def forced_choice(self, batch: int) -> Choice:
        return choose(self, batch) if forced is None else Choice(forced, np.ones(self.layers, bool))

    def force(label: str, batch: int) -> None:
        nonlocal forced
        backend, wanted = active(), None if label == AUTO else Mode(label)
        if backend is None or wanted == forced:
            return
        forced = wanted
        choice = backend.policy.choose(batch)
        backend.chosen = choice.mode
        backend.token_to_kv_pool.tier.set_split(choice.split)

    OverlapPolicy.__init__, OverlapPolicy.choose = with_modes, forced_choice
    return force


def _with_memory(get_init_info: Callable) -> Callable:
    """The handshake with "bench_pool": what the KV pool really holds, counted by its buffers."""

    @functools.wraps(get_init_info)
    def call(self):
        info = get_init_info(self)
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        facts = {"slots": self.token_to_kv_pool_allocator.size, "pid": os.getpid()}
        facts |= {"most_requests": self.max_running_requests}
        facts |= memory_of(pool, getattr(self, "hisparse_coordinator", None)) | _device_memory()
        if getattr(self, "hisparse_coordinator", None) is not None:
            facts["metadata_bytes"] += _nbytes(self.token_to_kv_pool_allocator)
        return {**info, "bench_pool": facts}

    return call


def memory_of(pool: Any, coordinator: Any = None) -> dict[str, Any]:
    """Bytes of a sparse model's pool by what they are for.

    latent_bytes: device rows; index_bytes: index keys; metadata_bytes: the rest on the device
    (maps, staging, plans; HiSparse's tables, which SGLang does not count); host_bytes: rows
    hot_rows: of a layer, on average; None where every slot has its device row
    """
    index = sum(buffer.nbytes for buffer in pool.index_k_with_scale_buffer)
    if hasattr(pool, "hot_caches"):
        layers = pool.hot_caches
        latents = sum(cache.num_rows * pool.host_tier.row_bytes for cache in layers)
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
    """Of the tensors that it holds on a device."""
    import torch

    tensors = [value for value in vars(owner).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")


def _device_memory() -> dict[str, int | None]:
    """Of this process as torch sees it, and what the card has left; null without one."""
    import torch

    if not torch.cuda.is_available():
        return {"allocated_bytes": None, "reserved_bytes": None, "free_bytes": None}
    return {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "free_bytes": torch.cuda.mem_get_info()[0],
    }


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

        Those that did not fit are sent away when the first ones are done.
        Raises: TimeoutError where none is done in `seconds`; whatever a request raised.
        """
        self._passes()
        fill = Fill(self._fills, batch, tuple(labels), steps)
        self._fills += 1
        self._engine.loop.run_until_complete(self._run(fill, context, new_tokens, seconds))
        return [one for one in self._passes() if one["fill"] == fill.number]

    async def _run(self, fill: Fill, context: int, new_tokens: int, seconds: float) -> None:
        prompt = [(31 * i) % self._vocabulary for i in range(context)]
        tasks = [
            asyncio.ensure_future(
                self._engine.async_generate(
                    input_ids=prompt,
                    sampling_params=greedy(new_tokens),
                    rid=fill.rid(i),
                    bootstrap_host=FAKE_HOST,
                    bootstrap_room=fill.number * 1_000_000 + i + 1,
                )
            )
            for i in range(fill.batch)
        ]
        done, _ = await asyncio.wait(
            tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )  # fmt: skip
        # One step ends all that joined in one step: their answers are under way.
        await asyncio.wait(tasks, timeout=0.5)
        self._engine.tokenizer_manager.abort_request(abort_all=True)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LEAVE_SECONDS)
        if not done:
            raise TimeoutError(f"{fill.batch} requests must decode {new_tokens} tokens within "
                               f"{seconds:.0f} s: none did")  # fmt: skip
        for task in done:
            task.result()
