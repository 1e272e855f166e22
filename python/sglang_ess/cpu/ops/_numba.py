"""Shared parts of the numba kernels: their decorators and the row decoders.

The bits of a format are shifted into place and multiplied once. LLVM turns that into vector code;
a table of 256 entries would need a gather per byte.
"""

import numba
import numpy as np
import torch
from numba.extending import overload

# Kernels are cached next to the sources, or in numba's user cache, so only the first start on a
# machine compiles them. fastmath without nnan and ninf: -inf marks masked scores and must survive.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
# For functions that kernels call. Numba compiles each one alone, and again inside every kernel,
# where LLVM may sum in another order. Without forceinline, the process that compiles would run
# the first version and a process that loads the kernel from the cache the second.
jit = numba.njit(cache=True, fastmath=FASTMATH, nogil=True, forceinline=True)
parallel_jit = numba.njit(cache=True, fastmath=FASTMATH, nogil=True, parallel=True)

# e4m3 bits placed in a float32's exponent and mantissa read 2**-120 too small: its bias
# is 127, e4m3's is 7. The product is exact, subnormals included.
E4M3_REBIAS = np.float32(2.0**120)
SIGN_BIT = np.uint32(0x80)
MAGNITUDE_BITS = np.uint32(0x7F)


@jit
def e4m3_to_float(source, scale, bits, out, start):
    """out[start:start+n] = e4m3(source) * scale.

    source [n] uint8; bits [m>=start+n] uint32 is the uint32 view of out [m] float32
    """
    for i in range(source.shape[0]):
        byte = np.uint32(source[i])
        bits[start + i] = ((byte & SIGN_BIT) << np.uint32(24)) | (
            (byte & MAGNITUDE_BITS) << np.uint32(20)
        )
    factor = scale * E4M3_REBIAS
    if np.isinf(factor):  # a scale above 2**8 would overflow the one product
        for i in range(source.shape[0]):
            out[start + i] = (out[start + i] * E4M3_REBIAS) * scale
    else:
        for i in range(source.shape[0]):
            out[start + i] *= factor


@jit
def bf16_to_float(source, bits, start):
    """bits[start:start+n] = source as the upper half of a float32; source [n] uint16."""
    for i in range(source.shape[0]):
        bits[start + i] = np.uint32(source[i]) << np.uint32(16)


def to_float(source, out, bits, start):
    """out[start:start+n] = source: bfloat16 as int16, or float32. source [n], any stride."""


@overload(to_float, inline="always")
def _to_float(source, out, bits, start):
    if source.dtype == numba.types.int16:

        def from_bf16(source, out, bits, start):
            for i in range(source.shape[0]):
                bits[start + i] = np.uint32(np.uint16(source[i])) << np.uint32(16)

        return from_bf16

    def from_float32(source, out, bits, start):
        for i in range(source.shape[0]):
            out[start + i] = source[i]

    return from_float32


def from_float(values, bits, factor, out):
    """out = values * factor in out's type, bfloat16 rounded to nearest even.

    values [n] float32, scaled in place; bits its uint32 view; out [n] int16 or float32
    """


@overload(from_float, inline="always")
def _from_float(values, bits, factor, out):
    if out.dtype == numba.types.int16:

        def to_bf16(values, bits, factor, out):
            for i in range(values.shape[0]):
                values[i] *= factor
            for i in range(values.shape[0]):
                rounded = bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))
                out[i] = np.int16(rounded >> np.uint32(16))

        return to_bf16

    def to_float32(values, bits, factor, out):
        for i in range(values.shape[0]):
            out[i] = values[i] * factor

    return to_float32


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory for to_float and from_float; TypeError for another dtype."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    if tensor.dtype != torch.float32:
        raise TypeError(f"the kernels take bfloat16 and float32: got {tensor.dtype}.")
    return tensor.numpy()
