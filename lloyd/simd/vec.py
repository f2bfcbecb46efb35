"""Sixteen f32 lanes, or eight f64 lanes, as one value inside compiled functions.

A block f32 [n, 16] or f64 [n, 8] is read and written a row at a time with `load` and `store`. Arithmetic between two
values is lane by lane; `fma` rounds once. The compiler makes of each value the vectors that the machine has. No sum
crosses lanes and none is reordered, so every machine computes the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, overload, register_model

intrinsic: Any = _intrinsic
"""numba's decorator, whose result takes one argument less than the function that it decorates."""

LANES = 16
WIDE_LANES = 8


class _Lanes(types.Type):
    """The numba type of one value; `element` is its lanes' type."""

    def __init__(self, element: types.Float, count: int) -> None:
        self.element = element
        self.count = count
        self.scalar = ir.FloatType() if element == types.float32 else ir.DoubleType()
        self.vector = ir.VectorType(self.scalar, count)
        super().__init__(name=f"{element}x{count}")

    @property
    def alignment(self) -> int:
        """Bytes to which arrays of the element are aligned at least."""
        return int(self.element.bitwidth) // 8

    @property
    def suffix(self) -> str:
        """How LLVM's intrinsics name the type."""
        return f"v{self.count}f{32 if self.element == types.float32 else 64}"


f32x16 = _Lanes(types.float32, LANES)
f64x8 = _Lanes(types.float64, WIDE_LANES)


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.vector)


def _lanes_of(block: Any) -> _Lanes:
    return f32x16 if block.dtype == types.float32 else f64x8


def _pointer(context: Any, builder: Any, kind: Any, value: Any, start: Any, vector: Any) -> Any:
    """The address of element `start` of a C-contiguous array, as a pointer to a vector."""
    data = context.make_array(kind)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _row_pointer(context: Any, builder: Any, kind: Any, value: Any, row: Any) -> Any:
    """The address of block[row, 0] as a pointer to its lanes; blocks are C-contiguous."""
    lanes = _lanes_of(kind)
    start = builder.mul(row, ir.Constant(row.type, lanes.count))
    return _pointer(context, builder, kind, value, start, lanes.vector)


def _broadcast(builder: Any, lanes: _Lanes, scalar: Any) -> Any:
    undefined = ir.Constant(lanes.vector, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), [0] * lanes.count)
    return builder.shuffle_vector(one, undefined, mask)


@intrinsic
def load(typing: Any, block: Any, row: Any) -> Any:
    """block[row] of an f32 [n, 16] or f64 [n, 8] array as a value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        pointer = _row_pointer(context, builder, signature.args[0], args[0], index)
        return builder.load(pointer, align=_lanes_of(signature.args[0]).alignment)

    return _lanes_of(block)(block, row), codegen


@intrinsic
def load_wide(typing: Any, block: Any, row: Any, half: Any) -> Any:
    """The first (half 0) or last (1) eight f32 lanes of block[row], f32 [n, 16], as an f64 value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, part = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (1, 2))
        index = builder.add(builder.mul(index, index.type(2)), part)
        start = builder.mul(index, index.type(WIDE_LANES))
        narrow = ir.VectorType(ir.FloatType(), WIDE_LANES)
        pointer = _pointer(context, builder, signature.args[0], args[0], start, narrow)
        return builder.fpext(builder.load(pointer, align=4), f64x8.vector)

    return f64x8(block, row, half), codegen


@intrinsic
def load_run(typing: Any, run: Any, start: Any) -> Any:
    """run[start:start+8] of an f64 [n] array as a value; start + 8 may not exceed n, which is not checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        pointer = _pointer(context, builder, signature.args[0], args[0], index, f64x8.vector)
        return builder.load(pointer, align=8)

    return f64x8(run, start), codegen


@intrinsic
def store(typing: Any, block: Any, row: Any, value: Any) -> Any:
    """block[row] = value for an f32 [n, 16] or f64 [n, 8] array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        pointer = _row_pointer(context, builder, signature.args[0], args[0], index)
        builder.store(args[2], pointer, align=_lanes_of(signature.args[0]).alignment)
        return context.get_dummy_value()

    return types.void(block, row, value), codegen


def _splatter(lanes: _Lanes) -> Callable[..., Any]:
    def typer(typing: Any, scalar: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _broadcast(
                builder, lanes, context.cast(builder, args[0], signature.args[0], lanes.element)
            )

        return lanes(scalar), codegen

    return typer


splat = intrinsic(_splatter(f32x16))
"""A scalar, rounded to f32, in all sixteen lanes."""
splat_wide = intrinsic(_splatter(f64x8))
"""A scalar in all eight f64 lanes."""


def _library(name: str, lanes: _Lanes, arity: int) -> Callable[..., Any]:
    """The code of a call of LLVM's intrinsic `name` on values of one type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(lanes.vector, [lanes.vector] * arity)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{lanes.suffix}")
        return builder.call(function, args)

    return codegen


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return a(a, b, c), _library("fma", a, 3)


@intrinsic
def root(typing: Any, a: Any) -> Any:
    """The square root, correctly rounded."""
    return a(a), _library("sqrt", a, 1)


def _choice(predicate: str) -> Callable[..., Any]:
    def typer(typing: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(predicate, args[0], args[1]), args[2], args[3])

        return a(a, b, then, other), codegen

    return typer


where_gt = intrinsic(_choice(">"))
"""where_gt(a, b, x, y): x in lanes with a > b, else y; y where either is NaN."""
where_eq = intrinsic(_choice("=="))
"""where_eq(a, b, x, y): x in lanes with a == b, else y."""


def _reduction(name: str) -> Callable[..., Any]:
    """An intrinsic that folds a value of lanes that are numbers into one scalar by LLVM's reduction `name`."""

    def typer(typing: Any, a: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(a.scalar, [a.vector])
            function = cgutils.get_or_insert_function(
                builder.module, kind, f"llvm.vector.reduce.{name}.{a.suffix}"
            )
            return builder.call(function, args, fastmath=("nnan", "nsz"))

        return a.element(a), codegen

    return typer


least = intrinsic(_reduction("fmin"))
"""The least of a value's lanes."""
greatest = intrinsic(_reduction("fmax"))
"""The greatest of a value's lanes."""


@intrinsic
def tree(typing: Any, a: Any) -> Any:
    """The sum of a value's lanes: half of them are added to the other half until one is left."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, count = args[0], a.count
        while count > 1:
            count //= 2
            undefined, word = ir.Constant(value.type, ir.Undefined), ir.IntType(32)
            low, high = (
                ir.Constant(ir.VectorType(word, count), list(range(start, start + count)))
                for start in (0, count)
            )
            value = builder.fadd(
                builder.shuffle_vector(value, undefined, low), builder.shuffle_vector(value, undefined, high)
            )
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return a.element(a), codegen


def _mask(builder: Any, predicate: str, a: Any, b: Any) -> Any:
    """A whole number with a bit to each lane in which two vectors compare so; none where either is NaN."""
    return builder.bitcast(builder.fcmp_ordered(predicate, a, b), ir.IntType(a.type.count))


@intrinsic
def any_le(typing: Any, a: Any, b: Any) -> Any:
    """Whether a <= b in some lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _mask(builder, "<=", args[0], args[1])
        return builder.icmp_unsigned("!=", mask, mask.type(0))

    return types.boolean(a, b), codegen


@intrinsic
def first_outside(typing: Any, a: Any, low: Any, high: Any, start: Any) -> Any:
    """The first lane from number `start` on in which low < a <= high does not hold for f32 values, or LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        begin = context.cast(builder, args[3], signature.args[3], types.int32)
        # What lies outside, and not what does not lie inside: the two comparisons need not wait for each other.
        below = builder.fcmp_unordered("<=", args[0], args[1])
        above = builder.fcmp_unordered(">", args[0], args[2])
        outside = builder.bitcast(builder.or_(below, above), ir.IntType(LANES))
        mask = builder.or_(builder.zext(outside, word), word(1 << LANES))
        found = builder.cttz(builder.and_(mask, builder.shl(word(-1), begin)), ir.IntType(1)(1))
        return context.cast(builder, found, types.int32, types.intp)

    return types.intp(a, low, high, start), codegen


@intrinsic
def pick(typing: Any, a: Any, lane: Any) -> Any:
    """One lane of a value; its number is not checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        return builder.extract_element(args[0], index)

    return a.element(a, lane), codegen


@intrinsic
def count_gt(typing: Any, a: Any, b: Any) -> Any:
    """In how many lanes a > b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.zext(_mask(builder, ">", args[0], args[1]), ir.IntType(64))
        return context.cast(builder, builder.ctpop(mask), types.int64, types.intp)

    return types.intp(a, b), codegen


def _operator(function: Any, method: str) -> None:
    """Give two values the Python operator `function`, lowered to the IR builder's `method`."""

    def typer(typing: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, method)(args[0], args[1])

        return a(a, b), codegen

    lowered = intrinsic(typer)

    @overload(function)
    def choose(a, b):
        return (lambda a, b: lowered(a, b)) if isinstance(a, _Lanes) and a == b else None


for _function, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_function, _method)
