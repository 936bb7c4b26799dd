// meam_policy.hpp: acts with a policy folder that `meam export` wrote.
//
// One header for C++17, onnxruntime's C++ API (1.17 or newer) and nlohmann-json (3.9 or newer). The semantics are those
// of `MeamPolicy` and `ControlLoop` of the Python package meam-policy: a table of cases that both run holds them equal.
// Licence: Apache-2.0.
#ifndef MEAM_POLICY_HPP
#define MEAM_POLICY_HPP

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <semaphore.h>
#else
#include <condition_variable>
#include <mutex>
#endif

#include <nlohmann/json.hpp>

#if __has_include(<onnxruntime_cxx_api.h>)
#include <onnxruntime_cxx_api.h>
#elif __has_include(<onnxruntime/onnxruntime_cxx_api.h>)
#include <onnxruntime/onnxruntime_cxx_api.h>
#else
#include <onnxruntime/core/session/onnxruntime_cxx_api.h>
#endif

namespace meam {

/// What came of a call; the numbers are those of the C interface.
enum class Status : int {
  ok = 0,
  bad_observation = 1,  ///< the observation, or the noise, does not fit or is not finite; no action was written
  no_action = 2,        ///< the network gave none, or a control loop is stopped; no action was written
  not_found = 3,        ///< the folder, or a file of it, does not exist
  bad_format = 4,       ///< a file does not have the expected format
  damaged = 5,          ///< the hash of a file is not the recorded one
  old_runtime = 6,      ///< onnxruntime is too old for the graph or for this program
  bad_argument = 7      ///< an option is out of range, or does not fit the policy
};

/// Raised while a policy or a loop is made, and by nothing else.
class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const noexcept { return status_; }

 private:
  Status status_;
};

/// What to do instead of acting: `raise` gives a status and no action; `contract` follows robot.json; `count` does
/// nothing, and is for unfamiliar observations alone.
enum class Reaction { contract, raise, hold, neutral, home, count };

/// The checks and limits of Python's `SafetySettings`, with its defaults.
struct SafetySettings {
  Reaction on_bad_observation = Reaction::contract;
  Reaction on_bad_action = Reaction::contract;
  Reaction on_unfamiliar = Reaction::contract;
  double unfamiliarity_limit = 10.0;  ///< standard deviations of the training data; infinity for no limit
  std::vector<double> rate_limit;     ///< per step: one for all numbers or one for each; empty follows robot.json
};

struct PolicyOptions {
  std::string variant;                ///< another graph of the folder; empty for the policy as trained
  SafetySettings safety;
  std::optional<double> noise_scale;  ///< 1 samples, 0 starts every chunk from zero noise; none follows config.json
  std::optional<std::uint64_t> seed;  ///< of the noise; none draws one
};

/// What happened since the policy was loaded: the fields of Python's `Health`. Not a number where nothing is known.
struct Health {
  std::uint64_t steps = 0;
  std::uint64_t inferences = 0;
  std::uint64_t bad_observations = 0;
  std::uint64_t bad_actions = 0;
  std::uint64_t out_of_bounds = 0;
  std::uint64_t unfamiliar = 0;
  std::uint64_t limited = 0;
  std::uint64_t rate_limited = 0;
  std::uint64_t replaced = 0;
  double unfamiliarity = std::numeric_limits<double>::quiet_NaN();
  double max_unfamiliarity = std::numeric_limits<double>::quiet_NaN();
  double value = std::numeric_limits<double>::quiet_NaN();
  double disagreement = std::numeric_limits<double>::quiet_NaN();
};

namespace detail {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLargest = std::numeric_limits<double>::max();
constexpr double kRateTolerance = 0.01;
constexpr std::size_t kMostNumbers = std::size_t{1} << 20;
constexpr std::size_t kMostSteps = 10000;
constexpr std::uintmax_t kMostConfigBytes = std::uintmax_t{1} << 22;
constexpr std::uintmax_t kMostGraphBytes = std::uintmax_t{1} << 31;

using Json = nlohmann::json;
using Numbers = std::vector<double>;

[[noreturn]] inline void refuse(const std::string& message, Status status = Status::bad_format) {
  throw Error(status, message);
}

inline std::string shown(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

/// A message of limited length, kept without allocating.
class Message {
 public:
  const char* text() const noexcept { return text_.data(); }
#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  void write(const char* format, ...) noexcept {
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text_.data(), text_.size(), format, arguments);
    va_end(arguments);
  }

 private:
  std::array<char, 400> text_{};
};

/// A number that one thread writes and any may read.
template <class T>
class Shared {
 public:
  explicit Shared(T value = T{}) noexcept : value_(value) {}
  T get() const noexcept { return value_.load(std::memory_order_relaxed); }
  void set(T value) noexcept { value_.store(value, std::memory_order_relaxed); }
  void add(T more = T{1}) noexcept { set(get() + more); }

 private:
  std::atomic<T> value_;
};

// Hashes.

class Sha256 {
 public:
  static std::string hex(const std::string& data) {
    Sha256 sum;
    const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
    const std::size_t whole = data.size() / 64 * 64;
    for (std::size_t at = 0; at < whole; at += 64) sum.block(bytes + at);
    std::array<unsigned char, 128> tail{};
    const std::size_t rest = data.size() - whole, length = rest < 56 ? 64 : 128;
    std::copy(bytes + whole, bytes + data.size(), tail.begin());
    tail[rest] = 0x80;
    const std::uint64_t bits = std::uint64_t{data.size()} * 8;
    for (std::size_t i = 0; i < 8; ++i) tail[length - 1 - i] = static_cast<unsigned char>(bits >> (8 * i));
    for (std::size_t at = 0; at < length; at += 64) sum.block(tail.data() + at);
    std::string text;
    for (const std::uint32_t word : sum.state_) {
      for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[(word >> shift) & 15U];
    }
    return text;
  }

 private:
  static std::uint32_t rotated(std::uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

  void block(const unsigned char* bytes) {
    static constexpr std::array<std::uint32_t, 64> kRound{
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    std::array<std::uint32_t, 64> w{};
    for (std::size_t i = 0; i < 16; ++i) {
      w[i] = std::uint32_t{bytes[4 * i]} << 24 | std::uint32_t{bytes[4 * i + 1]} << 16 |
             std::uint32_t{bytes[4 * i + 2]} << 8 | std::uint32_t{bytes[4 * i + 3]};
    }
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[i - 7] +
             (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t one =
          h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      const std::uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    const std::array<std::uint32_t, 8> more{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state_[i] += more[i];
  }

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
};

// Numbers of an action box's type.

enum class NumberType { float16, float32, float64, whole };

inline double half(double x) noexcept {
  if (!std::isfinite(x) || x == 0.0) return x;
  const double step = std::ldexp(1.0, std::max(std::ilogb(x), -14) - 10);
  const double near = std::nearbyint(x / step) * step;
  return std::fabs(near) > 65504.0 ? std::copysign(kInfinity, x) : near;
}

/// The nearest number of a type; of whole numbers the next one towards zero, as a cast has it.
inline double cast(NumberType type, double x) noexcept {
  switch (type) {
    case NumberType::float16: return half(x);
    case NumberType::float32: return static_cast<double>(static_cast<float>(x));
    case NumberType::whole: return std::trunc(x);
    default: return x;
  }
}

/// The number of a type that is nearest to a bound and does not pass it; `side` is 1 for an upper one.
inline double inwards(NumberType type, double bound, double side) noexcept {
  if (type == NumberType::whole) return side > 0 ? std::floor(bound) : std::ceil(bound);
  const double near = cast(type, bound);
  if (!((near - bound) * side > 0)) return near;
  if (type == NumberType::float32) {
    return std::nextafter(static_cast<float>(near), static_cast<float>(-side * kInfinity));
  }
  const double step = std::ldexp(1.0, std::max(near == 0.0 ? -14 : std::ilogb(near), -14) - 10);
  const double closer = near - side * step / 2;  // representable below a power of two only
  return half(closer) == closer ? closer : near - side * step;
}

inline double largest_of(NumberType type) noexcept {
  switch (type) {
    case NumberType::float16: return 65504.0;
    case NumberType::float32: return static_cast<double>(std::numeric_limits<float>::max());
    default: return kLargest;
  }
}

inline double clipped(double x, double low, double high) noexcept { return std::min(std::max(x, low), high); }

// Reading JSON: every error names the file, the field, what was seen and what was expected.

/// A value in at most 60 characters of ASCII.
inline std::string written(const Json& value) { return value.dump(-1, ' ', true).substr(0, 60); }

class Fields {
 public:
  Fields(const Json& data, std::string where) : data_(data), where_(std::move(where)) {
    if (!data.is_object()) refuse(where_.substr(0, where_.find_last_not_of(": ") + 1) + " is no object of fields.");
  }

  bool has(const char* name) const { return data_.contains(name) && !data_.at(name).is_null(); }
  std::string name_of(const char* name) const { return where_ + (where_.back() == ' ' ? "" : ".") + name; }

  const Json& at(const char* name) const {
    if (!data_.contains(name)) refuse(name_of(name) + " is missing. Export the policy again.");
    return data_.at(name);
  }

  double number(const char* name) const { return as_number(at(name), name_of(name)); }
  std::optional<double> optional_number(const char* name) const {
    return has(name) ? std::optional<double>(number(name)) : std::nullopt;
  }

  std::size_t count(const char* name, std::size_t least, std::size_t most) const {
    const Json& value = at(name);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() < least || value.get<std::uint64_t>() > most) {
      fail(name, "a whole number, " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value.get<std::size_t>();
  }

  std::string text(const char* name) const {
    if (!at(name).is_string()) fail(name, "text");
    return at(name).get<std::string>();
  }
  std::string text(const char* name, const char* otherwise) const { return has(name) ? text(name) : otherwise; }

  bool truth(const char* name) const {
    if (!at(name).is_boolean()) fail(name, "true or false");
    return at(name).get<bool>();
  }

  /// Numbers, of which null is `missing`.
  Numbers numbers(const char* name, std::size_t size, double missing = kNaN) const {
    const Json& list = at(name);
    if (!list.is_array() || list.size() != size) fail(name, std::to_string(size) + " numbers");
    Numbers found;
    for (const Json& value : list) {
      if (value.is_null() && !std::isnan(missing)) found.push_back(missing);
      else found.push_back(as_number(value, name_of(name)));
    }
    return found;
  }

  [[noreturn]] void fail(const char* name, const std::string& expected) const {
    refuse(name_of(name) + " is " + written(at(name)) + "; expected " + expected + ".");
  }

 private:
  static double as_number(const Json& value, const std::string& name) {
    if (!value.is_number() || !std::isfinite(value.get<double>())) {
      refuse(name + " holds " + written(value) + "; expected finite numbers.");
    }
    return value.get<double>();
  }

  const Json& data_;
  std::string where_;
};

inline std::string read_file(const std::filesystem::path& folder, const std::string& name, std::uintmax_t most) {
  std::error_code error;
  const std::filesystem::path path = folder / name;
  if (!std::filesystem::exists(path, error)) {
    refuse("The policy folder " + folder.string() + " has no " + name + ". Give the folder that `meam export` wrote.",
           Status::not_found);
  }
  if (!std::filesystem::is_regular_file(path, error)) refuse(path.string() + " is no regular file.");
  if (std::filesystem::file_size(path, error) > most || error) {
    refuse(path.string() + " is too large; expected at most " + std::to_string(most) + " bytes.");
  }
  std::ifstream stream(path, std::ios::binary);
  std::string data{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  if (!stream.good() && !stream.eof()) refuse(path.string() + " cannot be read.", Status::not_found);
  return data;
}

inline Json parse(const std::string& text, const std::string& name) {
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    std::string reason = error.what();
    reason = reason.substr(std::min(reason.find("] ") + 2, reason.size())).substr(0, 120);
    for (char& each : reason) each = each >= ' ' && each <= '~' ? each : '?';
    refuse(name + " is not JSON: " + reason + ". Download or export the policy again.");
  }
}

/// What the policy and its robot are: the fields of config.json and robot.json that acting needs.
struct Contract {
  std::size_t observation_dim = 0, action_dim = 0, chunk_size = 0, execute_steps = 0, best_of = 1;
  std::vector<std::pair<std::string, std::size_t>> boxes;
  std::string graph_file, precision = "fp32", others;
  bool takes_prefix = false;
  double noise_scale = 1.0;
  NumberType type = NumberType::float64;
  Numbers mean, std, offset, low, high;
  std::optional<double> rate_hz, recorded_rate_hz;  // agreed, and of the training data
  // Of the robot; without one as if nothing were said.
  bool limited = false, stands_still = true, has_max_rate = false;
  std::optional<double> latency_budget_s, max_observation_age_s;
  double blend_in_s = 0.0;
  std::string on_failure;
  Numbers box_low, box_high, robot_low, robot_high, max_change, home, start_default;
  std::vector<std::ptrdiff_t> measured;  // index of the observation number that measures an action, or -1
  std::vector<bool> still;

  std::size_t chunk_dim() const { return chunk_size * action_dim; }
  std::size_t noise_dim() const { return best_of * chunk_dim(); }
};

inline NumberType type_of(const Fields& box) {
  const std::string name = box.text("dtype");
  if (name == "float16") return NumberType::float16;
  if (name == "float32") return NumberType::float32;
  if (name == "float64") return NumberType::float64;
  static const char* const whole[] = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"};
  if (std::find(std::begin(whole), std::end(whole), name) == std::end(whole)) {
    box.fail("dtype", "NumPy's name of a type");
  }
  return NumberType::whole;
}

inline std::size_t size_of(const Fields& box) {
  const Json& shape = box.at("shape");
  std::size_t size = 1;
  if (!shape.is_array() || shape.size() > 16) box.fail("shape", "a list of sizes");
  for (const Json& axis : shape) {
    const bool whole = axis.is_number_unsigned() && axis.get<std::uint64_t>() >= 1;
    if (!whole || axis.get<std::uint64_t>() > kMostNumbers / size) box.fail("shape", "at most 2^20 numbers");
    size *= axis.get<std::size_t>();
  }
  return size;
}

inline void read_action_box(const Fields& box, Contract& found) {
  found.action_dim = size_of(box);
  found.type = type_of(box);
  found.low = box.numbers("low", found.action_dim, kNaN);
  found.high = box.numbers("high", found.action_dim, kNaN);
  for (std::size_t i = 0; i < found.action_dim; ++i) {
    if (std::fabs(found.low[i]) > 1e18 || std::fabs(found.high[i]) > 1e18 || found.low[i] > found.high[i]) {
      refuse("config.json: the bounds of action number " + std::to_string(i) + " are " + shown(found.low[i]) + " and " +
             shown(found.high[i]) + "; expected a lower and an upper one within 1e18.");
    }
    const bool whole = found.type == NumberType::whole;
    const double most = largest_of(found.type);
    found.box_low.push_back(whole ? std::ceil(found.low[i]) : clipped(cast(found.type, found.low[i]), -most, most));
    found.box_high.push_back(whole ? std::floor(found.high[i]) : clipped(cast(found.type, found.high[i]), -most, most));
  }
}

inline std::string read_integration(const Fields& fields, Contract& found, const Fields* variant) {
  found.best_of = fields.has("best_of") ? fields.count("best_of", 1, kMostSteps) : 1;
  const std::size_t of_policy = found.best_of;
  if (variant == nullptr) return "policy.onnx";
  found.best_of = variant->has("best_of") ? variant->count("best_of", 1, kMostSteps) : 1;
  found.precision = variant->text("precision");
  const char* prefix = variant->has("takes_prefix") ? "takes_prefix" : "inpainting";  // its name in older files
  found.takes_prefix = variant->truth(prefix);
  if (found.best_of != of_policy) found.noise_scale = 1.0;  // the rule was for another number of samples
  return variant->text("file");
}

inline Contract read_config(const std::string& text, const std::string& variant,
                            std::map<std::string, std::string>& files) {
  const Json data = parse(text, "config.json");
  const Fields fields(data, "config.json: ");
  const Json& version = fields.at("format_version");
  if (!version.is_number_integer() || version != 1) {
    fields.fail("format_version", "1, which this header reads: take a newer one, or export the policy again");
  }
  Contract found;
  const Json& boxes = fields.at("observation");
  if (!boxes.is_array() || boxes.empty()) fields.fail("observation", "a list of boxes");
  for (const Json& each : boxes) {
    const Fields box(each, "config.json: observation");
    const std::size_t size = size_of(box);
    found.boxes.emplace_back(box.text("key", ""), size);
    found.observation_dim += size;
    if (found.observation_dim > kMostNumbers) fields.fail("observation", "at most 2^20 numbers");
  }
  read_action_box(Fields(fields.at("action"), "config.json: action"), found);
  found.chunk_size = fields.count("chunk_size", 1, kMostSteps);
  found.execute_steps = fields.count("execute_steps", 1, found.chunk_size);
  found.mean = fields.numbers("observation_mean", found.observation_dim);
  found.std = fields.numbers("observation_std", found.observation_dim);
  for (const double each : found.std) {
    if (!(each > 0)) fields.fail("observation_std", "numbers above 0");
  }
  found.offset = fields.has("observation_offset") ? fields.numbers("observation_offset", found.observation_dim)
                                                  : Numbers(found.observation_dim, 0.0);
  if (fields.has("acting")) {
    found.noise_scale = Fields(fields.at("acting"), "config.json: acting").number("noise_scale");
    if (found.noise_scale < 0 || found.noise_scale > 1) fields.fail("acting", "a noise_scale from 0 to 1");
  }
  found.rate_hz = found.recorded_rate_hz = fields.optional_number("control_rate_hz");
  if (found.rate_hz && !(*found.rate_hz > 0)) fields.fail("control_rate_hz", "a rate above 0, or null");
  const Json variants = fields.has("variants") ? fields.at("variants") : Json::object();
  if (!variants.is_object()) fields.fail("variants", "an object");
  for (const auto& [name, each] : variants.items()) {
    if (each.is_object() && each.contains("precision") && each.at("precision") == "fp32" && name != variant) {
      found.others += (found.others.empty() ? "" : ", ") + name;
    }
  }
  if (variant.empty()) {
    found.graph_file = read_integration(fields, found, nullptr);
  } else {
    if (!variants.contains(variant)) {
      refuse("The policy has no variant \"" + variant + "\"; expected none, or one that config.json names.",
             Status::bad_argument);
    }
    const Fields own(variants.at(variant), "config.json: variants[\"" + variant + "\"]");
    found.graph_file = read_integration(fields, found, &own);
  }
  const std::string& file = found.graph_file;
  const bool plain = file.find_first_of(std::string("/\\:\0", 4)) == std::string::npos;
  if (!plain || file.empty() || file == "." || file == "..") {
    refuse("config.json: the graph's file is \"" + file + "\"; expected a plain file name.");
  }
  if (found.chunk_dim() > (std::size_t{1} << 26) / found.best_of) {
    fields.fail("chunk_size", "at most 2^26 numbers of noise");
  }
  const Json& listed = fields.at("files");
  if (!listed.is_object()) fields.fail("files", "an object of hashes");
  for (const auto& [name, digest] : listed.items()) {
    if (!digest.is_string()) fields.fail("files", "an object of hashes");
    files[name] = digest.get<std::string>();
  }
  return found;
}

inline bool is_place(const std::string& kind) {
  return kind == "target/joint/position" || kind == "target/body/position" || kind == "target/body/orientation";
}

/// One number of robot.json, as far as acting needs it.
struct RobotNumber {
  std::string name, kind, unit, joint;
};

inline RobotNumber read_robot_number(const Fields& number) {
  return {number.text("name"), number.text("kind"), number.text("unit"), number.text("joint", "")};
}

inline void read_robot_action(const Fields& number, std::size_t i, const std::vector<RobotNumber>& observed,
                              Contract& found) {
  const RobotNumber own = read_robot_number(number);
  const std::string way = number.text("representation", "absolute");
  if (way != "absolute" && way != "delta_to_state" && way != "delta_to_last") {
    number.fail("representation", "absolute, delta_to_state or delta_to_last");
  }
  const std::optional<double> lower = number.optional_number("lower"), upper = number.optional_number("upper"),
                              max_rate = number.optional_number("max_rate"), home = number.optional_number("default");
  if (max_rate && !(*max_rate > 0)) number.fail("max_rate", "a number above 0");
  if (max_rate && !found.rate_hz) number.fail("max_rate", "a rate_hz beside it, since it is per second");
  const double step = max_rate ? *max_rate / *found.rate_hz : kInfinity;
  double least = found.box_low[i], most = found.box_high[i];
  if (way == "absolute") {
    found.max_change[i] = step;
  } else {
    least = std::max(least, -step), most = std::min(most, step);
  }
  if (lower) least = std::max(least, *lower);
  if (upper) most = std::min(most, *upper);
  found.robot_low[i] = inwards(found.type, least, -1.0);
  found.robot_high[i] = inwards(found.type, most, 1.0);
  if (found.robot_low[i] > found.robot_high[i]) {
    refuse("robot.json: action[" + std::to_string(i) + "] has nothing between " + shown(least) + " and " + shown(most) +
           "; expected limits that leave values.");
  }
  found.has_max_rate = found.has_max_rate || max_rate.has_value();
  found.still[i] = is_place(own.kind) && way == "absolute";
  found.stands_still = found.stands_still && found.still[i];
  found.start_default[i] = home.value_or(kNaN);
  if (own.kind != "target/joint/position") return;
  for (std::size_t j = 0; j < observed.size() && found.measured[i] < 0; ++j) {
    const RobotNumber& each = observed[j];
    if (each.kind == "state/joint/position" && each.joint == own.joint && each.unit == own.unit) {
      found.measured[i] = static_cast<std::ptrdiff_t>(j);
    }
  }
}

inline void read_robot(const std::string& text, Contract& found) {
  const Json data = parse(text, "robot.json");
  const Fields fields(data, "robot.json: ");
  const Json& version = fields.at("format_version");
  if (!version.is_number_integer() || version != 1) {
    fields.fail("format_version", "1, which this header reads: take a newer one, or export the policy again");
  }
  const Json nothing = Json::object();
  const Fields timing(fields.has("timing") ? fields.at("timing") : nothing, "robot.json: timing");
  const auto positive = [&timing](const char* name) {
    const std::optional<double> value = timing.optional_number(name);
    if (value && !(*value > 0)) timing.fail(name, "a number above 0");
    return value;
  };
  if (const std::optional<double> rate = positive("rate_hz")) {
    if (found.recorded_rate_hz && std::fabs(*rate / *found.recorded_rate_hz - 1) > kRateTolerance) {
      timing.fail("rate_hz", shown(*found.recorded_rate_hz) + ", the rate that the policy was trained at");
    }
    found.rate_hz = rate;
  }
  found.max_observation_age_s = positive("max_observation_age_s");
  if (const std::optional<double> budget = positive("latency_budget_ms")) found.latency_budget_s = *budget / 1e3;
  found.blend_in_s = timing.optional_number("blend_in_s").value_or(0.0);
  if (found.blend_in_s < 0) timing.fail("blend_in_s", "0 or more seconds");
  found.on_failure = timing.text("on_failure", "");
  for (const char* known : {"", "hold", "neutral", "home", "disable", (const char*)nullptr}) {
    if (known == nullptr) timing.fail("on_failure", "hold, neutral, home or disable");
    if (found.on_failure == known) break;
  }
  const auto listed = [&](const char* name, std::size_t size) -> const Json& {
    static const Json none = Json::array();
    const Json& list = fields.has(name) ? fields.at(name) : none;
    if (!list.is_array() || (!list.empty() && list.size() != size)) {
      fields.fail(name, "entries for all " + std::to_string(size) + " numbers, or for none");
    }
    return list;
  };
  std::vector<RobotNumber> observed;
  for (const Json& each : listed("observation", found.observation_dim)) {
    const std::string where = "robot.json: observation[" + std::to_string(observed.size()) + "]";
    observed.push_back(read_robot_number(Fields(each, where)));
  }
  const Json& actions = listed("action", found.action_dim);
  found.limited = !actions.empty();
  for (std::size_t i = 0; i < actions.size(); ++i) {
    read_robot_action(Fields(actions[i], "robot.json: action[" + std::to_string(i) + "]"), i, observed, found);
  }
  if (found.on_failure == "hold" && !found.stands_still) {
    timing.fail("on_failure", "neutral or disable, since a repeated action would go on moving");
  }
}

inline Contract read_folder(const std::filesystem::path& folder, const std::string& variant, std::string& graph) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    refuse("The policy folder " + folder.string() + " does not exist. Give the folder that `meam export` wrote.",
           Status::not_found);
  }
  std::map<std::string, std::string> files;
  Contract found = read_config(read_file(folder, "config.json", kMostConfigBytes), variant, files);
  const auto checked = [&](const std::string& name, std::uintmax_t most) {
    if (files.count(name) == 0) refuse("config.json records no hash of " + name + ".", Status::damaged);
    std::string bytes = read_file(folder, name, most);
    if (bytes.rfind("version https://git-lfs", 0) == 0) {
      refuse(name + " is a git-lfs pointer, not the file. Run `git lfs pull`.");
    }
    const std::string seen = Sha256::hex(bytes);
    if (seen != files[name]) {
      refuse(name + " has SHA-256 " + seen.substr(0, 16) + "..., but config.json records " + files[name].substr(0, 16) +
                 "...: it is damaged, or of another export. Copy the whole folder again.",
             Status::damaged);
    }
    return bytes;
  };
  found.robot_low = found.box_low, found.robot_high = found.box_high;
  found.max_change.assign(found.action_dim, kInfinity);
  found.start_default.assign(found.action_dim, kNaN);
  found.measured.assign(found.action_dim, -1);
  found.still.assign(found.action_dim, false);
  if (files.count("robot.json") != 0 || std::filesystem::exists(folder / "robot.json", error)) {
    read_robot(checked("robot.json", kMostConfigBytes), found);
  }
  const auto homeless = [](double each) { return std::isnan(each); };
  if (std::none_of(found.start_default.begin(), found.start_default.end(), homeless)) {
    for (std::size_t i = 0; i < found.action_dim; ++i) {
      found.home.push_back(clipped(found.start_default[i], found.robot_low[i], found.robot_high[i]));
    }
  }
  graph = checked(found.graph_file, kMostGraphBytes);
  return found;
}

// The network.

/// Standard normal draws, the same for the same seed on every machine with the same mathematical library.
class Noise {
 public:
  explicit Noise(std::optional<std::uint64_t> seed) {
    std::random_device device;
    reseed(seed ? *seed : std::uint64_t{device()} << 32 | device());
  }

  void reseed(std::uint64_t seed) noexcept {
    engine_.seed(seed);
    spare_ = kNaN;
  }

  void draw(float* out, std::size_t size, double scale) noexcept {
    for (std::size_t i = 0; i < size; ++i) {
      out[i] = scale == 0 ? 0.0F : static_cast<float>(next()) * static_cast<float>(scale);
    }
  }

 private:
  // Box and Muller; the library's own distribution differs from one to another.
  double next() noexcept {
    if (!std::isnan(spare_)) return std::exchange(spare_, kNaN);
    const double radius = std::sqrt(-2.0 * std::log(uniform())), angle = 6.283185307179586 * uniform();
    spare_ = radius * std::sin(angle);
    return radius * std::cos(angle);
  }

  double uniform() noexcept { return (static_cast<double>(engine_() >> 11) + 0.5) * 0x1p-53; }

  std::mt19937_64 engine_;
  double spare_ = kNaN;
};

inline Ort::Env& environment() {
#ifndef _WIN32
  ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // from 1.29 on official builds send events unless told not to
#endif
  static Ort::Env made(ORT_LOGGING_LEVEL_ERROR, "meam_policy");
  return made;
}

inline std::string runtime_version() { return OrtGetApiBase()->GetVersionString(); }

/// Whether a version such as "1.21.0" is older than 1.`minor`.
inline bool older_than(const std::string& version, int minor) {
  int first = 0, second = 0;
  return std::sscanf(version.c_str(), "%d.%d", &first, &second) == 2 && (first < 1 || (first == 1 && second < minor));
}

/// A graph, and buffers of its inputs and outputs, at addresses that never change.
class Network {
 public:
  Network(const Contract& contract, const std::string& graph) : name_(contract.graph_file) {
    const std::string version = runtime_version();
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
      refuse("This program was compiled with the headers of onnxruntime 1." + std::to_string(ORT_API_VERSION) +
                 ", and runs with the library of " + version + "; expected one that is not older.",
             Status::old_runtime);
    }
    if (contract.precision == "int8" && older_than(version, 22)) {
      refuse(name_ + " has 8-bit weights, which need onnxruntime 1.22 or newer; this is " + version +
                 ". Take the policy itself, without a variant" +
                 (contract.others.empty() ? "" : ", or one of its variants " + contract.others) +
                 ", or a newer onnxruntime.",
             Status::old_runtime);
    }
    try {
      Ort::SessionOptions options;
      options.SetIntraOpNumThreads(1);
      options.SetInterOpNumThreads(1);
      options.AddConfigEntry("session.intra_op.allow_spinning", "0");
      options.SetGraphOptimizationLevel(GraphOptimizationLevel::ORT_ENABLE_ALL);
      options.SetLogSeverityLevel(3);
      session_ = Ort::Session(environment(), graph.data(), graph.size(), options);
    } catch (const std::exception& error) {
      refuse(name_ + " cannot be loaded by onnxruntime " + version + ": " + line(error));
    }
    bind(contract);
  }

  /// Compute a chunk; false, with a message, if onnxruntime failed.
  bool run(Message& message) noexcept {
    try {
      session_.Run(Ort::RunOptions{nullptr}, input_names_.data(), inputs_.data(), inputs_.size(), output_names_.data(),
                   outputs_.data(), outputs_.size());
      return true;
    } catch (const std::exception& error) {
      message.write("%s failed while it ran; no action is returned: %.200s", name_.c_str(), error.what());
    } catch (...) {
      message.write("%s failed while it ran; no action is returned.", name_.c_str());
    }
    return false;
  }

  std::vector<float> observation, noise, prefix, prefix_weight, actions, value, disagreement;

 private:
  static std::string line(const std::exception& error) {
    const std::string text = error.what();
    return text.substr(0, std::min(text.find('\n'), std::size_t{200}));
  }

  void bind(const Contract& contract) {
    const auto number = [](std::size_t size) { return static_cast<std::int64_t>(size); };
    const std::int64_t steps = number(contract.chunk_size), action = number(contract.action_dim);
    const bool several = contract.best_of > 1;
    std::vector<std::int64_t> noise_shape{1, number(contract.noise_dim())};
    if (several) noise_shape = {1, number(contract.best_of), number(contract.chunk_dim())};
    // A dynamic axis is -1: the batch, and the samples of one decision.
    add(true, "observation", observation, {1, number(contract.observation_dim)}, 1);
    add(true, "noise", noise, noise_shape, several ? 2 : 1);
    if (contract.takes_prefix) {
      add(true, "prefix", prefix, {1, steps, action}, 1);
      add(true, "prefix_weight", prefix_weight, {1, steps}, 1);
    }
    add(false, "actions", actions, {1, steps, action}, 1);
    if (several) {
      add(false, "value", value, {1}, 1);
      add(false, "disagreement", disagreement, {1}, 1);
    }
    if (session_.GetInputCount() != inputs_.size() || session_.GetOutputCount() != outputs_.size()) {
      refuse(name_ + " has " + std::to_string(session_.GetInputCount()) + " inputs and " +
             std::to_string(session_.GetOutputCount()) + " outputs; expected " + std::to_string(inputs_.size()) +
             " and " + std::to_string(outputs_.size()) + ", as config.json says.");
    }
  }

  void add(bool input, const char* name, std::vector<float>& buffer, const std::vector<std::int64_t>& shape,
           std::size_t free) {
    Ort::AllocatorWithDefaultOptions allocator;
    const std::size_t count = input ? session_.GetInputCount() : session_.GetOutputCount();
    for (std::size_t i = 0; i < count; ++i) {
      const auto own =
          input ? session_.GetInputNameAllocated(i, allocator) : session_.GetOutputNameAllocated(i, allocator);
      if (std::strcmp(own.get(), name) != 0) continue;
      const Ort::TypeInfo type = input ? session_.GetInputTypeInfo(i) : session_.GetOutputTypeInfo(i);
      require(name, type, shape, free);
      std::size_t size = 1;
      for (const std::int64_t axis : shape) size *= static_cast<std::size_t>(axis);
      buffer.assign(size, 0.0F);
      const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
      (input ? inputs_ : outputs_)
          .push_back(Ort::Value::CreateTensor<float>(memory, buffer.data(), size, shape.data(), shape.size()));
      (input ? input_names_ : output_names_).push_back(name);
      return;
    }
    refuse(name_ + " has no " + (input ? "input" : "output") + " \"" + name +
           "\", which config.json leads to expect. Export it with `meam export`.");
  }

  void require(const char* name, const Ort::TypeInfo& type, const std::vector<std::int64_t>& shape,
               std::size_t free) const {
    bool fits = type.GetONNXType() == ONNX_TYPE_TENSOR;
    std::string seen;
    if (fits) {
      const auto tensor = type.GetTensorTypeAndShapeInfo();
      const std::vector<std::int64_t> own = tensor.GetShape();
      fits = tensor.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && own.size() == shape.size();
      for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
        fits = own[axis] == shape[axis] || (axis < free && own[axis] == -1);
      }
      for (const std::int64_t axis : own) seen += (seen.empty() ? "" : ", ") + std::to_string(axis);
    }
    if (fits) return;
    std::string wanted;
    for (const std::int64_t axis : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(axis);
    refuse(name_ + ": \"" + name + "\" is [" + seen + "] (-1 for any size); expected float32 [" + wanted +
           "], as config.json says.");
  }

  std::string name_;
  Ort::Session session_{nullptr};
  std::vector<const char*> input_names_, output_names_;
  std::vector<Ort::Value> inputs_, outputs_;
};

// The safety shell.

/// Counters that the threads of a control loop share.
struct Counters {
  Shared<std::uint64_t> steps, inferences, bad_observations, bad_actions, out_of_bounds, unfamiliar, limited,
      rate_limited, replaced;
  Shared<double> unfamiliarity{kNaN}, max_unfamiliarity{kNaN}, value{kNaN}, disagreement{kNaN};
};

/// Judges observations and limits actions: the `SafetyShell` of Python, for one slot.
class Shell {
 public:
  Shell(const Contract& contract, const SafetySettings& settings, Counters& counters)
      : contract_(contract), counters_(counters), limit_(settings.unfamiliarity_limit) {
    if (!(limit_ > 0)) {
      refuse("unfamiliarity_limit is " + shown(limit_) + "; expected a number above 0.", Status::bad_argument);
    }
    const std::string& word = contract.on_failure;
    const Reaction agreed = word == "hold"      ? Reaction::hold
                            : word == "neutral" ? Reaction::neutral
                            : word == "home"    ? Reaction::home
                                                : Reaction::raise;
    const Reaction usual = !word.empty() ? agreed : contract.stands_still ? Reaction::hold : Reaction::neutral;
    on_bad_observation_ = reaction("on_bad_observation", settings.on_bad_observation, agreed);
    on_bad_action_ = reaction("on_bad_action", settings.on_bad_action, agreed);
    on_unfamiliar_ = reaction("on_unfamiliar", settings.on_unfamiliar, usual);
    rate_ = contract.max_change;
    if (!settings.rate_limit.empty()) {
      const Numbers& given = settings.rate_limit;
      const bool positive = std::all_of(given.begin(), given.end(), [](double each) { return each > 0; });
      if (!positive || (given.size() != 1 && given.size() != contract.action_dim)) {
        refuse("rate_limit has " + std::to_string(given.size()) + " numbers; expected one above 0, or " +
                   std::to_string(contract.action_dim) + " of them.",
               Status::bad_argument);
      }
      for (std::size_t i = 0; i < rate_.size(); ++i) rate_[i] = given[given.size() == 1 ? 0 : i];
    }
    slows_ = std::any_of(rate_.begin(), rate_.end(), [](double each) { return std::isfinite(each); });
    for (std::size_t i = 0; i < contract.action_dim; ++i) {
      neutral_.push_back(clipped(0.0, contract.robot_low[i], contract.robot_high[i]));
    }
    last_ = neutral_;
  }

  void reset() noexcept { acted_ = false; }
  Reaction on_bad_action() const noexcept { return on_bad_action_; }

  /// Judge a row; `count` if it may be acted on, else what to do instead; `raise` comes with a message.
  Reaction judge(const float* row, Message& message) noexcept {
    bool finite = true;
    double distance = 0.0;
    std::size_t worst = 0;
    for (std::size_t i = 0; i < contract_.observation_dim; ++i) {
      if (finite && !std::isfinite(row[i])) finite = false, worst = i;
      distance = std::max(distance, std::fabs((static_cast<double>(row[i]) - contract_.mean[i]) / contract_.std[i]));
    }
    if (!finite) {
      counters_.bad_observations.add();
      if (on_bad_observation_ == Reaction::raise) {
        message.write("Observation is %g at index %zu, beyond the finite numbers of float32. Check the sensor.",
                      static_cast<double>(row[worst]), worst);
      }
      return on_bad_observation_;
    }
    const double noted = std::min(distance, kLargest);
    counters_.unfamiliarity.set(noted);
    if (!(counters_.max_unfamiliarity.get() >= noted)) counters_.max_unfamiliarity.set(noted);
    if (!(distance > limit_)) return Reaction::count;
    counters_.unfamiliar.add();
    if (on_unfamiliar_ == Reaction::raise) {
      message.write("The observation is %.3g standard deviations from the training data; expected at most %g. Check "
                    "units and order of its numbers.", noted, limit_);
    }
    return on_unfamiliar_;
  }

  /// The action in place of the policy's.
  const Numbers& instead(Reaction reaction) noexcept {
    counters_.replaced.add();
    if (reaction == Reaction::home) return contract_.home;
    return reaction == Reaction::hold && acted_ ? last_ : neutral_;
  }

  /// Bring an action within bounds, limits, rate and type, remember it, and write it.
  template <class In, class Out>
  void limit(const In* action, Out* out) noexcept {
    bool limited = false, slowed = false;
    for (std::size_t i = 0; i < contract_.action_dim; ++i) {
      double x = clipped(static_cast<double>(action[i]), contract_.box_low[i], contract_.box_high[i]);
      if (contract_.limited) {
        const double within = x;
        x = clipped(x, contract_.robot_low[i], contract_.robot_high[i]);
        limited = limited || x != within;
      }
      if (slows_ && acted_) {
        const double wanted = x;
        x = clipped(x, last_[i] - rate_[i], last_[i] + rate_[i]);
        slowed = slowed || x != wanted;
      }
      if (contract_.type == NumberType::whole) x = std::nearbyint(x);
      last_[i] = cast(contract_.type, x);
      out[i] = static_cast<Out>(last_[i]);
    }
    acted_ = true;
    counters_.limited.add(limited);
    counters_.rate_limited.add(slowed);
    counters_.steps.add();
  }

 private:
  Reaction reaction(const char* name, Reaction given, Reaction agreed) const {
    const Reaction chosen = given == Reaction::contract ? agreed : given;
    if (chosen == Reaction::home && contract_.home.empty()) {
      refuse(std::string(name) + " is home; expected another reaction, since no robot.json says where home is: a "
             "default of every action.", Status::bad_argument);
    }
    if (chosen == Reaction::count && std::strcmp(name, "on_unfamiliar") != 0) {
      refuse(std::string(name) + " is count; expected raise, hold, neutral, home or contract.", Status::bad_argument);
    }
    return chosen;
  }

  const Contract& contract_;
  Counters& counters_;
  double limit_;
  Reaction on_bad_observation_, on_bad_action_, on_unfamiliar_;
  Numbers rate_, neutral_, last_;
  bool slows_ = false, acted_ = false;
};

}  // namespace detail

class Loop;

/// A policy folder, ready to act.
///
/// One thread acts; `health` may be read from any. Only the constructor throws, and no call after it blocks. A tick
/// that takes a queued action allocates nothing.
class Policy {
 public:
  /// Load a folder: check its hashes and its graph's signature, and run it once.
  ///
  /// Throws Error: a file is missing, damaged, of another format or of a newer onnxruntime, or an option does not fit.
  explicit Policy(const std::filesystem::path& folder, const PolicyOptions& options = {})
      : contract_(detail::read_folder(folder, options.variant, graph_)),
        network_(contract_, graph_),
        noise_(options.seed),
        shell_(contract_, options.safety, counters_),
        row_(contract_.observation_dim),
        chunk_(contract_.chunk_dim()),
        queued_(contract_.execute_steps) {
    graph_ = std::string();
    if (options.noise_scale) contract_.noise_scale = *options.noise_scale;
    if (!(contract_.noise_scale >= 0 && contract_.noise_scale <= 1)) {
      detail::refuse("noise_scale is " + detail::shown(contract_.noise_scale) + "; expected 0 to 1.",
                     Status::bad_argument);
    }
    for (std::size_t i = 0; i < contract_.action_dim; ++i) {
      chunk_low_.push_back(static_cast<float>(contract_.low[i]));
      chunk_high_.push_back(static_cast<float>(contract_.high[i]));
    }
    std::copy(contract_.mean.begin(), contract_.mean.end(), network_.observation.begin());
    for (int warm = 0; warm < 2; ++warm) network_.run(message_);  // what fails here, acting reports
    message_.write("%s", "");
  }

  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  std::size_t observation_dim() const noexcept { return contract_.observation_dim; }
  std::size_t action_dim() const noexcept { return contract_.action_dim; }
  std::size_t chunk_size() const noexcept { return contract_.chunk_size; }
  std::size_t execute_steps() const noexcept { return contract_.execute_steps; }
  std::size_t noise_dim() const noexcept { return contract_.noise_dim(); }
  bool takes_prefix() const noexcept { return contract_.takes_prefix; }
  /// Actions per second that robot.json, or else the training data, asks for; 0 if nobody says.
  double rate_hz() const noexcept { return contract_.rate_hz.value_or(0.0); }
  /// Keys and sizes of the boxes of an observation, in the order of its numbers; the key of a single box is empty.
  const std::vector<std::pair<std::string, std::size_t>>& observation_boxes() const noexcept { return contract_.boxes; }

  /// Write the next action; the network runs only when the current chunk is used up.
  ///
  /// Numbers are double or float, in the order of config.json's boxes, in environment units. Without an action, nothing
  /// is written, and `last_error` says why.
  template <class In, class Out>
  [[nodiscard]] Status act(const In* observation, std::size_t size, Out* action, std::size_t action_size) noexcept {
    return act(observation, size, static_cast<const In*>(nullptr), 0, action, action_size);
  }

  /// The same with noise for the chunk that begins now, where one does: `noise_dim` standard normal numbers.
  template <class In, class Given, class Out>
  [[nodiscard]] Status act(const In* observation, std::size_t size, const Given* noise, std::size_t noise_size,
                           Out* action, std::size_t action_size) noexcept {
    if (!flatten(observation, size) || !fits("action", action_size, action_dim()) || !takes(noise, noise_size)) {
      return Status::bad_observation;
    }
    detail::Message& message = message_;
    Reaction reaction = shell_.judge(row_.data(), message);
    if (reaction == Reaction::raise) return Status::bad_observation;
    if (reaction == Reaction::count && queued_ >= contract_.execute_steps) {
      prepare(noise == nullptr);
      if (!infer(message)) return Status::no_action;
      if (!finite_chunk()) {
        counters_.bad_actions.add();
        reaction = shell_.on_bad_action();
        if (reaction == Reaction::raise) {
          refuse_chunk(message);
          return Status::no_action;
        }
      } else {
        std::copy(network_.actions.begin(), network_.actions.end(), chunk_.begin());
        queued_ = 0;
      }
    }
    if (reaction != Reaction::count) {
      shell_.limit(shell_.instead(reaction).data(), action);
      queued_ = contract_.execute_steps;  // what is left of the chunk is for a state that the robot has left
      return Status::ok;
    }
    shell_.limit(chunk_.data() + queued_ * action_dim(), action);
    ++queued_;
    return Status::ok;
  }

  /// The same for containers with data() and size(), such as std::array, std::vector and Eigen's vectors.
  template <class Observation, class Action>
  [[nodiscard]] Status act(const Observation& observation, Action& action) noexcept {
    return act(std::data(observation), std::size(observation), std::data(action), std::size(action));
  }

  /// Write a whole chunk [chunk_size, action_dim], without touching the queued actions; noise is drawn where none
  /// (null) is given. Neither limits nor rates of robot.json hold for it: they are those of executed actions.
  template <class In, class Given, class Out>
  [[nodiscard]] Status predict_chunk(const In* observation, std::size_t size, const Given* noise,
                                     std::size_t noise_size, Out* chunk, std::size_t chunk_numbers) noexcept {
    if (!flatten(observation, size) || !fits("chunk", chunk_numbers, contract_.chunk_dim()) ||
        !takes(noise, noise_size) || !finite_row()) {
      return Status::bad_observation;
    }
    prepare(noise == nullptr);
    if (!infer(message_)) return Status::no_action;
    if (!finite_chunk()) {
      refuse_chunk(message_);
      return Status::no_action;
    }
    std::copy(network_.actions.begin(), network_.actions.end(), chunk);
    return Status::ok;
  }

  /// Begin a new episode: drop queued actions, and forget the last one. The noise goes on as it is.
  void reset() noexcept {
    queued_ = contract_.execute_steps;
    shell_.reset();
  }

  /// The same, with noise from a seed.
  void reset(std::uint64_t seed) noexcept {
    reset();
    noise_.reseed(seed);
  }

  /// What happened since the policy was loaded; from any thread, at any time.
  Health health() const noexcept {
    const detail::Counters& c = counters_;
    return {c.steps.get(),        c.inferences.get(),   c.bad_observations.get(), c.bad_actions.get(),
            c.out_of_bounds.get(), c.unfamiliar.get(),   c.limited.get(),          c.rate_limited.get(),
            c.replaced.get(),     c.unfamiliarity.get(), c.max_unfamiliarity.get(), c.value.get(),
            c.disagreement.get()};
  }

  /// Why the last call gave no action: one sentence or two; the text is valid until the next call.
  const char* last_error() const noexcept { return message_.text(); }

 private:
  friend class Loop;

  template <class In>
  bool flatten(const In* observation, std::size_t size) noexcept {
    if (!fits("observation", size, contract_.observation_dim)) return false;
    for (std::size_t i = 0; i < size; ++i) {
      row_[i] = static_cast<float>(static_cast<double>(observation[i]) - contract_.offset[i]);
    }
    return true;
  }

  bool finite_row() noexcept {
    if (std::all_of(row_.begin(), row_.end(), [](float each) { return std::isfinite(each); })) return true;
    message_.write("Observation holds NaN or infinity; expected finite numbers of float32. Check the sensor.");
    return false;
  }

  bool fits(const char* what, std::size_t seen, std::size_t expected) noexcept {
    if (seen == expected) return true;
    message_.write("The %s has %zu numbers; expected %zu.", what, seen, expected);
    return false;
  }

  template <class Given>
  bool takes(const Given* noise, std::size_t size) noexcept {
    if (noise == nullptr) return true;
    if (!fits("noise", size, noise_dim())) return false;
    for (std::size_t i = 0; i < size; ++i) {
      network_.noise[i] = static_cast<float>(noise[i]);
      if (!std::isfinite(network_.noise[i])) {
        message_.write("Noise holds NaN or infinity; expected finite numbers of float32.");
        return false;
      }
    }
    return true;
  }

  /// Fill the network's inputs, without a prefix; noise that was given is there already.
  void prepare(bool draws) noexcept {
    if (draws) noise_.draw(network_.noise.data(), noise_dim(), contract_.noise_scale);
    std::copy(row_.begin(), row_.end(), network_.observation.begin());
    std::fill(network_.prefix.begin(), network_.prefix.end(), 0.0F);
    std::fill(network_.prefix_weight.begin(), network_.prefix_weight.end(), 0.0F);
  }

  /// Run the network and bring its finite numbers within the bounds.
  bool infer(detail::Message& message) noexcept {
    counters_.inferences.add();
    if (!network_.run(message)) return false;
    if (contract_.best_of > 1) {
      const auto known = [](float x) { return std::isfinite(x) ? static_cast<double>(x) : detail::kNaN; };
      counters_.value.set(known(network_.value[0]));
      counters_.disagreement.set(known(network_.disagreement[0]));
    }
    bool outside = false;
    std::size_t number = 0;
    for (float& x : network_.actions) {
      const float low = chunk_low_[number], high = chunk_high_[number];
      number = number + 1 == contract_.action_dim ? 0 : number + 1;
      if (!std::isfinite(x) || (x >= low && x <= high)) continue;
      outside = true;
      x = std::min(std::max(x, low), high);
    }
    counters_.out_of_bounds.add(outside);
    return true;
  }

  bool finite_chunk() const noexcept {
    return std::all_of(network_.actions.begin(), network_.actions.end(), [](float x) { return std::isfinite(x); });
  }

  static void refuse_chunk(detail::Message& message) noexcept {
    message.write("The policy produced NaN or infinity; no action is returned. The observation may be far outside the "
                  "training data.");
  }

  std::string graph_;
  detail::Contract contract_;
  detail::Network network_;
  detail::Noise noise_;
  detail::Counters counters_;
  detail::Shell shell_;
  detail::Message message_;
  std::vector<float> row_, chunk_, chunk_low_, chunk_high_;
  std::size_t queued_;  // position in the chunk; execute_steps if it is used up
};

// The control loop.

/// How one chunk follows another: see Python's `ControlLoop`, whose modes these are.
enum class Chunking { realtime, naive, blocking };

/// What a tick gives for which there is no action; `contract` follows robot.json, or holds.
enum class Overrun { contract, hold, repeat, zero, home, stop };

struct LoopOptions {
  double rate_hz = 0;  ///< ticks per second; 0 follows robot.json, or else the training data
  Chunking chunking = Chunking::realtime;
  Overrun overrun = Overrun::contract;
  std::size_t execute_steps = 0;                ///< ticks from one inference to the next; 0 for the policy's own
  std::optional<double> max_observation_age_s;  ///< none follows robot.json; infinity is for any age
  std::optional<double> blend_in_s;             ///< none follows robot.json
  std::optional<int> expected_delay;   ///< ticks that an inference takes; none expects the longest of the last ten
  std::optional<int> simulated_delay;  ///< ticks that every inference takes, without a thread and without a clock
  bool any_rate = false;               ///< accept another rate than that of the training data
  std::function<double()> clock;       ///< seconds, monotonic, from any thread; none takes `Loop::now`
  std::function<void()> on_thread_start;  ///< called first in the second thread, e.g. to set its priority
};

/// How a control loop is doing: the fields of Python's `LoopHealth`. Not a number where nothing is known.
struct LoopHealth {
  std::uint64_t ticks = 0;
  std::uint64_t inferences = 0;
  std::uint64_t failed_inferences = 0;
  std::uint64_t overruns = 0;
  std::uint64_t missed_deadlines = 0;
  std::uint64_t stale_observations = 0;
  std::uint64_t over_budget = 0;
  double latency_last_ms = std::numeric_limits<double>::quiet_NaN();
  double latency_p50_ms = std::numeric_limits<double>::quiet_NaN();
  double latency_p99_ms = std::numeric_limits<double>::quiet_NaN();
  std::int64_t delay_ticks = 0;
  bool stopped = false;
};

namespace detail {

/// Wakes one thread from another, without a lock where the system has semaphores.
class Signal {
 public:
#ifdef __linux__
  Signal() { sem_init(&semaphore_, 0, 0); }
  ~Signal() { sem_destroy(&semaphore_); }
  void post() noexcept { sem_post(&semaphore_); }
  void wait() noexcept {
    while (sem_wait(&semaphore_) != 0) {  // interrupted by a system signal
    }
  }
#else
  Signal() = default;
  ~Signal() = default;
  void post() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++count_;
    changed_.notify_one();
  }
  void wait() noexcept {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return count_ > 0; });
    --count_;
  }
#endif
  Signal(const Signal&) = delete;
  Signal& operator=(const Signal&) = delete;

 private:
#ifdef __linux__
  sem_t semaphore_;
#else
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t count_ = 0;
#endif
};

/// The latest of what one thread publishes, for one other thread; neither ever waits for the other.
template <class T>
class Latest {
 public:
  std::array<T, 3>& slots() noexcept { return slots_; }
  T& to_write() noexcept { return slots_[back_]; }
  void publish() noexcept { back_ = middle_.exchange(back_ | kNew, std::memory_order_acq_rel) & ~kNew; }
  bool take() noexcept {
    if ((middle_.load(std::memory_order_relaxed) & kNew) == 0) return false;
    front_ = middle_.exchange(front_, std::memory_order_acq_rel) & ~kNew;
    return true;
  }
  const T& taken() const noexcept { return slots_[front_]; }

 private:
  static constexpr unsigned kNew = 4;
  std::array<T, 3> slots_;
  unsigned back_ = 0, front_ = 1;
  std::atomic<unsigned> middle_{2};
};

/// One inference that a loop asks for. Seeds are counted: one that was given holds for every request after it.
struct ChunkRequest {
  std::int64_t tick = 0;
  bool opening = false;
  std::uint64_t generation = 0, seed = 0, seeds_given = 0;
  std::vector<float> row, prefix, prefix_weight;
};

struct ChunkAnswer {
  std::int64_t tick = 0;
  bool opening = false, good = false;
  std::uint64_t generation = 0;
  double seconds = 0;
  Numbers chunk;
  Message message;
};

/// How strongly a new chunk must equal the running one: see Python's `prefix_weights`.
inline void prefix_weights(float* out, std::size_t chunk_size, std::int64_t delay, std::int64_t executed) noexcept {
  const double overlap = static_cast<double>(chunk_size) - static_cast<double>(executed);
  const double reached = std::min(static_cast<double>(delay), overlap);
  for (std::size_t i = 0; i < chunk_size; ++i) {
    const double c = clipped((overlap - static_cast<double>(i)) / (overlap - reached + 1), 0.0, 1.0);
    out[i] = static_cast<float>(c * std::expm1(c) / std::expm1(1.0));
  }
}

/// The running chunk, and the tick at which its first action was, or would have been, due.
class Schedule {
 public:
  Schedule(bool blocking, const Contract& contract, std::size_t execute_steps)
      : blocking_(blocking),
        action_(contract.action_dim),
        size_(static_cast<std::int64_t>(contract.chunk_size)),
        steps_(static_cast<std::int64_t>(execute_steps)),
        chunk_(contract.chunk_dim()) {}

  bool empty() const noexcept { return empty_; }
  void clear() noexcept { empty_ = true; }

  void begin(const Numbers& chunk, std::int64_t tick) noexcept {
    std::copy(chunk.begin(), chunk.end(), chunk_.begin());
    start_ = tick, empty_ = false;
  }

  bool is_due(std::int64_t tick, std::int64_t delay) const noexcept {
    if (blocking_) return tick - start_ >= steps_;
    // Sooner than execute_steps if otherwise the running chunk would end before the next one is there.
    return tick - start_ >= std::max<std::int64_t>(1, std::min(steps_, size_ - delay));
  }

  /// The action of a tick; null if the chunk is used up.
  const double* action(std::int64_t tick) const noexcept {
    const std::int64_t index = tick - start_;
    return index >= (blocking_ ? steps_ : size_) ? nullptr : at(index);
  }

  const double* repeated(std::int64_t tick) const noexcept { return at((tick - start_) % size_); }

  /// The rest of the running chunk, for one that is asked for at this tick, and its weights.
  void prefix(std::int64_t tick, std::int64_t delay, ChunkRequest& request) const noexcept {
    const std::int64_t executed = empty_ ? size_ : std::min(tick - start_, size_);
    const auto skipped = static_cast<std::size_t>(executed) * action_;
    std::fill(request.prefix.begin(), request.prefix.end(), 0.0F);
    for (std::size_t i = skipped; i < chunk_.size(); ++i) request.prefix[i - skipped] = static_cast<float>(chunk_[i]);
    prefix_weights(request.prefix_weight.data(), static_cast<std::size_t>(size_), delay, executed);
  }

 private:
  const double* at(std::int64_t index) const noexcept {
    return chunk_.data() + static_cast<std::size_t>(index) * action_;
  }

  bool blocking_, empty_ = true;
  std::size_t action_;
  std::int64_t size_, steps_, start_ = 0;
  Numbers chunk_;
};

/// Durations of the newest inferences, which any thread may read.
class Latencies {
 public:
  void add(double seconds) noexcept {
    recent_[count_.get() % recent_.size()].set(seconds);
    count_.add();
  }

  void read(LoopHealth& health) const {
    const std::uint64_t count = count_.get();
    if (count == 0) return;
    Numbers sorted;
    for (std::size_t i = 0; i < std::min<std::uint64_t>(count, recent_.size()); ++i) sorted.push_back(recent_[i].get());
    health.latency_last_ms = recent_[(count - 1) % recent_.size()].get() * 1e3;
    std::sort(sorted.begin(), sorted.end());
    health.latency_p50_ms = percentile(sorted, 0.5) * 1e3;
    health.latency_p99_ms = percentile(sorted, 0.99) * 1e3;
  }

 private:
  static double percentile(const Numbers& sorted, double share) {
    const double place = share * static_cast<double>(sorted.size() - 1);
    const auto below = static_cast<std::size_t>(place);
    const double rest = place - static_cast<double>(below);
    const double high = sorted[std::min(below + 1, sorted.size() - 1)];
    return sorted[below] + rest * (high - sorted[below]);
  }

  std::array<Shared<double>, 1000> recent_;
  Shared<std::uint64_t> count_;
};

}  // namespace detail

/// Acts at a fixed rate, while the next chunk is computed in a second thread: Python's `ControlLoop`.
///
/// One thread calls `step` and `reset`; nobody else may use the policy until the loop is gone. `step` waits for an
/// inference in the first tick of an episode, and where blocking chunks end; otherwise it neither waits nor allocates.
class Loop {
 public:
  /// Throws Error: an option is out of range, or does not fit the policy.
  explicit Loop(Policy& policy, LoopOptions options = {})
      : policy_(policy),
        contract_(policy.contract_),
        options_(std::move(options)),
        rate_hz_(checked_rate()),
        overrun_(checked_overrun()),
        schedule_(options_.chunking == Chunking::blocking, contract_, checked_steps()),
        simulated_(options_.simulated_delay.has_value()),
        neutral_(contract_.action_dim) {
    if (!options_.clock) options_.clock = now;
    const std::optional<int> given = options_.expected_delay ? options_.expected_delay : options_.simulated_delay;
    given_delay_ = given.has_value();
    delay_.set(given ? *given : 1);
    age_ = options_.max_observation_age_s ? options_.max_observation_age_s : contract_.max_observation_age_s;
    if (age_ && !(*age_ > 0)) refuse("max_observation_age_s is " + detail::shown(*age_) + "; expected seconds above 0");
    for (std::size_t i = 0; i < contract_.action_dim; ++i) {
      low_.push_back(detail::cast(contract_.type, contract_.low[i]));
      high_.push_back(detail::cast(contract_.type, contract_.high[i]));
      neutral_[i] = detail::clipped(0.0, contract_.robot_low[i], contract_.robot_high[i]);
    }
    last_ = chosen_ = start_ = neutral_;
    prepare_blend_in();
    for (detail::ChunkRequest& request : requests_.slots()) {
      request.row.resize(contract_.observation_dim);
      request.prefix.resize(contract_.chunk_dim());
      request.prefix_weight.resize(contract_.chunk_size);
    }
    for (detail::ChunkAnswer& answer : answers_.slots()) answer.chunk.resize(contract_.chunk_dim());
    if (!simulated_) thread_ = std::thread([this] { serve(); });
  }

  /// Waits for a running inference.
  ~Loop() {
    if (!thread_.joinable()) return;
    closed_.store(true);
    asked_.post();
    thread_.join();
  }

  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  /// Seconds on the clock of timestamps: monotonic, of no particular beginning.
  static double now() noexcept {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  double rate_hz() const noexcept { return rate_hz_; }

  /// Write the action of one tick; without one nothing is written, and `last_error` says why.
  ///
  /// `timestamp` is when the observation was made: seconds on the loop's clock, in a simulation ticks of this episode
  /// over the rate; none for now.
  template <class In, class Out>
  [[nodiscard]] Status step(const In* observation, std::size_t size, Out* action, std::size_t action_size,
                            std::optional<double> timestamp = std::nullopt) noexcept {
    if (stopped_.get()) {
      message_.write("The control loop is stopped: %.250s Call reset() to start again.", reason_.text());
      return Status::no_action;
    }
    if (action_size != contract_.action_dim) {
      message_.write("The action has %zu numbers; expected %zu.", action_size, contract_.action_dim);
      return Status::bad_observation;
    }
    if (given_at_) skip_pause((options_.clock() - *given_at_) * rate_hz_);
    const bool fresh = is_fresh(timestamp);
    bool usable = false;
    Status status = Status::ok;
    if (fresh) {
      const bool fits = policy_.flatten(observation, size);
      const Reaction reaction = fits ? policy_.shell_.judge(policy_.row_.data(), policy_.message_) : Reaction::raise;
      usable = reaction == Reaction::count;
      if (reaction == Reaction::raise) status = refused_observation();
    }
    if (status == Status::ok) status = schedule_.empty() ? open(fresh, usable) : proceed(usable);
    if (status == Status::ok) status = choose(fresh, usable);
    if (status != Status::ok) return status;
    policy_.shell_.limit(chosen_.data(), last_.data());
    for (std::size_t i = 0; i < action_size; ++i) action[i] = static_cast<Out>(last_[i]);
    ++tick_;
    ticks_.add();
    if (!simulated_) given_at_ = options_.clock();
    return Status::ok;
  }

  template <class Observation, class Action>
  [[nodiscard]] Status step(const Observation& observation, Action& action,
                            std::optional<double> timestamp = std::nullopt) noexcept {
    return step(std::data(observation), std::size(observation), std::data(action), std::size(action), timestamp);
  }

  /// Begin a new episode, also after a stop: drop every action of the old one, with those still being computed.
  void reset() noexcept {
    discard();
    policy_.reset();
    schedule_.clear();
    tick_ = 0;
    given_at_.reset();
    stopped_.set(false);
  }

  /// The same, with noise from a seed.
  void reset(std::uint64_t seed) noexcept {
    reset();
    seed_ = seed;
    ++seeds_given_;
  }

  /// How the loop is doing; from any thread, at any time.
  LoopHealth health() const {
    LoopHealth found{ticks_.get(),    inferences_.get(),  failed_.get(),     overruns_.get(), missed_.get(),
                     stale_.get(),    over_budget_.get(), detail::kNaN,      detail::kNaN,    detail::kNaN,
                     delay_.get(),    stopped_.get()};
    latencies_.read(found);
    return found;
  }

  /// Why the last call gave no action; the text is valid until the next call.
  const char* last_error() const noexcept { return message_.text(); }

 private:
  [[noreturn]] static void refuse(const std::string& message) { detail::refuse(message + ".", Status::bad_argument); }

  double checked_rate() const {
    const double rate = options_.rate_hz != 0 ? options_.rate_hz : contract_.rate_hz.value_or(0.0);
    if (!(rate > 0) || !std::isfinite(rate)) {
      refuse("rate_hz is " + detail::shown(rate) + "; expected ticks a second, above 0, since neither policy nor "
             "robot.json says them");
    }
    const std::optional<double> recorded = contract_.recorded_rate_hz;
    if (!options_.any_rate && recorded && std::fabs(rate / *recorded - 1) > detail::kRateTolerance) {
      refuse("rate_hz is " + detail::shown(rate) + "; expected " + detail::shown(*recorded) +
             ", the rate of the actions that the policy was trained on. Set any_rate if that is intended");
    }
    if (contract_.has_max_rate && contract_.rate_hz && rate > (1 + detail::kRateTolerance) * *contract_.rate_hz) {
      refuse("rate_hz is " + detail::shown(rate) + "; expected at most " + detail::shown(*contract_.rate_hz) +
             ", that of robot.json: its max_rate holds from tick to tick, and would be exceeded in a second, whatever "
             "rate_limit is given. Take a robot.json without max_rate, and give a rate_limit for this rate");
    }
    if (options_.chunking == Chunking::realtime && !contract_.takes_prefix) {
      refuse("chunking is realtime, and the graph takes no prefix; expected naive, or a policy loaded with its variant "
             "rtc");
    }
    return rate;
  }

  Overrun checked_overrun() const {
    Overrun chosen = options_.overrun;
    if (chosen == Overrun::contract) {
      const std::string& word = contract_.on_failure;
      chosen = word == "hold"      ? Overrun::hold
               : word == "neutral" ? Overrun::zero
               : word == "home"    ? Overrun::home
               : word == "disable" ? Overrun::stop
                                   : contract_.stands_still ? Overrun::hold : Overrun::zero;
    }
    if (chosen == Overrun::home && contract_.home.empty()) {
      refuse("overrun is home; expected another one, since no robot.json says where home is: a default of every "
             "action");
    }
    return chosen;
  }

  std::size_t checked_steps() const {
    const std::size_t steps = options_.execute_steps == 0 ? contract_.execute_steps : options_.execute_steps;
    if (steps > contract_.chunk_size) {
      refuse("execute_steps is " + std::to_string(steps) + "; expected 1 to chunk_size, " +
             std::to_string(contract_.chunk_size));
    }
    const int expected = options_.expected_delay.value_or(0), simulated = options_.simulated_delay.value_or(1);
    if (expected < 0 || simulated < 0) refuse("A delay is below 0; expected whole ticks, 0 or more");
    const int least = std::max(simulated, expected);
    if (options_.chunking != Chunking::blocking && static_cast<std::size_t>(least) >= contract_.chunk_size) {
      refuse("A chunk has " + std::to_string(contract_.chunk_size) + " actions and takes " + std::to_string(least) +
             " ticks to arrive: none of it would be executed. Use blocking chunks, or a faster variant");
    }
    return steps;
  }

  void prepare_blend_in() {
    const double seconds = options_.blend_in_s.value_or(contract_.blend_in_s);
    if (!(seconds >= 0) || seconds > 3600) {
      refuse("blend_in_s is " + detail::shown(seconds) + "; expected a number of seconds, 0 to 3600");
    }
    blend_ticks_ = static_cast<std::int64_t>(std::ceil(seconds * rate_hz_));
    for (std::size_t i = 0; seconds > 0 && i < contract_.action_dim; ++i) {
      const bool lost = contract_.still[i] && contract_.measured[i] < 0 && std::isnan(contract_.start_default[i]);
      if (!contract_.limited || lost) {
        refuse("blend_in_s is " + detail::shown(seconds) + "; expected 0, since robot.json does not say where every "
               "action begins: a default, or the observed position of its joint");
      }
    }
  }

  void skip_pause(double periods) noexcept {
    if (periods >= 0 && periods < 2) return;
    const auto size = static_cast<std::int64_t>(contract_.chunk_size);
    const std::int64_t skipped = periods > 0 ? static_cast<std::int64_t>(std::min(periods, 1e15)) - 1 : size;
    missed_.add(periods > 0 ? static_cast<std::uint64_t>(skipped) : 1);
    tick_ += skipped;
    if (skipped >= size) discard();
  }

  bool is_fresh(std::optional<double> timestamp) noexcept {
    if (!timestamp || !age_) return true;
    const double at = simulated_ ? static_cast<double>(tick_) / rate_hz_ : options_.clock();
    return std::fabs(at - *timestamp) <= *age_;
  }

  Status refused_observation() noexcept {
    message_ = policy_.message_;
    if (schedule_.empty()) return Status::bad_observation;
    failed_.add();
    if (overrun_ == Overrun::stop) return stop(Status::bad_observation);
    return Status::ok;
  }

  Status stop(Status status) noexcept {
    reason_ = message_;
    stopped_.set(true);
    return status;
  }

  Status open(bool fresh, bool usable) noexcept {
    if (!fresh) {
      stale_.add();
      message_.write("The first observation of the episode is older than %g s, or its timestamp is not of the loop's "
                     "clock. Check the sensor.", *age_);
      return Status::bad_observation;
    }
    if (!usable) {
      message_.write("The first observation of the episode is refused by the policy's safety settings, and there is no "
                     "action to hold. Check the sensor.");
      return Status::bad_observation;
    }
    for (std::size_t i = 0; i < contract_.action_dim; ++i) {
      const std::ptrdiff_t from = contract_.measured[i];
      const auto index = static_cast<std::size_t>(from);
      const double home = std::isnan(contract_.start_default[i]) ? 0.0 : contract_.start_default[i];
      start_[i] = from < 0 ? home : static_cast<double>(policy_.row_[index]) + contract_.offset[index];
    }
    discard();
    ask(true);
    while (!arrived()) answered_.wait();
    take();
    return taken().good ? Status::ok : Status::no_action;
  }

  /// Take the next chunk if it is there, and ask for another one if it is time to.
  Status proceed(bool usable) noexcept {
    Status status = collect(false);
    if (status == Status::ok && usable && !pending_ && schedule_.is_due(tick_, delay_.get())) {
      ask(false);
      status = collect(options_.chunking == Chunking::blocking);
    }
    return status;
  }

  void ask(bool opening) noexcept {
    detail::ChunkRequest& request = requests_.to_write();
    request.tick = tick_, request.opening = opening, request.generation = generation_.load();
    request.seed = seed_, request.seeds_given = seeds_given_;
    std::copy(policy_.row_.begin(), policy_.row_.end(), request.row.begin());
    if (options_.chunking == Chunking::realtime) {
      schedule_.prefix(tick_, delay_.get(), request);
    }
    requests_.publish();
    pending_ = true;
    if (!simulated_) {
      asked_.post();
    } else if (requests_.take()) {
      compute(requests_.taken(), answers_.to_write());
      answers_.publish();
      arrived_ = answers_.take();
    }
  }

  const detail::ChunkAnswer& taken() const noexcept { return answers_.taken(); }

  /// Whether the answer to the pending request is there.
  bool arrived() noexcept {
    if (!pending_) return false;
    if (simulated_) {
      return arrived_ && tick_ >= taken().tick + (taken().opening ? 0 : *options_.simulated_delay);
    }
    return answers_.take() && taken().generation == generation_.load();
  }

  Status collect(bool wait) noexcept {
    bool there = arrived();
    while (!there && wait && !simulated_) {
      answered_.wait();
      there = arrived();
    }
    if (!there) return Status::ok;
    take();
    return taken().good || overrun_ != Overrun::stop ? Status::ok : stop(Status::no_action);
  }

  void take() noexcept {
    const detail::ChunkAnswer& answer = taken();
    pending_ = arrived_ = false;
    if (!answer.good) {
      failed_.add();
      message_ = answer.message;
      return;
    }
    inferences_.add();
    schedule_.begin(answer.chunk, options_.chunking == Chunking::blocking ? tick_ : answer.tick);
    if (!simulated_) measure(answer);
  }

  void measure(const detail::ChunkAnswer& answer) noexcept {
    if (!answer.opening) {
      latencies_.add(answer.seconds);
      over_budget_.add(contract_.latency_budget_s && answer.seconds > *contract_.latency_budget_s);
      delays_[delays_seen_++ % delays_.size()] = tick_ - answer.tick;
    }
    if (given_delay_) return;
    const auto end = delays_.begin() + static_cast<std::ptrdiff_t>(std::min(delays_seen_, delays_.size()));
    if (end != delays_.begin()) {
      delay_.set(*std::max_element(delays_.begin(), end));
    } else {
      delay_.set(std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(answer.seconds * rate_hz_))));
    }
  }

  void discard() noexcept {
    generation_.fetch_add(1);
    pending_ = arrived_ = false;
  }

  void use(const double* action) noexcept { std::copy(action, action + contract_.action_dim, chosen_.begin()); }

  Status choose(bool fresh, bool usable) noexcept {
    if (!fresh) {
      stale_.add();
      return fall_back("an observation is too old.", true);
    }
    if (!usable) return fall_back("the policy's safety settings refuse the observation.", true);
    if (const double* action = schedule_.action(tick_)) {
      use(action);
      blend_in();
      return Status::ok;
    }
    if (options_.chunking == Chunking::blocking && pending_) {
      missed_.add();  // simulated: a real wait lasts within one tick, and the robot keeps its last command
      use(last_.data());
      return Status::ok;
    }
    overruns_.add();
    return fall_back("the running chunk is used up, and the next one has not arrived.", false);
  }

  void blend_in() noexcept {
    const double weight = static_cast<double>(tick_ + 1) / static_cast<double>(blend_ticks_ + 1);
    if (weight >= 1) return;
    for (std::size_t i = 0; i < chosen_.size(); ++i) {
      const double share = weight * (chosen_[i] - start_[i]);
      chosen_[i] = detail::cast(contract_.type, start_[i] + share);
    }
  }

  Status fall_back(const char* reason, bool blind) noexcept {
    if (overrun_ == Overrun::stop) {
      message_.write("No action is given: %s", reason);
      return stop(Status::no_action);
    }
    if (overrun_ == Overrun::zero) use(neutral_.data());
    else if (overrun_ == Overrun::home) use_home();
    else if (overrun_ == Overrun::hold || blind) use(last_.data());  // blind: a chunk is not begun again
    else use(schedule_.repeated(tick_));
    return Status::ok;
  }

  void use_home() noexcept {
    for (std::size_t i = 0; i < chosen_.size(); ++i) chosen_[i] = detail::cast(contract_.type, contract_.home[i]);
  }

  // In the second thread, or in a simulation.

  void serve() noexcept {
    if (options_.on_thread_start) options_.on_thread_start();
    for (;;) {
      asked_.wait();
      if (closed_.load()) return;
      if (!requests_.take() || requests_.taken().generation != generation_.load()) continue;
      compute(requests_.taken(), answers_.to_write());
      answers_.publish();
      answered_.post();
    }
  }

  void compute(const detail::ChunkRequest& request, detail::ChunkAnswer& answer) noexcept {
    if (request.seeds_given != seeds_used_) {
      seeds_used_ = request.seeds_given;
      policy_.noise_.reseed(request.seed);
    }
    answer.tick = request.tick, answer.opening = request.opening, answer.generation = request.generation;
    detail::Network& network = policy_.network_;
    const double start = simulated_ ? 0.0 : options_.clock();
    policy_.noise_.draw(network.noise.data(), contract_.noise_dim(), contract_.noise_scale);
    std::copy(request.row.begin(), request.row.end(), network.observation.begin());
    if (contract_.takes_prefix) {
      std::copy(request.prefix.begin(), request.prefix.end(), network.prefix.begin());
      std::copy(request.prefix_weight.begin(), request.prefix_weight.end(), network.prefix_weight.begin());
    }
    answer.good = policy_.infer(answer.message);
    answer.seconds = simulated_ ? 0.0 : options_.clock() - start;
    if (answer.good && !policy_.finite_chunk()) {
      Policy::refuse_chunk(answer.message);
      answer.good = false;
    }
    for (std::size_t i = 0; answer.good && i < answer.chunk.size(); ++i) {
      const std::size_t number = i % contract_.action_dim;
      const double x = detail::cast(contract_.type, static_cast<double>(network.actions[i]));
      answer.chunk[i] = detail::clipped(x, low_[number], high_[number]);
    }
  }

  Policy& policy_;
  const detail::Contract& contract_;
  LoopOptions options_;
  double rate_hz_;
  Overrun overrun_;
  detail::Schedule schedule_;
  bool simulated_, given_delay_ = false, pending_ = false, arrived_ = false;
  std::optional<double> age_;
  detail::Numbers neutral_, low_, high_, last_, chosen_, start_;
  std::int64_t tick_ = 0, blend_ticks_ = 0;
  std::optional<double> given_at_;
  std::array<std::int64_t, 10> delays_{};
  std::size_t delays_seen_ = 0;
  detail::Message message_, reason_;
  std::uint64_t seed_ = 0, seeds_given_ = 0, seeds_used_ = 0;  // the last one is the second thread's
  detail::Latencies latencies_;
  detail::Shared<std::int64_t> delay_{1};
  detail::Shared<bool> stopped_{false};
  detail::Shared<std::uint64_t> ticks_, inferences_, failed_, overruns_, missed_, stale_, over_budget_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> closed_{false};
  detail::Latest<detail::ChunkRequest> requests_;
  detail::Latest<detail::ChunkAnswer> answers_;
  detail::Signal asked_, answered_;
  std::thread thread_;
};

}  // namespace meam

#endif  // MEAM_POLICY_HPP
