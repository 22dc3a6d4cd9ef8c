// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Top-k of many rows, floor: scores read once. Rows of up to 1,024 tokens belong to one warp each, which needs no
// barrier; rows of up to 8,192 to one block. Counting compares each key with 48 pivots, so longer rows are cut down
// first: a sample of 4,096 tokens gives a pivot that somewhat more than k tokens reach, all SMs read the row once and
// write those, and one block selects among them. Any pivot gives the same tokens; where too few reach it, the block
// reads the row anew.
#include "common/launch.cuh"
#include "common/topk_rows.cuh"

namespace tokred {
namespace {

struct RowStorage {
  BlockTopkScratch topk;
};

// grid: ceil(num_rows / kTopkWarpsPerBlock). The block's shared memory is list_slots per warp.
template <typename T, int kItems>
__global__ void __launch_bounds__(kTopkWarpsPerBlock* kWarpSize) topk_warp_kernel(const TopkRows args, int list_slots) {
  TOKRED_SHARED_BYTES(shared);
  const int64_t row_idx = int64_t{blockIdx.x} * kTopkWarpsPerBlock + warp_index();
  if (row_idx >= args.num_rows) return;  // the whole warp leaves; there is no block-wide barrier
  const TopkList list = reinterpret_cast<TopkList>(shared) + warp_index() * list_slots;
  WarpTeam team;
  const int count = select_row<T, kItems>(args, row_idx, team,
                                          [&](int slot, int token) { list[slot] = static_cast<unsigned>(token); });
  finish_row<T>(args, row_idx, count, list, team);
}

// grid: num_rows. listed: the tail of the shared memory holds the row's list.
template <typename T, int kItems>
__global__ void __launch_bounds__(kItems > 0 ? 1024 : kTopkStreamThreads, 1)
    topk_select_kernel(const TopkRows args, bool listed) {
  TOKRED_SHARED(RowStorage, shared);
  TOKRED_SHARED_TAIL(RowStorage, tail);
  const TopkList list = listed ? reinterpret_cast<TopkList>(tail) : nullptr;
  const int64_t row_idx = blockIdx.x;
  BlockTeam team(shared.topk);
  const int count = select_row<T, kItems>(args, row_idx, team,
                                          [&](int slot, int token) { write_kept(args, row_idx, list, slot, token); });
  finish_row<T>(args, row_idx, count, list, team);
}

// ---- Long rows: pivot, candidates of each chunk, selection from them

struct Candidates {
  TopkRowState* state;    // [num_rows]
  uint32_t* count;        // [num_rows, num_chunks]
  uint32_t *key, *token;  // [num_rows, num_chunks, chunk_slots]
};
__device__ inline Candidates candidates_of(const TopkRows& args, int num_chunks, int chunk_slots) {
  const int64_t chunks = args.num_rows * num_chunks;
  Candidates out;
  out.state = reinterpret_cast<TopkRowState*>(args.workspace);
  out.count = args.workspace + 3 * args.num_rows;
  out.key = out.count + chunks;
  out.token = out.key + chunks * chunk_slots;
  return out;
}

// The rank in the sample whose key is the pivot: a quarter more than k's share and six standard deviations, since
// neighbours in the sample may be alike. Candidates cost little; too few of them cost the whole row again.
__device__ inline int sample_rank(int k, int num_tokens) {
  const int expected = static_cast<int>(int64_t{k} * kTopkSample / num_tokens);
  return expected + expected / 4 + static_cast<int>(6.f * sqrtf(static_cast<float>(expected))) + 8;
}

// grid: num_rows.
template <typename T>
__global__ void __launch_bounds__(kTopkStreamThreads)
    topk_pivot_kernel(const TopkRows args, int num_chunks, int chunk_slots) {
  TOKRED_SHARED(RowStorage, shared);
  const int64_t row_idx = blockIdx.x;
  BlockTeam team(shared.topk);
  const TopkRow<T> row = topk_row<T>(args, row_idx);
  const int wanted = static_cast<int>(topk_count(args, row_idx));
  const TopkEligible eligible = row_eligible(row, wanted, team);
  const int k = min(wanted, eligible.count);
  uint32_t pivot = kKeyNaN;  // reached by all that may be kept
  const int rank = row.num_tokens > kTopkBlockTokens && k > 0 ? sample_rank(k, row.num_tokens) : kTopkSample;
  if (rank < kTopkSample) {
    // Neighbours in fours, a quarter of the sectors; their place in each stride moves, so that a period of the data
    // cannot hide from the sample.
    constexpr int kGroup = 4;
    const int stride = row.num_tokens / (kTopkSample / kGroup);
    const auto keys = register_keys<kTopkSample / kTopkStreamThreads>(team, kTopkSample, [&](int i) {
      const int group = i / kGroup;
      return token_key(row, group * stride + group * 40503 % (stride - kGroup + 1) + i % kGroup, eligible.crowded);
    });
    pivot = max(pivot, topk_bound(keys, rank, team).bound);
  }
  if (team.rank() == 0) {
    candidates_of(args, num_chunks, chunk_slots).state[row_idx] = {pivot, static_cast<uint32_t>(eligible.count),
                                                                   eligible.crowded};
  }
}

// grid: num_rows * num_chunks. Writes the tokens that reach the pivot, the best chunk_slots of them at most: no row
// keeps more of a chunk.
template <typename T>
__global__ void __launch_bounds__(kTopkChunkThreads)
    topk_chunk_kernel(const TopkRows args, int num_chunks, int chunk_slots) {
  TOKRED_SHARED(RowStorage, shared);
  const int64_t row_idx = blockIdx.x / num_chunks, at = blockIdx.x;
  const int first = static_cast<int>(blockIdx.x % num_chunks) * kTopkBlockTokens;
  const Candidates out = candidates_of(args, num_chunks, chunk_slots);
  const TopkRow<T> row = topk_row<T>(args, row_idx);
  const TopkRowState state = out.state[row_idx];
  BlockTeam team(shared.topk);
  // A packed row may end before this chunk: then all keys are excluded.
  const auto keys = register_keys<kTopkBlockTokens / kTopkChunkThreads>(
      team, row.num_tokens - first, [&](int i) { return token_key(row, first + i, state.crowded != 0); });
  int reached[3] = {0, 0, 0};
  keys.for_each([&](uint32_t key) { reached[0] += key >= state.pivot; });
  team.sum(reached);
  TopkBound bound{state.pivot, kTopkBlockTokens};
  if (reached[0] > chunk_slots) bound = topk_bound(keys, chunk_slots, team);
  const int count = topk_visit(keys, bound, team, [&](int token, uint32_t key, int before, bool taken) {
    if (!taken) return;
    out.key[at * chunk_slots + before] = key;
    out.token[at * chunk_slots + before] = static_cast<uint32_t>(first + token);
  });
  if (team.rank() == 0) out.count[at] = static_cast<uint32_t>(count);
}

struct MergeStorage {
  BlockTopkScratch topk;
  int first[kTopkMaxChunks + 1];  // candidates before each chunk's
};

// grid: num_rows. The candidates of all chunks stand in token order, so the row's selection is the selection from them.
template <typename T>
__global__ void __launch_bounds__(kTopkStreamThreads)
    topk_merge_kernel(const TopkRows args, int num_chunks, int chunk_slots, bool listed) {
  TOKRED_SHARED(MergeStorage, shared);
  TOKRED_SHARED_TAIL(MergeStorage, tail);
  const TopkList list = listed ? reinterpret_cast<TopkList>(tail) : nullptr;
  const int64_t row_idx = blockIdx.x;
  const Candidates from = candidates_of(args, num_chunks, chunk_slots);
  BlockTeam team(shared.topk);
  int candidates = 0;
  for (int tile = 0; tile < num_chunks; tile += team.size()) {
    const int chunk = tile + team.rank();
    int total;
    const int count = chunk < num_chunks ? static_cast<int>(from.count[row_idx * num_chunks + chunk]) : 0;
    const int before = block_exclusive_scan(count, shared.topk.block, &total);
    if (chunk < num_chunks) shared.first[chunk] = candidates + before;
    candidates += total;
  }
  if (team.rank() == 0) shared.first[num_chunks] = candidates;
  __syncthreads();  // the first candidate of each chunk is known
  const auto place_of = [&](int candidate) {
    int low = 0, high = num_chunks - 1;  // the last chunk that starts at or before it: empty ones share their start
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (shared.first[middle] <= candidate) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return (row_idx * num_chunks + low) * chunk_slots + candidate - shared.first[low];
  };
  const int k = min(static_cast<int>(topk_count(args, row_idx)), static_cast<int>(from.state[row_idx].eligible));
  int count = 0;
  if (k > 0 && candidates >= k) {
    const auto key_at = [&](int candidate) { return from.key[place_of(candidate)]; };
    const auto emit = [&](int slot, int candidate) {
      write_kept(args, row_idx, list, slot, static_cast<int>(from.token[place_of(candidate)]));
    };
    constexpr int kFew = kTopkBlockTokens / kTopkStreamThreads, kAll = kTopkMaxCandidates / kTopkStreamThreads;
    count = candidates <= kTopkBlockTokens ? topk_emit(register_keys<kFew>(team, candidates, key_at), k, team, emit)
                                           : topk_emit(register_keys<kAll>(team, candidates, key_at), k, team, emit);
  } else if (k > 0) {
    count = select_row<T, 0>(args, row_idx, team,
                             [&](int slot, int token) { write_kept(args, row_idx, list, slot, token); });
  }
  finish_row<T>(args, row_idx, count, list, team);
}

template <typename T>
int select(const TopkRows& args, const TopkPolicy& policy, CUstream_st* stream) {
  const dim3 rows(static_cast<unsigned>(args.num_rows)), block(static_cast<unsigned>(policy.threads));
  int list_slots = 1;
  while (list_slots < args.k && policy.listed) list_slots *= 2;  // a sort pads it to a power of two
  const size_t list_bytes = policy.listed ? list_slots * sizeof(*TopkList()) : 0;
  int error = cudaErrorInvalidValue;
  if (policy.warps) {
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.num_rows, kTopkWarpsPerBlock)));
    const int items = static_cast<int>(ceil_div<int64_t>(args.max_seqlen, 8 * kWarpSize) * 8);
    const bool known = dispatch_int<8, 16, 24, 32>(items == 0 ? 8 : items, [&](auto items) {
      error = launch(topk_warp_kernel<T, decltype(items)::value>, grid, dim3(kTopkWarpsPerBlock * kWarpSize),
                     kTopkWarpsPerBlock * list_bytes, stream, args, list_slots);
    });
    return known ? error : static_cast<int>(cudaErrorInvalidValue);
  }
  if (policy.num_chunks == 0) {
    const bool known = dispatch_int<0, 2, 4, 8>(policy.items, [&](auto items) {
      error = launch(topk_select_kernel<T, decltype(items)::value>, rows, block,
                     shared_bytes_with_tail<RowStorage>(list_bytes), stream, args, policy.listed);
    });
    return known ? error : static_cast<int>(cudaErrorInvalidValue);
  }
  error = launch(topk_pivot_kernel<T>, rows, block, sizeof(RowStorage), stream, args, policy.num_chunks,
                 policy.chunk_slots);
  if (error != cudaSuccess) return error;
  const dim3 chunks(static_cast<unsigned>(args.num_rows * policy.num_chunks));
  error = launch(topk_chunk_kernel<T>, chunks, dim3(kTopkChunkThreads), sizeof(RowStorage), stream, args,
                 policy.num_chunks, policy.chunk_slots);
  if (error != cudaSuccess) return error;
  return launch(topk_merge_kernel<T>, rows, block, shared_bytes_with_tail<MergeStorage>(list_bytes), stream, args,
                policy.num_chunks, policy.chunk_slots, policy.listed);
}

}  // namespace

int topk_rows_cuda(const TopkRows& args, const TopkPolicy& policy, CUstream_st* stream) {
  if (args.num_rows == 0) return cudaSuccess;
  int error = cudaErrorInvalidValue;
  dispatch_float(args.dtype, [&](auto tag) { error = select<typename decltype(tag)::type>(args, policy, stream); });
  return error;
}

}  // namespace tokred
