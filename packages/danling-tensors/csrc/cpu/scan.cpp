// Running sums within each element.

#include "segment.h"

namespace danling {
namespace {

// What running sums are formed in, as torch does on the CPU
template <typename T>
using Running = std::conditional_t<std::is_same_v<T, float>, double, Sum<T>>;

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

Tensor segment_cumsum(const Tensor& values, const Tensor& offsets, bool reverse) {
  const Input input(values, offsets, true);
  Tensor result = input.for_sums(input.segments.rows);
  dispatch(input.dtype, "segment_cumsum", [&](auto zero) {
    using T = decltype(zero);
    cumsum_kernel<T>(input.segments, read<T>(input.values), write<SumResult<T>>(result), reverse);
  });
  return input.narrow(result);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CPU, m) {
  m.impl("segment_cumsum", TORCH_BOX(&segment_cumsum));
}

} // namespace danling
