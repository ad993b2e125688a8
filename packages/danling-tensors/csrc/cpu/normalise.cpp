// Softmax, its gradient and logsumexp over each element's rows, every column on its own.

#include "segment.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace danling {
namespace {

// exp, as a polynomial that compilers turn into vector code; within 2 units in the last place, 0 below -87.3 and inf above
// 88.7. kNegative leaves out what only arguments above 0 need.
template <bool kNegative>
inline float exponential(float x) {
  constexpr float kMagic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  constexpr float kLow = -87.3f;
  constexpr float kHigh = 88.7f;
  float clamped = x < kLow ? kLow : x; // NaN stays
  if constexpr (!kNegative) {
    clamped = clamped > kHigh ? kHigh : clamped;
  }
  const float shifted = std::fma(clamped, 1.44269504088896341f, kMagic);
  const float count = shifted - kMagic;
  float rest = std::fma(count, -0.693359375f, clamped); // ln 2 in two parts
  rest = std::fma(count, 2.12194440e-4f, rest);
  float p = 1.9875691500e-4f; // coefficients of the Cephes library's expf
  p = std::fma(p, rest, 1.3981999507e-3f);
  p = std::fma(p, rest, 8.3334519073e-3f);
  p = std::fma(p, rest, 4.1665795894e-2f);
  p = std::fma(p, rest, 1.6666665459e-1f);
  p = std::fma(p, rest, 5.0000001201e-1f);
  p = std::fma(p, rest * rest, rest) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  float value;
  if constexpr (kNegative) { // 2^count straight into the exponent, which stays in its range
    int32_t exponent;
    std::memcpy(&exponent, &p, sizeof(exponent));
    exponent += static_cast<int32_t>(static_cast<uint32_t>(bits) << 23);
    std::memcpy(&value, &exponent, sizeof(value));
    return x < kLow ? 0.0f : value;
  } else { // in two factors: count reaches 128, one more than an exponent holds
    const int32_t power = (bits & 0x1ff) - ((bits & 0x100) << 1);
    const int32_t half = power >> 1;
    const int32_t low = (half + 127) << 23;
    const int32_t high = (power - half + 127) << 23;
    float a;
    float b;
    std::memcpy(&a, &low, sizeof(a));
    std::memcpy(&b, &high, sizeof(b));
    value = p * a * b;
    return x < kLow ? 0.0f : (x > kHigh ? std::numeric_limits<float>::infinity() : value);
  }
}

template <bool kNegative>
inline double exponential(double x) {
  return std::exp(x);
}

// Per-lane scratch of one element
template <typename V>
struct Lanes {
  std::vector<V> top; // largest value
  std::vector<V> total; // sum
  std::vector<V> block; // sum of a block of rows

  void resize(int64_t lanes) {
    top.resize(lanes);
    total.resize(lanes);
    block.resize(lanes);
  }
};

// top[l] = the largest value of the lane's column, NaN left out (whatever is made of it, NaN comes back in the sum)
template <typename V, typename T>
void largest(std::vector<V>& top, const T* __restrict x, const Wide& wide, int64_t columns) {
  V* __restrict t = top.data();
  std::fill(t, t + wide.lanes, -std::numeric_limits<V>::infinity());
  int64_t r = 0;
  for (; r + 4 <= wide.rows; r += 4) {
    const T* __restrict a = x + r * wide.lanes;
    const T* __restrict b = a + wide.lanes;
    const T* __restrict c = b + wide.lanes;
    const T* __restrict d = c + wide.lanes;
    for (int64_t l = 0; l < wide.lanes; ++l) {
      const V one = static_cast<V>(a[l]);
      const V two = static_cast<V>(b[l]);
      const V three = static_cast<V>(c[l]);
      const V four = static_cast<V>(d[l]);
      V best = one > t[l] ? one : t[l];
      best = two > best ? two : best;
      best = three > best ? three : best;
      t[l] = four > best ? four : best;
    }
  }
  for (; r <= wide.rows; ++r) {
    const int64_t size = r < wide.rows ? wide.lanes : wide.tail;
    for (int64_t l = 0; l < size; ++l) {
      const V value = static_cast<V>(x[r * wide.lanes + l]);
      t[l] = value > t[l] ? value : t[l];
    }
  }
  wide.gather(t, columns, [](V a, V b) { return b > a ? b : a; });
  wide.repeat(t, columns);
}

// total[l] = sum of body(offset, lane) over the lane's column, in blocks so that rounding errors stay small
template <typename V, typename Body>
void sum_lanes(Lanes<V>& scratch, const Wide& wide, int64_t columns, const Body& body) {
  constexpr int64_t kBlock = 128;
  V* __restrict total = scratch.total.data();
  V* __restrict block = scratch.block.data();
  std::fill(total, total + wide.lanes, V(0));
  for (int64_t first = 0; first < wide.rows; first += kBlock) {
    std::fill(block, block + wide.lanes, V(0));
    for (int64_t r = first; r < std::min(wide.rows, first + kBlock); ++r) {
      for (int64_t l = 0; l < wide.lanes; ++l) {
        block[l] += body(r * wide.lanes + l, l);
      }
    }
    for (int64_t l = 0; l < wide.lanes; ++l) {
      total[l] += block[l];
    }
  }
  for (int64_t l = 0; l < wide.tail; ++l) {
    total[l] += body(wide.rows * wide.lanes + l, l);
  }
  wide.gather(total, columns, [](V a, V b) { return a + b; });
}

template <typename T>
void softmax_kernel(const Segments& s, const T* in, T* out, bool log) {
  using V = Real<T>;
  s.each([&](int64_t, int64_t first, int64_t count) {
    if (count == 0) {
      return;
    }
    thread_local Lanes<V> scratch;
    const int64_t columns = s.columns;
    const Wide wide(count, columns);
    scratch.resize(wide.lanes);
    const T* __restrict x = in + first * columns;
    T* __restrict y = out + first * columns;
    largest(scratch.top, x, wide, columns);
    const V* __restrict b = scratch.top.data();
    V* __restrict t = scratch.total.data();
    if (log) {
      sum_lanes(scratch, wide, columns, [=](int64_t j, int64_t l) {
        return exponential<true>(static_cast<V>(x[j]) - b[l]);
      });
      for (int64_t c = 0; c < columns; ++c) {
        t[c] = std::log(t[c]);
      }
      wide.repeat(t, columns);
      wide.each([&](int64_t at, int64_t size) {
        for (int64_t l = 0; l < size; ++l) {
          y[at + l] = static_cast<T>(static_cast<V>(x[at + l]) - b[l] - t[l]);
        }
      });
      return;
    }
    // Exponentials wait in the result for their sum, unless the result is too narrow for them.
    sum_lanes(scratch, wide, columns, [=](int64_t j, int64_t l) {
      const V value = exponential<true>(static_cast<V>(x[j]) - b[l]);
      if constexpr (std::is_same_v<T, V>) {
        y[j] = value;
      }
      return value;
    });
    wide.repeat(t, columns);
    wide.each([&](int64_t at, int64_t size) {
      for (int64_t l = 0; l < size; ++l) {
        if constexpr (std::is_same_v<T, V>) {
          y[at + l] /= t[l];
        } else {
          y[at + l] = static_cast<T>(exponential<true>(static_cast<V>(x[at + l]) - b[l]) / t[l]);
        }
      }
    });
  });
}

template <typename T>
void softmax_backward_kernel(const Segments& s, const T* grad, const T* output, T* out, bool log) {
  using V = Real<T>;
  s.each([&](int64_t, int64_t first, int64_t count) {
    thread_local Lanes<V> scratch;
    const int64_t columns = s.columns;
    const Wide wide(count, columns);
    scratch.resize(wide.lanes);
    const T* __restrict g = grad + first * columns;
    const T* __restrict y = output + first * columns;
    T* __restrict x = out + first * columns;
    const V* __restrict t = scratch.total.data();
    if (log) {
      sum_lanes(scratch, wide, columns, [=](int64_t j, int64_t) { return static_cast<V>(g[j]); });
    } else {
      sum_lanes(scratch, wide, columns, [=](int64_t j, int64_t) {
        return static_cast<V>(g[j]) * static_cast<V>(y[j]);
      });
    }
    wide.repeat(scratch.total.data(), columns);
    wide.each([&](int64_t at, int64_t size) {
      if (log) {
        for (int64_t l = 0; l < size; ++l) {
          const V p = exponential<false>(static_cast<V>(y[at + l]));
          x[at + l] = static_cast<T>(static_cast<V>(g[at + l]) - p * t[l]);
        }
      } else {
        for (int64_t l = 0; l < size; ++l) {
          x[at + l] = static_cast<T>(static_cast<V>(y[at + l]) * (static_cast<V>(g[at + l]) - t[l]));
        }
      }
    });
  });
}

template <typename T>
void logsumexp_kernel(const Segments& s, const T* in, T* out) {
  using V = Real<T>;
  s.each([&](int64_t i, int64_t first, int64_t count) {
    const int64_t columns = s.columns;
    T* y = out + i * columns;
    if (count == 0) {
      std::fill(y, y + columns, static_cast<T>(-std::numeric_limits<float>::infinity()));
      return;
    }
    thread_local Lanes<V> scratch;
    const Wide wide(count, columns);
    scratch.resize(wide.lanes);
    const T* __restrict x = in + first * columns;
    largest(scratch.top, x, wide, columns);
    V* __restrict b = scratch.top.data();
    for (int64_t l = 0; l < wide.lanes; ++l) {
      b[l] = std::isinf(b[l]) ? V(0) : b[l]; // inf - inf would be NaN
    }
    sum_lanes(scratch, wide, columns, [=](int64_t j, int64_t l) {
      return exponential<false>(static_cast<V>(x[j]) - b[l]);
    });
    for (int64_t c = 0; c < columns; ++c) {
      y[c] = static_cast<T>(std::log(scratch.total[c]) + b[c]);
    }
  });
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

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CPU, m) {
  m.impl("segment_softmax", TORCH_BOX(&segment_softmax));
  m.impl("segment_softmax_backward", TORCH_BOX(&segment_softmax_backward));
  m.impl("segment_logsumexp", TORCH_BOX(&segment_logsumexp));
}

} // namespace danling
