"""Label tables with and without a null row: which rows are classes, and what is recorded."""

import numpy as np
import pytest

from convert import from_torch, to_torch
from convert.names import LABEL_TABLE
from convert.torch_file import read_torch_file
from sit_jax.errors import UserError
from tests import checkpoints
from tests.convert.test_from_torch import as_state_dict, opened

# (args, rows, --num_classes) -> (classes, label dropout, whether the file has a null row, words)
NO_NULL = "each of the {} rows of the label table is a class"
LAST = "the last of the {} rows of the label table is taken for the null label"
TABLES = {
    "the reference": ({"num_classes": 10}, 11, None, (10, 0.1, True, "")),
    "no dropout": ({"num_classes": 11}, 11, None, (11, 0, False, NO_NULL)),
    "dropout 0": (
        {"num_classes": 11, "class_dropout_prob": 0},
        11,
        None,
        (11, 0, False, NO_NULL),
    ),
    "dropout 0, classes unknown": ({"class_dropout_prob": 0.0}, 5, None, (5, 0, False, NO_NULL)),
    "dropout 0, with a null row": (
        {"num_classes": 10, "class_dropout_prob": 0},
        11,
        None,
        (10, 0, True, "no label was dropped in training"),
    ),
    "dropout 0.2": ({"num_classes": 4, "class_dropout_prob": 0.2}, 5, None, (4, 0.2, True, "")),
    "one class": ({"num_classes": 1}, 1, None, (1, 0, False, NO_NULL)),
    "one class and null": ({"num_classes": 1}, 2, None, (1, 0.1, True, "")),
    "bare": (None, 11, None, (10, 0.1, True, LAST)),
    "bare, all are classes": (None, 11, 11, (11, 0, False, NO_NULL)),
    "bare, one class": (None, 1, 1, (1, 0, False, NO_NULL)),
    "args of another table": ({"num_classes": 1000}, 11, None, (10, 0.1, True, LAST)),
    "changed": ({"num_classes": 10}, 11, 11, (11, 0.1, None, "initialised again for 11 instead")),
    "no null, changed": ({"num_classes": 11}, 11, 3, (3, 0.1, None, "again for 3 instead of 11")),
}


@pytest.mark.parametrize("case", TABLES)
def test_which_rows_are_classes(tmp_path, capsys, case):
    args, rows, num_classes, (classes, dropout, has_null, words) = TABLES[case]
    weights = checkpoints.state_dict(0, classes=rows - 1)
    content = weights
    if args is not None:
        content = checkpoints.training(classes=rows - 1) | {"args": args}
        weights = content["model"]
    path = checkpoints.save(tmp_path / "x.pt", content)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, num_classes=num_classes)
    printed = capsys.readouterr().out
    assert words.format(rows) in printed
    if not words:
        assert LAST[:20] not in printed and NO_NULL[:10] not in printed
    setup, step, state = opened(tmp_path / "run")
    config = setup.config
    assert (config.data.classes, config.train.label_dropout) == (classes, dropout)
    assert config.sample.cfg_scale == (4.0 if dropout else 1.0)
    table = as_state_dict(state.params, setup.size)[LABEL_TABLE]
    assert table.shape == (classes + 1, 16)
    if has_null is not None:
        np.testing.assert_array_equal(table[:rows], weights[LABEL_TABLE])
        assert has_null or not table[-1].any()
        assert step == (0 if args is None else 5)


def test_a_table_of_one_row_asks_for_the_flag(tmp_path):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0, classes=0))
    with pytest.raises(UserError, match="has 1 row; if it is a class, .*give --num_classes 1"):
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert not (tmp_path / "run").exists()


def test_moments_get_a_null_row_too_and_all_of_it_comes_back(tmp_path):
    content = checkpoints.training(classes=9) | {"args": {"num_classes": 10}}
    path = checkpoints.save(tmp_path / "x.pt", content)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "y.pt"))
    back = read_torch_file(str(tmp_path / "y.pt"))
    number = list(back["model"]).index(LABEL_TABLE)
    want = content["opt"]["state"][number]
    for have, expected in (
        (back["model"][LABEL_TABLE], content["model"][LABEL_TABLE]),
        (back["opt"]["state"][number]["exp_avg"], want["exp_avg"]),
        (back["opt"]["state"][number]["exp_avg_sq"], want["exp_avg_sq"]),
    ):
        np.testing.assert_array_equal(np.asarray(have)[:-1], expected)
        assert have.shape[0] == 11 and not np.asarray(have)[-1].any()
    from_torch.convert(str(tmp_path / "y.pt"), str(tmp_path / "again"))
    assert opened(tmp_path / "again")[0].config == opened(tmp_path / "run")[0].config
