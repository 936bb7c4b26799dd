/* meam_policy.h: the C interface of meam_policy.hpp, for Rust, MATLAB, LabVIEW and others.
 *
 * Functions return a status, 0 for success; `meam_last_error` says what was wrong. One thread acts with a policy;
 * `meam_health` may be called from any. Licence: Apache-2.0.
 */
#ifndef MEAM_POLICY_H
#define MEAM_POLICY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct meam_policy meam_policy;

enum meam_status {
  MEAM_OK = 0,
  MEAM_BAD_OBSERVATION = 1, /* it does not fit, or is not finite; no action was written */
  MEAM_NO_ACTION = 2,       /* the network gave none; no action was written */
  MEAM_NOT_FOUND = 3,       /* the folder, or a file of it, does not exist */
  MEAM_BAD_FORMAT = 4,      /* a file does not have the expected format */
  MEAM_DAMAGED = 5,         /* the hash of a file is not the recorded one */
  MEAM_OLD_RUNTIME = 6,     /* onnxruntime is too old for the graph, or for this library */
  MEAM_BAD_ARGUMENT = 7     /* an argument is out of range, or does not fit the policy */
};

/* What happened since the policy was loaded. Not a number where nothing is known. */
typedef struct meam_health_counts {
  uint64_t steps, inferences, bad_observations, bad_actions, out_of_bounds, unfamiliar, limited, rate_limited, replaced;
  double unfamiliarity, max_unfamiliarity, value, disagreement;
} meam_health_counts;

/* Load a policy folder, with Python's default safety settings; robot.json is followed.
 * variant: another graph of the folder; NULL for the policy as trained.
 * seed: of the noise; a negative one draws it.
 * On success *policy is to be given to meam_destroy; on failure it is NULL, and meam_last_error(NULL) says why. */
int meam_create(const char* folder, const char* variant, int64_t seed, meam_policy** policy);

/* How many numbers an observation and an action have. */
size_t meam_observation_size(const meam_policy* policy);
size_t meam_action_size(const meam_policy* policy);

/* Write the next action. noise: NULL to draw it, else meam_noise_size standard normal numbers, for a chunk that begins
 * now. */
int meam_act(meam_policy* policy, const double* observation, size_t observation_size, const double* noise,
             size_t noise_size, double* action, size_t action_size);
size_t meam_noise_size(const meam_policy* policy);

/* Begin a new episode; a negative seed leaves the noise going as it is. */
int meam_reset(meam_policy* policy, int64_t seed);

int meam_health(const meam_policy* policy, meam_health_counts* health);

/* Why the policy's last call gave no action; of NULL, why this thread's last meam_create failed. Never NULL. */
const char* meam_last_error(const meam_policy* policy);

/* NULL is allowed. */
void meam_destroy(meam_policy* policy);

#ifdef __cplusplus
}
#endif

#endif /* MEAM_POLICY_H */
