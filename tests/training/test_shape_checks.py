"""The shapes that signatures state are checked while the tests run; see tests/conftest.py."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import when_called
from torch import Tensor

import meam_export
import meam_policy
import meam_training
from meam_training.flow.path import interpolate

pytestmark = pytest.mark.skipif("MEAM_WITHOUT_SHAPE_CHECKS" in os.environ, reason="the checks are off")


def annotated_modules() -> list[str]:
    """Names of the modules that state shapes."""
    names = []
    for package in (meam_policy, meam_training, meam_export):
        root = Path(str(package.__file__)).parent
        for file in root.rglob("*.py"):
            if "from jaxtyping import" in file.read_text("utf-8"):
                names.append(".".join(file.relative_to(root.parent).with_suffix("").parts))
    return sorted(names)


def test_every_module_that_states_shapes_is_loaded_with_checks() -> None:
    names = annotated_modules()
    assert "meam_training.flow.path" in names
    loaders = {name: importlib.import_module(name).__loader__ for name in names}
    unchecked = [name for name, loader in loaders.items() if not type(loader).__module__.startswith("jaxtyping")]
    assert not unchecked, "add their package to SHAPE_CHECKED in tests/conftest.py"


def test_a_shape_that_a_signature_rules_out_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        interpolate(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, 1))


def test_functions_of_one_name_are_checked_each_by_its_own_signature() -> None:
    """As those within a function are, which is called with other ones."""

    def checked(dims: str) -> Any:
        def inner(x: Any) -> Any:
            return x

        inner.__annotations__ = {"x": Float[Tensor, dims]}
        return jaxtyped(inner, typechecker=when_called)

    pair, triple = checked("rows 2"), checked("rows 3")
    for rows in (1, 4):
        assert pair(torch.zeros(rows, 2)).shape == (rows, 2)
        assert triple(torch.zeros(rows, 3)).shape == (rows, 3)
        for function, size in ((pair, 3), (triple, 2)):
            with pytest.raises(TypeCheckError):
                function(torch.zeros(rows, size))
