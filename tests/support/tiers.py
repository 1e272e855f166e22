"""Figures of the pool out of a running engine."""


def expose() -> None:
    """Add "hot_counters", one dict a hot cache, and "index_key_bytes", by layer, to what the
    scheduler says of itself."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.mem_cache.allocator import sparse_pool
    from tests.support import engine as engines

    original = Scheduler.get_internal_state

    def with_counters(scheduler, request):
        answer = original(scheduler, request)
        pool = sparse_pool(scheduler.token_to_kv_pool_allocator)
        answer.internal_state["hot_counters"] = [
            cache.counters | {"occupied": cache.occupied, "steps": cache.steps}
            for cache in getattr(pool, "hot_caches", [])  # one tier has none
        ]
        answer.internal_state["index_key_bytes"] = [
            buffer.nbytes for buffer in pool.index_k_with_scale_buffer
        ]
        return answer

    Scheduler.get_internal_state = with_counters
    engines._hot_counters, engines._index_key_bytes = _hot_counters, _index_key_bytes


def _hot_counters(engine) -> list[dict[str, int]]:
    return engine.get_server_info()["internal_states"][0]["hot_counters"]


def _index_key_bytes(engine) -> list[int]:
    return engine.get_server_info()["internal_states"][0]["index_key_bytes"]
