// What the shim must show, each as a kernel of its own.
#include "memory.cuh"
#include "probe.h"

namespace ess {

__global__ void add_one(int* sum, bool atomically) {
  if (atomically) {
    atomicAdd(sum, 1);
  } else {
    store_relaxed(sum, load_relaxed(sum) + 1);
  }
}

__global__ void one_lane_stays_away(int* sum) {
  if (threadIdx.x != 5) *sum = __shfl_sync(0xffffffffu, *sum, 0);
}

__global__ void two_operations(int* sum) {
  if (threadIdx.x < 16) {
    *sum = __shfl_sync(0xffffffffu, 1, 0);
  } else {
    *sum = static_cast<int>(__ballot_sync(0xffffffffu, true));
  }
}

// Every block waits for a word of block 0.
__global__ void wait_for_a_word(int* words) {
  if (blockIdx.x == 0 && threadIdx.x == 0) store_relaxed(words, 1);
  while (load_relaxed(words) == 0) {
  }
  atomicAdd(words + 1, 1);
}

__global__ void barrier_of_all(int* words) {
  atomicAdd(words, 1);
  grid_sync();
  words[1 + blockIdx.x * blockDim.x + threadIdx.x] = load_relaxed(words);
}

// Each thread reads what its neighbour wrote, with or without a barrier between.
template <bool kBarrier>
__global__ void neighbours(int* words) {
  words[threadIdx.x] = 1;
  if (kBarrier) __syncthreads();
  words[blockDim.x + threadIdx.x] = words[(threadIdx.x + 1) % blockDim.x];
}

const char* probe(int kind, int* words, int blocks, int threads) {
  switch (kind) {
    case 0: return launch(add_one, blocks, threads, false, nullptr, words, false);
    case 1: return launch(add_one, blocks, threads, false, nullptr, words, true);
    case 2: return launch(one_lane_stays_away, blocks, threads, false, nullptr, words);
    case 3: return launch(two_operations, blocks, threads, false, nullptr, words);
    case 4: return launch(wait_for_a_word, blocks, threads, true, nullptr, words);
    case 5: return launch(barrier_of_all, blocks, threads, true, nullptr, words);
    case 6: return launch(neighbours<true>, blocks, threads, false, nullptr, words);
    case 7: return launch(neighbours<false>, blocks, threads, false, nullptr, words);
    default: return launch(barrier_of_all, blocks, threads, false, nullptr, words);
  }
}

}  // namespace ess
