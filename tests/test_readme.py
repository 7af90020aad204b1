"""README.md's commands run as written, on tiny runs; what all READMEs link to and name exists."""

import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib

import numpy as np
import pytest

from convert import inception
from sit_jax import command_line, main
from sit_jax.config import flatten
from sit_jax.errors import UserError
from sit_jax.settings import Config
from tests import goldens
from tests.commands import ROOT, TINY, call, flags, succeed, write_images
from tests.machine import BASH
from tests.test_imports import LEVELS

README = (ROOT / "README.md").read_text()
FOLDERS = ("configs", "convert", "launch", "sit_jax", "tests")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"bash", "python", "text", "bibtex"}
SETTINGS = flatten(Config())
SECTIONS = {key.partition(".")[0] for key in SETTINGS if "." in key}


def blocks(text, language):
    """Return the contents of the fenced code blocks in a language."""
    return [content for found, content in FENCE.findall(text) if found == language]


def spans(text):
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text):
    """Return a page's commands in order: lines of bash blocks, and inline code that is one."""
    lines = []
    for block in blocks(text, "bash"):
        lines += block.replace("\\\n", " ").splitlines()
    lines += [span for span in spans(text) if span.startswith(("python -m ", "bash launch/"))]
    stripped = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [line for line in stripped if line]


def test_it_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_every_code_block_has_a_language_that_this_test_knows():
    assert {language for language, _ in FENCE.findall(README)} <= LANGUAGES
    assert README.count("```") == 2 * len(FENCE.findall(README))


# Commands

# Settings that make a command of each mode tiny, and a part of what it then prints.
TINY_SAMPLE = flags(sample__steps=2, sample__count=8, sample__batch=8)
TINY_SWEEP = flags(
    sweep__solvers="euler", sweep__steps=2, sweep__count=8,
    sweep__reference_count=100, sweep__components=4,
)  # fmt: skip
TINY_LIKELIHOOD = flags(
    likelihood__count=8, likelihood__batch=8, likelihood__solver="euler", likelihood__steps=2
)
TINY_EXCESS = flags(
    excess__strata=2, excess__draws=4, excess__batch=8, excess__samples=4, sample__steps=2,
    sample__batch=8,
)  # fmt: skip
MODES = {
    "train": (TINY[2:], "trained to step"),  # TINY without its --config FILE
    "sample": (TINY_SAMPLE, "sheet: "),
    "evaluate": (TINY_SAMPLE + flags(sweep__components=4), "report: "),
    "sweep": (TINY_SAMPLE + TINY_SWEEP, "plot: "),
    "invert": (TINY_SAMPLE, "round trip: RMS error"),
    "likelihood": (TINY_LIKELIHOOD, "bits/dim: "),
    "quality": (TINY_SAMPLE, "samples are read as their label"),
    "excess": (TINY_EXCESS, "images: model "),
    "encode": ([], "records of 2 classes"),
    "data": ([], "card: "),
}
# A real autoencoder and ImageNet in miniature; learn_sigma, the argument and the rest stay.
TINY_VAE = flags(data__classes=2, data__workers=0, latents__path=goldens.FOLDER / "vae_legacy")
TINY_IMAGENET = TINY_VAE + flags(data__image_size=16)
# README's command, which the training after it needs.
ENCODE = (
    "--mode encode --config configs/imagenet.py --workdir LATENTS --config.data.path=IMAGENET/train"
)
TINY_LATENTS = TINY_VAE + flags(data__image_size=8, mesh__data=-1, mesh__fsdp=1)


@pytest.fixture(scope="module")
def clone(quiet_machine, tmp_path_factory):
    """A folder in which README's relative paths exist: configs/, and images where it says PATH."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    for images in ("PATH", "IMAGENET/train"):
        write_images(folder / images, *(f"{name}/{i}.png" for name in "ab" for i in range(4)))
    write_imagenet_tar(folder)
    return folder


def write_imagenet_tar(folder):
    """Write the tar of ImageNet's training images in miniature: a tar of each class inside."""
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in "ab":
            with tarfile.open(folder / f"{name}.tar", "w") as inner:
                for path in (folder / "PATH" / name).iterdir():
                    inner.add(path, path.name)
            outer.add(folder / f"{name}.tar", f"{name}.tar")


@pytest.fixture
def inside(clone, monkeypatch):
    """The clone as the working directory."""
    monkeypatch.chdir(clone)


def option(words, name, default=None):
    """Return the value that follows a flag."""
    return words[words.index(name) + 1] if name in words else default


def check_install(words):
    """Check that the extras exist. The README test installs nothing."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.fullmatch(r"\.(?:\[(.+)\])?", words[-1])
    assert named and set((named[1] or "test").split(",")) <= set(extras)


def check_script(words):
    """Check that the script exists, is the one its help describes, and knows the arguments."""
    done = subprocess.run(
        [BASH, words[1], "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and f"bash {words[1]}" in done.stdout
    for word in words[2:]:
        assert word in done.stdout


def check_help(words, capsys):
    """Check that the help names every mode, section or setting that it is about."""
    try:
        status = main.main(words)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr().out
    assert not status
    if "--help" in words:
        expected = MODES
    elif section := option(words + [None], "--help-config"):
        expected = [key.partition(".")[2] for key in SETTINGS if key.startswith(f"{section}.")]
    else:
        expected = SECTIONS
    assert expected and not [name for name in expected if name not in out]


def train_first(workdir):
    """Make a tiny run there if no earlier command has, so that each test can run on its own."""
    if not pathlib.Path(workdir, "config.json").exists():
        succeed(*TINY, "--workdir", workdir)


def check_run(words):
    """Run the command with tiny overrides after its own flags; look for what its mode prints."""
    mode = option(words, "--mode", "train")
    tiny, expected = MODES[mode]
    if "--config" in words:
        shutil.rmtree(option(words, "--workdir"), ignore_errors=True)
    else:
        train_first(option(words, "--workdir"))
        tiny = tiny + flags(train__steps=6) if mode == "train" else tiny
    config = option(words, "--config", "")
    if config.startswith("configs/imagenet.py"):
        tiny = tiny + TINY_IMAGENET
    if config == "configs/latents.py":
        tiny = tiny + TINY_LATENTS
        if not pathlib.Path("LATENTS").exists():
            check_run(shlex.split(ENCODE))
    status, out, err = call(*words, *tiny)
    assert status == 0, err
    assert expected in out and "error: " not in err


def check_unpacking(command):
    """Run a command that unpacks the tar; after the last, each class has its images."""
    subprocess.run([BASH, "-c", command], check=True)
    train = pathlib.Path("IMAGENET/train")
    assert {path.name for path in train.iterdir()} >= {"a", "b"}
    if command.startswith("find"):
        assert not list(train.glob("*.tar"))
        assert len(list(train.glob("[ab]/*.png"))) == 8


def check(command, capsys):
    """Check a command of README. Fail if it is of a kind that this test does not know."""
    words = shlex.split(command)
    if words[:2] == ["cd", "sit_jax"] or words[:3] == ["python3", "-m", "venv"]:
        return
    if words[:3] == ["pip", "install", "-e"]:
        check_install(words)
    elif words[0] in ("mkdir", "tar", "find"):
        check_unpacking(command)
    elif words[0] == "bash" and words[1].startswith("launch/"):
        check_script(words)
    elif words[:2] == ["python", "-m"] and words[2:] == ["convert.inception"]:
        with pytest.raises(SystemExit) as ended:  # without arguments it would download
            inception.main(["--help"])
        assert ended.value.code == 0
    elif words[:3] != ["python", "-m", "sit_jax.main"]:
        pytest.fail(f"README has {command!r}, which this test does not know how to check")
    elif "--help" in words or "--help-config" in words:
        check_help(words[3:], capsys)
    elif "--topology" in words:  # would need a compiler and minutes: flags and config only
        assert main.load_config(*command_line.parse(words[3:])).model.name
    else:
        check_run(words[3:])


@pytest.mark.parametrize("command", list(dict.fromkeys(commands(README))))
def test_a_command_does_what_it_says(command, inside, capsys):
    check(command, capsys)


def test_every_mode_has_a_command():
    modes = {option(shlex.split(command), "--mode", "train") for command in commands(README)}
    assert {*MODES, "preflight"} <= modes


def test_an_unknown_command_is_noticed(capsys):
    for command in ("make digits", "python -m sit_jax.evaluate", "python tools/train.py"):
        with pytest.raises(pytest.fail.Exception, match="does not know how to check"):
            check(command, capsys)


def test_commands_are_found_in_blocks_and_in_lines():
    text = "```bash\nls \\\n    -l  # all\n\n```\nThen `bash launch/a.sh`, not `--flag`.\n"
    assert commands(text) == ["ls -l", "bash launch/a.sh"]


def test_the_python_example_runs(inside):
    train_first("runs/digits")
    (example,) = blocks(README, "python")
    names = {}
    exec(compile(example, "example", "exec"), names)
    assert names["images"].shape == (3, 8, 8, 1) and names["images"].dtype == np.uint8
    assert np.shape(names["log_p"]) == (3,)
    for attribute in ("config", "params", "velocity", "tokens"):
        assert attribute in README and hasattr(names["run"], attribute)


# Links, files and settings


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)}


def broken_links(page, text):
    """Return the relative links of a page whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def missing_files(text):
    """Return the paths into this repository that a page names and that do not exist."""
    pattern = rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w/-]+\.(?:py|sh|ipynb|md|png|flags)\b"
    return [path for path in re.findall(pattern, text) if not (ROOT / path).exists()]


def unknown_settings(text):
    """Return the settings that a page's code names, as a flag or a key, and that do not exist."""
    code = "\n".join([*spans(text), *(content for _, content in FENCE.findall(text))])
    keys = re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)*)", code)
    dotted = rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.(?!(?:py|json|png)\b)[a-z_0-9]+"
    return [key for key in keys + re.findall(dotted, code) if key not in SETTINGS]


def refused_commands(text):
    """Return (command, message) of each command of main with an unknown flag or mode."""
    refused = []
    for command in commands(text):
        prefix, arguments = shlex.split(command)[:3], shlex.split(command)[3:]
        if prefix == ["python", "-m", "sit_jax.main"] and arguments and "--help" not in command:
            try:
                command_line.parse(arguments)
            except UserError as error:
                refused.append((command, str(error)))
    return refused


@each_page
def test_links_and_files_exist(page):
    broken = broken_links(page, page.read_text())
    # The changelog also names files that were removed.
    missing = [] if page.name == "CHANGELOG.md" else missing_files(page.read_text())
    assert (broken, missing) == ([], [])


@each_page
def test_settings_exist(page):
    unknown = unknown_settings(page.read_text())
    assert unknown == []


@each_page
def test_the_flags_of_its_commands_are_accepted(page):
    assert refused_commands(page.read_text()) == []


def test_contributing_shows_the_levels_of_imports():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d) \| ((?:`\w+` )+)\|$", text, re.M)
    assert {int(level): names.replace("`", "").strip() for level, names in rows} == LEVELS


def test_what_does_not_exist_is_noticed():
    page = ROOT / "README.md"
    links = (
        "[a](https://a.b) [b](configs/README.md#all-settings) [c](none.md) [d](README.md#no-such)"
    )
    assert broken_links(page, links) == ["none.md", "README.md#no-such"]
    assert missing_files("sit_jax/main.py, sit_jax/no_such.py") == ["sit_jax/no_such.py"]
    text = (
        "`--config.train.stepz=1`, `--config.trane.steps`, `sample.step`, `sample.py`, "
        "`data.json`, `log.every`"
    )
    assert unknown_settings(text) == ["train.stepz", "trane.steps", "sample.step"]
    good = "python -m sit_jax.main --workdir runs/a --mode sample"
    bad = [f"{good}r", f"{good} --minimum=1", f"{good} --stepz=1"]
    text = f"```bash\n{good}\n{bad[0]}\n{bad[1]}\n```\nOr `{bad[2]}`."
    assert [command for command, _ in refused_commands(text)] == bad
