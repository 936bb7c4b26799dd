"""Heads on a flow policy: an edit policy that corrects its actions, and a one-step policy distilled from it.

Both follow the public code of QAM (Li & Levine, arXiv:2601.14234), which uses one or the other, never both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EditPolicy", "OneStepPolicy", "Value", "apply_edit", "distill_loss", "edit_loss"]

Value = Callable[[Tensor], Tensor]
"""Q(a) at a batch's observations, differentiable: normalised actions [batch, act] to values [batch].

The losses move actions up this value, and must not train the critics behind it: close over parameters without a
gradient. The reference takes the ensemble mean of the trained critics, not of their averages, and without pessimism::

    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}

    def value(actions):
        return torch.func.functional_call(critic, frozen, (features, actions)).mean(dim=0)
"""

LOG_STD_RANGE = (-20.0, 2.0)
"""Limits of the edit policy's log standard deviations, before the tanh."""


class EditPolicy(nn.Module):
    """A tanh-Gaussian on edits of a flow's action, with the temperature of its entropy.

    A perceptron on the encoded observation and the action, built like `VelocityField`, with one linear layer for the
    mean and one for the log standard deviation.

    Args:
        feature_dim: Numbers in an encoded observation.
        action_dim: Numbers in a flattened action chunk.
        hidden_dims: Hidden layers.

    References:
        Dong et al., EXPO, arXiv:2507.07986. Haarnoja et al., Soft Actor-Critic, arXiv:1812.05905.
    """

    def __init__(self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        sizes = [feature_dim + action_dim, *hidden_dims]
        self.layers = nn.ModuleList(_linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.mean = _linear(sizes[-1], action_dim)
        self.log_std = _linear(sizes[-1], action_dim)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    @property
    def alpha(self) -> Float[Tensor, ""]:
        """Temperature: units of value per nat of entropy; 1 in a new policy."""
        return self.log_alpha.exp()

    def forward(
        self, features: Float[Tensor, "*batch features"], action: Float[Tensor, "*batch act"]
    ) -> tuple[Float[Tensor, "*batch act"], Float[Tensor, "*batch act"]]:
        """Mean and log standard deviation of the edit before its tanh, at flow actions in normalised units."""
        hidden = torch.cat([features, action], dim=-1)
        for layer in self.layers:
            hidden = F.gelu(layer(hidden), approximate="tanh")
        return self.mean(hidden), self.log_std(hidden).clamp(*LOG_STD_RANGE)

    def sample(
        self,
        features: Float[Tensor, "*batch features"],
        action: Float[Tensor, "*batch act"],
        noise: Float[Tensor, "*batch act"],
    ) -> tuple[Float[Tensor, "*batch act"], Float[Tensor, "*batch"]]:
        """Draw an edit, reparameterised.

        Args:
            features: Encoded observations.
            action: Flow actions, normalised.
            noise: Standard normal draws.

        Returns:
            The edit tanh(u), u = mean + std noise, in [-1, 1]; and the log density of the edit, nats, which is finite
            even where the tanh rounds to 1.
        """
        mean, log_std = self(features, action)
        u = mean + log_std.exp() * noise
        # log N(u; mean, std) - log |d tanh(u) / du|, with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))
        log_normal = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (log_normal - log_slope).sum(dim=-1)

    def mode(
        self, features: Float[Tensor, "*batch features"], action: Float[Tensor, "*batch act"]
    ) -> Float[Tensor, "*batch act"]:
        """The edit tanh(mean), without noise.

        The reference implementation samples the edit wherever it acts, in evaluation too.
        """
        return self(features, action)[0].tanh()


class OneStepPolicy(nn.Module):
    """mu(s, x_0): an action chunk from noise in one evaluation; a `VelocityField` without time.

    Args:
        feature_dim: Numbers in an encoded observation.
        action_dim: Numbers in a flattened action chunk.
        hidden_dims: Hidden layers.

    References:
        Park et al., Flow Q-Learning, arXiv:2502.02538.
    """

    def __init__(self, feature_dim: int, action_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        sizes = [feature_dim + action_dim, *hidden_dims, action_dim]
        self.layers = nn.ModuleList(_linear(n_in, n_out) for n_in, n_out in pairwise(sizes))

    def forward(
        self, features: Float[Tensor, "*batch features"], x_0: Float[Tensor, "*batch act"]
    ) -> Float[Tensor, "*batch act"]:
        """Normalised action chunks, not clipped: whoever acts on them clips to [-1, 1]."""
        *hidden_layers, last = self.layers
        hidden = torch.cat([features, x_0], dim=-1)
        for layer in hidden_layers:
            hidden = F.gelu(layer(hidden), approximate="tanh")
        return last(hidden)


def apply_edit(
    flow_actions: Float[Tensor, "*batch act"], edit: Float[Tensor, "*batch act"], edit_scale: float
) -> Float[Tensor, "*batch act"]:
    """Flow actions moved by at most `edit_scale` per component, inside the box [-1, 1] if they were."""
    return (flow_actions + edit_scale * edit).clamp(-1, 1)


def edit_loss(
    edit_policy: EditPolicy,
    value: Value,
    features: Float[Tensor, "batch features"],
    flow_actions: Float[Tensor, "batch act"],
    noise: Float[Tensor, "batch act"],
    edit_scale: float,
    target_entropy: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Maximise value plus entropy of the edits, and adapt the temperature to a target entropy.

    The loss is -Q + alpha log pi, at constant alpha, plus alpha (H - target_entropy), at constant entropy H, each a
    mean over the batch. Descent lowers alpha while the entropy exceeds its target, and raises it below.

    Args:
        edit_policy: The policy trained.
        value: Value of the edited actions, with frozen parameters; see `Value`.
        features: Encoded observations.
        flow_actions: Ends of the flow's ODE clipped to [-1, 1], held constant.
        noise: Standard normal draws.
        edit_scale: Length of an edit per component, normalised action units.
        target_entropy: Of the edit before it is scaled, nats; -act / 2 in the reference. At most act log 2 is possible.

    Returns:
        The loss, and to log: `edit_value`, `edit_entropy`, `edit_alpha`.

    References:
        Dong et al., EXPO, arXiv:2507.07986. Haarnoja et al., Soft Actor-Critic, arXiv:1812.05905.
    """
    flow_actions = flow_actions.detach()
    edit, log_prob = edit_policy.sample(features, flow_actions, noise)
    q, entropy = value(apply_edit(flow_actions, edit, edit_scale)).mean(), -log_prob.mean()
    alpha = edit_policy.alpha
    loss = -q - alpha.detach() * entropy + alpha * (entropy.detach() - target_entropy)
    return loss, {"edit_value": q.detach(), "edit_entropy": entropy.detach(), "edit_alpha": alpha.detach()}


def distill_loss(
    one_step: OneStepPolicy,
    value: Value | None,
    features: Float[Tensor, "batch features"],
    x_0: Float[Tensor, "batch act"],
    flow_actions: Float[Tensor, "batch act"],
    distill_coef: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Match the flow's actions from the same noise, and maximise value.

    The loss is distill_coef (mu - flow_actions)^2, mean over batch and components, minus the mean of Q at the clipped
    mu. Outside the box the value has no gradient, and the squared error alone leads back.

    Args:
        one_step: The policy trained.
        value: Value of the clipped actions, with frozen parameters; see `Value`. None for distillation alone.
        features: Encoded observations.
        x_0: Noise that the flow actions start from.
        flow_actions: Ends of the flow's ODE clipped to [-1, 1], held constant.
        distill_coef: Units of value per squared action unit; the reference takes 3 to 300, by task.

    Returns:
        The loss, and to log: `distill_loss`, the mean squared error alone, and, with a value, `one_step_value`.

    References:
        Park et al., Flow Q-Learning, arXiv:2502.02538.
    """
    mu = one_step(features, x_0)
    error = (mu - flow_actions.detach()).square().mean()
    metrics = {"distill_loss": error.detach()}
    if value is None:
        return distill_coef * error, metrics
    q = value(mu.clamp(-1, 1)).mean()
    return distill_coef * error - q, metrics | {"one_step_value": q.detach()}


def _linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
