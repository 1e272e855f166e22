"""Load the fake CUDA libraries, and replace what cannot run over them, in each Python process.

Python imports a module of this name at start, before torch can load the real libraries.
"""

import ctypes
import faulthandler
import os

import stand_ins

LIBRARIES = (
    "libcudart.so.13",  # first: the others only refer to it
    "libcuda.so.1",
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libnccl.so.2",
    "libnvidia-ml.so.1",
)

for name in LIBRARIES:
    ctypes.CDLL(os.path.join(os.environ["FAKE_CUDA_LIB"], name), mode=ctypes.RTLD_GLOBAL)
stand_ins.install()
# The runtime raises this signal where it reports something: the Python stack joins the log.
faulthandler.register(
    int(os.environ["FAKE_CUDA_SIGNAL"]), file=open(os.environ["FAKE_CUDA_LOG"], "a"),
    all_threads=False,
)  # fmt: skip
