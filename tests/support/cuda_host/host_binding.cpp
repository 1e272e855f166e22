// The shim's settings for Python.
#include <tvm/ffi/function.h>

#include "cuda_shim.h"

static void configure(bool fast, int64_t seed, int64_t fault, int64_t number) {
  ess_host::Settings settings;
  settings.fast = fast;
  settings.seed = static_cast<uint64_t>(seed);
  settings.fault = static_cast<ess_host::Fault>(fault);
  settings.fault_number = static_cast<int>(number);
  ess_host::configure(settings);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(configure, configure);
