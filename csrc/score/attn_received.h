// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/constants.h"
#include "common/dispatch.h"
#include "common/ragged.h"

namespace tokred {

constexpr int kAttnReceivedMaxHeadDim = 256;

struct AttnReceivedStrides {  // in elements; the last dim is contiguous
  int64_t batch, head, token;
};

TOKRED_HOST_DEVICE int64_t clipped(int64_t x, int64_t most) { return x < 0 ? 0 : x < most ? x : most; }

struct KeySpan {  // keys [begin, end)
  int begin, end;
  TOKRED_HOST_DEVICE bool has(int key) const { return key >= begin && key < end; }
};

// Which keys a query sees: query i those from i + first up to, not including, i + end, as far as there are such. q_len
// plus kv_len is an int, and so are all sums here: first and end lie in [-q_len, kv_len].
struct Band {
  int first, end;
};
// The query at position p sees the keys from p - back to p + ahead; q_start is the position of query 0. All three are
// within 2^60 of zero.
TOKRED_HOST_DEVICE Band make_band(int64_t q_start, int64_t back, int64_t ahead, int64_t q_len, int64_t kv_len) {
  const int64_t first = q_start - back, end = q_start + ahead + 1;
  return {static_cast<int>(first < -q_len   ? -q_len
                           : first < kv_len ? first
                                            : kv_len),
          static_cast<int>(end < -q_len   ? -q_len
                           : end < kv_len ? end
                                          : kv_len)};
}

// One row of the batch, or one sequence of a packed input.
struct AttnSequence {
  int64_t batch;             // its index along batch dimensions; 0 when packed
  int64_t q_begin, k_begin;  // its first query and key in packed tensors, else 0
  int q_len, kv_len;
  Band band;

  TOKRED_HOST_DEVICE KeySpan visible(int q_idx) const {
    const int first = q_idx + band.first, end = q_idx + band.end;
    return {first < 0 ? 0 : first < kv_len ? first : kv_len, end < 0 ? 0 : end < kv_len ? end : kv_len};
  }
};

// Pass 1 on CUDA: a row's keys are cut into num splits of that many keys.
struct AttnSplits {
  int keys, num;
};

// Rows are the queries of all heads of a group, head after head: these group() * q_len rows share one key head's K and
// bias. Where each query head has a bias of its own, it is a group of its own, and k_repeat groups share a head of k.
// Packed: tensors hold all sequences, q_len and kv_len count their tokens, and there is no batch dimension.
struct AttnReceivedArgs {
  const void* q;          // [batch_size, num_q_heads, q_len, head_dim]
  const void* k;          // [batch_size, num_kv_heads / k_repeat, kv_len, head_dim]; paged: [num_pages, page_size, ...]
  const float* lse_in;    // [batch_size, num_q_heads, q_len], last dim contiguous; null: computed
  const float* q_weight;  // as lse_in; null: 1
  const float* sink;      // [num_q_heads], contiguous; null: none. Never with lse_in
  const float* key_bias;  // [batch_size, num_kv_heads, kv_len] by strides, last dim contiguous; null: 0
  const int32_t *cu_seqlens, *cu_seqlens_k;  // [batch_size + 1] of queries and keys; null: not packed
  const int32_t* page_table;                 // [batch_size, max_pages], contiguous; null: not paged
  const int32_t* kv_lens;                    // [batch_size]; null: kv_len each
  float* received;                           // [batch_size, num_q_heads, kv_len], contiguous
  float* lse;                                // [batch_size, num_q_heads, q_len], contiguous
  float* diagonal;  // [batch_size, num_q_heads, kv_len], contiguous: the sum over each distance of a query to a key
                    // before it; null: not wanted. Dense, causal, align_ends
  float* partial;   // CUDA: two floats per row and split, partial_plane() rows per key head; null: nothing is split
  AttnReceivedStrides stride_q, stride_k, stride_lse_in, stride_weight;
  int64_t bias_batch, bias_head;  // strides of key_bias
  int64_t batch_size, num_q_heads, num_kv_heads, q_len, kv_len, head_dim;
  int64_t k_repeat;
  int64_t num_pages, max_pages, stride_page;
  int page_shift;       // log2(page_size)
  int64_t q_start;      // the position of query 0; as below
  bool align_ends;      // the last query is at the last key instead
  int64_t back, ahead;  // the query at position p sees the keys from p - back to p + ahead; within 2^60 of zero
  float scale;
  float exponent_scale;  // of a product before 2^x, log2(e) * scale; 1 where adjusted() has brought it to that
  float softcap;         // logits are softcap * tanh(logit / softcap); 0: as they are
  bool max_reduce;
  DType dtype;  // of q and k

  TOKRED_HOST_DEVICE int64_t group() const { return num_kv_heads > 0 ? num_q_heads / num_kv_heads : 0; }
  // Whether a logit is more than a product times scale.
  TOKRED_HOST_DEVICE bool adjusted() const { return key_bias || softcap > 0; }
  TOKRED_HOST_DEVICE bool packed() const { return cu_seqlens != nullptr; }
  // Of outputs with a row per sequence.
  TOKRED_HOST_DEVICE int64_t batch_dim() const { return packed() ? 1 : batch_size; }
  // Packed: what lies behind the last sequence is one more, in which no query sees a key.
  TOKRED_HOST_DEVICE int64_t num_sequences() const { return packed() ? batch_size + 1 : batch_size; }

  TOKRED_HOST_DEVICE AttnSequence sequence(int64_t b) const {
    if (packed()) {
      const bool rest = b == batch_size;
      const TokenSpan queries = rest ? rest_of(cu_seqlens, q_len) : token_span(cu_seqlens, q_len, q_len, b);
      const TokenSpan keys = rest ? rest_of(cu_seqlens_k, kv_len) : token_span(cu_seqlens_k, kv_len, kv_len, b);
      return make_sequence(0, queries, keys, rest);
    }
    const int64_t len = kv_lens ? kv_lens[b] : kv_len;
    return make_sequence(b, {0, q_len}, {0, clipped(len, kv_len)}, false);
  }
  // Where a key's row starts, without its head; -1 when it is on no page.
  TOKRED_HOST_DEVICE int64_t key_row(const AttnSequence& s, int key) const {
    if (!page_table) return (s.k_begin + key) * stride_k.token;
    const int64_t page = page_table[s.batch * max_pages + (key >> page_shift)];
    if (page < 0 || page >= num_pages) return -1;
    return page * stride_page + (key & ((1 << page_shift) - 1)) * stride_k.token;
  }

  TOKRED_HOST_DEVICE AttnSplits splits(int64_t rows, int64_t seq_keys) const {
    const int64_t keys = split_keys(rows);
    if (!partial || seq_keys <= keys) return {static_cast<int>(seq_keys), 1};
    return {static_cast<int>(keys), static_cast<int>(ceil_div(seq_keys, keys))};
  }
  // 1,024 keys per block for few rows: a window of 64 queries over 131,072 keys makes 128 blocks per key head. More
  // rows bring blocks of their own; splits grow with them, so that rows times splits is at most rows + keys / 4.
  TOKRED_HOST_DEVICE static int64_t split_keys(int64_t rows) {
    const int64_t keys = 1024 * ceil_div<int64_t>(rows > 0 ? rows : 1, 256);
    return keys < 1 << 30 ? keys : 1 << 30;
  }
  TOKRED_HOST_DEVICE int64_t partial_plane() const {
    const int64_t rows = group() * q_len;
    return packed() ? rows + kv_len / 4 : rows * ceil_div(kv_len, split_keys(rows));
  }
  // Where the partial sums of a sequence start in a plane.
  TOKRED_HOST_DEVICE int64_t partial_begin(const AttnSequence& s) const { return group() * s.q_begin + s.k_begin / 4; }

 private:
  TOKRED_HOST_DEVICE TokenSpan rest_of(const int32_t* cu, int64_t num_tokens) const {
    const int64_t begin = clipped(cu[batch_size], num_tokens);
    return {begin, num_tokens - begin};
  }
  TOKRED_HOST_DEVICE AttnSequence make_sequence(int64_t batch, TokenSpan queries, TokenSpan keys, bool blind) const {
    const int64_t start = align_ends ? keys.len - queries.len : q_start;
    const Band band = blind ? Band{0, 0} : make_band(start, back, ahead, queries.len, keys.len);
    return {batch, queries.begin, keys.begin, static_cast<int>(queries.len), static_cast<int>(keys.len), band};
  }
};

// All that may be tuned on CUDA. Bits depend on none of it.
struct AttnReceivedPolicy {
  int rows_per_warp;              // queries in pass 1, keys in pass 2
  int warps_lse, warps_received;  // per block
};

// 8 warps share a streamed tile twice as often as 4; 4 leave less of the last block idle.
constexpr int attn_received_warps(int64_t rows, int rows_per_warp, int max_warps) {
  const int64_t units = ceil_div<int64_t>(rows, rows_per_warp);
  const bool wide = ceil_div<int64_t>(units, 8) * 8 * 7 <= ceil_div<int64_t>(units, 4) * 4 * 8;
  return max_warps >= 8 && wide ? 8 : 4;
}

// rows, kv_len: of one sequence, a typical one when they differ.
constexpr AttnReceivedPolicy choose_attn_received_policy(int64_t rows, int64_t kv_len, int64_t head_dim, DType dtype) {
  AttnReceivedPolicy policy{};
  // The warp's own rows stay in registers over the whole depth: 32 rows of 16-bit values up to 128 deep take 64
  // registers.
  policy.rows_per_warp = dtype == DType::kF32 || head_dim > 128 ? 16 : 32;
  const int max_warps = dtype == DType::kF32 ? 4 : 8;
  policy.warps_lse = attn_received_warps(rows, policy.rows_per_warp, max_warps);
  policy.warps_received = attn_received_warps(kv_len, policy.rows_per_warp, max_warps);
  return policy;
}

inline AttnReceivedPolicy choose_attn_received_policy(const AttnReceivedArgs& a) {
  const int64_t sequences = a.packed() && a.batch_size > 0 ? a.batch_size : 1;
  return choose_attn_received_policy(a.group() * ceil_div(a.q_len, sequences), ceil_div(a.kv_len, sequences),
                                     a.head_dim, a.dtype);
}

// Diagonals of one block on CUDA: as many as the keys of its warps that all queries of a tile may meet.
struct AttnDiagonalPolicy {
  int warps, tile_queries, diagonals;
};
constexpr AttnDiagonalPolicy choose_attn_diagonal_policy(int64_t head_dim, DType dtype) {
  const bool is_float = dtype == DType::kF32;
  const int warps = !is_float ? 8 : head_dim > 128 ? 3 : 4, rows_per_warp = is_float || head_dim > 128 ? 16 : 32;
  const int tile_queries = !is_float ? 64 : head_dim > 128 ? 16 : 32;
  return {warps, tile_queries, warps * rows_per_warp - tile_queries};
}

// Which blocks work on which sequence. Not packed: per_head for each key head of each batch row. Packed: per_head for
// each key head, of which a sequence has those from before(b) on, more than it needs by a few that have nothing to do:
// counts are rounded down in the sums before a sequence and up within one.
struct AttnBlocks {
  int64_t key_unit, row_unit, factor, per_head;

  TOKRED_HOST_DEVICE int64_t before(const AttnReceivedArgs& a, int64_t b) const {
    const int64_t keys = b > a.batch_size ? a.kv_len : clipped(a.cu_seqlens_k[b], a.kv_len);
    const int64_t rows = a.group() * (b > a.batch_size ? a.q_len : clipped(a.cu_seqlens[b], a.q_len));
    return factor * (keys / key_unit + rows / row_unit + b);
  }
};
constexpr int64_t kAttnNoUnit = int64_t{1} << 40;

// Pass 1, by rows and splits. ceil(rows / 256) * num splits <= ceil(keys / 1024) + ceil(rows / 256) - 1.
inline AttnBlocks attn_lse_blocks(const AttnReceivedArgs& a, int64_t block_rows) {
  const int64_t rows = a.group() * a.q_len, total = a.batch_size + 1;
  if (!a.packed()) return {0, 0, 0, ceil_div(rows, block_rows) * a.splits(rows, a.kv_len).num};
  if (!a.partial) return {kAttnNoUnit, block_rows, 1, rows / block_rows + total};
  const int64_t factor = 256 / block_rows;
  return {1024, 256, factor, factor * (a.kv_len / 1024 + rows / 256 + total)};
}
// Pass 2, by keys.
inline AttnBlocks attn_received_blocks(const AttnReceivedArgs& a, int64_t block_keys) {
  if (!a.packed()) return {0, 0, 0, ceil_div(a.kv_len, block_keys)};
  return {block_keys, kAttnNoUnit, 1, a.kv_len / block_keys + a.batch_size + 1};
}

void attn_received_cpu(const AttnReceivedArgs& args);
int attn_received_cuda(const AttnReceivedArgs& args, CUstream_st* stream);  // returns a cudaError_t

// The diagonals, from lse, which the calls above write. They are a pass of their own.
void attn_received_diagonal_cpu(const AttnReceivedArgs& args);
int attn_received_diagonal_cuda(const AttnReceivedArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
