"""Pieces the numba kernels share: the decorator and the row decoders.

A format's bits become float32 by shifting them into place and multiplying once, which
LLVM turns into vector code; a 256-entry table would be a gather per byte.
"""

import numba
import numpy as np

# Cached beside the sources (or in numba's user cache), so only a machine's first start
# compiles. fastmath without nnan/ninf: -inf marks masked scores and must survive.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
jit = numba.njit(cache=True, fastmath=FASTMATH, nogil=True)
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
