"""Several ranks of each kind behind the launcher.

Each gives the tokens of one rank: float32 and greedy, so that another order of sums turns none.
"""

import os

import pytest

import sglang_ess
from sglang_ess import EssConfig
from sglang_ess.platforms.cpu_threads import COUNT_VAR
from tests.support import parity
from tests.support.engine import in_fork
from tests.support.forked import ForkedNode
from tools.forks import fork_children

pytestmark = pytest.mark.slow
PROMPTS, TOKENS = parity.prompts_of([20, 130, 300], seed=8), 10
SAMPLING = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
FLAGS = ("--dtype", "float32", "--max-total-tokens", "8192", "--random-seed", "1")
TWO_TIERS = ("--ess-hot-ratio", "0.1", "--ess-index-dtype", "float32")
DP = ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention")


@pytest.fixture(scope="module", autouse=True)
def no_number_of_threads():
    """Chosen by whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(COUNT_VAR, raising=False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = dict(index_topk=32, layers=4, **parity.NARROW | dict(heads=4))
    return parity.write_model(tmp_path_factory.mktemp("model") / "v32", arch="v32", **shape)


def of_one_rank(model) -> list[list[int]]:
    """The tokens of an engine with one tier."""
    fork_children()
    ess = EssConfig(enabled=False, index_dtype="float32")
    options = {"dtype": "float32", "max_total_tokens": 8192, "random_seed": 1}
    with sglang_ess.engine(model, ess=ess, skip_tokenizer_init=True, **options) as llm:
        answers = llm.generate(input_ids=PROMPTS, sampling_params=SAMPLING)
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def expected(model):
    return in_fork(of_one_rank, model)


def tokens_of(server) -> list[list[int]]:
    answers = [server.generate(prompt, TOKENS) for prompt in PROMPTS]
    assert all(status == 200 for status, _ in answers), answers
    return [answer["output_ids"] for _, answer in answers]


@pytest.mark.parametrize(
    "flags",
    [
        ("--tp-size", "2", *TWO_TIERS),
        ("--tp-size", "2", "--disable-ess", "--ess-index-dtype", "float32"),
        (*DP, "--ep-size", "2", "--enable-dp-lm-head", *TWO_TIERS),
        ("--dp-size", "2", *TWO_TIERS),
        ("--pp-size", "2", "--ess-admission", "off", *TWO_TIERS),
    ],
    ids=["tp2", "tp2 one tier", "dp2 ep2", "two replicas", "pp2"],
)
def test_the_launcher(model, expected, tmp_path, flags):
    given = ("--model-path", str(model), *FLAGS, *flags)
    with ForkedNode("sglang_ess.launch_server", *given, log=tmp_path / "log") as server:
        server.wait_ready()
        assert tokens_of(server) == tokens_of(server) == expected
        info = server.get("/server_info")
        if "--dp-size" not in flags:  # SGLang's controller keeps the schedulers' facts to itself
            assert info["ess"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
        assert server.stop() == 0, server.tail()
