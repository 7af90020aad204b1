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
from sit_jax.laws import Choice, anything, declared
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
    assert re.search(
        r"c\.py cannot be used as a config: TypeError: .*argument", refusal(file() + ":x")
    )


BAD = [
    # (overrides, text that the message must contain)
    ({"model__name": "SiT-S/3"}, "unknown model.name 'SiT-S/3'; did you mean 'SiT-S/"),
    ({"model__depth": "0"}, "model.depth is 0; expected more than 0"),
    ({"model__heads": "-1"}, "model.heads is -1; expected more than 0"),
    ({"model__heads": "3"}, "model width 128 is not divisible by its 3 heads; choose a multiple"),
    ({"model__width": "6", "model__heads": "2"}, "model width 6 is not divisible by 4"),
    ({"model__remat": "half"}, "unknown model.remat 'half'; known: 'none', 'dots', 'full'"),
    ({"transport__path": "Liner"}, "unknown transport.path 'Liner'; did you mean 'Linear'?"),
    (
        {"transport__prediction": "velocty"},
        "unknown transport.prediction 'velocty'; did you mean 'velocity'?",
    ),
    (
        {"transport__loss_weight": "snr"},
        "unknown transport.loss_weight 'snr'; known: 'none', 'velocity', 'likelihood'",
    ),
    (
        {"transport__loss_weight": "velocity"},
        "'velocity' does nothing to a velocity prediction; use 'none', or",
    ),
    (
        {"transport__train_eps": "0"},
        "transport.train_eps is 0.0; expected a number inside (0, 0.5)",
    ),
    (
        {"transport__train_eps": "0.5"},
        "transport.train_eps is 0.5; expected a number inside (0, 0.5)",
    ),
    (
        {"transport__sample_eps": "-0.1"},
        "transport.sample_eps is -0.1; expected a number inside (0, 0.5)",
    ),
    (
        {"transport__sample_eps": "0.7"},
        "transport.sample_eps is 0.7; expected a number inside (0, 0.5)",
    ),
    (
        {"transport__times": "logitnormal"},
        "unknown transport.times 'logitnormal'; did you mean 'logit-normal'?",
    ),
    ({"data__source": "digit"}, "unknown data.source 'digit'; did you mean 'digits'?"),
    ({"latents__codec": "pixel"}, "unknown latents.codec 'pixel'; did you mean 'pixels'?"),
    (
        {"latents__path": "vae", "latents__repo": "a/b"},
        "latents.path 'vae' and latents.repo 'a/b' are both given; set",
    ),
    ({"latents__dtype": "half"}, "unknown latents.dtype 'half'; known: 'float32', 'bfloat16'"),
    (
        {"optimizer__schedule": "cosin"},
        "unknown optimizer.schedule 'cosin'; did you mean 'cosine'?",
    ),
    (
        {"sample__weights": "emas"},
        "unknown sample.weights 'emas'; did you mean 'ema'? known: 'ema', 'raw'",
    ),
    (
        {"sample__solver": "dopri"},
        "unknown sample.solver 'dopri'; did you mean 'dopri8' or 'dopri5'",
    ),
    ({"sample__cfg_scale": "0.99"}, "sample.cfg_scale is 0.99; expected 1 (no guidance) or more"),
    ({"precision__compute": "bf16"}, "unknown precision.compute 'bf16'; did you mean 'bfloat16'?"),
    (
        {"precision__grad_reduce": "bfloat16"},
        "precision.grad_reduce is 'bfloat16', but gradients are computed in",
    ),
    (
        {"precision__matmul": "max"},
        "unknown precision.matmul 'max'; known: 'default', 'high', 'highest'",
    ),
    (
        {"train__batch": "10", "train__accumulation": "4"},
        "train.batch 10 is not divisible by train.accumulation 4;",
    ),
    ({"sample__labels": "3,10"}, "sample.labels holds 10; expected 0 to 9 (data.classes)"),
    ({"sample__labels": "-1"}, "sample.labels holds -1; expected 0 to 9 (data.classes)"),
    ({"mesh__data": "0"}, "mesh.data is 0; expected 1 or more, or -1"),
    ({"mesh__tensor": "-2"}, "mesh.tensor is -2; expected 1 or more, or -1"),
    ({"mesh__fsdp": "-1"}, "more than one -1; leave at most one axis"),
    ({"train__label_dropout": "1.1"}, "train.label_dropout is 1.1; expected a number from 0 to 1"),
    ({"train__ema_decay": "-0.1"}, "train.ema_decay is -0.1; expected a number from 0 to 1"),
    ({"optimizer__b1": "2"}, "optimizer.b1 is 2.0; expected a number from 0 to 1"),
    ({"optimizer__b2": "1.5"}, "optimizer.b2 is 1.5; expected a number from 0 to 1"),
    ({"seed": "4294967296"}, "seed is 4294967296; expected 0 or more, and less than 2**32"),
    (
        {"sample__seed": "4294967296"},
        "sample.seed is 4294967296; expected 0 or more, and less than 2**32",
    ),
    ({"seed": "-1"}, "seed is -1; expected 0 or more, and less than 2**32"),
    ({"sample__seed": "-1"}, "sample.seed is -1; expected 0 or more, and less than 2**32"),
    ({"likelihood__solver": "shark"}, "'shark' solves an SDE, which gives no log p"),
    # Unknown keys and wrong types.
    ({"train__stpes": "3"}, "unknown config key 'train.stpes'; did you mean 'train.steps'"),
    ({"steps": "3"}, "unknown config key 'steps'; did you mean"),
    ({"train": "3"}, "unknown config key 'train'"),
    ({"train__steps": "many"}, "train.steps is 'many'; expected a whole number"),
    ({"train__steps": "1.5"}, "train.steps is 1.5; expected a whole number"),
    ({"train__steps": "True"}, "train.steps is True; expected a whole number"),
    ({"train__steps": "none"}, "train.steps is None; expected a whole number"),
    ({"optimizer__learning_rate": "fast"}, "optimizer.learning_rate is 'fast'; expected a number"),
    ({"optimizer__learning_rate": "nan"}, "optimizer.learning_rate is 'nan'; expected a number"),
    ({"optimizer__clip_norm": "'1'"}, "optimizer.clip_norm is '1'; expected a number"),
    ({"data__flip": "1"}, "data.flip is 1; expected True or False"),
    ({"data__flip": "yes"}, "data.flip is 'yes'; expected True or False"),
    (
        {"sample__labels": "a,b"},
        "sample.labels is 'a,b'; expected a list of whole numbers such as 3,1,4",
    ),
    ({"sample__labels": "1,2.5"}, "sample.labels is (1, 2.5); expected a list of whole numbers"),
    ({"sample__labels": "none"}, "sample.labels is None; expected a list of whole numbers"),
]
POSITIVE = [
    "data.image_size",
    "data.channels",
    "data.classes",
    "latents.scale",
    "latents.batch",
    "train.steps",
    "train.batch",
    "train.accumulation",
    "optimizer.learning_rate",
    "optimizer.eps",
    "optimizer.clip_norm",
    "transport.times_std",
    "sample.steps",
    "sample.atol",
    "sample.rtol",
    "sample.count",
    "sample.batch",
    "sample.columns",
    "sample.scale",
    "sample.cfg_channels",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "log.every",
    "log.sheet_count",
]
NOT_NEGATIVE = [
    "data.workers",
    "train.skip_nonfinite",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "log.sheet_every",
]


@pytest.mark.parametrize(
    ("overrides", "words"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_value_is_one_line_with_value_and_expectation(overrides, words):
    assert words in refusal(DIGITS, **overrides)


@pytest.mark.parametrize("text", ["0", "-3"])
@pytest.mark.parametrize("key", POSITIVE)
def test_counts_and_scales_are_more_than_0(key, text):
    assert re.fullmatch(
        rf"{key} is {text}(\.0)?; expected more than 0", refusal(DIGITS, **{key: text})
    )


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_some_numbers_may_be_0_and_not_less(key):
    assert re.fullmatch(rf"{key} is -1(\.0)?; expected 0 or more", refusal(DIGITS, **{key: "-1"}))
    assert config_lib.flatten(load(DIGITS, [(key, "0")]))[key] == 0


# A value that breaks each law, keyed by the law's `expected`.
BREAKS = {
    "more than 0": "0",
    "0 or more": "-1",
    "0 or more, and less than 2**32": "-1",
    "a number from 0 to 1": "1.5",
    "2 or more, or none": "1",
    "2 or more, as a Frechet distance needs": "1",
    "1 (no guidance) or more": "0.5",
    "1 or more, or -1 for the remaining devices": "0",
    "a number inside (0, 0.5): give one, or none for the path's default": "0.5",
    "a number inside (0, 1), or sample.last_step=none": "1.0",
}


@pytest.mark.parametrize("entry", list(declared(Config)), ids=lambda entry: entry.key)
def test_every_setting_obeys_its_own_law(entry):
    """The default passes its law; a value that breaks the law is refused with the key's name."""
    entry.law.check(entry.key, entry.default)
    assert entry.help and not entry.help.endswith(".")
    if isinstance(entry.law, Choice):
        message = refusal(DIGITS, **{entry.key: "no-such-name"})
        if entry.key != "model.name":  # the message shortens this long list
            assert all(repr(name) in message for name in entry.law.names)
    elif entry.law is not anything:
        message = refusal(DIGITS, **{entry.key: BREAKS[entry.law.expected]})
        assert f"expected {entry.law.expected}" in message
    else:
        return
    assert entry.key in message


def test_values_at_the_boundary_are_accepted():
    accepted = {
        "transport.train_eps": "0.499",
        "sample.cfg_scale": "1",
        "sample.labels": "0,9",
        "train.label_dropout": "0",
        "train.ema_decay": "1",
        "train.accumulation": "128",
        "seed": "4294967295",
    }
    flat = config_lib.flatten(load(DIGITS, list(accepted.items())))
    assert flat["sample.labels"] == (0, 9)
    assert flat["transport.train_eps"] == 0.499
    assert flat["seed"] == 2**32 - 1
    weighted = load(
        DIGITS, [("transport.prediction", "noise"), ("transport.loss_weight", "velocity")]
    )
    assert weighted.transport.loss_weight == "velocity"


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
            "optimizer.learning_rate is nan; expected more than 0",
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
    assert "other.json cannot be read as a recorded config" in refusal(str(tmp_path / "other.json"))


def test_a_recorded_config_is_checked_as_a_file_is(tmp_path):
    values = json.loads(config_lib.to_json(Config()))
    values["train"]["steps"] = -1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert refusal(str(tmp_path / "config.json")) == "train.steps is -1; expected more than 0"


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
    fixed = {key for key in keys if not key.startswith(config_lib.CHANGEABLE)}
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
        "data.split",
        "data.image_size",
        "data.channels",
        "data.classes",
        "data.flip",
        "latents.codec",
        "latents.repo",
        "latents.revision",
        "latents.dtype",
        "latents.scale",
        "train.batch",
        "train.accumulation",
        "train.label_dropout",
        "train.ema_decay",
        "optimizer.schedule",
        "optimizer.warmup_steps",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "precision.compute",
        "precision.matmul",
        "precision.grad_reduce",
    }
    network = {key for key in keys if key.startswith(config_lib.NETWORK)}
    assert network == {key for key in keys if key.startswith("model.")} | {
        "transport.path",
        "transport.prediction",
        "data.image_size",
        "data.channels",
        "data.classes",
        "latents.codec",
        "latents.scale",
    }
