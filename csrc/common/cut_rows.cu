// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A bound is found digit by digit, 8 bits a round: a histogram of the tokens that share the digits so far, a scan of
// its bins, the bin in which the target lies. Up to six bounds are searched at once; a token is in the histogram of one
// of them at most. Lanes with the same bin add up first, so that constant scores do not queue for one counter.
//
// A row of up to 8,192 tokens is one block's: statistics, rounds and list in one launch. Longer rows, and groups of
// rows, are cut by all SMs: a launch for the statistics, one per round, each of which begins with the scan of the round
// before, one to count what each chunk keeps, one to write it.
#include "common/cut_rows.h"

#include "common/launch.cuh"
#include "common/topk_rows.cuh"

namespace tokred {
namespace {

using Wide = unsigned long long;

struct CutStorage {
  BlockTopkScratch topk;
  CutHistogram histogram;
  CutPlan plan;
  Cut cut;
};

// All functions are called by the whole block, of kCutThreads, and valid in each thread.

template <typename T>
__device__ CutStats add_stats(const CutRows& a, const CutRow<T>& row, int begin, int end, BlockScratch& scratch) {
  unsigned eligible = 0, forced = 0, best = 0;
  for (int token = begin + static_cast<int>(threadIdx.x); token < end; token += kCutThreads) {
    if (row.row.drop && row.row.drop[token]) continue;
    ++eligible;
    forced += row.forced(a, token);
    best = max(best, score_key(static_cast<float>(row.row.score[token])));
  }
  return {block_sum(eligible, scratch), block_sum(forced, scratch), block_max(best, scratch)};
}

__device__ void clear_histogram(CutHistogram& histogram, int slots) {
  for (int slot = 0; slot < slots; ++slot) {
    histogram.mass[slot][threadIdx.x] = 0;
    histogram.count[slot][threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) histogram.forced_mass = 0;
  __syncthreads();  // it is empty
}

// The tokens of [begin, end) that share the digits of a target before this round. Ends with a barrier.
template <typename T>
__device__ void add_tokens(const CutRows& a, const CutRow<T>& row, int begin, int end, int round, CutStorage& shared) {
  const CutPlan& plan = shared.plan;
  CutHistogram& histogram = shared.histogram;
  clear_histogram(histogram, round == 0 ? 1 : plan.num_targets);
  const bool weighs = a.rule == CutRule::kMass || a.rule == CutRule::kQuantile || a.rule == CutRule::kIqr;
  Wide forced_mass = 0;
  for (int tile = begin; tile < end; tile += kCutThreads) {
    const int token = tile + static_cast<int>(threadIdx.x);
    CutToken t{kKeyExcluded, 0, false, false};
    if (token < end) t = cut_token(a, row, token);
    int bin = -1;
    if (a.rule == CutRule::kMass && t.forced && !row.crowded) {
      forced_mass += static_cast<Wide>(t.mass);
    } else if (t.counted || t.mass > 0) {
      const int digit = static_cast<int>(t.key >> (24 - 8 * round)) & (kCutThreads - 1);
      if (round == 0) bin = digit;
      for (int i = 0; round > 0 && bin < 0 && i < plan.num_targets; ++i) {
        if (t.key >> (32 - 8 * round) == plan.target[i].prefix) bin = plan.target[i].slot * kCutThreads + digit;
      }
    }
    const unsigned counted = __ballot_sync(kFullMask, t.counted);
    const unsigned peers = __match_any_sync(kFullMask, bin);
    if (bin < 0) continue;  // with all its peers
    Wide mass = 0;
    if (weighs) {  // in two halves: 32 of them fit into a word
      const unsigned low = __reduce_add_sync(peers, static_cast<unsigned>(t.mass & 0xfffff));
      mass = (Wide{__reduce_add_sync(peers, static_cast<unsigned>(t.mass >> 20))} << 20) + low;
    }
    if (__ffs(static_cast<int>(peers)) - 1 == lane_index()) {
      const int slot = bin / kCutThreads, digit = bin % kCutThreads;
      atomicAdd(&histogram.count[slot][digit], static_cast<unsigned>(__popc(peers & counted)));
      if (mass > 0) atomicAdd(&histogram.mass[slot][digit], mass);
    }
  }
  __syncthreads();  // the histogram is whole
  if (round == 0 && a.rule == CutRule::kMass) {
    forced_mass = block_sum(forced_mass, shared.topk.block);
    if (threadIdx.x == 0) histogram.forced_mass = forced_mass;
    __syncthreads();  // as above
  }
}

// What the first histogram says of all tokens becomes the plan.
__device__ void make_plan(const CutRows& a, int64_t group, CutStorage& shared) {
  const unsigned bin = threadIdx.x, in_bin = shared.histogram.count[0][bin];
  CutTotals totals;
  totals.count = static_cast<int64_t>(block_sum(Wide{in_bin}, shared.topk.block));
  totals.mass = static_cast<int64_t>(block_sum(shared.histogram.mass[0][bin], shared.topk.block));
  // What can be drawn has a positive score_key, whose top bit is set.
  totals.positive = static_cast<int64_t>(block_sum(Wide{bin >= 128 ? in_bin : 0}, shared.topk.block));
  totals.forced_mass = static_cast<int64_t>(shared.histogram.forced_mass);
  if (threadIdx.x == 0) plan_cut(a, group, totals, shared.plan);
  __syncthreads();  // the plan is made
}

// Adds the digit of this round to each target. Thread i has bin 255 - i, so a scan gives what lies beyond a bin.
__device__ void pick_digits(CutStorage& shared) {
  const unsigned digit = kCutThreads - 1 - threadIdx.x;
  CutPlan& plan = shared.plan;
  for (int i = 0; i < plan.num_targets; ++i) {
    const CutTarget target = plan.target[i];
    const int64_t mass = static_cast<int64_t>(shared.histogram.mass[target.slot][digit]);
    const int64_t count = shared.histogram.count[target.slot][digit];
    const int64_t in_bin = target.by_mass ? mass : count;
    int64_t total;
    const int64_t above = target.above + block_exclusive_scan(in_bin, shared.topk.block, &total);
    if (above < target.amount && target.amount <= above + in_bin) {  // one thread; all have read the target
      plan.target[i].above = above;
      plan.target[i].at = mass;
      plan.target[i].at_count = count;
      plan.target[i].prefix = target.prefix << 8 | digit;
    }
  }
  __syncthreads();  // all digits are known
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.num_targets; ++i) {
      int slot = 0;
      while (plan.target[slot].prefix != plan.target[i].prefix) ++slot;
      plan.target[i].slot = slot;
    }
  }
  __syncthreads();  // and who shares a histogram
}

// f(token, slot) for the tokens of [begin, end) that are kept; seen counts those of the row before, and then these.
template <typename T, typename F>
__device__ void visit_kept(const CutRows& a, const CutRow<T>& row, int begin, int end, Cut cut, BlockTeam& team,
                           TopkSeen& seen, F&& f) {
  for (int tile = begin; tile < end; tile += kCutThreads) {
    const int token = tile + team.rank();
    const uint32_t key = token < end ? cut_key(cut_token(a, row, token), row.crowded) : kKeyExcluded;
    topk_visit_tile(RegisterKeys<1>{token, {key}}, TopkBound{cut.bound, cut.ties}, team, seen,
                    [&](int at, uint32_t, int before, bool taken) { f(at, before, taken); });
  }
}

// grid: num_rows. To ask for two blocks on an SM keeps ptxas from its own choice of 64 registers, which would spill.
template <typename T>
__global__ void __launch_bounds__(kCutThreads, 2) cut_row_kernel(const CutRows args, bool searches, bool listed) {
  TOKRED_SHARED(CutStorage, shared);
  TOKRED_SHARED_TAIL(CutStorage, tail);
  const TopkList list = listed ? reinterpret_cast<TopkList>(tail) : nullptr;
  const int64_t row_idx = blockIdx.x;
  BlockTeam team(shared.topk);
  CutRow<T> row = cut_row<T>(args, row_idx);
  const int n = row.row.num_tokens;
  const CutStats stats = add_stats(args, row, 0, n, shared.topk.block);
  know_stats(args, stats, row);
  if (threadIdx.x == 0) {
    shared.plan.stats = stats;
    shared.plan.num_targets = 0;
    shared.plan.low = kCutNothing;
    shared.plan.high = kCutAll;
  }
  for (int round = 0; round < kCutRounds && searches; ++round) {
    if (round > 0 && shared.plan.num_targets == 0) break;
    add_tokens(args, row, 0, n, round, shared);
    if (round == 0) make_plan(args, row_idx, shared);
    pick_digits(shared);
  }
  if (threadIdx.x == 0) shared.cut = resolve_cut(args, row_idx, shared.plan);
  __syncthreads();  // the cut is known
  const Cut cut = shared.cut;
  TopkSeen seen;
  visit_kept(args, row, 0, n, cut, team, seen, [&](int token, int slot, bool taken) {
    if (taken) write_kept(args.rows, row_idx, list, slot, token);
  });
  finish_row<T>(args.rows, row_idx, seen.above + min(seen.ties, cut.ties), list, team);
}

// ---- Long rows, and groups

struct CutAt {
  int64_t row_idx, group;
  int64_t first_chunk;        // of the group
  int chunk, chunk_in_group;  // of the row
  int chunks_in_group;
  int begin, end;  // tokens of the row
  CutGroup* state;
  CutChunk* chunks;
};

__device__ CutAt cut_at(const CutRows& a, int num_chunks, int num_tokens, int64_t row_idx) {
  CutAt at;
  at.row_idx = row_idx;
  at.group = row_idx / a.rows_per_group;
  at.chunk = static_cast<int>(blockIdx.x % num_chunks);
  at.chunks_in_group = static_cast<int>(a.rows_per_group) * num_chunks;
  at.first_chunk = at.group * at.chunks_in_group;
  at.chunk_in_group = static_cast<int>(blockIdx.x - at.first_chunk);
  at.begin = min(at.chunk * kCutTokens, num_tokens);
  at.end = min(at.begin + kCutTokens, num_tokens);
  unsigned char* bytes = reinterpret_cast<unsigned char*>(a.rows.workspace);
  at.state = reinterpret_cast<CutGroup*>(bytes) + at.group;
  at.chunks = reinterpret_cast<CutChunk*>(bytes + cut_chunks_offset(a));
  return at;
}

// grid of this and the next ones: num_rows * num_chunks.
template <typename T>
__global__ void __launch_bounds__(kCutThreads) cut_stats_kernel(const CutRows args, int num_chunks) {
  TOKRED_SHARED(BlockScratch, scratch);
  const CutRow<T> row = cut_row<T>(args, blockIdx.x / num_chunks);
  const CutAt at = cut_at(args, num_chunks, row.row.num_tokens, blockIdx.x / num_chunks);
  const CutStats stats = add_stats(args, row, at.begin, at.end, scratch);
  if (threadIdx.x == 0) at.chunks[blockIdx.x].stats = stats;
  unsigned* words = reinterpret_cast<unsigned*>(at.state->histogram);  // the chunks of a group empty them together
  constexpr int kWords = kCutRounds * static_cast<int>(sizeof(CutHistogram) / sizeof(unsigned));
  for (int i = at.chunk_in_group * kCutThreads + static_cast<int>(threadIdx.x); i < kWords;
       i += at.chunks_in_group * kCutThreads) {
    words[i] = 0;
  }
}

// The plan as it is before a round; round kCutRounds is after the last. The group's first block leaves it for the next
// launch.
__device__ void begin_round(const CutRows& a, const CutAt& at, int round, bool searches, CutStorage& shared) {
  if (round == 0 || !searches) {
    Wide eligible = 0, forced = 0;
    unsigned best = 0;
    for (int i = static_cast<int>(threadIdx.x); i < at.chunks_in_group; i += kCutThreads) {
      const CutStats stats = at.chunks[at.first_chunk + i].stats;
      eligible += static_cast<Wide>(stats.eligible);
      forced += static_cast<Wide>(stats.forced);
      best = max(best, static_cast<unsigned>(stats.best));
    }
    eligible = block_sum(eligible, shared.topk.block);
    forced = block_sum(forced, shared.topk.block);
    best = block_max(best, shared.topk.block);
    if (threadIdx.x == 0) {
      shared.plan = CutPlan{};
      shared.plan.stats = {static_cast<int64_t>(eligible), static_cast<int64_t>(forced), best};
      shared.plan.low = kCutNothing;
      shared.plan.high = kCutAll;
    }
    __syncthreads();  // the plan is there
  } else {
    if (threadIdx.x == 0) shared.plan = at.state->plan[round - 1];
    const CutHistogram& of_group = at.state->histogram[round - 1];
    for (int slot = 0; slot < kCutTargets; ++slot) {
      shared.histogram.mass[slot][threadIdx.x] = of_group.mass[slot][threadIdx.x];
      shared.histogram.count[slot][threadIdx.x] = of_group.count[slot][threadIdx.x];
    }
    if (threadIdx.x == 0) shared.histogram.forced_mass = of_group.forced_mass;
    __syncthreads();  // both are there
    if (round == 1) make_plan(a, at.group, shared);
    pick_digits(shared);
  }
  if (round < kCutRounds && at.chunk_in_group == 0 && threadIdx.x == 0) at.state->plan[round] = shared.plan;
}

template <typename T>
__global__ void __launch_bounds__(kCutThreads) cut_round_kernel(const CutRows args, int num_chunks, int round) {
  TOKRED_SHARED(CutStorage, shared);
  CutRow<T> row = cut_row<T>(args, blockIdx.x / num_chunks);
  const CutAt at = cut_at(args, num_chunks, row.row.num_tokens, blockIdx.x / num_chunks);
  begin_round(args, at, round, true, shared);
  know_stats(args, shared.plan.stats, row);
  const int slots = round == 0 ? 1 : shared.plan.num_targets;
  if (slots == 0) return;  // the same in the whole group
  add_tokens(args, row, at.begin, at.end, round, shared);
  CutHistogram& of_group = at.state->histogram[round];
  for (int slot = 0; slot < slots; ++slot) {
    const unsigned count = shared.histogram.count[slot][threadIdx.x];
    const Wide mass = shared.histogram.mass[slot][threadIdx.x];
    if (count > 0) atomicAdd(&of_group.count[slot][threadIdx.x], count);
    if (mass > 0) atomicAdd(&of_group.mass[slot][threadIdx.x], mass);
  }
  if (threadIdx.x == 0 && shared.histogram.forced_mass > 0) {
    atomicAdd(&of_group.forced_mass, shared.histogram.forced_mass);
  }
}

template <typename T>
__global__ void __launch_bounds__(kCutThreads, 2) cut_count_kernel(const CutRows args, int num_chunks, bool searches) {
  TOKRED_SHARED(CutStorage, shared);
  CutRow<T> row = cut_row<T>(args, blockIdx.x / num_chunks);
  const CutAt at = cut_at(args, num_chunks, row.row.num_tokens, blockIdx.x / num_chunks);
  begin_round(args, at, kCutRounds, searches, shared);
  know_stats(args, shared.plan.stats, row);
  if (threadIdx.x == 0) shared.cut = resolve_cut(args, at.group, shared.plan);
  __syncthreads();  // the cut is known
  unsigned above = 0, ties = 0;
  for (int token = at.begin + static_cast<int>(threadIdx.x); token < at.end; token += kCutThreads) {
    const uint32_t key = cut_key(cut_token(args, row, token), row.crowded);
    above += key > shared.cut.bound;
    ties += key == shared.cut.bound;
  }
  above = block_sum(above, shared.topk.block);
  ties = block_sum(ties, shared.topk.block);
  if (threadIdx.x == 0) {
    at.chunks[blockIdx.x].above = static_cast<int>(above);
    at.chunks[blockIdx.x].ties = static_cast<int>(ties);
    if (at.chunk_in_group == 0) {
      at.state->cut = shared.cut;
      at.state->plan[0].stats = shared.plan.stats;
    }
  }
}

// What is kept of a group before some chunk.
struct CutBefore {
  int64_t above, ties;
};
__device__ CutBefore kept_before(const CutAt& at, int begin, int end, BlockScratch& scratch) {
  Wide above = 0, ties = 0;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kCutThreads) {
    above += static_cast<Wide>(at.chunks[at.first_chunk + i].above);
    ties += static_cast<Wide>(at.chunks[at.first_chunk + i].ties);
  }
  above = block_sum(above, scratch);
  ties = block_sum(ties, scratch);
  return {static_cast<int64_t>(above), static_cast<int64_t>(ties)};
}

// Groups of one row.
template <typename T>
__global__ void __launch_bounds__(kCutThreads) cut_emit_kernel(const CutRows args, int num_chunks) {
  TOKRED_SHARED(BlockTopkScratch, scratch);
  BlockTeam team(scratch);
  CutRow<T> row = cut_row<T>(args, blockIdx.x / num_chunks);
  const CutAt at = cut_at(args, num_chunks, row.row.num_tokens, blockIdx.x / num_chunks);
  know_stats(args, at.state->plan[0].stats, row);
  const Cut cut = at.state->cut;
  const CutBefore before = kept_before(at, 0, at.chunk, scratch.block);
  const CutBefore all = kept_before(at, 0, num_chunks, scratch.block);
  TopkSeen seen{static_cast<int>(before.above), static_cast<int>(before.ties)};
  uint8_t* const mask = row_mask(args, at.row_idx);
  visit_kept(args, row, at.begin, at.end, cut, team, seen, [&](int token, int slot, bool taken) {
    if (mask && token < at.end) mask[token] = taken;
    if (!mask && taken) write_kept(args.rows, at.row_idx, nullptr, slot, token);
  });
  if (mask) return;
  const int64_t count = all.above + min(all.ties, int64_t{cut.ties});
  for (int64_t slot = count + at.chunk * kCutThreads + threadIdx.x; slot < args.rows.k;
       slot += int64_t{num_chunks} * kCutThreads) {
    args.rows.kept_idx[at.row_idx * args.rows.k + slot] = -1;
  }
  if (args.rows.num_kept && at.chunk == 0 && threadIdx.x == 0) {
    args.rows.num_kept[at.row_idx] = static_cast<int32_t>(count);
  }
}

// grid: num_rows. How many of the group's tokens are this row's.
__global__ void __launch_bounds__(kCutThreads) cut_row_count_kernel(const CutRows args, int num_chunks) {
  TOKRED_SHARED(BlockScratch, scratch);
  CutAt at;
  at.group = blockIdx.x / args.rows_per_group;
  at.first_chunk = at.group * args.rows_per_group * num_chunks;
  unsigned char* bytes = reinterpret_cast<unsigned char*>(args.rows.workspace);
  at.chunks = reinterpret_cast<CutChunk*>(bytes + cut_chunks_offset(args));
  const int64_t ties = reinterpret_cast<const CutGroup*>(bytes)[at.group].cut.ties;
  const int first = static_cast<int>(blockIdx.x % args.rows_per_group) * num_chunks;
  const CutBefore before = kept_before(at, 0, first, scratch),
                  here = kept_before(at, first, first + num_chunks, scratch);
  if (threadIdx.x == 0) {
    args.row_count[blockIdx.x] =
        row_count_of(args, here.above + min(before.ties + here.ties, ties) - min(before.ties, ties));
  }
}

template <typename T>
int cut(const CutRows& args, const CutPolicy& policy, CUstream_st* stream) {
  const dim3 block(kCutThreads), rows(static_cast<unsigned>(args.rows.num_rows));
  if (policy.num_chunks == 0) {
    int list_slots = 1;
    while (list_slots < args.rows.k && policy.listed) list_slots *= 2;  // a sort pads it to a power of two
    const size_t list_bytes = policy.listed ? list_slots * sizeof(*TopkList()) : 0;
    return launch(cut_row_kernel<T>, rows, block, shared_bytes_with_tail<CutStorage>(list_bytes), stream, args,
                  policy.searches, policy.listed);
  }
  const int num_chunks = policy.num_chunks;
  const dim3 chunks(static_cast<unsigned>(args.rows.num_rows * num_chunks));
  int error = launch(cut_stats_kernel<T>, chunks, block, sizeof(BlockScratch), stream, args, num_chunks);
  for (int round = 0; round < kCutRounds && policy.searches && error == cudaSuccess; ++round) {
    error = launch(cut_round_kernel<T>, chunks, block, sizeof(CutStorage), stream, args, num_chunks, round);
  }
  if (error != cudaSuccess) return error;
  error = launch(cut_count_kernel<T>, chunks, block, sizeof(CutStorage), stream, args, num_chunks, policy.searches);
  if (error != cudaSuccess) return error;
  if (args.row_count) {
    return launch(cut_row_count_kernel, rows, block, sizeof(BlockScratch), stream, args, num_chunks);
  }
  return launch(cut_emit_kernel<T>, chunks, block, sizeof(BlockTopkScratch), stream, args, num_chunks);
}

}  // namespace

int cut_rows_cuda(const CutRows& args, CUstream_st* stream) {
  if (args.rows.num_rows == 0) return cudaSuccess;
  const CutPolicy policy = choose_cut_policy(args);
  int error = cudaErrorInvalidValue;
  dispatch_float(args.rows.dtype, [&](auto tag) { error = cut<typename decltype(tag)::type>(args, policy, stream); });
  if (error != cudaSuccess || !policy.sorts) return error;
  unsigned char* keys = reinterpret_cast<unsigned char*>(args.rows.workspace) + cut_sort_offset(args, policy);
  return sort_lists_cuda(args.rows, reinterpret_cast<unsigned long long*>(keys), stream);
}

}  // namespace tokred
