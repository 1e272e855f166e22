"""An engine in this process, with two tiers: python examples/offline_engine.py [MODEL]

Without MODEL it writes a tiny model with random weights to out/tiny first.
"""

import sys
from pathlib import Path

import sglang_ess

DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 40


def main(model: str = "out/tiny") -> None:
    """Print two answers about one document; the second prompt's prefix is cached."""
    if not Path(model).exists() and model == "out/tiny":
        from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model

        write_tiny_model(Path(model), TinyModelConfig())
    ess = sglang_ess.EssConfig(hot_ratio=0.2)
    with sglang_ess.engine(model, ess=ess, max_total_tokens=8192) as llm:
        for question in ("What does the fox do?", "And the dog?"):
            answer = llm.generate(DOCUMENT + question, {"max_new_tokens": 16, "temperature": 0})
            cached = answer["meta_info"]["cached_tokens"]
            print(f"{question} {answer['text']!r} ({cached} tokens of the prompt were cached)")


if __name__ == "__main__":  # SGLang's processes run this file once more
    main(*sys.argv[1:])
