#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <random>

namespace simt {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxCluster = 16;
constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

enum class State : uint8_t { kReady, kAtBarrier, kAtClusterBarrier, kAtShuffle, kAtWord, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t context;
  jmp_buf resume;
  bool started = false;        // it waits in `resume` for the next block
  const char* file = nullptr;  // of the barrier
  int line = 0;                // of the barrier or the shuffle
  bool arrived = false;        // at the cluster's barrier, where others are missing yet
  int passed = 0, waited = 0;  // cluster barriers
  std::string arrived_at;
  const unsigned* word = nullptr;  // that it waits for, to be `bits` under `mask`
  unsigned bits = 0, mask = 0;
  bool depends = false;                     // it has waited for the kernels before
  std::vector<Copy> copies;                 // begun, and in no group yet
  std::deque<std::vector<Copy>> in_flight;  // groups
  uint64_t slot[2] = {0, 0};  // values left for other lanes, alternating: a fast lane cannot overwrite what is read
  unsigned num_shuffles = 0;
};

struct Range {
  uintptr_t begin, end;
  std::vector<bool> stored;  // for outputs: one flag per byte
};

struct Machine {
  Session session;
  std::mt19937_64 random;
  std::deque<Fiber> fibers;  // of all blocks of a cluster, or of a cooperative launch
  // Of each fiber, side by side: they are looked at whenever another one runs.
  std::vector<State> states;
  std::vector<uint32_t> priorities;
  jmp_buf scheduler;
  // cluster: blocks that run at the same time, also in a cooperative launch.
  unsigned fiber = 0, first_block = 0, num_threads = 0, cluster = 1, num_blocks = 0;
  const std::function<void()>* kernel = nullptr;
  bool cooperative = false, overlaps = false;
  std::vector<std::vector<unsigned char>> shared;  // one for each block of a cluster
  std::vector<Range> loads, stores;
  int64_t bytes_loaded = 0, bytes_stored = 0, bytes_kept = 0, bytes_stored_meanwhile = 0;
  Late late;
  int launches = 0;
  std::string error;
  std::vector<std::string> barriers;
};

Machine m;

Fiber& current() { return m.fibers[m.fiber]; }

unsigned thread() { return m.fiber % m.num_threads; }
unsigned rank() { return m.fiber / m.num_threads; }
unsigned num_fibers() { return m.num_threads * m.cluster; }

std::string where() {
  return " (thread " + std::to_string(thread()) + " of block " + std::to_string(m.first_block + rank()) + ")";
}

// Back to the scheduler until it picks this fiber again.
void yield() {
  if (_setjmp(current().resume) == 0) _longjmp(m.scheduler, 1);
}

// Ends the launch. The fibers are left where they are and start anew in the next launch.
[[noreturn]] void fail(const std::string& what) {
  if (m.error.empty()) m.error = what + where();
  _longjmp(m.scheduler, 2);
}

void fiber_main() {
  for (;;) {
    (*m.kernel)();
    const bool waits = current().arrived || current().passed != current().waited;
    if (waits) fail("a thread ends without waiting at the cluster's barrier");
    if (!current().copies.empty()) fail("an asynchronous copy that nobody waits for");
    for (const auto& group : current().in_flight) {
      if (!group.empty()) fail("an asynchronous copy that nobody waits for");
    }
    m.states[m.fiber] = State::kDone;
    yield();
  }
}

std::string place(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
}

// Notes that a barrier has been reached; true if it is to be passed over.
bool skipped(const char* file, int line) {
  const std::string name = place(file, line);
  if (std::find(m.barriers.begin(), m.barriers.end(), name) == m.barriers.end()) m.barriers.push_back(name);
  return (" " + m.session.skipped_barriers + " ").find(" " + name + " ") != std::string::npos;
}

// Lets a warp go on whose lanes have all reached the same shuffle.
void release_warp(unsigned first) {
  Fiber& leader = m.fibers[first];
  for (unsigned i = first; i < first + kWarp; ++i) {
    if (m.states[i] != State::kAtShuffle) return;
  }
  for (unsigned i = first; i < first + kWarp; ++i) {
    if (m.fibers[i].line != leader.line || m.fibers[i].num_shuffles != leader.num_shuffles) {
      fail("lanes of a warp are at different shuffles");
    }
  }
  for (unsigned i = first; i < first + kWarp; ++i) m.states[i] = State::kReady;
}

void release_block(unsigned first) {
  Fiber& leader = m.fibers[first];
  for (unsigned i = first; i < first + m.num_threads; ++i) {
    if (m.states[i] != State::kAtBarrier) return;
  }
  for (unsigned i = first; i < first + m.num_threads; ++i) {
    if (m.fibers[i].line != leader.line || m.fibers[i].file != leader.file) fail("threads are at different barriers");
    m.states[i] = State::kReady;
  }
}

// When all threads have arrived, those that wait go on; the others need not wait when they come to it.
void release_cluster() {
  for (unsigned i = 0; i < num_fibers(); ++i) {
    if (!m.fibers[i].arrived) return;
  }
  for (unsigned i = 0; i < num_fibers(); ++i) {
    Fiber& fiber = m.fibers[i];
    if (fiber.arrived_at != m.fibers[0].arrived_at) fail("threads are at different cluster barriers");
    fiber.arrived = false;
    if (m.states[i] == State::kAtClusterBarrier) m.states[i] = State::kReady;
  }
  for (unsigned i = 0; i < num_fibers(); ++i) m.fibers[i].passed += 1;
}

bool has_ended(unsigned rank) {
  for (unsigned i = rank * m.num_threads; i < (rank + 1) * m.num_threads; ++i) {
    if (m.states[i] != State::kDone) return false;
  }
  return true;
}

// The same for groups of threads.
void draw_priorities(unsigned together) {
  for (unsigned i = 0; i < num_fibers(); ++i) {
    const bool follows = i % together != 0;
    m.priorities[i] = follows ? m.priorities[i - 1] : static_cast<uint32_t>(m.random());
  }
}

// Four kinds of schedule. Uniformly random order rarely lets one warp run far ahead of another, and that is what shows
// some missing barriers; so others prefer threads, warps or blocks, in a random order that is drawn anew now and then.
unsigned pick(const std::vector<unsigned>& ready) {
  const unsigned kinds[] = {0, 1, kWarp, m.num_threads};
  const unsigned together = kinds[m.session.seed % 4];
  if (together == 0) return ready[m.random() % ready.size()];
  if (m.random() % (8 * num_fibers()) == 0) draw_priorities(together);
  return *std::max_element(ready.begin(), ready.end(),
                           [](unsigned a, unsigned b) { return m.priorities[a] < m.priorities[b]; });
}

void start_fiber(Fiber& fiber) {
  fiber.started = true;
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

// Who waits for other blocks holds up those of its own.
void report_deadlock() {
  for (m.fiber = 0; m.fiber < num_fibers() && m.states[m.fiber] != State::kAtWord;) ++m.fiber;
  if (m.fiber < num_fibers()) {
    m.error = "waits for ever at " + place(current().file, current().line) + where();
    return;
  }
  for (m.fiber = 0; m.states[m.fiber] == State::kDone;) ++m.fiber;
  const Fiber& fiber = current();
  m.error = m.states[m.fiber] == State::kAtBarrier || m.states[m.fiber] == State::kAtClusterBarrier
                ? "not all threads reach the barrier at " + place(fiber.file, fiber.line)
                : "not all lanes reach the shuffle at line " + std::to_string(fiber.line);
  m.error += where() + " does";
}

void run_cluster(unsigned first_block) {
  m.first_block = first_block;
  for (auto& memory : m.shared) std::fill(memory.begin(), memory.end() - kGuardBytes, kPoison);
  for (unsigned i = 0; i < num_fibers(); ++i) {
    Fiber& fiber = m.fibers[i];
    m.states[i] = State::kReady;
    fiber.num_shuffles = 0;
    fiber.arrived = false;
    fiber.passed = fiber.waited = 0;
    fiber.depends = !m.overlaps;
    fiber.copies.clear();
    fiber.in_flight.clear();
  }
  const unsigned kinds[] = {1, 1, kWarp, m.num_threads};
  draw_priorities(kinds[m.session.seed % 4]);
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (unsigned i = 0; i < num_fibers(); ++i) {
      State& state = m.states[i];
      const Fiber& waits = m.fibers[i];
      if (state == State::kAtWord && (*waits.word & waits.mask) == waits.bits) state = State::kReady;
      if (state == State::kReady) ready.push_back(i);
      all_done = all_done && state == State::kDone;
    }
    if (all_done) break;
    if (ready.empty()) return report_deadlock();
    // Runs until it waits or ends. Those that wait for others are looked at again when the others arrive.
    m.fiber = pick(ready);
    Fiber& fiber = current();
    const int from = _setjmp(m.scheduler);
    if (from == 2) return;
    if (from == 1) continue;
    if (fiber.started) _longjmp(fiber.resume, 1);
    start_fiber(fiber);
  }
  for (unsigned rank = 0; rank < m.cluster; ++rank) {
    const auto& memory = m.shared[rank];
    if (std::all_of(memory.end() - kGuardBytes, memory.end(), [](unsigned char c) { return c == kGuard; })) continue;
    m.error = "block " + std::to_string(first_block + rank) + " wrote beyond its shared memory";
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

Index thread_index() { return {thread()}; }
Index block_index() { return {m.first_block + rank()}; }
Index block_size() { return {m.num_threads}; }
Index grid_size() { return {m.num_blocks}; }

unsigned char* shared_memory() { return m.shared[rank()].data(); }

void barrier(const char* file, int line) {
  if (skipped(file, line)) return;
  m.states[m.fiber] = State::kAtBarrier;
  current().file = file;
  current().line = line;
  release_block(rank() * m.num_threads);
  yield();
}

void cluster_arrive(const char* file, int line) {
  if (skipped(file, line)) return;
  Fiber& fiber = current();
  if (fiber.arrived || fiber.passed != fiber.waited) fail("a thread arrives twice at the cluster's barrier");
  fiber.arrived = true;
  fiber.arrived_at = place(file, line);
  release_cluster();
}

void cluster_wait(const char* file, int line) {
  if (skipped(file, line)) return;
  Fiber& fiber = current();
  if (!fiber.arrived && fiber.passed == fiber.waited) fail("a thread waits at the cluster's barrier without arriving");
  fiber.waited += 1;
  if (fiber.passed >= fiber.waited) return;
  m.states[m.fiber] = State::kAtClusterBarrier;
  fiber.file = file;
  fiber.line = line;
  yield();
}

const void* cluster_memory(const void* own, size_t bytes, unsigned rank_of_other) {
  const auto& mine = m.shared[rank()];
  const size_t offset = static_cast<const unsigned char*>(own) - mine.data();
  if (offset + bytes > mine.size() - kGuardBytes) fail("a load outside the block's shared memory");
  if (rank_of_other >= m.cluster || m.cooperative) fail("a load from a block that is not in the cluster");
  if (has_ended(rank_of_other)) fail("a load from a block that has ended");
  return m.shared[rank_of_other].data() + offset;
}

// Others may run at once, before this thread does anything more.
void arrive_at(unsigned* word, unsigned amount, const char* file, int line) {
  if (skipped(file, line)) return;
  *word += amount;
  yield();
}

void await(const unsigned* word, unsigned bits, unsigned mask, const char* file, int line) {
  if (skipped(file, line)) return;
  Fiber& fiber = current();
  m.states[m.fiber] = State::kAtWord;
  fiber.word = word;
  fiber.bits = bits;
  fiber.mask = mask;
  fiber.file = file;
  fiber.line = line;
  yield();
}

void wait_for_kernels(const char* file, int line) {
  if (!skipped(file, line)) current().depends = true;
}

void check_dependency() {
  if (!current().depends) fail("a kernel before may not have ended");
}

void copy_async(void* to, const void* from, size_t bytes, bool keeps) {
  if (keeps) m.bytes_kept += static_cast<int64_t>(bytes);
  std::memset(to, kPoison, bytes);
  current().copies.push_back({to, from, bytes});
}

void commit_async() {
  current().in_flight.push_back(std::move(current().copies));
  current().copies.clear();
}

void wait_async(int groups, const char* file, int line) {
  if (skipped(file, line)) return;
  auto& in_flight = current().in_flight;
  for (; in_flight.size() > static_cast<size_t>(groups); in_flight.pop_front()) {
    for (const Copy& copy : in_flight.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void count_late_thread(int clocks) {
  ++m.late.threads;
  m.late.least_clocks = std::min<int64_t>(m.late.least_clocks, clocks);
  m.late.most_clocks = std::max<int64_t>(m.late.most_clocks, clocks);
  m.late.first_block = std::min<int64_t>(m.late.first_block, block_index().x);
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned from, int line) {
  if (mask != 0xffffffffu) fail("a shuffle without all lanes");
  Fiber& fiber = current();
  const unsigned turn = fiber.num_shuffles++ % 2;
  fiber.slot[turn] = bits;
  m.states[m.fiber] = State::kAtShuffle;
  fiber.line = line;
  const unsigned self = m.fiber;
  release_warp(self / kWarp * kWarp);
  yield();
  return m.fibers[self / kWarp * kWarp + from % kWarp].slot[turn];
}

const void* check_load(const void* from, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (begin % bytes != 0) fail("a load of " + std::to_string(bytes) + " bytes is misaligned");
  if (find(m.loads, begin, begin + bytes) == nullptr) fail("a load outside the tensors");
  m.bytes_loaded += bytes;
  return from;
}

void* check_store(void* to, size_t bytes) {
  check_dependency();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  if (begin % bytes != 0) fail("a store of " + std::to_string(bytes) + " bytes is misaligned");
  Range* range = find(m.stores, begin, begin + bytes);
  if (range == nullptr) fail("a store outside the outputs");
  for (uintptr_t i = begin - range->begin; i < begin - range->begin + bytes; ++i) {
    if (range->stored[i]) fail("an element is stored twice");
    range->stored[i] = true;
  }
  m.bytes_stored += bytes;
  for (const auto& group : current().in_flight) {
    if (group.empty()) continue;
    m.bytes_stored_meanwhile += bytes;
    break;
  }
  return to;
}

void run_grid(unsigned grid, unsigned block, unsigned cluster, bool cooperative, size_t shared_bytes, bool overlaps,
              const std::function<void()>& kernel) {
  if (!m.error.empty()) return;
  if (++m.launches == m.session.refused_launch) {
    m.error = "refused";
    return;
  }
  if (grid == 0 || block == 0 || block > kMaxThreads || block % kWarp != 0 || cluster == 0 || cluster > kMaxCluster ||
      grid % cluster != 0 || (cooperative && cluster > 1)) {
    m.error = "a grid of " + std::to_string(grid) + " x " + std::to_string(block) + " in clusters of " +
              std::to_string(cluster) + " cannot run";
    return;
  }
  m.kernel = &kernel;
  m.num_blocks = grid;
  m.num_threads = block;
  m.cluster = cooperative ? grid : cluster;
  m.cooperative = cooperative;
  m.overlaps = overlaps;
  if (m.fibers.size() < num_fibers()) m.fibers.resize(num_fibers());
  m.states.assign(m.fibers.size(), State::kDone);
  m.priorities.resize(m.fibers.size());
  m.shared.assign(m.cluster, std::vector<unsigned char>(shared_bytes + kGuardBytes, kGuard));
  std::vector<unsigned> order(grid / m.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (unsigned i : order) {
    run_cluster(i * m.cluster);
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
  m.bytes_loaded = m.bytes_stored = m.bytes_kept = m.bytes_stored_meanwhile = 0;
  m.late = {};
  m.launches = 0;
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
int64_t bytes_kept() { return m.bytes_kept; }
int64_t bytes_stored_meanwhile() { return m.bytes_stored_meanwhile; }
Late late() { return m.late; }
const std::vector<std::string>& barriers() { return m.barriers; }

}  // namespace simt

cudaError_t cudaGetLastError() { return simt::error().empty() ? cudaSuccess : cudaErrorLaunchFailure; }
