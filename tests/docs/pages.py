"""What a Markdown page holds, for the tests of the documentation."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGES = (
    sorted(REPO.glob("*.md"))
    + sorted((REPO / "docs").glob("*.md"))
    + sorted((REPO / ".github").glob("*.md"))
)
# What a block that no test runs as it stands may need, in its comment `<!-- needs: A, B -->`.
NEEDS = {"gpu", "network", "minutes", "setup", "server", "router", "trace"}


@dataclass(frozen=True)
class Block:
    """A fenced block. needs: of the comment in the line before it; commands of a shell block"""

    language: str
    text: str
    needs: frozenset[str]

    @property
    def commands(self) -> list[list[str]]:
        """Each command's words, comments left out, continued lines joined."""
        lines, command = [], ""
        for line in self.text.splitlines():
            command += line + "\n"
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(command.replace("\\\n", " "), comments=True)
            except ValueError:  # inside quotes
                continue
            command = ""
            if words:
                lines.append(words)
        assert not command, command
        return lines


def name(page: Path) -> str:
    """An identifier for pytest."""
    return str(page.relative_to(REPO))


def blocks(page: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    pattern = r"(?:^<!-- needs: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```"
    return [
        Block(kind, text, frozenset(filter(None, (needs or "").split(", "))))
        for needs, kind, text in re.findall(pattern, page.read_text(), re.M | re.S)
        if language in ("", kind)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```\n", "", page.read_text(), flags=re.M | re.S)


def section(page: Path, title: str) -> str:
    """The text below a heading of the second level."""
    text = page.read_text()
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def first_cells(text: str) -> list[str]:
    """The code in the first column of a text's tables."""
    rows = re.findall(r"^\| (`.*?) \| ", text, re.M)
    return [cell for row in rows for cell in re.findall(r"`([^`]+)`", row)]


def anchors(page: Path) -> set[str]:
    """What GitHub lets a link name behind `#`."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def links(page: Path) -> list[str]:
    """Targets of Markdown links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))
