"""The two files of an autoencoder in diffusers' layout: config.json and the safetensors, from a folder or Hugging Face.

Attention has two namings, to_q ... and the older query ... of the published files; both are read.
"""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from sit_jax.errors import UserError, check
from sit_jax.latents.autoencoder import Architecture

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_DEFAULT = "stabilityai/sd-vae-ft-ema"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published autoencoder of the default `Architecture`; both files of its revision are known."""

    revision: str
    weights_sha256: str
    weights_bytes: int = 334_643_276


# Their encoders are equal to the bit: -mse is the same latents, decoded more smoothly.
PUBLISHED = {
    _DEFAULT: Published(
        "f04b2c4b98319346dad8c65879f680b1997b204a",
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    "stabilityai/sd-vae-ft-mse": Published(
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the two files are: in the folder `path`, or else in a Hugging Face repository at a commit.

    The repository is sd-vae-ft-ema unless given, the commit that of PUBLISHED.
    """

    path: str | None = None
    repo: str | None = None
    revision: str | None = None

    @property
    def published(self) -> Published | None:
        return None if self.path else PUBLISHED.get(self.repo or _DEFAULT)

    def locate(self, name: str) -> epath.Path:
        """The file, fetched into Hugging Face's cache if it is not there. `UserError` says what to bring where."""
        if self.path is None:
            return epath.Path(self._fetch(name))
        file = epath.Path(self.path) / name
        expected = f"expected a folder with {CONFIG} and {WEIGHTS}, such as those of https://huggingface.co/{_DEFAULT}"
        check(file.exists(), f"latents.path {self.path!r} has no {name}; {expected}")
        return file

    def _fetch(self, name: str) -> str:
        import huggingface_hub  # here: it takes a while to import, and pixels or a folder need none of it

        repo, known = self.repo or _DEFAULT, self.published
        commit = self.revision or (known and known.revision)
        check(
            commit,
            f"latents.repo {repo!r} needs latents.revision, a commit of it: a branch may change under a run",
        )
        try:
            return huggingface_hub.hf_hub_download(repo, name, revision=commit)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            of = ""
            if known and commit == known.revision:
                of = f" ({known.weights_bytes:,} bytes, sha256 {known.weights_sha256})"
            raise UserError(
                f"{name} of {repo} could not be fetched ({reason}); without a network, bring {CONFIG} and {WEIGHTS}"
                f"{of} from https://huggingface.co/{repo}/tree/{commit} into a folder and set latents.path to it"
            ) from error


def read_architecture(source: Source, scale: float) -> Architecture:
    """What config.json describes; that of a published repository is known, and needs no file.

    `UserError` if it is another network, or one whose latents have another scale.
    """
    if source.published:
        return Architecture()
    file = source.locate(CONFIG)
    try:
        config = json.loads(file.read_text())
        check(isinstance(config, dict), "it holds no settings")
        return _architecture(config, scale)
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: not UTF-8, not JSON, or what _architecture refuses
        raise UserError(f"{file} is no {CONFIG} of a VAE that can be used: {error}") from error


# Settings of diffusers that may have one value here; the second half is not in older files.
_NEEDED = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
_NEEDED_IF_THERE = {
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def _architecture(config: dict, scale: float) -> Architecture:
    needed = _NEEDED | {key: value for key, value in _NEEDED_IF_THERE.items() if key in config}
    for key, value in needed.items():
        check(config.get(key) == value, f"{key} is {config.get(key)!r}; expected {value!r}")
    for key in (
        "layers_per_block",
        "norm_num_groups",
        "latent_channels",
        "in_channels",
        "out_channels",
    ):
        value = config.get(key)
        check(
            type(value) is int and value > 0, f"{key} is {value!r}; expected a whole number above 0"
        )
    blocks, groups = config.get("block_out_channels"), config["norm_num_groups"]
    check(
        isinstance(blocks, list)
        and blocks
        and all(type(n) is int and n > 0 and n % groups == 0 for n in blocks),
        f"block_out_channels is {blocks!r}; expected a list of multiples of norm_num_groups, {groups}",
    )
    for key, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        check(
            config.get(key) == [block] * len(blocks),
            f"{key} is {config.get(key)!r}; expected {len(blocks)} {block}",
        )
    channels = config["in_channels"]
    check(
        config["out_channels"] == channels,
        f"out_channels is {config['out_channels']}; expected in_channels, {channels}",
    )
    stated = config.get("scaling_factor", scale)
    check(
        stated == scale,
        f"scaling_factor is {stated}, but latents.scale is {scale}; set latents.scale={stated}",
    )
    return Architecture(
        tuple(blocks), config["layers_per_block"], groups, config["latent_channels"], channels
    )


def read_params(source: Source, abstract: Any) -> Any:
    """A tree like `abstract` from the safetensors, float32 NumPy arrays in our layouts.

    `UserError` if the file is not there or not whole, and for tensors that are missing, unknown, of another shape or
    not finite.
    """
    file = source.locate(WEIGHTS)
    try:
        tensors = safetensors.numpy.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); bring a whole copy of it") from error
    except KeyError as error:  # a type that NumPy lacks
        raise UserError(f"{file} holds {error.args[0]} numbers; expected F32 or F16") from error
    return from_tensors(
        {_current_name(name): tensor for name, tensor in tensors.items()}, abstract, str(file)
    )


def from_tensors(tensors: dict[str, np.ndarray], abstract: Any, file: str) -> Any:
    """As `read_params`, from tensors by their current names."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {torch_name(path): leaf.shape for path, leaf in paths}
    missing, unknown = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    advice = f"expected the weights that belong to its {CONFIG}"
    check(
        not missing,
        f"{file} lacks {len(missing)} of {len(wanted)} tensors: {_some(missing)}; {advice}",
    )
    check(not unknown, f"{file} holds {len(unknown)} unknown tensors: {_some(unknown)}; {advice}")
    leaves = []
    for name, shape in wanted.items():
        tensor, expected = tensors[name], torch_shape(shape)
        if len(shape) == 2 and tensor.shape[2:] == (
            1,
            1,
        ):  # some files hold attention's linear layers as convolutions
            tensor = tensor[:, :, 0, 0]
        check(
            tensor.shape == expected,
            f"{file}: {name} is {list(tensor.shape)}; expected {list(expected)}",
        )
        check(
            np.isfinite(tensor).all(),
            f"{file}: {name} holds NaN or infinite values; bring an undamaged copy",
        )
        leaves.append(np.ascontiguousarray(_our_layout(tensor), np.float32))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _our_layout(tensor: np.ndarray) -> np.ndarray:
    """[out, in, h, w] -> [h, w, in, out], [out, in] -> [in, out]."""
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that becomes `shape` by `_our_layout`."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def torch_name(path: tuple) -> str:
    """encoder/mid_block/resnets_0/norm1/scale -> encoder.mid_block.resnets.0.norm1.weight."""
    *modules, leaf = (key.key for key in path)
    names = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*names, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _current_name(name: str) -> str:
    """encoder.mid_block.attentions.0.query.weight -> encoder.mid_block.attentions.0.to_q.weight."""
    head, layer, leaf = ["", *name.rsplit(".", 2)][-3:]
    return f"{head}.{OLD_NAMES[layer]}.{leaf}" if layer in OLD_NAMES else name


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
