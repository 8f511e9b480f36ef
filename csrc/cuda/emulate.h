// The kernels on a CPU: every thread of a block is a context of its own, and the hardware keeps only what it promises.
//
// - Warps run as far as they can before another one does, in one order or the other: a missing barrier shows.
// - Shared memory begins as NaN, and so does what copy_async is to fill: the bytes come with the thread's wait_copies, and
//   for wgmma only with its fence_copies. A missing or early wait shows.
// - wgmma reads registers and shared memory, and writes its sums, at wgmma_wait, not before.
// - The lanes of a warp meet at its collectives; who leaves others waiting at a barrier or a collective is an error.
// - Fragments are those of the PTX manual. Products are exact, a sum is rounded towards zero once per instruction: not
//   exactly what the tensor cores do (which no manual states), but as coarse.
//
// Not emulated: bank conflicts, alignment of shared memory (the sanitizer's task), time.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace modeconn::cuda::emulation {

constexpr size_t stack_bytes = 128 * 1024;

struct Copy {
  char* to;
  const char* from;
};

struct Wgmma {
  float* d;
  const uint32_t* a;
  uint64_t b;
  int units;
  bool bf16;
};

enum class State { ready, at_collective, at_barrier, done };

// A collective of a warp's lanes, given each lane's argument.
using Collective = void (*)(void* const (&lanes)[32]);

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  State state;
  Collective collective;
  void* argument;
  std::vector<Copy> open;                 // copies since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  std::vector<Copy> landed;               // there, but not fenced
  std::vector<Wgmma> products;
};

class Block {
 public:
  std::vector<Lane> lanes;
  std::unique_ptr<char[]> memory;  // as threads see it
  std::vector<char> async;         // as wgmma sees it
  size_t bytes = 0;
  int64_t index = 0, count = 0;
  int current = 0;

  Lane& lane() { return lanes[size_t(current)]; }

  void run(const std::function<void()>& kernel, bool backwards) {
    kernel_ = &kernel;
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
    async.assign(bytes, char(0xff));
    for (size_t i = 0; i < lanes.size(); ++i) prepare(lanes[i]);
    const int warps = int(lanes.size() / 32);
    for (;;) {
      bool moved = false;
      for (int w = 0; w < warps; ++w) moved |= run_warp(backwards ? warps - 1 - w : w);
      if (failure_) std::rethrow_exception(failure_);
      size_t done = 0, waiting = 0;
      for (const Lane& l : lanes) done += l.state == State::done, waiting += l.state == State::at_barrier;
      if (done == lanes.size()) return;
      if (waiting == lanes.size())
        for (Lane& l : lanes) l.state = State::ready;
      else if (!moved)
        throw std::runtime_error(std::to_string(waiting) + " of " + std::to_string(lanes.size()) + " threads wait at a barrier for the others");
    }
  }

  // Stop the current thread until the scheduler goes on with it.
  void stop(State state) {
    Lane& l = lane();
    l.state = state;
    switch_to(l.context, scheduler_, scheduler_stack_, scheduler_bytes_);
  }

  void meet(Collective collective, void* argument) {
    lane().collective = collective;
    lane().argument = argument;
    stop(State::at_collective);
  }

  // The offset of 16 bytes of shared memory.
  size_t offset(const void* p) const {
    const auto at = size_t(static_cast<const char*>(p) - memory.get());
    if (static_cast<const char*>(p) < memory.get() || at + 16 > bytes || at % 16)
      throw std::runtime_error("an asynchronous copy must go to 16 aligned bytes of the block's shared memory");
    return at;
  }

  void begin_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
#endif
    try {
      (*kernel_)();
    } catch (...) {
      failure_ = std::current_exception();
    }
    lane().state = State::done;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_bytes_);
#endif
    setcontext(&scheduler_);
  }

 private:
  void prepare(Lane& l);

  // Until its lanes are done or wait for the block; whether any of them ran.
  bool run_warp(int warp) {
    bool moved = false;
    for (;;) {
      int ready = 0, met = 0;
      void* arguments[32];
      for (int i = 0; i < 32; ++i) {
        current = warp * 32 + i;
        Lane& l = lane();
        if (l.state == State::ready) switch_to(scheduler_, l.context, l.stack.get(), stack_bytes), ++ready;
        met += l.state == State::at_collective;
        arguments[i] = l.argument;
      }
      moved |= ready > 0;
      if (met < 32) {
        if (failure_) return moved;
        if (met) throw std::runtime_error("only " + std::to_string(met) + " lanes of a warp meet at a collective");
        return moved;
      }
      const Collective collective = lanes[size_t(warp) * 32].collective;
      for (int i = 0; i < 32; ++i) {
        Lane& l = lanes[size_t(warp * 32 + i)];
        if (l.collective != collective) throw std::runtime_error("the lanes of a warp meet at different collectives");
        l.state = State::ready;
      }
      current = warp * 32;
      collective(arguments);
    }
  }

  void switch_to(ucontext_t& from, ucontext_t& to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack, size);
    swapcontext(&from, &to);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&from, &to);
#endif
  }

  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr failure_;  // of a thread
};

inline Block* running = nullptr;  // one at a time: the emulation has no threads of its own

inline void thread_main() { running->begin_thread(); }

inline void Block::prepare(Lane& l) {
  l.state = State::ready;
  l.open.clear(), l.groups.clear(), l.landed.clear(), l.products.clear();
  getcontext(&l.context);
  l.context.uc_stack.ss_sp = l.stack.get();
  l.context.uc_stack.ss_size = stack_bytes;
  l.context.uc_link = nullptr;
  makecontext(&l.context, thread_main, 0);
}

template <class F> void run(const char* name, int64_t blocks, int threads, int shared_bytes, F&& kernel) {
  const std::function<void()> body = kernel;
  Block block;
  block.lanes = std::vector<Lane>(size_t(threads));
  block.bytes = size_t(shared_bytes);
  block.count = blocks;
  running = &block;
  for (block.index = 0; block.index < blocks; ++block.index) {
    try {
      block.run(body, block.index % 2);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(name) + ", block " + std::to_string(block.index) + ": " + error.what());
    }
  }
}

inline float as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

// d + the products, rounded once, towards zero.
inline float accumulated(float d, double products) {
  const double exact = double(d) + products;
  const float near = float(exact);
  return std::isfinite(near) && std::fabs(double(near)) > std::fabs(exact) ? std::nextafterf(near, 0.f) : near;
}

// Element `slot` of a fragment's row, k = 0…, from the two registers that its threads have of it.
template <class Registers> double element(Registers&& registers, int slot, bool bf16) {
  if (!bf16) return as_float(registers(slot % 4, slot / 4) & 0xffffe000u);
  const uint32_t two = registers(slot % 8 / 2, slot / 8);
  return as_float(slot % 2 ? two & 0xffff0000u : two << 16);
}

// d[row][unit] += Σ_k a[row][k] b[k][unit] for the 16 rows of a warp and 8 units, whose b is given.
inline void multiply(float* const (&d)[32], const uint32_t* const (&a)[32], const double (&b)[16][8], bool bf16) {
  const int depth = bf16 ? 16 : 8;
  for (int row = 0; row < 16; ++row) {
    double x[16];
    for (int k = 0; k < depth; ++k)
      x[k] = element([&](int thread, int half) { return a[row % 8 * 4 + thread][half * 2 + row / 8]; }, k, bf16);
    for (int unit = 0; unit < 8; ++unit) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += x[k] * b[k][unit];
      float& to = d[row % 8 * 4 + unit / 2][row / 8 * 2 + unit % 2];
      to = accumulated(to, sum);
    }
  }
}

struct Mma {
  float* d;           // [tiles][4]
  const uint32_t* a;  // [tiles][4]
  const uint32_t* b;  // [2]
};

template <int M, bool Bf16> void mma(void* const (&arguments)[32]) {
  const auto lane = [&](int i) { return static_cast<const Mma*>(arguments[i]); };
  double b[16][8];
  for (int k = 0; k < (Bf16 ? 16 : 8); ++k)
    for (int unit = 0; unit < 8; ++unit)
      b[k][unit] = element([&](int thread, int word) { return lane(unit * 4 + thread)->b[word]; }, k, Bf16);
  for (int tile = 0; tile < M; ++tile) {
    float* d[32];
    const uint32_t* a[32];
    for (int i = 0; i < 32; ++i) d[i] = lane(i)->d + tile * 4, a[i] = lane(i)->a + tile * 4;
    multiply(d, a, b, Bf16);
  }
}

// The products that the warp's lanes have issued, a warp's 16 rows each, with b read from core matrices without swizzle.
inline void wgmma_done(void* const (&arguments)[32]) {
  const auto lane = [&](int i) { return static_cast<Lane*>(arguments[i]); };
  const size_t count = lane(0)->products.size();
  for (int i = 0; i < 32; ++i)
    if (lane(i)->products.size() != count) throw std::runtime_error("the lanes of a warp have issued different products");
  for (size_t n = 0; n < count; ++n) {
    const Wgmma& first = lane(0)->products[n];
    const size_t at = size_t(first.b & 0x3fff) << 4, along_depth = size_t(first.b >> 16 & 0x3fff) << 4, along_units = size_t(first.b >> 32 & 0x3fff) << 4;
    const int depth = first.bf16 ? 16 : 8, size = first.bf16 ? 2 : 4;
    for (int unit0 = 0; unit0 < first.units; unit0 += 8) {
      double b[16][8];
      for (int k = 0; k < depth; ++k)
        for (int unit = 0; unit < 8; ++unit) {
          const size_t byte = at + size_t(k * size / 16) * along_depth + size_t(unit0 / 8) * along_units + size_t(unit * 16 + k * size % 16);
          if (byte + size_t(size) > running->async.size()) throw std::runtime_error("a product reads beyond shared memory");
          uint32_t word = 0;
          std::memcpy(&word, running->async.data() + byte, size_t(size));
          b[k][unit] = as_float(first.bf16 ? word << 16 : word & 0xffffe000u);
        }
      float* d[32];
      const uint32_t* a[32];
      for (int i = 0; i < 32; ++i) d[i] = lane(i)->products[n].d + unit0 / 2, a[i] = lane(i)->products[n].a;
      multiply(d, a, b, first.bf16);
    }
  }
  for (int i = 0; i < 32; ++i) lane(i)->products.clear();
}

template <class T> struct Shuffle {
  T in, out;
  int mask;
};

template <class T> void shuffle(void* const (&arguments)[32]) {
  for (int i = 0; i < 32; ++i) {
    auto* mine = static_cast<Shuffle<T>*>(arguments[i]);
    mine->out = static_cast<Shuffle<T>*>(arguments[i ^ mine->mask])->in;
  }
}

inline void nothing(void* const (&)[32]) {}

}  // namespace modeconn::cuda::emulation

namespace modeconn::cuda::device {

using emulation::running;

constexpr bool has_wgmma = true;

inline int thread() { return running->current; }
inline int lane() { return running->current % 32; }
inline int warp() { return running->current / 32; }
inline int64_t block() { return running->index; }
inline int64_t blocks() { return running->count; }

inline char* shared_memory() { return running->memory.get(); }
inline uint32_t shared_address(const void* p) { return uint32_t(running->offset(p)); }

inline void sync_block() { running->stop(emulation::State::at_barrier); }
inline void sync_warp() { running->meet(emulation::nothing, nullptr); }
template <class T> T shuffle_xor(T value, int mask) {
  emulation::Shuffle<T> s{value, {}, mask};
  running->meet(emulation::shuffle<T>, &s);
  return s.out;
}

inline void copy_async(void* to, const void* from) {
  const size_t at = running->offset(to);
  std::memset(to, 0xff, 16);
  std::memset(running->async.data() + at, 0xff, 16);
  running->lane().open.push_back({static_cast<char*>(to), static_cast<const char*>(from)});
}
inline void commit_copies() {
  running->lane().groups.push_back(std::move(running->lane().open));
  running->lane().open.clear();
}
template <int Newest> void wait_copies() {
  auto& groups = running->lane().groups;
  while (groups.size() > size_t(Newest)) {
    for (const emulation::Copy& c : groups.front()) {
      std::memcpy(c.to, c.from, 16);
      running->lane().landed.push_back(c);
    }
    groups.erase(groups.begin());
  }
}
inline void fence_copies() {
  for (const emulation::Copy& c : running->lane().landed) std::memcpy(running->async.data() + running->offset(c.to), c.to, 16);
  running->lane().landed.clear();
}

inline uint32_t bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float from_bits(uint32_t x) { return emulation::as_float(x); }
// To nearest, ties away from zero.
inline uint32_t to_tf32(float x) { return std::isfinite(x) ? (bits(x) + 0x1000u) & 0xffffe000u : bits(x) & 0xffffe000u; }
// To nearest, ties to even.
inline uint16_t to_bf16(float x) {
  const uint32_t y = bits(x);
  return uint16_t(x != x ? 0x7fffu : (y + 0x7fffu + (y >> 16 & 1)) >> 16);
}
inline uint32_t to_bf16(float first, float second) { return to_bf16(first) | uint32_t(to_bf16(second)) << 16; }

template <int M> void mma_tf32(float (&d)[M][4], const uint32_t (&a)[M][4], const uint32_t (&b)[2]) {
  emulation::Mma all{d[0], a[0], b};
  running->meet(emulation::mma<M, false>, &all);
}
template <int M> void mma_bf16(float (&d)[M][4], const uint32_t (&a)[M][4], const uint32_t (&b)[2]) {
  emulation::Mma all{d[0], a[0], b};
  running->meet(emulation::mma<M, true>, &all);
}

inline void wgmma_begin() {}
inline void wgmma_end() {}
template <int N, bool Bf16, int Size> void wgmma(float (&d)[Size], const uint32_t (&a)[4], uint64_t b_descriptor) {
  static_assert(Size >= N / 2, "an accumulator for each of 64 times N sums");
  running->lane().products.push_back({d, a, b_descriptor, N, Bf16});
}
inline void wgmma_wait() { running->meet(emulation::wgmma_done, &running->lane()); }

}  // namespace modeconn::cuda::device
