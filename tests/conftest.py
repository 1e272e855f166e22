"""The one real server that tests/test_users.py and tests/test_startup.py share."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined: before any import of one
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sglang_ess.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.server import Server

SLOTS = 40_000  # SGLang's default is most of the machine's memory


@pytest.fixture(scope="session")
def tiny_v32(tmp_path_factory):
    """Directory of the default tiny DeepSeek-V3.2."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "v32", TinyModelConfig())


@pytest.fixture(scope="session")
def server(tiny_v32, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--max-total-tokens", str(SLOTS), "--enable-cache-report")
    with Server(tiny_v32, *flags, log=log) as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0, running.tail()
