// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Which slot a token takes its row from is written down first; then each output row is written once.
#include "compact/scatter_tokens.h"

#include <algorithm>

namespace tokred {
namespace {

void find_slots(const ScatterTokensArgs& args) {
  const int64_t lists = args.batch_size * args.list_heads;
  parallel_for(lists, 1 + (int64_t{1} << 16) / (args.k + args.num_tokens + 1), [&](int64_t list, int64_t last) {
    for (; list < last; ++list) {
      int32_t* slots = args.slot_idx + list * args.num_tokens;
      std::fill_n(slots, args.num_tokens, -1);
      for (int64_t slot = 0; slot < args.k; ++slot) {
        const int64_t token = args.kept_idx[list * args.k + slot];
        if (token >= 0 && token < args.num_tokens) slots[token] = static_cast<int32_t>(slot);
      }
    }
  });
}

template <typename T>
TOKRED_CLONES void blend_row(const T* fresh, const T* base, T* out, int64_t n, float alpha, float beta) {
  for (int64_t c = 0; c < n; ++c) {
    out[c] = static_cast<T>(alpha * static_cast<float>(fresh[c]) + beta * static_cast<float>(base[c]));
  }
}
template <typename T>
TOKRED_CLONES void scale_row(const T* fresh, T* out, int64_t n, float alpha) {
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<T>(alpha * static_cast<float>(fresh[c]));
}

template <typename T>
void blend_rows(const ScatterTokensArgs& args, const ScatterTensor& t) {
  const int64_t rows = args.batch_size * t.num_heads * args.num_tokens, n = t.row_bytes / int64_t{sizeof(T)};
  const auto values = [](const char* row) { return reinterpret_cast<const T*>(row); };
  parallel_for(rows, copy_grain(t.row_bytes), [&](int64_t row, int64_t last) {
    for (; row < last; ++row) {
      const int64_t token = row % args.num_tokens, list = row / args.num_tokens;
      const int64_t batch = list / t.num_heads, head = list % t.num_heads;
      const int64_t slot = scatter_slot(args, batch, head, token);
      const char* base = scatter_base(t, batch, head, token);
      char* dst = t.dst + row * t.row_bytes;
      T* out = reinterpret_cast<T*>(dst);
      if (slot < 0) {
        if (base != dst) copy_row(dst, base, t.row_bytes);
      } else if (base && args.beta != 0) {
        blend_row(values(scatter_row(t, batch, head, slot)), values(base), out, n, args.alpha, args.beta);
      } else {
        scale_row(values(scatter_row(t, batch, head, slot)), out, n, args.alpha);
      }
    }
  });
}

}  // namespace

void scatter_tokens_cpu(const ScatterTokensArgs& args) {
  if (!args.slots_known) find_slots(args);
  for (int i = 0; i < args.num_tensors; ++i) {
    const ScatterTensor& t = args.tensors[i];
    if (args.blend) {
      dispatch_float(t.dtype, [&](auto tag) { blend_rows<typename decltype(tag)::type>(args, t); });
      continue;
    }
    copy_rows(t, args.batch_size, args.num_tokens, [&](int64_t batch, int64_t head) {
      return [&, batch, head](int64_t token) -> const char* {
        const int64_t slot = scatter_slot(args, batch, head, token);
        return slot >= 0 ? scatter_row(t, batch, head, slot) : scatter_base(t, batch, head, token);
      };
    });
  }
}

}  // namespace tokred
