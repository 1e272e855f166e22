"""SGLang's frontend language: several questions that share one long document.

python examples/frontend_language.py [URL] [FILE]

The document is prefilled once: its rows are in the radix cache, and every question's decode finds
the hot ones in the same hot tier. Start the server first: sglang-ess serve --model-path out/tiny
"""

import sys
from pathlib import Path

import sglang

QUESTIONS = ("What is this about?", "Who needs it?", "What does it forbid?")


@sglang.function
def read(s, document, questions):
    s += document
    forks = s.fork(len(questions))
    for fork, question in zip(forks, questions, strict=True):
        fork += f"\n\nQuestion: {question}\nAnswer: "
        fork += sglang.gen("answer", max_tokens=24)
    s["answers"] = [fork["answer"] for fork in forks]


def main(url: str = "http://127.0.0.1:30000", file: str = "LICENSE") -> None:
    """Print each question with its answer."""
    document = Path(file).read_text()[:8000]
    state = read.run(document=document, questions=QUESTIONS, backend=sglang.RuntimeEndpoint(url))
    for question, answer in zip(QUESTIONS, state["answers"], strict=True):
        print(f"{question} {answer!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
