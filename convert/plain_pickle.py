"""Read a pickle of plain values, within bounds of bytes, size and depth.

Python's own unpickler expands what it reads before anyone can look: a few bytes may claim gigabytes
of memo, or hash a tuple of tuples for ever. This reader knows only the operations that torch.save
writes, takes only texts and numbers as keys, and counts. It runs no code of the file.
"""

import argparse
import pickle
import pickletools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import IO, Any, cast

MAX_BYTES = 16 * 2**20  # a training checkpoint of XL/2 has 0.3 MB
_MAX_OPERATIONS = 1_000_000
_MAX_VALUES = 1_000_000  # of the content as a tree
_MAX_DEPTH = 50
_MAX_TEXT = 2**20  # characters of a text, bytes of a byte string
_MAX_KEY = 500
_MAX_INTEGER = 2**128
_MARK = object()
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
Globals = Mapping[tuple[str, str], Any]


class _Bounded:
    """A file of which at most MAX_BYTES are read."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._left = MAX_BYTES

    def read(self, size: int) -> bytes:
        self._take(size)
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(min(self._left, _MAX_TEXT) + 1)
        self._take(len(line))
        return line

    def _take(self, size: int) -> None:
        self._left -= size
        if size < 0 or self._left < 0:
            raise pickle.UnpicklingError(
                f"its structure, without the tensors, has more than {MAX_BYTES / 1e6:.0f} MB"
            )


def load(file: IO[bytes], allowed: Globals, persistent: Callable[[tuple], Any]) -> Any:
    """Return the object that is pickled at the file's position, which moves behind it.

    `allowed` maps (module, name) to what the file may refer to: a function that it may call, or a
    value. `persistent` turns a persistent id, a tuple, into a value.

    Raises pickle.UnpicklingError, or almost any other exception, for anything else.
    """
    machine = _Machine(allowed, persistent)
    operations = pickletools.genops(cast(IO[bytes], _Bounded(file)))
    for count, (operation, argument, _) in enumerate(operations):
        if count > _MAX_OPERATIONS:
            raise pickle.UnpicklingError(f"it has more than {_MAX_OPERATIONS} operations")
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"it uses {operation.name}, which no checkpoint needs")
        _OPERATIONS[operation.name](machine, argument)
    (content,) = machine.stack
    for _ in walk(content):
        pass  # it checks the bounds
    return content


def check_key(key: Any) -> None:
    """Raise UnpicklingError unless a key of a dict is a short text in one line, or a number."""
    if isinstance(key, str):
        if len(key) > _MAX_KEY or not key.isprintable():
            raise pickle.UnpicklingError(f"{key[:40]!r}... is not a name")
    elif not isinstance(key, int | float | None):
        raise pickle.UnpicklingError(f"a {type(key).__name__} is not a key of a state dict")


def of_type(value: Any, kind: type) -> Any:
    """Return the value. Raises UnpicklingError if it is not a `kind`."""
    if not isinstance(value, kind):
        found = type(value).__name__
        raise pickle.UnpicklingError(f"it has a {found} in place of a {kind.__name__}")
    return value


def ordered_dict(items: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """Return a dict of pairs, whose keys are checked; it stands in for OrderedDict."""
    result: dict[Any, Any] = {}
    for key, value in items:
        check_key(key)
        result[key] = value
    return result


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, allowed: Globals, persistent: Callable[[tuple], Any]):
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._allowed = allowed
        self._persistent = persistent

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :]
        if len(values) != count or any(value is _MARK for value in values):
            raise pickle.UnpicklingError("its operations do not fit together")
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> list[Any]:
        """Pop all values above the last mark, and the mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        of_type(self.stack[-1], list).extend(values)

    def update(self, values: list[Any]) -> None:
        of_type(self.stack[-1], dict).update(_dict(values))

    def push_persistent(self) -> None:
        (pid,) = self.pop(1)
        self.push(self._persistent(of_type(pid, tuple)))

    def push_global(self, module: Any, name: Any) -> None:
        module, name = of_type(module, str), of_type(name, str)
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(
                f"it refers to {module[:80]}.{name[:80]}, which no checkpoint needs; save "
                "model.state_dict(), not the model"
            )
        self.push(self._allowed[module, name])

    def call(self) -> None:
        function, arguments = self.pop(2)
        self.push(function(*of_type(arguments, tuple)))

    def build(self) -> None:
        target, state = self.pop(2)
        if isinstance(target, argparse.Namespace):
            vars(target).update(of_type(state, dict))
        elif not isinstance(target, dict):  # of a dict, its attributes, such as _metadata
            target = target.built(state)
        self.push(target)


_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_LITERALS, lambda m, value: m.push(_literal(value))),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "MARK": lambda m, _: m.push(_MARK),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "POP": lambda m, _: m.pop(1),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "DICT": lambda m, _: m.push(_dict(m.pop_to_mark())),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.update(m.pop(2)),
    "SETITEMS": lambda m, _: m.update(m.pop_to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": lambda m, names: m.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.push_global(*m.pop(2)),
    "BINPERSID": lambda m, _: m.push_persistent(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
}


def _literal(value: Any) -> Any:
    """Return a number or text. A byte string of Python 2 is a text, which pickletools decodes."""
    if isinstance(value, str | bytes) and len(value) > _MAX_TEXT:
        raise pickle.UnpicklingError(f"it has a text of {len(value)} characters")
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise pickle.UnpicklingError(f"it has a number of {value.bit_length()} bits")
    return value


def _dict(values: list[Any]) -> dict[Any, Any]:
    return ordered_dict(zip(values[::2], values[1::2], strict=True))


def walk(content: Any) -> Iterator[Any]:
    """Yield every value in a tree of dicts, lists, tuples and Namespaces.

    Shared values count each time, since whoever walks or prints the content meets them each time.
    Raises UnpicklingError if the tree is too deep or too large.
    """
    pending = [(content, 0)]
    count = 1
    while pending:
        value, depth = pending.pop()
        yield value
        children = _children(value)
        count += len(children)
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(
                f"it has more than {_MAX_VALUES} values, or more than {_MAX_DEPTH} levels"
            )
        pending.extend((child, depth + 1) for child in children)


def _children(value: Any) -> Collection[Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value).values()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
