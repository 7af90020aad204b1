"""The curves of a training run as a picture."""

from etils import epath

from sit_jax import hosts, storage
from sit_jax.jobs.render import figure_png, new_figure


def training_curves(workdir: epath.Path) -> bytes:
    """Return a PNG of the loss and of each score by step, as metrics.jsonl has them.

    Empty if the run has no log, as after a conversion, and in all processes but 0.
    """
    path = workdir / "metrics.jsonl"
    if not hosts.is_first() or not path.exists():
        return b""
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, row in storage.json_rows(path.read_bytes()):
        for name, value in row.items():
            if value is not None and (name == "loss" or "/" in name):
                curves.setdefault(name, []).append((row["step"], value))
    if not curves:
        return b""
    figure = new_figure(8, 2.5 * len(curves))
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        steps, values = zip(*sorted(points), strict=True)
        axis.plot(steps, values, marker="." if len(points) < 50 else None)
        axis.set(ylabel=name)
    axes[-1].set(xlabel="step")
    return figure_png(figure)
