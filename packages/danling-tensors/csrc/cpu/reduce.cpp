// Sums, means and extrema over each element's rows. Every loop runs along a row, which is contiguous and needs no gather, and
// keeps one accumulator per column.

#include "segment.h"

#include <cstring>
#include <limits>

namespace danling {
namespace {

// total[c] = sum over rows of column c, in blocks so that rounding errors stay small. Four rows at a time spare the
// accumulators' way through memory.
template <typename T>
void sum_rows(
    Sum<T>* __restrict total, Sum<T>* __restrict block, const T* __restrict x, int64_t rows, int64_t columns, bool far) {
  using Acc = Sum<T>;
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
      const T* __restrict a = x + r * columns;
      const T* __restrict b = a + columns;
      const T* __restrict c = b + columns;
      const T* __restrict d = c + columns;
      if (far) {
        fetch(d + columns, std::min<int64_t>(4, rows - r - 4) * columns * static_cast<int64_t>(sizeof(T)));
      }
      for (int64_t i = 0; i < columns; ++i) {
        out[i] += (static_cast<Acc>(a[i]) + static_cast<Acc>(b[i])) + (static_cast<Acc>(c[i]) + static_cast<Acc>(d[i]));
      }
    }
    for (; r < stop; ++r) {
      for (int64_t i = 0; i < columns; ++i) {
        out[i] += static_cast<Acc>(x[r * columns + i]);
      }
    }
    if (rows > kBlock) {
      for (int64_t i = 0; i < columns; ++i) {
        total[i] += block[i];
      }
    }
  }
}

template <typename T>
void sum_kernel(const Segments& s, const T* in, SumResult<T>* out, bool mean) {
  const bool far = is_far(s.rows * s.columns * static_cast<int64_t>(sizeof(T)));
  s.each([&](int64_t i, int64_t first, int64_t count) {
    thread_local std::vector<Sum<T>> scratch;
    const Wide wide(count, s.columns);
    scratch.resize(2 * wide.lanes);
    Sum<T>* total = scratch.data();
    const T* x = in + first * s.columns;
    sum_rows<T>(total, total + wide.lanes, x, wide.rows, wide.lanes, far);
    for (int64_t l = 0; l < wide.tail; ++l) {
      total[l] += static_cast<Sum<T>>(x[wide.rows * wide.lanes + l]);
    }
    wide.gather(total, s.columns, [](Sum<T> a, Sum<T> b) { return a + b; });
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

// What values are compared in: four bytes at least, so that one mask selects values and positions
template <typename T>
using Ordered = std::conditional_t<
    is_narrow<T>, float,
    std::conditional_t<(sizeof(T) >= 4), T, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

constexpr int64_t kBytes = 32; // of a vector; compilers split it where the CPU's are shorter

template <typename V>
struct Vectors {
  typedef V Values __attribute__((vector_size(kBytes)));
  using Index = std::conditional_t<sizeof(V) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kBytes)));
  static constexpr int64_t kLanes = kBytes / sizeof(V);

  template <typename Vector, typename Element>
  static Vector load(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, kBytes);
    return vector;
  }

  template <typename Vector, typename Element>
  static void store(Element* to, const Vector& vector) {
    std::memcpy(to, &vector, kBytes);
  }
};

template <bool kLargest, typename V>
auto beats(V a, V b) {
  return kLargest ? a > b : a < b;
}

// One row, or a part of it, number `row`. Returns whether there is a NaN.
template <bool kLargest, typename V, typename Index>
bool extremum_row(const V* __restrict x, V* __restrict best, Index* __restrict where, int64_t lanes, Index row) {
  bool nan = false;
  for (int64_t l = 0; l < lanes; ++l) {
    const bool wins = beats<kLargest>(x[l], best[l]);
    nan |= x[l] != x[l];
    best[l] = wins ? x[l] : best[l];
    where[l] = wins ? row : where[l];
  }
  return nan;
}

// Four rows of `lanes` values, the first of them number `row`. The best of them is found in two rounds before it meets the best
// so far, so that few comparisons wait for another; the first of equals stays. Written with vector types because compilers turn
// the same choices on scalars into branches. Returns whether there may be a NaN: adding up costs less than looking for one, and
// finds none too many but where infinities of both signs meet.
template <bool kLargest, typename V, typename Index>
bool extremum_rows(const V* x, V* best, Index* where, int64_t lanes, Index row) {
  using Vector = Vectors<V>;
  using Values = typename Vector::Values;
  using Indices = typename Vector::Indices;
  const Indices first = Indices{} + row;
  const Indices third = Indices{} + (row + 2);
  Values sum = {};
  int64_t l = 0;
  for (; l + Vector::kLanes <= lanes; l += Vector::kLanes) {
    const Values a = Vector::template load<Values>(x + l);
    const Values b = Vector::template load<Values>(x + lanes + l);
    const Values c = Vector::template load<Values>(x + 2 * lanes + l);
    const Values d = Vector::template load<Values>(x + 3 * lanes + l);
    const Values old = Vector::template load<Values>(best + l);
    if constexpr (std::is_floating_point_v<V>) {
      sum += (a + b) + (c + d);
    }
    const Indices second = (Indices)beats<kLargest>(b, a); // all bits, which is -1, or none
    const Indices fourth = (Indices)beats<kLargest>(d, c);
    const Values early = second ? b : a;
    const Values late = fourth ? d : c;
    const Indices half = (Indices)beats<kLargest>(late, early);
    const Values top = half ? late : early;
    const Indices top_row = half ? third - fourth : first - second;
    const Indices wins = (Indices)beats<kLargest>(top, old);
    Vector::store(best + l, wins ? top : old);
    Vector::store(where + l, wins ? top_row : Vector::template load<Indices>(where + l));
  }
  bool nan = false;
  if constexpr (std::is_floating_point_v<V>) {
    for (int64_t j = 0; j < Vector::kLanes; ++j) {
      nan |= sum[j] != sum[j];
    }
  }
  for (Index r = 0; r < 4 && l < lanes; ++r) {
    nan |= extremum_row<kLargest>(x + r * lanes + l, best + l, where + l, lanes - l, row + r);
  }
  return nan;
}

// One column the plain way, for elements with NaN: the first NaN wins, otherwise the first of the best.
template <bool kLargest, typename T>
int64_t extremum_with_nan(const T* x, int64_t count, int64_t columns) {
  int64_t at = 0;
  for (int64_t r = 0; r < count; ++r) {
    const auto value = static_cast<Ordered<T>>(x[r * columns]);
    if (value != value) {
      return r;
    }
    at = beats<kLargest>(value, static_cast<Ordered<T>>(x[at * columns])) ? r : at;
  }
  return at;
}

// `none` is what an empty element gives.
template <bool kLargest, typename T>
void extremum_kernel(const Segments& s, const T* in, T* out, int64_t* positions, T none) {
  using V = Ordered<T>;
  using Index = typename Vectors<V>::Index;
  constexpr int64_t kChunk = int64_t{1} << 30; // wide rows that an Index can count
  const bool far = is_far(s.rows * s.columns * static_cast<int64_t>(sizeof(T)));
  s.each([&](int64_t i, int64_t first, int64_t count) {
    const int64_t columns = s.columns;
    T* y = out + i * columns;
    int64_t* p = positions + i * columns;
    if (count == 0) {
      std::fill(y, y + columns, none);
      std::fill(p, p + columns, int64_t{-1});
      return;
    }
    thread_local std::vector<V> best;
    thread_local std::vector<V> widened;
    thread_local std::vector<Index> where; // wide row in its chunk, -1 if an earlier chunk has the best value
    thread_local std::vector<int64_t> at; // wide row
    const T* x = in + first * columns;
    const Wide wide(count, columns);
    const int64_t lanes = wide.lanes;
    best.assign(lanes, worst<kLargest, V>());
    where.resize(lanes);
    at.assign(lanes, 0);
    bool nan = false;
    for (int64_t chunk = 0; chunk <= wide.rows; chunk += kChunk) {
      std::fill(where.begin(), where.end(), Index{-1});
      const int64_t stop = std::min(wide.rows, chunk + kChunk);
      for (int64_t r = chunk; r <= stop;) {
        const int64_t rows = r + 4 <= stop ? 4 : 1;
        const int64_t size = r < wide.rows ? rows * lanes : wide.tail;
        if (r == stop && stop < wide.rows) {
          break; // the next chunk's
        }
        const T* from = x + r * lanes;
        if (far) {
          fetch(from + size, std::min(4 * lanes, count * columns - r * lanes - size) * static_cast<int64_t>(sizeof(T)));
        }
        const V* values;
        if constexpr (std::is_same_v<T, V>) {
          values = from;
        } else {
          widened.resize(4 * lanes);
          for (int64_t j = 0; j < size; ++j) {
            widened[j] = static_cast<V>(from[j]);
          }
          values = widened.data();
        }
        const Index row = static_cast<Index>(r - chunk);
        nan |= rows == 4 ? extremum_rows<kLargest>(values, best.data(), where.data(), lanes, row)
                         : extremum_row<kLargest>(values, best.data(), where.data(), std::min(lanes, size), row);
        r += rows;
      }
      for (int64_t l = 0; l < lanes; ++l) {
        at[l] = where[l] >= 0 ? chunk + where[l] : at[l];
      }
    }
    if (wide.fold == 1 && !nan) {
      std::copy(at.begin(), at.end(), p);
      for (int64_t c = 0; c < columns; ++c) {
        y[c] = static_cast<T>(best[c]);
      }
      return;
    }
    for (int64_t c = 0; c < columns; ++c) {
      p[c] = at[c] * wide.fold;
      if (nan) {
        p[c] = extremum_with_nan<kLargest>(x + c, count, columns);
      } else {
        V top = best[c];
        for (int64_t f = 1; f < wide.fold && f * columns + c < count * columns; ++f) { // lanes of the same column
          const int64_t l = f * columns + c;
          const int64_t position = at[l] * wide.fold + f;
          if (beats<kLargest>(best[l], top) || (best[l] == top && position < p[c])) {
            top = best[l];
            p[c] = position;
          }
        }
      }
      y[c] = x[p[c] * columns + c];
    }
  });
}

Tensor segment_sum(const Tensor& values, const Tensor& offsets) {
  const Input input(values, offsets, true);
  Tensor result = input.for_sums(input.segments.batch);
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

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("segment_mean", TORCH_BOX(&segment_mean));
  m.impl("segment_max", TORCH_BOX(&segment_extremum<true>));
  m.impl("segment_min", TORCH_BOX(&segment_extremum<false>));
}

} // namespace danling
