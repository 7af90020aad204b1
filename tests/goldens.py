"""The golden arrays of the PyTorch reference, in our layouts; tests/golden/README.md lists them."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from convert.names import params_from_torch
from convert.torch_file import read_torch_file
from sit_jax.models.sit import SiT
from sit_jax.models.sizes import Size
from sit_jax.sampling.guidance import in_two_calls, with_guidance
from sit_jax.transport.paths import Path, path_by_name
from sit_jax.transport.prediction import Predict

FOLDER = pathlib.Path(__file__).parent / "golden"
SIZE = Size(depth=3, width=48, heads=4, patch=2)
CLASSES = 10


@functools.cache
def load(name: str) -> tuple[dict, np.lib.npyio.NpzFile]:
    """Return (manifest, arrays) of a fixture."""
    return json.loads((FOLDER / f"{name}.golden.json").read_text()), np.load(FOLDER / f"{name}.npz")


def cases(name: str, kind: str) -> list[dict]:
    """Return the cases of one kind in a fixture, which must have at least one."""
    of_kind = [case for case in load(name)[0]["cases"] if case["kind"] == kind]
    assert of_kind, f"{name} has no case of kind {kind}"
    return of_kind


def parameters(cases: list[dict], *combinations: tuple[str, ...]) -> list:
    """Return the cases as pytest's parameters.

    A case is slow if each of its combinations of fields has occurred in earlier cases.
    """
    seen = set()
    params = []
    for case in cases:
        values = {(fields, tuple(case.get(field) for field in fields)) for fields in combinations}
        marks = [pytest.mark.slow] if values <= seen else []
        params.append(pytest.param(case, id=case["name"], marks=marks))
        seen |= values
    return params


@functools.cache
def params(file: str, entry: str | None) -> dict:
    """Return the weights in a file, or in one entry of it, in our layout."""
    content = read_torch_file(str(FOLDER / file))
    return params_from_torch(content[entry] if entry else content, SIZE)


@functools.cache
def model(learn_sigma: bool) -> SiT:
    """Return the network of the fixtures."""
    return SiT(SIZE, 8, 4, CLASSES, learn_sigma=learn_sigma)


def bare() -> tuple[SiT, dict]:
    """Return the model and weights of every fixture except `model` and `train`."""
    return model(True), params("sit_bare.pt", None)


@functools.cache
def labelled(y: tuple[int, ...]) -> Predict:
    """Return the network of `bare` with labels y.

    All cases share one trace of it, which saves a sixth of their time.
    """
    net, params = bare()
    return jax.jit(lambda x, t: net.apply({"params": params}, x, t, np.array(y)))


def sampling(case: dict, y: np.ndarray) -> tuple[Path, Predict, int]:
    """Return a sampling case's path, network (guided if the case is) and number of samples.

    With guidance the reference doubles the batch: labels y, then null labels. The samples are the
    first half.
    """
    n = len(y) // 2 if case["cfg_scale"] else len(y)
    predict = labelled(tuple(y[:n]))
    if case["cfg_scale"]:
        both = in_two_calls(predict, labelled(tuple(y[n:])))
        predict = with_guidance(predict, both, case["cfg_scale"], channels=3)
    return path_by_name(case["path_type"]), predict, n


def nhwc(x: np.ndarray) -> np.ndarray:
    """Move channels last: [..., c, h, w] -> [..., h, w, c]."""
    return np.moveaxis(x, -3, -1)


def relative_error(ours, theirs) -> float:
    """Return the largest difference divided by the largest value.

    float32 rounding is relative to the largest summand, not to each value.
    """
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
