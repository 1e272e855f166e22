"""Every command of README.md and docs/ is run, or at least parsed by the parser that will read it.

A block whose comment says `needs:` is not run as it stands: a server's is parsed, and the session's
server stands for it; what takes minutes, the network or a GPU is checked word by word.
"""

import json
import re
import subprocess
from collections.abc import Callable

import pytest

from sglang_ess import launch_server
from sglang_ess.launch.commands import COMMANDS, SHORT_NAMES
from tests.docs import pages
from tests.docs.pages import REPO
from tests.support import forked
from tests.support.server import Server

ASKS = ("README.md", "docs/quickstart.md", "docs/recall_model.md")  # the recall model, by curl
SHELL = (*ASKS, "docs/simulator.md", "docs/disaggregation.md")
ALL = [(page, block) for page in SHELL for block in pages.blocks(REPO / page, "sh")]
COMMAND_LINES = sorted({tuple(words) for _, block in ALL for words in block.commands})
RUN = sorted({tuple(words) for _, block in ALL if not block.needs for words in block.commands})
SERVERS = [words for words in COMMAND_LINES if "--model-path" in words]
SERVE = (("sglang-ess", "serve"), ("python", "-m", "sglang_ess.launch_server"))


def module_of(words) -> tuple[str, list[str]]:
    """(module, arguments) of `sglang-ess NAME ...` or `python -m MODULE ...`."""
    if words[0] == "sglang-ess":
        return COMMANDS[words[1]][0], list(words[2:])
    assert words[:2] == ("python", "-m"), words
    return words[2], list(words[3:])


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Callable[[tuple[str, ...]], str]:
    """run(words) -> what it wrote, in a folder of its own, where relative paths are written."""
    folder = tmp_path_factory.mktemp("commands")

    def run(words: tuple[str, ...]) -> str:
        module, arguments = module_of(words)
        log = folder / "log"
        log.unlink(missing_ok=True)
        status = forked.run(module, *arguments, log=log, folder=folder)
        assert status == 0, log.read_text()[-2000:]
        return log.read_text()

    return run


def test_there_are_commands_of_each_kind():
    assert {words[1] for words in RUN if words[0] == "sglang-ess"} == {"doctor", "plan", "simulate"}
    assert len(SERVERS) >= 5 and any(words[0] == "curl" for words in RUN)


# sglang-ess doctor as it stands: tests/launch/test_wheel.py. It imports what a fork has patched.
@pytest.mark.parametrize(
    "words",
    [words for words in RUN if words[0] != "curl" and words != ("sglang-ess", "doctor")],
    ids=lambda words: " ".join(words[:5]),
)
def test_a_command_runs(ran, words):
    out = ran(words)
    if words[:2] == ("sglang-ess", "plan"):
        assert "simulated" in out and "--ess-hot-gib" in out
    elif words[:2] == ("sglang-ess", "simulate"):
        listed = {line.split()[0] for line in out.splitlines() if line.split()}
        assert {w[2] for w in COMMAND_LINES if w[:2] == words[:2]} - {"--list"} <= listed


def test_replay_reads_a_trace(ran):
    (words,) = [words for words in COMMAND_LINES if words[:2] == ("sglang-ess", "replay")]
    assert len(words) == 3
    assert "lookups" in ran((*words[:2], str(REPO / "tests" / "sim" / "golden.ess")))


@pytest.mark.parametrize("words", SERVERS, ids=" ".join)
def test_a_servers_flags_parse(words):
    """By ESS's parser and SGLang's, without its checks: they would ask for the GPUs."""
    from sglang.srt.server_args import ServerArgs

    module, arguments = module_of(words)
    assert module == "sglang_ess.launch_server"
    assert words[:2] == SERVE[0] or words[:3] == SERVE[1]
    config, rest = launch_server.split_args(arguments)
    parser = launch_server._OneLineParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(rest)
    assert args.model_path and config.enabled == ("--disable-ess" not in arguments)


def curl(server, page) -> tuple[dict, dict]:
    """(body of the page's request, what the server answers)"""
    (command,) = [b.text for b in pages.blocks(REPO / page, "sh") if b.text.startswith("curl")]
    path, body = re.fullmatch(
        r"curl http://[\w.:]+(/\S+) .*? -d '\n(.*)'\n", command, re.S
    ).groups()
    status, text = server.post(path, json.loads(body))
    assert status == 200, text
    return json.loads(body), json.loads(text)


def by_the_openai_client(server) -> None:
    """Run the program of docs/quickstart.md."""
    (program,) = [block.text for block in pages.blocks(REPO / "docs/quickstart.md", "python")]
    assert "http://127.0.0.1:30000" in program
    exec(program.replace("http://127.0.0.1:30000", server.url), {})


@pytest.mark.parametrize("page", ASKS)
def test_a_request_by_curl(server, page):
    asked, answer = curl(server, page)
    assert 0 < answer["usage"]["completion_tokens"] <= asked["max_tokens"]


def test_a_request_by_the_openai_client(server, capsys):
    by_the_openai_client(server)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_answers_are_right(tmp_path, capsys):
    """The requests of the pages, to the model that they name."""
    from sglang_ess.testing.recall.model import write_recall_model

    model = write_recall_model(tmp_path / "recall")
    with Server(model, log=tmp_path / "log") as server:
        server.wait_ready()
        for page in ASKS:
            asked, answer = curl(server, page)
            name = re.search(r"\nQ: What is the code of (\w+)\?", asked["prompt"])[1]
            (fact,) = re.findall(rf"The code of {name} is \d{{5}}\.", asked["prompt"])
            assert answer["choices"][0]["text"] == f" {fact}", page
        by_the_openai_client(server)
    assert capsys.readouterr().out == " The code of Gemil is 10539."


def test_the_block_has_the_rows_of_a_real_one():
    from sglang_ess.launch import startup

    (shown,) = [block.text for block in pages.blocks(REPO / "docs/quickstart.md", "text")]
    rows = startup._MODEL_ROWS + startup._ROW_ROWS + startup._TIER_ROWS[2]
    rows += startup._LIMIT_ROWS + (("URL", ""),)
    assert [line[4:19].strip() for line in shown.splitlines()[1:]] == [name for name, _ in rows]


def test_the_scripts_are_there_and_parse():
    scripts = {word for words in COMMAND_LINES for word in words if word.startswith("scripts/")}
    assert {"scripts/setup.sh", "scripts/demo.sh"} <= scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], cwd=REPO, check=True)


def test_every_command_is_of_a_known_kind():
    first = {words[0] for words in COMMAND_LINES}
    assert first - {"sglang-ess", "python", "pip", "curl", "source"} == {
        word for word in first if word.startswith("scripts/")
    }
    modules = {words[2] for words in COMMAND_LINES if words[:2] == ("python", "-m")}
    run = {"sglang_ess.launch_server", "sglang_ess.testing.train", "sglang_router.launch_router"}
    assert modules <= run | {*SHORT_NAMES}


def test_the_console_script_is_declared():
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["sglang-ess"] == "sglang_ess.launch.commands:main"
