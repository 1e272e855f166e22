// save for Python. The device's tensors come first, see fetch_binding.cpp.
#include "tensors.h"

namespace ess {

// Shapes and dtypes: ess_kernels.cuda_ops.save.
void save_tensors(TensorView rows, TensorView slots, TensorView host_rows, int64_t max_blocks) {
  const RowFormat format = check_format("rows", rows, "host_rows", host_rows);
  check_cuda("rows", rows);
  check_integers("slots", slots, 64, rows.size(0));
  SaveArguments arguments;
  arguments.rows = rows.data_ptr();
  arguments.slots = static_cast<const int64_t*>(slots.data_ptr());
  arguments.host_rows = host_rows.data_ptr();
  arguments.num_rows = static_cast<int>(rows.size(0));
  arguments.format = format;
  arguments.max_blocks = check_blocks(max_blocks);
  check_launch("save", save(arguments, stream_of(rows)));
}

}  // namespace ess

TVM_FFI_DLL_EXPORT_TYPED_FUNC(save, ess::save_tensors);
