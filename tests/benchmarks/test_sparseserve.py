"""The block-level model of SparseServe: its law of overlap, its costs and its server."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.harness import Report
from benchmarks.sim import reproduce_sparseserve as benchmark
from sglang_ess.sim.engine.block_serving import SYSTEMS, BlockCache, BlockServer, Request, load
from sglang_ess.sim.engine.blocks import BlockStreams, Roofline, Setting, overlap_law, working_sets

VLLM, SPARSE, OFFLOAD, FLASH, CONTROL, SEGMENTED = SYSTEMS


@pytest.fixture(scope="module")
def setting():
    return Setting.load(benchmark.DATA)


@pytest.fixture(scope="module")
def model(setting):
    return setting.models[0]


def run(setting, model, system, requests, **kwargs):
    return BlockServer(setting, model, system, requests, **kwargs).run()


# --- the setting ------------------------------------------------------------------------


def test_sizes_are_the_papers(setting, model):
    assert setting.block_bytes(model) == 16 << 10  # "16 KB per block"
    assert model.token_bytes == 512 << 10
    assert setting.models[1].token_bytes == 128 << 10  # GQA: a quarter
    assert setting.sparse.topk == 64


def test_a_bad_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "setting.toml"
    text = benchmark.DATA.read_text().replace("flops = 312e12", "flops = -1.0", 1)
    path.write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if row.startswith("flops"))
    with pytest.raises(ValueError, match=rf"setting.toml:{line}: machine.flops must be more than"):
        Setting.load(path)


def test_weights_that_do_not_fit_are_refused(setting, model):
    small = replace(setting, machine=replace(setting.machine, hbm_bytes=1 << 30))
    with pytest.raises(ValueError, match="must hold the weights of LWM-7B"):
        small.cache_bytes(model)


# --- locality ---------------------------------------------------------------------------


def test_overlap_law_gives_both_stated_rises():
    amplitude, power = overlap_law(0.1068, 0.0031)

    def misses(window):
        return amplitude * window**-power

    assert misses(1) - misses(12) == pytest.approx(0.1068)
    assert misses(12) - misses(16) == pytest.approx(0.0031)
    assert 0 < misses(1) < 1


def test_rises_that_no_power_law_has_are_refused():
    with pytest.raises(ValueError, match="must be a power law's"):
        overlap_law(0.1, 0.05)


def test_working_sets_grow_by_the_misses():
    sets = working_sets(0.12, 0.87, 64)
    assert sets[:2].tolist() == [64, pytest.approx(64 * 1.12)]
    assert sets[2] - sets[1] == pytest.approx(64 * 0.12 * 2**-0.87)


def test_streams_have_the_laws_overlap(setting):
    streams = BlockStreams(setting.sparse, 4, 800, seed=1)
    for stream in range(4):
        streams.join(stream, 800)
    steps = [streams.step(np.arange(4)) for _ in range(220)]

    def overlap(window):
        def share(t, row):
            past = np.concatenate([steps[t - back][row] for back in range(1, window + 1)])
            return np.isin(steps[t][row], past).mean()

        return np.mean([share(t, row) for t in range(60, 220) for row in range(4)])

    near, far = overlap(1), overlap(12)
    assert near == pytest.approx(1 - streams.amplitude, abs=0.01)
    assert far - near == pytest.approx(0.1068, abs=0.01)


def test_selections_are_distinct_blocks_of_the_prompt(setting):
    streams = BlockStreams(setting.sparse, 3, 400, seed=0)
    for stream, blocks in enumerate((400, 65, 20)):
        streams.join(stream, blocks)
    for _ in range(50):
        chosen = streams.step(np.array([0, 1, 2]))
        for row, blocks in enumerate((400, 65, 20)):
            real = chosen[row][chosen[row] >= 0]
            assert len(set(real.tolist())) == len(real) == min(64, blocks)
            assert real.max() < blocks
    assert sorted(streams._stacks[0].tolist()) == list(range(400))  # none is lost


# --- costs ------------------------------------------------------------------------------


def test_roofline_in_closed_form(setting, model):
    cost = Roofline(setting.machine, model, setting.sparse)
    assert cost.linear(1) == pytest.approx(2 * 6.74e9 / 1.6e12)
    assert cost.linear(2048) == pytest.approx(2 * 6.74e9 * 2048 / (312e12 * 0.65))
    whole = cost.prefill_attention(8192, 0)
    assert whole == pytest.approx(4 * 4096 * 32 * 8192**2 / 2 / (312e12 * 0.65))
    halves = cost.prefill_attention(4096, 0) + cost.prefill_attention(4096, 4096)
    assert halves - whole == pytest.approx(4096 * model.token_bytes / 1.6e12)  # the prefix again
    long = np.array([32768.0])
    assert cost.decode_attention(long, True) == pytest.approx(
        (2048 + 32768 / 32) / 32768 * cost.decode_attention(long, False)
    )


def test_transfers_have_the_papers_order(setting, model):
    found = benchmark.transfers(setting, model, 0)
    assert found["flash_h2d_speedup"] == 5
    assert found["save_flash_d2h"] == 1
    assert found["save_gpu_direct"] == pytest.approx(1.28, rel=0.1)  # nothing is fitted to it
    smaller = benchmark.chunked_attention(setting, model, 512, 0)
    assert smaller > benchmark.chunked_attention(setting, model, 2048, 0) > 1


# --- the server -------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_tokens_and_times_are_conserved(setting, model, system):
    requests = load(setting, model, 8, 2.0, 3)
    result = run(setting, model, system, requests)
    assert len(result.tbt) == sum(r.output - 1 for r in requests)
    for request in requests:
        assert request.prefilled == request.prompt and request.generated == request.output
        assert request.arrival <= request.scheduled < request.first_token <= request.last_token
    spent = sum(r.last_token - r.first_token for r in requests)
    assert result.tbt.sum() == pytest.approx(spent)


def one(prompt=8000, output=60):
    return [Request(0, 0.0, prompt, output)]


def test_one_request_loads_what_its_prefill_left_out(setting, model):
    """Chunked, its blocks are in the cache; layer by layer, each comes in once, when selected."""
    seen = []

    class Watched(BlockServer):
        def _touch(self, batch, prefills):
            before = self._cache.streams.step

            def step(active):
                chosen = before(active)
                seen.append(chosen.copy())
                return chosen

            self._cache.streams.step = step
            loaded = super()._touch(batch, prefills)
            self._cache.streams.step = before
            totals.append(loaded)
            return loaded

    totals = []
    Watched(setting, model, FLASH, one()).run()
    assert sum(totals) == 0
    totals.clear()
    seen.clear()
    Watched(setting, model, SEGMENTED, one()).run()
    distinct = len(np.unique(np.concatenate([s.ravel() for s in seen if len(s)])))
    assert sum(totals) == distinct * model.heads > 64 * model.heads


def test_one_request_alone_takes_the_sum_of_its_parts(setting, model):
    requests = one(prompt=4096, output=3)
    result = run(setting, model, VLLM, requests)
    cost = Roofline(setting.machine, model, setting.sparse)
    prefill = sum(cost.linear(2048) + cost.prefill_attention(2048, p) for p in (0, 2048))
    decode = sum(
        cost.linear(1) + cost.decode_attention(np.array([4096.0 + n]), False) for n in (1, 2)
    )
    assert result.ttft[0] == pytest.approx(prefill)
    assert requests[0].last_token == pytest.approx(prefill + decode)


def test_seeds_are_reproducible_and_differ(setting, model):
    def loads(seed):
        requests = load(setting, model, 6, 2.0, seed)
        return run(setting, model, SEGMENTED, requests, seed=seed).loads

    assert loads(1) == loads(1) != loads(2)


def test_a_faster_link_is_never_slower(setting, model):
    ends = []
    for rate in (4e9, 20e9):
        faster = replace(setting, machine=replace(setting.machine, flash_h2d_bytes_per_second=rate))
        requests = load(faster, model, 8, 3.0, 1)
        run(faster, model, SEGMENTED, requests)
        ends.append(max(r.last_token for r in requests))
    assert ends[1] < ends[0]


def test_control_keeps_the_batch_within_the_cache(setting, model):
    """With a cache of 500 blocks a head, about five working sets of the window fit."""
    used = {}

    class Small(BlockServer):
        def __post_init__(self):
            super().__post_init__()
            self._rows = 500
            self._cache = BlockCache(self.setting, self.model, 500, 0)

        def _batch(self):
            batch, rows = super()._batch()
            used.setdefault(self.system.name, []).append((len(batch), rows))
            return batch, rows

    loads = {}
    for system in (SEGMENTED, benchmark.UNCONTROLLED):
        requests = [Request(i, 0.0, 8000, 40) for i in range(12)]
        loads[system.name] = Small(setting, model, system, requests).run().loads
    assert all(rows <= 500 for size, rows in used[SEGMENTED.name] if size > 1)
    assert max(rows for _, rows in used[benchmark.UNCONTROLLED.name]) < 500  # metadata alone
    assert max(size for size, _ in used[benchmark.UNCONTROLLED.name]) > 8
    assert loads[SEGMENTED.name] < loads[benchmark.UNCONTROLLED.name] / 5


def test_a_prompt_waits_for_device_memory_without_offloading(setting, model):
    """Three prompts of 16 GiB of KV do not fit into 22: one after the other."""
    requests = [Request(i, 0.0, 32768 - 64, 8) for i in range(3)]
    run(setting, model, VLLM, requests)
    assert requests[1].scheduled >= requests[0].last_token
    requests = [Request(i, 0.0, 32768 - 64, 8) for i in range(3)]
    run(setting, model, SEGMENTED, requests)
    assert requests[1].scheduled < requests[0].last_token


# --- the report -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paper", "neutral", "model", "right"),
    [(1.5, 1, 1.2, True), (1.5, 1, 1.0, False), (1.5, 1, 0.9, False), (1.0, 1, 1.01, True),
     (1.0, 1, 1.1, False), (0.7, 0, 0.2, True), (0.7, 0, 0.0, False)],
)  # fmt: skip
def test_direction(paper, neutral, model, right):
    assert benchmark.Item("x", paper, "x", "", neutral).is_right(model) is right


def test_rows_are_simulated_and_the_summary_is_flat():
    report = Report()
    benchmark.record(report, "batch_2_to_6", 1.8, cache_gib=17.0)
    benchmark.record(report, "save_flash_d2h", 1.0)
    row, other = json.loads(json.dumps(report.rows))
    assert other["right"] is True
    assert (row["kind"], row["paper"], row["right"]) == ("simulated", 2.07, True)
    assert report.summary == {"batch_2_to_6": 1.8 / 2.07, "save_flash_d2h": 1}


@pytest.mark.slow
def test_the_benchmark_finds_the_papers_directions(tmp_path):
    path = tmp_path / "found.json"
    benchmark.main(["--quick", "--json", str(path)])
    summary = json.loads(path.read_text())["summary"]
    assert summary["directions_right"] >= summary["directions"] - 3
    assert summary["batch_6_to_12_down"] == pytest.approx(1, rel=0.6)
