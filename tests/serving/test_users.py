"""What users do with a server, each against one real server over HTTP."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.support import forked

CONTEXT = 16_384  # of the default tiny model
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def lives_on(server):
    """After the test the server still answers, as it did before: one greedy request."""
    before = generate(server, "The quick brown fox")
    yield
    assert generate(server, "The quick brown fox")["output_ids"] == before["output_ids"]


def generate(server, text, **sampling):
    status, body = server.post(
        "/generate", {"text": text, "sampling_params": {**SAMPLING, **sampling}}
    )
    assert status == 200, body
    return json.loads(body)


def chat(client, text, **more):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": text}],
        temperature=0,
        extra_body={"ignore_eos": True},
        **{"max_tokens": 24, **more},
    )


def test_openai_chat(client):
    answer = chat(client, LICENSE[:1000])
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert 1000 < answer.usage.prompt_tokens < 1100  # a token is a byte; the template adds some
    again = chat(client, LICENSE[:1000])
    assert again.choices[0].message.content == answer.choices[0].message.content
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert answer.usage.prompt_tokens - 64 <= cached < answer.usage.prompt_tokens


def test_openai_chat_streamed(client):
    whole = chat(client, "Count the words of a licence.")
    parts = list(
        chat(
            client,
            "Count the words of a licence.",
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [part.choices[0].delta.content for part in parts if part.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 4  # it came in pieces, not at once
    assert parts[-1].usage.completion_tokens == 24


def test_openai_completions(client):
    answer = client.completions.create(
        model="tiny", prompt=[LICENSE[:700], "Hello"], max_tokens=5, temperature=0, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(choice.logprobs.token_logprobs) == 5 for choice in answer.choices)
    assert answer.usage.completion_tokens == 10


def test_openai_models(client, tiny_v32):
    assert [model.id for model in client.models.list()] == [str(tiny_v32)]


def test_frontend_program(server):
    """SGLang's DSL: gen, select and fork over one shared prefix."""
    import sglang

    @sglang.function
    def review(s, text):
        s += text + "\nVerdict: "
        s += sglang.select("verdict", choices=["good", "bad", "unclear"])
        forks = s.fork(3)
        for i, fork in enumerate(forks):
            fork += f"\nReason {i}: " + sglang.gen("reason", max_tokens=6, ignore_eos=True)
        s += "\n".join(fork["reason"] for fork in forks)
        s += sglang.gen("end", max_tokens=4, ignore_eos=True)

    endpoint = sglang.RuntimeEndpoint(server.url)
    states = review.run_batch(
        [{"text": LICENSE[:500]}, {"text": LICENSE[500:1000]}],
        temperature=0,
        backend=endpoint,
        num_threads=2,
    )
    for state in states:
        assert state["verdict"] in ("good", "bad", "unclear")
        assert state["end"] and state.text().endswith(state["end"])
    again = review.run(text=LICENSE[:500], temperature=0, backend=endpoint)
    assert again["verdict"] == states[0]["verdict"]


def test_bench_serving(server, tiny_v32, tmp_path):
    out = tmp_path / "bench.jsonl"
    flags = ["--backend", "sglang", "--base-url", server.url, "--model", str(tiny_v32)]
    flags += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1"]
    flags += ["--num-prompts", "6", "--random-input-len", "300", "--random-output-len", "12"]
    flags += ["--output-file", str(out)]
    status = forked.run("sglang.bench_serving", *flags, log=tmp_path / "log")
    assert status == 0, (tmp_path / "log").read_text()[-2000:]
    result = json.loads(out.read_text())
    assert result["completed"] == 6
    assert result["total_input_tokens"] == 6 * 300
    assert result["total_output_tokens"] == 6 * 12
    assert result["output_throughput"] > 0


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"input_ids": [5] * (CONTEXT + 1), "sampling_params": SAMPLING}, "context length"),
        ({"text": "x" * (CONTEXT + 1), "sampling_params": SAMPLING}, "context length"),
        (b"{", ""),
        ({"text": "x", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "x", "sampling_params": {"top_p": 2}}, "top_p"),
        ({"text": "x", "sampling_params": {"max_new_tokens": "many"}}, ""),
        ({"sampling_params": SAMPLING}, "input_ids"),
    ],
)
def test_bad_requests_are_answered(server, lives_on, body, part):
    status, text = server.post("/generate", body)
    assert status == 400 and part in text, (status, text)


def test_a_chat_over_the_limit(client, lives_on):
    with pytest.raises(openai.BadRequestError, match="context length"):
        chat(client, "x" * (CONTEXT + 1))


@pytest.mark.slow
def test_the_longest_prompt(server, lives_on):
    """SGLang keeps a few positions of the context for itself, and says how many."""
    limit = server.get("/server_info")["max_req_input_len"]  # the first length refused
    assert CONTEXT - 16 < limit < CONTEXT
    status, text = server.post("/generate", {"input_ids": [7] * limit})
    assert status == 400 and str(limit) in text, text
    body = {"input_ids": [7] * (limit - 1), "sampling_params": {**SAMPLING, "max_new_tokens": 1}}
    status, text = server.post("/generate", body, seconds=300)
    assert status == 200, text
    meta = json.loads(text)["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (limit - 1, 1)


def test_a_client_that_goes_away(server, client, lives_on):
    stream = chat(client, "Say much.", stream=True, max_tokens=CONTEXT // 2)
    next(iter(stream))
    assert running_requests(server) == 1
    stream.close()
    server.wait_for(lambda: running_requests(server) == 0, 60, "rid of the request")


def running_requests(server):
    return sum(load["num_running_reqs"] for load in server.get("/v1/loads")["loads"])


def children_seconds():
    """Of a core, used by the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_second_server_on_the_same_port(server, tiny_v32, lives_on):
    before = children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "sglang_ess.launch_server", "--model-path", str(tiny_v32)]
        + ["--port", str(server.port)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sglang-ess: --port must be free on 127.0.0.1: got {server.port}")
    assert children_seconds() - before < 4  # of a core: before SGLang is imported


def test_health_and_information(server, tiny_v32):
    assert server.post("/health", b"")[0] == 405
    for path in ("/health", "/ready"):
        with server.open(path) as response:
            assert response.status == 200
    info = server.get("/server_info")
    assert info["model_path"] == str(tiny_v32) and info["page_size"] == 64
    assert info["version"] == "0.5.23"
    assert server.get("/model_info")["architectures"] == ["DeepseekV32ForCausalLM"]
