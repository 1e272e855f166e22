// Checks of the tensors that a binding is given. Only bindings include this: the kernels' files
// compile without tvm-ffi.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <limits>

#include "plan_fetch.h"

namespace ess {

using tvm::ffi::TensorView;

// Where the kernels run. The host build of the tests takes CPU tensors instead.
#ifdef ESS_HOST_SHIM
constexpr DLDeviceType kKernelDevice = kDLCPU;
constexpr const char* kKernelDeviceName = "CPU";
#else
constexpr DLDeviceType kKernelDevice = kDLCUDA;
constexpr const char* kKernelDeviceName = "CUDA";
#endif

inline void check_device(const char* name, const TensorView& tensor) {
  if (tensor.device().device_type != kKernelDevice) {
    TVM_FFI_THROW(ValueError) << name << " must be a " << kKernelDeviceName
                              << " tensor: got DLPack device type "
                              << tensor.device().device_type << ".";
  }
}

// A contiguous tensor on the device with `count` integers of `bits`, of any shape.
inline void check_integers(const char* name, const TensorView& tensor, int bits, int64_t count) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.code != kDLInt || dtype.bits != bits || dtype.lanes != 1) {
    TVM_FFI_THROW(ValueError) << name << " must be int" << bits << ": got "
                              << tvm::ffi::DLDataTypeToString(dtype) << ".";
  }
  if (tensor.numel() != count || !tensor.IsContiguous()) {
    TVM_FFI_THROW(ValueError) << name << " must be contiguous with " << count
                              << " elements: got shape " << tensor.shape() << ", strides "
                              << tensor.strides() << ".";
  }
  check_device(name, tensor);
}

struct RowLayout {
  int64_t row_bytes;
  int64_t stride_bytes;
};

// Rows [n, ...] of any dtype: bytes of one row and from one to the next.
inline RowLayout check_rows(const char* name, const TensorView& rows) {
  const int64_t item_bytes = rows.dtype().bits * rows.dtype().lanes / 8;
  if (rows.ndim() < 2) {
    TVM_FFI_THROW(ValueError) << name << " must be [rows, ...]: got shape " << rows.shape() << ".";
  }
  int64_t items = 1;
  bool dense = true;
  for (int d = rows.ndim() - 1; d > 0; --d) {
    dense = dense && (rows.size(d) == 1 || rows.stride(d) == items);
    items *= rows.size(d);
  }
  const RowLayout layout{items * item_bytes, rows.stride(0) * item_bytes};
  if (!dense || layout.row_bytes == 0 || layout.row_bytes % kAccessBytes != 0 ||
      layout.stride_bytes % kAccessBytes != 0) {
    TVM_FFI_THROW(ValueError) << "a row of " << name << " must be dense, of a multiple of "
                              << kAccessBytes << " bytes and as far from the next: got shape "
                              << rows.shape() << ", strides " << rows.strides() << " of "
                              << item_bytes << " B.";
  }
  if (reinterpret_cast<uintptr_t>(rows.data_ptr()) % kAccessBytes != 0) {
    TVM_FFI_THROW(ValueError) << name << " must start at a multiple of " << kAccessBytes
                              << " bytes: got " << rows.data_ptr()
                              << ". Pass an unsliced allocation, or slice whole rows.";
  }
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (rows.size(0) > most || layout.stride_bytes / kAccessBytes > most) {
    TVM_FFI_THROW(ValueError) << name << " must have less than 2^31 rows of less than 2^31 words "
                              << "of 16 bytes: got shape " << rows.shape() << ", strides "
                              << rows.strides() << ".";
  }
  return layout;
}

inline RowFormat check_format(const char* from_name, const TensorView& from, const char* to_name,
                              const TensorView& to) {
  const RowLayout a = check_rows(from_name, from), b = check_rows(to_name, to);
  if (a.row_bytes != b.row_bytes) {
    TVM_FFI_THROW(ValueError) << "a row of " << from_name << " must be as long as one of "
                              << to_name << ": got " << a.row_bytes << " and " << b.row_bytes
                              << " bytes.";
  }
  return {static_cast<int>(a.row_bytes / kAccessBytes),
          static_cast<int>(a.stride_bytes / kAccessBytes),
          static_cast<int>(b.stride_bytes / kAccessBytes)};
}

inline int check_blocks(int64_t max_blocks) {
  if (max_blocks < 1 || max_blocks > std::numeric_limits<int32_t>::max()) {
    TVM_FFI_THROW(ValueError) << "max_blocks must be 1 or more: got " << max_blocks << ".";
  }
  return static_cast<int>(max_blocks);
}

// The current stream of the device that `tensor` is on; torch's, where torch is the caller.
inline void* stream_of(const TensorView& tensor) {
  return TVMFFIEnvGetStream(tensor.device().device_type, tensor.device().device_id);
}

inline void check_launch(const char* name, const char* error) {
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << name << " was not launched: " << error;
}

}  // namespace ess
