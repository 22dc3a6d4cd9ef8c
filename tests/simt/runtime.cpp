// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Scheduler of the emulator, its collectives and its errors. See runtime.h for the picture.
#include "runtime.h"

#ifdef __SANITIZE_THREAD__
#error "compile tests/simt/*.cpp without -fsanitize=thread: they are what the instrumented kernels call"
#endif

#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

__thread const ThreadView* this_thread = nullptr;
__thread const BlockView* this_block = nullptr;
__thread Worker* worker = nullptr;

namespace {

thread_local std::string last_error;

// ---- switching stacks

#if defined(__x86_64__)
// Saves the callee-saved registers and swaps stacks: about 5 ns, where swapcontext costs 600 ns for its system call.
extern "C" void simt_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void switch_stack(void** from, void* to) { simt_switch(from, to); }
void prepare_stack(Fiber& fiber, unsigned char* stack, size_t bytes, void (*entry)()) {
  // Staggered, or the tops of all stacks would compete for the same cache lines.
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) - 64 * (fiber.rank % 48);
  auto* words = reinterpret_cast<void**>(top & ~uintptr_t{15});
  *--words = nullptr;  // keeps the stack aligned as after a call
  *--words = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  fiber.sp = words;
}
#else
void switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;  // lives on the stack that is left, which is not touched until it is entered again
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
void prepare_stack(Fiber& fiber, unsigned char* stack, size_t bytes, void (*entry)()) {
  // The first context lives at the foot of its own stack.
  auto* context = reinterpret_cast<ucontext_t*>(stack);
  getcontext(context);
  const size_t reserved = (sizeof(ucontext_t) + 63) / 64 * 64;
  context->uc_stack.ss_sp = stack + reserved;
  context->uc_stack.ss_size = bytes - reserved;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.sp = context;
}
#endif

// ---- random order, a function of seed and block alone: not of the number of host threads

unsigned seed() {
  const char* text = std::getenv("TOKRED_SIMT_SEED");
  return text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 0u;
}

uint64_t next_random(Worker& w) {  // splitmix64
  uint64_t z = (w.random += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void shuffle(Worker& w, std::vector<unsigned>& ranks) {
  for (size_t i = ranks.size(); i > 1; --i) std::swap(ranks[i - 1], ranks[next_random(w) % i]);
}

// ---- queue

void enqueue(Worker& w, unsigned rank) {
  w.fibers[rank].waits_for = nullptr;
  size_t at = w.queue_head + w.queue_size++;
  if (at >= w.queue.size()) at -= w.queue.size();
  w.queue[at] = rank;
}
unsigned dequeue(Worker& w) {
  const unsigned rank = w.queue[w.queue_head];
  if (++w.queue_head == w.queue.size()) w.queue_head = 0;
  --w.queue_size;
  return rank;
}

// Leaves the current fiber for the next in the queue, or for the scheduler when there is none.
void leave(Worker& w) {
  Fiber& from = *w.current;
  if (w.queue_size == 0) {
    switch_stack(&from.sp, w.scheduler_sp);
  } else {
    w.current = &w.fibers[dequeue(w)];
    this_thread = w.current;
    if (w.current != &from) switch_stack(&from.sp, w.current->sp);
  }
}

// ---- messages

std::string format_list(const char* format, va_list list) {
  char text[1024];
  std::vsnprintf(text, sizeof(text), format, list);
  return text;
}
__attribute__((format(printf, 1, 2))) std::string text_of(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::string text = format_list(format, list);
  va_end(list);
  return text;
}

std::string line_of_caller(void* pc);

void set_failed(Worker& w, const std::string& what, void* pc) {
  w.failed = true;
  w.message = what + text_of(" [block (%u,%u,%u)", w.block_idx.x, w.block_idx.y, w.block_idx.z);
  if (w.current) w.message += ", " + place_of(*w.current);
  if (pc) w.message += ", at " + line_of_caller(pc);
  w.message += "]";
}

SIMT_NORETURN void stop(Worker& w, const std::string& what, void* pc) {
  set_failed(w, what, pc);
  if (!w.current) std::abort();  // only kernels call what ends here
  void* forgotten;
  // Volatile, or the compiler finds out that this never returns; see SIMT_NORETURN.
  for (volatile bool forever = true; forever;) switch_stack(&forgotten, w.scheduler_sp);
#ifndef __SANITIZE_ADDRESS__
  __builtin_unreachable();
#endif
}

std::string lanes_of(unsigned mask) {
  std::string text;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) text += (text.empty() ? "" : ",") + std::to_string(lane);
  }
  return text;
}

std::string describe_deadlock(const Worker& w) {
  std::string text = "deadlock: no thread can go on;";
  std::map<std::string, std::pair<int, const Fiber*>> groups;
  for (const Fiber& fiber : w.fibers) {
    if (fiber.done || !fiber.waits_for) continue;
    std::string key = fiber.waits_for;
    if (fiber.waits_mask) key += text_of(" with mask %08x", fiber.waits_mask);
    auto& group = groups[key];
    if (group.first++ == 0) group.second = &fiber;
  }
  for (const auto& [what, group] : groups) {
    const auto& [count, fiber] = group;
    text += text_of(" %d wait in %s (%s at %s);", count, what.c_str(), place_of(*fiber).c_str(),
                    line_of(fiber->waits_at).c_str());
  }
  for (size_t i = 0; i < w.warps.size(); ++i) {
    for (const Gathering& g : w.warps[i].in_flight) {
      if (!g.mask) continue;
      text += text_of(" warp %zu: %s with mask %08x misses lanes %s;", i, g.function->name, g.mask,
                      lanes_of(g.mask & ~g.arrived).c_str());
    }
  }
  if (w.live < w.num_threads) text += text_of(" %u have exited;", w.num_threads - w.live);
  text.pop_back();
  return text;
}

// ---- memory

void* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::fprintf(stderr, "simt: no memory for fibers\n");
    std::abort();
  }
  return p;
}

constexpr size_t kArenaPages = (kArenaBytes + kPage - 1) / kPage + 1;  // and one before the largest arena
constexpr unsigned char kCanary = 0xa5;

void prepare_memory(Worker& w) {
  if (!w.arena_map) {
    w.arena_map = static_cast<unsigned char*>(map_memory((kArenaPages + 2) * kPage));
    mprotect(w.arena_map, kPage, PROT_NONE);
    mprotect(w.arena_map + (kArenaPages + 1) * kPage, kPage, PROT_NONE);
    w.emergency_stack = static_cast<unsigned char*>(map_memory(kStackBytes));
  }
  if (w.num_stacks < w.num_threads) {
    if (w.stacks) munmap(w.stacks, w.num_stacks * kStackBytes);
    w.num_stacks = w.num_threads;
    w.stacks = static_cast<unsigned char*>(map_memory(w.num_stacks * kStackBytes));
    for (size_t i = 0; i < w.num_stacks; ++i) mprotect(w.stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
  }
}

// The arena ends at the guard page, so that one element too far is a fault; what is before it is watched by canaries.
void place_arena(Worker& w, size_t bytes) {
  w.arena_bytes = bytes;
  w.arena = w.arena_map + (kArenaPages + 1) * kPage - (bytes + 15) / 16 * 16;
}
size_t canary_bytes() { return 1024; }
void poison_arena(Worker& w) {
  std::memset(w.arena - canary_bytes(), kCanary, canary_bytes());
  std::memset(w.arena, 0xff, w.arena_bytes);
  std::memset(w.arena + w.arena_bytes, kCanary, (16 - w.arena_bytes % 16) % 16);
}
void check_canaries(Worker& w) {
  for (size_t i = 1; i <= canary_bytes(); ++i) {
    if (w.arena[-static_cast<ptrdiff_t>(i)] != kCanary) {
      return set_failed(w, text_of("shared memory written out of bounds: %zu bytes before its start", i), nullptr);
    }
  }
  for (size_t i = 0; i < (16 - w.arena_bytes % 16) % 16; ++i) {
    if (w.arena[w.arena_bytes + i] != kCanary) {
      return set_failed(w, text_of("shared memory written out of bounds: %zu bytes past its end", i), nullptr);
    }
  }
}

// ---- faults: a guard page or a wild pointer, turned into an error of the launch

#if defined(__x86_64__) || defined(__aarch64__)
struct sigaction previous_action;
std::mutex action_mutex;

SIMT_NORETURN void report_fault() {  // on the emergency stack
  Worker& w = *worker;
  const auto at = w.fault_address;
  const auto arena = reinterpret_cast<uintptr_t>(w.arena), map = reinterpret_cast<uintptr_t>(w.arena_map);
  const auto stacks = reinterpret_cast<uintptr_t>(w.stacks);
  if (at >= map && at < map + (kArenaPages + 2) * kPage) {
    stop(w, text_of("shared memory out of bounds: byte %lld of %zu", static_cast<long long>(at - arena), w.arena_bytes),
         w.fault_pc);
  }
  if (at >= stacks && at < stacks + w.num_stacks * kStackBytes) {
    stop(w, text_of("a thread's local memory is larger than %zu bytes", kStackBytes - kGuardBytes), w.fault_pc);
  }
  stop(w, text_of("access to the invalid address %#zx", static_cast<size_t>(at)), w.fault_pc);
}

void on_fault(int signal, siginfo_t* info, void* context) {
  Worker* w = worker;
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  if (w && w->current && info->si_code > 0) {
    w->fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(w->emergency_stack, kStackBytes);  // frames of an earlier fault
#endif
    const auto top = reinterpret_cast<uintptr_t>(w->emergency_stack + kStackBytes) & ~uintptr_t{15};
#if defined(__x86_64__)
    w->fault_pc = reinterpret_cast<void*>(machine.gregs[REG_RIP] + 1);  // +1: callers' addresses point behind, too
    machine.gregs[REG_RSP] = static_cast<greg_t>(top - 8);
    machine.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(&report_fault));
#else
    w->fault_pc = reinterpret_cast<void*>(machine.pc + 1);
    machine.sp = top;
    machine.pc = reinterpret_cast<uintptr_t>(&report_fault);
#endif
    return;
  }
  if ((previous_action.sa_flags & SA_SIGINFO) && previous_action.sa_sigaction) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    sigaction(signal, &previous_action, nullptr);  // the fault comes again, to the default action
  }
}

class FaultGuard {  // while a thread of the host runs blocks
 public:
  FaultGuard() {
    {
      const std::lock_guard<std::mutex> lock(action_mutex);
      struct sigaction now;
      sigaction(SIGSEGV, nullptr, &now);
      if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != &on_fault) {  // others (faulthandler) may come later
        previous_action = now;
        struct sigaction ours = {};
        ours.sa_sigaction = &on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &ours, nullptr);
      }
    }
    if (!stack_) stack_.reset(new char[kBytes]);
    stack_t ours = {};
    ours.ss_sp = stack_.get();
    ours.ss_size = kBytes;
    sigaltstack(&ours, &before_);
  }
  ~FaultGuard() { sigaltstack(&before_, nullptr); }

 private:
  static constexpr size_t kBytes = 64 << 10;
  static thread_local std::unique_ptr<char[]> stack_;
  stack_t before_ = {};
};
thread_local std::unique_ptr<char[]> FaultGuard::stack_;
#else
class FaultGuard {};
#endif

// ---- one block

void fiber_main() {
  Worker& w = *worker;
  w.body(w.data);
  Fiber& fiber = *w.current;
  fiber.done = true;
  --w.live;
  Warp& warp = w.warps[fiber.rank / 32];
  const unsigned bit = 1u << fiber.rank % 32;
  warp.exited |= bit;
  if (w.waiting) {
    stop(w, text_of("divergent barrier: this thread has exited, %u threads wait in __syncthreads", w.waiting), nullptr);
  }
  for (const Gathering& g : warp.in_flight) {
    if (g.mask & bit) {
      stop(w, text_of("%s: mask %08x names lane %u, which has exited", g.function->name, g.mask, fiber.rank % 32),
           nullptr);
    }
  }
  for (;;) leave(w);
}

void run_block(Worker& w, uint64_t linear, const dim3& grid) {
  const unsigned n = w.num_threads;
  w.block_linear = linear;
  w.block_idx = uint3{static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                      static_cast<unsigned>(linear / grid.x / grid.y)};
  w.random = (static_cast<uint64_t>(seed()) << 32) + linear;
  w.live = n;
  w.waiting = 0;
  w.votes = 0;
  for (NamedBarrier& barrier : w.named) barrier = NamedBarrier();
  for (size_t i = 0; i < w.warps.size(); ++i) {
    const unsigned lanes = std::min(32u, n - 32 * static_cast<unsigned>(i));
    w.warps[i].exists = lanes == 32 ? ~0u : (1u << lanes) - 1;
    w.warps[i].exited = 0;
    for (Gathering& g : w.warps[i].in_flight) g.mask = 0;
    w.warps[i].knows.clear();
  }
  poison_arena(w);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(w.stacks, w.num_stacks * kStackBytes);  // frames of fibers that were left for good
#endif
  std::vector<unsigned>& order = w.order;
  for (unsigned t = 0; t < n; ++t) {
    Fiber& fiber = w.fibers[t];
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.copies.clear();
    fiber.group = 0;
    prepare_stack(fiber, w.stacks + t * kStackBytes + kGuardBytes, kStackBytes - kGuardBytes, &fiber_main);
    order[t] = t;
  }
  shuffle(w, order);
  w.queue_head = w.queue_size = 0;
  for (unsigned rank : order) enqueue(w, rank);
  race_block_start(w);
  while (w.live && !w.failed) {
    if (w.queue_size == 0) {
      set_failed(w, describe_deadlock(w), nullptr);
      break;
    }
    w.current = &w.fibers[dequeue(w)];
    this_thread = w.current;
    switch_stack(&w.scheduler_sp, w.current->sp);
    w.current = nullptr;
  }
  w.current = nullptr;
  if (!w.failed) check_canaries(w);
}

// ---- one launch

std::mutex pool_mutex;
std::vector<std::unique_ptr<Worker>> pool;

std::unique_ptr<Worker> take_worker() {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool.empty()) return std::make_unique<Worker>();
  auto w = std::move(pool.back());
  pool.pop_back();
  return w;
}
void give_worker(std::unique_ptr<Worker> w) {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(std::move(w));
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  void (*body)(const void*) = nullptr;
  const void* data = nullptr;
  uint64_t num_blocks = 0;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  uint64_t failed_block = ~uint64_t{0};
  std::string message;
};

void run_blocks(Launch& launch) {
  std::unique_ptr<Worker> owned = take_worker();
  Worker& w = *owned;
  const FaultGuard guard;
  w.block_dim = launch.block;
  w.grid_dim = launch.grid;
  w.num_threads = launch.block.x * launch.block.y * launch.block.z;
  w.body = launch.body;
  w.data = launch.data;
  w.failed = false;
  prepare_memory(w);
  place_arena(w, launch.shared_bytes);
  w.fibers.resize(w.num_threads);
  w.warps.resize((w.num_threads + 31) / 32);
  w.queue.resize(w.num_threads);
  w.order.resize(w.num_threads);
  for (unsigned t = 0; t < w.num_threads; ++t) {
    w.fibers[t].rank = t;
    w.fibers[t].thread_idx =
        uint3{t % launch.block.x, t / launch.block.x % launch.block.y, t / (launch.block.x * launch.block.y)};
  }
  worker = &w;
  this_block = &w;
  while (!launch.stop) {
    const uint64_t linear = launch.next++;
    if (linear >= launch.num_blocks) break;
    run_block(w, linear, launch.grid);
    if (w.failed) {
      const std::lock_guard<std::mutex> lock(launch.mutex);
      launch.stop = true;
      if (linear < launch.failed_block) {
        launch.failed_block = linear;
        launch.message = w.message;
      }
    }
  }
  worker = nullptr;
  this_block = nullptr;
  this_thread = nullptr;
  give_worker(std::move(owned));
}

unsigned num_host_threads() {
  if (const char* text = std::getenv("TOKRED_SIMT_THREADS")) return std::max(1, std::atoi(text));
  return std::max(1u, std::min(8u, std::thread::hardware_concurrency()));
}

int error_of(int error, const GridAt& grid, const std::string& what) {
  const char* slash = std::strrchr(grid.file, '/');
  last_error = text_of("simt: %s: kernel launched at line %d: ", slash ? slash + 1 : grid.file, grid.line) + what +
               text_of(" (TOKRED_SIMT_SEED=%u)", seed());
  std::fprintf(stderr, "%s\n", last_error.c_str());  // also for those who look at the number only
  return error;
}

}  // namespace

int launch_grid(const GridAt& grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* data,
                bool race) {
  constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;
  const dim3& g = grid.grid;
  if (g.x == 0 || g.y == 0 || g.z == 0) return 0;
  if (worker) {
    return error_of(kInvalidConfiguration, grid, "a kernel cannot launch a kernel");
  }
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    return error_of(kInvalidConfiguration, grid, text_of("grid (%u,%u,%u) is too large", g.x, g.y, g.z));
  }
  if (uint64_t{block.x} * block.y * block.z - 1 >= 1024 || block.z > 64) {
    return error_of(kInvalidConfiguration, grid,
                    text_of("block (%u,%u,%u) does not have 1 to 1024 threads", block.x, block.y, block.z));
  }
  if (shared_bytes > kArenaBytes) {
    return error_of(kInvalidValue, grid,
                    text_of("%zu bytes of shared memory, more than the %zu of every GPU since compute capability 8.0",
                            shared_bytes, kArenaBytes));
  }
  Launch launch;
  launch.grid = g;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  launch.body = body;
  launch.data = data;
  launch.num_blocks = uint64_t{g.x} * g.y * g.z;
  static std::mutex one_race_at_a_time;
  std::unique_lock<std::mutex> lock(one_race_at_a_time, std::defer_lock);
  if (race) {  // the detector watches blocks one after the other
    lock.lock();
    race_build = true;
    race_launch_start();
    run_blocks(launch);
  } else {
    const uint64_t work = launch.num_blocks * block.x * block.y * block.z;
    const unsigned threads =
        work < 1024 ? 1 : static_cast<unsigned>(std::min<uint64_t>(num_host_threads(), launch.num_blocks));
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back([&launch] { run_blocks(launch); });
    run_blocks(launch);
    for (std::thread& thread : others) thread.join();
  }
  return launch.stop ? error_of(kLaunchFailure, grid, launch.message) : 0;
}

const char* error_string(int error) {
  if (error == 0) return "no error";
  return last_error.empty() ? "simt: invalid argument" : last_error.c_str();
}

// ---- what kernels call

std::string place_of(const Fiber& fiber) {
  return text_of("thread (%u,%u,%u)", fiber.thread_idx.x, fiber.thread_idx.y, fiber.thread_idx.z);
}

namespace {

// "kernel.cu:12 < caller.cu:34", innermost first, without the emulator's own frames; empty if there are no others, or
// no debug information.
std::string kernel_lines_of(const Dl_info& info, uintptr_t offset) {
  const char* wanted = std::getenv("TOKRED_SIMT_ADDR2LINE");
  if (wanted && std::strcmp(wanted, "0") == 0) return "";
  const std::string command = text_of("addr2line -i -e '%s' %#zx 2>/dev/null", info.dli_fname, offset);
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return "";
  std::string lines;
  char line[1024];
  int frames = 0;
  while (std::fgets(line, sizeof(line), pipe)) {
    std::string text(line);
    text = text.substr(0, text.find_first_of(" \n"));
    const bool emulator = text.find("simt/include/") != std::string::npos ||
                          text.find("simt/runtime.") != std::string::npos ||
                          text.find("simt/race.") != std::string::npos;
    if (emulator || text.compare(0, 2, "??") == 0 || frames == 3) continue;
    const size_t slash = text.rfind('/');
    lines += (frames++ ? " < " : "") + (slash == std::string::npos ? text : text.substr(slash + 1));
  }
  pclose(pipe);
  return lines;
}

bool find_object(void* pc, Dl_info& info, uintptr_t& offset) {
  if (!pc || !dladdr(pc, &info) || !info.dli_fname) return false;
  offset = reinterpret_cast<uintptr_t>(pc) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);  // pc is behind the call
  return true;
}

}  // namespace

std::string line_of(void* pc) {
  Dl_info info;
  uintptr_t offset;
  if (!find_object(pc, info, offset)) return "?";
  const std::string lines = kernel_lines_of(info, offset);
  if (!lines.empty()) return lines;
  const char* slash = std::strrchr(info.dli_fname, '/');
  return text_of("%s+%#zx", slash ? slash + 1 : info.dli_fname, offset);
}

namespace {
// The nearest frame of the calling fiber that is the kernel's.
std::string line_of_caller(void* pc) {
  Dl_info info;
  uintptr_t offset;
  if (find_object(pc, info, offset)) {
    const std::string lines = kernel_lines_of(info, offset);
    if (!lines.empty()) return lines;
  }
  void* frames[24];
  const int count = backtrace(frames, 24);
  for (int i = 0; i < count; ++i) {
    if (!find_object(frames[i], info, offset)) continue;
    const std::string lines = kernel_lines_of(info, offset);
    if (!lines.empty()) return lines;
  }
  return line_of(pc);
}
}  // namespace

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  const std::string text = format_list(format, list);
  va_end(list);
  stop(*worker, text, __builtin_return_address(0));
}
void fail_at(void* pc, const char* format, ...) {
  va_list list;
  va_start(list, format);
  const std::string text = format_list(format, list);
  va_end(list);
  stop(*worker, text, pc);
}

unsigned char* shared(size_t bytes_needed) {
  Worker& w = *worker;
  if (bytes_needed > w.arena_bytes) {
    fail_at(__builtin_return_address(0), "the kernel's shared storage has %zu bytes, the launch gave %zu", bytes_needed,
            w.arena_bytes);
  }
  return w.arena;
}

bool in_shared(const void* address, size_t bytes) {
  const Worker& w = *worker;
  const auto* p = static_cast<const unsigned char*>(address);
  return p >= w.arena && p + bytes <= w.arena + w.arena_bytes;
}

int barrier(Barrier kind, int predicate) {
  static const char* const kNames[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  Worker& w = *worker;
  Fiber& fiber = *w.current;
  void* pc = __builtin_return_address(0);
  if (w.live < w.num_threads) {
    fail_at(pc, "divergent barrier: this thread is in %s, but %u of the block's %u threads have exited",
            kNames[static_cast<int>(kind)], w.num_threads - w.live, w.num_threads);
  }
  if (w.waiting && w.kind != kind) {
    fail_at(pc, "divergent barrier: this thread is in %s, others are in %s", kNames[static_cast<int>(kind)],
            kNames[static_cast<int>(w.kind)]);
  }
  w.kind = kind;
  w.votes += predicate != 0;
  if (++w.waiting == w.num_threads) {
    switch (kind) {
      case Barrier::kPlain:
        w.result = 0;
        break;
      case Barrier::kOr:
        w.result = w.votes != 0;
        break;
      case Barrier::kAnd:
        w.result = w.votes == static_cast<int>(w.num_threads);
        break;
      case Barrier::kCount:
        w.result = w.votes;
        break;
    }
    w.waiting = 0;
    w.votes = 0;
    race_barrier(w);
    for (unsigned t = 0; t < w.num_threads; ++t) w.order[t] = t;
    shuffle(w, w.order);
    for (unsigned rank : w.order) enqueue(w, rank);
  } else {
    fiber.waits_for = kNames[static_cast<int>(kind)];
    fiber.waits_mask = 0;
    fiber.waits_at = pc;
  }
  leave(w);
  return w.result;
}

void named_barrier(int id, int num_threads, bool wait) {
  Worker& w = *worker;
  Fiber& fiber = *w.current;
  void* pc = __builtin_return_address(0);
  if (id < 1 || id > 15) fail_at(pc, "named barrier: expected id in [1, 15], got %d", id);
  if (num_threads < 32 || num_threads % 32 || num_threads > static_cast<int>(w.num_threads)) {
    fail_at(pc, "named barrier %d: expected num_threads a multiple of 32 up to %u, got %d", id, w.num_threads,
            num_threads);
  }
  NamedBarrier& barrier = w.named[id];
  if (barrier.arrived && barrier.expected != num_threads) {
    fail_at(pc, "named barrier %d: this thread expects %d threads, others expect %d", id, num_threads,
            barrier.expected);
  }
  barrier.expected = num_threads;
  ++barrier.arrived;
  barrier.members.push_back(fiber.rank);
  if (wait) barrier.waiting.push_back(fiber.rank);
  if (barrier.arrived == num_threads) {
    race_named_barrier(w, barrier);
    shuffle(w, barrier.waiting);
    for (unsigned rank : barrier.waiting) enqueue(w, rank);
    barrier = NamedBarrier();
  } else if (wait) {
    fiber.waits_for = "named_barrier_sync";
    fiber.waits_mask = 0;
    fiber.waits_at = pc;
  }
  if (wait) leave(w);
}

void fence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  worker->current->fenced = true;
}

unsigned active_mask() {
  const Worker& w = *worker;
  const Warp& warp = w.warps[w.current->rank / 32];
  return warp.exists & ~warp.exited;
}

void warp_call(const WarpFunction& function, unsigned mask, const void* in, void* out) {
  Worker& w = *worker;
  Fiber& fiber = *w.current;
  void* pc = __builtin_return_address(0);
  Warp& warp = w.warps[fiber.rank / 32];
  const unsigned lane = fiber.rank % 32, bit = 1u << lane;
  if (!(mask & bit)) fail_at(pc, "%s: lane %u calls with mask %08x, which does not name it", function.name, lane, mask);
  if (mask & ~warp.exists) {
    fail_at(pc, "%s: mask %08x names lane %d, which the block of %u threads does not have", function.name, mask,
            __builtin_ctz(mask & ~warp.exists), w.num_threads);
  }
  if (mask & warp.exited) {
    fail_at(pc, "%s: mask %08x names lane %d, which has exited", function.name, mask,
            __builtin_ctz(mask & warp.exited));
  }
  Gathering* gathering = nullptr;
  Gathering* free_place = nullptr;
  for (Gathering& g : warp.in_flight) {
    if (!g.mask) free_place = &g;
    if (g.mask != mask) continue;  // another mask is another call
    if (g.function != &function) {
      fail_at(pc, "lanes of mask %08x are in different functions: this one in %s, lane %d in %s", mask, function.name,
              __builtin_ctz(g.arrived), g.function->name);
    }
    gathering = &g;
  }
  if (!gathering) {
    gathering = free_place ? free_place : &warp.in_flight.emplace_back();
    gathering->arrived = 0;
    gathering->mask = gathering->call.mask = mask;
    gathering->function = &function;
  }
  gathering->call.in[lane] = in;
  gathering->call.out[lane] = out;
  gathering->arrived |= bit;
  if (gathering->arrived != mask) {
    fiber.waits_for = function.name;
    fiber.waits_mask = mask;
    fiber.waits_at = pc;
    return leave(w);
  }
  function.run(gathering->call);  // every other lane waits, so their in and out are alive
  const unsigned first = 32 * (fiber.rank / 32);
  if (function.orders_memory) race_sync_warp(w, first / 32, mask);
  gathering->mask = 0;
  // This lane goes on at once; the others follow, from a random lane onwards.
  const unsigned start = static_cast<unsigned>(next_random(w) % 32);
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned other = (start + i) % 32;
    if (other != lane && (mask >> other & 1)) enqueue(w, first + other);
  }
}

void cp_async(void* smem, const void* gmem, int bytes, bool valid) {
  Worker& w = *worker;
  void* pc = __builtin_return_address(0);
  if (!in_shared(smem, static_cast<size_t>(bytes))) fail_at(pc, "cp_async: the destination is not in shared memory");
  if (reinterpret_cast<uintptr_t>(smem) % bytes || (valid && reinterpret_cast<uintptr_t>(gmem) % bytes)) {
    fail_at(pc, "cp_async_%d: an address is not aligned to %d bytes", bytes, bytes);
  }
  if (valid) race_touch(gmem, static_cast<size_t>(bytes), Access::kRead, pc);
  race_touch(smem, static_cast<size_t>(bytes), Access::kWrite, pc);
  race_async_issued(smem, static_cast<size_t>(bytes));
  std::memset(smem, 0xff, static_cast<size_t>(bytes));
  w.current->copies.push_back({smem, valid ? gmem : nullptr, bytes, w.current->group});
}
void cp_async_commit() { ++worker->current->group; }
void cp_async_wait(int groups_left) {
  Fiber& fiber = *worker->current;
  size_t kept = 0;
  for (const AsyncCopy& copy : fiber.copies) {
    if (copy.group + static_cast<unsigned>(groups_left) >= fiber.group) {
      fiber.copies[kept++] = copy;
      continue;
    }
    race_touch(copy.to, static_cast<size_t>(copy.bytes), Access::kWrite, __builtin_return_address(0));
    if (copy.from) {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    } else {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    }
  }
  fiber.copies.resize(kept);
}

void touch(const void* address, size_t bytes, Access access) {
  race_touch(address, bytes, access, __builtin_return_address(0));
}

}  // namespace simt
