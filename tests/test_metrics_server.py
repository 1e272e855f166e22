"""A server's /metrics and log lines: what it counts is what it has served."""

import json
import re

import numpy as np
import pytest

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from sglang_ess.tiers.index_groups import IndexGroups
from tests.support.server import Server
from tests.test_metrics import samples

pytestmark = pytest.mark.slow
PROMPTS, OUTPUT = (600, 700, 800), 20


@pytest.mark.parametrize("arch", ["v32", "glm"])
def test_a_server_counts_what_it_serves(arch, tmp_path):
    """The lengths of the requests determine the lookups; the other figures follow from them."""
    model = TinyModelConfig(arch=arch)
    groups = IndexGroups.of_layers([kind == "full" for kind in model.indexer_types])
    path = write_tiny_model(tmp_path / arch, model)
    flags = ["--enable-metrics", "--decode-log-interval", "1", "--max-total-tokens", "8192"]
    flags += ["--ess-hot-ratio", "0.02", "--disable-overlap-schedule", "--disable-radix-cache"]
    with Server(path, *flags, log=tmp_path / "log") as server:
        server.wait_ready()
        ess = server.get("/server_info")["ess"]
        rng = np.random.default_rng(0)
        before = scrape(server)
        for length in PROMPTS:
            ids = rng.integers(1, 255, length).tolist()
            params = {"temperature": 0, "max_new_tokens": OUTPUT, "ignore_eos": True}
            status, body = server.post("/generate", {"input_ids": ids, "sampling_params": params})
            assert status == 200, body
            assert json.loads(body)["meta_info"]["completion_tokens"] == OUTPUT
        found = scrape(server)
        log = server.log.read_text()
    check_counters(found, before, ess, groups)
    check_lines(log)


DRAFTS = 4
NGRAM = {"algorithm": "NGRAM", "ngram-max-bfs-breadth": 1}
EAGLE = {"algorithm": "EAGLE", "eagle-topk": 1, "num-steps": DRAFTS - 1}


@pytest.mark.parametrize("options", [NGRAM, EAGLE], ids=["ngram", "eagle"])
def test_a_server_counts_verify_steps_and_their_tokens(options, tmp_path):
    """SGLang says how many verify steps each request took; the other figures follow from that."""
    path = write_tiny_model(tmp_path / "tiny", TinyModelConfig(arch="v32", mtp_layers=1))
    flags = ["--enable-metrics", "--decode-log-interval", "1", "--max-total-tokens", "8192"]
    flags += ["--ess-hot-ratio", "0.02", "--disable-overlap-schedule", "--disable-radix-cache"]
    for name, value in (options | {"num-draft-tokens": DRAFTS}).items():
        flags += [f"--speculative-{name}", str(value)]
    tokens = verifies = 0
    with Server(path, *flags, log=tmp_path / "log") as server:
        server.wait_ready()
        ess = server.get("/server_info")["ess"]
        rng = np.random.default_rng(0)
        before = scrape(server)
        for length in PROMPTS:
            ids = np.tile(rng.integers(1, 255, 20), length // 20).tolist()
            params = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
            status, body = server.post("/generate", {"input_ids": ids, "sampling_params": params})
            assert status == 200, body
            meta = json.loads(body)["meta_info"]
            assert meta["completion_tokens"] == 60
            verifies += meta["spec_verify_ct"]
            # Those of the last step that the request did not need are among them.
            tokens += meta["spec_verify_ct"] + meta["spec_num_correct_drafts"]
        found = scrape(server)
        log = server.log.read_text()
    assert (tokens > 1.2 * verifies) == (options is NGRAM), "tokens come again, weights are random"
    check_speculation(found, before, ess, tokens, verifies)
    check_accept_lengths(log, tokens, verifies)


def check_speculation(found, before, ess, tokens, verifies):
    """Every list has index_topk slots, since the prompts are longer."""

    def since(name, *labels):
        return found[f"sglang:{name}", *labels] - before.get((f"sglang:{name}", *labels), 0)

    assert since("realtime_tokens_total", "decode") == tokens >= 3 * 59
    assert since("spec_verify_calls_total") == verifies
    misses = 0
    for layer in range(ess["layers"]):
        assert since("ess_lookups_total", str(layer)) == verifies * DRAFTS * ess["index_topk"]
        misses += since("ess_misses_total", str(layer))
    assert since("ess_request_misses_count") == len(PROMPTS)
    assert since("ess_request_misses_sum") == misses > 0
    assert 1 <= found["sglang:ess_accept_length",] <= DRAFTS
    # One request runs at a time: all that its 12 last steps selected, by the sample of whole lists.
    assert ess["index_topk"] <= found["sglang:ess_working_set_rows",] <= max(PROMPTS) + 60


def check_accept_lengths(log, tokens, verifies):
    """Our line shows the accept length of SGLang's, next to the misses; a line is a step here."""
    theirs = [float(one) for one in re.findall(r"Decode batch.* accept len: ([\d.]+)", log)]
    ours = re.findall(
        r"([\d.]+) misses/step, ([\d.]+) misses/token \(accept length ([\d.]+)\)", log
    )
    assert [float(length) for *_, length in ours] == theirs
    assert len(theirs) >= verifies and sum(theirs[-verifies:]) == tokens
    for step, token, length in np.array(ours, float):
        assert token == pytest.approx(step / length, abs=0.051)


def scrape(server):
    with server.open("/metrics/") as response:
        return samples(response.read().decode())


def check_counters(found, before, ess, groups):
    """found, before: metrics after and before the requests; ess: the server's facts."""

    def since(name, *labels):
        key = (f"sglang:ess_{name}", *labels)
        return found[key] - before.get(key, 0)

    # The first output token is prefill's; the decode step for the n-th sees prompt + n - 1.
    seen = [length + n - 1 for length in PROMPTS for n in range(2, OUTPUT + 1)]
    lookups = sum(min(length, ess["index_topk"]) for length in seen)
    total = 0
    for first, size in zip(groups.firsts, groups.sizes, strict=True):
        layer = str(first)
        assert since("lookups_total", layer) == lookups
        misses = since("misses_total", layer)
        assert 0 < misses <= lookups
        assert since("fetched_bytes_total", layer) == size * misses * ess["latent_row_bytes"]
        total += size * misses
        hot_rows = found["sglang:ess_hot_rows", layer]
        # Without a radix cache all of them are free again once the scheduler is idle.
        assert 0 <= found["sglang:ess_hot_rows_used", layer] <= hot_rows < 8192
        arrived = found["sglang:ess_misses_total", layer]
        arrived += found["sglang:ess_installed_rows_total", layer]
        assert found["sglang:ess_evictions_total", layer] <= arrived
    assert found["sglang:ess_host_slots",] >= ess["slots"]
    # One after another, each missed something, and is counted in the step that ends it.
    assert since("request_misses_count") == len(PROMPTS)
    assert since("request_misses_sum") == total


def check_lines(log):
    """Our line follows SGLang's decode line."""
    found = [line for line in log.splitlines() if "Decode batch" in line or "ESS: hot rows" in line]
    assert len(found) >= 2 * len(PROMPTS) * (OUTPUT - 1)
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        assert "Decode batch" in theirs
        assert re.search(
            r"ESS: hot rows \d+% .*, hit rate .*misses/step, fetched .*, host slots \d+/\d+$", ours
        ), ours
