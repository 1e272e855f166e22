// plan_fetch, fetch and install for Python.
#include "tensors.h"

namespace ess {

static int32_t* words_of(const char* name, const TensorView& tensor, int64_t count) {
  check_integers(name, tensor, 32, count);
  return static_cast<int32_t*>(tensor.data_ptr());
}

static int64_t* longs_of(const char* name, const TensorView& tensor, int64_t count) {
  check_integers(name, tensor, 64, count);
  return static_cast<int64_t*>(tensor.data_ptr());
}

static GroupState state_of(TensorView slot_row, TensorView row_slot, TensorView row_stamp,
                           TensorView words, TensorView counters, TensorView times,
                           int64_t groups) {
  GroupState g;
  const int64_t rows = row_slot.numel();
  g.slot_row = words_of("slot_row", slot_row, slot_row.numel());
  g.row_slot = words_of("row_slot", row_slot, rows);
  g.row_stamp = words_of("row_stamp", row_stamp, rows);
  g.words = words_of("words", words, groups * kWords);
  g.counters = longs_of("counters", counters, groups * kCounters);
  g.times = longs_of("times", times, times.numel());
  g.num_rows = static_cast<int>(rows / groups);
  g.num_layers = static_cast<int>(times.numel() / groups / 2);
  g.roomy = rows >= slot_row.numel();
  return g;
}

// No rows: nothing is copied.
static CopyArguments copy_of(TensorView host_rows, TensorView hot_rows, TensorView slots,
                             TensorView rows, TensorView count, TensorView times, int64_t layer,
                             int64_t blocks) {
  CopyArguments c{};
  c.slots = words_of("slots", slots, slots.numel());
  c.rows = words_of("rows", rows, slots.numel());
  c.count = words_of("count", count, 1);
  if (host_rows.numel() == 0) return c;
  check_device("hot_rows", hot_rows);
  c.format = check_format("host_rows", host_rows, "hot_rows", hot_rows);
  if (hot_rows.size(0) * c.format.to_stride > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << "hot_rows must have less than 2^31 words of " << kAccessBytes
                              << " bytes: got shape " << hot_rows.shape() << ".";
  }
  c.host_rows = host_rows.data_ptr();
  c.hot_rows = hot_rows.data_ptr();
  if (times.numel() > 0) {
    if (layer < 0 || 2 * layer + 2 > times.numel()) {
      TVM_FFI_THROW(ValueError) << "layer must be 0 to " << times.numel() / 2 - 1 << ": got "
                                << layer << ".";
    }
    c.done = longs_of("times", times, times.numel()) + 2 * layer + 1;
  }
  c.blocks = check_blocks(blocks);
  return c;
}

// Shapes and dtypes: plan_fetch.plan_fetch. Lists are written unless hit_rows is empty.
void plan_fetch_tensors(TensorView topk, TensorView rows, TensorView hit_rows,
                        TensorView hit_lengths, TensorView late_rows, TensorView late_lengths,
                        TensorView miss_slots, TensorView miss_rows, TensorView num_misses,
                        TensorView slot_row, TensorView row_slot, TensorView row_stamp,
                        TensorView words, TensorView counters, TensorView times,
                        TensorView host_rows, TensorView hot_rows, bool warm, bool advance,
                        int64_t pass, int64_t passes, int64_t blocks) {
  if (topk.ndim() != 2) {
    TVM_FFI_THROW(ValueError) << "topk must be [queries, K]: got shape " << topk.shape() << ".";
  }
  const int64_t lookups = topk.numel(), queries = topk.size(0), hot = row_slot.numel();
  const int64_t widest = kPlanMaxItems * plan_threads();
  const bool fits = lookups <= hot || hot >= slot_row.numel();
  if (topk.size(1) < 1 || topk.size(1) > widest || !fits) {
    TVM_FFI_THROW(ValueError) << "a plan must have 1 to " << widest << " columns and at most "
                              << hot << " lookups, one for each hot row: got shape "
                              << topk.shape() << ". Plan the batch in passes.";
  }
  if (pass < 0 || pass >= passes || passes > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << "a pass must be 0 or more and below the step's passes: got "
                              << pass << " of " << passes << ".";
  }
  PlanArguments a;
  a.state = state_of(slot_row, row_slot, row_stamp, words, counters, times, 1);
  a.topk = words_of("topk", topk, lookups);
  a.queries = static_cast<int>(queries);
  a.width = static_cast<int>(topk.size(1));
  a.rows = words_of("rows", rows, lookups);
  const bool lists = hit_rows.numel() > 0;
  a.hit_rows = lists ? words_of("hit_rows", hit_rows, lookups) : nullptr;
  a.hit_lengths = lists ? words_of("hit_lengths", hit_lengths, queries) : nullptr;
  a.late_rows = lists ? words_of("late_rows", late_rows, lookups) : nullptr;
  a.late_lengths = lists ? words_of("late_lengths", late_lengths, queries) : nullptr;
  a.miss_slots = words_of("miss_slots", miss_slots, lookups);
  a.miss_rows = words_of("miss_rows", miss_rows, lookups);
  a.num_misses = words_of("num_misses", num_misses, 1);
  a.warm = warm;
  a.advance = advance;
  a.pass = static_cast<int>(pass);
  a.passes = static_cast<int>(passes);
  a.copy = copy_of(host_rows, hot_rows, miss_slots, miss_rows, num_misses, times, 0, blocks);
  if (warm) a.copy.done = nullptr;  // no step waits for it
  check_launch("plan_fetch", plan_fetch(a, stream_of(topk)));
}

// No times: nobody asks when the copies ended.
void fetch_tensors(TensorView host_rows, TensorView hot_rows, TensorView slots, TensorView rows,
                   TensorView count, TensorView times, int64_t layer, int64_t blocks) {
  if (host_rows.numel() == 0) TVM_FFI_THROW(ValueError) << "host_rows must have rows: got none.";
  const CopyArguments c = copy_of(host_rows, hot_rows, slots, rows, count, times, layer, blocks);
  check_launch("fetch", fetch(c, static_cast<int>(slots.numel()), stream_of(hot_rows)));
}

// The state is that of all groups: [groups, ...].
void install_tensors(TensorView slots, TensorView slot_row, TensorView row_slot,
                     TensorView row_stamp, TensorView words, TensorView counters, TensorView times,
                     int64_t first_slot, int64_t min_age, bool reserve) {
  const int64_t groups = slot_row.size(0), count = slots.numel();
  if (first_slot < 0 || min_age < 0) {
    TVM_FFI_THROW(ValueError) << "first_slot and min_age must be 0 or more: got " << first_slot
                              << " and " << min_age << ".";
  }
  InstallArguments a;
  a.first = state_of(slot_row, row_slot, row_stamp, words, counters, times, groups);
  if (reserve && count > a.first.num_rows) {
    TVM_FFI_THROW(ValueError) << "slots to reserve must be at most " << a.first.num_rows
                              << ", the hot rows of a group: got " << count << ".";
  }
  a.slot_stride = slot_row.numel() / groups;
  a.row_stride = a.first.num_rows;
  a.word_stride = kWords;
  a.counter_stride = kCounters;
  a.time_stride = 2 * static_cast<int64_t>(a.first.num_layers);
  a.groups = static_cast<int>(groups);
  a.wide = slots.dtype().bits == 64;
  check_integers("slots", slots, a.wide ? 64 : 32, count);
  a.slots = slots.data_ptr();
  a.count = static_cast<int>(count);
  a.first_slot = static_cast<int>(first_slot);
  a.min_age = static_cast<int>(min_age);
  a.reserve = reserve;
  check_launch("install", install(a, stream_of(slots)));
}

int64_t max_width() { return kPlanMaxItems * plan_threads(); }

}  // namespace ess

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_fetch, ess::plan_fetch_tensors);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fetch, ess::fetch_tensors);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(install, ess::install_tensors);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(max_width, ess::max_width);
