"""Kernel tests run on the CUDA device where there is one, else by Triton's interpreter."""

import pytest
import torch

from tests.support.interpreter import new_memory_is_garbage


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def garbage():
    """What a kernel reads it or another one must have written."""
    new_memory_is_garbage()
    yield
    new_memory_is_garbage(False)
