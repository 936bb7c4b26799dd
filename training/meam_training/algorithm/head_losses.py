"""Losses of the heads on a flow policy: an edit policy, and a one-step policy distilled from the flow.

Let x be the flow's action, u = clip(x + edit_scale e) for an edit e ~ pi with entropy temperature alpha, and mu the
one-step policy's action from the same noise as x. The losses are means over the batch of

    edit:       -Q(u) + alpha log pi(e | s, x) + alpha (H - target_entropy),
    one-step:   distill_coef |mu - x|^2 / act - Q(clip(mu)),

where alpha is held constant in the second term and the entropy H in the third. Both follow the public code of QAM
(Li & Levine, arXiv:2601.14234), which uses one or the other, never both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from meam_training.algorithm.batch import MeamNoise
from meam_training.algorithm.policy_samples import PolicySamples
from meam_training.config import TrainConfig
from meam_training.networks.edit_policy import EditPolicy, apply_edit
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.one_step_policy import OneStepPolicy

__all__ = ["HEAD_METRICS", "Value", "distill_loss", "edit_loss", "head_losses"]

HEAD_METRICS = ("edit_value", "edit_entropy", "edit_alpha", "distill_loss", "one_step_value")
"""Names of the logged metrics; see `edit_loss` and `distill_loss`."""

Value = Callable[[Tensor], Tensor]
"""Differentiable Q(a) at a batch's observations: normalised actions [batch, act] to values [batch].

The losses increase this value through the actions, and must not train the critics behind it: close over detached
parameters. The reference takes the ensemble mean of the trained critics, not of the target critics, without pessimism::

    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}

    def value(actions):
        return torch.func.functional_call(critic, frozen, (features, actions)).mean(dim=0)
"""


def edit_loss(
    edit_policy: EditPolicy,
    value: Value,
    features: Float[Tensor, "batch features"],
    flow_actions: Float[Tensor, "batch act"],
    noise: Float[Tensor, "batch act"],
    edit_scale: float,
    target_entropy: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Maximise value and entropy of the edits, and adapt the temperature to a target entropy.

    The loss is -Q + alpha log pi, at constant alpha, plus alpha (H - target_entropy), at constant entropy H, each a
    mean over the batch. Gradient descent lowers alpha while the entropy exceeds its target, and raises it otherwise.

    Args:
        edit_policy: Edit policy, which is trained.
        value: Value of the edited actions, with frozen parameters; see `Value`.
        features: Encoded observations.
        flow_actions: Actions of the flow clipped to [-1, 1], held constant.
        noise: Standard normal draws.
        edit_scale: Largest edit of a component, normalised action units.
        target_entropy: Target entropy of the edit before scaling, nats; -act / 2 in the reference. It cannot exceed
            act log 2.

    Returns:
        The loss, and the metrics `edit_value`, `edit_entropy` and `edit_alpha`.

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
    mu. Outside the box Q has no gradient, and only the squared error pulls mu back.

    Args:
        one_step: One-step policy, which is trained.
        value: Value of the clipped actions, with frozen parameters; see `Value`. None for distillation alone.
        features: Encoded observations.
        x_0: Initial noise of the flow's actions.
        flow_actions: Actions of the flow clipped to [-1, 1], held constant.
        distill_coef: Weight of the squared error, in units of value per squared action unit; the reference takes 3 to
            300, depending on the task.

    Returns:
        The loss, and the metrics `distill_loss`, the unweighted mean squared error, and, with a value,
        `one_step_value`.

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


def head_losses(
    n: MeamNetworks,
    features: Float[Tensor, "batch features"],
    samples: PolicySamples,
    noise: MeamNoise,
    config: TrainConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Losses of the edit policy and of the one-step policy, as far as the run has them.

    Both use the target critics, which are not trained by them; the reference uses the critics themselves.

    Args:
        n: All networks; the heads are trained.
        features: Encoded observations of the batch.
        samples: Samples of the policy.
        noise: The update's randomness.
        config: Settings.

    Returns:
        The sum of the losses, 0 without heads, and those of `HEAD_METRICS` that belong to the run's heads.
    """
    total, metrics = torch.zeros_like(features[0, 0]), {}
    if n.edit_policy is None and n.one_step is None:
        return total, metrics
    flowed = samples.head_x_1[0].clamp(-1, 1)

    def value(actions: Tensor) -> Tensor:
        return n.values(features, actions).mean(dim=0)

    if n.edit_policy is not None:
        entropy = config.edit_target_entropy
        target = -0.5 * flowed.shape[-1] if entropy is None else entropy
        loss, logged = edit_loss(n.edit_policy, value, features, flowed, noise.edit, config.edit_scale, target)
        total = total + loss
        metrics |= logged
    if n.one_step is not None:
        loss, logged = distill_loss(n.one_step, value, features, noise.head_x_0, flowed, config.distill_coef)
        total = total + loss
        metrics |= logged
    return total, metrics
