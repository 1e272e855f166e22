"""benchmarks/kernels: every section's code, the checks before timing, its figures and files."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.harness import ROOT, Report, failed, measured, plot, print_failed
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import fetch as fetch_benchmark
from benchmarks.kernels import figures
from benchmarks.kernels import plan as plan_benchmark
from benchmarks.kernels.points import AGES, MINIATURE, PAGE, Run, Sizes, Steady, host_tier
from benchmarks.kernels.timing import Bench, Subject, WrongResult, require
from ess_kernels import hot_state
from ess_kernels.plan_fetch import fetch, install, plan_fetch
from sglang_ess.attention.overlap import CostTable, Mode, OverlapPolicy

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
without_gpu = pytest.mark.skipif(HAS_CUDA, reason="is about a machine without a GPU")
# What the interpreter cannot run: those rows fail, each with its reason.
NEEDS_CUDA = ("hisparse",)
NEEDS_CUDA_KERNELS = ("flashmla_fp8", "flashmla_bf16", "trtllm", "flashinfer")


def run_benchmark(*arguments):
    start = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; "
        "from tests.support.cuda_host import host; host.stand_in(); "
        "from benchmarks.kernels.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    how = ["-c", start] if "--interpret" in arguments else ["-m", "benchmarks.kernels"]
    return subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=ROOT, text=True, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """(JSON, PNG, output) of one interpreted run of every section."""
    folder = tmp_path_factory.mktemp("kernels")
    files = folder / "a" / "rows.json", folder / "a" / "rows.png"
    arguments = ["--interpret", "--json", str(files[0]), "--plot", str(files[1])]
    if HAS_CUDA:  # where this process's kernels are compiled
        done = run_benchmark(*arguments)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    else:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert kernels.main(arguments) == 0
        output = printed.getvalue()
    return json.loads(files[0].read_text()), files[1], output


class TestMiniature:
    def test_every_section_ran(self, miniature):
        ran = {
            (row["name"], row["config"].get("system") or row["config"].get("mode")
             or row["config"].get("direction") or row["config"].get("kernel"))
            for row in miniature[0]["rows"]
            if row["kind"] == "interpreted"
        }  # fmt: skip
        assert ran == {
            *(("pcie_peak", way) for way in ("h2d", "d2h")),
            *((name, "cuda") for name in ("fetch", "plan")),
            ("swap", "ours"),
            *(("step", mode.value) for mode in Mode),
            *((name, "triton") for name in ("attention", "empty")),
            *((name, None) for name in ("pack", "install", "indexer", "preattn")),
        }

    def test_only_what_needs_a_gpu_failed(self, miniature):
        for row in miniature[0]["rows"]:
            config = row["config"]
            gpu = config.get("system") in NEEDS_CUDA or config.get("kernel") in NEEDS_CUDA_KERNELS
            assert row["kind"] == ("failed" if gpu else "interpreted"), row
            assert bool(row.get("error")) == gpu

    def test_every_point(self, miniature):
        rows = [r["config"] for r in miniature[0]["rows"] if r["kind"] == "interpreted"]
        plans = [c for c in rows if c.get("system") == "cuda" and "topk" in c]
        assert {(c["batch"], c["misses"]) for c in plans} == {
            (batch, misses) for batch in MINIATURE.batches for misses in (0, *MINIATURE.misses)
        }
        assert {c["row_bytes"] for c in rows if "row_bytes" in c} == {656}
        steps = {(c["mode"], c["batch"]) for c in rows if "mode" in c}
        assert steps == {(m.value, b) for m in Mode for b in (1, 2)} - {("dba", 1)}

    def test_it_gives_no_figures(self, miniature):
        content, _, output = miniature
        assert content["summary"] == {} and "overlap_costs" not in content
        assert "interpreted on the CPU: their code ran, their times say nothing" in output

    def test_files(self, miniature):
        content, png, _ = miniature
        assert {"machine", "versions", "command", "seed", "config", "rows"} <= content.keys()
        assert content["machine"]["triton"] and content["config"]["indexer_us"] == 400
        assert png.read_bytes()[:4] == b"\x89PNG"


@without_gpu
def test_without_a_device_it_says_so_and_exits_with_2():
    done = run_benchmark()
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "needs a CUDA device" in done.stderr


# --- inputs and checks --------------------------------------------------------------------

SMALL = Sizes((2,), (3,), topk=8, context=40, buffer=16, heads=(2,), sets=2, few_sets=2, groups=3)


@pytest.fixture
def bench():
    return Bench(Report(machine={}), DEVICE, quick=True)


@pytest.fixture
def steady():
    return Steady(SMALL, batch=2, misses=3, sets=2, device=DEVICE, seed=1)


@pytest.fixture
def host_rows():
    return host_tier(80, DEVICE, torch.Generator(DEVICE).manual_seed(1))


@pytest.fixture
def run(bench):
    return Run(bench, SMALL, (1.0, 1.0), seed=0)


def plan_set(point, index=0):
    plan_fetch(point.state.group(index), point.topk[index], point.buffers, lists=True)


class TestSteady:
    @pytest.mark.parametrize("misses", [0, 1, 3, 8])
    def test_a_plan_misses_what_was_asked_for(self, misses):
        point = Steady(SMALL, 2, misses, 2, DEVICE, seed=2)
        for index in range(2):
            point.restore()
            plan_set(point, index)
            point.check_plan(index)
            assert int(point.buffers.num_misses) == 2 * misses

    def test_restore_brings_the_same_misses_again(self, steady):
        for _ in range(2):
            steady.restore()
            plan_set(steady)
            steady.check_plan(0)
        plan_set(steady)  # not restored: all hit
        with pytest.raises(WrongResult, match="must miss 6: got 0"):
            steady.check_plan(0)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda b, s: b.rows[0].copy_(b.rows[0].flip(0)), "another slot's row"),
            (lambda b, s: b.rows[1, 2:3].fill_(-1), "without a row"),
            (lambda b, s: b.miss_slots[:1].add_(1), "other misses"),
            (lambda b, s: b.miss_rows[:1].copy_(b.hit_rows[0, :1]), "other rows"),
            (lambda b, s: s.slot_row.clamp_(min=0), "an evicted slot hot"),
            (lambda b, s: s.counters.fill_(1), "ran short"),
        ],
    )  # fmt: skip
    def test_a_wrong_plan_is_noticed(self, steady, spoil, message):
        steady.restore()
        plan_set(steady)
        spoil(steady.buffers, steady.state.group(0))
        with pytest.raises(WrongResult, match=message):
            steady.check_plan(0)

    def test_a_young_victim_is_noticed(self, steady):
        steady.restore()
        words = steady.state.words[0]
        words[hot_state.AGE_LIMIT] = 0
        plan_set(steady)
        words[hot_state.AGE_LIMIT] = AGES
        with pytest.raises(WrongResult, match="evicted a young row"):
            steady.check_plan(0)


def hisparse_on_the_host(wrong_row=False):
    """SGLang's swap-in kernel as hisparse.cuh has it (slow path), request by request."""

    def swap(*, top_k_tokens, device_buffer_tokens, host_cache_locs, device_buffer_locs,
             host_cache, device_buffer, top_k_device_locs, req_pool_indices, seq_lens, lru_slots,
             item_size_bytes, num_top_k, hot_buffer_size, page_size, block_size,
             num_real_reqs):  # fmt: skip
        assert (item_size_bytes, num_top_k, hot_buffer_size) == (656, SMALL.topk, SMALL.buffer)
        assert lru_slots.dtype == torch.int16 and host_cache_locs.dtype == torch.int64
        assert device_buffer_tokens.shape == (2, SMALL.buffer + PAGE) and page_size == 1
        assert int(num_real_reqs) == 2 and block_size == 960
        for block, request in enumerate(req_pool_indices.tolist()):
            assert seq_lens[block] > hot_buffer_size
            tokens, lru = device_buffer_tokens[request], lru_slots[request]
            wanted = top_k_tokens[block].tolist()
            assert int(seq_lens[block]) - 1 not in wanted
            hits = [s for s in lru.tolist() if tokens[s].item() in wanted]
            rest = [s for s in lru.tolist() if s not in hits]
            missing = [t for t in wanted if t not in tokens[:hot_buffer_size].tolist()]
            for token, place in zip(missing, rest, strict=False):
                tokens[place] = token
                source = host_cache_locs[request, token] + int(wrong_row)
                device_buffer[device_buffer_locs[request, place].long()] = host_cache[source]
            lru.copy_(torch.tensor(rest[len(missing) :] + rest[: len(missing)] + hits))
            where = {t: s for s, t in enumerate(tokens[:hot_buffer_size].tolist())}
            places = torch.tensor([where[t] for t in wanted])
            top_k_device_locs[block] = device_buffer_locs[request, places]

    return swap


class TestHiSparse:
    @without_gpu
    def test_it_gets_the_same_requests_and_misses(self, bench, steady, host_rows, monkeypatch):
        monkeypatch.setattr(plan_benchmark, "hisparse_kernel", lambda _: hisparse_on_the_host())
        subject = plan_benchmark.HiSparse(steady, host_rows).subject()
        for last in range(2):
            subject.before()
            for op in subject.ops[: last + 1]:
                op()
            subject.check(last)
        assert subject.num_bytes == 2 * 3 * 656

    @without_gpu
    def test_a_wrong_row_is_noticed(self, steady, host_rows, monkeypatch):
        monkeypatch.setattr(plan_benchmark, "hisparse_kernel", lambda _: hisparse_on_the_host(True))
        subject = plan_benchmark.HiSparse(steady, host_rows).subject()
        subject.before()
        subject.ops[0]()
        with pytest.raises(WrongResult, match="copied another row"):
            subject.check(0)


class TestBench:
    def test_a_wrong_copy_is_a_failed_row_and_fails_the_run(self, bench, run, monkeypatch):
        def one_short(host, hot, slots, rows, count):
            fetch(host, hot, slots, rows, count - 1)

        monkeypatch.setattr(fetch_benchmark, "fetch", one_short)
        fetch_benchmark.measure_fetch(run)
        (row,) = bench.report.rows
        assert row["kind"] == "failed" and "WrongResult: fetched rows differ" in row["error"]
        assert len(bench.wrong) == 1

    def test_a_copy_too_many_is_noticed(self, bench, run, monkeypatch):
        def one_more(host, hot, slots, rows, count):
            fetch(host, hot, slots, rows, count + 1)

        monkeypatch.setattr(fetch_benchmark, "fetch", one_more)
        fetch_benchmark.measure_fetch(run)
        assert "or others changed" in bench.report.rows[0]["error"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state, slots: install(state, slots[:1], reserve=True), "has no row"),
            (lambda state, slots: install(state, slots), "does not count as used"),
        ],
    )
    def test_a_slot_that_is_not_reserved_is_noticed(self, bench, run, monkeypatch, change, message):
        fetch_benchmark.measure_install(run)
        assert bench.report.rows.pop()["kind"] != "failed"
        monkeypatch.setattr(fetch_benchmark, "install", lambda *args, reserve: change(*args))
        fetch_benchmark.measure_install(run)
        assert message in bench.report.rows[0]["error"]

    def test_what_cannot_be_made_is_a_failed_row(self, bench):
        def make():
            raise ImportError("no such kernel\nmore")

        assert bench.time("op", {"a": 1}, make) is None
        (row,) = bench.report.rows
        assert row["error"] == "ImportError: no such kernel" and row["median"] is None
        assert bench.wrong == []

    def test_no_time_left(self):
        late = Bench(Report(machine={}), DEVICE, quick=True, seconds=-1)
        assert late.time("op", {}, lambda: Subject([lambda: None])) is None
        assert late.report.rows[0]["error"].startswith("OutOfTime")

    def test_before_each_sample_and_check_first(self, bench):
        calls = []
        subject = Subject(
            [lambda: calls.append("a"), lambda: calls.append("b")],
            before=lambda: calls.append("before"),
            check=lambda last: calls.append(f"check {last}"),
        )
        bench.time("op", {}, lambda: subject, "wall")
        assert calls[:6] == ["before", "a", "check 0", "before", "a", "b"]
        kind = "measured" if HAS_CUDA else "interpreted"
        assert bench.report.rows[0]["kind"] == kind and bench.report.rows[0]["sets"] == 2

    def test_require(self):
        require(torch.tensor(True), "fine")
        with pytest.raises(WrongResult, match="not fine"):
            require(torch.tensor(False), "not fine")


# --- figures ------------------------------------------------------------------------------


def row(name, us, num_bytes=0, **config):
    found = measured(name, config, "time", "us", [us])
    if num_bytes:
        found |= {"bytes_moved": num_bytes, "gb_per_s": num_bytes / us / 1e3}
    return found


def synthetic():
    """Rows of a run: at 50 GB/s, misses cost batch x misses x 656 B."""
    report, point = Report(machine={}), {"row_bytes": 656}
    report.add(row("pcie_peak", 20, 10**6, direction="h2d"))  # 50 GB/s
    report.add(row("pcie_peak", 25, 10**6, direction="d2h"))
    for system, share in (("cuda", 0.9),):
        for batch, misses in ((1, 2048), (16, 32), (16, 64), (160, 256)):
            num_bytes = batch * misses * 656
            # Below the least point, a rate that must not count.
            rate = share if batch * misses >= 1024 and batch > 1 else 0.1
            rate -= 0.05 * (batch == 16)
            us = num_bytes / (50e3 * rate)
            report.add(row("fetch", us, num_bytes, system=system, batch=batch, misses=misses,
                           **point))  # fmt: skip
    for misses, us in ((2, 11), (2048, 14)):
        report.add(row("plan", us, system="cuda", topk=2048, batch=160, misses=misses))
        report.add(row("plan", 99, system="cuda", topk=2048, batch=64, misses=misses))
        at = {"batch": 160, "misses": misses, **point}
        report.add(row("swap", 100, system="hisparse", **at))
        report.add(row("swap", 40 + misses / 64, system="ours", **at))
    for heads, us in ((16, 20), (128, 40)):
        report.add(row("attention", us, kernel="triton", batch=1, heads=heads, **point))
    for batch in (1, 160):
        for parts in (1, 2):
            report.add(row("indexer", 400 + 10 * parts, batch=batch, parts=parts))
        report.add(row("preattn", 30, batch=batch))
        report.add(row("empty", 7, kernel="triton", batch=batch, misses=0, **point))
        for mode, extra in (("off", 0.9), ("da", 0.5), ("dba", 0.2)):
            if (mode, batch) == ("dba", 1):
                continue
            for misses in (0, 256):
                took = 500 + misses * extra + (mode != "off") * 5
                at = {"kernel": "triton", "batch": batch, "misses": misses, "mode": mode, **point}
                report.add(row("step", took, bare=False, **at))
                report.add(row("step", 44 + (mode != "off"), bare=True, **at))
    return report


class TestFigures:
    def test_summary(self):
        report = synthetic()
        figures.summarise(report)
        transfer = 160 * 256 * 656 / (50e3 * 0.9)
        wanted = {
            "pcie_h2d_gb_per_s": 50,
            "pcie_d2h_gb_per_s": 40,
            "fetch_of_pcie_peak": 0.85,
            "plan_us": 14,
            "swap_vs_hisparse": 100 / 72,
            "exposed_share": (256 * 0.2 + 5) / transfer,
            "exposed_share_off": 256 * 0.9 / transfer,
            "resident_overhead": 1.1,
        }
        assert report.summary == pytest.approx(wanted)
        assert figures.TARGETS.keys() <= report.summary.keys()

    def test_what_was_not_measured_is_left_out(self):
        report = synthetic()
        gone = ("pcie_peak", "plan", "attention")
        report.rows = [r for r in report.rows if r["name"] not in gone]
        figures.summarise(report)
        assert {"swap_vs_hisparse", "exposed_share"} <= report.summary.keys()
        assert not {"fetch_of_pcie_peak", "plan_us", "resident_overhead"} & report.summary.keys()

    def test_interpreted_rows_are_no_figures(self):
        report = synthetic()
        for found in report.rows:
            found["kind"] = "interpreted"
        figures.summarise(report)
        assert report.summary == {} and figures.cost_table(report, "x") is None

    def test_cost_table(self):
        table = figures.cost_table(synthetic(), "a card")
        assert table.batches == (1, 160) and table.misses == (0, 256)
        around = 410 + 30
        off, da, dba = (table.us[mode] for mode in Mode)
        assert off[1] == pytest.approx((500 - around, 500 - around + 256 * 0.9))
        assert da[0] == pytest.approx((505 - around, 505 - around + 128))
        assert dba[1] == pytest.approx((505 - around - 10, 505 - around - 10 + 256 * 0.2))
        assert dba[0] == da[0]  # one request has no halves
        assert (table.halving_us, table.empty_us, table.source) == (10, 7, "a card")

    def test_the_policy_reads_the_json(self, tmp_path):
        report, args = synthetic(), kernels.arguments().parse_args(["--json", str(tmp_path / "j")])
        costs = figures.cost_table(report, "a card")
        kernels.write_json(report, costs, args)
        read = CostTable.read(args.json)
        assert read == costs
        assert OverlapPolicy(3, read).choose(160).mode is Mode.OFF  # nothing seen: no misses

    def test_no_table_with_a_hole(self):
        report = synthetic()
        report.rows = [r for r in report.rows if r["config"].get("mode") != "dba"]
        assert figures.cost_table(report, "a card") is None

    def test_tables_and_plot(self, tmp_path, capsys):
        report = synthetic()
        report.add(failed("swap", {"system": "hisparse"}, "time", "us", "ImportError: none"))
        figures.summarise(report)
        figures.print_tables(report, None)
        print_failed(report)
        printed = capsys.readouterr().out
        assert "not measured: time of swap hisparse: ImportError: none" in printed
        lines = {line.split()[0]: line for line in printed.splitlines() if line.split()}
        assert lines["plan_us"].endswith("met") and lines["fetch_of_pcie_peak"].endswith("missed")
        for name, content in (("full", report), ("empty", Report(machine={}))):
            path = tmp_path / f"{name}.png"
            plot(path, *figures.panels(content))
            assert path.stat().st_size > 1000


# --- scripts ------------------------------------------------------------------------------


def bundle(folder, part_size):
    """Two wheels' parts, the larger one in pieces; returns their contents."""
    files = {"a-1-py3.whl": bytes(range(50)), "b-1-py3.whl": bytes(range(100, 230))}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, check=True).stdout
    for i in (1, 2):
        (folder / "parts" / f"part{i}").mkdir(parents=True)
        (folder / "parts" / f"part{i}" / "SHA256SUMS").write_bytes(sums)
    first, second = folder / "parts" / "part1", folder / "parts" / "part2"
    large = files["b-1-py3.whl"]
    (first / "b-1-py3.whl.piece000").write_bytes(large[:part_size])
    (second / "b-1-py3.whl.piece001").write_bytes(large[part_size:])
    (second / "a-1-py3.whl").write_bytes(files["a-1-py3.whl"])
    return files


def join(source, target):
    command = ["tools/gpu_bundle.sh", "--join", source, target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_bundles_parts_are_joined_as_they_come(tmp_path):
    files = bundle(tmp_path, part_size=100)
    parts, out = tmp_path / "parts", tmp_path / "joined"
    early = join(parts / "part1", out)
    assert early.returncode == 1 and "a-1-py3.whl: in a part that is not here" in early.stderr
    done = join(parts / "part2", out)
    assert done.returncode == 0, done.stderr
    assert {f.name: f.read_bytes() for f in out.iterdir()} == files


def test_a_spoilt_wheel_is_refused(tmp_path):
    bundle(tmp_path, part_size=100)
    (tmp_path / "parts" / "part2" / "a-1-py3.whl").write_bytes(b"other")
    done = join(tmp_path / "parts", tmp_path / "joined")
    assert done.returncode == 1 and "must have the checksum" in done.stderr
    assert not (tmp_path / "joined" / "a-1-py3.whl").exists()


@without_gpu
def test_the_check_wants_a_gpu(tmp_path):
    done = subprocess.run(
        ["tools/gpu_check.sh", "--quick"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OUT": str(tmp_path), "WORK": str(tmp_path), "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2 and "a CUDA device must be there: got none" in done.stderr
