"""Which objects of a store fit a server: those of the same model, weights and row formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_ess.errors import Refusal
from sglang_ess.mem_cache.page_parts import PageParts

VERSION = 1  # of what a part's bytes mean; another number makes all older objects invisible
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each file of weights


def identity(model: Any, server_args: Any, parts: PageParts, first_layer: int) -> str:
    """The store's identity: equal only where the same tokens give the same bytes of a page.

    model: SGLang's ModelConfig; server_args: its resolved options
    Of the weights it has names, sizes and samples of every file, not all bytes: a checkpoint that
    was trained further differs in nearly all of them. Ranks, batch shapes and kernels are not in
    it. They change the last bits of a row, as they do from one batch of a server to the next.
    Raises: Refusal where the weights are not in a local directory.
    """
    config = model.hf_config.to_dict()
    config.pop("_name_or_path", None)  # the same files elsewhere are the same model
    facts = {
        "version": VERSION,
        "config": config,
        "dtype": str(model.dtype),
        "quantization": server_args.quantization,
        "weights": weights_digest(weights_directory(model.model_path, model.revision)),
        "load": [server_args.load_format, server_args.random_seed]
        if server_args.load_format == "dummy"
        else server_args.load_format,
        "first layer": first_layer,
        "parts": [[part.name, part.pages.shape[1]] for part in parts.parts],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def weights_directory(path: str, revision: str | None) -> Path:
    """The local directory of a model's files. Raises: Refusal if there is none."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(path, "config.json", revision=revision)
    except ValueError:  # not a name of the Hub
        file = None
    if not isinstance(file, str):
        raise Refusal(
            "--ess-store must have a model whose files are in a local directory or in the Hugging "
            f"Face cache: got {path!r}. Download it first, or drop --ess-store."
        )
    return Path(file).parent


def weights_digest(directory: Path) -> str:
    """Digest of the names, sizes and samples of a directory's files of weights."""
    found = hashlib.sha256()
    for file in _sorted(directory):
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as data:
            for number in range(SAMPLES):
                data.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                found.update(data.read(SAMPLE_BYTES))
    return found.hexdigest()


def _sorted(directory: Path) -> Iterable[Path]:
    return sorted(file for pattern in WEIGHTS for file in directory.glob(pattern))
