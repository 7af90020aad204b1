"""Stand-ins for the command-line tools of clouds and clusters, for the tests of launch/."""

import os
import shlex
import subprocess

from tests.machine import BASH, ROOT

TPU = ("--name", "sit", "--zone", "us-west4-a", "--type", "v5litepod-16")
XPK = ("--cluster", "c", "--name", "sit", "--type", "v5litepod-16", "--image", "gcr.io/p/sit")
MAIN = (
    "--config",
    "configs/imagenet.py",
    "--workdir",
    "gs://bucket/my run",
    "--config.train.steps=3",
)
# MAIN as a shell reads it.
MAIN_LINE = "--config configs/imagenet.py --workdir 'gs://bucket/my run' --config.train.steps=3"
# The line with which training reports that it saved and stopped early.
STOPPED = "stopped at step 3 of 9, saved; the same command continues"
# Each call that changes something contains one of these words, in order of precedence.
VERBS = ("sit_jax.main", "on_tpu_vm", "create", "delete", "scp")


class Cloud:
    """A PATH with stand-ins for tools, and the calls that they received."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.tool("sleep", f"#!{BASH}\n")
        self.answers(runs=["0 READY trained to step 9"], creations=["0 READY"])

    def tool(self, name, text):
        """Install a script as a tool."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answers(self, **files):
        """Write the lines of each file from which the tools take their answers."""
        for name, lines in files.items():
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, script, *arguments, cwd=ROOT, **environment):
        return subprocess.run(
            [BASH, ROOT / "launch" / script, *arguments],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "CLOUD": self.folder,
                "TMPDIR": self.folder,
                **environment,
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def calls(self):
        """Return the calls that changed something: (their verbs, the complete lines)."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in lines if " describe " not in line]
        verbs = [next(verb for verb in VERBS if verb in line) for line in lines]
        return verbs, lines


def refusal(result):
    """Return the only line of a script that refused to start."""
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def commands(result):
    """Return the words of each command that --dry_run printed, as a shell splits them."""
    assert result.returncode == 0 and not result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]
