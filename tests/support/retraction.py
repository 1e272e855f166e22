"""What becomes of retracted requests, recorded from inside a running engine."""

import os
import pickle
from dataclasses import dataclass

import numpy as np

from tests.support import engine as engines
from tests.support.engine import RECORD_VAR, Output


@dataclass(frozen=True)
class Resume:
    """A retracted request runs again: `cached` of its `tokens` are a prefix hit.

    (SGLang's own cached_tokens counts a request's first admission only.)
    """

    rid: str
    prompt: int
    tokens: int
    cached: int


@dataclass(frozen=True)
class Slots:
    """At a flush: slots of the pool, and those free once the tree evicted all it could."""

    total: int
    free: int


def record() -> None:
    """Append a Resume or Slots to the file named by RECORD_VAR at each.

    Effect: EngineProcess.call knows the functions below as well. SGLang compares its count of
    slots with the pool's size at every step, not only when it is idle, and stops the engine at
    a difference.
    """
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    write = _writer()
    extend = ScheduleBatch.prepare_for_extend
    flush = Scheduler.flush_cache

    def recording_extend(batch):
        for req in batch.reqs:
            if req.is_retracted:
                tokens, prompt = len(req.full_untruncated_fill_ids), len(req.origin_input_ids)
                write(Resume(req.rid, prompt, tokens, req.prefix_len))
        return extend(batch)

    def recording_flush(scheduler, *args, **kwargs):
        allocator = scheduler.token_to_kv_pool_allocator
        scheduler.tree_cache.evict(EvictParams(num_tokens=allocator.size))
        write(Slots(allocator.size, allocator.available_size()))
        return flush(scheduler, *args, **kwargs)

    for call in (_generate_without_logprobs, _interrupt):
        setattr(engines, call.__name__, call)
    ScheduleBatch.prepare_for_extend = recording_extend
    Scheduler.flush_cache = recording_flush


def lose_draft_rows() -> None:
    """Whenever a request resumes, the pool of the draft model is emptied."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    from sglang_ess.mem_cache.pool import EssTokenToKVPool

    pools, make, extend = [], DSATokenToKVPool.__init__, ScheduleBatch.prepare_for_extend

    def remember(pool, *args, **kwargs):
        make(pool, *args, **kwargs)
        if not isinstance(pool, EssTokenToKVPool):
            pools.append(pool)

    def losing(batch):
        if any(req.is_retracted for req in batch.reqs):
            (drafts,) = pools
            for rows in drafts.kv_buffer:
                rows.zero_()
        return extend(batch)

    DSATokenToKVPool.__init__ = remember
    ScheduleBatch.prepare_for_extend = losing


def _generate_without_logprobs(engine, prompts, params) -> list[Output]:
    """SGLang resumes a request that wants logprobs from its logprob_start_len at most."""
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    return [_output(answer) for answer in answers]


def _interrupt(engine, prompt, params, how) -> list[Output]:
    """Run a request, and once it has 100 tokens "preempt" or "pause" it; it goes on afterwards.

    "preempt" sends the same prompt reversed with a higher priority, and gives both outputs.
    """
    return [
        _output(answer)
        for answer in engine.loop.run_until_complete(_interrupted(engine, prompt, params, how))
    ]


async def _interrupted(engine, prompt, params, how) -> list[dict]:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    stream = await engine.async_generate(
        input_ids=prompt, sampling_params=params, stream=True, priority=0
    )
    others = []
    async for answer in stream:
        if how and answer["meta_info"]["completion_tokens"] >= 100:
            if how == "preempt":
                others.append(
                    await engine.async_generate(
                        input_ids=prompt[::-1], sampling_params=params, priority=100
                    )
                )
            else:
                await engine.tokenizer_manager.pause_generation(
                    PauseGenerationReqInput(mode="retract")
                )
                await engine.tokenizer_manager.continue_generation(ContinueGenerationReqInput())
            how = None
    return [answer, *others]


def _output(answer) -> Output:
    meta = answer["meta_info"]
    nothing = np.empty(0)
    return Output(
        meta["id"], list(answer["output_ids"]), nothing, nothing, meta["cached_tokens"], meta
    )


def _writer():
    # Opened at the first event, in the scheduler's process.
    file = None

    def write(event) -> None:
        nonlocal file
        file = file or open(os.environ[RECORD_VAR], "ab")
        pickle.dump(event, file)
        file.flush()

    return write


def events(engine, kind) -> list:
    """The events of one kind that record() has written so far."""
    found = []
    with engine._record.open("rb") as file:
        while True:
            try:
                event = pickle.load(file)
            except EOFError:
                return found
            if isinstance(event, kind):
                found.append(event)


def without_hook() -> None:
    """SGLang's own release_req. (The fork server has ESS's hooks applied, whatever `ess` says.)"""
    from sglang.srt.managers import schedule_batch

    schedule_batch.release_req = schedule_batch.release_req.__wrapped__


def without_splitting() -> None:
    """Slots are kept, but in as few nodes as SGLang makes of them."""
    import sglang_ess.mem_cache.retraction

    sglang_ess.mem_cache.retraction.split_tail_first = lambda req, tree_cache: None


def force() -> None:
    """Retract at every third decode step, whether or not memory is short."""
    import sglang.srt.managers.scheduler as scheduler

    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, 3
