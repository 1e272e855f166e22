"""scripts/demo.sh: what it asks, what it says of the answers; the whole of it, slowly."""

import dataclasses
import subprocess
import sys

import pytest

from scripts import demo, demo_report
from scripts.demo_report import Answer, Served
from sglang_ess.testing.recall.documents import KINDS
from tests.docs.pages import REPO


@pytest.fixture(scope="module")
def asked():
    return demo.questions()


def served(asked, *, wrong=(), **facts):
    """Right answers but for the numbers in `wrong`, whose code or passage is another."""
    answers = []
    for number, one in enumerate(asked):
        text = one.question.answer.rstrip("\n")
        if number in wrong:
            text = text.replace(one.question.value, "x" * len(one.question.value))
        answers.append(Answer(len(one.text), 64, tuple(text.encode()), text))
    facts = {"device_bytes": 2**20, "host_bytes": 0, "slots": 64, "hot_ratio": 0.1} | facts
    return Served(facts, answers, answers, 4, 2.0, {0: 100, 1: 100}, {0: 25, 1: 50})


def test_the_questions_fit_and_cover_the_documents(asked):
    assert [one.length for one in asked[:: len(demo.KINDS)]] == [*demo.LENGTHS]
    assert {one.question.kind for one in asked} == {*KINDS}
    for one in asked:
        assert abs(len(one.text) - one.length) < 150
        assert len(one.question.answer) <= demo.OUTPUT_TOKENS
        assert len(one.text) + demo.OUTPUT_TOKENS < demo.CONTEXT
    cells = demo_report.needles(asked, [True] * len(asked)).cells
    # Quotes are not quite as deep as asked, so a cell may stay empty.
    assert len(cells) >= len(set(demo.LENGTHS)) * demo_report.DEPTHS - 2
    assert sum(map(len, cells.values())) == len(asked)


def test_the_quick_start_counts_them_right(asked):
    text = " ".join((REPO / "docs" / "quickstart.md").read_text().split())
    low, high = (f"{length // 1024}K" for length in (min(demo.LENGTHS), max(demo.LENGTHS)))
    assert f"answers {len(asked)} questions about documents of {low} to {high} bytes" in text


def test_an_answer_is_right_by_its_value(asked):
    right = demo_report.rights(asked, served(asked, wrong={0, 5}).alone)
    assert [number for number, is_right in enumerate(right) if not is_right] == [0, 5]


def test_the_needle_table_shows_where_answers_are_wrong(asked):
    number = next(n for n, one in enumerate(asked) if one.length == 8192)
    part = int(asked[number].question.depth * demo_report.DEPTHS)
    found = demo_report.needles(
        asked, demo_report.rights(asked, served(asked, wrong={number}).alone)
    )
    row = demo_report.needle_table(found).splitlines()[-1].split()
    assert row[:2] == ["8192", "bytes"]
    right, of = map(int, row[2 + part].split("/"))
    assert right == of - 1 and found.rate(8192, part) == right / of
    others = [cell.split("/") for n, cell in enumerate(row[2:]) if n != part]
    assert all(a == b for a, b in others)


def test_a_report(asked, tmp_path, capsys):
    ess = served(asked, wrong={1})
    one_tier = dataclasses.replace(ess, lookups={}, misses={})
    assert demo_report.report({"one-tier": one_tier, "ESS": ess}, asked, tmp_path) == 0
    out = capsys.readouterr().out
    total = len(asked)
    (row,) = [line for line in out.splitlines() if line.startswith("right answers   ")]
    assert row.split()[2:] == [str(total - 1), "of", str(total)] * 2
    (row,) = [line for line in out.splitlines() if line.startswith("hit rate of the hot tier")]
    assert row.split()[-2:] == ["-", "62.5%"]
    assert "outputs identical: yes" in out and asked[-1].question.answer.strip() in out
    for name in ("needle.png", "hit_rate.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_outputs_that_differ_are_named(asked, tmp_path, capsys):
    results = {"one-tier": served(asked), "ESS": served(asked, wrong={2, 3})}
    assert demo_report.report(results, asked, tmp_path) == 1
    assert "outputs identical: no: requests 3, 4 differ" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo(tmp_path):
    """Answers are right, the same with one tier and two, and more requests run together."""
    log = tmp_path / "log"
    with log.open("w") as out:
        status = subprocess.run([sys.executable, "-m", "scripts.demo"], cwd=REPO, stdout=out)
    text = log.read_text()
    assert status.returncode == 0 and "outputs identical: yes" in text, text[-3000:]
    rows = {line[:34].strip(): line[34:].split() for line in text.splitlines()}
    right, of = int(rows["right answers"][0]), int(rows["right answers"][2])
    assert rows["right answers"][:3] == rows["right answers"][3:] and right >= 0.9 * of
    one_tier, ess = map(int, rows["requests running together, most"])
    assert ess > one_tier
