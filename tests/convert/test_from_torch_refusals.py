"""from_torch: bad input is refused in one line, and nothing is lost or left behind."""

import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from convert import cli, from_torch
from sit_jax import lock, manifest, storage
from sit_jax.errors import UserError
from tests import checkpoints, goldens
from tests.convert.test_from_torch import opened, without

GOLDEN = str(goldens.FOLDER / "sit_train_ckpt.pt")


def with_nan(weights, name):
    weights[name].flat[[1, 5]] = np.nan, np.inf
    return weights


def with_two_step_counts(content):
    content["opt"]["state"][3]["step"] = np.array(9, np.float32)
    return content


def without_a_moment(content):
    del content["opt"]["state"][3]
    return content


def with_a_misshaped_moment(content):
    content["opt"]["state"][3]["exp_avg"] = np.zeros((2, 2), np.float32)
    return content


UNET = {
    "input_blocks.0.0.weight": np.zeros((8, 4, 3, 3), np.float32),
    "time_embed.0.bias": np.zeros(8, np.float32),
    "num_batches_tracked": np.array(0),
}
BARE, FULL = checkpoints.state_dict, checkpoints.training
BAD = {
    "a list": (lambda: [1, 2], {}, "holds list, not a state dict; expected tensors by name"),
    "no tensors": (
        lambda: {"epoch": 3, "history": [0.5, 0.4]},
        {},
        "is not a state dict: epoch, history is not a tensor",
    ),
    "a UNet": (
        lambda: UNET,
        {},
        "is not a SiT: it has no pos_embed and no x_embedder.proj.weight and .* "
        "3 tensors such as input_blocks",
    ),
    "no opt": (
        lambda: without(FULL(), "opt"),
        {},
        "incomplete training checkpoint: it has no opt, .* --weights ema or raw",
    ),
    "no ema": (
        lambda: without(FULL(), "ema", "opt"),
        {},
        "incomplete training checkpoint: it has no ema and no opt, .*--weights raw",
    ),
    "raw gone": (
        lambda: without(FULL(), "model"),
        {"weights": "raw"},
        "incomplete .*: it has no model, .* with --weights ema",
    ),
    "moments gone": (
        lambda: without_a_moment(FULL()),
        {},
        "opt of .* is not the complete AdamW state .*KeyError: 3",
    ),
    "two counts": (
        lambda: with_two_step_counts(FULL()),
        {},
        "opt of .* is not the complete AdamW state",
    ),
    "moment's shape": (
        lambda: with_a_misshaped_moment(FULL()),
        {},
        r"exp_avg of .* does not fit: t_embedder.mlp.0.weight has shape \[2, 2\], "
        r"expected \[16, 256\]",
    ),
    "weights of bare": (
        BARE,
        {"weights": "ema"},
        "holds only one set of weights; leave --weights out",
    ),
    "missing": (
        lambda: without(BARE(), "blocks.1.mlp.fc1.bias"),
        {},
        r"does not fit: blocks.1.mlp.fc1.bias is missing, expected shape \[64\]",
    ),
    "extra": (
        lambda: BARE() | {"head.bias": np.zeros(5, np.float32)},
        {},
        r"head.bias of shape \[5\] is unexpected",
    ),
    "mis-shaped": (
        lambda: BARE() | {"blocks.0.attn.proj.bias": np.zeros(5, np.float32)},
        {},
        r"blocks.0.attn.proj.bias has shape \[5\], expected \[16\]",
    ),
    "out features": (
        lambda: BARE() | {"final_layer.linear.weight": np.zeros((5, 16), np.float32)},
        {},
        r"final_layer.linear.weight has shape \[5, 16\], expected \[16, 16\], "
        r"or \[32, 16\] with learn_sigma",
    ),
    "no square": (
        lambda: BARE() | {"pos_embed": np.zeros((1, 15, 16), np.float32)},
        {},
        r"pos_embed has shape \[1, 15, 16\]; expected a square number of tokens, not 15",
    ),
    "NaN": (
        lambda: with_nan(BARE(), "blocks.1.mlp.fc1.weight"),
        {},
        "blocks.1.mlp.fc1.weight holds 2 NaN or infinite values of 1024",
    ),
    "NaN in EMA": (
        lambda: FULL() | {"ema": with_nan(BARE(), "x_embedder.proj.bias")},
        {},
        "ema of .*: x_embedder.proj.bias holds 2 NaN or infinite values of 16",
    ),
    "integers": (
        lambda: BARE() | {"x_embedder.proj.bias": np.zeros(16, np.int64)},
        {},
        "x_embedder.proj.bias holds int64 numbers; expected float32, float16, bfloat16 or float64",
    ),
    "heads unknown": (
        BARE,
        {"num_heads": None},
        "depth 2, width 16, patch 2 is not a published size, and .*; give --num_heads",
    ),
    "heads": (BARE, {"num_heads": 3}, "model width 16 is not divisible by its 3 heads"),
    "image size": (
        BARE,
        {"image_size": 100},
        "--image_size is 100; expected a multiple of 8 pixels",
    ),
    "image patch": (BARE, {"image_size": 72}, "input size 9 is not divisible by the patch size 2"),
    "classes": (BARE, {"num_classes": 0}, "--num_classes is 0; expected more than 0"),
    "override": (BARE, {"overrides": [("data.clases", "3")]}, "unknown config key 'data.clases'"),
    "network override": (
        BARE,
        {"overrides": [("model.depth", "3")]},
        "blocks.2.attn.qkv.weight is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    make, options, message = BAD[case]
    path = checkpoints.save(tmp_path / "x.pt", make())
    with pytest.raises(UserError, match=message) as caught:
        from_torch.convert(path, str(tmp_path / "run"), **({"num_heads": 2} | options))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("keep", [0, 50, 5000])
def test_a_truncated_safetensors_file_is_refused(tmp_path, keep):
    save_file(checkpoints.state_dict(0), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:keep])
    with pytest.raises(UserError, match="x.safetensors is not a readable safetensors file"):
        from_torch.convert(str(tmp_path / "x.safetensors"), str(tmp_path / "run"), num_heads=2)
    assert not (tmp_path / "run").exists()


def classes_of(run):
    return json.loads((run / "config.json").read_text())["data"]["classes"]


def test_an_existing_workdir_is_kept_until_a_complete_one_may_replace_it(tmp_path):
    old = checkpoints.save(tmp_path / "old.pt", checkpoints.state_dict(0, classes=4))
    bad = checkpoints.save(tmp_path / "bad.pt", with_nan(checkpoints.state_dict(0), "pos_embed"))
    new = checkpoints.save(tmp_path / "new.pt", checkpoints.state_dict(0, classes=6))
    run = tmp_path / "run"
    from_torch.convert(old, str(run), num_heads=2)
    with pytest.raises(
        UserError, match="run' already exists; give another name, or --overwrite to replace it"
    ):
        from_torch.convert(new, str(run), num_heads=2)
    with pytest.raises(UserError, match="pos_embed holds 2 NaN"):
        from_torch.convert(bad, str(run), num_heads=2, overwrite=True)
    assert classes_of(run) == 4 and opened(run)[1] == 0
    from_torch.convert(new, str(run), num_heads=2, overwrite=True)
    assert classes_of(run) == 6 and opened(run)[1] == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"old.pt", "bad.pt", "new.pt", "run"}
    with (
        lock.hold(epath.Path(run)),
        pytest.raises(UserError, match=f"run' is in use by process {os.getpid()} on "),
    ):
        from_torch.convert(old, str(run), num_heads=2, overwrite=True)
    # A conversion that was killed after it renamed the old workdir away.
    dead = subprocess.Popen(["true"])
    dead.wait()
    run.rename(tmp_path / f".run.{storage._HOST}-{dead.pid}-0123.old")
    with pytest.raises(UserError, match="run' already exists"):
        from_torch.convert(new, str(run), num_heads=2)
    assert classes_of(run) == 6 and opened(run)[1] == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    with pytest.raises(
        UserError, match="is a folder but not a workdir, so --overwrite does not replace it"
    ):
        from_torch.convert(new, str(photos), num_heads=2, overwrite=True)


def test_a_full_disk_is_refused_before_writing_and_leaves_nothing_while_writing(
    tmp_path, monkeypatch
):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0))
    with monkeypatch.context() as patch:
        patch.setattr(cli.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
        with pytest.raises(
            UserError, match="run' needs about 10.1 MB, but only 0.0 MB are free; make room"
        ):
            from_torch.convert(path, str(tmp_path / "run"), num_heads=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]
