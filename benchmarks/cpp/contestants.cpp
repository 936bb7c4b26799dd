// Times `Policy::act` and onnxruntime's bare `Session::Run`, in blocks that run.py asks for on stdin.
//
//   contestants POLICY_FOLDER OBSERVATIONS_FILE
//
// The file has float32 observations, row after row. Each line of stdin is `act N` or `bare N`; the answer is N lines of
// microseconds, with a minus for a call that ran the network.
#include <iostream>

#include "meam_policy.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double microseconds(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

/// onnxruntime alone: fixed buffers, nothing drawn, copied or checked.
class Bare {
 public:
  Bare(const std::filesystem::path& folder, const meam::Policy& policy)
      : observation_(policy.observation_dim(), 0.1F),
        noise_(policy.noise_dim(), 0.5F),
        actions_(policy.chunk_size() * policy.action_dim()) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    session_ = Ort::Session(meam::detail::environment(), (folder / "policy.onnx").c_str(), options);
    const auto size = [](std::size_t n) { return static_cast<std::int64_t>(n); };
    add(inputs_, observation_, {1, size(policy.observation_dim())});
    add(inputs_, noise_, {1, size(policy.noise_dim())});
    add(outputs_, actions_, {1, size(policy.chunk_size()), size(policy.action_dim())});
  }

  void run() {
    static const char* const in[] = {"observation", "noise"};
    static const char* const out[] = {"actions"};
    session_.Run(Ort::RunOptions{nullptr}, in, inputs_.data(), 2, out, outputs_.data(), 1);
  }

 private:
  static void add(std::vector<Ort::Value>& to, std::vector<float>& buffer, const std::vector<std::int64_t>& shape) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    to.push_back(Ort::Value::CreateTensor<float>(memory, buffer.data(), buffer.size(), shape.data(), shape.size()));
  }

  std::vector<float> observation_, noise_, actions_;
  Ort::Session session_{nullptr};
  std::vector<Ort::Value> inputs_, outputs_;
};

void serve(const std::filesystem::path& folder, const std::string& rows) {
  meam::PolicyOptions options;
  options.seed = 0;
  options.safety.on_unfamiliar = meam::Reaction::count;
  meam::Policy policy(folder, options);
  Bare bare(folder, policy);
  const std::size_t size = policy.observation_dim(), count = rows.size() / sizeof(float) / size;
  std::vector<float> observations(count * size);
  std::memcpy(observations.data(), rows.data(), observations.size() * sizeof(float));
  std::vector<double> action(policy.action_dim()), taken;
  std::string what;
  std::size_t calls = 0, next = 0;
  while (std::cin >> what >> calls) {
    taken.clear();
    for (std::size_t i = 0; i < calls; ++i) {
      const auto start = Clock::now();
      if (what == "bare") {
        bare.run();
        taken.push_back(-microseconds(start));
        continue;
      }
      const std::uint64_t before = policy.health().inferences;
      const auto status = policy.act(observations.data() + size * (next++ % count), size, action.data(), action.size());
      const double passed = microseconds(start);
      if (status != meam::Status::ok) throw std::runtime_error(policy.last_error());
      taken.push_back(policy.health().inferences == before ? passed : -passed);
    }
    for (const double each : taken) std::cout << each << '\n';
    std::cout.flush();
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  try {
    const std::filesystem::path file = arguments[2];
    serve(arguments[1], meam::detail::read_file(file.parent_path(), file.filename().string(), std::uintmax_t{1} << 30));
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
