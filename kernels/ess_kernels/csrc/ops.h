// What the bindings (C++) and the kernels (CUDA) agree on: one argument struct and one launch
// function an operation. Each returns nullptr, or what the CUDA runtime says went wrong.
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

struct FetchArguments {
  const void* host_rows;      // [slots] rows, pinned host memory
  void* hot_rows;             // [hot rows] rows; written
  const int32_t* miss_slots;  // [capacity]; negative: skipped
  const int32_t* miss_rows;   // [capacity]; negative: skipped
  const int32_t* num_misses;  // [1]
  int capacity;
  RowFormat format;
  int max_blocks;
};

struct SaveArguments {
  const void* rows;      // [num_rows] rows
  const int64_t* slots;  // [num_rows]; negative: skipped
  void* host_rows;       // [slots] rows, pinned host memory; written
  int num_rows;
  RowFormat format;
  int max_blocks;
};

// Meanings, shapes and dtypes: hot_state.HotState and plan.PlanBuffers.
struct PlanArguments {
  const void* topk;  // [total] slots, int64 if wide_slots, else int32
  bool wide_slots;
  const void* written;  // [queries] slots, int64 if wide_written, else int32; or nullptr
  bool wide_written;
  int total;
  int width;  // lookups of one query
  int32_t *rows, *hit_rows, *hit_lengths, *late_rows, *late_lengths, *query_misses;
  int32_t *miss_slots, *miss_rows, *num_misses;
  int32_t *slot_row, *row_slot, *row_stamp, *free, *order, *words;
  int64_t* counters;
  int min_age;
  int first_slot;
  int kind;
  bool advance;
};

constexpr int kPlanMaxWidth = 8192;  // plan.MAX_WIDTH

const char* fetch(const FetchArguments& arguments, void* stream);
const char* save(const SaveArguments& arguments, void* stream);
const char* plan(const PlanArguments& arguments, void* stream);

}  // namespace ess
