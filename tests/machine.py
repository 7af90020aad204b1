"""A machine for the scripts of launch/ with a stand-in for Python, so that nothing is installed."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")

# Runs `-c` code in the real Python, after $PREAMBLE, which may patch modules. Copies itself for
# `-m venv`. Records every other call in $CALLS.
STAND_IN = f"""#!{BASH}
case "$1 $2" in
    "-c "*)
        exec "{sys.executable}" -c "import sys
sys.modules['pip'] = sys.modules['ensurepip'] = sys
${{PREAMBLE:-}}
$2" "${{@:3}}" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *) printf '%s\\n' "${{JAX_PLATFORMS:-unset}}: $*" >>"$CALLS"; [ "${{FAILS:-}}" != "$2" ] ;;
esac
"""


class Machine:
    """A copy of the scripts, in a folder with a space, and a PATH with a few tools.

    `python` says whether a `python3` is among the tools.
    """

    def __init__(self, folder, *, python=True):
        self.root = folder / "a tree"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.decoy = folder / "decoy"  # in CDPATH: where an unguarded `cd launch/..` would go
        (self.decoy / "launch").mkdir(parents=True)
        self.bin.mkdir()
        for tool in ("cat", "cksum", "cp", "dirname", "mkdir", "mv", "rm", "touch", "wc"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        if python:
            self.stand_in(self.bin / "python3")

    def stand_in(self, path):
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def run(self, script, *arguments, cwd=None, **environment):
        return subprocess.run(
            [BASH, os.path.relpath(self.root / "launch" / script, cwd or self.root), *arguments],
            env={
                "PATH": str(self.bin),
                "CALLS": str(self.calls_file),
                "CDPATH": str(self.decoy),
                **environment,
            },
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def calls(self):
        """Return the calls of Python since the last time this was called."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls


def refusal(result):
    """Return the one line of a script that refused to run."""
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("== ")]
    assert line.startswith("error: ")
    return line
