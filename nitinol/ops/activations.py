"""Activations as 8-bit integers, so that products with quantised weights are integer dot products.

Every 32 values share a scale, amax / 127, as llama.cpp's Q8_0 and Q8_1 blocks do for their side of the product:
relative to the largest of 32 values the rounding error is at most 1 / 254.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array, whole_array
from nitinol.graph.launch import Output, launch
from nitinol.graph.nodes import Call, View, whole
from nitinol.graph.operation import Launch
from nitinol.language.jit import JITFunction, jit
from nitinol.ops.attention import combine_kernel, combined
from nitinol.ops.norm import normal_part, rms_norm_kernel, row_parts

SMALLEST = tl.constexpr(1e-30)  # of the largest of a group: groups below it, and those of zeros, become zeros


class Activations(NamedTuple):
    """Quantised activations of T tokens: `values` int8 [T, columns], `scales` float32 [T, columns / 32], and `sums`
    int32 [T, columns / 16], the sums of every 16 integers (what a weight's minimum or offset is multiplied by)."""

    values: Any
    scales: Any
    sums: Any


@jit
def quantize_activations_kernel(x, values, scales, sums, columns, GROUPS: tl.constexpr):
    """Program (t, c): 32 * GROUPS values of token t."""
    group = tl.program_id(0).to(tl.int64) * (columns // 32) + tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = places(group)
    store_quantized(tl.load(x + at), values + at, scales + group, sums + group[:, None] * 2, None)


@jit
def rms_norm_quantize_kernel(
    x, weight, values, scales, sums, columns, epsilon,
    BLOCK: tl.constexpr, EVEN: tl.constexpr = False, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Program (r, p): RMSNorm of part p of PARTS of row r, then as above. BLOCK is at least `columns`, a multiple of
    32 (EVEN: the same)."""
    row = tl.program_id(0).to(tl.int64) * columns
    _, _, normal = normal_part(x, weight, None, row, columns, epsilon, BLOCK, EVEN, False, PARTS)
    GROUPS: tl.constexpr = BLOCK // PARTS // 32
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = places(group)
    store_quantized(
        tl.reshape(normal, (GROUPS, 2, 16)), values + row + at, scales + row // 32 + group,
        sums + row // 16 + group[:, None] * 2, None if EVEN else group < columns // 32,
    )  # fmt: skip


@jit
def combine_quantize_kernel(
    part, tops, totals, values, scales, sums, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Program (h, c): attention's parts of query head h (of all sequences') as one, BLOCK_D of its values, then as
    above. HEAD_DIM and BLOCK_D are multiples of 32."""
    head = tl.program_id(0)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = combined(part, tops, totals, head, lane, SPLITS, HEAD_DIM)
    group = tl.program_id(1) * (BLOCK_D // 32) + tl.arange(0, BLOCK_D // 32)
    at = places(group)
    first = head * (HEAD_DIM // 32) + group
    store_quantized(
        tl.reshape(value, (BLOCK_D // 32, 2, 16)), values + head * HEAD_DIM + at, scales + first,
        sums + first[:, None] * 2, None if HEAD_DIM % BLOCK_D == 0 else group < HEAD_DIM // 32,
    )  # fmt: skip


@jit
def places(group):
    """Those of groups of 32 values, as two runs of 16: [groups, 2, 16]."""
    return group[:, None, None] * 32 + (tl.arange(0, 2) * 16)[None, :, None] + tl.arange(0, 16)[None, None, :]


@jit
def store_quantized(value, values, scales, sums, inside):
    """Groups [groups, 2, 16] as bytes with a scale each and sums of 16, where `inside` [groups] (None: everywhere)."""
    largest = tl.max(tl.max(tl.abs(value), axis=2), axis=1)
    inverse = 127.0 / tl.maximum(largest, SMALLEST)
    quant = tl.floor(value * inverse[:, None, None] + 0.5).to(tl.int32)
    tl.store(values, quant.to(tl.int8), mask=None if inside is None else inside[:, None, None])
    tl.store(scales, largest * (1.0 / 127.0), mask=inside)
    halves = sums + tl.arange(0, 2)[None, :]
    tl.store(halves, tl.sum(quant, axis=2), mask=None if inside is None else inside[:, None])


def quantize_activations(target: str, x: Array) -> Activations:
    """x float32 [T, columns], columns a multiple of 32, as int8 with a scale per 32 values.

    Asked again for the same pending array, as by the projections to queries, keys and values, it gives the result
    that is recorded already. Of an RMSNorm or the last step of attention that is still pending it makes one kernel with
    that (which, if nothing else wants its result, does not run at all).
    """
    tokens, columns = x.shape
    if columns % 32:
        raise ValueError(f"quantize_activations: rows have {columns} values, expected a multiple of 32")
    outputs = {
        "values": Output((tokens, columns), "int8"), "scales": Output((tokens, columns // 32), "float32"),
        "sums": Output((tokens, columns // 16), "int32"),
    }  # fmt: skip
    before = _pending(x)
    operation = None if before is None else cast(Launch, before.form.operation)
    if before is not None and operation is not None and _is_norm_of_rows(operation, columns):
        source, weight = cast(tuple[View, View], before.inputs)
        if found := _recorded(rms_norm_quantize_kernel, source, weight):
            return found
        block, (parts, warps) = tl.next_power_of_2(columns), row_parts(target, tokens, columns)
        return Activations(*launch(
            rms_norm_quantize_kernel, (tokens, parts), x=Array(*source), weight=Array(*weight), columns=columns,
            epsilon=operation.argument("epsilon"), BLOCK=block, EVEN=block == columns, PARTS=parts, _warps=warps,
            **outputs,
        ))  # fmt: skip
    if (
        before is not None and operation is not None and operation.kernel is combine_kernel
        and operation.argument("HEAD_DIM") % 32 == 0
    ):
        part, tops, totals = cast(tuple[View, View, View], before.inputs)
        if found := _recorded(combine_quantize_kernel, part, tops, totals):
            return found
        constants = {name: operation.argument(name) for name in ("SPLITS", "HEAD_DIM", "BLOCK_D")}
        grid = (tokens * columns // constants["HEAD_DIM"], tl.cdiv(constants["HEAD_DIM"], constants["BLOCK_D"]))
        return Activations(*launch(
            combine_quantize_kernel, grid, part=Array(*part), tops=Array(*tops),
            totals=Array(*totals), **constants, **outputs,
        ))  # fmt: skip
    if found := _recorded(quantize_activations_kernel, x.view):
        return found
    groups = groups_per_program(columns, 4 if target == "cuda" and tokens <= 16 else 32)
    return Activations(*launch(
        quantize_activations_kernel, (tokens, columns // (32 * groups)), x=x, columns=columns, GROUPS=groups, **outputs,
    ))  # fmt: skip


def _recorded(kernel: JITFunction, *inputs: View) -> Activations | None:
    """What a launch of the kernel that is recorded already, but has not run, will give for the same inputs."""
    for call in inputs[0].value.pending_readers():
        operation = call.form.operation
        same = isinstance(operation, Launch) and operation.kernel is kernel and call.inputs == inputs
        if same and all(write.number < call.number for v in inputs for write in v.value.writes):
            return Activations(*map(whole_array, call.outputs))
    return None


def _pending(x: Array) -> Call | None:
    """The launch that x is the whole result of, if it has not run and its inputs are still what they were."""
    call, view = x.value.call, x.view
    if call is None or not isinstance(call.form.operation, Launch) or call.done or view != whole(x.value):
        return None
    if x.value.writes or call.form.updates:
        return None
    later = any(write.number > call.number for v in call.inputs for write in cast(View, v).value.writes)
    return None if later else call


def _is_norm_of_rows(operation: Launch, columns: int) -> bool:
    """Whether it is an RMSNorm with a weight over rows of so many values, without a sum."""
    if operation.kernel is not rms_norm_kernel or operation.argument("ADD") or operation.argument("weight") is None:
        return False
    return operation.argument("columns") == columns


def groups_per_program(columns: int, most: int = 32) -> int:
    """Groups of 32 for one program: a power of two that divides the row, at most `most`."""
    groups = most
    while columns // 32 % groups:
        groups //= 2
    return groups


def quantize_activations_reference(x: np.ndarray) -> Activations:
    """The same in NumPy float32, operation by operation."""
    groups = x.reshape(-1, 2, 16)
    largest = np.abs(groups).max(axis=(1, 2), keepdims=True)
    inverse = np.float32(127) / np.maximum(largest, np.float32(SMALLEST.value))
    quants = np.floor(groups * inverse + np.float32(0.5)).astype(np.int32)
    scales = largest * np.float32(1 / 127)
    tokens, columns = x.shape
    return Activations(
        quants.astype(np.int8).reshape(tokens, columns),
        scales.reshape(tokens, columns // 32),
        quants.sum(axis=2, dtype=np.int32).reshape(tokens, columns // 16),
    )
