"""What may go wrong between prefill, decode, router and clients, each with real processes.

After every test no slot, request row or cached prefix is in use on either node, and the next
request gets the tokens that a colocated one-tier engine gives.
"""

import json
import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.disagg.cluster import SERVER_FLAGS
from tests.support import parity
from tests.support.pd import PdCluster, faulty

pytestmark = pytest.mark.slow
SLOTS = 3072  # of each node: what prefill cannot hold, it refuses as decode does, at once
RESERVE = 192  # slots that SGLang's decode node keeps for the growth of each request
OUTPUT = 12
RETRY_SECONDS = 480
DECODE_FLAGS = (
    *("--ess-hot-ratio", "0.2", "--disaggregation-decode-enable-radix-cache"),
    # Not SGLang's 512: so few that it must retract.
    *("--num-reserved-decode-tokens", str(RESERVE), "--max-running-requests", "16"),
)
# What the half of a request waits for its lost other half before the router hears of it, and tries
# again: in prefill for decode, and in decode for rows. SGLang's defaults are 300 s.
ENV = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "60",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "60",
}


def slots(number):
    return "--max-total-tokens", str(number)


@pytest.fixture(scope="module")
def shared(model, tmp_path_factory):
    """The decode node's host tier holds four or five requests of 600 tokens."""
    flags, directory = (*SERVER_FLAGS, *slots(SLOTS)), tmp_path_factory.mktemp("pd")
    with PdCluster(model, directory, flags, decode_flags=DECODE_FLAGS, env=ENV) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def cluster(shared):
    """The shared one, mended if the test before broke it."""
    for node in shared.nodes:
        if node.process.poll() is not None:
            shared.restart(node)
        node.post("/abort_request", {"abort_all": True})
    return shared


@pytest.fixture
def goes_on(cluster, right):
    """After the test: nothing leaked, and a request is served as if nothing had happened."""
    yield
    check_goes_on(cluster, right)


def check_goes_on(cluster, right):
    cluster.settle()
    (prompt,) = parity.prompts_of([333], seed=99)
    assert ask(cluster, prompt) == right(prompt)


@pytest.fixture(scope="module")
def right(colocated):
    """right(prompt, tokens): the tokens that the colocated engine gives."""
    known, lock = {}, threading.Lock()

    def answer(prompt, tokens=OUTPUT):
        key = (tuple(prompt), tokens)
        with lock:  # the engine's pipe takes one caller at a time
            if key not in known:
                (known[key],) = colocated.generate([prompt], tokens, start=-1)
            return known[key].token_ids

    return answer


def ask(cluster, prompt, tokens=OUTPUT, **more):
    """Tokens of a request that must succeed."""
    status, answer = cluster.generate(prompt, tokens, **more)
    assert status == 200, (status, answer)
    assert answer["meta_info"]["finish_reason"]["type"] == "length", answer["meta_info"]
    return answer["output_ids"]


def ask_until_served(cluster, prompt, tokens=OUTPUT):
    """(tokens, how often it was refused): a client that tries again at every error."""
    until, refused = time.monotonic() + RETRY_SECONDS, 0
    while True:
        try:
            status, answer = cluster.generate(prompt, tokens)
        except OSError as error:
            status, answer = 0, {"error": repr(error)}
        if status == 200 and answer["meta_info"]["finish_reason"]["type"] == "length":
            return answer["output_ids"], refused
        assert time.monotonic() < until, (status, answer)
        refused += 1
        time.sleep(0.3)  # a client's pause between tries


def together(function, items):
    """function of each item, all at once; the results in order."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def stream(cluster, prompt, tokens):
    """An open streamed answer, its first event read."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": True})
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{cluster.url}/generate", body.encode(), header)
    response = urllib.request.urlopen(request, timeout=300)
    assert response.readline().startswith(b"data:")
    return response


def test_host_tier_full(cluster, right, goes_on):
    """Three times the requests that fit: those that do not wait, and nobody gets an error."""
    prompts = parity.prompts_of([600] * 12, seed=21)
    expected = [right(prompt) for prompt in prompts]
    assert together(lambda prompt: ask(cluster, prompt), prompts) == expected


def test_a_request_that_never_fits(cluster, right, goes_on):
    """More tokens than the decode node has slots: 400 at once, with the limit."""
    (prompt,) = parity.prompts_of([SLOTS + 200], seed=22)
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": 7}
    for node, more in ((cluster, {}), (cluster.decode, room)):
        status, answer = node.generate(prompt, OUTPUT, seconds=60, **more)
        message = json.dumps(answer)
        assert status == 400, message
        assert str(len(prompt)) in message and "maximum allowed length" in message


def test_a_request_that_fits_alone(cluster, right, goes_on):
    """With less room left than SGLang keeps for growth: served, and so are those behind it."""
    # SGLang's intake leaves a page and the prompt's own free; what is left is the output's.
    large, small = parity.prompts_of([SLOTS - 2 * 64, 300], seed=30)
    tokens = together(lambda prompt: ask(cluster, prompt, seconds=120), [large, small])
    assert tokens == [right(large), right(small)]


def test_clients_that_go_away(cluster, right, goes_on):
    """In mid-stream. Another client gets its whole answer."""
    prompts = parity.prompts_of([200, 300, 100], seed=23)
    streams = [stream(cluster, prompt, 1500) for prompt in prompts[:2]]
    for response in streams:
        response.close()
    assert ask(cluster, prompts[2]) == right(prompts[2])


def test_retraction(cluster, right, goes_on):
    """Outputs outgrow the slots: some requests are retracted, resume, and end with every token."""
    prompts = parity.prompts_of([500] * 6, seed=24)
    expected = [right(prompt, 400) for prompt in prompts]
    sent = requests_of(cluster.prefill)
    answers = together(lambda prompt: cluster.generate(prompt, 400), prompts)
    assert [status for status, _ in answers] == [200] * 6, answers
    assert [answer["output_ids"] for _, answer in answers] == expected
    assert sum(answer["meta_info"]["num_retractions"] for _, answer in answers) > 0
    assert requests_of(cluster.prefill) - sent == 6  # no resume asked prefill again


def requests_of(node):
    """Requests that the node has computed a prompt of, since its start."""
    return node.log.read_text(errors="replace").count("POST /generate")


def test_two_hundred_aborts(cluster, right, goes_on):
    """At random points of prefill, transfer and decode, by /abort_request or by hanging up."""
    chance = random.Random(25)
    prompts = parity.prompts_of([chance.randrange(20, 1200) for _ in range(220)], seed=25)
    expected = {number: right(prompts[number]) for number in range(0, 220, 11)}

    def one(number):
        if number in expected:
            return ask(cluster, prompts[number]) == expected[number]
        abort(cluster, prompts[number], number, chance)
        return True

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(220)))


def abort(cluster, prompt, number, chance):
    """Send a request and give it up after a while; any answer to it will do."""
    delay, tokens = chance.uniform(0, 1.5), chance.randrange(1, 300)
    rid = f"given-up-{number:04}"  # SGLang aborts by prefix
    if chance.random() < 0.5:
        try:
            cluster.router.generate(prompt, tokens, rid=rid, seconds=delay)
        except OSError:
            pass
        return
    request = threading.Thread(target=cluster.generate, args=(prompt, tokens), kwargs={"rid": rid})
    request.start()
    time.sleep(delay)  # a random point, not a condition
    for node in cluster.nodes:
        node.post("/abort_request", {"rid": rid})
    request.join(300)
    assert not request.is_alive(), "an aborted request must be answered"


def test_decode_server_is_killed(cluster, right, goes_on):
    """Under load, and started again: the router repeats what fails, and no client sees it."""
    prompts = parity.prompts_of([50 + 70 * i for i in range(10)], seed=26)
    expected = [right(prompt, 60) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(ask_until_served, cluster, prompt, 60) for prompt in prompts]
        cluster.decode.wait_for(lambda: cluster.decode.loads()["num_running_reqs"], 60, "busy")
        cluster.restart(cluster.decode)
        done = [answer.result() for answer in answers]
    assert [tokens for tokens, _ in done] == expected
    assert not any(refused for _, refused in done)


def test_prefill_server_is_killed(cluster, right, goes_on):
    """While prompts are being computed and sent. What decode already has goes on."""
    (early,), late = parity.prompts_of([100], seed=27), parity.prompts_of([1000] * 4, seed=28)
    expected = [right(early, 1500), *(right(prompt) for prompt in late)]
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cluster.generate, early, 1500)
        cluster.decode.wait_for(lambda: cluster.decode.loads()["num_running_reqs"], 60, "busy")
        others = [pool.submit(ask_until_served, cluster, prompt) for prompt in late]
        transfer = "decode_transfer_queue_reqs"
        cluster.decode.wait_for(lambda: cluster.decode.loads()[transfer], 60, "in a transfer")
        cluster.restart(cluster.prefill)
        status, answer = first.result()
        done = [answer.result() for answer in others]
    assert status == 200 and answer["output_ids"] == expected[0], (status, str(answer)[:300])
    assert [tokens for tokens, _ in done] == expected[1:]


def test_transfers_that_fail(model, right, tmp_path):
    """Some of many, by SGLang's own failure injection: an error for each, and for no other."""
    prompts = parity.prompts_of([30 + 13 * i for i in range(40)], seed=29)
    flags = (*SERVER_FLAGS, *slots(4 * SLOTS))
    # Of each poll of each request, and a spinning scheduler polls about a thousand times.
    env = {"SGLANG_TEST_DISAGG_FAILURE_PROB": "0.0003"}
    more = dict(decode_flags=DECODE_FLAGS, router_flags=("--mini-lb",))  # which never tries again
    with PdCluster(model, tmp_path, flags, env=env, **more) as broken:
        broken.wait_ready()
        answers = []
        for at in range(0, len(prompts), 4):
            batch = prompts[at : at + 4]
            answers += together(lambda prompt: broken.generate(prompt, OUTPUT), batch)
        for prompt, (status, answer) in zip(prompts, answers, strict=True):
            assert status >= 500 or answer["output_ids"] == right(prompt), (status, answer)
        failed = sum(status != 200 for status, _ in answers)
        assert 0 < failed < len(prompts)
        broken.settle()


def test_a_leak_would_be_seen(model, tmp_path):
    """That a cluster's checks can fail: a node that loses one page does not come to rest."""
    flags, env = (*SERVER_FLAGS, *slots(SLOTS)), faulty(tmp_path, "tests.support.pd:a_page_is_lost")
    with PdCluster(model, tmp_path, flags, decode_flags=DECODE_FLAGS, env=env) as leaky:
        with pytest.raises(RuntimeError, match="leak"):
            leaky.wait_ready()  # SGLang's own first request may be enough
            ask(leaky, parity.prompts_of([333], seed=99)[0])
            leaky.settle(60)
