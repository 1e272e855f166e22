"""Hot tier counters out of a running engine."""


def expose() -> None:
    """Add "hot_counters", one dict a layer, to what the scheduler says of itself."""
    from sglang.srt.managers.scheduler import Scheduler

    from tests.support import engine as engines

    original = Scheduler.get_internal_state

    def with_counters(scheduler, request):
        answer = original(scheduler, request)
        caches = scheduler.token_to_kv_pool_allocator.get_kvcache().hot_caches
        answer.internal_state["hot_counters"] = [
            cache.counters | {"occupied": cache.occupied} for cache in caches
        ]
        return answer

    Scheduler.get_internal_state = with_counters
    engines._hot_counters = _hot_counters


def _hot_counters(engine) -> list[dict[str, int]]:
    return engine.get_server_info()["internal_states"][0]["hot_counters"]
