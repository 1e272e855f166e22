"""README.md keeps its form: its length, its parts in their order, one tagline."""

import re

from sglang_ess.config import EssConfig
from tests.docs import pages
from tests.docs.pages import REPO

README = REPO / "README.md"
PARTS = [
    "Status", "Install", "Quick start", "Results", "How it works", "Compatibility and limits",
    "The six flags that matter", "Documentation", "Contributing, citation, licence",
]  # fmt: skip
TAGLINE = "Serve more long-context requests per GPU: KV in host memory, a small hot cache in HBM."


def test_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


def test_the_parts_in_their_order():
    assert re.findall(r"^## (.*)", README.read_text(), re.M) == PARTS
    assert README.read_text().splitlines()[2] == TAGLINE


def test_six_rows_of_status_six_flags_and_eight_steps():
    assert len(re.findall(r"^\| (?!Feature|---)", pages.section(README, "Status"), re.M)) == 6
    flags = [cell.split()[0] for cell in pages.first_cells(pages.section(README, PARTS[6]))]
    assert len(flags) == 6 and set(flags) <= set(EssConfig.flags())
    assert re.findall(r"^(\d)\. ", pages.section(README, "How it works"), re.M) == [*"12345678"]


def test_measured_and_simulated_figures_are_apart():
    text = pages.section(README, "Results")
    measured, simulated = text.split("**Simulated**")
    assert measured.lstrip().startswith("**Measured**")
    assert measured.count("\n| ---") + measured.count("\n|---") == 1
    assert simulated.count("\n|---") == 1 and "never measured" in simulated


def test_no_figure_of_a_gpu_is_claimed():
    assert "never ran on a device" in README.read_text()
    assert "never run" in pages.section(README, "Quick start")
