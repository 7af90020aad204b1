"""The autoencoder against diffusers' own, its codec, and the refusal of unusable files."""

import json
import pathlib
import shutil

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sit_jax.errors import UserError
from sit_jax.latents import files
from sit_jax.latents.autoencoder import AutoencoderKL, VaeArchitecture
from sit_jax.latents.sd_vae import VaeOptions, open_sd_vae
from sit_jax.record import ArraySpec
from tests import goldens
from tests.goldens import nhwc, relative_error

SCALE = 0.18215
LEGACY = goldens.FOLDER / "vae_legacy"
each_case = pytest.mark.parametrize(
    "case", goldens.cases("vae", "vae"), ids=lambda case: case["name"]
)


def open_codec(**options):
    return open_sd_vae(VaeOptions(**options))


def spec(*image_shape):
    return {"image": ArraySpec(image_shape, np.uint8)}


def records(x_bhwc):
    """Return records whose images `normalise` maps to x."""
    return {"image": (x_bhwc + 1) * 127.5}


def sd_vae(folder=LEGACY, **changes):
    return open_codec(path=str(folder), **changes)


def arrays_of(case):
    arrays = goldens.load("vae")[1]
    return {
        name: arrays[key] if name.endswith("nhwc") else nhwc(arrays[key])
        for name, key in case["arrays"].items()
    }


# Equality with diffusers


@each_case
def test_posterior_and_decoder_equal_diffusers(case):
    folder, arrays = goldens.FOLDER / case["folder"], arrays_of(case)
    architecture = files.read_architecture(files.VaeFiles(str(folder)), SCALE)
    vae, params = AutoencoderKL(architecture), sd_vae(folder).load()
    mean, logvar = jnp.split(
        vae.apply({"params": params}, arrays["x"], method="encode"), 2, axis=-1
    )
    # Some 30 layers of float32 sums in another order: measured 6e-7 to 2e-6.
    assert relative_error(mean, arrays["mean"]) < 1e-5
    assert relative_error(logvar, arrays["logvar"]) < 1e-5
    assert (
        relative_error(
            vae.apply({"params": params}, arrays["z"], method="decode"), arrays["decoded"]
        )
        < 1e-5
    )
    assert architecture.factor == case["downsampling"]
    assert sd_vae(folder).shape(spec(*arrays["x"].shape[1:])) == arrays["mean"].shape[1:]


@each_case
def test_the_codec_draws_scales_and_decodes_as_diffusers(case, monkeypatch):
    arrays, codec = arrays_of(case), sd_vae(goldens.FOLDER / case["folder"])
    params = codec.load()
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape, dtype: key.reshape(shape))
        x = codec.encode(params, arrays["noise"], records(arrays["x"]))
    assert relative_error(x, arrays["scaled_latent"]) < 1e-5
    assert relative_error(codec.decode(params, x), arrays["round_trip"]) < 1e-5
    assert codec.scale == SCALE


def test_the_log_variance_is_clamped():
    params = sd_vae().load()
    params["quant_conv"]["bias"] = np.repeat(np.float32([0, 1000, -1000]), [4, 2, 2])
    vae = AutoencoderKL(files.read_architecture(files.VaeFiles(str(LEGACY)), SCALE))
    logvar = vae.apply({"params": params}, jnp.zeros((1, 12, 12, 3)), method="encode")[..., 4:]
    assert np.all(logvar[..., :2] == 20) and np.all(logvar[..., 2:] == -30)


def test_bfloat16_is_near_float32_and_computes_in_it():
    arrays, codec = arrays_of(goldens.cases("vae", "vae")[1]), sd_vae(dtype="bfloat16")
    params = codec.load()
    error = relative_error(codec.decode(params, arrays["scaled_latent"]), arrays["round_trip"])
    assert 1e-4 < error < 0.03  # 8 bits of mantissa; measured 0.015
    lowered = jax.jit(codec.decode).lower(params, arrays["scaled_latent"]).as_text()
    convolutions = [line for line in lowered.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("xbf16>" in line.split("->")[1] for line in convolutions)


def test_float32_is_full_precision_whatever_the_step_around_it_says():
    codec = sd_vae()
    with jax.default_matmul_precision("default"):
        lowered = (
            jax.jit(codec.decode).lower(codec.abstract_params, jnp.zeros((1, 6, 6, 4))).as_text()
        )
    products = [
        x
        for x in lowered.splitlines()
        if "stablehlo.convolution" in x or "stablehlo.dot_general" in x
    ]
    assert len(products) > 10 and all("HIGHEST" in line for line in products)


# The published architecture


def test_the_published_vae_needs_no_file_for_its_shapes():
    codec = open_codec()
    assert codec.shape(spec(256, 256, 3)) == (32, 32, 4) and codec.shape(spec(512, 512, 3)) == (
        64,
        64,
        4,
    )
    # What the published file holds: 334,643,276 bytes, 27,824 of them its header.
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(codec.abstract_params))
        == (334_643_276 - 27_824) // 4
        == 83_653_863
    )


def test_a_config_of_the_published_files_describes_the_default_architecture(tmp_path):
    config = json.loads((LEGACY / "config.json").read_text())
    for key, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        config[key] = [block] * 4
    config |= {
        "block_out_channels": [128, 256, 512, 512],
        "norm_num_groups": 32,
        "sample_size": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert files.read_architecture(files.VaeFiles(str(tmp_path)), SCALE) == VaeArchitecture()


# The codec


def test_a_draw_is_a_function_of_its_key():
    codec, images = sd_vae(), jnp.zeros((4, 12, 12, 3))
    encode = jax.jit(codec.encode)
    draws = [
        encode(codec.load(), jax.random.split(jax.random.key(seed), 4), records(images))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2]) and not np.array_equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("rows", [4, 7])
def test_parts_change_nothing_but_the_memory(rows):
    x = jax.random.normal(jax.random.key(0), (rows, 8, 8, 4))
    whole, parts = sd_vae(batch=64), sd_vae(batch=2)
    params = whole.load()
    # Other blocks of the same convolution: only rounding differs.
    assert relative_error(parts.decode(params, x), whole.decode(params, x)) < 1e-5


def test_memory_is_bounded_by_the_parts():
    x = jax.ShapeDtypeStruct((64, 32, 32, 4), jnp.float32)

    def temporaries(batch):
        codec = sd_vae(batch=batch)
        return (
            jax.jit(codec.decode)
            .lower(codec.abstract_params, x)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporaries(2) < 0.25 * temporaries(64)


# Unusable files


@pytest.fixture
def folder(tmp_path):
    """A copy that a test may break."""
    return pathlib.Path(shutil.copytree(LEGACY, tmp_path / "vae"))


def refusal(folder, **changes):
    """Return the message, after checking that it is one line and names the folder."""
    with pytest.raises(UserError) as caught:
        sd_vae(folder, **changes).load()
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def same(a, b):
    """Return True if two trees of weights are equal to the bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def rewrite(folder, change):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def test_attention_kept_as_convolutions_is_the_same(folder):
    def as_convolutions(tensors):
        for name in [name for name in tensors if "attentions" in name and tensors[name].ndim == 2]:
            tensors[name] = tensors[name][:, :, None, None]

    rewrite(folder, as_convolutions)
    assert same(sd_vae(folder).load(), sd_vae().load())


def test_half_precision_is_read(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update({n: t.astype(np.float16) for n, t in tensors.items()}),
    )
    after, before = sd_vae(folder).load(), sd_vae().load()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)),
        after,
        before,
    )


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert (
        f"has no {name}; expected a folder with config.json and diffusion_pytorch_model.safetensors"
        in refusal(folder)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "_class_name is 'UNet2DConditionModel'; expected 'AutoencoderKL'",
        ),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; expected 'silu'"),
        ({"use_quant_conv": False}, "use_quant_conv is False; expected True"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False; expected True"),
        ({"shift_factor": 0.1159}, "shift_factor is 0.1159; expected None"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "expected 2 DownEncoderBlock2D",
        ),
        (
            {"scaling_factor": 0.13025},
            "scaling_factor is 0.13025, but latents.scale is 0.18215; set latents.scale=0.13",
        ),
        (
            {"norm_num_groups": 3},
            "block_out_channels is [8, 16]; expected a list of multiples of norm_num_groups, 3",
        ),
        ({"block_out_channels": 8}, "block_out_channels is 8; expected a list"),
        ({"layers_per_block": "2"}, "layers_per_block is '2'; expected a whole number above 0"),
        ({"out_channels": 4}, "out_channels is 4; expected in_channels, 3"),
    ],
)
def test_another_network_is_named(folder, change, words):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert words in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x80"])
def test_a_file_that_is_not_a_config_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    assert "config.json is not a usable config.json of a VAE: " in refusal(folder)


def test_the_folders_scale_is_taken_when_the_setting_is_the_same(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.13025}))
    assert sd_vae(folder, scale=0.13025).scale == 0.13025


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(folder, share):
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    message = refusal(folder)
    assert "cannot be read (" in message and "get a complete copy of it" in message


def test_numbers_that_are_not_read_are_named(folder):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(2)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert "holds BF16 numbers; expected F32 or F16" in refusal(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    def rename(tensors):
        tensors["decoder.conv_in.wait"] = tensors.pop("decoder.conv_in.weight")

    rewrite(folder, rename)
    assert (
        "lacks 1 of 156 tensors: decoder.conv_in.weight; expected the weights that belong"
        in refusal(folder)
    )
    rewrite(
        folder,
        lambda tensors: tensors.update({"decoder.conv_in.weight": tensors["decoder.conv_in.wait"]}),
    )
    assert "holds 1 unknown tensors: decoder.conv_in.wait" in refusal(folder)
    rewrite(folder, lambda tensors: tensors.pop("decoder.conv_in.wait"))
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"decoder.conv_in.weight": np.zeros((16, 4, 1, 1), np.float32)}
        ),
    )
    assert "decoder.conv_in.weight is [16, 4, 1, 1]; expected [16, 4, 3, 3]" in refusal(folder)
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"decoder.conv_in.weight": np.zeros((16, 4, 3, 3), np.float32)}
        ),
    )
    rewrite(folder, lambda tensors: tensors["encoder.conv_out.bias"].__setitem__(3, np.nan))
    assert "encoder.conv_out.bias holds NaN or infinite values" in refusal(folder)


def test_images_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="data.channels is 1, but this VAE encodes 3; set it to 3"):
        sd_vae().shape(spec(12, 12, 1))
    with pytest.raises(
        UserError,
        match="data.image_size is 250, but one cell of this VAE is 8 pixels; make it a multiple "
        "of 8",
    ):
        open_codec().shape(spec(250, 250, 3))


# From a repository


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of Hugging Face, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", ["ema", "mse"])
def test_without_a_network_the_error_says_what_to_bring_where(hub, kind):
    repo = f"stabilityai/sd-vae-ft-{kind}"
    codec = open_codec(repo=repo)
    with pytest.raises(UserError) as caught:
        codec.load()
    message, known = str(caught.value), files.PUBLISHED[repo]
    assert "\n" not in message
    assert f"of {repo} could not be fetched" in message and "set latents.path to it" in message
    assert (
        "put config.json and diffusion_pytorch_model.safetensors (334,643,276 bytes, sha256 "
        in message
    )
    commit = f"https://huggingface.co/{repo}/tree/{known.revision}"
    assert f"{known.weights_sha256}) from {commit} into a folder" in message


def test_an_unknown_repository_needs_a_revision(hub):
    with pytest.raises(
        UserError, match="latents.repo 'me/mine' needs latents.revision, a commit of it"
    ):
        open_codec(repo="me/mine")
    with pytest.raises(
        UserError,
        match="config.json of me/mine could not be fetched .*me/mine/tree/abc into a folder",
    ):
        open_codec(repo="me/mine", revision="abc")


def test_files_in_the_cache_are_used_without_a_network(hub):
    commit = "0123456789" * 4
    shutil.copytree(LEGACY, hub / "models--me--mine" / "snapshots" / commit)
    codec = open_codec(repo="me/mine", revision=commit)
    assert same(codec.load(), sd_vae().load())
