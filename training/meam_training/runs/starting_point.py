"""Runs that start from the weights of a trained policy."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from meam_policy.errors import CheckpointError, ConfigError, SpaceError
from meam_policy.spec import BoxSpec, PolicySpec
from meam_training.config import Statistics, TrainConfig
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.trained_policy import TrainedPolicy
from meam_training.setting_text import SettingText

__all__ = ["StartingPoint", "started_spec"]

SPEC_STATISTICS = ("observation_mean", "observation_std", "action_offset", "action_scale")
"""Normalisation in the policy's specification."""

NETWORK_STATISTICS = {"preconditioner.mean", "preconditioner.std", "offset", "scale"}
"""Normalisation in the velocity fields and the critics."""

FLOW_SETTINGS = ("chunk_size", "hidden_dims", "layer_norm", "precondition", "fourier_features", "fourier_scale")
FLOW_SETTINGS += ("observation_limit",)
CRITIC_SETTINGS = ("critic_hidden_dims", "num_critics", "normalise_values")
"""Settings without which weights mean something else: those of the flows, and those of the critics."""


@dataclass(frozen=True)
class StartingPoint:
    """A trained policy, from whose weights a run starts.

    Attributes:
        policy: The policy.
        statistics: Whether its normalisation is kept, or renewed from the new data.
    """

    policy: TrainedPolicy
    statistics: Statistics = "kept"

    @classmethod
    def load(cls, policy_or_run: str | os.PathLike[str], statistics: Statistics) -> StartingPoint:
        """Read a policy; see `TrainedPolicy.load` for the path and the errors.

        Raises:
            ConfigError: `statistics` is not "kept" or "renewed".
        """
        if statistics not in ("kept", "renewed"):
            raise ConfigError(
                f'statistics is {statistics!r}; expected "kept" (the policy\'s) or "renewed" (the data\'s).'
            )
        return cls(TrainedPolicy.load(policy_or_run), statistics)

    def settings(self, method: str | None = None) -> TrainConfig:
        """Settings for going on: all of the policy's where the method stays, otherwise those that its weights need.

        How long the run is, what follows from that and from the data's rewards, and how it is executed are as preset,
        and nothing is pretrained where there is a policy.

        Args:
            method: Method of the new run; None for the policy's.
        """
        config = self.policy.config
        if method in (None, config.method):
            shared = config.deciding(online=False)
            for name in ("method", "steps", "pretrain_steps", "polyak", "reward_offset", "seed"):
                shared.pop(name, None)
        else:
            shared = {name: getattr(config, name) for name in (*FLOW_SETTINGS, *CRITIC_SETTINGS)}
        return self.without_pretraining(TrainConfig.preset(method or config.method, shared))

    def without_pretraining(self, config: TrainConfig) -> TrainConfig:
        """The settings with no pretraining, unless it is asked for: the policy would start anew after it."""
        both = config.trains_policy and self.policy.config.trains_policy
        return config.changed(pretrain_steps=0) if both and config.pretrain_steps is None else config

    def check(self, config: TrainConfig, spec: PolicySpec) -> None:
        """Refuse settings or data that the weights do not fit.

        Raises:
            ConfigError: a setting that gives the weights their meaning is another one.
            SpaceError: the data's spaces are not the policy's.
        """
        held = self.policy.config
        critics = CRITIC_SETTINGS if config.trains_policy and held.trains_policy else ()
        for name in (*FLOW_SETTINGS, *critics):
            if getattr(config, name) != getattr(held, name):
                raise ConfigError(
                    SettingText(
                        f"{{{name}}} is {{0}}, but the weights of {{1}} were trained with {{2}}; expected the same, so "
                        f"that they fit. Set {{{name}}} to that, or start anew.",
                        getattr(config, name),
                        self.policy.name,
                        getattr(held, name),
                    )
                )
        ours, theirs = _layout(spec), _layout(self.policy.spec)
        if ours != theirs:
            what = next(name for name in ours if ours[name] != theirs[name])
            raise SpaceError(
                f"The {what} of the data is {ours[what]}, but that of {self.policy.name} is {theirs[what]}; expected "
                "the same spaces, because weights mean nothing at other numbers. Give data of the same robot (where "
                "nobody declared bounds of actions, read it with the policy's action_space=), or start anew."
            )

    def record(self, config: TrainConfig) -> dict[str, str]:
        """What the new policy's specification says of its start; see `PolicySpec.started_from`."""
        policy, source = self.policy, self.policy.networks
        anew = {
            "critics": config.trains_policy and not policy.config.trains_policy,
            "edit policy": config.edit_scale > 0 and source.edit_policy is None,
            "one-step policy": config.distill_coef > 0 and source.one_step is None,
        }
        named = {"training_data": policy.spec.training_data, "anew": ", ".join(name for name in anew if anew[name])}
        named["commit"] = policy.commit
        return {
            "policy": policy.name,
            "method": policy.config.method,
            "weights": policy.weights,
            "statistics": self.statistics,
            **{name: text for name, text in named.items() if text},
        }

    def initialise(self, networks: MeamNetworks) -> None:
        """Copy the policy's weights into a run's networks, which fit; those that it lacks stay as they are.

        A run without critics (`bc`) clones with the network that acts in the policy; one with critics takes a policy
        without them (`bc`) as its prior, and starts at it. The temperature of a KL budget is found anew.
        """
        source = self.policy.networks
        prior = source.prior if networks.policy is not None else source.deployed
        originals: dict[str, nn.Module | None] = {
            "encoder": source.encoder,
            "prior": prior,
            "policy": source.policy or source.prior,
            "target_policy": source.deployed,
            "target_prior": getattr(source, "target_prior", prior),
            "critic": getattr(source, "critic", None),
            "target_critic": getattr(source, "target_critic", None),
            "edit_policy": source.edit_policy,
            "one_step": source.one_step,
        }
        for name, original in originals.items():
            part = getattr(networks, name, None)
            if part is None or original is None:
                continue
            weights = original.state_dict()
            if self.statistics == "renewed":
                weights |= {key: value for key, value in part.state_dict().items() if key in NETWORK_STATISTICS}
            part.load_state_dict(weights, strict=True)


def started_spec(
    spec: PolicySpec, config: TrainConfig, start: StartingPoint | None, begun: Checkpoint | None, measured: bool = False
) -> PolicySpec:
    """The specification of a run that starts from a policy, or resumes after such a start.

    Args:
        spec: Specification that its data alone would give.
        config: Settings of the run.
        start: Where it starts; None to start anew, or to resume without asking.
        begun: Checkpoint from which it is resumed, which holds what was kept; None if it begins.
        measured: Whether the data's action box is only the range of its actions; the policy's box then stays, if it
            contains that range.

    Raises:
        ConfigError, SpaceError: as in `StartingPoint.check`.
        CheckpointError: the run to be resumed did not start there.
    """
    if begun is None:
        if start is None:
            return spec
        spec = _within(spec, start.policy.spec) if measured else spec
        start.check(config, spec)
        record, source = start.record(config), start.policy.spec
    else:
        record, source = dict(begun.spec.started_from), begun.spec
        spec = _within(spec, source) if measured and record else spec
        asked = {} if start is None else start.record(config)
        for name in ("weights", "statistics"):
            if start is not None and asked[name] != record.get(name):
                raise CheckpointError(
                    f"The run in {begun.path.parent.parent} started from {record.get('policy', 'no policy')}, its "
                    f"{name} {record.get(name, 'none')}; asked for are {asked[name]} of {start.policy.name}. Resume it "
                    "without a starting point, or choose another output folder."
                )
    kept = SPEC_STATISTICS if record.get("statistics") == "kept" else ()
    taken: dict[str, Any] = {name: getattr(source, name) for name in kept}
    if kept and source.observation_offset != spec.observation_offset:
        # The data's offset stays, and the mean moves: normalised, an observation is the same.
        moved = np.array(source.observation_offset or 0.0) - np.array(spec.observation_offset or 0.0)
        taken["observation_mean"] = tuple((np.array(source.observation_mean) + moved).tolist())
    return replace(spec, started_from=record, **taken)


def _within(spec: PolicySpec, source: PolicySpec) -> PolicySpec:
    """The specification with the action box of another one, if that contains its own."""
    own, box = spec.action, source.action
    if own.shape != box.shape or np.less(own.low, box.low).any() or np.greater(own.high, box.high).any():
        return spec
    return replace(spec, action=box)


def _layout(spec: PolicySpec) -> dict[str, Any]:
    """What two policies must share so that weights of one mean the same in the other; bounds of actions included."""

    def shapes(boxes: tuple[BoxSpec, ...]) -> str:
        return ", ".join(f"{'' if box.key is None else box.key + ' '}{list(box.shape)}" for box in boxes)

    def bounds(values: tuple[float, ...]) -> list[float]:
        return [float(f"{value:.5g}") for value in values]  # float32 bounds, read as float64

    return {
        "observation": shapes(spec.observation),
        "action": shapes((spec.action,)),
        "lower bound of actions": bounds(spec.action.low),
        "upper bound of actions": bounds(spec.action.high),
    }
