"""CUDA C++ operations over the fake CUDA libraries: compiled, loaded, launched, captured."""

import json
import os
import subprocess
import sys

import pytest

from tools.fake_cuda import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.missing()), reason=f"needs {build.missing()}"),
]

STEP = """
import torch
from ess_kernels import hot_state, plan_fetch

states = hot_state.HotState.new(2, 3000, 700, "cuda", layers=3)
state = states.group(0)
host = torch.zeros(3000, 656, dtype=torch.uint8).pin_memory()
hot = torch.zeros(700, 656, dtype=torch.uint8, device="cuda")
topk = torch.zeros(5, 100, dtype=torch.int32, device="cuda")
new = torch.zeros(5, dtype=torch.int64, device="cuda")
buffers = plan_fetch.PlanBuffers.new(5, 100, "cuda")

def step():
    plan_fetch.install(states, new, reserve=True)
    plan_fetch.plan_fetch(state, topk, buffers, host, hot, lists=True)
    listed = buffers.miss_slots, buffers.miss_rows, buffers.num_misses
    plan_fetch.fetch(host, hot, *listed, state.times, layer=1)

step()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step()
graph.replay()
torch.cuda.synchronize()
"""

TOO_MANY = """
import ctypes, os

class Size(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]

runtime = ctypes.CDLL(os.path.join(os.environ["FAKE_CUDA_LIB"], "libcudart.so.13"))
launch = runtime.cudaLaunchCooperativeKernel
launch.argtypes = [ctypes.c_void_p, Size, Size, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
for blocks, shared in ((528, 0), (529, 0), (529, 60000)):
    print(launch(None, Size(blocks, 1, 1), Size(512, 1, 1), None, shared, None))
"""


@pytest.fixture
def run(request, tmp_path):
    """run(code) -> (what it printed, the fake libraries' reports)."""
    kept, log = request.config.cache.mkdir("fake_cuda"), tmp_path / "log"
    log.touch()
    environment = os.environ | build.environment(kept, log)
    environment["TVM_FFI_CACHE_DIR"] = str(kept / "tvm")

    def run(code):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read_text().splitlines()

    return run


def test_a_step_of_plan_fetch_is_captured(run):
    _, reports = run(STEP)
    (graph,) = [json.loads(line.split("GRAPH: ")[1]) for line in reports if "GRAPH" in line]
    kernels = {name: count for name, count in graph["kernels"].items() if "3ess" in name}
    assert sum(kernels.values()) == 3 and len(graph["kernels"]) == 3
    for part in ("14install_kernel", "17plan_fetch_kernel", "12fetch_kernel"):
        assert sum(part in name for name in kernels) == 1
    assert not [line for line in reports if "ERROR" in line]


def test_a_cooperative_launch_must_fit_on_the_device(run):
    printed, reports = run(TOO_MANY)
    too_large = 720  # cudaErrorCooperativeLaunchTooLarge
    assert printed.split() == ["0", str(too_large), str(too_large)]
    assert "529 blocks, at most 528" in "".join(reports)
