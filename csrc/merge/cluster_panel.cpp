// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/cluster_panel.h"

namespace tokred {

TOKRED_CLONES void panel_distances(int64_t rows, int64_t width, const float* row_square, const float* col_square,
                                   float* product) {
  for (int64_t i = 0; i < rows; ++i) {
    const float square = row_square[i];
    float* value = product + i * width;
    for (int64_t j = 0; j < width; ++j) {
      const float negative = 2.f * value[j] - (square + col_square[j]);
      value[j] = negative > 0.f ? 0.f : negative;
    }
  }
}

}  // namespace tokred
