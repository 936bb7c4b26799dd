"""Sums of scaled graph values, emitted as few ONNX operators.

An exported policy runs hundreds of small operators, each of which costs more than the few numbers that a solver adds or
scales. So the solvers of training run here on symbols, and nothing is emitted before it is known what it is for:

- A matrix product takes what is added to it as the third input of its Gemm, and its scale as `alpha`.
- A sum may be emitted up to a scale and a constant, which the next layer's `alpha` and bias take up.
- What was emitted as a part of a sum is afterwards known as a difference of that sum and the rest; where rounding would
  spoil the difference, it is computed again.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["Emitter", "Expression", "LinearWriter"]

_NOTHING = 1e-12
"""Coefficients and constants below this share of the largest are rounding errors of exact cancellations."""

_MAX_ERROR = 8.0
"""Rounding errors of a sum by which a part may be wrong that is taken as a difference; else it is computed again."""

_RANGE = 256.0
"""How far a value may be from the sum that it stands for: float16 overflows at 65504, and factors multiply."""

Vector = NDArray[np.float64]


class _Atom:
    """Something that sums are made of; once it exists only as a part of other values, `meaning` says how.

    Taken as that difference it is known to within `error` rounding errors.
    """

    meaning: Expression | None = None
    error: float = 0.0


class _Value(_Atom):
    """A value of the graph."""

    def __init__(self, value: ir.Value) -> None:
        self.value = value


class _Product(_Atom):
    """A matrix product that is still to be emitted."""

    def __init__(self, inputs: ir.Value, weight: Vector) -> None:
        self.inputs, self.weight = inputs, weight


class _Clipped(_Atom):
    """A clipped sum that is still to be emitted."""

    def __init__(self, inner: Expression, low: float, high: float) -> None:
        self.inner, self.low, self.high = inner, low, high


class Expression:
    """A sum of scaled atoms and a constant vector; every row of a batch is such a sum.

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
        """Inputs @ weight.T + bias, with inputs [rows, in], weight [out, in] and bias [out]."""
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
        """The sum with every component clipped."""
        here = self.resolved()
        if len(here.terms) == 1 and not np.any(here.constant):
            ((atom, coefficient),) = here.terms.items()
            if isinstance(atom, _Clipped) and _is_one(coefficient) and (atom.low, atom.high) == (low, high):
                return here
        return Expression({_Clipped(self, low, high): 1.0})

    def resolved(self) -> Expression:
        """The same sum of atoms that stand for themselves."""
        size = _size(self.terms)
        sum_ = Expression({}, self.constant)
        for atom, coefficient in self.terms.items():
            if atom.meaning is None or abs(coefficient) * atom.error > _MAX_ERROR * size:
                sum_ = sum_ + Expression({atom: coefficient})
            else:
                sum_ = sum_ + coefficient * atom.meaning
        least = _NOTHING * max(map(abs, sum_.terms.values()), default=0.0)
        terms = {atom: c for atom, c in sum_.terms.items() if abs(c) > least}
        return Expression(terms, sum_.constant if np.max(np.abs(sum_.constant)) > least else 0.0)


class LinearWriter(Protocol):
    """Writes the operators that sums need."""

    def product(self, inputs: ir.Value, weight: Vector, added: ir.Value | None, alpha: float, beta: float) -> ir.Value:
        """Alpha inputs @ weight.T + beta added, in float32."""
        ...

    def op(self, name: str, *inputs: ir.Value) -> ir.Value:
        """One operator of float32 values."""
        ...

    def constant(self, value: Vector | float) -> ir.Value:
        """A float32 constant."""
        ...


class Emitter:
    """Turns sums into values of the graph.

    Args:
        writer: Writes the operators.
    """

    def __init__(self, writer: LinearWriter) -> None:
        self._writer = writer

    def up_to_scale(self, sum_: Expression) -> tuple[ir.Value, float, Vector | float]:
        """Emit a value m of which the sum is scale * m + constant, and from now on known as that.

        Returns:
            m, scale and constant.
        """
        here = sum_.resolved()
        atom, scale = self._emit(here.terms)
        if not 1 / _RANGE < abs(scale) < _RANGE:
            atom, scale = _Value(self._writer.op("Mul", atom.value, self._writer.constant(scale))), 1.0
        # Else sums made of this one would hold all of its history, and what rounding adds to it.
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
        """A value of which the terms are a multiple."""
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
        """A multiple of a sum of values, with the largest coefficient as 1."""
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
        """One Gemm, whose third input carries the rest and the constant."""
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
    return abs(coefficient - 1) <= _NOTHING


def _size(terms: dict[_Atom, float]) -> float:
    """Of a sum: its values are of order one, as actions are, unless a coefficient says more."""
    return max([1.0, *map(abs, terms.values())])
