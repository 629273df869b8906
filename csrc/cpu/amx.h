// The tile registers of Intel's AMX, and the product of rows and a panel that lie in tiles.
//
// A tile register is 16 rows of 64 bytes. One instruction adds to 16 rows by 16 columns of float sums the products of
// 32 bfloat16 factors of each row and each column. What rows hold side by side, columns hold in pairs:
//
//          A: 16 rows x 32 factors                  B: 16 pairs of factors x 16 columns
//        +---------------------------+            +-----------------------------------+
//     m  | k0 k1 | k2 k3 | ... | k31 |     k0,k1  | n0: k0 k1 | n1: k0 k1 | ...  n15  |
//        | ...                       |     k2,k3  | n0: k2 k3 | ...                   |
//        +---------------------------+            +-----------------------------------+
//
// The eight registers: 4 of sums (16 rows x 4 vectors of columns) + 3 planes of A + 1 plane of B.
#pragma once

#include "plan.h"
#include "simd.h"

#if defined(LSTM_EXT_TILES)  // the build defines it for the level that may use them

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

inline constexpr int kTileFactors = kTileBytes / sizeof(BFloat16);  // of a tile (plan.h has its height and depth)

// ---- the registers: 0 to 3 hold sums, 4 to 6 the planes of rows, 7 one plane of a panel ---------------

inline constexpr int kRowTile = 4, kPanelTile = 7;

#if !defined(LSTM_EXT_TILES_IN_ARRAYS)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

inline void configure_tiles(int rows) {
  TileConfig config;
  for (int n = 0; n < kPanelTile; ++n) config.rows[n] = static_cast<uint8_t>(rows);
  config.rows[kPanelTile] = kTileHeight;
  asm volatile("ldtilecfg %0" ::"m"(config));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
LSTM_EXT_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
LSTM_EXT_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

// sums += rows * panel
template <int sums, int rows>
LSTM_EXT_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(kPanelTile));
}

#else  // of a build with sanitizers, which see no access of a tile instruction

struct Tile {
  alignas(64) unsigned char row[kTileHeight][64];
};
inline thread_local Tile tiles[kPanelTile + 1];
inline thread_local int tile_rows = 0;

inline void configure_tiles(int rows) { tile_rows = rows; }
inline void release_tiles() { tile_rows = 0; }

template <int tile>
void load_tile(const void* from, int64_t stride) {
  const int rows = tile == kPanelTile ? kTileHeight : tile_rows;
  for (int m = 0; m < rows; ++m) {
    __builtin_memcpy(tiles[tile].row[m], static_cast<const unsigned char*>(from) + m * stride, 64);
  }
}

template <int tile>
void store_tile(void* to, int64_t stride) {
  for (int m = 0; m < tile_rows; ++m) {
    __builtin_memcpy(static_cast<unsigned char*>(to) + m * stride, tiles[tile].row[m], 64);
  }
}

template <int sums, int rows>
void multiply_tiles() {
  for (int m = 0; m < tile_rows; ++m) {
    Vec<float> sum{};
    for (int pair = 0; pair < kTileHeight; ++pair) {
      const auto* a = reinterpret_cast<const BFloat16*>(tiles[rows].row[m]) + 2 * pair;
      const auto* b = reinterpret_cast<const BFloat16*>(tiles[kPanelTile].row[pair]);
      sum = multiply_add(sum, broadcast_lane(a), load_factors(b), BFloat16{});
    }
    float* to = reinterpret_cast<float*>(tiles[sums].row[m]);
    store(to, load(to) + sum);
  }
}

#endif

// How many rows the registers are configured for. Whoever multiplies holds a TileSession, as other libraries configure
// the same registers.
inline thread_local int configured_rows = 0;

struct TileSession {
  TileSession() { configured_rows = 0; }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
  ~TileSession() { release_tiles(); }
};

// The unit that stores tiles falls asleep when it is not used for about half a microsecond, and takes a quarter of one
// to wake up (Xeon with AMX, 2026-11-25). So in long products a tile is stored now and then, after about as many
// multiplications.
inline constexpr int kProductsAwake = 24;

// ---- products ---------------------------------------------------------------------------------------------

// Rows of factors in planes (tiles.h), in elements: the first row's, the way to the next row, to the row's next plane,
// and to its next 32 factors.
struct TileRows {
  const BFloat16* first;
  int64_t next_row, next_plane, next_block;
};

template <int vectors, class Body>
LSTM_EXT_INLINE void for_vectors(const Body& body) {
  body(std::integral_constant<int, 0>{});
  if constexpr (vectors > 1) body(std::integral_constant<int, 1>{});
  if constexpr (vectors > 2) body(std::integral_constant<int, 2>{});
  if constexpr (vectors > 3) body(std::integral_constant<int, 3>{});
}

// Sums n += the planes of some rows times those of 16 columns, as far as their numbers add up to two at the most; the
// small ones first.
template <int n, int row_planes, int column_planes>
LSTM_EXT_INLINE void add_products(const BFloat16* columns) {
  constexpr int kLast = column_planes - 1;
  load_tile<kPanelTile>(columns + kLast * kTileFactors, kVecBytes);
  if constexpr (row_planes > 2 && kLast < 1) multiply_tiles<n, kRowTile + 2>();
  if constexpr (row_planes > 1 && kLast < 2) multiply_tiles<n, kRowTile + 1>();
  multiply_tiles<n, kRowTile>();
  if constexpr (kLast > 0) add_products<n, row_planes, kLast>(columns);
}

// tile[m] = start[m * start_stride] + rows times a panel [blocks][vectors][column_planes] of tiles;  tile is
// [rows][4][lanes], contiguous
template <int row_planes, int column_planes, int vectors>
LSTM_EXT_INLINE void multiply_blocks(TileRows rows, int64_t blocks, const BFloat16* panel, const float* start,
                                     int64_t start_stride, float* tile) {
  constexpr int64_t kFactor = sizeof(BFloat16), kSum = sizeof(float), kTileStride = 4 * kLanes<float> * kSum;
  constexpr int kOfBlock = vectors * tile_products(row_planes, column_planes);
  constexpr int kBlocksAwake = (kProductsAwake + kOfBlock - 1) / kOfBlock;
  for_vectors<vectors>([&](auto n) { load_tile<n>(start + n * kLanes<float>, start_stride * kSum); });
  for (int64_t block = 0; block < blocks; ++block) {
    load_tile<kRowTile>(rows.first, rows.next_row * kFactor);
    if constexpr (row_planes > 1) load_tile<kRowTile + 1>(rows.first + rows.next_plane, rows.next_row * kFactor);
    if constexpr (row_planes > 2) load_tile<kRowTile + 2>(rows.first + 2 * rows.next_plane, rows.next_row * kFactor);
    for_vectors<vectors>(
        [&](auto n) { add_products<n, row_planes, column_planes>(panel + n * column_planes * kTileFactors); });
    if (block % kBlocksAwake == 0) store_tile<kRowTile>(tile, kTileStride);  // anything, to where sums will be
    rows.first += rows.next_block;
    panel += vectors * column_planes * kTileFactors;
  }
  for_vectors<vectors>([&](auto n) { store_tile<n>(tile + n * kLanes<float>, kTileStride); });
}

// The same for `count` rows and 1 to 4 vectors
template <int row_planes, int column_planes>
LSTM_EXT_INLINE void multiply_blocks(int count, int vectors, const TileRows& rows, int64_t blocks,
                                     const BFloat16* panel, const float* start, int64_t start_stride, float* tile) {
  if (count != configured_rows) configure_tiles(configured_rows = count);
  switch (vectors) {
    case 1: return multiply_blocks<row_planes, column_planes, 1>(rows, blocks, panel, start, start_stride, tile);
    case 2: return multiply_blocks<row_planes, column_planes, 2>(rows, blocks, panel, start, start_stride, tile);
    case 3: return multiply_blocks<row_planes, column_planes, 3>(rows, blocks, panel, start, start_stride, tile);
    default: return multiply_blocks<row_planes, column_planes, 4>(rows, blocks, panel, start, start_stride, tile);
  }
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL

#endif
