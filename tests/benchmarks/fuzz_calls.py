"""Damages input, and calls the program on it in this process, for fuzz_cases.py."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from convert import cli, from_torch, inception, to_torch
from sit_jax import main

Draw = random.Random
_WORK_S = 20  # a case that works for so long is interrupted
INTACT_S = 200
_WORKS = re.compile(
    "training from step|^sampling |samplers at step|^inverting|^log p of|classifier reads|"
    "^compiling|^data: ",
    re.MULTILINE,
)
_HARMLESS = ("warning: ", "note: ")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended. `failure` is None, or what is wrong."""

    input: str
    ending: str
    failure: str | None = None
    printed: str = ""


def damaged(draw: Draw, data: bytes) -> bytes:
    """Return bytes with one to four random changes, mostly near the ends, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = _place(draw, len(changed))
        kind = draw.randrange(7)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            changed[place : place + 4] = draw.choice((b"\xff" * 4, b"\x7f" * 4, bytes(4)))
        elif kind == 3:
            changed[place:place] = draw.randbytes(draw.choice((1, 8, 300)))
        elif kind == 4:
            del changed[place : place + draw.choice((1, 8, 300))]
        elif kind == 5:
            changed[place : place + 8] = draw.choice((0, 1, 2**31 - 1, 2**40)).to_bytes(8, "little")
        else:
            other = _place(draw, len(changed))
            changed[place : place + 16] = changed[other : other + 16]
    return bytes(changed)


def _place(draw: Draw, size: int) -> int:
    if not size:
        return 0
    near = min(size, draw.choice((16, 64, 1024, size)))
    offset = draw.randrange(near)
    return offset if draw.random() < 0.6 else size - 1 - offset


JSON_TEXTS = (
    "", "{", "null", "[]", "3", '"x"', "[" * 200_000, '{"a":' * 100_000, "9" * 5000, "NaN",
    "\ufeff{}", '{"step": null}', '{"step": 1e400, "run": [], "files": 3}',
)  # fmt: skip
_JSON_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "é", "a\nb",
    "x" * 5000, [], {}, [[]], [None], {"a": 1}, "../..", "/etc/passwd",
)  # fmt: skip


def damaged_json(draw: Draw, text: str) -> str:
    """Return JSON with one value replaced, removed or added, or another text altogether."""
    if draw.random() < 0.25:
        return draw.choice(JSON_TEXTS)
    try:
        lines = [json.loads(line) for line in text.splitlines()] if "\n{" in text else []
        content = draw.choice(lines) if lines else json.loads(text)
    except ValueError:
        return draw.choice(JSON_TEXTS)
    node: Any = content
    while isinstance(node, dict | list) and node:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
            if isinstance(node, dict) and draw.random() < 0.3:
                del node[key]
            else:
                node[key] = draw.choice(_JSON_VALUES)
            break
        node = inner
    return json.dumps(content) if not lines else "".join(f"{json.dumps(row)}\n" for row in lines)


@contextlib.contextmanager
def limited(seconds: int = _WORK_S) -> Iterator[list[bool]]:
    """Interrupt the block after so long, as Ctrl-C would; yield a list that is then not empty."""
    fired: list[bool] = []

    def interrupt(*_: object) -> None:
        fired.append(True)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield fired
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def call(
    program: str, arguments: Sequence[str], seconds: int = _WORK_S
) -> tuple[int, str, str, bool]:
    """Return exit status, stdout, stderr, and whether the program was interrupted."""
    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = [program, *arguments]
    converters: dict[str, Callable] = {
        "from_torch": from_torch.main, "to_torch": to_torch.main, "inception": inception.main,
    }  # fmt: skip
    try:
        with (
            limited(seconds) as fired,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                if program == "main":
                    status = main.main(list(arguments))
                else:
                    status = cli.run(converters[program])
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            except KeyboardInterrupt:
                status = 130
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue(), bool(fired)


def judge(program: str, arguments: Sequence[str]) -> Outcome:
    """Call the program, and say what is wrong with the way in which it ended."""
    status, out, err, interrupted = call(program, arguments)
    given = f"{program} {' '.join(map(short, arguments))}"
    errors = [line for line in err.splitlines() if line and not line.startswith(_HARMLESS)]
    failure = None
    if "Traceback" in err or status not in (0, 2, 130):
        failure = f"status {status}: {err[-600:]}"
    elif interrupted and not _WORKS.search(out):
        failure = f"silent for {_WORK_S} s: {out[-300:]}{err[-300:]}"
    elif status == 2 and (len(errors) != 1 or not errors[0].startswith("error: ")):
        failure = f"not one line: {err[-600:]}"
    elif status == 0 and errors:
        failure = f"succeeds, but prints {err[-600:]}"
    ending = "interrupted work" if interrupted else {0: "succeeds", 2: "refused"}.get(status, "?")
    return Outcome(given, ending, failure, out + err)


def short(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) < 120 else f"{quoted[:80]}...({len(text)} characters)"


@contextlib.contextmanager
def inside(folder: pathlib.Path) -> Iterator[None]:
    before = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
