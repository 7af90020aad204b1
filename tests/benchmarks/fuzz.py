"""Fuzz the command line and the readers of checkpoints, PyTorch files and images.

    python tests/benchmarks/fuzz.py                             # 10 minutes, in four equal parts
    python tests/benchmarks/fuzz.py --only images,torch --minutes 2 --seed 7
    python tests/benchmarks/fuzz.py --case command:17           # one case again, with its output

- command: random flags, settings, values and paths of every mode and converter.
- checkpoints: a trained workdir with damaged files, which is trained on, sampled or converted.
- torch: damaged .pt and .safetensors files for convert.from_torch and convert.inception.
- images: damaged images of every format for the folder source.

Many cases share a child process, which is replaced when it dies, hangs or grows. A case fails if it
ends in a traceback, a status other than 0 or 2, more than one line of error, or a wrong result
where that can be told; if it takes more than a minute; or if it takes 1 GiB more memory than an
intact case. Exits with 1 at any failure.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import fuzz_cases
from tests.benchmarks.children import ROOT

_LIMIT_S = 60  # for a case
_START_S = 240  # for a child until its first case
_GIB = 2**30
_GROWN = 2 * _GIB  # a child that has grown by so much is replaced
_CASES_OF_A_CHILD = 5000


@dataclasses.dataclass
class Tally:
    """What the cases of a part came to."""

    cases: int = 0
    failures: int = 0
    slowest_s: float = 0
    most_bytes: int = 0  # above the memory of an intact case
    endings: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, result: dict[str, Any]) -> None:
        self.cases += 1
        self.failures += result["failure"] is not None
        self.slowest_s = max(self.slowest_s, result["seconds"])
        self.most_bytes = max(self.most_bytes, result["bytes"])
        self.endings[result["ending"]] += 1


def memory(name: str) -> int:
    """Return a number of bytes of /proc/self/status, such as VmRSS."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def forget_peak() -> None:
    """Let VmHWM, the peak of this process, start again from its memory now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def run_cases(part: str, seed: int, first: int, folder: pathlib.Path, count: int) -> None:
    """Run cases in this process, and report each in a line of JSON before and after it."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    with open(folder / "log", "ab") as log:  # what libraries in C print
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    forget_peak()
    cases = fuzz_cases.PARTS[part](folder)  # this runs intact ones
    own_peak = memory("VmHWM")
    limit = memory("VmSize") + 8 * _GIB  # so that no case takes all of the machine's memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, first + count):
        print(json.dumps({"case": number}), file=report)
        forget_peak()
        started = time.monotonic()
        try:
            outcome = cases.run(fuzz_cases.draw_of(seed, part, number))
        except BaseException:  # a traceback that main did not even catch
            outcome = fuzz_cases.Outcome("", "traceback", traceback.format_exc())
        took = memory("VmHWM") - own_peak
        failure = outcome.failure
        if took > _GIB:
            failure = f"{failure or ''} {took / _GIB:.1f} GiB more than an intact case".strip()
        result = {
            "case": number, "input": outcome.input, "ending": outcome.ending, "failure": failure,
            "seconds": time.monotonic() - started, "bytes": took,
        }  # fmt: skip
        print(json.dumps(result), file=report)
        if memory("VmRSS") > own_peak + _GROWN:
            return


class Child:
    """A process that runs cases, and the lines that it has reported."""

    def __init__(self, part: str, seed: int, first: int, folder: pathlib.Path, count: int):
        arguments = [__file__, "--child", part, "--seed", str(seed), "--first", str(first)]
        arguments += ["--folder", str(folder), "--count", str(count)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HOME": str(folder),
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE
        )
        self._unread = b""

    def line(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next report; None if the child has ended. Raises TimeoutError."""
        assert self.process.stdout
        end = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self.process.stdout.fileno(), 2**16)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def fuzz(part: str, seed: int, seconds: float, folder: pathlib.Path) -> Tally:
    """Run cases of a part for so long; print each failure."""
    tally = Tally()
    number = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        child = Child(part, seed, number, folder, _CASES_OF_A_CHILD)
        timeout_s: float = _START_S
        while time.monotonic() < end or timeout_s == _START_S:
            try:
                result = child.line(timeout_s)
            except TimeoutError:
                result = _failed(number, "hang", f"more than {timeout_s} s")
            if result is None:
                if child.process.wait() == 0:
                    break
                result = _failed(number, "died", f"status {child.process.returncode}")
            timeout_s = _LIMIT_S
            number = result["case"]
            if "ending" not in result:
                continue
            tally.add(result)
            number += 1
            if result["failure"]:
                print(
                    f"{part}:{number - 1}: {result['failure']}\n    {result['input']}", flush=True
                )
            if result["ending"] in ("hang", "died"):
                break
        child.process.kill()
        child.process.wait()
    return tally


def _failed(number: int, ending: str, failure: str) -> dict[str, Any]:
    return {
        "case": number, "input": "repeat it with --case", "ending": ending,
        "failure": f"{ending}: {failure}", "seconds": 0, "bytes": 0,
    }  # fmt: skip


def main(flags: argparse.Namespace, folder: pathlib.Path) -> int:
    """Fuzz all parts and print a table; return the exit status."""
    if flags.case:
        part, _, number = flags.case.partition(":")
        outcome = fuzz_cases.PARTS[part](folder).run(
            fuzz_cases.draw_of(flags.seed, part, int(number))
        )
        print(outcome.input, outcome.ending, outcome.failure, outcome.printed, sep="\n")
        return outcome.failure is not None
    tallies = {}
    for part in flags.only:
        (folder / part).mkdir()
        seconds = 60 * flags.minutes / len(flags.only)
        tallies[part] = fuzz(part, flags.seed, seconds, folder / part)
    print("| part | cases | endings | failures | slowest | most memory above an intact case |")
    print("|---|---|---|---|---|---|")
    for part, tally in tallies.items():
        endings = ", ".join(f"{name} {count:,}" for name, count in tally.endings.most_common())
        print(
            f"| {part} | {tally.cases:,} | {endings} | {tally.failures} | {tally.slowest_s:.1f} s "
            f"| {tally.most_bytes / 2**20:.0f} MiB |"
        )
    return any(tally.failures for tally in tallies.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(fuzz_cases.PARTS)
    parser.add_argument("--minutes", type=float, default=10, help="in total (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=names,
        metavar="PART[,PART]",
        help=f"only these of {', '.join(names)}",
    )
    parser.add_argument("--case", metavar="PART:N", help="run one case in this process")
    for name in ("child", "folder", "first", "count"):  # of a child process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child_folder = pathlib.Path(given.folder)
        run_cases(given.child, given.seed, int(given.first), child_folder, int(given.count))
        sys.exit(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        sys.exit(main(given, pathlib.Path(temporary).resolve()))
