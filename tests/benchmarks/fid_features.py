"""Inception features of uint8 images, ours beside pytorch-fid's network in PyTorch.

    python tests/benchmarks/fid.py --only features

Takes about 4 minutes on 2 idle cores and needs PyTorch. Both sides read the same random weights
and 48 images of 256x256, resize as pytorch-fid does, and compute in float32. PyTorch computes
them at once (pytorch-fid's default is 50), ours in the batches of --mode evaluate. Ours gives the
spatial features and the logits too. The ratio is pytorch-fid's time over ours. Beforehand the
features are compared.
"""

import argparse
import sys

import numpy as np

from tests.benchmarks import sides

TARGETS = {"features": 1.2}  # PyTorch's time over ours
_AGREEMENT = 1e-4  # of the features, relative to the largest


def run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=48, help="images (default: %(default)s)")
    if "--side" not in sys.argv and "--help" not in sys.argv and "-h" not in sys.argv:
        _check_agreement()
    sides.run(parser, {"PyTorch": pytorch, "ours": ours}, TARGETS, memory=False)


def weights() -> dict[str, np.ndarray]:
    """Return random weights in pytorch-fid's format that keep activations near 1."""
    from sit_jax.metrics import inception

    draw = np.random.default_rng(0)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("conv.weight"):
            scale = (2 / np.prod(shape[1:])) ** 0.5
            return (scale * draw.standard_normal(shape)).astype(np.float32)
        ones = name.endswith(("bn.weight", "running_var"))
        return (ones + 0.1 * draw.random(shape)).astype(np.float32)

    return {name: tensor(name, shape) for name, shape in inception.file_shapes().items()}


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)


def _our_features(batch: int):
    """Return the function () -> pool features [b, 2048]."""
    import jax

    from sit_jax import runtime, sharding
    from sit_jax.jobs.evaluation.feature_sets import choose_batch
    from sit_jax.metrics import inception
    from sit_jax.metrics.features import EXTRACTORS

    runtime.keep_host_memory()
    params = jax.device_put(inception.fold(weights()))
    apply = jax.jit(EXTRACTORS["inception-pytorch-fid"].apply)
    size = choose_batch(sharding.make_mesh(1, 1, 1))
    parts = np.split(images(batch), range(size, batch, size))
    return lambda: np.concatenate([np.asarray(apply(params, part)["pool"]) for part in parts])


def _torch_features(batch: int):
    """Return the function () -> pool features [b, 2048]."""
    import torch

    from tests import torch_inception

    net = torch_inception.Inception().eval()
    state = {name: torch.from_numpy(array) for name, array in weights().items()}
    missing, unknown = net.load_state_dict(state, strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in missing)
    images_bchw = torch.from_numpy(images(batch)).movedim(3, 1).contiguous()

    @torch.inference_mode()
    def features():
        return net(images_bchw.float() / 255).numpy()

    return features


def ours(options: argparse.Namespace) -> sides.Calls:
    """Run the extractor of sit_jax."""
    return {"features": _our_features(options.batch)}


def pytorch(options: argparse.Namespace) -> sides.Calls:
    """Run pytorch-fid's network."""
    return {"features": _torch_features(options.batch)}


def _check_agreement() -> None:
    """Stop unless both sides give the same features."""
    ours_bd, theirs_bd = _our_features(2)(), _torch_features(2)()
    difference = np.abs(ours_bd - theirs_bd).max() / np.abs(theirs_bd).max()
    print(f"largest difference of the features: {difference:.1e} of the largest feature")
    if not difference < _AGREEMENT:
        sys.exit("error: the sides do not give the same features")
