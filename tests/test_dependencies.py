"""requirements.txt and the extras of pyproject.toml declare the packages that the code imports."""

import ast
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST_PARTY = {"sit_jax", "convert", "configs", "tests"}
# The import names of the distributions whose own name differs from it.
IMPORT_NAMES = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "tensorflow-datasets": "tensorflow_datasets",
}


def import_name(requirement):
    """Return the name to import a requirement by, such as etils for `etils[epath]>=1.15`."""
    distribution = re.match(r"[\w.-]+", requirement)[0]
    return IMPORT_NAMES.get(distribution, distribution)


def base():
    """Return the import names of the packages in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {import_name(line) for line in lines if line and not line.startswith("#")}


def requirements_of(extra):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return pyproject["project"]["optional-dependencies"][extra]


def extras(*names):
    """Return the import names of the packages that these extras add."""
    return {import_name(requirement) for name in names for requirement in requirements_of(name)}


def imported_by(*folders):
    """Return the third-party packages that any of the files imports, inside functions too."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - FIRST_PARTY - sys.stdlib_module_names


def test_the_base_is_exactly_what_the_code_imports():
    # The other extras bring no package that the code imports by name.
    optional = extras("wandb")
    assert imported_by("sit_jax", "convert", "configs") - optional == base()


def test_the_optional_packages_are_imported_and_not_in_the_base():
    assert extras("wandb") <= imported_by("sit_jax") and not extras("wandb") & base()


def test_the_tests_import_only_what_their_extras_declare():
    assert imported_by("tests") <= base() | extras("test", "torch", "benchmark")


def test_the_linters_are_pinned_exactly():
    assert [requirement.partition("==")[0] for requirement in requirements_of("lint")] == [
        "ruff",
        "mypy",
    ]
    assert all("==" in requirement for requirement in requirements_of("lint"))
