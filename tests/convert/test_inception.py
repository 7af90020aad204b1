"""pytorch-fid's Inception weights keep every name and shape in a safetensors file."""

import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import inception
from sit_jax.errors import UserError
from tests import checkpoints, goldens


@pytest.fixture(scope="module")
def weights():
    return {
        name: np.full(shape, zlib.crc32(name.encode()) / 2**32, np.float32)
        for name, shape in inception.expected_shapes().items()
    }


def test_the_names_and_shapes_are_the_networks():
    manifest = json.loads((goldens.FOLDER / "inception.golden.json").read_text())
    want = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    assert inception.expected_shapes() == want and len(want) == 472


def test_every_tensor_arrives(tmp_path, weights):
    # torchvision's counter, which inference does not use.
    counters = {"Mixed_7c.branch_pool.bn.num_batches_tracked": np.array(0)}
    path = checkpoints.save(tmp_path / "in.pth", weights | counters)
    out = tmp_path / "out.safetensors"
    inception.convert(path, str(out))
    tensors = load_file(out)
    assert tensors.keys() == weights.keys()
    for name, want in weights.items():
        np.testing.assert_array_equal(tensors[name], want, err_msg=name)
    with pytest.raises(UserError, match="already exists; give another name, or --overwrite"):
        inception.convert(path, str(out))


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, weights):
    cases = [
        (
            {**weights, "fc.bias": np.zeros(1000, np.float32)},
            r"fc.bias has shape \[1000\], expected \[1008\]",
        ),
        (
            {n: w for n, w in weights.items() if n != "fc.bias"},
            r"fc.bias is missing, expected shape \[1008\]",
        ),
        (
            {**weights, "AuxLogits.fc.bias": np.zeros(3)},
            r"AuxLogits.fc.bias of shape \[3\] is unexpected",
        ),
        (
            {**weights, "fc.bias": np.full(1008, np.nan, np.float32)},
            "fc.bias holds NaN or infinite values",
        ),
        ([1], "holds list, not a state dict"),
    ]
    for content, message in cases:
        path = checkpoints.save(tmp_path / "in.pth", content)
        with pytest.raises(UserError, match=message):
            inception.convert(path, str(tmp_path / "out.safetensors"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["in.pth"]
    with pytest.raises(UserError, match="expected NAME.safetensors"):
        inception.convert(path, str(tmp_path / "out.pt"))
