"""The argument of --ess-topk-stream: a locality profile with its contexts, or a table's file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_ess.sim.model.locality import Locality
from sglang_ess.testing.topk_stream.table import (
    DEFAULT_STEPS,
    DEFAULT_STREAMS,
    FORMAT,
    StreamTable,
    check_contexts,
    default_contexts,
    generate,
    scaled,
)

logger = logging.getLogger(__name__)

MAX_LAYERS = 8  # of a generated table; a deeper model plays each of them in several layers
SEED = 0


@dataclass(frozen=True)
class Profile:
    """PROFILE or PROFILE@CONTEXTS. contexts: None for the default ones."""

    locality: Locality
    name: str
    contexts: tuple[int, ...] | None

    @staticmethod
    def parse(text: str) -> Profile:
        """Parse the text. Raises: ValueError, one line, for a profile that does not exist."""
        name, contexts = text, None
        if found := re.fullmatch(r"(.+)@(\d+(?:,\d+)*)", text):
            name, contexts = found[1], tuple(int(part) for part in found[2].split(","))
        return Profile(Locality.load(name), name, contexts)

    def contexts_at(self, topk: int) -> tuple[int, ...]:
        """Return the contexts for a top-k. Raises: ValueError if they are too short for it."""
        contexts = self.contexts or default_contexts(topk)
        check_contexts(contexts, topk)
        return contexts

    def table(self, topk: int, layers: int) -> StreamTable:
        """Return the table from the cache, or generate it and keep it there."""
        locality, contexts = scaled(self.locality, topk), self.contexts_at(topk)
        layers = min(layers, MAX_LAYERS)
        facts = {
            "format": FORMAT, "locality": asdict(locality), "contexts": contexts,
            "layers": layers, "streams": DEFAULT_STREAMS, "steps": DEFAULT_STEPS, "seed": SEED,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        name = Path(self.name).name.removesuffix(".toml")
        file = _cache_folder() / f"{name}-{key}.npz"
        try:
            return StreamTable.load(file)
        except ValueError:  # no file yet, or not a table of this format
            pass
        table = generate(locality, contexts, layers, seed=SEED, note=f"{self.name}, top-k {topk}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            table.save(file)
        except OSError as error:
            logger.info("a table of top-k streams cannot be cached: %s", error)
        return table


def table_for(text: str, topk: int, layers: int) -> StreamTable:
    """Return the table that --ess-topk-stream names, for a model with `layers` layers.

    Raises: ValueError, one line, for a profile or file that does not exist or has another top-k.
    """
    if not _is_file(text):
        return Profile.parse(text).table(topk, layers)
    table = StreamTable.load(text)
    if table.topk != topk:
        raise ValueError(
            f"{text} must have the model's top-k {topk}: got {table.topk}. Make it with "
            f"python -m sglang_ess.topk_stream --top-k {topk}."
        )
    return table


def reasons(text: str, model: Mapping[str, Any]) -> list[str]:
    """Return why --ess-topk-stream cannot serve this config.json. Nothing is generated."""
    topk = model["index_topk"]
    try:
        if _is_file(text):
            table_for(text, topk, 1)
        else:
            Profile.parse(text).contexts_at(topk)
    except ValueError as error:
        return [f"--ess-topk-stream: {error}"]
    if model.get("index_kpool", 1) > 1:
        return [
            "--ess-topk-stream must have an index key for each token: got index_kpool "
            f"{model['index_kpool']}. Drop it."
        ]
    return []


def _is_file(text: str) -> bool:
    return text.endswith(".npz")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sglang_ess" / "topk_streams"
