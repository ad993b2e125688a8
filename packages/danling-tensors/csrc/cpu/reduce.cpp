// Sums, means and extrema over each element's rows. Every loop runs along a row, which is contiguous and needs no gather, and
// keeps one accumulator per column.

#include "segment.h"

#include <cstring>
#include <limits>

namespace danling {
namespace {

// out[i] += the sum over all rows; four at a time spare the sums' way through memory. A function of its own, because inlined
// ones lose what __restrict says.
template <typename T>
DANLING_APART void add_rows(
    Sum<T>* __restrict out, const T* __restrict x, int64_t rows, int64_t columns, int64_t ahead) {
  using Acc = Sum<T>;
  constexpr int64_t kStep = 16;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, x += 4 * columns) {
    const T* __restrict b = x + columns;
    const T* __restrict c = b + columns;
    const T* __restrict d = c + columns;
    int64_t i = 0;
    for (; i + kStep <= columns; i += kStep) {
      if (ahead > 0) {
        fetch_ahead(x + 4 * i, ahead, 4 * kStep * static_cast<int64_t>(sizeof(T)));
      }
#pragma GCC unroll 1 // written out, this short loop would not become vector code
      for (int64_t j = i; j < i + kStep; ++j) {
        out[j] += (static_cast<Acc>(x[j]) + static_cast<Acc>(b[j])) + (static_cast<Acc>(c[j]) + static_cast<Acc>(d[j]));
      }
    }
    for (; i < columns; ++i) {
      out[i] += (static_cast<Acc>(x[i]) + static_cast<Acc>(b[i])) + (static_cast<Acc>(c[i]) + static_cast<Acc>(d[i]));
    }
  }
  for (; r < rows; ++r, x += columns) {
    for (int64_t i = 0; i < columns; ++i) {
      out[i] += static_cast<Acc>(x[i]);
    }
  }
}

// total[c] = sum over rows of column c, in blocks so that rounding errors stay small
template <typename T>
void sum_rows(Sum<T>* __restrict total, Scratch<Sum<T>>& scratch, const T* x, int64_t rows, int64_t columns, int64_t ahead) {
  constexpr int64_t kBlock = 128;
  std::fill(total, total + columns, Sum<T>(0));
  add_rows<T>(total, x, std::min(rows, kBlock), columns, ahead);
  for (int64_t first = kBlock; first < rows; first += kBlock) {
    Sum<T>* __restrict block = scratch.resize(columns);
    std::fill(block, block + columns, Sum<T>(0));
    add_rows<T>(block, x + first * columns, std::min(rows - first, kBlock), columns, ahead);
    for (int64_t i = 0; i < columns; ++i) {
      total[i] += block[i];
    }
  }
}

template <typename T>
void sum_kernel(const Segments& s, const T* in, SumResult<T>* out, bool mean) {
  const int64_t ahead = distance(s.rows * s.columns * static_cast<int64_t>(sizeof(T)));
  s.each([&](int64_t i, int64_t first, int64_t count) {
    thread_local Scratch<Sum<T>> totals;
    thread_local Scratch<Sum<T>> blocks;
    const Wide wide(count, s.columns);
    Sum<T>* total = totals.resize(wide.lanes);
    const T* x = in + first * s.columns;
    sum_rows<T>(total, blocks, x, wide.rows, wide.lanes, ahead);
    for (int64_t l = 0; l < wide.tail; ++l) {
      total[l] += static_cast<Sum<T>>(x[wide.rows * wide.lanes + l]);
    }
    wide.gather(total, s.columns, [](Sum<T> a, Sum<T> b) { return a + b; });
    if constexpr (is_floating<T>) {
      for (int64_t c = 0; mean && c < s.columns; ++c) {
        total[c] /= static_cast<Sum<T>>(count);
      }
    }
    SumResult<T>* y = out + i * s.columns;
    for (int64_t c = 0; c < s.columns; ++c) {
      y[c] = static_cast<SumResult<T>>(total[c]);
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

// One row, or a part of it, number `row`; a NaN shows in `sum`.
template <bool kLargest, typename V, typename Index>
void extremum_row(const V* __restrict x, V* __restrict best, Index* __restrict where, V* sum, int64_t lanes, Index row) {
  for (int64_t l = 0; l < lanes; ++l) {
    const bool wins = beats<kLargest>(x[l], best[l]);
    if constexpr (std::is_floating_point_v<V>) {
      *sum += x[l];
    }
    best[l] = wins ? x[l] : best[l];
    where[l] = wins ? row : where[l];
  }
}

// As the values are compared: `from` itself, or a wider copy of it in `room`
template <typename V, typename T>
const V* widen(const T* from, int64_t size, V* room) {
  if constexpr (std::is_same_v<T, V>) {
    return from;
  } else {
    for (int64_t j = 0; j < size; ++j) {
      room[j] = static_cast<V>(from[j]);
    }
    return room;
  }
}

// All rows of a chunk, four at a time. The best of four is found in two rounds before it meets the best so far, so that few
// comparisons wait for another; the first of equals stays. Written with vector types because compilers turn the same choices on
// scalars into branches. `sum` tells whether there may be a NaN: adding up costs less than looking for one, and finds none too
// many but where infinities of both signs meet. `room` takes four widened rows.
template <bool kLargest, typename V, typename Index, typename T>
DANLING_APART void extremum_rows(
    const T* x, int64_t rows, int64_t lanes, V* best, Index* where, V* sum, V* room, int64_t ahead) {
  using Vector = Vectors<V>;
  using Values = typename Vector::Values;
  using Indices = typename Vector::Indices;
  constexpr int64_t kStep = Vector::kLanes;
  const int64_t whole = lanes / kStep * kStep;
  Values total = {};
  for (int64_t r = 0; r < rows; r += 4) {
    // Where less than four rows are left, the last one stands in for the others.
    const int64_t left = std::min<int64_t>(4, rows - r);
    const T* next = x + r * lanes;
    const V* row_a = widen<V>(next, left * lanes, room);
    const V* row_b = left > 1 ? row_a + lanes : row_a;
    const V* row_c = left > 2 ? row_b + lanes : row_b;
    const V* row_d = left > 3 ? row_c + lanes : row_c;
    const Indices first = Indices{} + static_cast<Index>(r);
    const Indices third = Indices{} + static_cast<Index>(r + 2);
    for (int64_t l = 0; l < whole; l += kStep, next += 4 * kStep) {
      if (ahead > 0) {
        fetch_ahead(next, ahead, 4 * kStep * static_cast<int64_t>(sizeof(T)));
      }
      const Values a = Vector::template load<Values>(row_a + l);
      const Values b = Vector::template load<Values>(row_b + l);
      const Values c = Vector::template load<Values>(row_c + l);
      const Values d = Vector::template load<Values>(row_d + l);
      const Values old = Vector::template load<Values>(best + l);
      if constexpr (std::is_floating_point_v<V>) {
        total += (a + b) + (c + d);
      }
      const Indices is_b = (Indices)beats<kLargest>(b, a); // all bits, which is -1, or none
      const Indices is_d = (Indices)beats<kLargest>(d, c);
      const Values early = beats<kLargest>(b, a) ? b : a;
      const Values late = beats<kLargest>(d, c) ? d : c;
      const Indices is_late = (Indices)beats<kLargest>(late, early);
      const Values top = beats<kLargest>(late, early) ? late : early;
      // Logic rather than a choice: CPUs have more units for it.
      const Indices top_row = ((third - is_d) & is_late) | ((first - is_b) & ~is_late);
      const Indices wins = (Indices)beats<kLargest>(top, old);
      Vector::store(best + l, wins ? top : old);
      Vector::store(where + l, wins ? top_row : Vector::template load<Indices>(where + l));
    }
    if (whole < lanes) {
      for (int64_t j = 0; j < left; ++j) {
        extremum_row<kLargest>(
            row_a + j * lanes + whole, best + whole, where + whole, sum, lanes - whole, static_cast<Index>(r + j));
      }
    }
  }
  for (int64_t j = 0; j < kStep; ++j) {
    *sum += total[j];
  }
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
  const int64_t ahead = distance(s.rows * s.columns * static_cast<int64_t>(sizeof(T)));
  s.each([&](int64_t i, int64_t first, int64_t count) {
    const int64_t columns = s.columns;
    T* y = out + i * columns;
    int64_t* p = positions + i * columns;
    if (count == 0) {
      std::fill(y, y + columns, none);
      std::fill(p, p + columns, int64_t{-1});
      return;
    }
    thread_local Scratch<V> bests;
    thread_local Scratch<V> widened;
    thread_local Scratch<Index> places;
    thread_local Scratch<int64_t> wide_rows;
    const T* x = in + first * columns;
    const Wide wide(count, columns);
    const int64_t lanes = wide.lanes;
    V* best = bests.resize(lanes);
    V* room = widened.resize(4 * lanes);
    Index* where = places.resize(lanes); // wide row in its chunk, -1 if an earlier chunk has the best value
    int64_t* at = wide.fold == 1 ? p : wide_rows.resize(lanes); // wide row
    std::fill(best, best + lanes, worst<kLargest, V>());
    V sum = V(0);
    for (int64_t chunk = 0; chunk == 0 || chunk < wide.rows; chunk += kChunk) {
      std::fill(where, where + lanes, chunk == 0 ? Index{0} : Index{-1});
      const int64_t rows = std::min(wide.rows - chunk, kChunk);
      const T* from = x + chunk * lanes;
      extremum_rows<kLargest>(from, rows, lanes, best, where, &sum, room, ahead);
      if (chunk + rows == wide.rows) {
        extremum_row<kLargest>(
            widen<V>(from + rows * lanes, wide.tail, room), best, where, &sum, wide.tail, static_cast<Index>(rows));
      }
      if (chunk == 0) {
        std::copy(where, where + lanes, at);
        continue;
      }
      for (int64_t l = 0; l < lanes; ++l) {
        at[l] = where[l] >= 0 ? chunk + where[l] : at[l];
      }
    }
    const bool nan = sum != sum;
    if (wide.fold == 1 && !nan) {
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
