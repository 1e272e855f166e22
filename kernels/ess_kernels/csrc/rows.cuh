// Copy listed rows between host and device, a group of rows a warp.
//
// Bytes in flight decide the speed over PCIe: 55 GB/s (PCIe 5 x16) times a round trip of about
// 2 us is 110 KB that must be under way at any time. A warp issues kLoads loads of 512 B before
// its first store, 4,608 B, so 24 warps (3 blocks) cover the link if the link is the limit.
// The rows of a group are one run of 16-byte words dealt to the lanes in turn, since a row alone
// leaves lanes idle: 656 B is 41 words for 2 x 32 lanes (64% used), 7 rows are 287 for 9 x 32
// (99.7%); 4 rows of 1152 B are 288 (100%).
#pragma once

#include "memory.cuh"
#include "ops.h"

namespace ess {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLoads = 9;
constexpr int kGroupWords = kLoads * kLanes;
constexpr int kCopyThreads = 256;
constexpr int kCopyWarps = kCopyThreads / kLanes;
constexpr int kCopyBlocks = 3;  // of an SM: 80 registers a thread, what the loads need
constexpr int kFp8RowWords = 656 / kAccessBytes;
constexpr int kBf16RowWords = 1152 / kAccessBytes;

// Lane r < rows holds source and target of row r of the group, both negative: not copied.
//
// A lane with nothing to load reads `idle`, 16 bytes of device memory, and drops them: a predicate
// on the load would make its target a value to merge, and the merge waits for the load.
template <int kRowWords, bool kFromHost>
__device__ __forceinline__ void copy_group(const uint4* from, uint4* to, const uint4* idle,
                                           const RowFormat& format, int rows, int source,
                                           int target) {
  const int lane = threadIdx.x % kLanes;
  const int width = kRowWords > 0 ? kRowWords : format.row_words;
  const int total = rows * width;
  for (int base = 0; base < total; base += kGroupWords) {
    uint4 value[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int word = base + k * kLanes + lane;
      const int row = min(word / width, rows - 1);
      const int source_row = __shfl_sync(kAllLanes, source, row);
      const bool wanted = word < total && source_row >= 0;
      const int column = word - row * width;
      // 64 bits: a row times its words passes 2^31.
      const int64_t start = static_cast<int64_t>(source_row) * format.from_stride;
      const uint4* address = wanted ? from + start + column : idle;
      value[k] = kFromHost ? load_host(address) : load_device(address);
    }
    loads_before_stores();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      // Computed again: 9 addresses kept through the loads would be 18 registers.
      const int word = base + k * kLanes + lane;
      const int row = min(word / width, rows - 1);
      const int target_row = __shfl_sync(kAllLanes, target, row);
      if (word < total && target_row >= 0) {
        const int64_t start = static_cast<int64_t>(target_row) * format.to_stride;
        to[start + (word - row * width)] = value[k];
      }
    }
    if (kRowWords > 0) break;  // a group of known width is one pass
  }
}

// Rows 0 to count - 1 of a list; pick(i, source, target) reads entry i.
template <int kRowWords, bool kFromHost, class Pick>
__device__ __forceinline__ void copy_rows(const void* from, void* to, const RowFormat& format,
                                          int count, Pick pick) {
  const int width = kRowWords > 0 ? kRowWords : format.row_words;
  const int lane = threadIdx.x % kLanes;
  // Neighbouring groups go to different SMs, so that a short list uses all of them.
  const int warp = threadIdx.x / kLanes * gridDim.x + blockIdx.x;
  const int warps = gridDim.x * kCopyWarps;
  const int share = (count + warps - 1) / warps;
  const int group = max(1, min(share, min(kLanes, kGroupWords / width)));
  for (int first = warp * group; first < count; first += warps * group) {
    const int rows = min(group, count - first);
    int source = -1, target = -1;
    if (lane < rows) pick(first + lane, source, target);
    if (source < 0 || target < 0) source = target = -1;
    const uint4* const source_rows = static_cast<const uint4*>(from);
    uint4* const target_rows = static_cast<uint4*>(to);
    const uint4* const idle = kFromHost ? target_rows : source_rows;
    copy_group<kRowWords, kFromHost>(source_rows, target_rows, idle, format, rows, source, target);
  }
}

// The kernel of a row format: of 656 B, of 1152 B, else of any.
template <class Kernel>
Kernel for_format(const RowFormat& format, Kernel fp8, Kernel bf16, Kernel any) {
  return format.row_words == kFp8RowWords ? fp8 : format.row_words == kBf16RowWords ? bf16 : any;
}

// No more blocks than give every warp one row.
inline int copy_blocks(int rows, int max_blocks) {
  const int most = (rows + kCopyWarps - 1) / kCopyWarps;
  return most < max_blocks ? most : max_blocks;
}

}  // namespace ess
