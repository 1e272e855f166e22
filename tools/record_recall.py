"""What the recall model selects, as traces with scores: python -m tools.record_recall FOLDER

For each context a request answers a question about a document of that length and then, as its
training has shown it, asks and answers others until its tokens end. `benchmarks.sim.policies
--traces FOLDER` replays the files.
"""

import argparse
import random
import sys
from pathlib import Path

import sglang_ess
from sglang_ess.testing.recall.documents import BYTES_A_FACT, KINDS, make_document
from sglang_ess.testing.recall.model import write_recall_model

CONTEXTS = (2048, 4096, 8192, 14_336)  # tokens of the prompt
DECODED = 1200  # tokens
RUNNER_UPS = 128


def record(model: Path, out: Path, context: int, decoded: int) -> None:
    """Serve one request with two tiers and write its trace to context_N.trace."""
    rng = random.Random(f"record/{context}")
    document = make_document(rng, context - 64, KINDS[:1], others=context // BYTES_A_FACT)
    trace = out / f"context_{context}.trace"
    trace.unlink(missing_ok=True)
    ess = sglang_ess.EssConfig(hot_ratio=0.2, trace=str(trace), trace_scores=RUNNER_UPS)
    slots = -(-(context + decoded) // 64 + 2) * 64
    sampling = {"max_new_tokens": decoded, "temperature": 0, "ignore_eos": True}
    with sglang_ess.engine(str(model), ess=ess, max_total_tokens=slots) as llm:
        answer = llm.generate(document.text + document.questions[0].prompt, sampling)
    print(
        f"{trace}: {answer['meta_info']['completion_tokens']} tokens, {answer['text'][:60]!r} ..."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.record_recall", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--decoded", type=int, default=DECODED)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    model = write_recall_model(options.out / "model")
    for context in options.contexts:
        record(model, options.out, context, options.decoded)
    return 0


if __name__ == "__main__":  # SGLang's processes run this file once more
    sys.exit(main())
