// Three kernels: the sums of squares of each tile, the factors of the units from the sums of their
// tiles, and the clipped gradients. Why it is built this way:
//
// - A warp reads 32 units of a row, which lie side by side. Where a matrix has fewer units than a
//   block has threads, the block does several rows at once: it is a matrix of `lanes` by `width`.
// - A factor is needed before the first value of its unit can be written, so gradients are read
//   twice: the second time in part from the L2 cache.
// - Which thread adds what, and in which order, follows from the sizes.
#include "clip_tiles.h"
#include "clip_units.h"
#include "cuda_common.cuh"
#include "tensor_table.cuh"

namespace accumops {
namespace {

constexpr int kThreads = 256;
constexpr int kTileValues = 16384;

// A block's threads in rows and units, and the tiles that it takes.
struct Layout {
  __host__ __device__ explicit Layout(std::int64_t units) : width(1) {
    while (width < kThreads && width < units) width *= 2;
  }

  __host__ __device__ ClipTiling Tiling(std::int64_t rows, std::int64_t units) const {
    return {rows, units, kTileValues / width, width};
  }

  int width;  // threads for the units of a row
};

ClipTiling TilingOf(const ClipItem& item) {
  return Layout(item.units).Tiling(item.rows, item.units);
}

// Where an item's results are in the workspace.
struct Found {
  // Sums of squares: one for each unit of the first row tile, then of the second, and so on.
  double* gradients;
  double* weights;
  double* factors;  // one for each unit
};

template <int kTableCapacity>
struct Params {
  static constexpr int kCapacity = kTableCapacity;

  ClipItem item[kCapacity];
  Found found[kCapacity];
  // Ascending; chunks are counted through the table. Negative where an earlier grid began the item.
  std::int64_t first_chunk[kCapacity];
  ClipSettings settings;
  int count;
};

constexpr int kSmallCapacity = 56;
using SmallParams = Params<kSmallCapacity>;
using LargeParams = Params<cuda::LargeCapacity(448, kSmallCapacity)>;

// A thread's place in a tile.
struct Place {
  __device__ Place(const ClipItem& item, std::int64_t tile_index)
      : width(Layout(item.units).width),
        tiling(Layout(item.units).Tiling(item.rows, item.units)),
        tile(tiling.Tile(tile_index)),
        lanes(kThreads / width),
        lane(static_cast<int>(threadIdx.x) / width),
        column(static_cast<int>(threadIdx.x) % width),
        unit(tile.first_unit + column) {}

  // Calls body(i) for the thread's values, of one unit.
  template <typename Body>
  __device__ void ForEachValue(const Body& body) const {
    if (column >= tile.units) return;
    const std::int64_t end = tile.first_row + tile.rows;
#pragma unroll 4
    for (std::int64_t row = tile.first_row + lane; row < end; row += lanes) {
      body(row * tiling.units + unit);
    }
  }

  int width;
  ClipTiling tiling;
  ClipTile tile;
  int lanes, lane, column;
  std::int64_t unit;
};

template <typename Table>
__global__ void __launch_bounds__(kThreads) SumsKernel(ACCUMOPS_PARAMS(Table) params) {
  ACCUMOPS_SHARED(gradients, double[kThreads]);
  ACCUMOPS_SHARED(weights, double[kThreads]);
  const std::int64_t block = blockIdx.x;
  const int entry = cuda::FindEntry(params.first_chunk, params.count, block);
  const ClipItem& item = params.item[entry];
  const Place place(item, block - params.first_chunk[entry]);
  double gradient = 0, weight = 0;
  place.ForEachValue([&](std::int64_t i) {
    const double g = item.gradient[i], w = item.weights[i];
    gradient = fma(g, g, gradient);
    weight = fma(w, w, weight);
  });
  const int thread = static_cast<int>(threadIdx.x);
  gradients[thread] = gradient;
  weights[thread] = weight;
  for (int distance = kThreads / 2; distance >= place.width; distance /= 2) {
    __syncthreads();
    if (thread < distance) {
      gradients[thread] += gradients[thread + distance];
      weights[thread] += weights[thread + distance];
    }
  }
  if (thread < place.width && place.column < place.tile.units) {
    const std::int64_t sum = place.tile.row_tile * place.tiling.units + place.unit;
    params.found[entry].gradients[sum] = gradients[thread];
    params.found[entry].weights[sum] = weights[thread];
  }
}

template <typename Table>
__global__ void __launch_bounds__(kThreads) FactorsKernel(ACCUMOPS_PARAMS(Table) params) {
  const std::int64_t block = blockIdx.x;
  const int entry = cuda::FindEntry(params.first_chunk, params.count, block);
  const ClipItem& item = params.item[entry];
  const std::int64_t unit = (block - params.first_chunk[entry]) * kThreads + threadIdx.x;
  if (unit >= item.units) return;
  const Found& found = params.found[entry];
  const std::int64_t sums = Layout(item.units).Tiling(item.rows, item.units).sums();
  double gradient = 0, weight = 0;
#pragma unroll 4
  for (std::int64_t i = unit; i < sums; i += item.units) {
    gradient += found.gradients[i];
    weight += found.weights[i];
  }
  found.factors[unit] =
      ClipFactor(gradient, weight, params.settings, [](double x) { return sqrt(x); });
}

template <typename Table>
__global__ void __launch_bounds__(kThreads) ScaleKernel(ACCUMOPS_PARAMS(Table) params) {
  const std::int64_t block = blockIdx.x;
  const int entry = cuda::FindEntry(params.first_chunk, params.count, block);
  const ClipItem& item = params.item[entry];
  const Place place(item, block - params.first_chunk[entry]);
  if (place.column >= place.tile.units) return;
  const double factor = params.found[entry].factors[place.unit];
  place.ForEachValue([&](std::int64_t i) {
    item.clipped[i] = static_cast<float>(static_cast<double>(item.gradient[i]) * factor);
  });
}

// Runs a kernel over all items, with `chunks_of(item)` blocks for each.
template <typename Table, typename Kernel, typename CountChunks>
cudaError_t Launch(Kernel kernel, const ClipItem* items, std::size_t count,
                   const ClipSettings& settings, double* workspace, CountChunks chunks_of,
                   cudaStream_t stream) {
  Table params;
  params.settings = settings;
  std::size_t placed = 0;
  double* next = workspace;
  Found found = {};
  return cuda::ForEachTable(
      count, Table::kCapacity, [&](std::size_t i) { return chunks_of(items[i]); },
      [&](std::size_t i, const cuda::TablePart& part) {
        for (; placed <= i; ++placed) {
          const ClipTiling tiling = TilingOf(items[placed]);
          found = {next, next + tiling.sums(), next + 2 * tiling.sums()};
          next = found.factors + tiling.units;
        }
        params.item[part.entry] = items[i];
        params.found[part.entry] = found;
        params.first_chunk[part.entry] = part.first_chunk - part.begin;
      },
      [&](int entries, std::int64_t chunks) {
        params.count = entries;
        return cuda::Launch(kernel, chunks, kThreads, params, stream);
      });
}

template <typename Table>
cudaError_t LaunchAll(const ClipItem* items, std::size_t count, const ClipSettings& settings,
                      double* workspace, cudaStream_t stream) {
  const auto tiles = [](const ClipItem& item) { return TilingOf(item).tiles(); };
  const auto units = [](const ClipItem& item) {
    return item.rows == 0 ? 0 : cuda::ChunksOf(item.units, kThreads);
  };
  cudaError_t error =
      Launch<Table>(SumsKernel<Table>, items, count, settings, workspace, tiles, stream);
  if (error != cudaSuccess) return error;
  error = Launch<Table>(FactorsKernel<Table>, items, count, settings, workspace, units, stream);
  if (error != cudaSuccess) return error;
  return Launch<Table>(ScaleKernel<Table>, items, count, settings, workspace, tiles, stream);
}

}  // namespace

std::size_t ClipUnitsWorkspace(const ClipItem* items, std::size_t count) {
  std::int64_t values = 0;
  for (std::size_t i = 0; i < count; ++i) {
    values += 2 * TilingOf(items[i]).sums() + items[i].units;
  }
  return static_cast<std::size_t>(values) * sizeof(double);
}

const char* ClipUnitsCuda(const ClipItem* items, std::size_t count, const ClipSettings& settings,
                          void* workspace, CUstream_st* stream) {
  const auto launch = cuda::ChooseTable<SmallParams, LargeParams>(count, LaunchAll<SmallParams>,
                                                                  LaunchAll<LargeParams>);
  return cuda::ErrorText(launch(items, count, settings, static_cast<double*>(workspace), stream));
}

}  // namespace accumops
