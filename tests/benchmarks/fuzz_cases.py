"""The cases of fuzz.py: each part draws an input, runs the program on it, and judges the end."""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from sit_jax import config as config_lib
from sit_jax.data import folder as folder_source
from sit_jax.data.source import SourceOptions, UnreadableImage
from sit_jax.data.transforms import Decoding
from sit_jax.jobs.table import JOBS
from sit_jax.settings import Config
from tests import checkpoints
from tests.benchmarks.fuzz_calls import (
    INTACT_S,
    Draw,
    Outcome,
    call,
    damaged,
    damaged_json,
    inside,
    judge,
    limited,
)
from tests.commands import TINY, write_images


def draw_of(seed: int, part: str, number: int) -> Draw:
    """Return the random numbers of a case."""
    return Draw(f"{seed} {part} {number}")


class _WithRun:
    """A folder with a trained run and whatever else a part needs; each case works in a copy."""

    def __init__(self, folder: pathlib.Path):
        self.base = folder / "base"
        self.copy = folder / "copy"
        jax.config.update("jax_platforms", "cpu")
        if not (folder / "is_made").exists():
            shutil.rmtree(self.base, ignore_errors=True)
            self.base.mkdir(parents=True)
            with inside(self.base):
                self.make()
            (folder / "is_made").touch()
        self.warm_up()

    def make(self) -> None:
        """Fill the base folder, the current one."""
        self.succeed("main", *TINY, "--workdir", "run")

    def warm_up(self) -> None:
        """Run intact cases, whose memory is the program's own."""
        with self.in_copy():
            self.succeed("main", "--workdir", "run", "--mode", "sample")
            self.succeed("main", "--workdir", "run", "--config.train.steps=6")
            self.succeed("main", "--workdir", "run", "--mode", "likelihood",
                         "--config.likelihood.count=8")  # fmt: skip
            self.succeed("to_torch", "run", "warm.pt")
            self.succeed("from_torch", "warm.pt", "warm")

    def succeed(self, program: str, *arguments: str) -> None:
        """Raise RuntimeError unless the program succeeds."""
        status, out, err, _ = call(program, arguments, INTACT_S)
        if status:
            raise RuntimeError(f"an intact case fails: {program} {arguments}:\n{out}{err}")

    @contextlib.contextmanager
    def in_copy(self) -> Iterator[pathlib.Path]:
        """Work in a new copy of the base folder."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.base, self.copy, symlinks=True)
        with inside(self.copy):
            yield self.copy
        shutil.rmtree(self.copy, ignore_errors=True)


VALUES = (
    "", " ", "0", "-1", "1", "2.5", "1e999", "-inf", "nan", "1e-999", "2147483648",
    "-2147483649", "9223372036854775808", "9" * 5000, "1_0", "0x10", "none", "None", "null",
    "True", "false", "[]", "{}", "[1,2", "(1,)", "1,2,3", ",", ",,1", "é", "日本", "\udcff", "\n",
    "a\nb", "x" * 10_000, "--", "-", "~", "~nobody/x", "$HOME/x", "Linear", "linear", "VP",
    "velocity", "euler", "dopri5", "sde", "bfloat16", "float32", "adamw", "folder", "digits",
    "all", "logit-normal", "missing.png", "file.txt", "images", "images/", "run",
    "run/config.json", "/dev/null", "/dev/zero/x", "new/deep/x", "configs/none.py", "bad.py",
    "exit.py", "empty.py", "digits.py", "digits.py:x", "foo://x", "://", "s3://bucket/x",
    "run.pt", "a" * 300, "../x", "v5e:4x4", "nothing:0x0", "100:110", "2:3", "3:2", "0.5",
    "0.5,2", "1" + "0" * 400,
)  # fmt: skip
_FLAGS = ("--config", "--workdir", "--mode", "--fork", "--profile", "--minimum", "--out",
          "--help-config", "--topology", "--json", "--search", "--sampler", "--distributed",
          "--no-distributed", "--help", "--overwrite", "--weights", "--num_heads", "--image_size",
          "--num_classes", "--unknown", "-x", "stray")  # fmt: skip


class Command(_WithRun):
    """Random flags, settings, values and paths of every mode and converter."""

    def make(self) -> None:
        """Add files that flags may name."""
        super().make()
        self.succeed("to_torch", "run", "run.pt")
        write_images(pathlib.Path("images"), "a/1.png", "b/1.png")
        files = {"file.txt": "x", "bad.py": "def", "exit.py": "import sys; sys.exit(0)",
                 "empty.py": ""}  # fmt: skip
        for name, text in files.items():
            pathlib.Path(name).write_text(text)
        shutil.copy(TINY[1], "digits.py")

    def run(self, draw: Draw) -> Outcome:
        """Change a valid command one to four times, and call it."""
        run = ["--workdir", "run"]
        settings = list(config_lib.flatten(Config()))
        program, arguments = draw.choice(
            [("main", [*TINY, "--workdir", "new"]), ("from_torch", ["run.pt", "new"]),
             ("to_torch", ["run", "new.pt"]),
             ("inception", ["run.pt", "new.safetensors", "--any_weights"])]
            + [("main", [*run, "--mode", mode]) for mode in JOBS]
        )  # fmt: skip
        arguments = list(arguments)
        for _ in range(draw.choice((1, 1, 2, 4))):
            kind = draw.randrange(8)
            place = draw.randrange(len(arguments) + 1)
            value = draw.choice(VALUES)
            if kind <= 3:
                key = draw.choice(settings) if draw.random() < 0.95 else value
                arguments.append(f"--config.{key}={value}")
            elif kind == 4:
                arguments[place:place] = draw.choice(
                    ([draw.choice(_FLAGS), value], [f"{draw.choice(_FLAGS)}={value}"])
                )
            elif kind == 5:
                arguments[place : place + 1] = [value]
            elif kind == 6:
                del arguments[place : place + 1]
            else:
                arguments += arguments[place : place + 2]
        with self.in_copy():
            return judge(program, arguments)


class Checkpoint(_WithRun):
    """A run with damaged files, which is then trained on, sampled, evaluated or converted."""

    def make(self) -> None:
        """Draw the samples of each checkpoint as well."""
        super().make()
        for step, other in (("2", "4"), ("4", "2")):
            shutil.copytree("run", step)
            shutil.rmtree(f"{step}/checkpoints/{other}")
            self.succeed("main", "--workdir", step, "--mode", "sample")

    @staticmethod
    def _samples(run: pathlib.Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.glob("samples/*/images/0*.png")}

    def run(self, draw: Draw) -> Outcome:
        """Damage one to three files and give a command."""
        with self.in_copy() as copy:
            files = sorted(path for path in (copy / "run").rglob("*") if path.is_file())
            files = [path for path in files if not {"sheets", "tensorboard"} & set(path.parts)]
            small = [path for path in files if path.suffix in (".json", ".jsonl")]
            changed = []
            for _ in range(draw.choice((1, 1, 2, 3))):
                path = draw.choice(small if draw.random() < 0.6 else files)
                if path.is_file():
                    changed.append(f"{self._damage(draw, path)} {path.relative_to(copy)}")
            program, arguments = draw.choice(
                [("main", ["--workdir", "run", "--mode", "sample"]),
                 ("main", ["--workdir", "run", "--config.train.steps=6",
                           "--config.log.sheet_every=0"]),
                 ("main", ["--workdir", "run", "--mode", "likelihood",
                           "--config.likelihood.count=8"]),
                 ("main", ["--workdir", "run", "--fork", "fork"]), ("to_torch", ["run", "new.pt"])]
            )  # fmt: skip
            outcome = judge(program, arguments)
            failure = outcome.failure
            drawn = self._samples(copy / "run")
            expected = [self._samples(copy / step) for step in ("2", "4")]
            is_same_config = not any("config.json" in text for text in changed)
            if drawn and is_same_config and drawn not in expected:
                failure = failure or "these are samples of no checkpoint"
        given = f"{'; '.join(changed)}: {outcome.input}"
        return dataclasses.replace(outcome, input=given, failure=failure)

    @staticmethod
    def _damage(draw: Draw, path: pathlib.Path) -> str:
        kind = draw.choice(("bytes", "bytes", "json", "json", "json", "gone", "folder", "empty"))
        data = path.read_bytes()
        path.unlink()
        if kind == "json" and path.suffix in (".json", ".jsonl"):
            path.write_text(damaged_json(draw, data.decode()), encoding="utf-8")
        elif kind == "folder":
            path.mkdir()
        elif kind == "empty":
            path.touch()
        elif kind != "gone":
            path.write_bytes(damaged(draw, data))
        return kind


class Torch(_WithRun):
    """Damaged .pt and .safetensors files for the converters."""

    def make(self) -> None:
        """Write one of each kind."""
        super().make()
        checkpoints.save("training.pt", checkpoints.training())
        checkpoints.save("bare.pt", checkpoints.state_dict())
        save_file(checkpoints.state_dict(), "bare.safetensors", {"format": "pt"})
        self.succeed("to_torch", "run", "run.pt")
        self.succeed("to_torch", "run", "run.safetensors")

    def run(self, draw: Draw) -> Outcome:
        """Damage a file, or the pickle inside it, and convert it."""
        with self.in_copy() as copy:
            path = draw.choice(sorted([*copy.glob("*.pt"), *copy.glob("*.safetensors")]))
            is_inside = path.suffix == ".pt" and draw.random() < 0.6
            if is_inside:
                self._damage_inside(draw, path)
            else:
                path.write_bytes(damaged(draw, path.read_bytes()))
            heads = [] if path.stem == "run" else ["--num_heads", "2"]
            program, arguments = draw.choice(
                [("from_torch", [path.name, "new", *heads])] * 4
                + [("inception", [path.name, "new.safetensors", "--any_weights"])]
            )
            outcome = judge(program, arguments)
            # What says that it is refused has not left anything.
            left = [name for name in ("new", "new.safetensors") if (copy / name).exists()]
            failure = outcome.failure
            if outcome.ending == "refused" and left:
                failure = failure or f"refused, but leaves {left}"
        where = "a member of" if is_inside else "bytes of"
        return dataclasses.replace(outcome, input=f"{where} {outcome.input}", failure=failure)

    @staticmethod
    def _damage_inside(draw: Draw, path: pathlib.Path) -> None:
        """Damage one member of a zip file, mostly the pickle, under a valid checksum."""
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickle = next(name for name in members if name.endswith("data.pkl"))
        name = pickle if draw.random() < 0.8 else draw.choice(sorted(members))
        members[name] = damaged(draw, members[name])
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)


class Images:
    """Damaged images of every format for the folder source."""

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "images" / "a"
        self.path.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (20, 24, 4), dtype=np.uint8)
        rgba = Image.fromarray(pixels)
        rgb, grey = rgba.convert("RGB"), rgba.convert("L")
        deep = Image.fromarray(generator.integers(0, 2**16, (20, 24), dtype=np.uint16))
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation
        self.intact = [
            self._encoded(image, kind, **options)
            for image, kind, options in (
                (rgb, "png", {}), (rgba, "png", {}), (grey, "png", {}), (deep, "png", {}),
                (rgb.convert("P"), "png", {}), (rgb, "jpeg", {"exif": exif}), (grey, "jpeg", {}),
                (rgb, "jpeg", {"progressive": True}), (rgb.convert("CMYK"), "jpeg", {}),
                (rgb, "webp", {"exif": exif}), (rgba, "webp", {"lossless": True}), (rgb, "bmp", {}),
                (grey, "bmp", {}), (rgb.convert("1"), "bmp", {}), (rgb, "ppm", {}),
                (grey, "ppm", {}), (deep, "ppm", {}), (rgb, "tiff", {}), (deep, "tiff", {}),
                (rgb, "tiff", {"compression": "tiff_lzw"}), (rgb, "tiff", {"compression": "jpeg"}),
                (grey, "tiff", {"compression": "tiff_deflate"}),
                (rgb.convert("1"), "tiff", {"compression": "group4"}),
            )
        ]  # fmt: skip
        for kind, data in self.intact:
            outcome = self._read(kind, data, is_turned=True)
            if outcome.ending != "succeeds":
                raise RuntimeError(f"an intact {kind} fails: {outcome}")

    @staticmethod
    def _encoded(image: Image.Image, kind: str, **options: Any) -> tuple[str, bytes]:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return kind, file.getvalue()

    def run(self, draw: Draw) -> Outcome:
        """Damage an image, and read it under its own or another extension."""
        kind, data = draw.choice(self.intact)
        name = kind if draw.random() < 0.9 else draw.choice(("png", "jpeg", "tiff", "bmp", "ppm"))
        return self._read(name, damaged(draw, data), is_turned=draw.random() < 0.5)

    def _read(self, kind: str, data: bytes, *, is_turned: bool) -> Outcome:
        path = self.path / f"x.{kind}"
        path.write_bytes(data)
        decoding = Decoding(max_pixels=2**24, exif_orientation=is_turned)
        given = f"{kind} of {len(data)} bytes, {data[:40]!r}"
        try:
            with warnings.catch_warnings(), limited() as interrupted:
                warnings.simplefilter("ignore")
                options = SourceOptions(str(self.path.parent), None, "all", 8, 3, decoding)
                record = folder_source.open_folder(options).read(0)
        except UnreadableImage as error:
            failure = None if "\n" not in str(error) else f"more than a line: {error}"
            return Outcome(given, "refused", failure, str(error))
        finally:
            path.unlink()
        image = record["image"]
        is_right = image.shape == (8, 8, 3) and image.dtype == np.uint8 and not interrupted
        return Outcome(given, "succeeds", None if is_right else f"it is {image.shape}")


PARTS: dict[str, Callable[[pathlib.Path], Any]] = {
    "command": Command,
    "checkpoints": Checkpoint,
    "torch": Torch,
    "images": Images,
}
