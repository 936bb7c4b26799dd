// What the tests of the header run: `program COMMAND ARGUMENTS...`; it says what is wrong on stderr, and exits with 1.
#include <cstdio>
#include <new>

// The header, and what `meam cpp` writes beside it.
#define main golden_main
#include "golden_test.cpp"
#undef main
#define main example_main
#include "example.cpp"
#undef main
#include "meam_policy_c.cpp"  // for interface.c

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_ALLOCATIONS
#endif

#ifdef COUNTS_ALLOCATIONS
namespace {
std::atomic<std::uint64_t> allocations{0};
}
// Not inlined: GCC would take a pair of which it sees one half for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace {

double number(const Json& value) {
  if (value.is_null()) return meam::detail::kNaN;
  if (value.is_boolean()) return value.get<bool>() ? 1.0 : 0.0;
  if (value.is_string()) return std::strtod(value.get<std::string>().c_str(), nullptr);
  return value.get<double>();
}

std::vector<double> numbers(const Json& list) {
  std::vector<double> found;
  for (const Json& value : list) found.push_back(number(value));
  return found;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

std::string text(const std::vector<double>& list) {
  std::string found;
  char one[40];
  for (const double each : list) found += (std::snprintf(one, sizeof one, "%.17g ", each), one);
  return found;
}

meam::Reaction reaction(const Json& settings, const char* name) {
  static const std::map<std::string, meam::Reaction> known{
      {"contract", meam::Reaction::contract}, {"raise", meam::Reaction::raise}, {"hold", meam::Reaction::hold},
      {"neutral", meam::Reaction::neutral},   {"home", meam::Reaction::home}};
  return settings.at(name).is_null() ? meam::Reaction::count : known.at(settings.at(name).get<std::string>());
}

meam::PolicyOptions options_of(const Json& given) {
  meam::PolicyOptions options;
  options.variant = given.value("variant", "");
  const Json& safety = given.at("safety");
  options.safety.on_bad_observation = reaction(safety, "on_bad_observation");
  options.safety.on_bad_action = reaction(safety, "on_bad_action");
  options.safety.on_unfamiliar = reaction(safety, "on_unfamiliar");
  options.safety.unfamiliarity_limit = number(safety.at("unfamiliarity_limit"));
  options.safety.rate_limit = numbers(safety.at("rate_limit"));
  options.noise_scale = number(given.at("noise_scale"));
  options.seed = 0;
  return options;
}

std::map<std::string, double> as_map(const meam::Health& h) {
  const auto whole = [](std::uint64_t count) { return static_cast<double>(count); };
  return {{"steps", whole(h.steps)},
          {"inferences", whole(h.inferences)},
          {"bad_observations", whole(h.bad_observations)},
          {"bad_actions", whole(h.bad_actions)},
          {"out_of_bounds", whole(h.out_of_bounds)},
          {"unfamiliar", whole(h.unfamiliar)},
          {"limited", whole(h.limited)},
          {"rate_limited", whole(h.rate_limited)},
          {"replaced", whole(h.replaced)},
          {"unfamiliarity", h.unfamiliarity},
          {"max_unfamiliarity", h.max_unfamiliarity},
          {"value", h.value},
          {"disagreement", h.disagreement}};
}

/// Compare counters by name; false, after saying which, if one differs.
bool compare(const std::string& name, const std::map<std::string, double>& seen, const Json& expected) {
  bool good = seen.size() == expected.size();
  for (const auto& [field, value] : seen) {
    if (expected.contains(field) && same(value, number(expected.at(field)))) continue;
    const std::string wanted = expected.contains(field) ? expected.at(field).dump() : "no such field";
    std::fprintf(stderr, "%s: %s is %.17g; expected %s\n", name.c_str(), field.c_str(), value, wanted.c_str());
    good = false;
  }
  return good;
}

bool compare(const std::string& name, std::size_t step, meam::Status status, const std::vector<double>& action,
             const Json& expected) {
  const auto wanted = static_cast<meam::Status>(expected.value("status", 0));
  const std::vector<double> values = expected.contains("action") ? numbers(expected.at("action")) : action;
  if (status == wanted && std::equal(action.begin(), action.end(), values.begin(), values.end(), same)) return true;
  std::fprintf(stderr, "%s, step %zu: status %d, action %s; expected status %d, action %s\n", name.c_str(), step,
               static_cast<int>(status), text(action).c_str(), static_cast<int>(wanted), text(values).c_str());
  return false;
}

bool run_case(const Json& given) {
  const auto name = given.at("name").get<std::string>();
  meam::Policy policy(given.at("folder").get<std::string>(), options_of(given));
  std::vector<double> action(policy.action_dim());
  std::size_t number_of_step = 0;
  for (const Json& step : given.at("steps")) {
    if (step.contains("reset")) {
      policy.reset();
      continue;
    }
    const std::vector<double> before = action, observation = numbers(step.at("observation"));
    meam::Status status{};
    if (step.contains("noise")) {
      const std::vector<double> noise = numbers(step.at("noise"));
      status = policy.act(observation.data(), observation.size(), noise.data(), noise.size(), action.data(),
                          action.size());
    } else {
      status = policy.act(observation, action);
    }
    if (status != meam::Status::ok && (action != before || std::strlen(policy.last_error()) < 20)) {
      std::fprintf(stderr, "%s: without an action something was written, or nothing said\n", name.c_str());
      return false;
    }
    if (!compare(name, number_of_step++, status, action, step)) return false;
  }
  return compare(name, as_map(policy.health()), given.at("health"));
}

template <class T>
T choice(const Json& given, const char* name, const std::map<std::string, T>& known) {
  return known.at(given.at(name).get<std::string>());
}

meam::LoopOptions loop_options_of(const Json& given, std::atomic<double>& time) {
  using meam::Chunking;
  using meam::Overrun;
  meam::LoopOptions options;
  options.rate_hz = number(given.at("rate_hz"));
  options.chunking = choice<Chunking>(given, "chunking",
                                      {{"realtime", Chunking::realtime},
                                       {"naive", Chunking::naive},
                                       {"blocking", Chunking::blocking}});
  options.overrun = choice<Overrun>(given, "overrun",
                                    {{"contract", Overrun::contract}, {"hold", Overrun::hold}, {"zero", Overrun::zero},
                                     {"repeat", Overrun::repeat}, {"home", Overrun::home}, {"stop", Overrun::stop}});
  options.any_rate = given.value("any_rate", false);
  options.execute_steps = given.value("execute_steps", std::size_t{0});
  const auto seconds = [&](const char* name, std::optional<double>& to) {
    if (given.contains(name)) to = number(given.at(name));
  };
  seconds("max_observation_age_s", options.max_observation_age_s);
  seconds("blend_in_s", options.blend_in_s);
  if (given.contains("expected_delay")) options.expected_delay = given.at("expected_delay").get<int>();
  if (given.contains("simulated_delay")) options.simulated_delay = given.at("simulated_delay").get<int>();
  // As the clock of the tests: it advances whenever somebody looks at it.
  options.clock = [&time] { return time = time + 0x1p-10; };
  return options;
}

std::map<std::string, double> as_map(const meam::LoopHealth& h) {
  const auto whole = [](std::uint64_t count) { return static_cast<double>(count); };
  return {{"ticks", whole(h.ticks)},
          {"inferences", whole(h.inferences)},
          {"failed_inferences", whole(h.failed_inferences)},
          {"overruns", whole(h.overruns)},
          {"missed_deadlines", whole(h.missed_deadlines)},
          {"stale_observations", whole(h.stale_observations)},
          {"over_budget", whole(h.over_budget)},
          {"latency_last_ms", h.latency_last_ms},
          {"latency_p50_ms", h.latency_p50_ms},
          {"latency_p99_ms", h.latency_p99_ms},
          {"delay_ticks", static_cast<double>(h.delay_ticks)},
          {"stopped", h.stopped ? 1.0 : 0.0}};
}

bool run_loop_case(const Json& given) {
  const auto name = given.at("name").get<std::string>();
  std::atomic<double> time{1000.0};
  meam::Policy policy(given.at("folder").get<std::string>(), options_of(given));
  meam::Loop loop(policy, loop_options_of(given.at("loop"), time));
  std::vector<double> action(policy.action_dim());
  std::size_t number_of_step = 0;
  for (const Json& step : given.at("steps")) {
    if (step.contains("pause")) time = time + number(step.at("pause"));
    if (step.contains("reset")) {
      loop.reset();
      continue;
    }
    std::optional<double> timestamp;
    if (step.contains("timestamp")) timestamp = number(step.at("timestamp"));
    const std::vector<double> before = action;
    const meam::Status status = loop.step(numbers(step.at("observation")), action, timestamp);
    if (status != meam::Status::ok && (action != before || std::strlen(loop.last_error()) < 20)) {
      std::fprintf(stderr, "%s: without an action something was written, or nothing said\n", name.c_str());
      return false;
    }
    if (!compare(name, number_of_step++, status, action, step)) return false;
  }
  const bool same_loop = compare(name, as_map(loop.health()), given.at("loop_health"));
  return compare(name, as_map(policy.health()), given.at("health")) && same_loop;
}

/// A loop whose second thread is real, for so many ticks and episodes: every action is written, finite and in order.
int run_threads(const char* folder, const char* variant, const char* ticks) {
  for (const meam::Chunking chunking : {meam::Chunking::naive, meam::Chunking::realtime, meam::Chunking::blocking}) {
    meam::PolicyOptions options;
    options.variant = variant;
    meam::Policy policy(folder, options);
    std::atomic<int> begun{0};
    meam::LoopOptions how;
    how.chunking = chunking;
    how.rate_hz = 2000;
    how.any_rate = true;
    how.on_thread_start = [&begun] { ++begun; };
    meam::Loop loop(policy, how);
    std::vector<float> observation(policy.observation_dim()), action(policy.action_dim());
    std::uint64_t wrong = 0;
    const int count = std::atoi(ticks);
    for (int tick = 0; tick < count; ++tick) {
      if (tick % 97 == 0) loop.reset(static_cast<std::uint64_t>(tick));
      if (tick % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
      if (loop.step(observation, action) != meam::Status::ok) return 1;
      for (const float each : action) wrong += std::isfinite(each) ? 0 : 1;
    }
    const meam::LoopHealth health = loop.health();
    if (wrong != 0 || begun != 1 || health.ticks != static_cast<std::uint64_t>(count)) return 1;
    if (health.inferences < 10 || health.failed_inferences != 0) return 1;
    if (!(health.latency_p50_ms <= health.latency_p99_ms)) return 1;
  }
  std::printf("3 loops\n");
  return 0;
}

/// What is refused when a loop is made.
int make_loop(const char* folder, const char* options) {
  std::atomic<double> time{0.0};
  meam::Policy policy(folder);
  try {
    const meam::Loop loop(policy, loop_options_of(Json::parse(options), time));
    std::printf("0 made\n");
  } catch (const meam::Error& error) {
    std::printf("%d %s\n", static_cast<int>(error.status()), error.what());
  }
  return 0;
}

int print_weights(const char* size, const char* delay, const char* executed) {
  std::vector<float> weights(static_cast<std::size_t>(std::atoi(size)));
  meam::detail::prefix_weights(weights.data(), weights.size(), std::atoi(delay), std::atoi(executed));
  for (const float each : weights) std::printf("%.9g\n", static_cast<double>(each));
  return 0;
}

int run_cases(const char* file, bool (*one)(const Json&)) {
  std::ifstream stream(file);
  const Json cases = Json::parse(stream);
  int failed = 0;
  for (const Json& each : cases) failed += one(each) ? 0 : 1;
  std::printf("%zu cases, %d failed\n", cases.size(), failed);
  return failed == 0 ? 0 : 1;
}

/// Queued actions, a million of them, and how many times memory was allocated meanwhile.
int count_allocations(const char* folder) {
  meam::PolicyOptions options;
  options.safety.rate_limit = {0.5};
  options.safety.on_unfamiliar = options.safety.on_bad_observation = meam::Reaction::hold;
  meam::Policy policy(folder, options);
  std::vector<double> observation(policy.observation_dim()), action(policy.action_dim());
  std::uint64_t counted = 0, queued = 0;
  double sum = 0;
  for (std::uint64_t tick = 0; queued < 1000000; ++tick) {
    const std::uint64_t inferences = policy.health().inferences;
    // Observations that are held too.
    observation[0] = tick % 1000 == 4 ? meam::detail::kNaN : tick % 1000 == 7 ? 1e6 : 0.0;
#ifdef COUNTS_ALLOCATIONS
    const std::uint64_t before = allocations;
#endif
    if (policy.act(observation, action) != meam::Status::ok) return 1;
    sum += action[0];
    if (policy.health().inferences != inferences) continue;
    ++queued;
#ifdef COUNTS_ALLOCATIONS
    counted += allocations - before;
#endif
  }
  std::printf("%llu allocations in %llu queued actions (%g)\n", static_cast<unsigned long long>(counted),
              static_cast<unsigned long long>(queued), sum);
  return counted == 0 ? 0 : 1;
}

int load(const char* folder, const char* variant) {
  meam::PolicyOptions options;
  options.variant = variant;
  try {
    meam::Policy policy(folder, options);
    std::printf("0 loaded\n");
  } catch (const meam::Error& error) {
    std::printf("%d %s\n", static_cast<int>(error.status()), error.what());
  }
  return 0;
}

int draw(const char* seed, const char* scale, const char* count) {
  meam::detail::Noise noise(std::strtoull(seed, nullptr, 10));
  std::vector<float> drawn(std::strtoull(count, nullptr, 10));
  noise.draw(drawn.data(), drawn.size(), std::strtod(scale, nullptr));
  for (const float each : drawn) std::printf("%.9g\n", static_cast<double>(each));
  return 0;
}

int hash(const char* file) {
  std::ifstream stream(file, std::ios::binary);
  const std::string data{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  for (std::size_t size = 0; size <= data.size(); ++size) {
    std::printf("%s\n", meam::detail::Sha256::hex(data.substr(0, size)).c_str());
  }
  return 0;
}

}  // namespace

extern "C" int use_interface(const char* folder, const char* broken);

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  try {
    if (command == "cases" && count == 3) return run_cases(arguments[2], run_case);
    if (command == "loop-cases" && count == 3) return run_cases(arguments[2], run_loop_case);
    if (command == "threads" && count == 5) return run_threads(arguments[2], arguments[3], arguments[4]);
    if (command == "loop" && count == 4) return make_loop(arguments[2], arguments[3]);
    if (command == "weights" && count == 5) return print_weights(arguments[2], arguments[3], arguments[4]);
    if (command == "golden" && count == 3) return golden_main(2, arguments + 1);
    if (command == "example" && count == 3) return example_main(2, arguments + 1);
    if (command == "allocations" && count == 3) return count_allocations(arguments[2]);
    if (command == "load" && count == 4) return load(arguments[2], arguments[3]);
    if (command == "draw" && count == 5) return draw(arguments[2], arguments[3], arguments[4]);
    if (command == "hash" && count == 3) return hash(arguments[2]);
    if (command == "interface" && count == 4) return use_interface(arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::fprintf(stderr, "No such command, or other arguments: %s\n", command.c_str());
  return 2;
}
