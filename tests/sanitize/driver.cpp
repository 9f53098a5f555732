// Runs the CPU kernels over shapes, dtypes, layouts and options, with a sanitizer compiled in and without torch, and
// compares every result with the oracle. See the Makefile beside it; `driver --help` lists the options.
#include <sanitizer/common_interface_defs.h>

#include <cinttypes>
#include <stdexcept>

#include "ATen/Parallel.h"
#include "cases.h"
#include "cpu/batchnorm.h"
#include "cpu/kernels.h"
#include "oracle.h"

namespace {

// What the kernels take for the last cache: nothing makes every store a streamed one, a lot makes none.
int64_t g_cache_bytes = int64_t{1} << 40;
// The case at work, for whoever reads a sanitizer's report.
thread_local char g_label[256] = "start";

}  // namespace

// The linker sends the kernels' calls of bnext::cpu::last_cache_bytes() here (--wrap).
extern "C" int64_t __wrap__ZN5bnext3cpu16last_cache_bytesEv() { return g_cache_bytes; }

namespace sanitize {

void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n  in case: %s\n", what.c_str(), g_label);
  std::_Exit(1);
}

void check(const char* name, const Expected& want, const std::vector<double>& got) {
  const int64_t i = want.mismatch(got);
  if (i < 0) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%" PRId64 "] is %.17g, should be %.17g within %.3g", name, i, got[i],
                want.value[i], want.bar[i]);
  fail(text);
}

void check_surroundings(const char* name, const MaybeTensor& t) {
  if (t != nullptr && !t->surroundings_intact()) fail(std::string(name) + ": memory beside its elements was written");
}

std::vector<double> values_or(const MaybeTensor& t, int64_t count, double otherwise) {
  return t == nullptr ? std::vector<double>(count, otherwise) : t->values();
}

MaybeTensor copy_of(const MaybeTensor& t, const Case& of) {
  if (t == nullptr) return nullptr;
  auto copy = std::make_shared<Tensor>(of.parameter(t->dtype()));
  copy->fill(t->values());
  return copy;
}

// Forward, and what the oracle makes of it for each channel.
std::vector<Channel> run_forward(const Case& given, const Oracle& oracle) {
  const int64_t num_channels = given.size[1];
  MaybeTensor y = given.wants_y ? std::make_shared<Tensor>(given.size, given.dtype, given.where_y) : nullptr;
  MaybeTensor running_mean = copy_of(given.running_mean, given), running_var = copy_of(given.running_var, given);
  auto mean = std::make_shared<Tensor>(given.parameter(DType::kFloat64));
  auto invstd = std::make_shared<Tensor>(given.parameter(DType::kFloat64));
  int64_t num_batches_tracked = 2;

  bnext::ForwardProblem problem;
  problem.geometry =
      bnext::make_geometry(given.size, given.dtype, {given.x->layout(), y == nullptr ? given.x->layout() : y->layout()},
                           {&problem.x, &problem.y});
  if (y == nullptr) problem.y.data = nullptr;
  problem.weight = channel_vector(given.weight);
  problem.bias = channel_vector(given.bias);
  problem.running_mean = channel_vector(running_mean);
  problem.running_var = channel_vector(running_var);
  problem.num_batches_tracked = &num_batches_tracked;
  problem.mean = channel_vector(mean);
  problem.invstd = channel_vector(invstd);
  problem.training = given.training;
  problem.cumulative = given.cumulative;
  problem.momentum = given.momentum;
  problem.eps = given.eps;
  bnext::cpu::forward(problem);

  const std::vector<double> weight = values_or(given.weight, num_channels, 1),
                            bias = values_or(given.bias, num_channels, 0);
  const std::vector<double> old_mean = values_or(given.running_mean, num_channels, 0);
  const std::vector<double> old_var = values_or(given.running_var, num_channels, 1);
  const double momentum = given.cumulative ? 1.0 / 3 : given.momentum, m = static_cast<double>(oracle.num_values());
  std::vector<Channel> channels(num_channels);
  Expected want_mean, want_invstd, want_running_mean, want_running_var;
  for (int64_t c = 0; c < num_channels; ++c) {
    Channel& channel = channels[c];
    channel.weight = weight[c];
    channel.bias = bias[c];
    channel.mean = old_mean[c];
    channel.var = old_var[c];
    if (given.training) oracle.find_statistics(c, channel);
    channel.invstd = 1 / std::sqrt(channel.var + given.eps);
    want_mean.add(channel.mean, channel.mean_bar);
    want_invstd.add(channel.invstd,
                    channel.invstd * (channel.var_bar / (channel.var + given.eps) + 4 * rounding(DType::kFloat64)));
    auto add = [&](Expected& to, double old, double now, double bar) {
      const double value = given.training ? momentum * now + (1 - momentum) * old : old;
      to.add(value, momentum * bar + rounded_bar(given.parameter_dtype, value) + 8 * rounded_bar(DType::kFloat64, now));
    };
    const double unbiased = m > 1 ? m / (m - 1) : 1;
    add(want_running_mean, old_mean[c], channel.mean, channel.mean_bar);
    add(want_running_var, old_var[c], channel.var * unbiased, channel.var_bar * unbiased);
  }
  check("mean", want_mean, mean->values());
  check("invstd", want_invstd, invstd->values());
  if (running_mean != nullptr) {
    check("running_mean", want_running_mean, running_mean->values());
    check("running_var", want_running_var, running_var->values());
  }
  if (num_batches_tracked != 2 + given.training) fail("num_batches_tracked is wrong");
  if (y != nullptr) check("y", oracle.forward(channels, given.eps), y->values());
  for (const MaybeTensor& t : {y, mean, invstd, running_mean, running_var}) check_surroundings("forward", t);
  return channels;
}

void run_backward(const Case& given, const Oracle& oracle, const std::vector<Channel>& channels) {
  auto dy = std::make_shared<Tensor>(given.size, given.dtype, given.where_dy);
  dy->fill(given.dy->values());
  MaybeTensor dx;
  if (given.wants_dx) dx = given.in_place ? dy : std::make_shared<Tensor>(given.size, given.dtype, given.where_dx);
  auto mean = std::make_shared<Tensor>(given.parameter(DType::kFloat64));
  auto invstd = std::make_shared<Tensor>(given.parameter(DType::kFloat64));
  std::vector<double> means, invstds;
  for (const Channel& c : channels) means.push_back(c.mean), invstds.push_back(c.invstd);
  mean->fill(means);
  invstd->fill(invstds);
  MaybeTensor outputs[4];
  for (int i = 0; i < 4; ++i) {
    if (given.wants_parameters[i]) outputs[i] = std::make_shared<Tensor>(given.parameter(given.parameter_dtype));
  }

  bnext::BackwardProblem problem;
  problem.geometry = bnext::make_geometry(given.size, given.dtype,
                                          {given.x->layout(), dy->layout(), (dx == nullptr ? dy : dx)->layout()},
                                          {&problem.x, &problem.dy, &problem.dx});
  if (dx == nullptr) problem.dx.data = nullptr;
  problem.weight = channel_vector(given.weight);
  problem.mean = channel_vector(mean);
  problem.invstd = channel_vector(invstd);
  problem.dweight = channel_vector(outputs[0]);
  problem.dbias = channel_vector(outputs[1]);
  problem.dmean = channel_vector(outputs[2]);
  problem.dvar = channel_vector(outputs[3]);
  problem.training = given.training;
  bnext::cpu::backward(problem);

  const auto want = oracle.backward(channels, given.dy->values(), given.parameter_dtype, given.training);
  const Expected* of_output[] = {&want.dweight, &want.dbias, &want.dmean, &want.dvar};
  constexpr const char* kNames[] = {"dweight", "dbias", "dmean", "dvar"};
  for (int i = 0; i < 4; ++i) {
    if (outputs[i] != nullptr) check(kNames[i], *of_output[i], outputs[i]->values());
    check_surroundings(kNames[i], outputs[i]);
  }
  if (dx != nullptr) check("dx", want.dx, dx->values());
  check_surroundings("dx", dx);
  check_surroundings("dy", dy);
  if (dx != dy && dy->values() != given.dy->values()) fail("dy was written");
}

void run_case(const Case& given) {
  std::snprintf(g_label, sizeof g_label, "%s", given.label.c_str());
  const std::vector<unsigned char> before = given.x->bytes();
  const Oracle oracle(given.size, given.dtype, given.x->values());
  run_backward(given, oracle, run_forward(given, oracle));
  if (given.x->bytes() != before) fail("x was written");
}

// Calls f(number, size, dtype, layout, training) for everything that is legal: training needs more than one value.
template <typename F>
void for_each_case(const std::vector<Size>& sizes, F f) {
  int64_t number = 0;
  for (DType dtype : kDTypes) {
    for (const Size& size : sizes) {
      for (int layout = 0; layout < static_cast<int>(Layout::kCount); ++layout) {
        for (bool training : {true, false}) {
          ++number;
          if (training && size[0] * size[2] * size[3] == 1) continue;
          f(number, size, dtype, static_cast<Layout>(layout), training);
        }
      }
    }
  }
}

// Channels and planes below, at and above vector widths; one large enough for every thread and for several blocks.
std::vector<Size> memory_sizes() {
  std::vector<Size> sizes;
  for (int64_t c : {1, 2, 3, 5, 16, 17, 64, 513}) {
    for (const auto& [n, h, w] : std::initializer_list<std::array<int64_t, 3>>{
             {1, 1, 1}, {5, 1, 1}, {3, 2, 2}, {2, 7, 7}, {3, 14, 14}, {1, 31, 17}}) {
      if (c * n * h * w <= 20000) sizes.push_back({n, c, h, w});
    }
  }
  sizes.push_back({2, 3, 75, 81});
  sizes.push_back({2, 64, 16, 17});
  sizes.push_back({9, 41, 7, 7});
  sizes.push_back({3, 289, 5, 5});    // wide rows
  sizes.push_back({66, 1093, 1, 1});  // rows in parts
  return sizes;
}

// All above the size from which work is spread over threads, and cut in every way there is.
std::vector<Size> thread_sizes() {
  return {{4, 64, 14, 14}, {9, 83, 7, 7},   {2, 3, 75, 81},  {1, 1, 200, 200},
          {16, 513, 2, 2}, {700, 48, 1, 1}, {66, 1093, 1, 1}};
}

int64_t run_memory(int64_t only) {
  int64_t count = 0;
  for_each_case(memory_sizes(), [&](int64_t number, const Size& size, DType dtype, Layout layout, bool training) {
    if (only != 0 && number != only) return;
    at::set_num_threads(static_cast<int>(1 + number % 3));
    // Masked vector instructions run into pages only; the ends of heap memory are exact to the byte.
    const Place place = number % 4 == 0 ? Place::kAfterPage : number % 4 == 1 ? Place::kHeap : Place::kBeforePage;
    run_case(CaseMaker(number).make(size, dtype, layout, training, place));
    ++count;
  });
  return count;
}

// Each case by two threads at a time, each of which has its own pool of threads.
int64_t run_threads(int64_t only) {
  int64_t count = 0;
  for_each_case(thread_sizes(), [&](int64_t number, const Size& size, DType dtype, Layout layout, bool training) {
    // Every fifth, which takes turns at layouts, modes, dtypes and sizes: ThreadSanitizer is slow.
    if (only != 0 ? number != only : number % 5 != 0) return;
    at::set_num_threads(static_cast<int>(2 + number % 3));
    const Case given = CaseMaker(number).make(size, dtype, layout, training, Place::kHeap);
    std::thread other([&] { run_case(given); });
    run_case(given);
    other.join();
    ++count;
  });
  return count;
}

// Faults that have to be found. Each of these must end the process; the Makefile looks at how.
void plant(const std::string& fault) {
  const Size size = {2, 3, 5, 7};
  Case given = CaseMaker(1).make(size, DType::kFloat32, Layout::kNchw, true, Place::kHeap);
  std::snprintf(g_label, sizeof g_label, "planted: %s", fault.c_str());
  auto forward_into = [&](const Tensor& x, const Tensor& y, bnext::ChannelVector weight) {
    Tensor mean = given.parameter(DType::kFloat64), invstd = given.parameter(DType::kFloat64);
    bnext::ForwardProblem problem;
    problem.geometry = bnext::make_geometry(size, given.dtype, {x.layout(), y.layout()}, {&problem.x, &problem.y});
    problem.weight = weight;
    problem.mean = channel_vector(std::make_shared<Tensor>(mean));
    problem.invstd = channel_vector(std::make_shared<Tensor>(invstd));
    bnext::cpu::forward(problem);
  };
  const Size dense = strides(Layout::kNchw, size);
  auto make = [&](Place place, int64_t missing) {
    Tensor t(size, given.dtype, {dense, 0, place}, missing);
    if (missing == 0) t.fill(given.x->values());
    return t;
  };
  if (fault == "short-input") {
    forward_into(make(Place::kBeforePage, 1), make(Place::kHeap, 0), {});
  } else if (fault == "short-output") {
    forward_into(make(Place::kHeap, 0), make(Place::kBeforePage, 1), {});
  } else if (fault == "short-heap") {
    forward_into(make(Place::kHeap, 16), make(Place::kHeap, 0), {});
  } else if (fault == "misaligned") {
    unsigned char bytes[64] = {};
    forward_into(make(Place::kHeap, 0), make(Place::kHeap, 0), {bytes + 1, 1, DType::kFloat32});
  } else if (fault == "overflow") {
    bnext::View view, other;
    bnext::make_geometry(size, given.dtype, {{nullptr, {INT64_MAX, 1, 1, 1}}, {nullptr, {INT64_MAX, 1, 1, 1}}},
                         {&view, &other});
  } else if (fault == "wrong-result") {
    const Oracle oracle(size, given.dtype, given.dy->values());
    run_forward(given, oracle);
  } else if (fault == "race") {
    const Tensor x = make(Place::kHeap, 0), y = make(Place::kHeap, 0);
    std::thread other([&] { forward_into(x, y, {}); });
    forward_into(x, y, {});
    other.join();
  } else {
    fail("no such fault");
  }
  std::printf("the planted fault was not noticed\n");
}

}  // namespace sanitize

int main(int argc, char** argv) {
  std::string mode = argc > 1 ? argv[1] : "";
  std::string fault;
  int64_t only = 0;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--stream") {
      g_cache_bytes = 1;
    } else if (option == "--case" && i + 1 < argc) {
      only = std::atoll(argv[++i]);
    } else {
      fault = option;
    }
  }
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "bnext: in case: %s\n", g_label); });
  try {
    const char* isa = bnext::cpu::isa_name(bnext::cpu::current_isa());
    if (mode == "isa") {
      std::printf("%s\n", isa);
    } else if (mode == "memory" || mode == "threads") {
      const int64_t count = mode == "memory" ? sanitize::run_memory(only) : sanitize::run_threads(only);
      std::printf("%s, %s%s: %" PRId64 " cases clean\n", mode.c_str(), isa, g_cache_bytes == 1 ? ", streamed" : "",
                  count);
    } else if (mode == "plant") {
      sanitize::plant(fault);
    } else {
      std::printf("driver isa | memory [--stream] [--case N] | threads [--stream] [--case N] | plant FAULT\n");
      return mode == "--help" ? 0 : 2;
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
