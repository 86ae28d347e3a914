#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"
#include "clip_span.h"
#include "clip_tiles.h"
#include "clip_units.h"

namespace accumops {
namespace {

// A tile's sums stay in the L1 cache, and there are at most 1/64 as many as values.
constexpr std::int64_t kTileUnits = 1024;
constexpr std::int64_t kTileValues = 65536;

ClipTiling TilingOf(const ClipItem& item) {
  const std::int64_t units = std::clamp<std::int64_t>(item.units, 1, kTileUnits);
  return {item.rows, item.units, kTileValues / units, units};
}

std::vector<ClipTiling> TilingsOf(const ClipItem* items, std::size_t count) {
  std::vector<ClipTiling> tilings;
  for (std::size_t i = 0; i < count; ++i) tilings.push_back(TilingOf(items[i]));
  return tilings;
}

std::vector<std::int64_t> CountTiles(const std::vector<ClipTiling>& tilings) {
  std::vector<std::int64_t> counts;
  for (const ClipTiling& each : tilings) counts.push_back(each.tiles());
  return counts;
}

// The matrices of a list in tiles, with a place for what is found of each.
class Tiles {
 public:
  Tiles(const ClipItem* items, std::size_t count)
      : tilings_(TilingsOf(items, count)), blocks_(CountTiles(tilings_), 1) {
    std::int64_t sums = 0, units = 0;
    for (const ClipTiling& each : tilings_) {
      first_sum_.push_back(sums);
      first_unit_.push_back(units);
      sums += each.sums();
      units += each.units;
    }
    gradients_.resize(static_cast<std::size_t>(sums));
    weights_.resize(static_cast<std::size_t>(sums));
    factors_.resize(static_cast<std::size_t>(units));
  }

  // Calls body(i, tiling, tile) for each tile of each matrix.
  template <typename Body>
  void ForEach(Executor& executor, const Body& body) const {
    blocks_.ForEach(executor, [&](std::int64_t, std::size_t i, std::int64_t tile, std::int64_t) {
      body(i, tilings_[i], tilings_[i].Tile(tile));
    });
  }

  const ClipTiling& tiling(std::size_t i) const { return tilings_[i]; }
  double* gradients(std::size_t i) { return gradients_.data() + first_sum_[i]; }
  double* weights(std::size_t i) { return weights_.data() + first_sum_[i]; }
  double* factors(std::size_t i) { return factors_.data() + first_unit_[i]; }

 private:
  const std::vector<ClipTiling> tilings_;
  const Blocks blocks_;
  std::vector<std::int64_t> first_sum_, first_unit_;
  std::vector<double> gradients_, weights_, factors_;
};

// The factors of a matrix, from the sums of its tiles.
void FindFactors(const ClipTiling& tiling, const double* gradients, const double* weights,
                 const ClipSettings& settings, double* factors) {
  const auto sum = [&](const double* sums, std::int64_t unit) {
    double total = 0;
    for (std::int64_t k = unit; k < tiling.sums(); k += tiling.units) total += sums[k];
    return total;
  };
  for (std::int64_t unit = 0; unit < tiling.units; ++unit) {
    factors[unit] = ClipFactor(sum(gradients, unit), sum(weights, unit), settings,
                               [](double x) { return std::sqrt(x); });
  }
}

}  // namespace

void ClipUnitsCpu(const ClipItem* items, std::size_t count, const ClipSettings& settings,
                  Executor& executor) {
  const ClipSpanFunctions& functions = CurrentClipSpanFunctions();
  Tiles tiles(items, count);
  tiles.ForEach(executor, [&](std::size_t i, const ClipTiling& tiling, const ClipTile& tile) {
    const ClipRows shape = {tile.rows, tile.units, tiling.units};
    const std::int64_t value = tile.first_row * tiling.units + tile.first_unit;
    const std::int64_t sum = tile.row_tile * tiling.units + tile.first_unit;
    functions.column_squares(items[i].gradient + value, shape, tiles.gradients(i) + sum);
    functions.column_squares(items[i].weights + value, shape, tiles.weights(i) + sum);
  });
  ParallelFor(executor, static_cast<std::int64_t>(count), [&](std::int64_t item) {
    const auto i = static_cast<std::size_t>(item);
    FindFactors(tiles.tiling(i), tiles.gradients(i), tiles.weights(i), settings, tiles.factors(i));
  });
  tiles.ForEach(executor, [&](std::size_t i, const ClipTiling& tiling, const ClipTile& tile) {
    const std::int64_t value = tile.first_row * tiling.units + tile.first_unit;
    functions.scale_columns(items[i].gradient + value, items[i].clipped + value,
                            {tile.rows, tile.units, tiling.units},
                            tiles.factors(i) + tile.first_unit);
  });
}

}  // namespace accumops
