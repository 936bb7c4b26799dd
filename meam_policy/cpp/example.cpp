// Acts with a policy at its rate. Put your sensors into `read`, and your motors into `send`.
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "meam_policy.hpp"

namespace {

void read(std::vector<double>& observation) { std::fill(observation.begin(), observation.end(), 0.0); }

void send(const std::vector<double>& action) {
  for (const double number : action) std::printf("%9.5f", number);
  std::printf("\n");
}

bool act(meam::Policy& policy, int ticks) {
  using Clock = std::chrono::steady_clock;
  const double rate_hz = policy.rate_hz() > 0 ? policy.rate_hz() : 50.0;
  const auto period = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(1.0 / rate_hz));
  std::vector<double> observation(policy.observation_dim()), action(policy.action_dim());
  auto next = Clock::now();
  policy.reset();  // an episode begins
  for (int tick = 0; tick < ticks; ++tick, next += period) {
    std::this_thread::sleep_until(next);
    read(observation);
    if (policy.act(observation, action) != meam::Status::ok) {
      std::fprintf(stderr, "%s\n", policy.last_error());  // nothing was written: stop the robot here
      return false;
    }
    send(action);
  }
  const meam::Health health = policy.health();
  std::printf("%llu actions, %llu inferences, %.2g standard deviations from the training data\n",
              static_cast<unsigned long long>(health.steps), static_cast<unsigned long long>(health.inferences),
              health.unfamiliarity);
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s POLICY_FOLDER\n", arguments[0]);
    return 2;
  }
  try {
    meam::Policy policy(arguments[1]);
    return act(policy, 20) ? 0 : 1;
  } catch (const meam::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
