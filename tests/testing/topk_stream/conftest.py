"""A small table, an environment that asks for it, and log lines as they were before a test."""

import logging

import pytest

from sglang_ess.config import ENV_VAR, EssConfig
from sglang_ess.sim.model.locality import Locality
from sglang_ess.testing.topk_stream import playback
from sglang_ess.testing.topk_stream.table import StreamTable, generate, scaled
from tests.testing.topk_stream import CONTEXTS, PROFILE, STEPS, TOPK


@pytest.fixture(scope="module")
def small() -> StreamTable:
    return generate(scaled(Locality.load(PROFILE), TOPK), CONTEXTS, 3, streams=2, steps=STEPS)


@pytest.fixture
def asked(monkeypatch, tmp_path, small):
    """asked(text): this process has --ess-topk-stream text; the small table's file by default."""
    file = tmp_path / "small.npz"
    small.save(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    playback.playback.cache_clear()

    def put(text=str(file), **config):
        config = EssConfig(topk_stream=text, unsafe=bool(text), **config)
        monkeypatch.setenv(ENV_VAR, config.to_env()[ENV_VAR])
        return text

    yield put
    playback.playback.cache_clear()


@pytest.fixture(autouse=True)
def unmarked():
    """What marks log lines goes with the test."""
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)
