/* Uses the C interface from C99, and prints what the test compares. */
#include "meam_policy.h"

#include <stdio.h>

int use_interface(const char* folder, const char* broken);

int use_interface(const char* folder, const char* broken) {
  meam_policy* policy = NULL;
  meam_health_counts health;
  double observation[16] = {0.25, -0.5, 0.75}, noise[64] = {0.5, -0.25, 0.125}, action[8] = {9, 9};
  size_t size, actions;
  int tick;
  printf("%d %s\n", meam_create(broken, NULL, -1, &policy), meam_last_error(NULL));
  if (policy != NULL) return 1;
  if (meam_create(folder, "none", 0, &policy) != MEAM_BAD_ARGUMENT) return 1;
  if (meam_create(NULL, NULL, 0, &policy) != MEAM_BAD_ARGUMENT) return 1;
  meam_destroy(policy);
  if (meam_create(folder, NULL, 0, &policy) != MEAM_OK) return 1;
  size = meam_observation_size(policy);
  actions = meam_action_size(policy);
  for (tick = 0; tick < 3; ++tick) {
    if (meam_act(policy, observation, size, noise, meam_noise_size(policy), action, actions) != MEAM_OK) return 1;
    printf("%.17g %.17g\n", action[0], action[1]);
  }
  observation[1] = 1e300;
  printf("%d ", meam_act(policy, observation, size, NULL, 0, action, actions));
  printf("%s\n", meam_last_error(policy));
  if (meam_act(policy, observation, size + 1, NULL, 0, action, actions) != MEAM_BAD_OBSERVATION) return 1;
  if (meam_act(NULL, observation, size, NULL, 0, action, actions) != MEAM_BAD_ARGUMENT) return 1;
  if (meam_reset(policy, 3) != MEAM_OK || meam_reset(policy, -1) != MEAM_OK) return 1;
  if (meam_health(policy, &health) != MEAM_OK || meam_health(policy, NULL) != MEAM_BAD_ARGUMENT) return 1;
  printf("%d %d %d %.17g\n", (int)health.steps, (int)health.inferences, (int)health.bad_observations,
         health.unfamiliarity);
  meam_destroy(policy);
  meam_destroy(NULL);
  return 0;
}
