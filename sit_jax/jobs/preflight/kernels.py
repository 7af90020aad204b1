"""The kernels of a compiled program, what each of them moves and computes, and their kinds."""

import collections
import dataclasses
import math
from collections.abc import Iterable

from sit_jax.jobs.preflight import hlo, products
from sit_jax.jobs.preflight.hlo import Execution, Program
from sit_jax.jobs.preflight.hlo_text import Array, Instruction

KINDS = ("products", "attention", "elementwise", "copies", "fills", "links")

# The words in the names of operations that only move values, or only write a constant.
_COPYING = {
    *("bitcast", "concatenate", "copy", "dynamic", "pad", "reshape", "reverse", "slice"),
    *("transpose", "update"),
}
_FILLING = {"broadcast"}
# Operations that are no work by themselves.
_STRUCTURE = {
    *("fusion", "fusion-start", "parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
}
# Operations that compute nothing: they only say which element to read.
_INDEXING = _STRUCTURE | {
    *("broadcast", "concatenate", "copy", "dynamic-slice", "dynamic-update-slice", "iota", "pad"),
    *("reshape", "reverse", "slice", "transpose"),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one execution of a kernel costs. The names of rates are the keys of `Attainable`."""

    name: str
    kind: str  # one of KINDS
    times: int  # executions in one run of the program
    bytes: int  # of HBM, read and written
    access: str  # the rate of these bytes
    beside: int  # of these bytes, those that a product writes beside its result
    flops: dict[str, int]  # by rate: of products by precision, of attention by direction
    elements: dict[str, int]  # by rate, where their number counts, and not their bytes
    origin: str  # jax's name of the line of the model


def kind_of_words(words: Iterable[str]) -> str:
    """Return the kind of a kernel without products, by the words in its operations' names."""
    found = set(words)
    if found and found <= _FILLING:
        return "fills"
    if found and found <= _COPYING | _FILLING:
        return "copies"
    return "elementwise"


def kernels(program: Program) -> list[Kernel]:
    """Return the program's kernels; transfers between devices are in `program.collectives`."""
    found = [_kernel(program, e) for e in program.executions if not e.fused and _is_kernel(e)]
    return [kernel for kernel in found if kernel.bytes or kernel.flops]


def _is_kernel(e: Execution) -> bool:
    opcode = e.instruction.opcode
    is_link = opcode.removesuffix("-start").removesuffix("-done") in hlo.COLLECTIVES
    return opcode not in hlo.CALLS_UNFUSED and not is_link


def _kernel(program: Program, e: Execution) -> Kernel:
    inside = program.inside(e)
    flops = collections.Counter[str]()
    for part in inside:
        if count := program.product_flops(part):
            flops[_precision(program, part, result=e.instruction.arrays[0])] += count
    kind = _kind_of_product(flops) or _kind_of_moves(inside, reads=program.operands(e))
    moved = program.traffic(e)
    return Kernel(
        name=e.instruction.name,
        kind=kind,
        times=e.times,
        bytes=moved,
        access=_access(program, inside, kind),
        beside=_beside(e.instruction),
        flops=dict(flops),
        elements=_elements(program, inside, kind, moved),
        origin=e.origin,
    )


def _precision(program: Program, product: Execution, result: Array) -> str:
    """Return the rate of a product: attention forward or backward, or by its precision.

    An NVIDIA GPU computes float32 products in TF32 unless the precision is "highest".
    """
    if count := products.attention_products(product.instruction):
        return "attention forward" if count == 2 else "attention backward"
    lhs = program.operands(product)[0][0]
    if lhs.bits <= 16:
        return "bfloat16 to float32" if result.bits == 32 else "bfloat16"
    if products.operand_precision(product.instruction) == "highest":
        return "float32"
    is_direct = products.reads_along_contraction(product.instruction, program.operands(product))
    return "tf32" if is_direct else "tf32 transposed"


def _beside(instruction: Instruction) -> int:
    """Return the bytes of GELU's operand that a call of cuBLAS also writes; 0 for other kernels."""
    if not products.call_target(instruction).startswith("__cublas$"):
        return 0
    return sum(array.bytes for array in products.without_workspace(instruction.arrays)[1:])


def _elements(program: Program, inside: list[Execution], kind: str, moved: int) -> dict[str, int]:
    """Return what takes time by its number, not by its bytes: fills, operations, rows."""
    call = inside[0].instruction
    if kind == "fills":
        return {"fills": max(map(_size, call.arrays))}
    if kind != "elementwise":
        return {}
    elements = {"operations": _operations(program, inside)}
    if _is_triton(call):
        # Those that are read and written, by the mean width of the arrays.
        arrays = [*call.arrays, *(array for read in program.operands(inside[0]) for array in read)]
        width = sum(array.bytes for array in arrays) / max(sum(map(_size, arrays)), 1)
        elements["rows"] = round(moved / width) if width else 0
    return elements


def _operations(program: Program, inside: list[Execution]) -> int:
    """Return how many operations a kernel computes, over all elements.

    Of an operation before a slice, only the elements of the slice are computed.
    """
    sizes = [_size_of(program, e) for e in inside if e.instruction.opcode not in _INDEXING]
    results = [_size(array) for array in inside[0].instruction.arrays]
    used = max(results + [_size_of(program, e) for e in _of(inside, "reduce")], default=0)
    # Scalars are indices, or the addition of a reduction, which counts with its elements.
    return sum(min(size, used) for size in sizes if size > 1)


def _kind_of_product(flops: Iterable[str]) -> str:
    """Return the kind of a kernel with products at these rates; "" if there is none."""
    rates = set(flops)
    if any(rate.startswith("attention") for rate in rates):
        return "attention"
    return "products" if rates else ""


def _kind_of_moves(inside: list[Execution], reads: list[tuple[Array, ...]]) -> str:
    """Return the kind of a kernel without products, given its operations and its operands."""
    # Scalars are indices: moving a slice takes some arithmetic.
    operations = {e.instruction.opcode for e in inside if _has_array(e.instruction.arrays)}
    kind = kind_of_words(word for name in operations - _STRUCTURE for word in name.split("-"))
    is_constant = not any(map(_has_array, reads))  # copies of a constant: several arrays to fill
    return "fills" if kind == "copies" and is_constant else kind


def _has_array(arrays: tuple[Array, ...]) -> bool:
    return any(array.shape for array in arrays)


def _access(program: Program, inside: list[Execution], kind: str) -> str:
    """Return the rate of a kernel's bytes."""
    if kind == "copies":
        return "copies"
    # LayerNorm's backward pass broadcasts statistics of each row (token), and sums over rows.
    broadcasts = any(
        _leaves_out_last_axis(e, e.instruction.arrays) for e in _of(inside, "broadcast")
    )
    sums = any(_leaves_out_last_axis(e, program.operands(e)[0]) for e in _of(inside, "reduce"))
    return "sums" if broadcasts and sums else "elementwise"


def _of(inside: list[Execution], opcode: str) -> list[Execution]:
    return [e for e in inside if e.instruction.opcode == opcode]


def _leaves_out_last_axis(e: Execution, arrays: tuple[Array, ...]) -> bool:
    """Return True if `dimensions`, those of the larger side's arrays, leave out the last axis."""
    dimensions = e.instruction.attribute("dimensions")
    return bool(dimensions) and str(len(arrays[0].shape) - 1) not in dimensions.split(",")


def _is_triton(instruction: Instruction) -> bool:
    """Return True for a chain around a reduction over rows (LayerNorm, softmax)."""
    return '"kind":"__triton"' in instruction.text


def _size_of(program: Program, e: Execution) -> int:
    """Return how many elements an operation computes: of a reduction, those that it reads."""
    is_reduction = e.instruction.opcode == "reduce"
    arrays = program.operands(e)[0] if is_reduction else e.instruction.arrays
    return max(map(_size, arrays), default=0)


def _size(array: Array) -> int:
    return math.prod(array.shape)
