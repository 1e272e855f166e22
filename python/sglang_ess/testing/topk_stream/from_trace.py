"""Make a table of top-k streams of an --ess-trace recording of real weights."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from sglang_ess.testing.topk_stream.table import StreamTable, check_contexts, seam
from sglang_ess.trace.trace import Trace


def from_trace(trace: Trace, streams: int, steps: int) -> StreamTable:
    """Make a table of the first `steps` steps of the longest requests, one a stream.

    The one context of the table is the shortest start of these requests. Later positions, of
    generated tokens, are replaced by the unselected ones that were selected last. The selections
    before the recording are unknown; for the seam they are taken as the first steps mirrored.
    Raises: ValueError, one line, if the trace has too few such requests; as Trace.frames.
    """
    lengths: dict[str, int] = {}
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for record in trace.kept():
        if len(record.positions) == trace.topk:
            counts[record.request_id, record.layer] += 1
            lengths.setdefault(record.request_id, record.length)
    # One query more than steps, for the selection before the first step.
    long = [
        name
        for name in lengths
        if all(counts[name, layer] > steps for layer in range(trace.layers))
    ]
    chosen = sorted(long, key=lambda name: -lengths[name])[:streams]
    if len(chosen) < streams:
        raise ValueError(
            f"{trace.path} must have {streams} requests of more than {steps} decode steps past "
            f"top-k {trace.topk} in each layer: got {len(chosen)}. Lower --streams or --steps."
        )
    context = min(lengths[name] for name in chosen)
    check_contexts([context], trace.topk)
    table = np.empty((streams, trace.layers, steps, trace.topk), np.int32)
    seams = np.empty((streams, trace.layers, context - 1), np.int32)
    for (name, layer), selected in _selections(trace, chosen, steps + 1).items():
        place = chosen.index(name), layer
        before, *after = _folded(selected, context - 1)
        table[place] = after
        seams[place] = seam(_mirrored_order(before, table[place], context - 1), table[place])
    note = f"recorded: {trace.path.name}"
    return StreamTable((context,), (table,), (seams,), note)


def _selections(
    trace: Trace, requests: list[str], count: int
) -> dict[tuple[str, int], list[np.ndarray]]:
    """Return {(request, layer): its first `count` full selections}."""
    found: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for record in trace.kept():
        rows = found[record.request_id, record.layer] if record.request_id in requests else None
        if rows is not None and len(rows) < count and len(record.positions) == trace.topk:
            rows.append(record.positions)
    return found


def _folded(selections: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Return the selections with positions below `tokens` only, each of the same size."""
    used = np.arange(tokens) - tokens  # before the first step later positions are more recent
    folded = []
    for step, positions in enumerate(selections):
        kept = positions[positions < tokens]
        missing = len(positions) - len(kept)
        used[kept] = step + 1
        others = np.setdiff1d(np.arange(tokens), kept)
        kept = np.concatenate([kept, others[np.argsort(-used[others], kind="stable")[:missing]]])
        used[kept] = step + 1
        folded.append(kept.astype(np.int32))
    return folded


def _mirrored_order(before: np.ndarray, steps: np.ndarray, tokens: int) -> np.ndarray:
    """Return positions [tokens], least recently selected first: the next to return left last."""
    first = np.full(tokens, len(steps), np.int64)
    for step in range(len(steps) - 1, -1, -1):
        first[steps[step]] = step
    first[before] = -1
    return np.argsort(-first, kind="stable").astype(np.int32)
