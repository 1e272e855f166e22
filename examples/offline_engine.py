"""An engine in this process, with two tiers: python examples/offline_engine.py [MODEL]

It asks questions about one document, of Python's documentation with facts put in. Without MODEL it
writes the model that was trained for that to out/recall first (docs/recall_model.md).
"""

import random
import sys
from pathlib import Path

import sglang_ess
from sglang_ess.testing.recall.documents import KINDS, STOP, make_document


def main(model: str = "out/recall") -> None:
    """Print each question and its answer; all prompts but the first find the document cached."""
    if not Path(model).exists() and model == "out/recall":
        from sglang_ess.testing.recall.model import write_recall_model

        write_recall_model(model)
    document = make_document(random.Random(0), 2000, KINDS, others=10)
    sampling = {"max_new_tokens": 80, "temperature": 0, "stop": STOP}
    ess = sglang_ess.EssConfig(hot_ratio=0.2)
    with sglang_ess.engine(model, ess=ess, max_total_tokens=8192) as llm:
        for question in document.questions:
            answer = llm.generate(document.text + question.prompt, sampling)
            cached = answer["meta_info"]["cached_tokens"]
            print(f"{question.prompt.strip()}{answer['text']}")
            right = "right" if question.is_right(answer["text"]) else "wrong"
            print(f"({right}; {cached} tokens of the prompt were cached)")


if __name__ == "__main__":  # SGLang's processes run this file once more
    main(*sys.argv[1:])
