"""The orderings of the SiT paper's Tables 3 to 7, and whether measurements have them too.

Ma et al., arXiv 2401.08740v2. Its w is twice this project's diffusion coefficient D, and its time
runs the other way. Lower is better in all that is compared here.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a network learns: settings of the section `transport`."""

    path: str
    prediction: str
    loss_weight: str = "none"

    @property
    def name(self) -> str:
        """A name for tables."""
        weighted = "" if self.loss_weight == "none" else " (weighted)"
        return f"{self.path} {self.prediction}{weighted}"


Cell = tuple[Objective, str]  # an objective and the name of a sampler

ODE, SIGMA, KL, SIN, GUIDED = "ODE", "SDE sigma", "SDE KL", "SDE sin^2", "ODE cfg 1.5"
PATHS = ("VP", "Linear", "GVP")
OBJECTIVES = tuple(
    Objective(path, prediction) for path in PATHS for prediction in ("velocity", "score", "noise")
)
VELOCITY = {path: Objective(path, "velocity") for path in PATHS}
SCORE = {path: Objective(path, "score") for path in PATHS}
WEIGHTED = Objective("VP", "score", "velocity")  # the paper's L_s_lambda

# FID-50K of SiT-B/2 at 400K steps, without guidance, from Tables 3 to 6.
PAPER: dict[Cell, float] = {
    (SCORE["VP"], ODE): 43.6,
    (WEIGHTED, ODE): 39.1,
    (VELOCITY["VP"], ODE): 39.8,
    (VELOCITY["Linear"], ODE): 34.8,
    (VELOCITY["GVP"], ODE): 34.6,
    **{
        (objective, sampler): fid
        for objective, fids in (
            (VELOCITY["VP"], (37.8, 38.7, 39.2)),
            (WEIGHTED, (35.7, 37.1, 37.7)),
            (VELOCITY["GVP"], (32.9, 33.4, 33.6)),
            (SCORE["GVP"], (37.8, 33.5, 33.2)),
            (VELOCITY["Linear"], (33.6, 33.5, 33.3)),
            (SCORE["Linear"], (41.0, 35.3, 34.4)),
        )
        for sampler, fid in zip((KL, SIGMA, SIN), fids, strict=True)
    },
}
# Of SiT-XL/2 at 7M steps: 9.35 in the text, 2.15 in Table 7.
PAPER_XL: dict[Cell, float] = {
    (VELOCITY["Linear"], ODE): 9.35,
    (VELOCITY["Linear"], GUIDED): 2.15,
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """The paper measured a lower FID in the cell `better` than in the cell `worse`."""

    table: str
    better: Cell
    worse: Cell
    fids: tuple[float, float]


def claim(table: str, a: Cell, b: Cell, paper: Mapping[Cell, float] = PAPER) -> Claim:
    """Return the paper's ordering of two cells."""
    better, worse = sorted((a, b), key=lambda cell: paper[cell])
    return Claim(table, better, worse, (paper[better], paper[worse]))


def _claims() -> Iterable[Claim]:
    vp, linear, gvp = (VELOCITY[path] for path in PATHS)
    for a, b in ((WEIGHTED, SCORE["VP"]), (vp, SCORE["VP"]), (WEIGHTED, vp)):
        yield claim("Table 3", (a, ODE), (b, ODE))
    for a, b in ((linear, vp), (gvp, vp), (gvp, linear)):
        yield claim("Table 4", (a, ODE), (b, ODE))
    for sampler, table in ((KL, "Table 5"), (SIGMA, "Tables 5 and 6")):
        for objective in (vp, linear, gvp):
            yield claim(table, (objective, sampler), (objective, ODE))
    # Of each row of Table 6 the best and the worst coefficient, then its rows of the same path.
    for path, score in (("VP", WEIGHTED), ("GVP", SCORE["GVP"]), ("Linear", SCORE["Linear"])):
        for objective in (VELOCITY[path], score):
            cells = sorted(((objective, w) for w in (KL, SIGMA, SIN)), key=lambda cell: PAPER[cell])
            yield claim("Table 6", cells[0], cells[-1])
        for w in (KL, SIGMA, SIN):
            yield claim("Table 6", (VELOCITY[path], w), (score, w))
    yield claim("Table 7", (linear, GUIDED), (linear, ODE), PAPER_XL)


CLAIMS = tuple(_claims())


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over trainings with different seeds."""

    mean: float  # infinite if the samples of a training were not finite
    deviation: float

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "not finite"
        return f"{self.mean:#.3g} ± {self.deviation:.2g}"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of the values. One value, or an infinite one, has no deviation."""
    mean = statistics.fmean(values)
    has_deviation = len(values) > 1 and math.isfinite(mean)
    return Spread(mean, statistics.stdev(values) if has_deviation else 0.0)


HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "within the spread"


def verdict(better: Spread, worse: Spread) -> str:
    """Return whether `better` is lower by more than the root of the summed variances."""
    if math.isinf(better.mean) and math.isinf(worse.mean):
        return UNDECIDED
    gap = worse.mean - better.mean
    if abs(gap) <= math.hypot(better.deviation, worse.deviation):
        return UNDECIDED
    return HOLDS if gap > 0 else FAILS


def judge(claims: Iterable[Claim], distances: Mapping[Cell, Spread]) -> list[tuple[Claim, str]]:
    """Return the verdict on each claim whose two cells were measured."""
    return [
        (each, verdict(distances[each.better], distances[each.worse]))
        for each in claims
        if each.better in distances and each.worse in distances
    ]


CLAIM_COLUMNS = ("table", "better in the paper", "worse", "FID there", "distance here", "verdict")


def as_row(each: Claim, result: str, distances: Mapping[Cell, Spread]) -> tuple[str, ...]:
    """Return the CLAIM_COLUMNS of a claim and its verdict."""
    ends = (each.better, each.worse)
    names = [f"{objective.name}, {sampler}" for objective, sampler in ends]
    fids = " and ".join(f"{fid:g}" for fid in each.fids)
    measured = " and ".join(str(distances[cell]) for cell in ends)
    return each.table, *names, fids, measured, result
