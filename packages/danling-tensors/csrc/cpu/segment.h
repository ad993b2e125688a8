// What the kernels over each element's rows share: which types they compute in, how elements are dealt out to threads, and
// how narrow rows are read as wide ones.
//
// One element is always handled by one thread in one order, so results do not depend on the number of threads. Accumulators
// are float for float16 and bfloat16, double for running sums of float, int64 for integers.
#pragma once

#include "../common.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#define DANLING_APART __attribute__((noinline))

namespace danling {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
constexpr bool is_narrow = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;
template <typename T>
constexpr bool is_floating = std::is_floating_point_v<T> || is_narrow<T>;

// What sums are formed in
template <typename T>
using Sum = std::conditional_t<is_narrow<T>, float, std::conditional_t<is_floating<T>, T, int64_t>>;
// What exponentials are formed in
template <typename T>
using Real = std::conditional_t<is_narrow<T>, float, T>;
// What sums are returned in
template <typename T>
using SumResult = std::conditional_t<is_floating<T>, T, int64_t>;

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

// One element's rows as wide ones: few columns are read several rows at a time, so that vectors fill. Lane `l` of a wide row
// belongs to column `l % columns`; the last wide row may hold `tail` values only.
struct Wide {
  int64_t fold; // rows in a wide row, a power of two
  int64_t lanes; // values in a wide row
  int64_t rows; // whole wide rows
  int64_t tail;

  Wide(int64_t count, int64_t columns)
      : fold(columns > 16 || columns == 0 ? 1 : columns > 8 ? 2 : columns > 4 ? 4 : columns > 2 ? 8 : 32 / columns),
        lanes(columns * fold),
        rows(count / fold),
        tail(count % fold * columns) {}

  // The first `columns` lanes over all lanes
  template <typename V>
  void repeat(V* per_lane, int64_t columns) const {
    for (int64_t l = columns; l < lanes; ++l) {
      per_lane[l] = per_lane[l - columns];
    }
  }

  // join(into, from) over all lanes of each column, by halves; the result is in the first `columns` lanes.
  template <typename V, typename Join>
  void gather(V* per_lane, int64_t columns, const Join& join) const {
    for (int64_t half = lanes / 2; half >= columns && half > 0; half /= 2) {
      V* __restrict into = per_lane;
      const V* __restrict from = per_lane + half;
      for (int64_t l = 0; l < half; ++l) {
        into[l] = join(into[l], from[l]);
      }
    }
  }

  // body(offset of a wide row, number of its values)
  template <typename Body>
  void each(const Body& body) const {
    for (int64_t r = 0; r < rows; ++r) {
      body(r * lanes, lanes);
    }
    if (tail > 0) {
      body(rows * lanes, tail);
    }
  }
};

constexpr int64_t kLine = 64; // bytes of a cache line

// Asks for `bytes` of memory that lie `ahead` of `data`. They may lie behind the end of the buffer, which is harmless.
inline void fetch_ahead(const void* data, int64_t ahead, int64_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(data) + ahead;
  for (int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + at));
  }
}

// Where kernels read several rows at once, the CPU's own prefetcher loses the thread: they ask for what lies ahead, in the order of
// memory. How far ahead depends on where data of this size are likely to be: in the nearest caches (0, which is not at all), in
// the last one, or outside.
inline int64_t distance(int64_t bytes) {
  return bytes <= (int64_t{1} << 20) ? 0 : bytes <= (int64_t{1} << 24) ? 4096 : 8192;
}

// Memory for one value per lane, to be kept from element to element. It begins with a cache line: vectors that straddle two are
// slow to write and slower to read back.
template <typename V>
class Scratch {
 public:
  V* resize(int64_t lanes) {
    memory_.resize(static_cast<size_t>(lanes) + kLine / sizeof(V));
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<V*>((start + kLine - 1) / kLine * kLine);
  }

 private:
  std::vector<V> memory_;
};

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

  // (B, ...) or (R, ...) in the dtype of sums
  Tensor for_sums(int64_t first) const {
    return make(values, shape_with(first, values), is_integral(dtype) ? int64_code() : dtype_code(values));
  }

  Tensor narrow(const Tensor& result) const {
    return is_float8(given) ? torch::stable::to(result, given) : result;
  }
};

} // namespace danling
