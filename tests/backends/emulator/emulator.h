// CUDA kernels on the CPU, for tests: put in front of a kernel's source, it compiles with any C++17 compiler.
//
// Every thread of a block is a fiber; the blocks run one after the other.  In what order fibers, warps and blocks run
// is for the caller to choose, so that code which relies on an order that no barrier gives is found out.  Shared memory
// is allocated with exactly the size asked for and filled with ones bits (NaN) before each block.  Asynchronous copies
// happen as late as may be, when they are waited for, in forward order; at once in reverse order; and the one or the
// other in random order.  A barrier that not all threads reach, lanes of a warp that wait in different operations, and
// misaligned asynchronous copies are faults; the launch ends and tells.
//
// What it cannot show: the text of inline PTX, races between blocks, a missing __syncwarp where a shuffle or a product
// makes the lanes meet anyway, speed.
#pragma once

#include <ucontext.h>
#include <csetjmp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::min;

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { running, at_warp_barrier, at_block_barrier, finished };
enum class Order { forward, reverse, random };
constexpr size_t STACK = 128 * 1024;
constexpr unsigned WARP = 32, EXCHANGED = 6;

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  ucontext_t context;
  jmp_buf place;
  bool entered;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // of the address sanitizer
  State state;
  const char* operation;   // what the warp waits in
  std::vector<Copy> open;  // copies not yet committed
  std::deque<std::vector<Copy>> groups;
  unsigned turn;  // which half of the exchange is free
};

static std::vector<Thread> threads;
static std::vector<uint32_t> exchange;  // [warp][turn][lane][number]
static ucontext_t scheduler;
static jmp_buf scheduler_place;
static unsigned running;
static std::function<void()> body;
static std::string fault;
static Order order;
static std::mt19937 random_bits;
static std::unique_ptr<unsigned char, decltype(&std::free)> shared(nullptr, &std::free);
#if defined(__SANITIZE_ADDRESS__)
static const void* scheduler_stack;
static size_t scheduler_size;
static void* scheduler_fake;
#endif

#if defined(__SANITIZE_ADDRESS__)

inline void to_scheduler() {
  Thread& thread = threads[running];
  const bool last = thread.state == State::finished;
  __sanitizer_start_switch_fiber(last ? nullptr : &thread.fake_stack, scheduler_stack, scheduler_size);
  swapcontext(&thread.context, &scheduler);
  __sanitizer_finish_switch_fiber(threads[running].fake_stack, &scheduler_stack, &scheduler_size);
}

inline void to_thread(unsigned index) {
  running = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  __sanitizer_start_switch_fiber(&scheduler_fake, threads[index].stack.get(), STACK);
  swapcontext(&scheduler, &threads[index].context);
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
}

#else

// Jumps leave the mask of signals alone, which costs swapcontext two calls of the system; only the first entry needs
// it.
inline void to_scheduler() {
  if (_setjmp(threads[running].place) == 0) _longjmp(scheduler_place, 1);
}

inline void to_thread(unsigned index) {
  running = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  if (_setjmp(scheduler_place) != 0) return;
  if (threads[index].entered) _longjmp(threads[index].place, 1);
  threads[index].entered = true;
  setcontext(&threads[index].context);
}

#endif

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  body();
  threads[running].state = State::finished;
  to_scheduler();
}

inline void fail(const std::string& text) {
  if (fault.empty()) fault = text;
  to_scheduler();  // which does not come back
}

inline void wait(State state, const char* operation) {
  threads[running].state = state;
  threads[running].operation = operation;
  to_scheduler();
}

inline void start(unsigned index) {
  Thread& thread = threads[index];
  if (!thread.stack) thread.stack.reset(new char[STACK]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack.get(), STACK);
#endif
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = STACK;
  thread.context.uc_link = nullptr;
  thread.state = State::running;
  thread.entered = false;
  thread.open.clear();
  thread.groups.clear();
  thread.turn = 0;
  makecontext(&thread.context, run_thread, 0);
}

inline std::vector<unsigned> ordered(unsigned n) {
  std::vector<unsigned> found(n);
  for (unsigned i = 0; i < n; ++i) found[i] = order == Order::reverse ? n - 1 - i : i;
  if (order == Order::random) std::shuffle(found.begin(), found.end(), random_bits);
  return found;
}

// Let the lanes of a warp run up to their next barrier, and pass it if it is one of the warp.
inline void advance(unsigned warp) {
  for (unsigned lane : ordered(WARP)) {
    if (threads[warp * WARP + lane].state == State::running) to_thread(warp * WARP + lane);
    if (!fault.empty()) return;
  }
  Thread* const lanes = &threads[warp * WARP];
  for (unsigned lane = 1; lane < WARP; ++lane) {
    if (lanes[lane].state != lanes[0].state) {
      fault = "barrier divergence: lanes of a warp wait at different barriers or have left";
    } else if (lanes[0].state == State::at_warp_barrier && lanes[lane].operation != lanes[0].operation) {
      fault =
          std::string("divergence: lanes of a warp wait in ") + lanes[0].operation + " and " + lanes[lane].operation;
    }
  }
  if (lanes[0].state == State::at_warp_barrier) {
    for (unsigned lane = 0; lane < WARP; ++lane) lanes[lane].state = State::running;
  }
}

inline void run_block() {
  const unsigned n_warps = threads.size() / WARP;
  for (unsigned i = 0; i < threads.size(); ++i) start(i);
  while (fault.empty()) {
    unsigned n_waiting = 0, n_finished = 0, chosen = n_warps;
    for (unsigned warp : ordered(n_warps)) {
      const State state = threads[warp * WARP].state;
      n_waiting += state == State::at_block_barrier;
      n_finished += state == State::finished;
      if (state == State::running && chosen == n_warps) chosen = warp;
    }
    if (chosen < n_warps) {
      advance(chosen);
    } else if (n_finished == n_warps) {
      return;
    } else if (n_waiting == n_warps) {
      for (Thread& thread : threads) thread.state = State::running;
    } else {
      fault = "barrier divergence: warps have left that others wait for";
    }
  }
}

// Run a kernel.  Gives what went wrong, or nothing.
inline const std::string& launch(std::function<void()> kernel, Index grid, Index block, unsigned shared_bytes,
                                 Order how, unsigned seed) {
  const unsigned n_threads = block.x * block.y * block.z, n_blocks = grid.x * grid.y * grid.z;
  order = how;
  random_bits.seed(seed);
  body = std::move(kernel);
  fault.clear();
  gridDim = grid;
  blockDim = block;
  if (n_threads % WARP || !n_threads || n_threads > 1024 || !n_blocks) {
    fault = "launch: blocks have 32 to 1024 threads, whole warps, and there is at least one block";
    return fault;
  }
  threads.resize(n_threads);
  exchange.assign(n_threads * 2 * EXCHANGED, 0);
  for (unsigned i : ordered(n_blocks)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    // A size of its own for every block, so that the address sanitizer knows the bounds.
    shared.reset(static_cast<unsigned char*>(std::malloc(shared_bytes)));
    if (shared_bytes) std::memset(shared.get(), 0xFF, shared_bytes);
    run_block();
    if (!fault.empty()) break;
  }
  return fault;
}

inline unsigned char* dynamic_shared() { return shared.get(); }

inline void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("asynchronous copy: an address is not a multiple of 16");
  }
  if (order == Order::reverse || (order == Order::random && random_bits() % 2)) {
    std::memcpy(to, from, 16);
  } else {
    threads[running].open.push_back({to, from});
  }
}

inline void copies_commit() {
  Thread& thread = threads[running];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

inline void copies_wait(unsigned left) {
  Thread& thread = threads[running];
  for (; thread.groups.size() > left; thread.groups.pop_front()) {
    for (const Copy& copy : thread.groups.front()) std::memcpy(copy.to, copy.from, 16);
  }
}

// Lay `n` numbers open to the warp; gives all lanes' numbers, EXCHANGED per lane, valid until the next exchange.
inline const uint32_t* lay_open(const uint32_t* numbers, unsigned n, const char* operation) {
  const unsigned warp = running / WARP, lane = running % WARP;
  Thread& thread = threads[running];
  // Two halves in turn: who writes to a half has passed the other half's barrier, so all have read this one.
  uint32_t* const half = &exchange[(warp * 2 + thread.turn) * WARP * EXCHANGED];
  thread.turn ^= 1;
  std::copy(numbers, numbers + n, half + lane * EXCHANGED);
  wait(State::at_warp_barrier, operation);
  return half;
}

inline uint32_t from_lane(unsigned mask, uint32_t number, unsigned lane, const char* operation) {
  if (mask != 0xffffffffu) fail("shuffle: not all lanes are named");
  return lay_open(&number, 1, operation)[(lane % WARP) * EXCHANGED];
}

inline float from_bits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

inline uint32_t to_bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  return bits;
}

inline float from_bfloat16(uint32_t bits) { return from_bits(bits << 16); }

inline uint32_t to_bfloat16(float number) {
  const uint32_t bits = to_bits(number);
  if (std::isnan(number)) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float from_float16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFF, sign = (bits & 0x8000) << 16;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // A float32 with the same exponent field is too small by 2^112; subnormals come out right, too.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

inline uint32_t to_float16(float number) {
  const uint32_t sign = to_bits(number) >> 16 & 0x8000;
  const float magnitude = std::fabs(number);
  if (std::isnan(number)) return 0x7FFF;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t bits = to_bits(magnitude);
  return sign | (bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
}

// mma.m16n8k16 with the operands spread over the warp as PTX documents.
template <class Decode>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  const uint32_t own[EXCHANGED] = {a[0], a[1], a[2], a[3], b0, b1};
  const uint32_t* const all = lay_open(own, EXCHANGED, "mma");
  const unsigned lane = running % WARP;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float sum = 0.0f;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t from_a = all[(row % 8 * 4 + k % 8 / 2) * EXCHANGED + row / 8 + k / 8 * 2];
      const uint32_t from_b = all[(column * 4 + k % 8 / 2) * EXCHANGED + 4 + k / 8];
      sum += decode(from_a >> k % 2 * 16 & 0xFFFF) * decode(from_b >> k % 2 * 16 & 0xFFFF);
    }
    c[e] += sum;
  }
}

// A kernel from the array of pointers to its arguments that the driver also takes.
template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** pointers, std::index_sequence<I...>) {
  kernel(*static_cast<Arguments*>(pointers[I])...);
}

template <class... Arguments>
void call(void (*kernel)(Arguments...), void** pointers) {
  call(kernel, pointers, std::index_sequence_for<Arguments...>());
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier, "__syncthreads"); }
inline void __syncwarp() { emulator::wait(emulator::State::at_warp_barrier, "__syncwarp"); }
inline unsigned __shfl_sync(unsigned mask, unsigned number, int lane) {
  return emulator::from_lane(mask, number, lane, "__shfl_sync");
}
inline unsigned __shfl_up_sync(unsigned mask, unsigned number, int step) {
  const int lane = emulator::running % emulator::WARP;
  return emulator::from_lane(mask, number, lane >= step ? lane - step : lane, "__shfl_up_sync");
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) { return emulator::from_bits(bits); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> shift % 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return found;
}
