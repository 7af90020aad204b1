"""The orderings of the paper, and a miniature run of tests/benchmarks/paper_in_small.py."""

import math

import pytest

from tests.benchmarks import paper_claims, paper_in_small
from tests.benchmarks.paper_claims import (
    FAILS,
    GUIDED,
    HOLDS,
    KL,
    ODE,
    SCORE,
    SIGMA,
    SIN,
    UNDECIDED,
    VELOCITY,
    WEIGHTED,
    Spread,
    claim,
    judge,
    spread,
    verdict,
)
from tests.commands import write_images


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (Spread(1.0, 0.3), Spread(1.6, 0.4), HOLDS),  # 0.6 is more than hypot(0.3, 0.4) = 0.5
        (Spread(1.0, 0.3), Spread(1.5, 0.4), UNDECIDED),
        (Spread(1.5, 0.3), Spread(1.0, 0.4), UNDECIDED),
        (Spread(1.6, 0.3), Spread(1.0, 0.4), FAILS),
        (Spread(1.0, 0.3), Spread(math.inf, 0.0), HOLDS),
        (Spread(math.inf, 0.0), Spread(1.0, 0.3), FAILS),
        (Spread(math.inf, 0.0), Spread(math.inf, 0.0), UNDECIDED),
    ],
)
def test_an_ordering_counts_only_beyond_the_spread(better, worse, expected):
    assert verdict(better, worse) == expected


def test_spread_is_the_sample_deviation():
    assert spread([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert spread([5.0]) == Spread(5.0, 0.0)
    assert spread([1.0, math.inf]) == Spread(math.inf, 0.0)
    assert str(Spread(0.12345, 0.00678)) == "0.123 ± 0.0068"
    assert str(spread([math.inf])) == "not finite"


def test_claims_take_their_direction_from_the_papers_numbers():
    forwards = claim("Table 4", (VELOCITY["GVP"], ODE), (VELOCITY["VP"], ODE))
    assert forwards == claim("Table 4", (VELOCITY["VP"], ODE), (VELOCITY["GVP"], ODE))
    assert forwards.better == (VELOCITY["GVP"], ODE)
    assert forwards.fids == (34.6, 39.8)


def test_claims_are_those_of_tables_3_to_7():
    tables = [each.table for each in paper_claims.CLAIMS]
    assert {table: tables.count(table) for table in tables} == {
        "Table 3": 3, "Table 4": 3, "Table 5": 3, "Tables 5 and 6": 3, "Table 6": 15, "Table 7": 1,
    }  # fmt: skip
    best_and_worst = {
        (each.better[0], each.better[1], each.worse[1])
        for each in paper_claims.CLAIMS
        if each.table == "Table 6" and each.better[0] == each.worse[0]
    }
    assert best_and_worst == {
        (VELOCITY["VP"], KL, SIN),
        (WEIGHTED, KL, SIN),
        (VELOCITY["GVP"], KL, SIN),
        (SCORE["GVP"], SIN, KL),
        (VELOCITY["Linear"], SIN, KL),
        (SCORE["Linear"], SIN, KL),
    }
    # VP's score is weighted, and better than its velocity; the other scores are worse.
    across = [each for each in paper_claims.CLAIMS if each.better[0] != each.worse[0]]
    assert sum(each.better[0] == WEIGHTED for each in across if each.table == "Table 6") == 3


def test_only_measured_claims_are_judged():
    distances = {
        (VELOCITY["Linear"], ODE): Spread(2.0, 0.1),
        (VELOCITY["GVP"], ODE): Spread(1.0, 0.1),
        (VELOCITY["Linear"], GUIDED): Spread(3.0, 0.1),
        (VELOCITY["VP"], SIGMA): Spread(1.0, 0.1),
    }
    verdicts = judge(paper_claims.CLAIMS, distances)
    assert [(each.table, result) for each, result in verdicts] == [
        ("Table 4", HOLDS),
        ("Table 7", FAILS),
    ]
    assert paper_claims.as_row(*verdicts[0], distances) == (
        "Table 4",
        "GVP velocity, ODE",
        "Linear velocity, ODE",
        "34.6 and 34.8",
        "1.00 ± 0.1 and 2.00 ± 0.1",
        "holds",
    )


def test_every_cell_of_a_claim_is_in_the_plan():
    planned = {
        (objective, sampler)
        for stage in paper_in_small.STAGES
        for objective, samplers in stage
        for sampler in samplers
    }
    for each in paper_claims.CLAIMS:
        assert {each.better, each.worse} <= planned
    trainings = {objective for objective, _ in planned}
    assert len(trainings) == 10  # 3 paths x 3 predictions, and VP's weighted score
    for objective in paper_claims.OBJECTIVES:
        assert {(objective, ODE), (objective, SIGMA)} <= planned


def test_samplers_have_equal_numbers_of_evaluations():
    for options in paper_in_small.SAMPLERS.values():
        is_ode = options["solver"] == "heun"
        evaluations = 2 * options["steps"] if is_ode else options["steps"] + 1
        assert evaluations == paper_in_small.EVALUATIONS


def test_a_miniature_run_is_kept_and_continued(tmp_path, monkeypatch):
    tiny = {
        **paper_in_small.COMMON,
        "model.depth": 1,
        "model.width": 16,
        "model.heads": 2,
        "train.steps": 2,
        "train.batch": 8,
        "sample.count": 20,
        "sample.batch": 10,
    }
    euler = {"solver": "euler", "steps": 2}
    monkeypatch.setattr(paper_in_small, "SAMPLERS", {ODE: euler, GUIDED: euler})
    stages = [[(VELOCITY["Linear"], (ODE,))], [(VELOCITY["Linear"], (GUIDED,))]]
    first = paper_in_small.compare(str(tmp_path), tiny, stages[:1], seeds=1)
    assert "2 steps of 8 images, seeds: 1" in first[0]
    assert "20 samples of 100 evaluations, compared with 898 real images" in first[0]
    assert "The other 899 real images are a distance of" in first[0]
    assert first[2] == "| Frechet distance | ODE |"

    (results,) = tmp_path.glob("paper/digits-*/results.jsonl")
    rows = results.read_text()
    assert rows.count("\n") == 2  # a training and a measurement
    monkeypatch.setattr(paper_in_small, "_train", None)  # would fail
    again = paper_in_small.compare(str(tmp_path), tiny, stages, seeds=1)
    assert results.read_text().startswith(rows)
    assert results.read_text().count("\n") == 3  # and the other sampler
    assert again[2] == "| Frechet distance | ODE | ODE cfg 1.5 |"
    assert again[4].startswith(first[4])
    assert again[-3].startswith(
        "| Table 7 | Linear velocity, ODE cfg 1.5 | Linear velocity, ODE | "
    )
    assert again[-1].startswith("Of 1 orderings of the paper: holds: ")


def test_a_folder_of_images_is_read_by_class(tmp_path):
    write_images(tmp_path / "images", *(f"{name}/{i}.png" for name in "ab" for i in range(4)))
    settings = {**paper_in_small.COMMON, **paper_in_small.folder_settings(str(tmp_path / "images"))}
    real = paper_in_small.read_images(settings)
    assert real.images.shape == (8, 16, 16, 3)
    assert real.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert paper_in_small.load(settings).data.classes == 2
