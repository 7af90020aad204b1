"""settings: each value obeys its law and contradicts no other. A mistake is one line."""

import dataclasses
import math
import re

import pytest

from sit_jax import config as config_lib
from sit_jax import settings_help
from sit_jax.config import load
from sit_jax.errors import UserError
from sit_jax.laws import Between, Choice, declared
from sit_jax.settings import Config
from tests.test_config import DIGITS, refusal

BAD = [
    # (overrides, text that the message must contain)
    ({"model__name": "SiT-S/3"}, "unknown model.name 'SiT-S/3'; did you mean 'SiT-S/"),
    ({"model__depth": "0"}, "model.depth is 0; expected 1 to 1,000"),
    ({"model__heads": "-1"}, "model.heads is -1; expected 1 to 4,096"),
    ({"model__heads": "3"}, "model width 128 is not divisible by its 3 heads; choose a multiple"),
    ({"model__width": "6", "model__heads": "2"}, "model width 6 is not divisible by 4"),
    (
        {"model__remat": "half"},
        "unknown model.remat 'half'; known: 'none', 'dots', 'operands', 'full'",
    ),
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
        "transport.train_eps is 0.0; expected 1e-06 to 0.499",
    ),
    (
        {"transport__train_eps": "0.5"},
        "transport.train_eps is 0.5; expected 1e-06 to 0.499",
    ),
    (
        {"transport__sample_eps": "-0.1"},
        "transport.sample_eps is -0.1; expected 1e-06 to 0.499",
    ),
    (
        {"transport__sample_eps": "0.7"},
        "transport.sample_eps is 0.7; expected 1e-06 to 0.499",
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
    ({"sample__cfg_scale": "0.99"}, "sample.cfg_scale is 0.99; expected 1 to 1000"),
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
    ({"mesh__tensor": "-2"}, "mesh.tensor is -2; expected -1 to 65,536"),
    ({"mesh__fsdp": "-1"}, "more than one -1; leave at most one axis"),
    ({"train__label_dropout": "1.1"}, "train.label_dropout is 1.1; expected 0 to 0.99"),
    ({"train__ema_decay": "-0.1"}, "train.ema_decay is -0.1; expected 0 to 1"),
    ({"optimizer__b1": "2"}, "optimizer.b1 is 2.0; expected 0 to 0.999999"),
    ({"optimizer__b2": "1.5"}, "optimizer.b2 is 1.5; expected 0 to 0.999999"),
    ({"seed": "4294967296"}, "seed is 4294967296; expected 0 to 4,294,967,295"),
    (
        {"sample__seed": "4294967296"},
        "sample.seed is 4294967296; expected 0 to 4,294,967,295",
    ),
    ({"seed": "-1"}, "seed is -1; expected 0 to 4,294,967,295"),
    ({"sample__seed": "-1"}, "sample.seed is -1; expected 0 to 4,294,967,295"),
    ({"likelihood__solver": "shark"}, "'shark' solves an SDE, which gives no log p"),
    # Unknown keys and wrong types.
    ({"train__stpes": "3"}, "unknown config key 'train.stpes'; did you mean 'train.steps'"),
    ({"steps": "3"}, "unknown config key 'steps'; did you mean"),
    ({"train": "3"}, "unknown config key 'train'"),
    ({"train__steps": "many"}, "train.steps is 'many'; expected a whole number"),
    ({"train__steps": "1.5"}, "train.steps is 1.5; expected a whole number"),
    ({"train__steps": "True"}, "train.steps is True; expected a whole number"),
    ({"train__steps": "none"}, "train.steps and train.epochs are both none; set one of them"),
    (
        {"train__epochs": "80"},
        "train.steps 1800 and train.epochs 80.0 are both given; set train.steps=none to train for",
    ),
    (
        {"train__steps": "none", "train__epochs": "0"},
        "train.epochs is 0.0; expected 1e-06 to 1e+06",
    ),
    ({"train__batch": "none"}, "train.batch is None; expected a whole number"),
    (
        {"optimizer__learning_rate": "fast"},
        "optimizer.learning_rate is 'fast'; expected a finite number",
    ),
    (
        {"optimizer__learning_rate": "nan"},
        "optimizer.learning_rate is 'nan'; expected a finite number",
    ),
    ({"optimizer__clip_norm": "'1'"}, "optimizer.clip_norm is '1'; expected a finite number"),
    ({"data__flip": "1"}, "data.flip is 1; expected True or False"),
    ({"data__flip": "yes"}, "data.flip is 'yes'; expected True or False"),
    (
        {"sample__labels": "a,b"},
        "sample.labels is 'a,b'; expected a list of whole numbers such as 3,1,4",
    ),
    ({"sample__labels": "1,2.5"}, "sample.labels is (1, 2.5); expected a list of whole numbers"),
    ({"sample__labels": "none"}, "sample.labels is None; expected a list of whole numbers"),
]
NUMBERS = [entry for entry in declared(Config) if "number" in settings_help.type_name(entry.type)]
# Each was accepted, or ended in a traceback or in NaN.
BEYOND = {
    "optimizer.eps": "1e999",
    "optimizer.b1": "1",
    "optimizer.b2": "0.99999999",
    "optimizer.learning_rate": "1e-50",
    "optimizer.warmup_steps": "3000000000",
    "train.steps": "1" + "0" * 400,
    "train.batch": "-1" + "0" * 400,
    "train.label_dropout": "1",
    "transport.train_eps": "1e-12",
    "sample.time_shift": "1e999",
    "sample.times": "0,1e999",
    "sample.cfg_scale": "1" + "0" * 400,
    "sweep.rtols": "0.1,-1e999",
    "data.workers": "100000",
    "mesh.data": "1" + "0" * 30,
    "log.sheet_count": "9" * 5000,
}


@pytest.mark.parametrize(
    ("overrides", "words"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_value_is_one_line_with_value_and_expectation(overrides, words):
    assert words in refusal(DIGITS, **overrides)


@pytest.mark.parametrize("key", BEYOND)
def test_a_number_beyond_an_end_is_one_line(key):
    message = refusal(DIGITS, **{key: BEYOND[key]})
    assert re.match(rf"{key} (is|holds) \S+.*; expected .*(to|number)", message)


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 10**400, -(10**5000)],
    ids=["inf", "-inf", "nan", "big", "long"],
)
def test_infinity_and_nan_are_not_numbers_in_a_file_or_in_python_either(value):
    for entry in NUMBERS:
        values = dataclasses.asdict(Config())
        *sections, name = entry.key.split(".")
        section = values[sections[0]] if sections else values
        section[name] = (value,) if entry.key.startswith("sweep.") else value
        with pytest.raises(UserError, match=rf"^{entry.key} (is|holds) .*; expected") as caught:
            config_lib.from_values(values)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("entry", NUMBERS, ids=lambda entry: entry.key)
def test_every_number_has_two_ends_and_both_are_accepted(entry):
    law = entry.law
    assert isinstance(law, Between) and -math.inf < law.low < law.high < math.inf
    for end, beyond in ((law.low, law.low - 1), (law.high, law.high * 2 + 1)):
        law.check(entry.key, end)
        with pytest.raises(UserError, match=re.escape(f"expected {law.describe()}")):
            law.check(entry.key, beyond)


@pytest.mark.parametrize("entry", list(declared(Config)), ids=lambda entry: entry.key)
def test_every_setting_obeys_its_own_law(entry):
    """The default passes its law; a value that breaks the law is refused with the key's name."""
    entry.law.check(entry.key, entry.default)
    assert entry.help and not entry.help.endswith(".")
    if isinstance(entry.law, Choice):
        message = refusal(DIGITS, **{entry.key: "no-such-name"})
        if entry.key != "model.name":  # the message shortens this long list
            assert all(repr(name) in message for name in entry.law.names)
    elif isinstance(entry.law, Between):
        if entry.key == "transport.times_mean":
            return  # -7 is one
        message = refusal(DIGITS, **{entry.key: "-7"})
        assert f"expected {entry.law.describe()}" in message or entry.key == "sample.labels"
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
        "optimizer.b1": "0.999999",
        "optimizer.eps": "1e-30",
        "train.steps": "2147483647",
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
