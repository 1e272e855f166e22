// What the binding (C++) and the kernels (CUDA) of plan_fetch.cu agree on. A launch function returns
// nullptr, or what the CUDA runtime says went wrong.
#pragma once

#include <cstdint>

namespace ess {

constexpr int kAccessBytes = 16;  // of one thread, the widest there is

// In accesses of 16 bytes.
struct RowFormat {
  int row_words;
  int from_stride;  // from one row to the next, in the memory read
  int to_stride;    // in the memory written
};

// The state of one index group. Meanings, shapes and dtypes: hot_state.HotState.
struct GroupState {
  int32_t *slot_row, *row_slot, *row_stamp, *words;
  int64_t *counters, *times;
  int num_rows;
  int num_layers;
  bool roomy;  // a row for every slot: nobody has to lose one
};

// Listed rows of one layer: entries 0 to *count - 1.
struct CopyArguments {
  const void* host_rows;  // [slots] rows, pinned host memory; nullptr: nothing is copied
  void* hot_rows;         // [num_rows] rows; written
  RowFormat format;
  const int32_t *slots, *rows, *count;
  int64_t* done;  // its maximum with the time in ns at which the copies ended
  int blocks;     // at most, so that a long list leaves SMs to other kernels
};

// Outputs: plan_fetch.PlanBuffers.
struct PlanArguments {
  GroupState state;
  const int32_t* topk;  // [queries, width]
  int queries, width;
  int32_t* rows;
  int32_t *hit_rows, *hit_lengths, *late_rows, *late_lengths;  // hit_rows nullptr: no lists
  int32_t *miss_slots, *miss_rows, *num_misses;
  bool warm;  // plan_fetch.WARM, else DECODE
  bool advance;
  int pass, passes;  // of the step's plans: ages count in steps
  CopyArguments copy;
};

struct InstallArguments {
  GroupState first;  // the first group's; another group's lie `strides` further for each group
  int64_t slot_stride, row_stride, word_stride, counter_stride, time_stride;
  int groups;
  const void* slots;  // [count], int64 if wide, else int32
  bool wide;
  int count;
  int first_slot;
  int min_age;
  bool reserve;  // for a decode step's new rows, else for a prompt's
};

constexpr int kWords = 8, kCounters = 10;  // hot_state.NUM_WORDS, NUM_COUNTERS
constexpr int kPlanMaxItems = 16;  // lookups of a query that one thread takes, at most

int plan_threads();  // of a block
const char* plan_fetch(const PlanArguments& arguments, void* stream);
const char* fetch(const CopyArguments& arguments, int capacity, void* stream);
const char* install(const InstallArguments& arguments, void* stream);

}  // namespace ess
