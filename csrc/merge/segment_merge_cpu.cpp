// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Destination-major: a stable counting sort lists each segment's members, then each output row is summed in a block of
// float32 columns that stays in L1 and is written once. Members are read up to four at a time, so that the sum passes
// L1 once per four rows; a segment with one member of factor 1 is a copy.
#include <algorithm>
#include <cmath>

#include "common/copy_rows.h"
#include "common/parallel.h"
#include "merge/segment_merge.h"

namespace tokred {
namespace {

constexpr int64_t kColumnBlock = 4096;  // floats; 16 KiB, half of the smallest L1

// One batch row. Stable: the last token of a segment is placed first, at the segment's end. dst_idx(i): as an array.
template <typename Index>
void sort_tokens(const Index& dst_idx, int64_t num_tokens, int64_t num_out, int32_t* offsets, int32_t* order) {
  const auto limit = static_cast<uint64_t>(num_out);
  std::memset(offsets, 0, sizeof(int32_t) * static_cast<size_t>(num_out + 1));
  for (int64_t i = 0; i < num_tokens; ++i) {
    const auto dst = static_cast<uint64_t>(int64_t{dst_idx(i)});  // a negative id is a large one
    if (dst < limit) ++offsets[dst];
  }
  int32_t total = 0;
  for (int64_t j = 0; j < num_out; ++j) offsets[j] = total += offsets[j];
  offsets[num_out] = total;
  for (int64_t i = num_tokens - 1; i >= 0; --i) {
    const auto dst = static_cast<uint64_t>(int64_t{dst_idx(i)});
    if (dst < limit) order[--offsets[dst]] = static_cast<int32_t>(i);
  }
}

TOKRED_INLINE float larger(float a, float b) { return (a < b || b != b) && a == a ? b : a; }  // NaN stays

// acc = (kFirst ? nothing : acc) + the kMembers rows, added in their order. kMax: the maximum instead.
template <typename T, int kMembers, bool kFirst, bool kMax>
TOKRED_CLONES void add_rows(const T* const* rows, const float* coef, float* __restrict__ acc, int64_t n) {
  const T* __restrict__ r0 = rows[0];
  const T* __restrict__ r1 = rows[kMembers > 1 ? 1 : 0];
  const T* __restrict__ r2 = rows[kMembers > 2 ? 2 : 0];
  const T* __restrict__ r3 = rows[kMembers > 3 ? 3 : 0];
  if constexpr (kMax) {
    for (int64_t c = 0; c < n; ++c) {
      float v = static_cast<float>(r0[c]);
      if constexpr (!kFirst) v = larger(acc[c], v);
      if constexpr (kMembers > 1) v = larger(v, static_cast<float>(r1[c]));
      if constexpr (kMembers > 2) v = larger(larger(v, static_cast<float>(r2[c])), static_cast<float>(r3[c]));
      acc[c] = v;
    }
  } else {
    const float c0 = coef[0], c1 = coef[kMembers > 1 ? 1 : 0];
    const float c2 = coef[kMembers > 2 ? 2 : 0], c3 = coef[kMembers > 3 ? 3 : 0];
    for (int64_t c = 0; c < n; ++c) {
      float v = c0 * static_cast<float>(r0[c]);
      if constexpr (!kFirst) v = acc[c] + v;
      if constexpr (kMembers > 1) v += c1 * static_cast<float>(r1[c]);
      if constexpr (kMembers > 2) v = v + c2 * static_cast<float>(r2[c]) + c3 * static_cast<float>(r3[c]);
      acc[c] = v;
    }
  }
}

template <typename T>
TOKRED_CLONES void round_row(const float* __restrict__ acc, T* __restrict__ out, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<T>(acc[c]);
}

// The factor of every member of one segment: factor / total, where total is 1 outside of a mean.
struct Coefficients {
  const float* factor;  // of the batch row; null: 1
  float total;

  Coefficients(const SegmentMergeArgs& a, int64_t batch_idx, const int32_t* members, int32_t count)
      : factor(a.factor() ? a.factor() + batch_idx * a.num_tokens : nullptr), total(1.f) {
    if (a.mode != MergeMode::kMean) return;
    total = static_cast<float>(count);
    if (!factor) return;
    total = 0.f;
    for (int32_t m = 0; m < count; ++m) total += factor[members[m]];
  }
  float operator()(int32_t token_idx) const { return (factor ? factor[token_idx] : 1.f) / total; }
};

// The token that a segment is a copy of, or -1.
template <bool kMax>
int32_t copied_token(const SegmentMergeArgs& a, int64_t batch_idx, const int32_t* members, int32_t count) {
  if (count != 1) return -1;
  const bool same = kMax || Coefficients(a, batch_idx, members, count)(members[0]) == 1.f;
  return same ? members[0] : -1;
}

// Columns [begin, end) of output row out (which starts at column begin).
template <typename T, bool kMax>
void merge_row(const SegmentMergeArgs& a, int64_t batch_idx, const int32_t* members, int32_t count, int64_t begin,
               int64_t end, T* out) {
  const T* x = static_cast<const T*>(a.x) + batch_idx * a.stride_batch;
  const auto row_bytes = static_cast<int64_t>(sizeof(T)) * (end - begin);
  const Coefficients coefficient(a, batch_idx, members, count);
  if (count == 0 || (!kMax && coefficient.total == 0.f)) {
    return copy_row(reinterpret_cast<char*>(out), nullptr, row_bytes);
  }
  if (const int32_t token_idx = copied_token<kMax>(a, batch_idx, members, count); token_idx >= 0) {
    const T* row = x + a.source_of(batch_idx, token_idx) * a.stride_token + begin;
    return copy_row(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(row), row_bytes);
  }
  alignas(64) float acc_block[kColumnBlock];
  for (int64_t c = begin; c < end; c += kColumnBlock, out += kColumnBlock) {
    const int64_t n = std::min(kColumnBlock, end - c);
    float* acc = acc_block;
    if constexpr (std::is_same_v<T, float>) acc = out;
    for (int32_t m = 0; m < count;) {
      const T* rows[4] = {};
      float coef[4] = {};
      const int32_t left = count - m, take = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for (int32_t i = 0; i < take; ++i) {
        const int32_t token_idx = members[m + i];
        rows[i] = x + a.source_of(batch_idx, token_idx) * a.stride_token + c;
        coef[i] = kMax ? 1.f : coefficient(token_idx);
      }
      const auto add = [&](auto first) {
        constexpr bool kFirst = decltype(first)::value;
        if (take == 4) return add_rows<T, 4, kFirst, kMax>(rows, coef, acc, n);
        if (take == 2) return add_rows<T, 2, kFirst, kMax>(rows, coef, acc, n);
        add_rows<T, 1, kFirst, kMax>(rows, coef, acc, n);
      };
      m == 0 ? add(std::true_type{}) : add(std::false_type{});
      m += take;
    }
    if constexpr (!std::is_same_v<T, float>) round_row(acc, out, n);
  }
}

void merge_size(const SegmentMergeArgs& a, int64_t batch_idx, int64_t segment_idx, const int32_t* members,
                int32_t count) {
  float total = static_cast<float>(count);
  if (a.size) {
    const float* size = a.size + batch_idx * a.num_tokens;
    total = 0.f;
    for (int32_t m = 0; m < count; ++m) total += size[members[m]];
  }
  a.size_out[batch_idx * a.num_out + segment_idx] = total;
}

// Work is counted in rows read and written, so that a thread's share does not depend on how full its segments are. Few
// output rows are also split by columns. Neither changes a sum.
template <typename T, bool kMax>
void merge_all(const SegmentMergeArgs& a) {
  const int64_t rows = a.batch_size * a.num_out, row_bytes = a.dim * int64_t{sizeof(T)};
  const int64_t width = rows >= 64 ? std::max<int64_t>(a.dim, 1) : 1024;
  const int64_t num_chunks = std::max<int64_t>(ceil_div(a.dim, width), 1);
  const int64_t units = a.num_tokens + a.num_out;                                  // of one batch row and column chunk
  const int64_t grain = 1 + (int64_t{256} << 10) / (row_bytes / num_chunks + 16);  // 256 KiB: about 10 us of copying
  parallel_for(num_chunks * a.batch_size * units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin / units; part * units < end; ++part) {
      const int64_t batch_idx = part % a.batch_size, chunk = part / a.batch_size;
      if (a.skip && a.skip[batch_idx]) continue;
      const int32_t* offsets = a.offsets + batch_idx * (a.num_out + 1);
      const int32_t* order = a.order + batch_idx * a.num_tokens;
      const int64_t first = begin - part * units, last = end - part * units;
      int64_t j = 0, above = a.num_out;  // the first segment whose unit, offsets[j] + j, is in this share
      while (j < above) {
        const int64_t mid = (j + above) / 2;
        if (offsets[mid] + mid < first)
          j = mid + 1;
        else
          above = mid;
      }
      const int64_t column = chunk * width, column_end = std::min(a.dim, column + width);
      int64_t copies = j;  // segments [copies, j) are copies of tokens, not written yet: several rows at once is faster
      const auto write_copies = [&] {
        char* out = static_cast<char*>(a.merged) + (batch_idx * a.num_out + copies) * row_bytes;
        copy_wide_rows(out, row_bytes, copies, j, [&](int64_t segment) {
          const int64_t token = a.source_of(batch_idx, order[offsets[segment]]);
          return static_cast<const char*>(a.x) +
                 (batch_idx * a.stride_batch + token * a.stride_token) * int64_t{sizeof(T)};
        });
      };
      for (; j < a.num_out && offsets[j] + j < last; ++j) {
        const int32_t* members = order + offsets[j];
        const int32_t count = offsets[j + 1] - offsets[j];
        if (chunk == 0 && !a.sorted) merge_size(a, batch_idx, j, members, count);
        if (num_chunks == 1 && copied_token<kMax>(a, batch_idx, members, count) >= 0) continue;
        write_copies();
        copies = j + 1;
        T* out = static_cast<T*>(a.merged) + (batch_idx * a.num_out + j) * a.dim + column;
        if (a.dim > 0) merge_row<T, kMax>(a, batch_idx, members, count, column, column_end, out);
      }
      write_copies();
    }
  });
}

}  // namespace

void segment_merge_cpu(const SegmentMergeArgs& a) {
  if (a.batch_size * a.num_out == 0) return;
  const int64_t to_sort = a.sorted ? 0 : a.batch_size;
  parallel_for(to_sort, 1 + 4096 / (a.num_tokens + a.num_out), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (a.skip && a.skip[b]) continue;
      const int64_t first = b * a.num_tokens;
      const auto sort = [&](const auto& dst_idx) {
        sort_tokens(dst_idx, a.num_tokens, a.num_out, a.offsets + b * (a.num_out + 1), a.order + first);
      };
      if (a.src_idx.data) {
        sort([&](int64_t i) { return a.segment_of(first + i); });
      } else if (a.dst_idx.is_int64) {
        sort([ids = static_cast<const int64_t*>(a.dst_idx.data) + first](int64_t i) { return ids[i]; });
      } else {
        sort([ids = static_cast<const int32_t*>(a.dst_idx.data) + first](int64_t i) { return ids[i]; });
      }
    }
  });
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.mode == MergeMode::kMax ? merge_all<T, true>(a) : merge_all<T, false>(a);
  });
}

}  // namespace tokred
