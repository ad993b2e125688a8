// Kernels that move bytes: packed to padded and back, lists to either, and one row per element to one per packed row.
// They know no dtype, only widths, so that every dtype is copied exactly. Work is split by rows, never by elements, and
// every output byte is written once, by one thread.

#include "../common.h"

#include <algorithm>
#include <cstring>

namespace danling {
namespace {

// About 64 KiB of output for each piece of work
int64_t grain(int64_t row_bytes) {
  return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, row_bytes));
}

template <typename Word>
void fill_words(char* out, const char* value, int64_t count) {
  Word word;
  std::memcpy(&word, value, sizeof(Word));
  Word* words = reinterpret_cast<Word*>(out);
  std::fill(words, words + count, word);
}

struct Wide {
  uint64_t low;
  uint64_t high;
};

// Writes copies of one value of 1, 2, 4, 8 or 16 bytes.
struct Filler {
  char value[16];
  int64_t width;
  bool uniform; // all bytes are the same: memset does

  explicit Filler(const Tensor& fill) : width(static_cast<int64_t>(fill.element_size())) {
    DANLING_CHECK(width <= 16 && (width & (width - 1)) == 0, "values of ", width, " bytes are not supported");
    std::memcpy(value, fill.const_data_ptr(), width);
    uniform = std::all_of(value, value + width, [this](char byte) { return byte == value[0]; });
  }

  void operator()(char* out, int64_t bytes) const {
    if (uniform) {
      std::memset(out, value[0], bytes);
      return;
    }
    switch (width) {
      case 2:
        return fill_words<uint16_t>(out, value, bytes / 2);
      case 4:
        return fill_words<uint32_t>(out, value, bytes / 4);
      case 8:
        return fill_words<uint64_t>(out, value, bytes / 8);
      default:
        return fill_words<Wide>(out, value, bytes / 16);
    }
  }
};

// 32 bytes, in one register where the CPU has such; compilers copy them in halves if they are not told so.
typedef uint8_t HalfLine __attribute__((vector_size(32), aligned(1), may_alias));

inline void copy_line(char* out, const char* in) {
  const HalfLine first = *reinterpret_cast<const HalfLine*>(in);
  const HalfLine second = *reinterpret_cast<const HalfLine*>(in + 32);
  *reinterpret_cast<HalfLine*>(out) = first;
  *reinterpret_cast<HalfLine*>(out + 32) = second;
}

constexpr int64_t kShort = 4096; // bytes from which memcpy is best

// Copies `bytes` of a run whose buffers go on for `room` bytes, where what lies behind the run in `out` is written afterwards.
// Short ones go in steps of 32 that may write beyond their end: without branches on the last few bytes that takes half the time
// of memcpy.
inline void copy_run(char* out, const char* in, int64_t bytes, int64_t room) {
  constexpr int64_t kStep = 32;
  if (bytes > kShort || bytes + kStep > room) {
    std::memcpy(out, in, bytes);
    return;
  }
  for (int64_t at = 0; at < bytes; at += kStep) {
    std::memcpy(out + at, in + at, kStep);
  }
}

// The same where `out` begins anywhere: in whole cache lines of `out`, so that no write straddles two.
inline void copy_run_aligned(char* out, const char* in, int64_t bytes, int64_t room) {
  constexpr int64_t kLine = 64;
  if (bytes > kShort || bytes + kLine > room) {
    std::memcpy(out, in, bytes);
    return;
  }
  copy_line(out, in);
  for (int64_t at = kLine - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kLine); at < bytes; at += kLine) {
    copy_line(out + at, in + at);
  }
}

// Asks for the first lines of memory from `data` on, which may lie behind the end of a buffer.
inline void fetch_start(const char* data) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t at = 0; at < 256; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + at));
  }
}

// Offsets and sizes of a batch on the host. The constructor proves them, so that no kernel below can leave its buffers.
struct Batch {
  int64_t batch;
  int64_t rows;
  int64_t ragged;
  const int64_t* offsets;
  const int64_t* sizes; // nullptr for one ragged dim

  Batch(const Tensor& offsets_, const std::optional<Tensor>& sizes_, int64_t rows_, const int64_t* max_sizes, int64_t k)
      : batch(offsets_.size(0) - 1),
        rows(rows_),
        ragged(k),
        offsets(static_cast<const int64_t*>(offsets_.const_data_ptr())),
        sizes(sizes_ ? static_cast<const int64_t*>(sizes_->const_data_ptr()) : nullptr) {
    DANLING_CHECK(offsets[0] == 0 && offsets[batch] == rows, "offsets must begin at 0 and end at ", rows, " rows");
    for (int64_t i = 0; i < batch; ++i) {
      int64_t count = offsets[i + 1] - offsets[i];
      DANLING_CHECK(count >= 0, "offsets decrease at element ", i);
      if (sizes == nullptr) {
        DANLING_CHECK(
            max_sizes == nullptr || count <= max_sizes[0],
            "element ", i, " has ", count, " rows, more than ", max_sizes[0]);
        continue;
      }
      int64_t product = 1;
      for (int64_t d = 0; d < ragged; ++d) {
        int64_t size = sizes[i * ragged + d];
        DANLING_CHECK(
            size >= 0 && size <= max_sizes[d], "element ", i, " has size ", size, " in ragged dim ", d,
            ", outside 0 to ", max_sizes[d]);
        product *= size;
      }
      DANLING_CHECK(product == count, "element ", i, " has ", count, " rows but sizes that give ", product);
    }
  }

  // One ragged dim, with offsets that need no proof
  Batch(const int64_t* offsets_, int64_t batch_)
      : batch(batch_), rows(offsets_[batch_]), ragged(1), offsets(offsets_), sizes(nullptr) {}

  int64_t size(int64_t element, int64_t dim) const {
    return sizes == nullptr ? offsets[element + 1] - offsets[element] : sizes[element * ragged + dim];
  }

  // The element that row belongs to, for row < rows
  int64_t element_of(int64_t row) const {
    return std::upper_bound(offsets, offsets + batch + 1, row) - offsets - 1;
  }
};

Tensor pad(
    const Tensor& values_, const Tensor& offsets_, std::optional<Tensor> sizes_, std::vector<int64_t> max_sizes,
    const Tensor& fill_) {
  check_rows(values_, "values");
  const int64_t k = static_cast<int64_t>(max_sizes.size());
  const Tensor offsets = check_offsets(offsets_, values_, "values");
  const std::optional<Tensor> sizes = check_sizes(sizes_, offsets.size(0) - 1, k, offsets);
  check_fill(fill_, dtype_code(values_));
  for (int64_t size : max_sizes) {
    DANLING_CHECK(size >= 0, "max_sizes must not be negative");
  }
  const Batch batch(offsets, sizes, values_.size(0), max_sizes.data(), k);
  const Tensor values = dense(values_);

  std::vector<int64_t> shape{batch.batch};
  shape.insert(shape.end(), max_sizes.begin(), max_sizes.end());
  for (int64_t d = 1; d < values.dim(); ++d) {
    shape.push_back(values.size(d));
  }
  Tensor result = make(values, shape);
  const Filler fill(fill_);
  const int64_t row_bytes = tail_numel(values, 1) * fill.width;
  if (result.numel() == 0) {
    return result;
  }
  const char* source = static_cast<const char*>(values.const_data_ptr());
  const char* source_end = source + values.size(0) * row_bytes;
  char* target = static_cast<char*>(result.mutable_data_ptr());

  // A line is a run of padded rows along the last ragged dim: data first, fill after it.
  const int64_t length = max_sizes[k - 1];
  int64_t lines_per_element = 1;
  for (int64_t d = 0; d + 1 < k; ++d) {
    lines_per_element *= max_sizes[d];
  }
  torch::stable::parallel_for(
      0, batch.batch * lines_per_element * length, grain(row_bytes), [&](int64_t begin, int64_t end) {
        int64_t line = begin / length;
        int64_t position = begin % length;
        const char* target_end = target + end * row_bytes;
        for (; begin < end; ++line, position = 0) {
          const int64_t stop = std::min(end - begin, length - position) + position;
          int64_t element = line;
          int64_t row = 0; // of the line's first row within the element, in lines
          bool inside = true;
          if (k > 1) {
            element = line / lines_per_element;
            int64_t rest = line % lines_per_element;
            int64_t weight = 1;
            for (int64_t d = k - 2; d >= 0; --d) {
              const int64_t index = rest % max_sizes[d];
              rest /= max_sizes[d];
              inside = inside && index < batch.size(element, d);
              row += index * weight;
              weight *= batch.size(element, d);
            }
          }
          const int64_t count = inside ? batch.size(element, k - 1) : 0;
          char* out = target + begin * row_bytes;
          const int64_t data = std::max<int64_t>(0, std::min(stop, count) - position);
          if (data > 0) {
            const char* in = source + (batch.offsets[element] + row * count + position) * row_bytes;
            copy_run(out, in, data * row_bytes, std::min(source_end - in, target_end - out));
          }
          if (stop - position > data) {
            fill(out + data * row_bytes, (stop - position - data) * row_bytes);
          }
          begin += stop - position;
        }
      });
  return result;
}

// The rows of `batch` from a padded tensor that is large enough for them
Tensor unpad_rows(const Tensor& padded_, const Batch& batch) {
  const int64_t k = batch.ragged;
  const int64_t rows = batch.rows;
  // Rows may lie anywhere (a transposed batch dim is common); each must be contiguous in itself.
  int64_t expected = 1;
  bool whole_rows = true;
  for (int64_t d = padded_.dim() - 1; d > k; --d) {
    whole_rows = whole_rows && (padded_.size(d) == 1 || padded_.stride(d) == expected);
    expected *= padded_.size(d);
  }
  const Tensor padded = whole_rows ? padded_ : dense(padded_);
  Tensor result = make(padded, shape_with(rows, padded, 1 + k));
  const int64_t width = static_cast<int64_t>(padded.element_size());
  const int64_t row_bytes = tail_numel(padded, 1 + k) * width;
  if (result.numel() == 0) {
    return result;
  }
  const char* source = static_cast<const char*>(padded.const_data_ptr());
  char* target = static_cast<char*>(result.mutable_data_ptr());
  int64_t strides[kMaxRagged + 1];
  int64_t source_bytes = width;
  for (int64_t d = 0; d < padded.dim(); ++d) {
    const int64_t stride = padded.stride(d) * width;
    source_bytes += (padded.size(d) - 1) * stride;
    if (d <= k) {
      strides[d] = stride;
    }
  }
  const char* source_end = source + source_bytes;
  torch::stable::parallel_for(0, rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    int64_t element = batch.element_of(begin);
    const char* target_end = target + end * row_bytes;
    if (k == 1 && strides[1] == row_bytes) { // one run for each element: thousands of short ones need a short loop
      for (; begin < end; ++element) {
        const char* in = source + element * strides[0] + (begin - batch.offsets[element]) * row_bytes;
        fetch_start(in + 2 * strides[0]); // of an element further on, which the CPU does not see coming
        char* out = target + begin * row_bytes;
        const int64_t stop = std::min(end, batch.offsets[element + 1]);
        copy_run_aligned(out, in, (stop - begin) * row_bytes, std::min(source_end - in, target_end - out));
        begin = stop;
      }
      return;
    }
    while (begin < end) {
      while (batch.offsets[element + 1] <= begin) {
        ++element;
      }
      const int64_t length = batch.size(element, k - 1);
      int64_t position = begin - batch.offsets[element];
      int64_t line = 0;
      if (k > 1) {
        line = position / length;
        position %= length;
      }
      const int64_t count = std::min(end - begin, length - position);
      const char* in = source + element * strides[0] + position * strides[k];
      for (int64_t d = k - 2; d >= 0; --d) {
        in += line % batch.size(element, d) * strides[d + 1];
        line /= batch.size(element, d);
      }
      char* out = target + begin * row_bytes;
      if (strides[k] == row_bytes) {
        std::memcpy(out, in, count * row_bytes);
      } else {
        for (int64_t row = 0; row < count; ++row) {
          std::memcpy(out + row * row_bytes, in + row * strides[k], row_bytes);
        }
      }
      begin += count;
    }
  });
  return result;
}

Tensor unpad(const Tensor& padded, const Tensor& offsets_, std::optional<Tensor> sizes_, int64_t rows) {
  DANLING_CHECK(!sizes_ || sizes_->dim() == 2, "sizes must be two-dimensional, (B, k)");
  const int64_t k = sizes_ ? sizes_->size(1) : 1;
  DANLING_CHECK(padded.dim() >= 1 + k, "padded needs a batch dim and ", k, " ragged dims");
  DANLING_CHECK(rows >= 0, "rows must not be negative");
  const Tensor offsets = check_offsets(offsets_, padded, "padded");
  DANLING_CHECK(padded.size(0) == offsets.size(0) - 1, "padded and offsets disagree in batch size");
  const std::optional<Tensor> sizes = check_sizes(sizes_, padded.size(0), k, offsets);
  std::vector<int64_t> max_sizes;
  for (int64_t d = 0; d < k; ++d) {
    max_sizes.push_back(padded.size(1 + d));
  }
  return unpad_rows(padded, Batch(offsets, sizes, rows, max_sizes.data(), k));
}

// Everything that is known of a batch from its lengths, in one call: rows, offsets, and the largest length.
std::tuple<Tensor, Tensor, int64_t> unpad_lengths(const Tensor& padded, const Tensor& lengths_) {
  DANLING_CHECK(padded.dim() >= 2, "padded needs a batch dim and a ragged dim");
  DANLING_CHECK(lengths_.scalar_type() == ScalarType::Long && lengths_.dim() == 1, "lengths must be int64, (B,)");
  DANLING_CHECK(padded.size(0) == lengths_.size(0), "padded and lengths disagree in batch size");
  check_same_device(padded, "padded", lengths_, "lengths");
  const Tensor lengths = dense(lengths_);
  const int64_t batch = lengths.size(0);
  const int64_t* sizes = static_cast<const int64_t*>(lengths.const_data_ptr());
  int64_t longest = 0;
  int64_t shortest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    longest = std::max(longest, sizes[i]);
    shortest = std::min(shortest, sizes[i]);
  }
  DANLING_CHECK(
      shortest >= 0 && longest <= padded.size(1), "lengths must be within 0 and ", padded.size(1), ", the padded size");
  Tensor offsets = make(lengths, {batch + 1});
  int64_t* bounds = static_cast<int64_t*>(offsets.mutable_data_ptr());
  bounds[0] = 0;
  for (int64_t i = 0; i < batch; ++i) {
    bounds[i + 1] = bounds[i] + sizes[i];
  }
  return {unpad_rows(padded, Batch(bounds, batch)), offsets, longest};
}

Tensor pack(std::vector<Tensor> tensors) {
  DANLING_CHECK(!tensors.empty(), "pack needs at least one tensor");
  check_list(tensors, 1);
  std::vector<int64_t> offsets{0};
  for (Tensor& tensor : tensors) {
    offsets.push_back(offsets.back() + tensor.size(0));
    tensor = dense(tensor);
  }
  const int64_t rows = offsets.back();
  Tensor result = make(tensors[0], shape_with(rows, tensors[0]));
  if (result.numel() == 0) {
    return result;
  }
  const int64_t row_bytes = tail_numel(result, 1) * static_cast<int64_t>(result.element_size());
  std::vector<const char*> sources;
  for (const Tensor& tensor : tensors) {
    sources.push_back(static_cast<const char*>(tensor.const_data_ptr()));
  }
  char* target = static_cast<char*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, offsets[i + 1]);
      std::memcpy(
          target + begin * row_bytes, sources[i] + (begin - offsets[i]) * row_bytes, (stop - begin) * row_bytes);
      begin = std::max(begin, stop);
    }
  });
  return result;
}

template <typename Word>
void copy_words(char* out, int64_t to, const char* in, int64_t from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * to, in + i * from, sizeof(Word));
  }
}

// One element of any strides into a target of other strides, both in bytes
struct StridedCopy {
  int64_t dims;
  const int64_t* sizes;
  const int64_t* from;
  const int64_t* to;
  int64_t width;

  void operator()(char* out, const char* in, int64_t dim = 0) const {
    int64_t run = width; // bytes of a contiguous rest
    bool contiguous = true;
    for (int64_t d = dims - 1; d >= dim; --d) {
      contiguous = contiguous && (sizes[d] == 1 || (from[d] == run && to[d] == run));
      run *= sizes[d];
    }
    if (contiguous) {
      std::memcpy(out, in, run);
      return;
    }
    if (dim == dims - 1) {
      switch (width) {
        case 1:
          return copy_words<char>(out, to[dim], in, from[dim], sizes[dim]);
        case 2:
          return copy_words<uint16_t>(out, to[dim], in, from[dim], sizes[dim]);
        case 4:
          return copy_words<uint32_t>(out, to[dim], in, from[dim], sizes[dim]);
        case 8:
          return copy_words<uint64_t>(out, to[dim], in, from[dim], sizes[dim]);
        default:
          return copy_words<Wide>(out, to[dim], in, from[dim], sizes[dim]);
      }
    }
    for (int64_t i = 0; i < sizes[dim]; ++i) {
      (*this)(out + i * to[dim], in + i * from[dim], dim + 1);
    }
  }
};

Tensor pad_list(std::vector<Tensor> tensors, std::vector<int64_t> max_sizes, const Tensor& fill_) {
  const int64_t k = static_cast<int64_t>(max_sizes.size());
  const int64_t batch = static_cast<int64_t>(tensors.size());
  check_list(tensors, k);
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t d = 0; d < k; ++d) {
      DANLING_CHECK(
          tensors[i].size(d) <= max_sizes[d],
          "tensor ", i, " has size ", tensors[i].size(d), " in dim ", d, ", more than ", max_sizes[d]);
    }
  }
  for (int64_t size : max_sizes) {
    DANLING_CHECK(size >= 0, "max_sizes must not be negative");
  }
  check_fill(fill_, tensors.empty() ? dtype_code(fill_) : dtype_code(tensors[0]));
  std::vector<int64_t> shape{batch};
  shape.insert(shape.end(), max_sizes.begin(), max_sizes.end());
  if (batch > 0) {
    for (int64_t d = k; d < tensors[0].dim(); ++d) {
      shape.push_back(tensors[0].size(d));
    }
  }
  Tensor result = make(batch > 0 ? tensors[0] : fill_, shape);
  if (result.numel() == 0) {
    return result;
  }
  const Filler fill(fill_);
  const int64_t dims = result.dim() - 1;
  std::vector<int64_t> to;
  for (int64_t d = 0; d < dims; ++d) {
    to.push_back(result.stride(d + 1) * fill.width);
  }
  std::vector<std::vector<int64_t>> sizes(batch), from(batch);
  std::vector<const char*> sources;
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t d = 0; d < dims; ++d) {
      sizes[i].push_back(tensors[i].size(d));
      from[i].push_back(tensors[i].stride(d) * fill.width);
    }
    sources.push_back(static_cast<const char*>(tensors[i].const_data_ptr()));
  }
  char* target = static_cast<char*>(result.mutable_data_ptr());
  // Split along the first ragged dim of all elements together, so that one long element is shared out too.
  const int64_t length = k > 0 ? max_sizes[0] : 1;
  const int64_t slice_bytes = result.stride(0) * fill.width / std::max<int64_t>(1, length);
  torch::stable::parallel_for(0, batch * length, grain(slice_bytes), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / length;
      const int64_t position = begin % length;
      const int64_t stop = std::min(end - begin, length - position) + position;
      const int64_t count = k > 0 ? sizes[i][0] : 1;
      const int64_t data = std::max<int64_t>(0, std::min(stop, count) - position);
      char* out = target + begin * slice_bytes;
      bool full = true; // the slices that hold data hold nothing else
      for (int64_t d = 1; d < k; ++d) {
        full = full && sizes[i][d] == max_sizes[d];
      }
      const int64_t clean = full ? data : 0;
      if (stop - position > clean) {
        fill(out + clean * slice_bytes, (stop - position - clean) * slice_bytes);
      }
      if (data > 0) {
        std::vector<int64_t> extent(sizes[i]);
        const char* in = sources[i];
        if (k > 0) {
          extent[0] = data;
          in += position * from[i][0];
        }
        StridedCopy{dims, extent.data(), from[i].data(), to.data(), fill.width}(out, in);
      }
      begin += stop - position;
    }
  });
  return result;
}

Tensor prefix_lengths(const Tensor& mask_) {
  DANLING_CHECK(mask_.scalar_type() == ScalarType::Bool && mask_.dim() == 2, "mask must be bool, (B, L)");
  const Tensor mask = dense(mask_);
  const int64_t length = mask.size(1);
  Tensor result = make(mask, {mask.size(0)}, int64_code());
  const uint8_t* source = static_cast<const uint8_t*>(mask.const_data_ptr());
  int64_t* target = static_cast<int64_t*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, mask.size(0), grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* m = source + row * length;
      const void* hole = length > 0 ? std::memchr(m, 0, length) : nullptr;
      const int64_t count = hole == nullptr ? length : static_cast<const uint8_t*>(hole) - m;
      uint8_t rest = 0;
      for (int64_t i = count; i < length; ++i) {
        rest |= m[i];
      }
      target[row] = rest == 0 ? count : -1;
    }
  });
  return result;
}

Tensor segment_expand(const Tensor& per_segment_, const Tensor& offsets_, int64_t rows) {
  check_rows(per_segment_, "per_segment");
  DANLING_CHECK(rows >= 0, "rows must not be negative");
  const Tensor offsets = check_offsets(offsets_, per_segment_, "per_segment");
  DANLING_CHECK(per_segment_.size(0) == offsets.size(0) - 1, "per_segment and offsets disagree in batch size");
  const Batch batch(offsets, std::nullopt, rows, nullptr, 1);
  const Tensor per_segment = dense(per_segment_);
  Tensor result = make(per_segment, shape_with(rows, per_segment));
  if (result.numel() == 0) {
    return result;
  }
  const int64_t row_bytes = tail_numel(result, 1) * static_cast<int64_t>(result.element_size());
  const char* source = static_cast<const char*>(per_segment.const_data_ptr());
  char* target = static_cast<char*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t element = batch.element_of(begin); begin < end; ++element) {
      const int64_t stop = std::min(end, batch.offsets[element + 1]);
      if (stop <= begin) {
        continue;
      }
      char* out = target + begin * row_bytes;
      const int64_t bytes = (stop - begin) * row_bytes;
      std::memcpy(out, source + element * row_bytes, row_bytes);
      // Repeat what is there, doubling up to a block that stays in the nearest cache.
      int64_t done = row_bytes;
      int64_t block = row_bytes;
      while (done < bytes) {
        const int64_t step = std::min(block, bytes - done);
        std::memcpy(out + done, out, step);
        done += step;
        block = done <= 4096 ? done : block;
      }
      begin = stop;
    }
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CPU, m) {
  m.impl("pad", TORCH_BOX(&pad));
  m.impl("unpad", TORCH_BOX(&unpad));
  m.impl("unpad_lengths", TORCH_BOX(&unpad_lengths));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("pad_list", TORCH_BOX(&pad_list));
  m.impl("prefix_lengths", TORCH_BOX(&prefix_lengths));
  m.impl("segment_expand", TORCH_BOX(&segment_expand));
}

} // namespace danling

DANLING_BUILT_WITH(";compiler=" __VERSION__)
