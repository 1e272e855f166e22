"""An engine over a store, and faults of the store that EngineProcess.switched wakes."""

import asyncio
import time
from pathlib import Path

from sglang_ess.launch.store_option import StoreSpec, linker_options
from tests.support.tier_scripts import engine

FAULTS = "tests.support.third_tier:install"
LIMIT = 1 << 30
SAVED_SECONDS = 60
LATE_SECONDS = 0.3  # of a page's read, with "late"


def over_store(model, store, ratio=0.1, limit=LIMIT, patches=(), **options):
    """tier_scripts.engine with a store in a directory; ratio None: one tier."""
    linker = linker_options(StoreSpec(Path(store), limit))
    return engine(model, ratio, patches=[FAULTS, *patches], **linker, **options)


def objects(store) -> list[Path]:
    """The files of a store's objects."""
    return sorted(file for file in (Path(store) / "objects").rglob("*") if file.is_file())


def wait_for_objects(store, count: int) -> list[Path]:
    """Wait until a server has saved so many pages."""
    deadline = time.monotonic() + SAVED_SECONDS
    while len(found := objects(store)) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} pages are saved"
        time.sleep(0.05)
    return found


def install() -> None:
    """Meanwhile, switched(fault=...) does one of these:

    slow        a read takes longer than a load may
    late        a read takes long, but not longer than it may
    dead        every read and lookup fails
    kept        freed slots keep their hot rows, as a pool that relies on the loader may do
    kept twice  and the loader does not drop them either
    """
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.mem_cache import linker
    from sglang_ess.mem_cache.allocator import EssPagedAllocator
    from sglang_ess.mem_cache.pool_cpu import CpuEssTokenToKVPool
    from sglang_ess.store.page_store import PageStore
    from tests.support import engine as engines
    from tests.support.switches import value

    read, contains, load = PageStore.read, PageStore.contains, linker.EssLinker.load
    begin, drop_loaded = linker.EssLinker.begin, linker.EssLinker.drop_hot_rows
    release, clear = EssPagedAllocator._release_page_ids, EssPagedAllocator.clear
    drop = CpuEssTokenToKVPool.invalidate_slots
    freeing: list[bool] = []

    def read_or_fail(store, *args):
        if value("fault") == "slow":
            time.sleep(0.5)
        if value("fault") == "late":
            time.sleep(LATE_SECONDS)
        if value("fault") == "dead":
            raise OSError(5, "Input/output error")
        return read(store, *args)

    def contains_or_fail(store, keys):
        if value("fault") == "dead lookup":
            raise OSError(5, "Input/output error")
        return contains(store, keys)

    def while_freeing(original):
        def run(*args):
            freeing.append(True)
            try:
                return original(*args)
            finally:
                freeing.pop()

        return run

    def set_limits():
        linker.GRACE_SECONDS = 0.05 if value("fault") == "slow" else 2.0
        linker.LEAST_BYTES_PER_SECOND = 1e12 if value("fault") == "slow" else 50e6
        linker.REST_SECONDS = 0.2

    def load_as_told(one, rid, transfers):
        set_limits()
        return load(one, rid, transfers)

    def begin_as_told(one, transfer):
        set_limits()
        return begin(one, transfer)

    def drop_as_told(one, slots):
        if value("fault") != "kept twice":
            drop_loaded(one, slots)

    def drop_unless_kept(pool, loc):
        if not (freeing and str(value("fault")).startswith("kept")):
            drop(pool, loc)

    original = Scheduler.get_internal_state

    def with_store(scheduler, request):
        answer = original(scheduler, request)
        linked = scheduler.tree_cache.linker
        if linked is not None:
            found = vars(linked.cache_linker.figures)
            answer.internal_state["store"] = found | {"load_seconds": []}
        return answer

    PageStore.read, PageStore.contains = read_or_fail, contains_or_fail
    linker.EssLinker.load, linker.EssLinker.begin = load_as_told, begin_as_told
    linker.EssLinker.drop_hot_rows = drop_as_told
    EssPagedAllocator._release_page_ids = while_freeing(release)
    EssPagedAllocator.clear = while_freeing(clear)
    CpuEssTokenToKVPool.invalidate_slots = drop_unless_kept
    Scheduler.get_internal_state = with_store
    engines._store_figures, engines._beside = _store_figures, _beside


def _store_figures(engine) -> dict:
    return engine.get_server_info()["internal_states"][0]["store"]


def _beside(engine, running, prompt, new_tokens) -> tuple[int, int]:
    """Begin to decode `running`; then ask `prompt` for a token.

    Returns (tokens of the former meanwhile, cached tokens of the latter).
    """
    params = {"temperature": 0.0, "ignore_eos": True}

    async def run():
        count, begun = 0, asyncio.Event()

        async def decode():
            nonlocal count
            stream = await engine.async_generate(
                input_ids=running, sampling_params=params | {"max_new_tokens": new_tokens},
                stream=True,
            )  # fmt: skip
            async for answer in stream:
                count = answer["meta_info"]["completion_tokens"]
                begun.set()

        task = asyncio.ensure_future(decode())
        await begun.wait()
        before = count
        answer = await engine.async_generate(
            input_ids=prompt, sampling_params=params | {"max_new_tokens": 1}
        )
        during, at_work = count - before, not task.done()
        await task
        assert at_work, "the running request must outlast the load: give it more tokens"
        return during, answer["meta_info"]["cached_tokens"]

    return engine.loop.run_until_complete(run())
