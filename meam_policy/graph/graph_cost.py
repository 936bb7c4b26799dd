"""What one inference of a policy graph costs, from the shapes of its values: memory and products, bounded.

onnxruntime computes what a graph asks for, however large: an outer product of two inputs, a value concatenated with
itself again and again, or hundreds of large matrix products stop a machine as surely as an endless loop. None of that
depends on the numbers that are computed, only on their shapes, and those follow from the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from meam_policy.graph.onnx_tensor import Tensor, integers
from meam_policy.graph.onnx_wire import WireReader, signed

__all__ = ["Cost", "Sizes"]

MAX_ELEMENTS = 2**26
"""Numbers that all nodes together may make for one observation, beside four times the weights: 256 MB in float32. A
thousand evaluations of four layers of 1024 make a fifteenth of that with an activation."""

MAX_PRODUCTS = 2**36
"""Multiplications in matrix products for one observation: a second or two on one core. A thousand evaluations of four
layers of 1024 take 2**32."""

_MAX_NUMBERS = 64
"""Longest list of integers that is followed as a shape."""

_FLOATS = (1, 10, 11, 16)
"""Of TensorProto.DataType: float32, float16, float64, bfloat16; what is not among them counts as whole numbers."""

_WHOLE = (b"ArgMax", b"ArgMin", b"Shape", b"Size", b"MatMulInteger", b"QuantizeLinear", b"DynamicQuantizeLinear")
_FLOATING = (b"DequantizeLinear", b"DynamicQuantizeMatMul", b"MatMulNBits")
"""Operators whose results are of whole numbers, and of floats, whatever the inputs are."""

_ENDLESS = 2**63
"""Taken for everything above it."""


class Sizes(NamedTuple):
    """What the dimensions are taken for that only a run fixes.

    Attributes:
        rows: The first axis of an input: the batch.
        others: Every other one: the samples to choose from.
    """

    rows: int
    others: int


class _Value(NamedTuple):
    """What is known of a value.

    Attributes:
        elements: How many numbers it has, at most.
        shape: Its shape; None where it is not known.
        numbers: Its numbers in C order, where they are few integers that are known.
        whole: Whether its type is one of whole numbers.
    """

    elements: int
    shape: tuple[int, ...] | None
    numbers: tuple[int, ...] | None = None
    whole: bool = False


_ABSENT = _Value(1, ())
"""An optional input that is left out."""

_Attributes = Mapping[bytes, dict[str, Any]]
_Shape = tuple[int, ...]


class Cost:
    """Follows a graph's nodes in their order, and refuses one with which an inference costs more than a policy needs.

    A shape that is known is exact. Where it is not, as behind a shape that is computed from numbers, a value has at
    most as many elements as the operator could make of its inputs, and so has everything that is made of it.

    Args:
        reader: The file.
        sizes: What the open dimensions are taken for. The bounds are multiplied by them, as what an honest graph
            costs is: one whose cost grows with the square of the batch is refused.
    """

    def __init__(self, reader: WireReader, sizes: Sizes) -> None:
        self.reader, self.sizes = reader, sizes
        factor = sizes.rows * sizes.others
        self.elements, self.products = MAX_ELEMENTS * factor, MAX_PRODUCTS * factor
        self.values: dict[bytes, _Value] = {b"": _ABSENT}

    def add_input(self, name: bytes, dimensions: Sequence[int | None] | None) -> None:
        """Add an input of the graph; its dimensions, None where they are open; None if no shape is declared."""
        if dimensions is None:  # refused when it is loaded
            self.values[name] = _Value(_ENDLESS, None)
            return
        shape = tuple(
            size if size is not None else self.sizes.others if axis else self.sizes.rows
            for axis, size in enumerate(dimensions)
        )
        self.values[name] = _Value(math.prod(shape), shape)

    def add_weight(self, tensor: Tensor) -> None:
        """Add an initialiser."""
        self.elements += 4 * tensor.elements
        self._add_constant(tensor, tensor.name)

    def _add_constant(self, tensor: Tensor, name: bytes) -> None:
        numbers = integers(self.reader, tensor) if tensor.elements <= _MAX_NUMBERS else None
        known = None if numbers is None else tuple(numbers)
        self.values[name] = _Value(tensor.elements, tensor.dims, known, tensor.data_type not in _FLOATS)

    def add_node(
        self, operator: bytes, inputs: Sequence[bytes], outputs: Sequence[bytes], attributes: _Attributes
    ) -> None:
        """Add the next node.

        Raises:
            FormatError: with it, an inference makes more numbers or products than a policy needs.
        """
        if operator == b"Constant":
            self._add_constant_node(outputs[0], *attributes.values())
            return
        values = [self.values[name] for name in inputs]
        if operator == b"Div" and values[0].whole:  # the least number by -1 ends the process
            self._refuse(operator, "of whole numbers")
        # An axis without elements would hide how large the others are.
        if operator in _DROPPING and None in [value.shape for value in values]:
            self._refuse(operator, "of values whose shape cannot be told before it runs")
        shapes = _shapes(operator, values, len(outputs), attributes)
        if operator in _PRODUCTS and shapes and shapes[0] is not None:
            self.products -= _product((*shapes[0], _summands(operator, values, attributes)))
            if self.products < 0:
                self._refuse(operator, f"with which one observation takes more than {MAX_PRODUCTS} multiplications")
        numbers = _numbers(operator, values, attributes)
        for index, (output, shape) in enumerate(zip(outputs, shapes, strict=True)):
            most = _most_elements(operator, values) if shape is None else _product(shape)
            self.elements -= most
            if self.elements < 0:
                self._refuse(operator, f"with which one observation makes more than {MAX_ELEMENTS} numbers")
            self.values[output] = _Value(most, shape, numbers, _whole(operator, index, values, attributes))
            numbers = None

    def _add_constant_node(self, output: bytes, fields: dict[str, Any]) -> None:
        if "tensor" in fields:
            self._add_constant(fields["tensor"], output)
            return
        listed = next((fields[kind] for kind in ("ints", "floats", "strings") if kind in fields), None)
        shape = () if listed is None else (len(listed),)
        given = fields.get("ints", [fields["i"]] if "i" in fields else None)
        known = None if given is None or len(given) > _MAX_NUMBERS else tuple(map(signed, given))
        self.values[output] = _Value(math.prod(shape), shape, known, "ints" in fields or "i" in fields)

    def _refuse(self, operator: bytes, text: str) -> NoReturn:
        self.reader.refuse(f"has an operator {operator.decode()} {text}, which no policy needs")


def _whole(operator: bytes, output: int, values: Sequence[_Value], attributes: _Attributes) -> bool:
    """Whether an output of a node is of whole numbers: mostly as its first input is."""
    if (operator, output) in ((b"TopK", 1), (b"DynamicQuantizeLinear", 1)):  # places; a scale
        return operator == b"TopK"
    if operator in _WHOLE or operator in _FLOATING:
        return operator in _WHOLE
    if operator == b"Cast":
        return _integer(attributes, b"to", 1) not in _FLOATS
    if operator == b"ConstantOfShape":
        filling = attributes.get(b"value", {}).get("tensor")
        return filling is not None and filling.data_type not in _FLOATS
    kind = 1 if operator in (b"CastLike", b"Where") else 0
    return len(values) > kind and values[kind].whole


def _shapes(
    operator: bytes, values: Sequence[_Value], outputs: int, attributes: _Attributes
) -> Sequence[_Shape | None]:
    """Shapes of a node's outputs; None where they are not known, or not what ONNX allows."""
    try:
        found = _RULES.get(operator, _broadcast)(values, attributes, outputs)
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        return [None] * outputs
    shapes = found[:outputs] if isinstance(found, list) else [found] * outputs
    return [None if min(shape, default=0) < 0 else shape for shape in shapes]


def _product(numbers: Sequence[int]) -> int:
    return min(math.prod(numbers), _ENDLESS)


def _most_elements(operator: bytes, values: Sequence[_Value]) -> int:
    """Elements of a result at most, whatever the shapes are."""
    sizes = [value.elements for value in values]
    if not sizes:
        return 1
    if operator == b"Concat":
        return min(sum(sizes), _ENDLESS)
    if operator in _NO_LARGER:
        return sizes[0]
    if operator in (b"Expand", b"Tile", b"ConstantOfShape"):
        shape = values[0 if operator == b"ConstantOfShape" else 1].numbers
        if shape is None:
            return _ENDLESS
        sizes = [abs(number) for number in shape] + (sizes[:1] if operator != b"ConstantOfShape" else [])
    elif operator == b"Range":
        return _ENDLESS
    return _product([max(size, 1) for size in sizes])


# The rules: what shapes an operator makes of its inputs. One that needs a shape which is not known fails, by the
# TypeError of None, and so does one that is given what ONNX does not allow.


def _known(value: _Value) -> _Shape:
    if value.shape is None:
        raise TypeError
    return value.shape


def _axis(attributes: _Attributes, rank: int, default: int = 0) -> int:
    axis = _integer(attributes, b"axis", default)
    if not -rank <= axis < rank:
        raise IndexError
    return axis % rank


def _integer(attributes: _Attributes, name: bytes, default: int) -> int:
    fields = attributes.get(name)
    return default if fields is None else signed(fields.get("i", 0))


def _integers(values: Sequence[_Value], index: int, attributes: _Attributes, name: bytes) -> _Shape | None:
    """Numbers from an input or, in earlier opsets, from an attribute; None if there are neither."""
    if len(values) > index and values[index] is not _ABSENT:
        return values[index].numbers or _fail()
    fields = attributes.get(name)
    return None if fields is None else tuple(map(signed, fields.get("ints", ())))


def _fail() -> _Shape:
    raise TypeError


def _joined(*shapes: _Shape) -> _Shape:
    """The shape to which shapes are broadcast."""
    if len(set(shapes)) == 1:
        return tuple(shapes[0])
    rank = max(map(len, shapes))
    padded = [(*[1] * (rank - len(shape)), *shape) for shape in shapes]
    joined = []
    for sizes in zip(*padded, strict=True):
        different = {size for size in sizes if size != 1}
        if len(different) > 1:
            raise ValueError
        joined.append(different.pop() if different else 1)
    return tuple(joined)


def _broadcast(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return _joined(*(_known(value) for value in values))


def _same(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return _known(values[0])


def _arg(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape = _known(values[0])
    axis = _axis(attributes, len(shape))
    kept = (1,) if _integer(attributes, b"keepdims", 1) else ()
    return shape[:axis] + kept + shape[axis + 1 :]


def _concat(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shapes = [_known(value) for value in values]
    axis = _axis(attributes, len(shapes[0]))
    around = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(around) > 1:
        raise ValueError
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _filled(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return values[0].numbers or _fail()


def _expand(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return _joined(_known(values[0]), values[1].numbers or _fail())


def _flatten(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape = _known(values[0])
    axis = _integer(attributes, b"axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise IndexError
    axis = axis + len(shape) if axis < 0 else axis
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def _gather(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, indices = _known(values[0]), _known(values[1])
    axis = _axis(attributes, len(shape))
    return shape[:axis] + indices + shape[axis + 1 :]


def _gather_elements(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return _known(values[1])


def _gather_nd(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, indices = _known(values[0]), _known(values[1])
    batch = _integer(attributes, b"batch_dims", 0)
    return indices[:-1] + shape[batch + indices[-1] :]


def _gemm(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    (rows, inner), (inner_too, columns) = (
        _known(value)[:: -1 if _integer(attributes, name, 0) else 1]
        for value, name in zip(values[:2], (b"transA", b"transB"), strict=True)
    )
    if inner != inner_too:
        raise ValueError
    return rows, columns


def _matmul(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    first, second = _known(values[0]), _known(values[1])
    a, b = first if len(first) > 1 else (1, *first), second if len(second) > 1 else (*second, 1)
    if a[-1] != b[-2]:
        raise ValueError
    made = (*_joined(a[:-2], b[:-2]), a[-2], b[-1])
    made = made if len(first) > 1 else made[:-2] + made[-1:]
    return made if len(second) > 1 else made[:-1]


def _matmul_bits(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return (*_known(values[0])[:-1], _integer(attributes, b"N", -1))


def _normalised(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> list[_Shape]:
    shape = _known(values[0])
    axis = _axis(attributes, len(shape), -1)
    statistics = shape[:axis] + (1,) * (len(shape) - axis)
    return [shape, statistics, statistics]


def _quantised(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> list[_Shape]:
    return [_known(values[0]), (), ()]


def _range(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    start, limit, step = ((value.numbers or _fail())[0] for value in values)
    return (max(0, -((start - limit) // step)),)


def _reduced(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, axes = _known(values[0]), _integers(values, 1, attributes, b"axes")
    if not axes:
        axes = () if _integer(attributes, b"noop_with_empty_axes", 0) else tuple(range(len(shape)))
    reduced = _within(axes, len(shape))
    if _integer(attributes, b"keepdims", 1):
        return tuple(1 if axis in reduced else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in reduced)


def _within(axes: Sequence[int], rank: int) -> set[int]:
    if not all(-rank <= axis < rank for axis in axes):
        raise IndexError
    return {axis % rank for axis in axes}


def _reshaped(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, wanted = _known(values[0]), values[1].numbers
    if wanted is None or values[1].shape is None:
        raise TypeError
    if not _integer(attributes, b"allowzero", 0):
        wanted = tuple(size or shape[axis] for axis, size in enumerate(wanted))
    if -1 in wanted:
        rest = -math.prod(wanted)  # of the others, since -1 is one of them
        wanted = tuple(math.prod(shape) // rest if size == -1 else size for size in wanted)
    if math.prod(wanted) != math.prod(shape):
        raise ValueError
    return wanted


def _shape(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape = _known(values[0])
    end = _integer(attributes, b"end", len(shape))
    return (len(shape[_integer(attributes, b"start", 0) : end]),)


def _scalar(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    return ()


def _sliced(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape = list(_known(values[0]))
    starts, ends = (value.numbers or _fail() for value in values[1:3])
    axes = _integers(values, 3, {}, b"") or range(len(starts))
    steps = _integers(values, 4, {}, b"") or (1,) * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        shape[axis] = len(range(*slice(start, end, step).indices(shape[axis])))
    return tuple(shape)


def _split(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> list[_Shape]:
    shape = _known(values[0])
    axis = _axis(attributes, len(shape))
    if len(values) > 1:
        sizes = values[1].numbers or _fail()
    else:
        part = -(-shape[axis] // outputs)
        sizes = (*[part] * (outputs - 1), shape[axis] - part * (outputs - 1))
    if len(sizes) != outputs or sum(sizes) != shape[axis]:
        raise ValueError
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def _squeezed(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, axes = _known(values[0]), _integers(values, 1, attributes, b"axes")
    if axes is None:
        return tuple(size for size in shape if size != 1)
    gone = _within(axes, len(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in gone)


def _tiled(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    repeats = values[1].numbers or _fail()
    return tuple(size * times for size, times in zip(_known(values[0]), repeats, strict=True))


def _top(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape = _known(values[0])
    axis = _axis(attributes, len(shape), -1)
    return (*shape[:axis], (values[1].numbers or _fail())[0], *shape[axis + 1 :])


def _transposed(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, fields = _known(values[0]), attributes.get(b"perm")
    if fields is None:
        return shape[::-1]
    order = [signed(axis) for axis in fields.get("ints", ())]
    if sorted(order) != list(range(len(shape))):
        raise IndexError
    return tuple(shape[axis] for axis in order)


def _unsqueezed(values: Sequence[_Value], attributes: _Attributes, outputs: int) -> _Shape:
    shape, axes = _known(values[0]), values[1].numbers or _fail()
    new, sizes = _within(axes, len(shape) + len(axes)), iter(shape)
    if len(new) < len(axes):
        raise ValueError
    return tuple(1 if axis in new else next(sizes) for axis in range(len(shape) + len(axes)))


_Rule = Callable[[Sequence[_Value], _Attributes, int], _Shape | list[_Shape]]
_RULES: Mapping[bytes, _Rule] = {
    b"ArgMax": _arg,
    b"ArgMin": _arg,
    b"CastLike": _same,
    b"Clip": _same,
    b"Concat": _concat,
    b"ConstantOfShape": _filled,
    b"DequantizeLinear": _same,
    b"DynamicQuantizeLinear": _quantised,
    b"DynamicQuantizeMatMul": _matmul,
    b"Expand": _expand,
    b"Flatten": _flatten,
    b"Gather": _gather,
    b"GatherElements": _gather_elements,
    b"GatherND": _gather_nd,
    b"Gemm": _gemm,
    b"LayerNormalization": _normalised,
    b"MatMul": _matmul,
    b"MatMulInteger": _matmul,
    b"MatMulNBits": _matmul_bits,
    b"QuantizeLinear": _same,
    b"Range": _range,
    b"ReduceMax": _reduced,
    b"ReduceMean": _reduced,
    b"ReduceMin": _reduced,
    b"ReduceSum": _reduced,
    b"ReduceSumSquare": _reduced,
    b"Reshape": _reshaped,
    b"Shape": _shape,
    b"Size": _scalar,
    b"Slice": _sliced,
    b"Split": _split,
    b"Squeeze": _squeezed,
    b"Tile": _tiled,
    b"TopK": _top,
    b"Transpose": _transposed,
    b"Unsqueeze": _unsqueezed,
}
"""All others broadcast their inputs, or keep the shape of the only one."""

# Operators whose result has no more elements than their first input, whatever the others are.
_NO_LARGER = frozenset(
    b"ArgMax ArgMin CastLike Clip DequantizeLinear DynamicQuantizeLinear Flatten LayerNormalization QuantizeLinear "
    b"ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Reshape Slice Split Squeeze TopK Transpose "
    b"Unsqueeze".split()
)

_DROPPING = frozenset(
    b"ArgMax ArgMin DynamicQuantizeMatMul Gemm MatMul MatMulInteger MatMulNBits ReduceMax ReduceMean ReduceMin "
    b"ReduceSum ReduceSumSquare".split()
)
"""Operators whose result lacks axes of their inputs."""

_PRODUCTS = (b"DynamicQuantizeMatMul", b"Gemm", b"MatMul", b"MatMulInteger", b"MatMulNBits")


def _summands(operator: bytes, values: Sequence[_Value], attributes: _Attributes) -> int:
    """Products that each number of a matrix product is the sum of."""
    shape = _known(values[0])
    return shape[0] if operator == b"Gemm" and _integer(attributes, b"transA", 0) else shape[-1]


def _numbers(operator: bytes, values: Sequence[_Value], attributes: _Attributes) -> _Shape | None:
    """The integers that a node makes, where it makes a shape by carrying numbers about."""
    if operator in (b"Shape", b"Size"):
        shape = values[0].shape
        if shape is None or operator == b"Size":
            return None if shape is None else (math.prod(shape),)
        return shape[_integer(attributes, b"start", 0) : _integer(attributes, b"end", len(shape))]
    if operator in (b"Identity", b"Reshape", b"Squeeze", b"Unsqueeze"):
        return values[0].numbers
    if operator not in (b"Concat", b"Gather", b"Mul", b"Slice"):
        return None
    known = [value.numbers for value in values if value.shape is not None and len(value.shape) <= 1]
    lists = [numbers for numbers in known if numbers is not None]
    if len(lists) < len(values):
        return None
    return _carried(operator, lists)


def _carried(operator: bytes, lists: Sequence[_Shape]) -> _Shape | None:
    first, *rest = lists
    if operator == b"Concat":
        made = tuple(number for numbers in lists for number in numbers)
    elif operator == b"Gather":
        made = tuple(first[index] for index in rest[0] if -len(first) <= index < len(first))
    elif operator == b"Mul":
        length = max(map(len, lists))
        if not {len(numbers) for numbers in lists} <= {1, length}:
            return None
        made = tuple(math.prod(numbers[i % len(numbers)] for numbers in lists) for i in range(length))
    else:
        if any(len(numbers) != 1 for numbers in rest) or (len(rest) > 2 and rest[2] != (0,) and rest[2] != (-1,)):
            return None
        step = rest[3][0] if len(rest) > 3 else 1
        made = first[slice(rest[0][0], rest[1][0], step)] if step else ()
    few = len(made) <= _MAX_NUMBERS and all(-_ENDLESS <= number < _ENDLESS for number in made)
    return made if few else None  # a product that wraps around is none of these numbers
