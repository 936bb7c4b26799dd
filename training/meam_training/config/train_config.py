"""Training settings: one frozen dataclass, and the presets that name the methods."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Literal, get_origin

from meam_policy.errors import ConfigError
from meam_policy.spec import EVALUATIONS, Integration, Solver
from meam_training.config.declaration import (
    Field,
    HowItRuns,
    OnlyIf,
    Range,
    Text,
    check_fields,
    fields_of,
    unknown,
)

__all__ = ["PRESETS", "Logger", "Method", "Objective", "Precision", "Scheme", "TrainConfig"]

Method = Literal["bc", "qam", "qam-edit", "me-am"]
Objective = Literal["reweighted", "adjoint", "target_score"]
Scheme = Literal["ancestral", "reference"]
Precision = Literal["float32", "bf16"]
Logger = Literal["tensorboard", "wandb"]


# When settings have an effect; beside each other in the order in which the first that fails is named.
TRAINS_POLICY = OnlyIf("method", lambda c: c.method != "bc", "take another method")
EDITS = OnlyIf("method", lambda c: c.method == "qam-edit", 'take method="qam-edit"')
HAS_FOURIER_FEATURES = OnlyIf("fourier_features", lambda c: c.fourier_features > 0, "set fourier_features above 0")
FOLLOWS_SDE = OnlyIf("objective", lambda c: c.objective == "adjoint", 'set objective="adjoint"')
REWEIGHTS = OnlyIf("objective", lambda c: c.objective == "reweighted", 'set objective="reweighted"')
TAKES_GRADIENTS = OnlyIf(
    "objective", lambda c: c.objective != "reweighted", 'set objective="adjoint" or objective="target_score"'
)
READS_SCORE = OnlyIf(
    "entropy_coef",
    lambda c: c.entropy_coef > 0 or c.objective == "target_score",
    'set entropy_coef above 0 with method="me-am", or objective="target_score"',
)
MIXES_PRIOR = OnlyIf("mixture_weight", lambda c: c.mixture_weight > 0, 'set mixture_weight above 0 with method="me-am"')
PERTURBS_STARTS = OnlyIf("ascent_starts", lambda c: c.ascent_starts > 2, "set ascent_starts above 2")
ASCENDS = OnlyIf("ascent_steps", lambda c: c.ascent_steps > 0, "set ascent_steps above 0")
HAS_SEVERAL_CRITICS = OnlyIf("num_critics", lambda c: c.num_critics > 1, "set num_critics above 1")
CLIPS = OnlyIf("gradient_clip", lambda c: c.gradient_clip > 0, "set gradient_clip above 0")
EVALUATES = OnlyIf("evaluate_every", lambda c: c.evaluate_every > 0, "set evaluate_every above 0")
LEARNS_ONLINE = OnlyIf("online_steps", lambda c: c.online_steps > 0, "set online_steps above 0")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, apart from the data.

    The methods are one algorithm: `bc` trains only the behaviour prior, `qam` adds a policy tilted by
    `exp(inverse_temperature * Q)`, `me-am` also flattens the prior by `entropy_coef` and widens it by
    `mixture_weight`; `qam-edit` adds a bounded residual policy to `qam`. `TrainConfig.preset` sets these consistently.
    The `qam` presets take the published scheme (Euler, `adjoint`, `sde="reference"`), `me-am` the one that
    `benchmarks/accuracy` measured best; every preset's scheme can be changed.
    """

    method: Method = "me-am"
    """Name of the method: bc, qam, qam-edit or me-am."""
    steps: Annotated[int, Range(least=1)] = 100_000
    """Gradient updates, those of pretraining included."""
    pretrain_steps: Annotated[int, Range(least=0)] = 0
    """First updates that train only the prior, on the data; they are cheap. The policy then starts as its copy."""
    batch_size: Annotated[int, Range(least=1)] = 256
    """Action chunks in a batch."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the weights, the batches and all noise."""
    device: Annotated[str, Text('"auto", "cpu", "cuda" or "cuda:N"'), HowItRuns()] = "auto"
    """Where to train: auto (CUDA if there is one), cpu, cuda or cuda:N."""
    threads: Annotated[int | None, Range(least=1), HowItRuns()] = None
    """CPU threads; None is PyTorch's choice. For small networks one is as fast, and never stalls on a busy machine."""
    precision: Precision = "float32"
    """Type of the matrix products: float32, or bf16 for speed; weights, sums and the optimiser stay in float32."""
    compile: Annotated[bool, HowItRuns()] = False
    """Compile the update (and on CUDA capture it as one graph): a wait of a minute or two at the start, then faster.
    Without a C++ compiler it says so and goes on uncompiled."""
    hidden_dims: Annotated[tuple[int, ...], Range(least=1)] = (512, 512, 512, 512)
    """Hidden layers of the two velocity fields, and of the edit and one-step policies."""
    critic_hidden_dims: Annotated[tuple[int, ...], Range(least=1), TRAINS_POLICY] = (512, 512, 512, 512)
    """Hidden layers of every critic."""
    num_critics: Annotated[int, Range(least=1), TRAINS_POLICY] = 10
    """Members of the critic ensemble."""
    fourier_features: Annotated[int, Range(least=0)] = 0
    """Random Fourier features of the normalised observation, cosines and sines together; 0 for none, else even.
    They let small networks follow sharp changes, such as the walls of a maze."""
    fourier_scale: Annotated[float, Range(above=0), HAS_FOURIER_FEATURES] = 1.0
    """Standard deviation of the Fourier frequencies, in radians per standard deviation of an observation."""
    nfe: Annotated[int, Range(least=1)] = 10
    """Evaluations K of the velocity from noise to action, in training and by default in the exported policy."""
    solver: Solver = "midpoint"
    """Integration scheme: euler takes K steps, midpoint K / 2 steps of second order, at the same cost."""
    confine: bool = True
    """Whether the denoised action of every evaluation is clipped to the action box, in which the mean of actions
    lies."""
    best_of: Annotated[int, Range(least=1), TRAINS_POLICY] = 1
    """Chunks drawn at TD targets and when acting, of which the one with the highest value is taken."""
    chunk_size: Annotated[int, Range(least=1)] = 1
    """Actions predicted by one inference."""
    execute_steps: Annotated[int | None, Range(least=1)] = None
    """Actions of a chunk executed before the next inference; None executes the whole chunk."""
    discount: Annotated[float, Range(above=0, most=1), TRAINS_POLICY] = 0.99
    """Discount per environment step, gamma."""
    inverse_temperature: Annotated[float, Range(least=0)] = 1.0
    """Weight tau of Q in the policy's target; 0 follows the prior."""
    entropy_coef: Annotated[float, Range(least=0, below=1)] = 0.1
    """Lambda in [0, 1): the policy's target is the prior's density to the power 1 - lambda, times exp(tau Q)."""
    objective: Annotated[Objective, TRAINS_POLICY] = "reweighted"
    """How the policy is trained: reweighted (its own and the prior's samples, weighted by the target's density over
    theirs), adjoint (adjoint matching along an SDE), target_score (regression on the target's score)."""
    sde: Annotated[Scheme, TRAINS_POLICY, FOLLOWS_SDE] = "ancestral"
    """Scheme of the adjoint objective's SDE: ancestral (exact linear part), or reference (Euler-Maruyama, as
    published)."""
    sde_steps: Annotated[int | None, Range(least=1), TRAINS_POLICY, FOLLOWS_SDE] = None
    """Steps of that SDE; None takes nfe."""
    candidates: Annotated[int, Range(least=1), TRAINS_POLICY, REWEIGHTS] = 8
    """Samples per observation of the reweighted objective, a quarter of them from the prior; 4 or more. An update takes
    batch_size samples in all. Few samples bias the policy towards the prior, in proportion to 1 / candidates."""
    likelihood_steps: Annotated[int, Range(least=1), TRAINS_POLICY, REWEIGHTS] = 5
    """Midpoint steps of its log densities."""
    divergence_probes: Annotated[int, Range(least=1), TRAINS_POLICY, REWEIGHTS] = 2
    """Directions in which their divergence is measured; exact from the dimension of the action chunk on."""
    mirror_stages: Annotated[int, Range(least=1), TRAINS_POLICY] = 1
    """Stages of mirror descent: the policy of one stage is the next one's prior. Equal shares of the updates."""
    score_eps: Annotated[float, Range(above=0, below=1), TRAINS_POLICY, TAKES_GRADIENTS, READS_SCORE] = 0.1
    """The prior's score is read off its velocity at t = 1 - score_eps."""
    score_limit: Annotated[float, Range(above=0), TRAINS_POLICY, TAKES_GRADIENTS, READS_SCORE] = 10.0
    """Bound on every component of the prior's score, per normalised action unit: outside the data a learned score
    extrapolates without limit."""
    mixture_weight: Annotated[float, Range(least=0, below=1)] = 0.1
    """w in [0, 1): share of Q-maximised action chunks in the prior's batches."""
    mixture_bandwidth: Annotated[float, Range(above=0), TRAINS_POLICY, MIXES_PRIOR] = 0.05
    """Standard deviation of the noise on Q-maximised actions, normalised action units; a point mass has no density."""
    adaptive_mixture: Annotated[bool, TRAINS_POLICY, MIXES_PRIOR, HAS_SEVERAL_CRITICS] = False
    """Keep a Q-maximised action only with the probability min(1, v / v_Q): the critics' variance at the data's
    actions over that at the Q-maximised one. It distrusts what the critics have not seen."""
    ascent_starts: Annotated[int, Range(least=1), TRAINS_POLICY, MIXES_PRIOR] = 4
    """Starting points of the search for Q-maximised actions: the data's action, then samples of the prior and copies
    of the data's action perturbed by ascent_spread in turn."""
    ascent_spread: Annotated[float, Range(least=0), TRAINS_POLICY, MIXES_PRIOR, PERTURBS_STARTS] = 0.2
    """Standard deviation of those perturbations, normalised action units."""
    ascent_steps: Annotated[int, Range(least=0), TRAINS_POLICY, MIXES_PRIOR] = 5
    """Projected gradient-ascent steps of that search."""
    ascent_step_size: Annotated[float, Range(above=0), TRAINS_POLICY, MIXES_PRIOR, ASCENDS] = 0.05
    """Length of the first ascent step, root mean square per action component, normalised action units; it shrinks
    linearly to zero."""
    trust_radius: Annotated[float, Range(above=0), TRAINS_POLICY, MIXES_PRIOR, ASCENDS] = 0.5
    """Largest distance of a Q-maximised action from its starting point, root mean square per component."""
    edit_scale: Annotated[float, Range(least=0)] = 0.0
    """Bound on the residual edits of qam-edit, normalised action units; 0 for no edit policy."""
    edit_target_entropy: Annotated[float | None, Range(), EDITS] = None
    """Entropy that the edit policy's temperature aims at; None is -0.5 per action component, as in the reference."""
    distill_coef: Annotated[float, Range(least=0), TRAINS_POLICY] = 0.0
    """Weight of imitating the flow in a one-step policy trained beside it (FQL); 0 trains none."""
    pessimism: Annotated[float, Range(least=0), TRAINS_POLICY, HAS_SEVERAL_CRITICS] = 0.5
    """rho: values are the ensemble's mean minus rho times its standard deviation."""
    learning_rate: Annotated[float, Range(above=0)] = 3e-4
    """Adam's learning rate, for all networks."""
    gradient_clip: Annotated[float, Range(least=0)] = 1.0
    """Bound on the norm of the gradients; 0 for none."""
    joint_clip: Annotated[bool, TRAINS_POLICY, CLIPS] = False
    """Clip the joint norm of all networks, as published, rather than each network's own."""
    polyak: Annotated[float, Range(above=0, most=1), TRAINS_POLICY] = 0.005
    """Rate at which the target networks follow."""
    checkpoint_every: Annotated[int, Range(least=1), HowItRuns()] = 10_000
    """Updates between checkpoints; the last update always writes one."""
    keep_checkpoints: Annotated[int, Range(least=1), HowItRuns()] = 3
    """Newest checkpoints kept, beside the best one; older ones are deleted."""
    log_every: Annotated[int, Range(least=1), HowItRuns()] = 100
    """Updates between rows of metrics.csv, each a mean over them."""
    loggers: Annotated[tuple[Logger, ...], HowItRuns()] = ()
    """Where metrics go beside metrics.csv: tensorboard, wandb."""
    evaluate_every: Annotated[int, Range(least=0), HowItRuns()] = 0
    """Updates between evaluations, in the environment or else on the data, and one at the end; 0 for none."""
    evaluate_episodes: Annotated[int, Range(least=1), HowItRuns(), EVALUATES] = 20
    """Episodes of an evaluation in the environment."""
    online_steps: Annotated[int, Range(least=0)] = 0
    """Steps in the environment after the `steps` offline updates, learning on; 0 for none."""
    online_warmup: Annotated[int, Range(least=0), LEARNS_ONLINE] = 1000
    """First online steps, which only act and record."""
    updates_per_step: Annotated[int, Range(least=1), LEARNS_ONLINE] = 1
    """Updates for every online step after these."""
    offline_share: Annotated[float | None, Range(least=0, most=1), LEARNS_ONLINE] = None
    """Share of an online update's batch that is drawn from the offline data; None draws uniformly from all rows."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field is out of range, does not fit the others, or has no effect with them and is not at
                its preset's default.
        """
        fields, values = fields_of(type(self)), vars(self)
        check_fields(fields, values)
        for name, value in _FIXED[self.method].items():
            if values[name] != value:
                raise ConfigError(f"{name} is {values[name]}; the preset {self.method} fixes it at {value}.")
        for name, condition in _without_effect(fields, values).items():
            raise ConfigError(
                f"{name} is {_shown(values[name])}, but has no effect with {condition.other}="
                f"{_shown(values[condition.other])}; leave it out, or {condition.remedy}."
            )
        self._check_together()

    def _check_together(self) -> None:
        """Check what is at stake between fields."""
        if self.nfe % EVALUATIONS[self.solver]:
            raise ConfigError(
                f"nfe is {self.nfe}; expected a multiple of {EVALUATIONS[self.solver]}, as "
                f'{self.solver} takes so many at a time, or solver="euler".'
            )
        if self.objective == "reweighted" and self.trains_policy:
            if self.batch_size < 4:
                raise ConfigError(
                    f'batch_size is {self.batch_size}; expected 4 or more with objective="reweighted". '
                    'For smaller batches take objective="adjoint".'
                )
            if not 4 <= self.candidates <= self.batch_size:
                raise ConfigError(f"candidates is {self.candidates}; expected 4 to batch_size = {self.batch_size}.")
        follows_sde = self.objective == "adjoint" and self.trains_policy
        if follows_sde and self.sde == "ancestral" and (self.sde_steps or self.nfe) < 2:
            name = "nfe" if self.sde_steps is None else "sde_steps"
            raise ConfigError(
                f"{name} is 1; expected 2 or more, for the last ancestral step has no noise to learn from."
            )
        if 0 < self.online_steps <= self.online_warmup:
            raise ConfigError(
                f"online_steps is {self.online_steps}, all of it warm-up; expected more than online_warmup = "
                f"{self.online_warmup}, or 0."
            )
        if self.fourier_features % 2:
            raise ConfigError(f"fourier_features is {self.fourier_features}; expected an even number.")
        if self.execute_steps is not None and self.execute_steps > self.chunk_size:
            raise ConfigError(
                f"execute_steps is {self.execute_steps}; expected a whole number, 1 to chunk_size = {self.chunk_size}."
            )
        if (self.edit_scale > 0) != (self.method == "qam-edit"):
            expected = "above 0 for qam-edit" if self.method == "qam-edit" else f"0 for {self.method}"
            raise ConfigError(f"edit_scale is {self.edit_scale}; expected {expected}.")
        if self.pretrain_steps >= self.steps:
            raise ConfigError(f"pretrain_steps is {self.pretrain_steps}; expected fewer than steps = {self.steps}.")
        joint = self.steps - self.pretrain_steps
        if self.mirror_stages > joint:
            raise ConfigError(
                f"mirror_stages is {self.mirror_stages}; expected at most the {joint} updates after pretraining."
            )

    @property
    def integration(self) -> Integration:
        """How the policy acts while it is trained, and by default when it is exported."""
        return Integration(self.nfe, self.solver, None, self.best_of)

    @property
    def trains_policy(self) -> bool:
        """Whether there is a policy flow beside the prior: not for bc."""
        return self.method != "bc"

    def deciding(self, *, online: bool = True) -> dict[str, Any]:
        """The settings that decide the weights, by name: runs in which they are equal are the same run.

        Left out are those of how a run is carried out, and of how far it goes: `online_steps`, and `steps` unless
        there are several `mirror_stages`, which share them.

        Args:
            online: Whether the settings of learning online count; before it has begun, they have decided nothing.
        """
        free = {name for name, field in fields_of(type(self)).items() if not field.decides} | {"online_steps"}
        if self.mirror_stages == 1:
            free.add("steps")
        if not online:
            free |= {name for name, field in fields_of(type(self)).items() if LEARNS_ONLINE in field.conditions}
        return {name: value for name, value in vars(self).items() if name not in free}

    @classmethod
    def preset(cls, name: str, shared: Mapping[str, Any] | None = None, /, **overrides: Any) -> TrainConfig:
        """The settings of a named method, with changes.

        Args:
            name: "bc", "qam", "qam-edit" or "me-am".
            shared: Changes shared by runs of several methods; those that have no effect on this one are left out.
            **overrides: Further changes, which win.

        Raises:
            ConfigError: an unknown preset or field (with the nearest known one), or a value out of range or without
                effect.
        """
        if name not in PRESETS:
            raise ConfigError(unknown("preset", name, PRESETS))
        values = _defaults(name)
        for field in {**(shared or {}), **overrides}:
            if field not in values:
                raise ConfigError(unknown("training setting", field, values))
        return cls(**_put_back(fields_of(cls), {**values, **(shared or {}), **overrides}, overrides))

    def changed(self, **changes: Any) -> TrainConfig:
        """These settings with changes; others that thereby lose their effect go back to their defaults.

        Raises:
            ConfigError: an unknown field, or a value out of range or without effect.
        """
        values = vars(self)
        for field in changes:
            if field not in values:
                raise ConfigError(unknown("training setting", field, values))
        return TrainConfig(**_put_back(fields_of(TrainConfig), {**values, **changes}, changes))

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Read settings written by `to_json`, of earlier versions too.

        Those versions took settings without an effect; they are put back to their defaults, so that every run can be
        resumed. (A resumed `bc` run may draw other random numbers: there, the settings of the policy used to shift
        them.)

        Raises:
            ConfigError: not such settings.
        """
        try:
            written: dict[str, Any] = json.loads(text)
            fields = fields_of(cls)
            data: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
            data |= {_RENAMED.get(name, name): value for name, value in written.items()}
            for name, field in fields.items():
                if get_origin(field.kind) is tuple:
                    data[name] = tuple(data[name])
            return cls(**_put_back(fields, data))
        except ConfigError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"Not training settings: {error}.") from error


_RENAMED = {"flow_steps": "nfe", "mirror_steps": "mirror_stages", "ascent_candidates": "ascent_starts"}
"""Settings by the names under which earlier versions wrote them."""

_FIXED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "bc": {"inverse_temperature": 0.0, "entropy_coef": 0.0, "mixture_weight": 0.0},
        "qam": {"entropy_coef": 0.0, "mixture_weight": 0.0},
        "qam-edit": {"entropy_coef": 0.0, "mixture_weight": 0.0},
        "me-am": {},
    }
)

_PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {"objective": "adjoint", "sde": "reference", "solver": "euler", "confine": False, "joint_clip": True}
)
"""The scheme of the public implementation of QAM."""

_SCHEMES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"qam": _PUBLISHED, "qam-edit": {**_PUBLISHED, "edit_scale": 0.1}}
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: {"method": name, **fixed, **_SCHEMES.get(name, {})} for name, fixed in _FIXED.items()}
)
"""What the name of a method sets; everything else keeps the defaults of `TrainConfig`."""


def _defaults(method: str) -> dict[str, Any]:
    plain = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return {**plain, **PRESETS[method]}


def _without_effect(fields: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, OnlyIf]:
    """The fields that have no effect and are not at their preset's defaults, each with the condition that fails."""
    settings, defaults = SimpleNamespace(**values), _defaults(values["method"])
    failing = {
        name: next((condition for condition in field.conditions if not condition.holds(settings)), None)
        for name, field in fields.items()
        if values[name] != defaults[name]
    }
    return {name: condition for name, condition in failing.items() if condition is not None}


def _put_back(fields: Mapping[str, Field], values: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Values of which those without effect, unless given, are at their preset's defaults."""
    check_fields(fields, values)
    idle, defaults = _without_effect(fields, values).keys() - set(given), _defaults(values["method"])
    return {name: defaults[name] if name in idle else value for name, value in values.items()}


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
