"""Compare our speed with the same SiT in plain PyTorch (tests/torch_sit.py) on one GPU.

    python tests/benchmarks/gpu_speed.py                       # SiT-XL/2 on 32x32x4
    python tests/benchmarks/gpu_speed.py --only training --repeats 10
    python tests/benchmarks/gpu_speed.py --only training --remat operands   # 25 GiB more at 256
    python tests/benchmarks/gpu_speed.py --cpu --model SiT-S/8 --batches 4 2 --budget 300

Takes at most 8 minutes (--budget) and needs PyTorch. What would not fit into the budget is left
out, and said. Results go to gpu_speed.json and gpu_speed.md in --out after every step, so nothing
is lost if the machine is taken away.

- Training: ours with its defaults in bfloat16; PyTorch in bfloat16 autocast with torch.compile and
  fused AdamW; and eager in TF32, as published. All with AdamW and an EMA in float32, at the largest
  of --batches that fits ours and torch.compile, each by itself on the card. With --format TF32
  only ours in TF32 and eager.
- Sampling: Euler with guidance, in bfloat16 (PyTorch: compiled) and in TF32 (PyTorch: eager).
- Profile: the time by kind of kernel (gpu_kernels.py), and the largest kernels in the JSON.

Each side is a child process (gpu_sides.py). In training a child ends before the next one starts,
since two do not fit on the card, and the sides come in turns in --rounds. In sampling the children
live side by side and take turns call by call; they are prepared at the same time, to save time. A
ratio is of images a second in one pair of turns. Compilation is the time of the first call less
that of the second, from empty caches. jax's peak memory is of its process so far.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from sit_jax.errors import UserError  # noqa: E402
from sit_jax.models.sit import REMAT_POLICIES  # noqa: E402
from sit_jax.models.sizes import size_by_name  # noqa: E402
from tests.benchmarks import gpu_report  # noqa: E402
from tests.benchmarks.gpu_sides import FORMATS, Child, ChildEnded, Task  # noqa: E402

PARTS = ("training", "sampling", "profile")
MODEL = "SiT-XL/2"
SAMPLING_BATCHES = (8, 64)
TRAINING_SHARE = 0.72  # of the budget, if sampling follows
# GiB of a training step of SiT-XL/2: of the state, and for each image (measured on an H200). A
# batch that cannot fit is not tried, as compiling it takes more than a minute.
STATE_GIB = 10.8
IMAGE_GIB = {"ours": 0.20, "torch.compile": 0.335, "torch eager": 0.64}
# Seconds of a child with empty caches, on the same machine.
START_S = {"ours": 60, "torch.compile": 125, "torch eager": 55}
SAMPLING_S = 130
PROFILE_S = 20


class Run:
    """The options, the results so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace, caches: str, log: IO):
        self.options = options
        self.deadline = time.monotonic() + options.budget
        self._caches = caches
        self._log = log
        self.results = {"model": options.model, "card": {}, "rows": [], "notes": []}

    def save(self) -> None:
        """Write the results so far. A kill leaves the file before or the new one, never a part."""
        out = self.options.out
        texts = {"gpu_speed.json": json.dumps(self.results, indent=1)}
        if self.results["card"]:
            texts["gpu_speed.md"] = gpu_report.report(self.results)
        for name, text in texts.items():
            (out / f"{name}.tmp").write_text(text)
            (out / f"{name}.tmp").replace(out / name)

    def say(self, text: str) -> None:
        """Print a note and keep it with the results."""
        print(text, flush=True)
        self.results["notes"].append(text)
        self.save()

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def enough(self, seconds: float, part: str) -> bool:
        """Return whether the time suffices; otherwise say that `part` is left out."""
        if self.left() >= seconds:
            return True
        left = max(0, self.left())
        self.say(f"{part}: left out, as it takes about {seconds:.0f} s and {left:.0f} s remain")
        return False

    def row(self, task: Task) -> dict:
        """Return the results of a task."""
        for row in self.results["rows"]:
            if all(row[key] == value for key, value in task._asdict().items()):
                return row
        self.results["rows"].append(task._asdict() | {"ms": [], "visits_s": []})
        return self.results["rows"][-1]

    @contextlib.contextmanager
    def child(self, arguments: Sequence[str], alone: bool) -> Iterator[Child]:
        """Start a child and end it; `alone`, jax takes the memory of the card in advance."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "JAX_COMPILATION_CACHE_DIR": f"{self._caches}/jax",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": f"{self._caches}/torch",
            "TRITON_CACHE_DIR": f"{self._caches}/triton",
            "XLA_PYTHON_CLIENT_PREALLOCATE": str(alone).lower(),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        }
        if self.options.cpu:
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        child = Child(arguments, environment, self._log, self.left())
        try:
            yield child
        finally:
            child.end()

    def prepared(self, child: Child, task: Task) -> str:
        """Wait until the child has prepared the task: "ok", "memory" (too little) or "failed"."""
        answer = child.answer()
        if "error" in answer:
            self.say(f"{task}: {answer['error']}")
            return "memory" if answer["memory"] else "failed"
        row = self.row(task)
        for key, value in answer.items():
            row.setdefault(key, value)  # of the first child, whose caches were empty
        print(f"{task}: ready, compiled in {answer['compile_s']:.1f} s", flush=True)
        return "ok"

    def measure(self, child: Child, task: Task, do: str) -> bool:
        """Have a task timed or profiled; say so and return False if that fails."""
        answer = child.ask(do, task)
        if "error" in answer:
            self.say(f"{task}: {answer['error']}")
            return False
        if do == "time":
            self.row(task)["ms"].append(answer["ms"])
        else:
            self.row(task)["profile"] = answer
        self.save()
        return True


def visit(run: Run, task: Task, repeats: int, profile: bool) -> str:
    """Train in a process of its own: "ok", "memory" (too little), "failed" or "left out"."""
    row = run.row(task)
    estimate = START_S[task.side] if task.model == MODEL else 1
    if not run.enough(row["visits_s"][-1] if row["visits_s"] else estimate, str(task)):
        return "left out"
    start = time.monotonic()
    try:
        with run.child([json.dumps([task])], alone=True) as child:
            outcome = run.prepared(child, task)
            if outcome == "ok":
                for _ in range(repeats):
                    run.measure(child, task, "time")
                if profile:
                    run.measure(child, task, "profile")
    except ChildEnded as error:
        run.say(f"{task}: {error}")
        outcome = "failed"
    row["visits_s"].append(time.monotonic() - start)
    return outcome


def possible_batches(run: Run, side: str) -> list[int]:
    """Return the batches of training that may fit, the largest first; say which cannot."""
    result = []
    memory = run.results["card"]["memory_gib"] or math.inf
    for batch in sorted(run.options.batches, reverse=True):
        needs = STATE_GIB + IMAGE_GIB[side] * batch
        if run.options.model == MODEL and needs > memory:
            run.say(f"{side} training batch {batch}: not tried, as it needs about {needs:.0f} GiB")
        else:
            result.append(batch)
    return result


def largest(run: Run, sides: Sequence[str], form: str, repeats: int, profile: bool) -> list[Task]:
    """Train at the largest batch that fits all sides; return the tasks that went well."""
    for batch in possible_batches(run, sides[-1]):
        well = []
        for side in sides:
            task = Task(side, "training", form, batch, run.options.model)
            if side == "ours":
                task = task._replace(remat=run.options.remat)
            outcome = visit(run, task, repeats, profile)
            if outcome == "memory":
                run.say(f"{task}: does not fit; the next smaller batch is taken")
                break
            if outcome == "ok":
                well.append(task)
        else:
            return well
    run.say(f"training: no batch fits {' and '.join(sides)}")
    return []


def training(run: Run, repeats: int, rounds: int, profile: bool) -> None:
    """Time training in alternating rounds; in the first, also PyTorch as published."""
    form = run.options.format
    rival = "torch.compile" if form in FORMATS["torch.compile"] else "torch eager"
    pair = largest(run, ["ours", rival], form, repeats, profile and rounds == 1)
    if rival == "torch.compile":
        largest(run, ["torch eager"], FORMATS["torch eager"][0], repeats, profile)
    for number in range(2, rounds + 1):
        pair.reverse()  # a, b, b, a: a drift affects both sides
        for task in pair:
            visit(run, task, repeats, profile and number == rounds)


def sampling(run: Run, repeats: int, profile: bool) -> None:
    """Time sampling by two children that take turns."""
    if not run.enough(SAMPLING_S if run.options.model == MODEL else 1, "sampling"):
        return
    children = [
        [
            Task(side, "sampling", form, batch, run.options.model)
            for side in sides
            for form in FORMATS[side]
            for batch in SAMPLING_BATCHES
        ]
        # PyTorch compiles first: it is on the GPU when jax has tuned its kernels.
        for sides in (["torch.compile", "torch eager"], ["ours"])
    ]
    live: dict[Task, Child] = {}
    with contextlib.ExitStack() as stack:
        started = [
            (stack.enter_context(run.child([json.dumps(tasks)], alone=False)), tasks)
            for tasks in children
        ]
        for child, tasks in started:
            live |= prepared(run, child, tasks)
        seconds = 0.0
        reserve = PROFILE_S if profile else 0
        for number in range(repeats):
            needs = 1.2 * seconds + reserve if number else 0
            if not run.enough(needs, f"sampling after {number} of {repeats} turns"):
                break
            start = time.monotonic()
            turn(run, live, "time")
            seconds = time.monotonic() - start
        if profile and live and run.enough(PROFILE_S, "the profile of sampling"):
            turn(run, live, "profile")


def prepared(run: Run, child: Child, tasks: Sequence[Task]) -> dict[Task, Child]:
    """Wait until a child has prepared its tasks; return those that went well."""
    try:
        return {task: child for task in tasks if run.prepared(child, task) == "ok"}
    except ChildEnded as error:
        run.say(f"{tasks[0].side}: {error}")
        return {}


def turn(run: Run, live: dict[Task, Child], do: str) -> None:
    """Time or profile each task once, both sides of a pair in turn; drop those that fail."""
    for task in sorted(live, key=lambda task: (task.format, task.batch, task.side)):
        if task not in live:
            continue
        lost = []
        try:
            if not run.measure(live[task], task, do):
                lost = [task]
        except ChildEnded as error:
            run.say(f"{task}: {error}")
            lost = [other for other, child in live.items() if child is live[task]]
        for other in lost:
            del live[other]


def measure(run: Run) -> None:
    """Measure the parts that the options ask for."""
    with run.child([], alone=False) as child:
        try:
            card = child.answer()
        except ChildEnded as error:
            raise UserError(f"jax or PyTorch does not start: it {error}") from None
    if not (card["gpu"] or run.options.cpu):
        seen = (
            f"jax has {card['jax sees']}, PyTorch {'a' if card['torch sees a GPU'] else 'no'} GPU"
        )
        raise UserError(
            f"this machine has no GPU that both frameworks find ({seen}); install the CUDA "
            "versions of both, or try the script itself with --cpu"
        )
    run.results["card"] = card
    run.say(f"{card['device']}, jax {card['jax']}, torch {card['torch']}")
    only, repeats = run.options.only, run.options.repeats
    if only == "profile":
        training(run, 1, rounds=1, profile=True)
        sampling(run, 1, profile=True)
        return
    if only in (None, "training"):
        end = run.deadline
        if only is None:
            run.deadline -= (1 - TRAINING_SHARE) * run.options.budget
        training(run, repeats, run.options.rounds, profile=only is None)
        run.deadline = end
    if only in (None, "sampling"):
        sampling(run, repeats * run.options.rounds, profile=only is None)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main() -> None:
    """Parse the flags, measure, print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--model", default=MODEL, help="size (default: %(default)s)")
    parser.add_argument(
        "--batches",
        type=_positive,
        nargs="+",
        default=[64, 128, 256],
        help="batches of training to choose from (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS["ours"],
        default="bfloat16",
        help="ours in training (default: %(default)s)",
    )
    parser.add_argument(
        "--remat",
        choices=REMAT_POLICIES,
        default="dots",
        help="our model.remat in training (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=_positive, default=3, help="calls in each round (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=2, help="turns of the sides (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=_positive, default=480, help="seconds at most (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("."), help="folder of the results"
    )
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU")
    options = parser.parse_args()
    try:
        size_by_name(options.model)
        if not importlib.util.find_spec("torch"):
            raise UserError('PyTorch is not installed; run: pip install -e ".[torch]"')
        options.out.mkdir(parents=True, exist_ok=True)
        with (
            open(options.out / "gpu_speed.log", "w") as log,
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches,
        ):
            run = Run(options, caches, log)
            measure(run)
            run.save()
    except UserError as error:
        sys.exit(f"error: {error}")
    print(gpu_report.report(run.results))


if __name__ == "__main__":
    main()
