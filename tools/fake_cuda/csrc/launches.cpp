// Kernels: registered by name, their launch checked and enqueued, never run.
#include <string.h>

#include "runtime.h"

static std::unordered_map<const void*, std::string> kernel_names;

int resident(int block, size_t shm) {
  int a = 2048 / block, b = (int)(233472 / (shm + 1024));
  return a < b ? a : b;
}

static std::string kernel_name(const void* f) {
  auto it = kernel_names.find(f);
  return it == kernel_names.end() ? "?" : it->second;
}

cudaError_t launch(const void* f, cudaStream_t s, dim3 g, dim3 b) {
  Lock l(big);
  if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z || g.y > 65535 || g.z > 65535 ||
      b.x * b.y * b.z > 1024) {
    say(true, "ERROR", "launch configuration %s grid %u %u %u block %u %u %u",
        kernel_name(f).c_str(), g.x, g.y, g.z, b.x, b.y, b.z);
    return fail(cudaErrorInvalidConfiguration);
  }
  return enqueue(s, "kernel", kernel_name(f));
}

// All blocks of a cooperative launch must be on the device at once.
static cudaError_t launch_together(const void* f, cudaStream_t s, dim3 g, dim3 b, size_t shm) {
  const long blocks = (long)g.x * g.y * g.z, threads = (long)b.x * b.y * b.z;
  const int most = threads > 0 && threads <= 1024
                       ? resident((int)threads, shm) *
                             attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
                       : 0;
  if (most > 0 && blocks > most) {
    Lock l(big);
    say(true, "ERROR", "cooperative launch %s of %ld blocks, at most %d", kernel_name(f).c_str(),
        blocks, most);
    return fail(cudaErrorCooperativeLaunchTooLarge);
  }
  return launch(f, s, g, b);
}

API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t, cudaStream_t s) {
  return launch(f, s, g, b);
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void**, size_t, cudaStream_t s) {
  return launch((void*)f, s, g, b);
}

API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void**, size_t shm,
                                            cudaStream_t s) {
  return launch_together(f, s, g, b, shm);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == cudaLaunchAttributeCooperative && c->attrs[i].val.cooperative)
      return launch_together(f, c->stream, c->gridDim, c->blockDim, c->dynamicSmemBytes);
  return launch(f, c->stream, c->gridDim, c->blockDim);
}

API void** __cudaRegisterFatBinary(void*) {
  static void* h[1];
  return h;
}

API void __cudaRegisterFatBinaryEnd(void**) {}

API void __cudaUnregisterFatBinary(void**) {}

API char __cudaInitModule(void**) { return 1; }

API void __cudaRegisterFunction(void**, const char* f, char*, const char* name, int, void*, void*,
                                void*, void*, int*) {
  Lock l(big);
  kernel_names[f] = name;
}

API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}

static thread_local struct {
  dim3 g, b;
  size_t shm;
  cudaStream_t s;
} pushed;

API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shm, struct CUstream_st* s) {
  pushed = {g, b, shm, s};
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* shm, void* s) {
  *g = pushed.g;
  *b = pushed.b;
  *shm = pushed.shm;
  *(cudaStream_t*)s = pushed.s;
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute a, int v) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize && v > MOST_SHARED) {
    say(true, "ERROR", "shared memory %d", v);
    return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = MOST_SHARED;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*,
                                                                       int block, size_t shm,
                                                                       unsigned) {
  *n = resident(block, shm);
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int block,
                                                              size_t shm) {
  *n = resident(block, shm);
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t*) {
  *n = 66;
  return cudaSuccess;
}
NOTHING(cudaKernelSetAttributeForDevice, cudaKernel_t, cudaFuncAttribute, int, int)

API cudaError_t cudaLibraryLoadData(cudaLibrary_t* lib, const void*, cudaJitOption*, void**,
                                    unsigned, cudaLibraryOption*, void**, unsigned) {
  *lib = (cudaLibrary_t) new int;
  return cudaSuccess;
}
NOTHING(cudaLibraryUnload, cudaLibrary_t)

void* named(const char* name) {
  Lock l(big);
  void* k = new int;
  kernel_names[k] = name;
  return k;
}

API cudaError_t cudaLibraryGetKernel(cudaKernel_t* k, cudaLibrary_t, const char* name) {
  *k = (cudaKernel_t)named(name);
  return cudaSuccess;
}
