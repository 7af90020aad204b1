"""The two files of an autoencoder in diffusers' layout: config.json and the safetensors.

They come from a folder or from Hugging Face. Attention layers have two naming schemes, both read:
to_q, to_k, ..., and the older query, key, ... of the published files.
"""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from sit_jax.errors import UserError, check, require
from sit_jax.latents.autoencoder import VaeArchitecture

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DEFAULT = "stabilityai/sd-vae-ft-ema"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published autoencoder of the default `VaeArchitecture`, pinned to a revision."""

    revision: str
    weights_sha256: str
    weights_bytes: int = 334_643_276


# Their encoders are bitwise equal; -mse decodes the same latents more smoothly.
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
class VaeFiles:
    """The place of the two files: the folder `path`, or else a Hugging Face repository at a commit.

    The default repository is sd-vae-ft-ema. The default commit is the one in PUBLISHED.
    """

    path: str | None = None
    repo: str | None = None
    revision: str | None = None

    @property
    def published(self) -> Published | None:
        """The entry in PUBLISHED, unless the files are in a folder or in another repository."""
        return None if self.path else PUBLISHED.get(self.repo or _DEFAULT)

    def locate(self, name: str) -> epath.Path:
        """Return the path of a file, fetched into Hugging Face's cache if it is not in a folder.

        Raises UserError that says which file to put where, if it cannot be found.
        """
        if self.path is None:
            return epath.Path(self._fetch(name))
        file = epath.Path(self.path) / name
        check(
            file.exists(),
            f"latents.path {self.path!r} has no {name}; expected a folder with {CONFIG} and "
            f"{WEIGHTS}, such as those of https://huggingface.co/{_DEFAULT}",
        )
        return file

    def _fetch(self, name: str) -> str:
        # Imported here because it takes a while, and neither pixels nor a folder needs it.
        import huggingface_hub

        repo = self.repo or _DEFAULT
        published = self.published
        commit = require(
            self.revision or (published.revision if published else None),
            f"latents.repo {repo!r} needs latents.revision, a commit of it: a branch may change "
            "under a run",
        )
        try:
            return huggingface_hub.hf_hub_download(repo, name, revision=commit)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            identity = ""
            if published and commit == published.revision:
                identity = (
                    f" ({published.weights_bytes:,} bytes, sha256 {published.weights_sha256})"
                )
            raise UserError(
                f"{name} of {repo} could not be fetched ({reason}); without a network, put "
                f"{CONFIG} and {WEIGHTS}{identity} from "
                f"https://huggingface.co/{repo}/tree/{commit} into a folder and set latents.path "
                "to it"
            ) from error


def read_architecture(source: VaeFiles, scale: float) -> VaeArchitecture:
    """Return the architecture that config.json describes; a published one needs no file.

    Raises UserError if it is a different network, or its latents have a different scale.
    """
    if source.published:
        return VaeArchitecture()
    file = source.locate(CONFIG)
    try:
        config = json.loads(file.read_text())
        check(isinstance(config, dict), "it holds no settings")
        return _architecture(config, scale)
    # A ValueError is text that is not UTF-8 or not JSON, or a setting that `_architecture` refuses.
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a usable {CONFIG} of a VAE: {error}") from error


# Settings of diffusers that must have these values.
_REQUIRED = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
# Settings that must have these values if given; older files lack them.
_REQUIRED_IF_GIVEN = {
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_COUNTS = (
    "layers_per_block",
    "norm_num_groups",
    "latent_channels",
    "in_channels",
    "out_channels",
)
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def _architecture(config: dict[str, Any], scale: float) -> VaeArchitecture:
    given = {key: value for key, value in _REQUIRED_IF_GIVEN.items() if key in config}
    for key, value in (_REQUIRED | given).items():
        check(config.get(key) == value, f"{key} is {config.get(key)!r}; expected {value!r}")
    for key in _COUNTS:
        value = config.get(key)
        check(
            type(value) is int and value > 0, f"{key} is {value!r}; expected a whole number above 0"
        )
    groups = config["norm_num_groups"]
    blocks = _block_channels(config, groups)
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
    return VaeArchitecture(
        block_out_channels=blocks,
        layers_per_block=config["layers_per_block"],
        norm_num_groups=groups,
        latent_channels=config["latent_channels"],
        image_channels=channels,
    )


def _block_channels(config: dict[str, Any], groups: int) -> tuple[int, ...]:
    blocks = config.get("block_out_channels")
    if not (
        isinstance(blocks, list)
        and blocks
        and all(type(n) is int and n > 0 and n % groups == 0 for n in blocks)
    ):
        raise UserError(
            f"block_out_channels is {blocks!r}; expected a list of multiples of norm_num_groups, "
            f"{groups}"
        )
    for key, block in _BLOCK_TYPES.items():
        check(
            config.get(key) == [block] * len(blocks),
            f"{key} is {config.get(key)!r}; expected {len(blocks)} {block}",
        )
    return tuple(blocks)


def read_params(source: VaeFiles, abstract: Any) -> Any:
    """Read a tree like `abstract` from the safetensors: float32 NumPy arrays in our layouts.

    Raises UserError if the file is missing or damaged, and for tensors that are missing, unknown,
    of a different shape or not finite.
    """
    file = source.locate(WEIGHTS)
    try:
        tensors = safetensors.numpy.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); get a complete copy of it") from error
    except KeyError as error:  # a type that NumPy lacks
        raise UserError(f"{file} holds {error.args[0]} numbers; expected F32 or F16") from error
    renamed = {_current_name(name): tensor for name, tensor in tensors.items()}
    return from_tensors(renamed, abstract, str(file))


def from_tensors(tensors: dict[str, np.ndarray], abstract: Any, file: str) -> Any:
    """Return a tree like `abstract` from tensors by their current names.

    Raises UserError, which names `file`, as `read_params` does.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    shapes = {torch_name(path): leaf.shape for path, leaf in paths}
    missing = sorted(shapes.keys() - tensors)
    unknown = sorted(tensors.keys() - shapes)
    advice = f"expected the weights that belong to its {CONFIG}"
    check(
        not missing,
        f"{file} lacks {len(missing)} of {len(shapes)} tensors: {_first_three(missing)}; {advice}",
    )
    check(
        not unknown,
        f"{file} holds {len(unknown)} unknown tensors: {_first_three(unknown)}; {advice}",
    )
    leaves = [_to_leaf(tensors[name], shape, name, file) for name, shape in shapes.items()]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _to_leaf(tensor: np.ndarray, shape: tuple[int, ...], name: str, file: str) -> np.ndarray:
    expected = torch_shape(shape)
    if len(shape) == 2 and tensor.shape[2:] == (1, 1):
        # Some files hold attention's linear layers as convolutions.
        tensor = tensor[:, :, 0, 0]
    check(
        tensor.shape == expected,
        f"{file}: {name} is {list(tensor.shape)}; expected {list(expected)}",
    )
    check(
        np.isfinite(tensor).all(),
        f"{file}: {name} holds NaN or infinite values; get an undamaged copy",
    )
    return np.ascontiguousarray(_our_layout(tensor), np.float32)


def _our_layout(tensor: np.ndarray) -> np.ndarray:
    """Transpose [out, in, h, w] -> [h, w, in, out], or [out, in] -> [in, out]."""
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that `_our_layout` turns into `shape`."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def torch_name(path: tuple) -> str:
    """Map encoder/mid_block/resnets_0/norm1/scale -> encoder.mid_block.resnets.0.norm1.weight."""
    *modules, leaf = (key.key for key in path)
    names = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*names, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _current_name(name: str) -> str:
    """Map mid_block.attentions.0.query.weight -> mid_block.attentions.0.to_q.weight."""
    head, layer, leaf = ["", *name.rsplit(".", 2)][-3:]
    return f"{head}.{OLD_NAMES[layer]}.{leaf}" if layer in OLD_NAMES else name


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
