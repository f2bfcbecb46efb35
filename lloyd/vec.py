"""Sixteen f32 lanes as one value inside compiled functions.

A block [n, 16] is read and written a row at a time with `load` and `store`; arithmetic between such values is lane by
lane, `fma` with a single rounding. The compiler lowers each value to whatever vectors the machine has, and since
nothing ever crosses lanes or is reordered, every machine computes the same bits. Depends on numba and llvmlite.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _F32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = _F32x16()


@register_model(_F32x16)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _row_pointer(context: Any, builder: Any, kind: Any, value: Any, row: Any) -> Any:
    """The address of block[row, 0] as a pointer to 16 lanes; blocks are C-contiguous f32 [n, 16]."""
    data = context.make_array(kind)(context, builder, value).data
    start = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(data, [start]), _VECTOR.as_pointer())


def _broadcast(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), mask)


@intrinsic
def load(typing: Any, block: Any, row: Any) -> Any:
    """block[row] of an f32 [n, 16] array as a value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        return builder.load(_row_pointer(context, builder, signature.args[0], args[0], index), align=4)

    return f32x16(block, row), codegen


@intrinsic
def store(typing: Any, block: Any, row: Any, value: Any) -> Any:
    """block[row] = value for an f32 [n, 16] array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        builder.store(args[2], _row_pointer(context, builder, signature.args[0], args[0], index), align=4)
        return context.get_dummy_value()

    return types.void(block, row, value), codegen


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """A scalar, rounded to f32, in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(builder, context.cast(builder, args[0], signature.args[0], types.float32))

    return f32x16(scalar), codegen


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
        )
        return builder.call(function, args)

    return f32x16(a, b, c), codegen


@intrinsic
def root(typing: Any, a: Any) -> Any:
    """The square root, correctly rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), f"llvm.sqrt.v{LANES}f32"
        )
        return builder.call(function, args)

    return f32x16(a), codegen


def _choice(predicate: str) -> Callable[..., Any]:
    def typer(typing: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(predicate, args[0], args[1]), args[2], args[3])

        return f32x16(a, b, then, other), codegen

    return typer


where_gt = intrinsic(_choice(">"))
"""where_gt(a, b, x, y): x in lanes with a > b, else y; y where either is NaN."""
where_eq = intrinsic(_choice("=="))
"""where_eq(a, b, x, y): x in lanes with a == b, else y."""


def _operator(function: Any, method: str) -> None:
    """Give two values the Python operator `function`, lowered to the IR builder's `method`."""

    def typer(typing: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, method)(args[0], args[1])

        return f32x16(a, b), codegen

    lowered = intrinsic(typer)

    @overload(function)
    def choose(a, b):
        return (lambda a, b: lowered(a, b)) if a == f32x16 and b == f32x16 else None


for _function, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_function, _method)
