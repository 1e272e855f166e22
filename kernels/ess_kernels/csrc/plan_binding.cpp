// plan for Python.
#include "tensors.h"

namespace ess {

static int32_t* words_of(const char* name, const TensorView& tensor, int64_t count) {
  check_integers(name, tensor, 32, count);
  return static_cast<int32_t*>(tensor.data_ptr());
}

// Shapes and dtypes: ess_kernels.plan.run_plan; the state is one layer's. `written` is read if
// `writes`.
void plan_tensors(TensorView slots, TensorView written, bool writes, int64_t total, int64_t width,
                  TensorView rows, TensorView hit_rows, TensorView hit_lengths,
                  TensorView late_rows, TensorView late_lengths, TensorView query_misses,
                  TensorView miss_slots, TensorView miss_rows, TensorView num_misses,
                  TensorView slot_row, TensorView row_slot, TensorView row_stamp, TensorView free,
                  TensorView order, TensorView words, TensorView counters, int64_t min_age,
                  int64_t first_slot, int64_t kind, bool advance) {
  const int64_t lookups = rows.numel(), queries = hit_lengths.numel(), hot = row_slot.numel();
  if (width < 1 || width > kPlanMaxWidth || total < 0 || total > lookups || total > hot ||
      total > slots.numel()) {
    TVM_FFI_THROW(ValueError) << "a plan must have at most " << kPlanMaxWidth << " columns and "
                              << "as many lookups as it has slots (" << slots.numel()
                              << "), the buffers have places (" << lookups
                              << ") and the tier has rows (" << hot << "): got " << total
                              << " lookups, " << width << " columns. Plan the batch in blocks.";
  }
  if (kind < 0 || kind > 2 || first_slot < 0) {
    TVM_FFI_THROW(ValueError) << "kind must be 0 to 2 and first_slot 0 or more: got " << kind
                              << " and " << first_slot << ".";
  }
  // Only DECODE (0) lists hits and misses of each query, and only INSTALL (1) charges none.
  const int64_t programs = (total + width - 1) / width;
  if (kind != 1 && (programs > queries || width * queries != lookups)) {
    TVM_FFI_THROW(ValueError) << "plan buffers must be [queries, width]: got " << lookups
                              << " places and " << queries << " lengths for " << programs
                              << " queries of " << width << ".";
  }
  const bool wide_slots = slots.dtype().bits == 64;
  check_integers("slots", slots, wide_slots ? 64 : 32, slots.numel());
  const bool wide_written = written.dtype().bits == 64;
  if (writes) check_integers("written", written, wide_written ? 64 : 32, programs);
  check_integers("counters", counters, 64, 7);
  PlanArguments a;
  a.topk = slots.data_ptr();
  a.wide_slots = wide_slots;
  a.written = writes ? written.data_ptr() : nullptr;
  a.wide_written = wide_written;
  a.total = static_cast<int>(total);
  a.width = static_cast<int>(width);
  a.rows = words_of("rows", rows, lookups);
  a.hit_rows = words_of("hit_rows", hit_rows, lookups);
  a.hit_lengths = words_of("hit_lengths", hit_lengths, queries);
  a.late_rows = words_of("late_rows", late_rows, lookups);
  a.late_lengths = words_of("late_lengths", late_lengths, queries);
  a.query_misses = words_of("query_misses", query_misses, queries);
  a.miss_slots = words_of("miss_slots", miss_slots, lookups);
  a.miss_rows = words_of("miss_rows", miss_rows, lookups);
  a.num_misses = words_of("num_misses", num_misses, 1);
  a.slot_row = words_of("slot_row", slot_row, slot_row.numel());
  a.row_slot = words_of("row_slot", row_slot, hot);
  a.row_stamp = words_of("row_stamp", row_stamp, hot);
  a.free = words_of("free", free, hot);
  a.order = words_of("order", order, hot);
  a.words = words_of("words", words, 10);
  a.counters = static_cast<int64_t*>(counters.data_ptr());
  a.min_age = static_cast<int>(min_age);
  a.first_slot = static_cast<int>(first_slot);
  a.kind = static_cast<int>(kind);
  a.advance = advance;
  check_launch("plan", plan(a, stream_of(rows)));
}

}  // namespace ess

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, ess::plan_tensors);
