"""The process that compiles a kernel computes what a process that loads it from the cache does.

Servers differ in this: on a machine's first start one of them compiles what the next one loads,
and "bit for bit" must hold between the two.
"""

import numpy as np
import pytest

from sglang_ess.launch import startup
from tests.support.launching import DSA

DENSE = {"architectures": ["LlamaForCausalLM"]}


def test_compiled_equals_loaded_bit_for_bit(kernel_runs):
    """Without forceinline in cpu/ops/_numba.py two of three results differ."""
    compiled, loaded = (dict(np.load(file)) for file in kernel_runs())
    assert compiled.pop("compiled") == 3 and loaded.pop("compiled") == 0
    assert len(compiled) == 68
    different = [name for name in compiled if not np.array_equal(compiled[name], loaded[name])]
    assert different == []


@pytest.mark.parametrize(
    ("model", "flags", "times"),
    [(DSA, [], 1), (DSA, ["--disable-ess"], 1), (DENSE, ["--disable-ess"], 0)],
)
def test_the_launcher_prepares_the_kernels_a_model_needs(launch, monkeypatch, model, flags, times):
    prepared = []
    monkeypatch.setattr(startup, "_prepare_kernels", lambda: prepared.append(1))
    server_args, refusals = launch(*flags, model=model)
    assert refusals == [] and server_args.model_path
    assert len(prepared) == times
