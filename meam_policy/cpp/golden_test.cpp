// Compares the policy's chunks with those that PyTorch computed when it was exported: golden.safetensors.
#include <cstdio>

#include "meam_policy.hpp"

namespace {

using meam::detail::Json;

constexpr double kTolerance = 1e-5;  // of the actions' half width, or of 1 where that is smaller

/// The numbers of one array of a safetensors file: float32, little-endian.
std::vector<float> array(const std::string& file, const char* name) {
  std::uint64_t header = 0;
  std::memcpy(&header, file.data(), sizeof header);
  const Json entry = Json::parse(file.substr(sizeof header, header)).at(name);
  const auto start = entry.at("data_offsets").at(0).get<std::size_t>();
  const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
  std::vector<float> numbers((end - start) / sizeof(float));
  std::memcpy(numbers.data(), file.data() + sizeof header + header + start, end - start);
  return numbers;
}

double largest_difference(const std::filesystem::path& folder) {
  meam::Policy policy(folder);
  const std::string file = meam::detail::read_file(folder, "golden.safetensors", std::uintmax_t{1} << 31);
  const Json config = Json::parse(meam::detail::read_file(folder, "config.json", std::uintmax_t{1} << 22));
  const std::vector<float> observations = array(file, "observation"), noise = array(file, "noise"),
                           expected = array(file, "actions");
  const std::size_t size = policy.observation_dim(), numbers = policy.chunk_size() * policy.action_dim();
  std::vector<double> observation(size), chunk(numbers);
  double largest = 0;
  for (std::size_t row = 0; row * numbers < expected.size(); ++row) {
    for (std::size_t i = 0; i < size; ++i) {
      // Recorded without the offset, which the policy takes off.
      const double offset = config.contains("observation_offset") ? config["observation_offset"][i].get<double>() : 0;
      observation[i] = static_cast<double>(observations[row * size + i]) + offset;
    }
    const meam::Status status = policy.predict_chunk(observation.data(), size, noise.data() + row * policy.noise_dim(),
                                                     policy.noise_dim(), chunk.data(), numbers);
    if (status != meam::Status::ok) throw std::runtime_error(policy.last_error());
    for (std::size_t i = 0; i < numbers; ++i) {
      const double width = std::max(1.0, config["action_scale"][i % policy.action_dim()].get<double>());
      largest = std::max(largest, std::fabs(chunk[i] - static_cast<double>(expected[row * numbers + i])) / width);
    }
  }
  return largest;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s POLICY_FOLDER\n", arguments[0]);
    return 2;
  }
  try {
    const double largest = largest_difference(arguments[1]);
    std::printf("largest difference %.2g, at most %.2g, onnxruntime %s\n", largest, kTolerance,
                meam::detail::runtime_version().c_str());
    return largest <= kTolerance ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
