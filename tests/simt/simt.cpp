#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <utility>

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

// A store to memory that kernels leave for each other: other blocks may not see it yet.
struct Pending {
  unsigned char* to;
  std::vector<unsigned char> value;
  int barriers;  // of the block, which the thread had passed
};

using Site = std::pair<const char*, int>;  // file and line

struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t context;
  jmp_buf resume;
  bool started = false;        // it waits in `resume` for the next block
  const char* file = nullptr;  // of the barrier
  int line = 0;                // of the barrier or the shuffle
  bool arrived = false;        // at the cluster's barrier, where others are missing yet
  int passed = 0, waited = 0;  // cluster barriers
  int barriers = 0;            // of the block, passed
  Site arrived_at;
  const unsigned* word = nullptr;  // that it waits for, to be `bits`, or to be something else
  unsigned bits = 0;
  bool something_else = false;
  bool depends = false;  // it has waited for the kernels before
  std::vector<Pending> pending;
  std::vector<Copy> copies;                 // begun, and in no group yet
  std::deque<std::vector<Copy>> in_flight;  // groups
  uint64_t slot[2] = {0, 0};  // values left for other lanes, alternating: a fast lane cannot overwrite what is read
  unsigned num_shuffles = 0;
};

// A word on its way to where other blocks look at it.
struct Posted {
  unsigned char* to;
  std::vector<unsigned char> value;
};

struct Range {
  uintptr_t begin, end;
  std::vector<bool> stored;  // for outputs: one flag per byte
  // For inputs that are not huge, of each 16 bytes: the last block that has loaded them, counted from 1.
  std::vector<unsigned> loaded;
};

// When a thread of a block has touched a word of shared memory: how many barriers it had passed, and clusters' barriers
// had arrived at.
struct Touch {
  int fiber = -1, barriers = 0, arrived = 0;
};

// Of 4 bytes of shared memory. Of two reads the later one stands for both, unless the threads differ.
struct Word {
  Touch written, read, read_by_another;
};

struct Machine {
  Session session;
  std::mt19937_64 random;
  std::deque<Fiber> fibers;   // of all blocks of a cluster, or of a cooperative launch
  std::vector<State> states;  // of each fiber; set_state changes them
  // The order in which fibers are preferred, where each of them is in it, and one bit for each place: whether it is
  // ready.
  std::vector<unsigned> order, position;
  std::vector<uint64_t> ready;
  std::vector<unsigned> at_barrier, done;  // of each block, so many fibers
  std::vector<unsigned> at_word;           // fibers
  std::vector<Posted> posted;              // and not there yet
  unsigned num_ready = 0, num_done = 0, num_arrived = 0;
  jmp_buf scheduler;
  // cluster: blocks that run at the same time, also in a cooperative launch.
  unsigned fiber = 0, first_block = 0, num_threads = 0, cluster = 1, num_blocks = 0;
  const std::function<void()>* kernel = nullptr;
  bool cooperative = false, overlaps = false;
  std::vector<std::vector<unsigned char>> shared;  // one for each block of a cluster
  std::vector<std::vector<Word>> words;            // the same, in words
  std::vector<Range> loads, stores, others, left;
  unsigned grid_words[2] = {0, 0};
  int64_t bytes_loaded = 0, bytes_stored = 0, bytes_kept = 0, bytes_stored_meanwhile = 0;
  int64_t num_asked = 0, num_asked_late = 0;
  std::set<std::pair<uintptr_t, unsigned>> asked;  // where, and by which block, and not loaded since
  Late late;
  Instructions instructions;
  int launches = 0;
  std::string error;
  std::map<Site, bool> skipped;  // those that have been reached in this session
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

void set_state(unsigned fiber, State state) {
  m.states[fiber] = state;
  const uint64_t bit = uint64_t{1} << m.position[fiber] % 64;
  uint64_t& word = m.ready[m.position[fiber] / 64];
  m.num_ready -= (word & bit) != 0;
  word = state == State::kReady ? word | bit : word & ~bit;
  m.num_ready += state == State::kReady;
}

// Back to the scheduler until it picks this fiber again.
void yield() {
  if (_setjmp(current().resume) == 0) _longjmp(m.scheduler, 1);
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
    set_state(m.fiber, State::kDone);
    m.num_done += 1;
    m.done[rank()] += 1;
    yield();
  }
}

std::string place(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
}

// Notes that a barrier has been reached; true if it is to be passed over.
bool skipped(const char* file, int line) {
  const auto [site, is_new] = m.skipped.emplace(Site(file, line), false);
  if (is_new) {
    const std::string name = place(file, line);
    if (std::find(m.barriers.begin(), m.barriers.end(), name) == m.barriers.end()) m.barriers.push_back(name);
    site->second = (" " + m.session.skipped_barriers + " ").find(" " + name + " ") != std::string::npos;
  }
  return site->second;
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
  for (unsigned i = first; i < first + kWarp; ++i) set_state(i, State::kReady);
}

void release_block(unsigned first) {
  Fiber& leader = m.fibers[first];
  if (m.at_barrier[first / m.num_threads] < m.num_threads) return;
  m.at_barrier[first / m.num_threads] = 0;
  for (unsigned i = first; i < first + m.num_threads; ++i) {
    if (m.fibers[i].line != leader.line || m.fibers[i].file != leader.file) fail("threads are at different barriers");
    set_state(i, State::kReady);
  }
}

// When all threads have arrived, those that wait go on; the others need not wait when they come to it.
void release_cluster() {
  if (m.num_arrived < num_fibers()) return;
  m.num_arrived = 0;
  for (unsigned i = 0; i < num_fibers(); ++i) {
    Fiber& fiber = m.fibers[i];
    if (fiber.arrived_at != m.fibers[0].arrived_at) fail("threads are at different cluster barriers");
    fiber.arrived = false;
    if (m.states[i] == State::kAtClusterBarrier) set_state(i, State::kReady);
  }
  for (unsigned i = 0; i < num_fibers(); ++i) m.fibers[i].passed += 1;
}

bool has_ended(unsigned rank) { return m.done[rank] == m.num_threads; }

// A random order of groups of so many fibers.
void draw_order(unsigned together) {
  std::vector<unsigned> groups(num_fibers() / together);
  for (unsigned i = 0; i < groups.size(); ++i) groups[i] = i;
  std::shuffle(groups.begin(), groups.end(), m.random);
  for (unsigned i = 0; i < num_fibers(); ++i) {
    m.order[i] = groups[i / together] * together + i % together;
    m.position[m.order[i]] = i;
  }
  for (unsigned i = 0; i < num_fibers(); ++i) set_state(i, m.states[i]);
}

// The fiber that so many ready ones are preferred to.
unsigned find_ready(unsigned others) {
  for (unsigned i = 0;; ++i) {
    uint64_t word = m.ready[i];
    const auto count = static_cast<unsigned>(__builtin_popcountll(word));
    if (others >= count) {
      others -= count;
      continue;
    }
    for (; others > 0; --others) word &= word - 1;
    return m.order[64 * i + static_cast<unsigned>(__builtin_ctzll(word))];
  }
}

// Four kinds of schedule. Uniformly random order rarely lets one warp run far ahead of another, and that is what shows
// some missing barriers; so others prefer threads, warps or blocks, in a random order that is drawn anew now and then.
unsigned preferred_together() {
  const unsigned kinds[] = {0, 1, kWarp, m.num_threads};
  return kinds[m.session.seed % 4];
}

unsigned pick() {
  const unsigned together = preferred_together();
  if (together == 0) return find_ready(static_cast<unsigned>(m.random() % m.num_ready));
  if (m.random() % (8 * num_fibers()) == 0) draw_order(together);
  return find_ready(0);
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

// What this thread has stored, and what others had when they met it at a barrier of the block.
void release_stores() {
  for (unsigned i = rank() * m.num_threads; i < (rank() + 1) * m.num_threads; ++i) {
    std::vector<Pending> kept;
    for (Pending& store : m.fibers[i].pending) {
      if (i != m.fiber && store.barriers >= current().barriers) {
        kept.push_back(std::move(store));
      } else {
        std::memcpy(store.to, store.value.data(), store.value.size());
      }
    }
    m.fibers[i].pending = std::move(kept);
  }
}

bool has_come(unsigned i) {
  const Fiber& fiber = m.fibers[i];
  return m.states[i] == State::kAtWord && (*fiber.word == fiber.bits) != fiber.something_else;
}

// Of the words on their way, one in so many arrives: in any order, but for those to one place.
void deliver(unsigned delay) {
  std::vector<Posted> kept;
  for (Posted& word : m.posted) {
    auto is_before = [&](const Posted& other) { return other.to == word.to; };
    if (m.random() % delay > 0 || std::any_of(kept.begin(), kept.end(), is_before)) {
      kept.push_back(std::move(word));
    } else {
      std::memcpy(word.to, word.value.data(), word.value.size());
    }
  }
  m.posted = std::move(kept);
}

// Until a word of global memory is `bits`, or is not.
void await_word(const unsigned* word, unsigned bits, bool something_else, const char* file, int line) {
  Fiber& fiber = current();
  set_state(m.fiber, State::kAtWord);
  m.at_word.push_back(m.fiber);
  fiber.word = word;
  fiber.bits = bits;
  fiber.something_else = something_else;
  fiber.file = file;
  fiber.line = line;
  yield();
}

void run_cluster(unsigned first_block) {
  m.first_block = first_block;
  for (auto& memory : m.shared) std::fill(memory.begin(), memory.end() - kGuardBytes, kPoison);
  for (auto& words : m.words) std::fill(words.begin(), words.end(), Word{});
  for (unsigned i = 0; i < num_fibers(); ++i) {
    Fiber& fiber = m.fibers[i];
    m.states[i] = State::kReady;
    fiber.num_shuffles = 0;
    fiber.arrived = false;
    fiber.passed = fiber.waited = fiber.barriers = 0;
    fiber.depends = !m.overlaps;
    fiber.pending.clear();
    fiber.copies.clear();
    fiber.in_flight.clear();
  }
  m.num_done = m.num_arrived = 0;
  m.at_barrier.assign(m.cluster, 0);
  m.done.assign(m.cluster, 0);
  m.at_word.clear();
  draw_order(std::max(preferred_together(), 1u));
  m.posted.clear();
  const unsigned delay = 1u << 2 * (m.random() % 4);  // of words that are posted
  for (;;) {
    deliver(delay);
    if (m.num_ready == 0 && std::none_of(m.at_word.begin(), m.at_word.end(), [](unsigned i) { return has_come(i); })) {
      deliver(1);
    }
    for (unsigned i : m.at_word) {
      if (has_come(i)) set_state(i, State::kReady);
    }
    m.at_word.erase(
        std::remove_if(m.at_word.begin(), m.at_word.end(), [](unsigned i) { return m.states[i] != State::kAtWord; }),
        m.at_word.end());
    if (m.num_done == num_fibers()) break;
    if (m.num_ready == 0) return report_deadlock();
    // Runs until it waits or ends. Those that wait for others are looked at again when the others arrive.
    m.fiber = pick();
    Fiber& fiber = current();
    const int from = _setjmp(m.scheduler);
    if (from == 2) return;
    if (from == 1) continue;
    if (fiber.started) _longjmp(fiber.resume, 1);
    start_fiber(fiber);
  }
  for (unsigned i = 0; i < num_fibers(); ++i) {
    for (const Pending& store : m.fibers[i].pending) std::memcpy(store.to, store.value.data(), store.value.size());
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

// Whether barriers keep the current thread's next access apart from one before.
bool ordered(const Touch& before) {
  const unsigned other = static_cast<unsigned>(before.fiber);
  if (before.fiber < 0 || other == m.fiber) return true;
  if (other / m.num_threads == rank() && before.barriers < current().barriers) return true;
  return before.arrived < current().waited;
}

}  // namespace

// The fibers are left where they are and start anew in the next launch.
void fail(const std::string& what) {
  if (m.error.empty()) m.error = what + where();
  _longjmp(m.scheduler, 2);
}

namespace {

void check_aligned(const char* what, uintptr_t begin, size_t bytes) {
  if (begin % bytes != 0) fail(std::string(what) + " of " + std::to_string(bytes) + " bytes is misaligned");
}

}  // namespace

Index thread_index() { return {thread()}; }
Index block_index() { return {m.first_block + rank()}; }
Index block_size() { return {m.num_threads}; }
Index grid_size() { return {m.num_blocks}; }

unsigned char* shared_memory() { return m.shared[rank()].data(); }

void barrier(const char* file, int line) {
  if (skipped(file, line)) return;
  set_state(m.fiber, State::kAtBarrier);
  current().file = file;
  current().line = line;
  m.at_barrier[rank()] += 1;
  release_block(rank() * m.num_threads);
  yield();
  current().barriers += 1;
}

void cluster_arrive(const char* file, int line) {
  if (skipped(file, line)) return;
  Fiber& fiber = current();
  if (fiber.arrived || fiber.passed != fiber.waited) fail("a thread arrives twice at the cluster's barrier");
  fiber.arrived = true;
  m.num_arrived += 1;
  fiber.arrived_at = {file, line};
  release_cluster();
}

void cluster_wait(const char* file, int line) {
  if (skipped(file, line)) return;
  Fiber& fiber = current();
  if (!fiber.arrived && fiber.passed == fiber.waited) fail("a thread waits at the cluster's barrier without arriving");
  fiber.waited += 1;
  if (fiber.passed >= fiber.waited) return;
  set_state(m.fiber, State::kAtClusterBarrier);
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
  release_stores();
  *word += amount;
  yield();
}

// On its way from now on. Others may run at once.
void post(void* to, const void* from, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(from);
  m.posted.push_back({static_cast<unsigned char*>(to), {first, first + bytes}});
  yield();
}

void await(const unsigned* word, unsigned bits, const char* file, int line) {
  if (!skipped(file, line)) await_word(word, bits, false, file, line);
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

void ask_l2(const void* from) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  const Range* range = find(m.loads, begin, begin + 1);
  if (range == nullptr) fail("the cache is asked for what lies outside the tensors");
  if (!range->loaded.empty() && range->loaded[(begin - range->begin) / 16] == block_index().x + 1) ++m.num_asked_late;
  ++m.num_asked;
  m.asked.insert({begin, block_index().x});
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
  set_state(m.fiber, State::kAtShuffle);
  fiber.line = line;
  const unsigned self = m.fiber;
  release_warp(self / kWarp * kWarp);
  yield();
  return m.fibers[self / kWarp * kWarp + from % kWarp].slot[turn];
}

const void* check_load(const void* from, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  check_aligned("a load", begin, bytes);
  Range* range = find(m.loads, begin, begin + bytes);
  if (range == nullptr) fail("a load outside the tensors");
  if (!range->loaded.empty()) range->loaded[(begin - range->begin) / 16] = block_index().x + 1;
  m.bytes_loaded += bytes;
  if (!m.asked.empty()) m.asked.erase({begin, block_index().x});
  return from;
}

void* check_store(void* to, size_t bytes) {
  check_dependency();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  check_aligned("a store", begin, bytes);
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

const void* load_anywhere(const void* from, size_t bytes, bool from_l2) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (find(m.left, begin, begin + bytes) != nullptr) {
    check_dependency();
    if (!from_l2) fail("a load that L1 may answer with what was there before");
    for (const Pending& store : current().pending) {
      if (store.to < static_cast<const unsigned char*>(from) + bytes && from < store.to + store.value.size())
        fail("a load of what this thread has not released");
    }
  } else if (find(m.others, begin, begin + bytes) == nullptr) {
    return check_load(from, bytes);
  }
  check_aligned("a load", begin, bytes);
  return from;
}

void store_anywhere(void* to, const void* value, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  const bool left = find(m.left, begin, begin + bytes) != nullptr;
  if (!left && find(m.others, begin, begin + bytes) == nullptr) {
    std::memcpy(check_store(to, bytes), value, bytes);
    return;
  }
  check_dependency();
  check_aligned("a store", begin, bytes);
  if (!left) {
    std::memcpy(to, value, bytes);
    return;
  }
  const auto* first = static_cast<const unsigned char*>(value);
  current().pending.push_back({static_cast<unsigned char*>(to), {first, first + bytes}, current().barriers});
}

void post_anywhere(void* to, const void* value, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  if (find(m.left, begin, begin + bytes) == nullptr) fail("a letter outside the workspace");
  check_dependency();
  check_aligned("a store", begin, bytes);
  post(to, value, bytes);
}

unsigned char* touch_shared(uint64_t offset, size_t bytes, bool stores, int other, const void* value) {
  const unsigned block = other < 0 ? rank() : static_cast<unsigned>(other);
  if (block >= m.cluster || (m.cooperative && other >= 0)) fail("a load from a block that is not in the cluster");
  if (offset + bytes > m.shared[block].size() - kGuardBytes) fail("an access outside the block's shared memory");
  check_aligned("an access", offset, bytes);
  if (has_ended(block)) fail("a load from a block that has ended");
  const Touch now = {static_cast<int>(m.fiber), current().barriers, current().passed + current().arrived};
  // Several threads may store what they all have.
  const bool same = value != nullptr && std::memcmp(m.shared[block].data() + offset, value, bytes) == 0;
  for (uint64_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) {
    Word& word = m.words[block][i];
    const bool clear =
        (same || ordered(word.written)) && (!stores || (ordered(word.read) && ordered(word.read_by_another)));
    if (!clear) fail("two threads race for byte " + std::to_string(4 * i) + " of shared memory");
    if (stores) {
      word = {now, {}, {}};
    } else {
      if (word.read.fiber != now.fiber) word.read_by_another = word.read;
      word.read = now;
    }
  }
  return m.shared[block].data() + offset;
}

void await_change(const unsigned* word, unsigned seen, const char* file, int line) {
  await_word(word, seen, true, file, line);
}

void count_instructions(int64_t count) {
  m.instructions.all += count;
  m.instructions.most = std::max(m.instructions.most, count);
}

unsigned* grid_memory() { return m.cooperative ? m.grid_words : nullptr; }

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
  m.states.assign(num_fibers(), State::kDone);
  m.order.resize(num_fibers());
  m.position.resize(num_fibers());
  m.ready.assign((num_fibers() + 63) / 64, 0);
  m.num_ready = 0;
  m.shared.assign(m.cluster, std::vector<unsigned char>(shared_bytes + kGuardBytes, kGuard));
  m.words.assign(has_ptx() ? m.cluster : 0, std::vector<Word>((shared_bytes + 3) / 4));
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
  for (auto* ranges : {&m.loads, &m.stores, &m.others, &m.left}) ranges->clear();
  allow_any(m.grid_words, sizeof m.grid_words);
  m.grid_words[1] = 0;
  m.bytes_loaded = m.bytes_stored = m.bytes_kept = m.bytes_stored_meanwhile = 0;
  m.num_asked = m.num_asked_late = 0;
  m.asked.clear();
  m.late = {};
  m.instructions = {};
  m.launches = 0;
  m.skipped.clear();
  m.error.clear();
}

// Packs are read whole: an allocation on a GPU consists of aligned groups of 16 bytes, and more.
void allow_load(const void* data, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = begin / 16 * 16, end = (begin + bytes + 15) / 16 * 16;
  constexpr uintptr_t kHuge = uintptr_t{1} << 26;
  m.loads.push_back({first, end, {}, std::vector<unsigned>(end - first < kHuge ? (end - first) / 16 : 0)});
}

void allow_store(const void* data, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  m.stores.push_back({begin, begin + bytes, std::vector<bool>(bytes), {}});
}

void allow_any(const void* data, size_t bytes, bool left) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  (left ? m.left : m.others).push_back({begin, begin + bytes, {}, {}});
}

const std::string& error() { return m.error; }
int64_t bytes_loaded() { return m.bytes_loaded; }
int64_t bytes_stored() { return m.bytes_stored; }
int64_t bytes_kept() { return m.bytes_kept; }
int64_t bytes_stored_meanwhile() { return m.bytes_stored_meanwhile; }
int64_t num_asked() { return m.num_asked; }
int64_t num_asked_late() { return m.num_asked_late; }
int64_t num_asked_in_vain() { return static_cast<int64_t>(m.asked.size()); }
Late late() { return m.late; }
Instructions instructions() { return m.instructions; }
const std::vector<std::string>& barriers() { return m.barriers; }

}  // namespace simt

cudaError_t cudaGetLastError() { return simt::error().empty() ? cudaSuccess : cudaErrorLaunchFailure; }
