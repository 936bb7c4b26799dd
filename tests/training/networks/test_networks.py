import jaxtyping
import numpy as np
import pytest
import torch

from meam_training.networks.critic_ensemble import CriticEnsemble
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.encoder import ObservationEncoder
from meam_training.networks.velocity_field import VelocityField


def perturbed(module, seed=0):
    """The module in float64, with nothing left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)


def weights(module):
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def test_observations_are_normalised():
    encoder = ObservationEncoder([1.0, -2.0], [2.0, 0.5])
    encoded = encoder(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    np.testing.assert_allclose(encoded, [[0, 0], [1, 4]])
    assert encoder.output_dim == 2


def test_normalised_observations_are_bounded():
    encoder = ObservationEncoder([1.0, -2.0], [2.0, 0.5], limit=3.0)
    np.testing.assert_allclose(encoder(torch.tensor([[1e9, -2.5], [-1e30, 0.0]])), [[3, -1], [-3, 3]])


def test_fourier_features_are_cosines_and_sines_of_the_normalised_observation():
    encoder = ObservationEncoder([1.0, -2.0, 0.0], [2.0, 0.5, 1.0], fourier_features=8, fourier_scale=3.0).double()
    observation = normal(5, 3)
    normalised = (observation.numpy() - [1, -2, 0]) / [2, 0.5, 1]
    phase = normalised @ encoder.frequencies.numpy()
    expected = np.concatenate([normalised, np.cos(phase), np.sin(phase)], axis=1)
    np.testing.assert_allclose(encoder(observation), expected, rtol=1e-12)
    assert encoder.output_dim == expected.shape[1] == 11


@pytest.mark.parametrize("fourier_features", [0, 8])
def test_encoded_observations_can_be_decoded(fourier_features):
    encoder = ObservationEncoder([1.0, -20.0, 300.0], [0.5, 3.0, 0.01], fourier_features).double()
    observation = 100 * normal(2, 5, 3)
    torch.testing.assert_close(encoder.decode(encoder(observation)), observation)


def test_the_fourier_frequencies_have_the_asked_for_scale():
    torch.manual_seed(0)
    frequencies = ObservationEncoder([0.0] * 10, [1.0] * 10, 2000, fourier_scale=2.5).frequencies
    assert frequencies.shape == (10, 1000)
    assert frequencies.std().item() == pytest.approx(2.5, rel=0.03)
    assert frequencies.mean().item() == pytest.approx(0, abs=0.1)


def test_statistics_are_not_among_the_weights_but_frequencies_are():
    assert set(ObservationEncoder([0.0], [1.0], 4).state_dict()) == {"frequencies"}


@pytest.mark.parametrize("normalised", [False, True])
def test_a_velocity_field_is_a_perceptron_of_features_point_and_time(normalised):
    field = perturbed(VelocityField(4, 2, (6, 5), layer_norm=normalised))
    features, x, t = normal(7, 4), normal(7, 2, seed=2), normal(7, 1, seed=3).sigmoid()
    w = weights(field)
    hidden = np.concatenate([features, x, t], axis=1)
    for i in range(2):
        hidden = gelu(hidden @ w[f"layers.{i}.weight"].T + w[f"layers.{i}.bias"])
        if normalised:
            hidden = layer_norm(hidden) * w[f"norms.{i}.weight"] + w[f"norms.{i}.bias"]
    expected = hidden @ w["layers.2.weight"].T + w["layers.2.bias"]
    np.testing.assert_allclose(field(features, x, t).detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_conditioned_field_takes_points_with_more_axes_than_the_features():
    field = perturbed(VelocityField(4, 2, (6, 5)))
    features, x, t = normal(7, 4), normal(3, 7, 2, seed=2), normal(3, 7, 1, seed=3)
    together = field.condition(features)(x, t)
    for i in range(3):
        torch.testing.assert_close(together[i], field(features, x[i], t[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("statistics", [None, DataStatistics(value_offset=-20.0, value_scale=7.0)])
def test_a_critic_ensemble_is_as_many_separate_perceptrons_with_layer_norms(statistics):
    critics = perturbed(CriticEnsemble(4, 2, (6, 5), num_critics=3, statistics=statistics))
    offset, scale = (-20, 7) if statistics else (0, 1)
    features, action = normal(7, 4), normal(7, 2, seed=2)
    w = weights(critics)
    values = critics(features, action).detach()
    assert values.shape == (3, 7)
    for m in range(3):
        hidden = np.concatenate([features, action], axis=1)
        for i in range(2):
            hidden = gelu(hidden @ w[f"weights.{i}"][m] + w[f"biases.{i}"][m])
            hidden = layer_norm(hidden) * w[f"norm_scales.{i}"][m] + w[f"norm_biases.{i}"][m]
        expected = hidden @ w["weights.2"][m] + w["biases.2"][m]
        np.testing.assert_allclose(values[m], offset + scale * expected[:, 0], rtol=1e-10, atol=1e-12)
    buffers = {"offset", "scale"} & set(critics.state_dict())
    assert buffers == ({"offset", "scale"} if statistics else set())


def test_new_critics_are_right_about_the_mean_and_of_the_size_of_the_returns():
    torch.manual_seed(0)
    known = DataStatistics(value_offset=5000.0, value_scale=300.0)
    plain, scaled = (CriticEnsemble(20, 4, (256, 256), num_critics=50, statistics=s) for s in (None, known))
    with torch.no_grad():
        scaled.load_state_dict(plain.state_dict(), strict=False)
        features, action = normal(64, 20).float(), normal(64, 4, seed=2).float().clamp(-1, 1)
        values = scaled(features, action)
    assert values.mean().item() == pytest.approx(5000, abs=300)
    assert 0.3 * 300 < values.std().item() < 3 * 300
    torch.testing.assert_close(values, 5000 + 300 * plain(features, action).detach())


def test_new_networks_have_xavier_weights_and_no_biases():
    torch.manual_seed(0)
    field, critics = VelocityField(100, 27, (256,)), CriticEnsemble(100, 28, (256,), num_critics=2)
    bound = np.sqrt(6 / (128 + 256))
    for weight in (weights(field)["layers.0.weight"], *weights(critics)["weights.0"]):
        assert 0.99 * bound < np.abs(weight).max() <= bound
        assert weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not weights(field)["layers.0.bias"].any()
    assert not weights(critics)["biases.0"].any()
    assert (weights(critics)["norm_scales.0"] == 1).all()
    assert not np.array_equal(*weights(critics)["weights.0"])


def test_shapes_are_checked_while_testing():
    late = "meam_training was imported before the import hook was installed: do that in tests/conftest.py"
    assert hasattr(VelocityField.forward, "__wrapped__"), late
    with pytest.raises(jaxtyping.TypeCheckError):
        VelocityField(4, 2, (6,))(torch.zeros(7, 4), torch.zeros(7, 2), torch.zeros(8, 1))
