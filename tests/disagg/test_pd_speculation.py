"""Drafts through prefill and decode servers: the tokens and drafts accepted of one server."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.disagg.cluster import DECODE_FLAGS, SERVER_FLAGS, SLOTS
from tests.support import parity
from tests.support.drafts import eagle
from tests.support.engine import EngineProcess
from tests.support.forked import ForkedNode
from tests.support.pd import PdCluster

TOKENS = 48
EAGLE = eagle(4)
FLAGS = [
    word for key, value in EAGLE.items() for word in (f"--{key.replace('_', '-')}", str(value))
]


def colocated(model, prompts, **options):
    """What one one-tier server answers, one request after the other."""
    args = dict(dtype="float32", chunked_prefill_size=512, context_length=8192, **options)
    ess = {"index_dtype": "float32", "enabled": False}
    with EngineProcess(model, ess=ess, **args) as engine:
        return [engine.generate([prompt], TOKENS, start=-1)[0] for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(), ("--tp-size", "2")], ids=["tp1", "tp2"])
@pytest.mark.parametrize(
    "family",
    [{"arch": "v32"}, {"arch": "glm", "index_share_for_mtp_iteration": 1}],
    ids=["v32", "glm"],
)
def test_acceptance_is_that_of_one_server(family, ranks, tmp_path):
    """One request after the other, and all at once.

    With glm, all draft steps read one top-k, and the first one's comes with the request.
    """
    shape = dict(layers=3, index_topk=128, mtp_layers=1, drafts="right", **family)
    model = parity.write_model(tmp_path / "tiny", **shape, **parity.NARROW)
    prompts = parity.prompts_of([20, 100, 700, 1500], seed=11)
    flags = (*SERVER_FLAGS, "--max-total-tokens", str(SLOTS), *FLAGS, *ranks)
    with PdCluster(model, tmp_path, flags, decode_flags=DECODE_FLAGS, node=ForkedNode) as cluster:
        plain, drafted = (colocated(model, prompts, **options) for options in ({}, EAGLE))
        cluster.wait_ready(600)

        def ask(prompt):
            """(tokens, steps that verified drafts)."""
            status, answer = cluster.generate(prompt, TOKENS)
            assert status == 200, answer
            return answer["output_ids"], answer["meta_info"]["spec_verify_ct"]

        answers = [ask(prompt) for prompt in prompts]
        cluster.settle()
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(ask, prompts))
        cluster.settle()
    alone = [one.meta["spec_verify_ct"] for one in drafted]
    assert answers == [(one.token_ids, steps) for one, steps in zip(plain, alone, strict=True)]
    assert together == answers
    assert sum(alone) < TOKENS * len(prompts) / 1.3  # drafts are accepted at all
