// NVML, NCCL and cuBLAS: what answers with more than success. The others: stubs.cpp.
#include <stdio.h>
#include <string.h>

#include "runtime.h"

API int nvmlDeviceGetCount_v2(unsigned* n) {
  *n = 1;
  return 0;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned, void** d) {
  *d = (void*)1;
  return 0;
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** d) {
  *d = (void*)1;
  return 0;
}

API int nvmlDeviceGetHandleByUUID(const char*, void** d) {
  *d = (void*)1;
  return 0;
}

API int nvmlDeviceGetName(void*, char* s, unsigned n) {
  snprintf(s, n, DEVICE_NAME);
  return 0;
}

API int nvmlDeviceGetUUID(void*, char* s, unsigned n) {
  snprintf(s, n, "GPU-01020304-0506-0708-090a-0b0c0d0e0f10");
  return 0;
}

API int nvmlDeviceGetMemoryInfo(void*, unsigned long long* m) {
  Lock l(big);
  m[0] = TOTAL;
  m[1] = TOTAL - device_used - RESERVED;
  m[2] = m[0] - m[1];
  return 0;
}

API int nvmlDeviceGetCudaComputeCapability(void*, int* a, int* b) {
  *a = 9;
  *b = 0;
  return 0;
}

API int nvmlSystemGetDriverVersion(char* s, unsigned n) {
  snprintf(s, n, "580.65.06");
  return 0;
}

API int nvmlSystemGetCudaDriverVersion_v2(int* v) {
  *v = CUDA_VERSION_ANSWERED;
  return 0;
}

API const char* nvmlErrorString(int) { return "fake"; }

API int ncclGetVersion(int* v) {
  *v = 22703;
  return 0;
}

API const char* ncclGetErrorString(int) { return "fake"; }

API const char* ncclGetLastError(void*) { return ""; }

static int make_handle(void** h) {
  *h = new char[4096]();
  return 0;
}

API int ncclCommInitRank(void** c, ...) { return make_handle(c); }

API int ncclCommInitRankConfig(void** c, ...) { return make_handle(c); }

API int ncclCommCount(void*, int* n) {
  *n = 1;
  return 0;
}

API int ncclCommUserRank(void*, int* n) {
  *n = 0;
  return 0;
}

API int ncclCommCuDevice(void*, int* n) {
  *n = 0;
  return 0;
}

API int ncclCommGetAsyncError(void*, int* e) {
  *e = 0;
  return 0;
}

API int cublasCreate_v2(void** h) { return make_handle(h); }

API int cublasLtCreate(void** h) { return make_handle(h); }

API int cublasGetPointerMode_v2(void*, int* m) {
  *m = 0;
  return 0;
}

API int cublasGetMathMode(void*, int* m) {
  *m = 0;
  return 0;
}

API int cublasGetVersion_v2(void*, int* v) {
  *v = 130100;
  return 0;
}

API size_t cublasLtGetVersion(void) { return 130100; }

API const char* cublasGetStatusString(int) { return "fake"; }

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int n,
                                       char* results, int* got) {
  memset(results, 0, 64 + 8 + 4 + 4 + 16);  // algo 64 B, workspaceSize, state (0: success), waves
  *got = n > 0;
  return 0;
}

static std::unordered_map<void*, cudaStream_t> blas_streams;

API int cublasSetStream_v2(void* h, cudaStream_t s) {
  Lock l(big);
  blas_streams[h] = s;
  return 0;
}

API int cublasGetStream_v2(void* h, cudaStream_t* s) {
  Lock l(big);
  *s = blas_streams[h];
  return 0;
}

static int gemm(void* h, const char* name) {
  Lock l(big);
  return enqueue(blas_streams[h], "gemm", name) ? 13 : 0;
}

API int cublasGemmEx(void* h, ...) { return gemm(h, "cublasGemmEx"); }

API int cublasGemmStridedBatchedEx(void* h, ...) { return gemm(h, "cublasGemmStridedBatchedEx"); }

API int cublasSgemm_v2(void* h, ...) { return gemm(h, "cublasSgemm"); }

API int cublasSgemmStridedBatched(void* h, ...) { return gemm(h, "cublasSgemmStridedBatched"); }
