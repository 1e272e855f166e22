"""Starts prefill, decode (with ESS) and a router, and sends one chat completion: scripts/pd.sh.

It runs until Ctrl-C, or with --once until the answer, and ends all processes that it started. The
default model's weights are random, so its answers are noise, but every part does its real work.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.pd import Node, PdCluster

OUT = Path("out/pd")
# SGLang's default takes most of the machine's memory, which two nodes share here.
SLOTS = 40_000
DECODE_FLAGS = ("--ess-hot-ratio", "0.2", "--disaggregation-decode-enable-radix-cache")
QUESTION = "Why do prefill and decode run on nodes of their own?"
START_SECONDS = 600


class Progress:
    """Prints a node's progress lines with its name. A call returns whether the node is ready."""

    def __init__(self, node: Node):
        self.node, self.lines = node, node.log.open(errors="replace")

    def __call__(self) -> bool:
        while line := self.lines.readline():
            if line.startswith("[sglang-ess] "):
                say(f"{self.node.log.stem:>8}: {line.removeprefix('[sglang-ess] ').rstrip()}")
        return self.node.is_ready()


def say(line: str) -> None:
    print(line, flush=True)


def wait_ready(cluster: PdCluster) -> None:
    """Wait until all are ready. Raises: RuntimeError with the log's end of one that is not."""
    for node in cluster.nodes:
        node.wait_for(Progress(node), START_SECONDS, "ready")
    cluster.wait_ready(START_SECONDS)


def chat(cluster: PdCluster, model: str) -> dict:
    """Send a request and print it with its answer. Raises: RuntimeError unless status is 200."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "temperature": 0,
    }
    say(f"\nPOST {cluster.url}/v1/chat/completions\n{json.dumps(body)}")
    since = time.perf_counter()
    status, text = cluster.router.post("/v1/chat/completions", body)
    if status != 200:
        raise RuntimeError(f"a chat completion must be answered with 200: got {status}, {text}")
    answer = json.loads(text)
    say(f"{status} after {time.perf_counter() - since:.2f} s\n{json.dumps(answer)}")
    return answer


def how_to_ask(cluster: PdCluster, model: str) -> str:
    message = '{"role": "user", "content": "Hello"}'
    body = f'{{"model": "{model}", "messages": [{message}], "max_tokens": 24}}'
    return (
        f"\nprefill {cluster.prefill.url}\ndecode  {cluster.decode.url}\nrouter  {cluster.url}\n"
        f"logs    {OUT}/*.log\n\nAsk it with any OpenAI client, base_url {cluster.url}/v1, or:\n"
        f"curl {cluster.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{body}'"
    )


def serve(model: str, flags: list[str], once: bool) -> None:
    """Run the cluster. Raises: RuntimeError if a node does not start, ends or does not answer."""
    with PdCluster(
        model,
        OUT,
        flags=("--max-total-tokens", str(SLOTS), *flags),
        decode_flags=DECODE_FLAGS,
    ) as cluster:
        wait_ready(cluster)
        chat(cluster, model)
        if once:
            return
        say(how_to_ask(cluster, model) + "\n\nCtrl-C ends all three.")
        while True:
            time.sleep(0.5)
            for node in (*cluster.nodes, cluster.router):
                if node.process.poll() is not None:
                    raise RuntimeError(f"{node.log.stem} ended by itself:\n{node.tail()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/pd.sh", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after one answer")
    parser.add_argument("--model-path", help="checkpoint; default: a tiny one, written to out/pd")
    parser.add_argument(
        "--arch", choices=("v32", "glm"), default="v32", help="architecture of the tiny one"
    )
    args, flags = parser.parse_known_args()
    # A plain kill must end the three processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    OUT.mkdir(parents=True, exist_ok=True)
    for name in ("prefill", "decode", "router"):
        (OUT / f"{name}.log").unlink(missing_ok=True)
    recipe = TinyModelConfig(arch=args.arch)
    model = args.model_path or str(write_tiny_model(OUT / f"tiny-{args.arch}", recipe))
    say(f"model: {model}\nstarting prefill, decode (ESS) and router; their logs: {OUT}/*.log")
    try:
        serve(model, flags, args.once)
    except KeyboardInterrupt:
        say("\nended")
    except RuntimeError as error:
        raise SystemExit(f"pd: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
