// Kernels that move bytes. As on the CPU they know widths, not dtypes. Every output row is written by one block, which finds
// out where the row comes from; offsets that contradict the buffers leave positions unwritten, and no buffer is ever left.

#include "launch.cuh"

#include <algorithm>
#include <cstring>

namespace danling {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTileUnits = 2048; // units of work for one block at a time

// Widest power of two, up to 16, that divides all bits of `mask`
int unit_width(uint64_t mask) {
  int width = 16;
  while (width > 1 && (mask & static_cast<uint64_t>(width - 1)) != 0) {
    width /= 2;
  }
  return width;
}

uint64_t address(const void* pointer) {
  return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(pointer));
}

// Output rows are dealt out in tiles: many rows where they are short, one row, and pieces of it along y, where they are long.
struct Tiles {
  int64_t rows;
  int64_t units; // per row
  int64_t tile; // rows per tile
  int64_t pieces; // per row

  Tiles(int64_t rows_, int64_t units_) : rows(rows_), units(units_) {
    tile = std::max<int64_t>(1, kTileUnits / units);
    pieces = (units + kTileUnits - 1) / kTileUnits;
  }

  dim3 grid() const {
    const int64_t tiles = (rows + tile - 1) / tile;
    return dim3(
        static_cast<unsigned>(std::min<int64_t>(tiles, 2147483647)),
        static_cast<unsigned>(std::min<int64_t>(pieces, 65535)));
  }
};

struct Pattern {
  alignas(16) char bytes[16];

  template <typename Unit>
  __device__ Unit at(int64_t unit) const {
    return reinterpret_cast<const Unit*>(bytes)[unit & (16 / sizeof(Unit) - 1)];
  }
};

// Where elements lie, packed (base, offsets) or each by itself (pointers); sizes (B, k) or none where offsets tell.
struct Elements {
  const char* base;
  const char* const* pointers;
  const int64_t* offsets;
  const int64_t* sizes;
  int64_t batch;
  int64_t rows; // in base
  int ragged;
  int64_t max_sizes[kMaxRagged];
  int64_t strides[kMaxRagged + 1]; // of the padded tensor, in bytes: batch, then ragged dims
  int64_t row_bytes;

  __device__ int64_t size(int64_t element, int dim) const {
    return sizes == nullptr ? offsets[element + 1] - offsets[element] : sizes[element * ragged + dim];
  }

  // Row `position` of padded element `element`: its first byte, or nullptr where there is only padding
  __device__ const char* row(int64_t element, int64_t position) const {
    int64_t local = 0;
    int64_t weight = 1;
    for (int d = ragged - 1; d >= 0; --d) {
      int64_t index = position;
      if (d > 0) {
        index = position % max_sizes[d];
        position /= max_sizes[d];
      }
      const int64_t extent = size(element, d);
      if (index >= extent) {
        return nullptr;
      }
      local += index * weight;
      weight *= extent;
    }
    if (pointers != nullptr) {
      return pointers[element] + local * row_bytes;
    }
    const int64_t at = offsets[element] + local;
    return at >= 0 && at < rows && at < offsets[element + 1] ? base + at * row_bytes : nullptr;
  }

  // Row `local` of element `element`, as it lies in the padded tensor
  __device__ const char* padded_row(int64_t element, int64_t local) const {
    const char* at = base + element * strides[0];
    for (int d = ragged - 1; d >= 0; --d) {
      int64_t index = local;
      if (d > 0) {
        const int64_t extent = size(element, d);
        if (extent <= 0) {
          return nullptr;
        }
        index = local % extent;
        local /= extent;
      }
      if (index < 0 || index >= max_sizes[d]) {
        return nullptr;
      }
      at += index * strides[d + 1];
    }
    return at;
  }
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    to_padded(Unit* __restrict__ out, Elements elements, Tiles tiles, int64_t length, Pattern fill) {
  for (int64_t first = blockIdx.x * tiles.tile; first < tiles.rows; first += gridDim.x * tiles.tile) {
    const int64_t first_element = first / length; // one 64-bit division for the tile
    const int64_t first_position = first - first_element * length;
    const uint32_t count = static_cast<uint32_t>(min(tiles.tile, tiles.rows - first));
    for (int64_t piece = blockIdx.y; piece < tiles.pieces; piece += gridDim.y) {
      const int64_t start = piece * kTileUnits;
      const uint32_t units = static_cast<uint32_t>(min(kTileUnits, tiles.units - start));
      for (uint32_t i = threadIdx.x; i < count * units; i += kThreads) {
        const uint32_t local = i / units;
        const int64_t unit = start + (i - local * units);
        int64_t element = first_element;
        int64_t position = first_position + local;
        if (position >= length) {
          if (length > kTileUnits) { // a tile is shorter than that: one step is enough
            position -= length;
            ++element;
          } else {
            const uint32_t steps = static_cast<uint32_t>(position) / static_cast<uint32_t>(length);
            position -= static_cast<int64_t>(steps) * length;
            element += steps;
          }
        }
        const char* row = elements.row(element, position);
        out[(first + local) * tiles.units + unit] =
            row != nullptr ? reinterpret_cast<const Unit*>(row)[unit] : fill.at<Unit>(unit);
      }
    }
  }
}

enum class From { kPadded, kList, kExpand };

template <typename Unit, From kFrom>
__global__ void __launch_bounds__(kThreads) to_packed(Unit* __restrict__ out, Elements elements, Tiles tiles) {
  __shared__ int64_t bounds[2]; // elements of the tile's first and last row
  for (int64_t first = blockIdx.x * tiles.tile; first < tiles.rows; first += gridDim.x * tiles.tile) {
    const uint32_t count = static_cast<uint32_t>(min(tiles.tile, tiles.rows - first));
    __syncthreads();
    if (threadIdx.x < 2) {
      const int64_t row = threadIdx.x == 0 ? first : first + count - 1;
      bounds[threadIdx.x] = element_of(elements.offsets, 0, elements.batch - 1, row);
    }
    __syncthreads();
    for (int64_t piece = blockIdx.y; piece < tiles.pieces; piece += gridDim.y) {
      const int64_t start = piece * kTileUnits;
      const uint32_t units = static_cast<uint32_t>(min(kTileUnits, tiles.units - start));
      for (uint32_t i = threadIdx.x; i < count * units; i += kThreads) {
        const uint32_t local = i / units;
        const int64_t unit = start + (i - local * units);
        const int64_t row = first + local;
        const int64_t element = element_of(elements.offsets, bounds[0], bounds[1], row);
        const int64_t inside = row - elements.offsets[element];
        if (inside < 0 || row >= elements.offsets[element + 1]) {
          continue; // a row of no element
        }
        const char* from;
        if constexpr (kFrom == From::kPadded) {
          from = elements.padded_row(element, inside);
        } else if constexpr (kFrom == From::kList) {
          from = elements.pointers[element] + inside * elements.row_bytes;
        } else {
          from = elements.base + element * elements.row_bytes;
        }
        if (from != nullptr) {
          out[row * tiles.units + unit] = reinterpret_cast<const Unit*>(from)[unit];
        }
      }
    }
  }
}

template <typename Launch>
void with_unit(int width, const Launch& launch) {
  switch (width) {
    case 16:
      return launch(uint4{});
    case 8:
      return launch(uint2{});
    case 4:
      return launch(uint32_t{});
    case 2:
      return launch(uint16_t{});
    default:
      return launch(uint8_t{});
  }
}

void launch_padded(const Tensor& result, const Elements& elements, const Tensor& fill, uint64_t alignment) {
  const int64_t width = static_cast<int64_t>(fill.element_size());
  DANLING_CHECK(width <= 16 && (width & (width - 1)) == 0, "values of ", width, " bytes are not supported");
  Pattern pattern;
  for (int64_t at = 0; at < 16; at += width) {
    std::memcpy(pattern.bytes + at, fill.const_data_ptr(), width);
  }
  void* out = result.mutable_data_ptr();
  const OnDevice device(result);
  int64_t length = 1;
  for (int d = 0; d < elements.ragged; ++d) {
    length *= elements.max_sizes[d];
  }
  with_unit(unit_width(alignment | address(out) | static_cast<uint64_t>(elements.row_bytes)), [&](auto unit) {
    using Unit = decltype(unit);
    const Tiles tiles(elements.batch * length, elements.row_bytes / static_cast<int64_t>(sizeof(Unit)));
    to_padded<Unit><<<tiles.grid(), kThreads, 0, device.stream()>>>(
        static_cast<Unit*>(out), elements, tiles, length, pattern);
  });
  check_launch("the padding kernel");
}

template <From kFrom>
void launch_packed(const Tensor& result, const Elements& elements, int64_t rows, uint64_t alignment) {
  void* out = result.mutable_data_ptr();
  const OnDevice device(result);
  with_unit(unit_width(alignment | address(out) | static_cast<uint64_t>(elements.row_bytes)), [&](auto unit) {
    using Unit = decltype(unit);
    const Tiles tiles(rows, elements.row_bytes / static_cast<int64_t>(sizeof(Unit)));
    to_packed<Unit, kFrom><<<tiles.grid(), kThreads, 0, device.stream()>>>(static_cast<Unit*>(out), elements, tiles);
  });
  check_launch("the packing kernel");
}

const int64_t* numbers(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// Pointers and numbers of a list, on the device of `like`, through pinned memory that torch keeps until the copy is done
Tensor upload(const std::vector<int64_t>& content, const Tensor& like) {
  using torch::headeronly::DeviceType;
  const Tensor host = torch::stable::empty(
      {static_cast<int64_t>(content.size())}, ScalarType::Long, std::nullopt, torch::stable::Device(DeviceType::CPU),
      true);
  std::memcpy(host.mutable_data_ptr(), content.data(), content.size() * sizeof(int64_t));
  return torch::stable::to(host, like.device(), /*non_blocking=*/true);
}

Tensor pad(
    const Tensor& values_, const Tensor& offsets_, std::optional<Tensor> sizes_, std::vector<int64_t> max_sizes,
    const Tensor& fill) {
  check_cuda(values_, "values");
  check_rows(values_, "values");
  const int64_t k = static_cast<int64_t>(max_sizes.size());
  const Tensor offsets = check_offsets(offsets_, values_, "values");
  const std::optional<Tensor> sizes = check_sizes(sizes_, offsets.size(0) - 1, k, offsets);
  check_fill(fill, dtype_code(values_));
  const Tensor values = dense(values_);

  Elements elements{};
  elements.offsets = numbers(offsets);
  elements.sizes = sizes ? numbers(*sizes) : nullptr;
  elements.batch = offsets.size(0) - 1;
  elements.rows = values.size(0);
  elements.ragged = static_cast<int>(k);
  elements.row_bytes = tail_numel(values, 1) * static_cast<int64_t>(values.element_size());
  std::vector<int64_t> shape{elements.batch};
  for (int64_t d = 0; d < k; ++d) {
    DANLING_CHECK(max_sizes[d] >= 0, "max_sizes must not be negative");
    elements.max_sizes[d] = max_sizes[d];
    shape.push_back(max_sizes[d]);
  }
  for (int64_t d = 1; d < values.dim(); ++d) {
    shape.push_back(values.size(d));
  }
  const Tensor result = make(values, shape);
  if (result.numel() == 0) {
    return result;
  }
  elements.base = static_cast<const char*>(values.const_data_ptr());
  launch_padded(result, elements, fill, address(elements.base));
  return result;
}

Tensor unpad(const Tensor& padded_, const Tensor& offsets_, std::optional<Tensor> sizes_, int64_t rows) {
  check_cuda(padded_, "padded");
  DANLING_CHECK(!sizes_ || sizes_->dim() == 2, "sizes must be two-dimensional, (B, k)");
  const int64_t k = sizes_ ? sizes_->size(1) : 1;
  DANLING_CHECK(padded_.dim() >= 1 + k, "padded needs a batch dim and ", k, " ragged dims");
  DANLING_CHECK(rows >= 0, "rows must not be negative");
  const Tensor offsets = check_offsets(offsets_, padded_, "padded");
  DANLING_CHECK(padded_.size(0) == offsets.size(0) - 1, "padded and offsets disagree in batch size");
  const std::optional<Tensor> sizes = check_sizes(sizes_, padded_.size(0), k, offsets);

  int64_t expected = 1;
  bool whole_rows = true;
  for (int64_t d = padded_.dim() - 1; d > k; --d) {
    whole_rows = whole_rows && (padded_.size(d) == 1 || padded_.stride(d) == expected);
    expected *= padded_.size(d);
  }
  const Tensor padded = whole_rows ? padded_ : dense(padded_);
  const Tensor result = make(padded, shape_with(rows, padded, 1 + k));
  DANLING_CHECK(result.numel() == 0 || padded.size(0) > 0, "rows are asked of an empty batch");
  if (result.numel() == 0) {
    return result;
  }
  const int64_t width = static_cast<int64_t>(padded.element_size());
  Elements elements{};
  elements.base = static_cast<const char*>(padded.const_data_ptr());
  elements.offsets = numbers(offsets);
  elements.sizes = sizes ? numbers(*sizes) : nullptr;
  elements.batch = padded.size(0);
  elements.ragged = static_cast<int>(k);
  elements.row_bytes = tail_numel(padded, 1 + k) * width;
  uint64_t alignment = address(elements.base);
  for (int64_t d = 0; d <= k; ++d) {
    elements.strides[d] = padded.stride(d) * width;
    alignment |= static_cast<uint64_t>(elements.strides[d]);
    if (d > 0) {
      elements.max_sizes[d - 1] = padded.size(d);
    }
  }
  launch_packed<From::kPadded>(result, elements, rows, alignment);
  return result;
}

Tensor pack(std::vector<Tensor> tensors) {
  DANLING_CHECK(!tensors.empty(), "pack needs at least one tensor");
  check_cuda(tensors[0], "tensor 0");
  check_list(tensors, 1);
  const int64_t batch = static_cast<int64_t>(tensors.size());
  std::vector<int64_t> content(2 * batch + 1); // offsets, then pointers
  uint64_t alignment = 0;
  for (int64_t i = 0; i < batch; ++i) {
    tensors[i] = dense(tensors[i]);
    content[i + 1] = content[i] + tensors[i].size(0);
  }
  const int64_t rows = content[batch];
  const Tensor result = make(tensors[0], shape_with(rows, tensors[0]));
  if (result.numel() == 0) {
    return result;
  }
  for (int64_t i = 0; i < batch; ++i) {
    const uint64_t pointer = address(tensors[i].const_data_ptr());
    alignment |= pointer;
    content[batch + 1 + i] = static_cast<int64_t>(pointer);
  }
  const Tensor table = upload(content, result);
  Elements elements{};
  elements.offsets = numbers(table);
  elements.pointers = reinterpret_cast<const char* const*>(numbers(table) + batch + 1);
  elements.batch = batch;
  elements.row_bytes = tail_numel(result, 1) * static_cast<int64_t>(result.element_size());
  launch_packed<From::kList>(result, elements, rows, alignment);
  return result;
}

Tensor pad_list(std::vector<Tensor> tensors, std::vector<int64_t> max_sizes, const Tensor& fill) {
  const int64_t k = static_cast<int64_t>(max_sizes.size());
  const int64_t batch = static_cast<int64_t>(tensors.size());
  DANLING_CHECK(batch > 0, "pad_list needs at least one tensor");
  DANLING_CHECK(k <= kMaxRagged, "at most ", kMaxRagged, " ragged dims are supported, not ", k);
  check_cuda(tensors[0], "tensor 0");
  check_list(tensors, k);
  check_fill(fill, dtype_code(tensors[0]));
  std::vector<int64_t> shape{batch};
  for (int64_t size : max_sizes) {
    DANLING_CHECK(size >= 0, "max_sizes must not be negative");
    shape.push_back(size);
  }
  for (int64_t d = k; d < tensors[0].dim(); ++d) {
    shape.push_back(tensors[0].size(d));
  }
  Elements elements{};
  elements.batch = batch;
  elements.ragged = static_cast<int>(std::max<int64_t>(1, k)); // elements of one size are one row each
  elements.max_sizes[0] = 1;
  std::copy(max_sizes.begin(), max_sizes.end(), elements.max_sizes);
  std::vector<int64_t> content; // sizes, then pointers
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t d = 0; d < k; ++d) {
      DANLING_CHECK(
          tensors[i].size(d) <= max_sizes[d],
          "tensor ", i, " has size ", tensors[i].size(d), " in dim ", d, ", more than ", max_sizes[d]);
      content.push_back(tensors[i].size(d));
    }
    if (k == 0) {
      content.push_back(1);
    }
  }
  const Tensor result = make(tensors[0], shape);
  if (result.numel() == 0) {
    return result;
  }
  uint64_t alignment = 0;
  for (Tensor& tensor : tensors) {
    tensor = dense(tensor);
    alignment |= address(tensor.const_data_ptr());
    content.push_back(static_cast<int64_t>(address(tensor.const_data_ptr())));
  }
  const Tensor table = upload(content, result);
  elements.sizes = numbers(table);
  elements.pointers = reinterpret_cast<const char* const*>(numbers(table) + batch * elements.ragged);
  elements.row_bytes = tail_numel(tensors[0], k) * static_cast<int64_t>(result.element_size());
  launch_padded(result, elements, fill, alignment);
  return result;
}

Tensor segment_expand(const Tensor& per_segment_, const Tensor& offsets_, int64_t rows) {
  check_cuda(per_segment_, "per_segment");
  check_rows(per_segment_, "per_segment");
  DANLING_CHECK(rows >= 0, "rows must not be negative");
  const Tensor offsets = check_offsets(offsets_, per_segment_, "per_segment");
  DANLING_CHECK(per_segment_.size(0) == offsets.size(0) - 1, "per_segment and offsets disagree in batch size");
  const Tensor per_segment = dense(per_segment_);
  const Tensor result = make(per_segment, shape_with(rows, per_segment));
  DANLING_CHECK(result.numel() == 0 || per_segment.size(0) > 0, "rows are asked of an empty batch");
  if (result.numel() == 0) {
    return result;
  }
  Elements elements{};
  elements.base = static_cast<const char*>(per_segment.const_data_ptr());
  elements.offsets = numbers(offsets);
  elements.batch = per_segment.size(0);
  elements.row_bytes = tail_numel(result, 1) * static_cast<int64_t>(result.element_size());
  launch_packed<From::kExpand>(result, elements, rows, address(elements.base));
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(danling, CUDA, m) {
  m.impl("pad", TORCH_BOX(&pad));
  m.impl("unpad", TORCH_BOX(&unpad));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("pad_list", TORCH_BOX(&pad_list));
  m.impl("segment_expand", TORCH_BOX(&segment_expand));
}

} // namespace danling

#define DANLING_CUDA_VERSION DANLING_EXPANDED(__CUDACC_VER_MAJOR__) "." DANLING_EXPANDED(__CUDACC_VER_MINOR__)
#ifdef __CUDA_ARCH_LIST__
DANLING_BUILT_WITH(";cuda=" DANLING_CUDA_VERSION ";architectures=" DANLING_EXPANDED(__CUDA_ARCH_LIST__))
#else
DANLING_BUILT_WITH(";cuda=" DANLING_CUDA_VERSION)
#endif
