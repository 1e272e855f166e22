// How a kernel is started and what its blocks share. A host build replaces this file: it defines
// ESS_HOST_SHIM and provides the same names (tests/support/cuda_host/cuda_shim.h).
#pragma once

#ifdef ESS_HOST_SHIM
#include "cuda_shim.h"
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace ess {

// One T of the block's shared memory, uninitialised.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ T storage;
  return storage;
}

// Barrier of all blocks of a cooperative launch; orders their global memory accesses.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int threads, bool cooperative,
                   void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Blocks of this kernel that the current device holds at once; 0 if it holds none.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads) {
  int device = 0, processors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  return blocks * processors;
}

}  // namespace ess

#endif
