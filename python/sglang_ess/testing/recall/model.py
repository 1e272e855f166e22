"""`python -m sglang_ess.recall_model`: write the trained recall model as a checkpoint.

Beside tiny models, whose weights are random, this one answers questions on long documents; see
documents.py for what it was taught and testing/train.py for how.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from sglang_ess.testing.recall import SHAPE
from sglang_ess.testing.tiny_model import (
    model_config,
    prepare_directory,
    run_command,
    write_small_files,
)

WEIGHTS = Path(__file__).with_name("weights.safetensors")
MARKER = "recall_model.json"  # a directory that holds it may be overwritten


@dataclass(frozen=True)
class Recipe:
    """No option: there is one such model."""


def write_recall_model(out_dir: str | os.PathLike, weights: Path = WEIGHTS) -> Path:
    """Write config, weights, tokenizer and chat template into out_dir, created if need be.

    weights: a model.safetensors of testing/train.py
    Returns: out_dir.  Raises: ValueError if out_dir holds anything but an earlier recall model.
    """
    out = prepare_directory(out_dir, MARKER, Recipe())
    from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE

    partial = out / "model.partial"
    partial.write_bytes(weights.read_bytes())
    os.replace(partial, out / "model.safetensors")
    write_small_files(out, model_config(SHAPE, VOCAB_SIZE, TOKEN_IDS))
    return out


def main(argv: list[str] | None = None) -> int:
    def write(out: str, recipe: Recipe) -> str:
        path = write_recall_model(out)
        size_mib = (path / "model.safetensors").stat().st_size / 2**20
        return f"wrote {path} ({size_mib:.1f} MiB of weights)"

    what = "Write a small DSA model, trained to find facts in documents of up to 16K tokens."
    return run_command("recall_model", what, Recipe, write, argv)


if __name__ == "__main__":
    sys.exit(main())
