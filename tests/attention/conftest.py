"""Fixtures of the tests that run EssDsaBackend on CPU tensors."""

import pytest

from tests.support.interpreter import new_memory_is_garbage


@pytest.fixture
def late(monkeypatch):
    """What is launched on the transfer stream runs when somebody waits for it."""
    from tests.support.device_tier import launches_are_late

    launches_are_late(monkeypatch.setattr)


@pytest.fixture
def build(monkeypatch):
    """small_backend.builder's build()."""
    from tests.support.small_backend import builder

    return builder(monkeypatch)


@pytest.fixture(autouse=True)
def garbage():
    """What a kernel reads it or another one must have written."""
    new_memory_is_garbage()
    yield
    new_memory_is_garbage(False)


@pytest.fixture
def flashinfer_module(monkeypatch):
    """FlashInfer's Python on a card that is not there; the value stands for its compiled module."""
    from tests.support.flashinfer_device import stand_in

    return stand_in(monkeypatch)
