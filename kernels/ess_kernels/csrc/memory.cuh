// Global memory accesses that C++ has no word for. The host build has its own (cuda_shim.h).
#pragma once

#include "launch.cuh"

#ifndef ESS_HOST_SHIM
namespace ess {

// 16 bytes of host memory, read once, so kept out of L1. No kernel in flight writes these, but other
// devices wrote them before: not ld.global.nc, to which the memory model does not apply.
__device__ __forceinline__ uint4 load_host(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The compiler moves no store above this, so that no load waits behind one.
__device__ __forceinline__ void loads_before_stores() { asm volatile("" ::: "memory"); }

// A word that other blocks may write at the same time: old or new, never torn, never from L1.
__device__ __forceinline__ int load_relaxed(const int* address) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(int* address, int value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// The device's clock, of which all SMs see the same; it steps by 32 ns to 1 us.
__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long v;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v));
  return v;
}

}  // namespace ess
#endif
