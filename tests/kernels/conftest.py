"""Kernel tests run on the CUDA device where there is one, else by Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
