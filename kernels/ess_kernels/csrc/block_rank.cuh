// Ranks of flagged items within a block, in item order, and one atomic for the block's share of
// a common counter.
#pragma once

#include "launch.cuh"

namespace ess {

// Item i of thread t has place i * kThreads + t, so that neighbours are read by neighbours.
template <int kItems, int kThreads>
struct BlockRank {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kCells = kItems * kWarps;

  int count[kCells];  // flags of a warp's 32 items
  int start[kCells];  // flags before them
  int total;
  int base;
};

// rank[i] = (counter ? its value before this block : 0) + flags at places before item i.
// Returns the block's number of flags, by which *counter grows. Two barriers; every thread calls.
template <int kItems, int kThreads>
__device__ __forceinline__ int rank_in_block(BlockRank<kItems, kThreads>& shared,
                                             const bool (&flag)[kItems], int (&rank)[kItems],
                                             int* counter) {
  using Shared = BlockRank<kItems, kThreads>;
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned votes[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    votes[i] = __ballot_sync(kAll, flag[i]);
    if (lane == 0) shared.count[i * Shared::kWarps + warp] = __popc(votes[i]);
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < Shared::kCells; first += 32) {
      const int cell = first + lane;
      const int own = cell < Shared::kCells ? shared.count[cell] : 0;
      int sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(kAll, sum, step);
        if (lane >= step) sum += below;
      }
      if (cell < Shared::kCells) shared.start[cell] = before + sum - own;
      before += __shfl_sync(kAll, sum, 31);
    }
    if (lane == 0) {
      shared.total = before;
      shared.base = counter != nullptr && before > 0 ? atomicAdd(counter, before) : 0;
    }
  }
  // The next call writes `count`, read above; it writes the rest only after its first barrier.
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    rank[i] = shared.base + shared.start[i * Shared::kWarps + warp] +
              __popc(votes[i] & ((1u << lane) - 1));
  }
  return shared.total;
}

}  // namespace ess
