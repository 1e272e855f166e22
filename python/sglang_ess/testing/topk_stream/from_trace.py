"""A table of top-k streams from an --ess-trace recording of real weights."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from sglang_ess.testing.topk_stream.table import StreamTable, check_contexts, seam
from sglang_ess.trace.trace import Trace


def from_trace(trace: Trace, streams: int, steps: int) -> StreamTable:
    """The first steps of the longest requests that have so many, each a stream.

    Its one context is the shortest of them at its start. Positions behind it, of what has been
    generated since, give way to the unselected ones selected last. What was selected before the
    recording is not known: for the seam it is taken as what the first steps mirrored.
    Raises: ValueError, one line, if the trace has too few such requests; as Trace.frames.
    """
    lengths, counts = {}, defaultdict(int)
    for record in trace:
        if len(record.positions) == trace.topk:
            counts[record.request_id, record.layer] += 1
            lengths.setdefault(record.request_id, record.length)
    # One query more than steps: the selection before the first.
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


def _selections(trace: Trace, requests: list[str], count: int) -> dict:
    """{(request, layer): its first `count` full selections}."""
    found = defaultdict(list)
    for record in trace:
        rows = found[record.request_id, record.layer] if record.request_id in requests else None
        if rows is not None and len(rows) < count and len(record.positions) == trace.topk:
            rows.append(record.positions)
    return found


def _folded(selections: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The selections with positions below `tokens` only, as many."""
    used = np.arange(tokens) - tokens  # before the first: later positions are the more recent
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
    """Positions [tokens], least recently selected first: what comes back first left last."""
    first = np.full(tokens, len(steps), np.int64)
    for step in range(len(steps) - 1, -1, -1):
        first[steps[step]] = step
    first[before] = -1
    return np.argsort(-first, kind="stable").astype(np.int32)
