"""benchmarks/serving/recall: its figures, systems and changes; a slow run of the real thing."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import sglang_ess.cpu
from benchmarks.harness import ROOT, Report, failed, finish
from benchmarks.serving import recall, recall_changes
from benchmarks.serving.recall import FULL, HALVED, HEADLINE, LAST_K, ONE_TIER, QUICK, SYSTEMS
from benchmarks.serving.recall_changes import NONE, STALE, WRONG_BEST, WRONG_RANDOM
from benchmarks.serving.shared import parser_with_threads
from sglang_ess.config import EssConfig
from sglang_ess.cpu.ops.topk_select import topk_select_reference
from sglang_ess.testing.recall.documents import KINDS
from sglang_ess.tiers import HotCache

LENGTH, DEPTHS = 2048, (0.2, 0.8)
ASKED = [recall.document_of(0, LENGTH, number, 1, depth) for number, depth in enumerate(DEPTHS)]
IN_QUICK = {
    *("recall_2k", "recall_2k_one_tier", "hit_rate_2k", "recall_16k", "recall_16k_one_tier"),
    *("hit_rate_16k", "recall_last_k", "same_answers", "fault_questions"),
    *recall.FAULT_FIGURES,
}  # fmt: skip


def answered(document, wrong=()) -> dict:
    """What RecallEngine.ask gives; wrong: kinds that it answers with something else."""
    texts = [" no\n" if one.kind in wrong else one.answer for one in document.questions]
    return {
        "token_ids": [list(text.encode()) for text in texts],
        "lookups": [100, 100], "misses": [20, 40], "request_steps": 10, "kept": 25,
    }  # fmt: skip


def rows_of(system, wrong=()):
    answers = {ONE_TIER: [answered(document) for document in ASKED]}
    answers[system] = [answered(ASKED[0]), answered(ASKED[1], wrong)]
    return recall.needle_rows(system, LENGTH, DEPTHS, ASKED, answers)


class TestFigures:
    def test_recall_by_kind_and_depth(self):
        report = Report()
        report.add(*rows_of(HEADLINE, wrong=("hop",)))

        def mean(name, metric="recall", **config):
            return report.figure(name, metric, "mean", **config)

        assert mean("recall", asks="all") == pytest.approx(5 / 6)
        assert mean("recall", asks="hop") == 0.5 and mean("recall", asks="code") == 1
        assert mean("needle", asks="hop", depth=0.8) == 0 and mean("needle", asks="hop", depth=0.2)
        assert mean("recall", "same_answers") == pytest.approx(5 / 6)
        assert mean("recall", "hit_rate") == pytest.approx(0.7)
        assert mean("recall", "accept_length") == pytest.approx(2.5)

    def test_equal_wrong_answers_are_the_same(self):
        wrong = answered(ASKED[0], KINDS)
        assert recall.same(wrong, wrong) == [True] * 3
        assert recall.rights(ASKED[0], wrong) == [False] * 3

    def test_tokens_that_are_no_bytes_are_wrong(self):
        found = {"token_ids": [[300] * 60] * 3}
        assert recall.rights(ASKED[0], found) == [False] * 3

    def test_as_many_answers_are_counted_as_asked(self):
        expected = [answered(document) for document in ASKED]
        found = [answered(ASKED[0]), answered(ASKED[1], KINDS)]
        for count, changed in ((6, 3), (4, 1)):
            row, right = recall.fault_rows(STALE, ASKED, found, expected, count)
            assert row["median"] == changed and right["n"] == count


class TestSystems:
    def test_all_are_asked_about_the_same_documents_in_the_same_slots(self, tmp_path):
        bench = recall.Bench(FULL, seed=0, threads=2, directory=tmp_path)
        (tmp_path / "recall-model").mkdir()
        engines = bench.systems(16384, 1, FULL.systems)
        assert engines.keys() == {SYSTEMS[name].engine for name in FULL.systems}
        args = {name: engine._args[1] for name, engine in engines.items()}
        assert {one["context_length"] for one in args.values()} == {16384}
        assert all(one.items() >= args[ONE_TIER].items() for one in args.values())
        ratios = {name: EssConfig.from_env(one._env).hot_ratio for name, one in engines.items()}
        assert ratios[HEADLINE] == ratios[HALVED] == 0.1
        assert not EssConfig.from_env(engines[ONE_TIER]._env).enabled

    def test_there_is_room_for_each_question(self):
        for document in ASKED:
            prompts = recall.tokens_of(document)[1]
            for question, prompt in zip(document.questions, prompts, strict=True):
                assert len(question.answer) <= recall.ANSWER
                assert len(prompt) + recall.ANSWER < LENGTH

    def test_documents_are_seeded_and_compared_with_one_tier(self):
        assert recall.document_of(0, LENGTH, 1, 1, 0.8) == ASKED[1]
        for grid in QUICK, FULL:
            assert grid.systems[0] == ONE_TIER and HEADLINE in grid.systems


class TestChanges:
    TOPK = [[101, 103, 105], [106, 107, -1]]

    @pytest.fixture
    def wake(self, monkeypatch):
        """Wakes a change. The indexer is a stand-in: the real one needs SGLang."""
        indexer = SimpleNamespace(topk_select=topk_select_reference)
        monkeypatch.setattr(sglang_ess.cpu, "indexer", indexer, raising=False)
        for name in ("plan", "install", "refill", "invalidate"):
            monkeypatch.setattr(HotCache, name, getattr(HotCache, name))
        awake = [NONE]
        recall_changes.install(lambda: awake[0])
        return lambda name: awake.__setitem__(0, name)

    def select(self):
        """3 of 6 positions, and of 2; their slots are 100 and more."""
        scores = torch.tensor([[0.0, 9, 1, 8, 2, 7], [4.0, 5, 0, 0, 0, 0]])
        lengths, rows = torch.tensor([6, 2], dtype=torch.int32), torch.tensor([0, 1])
        table = torch.arange(12, dtype=torch.int32).view(2, 6) + 100
        return sglang_ess.cpu.indexer.topk_select(scores, lengths, rows, table, 3).tolist()

    def read(self, cache):
        """The slots whose rows a query reads."""
        plan = cache.plan(torch.tensor(self.TOPK, dtype=torch.int32))
        cache.fetch(plan)
        return torch.where(plan.rows >= 0, cache.rows[plan.rows.long(), 0], -1).tolist()

    def test_last_k(self, wake):
        assert self.select() == self.TOPK
        wake(LAST_K)
        assert self.select() == [[103, 104, 105], [106, 107, -1]]

    def test_a_wrong_row(self, wake):
        """One row a query, of the best slot or of one that is drawn, is its neighbour's."""
        cache = HotCache(torch.arange(200)[:, None].repeat(1, 2), 20)
        assert self.read(cache) == self.TOPK
        wake(WRONG_BEST)
        self.select()
        assert self.read(cache) == [[103, 103, 105], [106, 106, -1]]
        wake(WRONG_RANDOM)
        for found, wanted in zip(self.read(cache), self.TOPK, strict=True):
            (place,) = (i for i in range(3) if found[i] != wanted[i])
            assert found[place] in wanted

    def test_a_stale_row(self, wake):
        host, slot = torch.zeros(20, 2, dtype=torch.int64), torch.tensor([[7]], dtype=torch.int32)
        cache = HotCache(host, 10)
        for name, expected in ((NONE, 1), (STALE, 1), (NONE, 3)):
            wake(name)
            host += 1
            cache.invalidate(slot[0].long())
            plan = cache.plan(slot)
            cache.fetch(plan)
            assert int(cache.rows[int(plan.rows), 0]) == expected


def synthetic_report() -> Report:
    report = Report()
    for system in SYSTEMS:
        for length in FULL.lengths:
            rows = rows_of(system, wrong=KINDS if system == LAST_K else ())
            report.add(*[row | {"config": row["config"] | {"length": length}} for row in rows])
    for count, change in enumerate(recall.FAULT_FIGURES.values()):
        answers = [answered(document) for document in ASKED]
        wrong = [answered(ASKED[0], KINDS[:count]), answers[1]]
        report.add(*recall.fault_rows(change, ASKED, wrong, answers, 6))
    return report


class TestReport:
    def test_summary(self):
        report = synthetic_report()
        recall.summarise(report)
        found = report.summary
        assert IN_QUICK < found.keys()
        assert found["recall_16k"] == 1 and found["recall_last_k"] == 0.5
        assert found["same_answers"] == 1 and found["accept_length"] == 2.5
        assert [found[key] for key in recall.FAULT_FIGURES] == [0, 1, 2, 3]
        assert found["fault_questions"] == 6

    def test_what_was_not_measured_is_left_out(self):
        report = Report()
        report.add(failed("needle", {}, "all", "", "no answer in 600 s"))
        recall.summarise(report)
        assert report.summary == {}

    def test_tables_and_plot(self, tmp_path, capsys):
        report = synthetic_report()
        recall.print_tables(report)
        args = parser_with_threads("x").parse_args(["--plot", str(tmp_path / "plot.png")])
        finish(report, args, *recall.panels(report))
        assert "16k" in capsys.readouterr().out
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_driver_does_not_import_torch():
    code = "import sys, benchmarks.serving.recall; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_quick_run(tmp_path):
    json_path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.serving.recall", "--quick"]
    command += ["--json", str(json_path), "--plot", str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(json_path.read_text())["summary"]
    assert summary.keys() == IN_QUICK
    assert summary["same_answers"] == 1 and summary["faults_none"] == 0
    assert summary["faults_wrong_row"] >= 1 and summary["faults_stale_row"] >= 1
