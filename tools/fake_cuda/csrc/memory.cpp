// Memory: device and pinned blocks are host pages; copies outside a capture are made at once.
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

std::map<char*, size_t> device_blocks, host_blocks;
size_t device_used = 0;

bool in_blocks(const std::map<char*, size_t>& blocks, const void* p) {
  auto it = blocks.upper_bound((char*)p);
  if (it == blocks.begin()) return false;
  --it;
  return (char*)p < it->first + it->second;
}

void* take(size_t bytes) {
  size_t rounded = (bytes + 4095) & ~4095ull;
  void* p = mmap(nullptr, rounded ? rounded : 4096, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

static cudaError_t allocate(void** p, size_t bytes) {
  if (bytes > TOTAL - device_used - RESERVED) return fail(cudaErrorMemoryAllocation);
  if (!(*p = take(bytes))) return fail(cudaErrorMemoryAllocation);
  device_blocks[(char*)*p] = bytes;
  device_used += bytes;
  return cudaSuccess;
}

static cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  auto it = device_blocks.find((char*)p);
  if (it == device_blocks.end()) {
    say(true, "ERROR", "free of what is not device memory");
    return fail(cudaErrorInvalidValue);
  }
  munmap(p, (it->second + 4095) & ~4095ull);
  device_used -= it->second;
  device_blocks.erase(it);
  return cudaSuccess;
}

static void set_bytes(void* p, int value, size_t n) {
  char* start = (char*)(((size_t)p + 4095) & ~4095ull);
  char* end = (char*)(((size_t)p + n) & ~4095ull);
  if (value == 0 && end > start + (1 << 20) &&
      in_blocks(device_blocks, p)) {  // zeros without touching pages
    memset(p, 0, start - (char*)p);
    madvise(start, end - start, MADV_DONTNEED);
    memset(end, 0, (char*)p + n - end);
  } else
    memset(p, value, n);
}

static bool pageable(const void* p) {
  return !in_blocks(device_blocks, p) && !in_blocks(host_blocks, p);
}

cudaError_t copy(void* d, const void* s, size_t n, cudaStream_t st, const char* what) {
  Lock l(big);
  Stream* stream = as_stream(st);
  if (stream && stream->capture && n && (pageable(d) || pageable(s)))
    say(true, "PAGEABLE", "%s of %zu bytes from or to pageable memory in capture %llu", what, n,
        stream->capture->id);
  if (auto e = enqueue(st, what)) return e;
  if (n && !(stream->capture)) memmove(d, s, n);
  return cudaSuccess;
}

API cudaError_t cudaMalloc(void** p, size_t n) {
  Lock l(big);
  if (auto e = unsafe("cudaMalloc")) return e;
  return allocate(p, n);
}

API cudaError_t cudaFree(void* p) {
  Lock l(big);
  if (auto e = unsafe("cudaFree")) return e;
  return release(p);
}

API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t s) {
  Lock l(big);
  if (auto e = enqueue(s, "mallocAsync")) return e;
  return allocate(p, n);
}

API cudaError_t cudaFreeAsync(void* p, cudaStream_t s) {
  Lock l(big);
  if (auto e = enqueue(s, "freeAsync")) return e;
  return release(p);
}

API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  Lock l(big);
  if (auto e = unsafe("cudaHostAlloc")) return e;
  if (!(*p = take(n))) return fail(cudaErrorMemoryAllocation);
  host_blocks[(char*)*p] = n;
  return cudaSuccess;
}

API cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }

API cudaError_t cudaFreeHost(void* p) {
  Lock l(big);
  if (auto e = unsafe("cudaFreeHost")) return e;
  auto it = host_blocks.find((char*)p);
  if (it == host_blocks.end()) return fail(cudaErrorInvalidValue);
  munmap(p, (it->second + 4095) & ~4095ull);
  host_blocks.erase(it);
  return cudaSuccess;
}

API cudaError_t cudaHostRegister(void* p, size_t n, unsigned f) {
  Lock l(big);
  if (auto e = unsafe("cudaHostRegister")) return e;
  for (auto& [start, bytes] : host_blocks)  // pages, not bytes, are locked
    if ((size_t)p / 4096 <= ((size_t)start + bytes - 1) / 4096 &&
        (size_t)start / 4096 <= ((size_t)p + n - 1) / 4096)
      return fail(cudaErrorHostMemoryAlreadyRegistered);
  host_blocks[(char*)p] = n;
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* p) {
  Lock l(big);
  if (auto e = unsafe("cudaHostUnregister")) return e;
  return host_blocks.erase((char*)p) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}

API cudaError_t cudaHostGetDevicePointer(void** d, void* h, unsigned) {
  Lock l(big);
  if (!in_blocks(host_blocks, h)) return fail(cudaErrorInvalidValue);
  *d = h;
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  Lock l(big);
  *t = TOTAL;
  *f = TOTAL - device_used - RESERVED;
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  Lock l(big);
  if (auto e = unsafe("cudaMemcpy")) return e;
  return copy(d, s, n, nullptr, "memcpy");
}

API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t st) {
  return copy(d, s, n, st, "memcpyAsync");
}

API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t st) {
  return copy(d, s, n, st, "memcpyPeerAsync");
}

API cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                                  cudaMemcpyKind, cudaStream_t st) {
  Lock l(big);
  if (auto e = enqueue(st, "memcpy2DAsync")) return e;
  if (!as_stream(st)->capture)
    for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, w);
  return cudaSuccess;
}
NOTHING(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)

API cudaError_t cudaMemset(void* p, int v, size_t n) {
  Lock l(big);
  if (auto e = enqueue(nullptr, "memset")) return e;
  set_bytes(p, v, n);
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  Lock l(big);
  if (auto e = enqueue(s, "memsetAsync")) return e;
  if (!as_stream(s)->capture) set_bytes(p, v, n);
  return cudaSuccess;
}

API cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int v, size_t w, size_t h,
                                  cudaStream_t s) {
  Lock l(big);
  if (auto e = enqueue(s, "memset2DAsync")) return e;
  if (!as_stream(s)->capture)
    for (size_t i = 0; i < h; i++) memset((char*)p + i * pitch, v, w);
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Lock l(big);
  memset(a, 0, sizeof *a);
  bool dev = in_blocks(device_blocks, p), host = in_blocks(host_blocks, p);
  a->type = dev ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = dev || host ? 0 : -2;
  a->devicePointer = dev || host ? (void*)p : nullptr;
  a->hostPointer = dev ? nullptr : (void*)p;
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static void* space = take(1 << 20);
  *p = space;
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolSize(size_t* n, const void*) {
  *n = 4;
  return cudaSuccess;
}
