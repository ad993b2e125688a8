// Reductions, normalisations and scans over each element's rows.
//
// Every loop runs along a row, which is contiguous and needs no gather, and keeps one accumulator per column. One element is
// always reduced by one thread in one order, so results do not depend on the number of threads; elements are dealt out by
// their rows. Accumulators are float for float16 and bfloat16, double for running sums of float, int64 for integers.

#include "../common.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace danling {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
constexpr bool is_narrow = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;
template <typename T>
constexpr bool is_floating = std::is_floating_point_v<T> || is_narrow<T>;

// What sums are formed in
template <typename T>
using Sum = std::conditional_t<is_narrow<T>, float, std::conditional_t<is_floating<T>, T, int64_t>>;
// What running sums are formed in, as torch does on the CPU
template <typename T>
using Running = std::conditional_t<std::is_same_v<T, float>, double, Sum<T>>;
// What values are compared in
template <typename T>
using Ordered = std::conditional_t<is_narrow<T>, float, T>;
// What sums are returned in
template <typename T>
using SumResult = std::conditional_t<is_floating<T>, T, int64_t>;

// exp, as a polynomial that compilers turn into vector code; within 2 units in the last place, 0 below -87.3, inf above 88.7
inline float exponential(float x) {
  constexpr float kMagic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x); // NaN stays
  const float shifted = clamped * 1.44269504088896341f + kMagic;
  const float count = shifted - kMagic;
  float rest = clamped - count * 0.693359375f; // ln 2 in two parts
  rest = rest + count * 2.12194440e-4f;
  float p = 1.9875691500e-4f; // coefficients of the Cephes library's expf
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  // 2^count in two factors: count reaches 128, one more than an exponent holds
  const int32_t power = (bits & 0x1ff) - ((bits & 0x100) << 1);
  const int32_t half = power >> 1;
  const int32_t low = (half + 127) << 23;
  const int32_t high = (power - half + 127) << 23;
  float a;
  float b;
  std::memcpy(&a, &low, sizeof(a));
  std::memcpy(&b, &high, sizeof(b));
  const float value = p * a * b;
  return x < -87.3f ? 0.0f : (x > 88.7f ? std::numeric_limits<float>::infinity() : value);
}

inline double exponential(double x) {
  return std::exp(x);
}

struct Segments {
  int64_t batch;
  int64_t rows;
  int64_t columns;
  const int64_t* offsets;

  Segments(const Tensor& offsets_, const Tensor& values, int64_t width)
      : batch(offsets_.size(0) - 1),
        rows(values.size(0)),
        columns(tail_numel(values, 1) * width),
        offsets(static_cast<const int64_t*>(offsets_.const_data_ptr())) {
    DANLING_CHECK(
        offsets[0] == 0 && offsets[batch] == rows, "offsets must begin at 0 and end at ", rows, ", the number of rows");
    for (int64_t i = 0; i < batch; ++i) {
      DANLING_CHECK(offsets[i] <= offsets[i + 1], "offsets decrease at element ", i);
    }
  }

  // body(element, first row, number of rows), each element once. An element is dealt to the piece of work that holds its
  // first row; counting one more place per element gives empty ones a place too.
  template <typename Body>
  void each(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(0, rows + batch, grain, [&](int64_t begin, int64_t end) {
      int64_t low = 0;
      int64_t high = batch;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (offsets[middle] + middle < begin) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      for (; low < batch && offsets[low] + low < end; ++low) {
        body(low, offsets[low], offsets[low + 1] - offsets[low]);
      }
    });
  }
};

// total[c] = sum of f(r, c) over rows, in blocks so that rounding errors stay small. Four rows at a time spare the
// accumulators' way through memory; `data` is what f reads, fetched ahead because four streams in a page outwit the CPU's own
// prefetcher.
template <typename Acc, typename T, typename F>
void sum_rows(
    Acc* __restrict total, Acc* __restrict block, const T* data, int64_t rows, int64_t columns, const F& f) {
  std::fill(total, total + columns, Acc(0));
  constexpr int64_t kBlock = 128;
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t stop = std::min(rows, first + kBlock);
    Acc* __restrict out = rows <= kBlock ? total : block;
    if (rows > kBlock) {
      std::fill(block, block + columns, Acc(0));
    }
    int64_t r = first;
    for (; r + 4 <= stop; r += 4) {
      const char* ahead = reinterpret_cast<const char*>(data + (r + 4) * columns);
      const int64_t bytes = std::min<int64_t>(4, rows - r - 4) * columns * static_cast<int64_t>(sizeof(T));
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(ahead + at);
      }
      for (int64_t c = 0; c < columns; ++c) {
        out[c] += (f(r, c) + f(r + 1, c)) + (f(r + 2, c) + f(r + 3, c));
      }
    }
    for (; r < stop; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        out[c] += f(r, c);
      }
    }
    if (rows > kBlock) {
      for (int64_t c = 0; c < columns; ++c) {
        total[c] += block[c];
      }
    }
  }
}

// The same for f that depends on the flat index alone. Few columns are read as fewer, wider rows, so that vectors fill.
template <typename Acc, typename T, typename F>
void sum_flat(
    Acc* __restrict total, std::vector<Acc>& scratch, const T* data, int64_t rows, int64_t columns, const F& f) {
  const int64_t fold = columns >= 16 || columns == 0 ? 1 : 32 / columns;
  const int64_t wide = columns * fold;
  scratch.resize(2 * wide);
  Acc* sums = fold == 1 ? total : scratch.data();
  sum_rows<Acc>(
      sums, scratch.data() + wide, data, rows / fold, wide, [&](int64_t r, int64_t c) { return f(r * wide + c); });
  if (fold == 1) {
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    Acc sum = 0;
    for (int64_t j = 0; j < fold; ++j) {
      sum += sums[j * columns + c];
    }
    for (int64_t r = rows / fold * fold; r < rows; ++r) {
      sum += f(r * columns + c);
    }
    total[c] = sum;
  }
}

template <typename T>
void sum_kernel(const Segments& s, const T* in, SumResult<T>* out, bool mean) {
  s.each([&](int64_t i, int64_t first, int64_t count) {
    thread_local std::vector<Sum<T>> scratch;
    thread_local std::vector<Sum<T>> total;
    total.resize(s.columns);
    const T* x = in + first * s.columns;
    sum_flat<Sum<T>>(
        total.data(), scratch, x, count, s.columns, [x](int64_t j) { return static_cast<Sum<T>>(x[j]); });
    SumResult<T>* y = out + i * s.columns;
    for (int64_t c = 0; c < s.columns; ++c) {
      if constexpr (is_floating<T>) {
        y[c] = static_cast<T>(mean ? total[c] / static_cast<Sum<T>>(count) : total[c]);
      } else {
        y[c] = total[c];
      }
    }
  });
}

// Updates best and where with rows [begin, end); positions are counted from `begin` in a type as wide as the values, which
// lets the comparison mask select both. NaN beats everything and the first of equals stays.
template <bool kLargest, typename V, typename Index>
void extremum_rows(
    const V* __restrict x, V* __restrict best, Index* __restrict where, int64_t columns, Index position) {
  for (int64_t c = 0; c < columns; ++c) {
    const V value = x[c];
    const V old = best[c];
    const bool worse = kLargest ? value <= old : value >= old;
    const bool better = !worse & (old == old);
    best[c] = better ? value : old;
    where[c] = better ? position : where[c];
  }
}

// `none` is what an empty element gives.
template <bool kLargest, typename T>
void extremum_kernel(const Segments& s, const T* in, T* out, int64_t* positions, T none) {
  using V = Ordered<T>;
  using Index = std::conditional_t<sizeof(V) == 8, int64_t, int32_t>;
  constexpr int64_t kChunk = int64_t{1} << 30; // rows that an Index can count
  s.each([&](int64_t i, int64_t first, int64_t count) {
    T* y = out + i * s.columns;
    int64_t* p = positions + i * s.columns;
    if (count == 0) {
      std::fill(y, y + s.columns, none);
      std::fill(p, p + s.columns, int64_t{-1});
      return;
    }
    thread_local std::vector<V> best;
    thread_local std::vector<V> row;
    thread_local std::vector<Index> where;
    const T* x = in + first * s.columns;
    best.assign(x, x + s.columns);
    where.resize(s.columns);
    row.resize(s.columns);
    std::fill(p, p + s.columns, int64_t{0});
    for (int64_t start = 0; start < count; start += kChunk) {
      const int64_t stop = std::min(count, start + kChunk);
      std::fill(where.begin(), where.end(), Index{-1});
      for (int64_t r = start; r < stop; ++r) {
        const T* xr = x + r * s.columns;
        const V* values;
        if constexpr (std::is_same_v<T, V>) {
          values = xr;
        } else {
          for (int64_t c = 0; c < s.columns; ++c) {
            row[c] = static_cast<V>(xr[c]);
          }
          values = row.data();
        }
        extremum_rows<kLargest>(values, best.data(), where.data(), s.columns, static_cast<Index>(r - start));
      }
      for (int64_t c = 0; c < s.columns; ++c) {
        p[c] = where[c] >= 0 ? start + where[c] : p[c];
      }
    }
    for (int64_t c = 0; c < s.columns; ++c) {
      y[c] = static_cast<T>(best[c]);
    }
  });
}

// The value that loses every comparison
template <bool kLargest, typename T>
T worst() {
  if constexpr (is_floating<T>) {
    const float infinity = std::numeric_limits<float>::infinity();
    return static_cast<T>(kLargest ? -infinity : infinity);
  } else {
    return kLargest ? std::numeric_limits<T>::lowest() : std::numeric_limits<T>::max();
  }
}

template <typename V, typename T>
void maximum(std::vector<V>& best, const T* x, int64_t rows, int64_t columns) {
  best.assign(x, x + columns);
  V* __restrict b = best.data();
  for (int64_t r = 1; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const V value = static_cast<V>(x[r * columns + c]);
      b[c] = value <= b[c] || b[c] != b[c] ? b[c] : value;
    }
  }
}

template <typename T>
void softmax_kernel(const Segments& s, const T* in, T* out, bool log) {
  using V = Ordered<T>;
  s.each([&](int64_t, int64_t first, int64_t count) {
    if (count == 0) {
      return;
    }
    thread_local std::vector<V> best;
    thread_local std::vector<V> total;
    thread_local std::vector<V> block;
    const int64_t columns = s.columns;
    const T* __restrict x = in + first * columns;
    T* __restrict y = out + first * columns;
    maximum(best, x, count, columns);
    total.resize(columns);
    block.resize(columns);
    V* __restrict b = best.data();
    V* __restrict t = total.data();
    if (columns == 1) {
      sum_flat<V>(t, block, x, count, 1, [=](int64_t j) { return exponential(static_cast<V>(x[j]) - b[0]); });
    } else {
      sum_rows<V>(t, block.data(), x, count, columns, [=](int64_t r, int64_t c) {
        return exponential(static_cast<V>(x[r * columns + c]) - b[c]);
      });
    }
    if (log) {
      for (int64_t c = 0; c < columns; ++c) {
        t[c] = std::log(t[c]);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const T* __restrict xr = x + r * columns;
      T* __restrict yr = y + r * columns;
      if (log) {
        for (int64_t c = 0; c < columns; ++c) {
          yr[c] = static_cast<T>(static_cast<V>(xr[c]) - b[c] - t[c]);
        }
      } else {
        for (int64_t c = 0; c < columns; ++c) {
          yr[c] = static_cast<T>(exponential(static_cast<V>(xr[c]) - b[c]) / t[c]);
        }
      }
    }
  });
}

template <typename T>
void softmax_backward_kernel(const Segments& s, const T* grad, const T* output, T* out, bool log) {
  using V = Ordered<T>;
  s.each([&](int64_t, int64_t first, int64_t count) {
    thread_local std::vector<V> total;
    thread_local std::vector<V> scratch;
    const int64_t columns = s.columns;
    const T* __restrict g = grad + first * columns;
    const T* __restrict y = output + first * columns;
    T* __restrict x = out + first * columns;
    total.resize(columns);
    if (log) {
      sum_flat<V>(total.data(), scratch, g, count, columns, [=](int64_t j) { return static_cast<V>(g[j]); });
    } else {
      sum_flat<V>(total.data(), scratch, g, count, columns, [=](int64_t j) {
        return static_cast<V>(g[j]) * static_cast<V>(y[j]);
      });
    }
    const V* __restrict t = total.data();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * columns;
      for (int64_t c = 0; c < columns; ++c) {
        const V gv = static_cast<V>(g[at + c]);
        const V yv = static_cast<V>(y[at + c]);
        x[at + c] = static_cast<T>(log ? gv - exponential(yv) * t[c] : yv * (gv - t[c]));
      }
    }
  });
}

template <typename T>
void logsumexp_kernel(const Segments& s, const T* in, T* out) {
  using V = Ordered<T>;
  s.each([&](int64_t i, int64_t first, int64_t count) {
    const int64_t columns = s.columns;
    T* y = out + i * columns;
    if (count == 0) {
      std::fill(y, y + columns, static_cast<T>(-std::numeric_limits<float>::infinity()));
      return;
    }
    thread_local std::vector<V> best;
    thread_local std::vector<V> total;
    thread_local std::vector<V> block;
    const T* __restrict x = in + first * columns;
    maximum(best, x, count, columns);
    total.resize(columns);
    block.resize(columns);
    V* __restrict b = best.data();
    for (int64_t c = 0; c < columns; ++c) {
      b[c] = std::isinf(b[c]) ? V(0) : b[c]; // inf - inf would be NaN
    }
    if (columns == 1) {
      sum_flat<V>(
          total.data(), block, x, count, 1, [=](int64_t j) { return exponential(static_cast<V>(x[j]) - b[0]); });
    } else {
      sum_rows<V>(total.data(), block.data(), x, count, columns, [=](int64_t r, int64_t c) {
        return exponential(static_cast<V>(x[r * columns + c]) - b[c]);
      });
    }
    for (int64_t c = 0; c < columns; ++c) {
      y[c] = static_cast<T>(std::log(total[c]) + b[c]);
    }
  });
}

template <typename T>
void cumsum_kernel(const Segments& s, const T* in, SumResult<T>* out, bool reverse) {
  using Acc = Running<T>;
  s.each([&](int64_t, int64_t first, int64_t count) {
    thread_local std::vector<Acc> total;
    const int64_t columns = s.columns;
    total.assign(columns, Acc(0));
    Acc* __restrict t = total.data();
    for (int64_t step = 0; step < count; ++step) {
      const int64_t row = (first + (reverse ? count - 1 - step : step)) * columns;
      const T* __restrict x = in + row;
      SumResult<T>* __restrict y = out + row;
      for (int64_t c = 0; c < columns; ++c) {
        t[c] += static_cast<Acc>(x[c]);
        y[c] = static_cast<SumResult<T>>(t[c]);
      }
    }
  });
}

// Runs body with a value of the C++ type behind the dtype; complex types are seen as pairs of their real type.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* name, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return body(float{});
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return body(double{});
    case ScalarType::Half:
    case ScalarType::ComplexHalf:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      fail(name, " does not take values of this dtype");
  }
}

template <typename Body>
void dispatch(ScalarType dtype, const char* name, const Body& body) {
  switch (dtype) {
    case ScalarType::Bool:
      return body(bool{});
    case ScalarType::Byte:
      return body(uint8_t{});
    case ScalarType::Char:
      return body(int8_t{});
    case ScalarType::Short:
      return body(int16_t{});
    case ScalarType::Int:
      return body(int32_t{});
    case ScalarType::Long:
      return body(int64_t{});
    case ScalarType::UInt16:
      return body(uint16_t{});
    case ScalarType::UInt32:
      return body(uint32_t{});
    case ScalarType::UInt64:
      return body(uint64_t{});
    default:
      return dispatch_floating(dtype, name, body);
  }
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
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
        segments(offsets, values, is_complex(dtype) ? 2 : 1) {}

  static bool is_complex(ScalarType dtype) {
    return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble;
  }

  static Tensor widen(const Tensor& values, bool complex) {
    check_rows(values, "values");
    DANLING_CHECK(complex || !is_complex(values.scalar_type()), "complex values have no order");
    return dense(is_float8(values.scalar_type()) ? torch::stable::to(values, ScalarType::Float) : values);
  }

  Tensor per_segment() const {
    return make(values, shape_with(segments.batch, values));
  }

  Tensor narrow(const Tensor& result) const {
    return is_float8(given) ? torch::stable::to(result, given) : result;
  }
};

Tensor segment_sum(const Tensor& values, const Tensor& offsets) {
  const Input input(values, offsets, true);
  const int32_t code = is_integral(input.dtype) ? int64_code() : dtype_code(input.values);
  Tensor result = make(input.values, shape_with(input.segments.batch, input.values), code);
  dispatch(input.dtype, "segment_sum", [&](auto zero) {
    using T = decltype(zero);
    sum_kernel<T>(input.segments, read<T>(input.values), write<SumResult<T>>(result), false);
  });
  return input.narrow(result);
}

Tensor segment_mean(const Tensor& values, const Tensor& offsets) {
  const Input input(values, offsets, true);
  Tensor result = input.per_segment();
  dispatch_floating(input.dtype, "segment_mean", [&](auto zero) {
    using T = decltype(zero);
    sum_kernel<T>(input.segments, read<T>(input.values), write<T>(result), true);
  });
  return input.narrow(result);
}

template <bool kLargest>
std::tuple<Tensor, Tensor> segment_extremum(const Tensor& values, const Tensor& offsets) {
  const Input input(values, offsets);
  Tensor result = input.per_segment();
  Tensor positions = make(input.values, shape_with(input.segments.batch, input.values), int64_code());
  dispatch(input.dtype, kLargest ? "segment_max" : "segment_min", [&](auto zero) {
    using T = decltype(zero);
    // bool is one byte of 0 or 1, and std::vector<bool> is none
    using Stored = std::conditional_t<std::is_same_v<T, bool>, uint8_t, T>;
    extremum_kernel<kLargest, Stored>(
        input.segments, read<Stored>(input.values), write<Stored>(result), write<int64_t>(positions),
        static_cast<Stored>(worst<kLargest, T>()));
  });
  return {input.narrow(result), positions};
}

Tensor segment_softmax(const Tensor& values, const Tensor& offsets, bool log) {
  const Input input(values, offsets);
  Tensor result = make(input.values, shape_with(input.segments.rows, input.values));
  dispatch_floating(input.dtype, "segment_softmax", [&](auto zero) {
    using T = decltype(zero);
    softmax_kernel<T>(input.segments, read<T>(input.values), write<T>(result), log);
  });
  return input.narrow(result);
}

Tensor segment_softmax_backward(const Tensor& grad, const Tensor& output, const Tensor& offsets, bool log) {
  const Input input(grad, offsets);
  DANLING_CHECK(dtype_code(grad) == dtype_code(output), "grad and output differ in dtype");
  check_same_device(grad, "grad", output, "output");
  DANLING_CHECK(grad.dim() == output.dim(), "grad and output differ in rank");
  for (int64_t d = 0; d < grad.dim(); ++d) {
    DANLING_CHECK(grad.size(d) == output.size(d), "grad and output differ in shape");
  }
  const Tensor out = Input::widen(output, false);
  Tensor result = make(input.values, shape_with(input.segments.rows, input.values));
  dispatch_floating(input.dtype, "segment_softmax_backward", [&](auto zero) {
    using T = decltype(zero);
    softmax_backward_kernel<T>(input.segments, read<T>(input.values), read<T>(out), write<T>(result), log);
  });
  return input.narrow(result);
}

Tensor segment_logsumexp(const Tensor& values, const Tensor& offsets) {
  const Input input(values, offsets);
  Tensor result = input.per_segment();
  dispatch_floating(input.dtype, "segment_logsumexp", [&](auto zero) {
    using T = decltype(zero);
    logsumexp_kernel<T>(input.segments, read<T>(input.values), write<T>(result));
  });
  return input.narrow(result);
}

Tensor segment_cumsum(const Tensor& values, const Tensor& offsets, bool reverse) {
  const Input input(values, offsets, true);
  const int32_t code = is_integral(input.dtype) ? int64_code() : dtype_code(input.values);
  Tensor result = make(input.values, shape_with(input.segments.rows, input.values), code);
  dispatch(input.dtype, "segment_cumsum", [&](auto zero) {
    using T = decltype(zero);
    cumsum_kernel<T>(input.segments, read<T>(input.values), write<SumResult<T>>(result), reverse);
  });
  return input.narrow(result);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CPU, m) {
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
