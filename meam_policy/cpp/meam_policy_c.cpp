// The C interface of meam_policy.hpp. Licence: Apache-2.0.
#include "meam_policy.h"

#include "meam_policy.hpp"

struct meam_policy : meam::Policy {
  using meam::Policy::Policy;
};

namespace {

meam::detail::Message& failure() {
  thread_local meam::detail::Message message;
  return message;
}

int as_int(meam::Status status) { return static_cast<int>(status); }

int created(const char* folder, const char* variant, int64_t seed, meam_policy** policy) {
  try {
    meam::PolicyOptions options;
    if (variant != nullptr) options.variant = variant;
    if (seed >= 0) options.seed = static_cast<uint64_t>(seed);
    *policy = new meam_policy(folder, options);
    return MEAM_OK;
  } catch (const meam::Error& error) {
    failure().write("%s", error.what());
    return as_int(error.status());
  } catch (const std::exception& error) {
    failure().write("The policy cannot be loaded: %s", error.what());
    return MEAM_BAD_FORMAT;
  }
}

}  // namespace

int meam_create(const char* folder, const char* variant, int64_t seed, meam_policy** policy) {
  if (folder == nullptr || policy == nullptr) {
    failure().write("The folder or the place for the policy is NULL; expected both.");
    return MEAM_BAD_ARGUMENT;
  }
  *policy = nullptr;
  return created(folder, variant, seed, policy);
}

size_t meam_observation_size(const meam_policy* policy) { return policy == nullptr ? 0 : policy->observation_dim(); }

size_t meam_action_size(const meam_policy* policy) { return policy == nullptr ? 0 : policy->action_dim(); }

size_t meam_noise_size(const meam_policy* policy) { return policy == nullptr ? 0 : policy->noise_dim(); }

int meam_act(meam_policy* policy, const double* observation, size_t observation_size, const double* noise,
             size_t noise_size, double* action, size_t action_size) {
  if (policy == nullptr || observation == nullptr || action == nullptr) return MEAM_BAD_ARGUMENT;
  return as_int(policy->act(observation, observation_size, noise, noise_size, action, action_size));
}

int meam_reset(meam_policy* policy, int64_t seed) {
  if (policy == nullptr) return MEAM_BAD_ARGUMENT;
  if (seed < 0) policy->reset();
  else policy->reset(static_cast<uint64_t>(seed));
  return MEAM_OK;
}

int meam_health(const meam_policy* policy, meam_health_counts* health) {
  if (policy == nullptr || health == nullptr) return MEAM_BAD_ARGUMENT;
  const meam::Health h = policy->health();
  *health = {h.steps,      h.inferences,   h.bad_observations, h.bad_actions,   h.out_of_bounds,
             h.unfamiliar, h.limited,      h.rate_limited,     h.replaced,      h.unfamiliarity,
             h.max_unfamiliarity, h.value, h.disagreement};
  return MEAM_OK;
}

const char* meam_last_error(const meam_policy* policy) {
  return policy == nullptr ? failure().text() : policy->last_error();
}

void meam_destroy(meam_policy* policy) { delete policy; }
