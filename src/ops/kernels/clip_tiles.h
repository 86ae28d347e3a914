// Cuts a matrix of rows and units into tiles, one for a block of threads or a task of a pool. The
// cuts depend on the sizes alone.
#pragma once

#include <cstdint>

namespace accumops {

// A part of a matrix: some rows of some units.
struct ClipTile {
  std::int64_t row_tile;  // its number, counted down the rows
  std::int64_t first_row, rows;
  std::int64_t first_unit, units;
};

struct ClipTiling {
  // The matrix has so many rows and units.
  std::int64_t rows, units;
  // A tile has so many; fewer at the matrix's edges.
  std::int64_t tile_rows, tile_units;

  constexpr std::int64_t row_tiles() const { return Ceiling(rows, tile_rows); }
  constexpr std::int64_t unit_tiles() const { return Ceiling(units, tile_units); }
  constexpr std::int64_t tiles() const { return row_tiles() * unit_tiles(); }
  // Sums that its tiles make: one for each of their units.
  constexpr std::int64_t sums() const { return row_tiles() * units; }

  constexpr ClipTile Tile(std::int64_t i) const {
    const std::int64_t row_tile = i / unit_tiles();
    const std::int64_t row = row_tile * tile_rows;
    const std::int64_t unit = i % unit_tiles() * tile_units;
    return {row_tile, row, Least(tile_rows, rows - row), unit, Least(tile_units, units - unit)};
  }

 private:
  static constexpr std::int64_t Ceiling(std::int64_t a, std::int64_t b) {
    return a / b + (a % b != 0);
  }
  static constexpr std::int64_t Least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
};

}  // namespace accumops
