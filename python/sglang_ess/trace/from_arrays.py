"""Makes a trace of the top-k lists, and the indexer's scores, that another system has saved.

The lists are of one sequence, a row for each of its successive queries. Those of a prefill pass,
whose next tokens are given, are what decoding the same tokens would select. Slots are positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sglang_ess.layout import MIB
from sglang_ess.tiers.hot_cache import PlanBuffers
from sglang_ess.trace.array_files import open_arrays
from sglang_ess.trace.array_lists import LayerLists, Sizes, sizes_of
from sglang_ess.trace.trace_recorder import RecordedHotCache, TraceRecorder

BLOCK_BYTES = 64 * MIB  # of the rows, and what is made of them, that are in memory at a time
ENTRY_BYTES = 32  # of a list's entry or a score, with what is made of it
NO_LIMIT = 1 << 62
REQUEST = "sequence"


@dataclass(frozen=True)
class Layout:
    """How another system has saved its lists; names as array_files.open_arrays takes them.

    lists        names of the lists, integers [queries, k]: positions in any order, -1 pads anywhere
    scores       names of the scores, floats; empty: read none. A row for each query, with k
                 columns, for the list's entries, or with one for each position
    first_query  position of the first row's query. It sees itself and those before it
    runner_ups   positions below each list to keep with their scores, where scores are by position;
                 None: a quarter of k
    """

    lists: str = "dsa_topk_indices_layer_{layer}"
    scores: str = "indexer_logits_layer_{layer}"
    first_query: int = 0
    runner_ups: int | None = None


@dataclass(frozen=True)
class Converted:
    """What a conversion has read and written.

    layers            their numbers in the source; they are 0, 1, ... in the trace
    sizes             of each layer
    hot_rows          of each layer
    ranked, agreeing  as LayerLists, of all layers
    """

    layers: list[int]
    sizes: Sizes
    hot_rows: int
    ranked: int
    agreeing: int


def convert(
    source: Path,
    target: Path,
    layout: Layout,
    skip: int = 0,
    hot_rows: int | None = None,
    progress: Callable[[int, int], object] = lambda done, queries: None,
) -> Converted:
    """Write a trace of the lists in source, all layers of a query before the next query.

    source, target  array_files.open_arrays reads the one; the other is replaced if it exists
    skip      first queries to leave out; later ones can select their positions all the same
    hot_rows  of each layer, for the counters of the trace: it can be replayed with any others.
              None: 2 k. One for each position at most
    progress  called with the queries written so far, and those of the source
    Raises: OSError; ValueError, one line, for files and arrays that do not fit the layout. Then
    nothing is written.
    """
    lists = open_arrays(source, layout.lists)
    scores = open_arrays(source, layout.scores) if layout.scores else {}
    # Scores by their usual name may be missing, others may not.
    for option, wanted, found in (
        ("--lists", layout.lists, lists),
        ("--scores", layout.scores, scores or layout.scores in ("", Layout.scores)),
    ):
        if not found:
            raise ValueError(
                f"{source} must have arrays named {wanted!r}: got none. Give {option} their name."
            )
    sizes = sizes_of(lists, scores, layout.first_query, layout.runner_ups)
    if not 0 <= skip < sizes.queries:
        raise ValueError(f"--skip must leave out 0 to {sizes.queries - 1} queries: got {skip}.")
    hot_rows = min(hot_rows or 2 * sizes.topk, sizes.context)
    layers = [LayerLists(sizes, rows, scores.get(layer)) for layer, rows in lists.items()]
    meta = {"source": source.name, "source_layers": list(lists), "skipped": skip}
    part = target.with_name(target.name + ".part")
    recorder = TraceRecorder(
        part, len(lists), sizes.topk, sizes.context, meta | {"first_query": sizes.first_query},
        limit_bytes=NO_LIMIT, runner_ups=sizes.runner_ups if scores else None, waits=True,
    )  # fmt: skip
    try:
        _record(recorder, sizes, layers, (skip, hot_rows), progress)
        recorder.writer.close()
        if recorder.writer.error is not None:
            raise ValueError(f"{part} must be writable to its end: {recorder.writer.error}.")
        part.replace(target)
    finally:
        recorder.writer.close()
        part.unlink(missing_ok=True)
    ranked, agreeing = (sum(getattr(one, n) for one in layers) for n in ("ranked", "agreeing"))
    return Converted(list(lists), sizes, hot_rows, ranked, agreeing)


def _record(
    recorder: TraceRecorder,
    sizes: Sizes,
    layers: list[LayerLists],
    numbers: tuple[int, int],
    progress: Callable[[int, int], object],
) -> None:
    """Read all layers block by block, and plan them query by query. numbers: (skip, hot rows)."""
    skip, hot_rows = numbers
    buffers = PlanBuffers(sizes.topk)
    caches = [recorder.hot_cache(None, hot_rows, sizes.context, buffers) for _ in layers]
    table = np.arange(sizes.context, dtype=np.int32)[None]
    row_bytes = ENTRY_BYTES * (sizes.topk + sizes.columns) * len(layers)
    most = max(1, BLOCK_BYTES // row_bytes)
    for done in range(0, skip, most):
        for layer in layers:
            layer.skip(min(most, skip - done))
    for done in range(skip, sizes.queries, most):
        count = min(most, sizes.queries - done)
        blocks = [layer.read(count) for layer in layers]
        for query in range(count):
            seen = np.array([sizes.first_query + done + query + 1], np.int32)
            recorder.begin_step([REQUEST], np.zeros(1, np.int64), seen, table)
            this = slice(query, query + 1)
            for cache, (topk, scored) in zip(caches, blocks, strict=True):
                lists = torch.from_numpy(topk[this])
                if scored is not None:
                    of_query = (torch.from_numpy(array[this]) for array in scored)
                    recorder.decode_scores(cache.layer, lists, *of_query)
                _plan(cache, lists)
        if not recorder.writer.recording:
            return
        progress(done + count, sizes.queries)


def _plan(cache: RecordedHotCache, lists: torch.Tensor) -> None:
    """Plan a step's lists [1, k], in as many passes as the hot rows need."""
    start: tuple[int, int] | None = (0, 0)
    while start is not None:
        start = cache.plan(lists, start).stop
