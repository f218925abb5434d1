// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace kilin::amx {

// What _tile_loadconfig takes: eight tiles of 16 rows of 64 bytes. 64-byte aligned where it is used.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace kilin::amx
