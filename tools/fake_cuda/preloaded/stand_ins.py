"""Replacements for what cannot be real while kernels do nothing, each with its reason."""

import ctypes
import enum
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from types import ModuleType

# Optional for SGLang. They link CUDA's runtime into themselves, where nothing can replace it.
ABSENT = ("flashinfer", "cutlass")
SAMPLER = "sglang.srt.layers.sampler"
VERIFIER = "sglang.srt.speculative.eagle_utils"


class CaptureStatus(enum.IntEnum):
    """cudaStreamCaptureStatus, by the names of cuda.bindings."""

    cudaStreamCaptureStatusNone = 0
    cudaStreamCaptureStatusActive = 1
    cudaStreamCaptureStatusInvalidated = 2


class Status(enum.IntEnum):
    """cudaError_t: what the caller compares with."""

    cudaSuccess = 0


def capture_info(stream):
    """cuda.bindings.runtime.cudaStreamGetCaptureInfo -> (status of the call, state, id)"""
    state = ctypes.c_int()
    runtime = ctypes.CDLL("libcudart.so.13")
    code = runtime.cudaStreamIsCapturing(ctypes.c_void_p(int(stream)), ctypes.byref(state))
    return (Status.cudaSuccess if code == 0 else code), CaptureStatus(state.value), 0


def _bindings() -> ModuleType:
    """Stand in for cuda.bindings.runtime, which brings a runtime of its own."""
    module = ModuleType("cuda.bindings.runtime")
    module.cudaStreamCaptureStatus = CaptureStatus
    module.cudaError_t = Status
    module.cudaStreamGetCaptureInfo = capture_info
    return module


def samples_zeros(module: ModuleType) -> None:
    """Sample zeros: memory that no kernel wrote holds no valid token."""
    forward = module.Sampler.forward

    def forward_to_zeros(*args, **kwargs):
        ids = forward(*args, **kwargs)
        ctypes.memset(ids.data_ptr(), 0, ids.nbytes)  # zero_() is a kernel
        return ids

    module.Sampler.forward = forward_to_zeros


def accepts_in_turns(module: ModuleType) -> None:
    """Accept zeros: each verification of drafts one more a request than the one before, or one."""
    sample, accepted = module.eagle_sample, 0

    def sample_zeros(verify_input, batch, *args, **kwargs):
        nonlocal accepted
        predict, lengths, indices = sample(verify_input, batch, *args, **kwargs)
        accepted = accepted % verify_input.draft_token_num + 1
        ctypes.memset(predict.data_ptr(), 0, predict.nbytes)
        values = accepted.to_bytes(lengths.element_size(), sys.byteorder) * lengths.numel()
        ctypes.memmove(lengths.data_ptr(), values, lengths.nbytes)
        return predict, lengths, indices

    module.eagle_sample = sample_zeros


class _Replacing:
    """Import finder that changes a module once it is executed."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]):
        self._name, self._change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self._change(module)

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Call this before anything of SGLang is imported."""
    sys.modules.update(dict.fromkeys(ABSENT))
    sys.modules["cuda.bindings.runtime"] = _bindings()
    changes = (SAMPLER, samples_zeros), (VERIFIER, accepts_in_turns)
    sys.meta_path[:0] = [_Replacing(*change) for change in changes]
