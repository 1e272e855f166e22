"""Replacements for what cannot be real while kernels do nothing, each with its reason."""

import ctypes
import enum
import sys
from importlib.machinery import PathFinder
from types import ModuleType

# Optional for SGLang. They link CUDA's runtime into themselves, where nothing can replace it.
ABSENT = ("flashinfer", "cutlass")
SAMPLER = "sglang.srt.layers.sampler"


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


class _SamplesZeros:
    """Import finder that samples zeros: memory that no kernel wrote holds no valid token."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != SAMPLER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            forward = module.Sampler.forward

            def forward_to_zeros(*args, **kwargs):
                ids = forward(*args, **kwargs)
                ctypes.memset(ids.data_ptr(), 0, ids.nbytes)  # zero_() is a kernel
                return ids

            module.Sampler.forward = forward_to_zeros

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Call this before anything of SGLang is imported."""
    sys.modules.update(dict.fromkeys(ABSENT))
    sys.modules["cuda.bindings.runtime"] = _bindings()
    sys.meta_path.insert(0, _SamplesZeros)
