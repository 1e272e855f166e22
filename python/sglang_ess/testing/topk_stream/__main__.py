"""`python -m sglang_ess.topk_stream --out FILE.npz`: write a table for --ess-topk-stream.

It is generated from a locality profile of the simulator, or made of an --ess-trace recording. For
options that cannot be used the command prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_ess.sim.inputs.files import names
from sglang_ess.sim.model.locality import Locality
from sglang_ess.testing.topk_stream.from_trace import from_trace
from sglang_ess.testing.topk_stream.table import (
    CONTEXTS_TOPK,
    DEFAULT_STEPS,
    DEFAULT_STREAMS,
    StreamTable,
    default_contexts,
    generate,
    scaled,
)
from sglang_ess.trace.trace import read_trace

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        if options.out.suffix != ".npz":
            raise ValueError(f"--out must end in .npz: got {options.out}. Correct the name.")
        table = _table(options)
        table.save(options.out)
    except (OSError, ValueError) as error:
        print(f"sglang_ess.topk_stream: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    print(
        f"{options.out}: {table.note}; contexts {', '.join(map(str, table.contexts))}, "
        f"{table.streams} streams, {table.layers} layers, {table.num_steps} steps, top-k "
        f"{table.topk}; {table.device_bytes / 2**20:.1f} MiB on a device"
    )
    return 0


def _table(options: argparse.Namespace) -> StreamTable:
    if options.from_trace:
        return from_trace(read_trace(options.from_trace), options.streams, options.steps)
    locality = scaled(Locality.load(options.locality), options.top_k)
    note = f"{options.locality}, top-k {options.top_k}, seed {options.seed}"
    return generate(
        locality, options.contexts or default_contexts(options.top_k), options.layers,
        options.streams, options.steps, options.seed, note,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ess.topk_stream", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument(
        "--locality", default="deepseek-v3.2", help=f"{', '.join(names('localities'))} or a .toml"
    )
    parser.add_argument(
        "--contexts", type=_tokens, help="nominal contexts in tokens, as 8192,32768"
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the locality, spread evenly"
    )
    parser.add_argument("--top-k", type=int, default=CONTEXTS_TOPK, help="the model's index_topk")
    parser.add_argument(
        "--streams", type=int, default=DEFAULT_STREAMS, help="streams of each context"
    )
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="steps before the seam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from-trace", type=Path, help="make the table of this --ess-trace recording"
    )
    return parser


def _tokens(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
