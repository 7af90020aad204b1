"""The kernels of a compiled program, what each of them moves and computes, and their kinds."""

import collections
import dataclasses
import math
from collections.abc import Iterable

from sit_jax.jobs.preflight import hlo, products
from sit_jax.jobs.preflight.hlo import Execution, Program
from sit_jax.jobs.preflight.hlo_text import Array

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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one execution of a kernel costs. The names of rates are the keys of `Attainable`."""

    name: str
    kind: str  # one of KINDS
    times: int  # executions in one run of the program
    bytes: int  # of HBM, read and written
    access: str  # the rate of these bytes
    flops: dict[str, int]  # by rate: of products by precision, of attention by direction
    elements: dict[str, int]  # by rate, where their number counts: of tanh, of fills
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
    elements = collections.Counter[str]()
    for part in inside:
        if count := program.product_flops(part):
            flops[_precision(program, part)] += count
        if part.instruction.opcode == "tanh":
            elements["tanh"] += math.prod(part.instruction.arrays[0].shape)
    kind = _kind_of_product(flops) or _kind_of_moves(inside, reads=program.operands(e))
    if kind == "fills":
        elements["fills"] = max(math.prod(array.shape) for array in e.instruction.arrays)
    return Kernel(
        name=e.instruction.name,
        kind=kind,
        times=e.times,
        bytes=program.traffic(e),
        access=_access(e, kind),
        flops=dict(flops),
        elements=dict(elements),
        origin=e.origin,
    )


def _precision(program: Program, product: Execution) -> str:
    """Return the rate of a product: attention forward or backward, bfloat16, tf32 or float32.

    An NVIDIA GPU computes float32 products in TF32 unless the precision is "highest".
    """
    if count := products.attention_products(product.instruction):
        return "attention forward" if count == 2 else "attention backward"
    lhs = program.operands(product)[0][0]
    if lhs.bits <= 16:
        return "bfloat16"
    is_highest = products.operand_precision(product.instruction) == "highest"
    return "float32" if is_highest else "tf32"


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


def _access(e: Execution, kind: str) -> str:
    """Return the rate of a kernel's bytes."""
    # XLA computes a chain around a reduction over rows (LayerNorm, softmax) in a Triton kernel.
    if kind == "elementwise" and '"kind":"__triton"' in e.instruction.text:
        return "rows"
    return "copies" if kind == "copies" else "elementwise"
