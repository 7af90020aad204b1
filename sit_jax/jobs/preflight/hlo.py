"""Reads FLOPs, memory traffic and collectives from the text of a compiled program.

The text (`compiled.as_text()`) is the program of one device after partitioning, fusion and
scheduling. So it shows the work that is really executed, including work that partitioning left on
every device and values that the compiler chose to compute twice. XLA's own cost analysis counts
the body of a loop once; here each instruction counts once per iteration of the loops around it.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator

from sit_jax.jobs.preflight import hlo_text, products
from sit_jax.jobs.preflight.hlo_text import Array, Computation, Instruction, first_group

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# A TPU computes a float32 product of this precision as several bfloat16 products.
_BFLOAT16_PASSES = {"high": 3, "highest": 6}
CALLS_UNFUSED = ("while", "conditional", "call", "async-start")
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "iota",
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction, its place, and how often one run of the program executes it."""

    instruction: Instruction
    computation: str
    times: int
    in_loop: bool
    fused: bool  # inside a fusion: its operands and result never reach memory
    origin: str  # jax's name of the line of the model, or of the fusion around it


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices."""

    kind: str
    group: int  # number of devices that take part
    times: int
    in_loop: bool
    arrays: tuple[Array, ...]  # the operands on one device
    in_background: bool  # started, and awaited later
    origin: str  # jax's name of the line of the model

    @property
    def sent(self) -> int:
        """Return the bytes that one device sends each time, by the ring algorithm."""
        operand_bytes = _size(self.arrays)
        others = self.group - 1
        factor = {
            "all-gather": others,
            "all-reduce": 2 * others / self.group,
            "collective-permute": 1,
        }
        return round(operand_bytes * factor.get(self.kind, others / self.group))


class Program:
    """The costs of a compiled program, given its text."""

    def __init__(self, text: str):
        module = hlo_text.parse(text)
        self.computations = module.computations
        self.entry = module.entry
        self.partitions = module.partitions

    @functools.cached_property
    def executions(self) -> list[Execution]:
        """Return all instructions with their counts. Every branch of a conditional counts."""
        return list(self._walk(self.entry, times=1, in_loop=False, fused=False, caller_origin=""))

    def _walk(
        self, computation: str, *, times: int, in_loop: bool, fused: bool, caller_origin: str
    ) -> Iterator[Execution]:
        for instruction in self.computations[computation].values():
            origin = first_group(r'op_name="([^"]*)"', instruction.text) or caller_origin
            execution = Execution(instruction, computation, times, in_loop, fused, origin)
            yield execution
            yield from self._called(execution)

    def _called(self, caller: Execution) -> Iterator[Execution]:
        """Return the executions of the computations that an instruction calls."""
        instruction = caller.instruction
        is_while = instruction.opcode == "while"
        iterations = (self.trips(instruction) or 1) if is_while else 1
        for called in instruction.calls:
            yield from self._walk(
                called,
                times=caller.times * iterations,
                in_loop=caller.in_loop or is_while,
                fused=caller.fused or instruction.opcode not in CALLS_UNFUSED,
                caller_origin=caller.origin,
            )

    def trips(self, loop: Instruction) -> int | None:
        """Return the number of iterations of a `while`; None if it depends on the data.

        A scan counts from 0 in steps of 1 to the constant that its condition compares with. A loop
        that the compiler made of one product and its transfers may count in steps of 2.
        """
        if count := first_group(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(count)
        condition = self.computations[loop.attribute("condition").strip("%")]
        body = self.computations[loop.attribute("body").strip("%")]
        # The limit: the only constant of a condition that ends in `counter < limit`.
        constants = [hlo_text.integer_constant(instruction) for instruction in condition.values()]
        limits = [value for value in constants if value is not None]
        comparisons = [hlo_text.root_of(condition)]
        comparisons += self._called_roots(comparisons[0])
        is_less_than = any(
            instruction.opcode == "compare" and "direction=LT" in instruction.text
            for instruction in comparisons
        )
        if len(limits) != 1 or not is_less_than:
            return None
        return -(-limits[0] // self._counter_step(condition, body))

    def _counter_step(self, condition: Computation, body: Computation) -> int:
        """Return the increment, per iteration, of the counter that a loop's condition reads."""
        indices = [
            instruction.attribute("index")
            for instruction in condition.values()
            if instruction.opcode == "get-tuple-element"
        ]
        if not indices:
            return 1
        counter = body.get(hlo_text.root_of(body).operands[int(indices[0])])
        while counter and counter.opcode in ("copy", "bitcast"):
            counter = body.get(counter.operands[0])
        if counter is None:
            return 1
        # counter = previous + constant
        steps = [hlo_text.integer_constant(body[name]) for name in counter.operands if name in body]
        return next((step for step in steps if step), 1)

    def _called_roots(self, instruction: Instruction) -> list[Instruction]:
        return [hlo_text.root_of(self.computations[name]) for name in instruction.calls]

    @property
    def unknown_loops(self) -> int:
        """Return the number of loops that are counted once because their length is unknown.

        It depends on the data, as in an adaptive solver.
        """
        return sum(
            e.instruction.opcode == "while" and not self.trips(e.instruction)
            for e in self.executions
        )

    @property
    def iterations(self) -> int:
        """Return how many iterations all loops run; one of a loop whose length is unknown."""
        return sum(
            e.times * (self.trips(e.instruction) or 1)
            for e in self.executions
            if e.instruction.opcode == "while"
        )

    def operands(self, execution: Execution) -> list[tuple[Array, ...]]:
        """Return the types of an instruction's operands."""
        siblings = self.computations[execution.computation]
        names = execution.instruction.operands
        return [siblings[name].arrays for name in names if name in siblings]

    def inside(self, execution: Execution) -> list[Execution]:
        """Return an instruction, and all of the computations that it calls, for one execution."""
        once = dataclasses.replace(execution, times=1)
        return [once, *self._called(once)]

    @functools.cached_property
    def flops(self) -> int:
        """Return the FLOPs of matrix products and convolutions, two per multiply-add.

        A hand-written kernel (Pallas, or the compiler's own for attention) counts as its text
        states.
        """
        return sum(e.times * self.product_flops(e) for e in self.executions)

    @functools.cached_property
    def bfloat16_flops(self) -> int:
        """Return `flops`, counting a precise float32 product as the bfloat16 ones a TPU runs."""
        total = 0
        for e in self.executions:
            if count := self.product_flops(e):
                passes = _BFLOAT16_PASSES.get(products.operand_precision(e.instruction), 1)
                total += e.times * count * passes
        return total

    def product_flops(self, e: Execution) -> int:
        """Return the FLOPs of one execution; 0 of anything but a product."""
        is_product = e.instruction.opcode in products.OPCODES
        return products.flops(e.instruction, self.operands(e)) if is_product else 0

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Return the transfers between devices: each one once, with its number of executions."""
        transfers: dict[object, Collective] = {}
        for e in self.executions:
            kind = e.instruction.opcode.removesuffix("-start")  # "-done" ends one counted already
            if kind not in COLLECTIVES:
                continue
            # The TPU compiler distributes one transfer over several fusions, with a copy of the
            # instruction in each. There the channel identifies it.
            channel = first_group(r"channel_id=(\d+)", e.instruction.text) if e.fused else None
            key = channel or (e.computation, e.instruction.name)
            transfer = Collective(
                kind=kind,
                group=hlo_text.group_size(e.instruction.text, self.partitions),
                times=e.times,
                in_loop=e.in_loop,
                arrays=tuple(array for operand in self.operands(e) for array in operand),
                in_background=e.fused or e.instruction.opcode.endswith("-start"),
                origin=e.origin,
            )
            transfers.setdefault(key, transfer)
        return list(transfers.values())

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Return the bytes that the program reads from and writes to HBM.

        They are the operands and results of every kernel. If a kernel slices an operand or updates
        its result in place, only the slice counts.
        """
        return sum(e.times * self.traffic(e) for e in self.executions if not e.fused)

    def traffic(self, e: Execution) -> int:
        """Return the bytes of HBM that one execution of an instruction outside a fusion moves."""
        instruction = e.instruction
        opcode = instruction.opcode
        if (
            opcode in _NO_TRAFFIC
            or opcode.endswith("-done")
            or "AllocateBuffer" in instruction.text
        ):
            return 0
        result = instruction.arrays
        if opcode == "copy-start":  # (result, operand, ...)
            result = result[:1]
        elif opcode == "fusion-start":  # ((operands), results, state)
            result = result[len(self.operands(e)) : -1]
        elif products.call_target(instruction).startswith("__cublas$"):
            result = products.without_workspace(result)
        elif opcode.endswith("-start") and len(result) > 2:  # (operand, result, ...)
            result = result[1:2]
        siblings = self.computations[e.computation]
        if opcode in ("fusion", "fusion-start"):
            return self._fusion_traffic(instruction, result, siblings)
        if opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
            return _size(result) + _hbm(result)
        if opcode == "dynamic-update-slice":
            return 2 * _hbm(siblings[instruction.operands[1]].arrays)
        return _hbm(result) + sum(map(_hbm, self.operands(e)))

    def _fusion_traffic(
        self, fusion: Instruction, result: tuple[Array, ...], siblings: Computation
    ) -> int:
        called = fusion.calls[0]
        total = 0
        for index, name in enumerate(fusion.operands):
            if operand_bytes := _hbm(siblings[name].arrays):
                total += min(operand_bytes, self._read(called, index))
        if result_bytes := _hbm(result):
            total += min(result_bytes, self._written(called))
        return total

    def _read(self, computation: str, index: int) -> int:
        """Return the bytes of parameter `index` that a fused computation reads."""
        names = [
            instruction.name
            for instruction in self.computations[computation].values()
            if instruction.opcode == "parameter" and instruction.text.startswith(f"({index})")
        ]
        return sum(self._read_by_users(computation, name) for name in names)

    def _read_by_users(self, computation: str, name: str) -> int:
        """Return the bytes that the users of instruction `name` read of its result."""
        instructions = self.computations[computation].values()
        users = [instruction for instruction in instructions if name in instruction.operands]
        return sum(self._read_by(computation, user, name) for user in users)

    def _read_by(self, computation: str, user: Instruction, name: str) -> int:
        is_first = user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather") and is_first:
            return _size(user.arrays)
        if user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and is_first):
            return 0  # passed on, or updated in place
        if user.opcode == "bitcast":
            return self._read_by_users(computation, user.name)
        if user.opcode == "fusion":
            return self._read(user.calls[0], user.operands.index(name))
        return _size(self.computations[computation][name].arrays)

    def _written(self, computation: str) -> int:
        """Return the bytes that a fused computation really writes to its result."""
        instructions = self.computations[computation]

        def written_by(instruction: Instruction) -> int:
            if instruction.opcode == "dynamic-update-slice":
                return _size(instructions[instruction.operands[1]].arrays)
            if instruction.opcode == "parameter":
                return 0
            if instruction.opcode in ("tuple", "bitcast"):
                return sum(written_by(instructions[name]) for name in instruction.operands)
            if instruction.opcode == "fusion":
                return self._written(instruction.calls[0])
            return _size(instruction.arrays)

        return written_by(hlo_text.root_of(instructions))


def by_kind(transfers: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Return totals of a run: {"all-gather": {"in_loop": bytes, "outside": bytes, "count": n}}.

    Bytes are those that one device sends; n counts executions. Kinds that do not occur are absent.
    """
    table: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: {"in_loop": 0, "outside": 0, "count": 0}
    )
    for transfer in transfers:
        place = "in_loop" if transfer.in_loop else "outside"
        table[transfer.kind][place] += transfer.times * transfer.sent
        table[transfer.kind]["count"] += transfer.times
    return dict(table)


def _size(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.hbm_bytes for array in arrays)
