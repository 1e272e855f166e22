"""Deliberate corruptions of index groups in a running two-tier engine: tests must notice each.

install() puts all of them in an engine's process, asleep; EngineProcess.switched(fault=name)
wakes one. early_fetches counts what the engine fetched early.
"""

from tests.support import switches

FAULTS = ("row_of_the_wrong_layer", "stale_row_in_the_third_layer", "missed_early_fetch")


def _is(fault) -> bool:
    return switches.value("fault") == fault


def install() -> None:
    """row_of_the_wrong_layer: a group's later layers fetch the rows of the layer before.

    stale_row_in_the_third_layer: a decode step's new rows reach all hot rows but that layer's.
    missed_early_fetch: the rows of a group's second layer are reported as there, and are not.
    """
    from sglang_ess.attention.passes import EarlyFetch
    from sglang_ess.tiers import HotCache

    load, refill, start = HotCache._load, HotCache.refill, EarlyFetch.start

    def load_of_another(cache, layer, slots, rows):
        words = cache._host_words
        if layer and _is("row_of_the_wrong_layer"):
            cache._host_words = words[-1:] + words[:-1]
        load(cache, layer, slots, rows)
        cache._host_words = words

    def forgetful(cache, layer, rows):
        if not (layer == 2 and _is("stale_row_in_the_third_layer")):
            refill(cache, layer, rows)

    def partly(fetches, cache, plan):
        fetch = cache.fetch
        if _is("missed_early_fetch"):
            cache.fetch = lambda plan, layer: None if layer == 1 else fetch(plan, layer)
        start(fetches, cache, plan)
        if _is("missed_early_fetch"):
            for copy in fetches._copies:
                copy.result()
            del cache.fetch

    HotCache._load, HotCache.refill, EarlyFetch.start = load_of_another, forgetful, partly
    _count()


def _count() -> None:
    """Add "early_fetches", plans whose rows were fetched early, to what the scheduler says."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.attention.passes import EarlyFetch
    from tests.support import engine as engines

    original, start, counted = Scheduler.get_internal_state, EarlyFetch.start, []

    def counting(fetches, cache, plan):
        counted.append(cache.num_layers)
        start(fetches, cache, plan)

    def with_count(scheduler, request):
        answer = original(scheduler, request)
        answer.internal_state["early_fetches"] = len(counted)
        return answer

    EarlyFetch.start, Scheduler.get_internal_state = counting, with_count
    engines._early_fetches = _early_fetches


def _early_fetches(engine) -> int:
    return engine.get_server_info()["internal_states"][0]["early_fetches"]
