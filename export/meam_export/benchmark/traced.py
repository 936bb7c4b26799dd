"""PyTorch's own ONNX export of a policy, to compare our graph with."""

from __future__ import annotations

import logging
import warnings

import torch

from meam_export.graph.writer import OPSET
from meam_policy import PolicySpec
from meam_training.networks.policy_module import PolicyModule

__all__ = ["traced_graph"]


def traced_graph(module: PolicyModule, spec: PolicySpec) -> bytes:
    """The policy as `torch.onnx.export` traces it; its noise is [batch, noise_dim], its only output `actions`."""
    example = (torch.zeros(2, spec.observation_dim), torch.zeros(2, spec.noise_dim))
    batch = torch.export.Dim("batch", min=1)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
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
    return program.model_proto.SerializeToString()
