"""config: values pass unchanged through files, flags and JSON.

Each mistake is reported in one line with the value and what was expected.
"""

import dataclasses
import json
import pathlib
import re

import pytest

from sit_jax import config as config_lib
from sit_jax.config import load
from sit_jax.errors import UserError
from sit_jax.laws import in_group
from sit_jax.settings import Config

DIGITS = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "digits.py")
HEAD = "from sit_jax.config import default\n"


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a config file around a body of get_config."""

    def write(*body, arguments="", name="c.py"):
        indented = "".join(
            f"    {line}\n" for line in ["config = default()", *body, "return config"]
        )
        (tmp_path / name).write_text(f"{HEAD}def get_config({arguments}):\n{indented}")
        return str(tmp_path / name)

    return write


def refusal(spec, **overrides):
    """Return the message by which load refuses; overrides are written model__depth="3"."""
    with pytest.raises(UserError) as caught:
        load(spec, [(key.replace("__", "."), text) for key, text in overrides.items()])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_a_file_that_changes_nothing_gives_the_defaults(file):
    assert load(file()) == Config()


def test_a_files_values_are_kept(file):
    body = (
        "config.model.update(name='SiT-XL/2', depth=3)",
        "config.sample.labels = [1, 2]",
        "config.seed = 7",
    )
    expected = dataclasses.replace(
        Config(),
        seed=7,
        model=dataclasses.replace(Config().model, name="SiT-XL/2", depth=3),
        sample=dataclasses.replace(Config().sample, labels=(1, 2)),
    )
    assert load(file(*body)) == expected


def test_a_config_survives_json_unchanged(tmp_path):
    config = load(
        DIGITS,
        [("sample.labels", "3,1,4"), ("optimizer.clip_norm", "1"), ("precision.matmul", "high")],
    )
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    assert load(str(tmp_path / "config.json")) == config
    assert config != load(DIGITS)
    assert load(str(tmp_path / "config.json"), [("seed", "5")]).seed == 5


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "12", 12),
        ("train.steps", "400_000", 400_000),
        ("optimizer.learning_rate", "2e-3", 0.002),
        ("optimizer.weight_decay", "1", 1.0),
        ("data.flip", "True", True),
        ("data.flip", "true", True),
        ("log.tensorboard", "False", False),
        ("model.name", "SiT-B/4", "SiT-B/4"),
        ("model.remat", "none", "none"),
        ("data.path", "/data/123", "/data/123"),
        ("data.path", "123", "123"),
        ("data.path", "true", "true"),
        ("data.path", "None", None),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.clip_norm", "1", 1.0),
        ("model.depth", "2", 2),
        ("model.depth", "None", None),
        ("sample.labels", "3,1,4", (3, 1, 4)),
        ("sample.labels", "[3, 1]", (3, 1)),
        ("sample.labels", "7", (7,)),
        ("sample.labels", "()", ()),
    ],
)
def test_an_override_becomes_the_value_it_stands_for(key, text, value):
    loaded = config_lib.flatten(load(DIGITS, [(key, text)]))[key]
    assert loaded == value and type(loaded) is type(value)


def test_every_setting_can_be_given_as_a_flag_with_its_current_value():
    """`none` is a valid name for some settings and means None for others."""
    config = load(DIGITS)
    texts = [(key, str(value)) for key, value in config_lib.flatten(config).items()]
    assert len(texts) > 60
    assert load(DIGITS, texts) == config


def test_the_last_override_wins():
    assert load(DIGITS, [("seed", "1"), ("seed", "2")]).seed == 2


def test_a_file_may_take_an_argument(file):
    spec = file("config.model.name = size or 'SiT-S/8'", arguments="size=None")
    assert load(f"{spec}:SiT-B/8").model.name == "SiT-B/8"
    assert load(spec).model.name == "SiT-S/8"
    assert "c.py has no variants; give --config" in refusal(file() + ":x")
    spec = file("1 / 0", arguments="size")
    assert "c.py with the variant 'x' cannot be used as a config: ZeroDiv" in refusal(f"{spec}:x")
    assert "c.py cannot be used as a config: TypeError: get_config() missing" in refusal(spec)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.train.stepz = 3", "unknown config key 'train.stepz'; did you mean 'train.steps'"),
        ("config.trian = 3", "unknown config key 'trian'"),
        (
            "config.model.update(dept=3)",
            "unknown config key 'model.dept'; did you mean 'model.depth'",
        ),
        ("config.train.steps = '3'", "train.steps is '3'; expected a whole number"),
        ("config.train.steps = 3.0", "train.steps is 3.0; expected a whole number"),
        (
            "config.optimizer.learning_rate = float('nan')",
            "optimizer.learning_rate is nan; expected a finite number",
        ),
        ("config.model = 'SiT-S/2'", "model is 'SiT-S/2'; expected the model settings"),
        (
            "del config.train.steps",
            "config key train.steps is missing; start from sit_jax.config.default()",
        ),
        (
            "config.transport.path = 'linear'",
            "unknown transport.path 'linear'; did you mean 'Linear'?",
        ),
        ("1 / 0", "c.py cannot be used as a config: ZeroDivisionError: division by zero"),
        (
            "raise ValueError('two\\nlines')",
            "c.py cannot be used as a config: ValueError: two lines",
        ),
        (
            "import no_such_module",
            "c.py cannot be used as a config: ModuleNotFoundError: No module named 'no_such",
        ),
        ("config = None", "c.py cannot be used as a config: AttributeError"),
        ("x = (", "c.py cannot be used as a config: SyntaxError"),
    ],
)
def test_a_mistake_inside_a_config_file_is_one_line(file, line, words):
    assert words in refusal(file(line))


def test_a_file_that_is_not_a_config_is_one_line(tmp_path):
    (tmp_path / "empty.py").write_text("")
    assert re.search(
        r"empty\.py cannot be used as a config: .*get_config", refusal(str(tmp_path / "empty.py"))
    )
    message = refusal(str(tmp_path / "none.py"))
    assert "none.py' does not exist; expected a file such as configs/digits.py" in message
    assert "variant.py' does not exist" in refusal(str(tmp_path / "variant.py:x"))


@pytest.mark.parametrize("text", ["", '{"seed": 1', "[]", "5"])
def test_a_damaged_recorded_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json cannot be read as a recorded config (" in refusal(
        str(tmp_path / "config.json")
    )


def test_a_setting_newer_than_a_recorded_config_has_its_default(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 3, "model": {"depth": 2}}')
    config = config_lib.load(str(tmp_path / "config.json"))
    assert (config.seed, config.model.depth, config.model.name) == (3, 2, Config().model.name)


def test_a_missing_recorded_config_is_one_line(tmp_path):
    assert "other.json' does not exist; expected a recorded" in refusal(
        str(tmp_path / "other.json")
    )


def test_a_recorded_config_is_checked_as_a_file_is(tmp_path):
    values = json.loads(config_lib.to_json(Config()))
    values["train"]["steps"] = -1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert (
        refusal(str(tmp_path / "config.json")) == "train.steps is -1; expected 1 to 2,147,483,647"
    )


def test_changes_name_each_key_with_both_values():
    old = load(DIGITS)
    other = {
        "model.depth": "3",
        "transport.path": "GVP",
        "train.batch": "64",
        "seed": "1",
        "train.steps": "9",
    }
    changes = config_lib.changes(old, load(DIGITS, list(other.items())))
    assert changes == {
        "seed": (0, 1),
        "model.depth": (4, 3),
        "transport.path": ("Linear", "GVP"),
        "train.steps": (1800, 9),
        "train.batch": (128, 64),
    }
    assert config_lib.changes(old, old) == {}


def test_a_continued_run_and_its_samples_keep_these_settings():
    """Each fixed key is listed, so that a new setting has to be put into one of the groups."""
    keys = set(config_lib.flatten(Config()))
    fixed = {key for key in keys if not in_group(key, config_lib.CHANGEABLE)}
    assert fixed == {
        "seed",
        "model.name",
        "model.depth",
        "model.width",
        "model.heads",
        "model.patch",
        "model.qk_norm",
        "model.learn_sigma",
        "transport.path",
        "transport.prediction",
        "transport.loss_weight",
        "transport.train_eps",
        "transport.times",
        "transport.times_mean",
        "transport.times_std",
        "data.source",
        "data.name",
        "data.split",
        "data.image_size",
        "data.channels",
        "data.classes",
        "data.flip",
        "data.exif_orientation",
        "latents.codec",
        "latents.repo",
        "latents.revision",
        "latents.dtype",
        "latents.scale",
        "train.batch",
        "train.label_dropout",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.eps",
    }
    network = {key for key in keys if in_group(key, config_lib.NETWORK)}
    assert network == {key for key in keys if key.startswith("model.")} | {
        "train.label_dropout",
        "transport.path",
        "transport.prediction",
        "data.image_size",
        "data.channels",
        "data.classes",
        "latents.codec",
        "latents.scale",
    }
