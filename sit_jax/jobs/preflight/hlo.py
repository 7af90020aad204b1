"""What a compiled program does, read from its text (`compiled.as_text()`): FLOPs, memory traffic, collectives.

The text is the program of one device after partitioning, fusion and scheduling, so it shows what is really executed:
also work that partitioning left on every device, and what the compiler chose to compute again. XLA's own cost analysis
counts the body of a loop once; here each instruction counts as often as the loops around it turn.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_PRODUCTS = ("dot", "convolution", "custom-call")
# Products of the size of Q K^T in attention kernels that say nothing of their cost: splash attention's, cuDNN's.
_KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2, "splash_mha_dkv": 5, "dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5
}  # fmt: skip
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: `bf16[8,128]{1,0:T(8,128)S(1)}`."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(
            re.sub(r"\D", "", re.sub(r"(e\d+m\d+|b\d+).*", "", self.dtype)) or 0
        )
        return math.prod(self.shape) * bits // 8

    @property
    def hbm_bytes(self) -> int:
        """0 for what is held on the chip: S(n) in the layout is a memory other than the main one."""
        return 0 if re.search(r"S\([1-9]", self.layout) else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result: several if that is a tuple
    operands: tuple[str, ...]
    text: str  # everything after the opcode
    is_root: bool

    @property
    def calls(self) -> list[str]:
        branches = _BRANCHES.search(self.text)
        return _CALLED.findall(self.text) + (
            re.findall(r"[\w.\-]+", branches[1]) if branches else []
        )

    def attribute(self, name: str) -> str:
        """`dim_labels=bf_io->bf` -> "bf_io->bf"; braces are taken off; "" if it has none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
        return found[1].strip("{}") if found else ""


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction, where it stands and how often a run of the program executes it."""

    instruction: Instruction
    computation: str
    times: int
    in_loop: bool
    fused: bool  # inside a fusion: its operands and result never reach memory
    origin: str  # what jax calls the place in the model it came from, or the fusion it is in


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    group: int  # devices that take part
    times: int
    in_loop: bool
    arrays: tuple[Array, ...]  # what one device puts in
    in_background: bool  # started, and awaited later
    origin: str  # the line of the model it came from, as jax names it

    @property
    def sent(self) -> int:
        """Bytes that one device sends each time, by the ring algorithm."""
        put_in = sum(array.bytes for array in self.arrays)
        others = self.group - 1
        factor = {
            "all-gather": others,
            "all-reduce": 2 * others / self.group,
            "collective-permute": 1,
        }
        return round(put_in * factor.get(self.kind, others / self.group))


class Program:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.partitions = int(_first(r"num_partitions=(\d+)", text[: text.find("\n")]) or 1)
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if instruction := _INSTRUCTION.match(line):
                parsed = _parse(*instruction.groups())
                current[parsed.name] = parsed
            elif computation := _COMPUTATION.match(line):
                current = self.computations.setdefault(computation[2], {})
                if computation[1]:
                    self.entry = computation[2]

    @functools.cached_property
    def executions(self) -> list[Execution]:
        """Every instruction with its count. Each branch of a conditional counts as if it were taken."""
        return list(self._walk(self.entry, 1, False, False, ""))

    def _walk(
        self, computation: str, times: int, in_loop: bool, fused: bool, within: str
    ) -> Iterator[Execution]:
        for instruction in self.computations[computation].values():
            origin = _first(r'op_name="([^"]*)"', instruction.text) or within
            yield Execution(instruction, computation, times, in_loop, fused, origin)
            is_while = instruction.opcode == "while"
            inside = times * (self.trips(instruction) or 1) if is_while else times
            for called in instruction.calls:
                fuses = fused or instruction.opcode not in (
                    "while",
                    "conditional",
                    "call",
                    "async-start",
                )
                yield from self._walk(called, inside, in_loop or is_while, fuses, origin)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` turns; None if that depends on the data.

        A scan counts from 0 to the constant that its condition compares with, in ones; a loop that the compiler made of
        one product and its transfers may count in twos.
        """
        if known := _first(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known)
        condition, body = (
            self.computations[loop.attribute(name).strip("%")] for name in ("condition", "body")
        )
        limits = [value for i in condition.values() if (value := _constant(i)) is not None]
        last = _root(condition)
        if len(limits) != 1 or not any(
            i.opcode == "compare" and "direction=LT" in i.text
            for i in (last, *self._called_roots(last))
        ):
            return None
        index = next(
            (i.attribute("index") for i in condition.values() if i.opcode == "get-tuple-element"),
            None,
        )
        counter = body.get(_root(body).operands[int(index)]) if index else None
        while counter and counter.opcode in ("copy", "bitcast"):
            counter = body.get(counter.operands[0])
        steps = (
            [_constant(body[name]) for name in counter.operands if name in body] if counter else []
        )
        step = next((value for value in steps if value), 1)
        return -(-limits[0] // step)

    def _called_roots(self, instruction: Instruction) -> list[Instruction]:
        return [_root(self.computations[name]) for name in instruction.calls]

    @property
    def unknown_loops(self) -> int:
        """Loops whose number of turns depends on the data, as an adaptive solver's: their bodies count once."""
        return sum(
            e.instruction.opcode == "while" and not self.trips(e.instruction)
            for e in self.executions
        )

    def _operands(self, execution: Execution) -> list[tuple[Array, ...]]:
        inside = self.computations[execution.computation]
        return [inside[name].arrays for name in execution.instruction.operands if name in inside]

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations of matrix products and convolutions, two per multiply-add.

        A hand-written kernel (Pallas, or the compiler's own for attention) counts as much as it says of itself.
        """
        return sum(
            e.times * self._flops(e) for e in self.executions if e.instruction.opcode in _PRODUCTS
        )

    @functools.cached_property
    def bfloat16_flops(self) -> int:
        """`flops` in units of bfloat16 products: a float32 product of precision high takes a TPU 3, of highest 6."""
        passes = {"high": 3, "highest": 6}
        return sum(
            e.times
            * self._flops(e)
            * passes.get(e.instruction.attribute("operand_precision").partition(",")[0], 1)
            for e in self.executions
            if e.instruction.opcode in _PRODUCTS
        )

    def _flops(self, e: Execution) -> int:
        if e.instruction.opcode == "custom-call":
            products = next(
                (n for name, n in _KERNEL_PRODUCTS.items() if e.instruction.name.startswith(name)),
                0,
            )
            if products:
                like_q = next(
                    array.shape for array in e.instruction.arrays if len(array.shape) == 4
                )
                return products * 2 * math.prod(like_q) * like_q[2]
            return int(_first(r'"cost_estimate":\{"flops":"(\d+)"', e.instruction.text) or 0)
        return _product_flops(e.instruction, self._operands(e))

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        found = {}
        for e in self.executions:
            kind, _, phase = (
                e.instruction.opcode.rpartition("-")
                if e.instruction.opcode.endswith(("-start", "-done"))
                else (e.instruction.opcode, "", "")
            )
            if kind not in COLLECTIVES or phase == "done":
                continue
            # The TPU compiler spreads one transfer over several fusions, each with a copy of the instruction: there, a
            # channel is one transfer.
            channel = _first(r"channel_id=(\d+)", e.instruction.text) if e.fused else None
            key = channel or (e.computation, e.instruction.name)
            arrays = tuple(array for operand in self._operands(e) for array in operand)
            group = _group_size(e.instruction.text, self.partitions)
            background = phase == "start" or e.fused
            found.setdefault(
                key, Collective(kind, group, e.times, e.in_loop, arrays, background, e.origin)
            )
        return list(found.values())

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Bytes that the program reads from and writes to the main memory: operands and results of every kernel.

        A kernel that takes a slice reads the slice; one that updates a slice writes the slice.
        """
        return sum(e.times * self._traffic(e) for e in self.executions if not e.fused)

    def _traffic(self, e: Execution) -> int:
        instruction = e.instruction
        if (
            instruction.opcode in _NO_TRAFFIC
            or instruction.opcode.endswith("-done")
            or "AllocateBuffer" in instruction.text
        ):
            return 0
        result = instruction.arrays
        if instruction.opcode == "copy-start":  # (result, operand, ...)
            result = result[:1]
        elif instruction.opcode.endswith("-start") and len(result) > 2:  # (operand, result, ...)
            result = result[1:2]
        inside = self.computations[e.computation]
        if instruction.opcode == "fusion":
            called = instruction.calls[0]
            read = sum(
                min(_hbm(inside[name].arrays), self._read(called, index))
                if _hbm(inside[name].arrays)
                else 0
                for index, name in enumerate(instruction.operands)
            )
            return read + min(_hbm(result), self._written(called)) if _hbm(result) else read
        if instruction.opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
            return _size(result) + _hbm(result)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _hbm(inside[instruction.operands[1]].arrays)
        return _hbm(result) + sum(map(_hbm, self._operands(e)))

    def _read(self, computation: str, index: int) -> int:
        """Bytes of parameter `index` that a fused computation looks at."""
        inside = self.computations[computation]
        names = [
            i.name
            for i in inside.values()
            if i.opcode == "parameter" and i.text.startswith(f"({index})")
        ]
        return sum(
            self._read_by(computation, user, name)
            for name in names
            for user in self._users(computation, name)
        )

    def _users(self, computation: str, name: str) -> list[Instruction]:
        return [i for i in self.computations[computation].values() if name in i.operands]

    def _read_by(self, computation: str, user: Instruction, name: str) -> int:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            return _size(user.arrays)
        if user.opcode == "tuple" or (
            user.opcode == "dynamic-update-slice" and user.operands[0] == name
        ):
            return 0  # handed on, in place
        if user.opcode == "bitcast":
            return sum(
                self._read_by(computation, further, user.name)
                for further in self._users(computation, user.name)
            )
        if user.opcode == "fusion":
            return self._read(user.calls[0], user.operands.index(name))
        return _size(self.computations[computation][name].arrays)

    def _written(self, computation: str) -> int:
        """Bytes that a fused computation's result really writes."""
        inside = self.computations[computation]

        def of(instruction):
            if instruction.opcode == "dynamic-update-slice":
                return _size(inside[instruction.operands[1]].arrays)
            if instruction.opcode == "parameter":
                return 0
            if instruction.opcode in ("tuple", "bitcast"):
                return sum(of(inside[name]) for name in instruction.operands)
            if instruction.opcode == "fusion":
                return self._written(instruction.calls[0])
            return _size(instruction.arrays)

        return of(_root(inside))


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """{"all-gather": {"in_loop": bytes sent in a run, "outside": ..., "count": executed}}, for the kinds there are."""
    table: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: {"in_loop": 0, "outside": 0, "count": 0}
    )
    for c in collectives:
        table[c.kind]["in_loop" if c.in_loop else "outside"] += c.times * c.sent
        table[c.kind]["count"] += c.times
    return dict(table)


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _constant(instruction: Instruction) -> int | None:
    """The value of a scalar integer constant."""
    if (
        instruction.opcode != "constant"
        or instruction.arrays[0].dtype[0] not in "su"
        or instruction.arrays[0].shape
    ):
        return None
    return int(instruction.text[1:].partition(")")[0])


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _size(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.hbm_bytes for array in arrays)


def _parse(root: str | None, name: str, rest: str) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), layout or "")
        for dtype, shape, layout in _ARRAY.findall(rest[:end])
    )
    opcode, text = re.match(r"\s*([\w\-]+)(.*)", rest[end:]).groups()
    operands = re.findall(r"%([\w.\-]+)", text[: _closing(text, 0)])
    return Instruction(name, opcode, arrays, tuple(operands), text, bool(root))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _group_size(text: str, partitions: int) -> int:
    if pairs := re.search(r"source_target_pairs=\{\{", text):
        return text[pairs.start() :].split("}}")[0].count("{") - 1
    if listed := _first(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed.count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # 'a' is a whole axis, 'a':(1)4 a part of it with 4 devices
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    return partitions


def _product_flops(product: Instruction, operands: list[tuple[Array, ...]]) -> int:
    lhs, out = operands[0][0].shape, product.arrays[0].shape
    if product.opcode == "dot":
        contracted = product.attribute("lhs_contracting_dims")
        return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)
    rhs = operands[1][0].shape
    of_lhs, of_rhs, of_out = re.split(r"_|->", product.attribute("dim_labels"))
    # A batched matrix product comes as a convolution whose batch is a dilated spatial dimension: only the positions
    # where the window meets data are multiplied.
    positions = 1
    spatial = sorted(set(of_lhs) - set("bf"))
    window = product.attribute("window")
    for d, label in enumerate(spatial):
        positions *= _positions(
            lhs[of_lhs.index(label)],
            rhs[of_rhs.index(label)],
            out[of_out.index(label)],
            stride=_window(window, "stride", d, 1),
            pad=_window(window, "pad", d, 0),
            lhs_dilate=_window(window, "lhs_dilate", d, 1),
            rhs_dilate=_window(window, "rhs_dilate", d, 1),
        )
    return 2 * positions * out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]


def _window(window: str, name: str, dimension: int, default: int) -> int:
    """`_window("size=3x3 pad=1_1x0_0", "pad", 0, 0)` -> 1, the padding before."""
    found = _first(rf"\b{name}=(\S+)", window)
    return int(found.split("x")[dimension].split("_")[0]) if found else default


@functools.cache
def _positions(
    lhs: int, rhs: int, out: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs (output, window) of one dimension for which the window meets an element, not padding or a gap."""
    return sum(
        0 <= at <= (lhs - 1) * lhs_dilate and at % lhs_dilate == 0
        for o in range(out)
        for at in (o * stride - pad + w * rhs_dilate for w in range(rhs))
    )
