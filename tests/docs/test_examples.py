"""The programs of examples/ do what their first lines say."""

import importlib
import re

from tests.docs.pages import REPO
from tests.support import forked


def test_each_example_is_tested():
    names = {file.stem for file in (REPO / "examples").glob("*.py")}
    assert names == {"openai_client", "frontend_language", "offline_engine"}


def test_openai_client(server, capsys):
    importlib.import_module("examples.openai_client").main(server.url)
    assert " prompt tokens, 32 written" in capsys.readouterr().out


def test_frontend_language(server, capsys, tmp_path):
    module, file = importlib.import_module("examples.frontend_language"), tmp_path / "document"
    file.write_text((REPO / "LICENSE").read_text()[:1000])  # a token is a byte: 8000 take a minute
    module.main(server.url, str(file))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("? ")[0] + "?" for line in lines] == [*module.QUESTIONS]


def test_offline_engine(tiny_v32, tmp_path):
    log = tmp_path / "log"
    status = forked.run("examples.offline_engine", str(tiny_v32), log=log)
    assert status == 0, log.read_text()[-2000:]
    # The model's weights are random. tests/docs/test_demo.py asks one whose answers are right.
    cached = re.findall(r"^\((?:right|wrong); (\d+) tokens", log.read_text(), re.M)
    assert cached[0] == "0" and len(cached) == 3 and all(int(one) > 1800 for one in cached[1:])
