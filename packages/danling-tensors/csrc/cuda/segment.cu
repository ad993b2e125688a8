// Reductions, normalisations and scans over each element's rows.
//
// One block handles one element and a stretch of columns: its threads form `lanes` rows of `width` columns, width being the
// number of columns up to a warp. Each thread folds every lanes-th row, then the lanes are combined in a fixed order: no
// atomics, the same bits on every run. An element that leaves the rows it should lie in counts as empty.

#include "launch.cuh"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

namespace danling {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;

struct Segments {
  const int64_t* offsets;
  int64_t batch;
  int64_t rows;
  int64_t columns;
};

struct Shape {
  int width; // columns side by side, a power of two up to 32
  int lanes;

  explicit Shape(int64_t columns) {
    width = 1;
    while (width < columns && width < 32) {
      width *= 2;
    }
    lanes = kThreads / width;
  }

  dim3 block() const {
    return dim3(width, lanes);
  }

  dim3 grid(const Segments& s) const {
    const int64_t stretches = (s.columns + width - 1) / width;
    return dim3(
        static_cast<unsigned>(std::min<int64_t>(s.batch, 2147483647)),
        static_cast<unsigned>(std::min<int64_t>(stretches, 65535)));
  }
};

// Calls body(element, first row, rows, column, whether the column exists) for all that this block has to do. All threads of a
// block make the same calls, so body may synchronise.
template <typename Body>
__device__ void each(const Segments& s, const Body& body) {
  for (int64_t element = blockIdx.x; element < s.batch; element += gridDim.x) {
    int64_t first = s.offsets[element];
    int64_t count = s.offsets[element + 1] - first;
    if (first < 0 || count < 0 || count > s.rows || first > s.rows - count) {
      first = 0;
      count = 0;
    }
    for (int64_t stretch = blockIdx.y; stretch * blockDim.x < s.columns; stretch += gridDim.y) {
      const int64_t column = stretch * blockDim.x + threadIdx.x;
      body(element, first, count, column, column < s.columns);
    }
  }
}

// Combines the lanes' partial results; every thread gets that of its column. The order depends on the block's shape alone.
template <typename V, typename Combine>
__device__ V across_lanes(V value, const Combine& combine) {
  __shared__ alignas(16) unsigned char memory[kThreads * sizeof(V)];
  V* shared = reinterpret_cast<V*>(memory);
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads(); // the memory may still be read from the last call
  shared[at] = value;
  __syncthreads();
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      shared[at] = combine(shared[at], shared[at + half * blockDim.x]);
    }
    __syncthreads();
  }
  return shared[threadIdx.x];
}

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// Values of a floating dtype, computed with in V
template <typename T, typename V_>
struct Floats {
  using V = V_;
  static constexpr bool kFloating = true;
  const T* in;
  T* out;

  __device__ V load(int64_t i) const {
    return static_cast<V>(in[i]);
  }
  __device__ void store(int64_t i, V value) const {
    out[i] = static_cast<T>(value);
  }
  __device__ void store_sum(int64_t i, V value) const {
    store(i, value);
  }
};

// Values of any integer dtype or bool, computed with in int64; one kernel serves all, the width is looked up on the way.
// Sums are stored as int64. uint64 is compared with its sign bit turned over, which keeps its order.
struct Integers {
  using V = int64_t;
  static constexpr bool kFloating = false;
  const void* in;
  void* out;
  int bytes;
  bool sign;
  int64_t flip;

  __device__ V load(int64_t i) const {
    switch (bytes) {
      case 1:
        return sign ? static_cast<int64_t>(static_cast<const int8_t*>(in)[i]) : static_cast<const uint8_t*>(in)[i];
      case 2:
        return sign ? static_cast<int64_t>(static_cast<const int16_t*>(in)[i]) : static_cast<const uint16_t*>(in)[i];
      case 4:
        return sign ? static_cast<int64_t>(static_cast<const int32_t*>(in)[i]) : static_cast<const uint32_t*>(in)[i];
      default:
        return static_cast<const int64_t*>(in)[i] ^ flip;
    }
  }
  __device__ void store(int64_t i, V value) const {
    switch (bytes) {
      case 1:
        static_cast<uint8_t*>(out)[i] = static_cast<uint8_t>(value);
        return;
      case 2:
        static_cast<uint16_t*>(out)[i] = static_cast<uint16_t>(value);
        return;
      case 4:
        static_cast<uint32_t*>(out)[i] = static_cast<uint32_t>(value);
        return;
      default:
        static_cast<int64_t*>(out)[i] = value ^ flip;
    }
  }
  __device__ void store_sum(int64_t i, V value) const {
    static_cast<int64_t*>(out)[i] = value;
  }
};

template <typename Data>
__global__ void __launch_bounds__(kThreads) sum_kernel(Segments s, Data data, bool mean) {
  using V = typename Data::V;
  each(s, [&](int64_t element, int64_t first, int64_t count, int64_t column, bool inside) {
    V sum = 0;
    for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
      sum += data.load((first + r) * s.columns + column);
    }
    sum = across_lanes(sum, Add{});
    if (inside && threadIdx.y == 0) {
      data.store_sum(element * s.columns + column, mean ? sum / static_cast<V>(count) : sum);
    }
  });
}

template <typename V>
struct Found {
  V value;
  int64_t position; // -1: nothing yet
};

// The larger (or smaller) value wins, NaN over all, the earlier of equals.
template <bool kLargest>
struct Better {
  template <typename V>
  __device__ Found<V> operator()(const Found<V>& a, const Found<V>& b) const {
    if (b.position < 0) {
      return a;
    }
    if (a.position < 0) {
      return b;
    }
    const bool a_nan = a.value != a.value;
    const bool b_nan = b.value != b.value;
    if (a_nan || b_nan || a.value == b.value) {
      if (a_nan != b_nan) {
        return a_nan ? a : b;
      }
      return a.position < b.position ? a : b;
    }
    return (a.value > b.value) == kLargest ? a : b;
  }
};

template <bool kLargest, typename Data>
__global__ void __launch_bounds__(kThreads)
    extremum_kernel(Segments s, Data data, int64_t* positions, typename Data::V worst) {
  using V = typename Data::V;
  const Better<kLargest> better;
  each(s, [&](int64_t element, int64_t first, int64_t count, int64_t column, bool inside) {
    Found<V> best{worst, -1};
    for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
      best = better(best, Found<V>{data.load((first + r) * s.columns + column), r});
    }
    best = across_lanes(best, better);
    if (inside && threadIdx.y == 0) {
      data.store(element * s.columns + column, best.value);
      positions[element * s.columns + column] = best.position;
    }
  });
}

struct Larger {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a >= b || a != a ? a : b; // NaN stays
  }
};

template <typename Data>
__device__ typename Data::V largest(const Data& data, const Segments& s, int64_t first, int64_t count, int64_t column, bool inside) {
  using V = typename Data::V;
  V best = static_cast<V>(-INFINITY);
  for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
    best = Larger{}(best, data.load((first + r) * s.columns + column));
  }
  return across_lanes(best, Larger{});
}

template <typename Data>
__device__ typename Data::V sum_of_exponentials(
    const Data& data, const Segments& s, int64_t first, int64_t count, int64_t column, bool inside, typename Data::V shift) {
  typename Data::V sum = 0;
  for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
    sum += exp(data.load((first + r) * s.columns + column) - shift);
  }
  return across_lanes(sum, Add{});
}

template <typename Data>
__global__ void __launch_bounds__(kThreads) softmax_kernel(Segments s, Data data, bool logarithm) {
  using V = typename Data::V;
  each(s, [&](int64_t, int64_t first, int64_t count, int64_t column, bool inside) {
    const V shift = largest(data, s, first, count, column, inside);
    const V total = sum_of_exponentials(data, s, first, count, column, inside, shift);
    const V log_total = log(total);
    for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
      const int64_t at = (first + r) * s.columns + column;
      const V shifted = data.load(at) - shift;
      data.store(at, logarithm ? shifted - log_total : exp(shifted) / total);
    }
  });
}

template <typename Data>
__global__ void __launch_bounds__(kThreads) logsumexp_kernel(Segments s, Data data) {
  using V = typename Data::V;
  each(s, [&](int64_t element, int64_t first, int64_t count, int64_t column, bool inside) {
    V shift = largest(data, s, first, count, column, inside);
    shift = isinf(shift) ? V(0) : shift; // inf - inf would be NaN
    const V total = sum_of_exponentials(data, s, first, count, column, inside, shift);
    if (inside && threadIdx.y == 0) {
      data.store(element * s.columns + column, log(total) + shift);
    }
  });
}

template <typename Data>
__global__ void __launch_bounds__(kThreads)
    softmax_backward_kernel(Segments s, Data grad, Data output, bool logarithm) {
  using V = typename Data::V;
  each(s, [&](int64_t, int64_t first, int64_t count, int64_t column, bool inside) {
    V sum = 0;
    for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
      const int64_t at = (first + r) * s.columns + column;
      sum += logarithm ? grad.load(at) : grad.load(at) * output.load(at);
    }
    sum = across_lanes(sum, Add{});
    for (int64_t r = threadIdx.y; inside && r < count; r += blockDim.y) {
      const int64_t at = (first + r) * s.columns + column;
      const V g = grad.load(at);
      const V y = output.load(at);
      grad.store(at, logarithm ? g - exp(y) * sum : y * (g - sum));
    }
  });
}

// Each lane owns a stretch of consecutive rows: it sums it, learns the sum of the lanes before it, and runs through it again.
template <typename Data>
__global__ void __launch_bounds__(kThreads) cumsum_kernel(Segments s, Data data, bool reverse) {
  using V = typename Data::V;
  __shared__ alignas(16) unsigned char memory[kThreads * sizeof(V)];
  V* shared = reinterpret_cast<V*>(memory);
  each(s, [&](int64_t, int64_t first, int64_t count, int64_t column, bool inside) {
    const int64_t share = (count + blockDim.y - 1) / blockDim.y;
    const int64_t begin = min(count, share * threadIdx.y);
    const int64_t end = min(count, begin + share);
    V sum = 0;
    for (int64_t r = begin; inside && r < end; ++r) {
      sum += data.load((first + (reverse ? count - 1 - r : r)) * s.columns + column);
    }
    __syncthreads();
    shared[threadIdx.y * blockDim.x + threadIdx.x] = sum;
    __syncthreads();
    V running = 0;
    for (int lane = 0; lane < static_cast<int>(threadIdx.y); ++lane) {
      running += shared[lane * blockDim.x + threadIdx.x];
    }
    for (int64_t r = begin; inside && r < end; ++r) {
      const int64_t at = (first + (reverse ? count - 1 - r : r)) * s.columns + column;
      running += data.load(at);
      data.store_sum(at, running);
    }
  });
}

bool is_complex(ScalarType dtype) {
  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble;
}

// Inputs as the kernels want them: float8 widened to float (and its results narrowed again), contiguous, with checked offsets.
struct Input {
  ScalarType given;
  Tensor values;
  Tensor offsets;
  ScalarType dtype;
  Segments segments;

  Input(const Tensor& values_, const Tensor& offsets_, bool complex = false)
      : given(values_.scalar_type()),
        values(widen(values_, complex)),
        offsets(check_offsets(offsets_, values_, "values")),
        dtype(values.scalar_type()),
        segments{
            static_cast<const int64_t*>(offsets.const_data_ptr()), offsets.size(0) - 1, values.size(0),
            tail_numel(values, 1) * (is_complex(dtype) ? 2 : 1)} {}

  static Tensor widen(const Tensor& values, bool complex) {
    check_cuda(values, "values");
    check_rows(values, "values");
    DANLING_CHECK(complex || !is_complex(values.scalar_type()), "complex values have no order");
    return dense(is_float8(values.scalar_type()) ? torch::stable::to(values, ScalarType::Float) : values);
  }

  Tensor like_segments(bool sums = false) const {
    return make(values, shape_with(segments.batch, values), sums ? sum_code() : dtype_code(values));
  }

  Tensor like_rows(bool sums = false) const {
    return make(values, shape_with(segments.rows, values), sums ? sum_code() : dtype_code(values));
  }

  int32_t sum_code() const {
    return is_integral(dtype) ? int64_code() : dtype_code(values);
  }

  Tensor narrow(const Tensor& result) const {
    return is_float8(given) ? torch::stable::to(result, given) : result;
  }
};

template <typename T, typename V>
Floats<T, V> floats(const Tensor& in, const Tensor& out) {
  return {static_cast<const T*>(in.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr())};
}

template <typename Body>
void with_floats(const char* name, const Input& input, const Tensor& in, const Tensor& out, const Body& body) {
  switch (input.dtype) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return body(floats<float, float>(in, out));
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return body(floats<double, double>(in, out));
    case ScalarType::Half:
    case ScalarType::ComplexHalf:
      return body(floats<Half, float>(in, out));
    case ScalarType::BFloat16:
      return body(floats<BFloat16, float>(in, out));
    default:
      fail(name, " does not take values of this dtype");
  }
}

Integers integers(const Input& input, const Tensor& out, bool ordered) {
  const bool sign = input.dtype == ScalarType::Char || input.dtype == ScalarType::Short ||
      input.dtype == ScalarType::Int || input.dtype == ScalarType::Long;
  const bool turn = ordered && input.dtype == ScalarType::UInt64;
  return {
      input.values.const_data_ptr(), out.mutable_data_ptr(), static_cast<int>(input.values.element_size()), sign,
      turn ? INT64_MIN : 0};
}

template <typename Body>
void with_any(const char* name, const Input& input, const Tensor& out, bool ordered, const Body& body) {
  if (is_integral(input.dtype)) {
    return body(integers(input, out, ordered));
  }
  with_floats(name, input, input.values, out, body);
}

bool nothing_to_do(const Input& input) {
  return input.segments.batch == 0 || input.segments.columns == 0;
}

Tensor reduce_sum(const char* name, const Tensor& values, const Tensor& offsets, bool mean) {
  const Input input(values, offsets, true);
  DANLING_CHECK(!mean || !is_integral(input.dtype), name, " does not take values of this dtype");
  const Tensor result = input.like_segments(true);
  if (nothing_to_do(input)) {
    return input.narrow(result);
  }
  const OnDevice device(input.values);
  const Shape shape(input.segments.columns);
  with_any(name, input, result, false, [&](auto data) {
    sum_kernel<<<shape.grid(input.segments), shape.block(), 0, device.stream()>>>(input.segments, data, mean);
  });
  check_launch(name);
  return input.narrow(result);
}

Tensor segment_sum(const Tensor& values, const Tensor& offsets) {
  return reduce_sum("segment_sum", values, offsets, false);
}

Tensor segment_mean(const Tensor& values, const Tensor& offsets) {
  return reduce_sum("segment_mean", values, offsets, true);
}

// What an empty element gives: the value that loses every comparison, as the kernel computes with it
int64_t worst_integer(ScalarType dtype, bool largest) {
  switch (dtype) {
    case ScalarType::Bool:
      return largest ? 0 : 1;
    case ScalarType::Byte:
      return largest ? 0 : UINT8_MAX;
    case ScalarType::Char:
      return largest ? INT8_MIN : INT8_MAX;
    case ScalarType::Short:
      return largest ? INT16_MIN : INT16_MAX;
    case ScalarType::UInt16:
      return largest ? 0 : UINT16_MAX;
    case ScalarType::Int:
      return largest ? INT32_MIN : INT32_MAX;
    case ScalarType::UInt32:
      return largest ? 0 : static_cast<int64_t>(UINT32_MAX);
    default: // uint64 too, whose sign bit is turned over
      return largest ? INT64_MIN : INT64_MAX;
  }
}

template <bool kLargest>
std::tuple<Tensor, Tensor> segment_extremum(const Tensor& values, const Tensor& offsets) {
  const char* name = kLargest ? "segment_max" : "segment_min";
  const Input input(values, offsets);
  const Tensor result = input.like_segments();
  const Tensor positions = make(input.values, shape_with(input.segments.batch, input.values), int64_code());
  if (nothing_to_do(input)) {
    return {input.narrow(result), positions};
  }
  const OnDevice device(input.values);
  const Shape shape(input.segments.columns);
  with_any(name, input, result, true, [&](auto data) {
    using Data = decltype(data);
    typename Data::V worst;
    if constexpr (Data::kFloating) {
      worst = static_cast<typename Data::V>(kLargest ? -INFINITY : INFINITY);
    } else {
      worst = worst_integer(input.dtype, kLargest);
    }
    extremum_kernel<kLargest><<<shape.grid(input.segments), shape.block(), 0, device.stream()>>>(
        input.segments, data, static_cast<int64_t*>(positions.mutable_data_ptr()), worst);
  });
  check_launch(name);
  return {input.narrow(result), positions};
}

Tensor segment_softmax(const Tensor& values, const Tensor& offsets, bool logarithm) {
  const Input input(values, offsets);
  const Tensor result = input.like_rows();
  const OnDevice device(input.values);
  const Shape shape(input.segments.columns);
  with_floats("segment_softmax", input, input.values, result, [&](auto data) {
    if (!nothing_to_do(input)) {
      softmax_kernel<<<shape.grid(input.segments), shape.block(), 0, device.stream()>>>(
          input.segments, data, logarithm);
    }
  });
  check_launch("segment_softmax");
  return input.narrow(result);
}

Tensor segment_softmax_backward(const Tensor& grad, const Tensor& output, const Tensor& offsets, bool logarithm) {
  const Input input(grad, offsets);
  DANLING_CHECK(dtype_code(grad) == dtype_code(output), "grad and output differ in dtype");
  check_same_device(grad, "grad", output, "output");
  DANLING_CHECK(grad.dim() == output.dim(), "grad and output differ in rank");
  for (int64_t d = 0; d < grad.dim(); ++d) {
    DANLING_CHECK(grad.size(d) == output.size(d), "grad and output differ in shape");
  }
  const Tensor out = Input::widen(output, false);
  const Tensor result = input.like_rows();
  const OnDevice device(input.values);
  const Shape shape(input.segments.columns);
  with_floats("segment_softmax_backward", input, input.values, result, [&](auto data) {
    if (!nothing_to_do(input)) {
      auto given = data;
      given.in = static_cast<decltype(given.in)>(out.const_data_ptr());
      softmax_backward_kernel<<<shape.grid(input.segments), shape.block(), 0, device.stream()>>>(
          input.segments, data, given, logarithm);
    }
  });
  check_launch("segment_softmax_backward");
  return input.narrow(result);
}

Tensor segment_logsumexp(const Tensor& values, const Tensor& offsets) {
  const Input input(values, offsets);
  const Tensor result = input.like_segments();
  const OnDevice device(input.values);
  const Shape shape(input.segments.columns);
  with_floats("segment_logsumexp", input, input.values, result, [&](auto data) {
    if (!nothing_to_do(input)) {
      logsumexp_kernel<<<shape.grid(input.segments), shape.block(), 0, device.stream()>>>(input.segments, data);
    }
  });
  check_launch("segment_logsumexp");
  return input.narrow(result);
}

Tensor segment_cumsum(const Tensor& values, const Tensor& offsets, bool reverse) {
  const Input input(values, offsets, true);
  const Tensor result = input.like_rows(true);
  if (nothing_to_do(input)) {
    return input.narrow(result);
  }
  const OnDevice device(input.values);
  const Shape shape(input.segments.columns);
  with_any("segment_cumsum", input, result, false, [&](auto data) {
    cumsum_kernel<<<shape.grid(input.segments), shape.block(), 0, device.stream()>>>(input.segments, data, reverse);
  });
  check_launch("segment_cumsum");
  return input.narrow(result);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CUDA, m) {
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("segment_mean", TORCH_BOX(&segment_mean));
  m.impl("segment_max", TORCH_BOX(&segment_extremum<true>));
  m.impl("segment_min", TORCH_BOX(&segment_extremum<false>));
  m.impl("segment_softmax", TORCH_BOX(&segment_softmax));
  m.impl("segment_softmax_backward", TORCH_BOX(&segment_softmax_backward));
  m.impl("segment_logsumexp", TORCH_BOX(&segment_logsumexp));
  m.impl("segment_cumsum", TORCH_BOX(&segment_cumsum));
}

} // namespace danling
