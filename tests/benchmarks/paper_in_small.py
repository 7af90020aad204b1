"""Compare paths, predictions and samplers as the SiT paper's Tables 3 to 7 do, on small images.

    python tests/benchmarks/paper_in_small.py --out runs/paper
    python tests/benchmarks/paper_in_small.py --out runs/paper --folder PATH    # a folder per class

Trains configs/digits.py for 600 steps with every path and prediction, and with VP's weighted score:
30 trainings of 3 seeds, alike in everything else. Draws 900 samples of each by the ODE (Heun) and
by SDEs (Euler-Maruyama), with equal numbers of evaluations. Prints Frechet distances in the
principal components of the pixels, the shares that a classifier reads as their label, both with
their spread over the seeds, and which orderings of the paper hold. Losses of different predictions
cannot be compared.

The even images of scikit-learn's digits are trained on, and the odd ones are compared with. Of a
folder of images, scaled to 16x16, all are trained on, and every second one is compared with.

The digits take 45 minutes of one core. The same command continues after a kill: finished trainings
and measurements are kept in --out.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sit_jax import config as config_lib
from sit_jax import main, runtime
from sit_jax.data import sources
from sit_jax.errors import UserError
from sit_jax.jobs.data import RealImages, open_source, read_real_images
from sit_jax.jobs.results import Results, Row, open_results
from sit_jax.jobs.sampler import labels_of, make_sampler, sample_images
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.sweep import make_evaluator
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.settings import Config
from tests.benchmarks.paper_claims import (
    CLAIM_COLUMNS,
    CLAIMS,
    FAILS,
    GUIDED,
    HOLDS,
    KL,
    OBJECTIVES,
    ODE,
    SCORE,
    SIGMA,
    SIN,
    UNDECIDED,
    VELOCITY,
    WEIGHTED,
    Cell,
    Objective,
    Spread,
    as_row,
    judge,
    spread,
)

Settings = Mapping[str, Any]  # by dotted key

CONFIG = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "digits.py")
EVALUATIONS = 100  # of the network for a sample; with guidance, of two networks
COMMON: Settings = {
    "train.steps": 600,
    "train.ema_decay": 0.99,
    "checkpoint.every": 600,
    "log.sheet_every": 0,
    "log.tensorboard": False,
    "sample.count": 900,
    "sample.batch": 450,
    "sample.cfg_scale": 1.0,
}
_HEUN = {"solver": "heun", "steps": EVALUATIONS // 2}
_EULER_MARUYAMA = {"solver": "euler-maruyama", "steps": EVALUATIONS - 1}  # and the last step
# Settings of the section `sample` for each sampler. The paper's w is 2 D: its sigma_t is half of
# the form "sigma" here, and its sin^2(pi t) half of "increasing-decreasing".
SAMPLERS: dict[str, Settings] = {
    ODE: _HEUN,
    SIGMA: _EULER_MARUYAMA | {"diffusion_form": "sigma", "diffusion_norm": 0.5},
    KL: _EULER_MARUYAMA | {"diffusion_form": "SBDM", "diffusion_norm": 1.0},
    SIN: _EULER_MARUYAMA | {"diffusion_form": "increasing-decreasing", "diffusion_norm": 0.5},
    GUIDED: _HEUN | {"cfg_scale": 1.5},
}
Stage = Sequence[tuple[Objective, tuple[str, ...]]]  # objectives with their samplers
# A stage is completed for all seeds before the next begins, so that a run cut short has the core.
STAGES: tuple[Stage, ...] = (
    [(objective, (ODE, SIGMA)) for objective in OBJECTIVES],
    [(WEIGHTED, (ODE, SIGMA, KL, SIN))],
    # The other cells of Table 6; the paper has no noise prediction, and VP's score only weighted.
    [
        (objective, (KL, SIN))
        for objective in OBJECTIVES
        if objective.prediction != "noise" and objective != SCORE["VP"]
    ],
    [(VELOCITY["Linear"], (GUIDED,))],
)
TRAINING = ("objective", "seed", "loss", "wall_seconds", "cpu_seconds", "load")
MEASUREMENT = ("objective", "seed", "sampler", "frechet", "agreement", "wall_seconds", "load")


def folder_settings(path: str) -> Settings:
    """Return the settings of a folder of images, which has a sub-folder per class."""
    settings = {
        "data.source": "folder",
        "data.path": path,
        "data.split": "all",
        "data.image_size": 16,
        "data.channels": 3,
    }
    options = load(settings).data.options
    names = sources.SOURCES["folder"].open(options).class_names
    return settings | {"data.classes": len(names)}


def load(settings: Settings) -> Config:
    """Return configs/digits.py with these settings."""
    return config_lib.load(CONFIG, [(key, str(value)) for key, value in settings.items()])


def with_section(section: str, values: Settings) -> Settings:
    """Return settings of a section by dotted key."""
    return {f"{section}.{name}": value for name, value in values.items()}


class Stopwatch:
    """Measures the seconds since its start: of the clock, and of this process on all cores."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def columns(self) -> Row:
        """Return the columns of a row, with the machine's load."""
        return {
            "wall_seconds": round(time.perf_counter() - self._wall, 1),
            "cpu_seconds": round(time.process_time() - self._cpu, 1),
            "load": round(os.getloadavg()[0], 1),
        }


def read_images(settings: Settings) -> RealImages:
    """Return all images of the data set, those trained on and those compared with."""
    config = load({**settings, "data.split": "all"})
    setup = set_up(config)
    return read_real_images(setup, open_source(setup), config.sweep.reference_count)


class Bench:
    """Trains and measures what `results` does not hold yet."""

    def __init__(self, settings: Settings, real: RealImages, results: Results):
        self.settings = settings
        self.results = results
        odd = real._replace(images=real.images[1::2], labels=real.labels[1::2])
        self.evaluate, _ = make_evaluator(odd, load(settings).sweep.components)
        # The other half is as far away as good samples can be expected to be.
        self.floor = self.evaluate(real.images[::2], real.labels[::2])
        self.real_counts = len(odd.images), len(real.images[::2])
        # Samples of all seeds are drawn by the same program, from different noise.
        self._sampler = functools.cache(self._make_sampler)

    def run(self, stages: Sequence[Stage], seeds: int) -> None:
        """Complete the rows of all stages for the seeds 0, 1, ..."""
        done = {_key(row) for row in self.results.read_rows(MEASUREMENT)}
        for stage, seed in itertools.product(stages, range(seeds)):
            for objective, samplers in stage:
                keys = [(objective.name, seed, sampler) for sampler in samplers]
                if done.issuperset(keys):
                    continue
                weights = self._trained(objective, seed)
                for key in keys:
                    if key not in done:
                        self._add(self._measured(objective, key[2], seed, weights))

    def _settings_of(self, objective: Objective, seed: int = 0) -> Settings:
        transport = with_section("transport", dataclasses.asdict(objective))
        return {**self.settings, **transport, "seed": seed}

    def _trained(self, objective: Objective, seed: int) -> Weights:
        """Return the EMA of a training, which is trained first if its row is missing."""
        settings = self._settings_of(objective, seed)
        config = load(settings)
        workdir = self.results.folder / "runs" / f"{objective.name} {seed}".replace(" ", "-")
        rows = self.results.read_rows(TRAINING)
        is_trained = (objective.name, seed) in {(row["objective"], row["seed"]) for row in rows}
        if not is_trained:
            watch = Stopwatch()
            _train(settings, workdir)
            columns = watch.columns()
        weights = restore_weights(set_up(config), workdir, "ema")
        if weights.step != config.train.steps:
            sys.exit(f"stopped at step {weights.step} of {workdir}; the same command continues")
        if not is_trained:
            last_line = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
            loss = json.loads(last_line)["loss"]
            self._add({"objective": objective.name, "seed": seed, "loss": loss, **columns})
        return weights

    def _make_sampler(self, objective: Objective, name: str) -> tuple[Setup, Callable]:
        settings = self._settings_of(objective) | with_section("sample", SAMPLERS[name])
        setup = set_up(load(settings))
        return setup, make_sampler(setup)

    def _measured(self, objective: Objective, name: str, seed: int, weights: Weights) -> Row:
        """Return the row of a sampler, its quality None if a sample is not finite."""
        setup, sampler = self._sampler(objective, name)
        watch = Stopwatch()
        count = setup.config.sample.count
        indices = np.arange(seed * count, (seed + 1) * count)  # they select the noise
        quality: Row = {"frechet": None, "agreement": None}
        try:
            batches = list(sample_images(setup, sampler, weights.params, indices))
        except UserError as error:
            print(f"warning: {objective.name}, {name}: {error}", file=sys.stderr)
        else:
            images = np.concatenate([batch.images_bfhwc[:, -1] for batch in batches])
            quality = self.evaluate(images, labels_of(setup, indices))
        key = {"objective": objective.name, "seed": seed, "sampler": name}
        return {**key, **quality, **watch.columns()}

    def _add(self, row: Row) -> None:
        self.results.add_rows([row])
        print(json.dumps(row), flush=True)


def _key(row: Row) -> tuple[str, int, str]:
    return row["objective"], row["seed"], row["sampler"]


def _train(settings: Settings, workdir: epath.Path) -> None:
    """Train a run, its output beside its workdir; exit if that fails."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    with open(f"{workdir}.txt", "a") as log, contextlib.redirect_stdout(log):
        status = main.main(["--config", CONFIG, "--workdir", str(workdir), *flags])
    if status:
        sys.exit(status)


def report(bench: Bench, stages: Sequence[Stage], seeds: int) -> list[str]:
    """Return the lines of the tables. Cells that are not measured for all seeds are empty."""
    rows = [row for row in bench.results.read_rows(MEASUREMENT) if row["seed"] < seeds]
    names = [sampler for sampler in SAMPLERS if any(row["sampler"] == sampler for row in rows)]
    objectives = list(dict.fromkeys(objective for stage in stages for objective, _ in stage))
    distances: dict[Cell, Spread] = {}
    agreements: dict[Cell, Spread] = {}
    for cell in itertools.product(objectives, names):
        own = [row for row in rows if (row["objective"], row["sampler"]) == (cell[0].name, cell[1])]
        if len(own) == seeds:
            finite = all(row["frechet"] is not None for row in own)
            distances[cell] = spread([row["frechet"] if finite else np.inf for row in own])
            if finite:
                agreements[cell] = spread([row["agreement"] for row in own])
    verdicts = judge(CLAIMS, distances)
    results = [result for _, result in verdicts]
    counts = ", ".join(f"{each}: {results.count(each)}" for each in (HOLDS, FAILS, UNDECIDED))

    def by_cell(title: str, values: Mapping[Cell, Spread], text: Callable[[Spread], str]) -> list:
        rows = [
            [
                each.name,
                *(text(values[each, name]) if (each, name) in values else "" for name in names),
            ]
            for each in objectives
        ]
        return as_table([title, *names], rows)

    return [
        _heading(bench, rows, seeds),
        "",
        *by_cell("Frechet distance", distances, str),
        "",
        *by_cell("read as their label", agreements, _percent),
        "",
        *as_table(CLAIM_COLUMNS, [as_row(each, result, distances) for each, result in verdicts]),
        "",
        f"Of {len(verdicts)} orderings of the paper: {counts}.",
    ]


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _percent(agreement: Spread) -> str:
    return f"{100 * agreement.mean:.1f} ± {100 * agreement.deviation:.1f} %"


def _heading(bench: Bench, rows: Sequence[Row], seeds: int) -> str:
    """Return what the numbers depend on, the floor, and what the run cost."""
    config = load(bench.settings)
    odd, even = bench.real_counts
    trainings = [row for row in bench.results.read_rows(TRAINING) if row["seed"] < seeds]
    loads = [row["load"] for row in [*trainings, *rows]]

    def cost(rows: Sequence[Row]) -> str:
        cpu, wall = (
            statistics.fmean(row[f"{clock}_seconds"] for row in rows) for clock in ("cpu", "wall")
        )
        return f"{cpu:.0f} s of a core in {wall:.0f} s"

    return (
        f"{config.train.steps} steps of {config.train.batch} images, seeds: {seeds}, mean ± "
        f"standard deviation over the seeds; {config.sample.count} samples of {EVALUATIONS} "
        f"evaluations, compared with {odd} real images. The other {even} real images are a "
        f"distance of {bench.floor['frechet']:.3g} away, and {bench.floor['agreement']:.1%} of "
        f"them are read as their label. A training took {cost(trainings)}, a sampler "
        f"{cost(rows)}; the machine's load was {min(loads):g} to {max(loads):g}."
    )


def compare(
    out: str, settings: Settings, stages: Sequence[Stage] = STAGES, seeds: int = 3
) -> list[str]:
    """Train and measure what `out` lacks; return the lines of the report."""
    arguments = argparse.Namespace(out=None)
    real = read_images(settings)
    recorded = {"settings": dict(settings), "evaluations": EVALUATIONS, **real.settings}
    name = str(settings.get("data.source", "digits"))
    with open_results(arguments, epath.Path(out), "paper", name, recorded) as results:
        bench = Bench(settings, real, results)
        bench.run(stages, seeds)
        lines = report(bench, stages, seeds)
        results.write_text("report.md", "\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for trainings and measurements")
    parser.add_argument("--folder", help="images instead of the digits, a sub-folder per class")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}; expected 1 or more")
    runtime.use_compilation_cache()
    runtime.keep_host_memory()
    try:
        extra = folder_settings(options.folder) if options.folder else {}
        print("\n".join(compare(options.out, {**COMMON, **extra}, seeds=options.seeds)))
    except UserError as error:
        sys.exit(f"error: {error}")
