"""Sums of scaled graph values, emitted as few ONNX operators.

An exported policy runs hundreds of small operators, and calling one costs more time than the few additions of a solver
step. So the solvers of training run here on symbolic sums, and no operator is emitted before its use is known:

- A matrix product takes its summand as the third input of its Gemm, and its scale as `alpha`.
- A sum may be emitted up to a scale and a constant, which go into the next layer's `alpha` and bias.
- An atom that was emitted only as part of a sum is expressed from then on as that sum minus the rest; where rounding
  would spoil the difference, the atom is computed again.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["Emitter", "Expression", "LinearWriter"]

_NEGLIGIBLE = 1e-12
"""Coefficients and constants below this share of the largest count as rounding errors of terms that cancel exactly."""

_MAX_ERROR = 8.0
"""Accepted error of an atom taken as a difference, in rounding errors of the sum; above it, it is computed again."""

_MAX_SCALE = 256.0
"""Largest factor, either way, between a value and the sum that it represents: float16 overflows at 65504, and factors
multiply."""

Vector = NDArray[np.float64]


class _Atom:
    """A summand.

    Attributes:
        meaning: The atom in terms of values of the graph, once it was emitted as part of one; None before.
        error: Error of `meaning`, in rounding errors.
    """

    meaning: Expression | None = None
    error: float = 0.0


class _Value(_Atom):
    """A value of the graph."""

    def __init__(self, value: ir.Value) -> None:
        self.value = value


class _Product(_Atom):
    """A matrix product to be emitted."""

    def __init__(self, inputs: ir.Value, weight: Vector) -> None:
        self.inputs, self.weight = inputs, weight


class _Clipped(_Atom):
    """A clipped sum to be emitted."""

    def __init__(self, inner: Expression, low: float, high: float) -> None:
        self.inner, self.low, self.high = inner, low, high


class Expression:
    """A sum of scaled atoms and a constant vector, for every row of a batch.

    Args:
        terms: Coefficient of every atom.
        constant: Vector [dim], or 0.
    """

    def __init__(self, terms: dict[_Atom, float], constant: Vector | float = 0.0) -> None:
        self.terms, self.constant = terms, constant

    @classmethod
    def value(cls, value: ir.Value) -> Expression:
        """A value [rows, dim] of the graph."""
        return cls({_Value(value): 1.0})

    @classmethod
    def linear(cls, inputs: ir.Value, weight: Vector, bias: Vector) -> Expression:
        """A linear layer: inputs @ weight.T + bias, with inputs [rows, in], weight [out, in] and bias [out]."""
        return cls({_Product(inputs, weight): 1.0}, bias)

    def __add__(self, other: Expression) -> Expression:
        terms = dict(self.terms)
        for atom, coefficient in other.terms.items():
            terms[atom] = terms.get(atom, 0.0) + coefficient
        return Expression(terms, self.constant + other.constant)

    def __sub__(self, other: Expression) -> Expression:
        return self + -1.0 * other

    def __rmul__(self, scale: float) -> Expression:
        return Expression({atom: scale * c for atom, c in self.terms.items()}, scale * self.constant)

    def __truediv__(self, scale: float) -> Expression:
        return (1 / scale) * self

    def clamp(self, low: float, high: float) -> Expression:
        """The sum with every component clipped to [low, high]."""
        here = self.resolved()
        if len(here.terms) == 1 and not np.any(here.constant):
            ((atom, coefficient),) = here.terms.items()
            if isinstance(atom, _Clipped) and _is_one(coefficient) and (atom.low, atom.high) == (low, high):
                return here
        return Expression({_Clipped(self, low, high): 1.0})

    def resolved(self) -> Expression:
        """The same sum, with emitted atoms replaced by their `meaning` where that is accurate enough."""
        size = _size(self.terms)
        sum_ = Expression({}, self.constant)
        for atom, coefficient in self.terms.items():
            if atom.meaning is None or abs(coefficient) * atom.error > _MAX_ERROR * size:
                sum_ = sum_ + Expression({atom: coefficient})
            else:
                sum_ = sum_ + coefficient * atom.meaning
        least = _NEGLIGIBLE * max(map(abs, sum_.terms.values()), default=0.0)
        terms = {atom: c for atom, c in sum_.terms.items() if abs(c) > least}
        return Expression(terms, sum_.constant if np.max(np.abs(sum_.constant)) > least else 0.0)


class LinearWriter(Protocol):
    """Writes the operators that sums are made of."""

    def product(self, inputs: ir.Value, weight: Vector, added: ir.Value | None, alpha: float, beta: float) -> ir.Value:
        """Writes alpha * inputs @ weight.T + beta * added, in float32."""
        ...

    def op(self, name: str, *inputs: ir.Value) -> ir.Value:
        """Writes one operator on float32 values."""
        ...

    def constant(self, value: Vector | float) -> ir.Value:
        """Stores a float32 constant."""
        ...


class Emitter:
    """Turns sums into values of the graph.

    Args:
        writer: Writes the operators.
    """

    def __init__(self, writer: LinearWriter) -> None:
        self._writer = writer

    def up_to_scale(self, sum_: Expression) -> tuple[ir.Value, float, Vector | float]:
        """Emit a value m with sum = scale * m + constant, and replace the sum's terms accordingly.

        Returns:
            m, scale and constant.
        """
        here = sum_.resolved()
        atom, scale = self._emit(here.terms)
        if not 1 / _MAX_SCALE < abs(scale) < _MAX_SCALE:
            atom, scale = _Value(self._writer.op("Mul", atom.value, self._writer.constant(scale))), 1.0
        # Otherwise later sums would expand into all atoms of this one, and accumulate their rounding errors.
        emitted = Expression({atom: scale}, here.constant)
        sum_.terms, sum_.constant = emitted.terms, emitted.constant
        return atom.value, scale, here.constant

    def exactly(self, sum_: Expression) -> ir.Value:
        """Emit the sum itself."""
        here = sum_.resolved()
        pending = [atom for atom in here.terms if isinstance(atom, _Product)]
        if pending:
            return self._product_with_constant(here, pending[-1])
        value, scale, constant = self.up_to_scale(here)
        if not _is_one(scale):
            value = self._writer.op("Mul", value, self._writer.constant(scale))
        return self._plus(value, constant)

    def _emit(self, terms: dict[_Atom, float]) -> tuple[_Value, float]:
        """Emit a value m; returns it and the scale with sum of terms = scale * m."""
        pending = [atom for atom in terms if not isinstance(atom, _Value)]
        if not pending:
            return self._combined(terms)
        newest = pending[-1]
        rest = {atom: c for atom, c in terms.items() if atom is not newest}
        if not rest:
            value = _Value(self._alone(newest, 1.0))
            newest.meaning, newest.error = Expression({value: 1.0}), 0.0
            return value, terms[newest]
        base, scale = self._emit(rest)
        share = terms[newest] / scale
        if isinstance(newest, _Product):
            added = self._writer.product(newest.inputs, newest.weight, base.value, share, 1.0)
        else:
            added = self._writer.op("Add", base.value, self._alone(newest, share))
        value = _Value(added)
        newest.meaning = Expression({value: 1 / share, base: -1 / share})
        newest.error = _size(terms) / abs(terms[newest])
        return value, scale

    def _alone(self, atom: _Atom, scale: float) -> ir.Value:
        if isinstance(atom, _Product):
            return self._writer.product(atom.inputs, atom.weight, None, scale, 1.0)
        assert isinstance(atom, _Clipped)
        low, high = sorted((scale * atom.low, scale * atom.high))
        bounds = (self._writer.constant(bound) for bound in (low, high))
        return self._writer.op("Clip", self.exactly(scale * atom.inner), *bounds)

    def _combined(self, terms: dict[_Atom, float]) -> tuple[_Value, float]:
        """Emit a sum of values, scaled to make its largest coefficient 1; returns it and the scale."""
        pivot = max(terms, key=lambda atom: abs(terms[atom]))
        assert isinstance(pivot, _Value)
        others = {atom: c / terms[pivot] for atom, c in terms.items() if atom is not pivot}
        if not others:
            return pivot, terms[pivot]
        value = pivot.value
        for atom, share in others.items():
            assert isinstance(atom, _Value)
            added = atom.value
            if not _is_one(abs(share)):
                added = self._writer.op("Mul", added, self._writer.constant(abs(share)))
            value = self._writer.op("Add" if share > 0 else "Sub", value, added)
        return _Value(value), terms[pivot]

    def _product_with_constant(self, here: Expression, product: _Product) -> ir.Value:
        """Emit one Gemm, whose third input holds the rest of the sum and the constant."""
        alpha = here.terms[product]
        rest = {atom: c for atom, c in here.terms.items() if atom is not product}
        if not rest:
            bias = self._writer.constant(here.constant) if np.any(here.constant) else None
            return self._writer.product(product.inputs, product.weight, bias, alpha, 1.0)
        base, beta = self._emit(rest)
        base = _Value(self._plus(base.value, here.constant / beta))
        value = _Value(self._writer.product(product.inputs, product.weight, base.value, alpha, beta))
        product.meaning = Expression({value: 1 / alpha, base: -beta / alpha})
        product.error = _size(here.terms) / abs(alpha)
        return value.value

    def _plus(self, value: ir.Value, constant: Vector | float) -> ir.Value:
        if not np.any(constant):
            return value
        return self._writer.op("Add", value, self._writer.constant(constant))


def _is_one(coefficient: float) -> bool:
    return abs(coefficient - 1) <= _NEGLIGIBLE


def _size(terms: dict[_Atom, float]) -> float:
    """Magnitude of a sum: 1, as for actions, or its largest coefficient if that is larger."""
    return max([1.0, *map(abs, terms.values())])
