"""Fixtures of the tests that run EssDsaBackend on CPU tensors."""

import pytest


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
