"""Parses the text of a compiled program (`compiled.as_text()`) into its instructions."""

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"\s*([\w\-]+)(.*)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array: `bf16[8,128]{1,0:T(8,128)S(1)}`."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bits(self) -> int:
        """Return the bits of one element."""
        bits = _BITS.get(self.dtype)
        if bits is None:  # f32, u8, f8e4m3fn: the first number
            bits = int(re.sub(r"\D", "", re.sub(r"(e\d+m\d+|b\d+).*", "", self.dtype)) or 0)
        return bits

    @property
    def bytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def hbm_bytes(self) -> int:
        """Return its size in HBM: 0 if the layout has S(n), which is memory on the chip."""
        return 0 if re.search(r"S\([1-9]", self.layout) else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = type opcode(%operand, ...), attribute=value, ...`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result: more than one if it is a tuple
    operands: tuple[str, ...]
    text: str  # everything after the opcode
    is_root: bool

    @property
    def calls(self) -> list[str]:
        """Return the names of the computations that it calls."""
        branches = _BRANCHES.search(self.text)
        return _CALLED.findall(self.text) + (
            re.findall(r"[\w.\-]+", branches[1]) if branches else []
        )

    def attribute(self, name: str) -> str:
        """Return an attribute without its braces, or "": "bf_io->bf" of `dim_labels=bf_io->bf`."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
        return match[1].strip("{}") if match else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Module:
    """The computations of a program by name, and the number of devices it is partitioned for."""

    partitions: int
    computations: dict[str, Computation] = dataclasses.field(default_factory=dict)
    entry: str = ""


def parse(text: str) -> Module:
    """Parse the text of a program."""
    header = text[: text.find("\n")]
    module = Module(partitions=int(first_group(r"num_partitions=(\d+)", header) or 1))
    current: Computation = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            instruction = _parse_instruction(*match.groups())
            current[instruction.name] = instruction
        elif match := _COMPUTATION.match(line):
            current = module.computations.setdefault(match[2], {})
            if match[1]:
                module.entry = match[2]
    return module


def _parse_instruction(root: str | None, name: str, definition: str) -> Instruction:
    definition = re.sub(r"/\*.*?\*/", "", definition)
    # The result's type ends at a space, or if it is a tuple at the closing parenthesis.
    is_tuple = definition.startswith("(")
    type_end = _closing(definition) + 1 if is_tuple else definition.index(" ")
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), layout or "")
        for dtype, shape, layout in _ARRAY.findall(definition[:type_end])
    )
    match = _OPCODE.match(definition[type_end:])
    if match is None:
        raise ValueError(f"instruction {name} has no opcode: {definition[:100]}")
    opcode, text = match.groups()
    operands = re.findall(r"%([\w.\-]+)", text[: _closing(text)])
    return Instruction(name, opcode, arrays, tuple(operands), text, bool(root))


def _closing(text: str) -> int:
    """Return the position where the first parenthesis of the text closes."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def root_of(computation: Computation) -> Instruction:
    """Return the instruction whose result is that of the computation."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def integer_constant(instruction: Instruction) -> int | None:
    """Return the value of a scalar integer constant; None for any other instruction."""
    if instruction.opcode != "constant":
        return None
    array = instruction.arrays[0]
    if array.dtype[0] not in "su" or array.shape:
        return None
    return int(instruction.text[1:].partition(")")[0])


def group_size(text: str, partitions: int) -> int:
    """Return the number of devices in each group of the collective with this text."""
    if pairs := re.search(r"source_target_pairs=\{\{", text):
        return text[pairs.start() :].split("}}")[0].count("{") - 1
    if listed := first_group(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed.count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # 'a' is an entire axis, 'a':(1)4 a part of it with 4 devices.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    return partitions


def first_group(pattern: str, text: str) -> str | None:
    """Return the first group of the first match; None if there is no match."""
    match = re.search(pattern, text)
    return match[1] if match else None
