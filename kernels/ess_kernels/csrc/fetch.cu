// fetch: hot_rows[miss_rows[i]] = host_rows[miss_slots[i]] for i < *num_misses, read over PCIe by
// address from pinned host memory. Bytes: row_bytes read over PCIe and written to HBM a row.
#include "rows.cuh"

namespace ess {

template <int kRowWords>
__global__ void __launch_bounds__(kCopyThreads, kCopyBlocks) fetch_rows(const FetchArguments a) {
  const int count = min(*a.num_misses, a.capacity);
  copy_rows<kRowWords, true>(a.host_rows, a.hot_rows, a.format, count,
                             [&](int i, int& slot, int& row) {
                               slot = a.miss_slots[i];
                               row = a.miss_rows[i];
                             });
}

const char* fetch(const FetchArguments& a, void* stream) {
  if (a.capacity == 0) return nullptr;
  const auto kernel =
      for_format(a.format, fetch_rows<kFp8RowWords>, fetch_rows<kBf16RowWords>, fetch_rows<0>);
  return launch(kernel, copy_blocks(a.capacity, a.max_blocks), kCopyThreads, false, stream, a);
}

}  // namespace ess
