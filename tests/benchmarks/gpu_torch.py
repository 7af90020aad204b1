"""The programs of PyTorch that gpu_speed.py times: tests/torch_sit.py, compiled or eager."""

import functools
import pathlib
import tempfile
from collections.abc import Callable

import torch

from sit_jax.models.sizes import size_by_name
from tests import torch_sit
from tests.benchmarks import gpu_kernels
from tests.benchmarks.gpu_sides import SCALE, UNITS, Task
from tests.benchmarks.torch_speed import CHANNELS, CLASSES, INPUT, examples

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start() -> None:
    """Allow TF32, as the published script does."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def prepare(task: Task) -> Callable[[], float]:
    """Return the program of a task."""
    # With static shapes, as a second batch size would otherwise make them dynamic.
    compiles = task.side == "torch.compile"
    model = _network(task.model)
    model = torch.compile(model, dynamic=False) if compiles else model
    return {"training": _training, "sampling": _sampling}[task.part](task, model)


@functools.cache
def _network(model: str) -> torch_sit.SiT:
    """Return the network, which all samplers share."""
    torch.manual_seed(0)
    with _DEVICE:
        return torch_sit.SiT(
            **vars(size_by_name(model)), input_size=INPUT, channels=CHANNELS, classes=CLASSES
        )


def _autocast(task: Task) -> torch.autocast:
    return torch.autocast(_DEVICE.type, torch.bfloat16, enabled=task.format == "bfloat16")


def _training(task: Task, model: torch.nn.Module) -> Callable[[], float]:
    trainer = torch_sit.Trainer(model, fused=task.side == "torch.compile")
    batch = {name: torch.from_numpy(value) for name, value in examples(task.batch).items()}
    batch |= {name: batch[name].movedim(3, 1).contiguous() for name in ("x1", "x0")}
    on_device = [value.to(_DEVICE) for value in batch.values()]

    def steps() -> float:
        for _ in range(UNITS["training"]):
            with _autocast(task):
                loss = trainer.step(*on_device)
        return loss.item()  # waits

    return steps


def _sampling(task: Task, model: torch.nn.Module) -> Callable[[], float]:
    generator = torch.Generator(_DEVICE).manual_seed(0)
    shape = (task.batch, CHANNELS, INPUT, INPUT)
    noise = torch.randn(shape, device=_DEVICE, generator=generator)
    labels = torch.arange(task.batch) % CLASSES
    y = torch.cat([labels, torch.full((task.batch,), CLASSES)]).to(_DEVICE)
    h = 1 / UNITS["sampling"]

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        # One call for both halves, as in the reference.
        both = model(torch.cat([x, x]), torch.full((2 * task.batch,), t, device=_DEVICE), y)
        conditional, unconditional = both.chunk(2)
        guided = unconditional[:, :3] + SCALE * (conditional[:, :3] - unconditional[:, :3])
        return torch.cat([guided, conditional[:, 3:]], dim=1)

    @torch.no_grad()
    def trajectory() -> float:
        x = noise
        with _autocast(task):
            for step in range(UNITS["sampling"]):
                x = x + h * velocity(x, step * h)
        return x.mean().item()  # waits

    return trajectory


def peak_bytes() -> int:
    """Return the most memory allocated since the last call; 0 if it is unknown."""
    if _DEVICE.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def trace(work: Callable[[], object]) -> list[gpu_kernels.Kernel]:
    """Return the kernels that run on the GPU during a call; the one before it warms up."""
    once = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        with torch.profiler.profile(schedule=once) as profiler:
            work()
            profiler.step()
            work()
        profiler.export_chrome_trace(str(path))
        return gpu_kernels.from_torch(path)


def out_of_memory(error: Exception) -> bool:
    """Return whether the device had too little memory."""
    return isinstance(error, torch.OutOfMemoryError)
