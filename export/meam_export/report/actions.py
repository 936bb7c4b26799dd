"""What prior and policy do at states of the data, and what the critics think of it.

Chunks are looked at as the mean of their actions, number by number: one point for each chunk, whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meam_export.report.subject import Subject
from meam_policy.spec import EVALUATIONS, PolicySpec
from meam_training.flow.ode import integrate
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.velocity_field import VelocityField

__all__ = ["ActionStudy", "Choice", "FlowPaths", "StateStudy", "choose", "study_actions"]

CANDIDATES, DRAWS = 128, 8
"""States among which three are chosen, and chunks drawn at each of them for that."""

SAMPLES, PATHS = 300, 16
"""Chunks that are drawn at a chosen state, and paths of the flow."""

GRID = 41
"""Points of the landscape along each axis; odd, so that one of them is its centre."""

SWEEP = 9
"""Points at which the critics are asked how much a number of the action matters."""

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Choice:
    """What is looked at: states, and numbers of an action.

    Attributes:
        observations: The states, raw observations [states, obs].
        reasons: Title of each, and why it was chosen.
        numbers: Indices of the one or two numbers of an action.
        why: Why these, of more.
        among: Among how many states of the data these were chosen.
        chosen_for: For which policy they were chosen, if others are looked at too.
    """

    observations: Tensor
    reasons: tuple[tuple[str, str], ...]
    numbers: tuple[int, ...]
    why: str
    among: int
    chosen_for: str = ""


@dataclass(frozen=True, eq=False)
class StateStudy:
    """One state.

    Attributes:
        title: How it is called.
        why: Why it was chosen.
        observation: The raw observation [obs].
        prior: Mean actions of the prior's chunks [samples, numbers], environment units; None without a policy, which
            is then the prior itself.
        policy: Those of the policy's.
        grid: Points of every number's axis [numbers, GRID], environment units.
        landscape: Values of a chunk with those means, mean over the critics: [GRID, GRID] by the second and the first
            number, or [GRID] for a single one; None without critics.
    """

    title: str
    why: str
    observation: Values
    prior: Values | None
    policy: Values
    grid: Values
    landscape: Values | None


@dataclass(frozen=True, eq=False)
class FlowPaths:
    """Paths of the same noise through the flows of prior and policy.

    Attributes:
        times: Flow times [states], from 0 to 1.
        prior: Mean actions along the prior's paths [states, paths, numbers], environment units; None without a policy.
        policy: Those along the policy's.
    """

    times: Values
    prior: Values | None
    policy: Values


@dataclass(frozen=True, eq=False)
class ActionStudy:
    """What a policy does.

    Attributes:
        spec: Its specification.
        choice: What is looked at.
        states: The chosen states.
        flow: Paths at the first of them.
        changed: What is not shown of how the policy acts, in a sentence; empty if nothing.
    """

    spec: PolicySpec
    choice: Choice
    states: tuple[StateStudy, ...]
    flow: FlowPaths
    changed: str


@torch.no_grad()
def choose(subject: Subject, observations: NDArray[np.float32]) -> Choice:
    """Choose three states and the numbers of an action to look at.

    The states are those at which policy and prior differ most, in the middle and least, for the same noise; without a
    policy of its own, those at which its chunks vary most, in the middle and least. The two numbers are those along
    which the critics' values vary most; without critics, those that vary most among the policy's chunks.

    Args:
        subject: A run or policy with networks.
        observations: Raw observations [n, obs] of the data.
    """
    study = _Study(subject)
    few = torch.from_numpy(observations[:CANDIDATES])
    order = torch.argsort(study.gaps(few), descending=True, stable=True)
    chosen = list(dict.fromkeys(int(order[i]) for i in (0, len(order) // 2, len(order) - 1)))
    own = study.networks.policy is not None
    said, noun = ("policy and prior differ", "difference") if own else ("its chunks vary", "spread")
    places = {"Largest": "most", "Median": "in the middle", "Smallest": "least"}
    reasons = [(f"{title} {noun}", f"{said} {place}") for title, place in places.items()][: len(chosen)]
    numbers, why = study.choose_numbers(few[chosen])
    return Choice(few[chosen], tuple(reasons), numbers, why, len(few))


@torch.no_grad()
def study_actions(subject: Subject, choice: Choice) -> ActionStudy:
    """Sample prior and policy at the chosen states, and ask the critics.

    Args:
        subject: A run or policy with networks.
        choice: What to look at, of this or of another policy for the same task.
    """
    study = _Study(subject)
    states = tuple(
        study.at(observation, *reason, choice.numbers)
        for observation, reason in zip(choice.observations, choice.reasons, strict=True)
    )
    flow = study.flow(choice.observations[0], choice.numbers)
    return ActionStudy(study.spec, choice, states, flow, _changed(study.spec, study.networks))


def _changed(spec: PolicySpec, networks: MeamNetworks) -> str:
    parts = []
    if spec.acting.noise_scale != 1:
        parts.append(f"when it acts, it scales its noise by {spec.acting.noise_scale:g}, and here it samples")
    if networks.edit_policy is not None:
        parts.append("its edits, which follow the flow, are in the samples and not on the paths")
    if networks.integration.best_of > 1:
        parts.append(f"its samples are the best of {networks.integration.best_of}, its paths are not")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


class _Study:
    def __init__(self, subject: Subject) -> None:
        networks, spec = subject.networks, subject.spec
        assert networks is not None
        assert spec is not None
        self.networks = self._n = networks.eval()
        self.spec = self._spec = spec
        self._generator = torch.Generator().manual_seed(0)
        self._offset, self._scale = np.array(spec.action_offset), np.array(spec.action_scale)

    def gaps(self, observations: Tensor) -> Tensor:
        """How far policy and prior are apart at every observation [n]; or how far its own chunks are."""
        n = self._n
        features = n.encoder(observations).repeat_interleave(DRAWS, dim=0)
        noise = self._noise(DRAWS).repeat(len(observations), 1)
        policy = n.flow(n.deployed, features, noise).clamp(-1, 1).unflatten(0, (-1, DRAWS))
        if n.policy is None:
            return policy.std(dim=1).mean(dim=-1)
        prior = n.flow(n.prior, features, noise).clamp(-1, 1).unflatten(0, (-1, DRAWS))
        return (policy - prior).square().mean(dim=(1, 2))

    def choose_numbers(self, observations: Tensor) -> tuple[tuple[int, ...], str]:
        """The one or two numbers of an action that matter, and why these."""
        size = self._spec.action_dim
        if size == 1:
            return (0,), ""
        features = self._n.encoder(observations)
        chunks = self._n.act(features, self._noise(len(observations), acting=True))
        if self._n.policy is None:
            scores = self._means(chunks).std(dim=0)
            why = "the numbers of an action that vary most among its chunks"
        else:
            shifts = torch.linspace(-1, 1, SWEEP)
            scores = torch.stack([self._sweep(features, chunks, number, shifts) for number in range(size)])
            why = "the numbers of an action along which the critics' values vary most"
        best = torch.argsort(scores, descending=True, stable=True)[:2]
        return tuple(sorted(best.tolist())), why

    def _sweep(self, features: Tensor, chunks: Tensor, number: int, shifts: Tensor) -> Tensor:
        values = [self._value(features, self._moved(chunks, (number,), s.expand(len(chunks), 1))) for s in shifts]
        return torch.stack(values).std(dim=0).mean()

    def at(self, observation: Tensor, title: str, why: str, numbers: tuple[int, ...]) -> StateStudy:
        n = self._n
        features = n.encoder(observation[None]).expand(SAMPLES, -1)
        acting = n.act(features, self._noise(SAMPLES, acting=True))
        prior = None
        if n.policy is not None:
            drawn = n.flow(n.prior, features, self._noise(SAMPLES)).clamp(-1, 1)
            prior = self._shown(self._means(drawn), numbers)
        axis = torch.linspace(-1, 1, GRID)
        grid = np.stack([self._offset[d] + self._scale[d] * axis.double().numpy() for d in numbers])
        landscape = None
        if n.policy is not None:
            # About the chunk in the middle of the policy's, so that all else stays as the policy has it.
            means = self._means(acting)
            centre = acting[(means - means.median(dim=0).values).square().sum(dim=-1).argmin()]
            points = torch.cartesian_prod(*[axis] * len(numbers)).reshape(-1, len(numbers))
            moved = self._moved(centre.expand(len(points), -1), numbers, points)
            values = self._value(features[:1].expand(len(points), -1), moved).double().numpy()
            landscape = values.reshape((GRID,) * len(numbers)).T
        raw = observation.double().numpy() + np.array(self._spec.observation_offset or 0.0)
        return StateStudy(title, why, raw, prior, self._shown(self._means(acting), numbers), grid, landscape)

    def flow(self, observation: Tensor, numbers: tuple[int, ...]) -> FlowPaths:
        n, noise = self._n, self._noise(PATHS)
        features = n.encoder(observation[None]).expand(PATHS, -1)

        def path(field: VelocityField) -> Values:
            states = _path(field.condition(features), noise, n)
            return np.stack([self._shown(self._means(x), numbers) for x in states])

        times = np.array(n.integration.times)
        return FlowPaths(times, None if n.policy is None else path(n.prior), path(n.deployed))

    def _noise(self, count: int, acting: bool = False) -> Tensor:
        samples = self._n.integration.best_of if acting else 1
        return torch.randn(count, samples * self._spec.chunk_dim, generator=self._generator)

    def _means(self, chunks: Tensor) -> Tensor:
        return chunks.unflatten(-1, (self._spec.chunk_size, -1)).mean(dim=-2)

    def _moved(self, chunks: Tensor, numbers: tuple[int, ...], means: Tensor) -> Tensor:
        """Chunks [n, act] whose numbers are shifted to these means [n, numbers], flattened as far as the box asks."""
        moved = chunks.unflatten(-1, (self._spec.chunk_size, -1)).clone()
        for column, number in enumerate(numbers):
            mean = means[:, column, None]
            around = moved[..., number] - moved[..., number].mean(dim=-1, keepdim=True)
            room = torch.where(around > 0, 1 - mean, 1 + mean) / around.abs().clamp(min=1e-6)
            moved[..., number] = mean + around * room.amin(dim=-1, keepdim=True).clamp(0, 1)
        return moved.flatten(-2)

    def _value(self, features: Tensor, chunks: Tensor) -> Tensor:
        return self._n.values(features, chunks).mean(dim=0)

    def _shown(self, means: Tensor, numbers: tuple[int, ...]) -> Values:
        """The shown numbers [..., numbers] in environment units."""
        picked = list(numbers)
        return self._offset[picked] + self._scale[picked] * means.double().numpy()[..., picked]


def _path(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, networks: MeamNetworks) -> list[Tensor]:
    """States of a flow at the boundaries of its solver's steps."""
    seen: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return velocity(x, t)

    last = integrate(recorded, noise, networks.integration, networks.confine)
    # The first evaluation of every step is at its beginning.
    return [*seen[:: EVALUATIONS[networks.integration.solver]], last]
