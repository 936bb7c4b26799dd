"""A policy as a model of NVIDIA Triton Inference Server, which serves a fleet of robots from one engine.

    REPOSITORY/arm/config.pbtxt     inputs and outputs, how requests are batched, where the model runs
    REPOSITORY/arm/1/model.onnx     the policy's graph; the next export is arm/2/model.onnx

Start the server with `tritonserver --model-repository=REPOSITORY`. A robot sends the flattened observation, with its
boxes in the order of `PolicySpec.observation`, and the noise: standard normal numbers, or zeros for the deterministic
policy. If the configuration has the parameter `policy_observation_offset`, it is taken off the observation in float64
first. Every request has a batch axis; the server joins the requests of several robots into one batch.

    import numpy as np
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient("localhost:8001")
    observation = np.zeros((1, 3), np.float32)
    noise = np.random.default_rng().standard_normal((1, 6), dtype=np.float32)
    inputs = []
    for name, array in (("observation", observation), ("noise", noise)):
        inputs.append(triton.InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array)
    actions = client.infer("arm", inputs).as_numpy("actions")  # [1, chunk_size, action_dim], environment units

The same over HTTP, without a client library:

    curl localhost:8000/v2/models/arm/infer -d '{"inputs": [
        {"name": "observation", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]},
        {"name": "noise", "shape": [1, 6], "datatype": "FP32", "data": [0, 0, 0, 0, 0, 0]}]}'

A best-of-N policy takes noise [batch, n, chunk_dim] for any n, and also returns `value` and `disagreement` [batch, 1];
requests with the same n are batched.

`GET /v2/models/arm/config` returns the configuration; its `parameters` named `policy_…` hold what a client needs to
know besides the shapes, e.g. the execution horizon and the control rate. They describe the version `policy_version`; a
response's `model_version` names the version that computed it.
"""

from meam_export.triton.config_text import TritonDevice
from meam_export.triton.repository import write_triton_repository

__all__ = ["TritonDevice", "write_triton_repository"]
