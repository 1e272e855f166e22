#include "probe.h"
#include "tensors.h"

namespace ess {

static void probe_words(int64_t kind, TensorView words, int64_t blocks, int64_t threads) {
  check_integers("words", words, 32, words.numel());
  check_launch("probe", probe(static_cast<int>(kind), static_cast<int*>(words.data_ptr()),
                              static_cast<int>(blocks), static_cast<int>(threads)));
}

}  // namespace ess

TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe, ess::probe_words);
