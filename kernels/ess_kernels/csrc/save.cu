// save: host_rows[slots[i]] = rows[i], stored over PCIe by address into pinned host memory.
// Stores are posted: a warp does not wait for them, so few blocks keep the link busy. The host
// may read the rows once an event recorded after the launch has completed.
#include "rows.cuh"

namespace ess {

template <int kRowWords>
__global__ void __launch_bounds__(kCopyThreads, kCopyBlocks) save_rows(const SaveArguments a) {
  copy_rows<kRowWords, false>(a.rows, a.host_rows, a.format, a.num_rows,
                              [&](int i, int& row, int& slot) {
                                row = i;
                                slot = static_cast<int>(a.slots[i]);
                              });
}

const char* save(const SaveArguments& a, void* stream) {
  if (a.num_rows == 0) return nullptr;
  const auto kernel =
      for_format(a.format, save_rows<kFp8RowWords>, save_rows<kBf16RowWords>, save_rows<0>);
  return launch(kernel, copy_blocks(a.num_rows, a.max_blocks), kCopyThreads, false, stream, a);
}

}  // namespace ess
