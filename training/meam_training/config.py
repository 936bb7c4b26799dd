"""Training settings: one frozen dataclass, and the presets that name the methods."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from meam_policy.errors import ConfigError
from meam_policy.spec import EVALUATIONS, Solver

__all__ = ["PRESETS", "Logger", "Method", "Objective", "Precision", "Scheme", "TrainConfig"]

Method = Literal["bc", "qam", "qam-edit", "me-am"]
Objective = Literal["reweighted", "adjoint", "target_score"]
Scheme = Literal["ancestral", "reference"]
Precision = Literal["float32", "bf16"]
Logger = Literal["tensorboard", "wandb"]


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
    steps: int = 100_000
    """Gradient updates, those of pretraining included."""
    pretrain_steps: int = 0
    """First updates that train only the prior, on the data; they are cheap. The policy then starts as its copy."""
    batch_size: int = 256
    """Action chunks in a batch."""
    seed: int = 0
    """Seed of the weights, the batches and all noise."""
    device: str = "auto"
    """Where to train: auto (CUDA if there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; None is PyTorch's choice. For small networks one is as fast, and never stalls on a busy machine."""
    precision: Precision = "float32"
    """Type of the matrix products: float32, or bf16 for speed; weights, sums and the optimiser stay in float32."""
    compile: bool = False
    """Compile the update (and on CUDA capture it as one graph): a wait of a minute or two at the start, then faster.
    Without a C++ compiler it says so and goes on uncompiled."""
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of the two velocity fields, and of the edit and one-step policies."""
    critic_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden layers of every critic."""
    num_critics: int = 10
    """Members of the critic ensemble."""
    fourier_features: int = 0
    """Random Fourier features of the normalised observation, cosines and sines together; 0 for none, else even.
    They let small networks follow sharp changes, such as the walls of a maze."""
    fourier_scale: float = 1.0
    """Standard deviation of the Fourier frequencies, in radians per standard deviation of an observation."""
    nfe: int = 10
    """Evaluations K of the velocity from noise to action, in training and by default in the exported policy."""
    solver: Solver = "midpoint"
    """Integration scheme: euler takes K steps, midpoint K / 2 steps of second order, at the same cost."""
    confine: bool = True
    """Whether the denoised action of every evaluation is clipped to the action box, in which the mean of actions
    lies."""
    best_of: int = 1
    """Chunks drawn at TD targets and when acting, of which the one with the highest value is taken."""
    chunk_size: int = 1
    """Actions predicted by one inference."""
    execute_steps: int | None = None
    """Actions of a chunk executed before the next inference; None executes the whole chunk."""
    discount: float = 0.99
    """Discount per environment step, gamma."""
    inverse_temperature: float = 1.0
    """Weight tau of Q in the policy's target; 0 follows the prior."""
    entropy_coef: float = 0.1
    """Lambda in [0, 1): the policy's target is the prior's density to the power 1 - lambda, times exp(tau Q)."""
    objective: Objective = "reweighted"
    """How the policy is trained: reweighted (its own and the prior's samples, weighted by the target's density over
    theirs), adjoint (adjoint matching along an SDE), target_score (regression on the target's score)."""
    sde: Scheme = "ancestral"
    """Scheme of the adjoint objective's SDE: ancestral (exact linear part), or reference (Euler-Maruyama, as
    published)."""
    sde_steps: int | None = None
    """Steps of that SDE; None takes nfe."""
    candidates: int = 8
    """Samples per observation of the reweighted objective, a quarter of them from the prior; 4 or more. An update takes
    batch_size samples in all. Few samples bias the policy towards the prior, in proportion to 1 / candidates."""
    likelihood_steps: int = 5
    """Midpoint steps of its log densities."""
    divergence_probes: int = 2
    """Directions in which their divergence is measured; exact from the dimension of the action chunk on."""
    mirror_stages: int = 1
    """Stages of mirror descent: the policy of one stage is the next one's prior. Equal shares of the updates."""
    score_eps: float = 0.1
    """The prior's score is read off its velocity at t = 1 - score_eps."""
    score_limit: float = 10.0
    """Bound on every component of the prior's score, per normalised action unit: outside the data a learned score
    extrapolates without limit."""
    mixture_weight: float = 0.1
    """w in [0, 1): share of Q-maximised action chunks in the prior's batches."""
    mixture_bandwidth: float = 0.05
    """Standard deviation of the noise on Q-maximised actions, normalised action units; a point mass has no density."""
    adaptive_mixture: bool = False
    """Keep a Q-maximised action only with the probability min(1, v / v_Q): the critics' variance at the data's
    actions over that at the Q-maximised one. It distrusts what the critics have not seen."""
    ascent_starts: int = 4
    """Starting points of the search for Q-maximised actions: the data's action, then samples of the prior and copies
    of the data's action perturbed by ascent_spread in turn."""
    ascent_spread: float = 0.2
    """Standard deviation of those perturbations, normalised action units."""
    ascent_steps: int = 5
    """Projected gradient-ascent steps of that search."""
    ascent_step_size: float = 0.05
    """Length of the first ascent step, root mean square per action component, normalised action units; it shrinks
    linearly to zero."""
    trust_radius: float = 0.5
    """Largest distance of a Q-maximised action from its starting point, root mean square per component."""
    edit_scale: float = 0.0
    """Bound on the residual edits of qam-edit, normalised action units; 0 for no edit policy."""
    edit_target_entropy: float | None = None
    """Entropy that the edit policy's temperature aims at; None is -0.5 per action component, as in the reference."""
    distill_coef: float = 0.0
    """Weight of imitating the flow in a one-step policy trained beside it (FQL); 0 trains none."""
    pessimism: float = 0.5
    """rho: values are the ensemble's mean minus rho times its standard deviation."""
    learning_rate: float = 3e-4
    """Adam's learning rate, for all networks."""
    gradient_clip: float = 1.0
    """Bound on the norm of the gradients; 0 for none."""
    joint_clip: bool = False
    """Clip the joint norm of all networks, as published, rather than each network's own."""
    polyak: float = 0.005
    """Rate at which the target networks follow."""
    checkpoint_every: int = 10_000
    """Updates between checkpoints; the last update always writes one."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, beside the best one; older ones are deleted."""
    log_every: int = 100
    """Updates between rows of metrics.csv, each a mean over them."""
    loggers: tuple[Logger, ...] = ()
    """Where metrics go beside metrics.csv: tensorboard, wandb."""
    evaluate_every: int = 0
    """Updates between evaluations, in the environment or else on the data, and one at the end; 0 for none."""
    evaluate_episodes: int = 20
    """Episodes of an evaluation in the environment."""
    online_steps: int = 0
    """Steps in the environment after the `steps` offline updates, learning on; 0 for none."""
    online_warmup: int = 1000
    """First online steps, which only act and record."""
    updates_per_step: int = 1
    """Updates for every online step after these."""
    offline_share: float | None = None
    """Share of an online update's batch that is drawn from the offline data; None draws uniformly from all rows."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field is out of range, or does not fit the method.
        """
        if self.method not in get_args(Method):
            raise ConfigError(_unknown("method", str(self.method), get_args(Method)))
        at_least_one = ("steps", "batch_size", "num_critics", "nfe", "chunk_size", "ascent_starts")
        at_least_one += ("checkpoint_every", "log_every", "best_of", "candidates", "likelihood_steps")
        at_least_one += (
            "divergence_probes",
            "mirror_stages",
            "keep_checkpoints",
            "evaluate_episodes",
            "updates_per_step",
        )
        whole = dict.fromkeys(at_least_one, 1)
        whole |= dict.fromkeys(("seed", "pretrain_steps", "ascent_steps", "fourier_features"), 0)
        whole |= dict.fromkeys(("evaluate_every", "online_steps", "online_warmup"), 0)
        for name, low in whole.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value < 2**63:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of {low} or more (below 2^63).")
        for name in ("threads", "sde_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of 1 or more, or None.")
        for name, kind in (("objective", Objective), ("sde", Scheme), ("solver", Solver), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(_unknown(name, str(getattr(self, name)), get_args(kind)))
        for name in ("confine", "adaptive_mixture", "joint_clip", "compile"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false.")
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
        if self.objective == "adjoint" and self.sde == "ancestral" and (self.sde_steps or self.nfe) < 2:
            name = "nfe" if self.sde_steps is None else "sde_steps"
            raise ConfigError(
                f"{name} is 1; expected 2 or more, for the last ancestral step has no noise to learn from."
            )
        if not self.trains_policy:
            for name, neutral in (("best_of", 1), ("mirror_stages", 1), ("distill_coef", 0.0)):
                if getattr(self, name) != neutral:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)}; expected {neutral} for {self.method}, which has no critics."
                    )
        if not isinstance(self.loggers, tuple):
            raise ConfigError(f"loggers is {self.loggers!r}; expected a tuple of {', '.join(get_args(Logger))}.")
        for name in self.loggers:
            if name not in get_args(Logger):
                raise ConfigError(_unknown("logger", str(name), get_args(Logger)))
        if 0 < self.online_steps <= self.online_warmup:
            raise ConfigError(
                f"online_steps is {self.online_steps}, all of it warm-up; expected more than online_warmup = "
                f"{self.online_warmup}, or 0."
            )
        share = self.offline_share
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ConfigError(f"offline_share is {share!r}; expected a number from 0 to 1, or None.")
        for name in ("hidden_dims", "critic_hidden_dims"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or any(type(n) is not int or n < 1 for n in value):
                raise ConfigError(f"{name} is {value!r}; expected a tuple of positive whole numbers.")
        ranges = {
            "fourier_scale": (0.0, math.inf, "above 0"),
            "discount": (0.0, math.nextafter(1.0, 2), "above 0, at most 1"),
            "learning_rate": (0.0, math.inf, "above 0"),
            "score_eps": (0.0, 1.0, "above 0, below 1"),
            "score_limit": (0.0, math.inf, "above 0"),
            "polyak": (0.0, math.nextafter(1.0, 2), "above 0, at most 1"),
            "ascent_step_size": (0.0, math.inf, "above 0"),
            "inverse_temperature": (-math.ulp(0.0), math.inf, "0 or more"),
            "entropy_coef": (-math.ulp(0.0), 1.0, "0 or more, below 1"),
            "mixture_weight": (-math.ulp(0.0), 1.0, "0 or more, below 1"),
            "mixture_bandwidth": (0.0, math.inf, "above 0"),
            "ascent_spread": (-math.ulp(0.0), math.inf, "0 or more"),
            "trust_radius": (0.0, math.inf, "above 0"),
            "edit_scale": (-math.ulp(0.0), math.inf, "0 or more"),
            "distill_coef": (-math.ulp(0.0), math.inf, "0 or more"),
            "pessimism": (-math.ulp(0.0), math.inf, "0 or more"),
            "gradient_clip": (-math.ulp(0.0), math.inf, "0 or more"),
        }
        for name, (low, high, expected) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low < value < high:
                raise ConfigError(f"{name} is {value!r}; expected a number {expected}.")
        if self.fourier_features % 2:
            raise ConfigError(f"fourier_features is {self.fourier_features}; expected an even number.")
        executed = self.execute_steps
        if executed is not None and (type(executed) is not int or not 1 <= executed <= self.chunk_size):
            raise ConfigError(
                f"execute_steps is {executed!r}; expected a whole number, 1 to chunk_size = {self.chunk_size}."
            )
        entropy = self.edit_target_entropy
        if entropy is not None and not (isinstance(entropy, (int, float)) and math.isfinite(entropy)):
            raise ConfigError(f"edit_target_entropy is {entropy!r}; expected a number, or None.")
        if (self.edit_scale > 0) != (self.method == "qam-edit"):
            expected = "above 0 for qam-edit" if self.method == "qam-edit" else f"0 for {self.method}"
            raise ConfigError(f"edit_scale is {self.edit_scale}; expected {expected}.")
        if not isinstance(self.device, str):
            raise ConfigError(f'device is {self.device!r}; expected "auto", "cpu", "cuda" or "cuda:N".')
        if self.pretrain_steps >= self.steps:
            raise ConfigError(f"pretrain_steps is {self.pretrain_steps}; expected fewer than steps = {self.steps}.")
        joint = self.steps - self.pretrain_steps
        if self.mirror_stages > joint:
            raise ConfigError(
                f"mirror_stages is {self.mirror_stages}; expected at most the {joint} updates after pretraining."
            )
        for name, value in _FIXED[self.method].items():
            if getattr(self, name) != value:
                raise ConfigError(f"{name} is {getattr(self, name)}; the preset {self.method} fixes it at {value}.")

    @property
    def trains_policy(self) -> bool:
        """Whether there is a policy flow beside the prior: not for bc."""
        return self.method != "bc"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """The settings of a named method, with changes.

        Args:
            name: "bc", "qam", "qam-edit" or "me-am".
            **overrides: Fields to change.

        Raises:
            ConfigError: an unknown preset or field (with the nearest known one), or a value out of range.
        """
        if name not in PRESETS:
            raise ConfigError(_unknown("preset", name, PRESETS))
        known = [f.name for f in dataclasses.fields(cls)]
        for field in overrides:
            if field not in known:
                raise ConfigError(_unknown("training setting", field, known))
        return cls(**{**PRESETS[name], **overrides})

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Read settings written by `to_json`.

        Raises:
            ConfigError: not such settings.
        """
        try:
            written: dict[str, Any] = json.loads(text)
            data = {_RENAMED.get(name, name): value for name, value in written.items()}
            for name, kind in get_type_hints(cls).items():
                if get_origin(kind) is tuple and name in data:
                    data[name] = tuple(data[name])
            return cls(**data)
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


def _unknown(kind: str, name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
    return f'There is no {kind} "{name}". {hint}'
