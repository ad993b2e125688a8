// What the CUDA kernels need from the host: the current stream, the device guard, and the check after a launch.
#pragma once

#include "../common.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

namespace danling {

// Makes the tensor's device current for its lifetime and knows torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const {
    return stream_;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  DANLING_CHECK(error == cudaSuccess, name, " could not be launched: ", cudaGetErrorString(error));
}

inline void check_cuda(const Tensor& tensor, const char* name) {
  DANLING_CHECK(tensor.is_cuda(), name, " is not on a CUDA device");
}

// Index of the element that `row` belongs to, searched in [low, high]: the last one whose offset is not above the row.
__device__ inline int64_t element_of(const int64_t* offsets, int64_t low, int64_t high, int64_t row) {
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

} // namespace danling
