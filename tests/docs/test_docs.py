"""The documentation is true: links, paths, flags, modules, hooks and generated tables."""

import importlib.util
import re

import pytest

from ess_patches import all_hooks
from sglang_ess.config import EssConfig
from tests.docs import pages
from tests.docs.pages import PAGES, REPO
from tools import generate_docs

ROOTS = ("python/sglang_ess", "kernels", "patches", "")
# Names in backticks that look like paths and are none of the repository's.
FOLDERS = "python|kernels|patches|tests|benchmarks|tools|docs|results|examples|scripts|deploy"
ROOMS = "tiers|mem_cache|attention|admission|disagg|cpu|platforms|launch|intake|trace|sim|testing"
every_page = pytest.mark.parametrize("page", PAGES, ids=pages.name)


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its package
        return False


@every_page
def test_links_and_anchors_resolve(page):
    broken = []
    for link in pages.links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in pages.anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_names_every_page():
    docs = REPO / "docs"
    named = {link for link in pages.links(docs / "index.md") if "/" not in link}
    assert named == {page.name for page in docs.glob("*.md")} - {"index.md"}


@every_page
def test_paths_exist(page):
    """Paths in backticks: from the repository's root, or of a room of sglang_ess."""
    paths = re.findall(
        rf"`((?:{FOLDERS}|{ROOMS}|sglang_ess|ess_kernels)/[\w./-]*)`", page.read_text()
    )
    roots = [REPO / root for root in ROOTS] + [REPO / "python"]
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


@every_page
def test_modules_and_scripts_exist(page):
    text = page.read_text()
    modules = set(
        re.findall(
            r"\bpython -m ((?:sglang_ess|ess_\w+|benchmarks|tools|tests|deploy)[\w.]*)", text
        )
    )
    scripts = set(re.findall(r"\b(?:scripts|tools|deploy)/\w+\.(?:sh|py)", text))
    missing = [name for name in modules if not is_module(name.rstrip("."))]
    missing += [name for name in scripts if not (REPO / name).is_file()]
    assert missing == []


@every_page
def test_flags_are_ours(page):
    """--ess-... in prose and commands; those of SGLang are parsed with the commands."""
    named = set(re.findall(r"--(?:ess-[\w-]+|disable-ess)", page.read_text()))
    assert named - set(EssConfig.flags()) == set()


@every_page
def test_console_commands_exist(page):
    from sglang_ess.launch.commands import COMMANDS

    named = set(re.findall(r"`sglang-ess (\w+)", page.read_text()))
    assert named - set(COMMANDS) == set()


def test_all_flags_are_in_the_table():
    text = pages.section(REPO / "docs" / "configuration.md", "All flags")
    assert [cell.split()[0] for cell in pages.first_cells(text)] == list(EssConfig.flags())


def test_all_hooks_are_in_the_table():
    text = pages.section(REPO / "docs" / "integration.md", "Hooks")
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \| ", text, re.M)
    hooks = [hook for hook in all_hooks() if hook.is_registered]
    touched = [hook for hook in all_hooks() if not hook.is_registered]
    wanted = []
    for group in (hooks, touched):
        kinds = {}
        for hook in group:
            kinds.setdefault(hook.target, hook.kind)
        wanted += [(t.removeprefix("sglang.srt."), kind) for t, kind in sorted(kinds.items())]
    assert rows == wanted
    for name, kind in rows[: len({hook.target for hook in hooks})]:
        assert {hook.kind for hook in hooks if hook.target.endswith(name)} == {kind}


def test_all_series_are_in_the_table():
    from prometheus_client import CollectorRegistry

    from sglang_ess.mem_cache.linker_metrics import StoreMetrics
    from sglang_ess.metrics import Exporter

    registry = CollectorRegistry()
    Exporter({"model_name": "m"}, [0], registry)
    StoreMetrics(None, {"model_name": "m"}, registry)
    made = {family.name for family in registry.collect()}
    page = REPO / "docs" / "metrics.md"
    cells = pages.first_cells(pages.section(page, "Prometheus"))
    assert {cell.removesuffix("_total") for cell in cells} == made
    named = set(re.findall(r"sglang:(ess_\w+)", page.read_text()))
    assert {name.removesuffix("_total") for name in named} == {n.partition(":")[2] for n in made}


@every_page
def test_generated_tables_are_fresh(page):
    text = page.read_text()
    assert generate_docs.generated(text) == text, "run python -m tools.generate_docs"


def test_a_stale_table_is_noticed():
    page = "<!-- generated: flags -->\n| old |\n<!-- end -->\n"
    assert "--ess-hot-ratio" in generate_docs.generated(page)


def test_every_result_is_shown():
    shown = re.findall(r"^### (\w+)$", (REPO / "docs" / "results.md").read_text(), re.M)
    assert shown == sorted(file.stem for file in (REPO / "results").glob("*.json"))


@every_page
def test_blocks_say_what_they_need(page):
    for block in pages.blocks(page):
        assert block.needs <= pages.NEEDS


def test_the_functions_of_a_walk_exist():
    """`file.py::function` of docs/structure.md: of a function or method in that file."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (REPO / "docs" / "structure.md").read_text())
    sources = REPO / "python" / "sglang_ess"
    assert len(named) > 20
    assert [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^ *def {name}\(", (sources / file).read_text(), re.M)
    ] == []


def test_every_room_is_named():
    from tools.structure import ORDER

    text = pages.section(REPO / "docs" / "structure.md", "Rooms, top to bottom")
    rooms = {room.split(".")[0] for room in ORDER} - {"sglang_ess"}
    named = {re.sub(r"/|\.py$", "", cell) for cell in pages.first_cells(text)}
    assert rooms <= named


def test_a_result_file_becomes_a_table(tmp_path, monkeypatch):
    from benchmarks import harness

    report = harness.Report()
    for system, tokens in (("one-tier", 114.0), ("ess", 271.25)):
        config = {"system": system, "prompt": 4096}
        report.add(harness.measured("buys", config, "decode", "tokens/s", [tokens]))
        report.add(harness.measured("buys", config, "together", "requests", [4]))
    report.summarise("decode_ratio", 271.25 / 114)
    report.write(tmp_path / "results" / "two_tier.json", seed=0)
    monkeypatch.setattr(generate_docs, "REPO", tmp_path)
    text = generate_docs.results("two_tier")
    assert "| `decode_ratio` | 2.379 |" in text and "rows: measured" in text
    assert "| system | decode, tokens/s | together, requests |" in text
    assert "| ess | 271.2 | 4 |" in text and "prompt" not in text
