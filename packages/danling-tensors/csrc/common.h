// What the CPU and the CUDA library share: argument checks, allocation, and the description of a ragged batch.
//
// Only torch's stable ABI is used (torch/csrc/stable and the C functions under it), so one binary serves every torch from
// 2.10 on, and no Python symbol is needed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace danling {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "danling: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define DANLING_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::danling::fail(__VA_ARGS__);   \
    }                                 \
  } while (false)

constexpr int kMaxRagged = 8;

// Product of tensor sizes from dim `from` on.
inline int64_t tail_numel(const Tensor& tensor, int64_t from) {
  int64_t product = 1;
  for (int64_t d = from; d < tensor.dim(); ++d) {
    product *= tensor.size(d);
  }
  return product;
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// A contiguous, uninitialised tensor on the device of `like`.
inline Tensor make(const Tensor& like, const std::vector<int64_t>& shape, int32_t dtype) {
  int32_t device_type;
  int32_t device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] > 0 ? shape[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor make(const Tensor& like, const std::vector<int64_t>& shape) {
  return make(like, shape, dtype_code(like));
}

// {first, *tensor.sizes()[from:]}
inline std::vector<int64_t> shape_with(int64_t first, const Tensor& tensor, int64_t from = 1) {
  std::vector<int64_t> shape{first};
  for (int64_t d = from; d < tensor.dim(); ++d) {
    shape.push_back(tensor.size(d));
  }
  return shape;
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_rows(const Tensor& tensor, const char* name) {
  DANLING_CHECK(tensor.dim() >= 1, name, " needs at least one dim, the rows");
}

inline void check_same_device(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  DANLING_CHECK(
      a.is_cpu() == b.is_cpu() && (a.is_cpu() || a.get_device_index() == b.get_device_index()),
      a_name, " and ", b_name, " are on different devices");
}

inline Tensor check_offsets(const Tensor& offsets, const Tensor& data, const char* name) {
  DANLING_CHECK(offsets.scalar_type() == ScalarType::Long, "offsets must be int64");
  DANLING_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be one-dimensional, (B + 1,)");
  check_same_device(data, name, offsets, "offsets");
  return dense(offsets);
}

// sizes (B, k), or none for one ragged dim
inline std::optional<Tensor> check_sizes(
    const std::optional<Tensor>& sizes, int64_t batch, int64_t ragged, const Tensor& offsets) {
  DANLING_CHECK(ragged >= 1 && ragged <= kMaxRagged, "1 to ", kMaxRagged, " ragged dims are supported, not ", ragged);
  if (!sizes.has_value()) {
    DANLING_CHECK(ragged == 1, "sizes are needed for ", ragged, " ragged dims");
    return std::nullopt;
  }
  DANLING_CHECK(sizes->scalar_type() == ScalarType::Long, "sizes must be int64");
  DANLING_CHECK(
      sizes->dim() == 2 && sizes->size(0) == batch && sizes->size(1) == ragged,
      "sizes must have shape (", batch, ", ", ragged, ")");
  check_same_device(offsets, "offsets", *sizes, "sizes");
  return dense(*sizes);
}

inline void check_fill(const Tensor& fill, int32_t dtype) {
  DANLING_CHECK(fill.is_cpu() && fill.numel() == 1, "fill must be a CPU tensor of one value");
  DANLING_CHECK(dtype_code(fill) == dtype, "fill must have the dtype of the data");
}

// The tensors of a list agree in dtype, device, rank and static sizes (from dim `ragged` on); returns that rank.
inline void check_list(const std::vector<Tensor>& tensors, int64_t ragged) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    DANLING_CHECK(tensors[i].dim() >= ragged, "tensor ", i, " has fewer than ", ragged, " dims");
    DANLING_CHECK(dtype_code(tensors[i]) == dtype_code(tensors[0]), "tensors 0 and ", i, " differ in dtype");
    DANLING_CHECK(tensors[i].dim() == tensors[0].dim(), "tensors 0 and ", i, " differ in rank");
    check_same_device(tensors[0], "tensor 0", tensors[i], "another tensor");
    for (int64_t d = ragged; d < tensors[0].dim(); ++d) {
      DANLING_CHECK(
          tensors[i].size(d) == tensors[0].size(d),
          "tensors 0 and ", i, " differ in dim ", d, ": ", tensors[0].size(d), " and ", tensors[i].size(d));
    }
  }
}

inline bool is_float8(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e8m0fnu:
      return true;
    default:
      return false;
  }
}

inline bool is_integral(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

inline int32_t int64_code() {
  return aoti_torch_dtype_int64();
}

// What the library was built with, as "key=value;..."; read by danling.tensors.kernels.info().
#define DANLING_TEXT(...) #__VA_ARGS__
#define DANLING_EXPANDED(...) DANLING_TEXT(__VA_ARGS__)
#define DANLING_BUILT_WITH(more)                                                     \
  extern "C" __attribute__((visibility("default"))) const char* danling_built_with() { \
    return "torch=" DANLING_EXPANDED(TORCH_VERSION_MAJOR) "." DANLING_EXPANDED(      \
        TORCH_VERSION_MINOR) "." DANLING_EXPANDED(TORCH_VERSION_PATCH) ";interface=" \
            DANLING_EXPANDED(DANLING_INTERFACE) more;                                \
  }

} // namespace danling
