// Copy listed rows from pinned host memory to the device, some rows at a time by each warp.
//
// Bytes in flight decide the speed over PCIe: 55 GB/s (PCIe 5 x16) times a round trip of about
// 2 us is 110 KB that must be under way at any time. A warp issues kLoads loads of 512 B before its
// first store: 3 rows of 656 B or 2 of 1152 B, 2.0 to 2.3 KB. So 56 warps cover the link; 16 blocks
// of 16 warps are four times that, because a warp has nothing in flight while it stores.
//
// A request goes to the host as lines of 128 B. Rows start at any multiple of 16 B, so the lanes
// are dealt to a row from the start of its first line on: eight neighbouring lanes read one line,
// and no line is asked for by two instructions. A row of 656 B takes 48 lanes of which 41 load.
#pragma once

#include "memory.cuh"
#include "plan_fetch.h"

namespace ess {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLoads = 5;
constexpr int kLineWords = 128 / kAccessBytes;
constexpr int kFp8RowWords = 656 / kAccessBytes;
constexpr int kBf16RowWords = 1152 / kAccessBytes;

// Lanes of a row, wherever in a line it starts.
__host__ __device__ constexpr int row_lanes(int row_words) {
  return (row_words + kLineWords - 1 + kLineWords - 1) / kLineWords * kLineWords;
}

// Rows that a warp copies at a time.
__host__ __device__ constexpr int rows_at_a_time(int row_words) {
  const int rows = kLoads * kLanes / row_lanes(row_words);
  return rows > 1 ? rows : 1;
}

// Lane r < rows holds slot and hot row of the r-th row; negative: not copied.
//
// A lane with nothing to load reads `idle`, 16 bytes of device memory that nobody writes meanwhile,
// and drops them: a predicate on the load would make its target a value to merge, and the merge
// waits for the load.
template <int kRowWords>
__device__ __forceinline__ void copy_some(const CopyArguments& c, int rows, int slot, int hot) {
  const int lane = threadIdx.x % kLanes;
  const int width = kRowWords > 0 ? kRowWords : c.format.row_words;
  const int span = row_lanes(width), total = rows * span;
  const uint4* const from = static_cast<const uint4*>(c.host_rows);
  uint4* const to = static_cast<uint4*>(c.hot_rows);
  const uint4* const idle = reinterpret_cast<const uint4*>(
      reinterpret_cast<uintptr_t>(c.slots) & ~static_cast<uintptr_t>(kAccessBytes - 1));
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(from) / kAccessBytes % kLineWords);
  for (int base = 0; base < total; base += kLoads * kLanes) {
    uint4 value[kLoads];
    int target[kLoads];  // in words: binding.cpp checks that they fit
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int place = base + k * kLanes + lane, row = min(place / span, rows - 1);
      const int source_row = __shfl_sync(kAllLanes, slot, row);
      const int target_row = __shfl_sync(kAllLanes, hot, row);
      // 64 bits: a row times its words exceeds 2^31.
      const int64_t start = static_cast<int64_t>(source_row) * c.format.from_stride;
      const int shift = static_cast<int>((start + lead) % kLineWords);
      const int word = place - row * span - shift;
      const bool wanted =
          place < total && word >= 0 && word < width && source_row >= 0 && target_row >= 0;
      value[k] = load_host(wanted ? from + start + word : idle);
      target[k] = wanted ? target_row * c.format.to_stride + word : -1;
    }
    loads_before_stores();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (target[k] >= 0) to[target[k]] = value[k];
    }
    if (kRowWords > 0) break;  // rows_at_a_time() of a known width are one turn
  }
}

// This block's share of the list, of `blocks` blocks. Neighbouring entries go to different blocks,
// so that a short list uses all of them.
template <int kRowWords>
__device__ __forceinline__ void copy_listed(const CopyArguments& c, int block, int blocks) {
  const int width = kRowWords > 0 ? kRowWords : c.format.row_words;
  const int lane = threadIdx.x % kLanes, count = *c.count;
  const int warp = threadIdx.x / kLanes * blocks + block;
  const int warps = static_cast<int>(blockDim.x) / kLanes * blocks;
  const int share = (count + warps - 1) / warps;
  const int each = max(1, min(share, min(kLanes, rows_at_a_time(width))));
  for (int first = warp * each; first < count; first += warps * each) {
    const int rows = min(each, count - first);
    const bool listed = lane < rows;
    const int slot = listed ? c.slots[first + lane] : -1;
    const int hot = listed ? c.rows[first + lane] : -1;
    copy_some<kRowWords>(c, rows, slot, hot);
  }
}

__device__ __forceinline__ void copy_any(const CopyArguments& c, int block, int blocks) {
  if (c.format.row_words == kFp8RowWords) {
    copy_listed<kFp8RowWords>(c, block, blocks);
  } else if (c.format.row_words == kBf16RowWords) {
    copy_listed<kBf16RowWords>(c, block, blocks);
  } else {
    copy_listed<0>(c, block, blocks);
  }
}

// Note when this block's copies ended.
__device__ __forceinline__ void note_end(int64_t* done) {
  __syncthreads();
  if (threadIdx.x == 0 && done != nullptr) {
    atomicMax(reinterpret_cast<unsigned long long*>(done), nanoseconds());
  }
}

}  // namespace ess
