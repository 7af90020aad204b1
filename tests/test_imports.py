"""Modules import only from lower levels, listed in CONTRIBUTING.md, and no other framework."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

LEVELS = {
    0: "transport sampling rng ema storage hosts errors precision laws record runtime manifest",
    1: "models metrics latents data optimizer sharding checkpoint image_io metric_log sinks report"
    " lock",
    2: "train_state train_step",
    3: "jobs config settings validation convert",
    4: "api main command_line settings_help check_command",
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}
# Imports allowed within a level, for each part. A part of level 0 or 1 that is not listed imports
# nothing of its own level.
BESIDE = {
    "laws": {"errors"},
    "transport": {"errors"},
    "sampling": {"transport", "errors"},
    "metrics": {"models"},
    "storage": {"errors"},
    "manifest": {"storage"},
    "runtime": {"errors"},
    "hosts": {"errors"},
    "metric_log": {"sinks"},
    "train_step": {"train_state"},
    "validation": {"settings"},
    "config": {"settings", "validation"},
    "jobs": {"config", "settings"},
    "convert": {"config", "settings", "jobs"},
    "command_line": {"settings_help"},
    "main": {"command_line"},
    "check_command": {"main", "command_line"},
}


def modules(*folders):
    """Yield (dotted name, path) of every module below the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(source, package):
    """Yield the dotted name of each import of a module, at its top or inside functions.

    Relative imports are resolved against `package`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:  # one dot is the package itself, each further dot its parent
                parents = package.split(".")
                base = parents[: len(parents) + 1 - node.level] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def part_of(name):
    """Return the part that a dotted name belongs to; None outside of this project.

    sit_jax.models.sit -> models, convert.names -> convert.
    """
    top, *below = name.split(".")
    if top == "sit_jax":
        return below[0] if below else ""
    return top if top in ("convert", "configs") else None


def violations(name, source, package):
    """Yield a line for each import that the module's level forbids."""
    part = part_of(name)
    assert part in LEVEL_OF, (
        f"{name} has no level; give it one in LEVELS, and a line in CONTRIBUTING.md"
    )
    for target in imported(source, package):
        other = part_of(target)
        if other is None or other == part:
            continue
        if LEVEL_OF.get(other, 9) >= LEVEL_OF[part] and other not in BESIDE.get(part, ()):
            yield f"{name} imports {target}"


def test_imports_point_down():
    forbidden = []
    for name, path in modules("sit_jax", "convert"):
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        if name == "sit_jax":
            # The package itself imports only the module of `sit_jax.load`, lazily.
            parts = {part_of(target) for target in imported(path.read_text(), package)}
            assert parts - {None, ""} == {"api"}, parts
        else:
            forbidden += violations(name, path.read_text(), package)
    assert not forbidden


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sit_jax.transport.paths", "from sit_jax.sampling import ode"),
        ("sit_jax.sampling.ode", "from sit_jax import rng"),
        ("sit_jax.storage", "from sit_jax.image_io import sheet"),
        ("sit_jax.models.sit", "from sit_jax import config as c"),
        ("sit_jax.models.sit", "import sit_jax.sharding"),
        ("sit_jax.models.sit", "from .. import latents"),
        ("sit_jax.models.sit", "from ..data import pipeline"),
        ("sit_jax.data.sources", "def f():\n    from sit_jax.jobs import train"),
        ("sit_jax.train_state", "from sit_jax import train_step"),
        ("sit_jax.config", "from sit_jax.jobs.setup import set_up"),
        ("sit_jax.jobs.train", "from convert import names"),
        ("sit_jax.jobs.train", "import sit_jax.main"),
        ("sit_jax.config", "import configs.digits"),
        ("convert.names", "from sit_jax import main"),
    ],
)
def test_the_check_sees_an_import_that_points_up_or_sideways(name, line):
    assert len(list(violations(name, line, name.rpartition(".")[0]))) == 1


def test_the_check_lets_imports_that_point_down_pass():
    source = (
        "import jax\n"
        "from sit_jax import rng, storage\n"
        "from sit_jax.errors import check\n"
        "from . import sizes"
    )
    assert not list(violations("sit_jax.models.sit", source, "sit_jax.models"))
    assert not list(
        violations("sit_jax.jobs.train", "from sit_jax.settings import Config", "sit_jax.jobs")
    )


def test_a_part_without_a_level_is_noticed():
    with pytest.raises(AssertionError, match="sit_jax.utils has no level"):
        list(violations("sit_jax.utils", "", "sit_jax"))


def test_configs_import_only_the_config_module():
    for name, path in modules("configs"):
        targets = {
            target
            for target in imported(path.read_text(), "configs")
            if part_of(target) is not None
        }
        assert {part_of(target) for target in targets} <= {"config"}, f"{name} imports {targets}"


def test_torch_and_tensorflow_stay_outside():
    scripts = [("", path) for path in [*ROOT.glob("*.py"), *(ROOT / "launch").rglob("*.py")]]
    for name, path in [*modules("sit_jax", "configs", "convert"), *scripts]:
        packages = {target.split(".")[0] for target in imported(path.read_text(), name or "launch")}
        assert not packages & {"torch", "torchvision", "tensorflow"}, path


def test_importing_main_loads_neither_tensorflow_nor_torch(tmp_path):
    """No dependency imports them either.

    Empty stand-in modules on the path make the check work where neither is installed.
    """
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").write_text("__version__ = '0'\n")
    code = (
        "import sys, sit_jax.main; print([m for m in ('tensorflow', 'torch') if m in sys.modules]);"
        "import torch; print(torch.__version__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.stdout.splitlines() == ["[]", "0"], process.stdout + process.stderr
