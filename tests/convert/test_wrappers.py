"""Files that wrap a SiT: prefixes of names, dicts around the state dict, names of files."""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import cli, from_torch, inception, to_torch
from convert.checkpoint_file import read
from convert.names import unwrapped
from sit_jax.errors import UserError
from tests import checkpoints
from tests.convert.test_from_torch import assert_same, opened

AVERAGED = {"n_averaged": np.array(7)}


def prefixed(weights, prefix, inserted=""):
    """Return weights with a prefix, and with a part inserted behind `blocks.N.`."""
    names = {name: name.replace(".attn.", f".{inserted}attn.") for name in weights}
    return {prefix + names[name]: value for name, value in weights.items()}


WRAPPED = {
    "torch.compile": (("_orig_mod.",), {}),
    "DistributedDataParallel": (("module.",), {}),
    "Lightning": (("model.",), {}),
    "a trainer": (("net.",), {}),
    "both": (("module._orig_mod.",), {}),
    "the other way round": (("_orig_mod.module.",), {}),
    "AveragedModel": (("module.",), AVERAGED),
    "AveragedModel of a compiled one": (("module._orig_mod.",), AVERAGED),
    "three": (("model.module.net.",), {}),
    "compiled blocks": (("", "_orig_mod."), {}),
    "FSDP": (("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."), {}),
    "an unknown name": (("ema_model.",), {}),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_stripped_in_every_part(tmp_path, case):
    """And the moments, which go by number, stay."""
    how, more = WRAPPED[case]
    content = checkpoints.training()
    wrapped = content | {
        "ema": prefixed(content["ema"], *how) | more,
        "model": prefixed(content["model"], "_orig_mod."),
    }
    path = checkpoints.save(tmp_path / "x.pt", wrapped)
    source = read(path)
    for part, want in (("ema", content["ema"]), ("model", content["model"])):
        tensors = getattr(source, part)
        assert list(tensors) == list(want)
        for name, value in want.items():
            np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    bare = checkpoints.save(tmp_path / "bare.pt", wrapped["ema"])
    assert list(read(bare).ema) == list(content["ema"])


def test_a_wrapped_checkpoint_continues(tmp_path):
    content = checkpoints.training()
    wrapped = content | {
        "ema": prefixed(content["ema"], "module._orig_mod.") | AVERAGED,
        "model": prefixed(content["model"], "_orig_mod."),
    }
    path = checkpoints.save(tmp_path / "x.pt", wrapped)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    setup, step, state = opened(tmp_path / "run")
    assert step == 5 and state.opt_state[0].count == 5
    assert_same(state.params, content["model"], setup.size)
    assert_same(state.ema, content["ema"], setup.size)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["model.x_embedder.proj.weight", "ema.x_embedder.proj.weight"],
            "x.pt holds several networks: 'ema.', 'model.'; save the state dict of one",
        ),
        (
            ["model.x_embedder.proj.weight", "model.pos_embed", "vae.conv.weight"],
            "x.pt holds a network under 'model.', and besides it vae.conv.weight; save",
        ),
        (
            ["x_embedder.proj.weight", "_orig_mod.x_embedder.proj.weight"],
            "x.pt holds several networks",
        ),
        (
            ["x_embedder.proj.weight", "_orig_mod.pos_embed", "pos_embed"],
            "x.pt holds a network under '', and besides it names twice",
        ),
    ],
)
def test_names_that_are_not_one_wrapped_network_are_named(names, message):
    with pytest.raises(UserError, match=message):
        unwrapped("x.pt", names)


def test_other_names_stay_as_they_are():
    names = ["pos_embed", "x_embedder.proj.weight", "head.weight", "n_averaged"]
    assert unwrapped("x.pt", names) == {name: name for name in names}
    assert unwrapped("x.pt", ["a.b", "c"]) == {"a.b": "a.b", "c": "c"}


DICTS = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "loss": 0.5},
    "Lightning": lambda w: {
        "state_dict": prefixed(w, "model."),
        "callbacks": {"a": {"best": 1.0}},
        "hyper_parameters": {"width": 16},
    },
    "only the model": lambda w: {"model": w},
    "only the ema": lambda w: {"ema": w, "step": 7},
    "net": lambda w: {"net": prefixed(w, "module."), "optimizer": {"param_groups": [1]}},
    "params_ema": lambda w: {"params_ema": w},
}


@pytest.mark.parametrize("case", DICTS)
def test_the_only_state_dict_of_a_file_is_converted(tmp_path, capsys, case):
    weights = checkpoints.state_dict(0)
    content = DICTS[case](weights)
    path = checkpoints.save(tmp_path / "x.pt", content)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    setup, step, state = opened(tmp_path / "run")
    assert_same(state.ema, weights, setup.size)
    key = next(iter(content))
    assert f"note: the file's one state dict, {key!r}, is converted\n" in capsys.readouterr().out
    assert step == 0


def test_args_beside_the_only_state_dict_count(tmp_path):
    weights, args = checkpoints.state_dict(0), {"path_type": "GVP", "prediction": "velocity"}
    path = checkpoints.save(tmp_path / "x.pt", {"state_dict": weights, "args": args})
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert opened(tmp_path / "run")[0].config.transport.path == "GVP"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            lambda w: {"params": w, "params_ema": w},
            {},
            "x.pt holds several state dicts: params, params_ema; save one of them",
        ),
        (lambda w: {"state_dict": w}, {"weights": "ema"}, "leave --weights out"),
        (lambda w: {"model": w, "params_ema": w}, {}, "it has no ema and no opt"),
        (lambda w: {"epoch": 3, "history": [1, 2]}, {}, "epoch, history is not a tensor"),
    ],
)
def test_dicts_that_do_not_say_which_are_refused(tmp_path, content, options, message):
    path = checkpoints.save(tmp_path / "x.pt", content(checkpoints.state_dict(0)))
    with pytest.raises(UserError, match=message):
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2, **options)


def test_args_that_are_a_list_are_not_used(tmp_path, capsys):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.training() | {"args": [1, 2]})
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    printed = capsys.readouterr().out
    assert "note: args is a list, not a Namespace or a dict: it is not used" in printed
    assert opened(tmp_path / "run")[1] == 5


@pytest.mark.parametrize(
    "name", ["X.PT", "x.pth", "x.ckpt", "x.bin", "x", "X.SAFETENSORS", "x.safetensors", "y.pt"]
)
def test_the_content_decides_and_not_the_suffix(tmp_path, name):
    weights = checkpoints.state_dict(0)
    path = str(tmp_path / name)
    if "safetensors" in name.lower() or name == "y.pt":  # the last one is misnamed
        save_file(weights, path)
    else:
        checkpoints.save(path, weights)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert (tmp_path / "run" / "config.json").exists()


def test_to_torch_takes_upper_case(tmp_path):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0))
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    for name in ("Y.PT", "Y.SAFETENSORS"):
        to_torch.convert(str(tmp_path / "run"), str(tmp_path / name))
        assert len(read(str(tmp_path / name)).ema) == 32


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("pt", np.int32),
        ("pt", np.uint8),
        ("safetensors", np.int32),
        ("safetensors", np.bool_),
        # test_torch_file.py reads it from a file that torch wrote.
        ("safetensors", ml_dtypes.float8_e4m3fn),
    ],
)
def test_numbers_that_are_no_weights_are_named_before_anything_is_written(
    tmp_path, capsys, suffix, dtype
):
    weights = checkpoints.state_dict(0)
    weights["blocks.0.mlp.fc1.bias"] = weights["blocks.0.mlp.fc1.bias"].astype(dtype)
    path = str(tmp_path / f"x.{suffix}")
    save_file(weights, path) if suffix == "safetensors" else checkpoints.save(path, weights)
    with pytest.raises(UserError, match="quantised weights are not converted") as caught:
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert f"blocks.0.mlp.fc1.bias holds {np.dtype(dtype)} numbers" in str(caught.value)
    assert "writing" not in capsys.readouterr().out


def test_what_is_not_a_file_is_refused_with_what_to_give(tmp_path):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0))
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        ".": "is a folder; give a file in it: x.pt",
        "empty": "empty' is a folder; give a .pt or .safetensors file",
        "run": "run' is a workdir of this project; sample it, or train on, as it is",
        "pipe": "pipe' is not a regular file",
        "missing.pt": "missing.pt' does not exist",
    }.items():
        given = str(pathlib.Path(tmp_path, name))
        for convert in (
            lambda given: from_torch.convert(given, str(tmp_path / "new")),
            lambda given: inception.convert(
                given, str(tmp_path / "new.safetensors"), any_weights=True
            ),
            cli.check_input,
        ):
            with pytest.raises(UserError, match=message):
                convert(given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("channels", [2, 5, 8, 16, 32])
def test_channels_without_a_codec_are_refused_before_anything_is_written(tmp_path, channels):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0, channels=channels))
    message = (
        f"takes {channels} channels; expected 1 or 3, pixels, or 4, latents of Stable Diffusion's "
        "autoencoder: there is no codec for other latents yet"
    )
    with pytest.raises(UserError, match=message):
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(("channels", "codec"), [(1, "pixels"), (3, "pixels"), (4, "sd-vae")])
def test_channels_with_a_codec(tmp_path, channels, codec):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0, channels=channels))
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert opened(tmp_path / "run")[0].config.latents.codec == codec
