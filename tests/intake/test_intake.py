"""No body ends a server or stays unanswered: one case of each kind, then all routes."""

import asyncio
import json
import threading
from types import SimpleNamespace

import msgspec
import pytest

from sglang_ess.config import ENV_VAR, EssConfig
from sglang_ess.intake import Refused, control, guard, streams
from sglang_ess.intake import request_checks as requests
from tests.support import http_bodies, http_fuzz

PARAMS = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
CONTEXT = 16_384  # of the default tiny model
GROUP = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
BODIES = 1500  # of the slow walks


def prompt(**changed):
    return {"text": "Hello", "sampling_params": PARAMS, **changed}


def sampled(**changed):
    return prompt(sampling_params={**PARAMS, **changed})


def logprobs(**changed):
    return prompt(return_logprob=True, **changed)


@pytest.fixture(scope="module")
def expected(server):
    return greedy(server)


@pytest.fixture
def lives_on(server, expected):
    yield
    assert greedy(server) == expected


def greedy(server):
    status, text = server.post("/generate", prompt(text="The quick brown fox"))
    assert status == 200, text
    return json.loads(text)["output_ids"]


REFUSED = [
    # A prompt without a token, by every way that leads to one.
    ("/generate", prompt(text=""), "at least one token"),
    ("/generate", prompt(text=["Hello", ""]), "at least one token"),
    ("/generate", {"input_ids": []}, "input_ids"),
    ("/generate", {"input_ids": [[5, 6], []]}, "at least one token"),
    ("/v1/completions", {"model": "m", "prompt": "", "max_tokens": 2}, ""),
    ("/vertex_generate", {"instances": [{"input_ids": []}]}, "input_ids"),
    # Errors in a stream that has no byte yet, and where the route catches none.
    ("/api/chat", {**http_bodies.CHAT, "options": {"num_predict": 10**6}}, "context length"),
    ("/api/generate", {"model": "m", "prompt": "a", "options": {"top_k": -7}}, "top_k"),
    # Ids outside the vocabulary.
    ("/generate", {"input_ids": [5, 10**6]}, "input_ids must be 0 to"),
    ("/generate", {"input_ids": [5, -1]}, "input_ids must be 0 to"),
    ("/v1/completions", {"model": "m", "prompt": [2**40], "max_tokens": 2}, "input_ids must be"),
    ("/generate", sampled(stop_token_ids=[10**6], min_new_tokens=2), "stop_token_ids must be"),
    ("/generate", sampled(logit_bias={"999999": 1.0}), "logit_bias"),
    ("/generate", logprobs(token_ids_logprob=[10**6]), "token_ids_logprob"),
    # Numbers and ranges.
    ("/generate", sampled(temperature=1.0, top_k=2**31), "top_k must be"),
    ("/generate", sampled(temperature=1.0, repetition_penalty=1e-300), "repetition_penalty must"),
    ("/generate", sampled(temperature=1.0, logit_bias={"5": 1e300}), "logit_bias must be"),
    ("/generate", sampled(stop_regex=["x", "(a+)+b"]), "stop_regex must be"),
    ("/v1/completions", {"model": "m", "prompt": "a", "stop_regex": "(a|aa)*b"}, "stop_regex must"),
    ("/generate", sampled(n=0), "n must be 1 to"),
    ("/generate", sampled(n=10**9), "n must be 1 to"),
    ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 2, "n": 10**9}, "n must be"),
    ("/generate", sampled(stream_interval=-1), "stream_interval must be"),
    ("/generate", logprobs(top_logprobs_num=10**6), "top_logprobs_num must be"),
    ("/generate", logprobs(top_logprobs_num=-1), "top_logprobs_num must be"),
    ("/generate", logprobs(logprob_start_len=-5), "logprob_start_len must be"),
    ("/generate", logprobs(logprob_start_len=500), "logprob_start_len"),
    # Shapes: the lists of a batch, types, embeddings.
    ("/generate", prompt(text=["a", "b"], logprob_start_len=[0]), "logprob_start_len must have"),
    ("/generate", prompt(positional_embed_overrides={"a": 1}), "must be of another type"),
    ("/generate", {"input_embeds": [[]]}, "input_embeds"),
    ("/generate", {"input_embeds": [[0.5]]}, "disable-radix-cache"),
    ("/generate", prompt(token_indices_to_pool=[500]), "token_indices_to_pool must be left out"),
    (
        "/vertex_generate",
        {"instances": [{"text": "a"}], "parameters": {"sampling_params": {"is_normalized": True}}},
        "is_normalized must not be given",
    ),
    # Names.
    ("/generate", prompt(rid="HEALTH_CHECK_me"), "rid must not begin"),
    ("/generate", prompt(rid=["a"]), "rid must be a string"),
    ("/generate", prompt(session_params={"id": "nowhere"}), "nowhere"),
    # Lengths: what slots and context allow.
    ("/generate", {"input_ids": [5] * (CONTEXT - 1)}, ""),
    # The server itself.
    ("/release_memory_occupation", {}, "needs --enable-memory-saver"),
    ("/resume_memory_occupation", {}, "needs --enable-memory-saver"),
    ("/slow_down", {"forward_sleep_time": 1e300}, "forward_sleep_time must be"),
    ("/start_profile", {}, "runs on the CPU platform"),
    ("/init_weights_update_group", GROUP, "runs on the CPU platform"),
]


@pytest.mark.parametrize(("path", "body", "part"), REFUSED)
def test_refused_in_one_line(server, lives_on, path, body, part):
    status, text = server.post(path, body)
    assert status == 400 and part in text, (status, text)
    assert "Traceback" not in text


def test_a_stream_is_refused_in_its_own_way(server, lives_on):
    status, text = server.post("/generate", prompt(text="", stream=True))
    assert "at least one token" in text and text.endswith("[DONE]\n\n"), (status, text)


def test_more_tokens_than_the_context_holds(server, lives_on):
    body = {"input_ids": [7] * 20, "sampling_params": {**PARAMS, "max_new_tokens": CONTEXT}}
    status, text = server.post("/generate", body)
    assert status == 400 and "context length" in text


def test_a_failing_scheduler_answers(server, lives_on):
    """This server records no expert distribution; SGLang's recorder raises an exception."""
    status, text = server.post("/start_expert_distribution_record", {})
    assert status == 400 and "must be able to take in" in text, (status, text)


class Scheduler:
    """The part of a scheduler that guard.py uses."""

    def __init__(self):
        self.waiting_queue, self.sent = [SimpleNamespace(rid="a"), SimpleNamespace(rid="b")], []
        self.grammar_manager, self.chunked_req = SimpleNamespace(grammar_queue=[]), None

    def collect_inflight_reqs(self):
        return set()

    def send_abort_output(self, output, req):
        self.sent.append((output.rid, output.finished_reason["status_code"], req))


@pytest.fixture
def io():
    return pytest.importorskip("sglang.srt.managers.io_struct")


def message(io, rid):
    """A tokenized request as the scheduler receives it."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    return io.TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=None,
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


def failing(recv_req):
    raise KeyError("no such thing\nmore")


@pytest.fixture
def parallel(monkeypatch):
    """SGLang's context for the guard: one rank, one tokenizer worker."""
    context = SimpleNamespace(tp_size=1, pp_size=1, tokenizer_worker_num=1)
    for name in ("get_parallel", "get_serving"):
        monkeypatch.setattr(f"sglang.srt.runtime_context.{name}", lambda: context)
    return context


def test_the_guard_answers_each_prompt_of_a_message_and_takes_it_from_the_queue(io, parallel):
    scheduler = Scheduler()
    batch = io.BatchTokenizedGenerateReqInput(batch=[message(io, "c"), message(io, "d")])

    def half(recv_req):
        scheduler.waiting_queue.append(recv_req.batch[0])
        raise KeyError("no such thing\nmore")

    assert guard.guarded(half, scheduler)(batch) is None
    assert [(rid, status) for rid, status, _ in scheduler.sent] == [("c", 400), ("d", 400)]
    assert [req.rid for req in scheduler.waiting_queue] == ["a", "b"]


def test_the_guard_lets_through_what_does_not_fail(parallel):
    assert guard.guarded(lambda req: (req, "done"), Scheduler())("x") == ("x", "done")


@pytest.mark.parametrize(("workers", "sent"), [(1, []), (2, ["b"])])
def test_a_request_id_of_another_worker(io, parallel, workers, sent):
    parallel.tokenizer_worker_num = workers
    scheduler = Scheduler()
    guard.guarded(lambda req: None, scheduler)(message(io, "b"))
    assert [rid for rid, *_ in scheduler.sent] == sent
    assert [req.rid for req in scheduler.waiting_queue] == ["a", "b"]


def test_a_control_request_of_several_ranks_still_ends_the_server(io, parallel):
    """Ranks that exchange messages must not continue separately."""
    parallel.tp_size = 2
    take_in = guard.guarded(failing, Scheduler())
    with pytest.raises(KeyError):
        take_in(io.SlowDownReqInput(forward_sleep_time=None))
    assert take_in(message(io, "b")) is None


def test_every_control_request_has_an_answer_that_says_it_failed(io):
    """Every answer that SGLang's tokenizer process waits for survives SGLang's encoding."""
    from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS

    waited_for = {spec[1].__name__ for spec in _COMMUNICATOR_SPECS}
    sent = [name for name in dir(io) if name.endswith(("ReqInput", "Req"))]
    answers = {type(guard.control_failure(name, "a line")) for name in sent} - {type(None)}
    missing = waited_for - {answer.__name__ for answer in answers}
    # Refused before they are sent: without --enable-lora there is no adapter to load.
    assert missing <= {"LoRAUpdateOutput"}
    for name in sent:
        answer = guard.control_failure(name, "a line")
        if answer is not None:
            assert io.msgpack_decode(io.msgpack_encode(answer)).rid == guard.FAILED + "a line"


@pytest.mark.parametrize("failed", [True, False])
def test_a_failed_answer_is_an_error_to_who_asked(io, failed):
    answer = guard.control_failure("SlowDownReqInput", "a line")
    answer = answer if failed else io.SlowDownReqOutput()

    async def original(communicator, obj):
        return [answer]

    asked = control.ask(original, None, io.SlowDownReqInput(forward_sleep_time=0.5))
    if not failed:
        assert asyncio.run(asked) == [answer]
        return
    with pytest.raises(Refused, match="^a line$"):
        asyncio.run(asked)


def test_what_a_gpu_serves_and_a_cpu_does_not(io):
    for name in control.UNSERVED_ON_CPU:
        assert issubclass(getattr(io, name), io.BaseReq)
        obj = type(name, (), {})()
        assert control.problem(obj, on_cpu=True)
        assert bool(control.problem(obj, on_cpu=False)) == (name in control.UNSERVED)


def test_a_refusal_is_a_value_error_with_one_line():
    refused = Refused("n must be 1.")
    assert isinstance(refused, ValueError) and str(refused) == "n must be 1."
    assert (refused.status_code, refused.detail) == (400, "n must be 1.")


@pytest.mark.parametrize("chunks", [0, 1])
def test_an_error_before_the_first_byte_is_an_answer(chunks):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(chunks):
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise Refused("a line")

    async def send(message):
        sent.append(message)

    answer = streams.FirstByteErrors(app)({"type": "http", "path": "/"}, None, send)
    if chunks:  # too late: only a broken connection says so
        with pytest.raises(Refused):
            asyncio.run(answer)
    else:
        asyncio.run(answer)
    assert sent[0]["status"] == (200 if chunks else 400) and len(sent) == 2
    assert chunks or b"a line" in sent[1]["body"]


def test_a_body_of_a_health_check_is_the_servers_own():
    body = SimpleNamespace(
        rid="HEALTH_CHECK_1", text=None, input_ids=[0], sampling_params={"max_new_tokens": 1}
    )
    assert list(requests.body_problems(body, "/health")) == []
    assert list(requests.body_problems(body, "/generate")) != []


def test_embeddings_must_be_rows_of_the_models_width(io):
    req = msgspec.structs.replace(message(io, "a"), input_embeds=[[0.5] * 8, [0.5] * 7])
    assert ["input_embeds" in line for line in requests.request_problems(req, 512, 8)] == [True]
    req = msgspec.structs.replace(req, input_embeds=[[0.5] * 8, [float("nan")] * 8])
    assert ["input_embeds" in line for line in requests.request_problems(req, 512, 8)] == [True]
    req = msgspec.structs.replace(req, input_embeds=[[0.5] * 8] * 2)
    assert list(requests.request_problems(req, 512, 8)) == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--disable-ess",), ("--tokenizer-worker-num", "2")])
def test_a_walk_of_all_routes(tiny_v32, tmp_path, flags):
    with http_fuzz.start(tiny_v32, tmp_path, *flags) as server:
        server.wait_ready()
        tally = http_fuzz.walk_server(server, BODIES, seed=0)
    print(tally)
    assert tally.tried == BODIES
    assert (tally.ended, tally.unanswered) == ([], []), tally


@pytest.mark.slow
def test_one_request_id_at_two_tokenizer_workers(tiny_v32, tmp_path):
    """Each worker knows only its own requests; the scheduler and the detokenizer know all."""
    with http_fuzz.start(tiny_v32, tmp_path, "--tokenizer-worker-num", "2") as server:
        server.wait_ready()
        expected = greedy(server)
        body = sampled(max_new_tokens=300) | {"rid": "the same"}
        statuses = []
        threads = [
            threading.Thread(target=lambda: statuses.append(server.post("/generate", body)[0]))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(statuses) == len(threads) and set(statuses) == {200, 400}, statuses
        assert greedy(server) == expected


def test_new_weights_and_a_store_exclude_each_other(io, monkeypatch):
    for name in control.NEW_WEIGHTS:
        assert issubclass(getattr(io, name), io.BaseReq)
        obj = type(name, (), {})()
        monkeypatch.setenv(ENV_VAR, EssConfig(store="/nvme/store").to_env()[ENV_VAR])
        assert "--ess-store" in control.problem(obj, on_cpu=False)
        monkeypatch.setenv(ENV_VAR, EssConfig().to_env()[ENV_VAR])
        assert control.problem(obj, on_cpu=False) is None
