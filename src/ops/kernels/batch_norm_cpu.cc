#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <type_traits>
#include <vector>

#include "batch_norm.h"
#include "batch_norm_span.h"

namespace accumops {
namespace {

// Work is cut into tiles of about this much of x: rows and, where there are very many, channels.
// Tiles depend on the shape alone, so that sums do not depend on the number of threads.
constexpr std::int64_t kTileBytes = 256 << 10;
constexpr std::int64_t kTileColumns = 512;
// Rows of a tile are a multiple of this, as long as they keep their sums in the data's precision.
constexpr std::int64_t kRows = 128;
// Few channels are folded: several rows become one row of at least this many columns.
constexpr std::int64_t kFoldedColumns = 64;
constexpr std::int64_t kLanes = 16;
// A panel is all rows of some columns. Up to this much of x, it stays in a core's own cache from
// the sums to the results.
constexpr std::int64_t kPanelBytes = 2 << 20;
// Above this, results bypass the caches: they would evict what they are made from.
constexpr std::int64_t kStreamingBytes = 16 << 20;
constexpr std::uintptr_t kCacheLine = 64;

std::int64_t Ceil(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How an array is walked through. Channels last: rows of `columns`, folded channels, and a few rows
// left over; channels first: `outer` blocks of runs, each of one channel.
struct Layout {
  std::int64_t channels;
  std::int64_t rows;          // after folding
  std::int64_t columns;       // of a row: channels * fold, or the values of a run
  std::int64_t fold;          // rows that make one
  std::int64_t left_over;     // rows of `channels` after those
  std::int64_t tile_rows;     // of each tile but the last ones
  std::int64_t tile_columns;  // channels last: columns of a tile; channels first: channels of it
  bool channels_first;

  std::int64_t row_tiles() const { return Ceil(rows, tile_rows); }
  std::int64_t column_tiles() const {
    return Ceil(channels_first ? channels : columns, tile_columns);
  }
  std::int64_t tiles() const { return row_tiles() * column_tiles(); }
  // Statistics of a row tile: a value for each column, or for each channel.
  std::int64_t width() const { return channels_first ? channels : columns; }
};

Layout MakeLayout(BatchNormShape shape, DType dtype, bool masked) {
  if (shape.channels == 1 && !masked) shape = {shape.outer * shape.inner, 1, 1};
  const auto size = static_cast<std::int64_t>(SizeOf(dtype));
  Layout layout = {};
  layout.channels = shape.channels;
  layout.channels_first = shape.inner != 1;
  if (layout.channels_first) {
    layout.fold = 1;
    layout.rows = shape.outer;
    layout.columns = shape.inner;
    const std::int64_t run_bytes = std::max<std::int64_t>(1, shape.inner * size);
    layout.tile_columns = std::clamp<std::int64_t>(kTileBytes / run_bytes, 1, shape.channels);
    layout.tile_rows = std::max<std::int64_t>(1, kTileBytes / (run_bytes * layout.tile_columns));
    return layout;
  }
  layout.fold = 1;
  if (!masked && shape.channels < kFoldedColumns) {
    layout.fold = kLanes / std::gcd(shape.channels, kLanes);
    while (shape.channels * layout.fold < kFoldedColumns) layout.fold *= 2;
  }
  layout.rows = shape.outer / layout.fold;
  layout.left_over = shape.outer % layout.fold;
  layout.columns = shape.channels * layout.fold;
  layout.tile_columns = std::clamp<std::int64_t>(layout.columns, 1, kTileColumns);
  const std::int64_t rows = kTileBytes / (layout.tile_columns * size);
  layout.tile_rows = std::max(kRows, rows / kRows * kRows);
  return layout;
}

// One tile: where it starts in the array, and its columns within a row tile's statistics.
struct Tile {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t column;
  std::int64_t columns;
  std::int64_t row_tile;
};

Tile TileAt(const Layout& layout, std::int64_t index) {
  const std::int64_t row_tile = index / layout.column_tiles();
  const std::int64_t row = row_tile * layout.tile_rows;
  const std::int64_t column = index % layout.column_tiles() * layout.tile_columns;
  return {row, std::min(layout.tile_rows, layout.rows - row), column,
          std::min(layout.tile_columns, layout.width() - column), row_tile};
}

// Columns of a panel, such that all threads get equally many panels. 0 where panels would be too
// long or too narrow to be quicker than all sums first and then all results. Both give the same
// values.
std::int64_t PanelColumns(const Layout& layout, DType dtype, const Executor& executor) {
  if (layout.channels_first || layout.fold != 1 || layout.rows == 0) return 0;
  const std::int64_t row_bytes = layout.columns * static_cast<std::int64_t>(SizeOf(dtype));
  std::int64_t panels = executor.concurrency();
  while (layout.rows * row_bytes / panels > kPanelBytes) panels *= 2;
  const std::int64_t columns = layout.columns / panels;
  return columns >= kTileColumns && layout.columns % panels == 0 ? columns : 0;
}

// Calls body(first column) for each panel.
template <typename Body>
void ForEachPanel(const Layout& layout, std::int64_t columns, Executor& executor,
                  const Body& body) {
  ParallelFor(executor, layout.columns / columns, [&](std::int64_t i) { body(i * columns); });
}

// Calls body(block, offset in values, first row) for the row tiles of a panel.
template <typename Body>
void ForEachRowTile(const Layout& layout, std::int64_t column, std::int64_t columns, DType dtype,
                    const Body& body) {
  for (std::int64_t row = 0; row < layout.rows; row += layout.tile_rows) {
    const std::int64_t rows = std::min(layout.tile_rows, layout.rows - row);
    body(BatchNormBlock{rows, columns, layout.columns, dtype}, row * layout.columns + column, row);
  }
}

// Calls body(block, offset in values, channel) for each run of a tile.
template <typename Body>
void ForEachRun(const Layout& layout, const Tile& tile, DType dtype, const Body& body) {
  const BatchNormBlock run = {1, layout.columns, layout.columns, dtype};
  for (std::int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
    for (std::int64_t c = tile.column; c < tile.column + tile.columns; ++c) {
      body(run, (r * layout.channels + c) * layout.columns, c);
    }
  }
}

// Calls body(block, offset in values, column of the statistics) for a tile's blocks.
template <typename Body>
void ForEachBlock(const Layout& layout, const Tile& tile, DType dtype, const Body& body) {
  if (layout.channels_first) {
    ForEachRun(layout, tile, dtype, body);
    return;
  }
  body(BatchNormBlock{tile.rows, tile.columns, layout.columns, dtype},
       tile.row * layout.columns + tile.column, tile.column);
}

BatchNormBlock LeftOver(const Layout& layout, DType dtype) {
  return {layout.left_over, layout.channels, layout.channels, dtype};
}

template <typename Pointer>
Pointer At(Pointer data, std::int64_t offset, std::size_t size) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(data) + offset * static_cast<std::int64_t>(size);
}

// Arrays of factors with a value for each column of a row: the channels' values, again and again.
class Factors {
 public:
  Factors(const Layout& layout, DType dtype)
      : channels_(layout.channels),
        width_(layout.width()),
        wide_(StatisticsType(dtype) == DType::kFloat64),
        uniform_(layout.channels_first),
        data_(static_cast<std::size_t>(4 * width_ + 8)) {}

  enum Kind { kShift, kScale, kSlope, kOffset };

  void Set(Kind kind, std::int64_t channel, double value) {
    for (std::int64_t c = channel; c < width_; c += channels_) {
      if (wide_) {
        static_cast<double*>(Row(kind))[c] = value;
      } else {
        static_cast<float*>(Row(kind))[c] = static_cast<float>(value);
      }
    }
  }

  BatchNormFactors At(std::int64_t column, bool streaming) {
    const std::size_t size = wide_ ? sizeof(double) : sizeof(float);
    const auto at = [&](Kind kind) { return accumops::At(Row(kind), column, size); };
    return {at(kShift), at(kScale), at(kSlope), at(kOffset), uniform_, streaming};
  }

 private:
  void* Row(Kind kind) { return data_.data() + kind * width_; }

  const std::int64_t channels_, width_;
  const bool wide_, uniform_;
  std::vector<double> data_;
};

double Read(const void* values, DType dtype, std::int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(values)[i]
                                  : static_cast<double>(static_cast<const float*>(values)[i]);
}

void Write(void* values, DType dtype, std::int64_t i, double value) {
  if (values == nullptr) return;
  if (dtype == DType::kFloat64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

// Moments of columns or channels that have `count` values each.
struct Moments {
  explicit Moments(std::int64_t width)
      : mean(static_cast<std::size_t>(width)), centred(static_cast<std::size_t>(width)) {}

  double count = 0;
  std::vector<double> mean, centred;

  // Merges the moments of `width` columns that have `size` values each.
  void Add(const double* other_mean, const double* other_centred, std::int64_t width, double size) {
    if (size == 0) return;
    CurrentBatchNormSpanFunctions().merge(other_mean, other_centred, width, size, count,
                                          mean.data(), centred.data());
    count += size;
  }
};

// The moments of all channels, merged from the moments of the tiles' columns.
Moments FindMoments(const Layout& layout, const void* x, const bool* mask, DType dtype,
                    Executor& executor) {
  const BatchNormSpanFunctions& functions = CurrentBatchNormSpanFunctions();
  const std::size_t size = SizeOf(dtype);
  const std::int64_t width = layout.width();
  const auto cells = static_cast<std::size_t>(layout.row_tiles() * width);
  std::vector<double> means(cells), centred(cells);
  std::vector<double> counts(static_cast<std::size_t>(layout.row_tiles()));
  ParallelFor(executor, layout.tiles(), [&](std::int64_t index) {
    const Tile tile = TileAt(layout, index);
    const std::int64_t first = tile.row_tile * width;
    double count = 0;
    if (!layout.channels_first) {
      const std::int64_t offset = tile.row * layout.columns + tile.column;
      functions.moments({tile.rows, tile.columns, layout.columns, dtype}, At(x, offset, size),
                        mask == nullptr ? nullptr : mask + tile.row, &count,
                        &means[first + tile.column], &centred[first + tile.column]);
    } else {
      ForEachRun(
          layout, tile, dtype, [&](const BatchNormBlock& run, std::int64_t offset, std::int64_t c) {
            count = static_cast<double>((offset / layout.columns / layout.channels - tile.row) *
                                        layout.columns);
            functions.uniform_moments(run, At(x, offset, size), &count, &means[first + c],
                                      &centred[first + c]);
          });
    }
    if (tile.column == 0) counts[tile.row_tile] = count;  // the same in all columns
  });
  Moments columns(width);
  for (std::int64_t i = 0; i < layout.row_tiles(); ++i) {
    columns.Add(&means[i * width], &centred[i * width], width, counts[i]);
  }
  if (layout.fold == 1) return columns;
  Moments channels(layout.channels);
  for (std::int64_t i = 0; i < layout.fold; ++i) {
    channels.Add(&columns.mean[i * layout.channels], &columns.centred[i * layout.channels],
                 layout.channels, columns.count);
  }
  if (layout.left_over > 0) {
    functions.moments(LeftOver(layout, dtype), At(x, layout.rows * layout.columns, size), nullptr,
                      &channels.count, channels.mean.data(), channels.centred.data());
  }
  return channels;
}

bool Streams(const Layout& layout, const void* to, DType dtype) {
  const auto size = static_cast<std::int64_t>(SizeOf(dtype));
  return !layout.channels_first && layout.rows * layout.columns * size >= kStreamingBytes &&
         layout.columns % kLanes == 0 && reinterpret_cast<std::uintptr_t>(to) % kCacheLine == 0;
}

void NormalizeTiles(const Layout& layout, const void* x, void* y, DType dtype, Factors& factors,
                    Executor& executor) {
  const BatchNormSpanFunctions& functions = CurrentBatchNormSpanFunctions();
  const std::size_t size = SizeOf(dtype);
  const bool streaming = Streams(layout, y, dtype);
  const std::int64_t tiles = layout.tiles();
  ParallelFor(executor, tiles, [&](std::int64_t index) {
    // From the end: what was read last may still be in the caches.
    const Tile tile = TileAt(layout, tiles - 1 - index);
    ForEachBlock(layout, tile, dtype,
                 [&](const BatchNormBlock& block, std::int64_t offset, std::int64_t column) {
                   functions.normalize(block, At(x, offset, size), At(y, offset, size),
                                       factors.At(column, streaming));
                 });
  });
  if (layout.left_over > 0) {
    const std::int64_t offset = layout.rows * layout.columns;
    functions.normalize(LeftOver(layout, dtype), At(x, offset, size), At(y, offset, size),
                        factors.At(0, false));
  }
}

struct GradientSums {
  double dy = 0;
  double product = 0;
};

std::vector<GradientSums> FindGradientSums(const Layout& layout, const BatchNormGradient& args,
                                           Factors& factors, Executor& executor) {
  const BatchNormSpanFunctions& functions = CurrentBatchNormSpanFunctions();
  const std::size_t size = SizeOf(args.dtype);
  const std::int64_t width = layout.width();
  const std::int64_t parts = layout.row_tiles() + (layout.left_over > 0 ? 1 : 0);
  const auto cells = static_cast<std::size_t>(parts * width);
  std::vector<double> sums(cells), products(cells);
  const auto add = [&](const BatchNormBlock& block, std::int64_t offset, std::int64_t column,
                       std::int64_t cell) {
    functions.gradient_sums(block, At(args.x, offset, size), At(args.dy, offset, size),
                            factors.At(column, false), &sums[cell], &products[cell]);
  };
  ParallelFor(executor, layout.tiles(), [&](std::int64_t index) {
    const Tile tile = TileAt(layout, index);
    ForEachBlock(layout, tile, args.dtype,
                 [&](const BatchNormBlock& block, std::int64_t offset, std::int64_t column) {
                   add(block, offset, column, tile.row_tile * width + column);
                 });
  });
  if (layout.left_over > 0) {
    add(LeftOver(layout, args.dtype), layout.rows * layout.columns, 0, (parts - 1) * width);
  }
  std::vector<GradientSums> totals(static_cast<std::size_t>(layout.channels));
  for (std::int64_t cell = 0; cell < parts * width; cell += layout.channels) {
    for (std::int64_t c = 0; c < layout.channels; ++c) {
      totals[c].dy += sums[cell + c];
      totals[c].product += products[cell + c];
    }
  }
  return totals;
}

void GradientTiles(const Layout& layout, const BatchNormGradient& args, Factors& factors,
                   Executor& executor) {
  const BatchNormSpanFunctions& functions = CurrentBatchNormSpanFunctions();
  const std::size_t size = SizeOf(args.dtype);
  const bool streaming = Streams(layout, args.dx, args.dtype);
  const std::int64_t tiles = layout.tiles();
  ParallelFor(executor, tiles, [&](std::int64_t index) {
    const Tile tile = TileAt(layout, tiles - 1 - index);
    ForEachBlock(layout, tile, args.dtype,
                 [&](const BatchNormBlock& block, std::int64_t offset, std::int64_t column) {
                   functions.gradient(block, At(args.x, offset, size), At(args.dy, offset, size),
                                      At(args.dx, offset, size),
                                      args.mask == nullptr ? nullptr : args.mask + tile.row,
                                      factors.At(column, streaming));
                 });
  });
  if (layout.left_over > 0) {
    const std::int64_t offset = layout.rows * layout.columns;
    functions.gradient(LeftOver(layout, args.dtype), At(args.x, offset, size),
                       At(args.dy, offset, size), At(args.dx, offset, size), nullptr,
                       factors.At(0, false));
  }
}

Moments PanelMoments(const Layout& layout, std::int64_t column, std::int64_t columns,
                     const BatchNormForward& args) {
  const BatchNormSpanFunctions& functions = CurrentBatchNormSpanFunctions();
  Moments moments(columns);
  ForEachRowTile(layout, column, columns, args.dtype,
                 [&](const BatchNormBlock& block, std::int64_t offset, std::int64_t row) {
                   Moments tile(columns);
                   functions.moments(block, At(args.x, offset, SizeOf(args.dtype)),
                                     args.mask == nullptr ? nullptr : args.mask + row, &tile.count,
                                     tile.mean.data(), tile.centred.data());
                   moments.Add(tile.mean.data(), tile.centred.data(), columns, tile.count);
                 });
  return moments;
}

std::vector<GradientSums> PanelGradientSums(const Layout& layout, std::int64_t column,
                                            std::int64_t columns, const BatchNormGradient& args,
                                            Factors& factors) {
  const BatchNormSpanFunctions& functions = CurrentBatchNormSpanFunctions();
  const std::size_t size = SizeOf(args.dtype);
  const auto width = static_cast<std::size_t>(columns);
  std::vector<GradientSums> totals(width);
  ForEachRowTile(layout, column, columns, args.dtype,
                 [&](const BatchNormBlock& block, std::int64_t offset, std::int64_t) {
                   std::vector<double> sums(width), products(width);
                   functions.gradient_sums(block, At(args.x, offset, size),
                                           At(args.dy, offset, size), factors.At(column, false),
                                           sums.data(), products.data());
                   for (std::size_t c = 0; c < width; ++c) {
                     totals[c].dy += sums[c];
                     totals[c].product += products[c];
                   }
                 });
  return totals;
}

}  // namespace

void BatchNormForwardCpu(const BatchNormForward& args, Executor& executor) {
  if (args.shape.channels == 0) {
    *args.count = args.mask == nullptr ? args.shape.outer * args.shape.inner
                                       : std::count(args.mask, args.mask + args.shape.outer, true);
    return;
  }
  const DType type = StatisticsType(args.dtype);
  const Layout layout = MakeLayout(args.shape, args.dtype, args.mask != nullptr);
  Factors factors(layout, args.dtype);
  const auto finish = [&](std::int64_t c, double count, double mean, double centred) {
    const double variance = count == 0 ? 0 : centred / count;
    const double inverse = 1 / std::sqrt(variance + args.epsilon);
    Write(args.statistics.mean, type, c, mean);
    const double rest = mean - Read(args.statistics.mean, type, c);
    Write(args.statistics.rest, type, c, rest);
    Write(args.statistics.variance, type, c, variance);
    Write(args.statistics.inverse, type, c, inverse);
    const double scale = Read(args.gamma, type, c) * inverse;
    factors.Set(Factors::kShift, c, mean);
    factors.Set(Factors::kScale, c, scale);
    factors.Set(Factors::kOffset, c, Read(args.beta, type, c) - rest * scale);
  };
  const std::size_t size = SizeOf(args.dtype);
  const std::int64_t columns = PanelColumns(layout, args.dtype, executor);
  if (columns > 0) {
    ForEachPanel(layout, columns, executor, [&](std::int64_t column) {
      const Moments moments = PanelMoments(layout, column, columns, args);
      if (column == 0) *args.count = static_cast<std::int64_t>(moments.count);
      for (std::int64_t c = 0; c < columns; ++c) {
        finish(column + c, moments.count, moments.mean[c], moments.centred[c]);
      }
      const BatchNormBlock block = {layout.rows, columns, layout.columns, args.dtype};
      CurrentBatchNormSpanFunctions().normalize(
          block, At(args.x, column, size), At(args.y, column, size), factors.At(column, false));
    });
    return;
  }
  const Moments moments = FindMoments(layout, args.x, args.mask, args.dtype, executor);
  *args.count = static_cast<std::int64_t>(moments.count);
  for (std::int64_t c = 0; c < layout.channels; ++c) {
    finish(c, moments.count, moments.mean[c], moments.centred[c]);
  }
  NormalizeTiles(layout, args.x, args.y, args.dtype, factors, executor);
}

void BatchNormInferenceCpu(const BatchNormInference& args, Executor& executor) {
  if (args.shape.channels == 0) return;
  const DType type = StatisticsType(args.dtype);
  const Layout layout = MakeLayout(args.shape, args.dtype, false);
  Factors factors(layout, args.dtype);
  for (std::int64_t c = 0; c < layout.channels; ++c) {
    const double inverse = 1 / std::sqrt(Read(args.variance, type, c) + args.epsilon);
    factors.Set(Factors::kShift, c, Read(args.mean, type, c));
    factors.Set(Factors::kScale, c, Read(args.gamma, type, c) * inverse);
    factors.Set(Factors::kOffset, c, Read(args.beta, type, c));
  }
  NormalizeTiles(layout, args.x, args.y, args.dtype, factors, executor);
}

void BatchNormGradientCpu(const BatchNormGradient& args, Executor& executor) {
  if (args.shape.channels == 0) return;
  const DType type = StatisticsType(args.dtype);
  const Layout layout = MakeLayout(args.shape, args.dtype, args.mask != nullptr);
  Factors factors(layout, args.dtype);
  for (std::int64_t c = 0; c < layout.channels; ++c) {
    factors.Set(Factors::kShift, c, Read(args.statistics.mean, type, c));
  }
  const bool needs_sums = args.count != nullptr || args.dgamma != nullptr;
  const auto finish = [&](std::int64_t c, const GradientSums& sums) {
    const double rest = Read(args.statistics.rest, type, c);
    const double inverse = Read(args.statistics.inverse, type, c);
    const double dgamma = (sums.product - rest * sums.dy) * inverse;
    Write(args.dgamma, type, c, dgamma);
    Write(args.dbeta, type, c, sums.dy);
    const double scale = Read(args.gamma, type, c) * inverse;
    factors.Set(Factors::kScale, c, scale);
    if (args.count == nullptr || *args.count == 0) return;
    const auto count = static_cast<double>(*args.count);
    const double slope = -scale * inverse * dgamma / count;
    factors.Set(Factors::kSlope, c, slope);
    factors.Set(Factors::kOffset, c, -scale * sums.dy / count - slope * rest);
  };
  const std::size_t size = SizeOf(args.dtype);
  const std::int64_t columns = PanelColumns(layout, args.dtype, executor);
  if (needs_sums && columns > 0) {
    ForEachPanel(layout, columns, executor, [&](std::int64_t column) {
      const std::vector<GradientSums> sums =
          PanelGradientSums(layout, column, columns, args, factors);
      for (std::int64_t c = 0; c < columns; ++c) finish(column + c, sums[c]);
      const BatchNormBlock block = {layout.rows, columns, layout.columns, args.dtype};
      CurrentBatchNormSpanFunctions().gradient(block, At(args.x, column, size),
                                               At(args.dy, column, size), At(args.dx, column, size),
                                               args.mask, factors.At(column, false));
    });
    return;
  }
  std::vector<GradientSums> sums(static_cast<std::size_t>(layout.channels));
  if (needs_sums) sums = FindGradientSums(layout, args, factors, executor);
  for (std::int64_t c = 0; c < layout.channels; ++c) finish(c, sums[c]);
  GradientTiles(layout, args, factors, executor);
}

}  // namespace accumops
