// Every other name that the libraries import: said once, then "not supported" by CUDA itself,
// success by the libraries that compute. build.py writes stubs.inc; no header of CUDA here: it
// declares the same names with their arguments.
#include <string>

void say(bool trace, const char* kind, const char* format, ...);

static int answer(const std::string& name) {
  const int not_supported = 801;  // cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED
  return name.rfind("cu", 0) == 0 && name.rfind("cublas", 0) != 0 ? not_supported : 0;
}

#define STUB(name)                                                  \
  extern "C" __attribute__((visibility("default"))) int name(...) { \
    static bool said = false;                                       \
    if (!said) say(false, "STUB", "%s", #name);                     \
    said = true;                                                    \
    return answer(#name);                                           \
  }
#include "stubs.inc"
