"""The policy as one ONNX graph: normalisers inside, the ODE unrolled, noise an input."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meam_policy.errors import MissingExtraError
from meam_policy.spec import PolicySpec
from meam_training.algorithm import MeamNetworks

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "PolicyModule", "build_graph"]

OPSET = 20
"""The oldest operator set with GELU as one operator."""


class PolicyModule(nn.Module):
    """What the exported graph computes, in PyTorch.

    Args:
        networks: Trained networks.
        spec: Normalisation, bounds, chunk size, and how to integrate.
    """

    action_offset: Tensor
    action_scale: Tensor
    action_low: Tensor
    action_high: Tensor

    def __init__(self, networks: MeamNetworks, spec: PolicySpec) -> None:
        super().__init__()
        self.networks = copy.copy(networks)  # the same parameters, integrated as the spec says
        self.networks.config = replace(
            networks.config, flow_steps=spec.flow_steps, solver=spec.solver, best_of=spec.best_of
        )
        self.chunk_shape = (spec.chunk_size, spec.action_dim)
        for name, values in (
            ("action_offset", spec.action_offset),
            ("action_scale", spec.action_scale),
            ("action_low", spec.action.low),
            ("action_high", spec.action.high),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Map raw observations [batch, obs] and noise [batch, noise_dim] to actions [batch, chunk_size, action_dim].

        The actions are in environment units and within the bounds.
        """
        x_1 = self.networks.act(self.networks.encoder(observation), noise)
        actions = self.action_offset + self.action_scale * x_1.reshape(-1, *self.chunk_shape)
        # Clamped again: offset + scale may round past a bound.
        return torch.minimum(torch.maximum(actions, self.action_low), self.action_high)


def build_graph(module: PolicyModule, spec: PolicySpec) -> bytes:
    """Export to one self-contained ONNX file with a dynamic batch.

    Args:
        module: The policy in PyTorch, on the CPU.
        spec: Dimensions, for the example inputs.

    Returns:
        The bytes of `policy.onnx`.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise MissingExtraError("Export needs onnx and onnxscript: pip install 'meam-policy[export]'.") from error
    # Two rows: torch.export takes a batch of one for a constant.
    example = (torch.zeros(2, spec.observation_dim), torch.zeros(2, spec.noise_dim))
    batch = torch.export.Dim("batch", min=1)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own making
            program = torch.onnx.export(
                module.eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=["observation", "noise"],
                output_names=["actions"],
                dynamic_shapes=({0: batch}, {0: batch}),
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    model = program.model_proto
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's debugging notes: paths of this machine have no place in a published file."""
    model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
