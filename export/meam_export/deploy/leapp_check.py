"""The check of a LEAPP bundle, which also sees what leapp lets through."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from meam_export.deploy.parts import STATES
from meam_policy.errors import FormatError, IntegrityError, NotFoundError
from meam_policy.extras import needs
from meam_policy.folder.safetensors_reader import read_arrays
from meam_policy.given_files import read_regular
from meam_policy.graph.graph_check import check_graph
from meam_policy.robot.vocabulary import ACTION_KINDS, EXTRA, OBSERVATION_KINDS
from meam_policy.spec import RATE_TOLERANCE

with needs("A LEAPP bundle", "onnx", "deploy"):
    import onnx

__all__ = ["NODE", "check_leapp_bundle"]

NODE = "policy"
"""Name of the bundle's one node."""


def check_leapp_bundle(file: str | os.PathLike[str]) -> None:
    """Check a LEAPP bundle of this project, also where leapp lets through what is wrong.

    Both hashes and the graph; the graph's names, shapes and types; kinds that the vocabulary lacks, and names of
    another number than the elements; a state that does not come back to itself, for either of the two readers, or does
    not begin at zero; inputs and outputs of the pipeline; and the time of a step.

    Args:
        file: The bundle's YAML file.

    Raises:
        NotFoundError: the description, its graph or its initial values cannot be read.
        FormatError: the description is none, or does not fit the graph; IntegrityError if the graph is another.
    """
    path = Path(file)
    if path.is_dir():
        raise NotFoundError(f"{path} is a folder; expected the YAML file of a bundle, such as {path / 'arm.yaml'}.")
    try:
        description = yaml.safe_load(read_regular(path))
        node, pipeline = description["models"][NODE], description["pipeline"]
        parameters = node["parameters"]
        graph = read_regular(path.parent / parameters["model_path"])
        given = {"md5sum": hashlib.md5(graph).hexdigest(), "sha256sum": hashlib.sha256(graph).hexdigest()}
        for name, seen in given.items():
            if parameters[name] != seen:
                raise IntegrityError(
                    f"{path.name}: {name} of {parameters['model_path']} is {str(parameters[name])[:16]}…, and the "
                    f"file's is {seen[:16]}…. One was changed; write the bundle again."
                )
        check_graph(graph, parameters["model_path"], conditional=True)
        _check_tensors(path.name, node, onnx.load_model_from_string(graph))
        _check_pipeline(path.name, node, pipeline)
        _check_initial_values(path.name, node, read_regular(path.parent / pipeline["initial_values"]))
        _check_step(path.name, description["semantic"]["scene"]["dt"], pipeline["configs"]["frequency"])
        description["system information"]["leapp config version"]  # without it leapp loads nothing
    except FormatError:
        raise
    except OSError as error:
        raise NotFoundError(f"Cannot read {error.filename}: {error.strerror}. Write the bundle again.") from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(
            f"{path.name} is no LEAPP bundle of this project ({type(error).__name__}: {error}). Write it again."
        ) from error


def _check_tensors(file: str, node: Mapping[str, Any], model: onnx.ModelProto) -> None:
    for side, values, known in (
        ("inputs", model.graph.input, OBSERVATION_KINDS),
        ("outputs", model.graph.output, ACTION_KINDS),
    ):
        types = {value.name: value.type.tensor_type for value in values}
        described = {tensor["name"]: tensor for tensor in node[side]}
        if list(described) != list(types):
            _refuse(file, f"the list of {side}", list(described), f"the graph's, {list(types)}")
        for name, tensor in described.items():
            shape = [axis.dim_value for axis in types[name].shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name].elem_type).name
            if tensor["shape"] != shape:
                _refuse(file, f"the shape of {name}", tensor["shape"], f"the graph's, {shape}")
            if tensor["dtype"] != dtype:
                _refuse(file, f"the dtype of {name}", tensor["dtype"], f"the graph's, {dtype}")
            kind = tensor.get("kind")
            if kind is not None and kind not in known and not kind.startswith(EXTRA):
                _refuse(file, f"the kind of {name}", kind, f"one of {', '.join(known)}")
            names = tensor.get("element_names")
            if names is not None and [len(axis) for axis in names] != [0, shape[-1]]:
                _refuse(file, f"element_names of {name}", names, f"none of the first axis and {shape[-1]} of the last")


def _check_pipeline(file: str, node: Mapping[str, Any], pipeline: Mapping[str, Any]) -> None:
    inputs, outputs = ([tensor["name"] for tensor in node[side]] for side in ("inputs", "outputs"))
    into, out = ([f"{state}_{way}" for state in STATES] for way in ("in", "out"))
    feedback = {f"{NODE}/{o}": [f"{NODE}/{i}"] for i, o in zip(into, out, strict=True) if i in inputs or o in outputs}
    for key in ("feedback_flow", "feedback_connections"):  # for leapp, and for Isaac ROS Deploy
        if pipeline[key] != feedback:
            _refuse(file, key, pipeline[key], f"every state back to itself, {feedback}")
    for side, names, states in (("inputs", inputs, into), ("outputs", outputs, out)):
        wanted = [name for name in names if name not in states]
        if list(pipeline[side]) != [NODE] or sorted(pipeline[side][NODE]) != sorted(wanted):
            _refuse(file, f"pipeline.{side}", pipeline[side], f"those that are no state, {wanted}")


def _check_initial_values(file: str, node: Mapping[str, Any], data: bytes) -> None:
    shapes = {f"{NODE}/{tensor['name']}": tuple(tensor["shape"]) for tensor in node["inputs"]}
    wanted = {f"{NODE}/{state}_in" for state in STATES} & shapes.keys()
    seen = read_arrays(data, f"{file}: initial_values")
    if seen.keys() != wanted:
        _refuse(file, "initial_values", sorted(seen), f"the states, {sorted(wanted)}")
    for name, array in seen.items():
        if array.shape != shapes[name]:
            _refuse(file, f"the initial shape of {name}", list(array.shape), str(list(shapes[name])))
        if array.any():
            _refuse(file, f"the initial value of {name}", array.flat[array.ravel().nonzero()[0][0]], "zeros")


def _check_step(file: str, dt: float, frequency: float) -> None:
    if not (dt > 0 and abs(dt * frequency - 1) <= RATE_TOLERANCE):
        _refuse(file, "dt", dt, f"the time of a step at the frequency, {frequency} Hz")


def _refuse(file: str, name: str, seen: object, expected: str) -> None:
    raise FormatError(f"{file}: {name} is {seen!r}; expected {expected}. Write the bundle again.")
