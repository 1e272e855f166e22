"""README.md is true: its paths, commands, flags, hooks and first requests."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from ess_patches import all_hooks
from sglang_ess.config import EssConfig
from sglang_ess.launch import startup

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def first_cells(title):
    """The code in the first column of a section's tables."""
    rows = re.findall(r"^\| (`.*?) \|", section(title), re.M)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("title", ["Repository", "Tests"])
def test_every_path_exists(title):
    paths = first_cells(title)
    assert len(paths) > 8
    assert [path for path in paths if not (REPO / path).exists()] == []
    assert [path for path in paths if path.endswith("/") != (REPO / path).is_dir()] == []


def test_every_test_file_is_listed():
    listed = first_cells("Tests")
    files = sorted(file.name for file in (REPO / "tests").glob("test_*.py"))
    assert [name for name in files if f"tests/{name}" not in listed] == []


def test_every_script_and_module_exists():
    scripts = re.findall(r"\bscripts/\w+\.\w+", README)
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert len(scripts) > 2 and len(modules) > 3
    assert [name for name in scripts if not (REPO / name).is_file()] == []
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_the_flags_are_all_there():
    assert [cell.split()[0] for cell in first_cells("Flags")] == list(EssConfig.flags())


def test_the_hooks_are_all_there():
    named = first_cells("How it attaches to SGLang")
    targets = {hook.target for hook in all_hooks() if hook.is_registered}
    assert sorted(targets) == sorted(next(t for t in targets if t.endswith(n)) for n in named)
    kinds = re.findall(r"^\| `(\S+)` \| (\w+) \|", section("How it attaches to SGLang"), re.M)
    assert len(kinds) == len(named)
    registered = [hook for hook in all_hooks() if hook.is_registered]
    for name, kind in kinds:
        assert {hook.kind for hook in registered if hook.target.endswith(name)} == {kind}


def test_the_block_has_the_rows_of_a_real_one():
    (shown,) = blocks("text")
    rows = startup._MODEL_ROWS + startup._ROW_ROWS + startup._TIER_ROWS[2]
    rows += startup._LIMIT_ROWS + (("URL", ""),)
    assert [line[4:19].strip() for line in shown.splitlines()[1:]] == [name for name, _ in rows]


def test_the_first_request_by_curl(server):
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    path, body = re.fullmatch(
        r"curl http://[\w.:]+(/\S+) .*? -d '\n(.*)'\n", command, re.S
    ).groups()
    status, text = server.post(path, json.loads(body))
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 16


def test_the_first_request_by_the_openai_client(server, capsys):
    (program,) = blocks("python")
    assert "http://127.0.0.1:30000" in program
    exec(program.replace("http://127.0.0.1:30000", server.url), {})
    assert capsys.readouterr().out
