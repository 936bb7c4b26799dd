"""The accuracy suite's runs on chunks: closed forms, importance sampling, and the measures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "accuracy"))
chunks, measures = (importlib.import_module(name) for name in ("chunks", "chunk_metrics"))

KNOWN = {
    "5d-lin-0-2m-2-1": ((0.549, 0.451), 0.464),
    "5d-bump-0-2m-2-1": ((0.631, 0.369), 0.345),
    "10d-lin-0.5-2m-2-1": ((0.284, 0.717), 0.722),
    "10d-lin-0-2m-6-2": ((0.022, 0.978), 0.991),
    "25d-lin-0-2m-2-1": ((0.549, 0.451), 0.365),
    "50d-lin-0-2m-2-1": ((0.549, 0.451), 0.442),
}
"""Masses of the modes and W1 of the prior, computed by another program."""


@pytest.mark.parametrize("name", KNOWN)
def test_masses_and_the_distance_of_the_prior_are_the_known_ones(name: str) -> None:
    masses, distance = KNOWN[name]
    target = measures.ChunkTarget(chunks.CHUNKS[name], 10_000)
    assert target.mode_mass == pytest.approx(masses, abs=0.02)
    # The random directions differ, and with them the sliced distance.
    assert target.prior_w1 == pytest.approx(distance, rel=0.25)


@pytest.mark.parametrize("name", [name for name in KNOWN if "lin" in name])
def test_the_divergence_from_the_prior_is_the_closed_form(name: str) -> None:
    run = chunks.CHUNKS[name]
    (observation,) = run.observations
    target, prior, power = run.proposal(observation), run.prior, 1 - run.entropy_coef
    generator = np.random.default_rng(0)
    modes = generator.choice(2, 40_000, p=target.weights)
    # Not cut off at the box, as the closed form is.
    noise = generator.standard_normal((40_000, run.dim)) * np.sqrt(target.variances)
    points = target.means[modes] + noise @ target.axes.T
    found = (target.log_density(points) - prior.log_density(points)).mean()
    # Separated modes: that of the masses, of the widths, and of the shifts, which are the slope times the variance.
    slope = run.nats * run.pattern / run.steps + run.shift / run.smooth_std * run.smooth_axis
    shifts = np.square(slope @ prior.axes) * prior.variances / power**2
    widths = run.dim * (1 / power - 1 + np.log(power))
    masses = target.weights @ np.log(target.weights / prior.weights)
    assert found == pytest.approx(masses + (widths + shifts.sum()) / 2, abs=0.05)


def test_the_mixture_is_the_tilted_prior_by_importance_sampling() -> None:
    run = chunks.CHUNKS["10d-quad-0-3m-2-1"]
    (observation,) = run.observations
    points = run.prior.sample(200_000, np.random.default_rng(0))
    drawn = measures.resample(points, run.log_tilt(observation, points), 20_000, np.random.default_rng(1))
    found = measures.ChunkTarget(run, 20_000).measure(drawn[None])
    assert found["normalised_w1"] < 0.06
    assert found["mass_error"] < 0.02
    assert abs(found["shift_error"]) < 0.06


def test_the_density_of_an_exact_target_needs_no_correction() -> None:
    run = chunks.CHUNKS["25d-lin-0-2m-1.5-1-context"]
    for observation in run.observations[:3]:
        points = run.proposal(observation).sample(100, np.random.default_rng(0))
        assert np.ptp(run.log_correction(observation, points)) < 1e-6


@pytest.mark.parametrize("name", ["5d-lin-0-2m-2-1", "5d-bump-0-2m-2-1"])
def test_samples_of_the_prior_are_at_1_and_the_exact_velocity_is_near_0(name: str) -> None:
    run = chunks.CHUNKS[name]
    target = measures.ChunkTarget(run, 10_000)
    prior = target.measure(run.prior.sample(10_000, np.random.default_rng(5))[None])
    assert prior["normalised_w1"] == pytest.approx(1, abs=0.08)
    # The target is shifted by one standard deviation, the prior is not.
    assert prior["shift_error"] == pytest.approx(-1, abs=0.1)
    assert target.floor(10)["normalised_w1"] < 0.06
    assert target.floor(200)["stiff_log_variance"] == pytest.approx(0, abs=0.12)


def test_the_velocity_carries_noise_to_the_mixture_s_mean() -> None:
    prior = chunks.CHUNKS["5d-lin-0-2m-2-1"].prior
    noise = np.random.default_rng(0).standard_normal((4, 5))
    # At t = 0 nothing is known of x_1: the velocity is its mean less the noise.
    np.testing.assert_allclose(prior.velocity(noise, 0.0), prior.weights @ prior.means - noise, atol=1e-9)


def test_the_behaviour_s_velocity_is_the_mixture_s_at_every_time_and_differentiable() -> None:
    run = chunks.CHUNKS["10d-quad-0-3m-2-1"]
    generator = np.random.default_rng(0)
    states, times = generator.standard_normal((3, 4, 10)), generator.random((3, 4, 1))
    given = torch.tensor(states, dtype=torch.float32, requires_grad=True)
    found = run.make_prior()(torch.zeros(4, 1), given, torch.tensor(times, dtype=torch.float32))
    # The posterior mean of the mixture, component by component, in full covariances.
    prior = run.prior
    expected = np.empty_like(states)
    for index in np.ndindex(3, 4):
        x, t = states[index], times[index][0]
        covariance = prior.axes @ np.diag(t**2 * prior.variances + (1 - t) ** 2) @ prior.axes.T
        gain = t * prior.axes @ np.diag(prior.variances) @ prior.axes.T @ np.linalg.inv(covariance)
        densities, means = [], []
        for weight, mean in zip(prior.weights, prior.means, strict=True):
            offset = x - t * mean
            densities.append(np.log(weight) - 0.5 * offset @ np.linalg.solve(covariance, offset))
            means.append(mean + gain @ offset)
        share = np.exp(np.array(densities) - np.logaddexp.reduce(densities))
        expected[index] = (share @ np.array(means) - x) / (1 - t)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-3, atol=2e-3)
    found.sum().backward()
    assert given.grad is not None
    assert given.grad.abs().min() > 0


def test_data_are_in_the_box_and_pay_the_value() -> None:
    run: Any = chunks.CHUNKS["25d-lin-0-2m-1.5-1-context"]
    data = run.make_dataset(500)
    assert np.abs(data.actions).max() <= 1
    value = run.make_value()(torch.from_numpy(data.observations), torch.from_numpy(data.actions))
    np.testing.assert_allclose(value.numpy(), data.rewards, atol=1e-4)
    assert len(run.observations) == chunks.UNSEEN
    assert not (np.abs(data.observations[:, None] - run.observations) < 1e-6).all(axis=2).any()


def test_the_time_to_an_error_is_interpolated_and_a_measured_curve_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    time_to = importlib.import_module("time_to")
    curve = [[10.0, 0.9, 100], [20.0, 0.5, 200], [30.0, 0.7, 300], [40.0, 0.1, 400]]
    assert [time_to.seconds_to(curve, goal) for goal in (1.0, 0.7, 0.3, 0.05)] == [
        10.0,
        15.0,
        pytest.approx(36.7, abs=0.1),
        None,
    ]
    options = ["--output", str(tmp_path), "--run", "5d-lin-0-2m-2-1", "--method", "two-scale"]
    short = ["--steps", "12", "--pretrain-steps", "4", "--every", "4"]
    assert time_to.main([*options, *short]) == 0
    before = (tmp_path / "two-scale.json").read_bytes()
    assert [row[2] for row in time_to.json.loads(before)["curve"]] == [4, 8, 12]
    assert time_to.main([*options, *short]) == 0
    assert (tmp_path / "two-scale.json").read_bytes() == before
    assert "s to 0.4" in capsys.readouterr().out
    assert (tmp_path / "time-to.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="Choose another --output"):
        time_to.main([*options, "--steps", "14", "--pretrain-steps", "4", "--every", "4"])
