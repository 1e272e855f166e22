// The part of CUDA that csrc/*.cu uses, on the host: every thread of a grid is a fiber of one OS
// thread. A fiber gives way at barriers, warp operations, atomics and relaxed accesses, and a
// seeded scheduler decides who goes on, so a run can be repeated and seeds differ in who is first.
// What it does not see: the hardware's weak memory order, and what lies between two such points.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <typeinfo>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

namespace ess_host {

struct Place {
  Index thread, block, block_size, grid_size;
};

extern Place place;  // of the running fiber

// Faults that a test puts in: a barrier of this kind and number, counted by each thread on its
// own, does not wait.
enum Fault { kNoFault = 0, kSkipBlockBarrier = 1, kSkipGridBarrier = 2 };

void configure(uint64_t seed, Fault fault, int number);

// Runs a grid to its end; nullptr, or what went wrong (deadlock, misuse).
const char* run(std::function<void()> kernel, int blocks, int threads, bool cooperative);

void yield();
void block_barrier();
void grid_barrier();
// Gives `value` and returns the 32 values of the warp once every lane of mask has given its own.
const uint64_t* exchange(unsigned mask, uint64_t value);
void* shared_storage(const std::type_info& type, size_t bytes);

inline int lane() { return static_cast<int>(place.thread.x % 32); }

}  // namespace ess_host

#define threadIdx (::ess_host::place.thread)
#define blockIdx (::ess_host::place.block)
#define blockDim (::ess_host::place.block_size)
#define gridDim (::ess_host::place.grid_size)

using std::max;
using std::min;

inline void __syncthreads() { ess_host::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ess_host::exchange(mask, 0); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(std::is_integral_v<T>);
  return static_cast<T>(ess_host::exchange(mask, static_cast<uint64_t>(value))[source & 31]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  static_assert(std::is_integral_v<T>);
  const int lane = ess_host::lane(), from = lane - static_cast<int>(delta);
  return static_cast<T>(
      ess_host::exchange(mask, static_cast<uint64_t>(value))[from < 0 ? lane : from]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  static_assert(std::is_integral_v<T>);
  const int from = ess_host::lane() ^ bits;
  return static_cast<T>(ess_host::exchange(mask, static_cast<uint64_t>(value))[from]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = ess_host::exchange(mask, vote);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (mask >> i & 1u && votes[i]) ? 1u << i : 0u;
  return bits;
}

inline int __reduce_add_sync(unsigned mask, int value) {
  const uint64_t* values = ess_host::exchange(mask, static_cast<uint64_t>(value));
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += (mask >> i & 1u) ? static_cast<int>(values[i]) : 0;
  return sum;
}

// Others may run before and after an atomic, never within.
template <class T, class Change>
T ess_host_atomic(T* address, Change change) {
  ess_host::yield();
  const T before = *address;
  *address = change(before);
  ess_host::yield();
  return before;
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}

template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T old) { return old < value ? old : value; });
}

template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T old) { return old > value ? old : value; });
}

template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T) { return value; });
}

namespace ess {

inline uint4 load_host(const uint4* address) { return *address; }
inline uint4 load_device(const uint4* address) { return *address; }
inline void loads_before_stores() {}

inline int load_relaxed(const int* address) {
  ess_host::yield();
  return *address;
}

inline void store_relaxed(int* address, int value) {
  ess_host::yield();
  *address = value;
}

template <class T>
T& block_shared() {
  return *static_cast<T*>(ess_host::shared_storage(typeid(T), sizeof(T)));
}

inline void grid_sync() { ess_host::grid_barrier(); }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int threads, bool cooperative,
                   void*, const Arguments&... arguments) {
  return ess_host::run([&] { kernel(arguments...); }, blocks, threads, cooperative);
}

// Small, so that grids of more queries than blocks are tried too.
template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int) {
  return 3;
}

}  // namespace ess
