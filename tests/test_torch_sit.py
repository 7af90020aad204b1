"""The plain PyTorch model that the speed benchmark measures against is the same model.

Its forward pass, its loss and its update are equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.names import params_from_torch
from sit_jax import optimizer, settings, train_state, train_step
from sit_jax.models.conditioning import ClassLabels
from sit_jax.models.sit import SiT
from sit_jax.models.sizes import Size
from sit_jax.transport.paths import path_by_name
from tests.goldens import nhwc

pytestmark = pytest.mark.torch
SIZE = Size(depth=3, width=64, heads=4, patch=2)
INPUT, CHANNELS, CLASSES, BATCH = 8, 4, 10, 3


@pytest.fixture(scope="module")
def sides():
    """(torch's trainer, our model, its weights in our layout, torch's examples, our examples)."""
    torch = pytest.importorskip("torch")
    from tests import torch_sit

    torch.manual_seed(0)
    theirs = torch_sit.SiT(**vars(SIZE), input_size=INPUT, channels=CHANNELS, classes=CLASSES)
    state = {name: value.numpy().copy() for name, value in theirs.state_dict().items()}
    x1, x0 = torch.randn(2, BATCH, CHANNELS, INPUT, INPUT)
    examples = {
        "x1": x1,
        "x0": x0,
        "t": torch.rand(BATCH),
        "condition": torch.tensor([1, CLASSES, 4]),
    }
    ours = {
        name: jnp.asarray(nhwc(value.numpy()) if value.ndim == 4 else value.numpy())
        for name, value in examples.items()
    }
    model = SiT(SIZE, INPUT, CHANNELS, CLASSES)
    return torch_sit.Trainer(theirs), model, params_from_torch(state, SIZE), examples, ours


def test_forward_is_equal(sides):
    trainer, model, params, theirs, ours = sides
    want = nhwc(trainer.model(theirs["x1"], theirs["t"], theirs["condition"]).detach().numpy())
    out = jax.jit(model.apply)({"params": params}, ours["x1"], ours["t"], ours["condition"])
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=1e-5)


def test_one_training_step_is_equal(sides):
    trainer, model, params, theirs, ours = sides
    values = {
        "times": "uniform",
        "times_mean": 0.0,
        "times_std": 1.0,
        "label_dropout": 0.0,
        "conditioning": ClassLabels(CLASSES),
    }
    goal = train_step.Objective(path_by_name("Linear"), "velocity", "none", (0.0, 1.0), **values)
    tx = optimizer.make_optimizer(settings.Optimizer(learning_rate=1e-4), total_steps=2)

    def loss(params, examples):
        return train_step.batch_loss(
            lambda p, x, t, y: model.apply({"params": p}, x, t, y), goal, params, examples
        )

    state = train_state.init(lambda: jax.tree.map(jnp.asarray, params), tx)
    update = jax.jit(
        lambda s, e: train_step.update(s, e, loss=loss, optimizer=tx, ema_decay=0.9999)
    )
    for _ in range(2):  # the second loss sees the first update
        state, metrics = update(state, ours)
        assert float(metrics["loss"]) == pytest.approx(
            float(trainer.step(*theirs.values())), rel=1e-5
        )
    linear = trainer.model.blocks[1].mlp.fc1.weight
    ema = dict(zip([id(p) for p in trainer.trained], trainer.ema, strict=True))[id(linear)]
    np.testing.assert_allclose(
        state.params["blocks"]["mlp"]["fc1"]["kernel"][1], linear.detach().T, rtol=0, atol=2e-5
    )
    np.testing.assert_allclose(
        state.ema["blocks"]["mlp"]["fc1"]["kernel"][1], ema.T, rtol=0, atol=2e-7
    )
