#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <random>

namespace simt {
namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

enum class State : uint8_t { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t context;
  jmp_buf resume;
  bool started = false;  // it waits in `resume` for the next block
  State state = State::kDone;
  const char* file = nullptr;  // of the barrier
  int line = 0;                // of the barrier or the shuffle
  uint64_t slot[2] = {0, 0};   // values left for other lanes, alternating: a fast lane cannot overwrite what is read
  unsigned num_shuffles = 0;
  uint32_t priority = 0;
};

struct Range {
  uintptr_t begin, end;
  std::vector<bool> stored;  // for outputs: one flag per byte
};

struct Machine {
  Session session;
  std::mt19937_64 random;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  jmp_buf scheduler;
  unsigned thread = 0, block = 0, num_threads = 0, num_blocks = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<unsigned char> shared;
  std::vector<Range> loads, stores;
  int64_t bytes_loaded = 0, bytes_stored = 0;
  std::string error;
  std::vector<std::string> barriers;
};

Machine m;

Fiber& current() { return m.fibers[m.thread]; }

// Back to the scheduler until it picks this fiber again.
void yield() {
  if (_setjmp(current().resume) == 0) _longjmp(m.scheduler, 1);
}

// Ends the launch. The fibers are left where they are and start anew in the next launch.
[[noreturn]] void fail(const std::string& what) {
  if (m.error.empty()) {
    m.error = what + " (thread " + std::to_string(m.thread) + " of block " + std::to_string(m.block) + ")";
  }
  _longjmp(m.scheduler, 2);
}

void fiber_main() {
  for (;;) {
    (*m.kernel)();
    current().state = State::kDone;
    yield();
  }
}

std::string place(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
}

// Lets a warp go on whose lanes have all reached the same shuffle.
void release_warp(unsigned warp) {
  Fiber* lanes = &m.fibers[warp * kWarp];
  for (int i = 0; i < kWarp; ++i) {
    if (lanes[i].state != State::kAtShuffle) return;
  }
  for (int i = 1; i < kWarp; ++i) {
    if (lanes[i].line != lanes[0].line || lanes[i].num_shuffles != lanes[0].num_shuffles) {
      fail("lanes of a warp are at different shuffles");
    }
  }
  for (int i = 0; i < kWarp; ++i) lanes[i].state = State::kReady;
}

void release_block() {
  for (unsigned i = 0; i < m.num_threads; ++i) {
    if (m.fibers[i].state != State::kAtBarrier) return;
  }
  for (unsigned i = 0; i < m.num_threads; ++i) {
    if (m.fibers[i].line != m.fibers[0].line || m.fibers[i].file != m.fibers[0].file) {
      fail("threads are at different barriers");
    }
    m.fibers[i].state = State::kReady;
  }
}

// Three kinds of schedule. Uniformly random order rarely lets one warp run far ahead of another, and that is what shows
// some missing barriers; so others prefer warps, or threads, in a random order that is drawn anew now and then.
unsigned pick(const std::vector<unsigned>& ready) {
  const unsigned kind = m.session.seed % 3;
  if (kind == 0) return ready[m.random() % ready.size()];
  if (m.random() % 256 == 0) {
    for (unsigned i = 0; i < m.num_threads; ++i) {
      const bool follows = kind == 1 && i % kWarp != 0;
      m.fibers[i].priority = follows ? m.fibers[i - 1].priority : static_cast<uint32_t>(m.random());
    }
  }
  return *std::max_element(ready.begin(), ready.end(),
                           [](unsigned a, unsigned b) { return m.fibers[a].priority < m.fibers[b].priority; });
}

void run_block(unsigned block) {
  m.block = block;
  std::fill(m.shared.begin(), m.shared.end() - kGuardBytes, kPoison);
  for (unsigned i = 0; i < m.num_threads; ++i) {
    m.fibers[i].state = State::kReady;
    m.fibers[i].num_shuffles = 0;
    m.fibers[i].priority = static_cast<uint32_t>(m.random());
  }
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (unsigned i = 0; i < m.num_threads; ++i) {
      if (m.fibers[i].state == State::kReady) ready.push_back(i);
      all_done = all_done && m.fibers[i].state == State::kDone;
    }
    if (all_done) break;
    if (ready.empty()) {
      for (m.thread = 0; m.fibers[m.thread].state == State::kDone;) ++m.thread;
      const bool barrier = current().state == State::kAtBarrier;
      m.error = (barrier ? "not all threads reach the barrier at " + place(current().file, current().line)
                         : "not all lanes reach the shuffle at line " + std::to_string(current().line)) +
                " (thread " + std::to_string(m.thread) + " of block " + std::to_string(block) + " does)";
      return;
    }
    // Runs until it waits or ends. Those that wait for others are looked at again when the others arrive.
    m.thread = pick(ready);
    Fiber& fiber = current();
    const int from = _setjmp(m.scheduler);
    if (from == 2) return;
    if (from == 1) continue;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    setcontext(&fiber.context);
  }
  for (size_t i = m.shared.size() - kGuardBytes; i < m.shared.size(); ++i) {
    if (m.shared[i] == kGuard) continue;
    m.error = "block " + std::to_string(block) + " wrote beyond its shared memory";
    return;
  }
}

Range* find(std::vector<Range>& ranges, uintptr_t begin, uintptr_t end) {
  for (Range& range : ranges) {
    if (begin >= range.begin && end <= range.end) return &range;
  }
  return nullptr;
}

}  // namespace

Index thread_index() { return {m.thread}; }
Index block_index() { return {m.block}; }
Index block_size() { return {m.num_threads}; }
Index grid_size() { return {m.num_blocks}; }

unsigned char* shared_memory() { return m.shared.data(); }

void barrier(const char* file, int line) {
  const std::string name = place(file, line);
  if (std::find(m.barriers.begin(), m.barriers.end(), name) == m.barriers.end()) m.barriers.push_back(name);
  if (name == m.session.skipped_barrier) return;
  current().state = State::kAtBarrier;
  current().file = file;
  current().line = line;
  release_block();
  yield();
}

uint64_t exchange(unsigned mask, uint64_t bits, int distance, int line) {
  if (mask != 0xffffffffu) fail("a shuffle without all lanes");
  Fiber& fiber = current();
  const unsigned turn = fiber.num_shuffles++ % 2;
  fiber.slot[turn] = bits;
  fiber.state = State::kAtShuffle;
  fiber.line = line;
  const unsigned thread = m.thread;
  release_warp(thread / kWarp);
  yield();
  return m.fibers[thread ^ static_cast<unsigned>(distance)].slot[turn];
}

const void* check_load(const void* from, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (begin % bytes != 0) fail("a load of " + std::to_string(bytes) + " bytes is misaligned");
  if (find(m.loads, begin, begin + bytes) == nullptr) fail("a load outside the tensors");
  m.bytes_loaded += bytes;
  return from;
}

void* check_store(void* to, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  if (begin % bytes != 0) fail("a store of " + std::to_string(bytes) + " bytes is misaligned");
  Range* range = find(m.stores, begin, begin + bytes);
  if (range == nullptr) fail("a store outside the outputs");
  for (uintptr_t i = begin - range->begin; i < begin - range->begin + bytes; ++i) {
    if (range->stored[i]) fail("an element is stored twice");
    range->stored[i] = true;
  }
  m.bytes_stored += bytes;
  return to;
}

void run_grid(unsigned grid, unsigned block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (!m.error.empty()) return;
  if (grid == 0 || block == 0 || block > kMaxThreads || block % kWarp != 0) {
    m.error = "a grid of " + std::to_string(grid) + " x " + std::to_string(block) + " cannot run";
    return;
  }
  m.kernel = &kernel;
  m.num_blocks = grid;
  m.num_threads = block;
  m.shared.assign(shared_bytes + kGuardBytes, kGuard);
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (unsigned i : order) {
    run_block(i);
    if (m.error.empty()) continue;
    for (Fiber& fiber : m.fibers) fiber.started = false;
    return;
  }
}

void begin(const Session& session) {
  m.session = session;
  m.random.seed(session.seed);
  m.loads.clear();
  m.stores.clear();
  m.bytes_loaded = m.bytes_stored = 0;
  m.error.clear();
}

// Packs are read whole: an allocation on a GPU consists of aligned groups of 16 bytes, and more.
void allow_load(const void* data, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  m.loads.push_back({begin / 16 * 16, (begin + bytes + 15) / 16 * 16, {}});
}

void allow_store(const void* data, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  m.stores.push_back({begin, begin + bytes, std::vector<bool>(bytes)});
}

const std::string& error() { return m.error; }
int64_t bytes_loaded() { return m.bytes_loaded; }
int64_t bytes_stored() { return m.bytes_stored; }
const std::vector<std::string>& barriers() { return m.barriers; }

}  // namespace simt

cudaError_t cudaGetLastError() { return simt::error().empty() ? cudaSuccess : cudaErrorLaunchFailure; }
