"""Training settings: one frozen dataclass, and one preset per method."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Literal, get_origin

from meam_policy.errors import ConfigError
from meam_policy.spec import EVALUATIONS, MAX_STEPS, Integration, Solver
from meam_policy.typed import typed
from meam_training.config.declaration import (
    Field,
    HowItRuns,
    OnlyIf,
    Range,
    Text,
    as_plain,
    check_fields,
    fields_of,
    unknown,
)
from meam_training.setting_text import SettingText

__all__ = ["PRESETS", "Dual", "Logger", "Method", "Objective", "Precision", "Scheme", "Statistics", "TrainConfig"]

Method = Literal["bc", "qam", "qam-edit", "trqam", "me-am"]
Objective = Literal["two_scale", "reweighted", "adjoint", "bridge", "target_score"]
BridgeAdjoint = Literal["denoiser", "scalar"]
Scheme = Literal["ancestral", "reference"]
Dual = Literal["log", "reference"]
Precision = Literal["float32", "bf16"]
ActionScaling = Literal["data", "box"]
Logger = Literal["tensorboard", "wandb"]
Statistics = Literal["kept", "renewed"]
"""Whose normalisation a run uses that starts from a policy: the policy's, or that of the new data."""


_ROWS, _WIDE, _CRITICS, _THREADS = 2**24, 2**16, 2**10, 2**10
"""Of what takes memory or threads: far more than is of use, and few enough that a slip of the finger is named."""

PRETRAINING_SHARE, LONG_SHARE = 0.3, 0.6
"""Share of the updates that pretrain, unless `pretrain_steps` says otherwise, and that of me-am. An update of
pretraining costs a fifth of another, or less, and everything stands on the prior."""

RATE, SMALL_RATE, LARGE = 3e-4, 1e-3, 256
"""Learning rates, unless `learning_rate` says otherwise: the published one, and that of me-am where all layers are
narrower than `LARGE`."""

TARGET_RATE, MOST_TARGET_RATE = 0.005, 0.05
"""Rates of the target networks, unless `polyak` says otherwise: the published one, and the largest of me-am."""

RENEWALS, NEAR = 40, 10
"""How many times me-am renews the target networks in a run, up to an effective horizon of so many chunks."""


# Conditions under which settings have an effect. Where a field has several, an error names the first one that fails.
TRAINS_POLICY = OnlyIf("method", lambda c: c.method != "bc", "take another {method}")
PRETRAINS = OnlyIf("pretrain_steps", lambda c: c.pretrain_steps != 0, "set {pretrain_steps} above 0")
EDITS = OnlyIf("method", lambda c: c.method == "qam-edit", 'take {method:"qam-edit"}')
HAS_FOURIER_FEATURES = OnlyIf("fourier_features", lambda c: c.fourier_features > 0, "set {fourier_features} above 0")
HAS_BUDGET = OnlyIf("kl_budget", lambda c: c.kl_budget is not None, "set {kl_budget}")
HAS_NO_BUDGET = OnlyIf("kl_budget", lambda c: c.kl_budget is None, "set {kl_budget:None} (not with trqam)")
FOLLOWS_SDE = OnlyIf("objective", lambda c: c.objective == "adjoint", "set {objective} to adjoint")
WEIGHS = OnlyIf(
    "objective", lambda c: c.objective in ("reweighted", "two_scale"), "set {objective} to two_scale or reweighted"
)
SWITCHES = OnlyIf("objective", lambda c: c.objective == "two_scale", "set {objective} to two_scale")
FOLLOWS_BRIDGES = OnlyIf("objective", lambda c: c.objective == "bridge", "set {objective} to bridge")
TAKES_SCORES = OnlyIf(
    "objective",
    lambda c: c.objective in ("adjoint", "bridge", "target_score"),
    "set {objective} to adjoint, bridge or target_score",
)
READS_SCORE = OnlyIf(
    "entropy_coef",
    lambda c: c.entropy_coef > 0 or c.objective == "target_score",
    "set {entropy_coef} above 0 (me-am), or {objective} to target_score",
)
MIXES_PRIOR = OnlyIf("mixture_weight", lambda c: c.mixture_weight > 0, "set {mixture_weight} above 0 (me-am)")
PERTURBS_STARTS = OnlyIf("ascent_starts", lambda c: c.ascent_starts > 2, "set {ascent_starts} above 2")
ASCENDS = OnlyIf("ascent_steps", lambda c: c.ascent_steps > 0, "set {ascent_steps} above 0")
HAS_SEVERAL_CRITICS = OnlyIf("num_critics", lambda c: c.num_critics > 1, "set {num_critics} above 1")
CLIPS = OnlyIf("gradient_clip", lambda c: c.gradient_clip > 0, "set {gradient_clip} above 0")
EVALUATES = OnlyIf("evaluate_every", lambda c: c.evaluate_every > 0, "set {evaluate_every} above 0")
HAS_CHUNKS = OnlyIf("chunk_size", lambda c: c.chunk_size > 1, "set {chunk_size} above 1")
LEARNS_ONLINE = OnlyIf("online_steps", lambda c: c.online_steps > 0, "set {online_steps} above 0")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run, apart from the data.

    The methods are variants of one algorithm: `bc` trains only the behaviour prior (behaviour cloning), `qam` adds a
    policy tilted by `exp(inverse_temperature * Q)`, `me-am` also flattens the prior by `entropy_coef` and widens it by
    `mixture_weight`; `qam-edit` adds a bounded residual policy to `qam`, and `trqam` a KL budget in place of the
    temperature. `TrainConfig.preset` sets these consistently. The `qam` and `trqam` presets use the published scheme
    (Euler, `adjoint`, `sde="reference"`), `me-am` the most accurate one in `benchmarks/accuracy`; every preset's scheme
    can be changed.
    """

    method: Method = "me-am"
    """Method: bc, qam, qam-edit, trqam or me-am."""
    steps: Annotated[int, Range(least=1)] = 100_000
    """Gradient steps (updates), including those of pretraining."""
    pretrain_steps: Annotated[int | None, Range(least=0), TRAINS_POLICY] = None
    """Initial updates that train the prior on the data, and the critics if `pretrain_critics`; they are cheap. The
    policy then starts as the prior's copy. None takes three fifths of the steps in me-am, else three tenths."""
    pretrain_critics: Annotated[bool, TRAINS_POLICY, PRETRAINS] = True
    """Train the critics on the data's discounted returns (Monte Carlo) in pretraining, at most until they have seen the
    data five times, so that they start from the behaviour's values."""
    batch_size: Annotated[int, Range(least=1, cap=_ROWS)] = 256
    """Action chunks in a batch."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the initial weights, the batches and all noise."""
    device: Annotated[str, Text('"auto", "cpu", "cuda" or "cuda:N"'), HowItRuns()] = "auto"
    """Device to train on: auto (CUDA if available), cpu, cuda or cuda:N."""
    threads: Annotated[int | None, Range(least=1, cap=_THREADS), HowItRuns()] = None
    """CPU threads; None leaves the choice to PyTorch. For small networks one thread is just as fast, and does not stall
    on a busy machine."""
    precision: Precision = "float32"
    """Element type of the matrix products: float32, or bf16 for speed; weights, sums and the optimiser stay in
    float32."""
    compile: Annotated[bool, HowItRuns()] = False
    """Compile the update (and on CUDA capture it as one graph): training starts about a minute later, then runs faster.
    Without a C++ compiler, training warns and runs uncompiled. `meam train` compiles runs of 10000 updates and more
    unless told otherwise."""
    hidden_dims: Annotated[tuple[int, ...], Range(least=1, cap=_WIDE)] = (512, 512, 512, 512)
    """Widths of the hidden layers of the two velocity fields, and of the edit and one-step policies."""
    layer_norm: bool = False
    """Normalise the hidden layers of the two velocity fields (LayerNorm after the activation), as those of the critics
    always are; TRQAM does so in its large networks, of width 1024."""
    critic_hidden_dims: Annotated[tuple[int, ...], Range(least=1, cap=_WIDE), TRAINS_POLICY] = (512, 512, 512, 512)
    """Widths of the hidden layers of each critic."""
    num_critics: Annotated[int, Range(least=1, cap=_CRITICS), TRAINS_POLICY] = 10
    """Number of critics in the ensemble."""
    observation_limit: Annotated[float | None, Range(above=0)] = 10.0
    """Bound on each number of a normalised observation, standard deviations, in training and in the exported graph: far
    from the data a network extrapolates without limit. None for no bound, as published."""
    action_scaling: ActionScaling = "data"
    """What the flow's [-1, 1] stands for in every number of an action: the range of the data with a tenth of its width
    on either side, within the action box, or the whole box, as published. Actions beyond it are never chosen:
    take the box for online training that is to leave the range of the data."""
    precondition: bool = True
    """Build the velocity of a Gaussian with the mean and the standard deviation of the data's actions into the velocity
    fields, so that their networks learn only what differs from it."""
    normalise_values: Annotated[bool, TRAINS_POLICY] = True
    """Put the critics' outputs in units of the data's discounted returns: values start at their mean, and the loss does
    not depend on the scale of the rewards. Reported values stay in units of reward."""
    fourier_features: Annotated[int, Range(least=0, cap=_WIDE)] = 0
    """Random Fourier features of the normalised observation, cosines and sines together; an even number, 0 for none.
    They let small networks represent sharp changes, like those at the walls of a maze."""
    fourier_scale: Annotated[float, Range(above=0), HAS_FOURIER_FEATURES] = 1.0
    """Standard deviation of the Fourier frequencies, in radians per standard deviation of an observation."""
    nfe: Annotated[int, Range(least=1, cap=MAX_STEPS)] = 10
    """Number of function evaluations K of the velocity from noise to action, in training and by default in the
    exported policy."""
    solver: Solver = "midpoint"
    """ODE solver: euler takes K steps, midpoint K / 2 second-order steps at the same cost."""
    confine: bool = True
    """Clip the denoised action at each evaluation to the action box, which contains the mean of any actions."""
    best_of: Annotated[int, Range(least=1, cap=MAX_STEPS), TRAINS_POLICY] = 1
    """Best-of-N sampling: number of chunks drawn for TD targets and for acting; the one of highest value is used."""
    chunk_size: Annotated[int, Range(least=1, cap=MAX_STEPS)] = 1
    """Actions in a chunk, predicted by one inference."""
    pad_chunks: Annotated[bool, HAS_CHUNKS] = True
    """Learn from every row: of a chunk that crosses the end of its episode, the prior learns the actions within it, and
    the critics its rewards if the task ended there. Otherwise such chunks are left out, as in the published scheme, and
    with them all of every episode shorter than a chunk."""
    execute_steps: Annotated[int | None, Range(least=1, cap=MAX_STEPS)] = None
    """Execution horizon: actions of a chunk executed before the next inference; None executes the whole chunk."""
    discount: Annotated[float, Range(above=0, most=1), TRAINS_POLICY] = 0.99
    """Discount gamma per environment step."""
    reward_offset: Annotated[float | None, Range(), TRAINS_POLICY] = None
    """Constant taken off every reward before training, units of reward; it is added to the values again, by its mean
    over the data. None takes off, with `normalise_values`, the one that explains most of the returns if all episodes of
    the data that terminate do so after the same number of steps: there a constant decides nothing, but critics would
    have to tell how much time is left. 0 takes off nothing, as is right where other actions could end an episode sooner
    or later."""
    inverse_temperature: Annotated[float, Range(least=0), HAS_NO_BUDGET] = 1.0
    """Weight tau of Q in the policy's target density; 0 reproduces the prior."""
    kl_budget: Annotated[float | None, Range(above=0)] = None
    """KL divergence of the policy from the prior, nats per action of a chunk: inverse_temperature is then found while
    training, whatever the scale of the rewards. None keeps inverse_temperature constant."""
    kl_dual: Annotated[Dual, HAS_BUDGET] = "log"
    """How the temperature is found: log (in the logarithm, in units of what the critics' values ask for), or reference
    (in steps of fixed size, as published for TRQAM)."""
    entropy_coef: Annotated[float, Range(least=0, below=1)] = 0.1
    """Entropy coefficient lambda in [0, 1): the policy's target density is p_prior^(1 - lambda) exp(tau Q), up to a
    constant. With kl_budget, lambda is this where the budget is spent as the values' leading order predicts or is not
    spent, and smaller where little is to be spent."""
    objective: Annotated[Objective, TRAINS_POLICY] = "two_scale"
    """How the policy is trained: two_scale (importance weights early in flow time, the adjoint late), reweighted (flow
    matching on samples of policy and prior, with importance weights), adjoint (adjoint matching along an SDE), bridge
    (adjoint matching on bridges, without an SDE), target_score (regression on the target's score)."""
    switch_time: Annotated[float, Range(above=0, below=1), TRAINS_POLICY, SWITCHES] = 0.7
    """Flow time at which the two_scale objective changes from weights to the adjoint. Before it, modes further apart
    than (1 - switch_time) / switch_time are decided; within what is left, the density should be close to Gaussian."""
    bridge_adjoint: Annotated[BridgeAdjoint, TRAINS_POLICY, FOLLOWS_BRIDGES] = "denoiser"
    """Adjoint of the bridge objective: denoiser (carried back by the Jacobian of the prior's denoised action), or
    scalar (scaled by t, as published by SQAM)."""
    sde: Annotated[Scheme, TRAINS_POLICY, FOLLOWS_SDE] = "ancestral"
    """Discretisation of the adjoint objective's SDE: ancestral (exact linear part), or reference (Euler-Maruyama, as
    published)."""
    sde_steps: Annotated[int | None, Range(least=1, cap=MAX_STEPS), TRAINS_POLICY, FOLLOWS_SDE] = None
    """SDE steps of the adjoint objective; None takes nfe."""
    candidates: Annotated[int, Range(least=1, cap=_WIDE), TRAINS_POLICY, WEIGHS] = 8
    """Weighted samples per observation, 4 or more; a quarter of them come from the prior in the reweighted objective,
    an eighth in two_scale. An update draws batch_size of them in total, two_scale half as many. Few candidates bias the
    policy towards the prior, in proportion to 1 / candidates."""
    likelihood_steps: Annotated[int, Range(least=1, cap=MAX_STEPS), TRAINS_POLICY, WEIGHS] = 5
    """Midpoint steps for the log densities of the weighted samples."""
    divergence_probes: Annotated[int, Range(least=1, cap=_WIDE), TRAINS_POLICY, WEIGHS] = 2
    """Directions along which the divergence in these log densities is evaluated; exact if there are as many as
    components in an action chunk."""
    mirror_stages: Annotated[int, Range(least=1), TRAINS_POLICY] = 1
    """Mirror-descent stages, of equal numbers of updates: the policy of one stage becomes the prior of the next."""
    score_eps: Annotated[float, Range(above=0, below=1), TRAINS_POLICY, TAKES_SCORES, READS_SCORE] = 0.1
    """Evaluate the prior's score from its velocity at t = 1 - score_eps."""
    score_limit: Annotated[float, Range(above=0), TRAINS_POLICY, TAKES_SCORES, READS_SCORE] = 10.0
    """Bound on each component of the prior's score, per normalised action unit: outside the data, a learned score
    extrapolates without bound."""
    mixture_weight: Annotated[float, Range(least=0, below=1)] = 0.0
    """Share w in [0, 1) of Q-maximised action chunks in the prior's batches."""
    mixture_bandwidth: Annotated[float, Range(above=0), TRAINS_POLICY, MIXES_PRIOR] = 0.05
    """Standard deviation of the noise added to Q-maximised actions, normalised action units; without it they would be
    point masses, which have no density."""
    adaptive_mixture: Annotated[bool, TRAINS_POLICY, MIXES_PRIOR, HAS_SEVERAL_CRITICS] = False
    """Keep a Q-maximised action only with probability min(1, v / v_Q), where v is the critics' mean variance at the
    data's actions and v_Q their variance at the Q-maximised one. This distrusts actions unlike those in the data."""
    ascent_starts: Annotated[int, Range(least=1, cap=_WIDE), TRAINS_POLICY, MIXES_PRIOR] = 4
    """Starts of the gradient ascent to Q-maximised actions: the data's action, then alternately samples of the prior
    and copies of the data's action perturbed by ascent_spread."""
    ascent_spread: Annotated[float, Range(least=0), TRAINS_POLICY, MIXES_PRIOR, PERTURBS_STARTS] = 0.2
    """Standard deviation of the perturbed starts, normalised action units."""
    ascent_steps: Annotated[int, Range(least=0, cap=MAX_STEPS), TRAINS_POLICY, MIXES_PRIOR] = 5
    """Ascent steps (projected gradient ascent) to Q-maximised actions."""
    ascent_step_size: Annotated[float, Range(above=0), TRAINS_POLICY, MIXES_PRIOR, ASCENDS] = 0.05
    """Length of the first ascent step, root mean square per action component, normalised action units; the length
    decreases linearly to zero."""
    trust_radius: Annotated[float, Range(above=0), TRAINS_POLICY, MIXES_PRIOR, ASCENDS] = 0.5
    """Largest distance of a Q-maximised action from its start, root mean square per action component, normalised action
    units."""
    edit_scale: Annotated[float, Range(least=0)] = 0.0
    """Bound on each component of qam-edit's residual edits, normalised action units; 0 for no edit policy."""
    edit_target_entropy: Annotated[float | None, Range(), EDITS] = None
    """Target entropy of the edit policy, nats; None takes -0.5 per action component, as in the reference."""
    distill_coef: Annotated[float, Range(least=0), TRAINS_POLICY] = 0.0
    """Weight of distillation in a one-step policy trained alongside the flow (FQL); 0 trains none."""
    pessimism: Annotated[float, Range(least=0), TRAINS_POLICY, HAS_SEVERAL_CRITICS] = 0.5
    """Pessimism rho: values are the ensemble's mean minus rho times its standard deviation."""
    value_penalty: Annotated[float, Range(least=0), TRAINS_POLICY] = 0.0
    """Weight c of the penalty c (Q(s, a_policy) - Q(s, a_data)) / inverse_temperature in the critics' loss, which keeps
    the policy's actions from being valued above the data's for nothing: c / 2 nats for each multiple of the data's
    density by which the policy exceeds it. Weighed by the discount of the value that a target rests on, so that chunks
    which end their episode have none."""
    learning_rate: Annotated[float | None, Range(above=0)] = None
    """Adam's learning rate, for all networks. None takes 3e-4, and in me-am 1e-3 if no layer has 256 units or more:
    small networks learn too slowly otherwise to follow a target that moves."""
    gradient_clip: Annotated[float, Range(least=0)] = 1.0
    """Largest norm of the gradients; 0 for no clipping."""
    joint_clip: Annotated[bool, TRAINS_POLICY, CLIPS] = False
    """Clip the gradients of all networks by their joint norm, as published, rather than each network's by its own."""
    polyak: Annotated[float | None, Range(above=0, most=1), TRAINS_POLICY] = None
    """Rate of the Polyak averaging of the target networks, each update. None takes the published 0.005, and in me-am
    more where the run is short: so much, up to 0.05, that they are renewed 40 times after pretraining. What chunks are
    worth moves on by one chunk in a renewal, and the acting policy follows the trained one. Errors move on too: where
    the effective horizon 1 / (1 - discount^chunk_size) is above ten chunks, there are fewer renewals in proportion."""
    checkpoint_every: Annotated[int, Range(least=1), HowItRuns()] = 10_000
    """Updates between checkpoints; the last update always writes one."""
    keep_checkpoints: Annotated[int, Range(least=1), HowItRuns()] = 3
    """Number of newest checkpoints to keep, besides the best one; older ones are deleted."""
    log_every: Annotated[int, Range(least=1), HowItRuns()] = 100
    """Updates between rows of metrics.csv; each row averages over the updates since the last one."""
    loggers: Annotated[tuple[Logger, ...], HowItRuns()] = ()
    """Loggers in addition to metrics.csv: tensorboard, wandb."""
    evaluate_every: Annotated[int, Range(least=0), HowItRuns()] = 0
    """Updates between evaluations, in the environment or, without one, on the data; the last update is evaluated too.
    0 for none."""
    evaluate_episodes: Annotated[int, Range(least=1), HowItRuns(), EVALUATES] = 20
    """Episodes per evaluation in the environment."""
    online_steps: Annotated[int, Range(least=0)] = 0
    """Environment steps of online training, after the `steps` offline updates; 0 for none."""
    online_warmup: Annotated[int, Range(least=0), LEARNS_ONLINE] = 1000
    """Initial online steps that only act and record, without updates."""
    updates_per_step: Annotated[int, Range(least=1), LEARNS_ONLINE] = 1
    """Updates per online step after the warm-up."""
    offline_share: Annotated[float | None, Range(least=0, most=1), LEARNS_ONLINE] = None
    """Share of an online update's batch drawn from the offline data; None draws uniformly from all rows."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field is out of range, conflicts with another, or has no effect but is not at its preset's
                default.
        """
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_plain(value))
        fields, values = fields_of(type(self)), vars(self)
        check_fields(fields, values)
        for name, value in _FIXED[self.method].items():
            if values[name] != value:
                raise _refused(
                    f"{{{name}}} is {{0}}; the preset {{1}} fixes it at {{2}}. Leave it out, or take me-am. In Python, "
                    'TrainConfig.preset("{1}") sets it.',
                    values[name],
                    self.method,
                    value,
                )
        for name, condition in _without_effect(fields, values).items():
            raise _no_effect(name, condition, values)
        self._check_together()

    def _check_together(self) -> None:
        """Check constraints between fields."""
        if self.nfe % EVALUATIONS[self.solver]:
            raise _refused(
                "{nfe} is {0}; expected a multiple of {1}, the evaluations per step of {solver:{2}}, or "
                '{solver:"euler"}.',
                self.nfe,
                EVALUATIONS[self.solver],
                _shown(self.solver),
            )
        if self.objective in ("reweighted", "two_scale") and self.trains_policy:
            if self.batch_size < 4:
                raise _refused(
                    "{batch_size} is {0}; expected 4 or more with {objective:{1}}. For smaller batches take "
                    '{objective:"adjoint"}.',
                    self.batch_size,
                    _shown(self.objective),
                )
            if not 4 <= self.candidates <= self.batch_size:
                raise _refused(
                    "{candidates} is {0}; expected 4 to {batch_size} = {1}.", self.candidates, self.batch_size
                )
        follows_sde = self.objective == "adjoint" and self.trains_policy
        if follows_sde and self.sde == "ancestral" and (self.sde_steps or self.nfe) < 2:
            name = "nfe" if self.sde_steps is None else "sde_steps"
            raise _refused(
                f"{{{name}}} is 1; expected 2 or more, because the last ancestral step is noiseless and trains nothing."
            )
        if 0 < self.online_steps <= self.online_warmup:
            raise _refused(
                "{online_steps} is {0}, all of it warm-up; expected more than {online_warmup} = {1}, or 0.",
                self.online_steps,
                self.online_warmup,
            )
        if self.fourier_features % 2:
            raise _refused("{fourier_features} is {0}; expected an even number.", self.fourier_features)
        if self.execute_steps is not None and self.execute_steps > self.chunk_size:
            raise _refused(
                "{execute_steps} is {0}; expected a whole number, 1 to {chunk_size} = {1}.",
                self.execute_steps,
                self.chunk_size,
            )
        if (self.edit_scale > 0) != (self.method == "qam-edit"):
            expected = "above 0 for qam-edit" if self.method == "qam-edit" else f"0 for {self.method}"
            raise _refused("{edit_scale} is {0}; expected {1}.", self.edit_scale, expected)
        if self.method == "trqam" and self.kl_budget is None:
            raise _refused("{kl_budget} is None; expected a number above 0 for trqam. Without one, take qam.")
        if self.pretraining >= self.steps:
            raise _refused(
                "{pretrain_steps} is {0}; expected fewer than {steps} = {1}. Raise {steps}, or lower {pretrain_steps} "
                "in a new run: a resumed one keeps what it began with.",
                self.pretrain_steps,
                self.steps,
            )
        joint = self.steps - self.pretraining
        if self.mirror_stages > joint:
            raise _refused(
                "{mirror_stages} is {0}; expected at most the {1} updates after pretraining.",
                self.mirror_stages,
                joint,
            )

    @property
    def integration(self) -> Integration:
        """How the policy's ODE is integrated in training, and by default in the exported policy."""
        return Integration(self.nfe, self.solver, None, self.best_of)

    @property
    def pretraining(self) -> int:
        """Updates on the data alone: `pretrain_steps`, or the share of the steps that it stands for."""
        if self.pretrain_steps is None:
            share = LONG_SHARE if self.method == "me-am" else PRETRAINING_SHARE
            return int(share * self.steps) if self.trains_policy else 0
        return self.pretrain_steps

    @property
    def adam_rate(self) -> float:
        """Adam's learning rate: `learning_rate`, or what it stands for."""
        return self._usual_rate if self.learning_rate is None else self.learning_rate

    @property
    def _usual_rate(self) -> float:
        small = max(*self.hidden_dims, *self.critic_hidden_dims) < LARGE
        return SMALL_RATE if small and self.method == "me-am" else RATE

    @property
    def target_rate(self) -> float:
        """Rate of the target networks: `polyak`, or what it stands for."""
        return self._usual_target_rate if self.polyak is None else self.polyak

    @property
    def _usual_target_rate(self) -> float:
        if self.method != "me-am":
            return TARGET_RATE
        updates = max(1, self.steps - self.pretraining + self.online_steps)
        renewals = RENEWALS * min(1.0, NEAR * (1 - self.discount**self.chunk_size))
        return min(max(TARGET_RATE, renewals / updates), MOST_TARGET_RATE)

    @property
    def pretrains_critics(self) -> bool:
        """Whether there are updates that train the critics on the data's returns."""
        return self.trains_policy and self.pretrain_critics and self.pretraining > 0

    @property
    def trains_policy(self) -> bool:
        """Whether a policy flow is trained besides the prior; false for bc."""
        return self.method != "bc"

    @property
    def own_settings(self) -> dict[str, Any]:
        """Settings that differ from those of the method's preset, by name."""
        preset = _defaults(self.method)
        usual = {"learning_rate": self._usual_rate, "polyak": self._usual_target_rate}
        return {
            name: value
            for name, value in vars(self).items()
            if value != preset[name] and value != usual.get(name, preset[name])
        }

    def deciding(self, *, online: bool = True) -> dict[str, Any]:
        """Settings that determine the weights, by name: runs that agree in them are the same run.

        Excludes settings of how a run is executed and of how long it is: `online_steps`, and `steps` unless it is
        divided among several `mirror_stages`.

        Args:
            online: Whether to include the settings of online training; until it has begun, they affect nothing.
        """
        free = {name for name, field in fields_of(type(self)).items() if not field.decides} | {"online_steps"}
        if self.mirror_stages == 1:
            free.add("steps")
        if not online:
            free |= {name for name, field in fields_of(type(self)).items() if LEARNS_ONLINE in field.conditions}
        return {name: value for name, value in vars(self.resolved()).items() if name not in free}

    @typed()
    def resolved(self, begun: TrainConfig | None = None) -> TrainConfig:
        """The settings with numbers in place of None where it stands for one, which stay when `steps` changes.

        Args:
            begun: Settings of the run to be resumed, whose numbers stay where these are None.

        Raises:
            ConfigError: an argument has another type.
        """
        source = begun or self
        found: dict[str, Any] = {} if self.learning_rate is not None else {"learning_rate": source.adam_rate}
        if self.trains_policy and self.pretrain_steps is None:
            found["pretrain_steps"] = source.pretraining
        if self.trains_policy and self.polyak is None:
            found["polyak"] = source.target_rate
        if self.trains_policy and begun is not None and self.reward_offset is None:
            found["reward_offset"] = begun.reward_offset
        return dataclasses.replace(self, **found) if found else self

    @classmethod
    @typed()
    def preset(cls, name: str, shared: Mapping[str, Any] | None = None, /, **overrides: Any) -> TrainConfig:
        """Settings of a method, with overrides.

        Args:
            name: "bc", "qam", "qam-edit", "trqam" or "me-am".
            shared: Overrides shared by runs of several methods; those without effect on this one are ignored.
            **overrides: Further overrides, which take precedence.

        Raises:
            ConfigError: a preset or field is unknown (the message suggests the nearest known one), or a value is out of
                range or without effect.
        """
        if name not in PRESETS:
            raise ConfigError(unknown("preset", name, PRESETS))
        values = _defaults(name)
        for field in {**(shared or {}), **overrides}:
            if field not in values:
                raise ConfigError(unknown("training setting", field, values))
        given = {**(shared or {}), **overrides}
        values |= _constant_temperature(values, given) | given
        return cls(**_effective(fields_of(cls), values, overrides))

    def changed(self, **changes: Any) -> TrainConfig:
        """Copy the settings with changes; others that lose their effect as a result return to their defaults.

        Raises:
            ConfigError: a field is unknown, or a value is out of range or without effect.
        """
        values = vars(self)
        for field in changes:
            if field not in values:
                raise ConfigError(unknown("training setting", field, values))
        values = {**values, **_constant_temperature(values, changes), **changes}
        return TrainConfig(**_effective(fields_of(TrainConfig), values, changes))

    def to_json(self) -> str:
        """Serialise the settings as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Read settings written by `to_json`, including those of earlier versions.

        Earlier versions accepted settings without effect; these are reset to their defaults, so that every run can be
        resumed. Where such settings of a `bc` run take part in its random draws, the resumed run draws other numbers.

        Raises:
            ConfigError: the text is not JSON, or does not hold valid training settings.
        """
        try:
            written: dict[str, Any] = json.loads(text)
            fields = fields_of(cls)
            data: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
            data |= _BEFORE | {_RENAMED.get(name, name): value for name, value in written.items()}
            for name, field in fields.items():
                if get_origin(field.kind) is tuple:
                    data[name] = tuple(data[name])
            return cls(**_effective(fields, data))
        except ConfigError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"Not training settings: {error}.") from error


_RENAMED = {"flow_steps": "nfe", "mirror_steps": "mirror_stages", "ascent_candidates": "ascent_starts"}
"""Current names of settings, by the names in earlier versions."""

_BEFORE: dict[str, Any] = {
    "observation_limit": None,
    "action_scaling": "box",
    "precondition": False,
    "normalise_values": False,
    "pretrain_critics": False,
    "pad_chunks": False,
    "reward_offset": 0.0,
}
"""What earlier versions did, where a setting that they lack is now something else by default."""

_FIXED: Mapping[str, Mapping[str, float | None]] = MappingProxyType(
    {
        "bc": {"inverse_temperature": 0.0, "entropy_coef": 0.0, "mixture_weight": 0.0, "kl_budget": None},
        "qam": {"entropy_coef": 0.0, "mixture_weight": 0.0},
        "qam-edit": {"entropy_coef": 0.0, "mixture_weight": 0.0},
        "trqam": {"entropy_coef": 0.0, "mixture_weight": 0.0},
        "me-am": {},
    }
)

_PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {
        "objective": "adjoint",
        "sde": "reference",
        "solver": "euler",
        "confine": False,
        "joint_clip": True,
        "observation_limit": None,
        "action_scaling": "box",
        "precondition": False,
        "normalise_values": False,
        "pretrain_steps": 0,
        "pretrain_critics": False,
        "pad_chunks": False,
    }
)
"""The scheme of the public implementation of QAM."""

_SCHEMES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qam": _PUBLISHED,
        "qam-edit": {**_PUBLISHED, "edit_scale": 0.1},
        "trqam": {**_PUBLISHED, "kl_budget": 1.0, "kl_dual": "reference", "pretrain_steps": None},
        "me-am": {"kl_budget": 1.0, "value_penalty": 1.0},
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: {"method": name, **fixed, **_SCHEMES.get(name, {})} for name, fixed in _FIXED.items()}
)
"""Settings fixed or preset by each method; all others keep the defaults of `TrainConfig`."""


def _defaults(method: str) -> dict[str, Any]:
    plain = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return {**plain, **PRESETS[method]}


def _constant_temperature(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """No budget, where me-am is given a temperature instead: asking for one is asking for it to stay."""
    asked = values["method"] == "me-am" and "inverse_temperature" in given and "kl_budget" not in given
    return {"kl_budget": None} if asked else {}


def _without_effect(
    fields: Mapping[str, Field], values: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, OnlyIf]:
    """Fields without effect that were given, or are not at their preset's defaults, and the condition that fails.

    What is given as None is left to its default, and thus not given.
    """
    settings, defaults = SimpleNamespace(**values), _defaults(values["method"])
    failing = {
        name: next((condition for condition in field.conditions if not condition.holds(settings)), None)
        for name, field in fields.items()
        if values[name] != defaults[name] or (name in given and values[name] is not None)
    }
    return {name: condition for name, condition in failing.items() if condition is not None}


def _effective(fields: Mapping[str, Field], values: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Reset values without effect to their preset's defaults, but refuse those that were given explicitly."""
    values = {name: as_plain(value) for name, value in values.items()}
    check_fields(fields, values)
    idle, defaults = _without_effect(fields, values, given), _defaults(values["method"])
    found = {name: defaults[name] if name in idle.keys() - set(given) else value for name, value in values.items()}
    fixed = all(found[name] == value for name, value in _FIXED[values["method"]].items())
    for name in (name for name in idle if name in given and fixed):  # a preset's own refusal says more
        raise _no_effect(name, idle[name], found)
    return found


def _no_effect(name: str, condition: OnlyIf, values: Mapping[str, Any]) -> ConfigError:
    where = f"{{{condition.other}:{{1}}}}"
    return _refused(
        f"{{{name}}} is {{0}}, but has no effect with {where}; leave it out, or {condition.remedy}.",
        _shown(values[name]),
        _shown(values[condition.other]),
    )


def _refused(template: str, *values: object) -> ConfigError:
    return ConfigError(SettingText(template, *values))


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
