"""Streams of the policy lab from what a model has selected: traces, and arrays in a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from sglang_ess.sim.planning.lab import Stream
from sglang_ess.sim.policies import Clues
from sglang_ess.trace.records import Record
from sglang_ess.trace.trace import read_trace


def load(path: str | Path) -> list[Stream]:
    """Return each layer's stream of one request's successive queries; slots are positions.

    path  a trace (of --ess-trace, or converted from another system's lists), whose request with
          the most queries counts; or an .npz with the arrays of `of_layer` by layer:
          topk_layer_0, runner_layer_0, scores_layer_0, ..., and the number `first`
    Raises: ValueError, one line, for a file without lists; OSError if there is none.
    """
    path = Path(path)
    streams = _from_arrays(path) if path.suffix == ".npz" else _from_trace(path)
    if not streams:
        raise ValueError(f"{path} must have the top-k lists of a layer: got none.")
    return streams


def of_layer(
    topk: np.ndarray, runner_ups: np.ndarray | None, scores: np.ndarray | None, first: int
) -> Stream:
    """Return the stream of one layer.

    topk        [queries, k] int32 positions, -1 pads, in any order
    runner_ups  [queries, m] int32: those of the next ranks, in any order; None: not known
    scores      [queries, k + m] float32: of topk's columns and then of runner_ups'; None: not known
    first       position of the first query
    Clues: the runner-ups, the best first; and each lookup's score between the list's least and
    greatest.
    """
    context = first + len(topk)
    largest = max(context - 1, int(topk.max()), -1 if runner_ups is None else runner_ups.max())
    hints = strengths = None
    if runner_ups is not None and scores is not None:
        own, others = scores[:, : topk.shape[1]], scores[:, topk.shape[1] :]
        order = np.argsort(-np.where(runner_ups >= 0, others, -np.inf), axis=1, kind="stable")
        hints = np.take_along_axis(runner_ups, order, axis=1)[:, None]
        known = (topk >= 0) & np.isfinite(own)
        least = np.where(known, own, np.inf).min(axis=1, keepdims=True)
        span = np.where(known, own, -np.inf).max(axis=1, keepdims=True) - least
        share = np.where(known, own - least, 0) / np.where(span > 0, span, 1)
        strengths = share.astype(np.float32)[:, None]
    steps = np.ascontiguousarray(topk[:, None], np.int32)
    return Stream(steps, np.array([first]), int(largest) + 1, clues=Clues(hints, strengths))


def _from_arrays(path: Path) -> list[Stream]:
    with np.load(path) as found:
        layers = sorted(int(name.split("_")[-1]) for name in found if name.startswith("topk_"))
        first = int(found["first"]) if "first" in found else None
        streams = []
        for layer in layers:
            topk = found[f"topk_layer_{layer}"]
            others, scores = (
                found[name] if (name := f"{kind}_layer_{layer}") in found else None
                for kind in ("runner", "scores")
            )
            streams.append(of_layer(topk, others, scores, _first(topk) if first is None else first))
    return streams


def _first(topk: np.ndarray) -> int:
    """The position of the first query, which sees itself: at least its list's last position."""
    return max(int(topk[0].max()), int(topk.max()) + 1 - len(topk))


def _from_trace(path: Path) -> list[Stream]:
    records = list(read_trace(path))
    by_request = Counter(record.request_id for record in records)
    if not by_request:
        return []
    (name, _), *_ = by_request.most_common(1)
    by_layer: dict[int, list[Record]] = {}
    for record in records:
        if record.request_id == name:
            by_layer.setdefault(record.layer, []).append(record)
    return [_of_records(by_layer[layer]) for layer in sorted(by_layer)]


def _of_records(records: list[Record]) -> Stream:
    """Return the stream of one layer's queries of one request."""
    topk = _padded([record.positions for record in records])
    if any(record.runner_ups is None or record.scores is None for record in records):
        return of_layer(topk, None, None, records[0].length - 1)
    others = _padded([record.runner_ups for record in records if record.runner_ups is not None])
    scores = np.full((len(topk), topk.shape[1] + others.shape[1]), np.nan, np.float32)
    for row, record in zip(scores, records, strict=True):
        if record.scores is not None and record.runner_ups is not None:
            count = len(record.positions)
            row[:count] = record.scores[:count]
            row[topk.shape[1] :][: len(record.runner_ups)] = record.scores[count:]
    return of_layer(topk, others, scores, records[0].length - 1)


def _padded(lists: list[np.ndarray]) -> np.ndarray:
    """[n, longest] int32, -1 pads."""
    found = np.full((len(lists), max(map(len, lists))), -1, np.int32)
    for row, one in zip(found, lists, strict=True):
        row[: len(one)] = one
    return found
