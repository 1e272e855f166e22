"""What a captured step holds of PyTorch's memory: its real allocator over the fake CUDA libraries.

The allocator's figures are real, because its calls are: only kernels do nothing.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tools.fake_cuda import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.missing()), reason=f"needs {build.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here the real one is"),
]

LAYERS, BATCH, TOPK = 61, 256, 2048
# Argument: whether the transfer stream's uses are announced to PyTorch as outside of a capture.
STEP = f"""
import json, sys
import torch
from sglang_ess.tiers.transfer_stream import TransferStream, wait

transfer, announce = TransferStream("cuda"), sys.argv[1] == "announced"

def step():
    for _ in range({LAYERS}):
        topk = torch.empty({BATCH}, {TOPK}, dtype=torch.int32, device="cuda")
        with transfer.on_transfer_stream():
            point = transfer.event()
            if announce:
                topk.record_stream(torch.cuda.current_stream())
            else:
                transfer.record_stream(topk)
        wait(point)
    transfer.join()

step()
torch.cuda.synchronize()
torch.cuda.empty_cache()
before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    step()
print(json.dumps(torch.cuda.memory_reserved() - before))
"""


@pytest.fixture(scope="module")
def reserved(request, tmp_path_factory):
    """reserved(how): bytes that the capture of a step took."""
    log = tmp_path_factory.mktemp("fake_cuda_memory") / "cuda.log"
    env = os.environ | build.environment(request.config.cache.mkdir("fake_cuda"), log)

    def run(how):
        command = [sys.executable, "-c", STEP, how]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        kinds = set(re.findall(r"^\d+ ([A-Z]+):", log.read_text(), re.M))
        assert kinds <= {"GRAPH", "MISSING", "STUB"}, log.read_text()
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_captured_steps_lists_share_memory(reserved):
    one = BATCH * TOPK * 4
    assert reserved("kept") <= 4 * one + (20 << 20)  # PyTorch's block for requests of 1 to 10 MB
    assert reserved("announced") >= LAYERS * one, "so this test would see it"
