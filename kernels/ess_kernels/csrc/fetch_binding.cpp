// fetch for Python. The device's tensors come first: tvm-ffi takes the stream of the first tensor
// that is not plain host memory, and pinned memory may count as a device of its own.
#include "tensors.h"

namespace ess {

// Shapes and dtypes: ess_kernels.cuda_ops.fetch.
void fetch_tensors(TensorView hot_rows, TensorView host_rows, TensorView miss_slots,
                   TensorView miss_rows, TensorView num_misses, int64_t max_blocks) {
  const RowFormat format = check_format("host_rows", host_rows, "hot_rows", hot_rows);
  check_cuda("hot_rows", hot_rows);
  check_integers("miss_slots", miss_slots, 32, miss_slots.numel());
  check_integers("miss_rows", miss_rows, 32, miss_slots.numel());
  check_integers("num_misses", num_misses, 32, 1);
  FetchArguments arguments;
  arguments.host_rows = host_rows.data_ptr();
  arguments.hot_rows = hot_rows.data_ptr();
  arguments.miss_slots = static_cast<const int32_t*>(miss_slots.data_ptr());
  arguments.miss_rows = static_cast<const int32_t*>(miss_rows.data_ptr());
  arguments.num_misses = static_cast<const int32_t*>(num_misses.data_ptr());
  arguments.capacity = static_cast<int>(miss_slots.numel());
  arguments.format = format;
  arguments.max_blocks = check_blocks(max_blocks);
  check_launch("fetch", fetch(arguments, stream_of(hot_rows)));
}

}  // namespace ess

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fetch, ess::fetch_tensors);
