#include "ptx.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/half.h"
#include "simt.h"

namespace simt {
namespace {

struct Thread;
struct Instruction;
using Execute = void (*)(Thread&, const Instruction&);

enum class Space : uint8_t { kParam, kAny, kShared, kCluster };

// Some places in a thread's file of registers: no instruction here has more.
class Places {
 public:
  void push_back(int place) {
    if (count_ == kMost) throw std::runtime_error("knows instructions of " + std::to_string(kMost) + " operands only");
    places_[count_++] = place;
  }
  int operator[](size_t i) const { return places_[i]; }
  size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }

 private:
  static constexpr size_t kMost = 5;
  int places_[kMost] = {};
  size_t count_ = 0;
};

// Constants have places there as well.
struct Instruction {
  Execute execute = nullptr;
  int line = 0;
  int predicate = -1;
  bool negated = false;
  Places to, from;
  // of loads and stores
  Space space = Space::kAny;
  bool from_l2 = false;
  int64_t offset = 0;
  int target = 0;     // of branches
  int operation = 0;  // its name is operations[operation]
};

constexpr int kEnd = -1;                 // where to go on from the last instruction
constexpr int64_t kMostSteps = 1 << 25;  // of a thread

struct Kernel {
  std::string name;
  size_t param_bytes = 0;
  std::vector<uint64_t> registers;  // what they begin as
  std::vector<Instruction> code;
};

struct Module {
  int arch = 0;
  std::map<std::string, Kernel> kernels;
  std::map<const void*, const Kernel*> by_function;  // those that have run since it is in use
};

// What instructions are called, and how often threads have executed each since a file is in use.
struct Operation {
  std::string name;
  int64_t count;
};
std::vector<Operation> operations;

int find_operation(const std::string& name) {
  static std::map<std::string, int> numbers;
  const auto [found, is_new] = numbers.emplace(name, static_cast<int>(operations.size()));
  if (is_new) operations.push_back({name, 0});
  return found->second;
}

std::map<int, Module> modules;
int last_module = 0;
Module* module = nullptr;  // in use

struct Thread {
  const Kernel& kernel;
  const unsigned char* args;
  std::vector<uint64_t> registers;
  int next = 0;
  int64_t clock = 0, first_clock = -1, last_clock = -1;  // of an SM, and when this thread has looked at it
  std::map<const uint32_t*, uint32_t> seen = {};         // words that others may change, when it looked last
  std::map<int, std::array<uint64_t, 2>> wide = {};      // registers of 16 bytes
  bool unfenced = false;                                 // it has stored to shared memory since the last fence
  std::vector<int> rounds = {};  // while banks are watched: how often it has been at each instruction

  template <typename T>
  T get(int place) const {
    if constexpr (std::is_same_v<T, bool>) return (registers[place] & 1) != 0;  // PTX writes true as -1
    T value;
    std::memcpy(&value, &registers[place], sizeof value);
    return value;
  }
  // Narrow numbers are extended, as loads promise.
  template <typename T>
  void set(int place, T value) {
    uint64_t bits = 0;
    if constexpr (std::is_integral_v<T>) {
      bits = static_cast<uint64_t>(static_cast<int64_t>(value));
      if constexpr (std::is_unsigned_v<T>) bits = value;
    } else {
      std::memcpy(&bits, &value, sizeof value);
    }
    registers[place] = bits;
  }
  const char* file() const { return kernel.name.c_str(); }
};

// Registers that every kernel has.
enum Special { kThreadIndex, kBlockIndex, kBlockSize, kGridSize, kZero, kOne, kArgs, kNumSpecial };

// ---- banks of shared memory --------------------------------------------------------------------------------------

bool watches_banks = false;
// What the lanes of a warp ask for at once: by kernel, block and warp, instruction, and how often before.
std::map<std::tuple<const Kernel*, int, int, int>, std::vector<BankAccess>> bank_accesses;

void note_access(Thread& t, const Instruction& i, uint64_t at, size_t bytes) {
  if (!watches_banks) return;
  t.rounds.resize(t.kernel.code.size());
  const auto thread = static_cast<int>(thread_index().x), instruction = static_cast<int>(&i - t.kernel.code.data());
  const int warp = static_cast<int>(block_index().x) * (1024 / 32) + thread / 32;
  bank_accesses[{&t.kernel, warp, instruction, t.rounds[instruction]++}].push_back(
      {thread % 32, at, static_cast<int>(bytes)});
}

// ---- memory ------------------------------------------------------------------------------------------------------

// Shared memory begins somewhere in its window, and not where a null pointer would be.
constexpr uint64_t kSharedBegin = 1024;
constexpr int kRankShift = 24;  // of an address in the shared memory of a cluster

const unsigned char* readable(Thread& t, const Instruction& i, size_t bytes) {
  const uint64_t address = t.registers[i.from[0]] + static_cast<uint64_t>(i.offset);
  const auto* pointer = reinterpret_cast<const unsigned char*>(address);
  const auto rank = static_cast<unsigned>((address & 0xffffffff) >> kRankShift);
  const uint64_t offset = (address & ((1 << kRankShift) - 1)) - kSharedBegin;
  switch (i.space) {
    case Space::kParam:
      if (pointer < t.args || pointer + bytes > t.args + t.kernel.param_bytes) fail("a load outside the arguments");
      return pointer;
    case Space::kAny:
      return static_cast<const unsigned char*>(load_anywhere(pointer, bytes, i.from_l2));
    case Space::kShared:
      note_access(t, i, address, bytes);
      return static_cast<const unsigned char*>(touch_shared(address - kSharedBegin, bytes, false));
    case Space::kCluster:
      return static_cast<const unsigned char*>(touch_shared(offset, bytes, false, static_cast<int>(rank)));
  }
  return nullptr;
}

template <typename T>
void load(Thread& t, const Instruction& i) {
  const unsigned char* from = readable(t, i, sizeof(T) * i.to.size());
  for (size_t k = 0; k < i.to.size(); ++k) {
    T value;
    std::memcpy(&value, from + k * sizeof value, sizeof value);
    t.set(i.to[k], value);
  }
}

template <typename T>
void store(Thread& t, const Instruction& i) {
  T values[4];
  const size_t count = i.from.size() - 1, bytes = count * sizeof(T);
  for (size_t k = 0; k < count; ++k) values[k] = t.get<T>(i.from[k + 1]);
  const uint64_t address = t.registers[i.from[0]] + static_cast<uint64_t>(i.offset);
  if (i.space == Space::kAny) {
    store_anywhere(reinterpret_cast<void*>(address), values, bytes);
  } else if (i.space == Space::kShared) {
    note_access(t, i, address, bytes);
    std::memcpy(touch_shared(address - kSharedBegin, bytes, true, -1, values), values, bytes);
    t.unfenced = true;
  } else {
    fail("a store to memory that kernels do not store to");
  }
}

// Who looks at a word and sees again what was there waits for another block.
void await_another(Thread& t, const Instruction& i, const uint32_t* word) {
  const auto [seen, is_new] = t.seen.emplace(word, *word);
  if (!is_new && *word == seen->second) await_change(word, seen->second, t.file(), i.line);
  seen->second = *word;
}

void load_acquire(Thread& t, const Instruction& i) {
  const auto* word = reinterpret_cast<const uint32_t*>(readable(t, i, sizeof(uint32_t)));
  await_another(t, i, word);
  t.set(i.to[0], *word);
}

void add_release(Thread& t, const Instruction& i) {
  const auto* word = reinterpret_cast<const uint32_t*>(readable(t, i, sizeof(uint32_t)));
  const uint32_t before = *word;
  if (!i.to.empty()) t.set(i.to[0], before);
  arrive_at(const_cast<uint32_t*>(word), t.get<uint32_t>(i.from[1]), t.file(), i.line);
}

// Words of 16 bytes that are stored and loaded as a whole, with a stamp at their end. They have registers of their own.
constexpr int kWideBytes = 16;

void load_wide(Thread& t, const Instruction& i) {
  const unsigned char* from = readable(t, i, kWideBytes);
  const auto* stamp = reinterpret_cast<const uint32_t*>(from + kWideBytes - sizeof(uint32_t));
  await_another(t, i, stamp);
  std::memcpy(&t.wide[i.to[0]], from, kWideBytes);
}

void store_wide(Thread& t, const Instruction& i) {
  const uint64_t address = t.registers[i.from[0]] + static_cast<uint64_t>(i.offset);
  post_anywhere(reinterpret_cast<void*>(address), &t.wide[i.from[1]], kWideBytes);
}

// {lower, upper} = wide, or the other way round.
void move_wide(Thread& t, const Instruction& i) {
  if (i.to.size() == 2) {
    for (size_t k = 0; k < 2; ++k) t.registers[i.to[k]] = t.wide[i.from[0]][k];
  } else {
    t.wide[i.to[0]] = {t.registers[i.from[0]], t.registers[i.from[1]]};
  }
}

void add_anywhere(Thread& t, const Instruction& i) {
  uint64_t number;
  std::memcpy(&number, readable(t, i, sizeof number), sizeof number);
  number += t.registers[i.from[1]];
  store_anywhere(reinterpret_cast<void*>(t.registers[i.from[0]] + static_cast<uint64_t>(i.offset)), &number,
                 sizeof number);
}

// The policies, as their registers have them.
constexpr uint64_t kEvictNormal = 1, kEvictFirst = 2;

void begin_copy(Thread& t, const Instruction& i) {
  constexpr int kBytes = 16;
  const uint64_t to = t.registers[i.from[0]], from = t.registers[i.from[1]], policy = t.registers[i.from[3]];
  if (t.registers[i.from[2]] != kBytes) fail("an asynchronous copy of another size");
  if (policy != kEvictNormal && policy != kEvictFirst) fail("an asynchronous copy without a policy");
  void* place = touch_shared(to - kSharedBegin, kBytes, true);
  copy_async(place, check_load(reinterpret_cast<const void*>(from), kBytes), kBytes, policy == kEvictNormal);
}

void prefetch(Thread& t, const Instruction& i) { ask_l2(reinterpret_cast<const void*>(t.registers[i.from[0]])); }

// ---- arithmetic --------------------------------------------------------------------------------------------------

// The second with so many bits of the first, from one of its own on.
template <typename T>
void insert_bits(Thread& t, const Instruction& i) {
  const auto first = t.get<uint32_t>(i.from[2]), count = t.get<uint32_t>(i.from[3]);
  if (count == 0 || first + count > 8 * sizeof(T)) fail("bits beyond a register");
  const T mask = static_cast<T>(~T{0} >> (8 * sizeof(T) - count)) << first;
  t.set(i.to[0], static_cast<T>((t.get<T>(i.from[0]) << first & mask) | (t.get<T>(i.from[1]) & ~mask)));
}

template <typename To, typename From, To (*kFunction)(From)>
void unary(Thread& t, const Instruction& i) {
  t.set(i.to[0], kFunction(t.get<From>(i.from[0])));
}

template <typename To, typename From>
To convert(From value) {
  return static_cast<To>(value);
}

template <typename T>
T negate(T value) {
  return static_cast<T>(-value);
}
template <typename T>
T absolute(T value) {
  return std::abs(value);
}
template <typename T>
T square_root(T value) {
  return std::sqrt(value);
}
template <typename T>
T reciprocal(T value) {
  return 1 / value;
}
template <typename T>
T reciprocal_root(T value) {
  return 1 / std::sqrt(value);
}
template <typename T>
T complement(T value) {
  return static_cast<T>(~value);
}
template <>
bool complement<bool>(bool value) {
  return !value;
}
uint32_t count_bits(uint32_t value) { return static_cast<uint32_t>(__builtin_popcount(value)); }

// A register of 16 bits that holds a half.
float from_half(uint16_t bits) { return bnext::to_float(bnext::Float16{bits}); }
uint16_t to_half(float value) { return bnext::to_float16(value).bits; }
uint16_t to_bfloat(float value) { return bnext::to_bfloat16(value).bits; }

// The first operand is the upper half.
template <uint16_t (*kNarrow)(float)>
void narrow_pair(Thread& t, const Instruction& i) {
  const uint32_t upper = kNarrow(t.get<float>(i.from[0])), lower = kNarrow(t.get<float>(i.from[1]));
  t.set(i.to[0], upper << 16 | lower);
}

template <typename Function, typename T>
void binary(Thread& t, const Instruction& i) {
  t.set(i.to[0], static_cast<T>(Function()(t.get<T>(i.from[0]), t.get<T>(i.from[1]))));
}

template <typename Function, typename T>
void compare(Thread& t, const Instruction& i) {
  t.set(i.to[0], static_cast<bool>(Function()(t.get<T>(i.from[0]), t.get<T>(i.from[1]))));
}

// Also true if one is NaN.
struct GreaterOrUnordered {
  template <typename T>
  bool operator()(T a, T b) const {
    return !(a <= b);
  }
};

struct Minimum {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Maximum {
  template <typename T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// A shift by the width or more leaves nothing, or the sign.
template <typename T>
void shift_left(Thread& t, const Instruction& i) {
  const uint32_t by = t.get<uint32_t>(i.from[1]);
  t.set(i.to[0], by < 8 * sizeof(T) ? static_cast<T>(t.get<T>(i.from[0]) << by) : T(0));
}
template <typename T>
void shift_right(Thread& t, const Instruction& i) {
  const uint32_t by = std::min<uint32_t>(t.get<uint32_t>(i.from[1]), 8 * sizeof(T) - 1);
  const bool gone = std::is_unsigned_v<T> && t.get<uint32_t>(i.from[1]) >= 8 * sizeof(T);
  t.set(i.to[0], gone ? T(0) : static_cast<T>(t.get<T>(i.from[0]) >> by));
}

template <typename To, typename From>
void multiply_wide(Thread& t, const Instruction& i) {
  t.set(i.to[0], static_cast<To>(t.get<From>(i.from[0])) * static_cast<To>(t.get<From>(i.from[1])));
}

template <typename T>
void multiply_add(Thread& t, const Instruction& i) {
  t.set(i.to[0], static_cast<T>(t.get<T>(i.from[0]) * t.get<T>(i.from[1]) + t.get<T>(i.from[2])));
}
template <typename T>
void fused_multiply_add(Thread& t, const Instruction& i) {
  t.set(i.to[0], std::fma(t.get<T>(i.from[0]), t.get<T>(i.from[1]), t.get<T>(i.from[2])));
}

template <typename T>
void divide(Thread& t, const Instruction& i) {
  if (t.get<T>(i.from[1]) == 0) fail("a division by zero");
  binary<std::divides<>, T>(t, i);
}

template <typename T>
void select(Thread& t, const Instruction& i) {
  t.set(i.to[0], t.get<T>(i.from[t.get<bool>(i.from[2]) ? 0 : 1]));
}

void insert_bits(Thread& t, const Instruction& i) {
  const uint32_t at = t.get<uint32_t>(i.from[2]), count = t.get<uint32_t>(i.from[3]);
  const uint64_t mask = (count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}) << at;
  t.set(i.to[0], (t.registers[i.from[0]] << at & mask) | (t.registers[i.from[1]] & ~mask));
}

// Of registers, of the halves of one, and of two as the halves of one.
template <typename T>
void move(Thread& t, const Instruction& i) {
  const auto half = static_cast<int>(4 * sizeof(T));
  const uint64_t mask = (uint64_t{1} << half) - 1;
  if (i.to.size() == 2) {
    const uint64_t bits = t.registers[i.from[0]];
    t.registers[i.to[0]] = bits & mask;
    t.registers[i.to[1]] = bits >> half & mask;
  } else if (i.from.size() == 2) {
    t.registers[i.to[0]] = t.registers[i.from[1]] << half | (t.registers[i.from[0]] & mask);
  } else {
    t.set(i.to[0], t.get<T>(i.from[0]));
  }
}

// ---- threads among each other ------------------------------------------------------------------------------------

void synchronize(Thread& t, const Instruction& i) { barrier(t.file(), i.line); }

template <bool kXor>
void shuffle(Thread& t, const Instruction& i) {
  if (t.get<uint32_t>(i.from[2]) != 31) fail("a shuffle among part of a warp");
  const uint32_t lane = t.get<uint32_t>(i.from[1]), self = thread_index().x;
  const unsigned from = (kXor ? self ^ lane : lane) % 32;
  t.set(i.to[0], static_cast<uint32_t>(exchange(t.get<uint32_t>(i.from[3]), t.get<uint32_t>(i.from[0]), from, i.line)));
  if (i.to.size() > 1) t.set(i.to[1], true);
}

template <bool kReleases>
void arrive_cluster(Thread& t, const Instruction& i) {
  if (!kReleases && t.unfenced) fail("stores to shared memory before a relaxed arrival are not fenced");
  cluster_arrive(t.file(), i.line);
}
void wait_cluster(Thread& t, const Instruction& i) { cluster_wait(t.file(), i.line); }
void fence_shared(Thread& t, const Instruction&) { t.unfenced = false; }

void map_to_rank(Thread& t, const Instruction& i) {
  t.set(i.to[0], t.get<uint32_t>(i.from[1]) << kRankShift | t.get<uint32_t>(i.from[0]));
}

void commit(Thread&, const Instruction&) { commit_async(); }
void wait_group(Thread& t, const Instruction& i) { wait_async(t.get<int>(i.from[0]), t.file(), i.line); }
void wait_dependency(Thread& t, const Instruction& i) { wait_for_kernels(t.file(), i.line); }

template <uint64_t kPolicy>
void make_policy(Thread& t, const Instruction& i) {
  t.registers[i.to[0]] = kPolicy;
}

// ---- the rest ----------------------------------------------------------------------------------------------------

void nothing(Thread&, const Instruction&) {}
void branch(Thread& t, const Instruction& i) { t.next = i.target; }
void end(Thread& t, const Instruction&) { t.next = kEnd; }
void trap(Thread&, const Instruction&) { fail("a trap"); }

void read_clock(Thread& t, const Instruction& i) {
  if (t.first_clock < 0) t.first_clock = t.clock;
  t.last_clock = t.clock;
  t.set(i.to[0], t.clock);
}
// As if a clock took a nanosecond.
void sleep(Thread& t, const Instruction& i) { t.clock += t.get<uint32_t>(i.from[0]); }

// Where a cooperative launch has put the word of its barrier, half of the address in each.
template <int kHalf>
void read_grid_memory(Thread& t, const Instruction& i) {
  const auto address = reinterpret_cast<uint64_t>(grid_memory());
  t.set(i.to[0], static_cast<uint32_t>(kHalf == 1 ? address >> 32 : address));
}

void to_shared(Thread& t, const Instruction& i) {
  t.registers[i.to[0]] = t.registers[i.from[0]] - reinterpret_cast<uint64_t>(shared_memory()) + kSharedBegin;
}
void from_shared(Thread& t, const Instruction& i) {
  t.registers[i.to[0]] = t.registers[i.from[0]] + reinterpret_cast<uint64_t>(shared_memory()) - kSharedBegin;
}

// ---- from names to functions -------------------------------------------------------------------------------------

using Table = std::map<std::string, Execute>;

template <typename T>
std::vector<std::string> names_of() {
  if (std::is_same_v<T, bool>) return {"pred"};
  const std::string bits = std::to_string(8 * sizeof(T));
  if (std::is_floating_point_v<T>) return {"f" + bits};
  if (std::is_signed_v<T>) return {"s" + bits};
  return {"u" + bits, "b" + bits};
}

// One line for each name that an operation has: `begin`, the type, `rest`.
template <typename T>
void add(Table& table, const std::string& begin, Execute execute, const std::string& rest = "") {
  for (const std::string& name : names_of<T>()) table[begin + "." + name + rest] = execute;
}

template <typename T>
void add_memory(Table& table) {
  for (const char* space : {"", ".global", ".global.cg", ".global.cs", ".shared", ".param", ".shared::cluster"}) {
    for (const char* count : {"", ".v2", ".v4"}) {
      add<T>(table, std::string("ld") + space + count, &load<T>);
      add<T>(table, std::string("st") + space + count, &store<T>);
    }
  }
}

template <typename T>
void add_comparisons(Table& table) {
  add<T>(table, "setp.eq", &compare<std::equal_to<>, T>);
  add<T>(table, "setp.lt", &compare<std::less<>, T>);
  add<T>(table, "setp.le", &compare<std::less_equal<>, T>);
  add<T>(table, "setp.gt", &compare<std::greater<>, T>);
  add<T>(table, "setp.ge", &compare<std::greater_equal<>, T>);
}

// Wrapping: of the same bits, with an overflow that is defined.
template <typename T, typename Wrapping = T>
void add_numbers(Table& table) {
  add_comparisons<T>(table);
  add<T>(table, "mov", &move<T>);
  add<T>(table, "selp", &select<T>);
  add<T>(table, "add", &binary<std::plus<>, Wrapping>);
  add<T>(table, "sub", &binary<std::minus<>, Wrapping>);
  add<T>(table, "neg", &unary<Wrapping, Wrapping, &negate<Wrapping>>);
}

template <typename T>
void add_integer(Table& table) {
  using U = std::make_unsigned_t<T>;
  add_numbers<T, U>(table);
  add<T>(table, "setp.ne", &compare<std::not_equal_to<>, T>);
  add<T>(table, "mul.lo", &binary<std::multiplies<>, U>);
  add<T>(table, "mad.lo", &multiply_add<U>);
  add<T>(table, "div", &divide<T>);
  add<T>(table, "min", &binary<Minimum, T>);
  add<T>(table, "max", &binary<Maximum, T>);
  add<T>(table, "shl", &shift_left<U>);
  add<T>(table, "shr", &shift_right<T>);
}

template <typename T>
void add_bits(Table& table) {
  add<T>(table, "and", &binary<std::bit_and<>, T>);
  add<T>(table, "or", &binary<std::bit_or<>, T>);
  add<T>(table, "xor", &binary<std::bit_xor<>, T>);
  add<T>(table, "not", &unary<T, T, &complement<T>>);
}

template <typename T>
void add_float(Table& table) {
  add_numbers<T>(table);
  add<T>(table, "setp.neu", &compare<std::not_equal_to<>, T>);
  add<T>(table, "setp.gtu", &compare<GreaterOrUnordered, T>);
  add<T>(table, "mul", &binary<std::multiplies<>, T>);
  add<T>(table, "fma.rn", &fused_multiply_add<T>);
  add<T>(table, "abs", &unary<T, T, &absolute<T>>);
  add<T>(table, "sqrt.rn", &unary<T, T, &square_root<T>>);
  add<T>(table, "rcp.rn", &unary<T, T, &reciprocal<T>>);
  add<T>(table, "rsqrt.approx", &unary<T, T, &reciprocal_root<T>>);
}

template <typename To, typename From>
void add_conversion(Table& table, const std::string& rounding = "") {
  for (const std::string& from : names_of<From>()) {
    add<To>(table, "cvt" + rounding, &unary<To, From, &convert<To, From>>, "." + from);
  }
}

Table make_table() {
  Table table;
  add_memory<uint8_t>(table), add_memory<uint16_t>(table), add_memory<uint32_t>(table), add_memory<uint64_t>(table);
  add_memory<int8_t>(table), add_memory<int16_t>(table), add_memory<int32_t>(table), add_memory<int64_t>(table);
  add_memory<float>(table), add_memory<double>(table);
  add_integer<uint16_t>(table), add_integer<uint32_t>(table), add_integer<uint64_t>(table);
  add_integer<int16_t>(table), add_integer<int32_t>(table), add_integer<int64_t>(table);
  add_bits<uint16_t>(table), add_bits<uint32_t>(table), add_bits<uint64_t>(table), add_bits<bool>(table);
  add_float<float>(table), add_float<double>(table);
  add_conversion<uint32_t, uint64_t>(table), add_conversion<uint64_t, uint32_t>(table);
  add_conversion<int64_t, int32_t>(table), add_conversion<uint32_t, uint16_t>(table);
  add_conversion<uint16_t, uint32_t>(table), add_conversion<double, float>(table);
  add_conversion<float, double>(table, ".rn"), add_conversion<float, int32_t>(table, ".rn");
  add_conversion<double, int32_t>(table, ".rn"), add_conversion<double, int64_t>(table, ".rn");
  table["mov.pred"] = &move<bool>;
  table["mul.wide.u32"] = &multiply_wide<uint64_t, uint32_t>;
  table["mul.wide.s32"] = &multiply_wide<int64_t, int32_t>;
  table["popc.b32"] = &unary<uint32_t, uint32_t, &count_bits>;
  table["bfi.b64"] = &insert_bits;
  table["cvt.f32.f16"] = &unary<float, uint16_t, &from_half>;
  table["cvt.rn.f16.f32"] = &unary<uint16_t, float, &to_half>;
  table["cvt.rn.bf16.f32"] = &unary<uint16_t, float, &to_bfloat>;
  table["cvt.rn.f16x2.f32"] = &narrow_pair<&to_half>;
  table["cvt.rn.bf16x2.f32"] = &narrow_pair<&to_bfloat>;

  table["ld.acquire.gpu.u32"] = &load_acquire;
  table["atom.add.release.gpu.u32"] = &add_release;
  table["ld.relaxed.gpu.global.b128"] = &load_wide;
  table["st.relaxed.gpu.global.b128"] = &store_wide;
  table["mov.b128"] = &move_wide;
  table["red.global.add.u64"] = &add_anywhere;
  table["cp.async.cg.shared.global.L2::cache_hint"] = &begin_copy;
  table["cp.async.commit_group"] = &commit;
  table["prefetch.global.L2"] = &prefetch;
  table["cp.async.wait_group"] = &wait_group;
  table["createpolicy.fractional.L2::evict_normal.b64"] = &make_policy<kEvictNormal>;
  table["createpolicy.fractional.L2::evict_first.b64"] = &make_policy<kEvictFirst>;
  table["cvta.to.global.u64"] = &move<uint64_t>;
  table["cvta.to.shared.u64"] = &to_shared;
  table["cvta.shared.u64"] = &from_shared;
  table["mapa.shared::cluster.u32"] = &map_to_rank;

  table["bar.sync"] = table["barrier.sync"] = &synchronize;
  table["shfl.sync.bfly.b32"] = &shuffle<true>;
  table["shfl.sync.idx.b32"] = &shuffle<false>;
  table["barrier.cluster.arrive.relaxed"] = &arrive_cluster<false>;
  table["barrier.cluster.arrive.release"] = &arrive_cluster<true>;
  table["barrier.cluster.wait.acquire"] = &wait_cluster;
  table["fence.release.sync_restrict::shared::cta.cluster"] = &fence_shared;
  table["griddepcontrol.wait"] = &wait_dependency;
  table["griddepcontrol.launch_dependents"] = &nothing;

  table["bra"] = table["bra.uni"] = &branch;
  table["bfi.b32"] = &insert_bits<uint32_t>;
  table["bfi.b64"] = &insert_bits<uint64_t>;
  table["ret"] = &end;
  table["trap"] = &trap;
  table["nanosleep.u32"] = &sleep;
  return table;
}

// What looks like a register and is different at each look.
const std::map<std::string, Execute> kReadings = {
    {"%clock64", &read_clock}, {"%envreg1", &read_grid_memory<1>}, {"%envreg2", &read_grid_memory<2>}};
const std::map<std::string, int> kSpecials = {
    {"%tid.x", kThreadIndex}, {"%ctaid.x", kBlockIndex}, {"%ntid.x", kBlockSize}, {"%nctaid.x", kGridSize},
    {"%tid.y", kZero},        {"%tid.z", kZero},         {"%ctaid.y", kZero},     {"%ctaid.z", kZero},
    {"%nctaid.y", kOne},      {"%nctaid.z", kOne}};

// ---- reading -----------------------------------------------------------------------------------------------------

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\n"), last = text.find_last_not_of(" \t\n");
  return begin == std::string::npos ? "" : text.substr(begin, last - begin + 1);
}

// What commas separate, outside braces.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{') - (c == '}');
    // A shuffle names two results: value|predicate.
    if (depth == 0 && (c == ',' || c == '|')) {
      parts.push_back(trimmed(part) + (c == '|' ? "|" : ""));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

class Reader {
 public:
  Reader(Kernel& kernel, const Table& table) : kernel_(kernel), table_(table) {
    kernel_.registers.resize(kNumSpecial);
    kernel_.registers[kOne] = 1;
    places_ = {kSpecials.begin(), kSpecials.end()};
    places_[kernel.name + "_param_0"] = kArgs;
  }

  // One statement, without its semicolon.
  void read(const std::string& statement, int line) {
    std::istringstream words(statement);
    std::string word;
    words >> word;
    if (word == ".reg") declare(statement);
    if (word.empty() || word[0] == '.') return;
    Instruction i;
    i.line = line;
    if (word[0] == '@') {
      i.negated = word[1] == '!';
      i.predicate = place(word.substr(i.negated ? 2 : 1));
      words >> word;
    }
    std::string rest;
    std::getline(words, rest, '\0');
    read_operation(i, word, split(rest));
    kernel_.code.push_back(std::move(i));
  }

  void label(const std::string& name) { labels_[name] = static_cast<int>(kernel_.code.size()); }

  void finish() {
    for (const auto& [at, name] : branches_) {
      if (labels_.count(name) == 0) throw std::runtime_error("no label '" + name + "'");
      kernel_.code[at].target = labels_.at(name);
    }
  }

 private:
  // .reg .b32 %r<12>, or .reg .u32 name, another
  void declare(const std::string& statement) {
    const size_t type = statement.find('.', 1), names = statement.find_first_of(" \t", type);
    for (const std::string& name : split(statement.substr(names))) declared_.insert(name.substr(0, name.find('<')));
  }

  bool is_register(const std::string& text) const {
    const size_t last = text.find_last_not_of("0123456789");
    return last != std::string::npos && (declared_.count(text) > 0 || declared_.count(text.substr(0, last + 1)) > 0);
  }

  void read_operation(Instruction& i, const std::string& name, std::vector<std::string> operands) {
    const auto found = table_.find(name);
    if (found == table_.end()) throw std::runtime_error("does not know the instruction '" + name + "'");
    i.execute = found->second;
    i.operation = find_operation(name);
    if (i.execute == &branch) {
      branches_.emplace_back(kernel_.code.size(), operands.at(0));
      return;
    }
    if (name.compare(0, 3, "mov") == 0) {
      const auto reading = kReadings.find(operands.at(1));
      if (reading != kReadings.end()) {
        i.execute = reading->second;
        operands.pop_back();
      }
    }
    static const char* kNoResult[] = {"st.", "red.", "bar.", "barrier.", "cp.", "nanosleep.", "prefetch."};
    bool result = true;
    for (const char* begin : kNoResult) result = result && name.compare(0, std::strlen(begin), begin) != 0;
    for (const std::string& operand : operands) {
      const bool another = operand.back() == '|';
      add_operand(i, result ? i.to : i.from, another ? operand.substr(0, operand.size() - 1) : operand);
      if (!another) result = false;
    }
    i.space = name.find(".param") != std::string::npos             ? Space::kParam
              : name.find(".shared::cluster") != std::string::npos ? Space::kCluster
              : name.find(".shared") != std::string::npos          ? Space::kShared
                                                                   : Space::kAny;
    i.from_l2 = name.find(".cg") != std::string::npos || name.find(".gpu") != std::string::npos;
  }

  void add_operand(Instruction& i, Places& list, const std::string& text) {
    if (text[0] == '{') {
      for (const std::string& part : split(text.substr(1, text.size() - 2))) list.push_back(place(part));
    } else if (text[0] == '[') {
      const size_t plus = text.find('+');
      list.push_back(place(text.substr(1, (plus == std::string::npos ? text.size() - 1 : plus) - 1)));
      if (plus != std::string::npos) i.offset = std::stoll(text.substr(plus + 1));
    } else {
      list.push_back(place(text));
    }
  }

  // Of a register, a constant or the block's shared memory.
  int place(const std::string& text) {
    const auto found = places_.find(text);
    if (found != places_.end()) return found->second;
    const int place = static_cast<int>(kernel_.registers.size());
    kernel_.registers.push_back(~uint64_t{0});  // NaN, until it is written
    places_[text] = place;
    if (is_register(text)) return place;
    if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0d") == 0) {
      kernel_.registers[place] = std::stoull(text.substr(2), nullptr, 16);
    } else if (text[0] == '-' || (text[0] >= '0' && text[0] <= '9')) {
      kernel_.registers[place] =
          text[0] == '-' ? static_cast<uint64_t>(std::stoll(text)) : std::stoull(text, nullptr, 0);
    } else if (text.find("bnext_shared_memory") != std::string::npos) {
      kernel_.registers[place] = kSharedBegin;
    } else {
      throw std::runtime_error("does not know the operand '" + text + "'");
    }
    return place;
  }

  Kernel& kernel_;
  const Table& table_;
  std::map<std::string, int> places_, labels_;
  std::set<std::string> declared_;  // registers, by name or by what stands before their number
  std::vector<std::pair<size_t, std::string>> branches_;
};

// Kernels as PTX has them: `.visible .entry name(.param ... name_param_0[bytes]) .directives { statements }`.
Module read_module(std::istream& file) {
  static const Table table = make_table();
  Module result;
  std::string text, statement;
  std::unique_ptr<Reader> reader;
  Kernel* kernel = nullptr;
  int line = 0, depth = 0;
  while (std::getline(file, text)) {
    ++line;
    text = text.substr(0, text.find("//"));
    try {
      if (text.compare(0, 15, ".visible .entry") == 0) {
        const std::string name = text.substr(16, text.find('(') - 16);
        kernel = &result.kernels[name];
        kernel->name = name;
        reader = std::make_unique<Reader>(*kernel, table);
        continue;
      }
      if (text.compare(0, 11, ".target sm_") == 0) result.arch = std::stoi(text.substr(11));
      if (reader == nullptr) continue;
      if (depth == 0) {
        if (text.find("_param_0[") != std::string::npos)
          kernel->param_bytes = std::stoull(text.substr(text.find('[') + 1));
        if (text.find("_param_1") != std::string::npos) throw std::runtime_error("knows kernels of one argument only");
        if (text[0] == '{') depth = 1;
        continue;
      }
      if (text.compare(0, 3, "$L_") == 0) {
        reader->label(text.substr(0, text.find(':')));
        continue;
      }
      for (const char c : text) {
        const bool vector = statement.find_first_not_of(" \t") != std::string::npos;  // braces within a statement
        if (c == ';') {
          reader->read(trimmed(statement), line);
          statement.clear();
        } else if ((c == '{' || c == '}') && !vector) {
          depth += c == '{' ? 1 : -1;
        } else {
          statement += c;
        }
      }
      if (depth == 0) {
        reader->finish();
        reader.reset();
      }
    } catch (const std::exception& error) {
      throw std::runtime_error("line " + std::to_string(line) + ": " + error.what());
    }
  }
  if (result.kernels.empty()) throw std::runtime_error("no kernels in it");
  return result;
}

// Both compilers give a function the same name.
const Kernel& find_kernel(const void* function) {
  const Kernel*& kernel = module->by_function[function];
  if (kernel == nullptr) {
    Dl_info info;
    if (dladdr(function, &info) == 0 || info.dli_saddr != function) fail("a kernel has no name");
    const auto found = module->kernels.find(info.dli_sname);
    if (found == module->kernels.end()) fail(std::string("the PTX has no kernel ") + info.dli_sname);
    kernel = &found->second;
  }
  return *kernel;
}

}  // namespace

int load_ptx(const std::string& path) {
  std::ifstream file(path);
  try {
    modules[last_module + 1] = read_module(file);
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  return ++last_module;
}

void forget_ptx(int number) { modules.erase(number); }
void use_ptx(int number) {
  module = number == 0 ? nullptr : &modules.at(number);
  if (module == nullptr) return;
  module->by_function.clear();
  for (Operation& operation : operations) operation.count = 0;
}

bool has_ptx() { return module != nullptr; }
int ptx_arch() { return module->arch; }

void watch_banks(bool on) {
  watches_banks = on;
  bank_accesses.clear();
}

BankUse bank_use(const std::vector<BankAccess>& lanes) {
  constexpr int kLanes = 32, kBanks = 32, kWord = 4;
  BankUse use = {0, 0};
  const int words = std::max(1, lanes.front().bytes / kWord), lanes_of_turn = kLanes / words;
  for (int first = 0; first < kLanes; first += lanes_of_turn) {
    std::set<uint64_t> of_bank[kBanks];
    for (const BankAccess& access : lanes) {
      if (access.lane < first || access.lane >= first + lanes_of_turn) continue;
      for (int w = 0; w < words; ++w) {
        const uint64_t word = access.at / kWord + w;
        of_bank[word % kBanks].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& bank : of_bank) most = std::max(most, bank.size());
    use.cycles += static_cast<int64_t>(most);
    use.least += most > 0;
  }
  return use;
}

BankUse bank_use() {
  BankUse use = {0, 0};
  for (const auto& [key, lanes] : bank_accesses) {
    const BankUse once = bank_use(lanes);
    use.cycles += once.cycles;
    use.least += once.least;
  }
  return use;
}

std::string ptx_kernels_run() {
  std::string names;
  for (const auto& [function, kernel] : module->by_function) names += kernel->name + " ";
  return names;
}

std::string ptx_operations_run() {
  std::string text;
  for (const Operation& operation : operations) {
    if (operation.count > 0) text += operation.name + " " + std::to_string(operation.count) + "\n";
  }
  return text;
}

void run_ptx(const void* function, const void* args, size_t bytes) {
  const Kernel& kernel = find_kernel(function);
  if (bytes != kernel.param_bytes) fail("the kernel's arguments have another size");
  Thread t{kernel, static_cast<const unsigned char*>(args), kernel.registers};
  t.registers[kThreadIndex] = thread_index().x;
  t.registers[kBlockIndex] = block_index().x;
  t.registers[kBlockSize] = block_size().x;
  t.registers[kGridSize] = grid_size().x;
  t.registers[kArgs] = reinterpret_cast<uint64_t>(args);
  int64_t steps = 0;
  for (; t.next != kEnd; ++steps) {
    if (steps > kMostSteps) fail("runs for ever");
    const Instruction& i = kernel.code[t.next++];
    ++operations[i.operation].count;
    if (i.predicate < 0 || t.get<bool>(i.predicate) != i.negated) i.execute(t, i);
  }
  count_instructions(steps);
  if (t.first_clock >= 0) count_late_thread(static_cast<int>(t.last_clock - t.first_clock));
}

}  // namespace simt
