// The driver API, as Triton, tvm-ffi and torch's lazy binding ask for it.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "runtime.h"

// The numbers agree wherever somebody looks at them.
static CUresult as_driver(cudaError_t e) { return (CUresult)e; }
NOTHING_CU(cuInit, unsigned)

API CUresult cuDriverGetVersion(int* v) {
  *v = CUDA_VERSION_ANSWERED;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int* n) {
  *n = 1;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* d, int) {
  *d = 0;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char* s, int n, CUdevice) {
  snprintf(s, n, DEVICE_NAME);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  *v = attribute(a);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem(size_t* n, CUdevice) {
  *n = TOTAL;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid(CUuuid* u, CUdevice) {
  for (int i = 0; i < 16; i++) u->bytes[i] = i + 1;
  return CUDA_SUCCESS;
}

static int the_context;

API CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (CUcontext)&the_context;
  return CUDA_SUCCESS;
}
NOTHING_CU(cuCtxSetCurrent, CUcontext)
NOTHING_CU(cuCtxPushCurrent, CUcontext)

API CUresult cuCtxPopCurrent(CUcontext* c) {
  if (c) *c = (CUcontext)&the_context;
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* d) {
  *d = 0;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize(void) {
  Lock l(big);
  return as_driver(sync_all("cuCtxSynchronize"));
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
  *c = (CUcontext)&the_context;
  return CUDA_SUCCESS;
}
NOTHING_CU(cuDevicePrimaryCtxRelease, CUdevice)

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return CUDA_SUCCESS;
}
NOTHING_CU(cuCtxSetLimit, CUlimit, size_t)

API CUresult cuCtxGetLimit(size_t* n, CUlimit) {
  *n = 1024;
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult e, const char** s) {
  *s = cudaGetErrorName((cudaError_t)e);
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = cudaGetErrorName((cudaError_t)e);
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule* m, const void*) {
  *m = (CUmodule) new int;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) {
  *m = (CUmodule) new int;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoad(CUmodule* m, const char*) {
  *m = (CUmodule) new int;
  return CUDA_SUCCESS;
}
NOTHING_CU(cuModuleUnload, CUmodule)

API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
  *f = (CUfunction)named(name);
  return CUDA_SUCCESS;
}

API CUresult cuModuleGetGlobal(CUdeviceptr* p, size_t* n, CUmodule, const char*) {
  static void* space = take(1 << 20);
  *p = (CUdeviceptr)space;
  if (n) *n = 1 << 20;
  return CUDA_SUCCESS;
}

API CUresult cuLibraryLoadData(CUlibrary* lib, const void*, CUjit_option*, void**, unsigned,
                               CUlibraryOption*, void**, unsigned) {
  *lib = (CUlibrary) new int;
  return CUDA_SUCCESS;
}

API CUresult cuLibraryLoadFromFile(CUlibrary* lib, const char*, CUjit_option*, void**, unsigned,
                                   CUlibraryOption*, void**, unsigned) {
  *lib = (CUlibrary) new int;
  return CUDA_SUCCESS;
}
NOTHING_CU(cuLibraryUnload, CUlibrary)

API CUresult cuLibraryGetKernel(CUkernel* k, CUlibrary, const char* name) {
  *k = (CUkernel)named(name);
  return CUDA_SUCCESS;
}

API CUresult cuLibraryGetKernelCount(unsigned* n, CUlibrary) {
  *n = 1;
  return CUDA_SUCCESS;
}

API CUresult cuLibraryEnumerateKernels(CUkernel* k, unsigned n, CUlibrary) {
  for (unsigned i = 0; i < n; i++) k[i] = (CUkernel)named("library_kernel");
  return CUDA_SUCCESS;
}

API CUresult cuKernelGetFunction(CUfunction* f, CUkernel k) {
  *f = (CUfunction)k;
  return CUDA_SUCCESS;
}

API CUresult cuKernelGetName(const char** s, CUkernel) {
  *s = "kernel";
  return CUDA_SUCCESS;
}
NOTHING_CU(cuKernelSetAttribute, CUfunction_attribute, int, CUkernel, CUdevice)

API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && v > MOST_SHARED) {
    say(true, "ERROR", "shared memory %d", v);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
       : a == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                    : 0;
  return CUDA_SUCCESS;
}
NOTHING_CU(cuFuncSetCacheConfig, CUfunction, CUfunc_cache)

API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                            unsigned by, unsigned bz, unsigned, CUstream s, void**, void**) {
  return as_driver(launch((void*)f, (cudaStream_t)s, {gx, gy, gz}, {bx, by, bz}));
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  return as_driver(launch((void*)f, (cudaStream_t)c->hStream,
                          {c->gridDimX, c->gridDimY, c->gridDimZ},
                          {c->blockDimX, c->blockDimY, c->blockDimZ}));
}

API CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz,
                                       unsigned bx, unsigned by, unsigned bz, unsigned, CUstream s,
                                       void**) {
  return as_driver(launch((void*)f, (cudaStream_t)s, {gx, gy, gz}, {bx, by, bz}));
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int block,
                                                         size_t shm) {
  *n = resident(block, shm);
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, CUfunction, int block,
                                                                  size_t shm, unsigned) {
  *n = resident(block, shm);
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 66;
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void* out, CUpointer_attribute a, CUdeviceptr p) {
  Lock l(big);
  bool dev = in_blocks(device_blocks, (void*)p), host = in_blocks(host_blocks, (void*)p);
  if (!dev && !host) return CUDA_ERROR_INVALID_VALUE;
  switch (a) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      *(CUdeviceptr*)out = p;
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)out = dev ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *(int*)out = 0;
      break;
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *(CUcontext*)out = (CUcontext)&the_context;
      break;
    default:
      *(int*)out = 0;
  }
  return CUDA_SUCCESS;
}

API CUresult cuTensorMapEncodeTiled(CUtensorMap* m, CUtensorMapDataType, cuuint32_t rank, void* p,
                                    const cuuint64_t* dim, const cuuint64_t* stride,
                                    const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill) {
  memset(m, 0, sizeof *m);
  bool ok = rank >= 1 && rank <= 5 && (size_t)p % 16 == 0;
  for (unsigned i = 0; ok && i < rank; i++)
    ok = dim[i] > 0 && box[i] > 0 && box[i] <= 256 && (i + 1 == rank || stride[i] % 16 == 0);
  if (!ok)
    say(true, "ERROR", "tensor map: rank %u, dim0 %llu, stride0 %llu, box0 %u", rank,
        (unsigned long long)dim[0], (unsigned long long)(rank > 1 ? stride[0] : 0), box[0]);
  return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* n, CUdeviceptr p) {
  Lock l(big);
  auto it = device_blocks.upper_bound((char*)p);
  if (it == device_blocks.begin()) return CUDA_ERROR_NOT_FOUND;
  --it;
  if (base) *base = (CUdeviceptr)it->first;
  if (n) *n = it->second;
  return CUDA_SUCCESS;
}

API CUresult cuMemGetInfo(size_t* f, size_t* t) { return as_driver(cudaMemGetInfo(f, t)); }

API CUresult cuMemAlloc(CUdeviceptr* p, size_t n) { return as_driver(cudaMalloc((void**)p, n)); }

API CUresult cuMemFree(CUdeviceptr p) { return as_driver(cudaFree((void*)p)); }

API CUresult cuMemcpyHtoDAsync(CUdeviceptr d, const void* s, size_t n, CUstream st) {
  return as_driver(copy((void*)d, s, n, (cudaStream_t)st, "cuMemcpyHtoDAsync"));
}

API CUresult cuMemcpyDtoHAsync(void* d, CUdeviceptr s, size_t n, CUstream st) {
  return as_driver(copy(d, (void*)s, n, (cudaStream_t)st, "cuMemcpyDtoHAsync"));
}

API CUresult cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream st) {
  return as_driver(copy((void*)d, (void*)s, n, (cudaStream_t)st, "cuMemcpyAsync"));
}

API CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
  Lock l(big);
  if (auto e = enqueue((cudaStream_t)s, "memsetD32")) return as_driver(e);
  if (!as_stream((cudaStream_t)s)->capture)
    for (size_t i = 0; i < n; i++) ((unsigned*)p)[i] = v;
  return CUDA_SUCCESS;
}

API CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) {
  return as_driver(cudaMemsetAsync((void*)p, v, n, (cudaStream_t)s));
}

API CUresult cuStreamCreate(CUstream* s, unsigned f) {
  return as_driver(cudaStreamCreateWithFlags((cudaStream_t*)s, f));
}

API CUresult cuStreamDestroy(CUstream s) { return as_driver(cudaStreamDestroy((cudaStream_t)s)); }

API CUresult cuStreamSynchronize(CUstream s) {
  return as_driver(cudaStreamSynchronize((cudaStream_t)s));
}

API CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* st) {
  return as_driver(cudaStreamIsCapturing((cudaStream_t)s, (cudaStreamCaptureStatus*)st));
}

API CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned f) {
  return as_driver(cudaStreamWaitEvent((cudaStream_t)s, (cudaEvent_t)e, f));
}

API CUresult cuStreamGetCtx(CUstream, CUcontext* c) {
  *c = (CUcontext)&the_context;
  return CUDA_SUCCESS;
}

API CUresult cuEventCreate(CUevent* e, unsigned f) {
  return as_driver(cudaEventCreateWithFlags((cudaEvent_t*)e, f));
}

API CUresult cuEventRecord(CUevent e, CUstream s) {
  return as_driver(cudaEventRecord((cudaEvent_t)e, (cudaStream_t)s));
}

API CUresult cuEventDestroy(CUevent e) { return as_driver(cudaEventDestroy((cudaEvent_t)e)); }

static void* entry(const char* name) {
  static void* self = [] {
    Dl_info i;
    dladdr((void*)&cuInit, &i);
    return dlopen(i.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  for (const char* suffix : {"_v3", "_v2", ""})
    if (void* f = dlsym(self, (std::string(name) + suffix).c_str())) return f;
  say(false, "MISSING", "entry point %s", name);
  return nullptr;
}

API CUresult cuGetProcAddress(const char* name, void** f, int, cuuint64_t,
                              CUdriverProcAddressQueryResult* r) {
  *f = entry(name);
  if (r) *r = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
  *f = entry(name);
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long g,
                                        cudaDriverEntryPointQueryResult* r) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, g, r);
}
