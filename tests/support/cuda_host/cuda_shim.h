// The part of CUDA that csrc/ uses, on the host. Every thread of a grid is a fiber of one OS
// thread. Two ways to run a grid (configure):
// - fast: a fiber runs until it must wait for others. For tests that use the kernels.
// - seeded: a fiber also gives way at atomics and relaxed accesses, and a seeded scheduler decides
//   who goes on. A seed repeats its interleaving. For tests of the kernels.
// A build with -fsanitize=thread also finds races (races.h).
// What none of these sees: the hardware's weak memory order.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <typeinfo>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

namespace ess_host {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBlockThreads = 1024;  // the most that a device takes

struct Place {
  Index thread, block, block_size, grid_size;
};

extern const Place* place;  // of the running fiber

// Faults that a test puts in: a barrier of this kind and number, counted by each thread on its
// own, does not wait.
enum Fault { kNoFault = 0, kSkipBlockBarrier = 1, kSkipGridBarrier = 2 };

struct Settings {
  bool fast = true;
  uint64_t seed = 0;
  Fault fault = kNoFault;
  int fault_number = 0;
};

constexpr int kResidentBlocks = 3;  // small, so that grids of more work than blocks are tried too

// Holds for the next grids of this library.
void configure(const Settings& settings);

// Runs a grid to its end. Returns nullptr, or what went wrong (deadlock, misuse). One at a time:
// a second OS thread waits.
const char* run(const std::function<void()>& kernel, int blocks, int threads, bool cooperative);

void begin_atomic();  // what the running thread touches until the end, it touches atomically
void end_atomic();

void yield();
void block_barrier();
void grid_barrier();

enum Collective { kSync, kShuffle, kVote, kSum };

// What the lanes of a mask gave, once all have: each lane's value, their votes, their sum.
struct Given {
  uint64_t value[32];
  unsigned votes;
  uint64_t sum;
};

const Given& exchange(Collective kind, unsigned mask, uint64_t value);
// Lane `from` of what was given. An error if its lane is not of the mask.
uint64_t value_of(const Given& given, unsigned mask, int from);
void* shared_storage(const std::type_info& type, size_t bytes);

inline int lane() { return static_cast<int>(place->thread.x % 32); }

}  // namespace ess_host

#define threadIdx (::ess_host::place->thread)
#define blockIdx (::ess_host::place->block)
#define blockDim (::ess_host::place->block_size)
#define gridDim (::ess_host::place->grid_size)

using std::max;
using std::min;

inline void __syncthreads() { ess_host::block_barrier(); }
inline void __syncwarp(unsigned mask = ess_host::kAllLanes) {
  ess_host::exchange(ess_host::kSync, mask, 0);
}
inline void __threadfence() {}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

template <class T>
T ess_host_shuffle(unsigned mask, T value, int from) {
  static_assert(std::is_integral_v<T>);
  const auto& given = ess_host::exchange(ess_host::kShuffle, mask, static_cast<uint64_t>(value));
  return static_cast<T>(ess_host::value_of(given, mask, from));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return ess_host_shuffle(mask, value, source & 31);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int from = ess_host::lane() - static_cast<int>(delta);
  return ess_host_shuffle(mask, value, from < 0 ? ess_host::lane() : from);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int from = ess_host::lane() + static_cast<int>(delta);
  return ess_host_shuffle(mask, value, from > 31 ? ess_host::lane() : from);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ess_host_shuffle(mask, value, ess_host::lane() ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return ess_host::exchange(ess_host::kVote, mask, vote).votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(
      ess_host::exchange(ess_host::kSum, mask, static_cast<uint64_t>(value)).sum);
}

// Others may run before and after an atomic, never within.
template <class T, class Change>
T ess_host_atomic(T* address, Change change) {
  ess_host::yield();
  ess_host::begin_atomic();
  const T before = *address;
  *address = change(before);
  ess_host::end_atomic();
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
T atomicOr(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T old) { return old | value; });
}

template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T old) { return old & value; });
}

template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T) { return value; });
}

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return ess_host_atomic(address, [=](T old) { return old == expected ? value : old; });
}

namespace ess {

// Not looked at for races: no kernel writes host rows, and lanes with nothing to load read any word.
uint4 load_host(const uint4* address);
inline void loads_before_stores() {}

inline int load_relaxed(const int* address) {
  ess_host::yield();
  ess_host::begin_atomic();
  const int value = *static_cast<const volatile int*>(address);
  ess_host::end_atomic();
  return value;
}

inline void store_relaxed(int* address, int value) {
  ess_host::yield();
  ess_host::begin_atomic();
  *static_cast<volatile int*>(address) = value;
  ess_host::end_atomic();
}

inline unsigned long long nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<unsigned long long>(std::chrono::nanoseconds(now).count());
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

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), int) {
  return ess_host::kResidentBlocks;
}

}  // namespace ess
