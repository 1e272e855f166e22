"""`sglang-ess convert SOURCE TRACE`: make a trace of the top-k lists that another system has saved.

SOURCE has a list for each query of one sequence and each layer, and the indexer's scores if it has
them: a directory of .npy, .npz or .safetensors files, or one .npz or .safetensors file. The trace
is for `sglang-ess replay`. Exit status: 0; 2 with one line of reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sglang_ess.errors import program_name
from sglang_ess.trace.from_arrays import Converted, Layout, convert


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    layout = Layout(options.lists, options.scores, options.first_query, options.runner_ups)
    try:
        with tqdm(unit="query", desc="convert", disable=None, leave=False) as bar:

            def progress(done: int, queries: int) -> None:
                bar.total = queries
                bar.update(done - bar.n)

            found = convert(
                options.source, options.trace, layout, options.skip, options.hot_rows, progress
            )
    except OSError as error:
        reason = f"a file must be open to this command: got {error.filename} ({error.strerror})."
        print(f"sglang_ess.convert: {reason}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"sglang_ess.convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for line in told(found, options):
        print(line)
    return 0


def told(found: Converted, options: argparse.Namespace) -> list[str]:
    """What the command prints about a conversion."""
    sizes, layers = found.sizes, found.layers
    scores = "no scores"
    if sizes.columns:
        scores = f"scores of {sizes.topk:,} + {sizes.runner_ups:,}"
    lines = [
        f"{options.trace.name}: {len(layers)} layers ({layers[0]} to {layers[-1]} of the source), "
        f"{sizes.queries - options.skip:,} queries, top-k {sizes.topk:,}, {scores}; "
        f"{options.trace.stat().st_size:,} bytes, counted with {found.hot_rows:,} hot rows a layer"
    ]
    if found.ranked:
        share = found.agreeing / found.ranked
        doubt = "" if share > 0.99 else " Are they of the same model, layers and queries?"
        lines.append(
            f"Lists and scores agree in {share:.2%} of {found.ranked:,} lists of more positions "
            f"than the top-k.{doubt}"
        )
    return lines


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program_name("convert"), description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("source", type=Path, help="the arrays: a directory or a file")
    parser.add_argument("trace", type=Path, help="the trace to write")
    parser.add_argument(
        "--lists", default=Layout.lists, metavar="NAME",
        help="the lists' names, {layer} for the layer's number (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--scores", default=Layout.scores, metavar="NAME",
        help="the scores' names; an empty NAME reads none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--first-query", type=_whole, default=0, metavar="N",
        help="position of the first row's query (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--skip", type=_whole, default=0, metavar="N", help="leave out the first N queries"
    )
    parser.add_argument(
        "--runner-ups", type=_whole, metavar="M",
        help="keep M positions below each list, with their scores (default: a quarter of k)",
    )  # fmt: skip
    parser.add_argument(
        "--hot-rows", type=_positive, metavar="N",
        help="hot rows of each layer in the trace's own counts (default: 2 k)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _whole(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more: got {text}")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more: got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
