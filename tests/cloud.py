"""Stand-ins for the command-line tools of clouds and clusters, for the tests of launch/."""

import os
import re
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
INSTALL = (
    "mkdir -p sit_jax && tar -xzf sit_jax.tar.gz -C sit_jax && bash sit_jax/launch/on_tpu_vm.sh"
)
# A cloud with one TPU, whose state is in $CLOUD/state. Each line of $CLOUD/runs and
# $CLOUD/creations says how one run or creation ends: STATUS NEXT-STATE LINE-PRINTED-BY-TRAINING.
# The last line is used for all further ones.
GCLOUD = f"""#!{BASH}
printf 'gcloud %s\\n' "$*" >>"$CLOUD/calls"
next() {{ head -n 1 "$CLOUD/$1"; [ "$(wc -l <"$CLOUD/$1")" = 1 ] || sed -i 1d "$CLOUD/$1"; }}
gone() {{ echo "ERROR: NOT_FOUND: Resource 'sit' was not found" >&2; exit 1; }}
case "$*" in
    *" describe "*) [ ! -e "$CLOUD/offline" ] || {{ echo "ERROR: no network" >&2; exit 1; }} ;;&
    *"queued-resources describe "*)
        [ -e "$CLOUD/request" ] || gone
        cat "$CLOUD/request"
        echo ACTIVE >"$CLOUD/request" ;;
    *"storage "*)
        [ ! -e "$CLOUD/no bucket" ] || {{ echo "ERROR: matched no objects" >&2; exit 1; }}
        echo '{{"stored": 1}}' ;;
    *"tpu-vm describe "*) cat "$CLOUD/state" 2>/dev/null || gone ;;
    *" create "*)
        read -r status state <<<"$(next creations)"
        [ "$status" = 0 ] || exit "$status"
        echo "$state" >"$CLOUD/state"
        case "$*" in *queued*) echo WAITING_FOR_RESOURCES >"$CLOUD/request" ;; esac ;;
    *" delete "*) rm -f "$CLOUD/state" "$CLOUD/request" ;;
    *data.sh*)
        read -r status state <<<"$(next copies)"
        if [ "$state" = GONE ]; then rm "$CLOUD/state"; fi
        exit "$status" ;;
    *sit_jax.main*)
        read -r status state says <<<"$(next runs)"
        echo "$says"
        if [ "$state" = GONE ]; then rm "$CLOUD/state"; else echo "$state" >"$CLOUD/state"; fi
        exit "$status" ;;
esac
"""
# Each call that changes something contains one of these words, in order of precedence.
VERBS = ("data.sh", "sit_jax.main", "on_tpu_vm", "create", "delete", "scp")


# The Python that checks a command before anything is created: it records its arguments and the
# manifest that it was given, and refuses if $REFUSES says why.
CHECKS = f"""#!{BASH}
printf '%s\\n' "$*" >>"$CLOUD/checks"
while [ $# -gt 0 ]; do
    if [ "$1" = --manifest ]; then
        printf 'manifest %s\\n' "$(cat "$2/manifest.json" 2>/dev/null)" >>"$CLOUD/checks"
    fi
    shift
done
[ -z "${{REFUSES:-}}" ] || {{ echo "error: $REFUSES" >&2; exit "${{REFUSAL:-2}}"; }}
echo "train on 16 devices"
"""


class Cloud:
    """A PATH with stand-ins for tools, and the calls that they received."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.tool("sleep", f"#!{BASH}\n")
        self.tool("checks", CHECKS)
        self.answers(runs=["0 READY trained to step 9"], creations=["0 READY"], copies=["0 READY"])

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
                "PYTHON": self.bin / "checks",
                **environment,
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self):
        """Return the calls that changed something: (their verbs, the complete lines)."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in lines if not re.search(" describe | storage ", line)]
        verbs = [next(verb for verb in VERBS if verb in line) for line in lines]
        return verbs, lines

    def checks(self):
        """Return the arguments of each check, and the manifests."""
        path = self.folder / "checks"
        return path.read_text().splitlines() if path.exists() else []


def errors(result):
    """Return the lines of stderr that do not only say what is being done."""
    return [line for line in result.stderr.splitlines() if not line.startswith("== ")]


def refusal(result):
    """Return the only line of a script that refused to start."""
    assert result.returncode == 2 and not result.stdout
    (line,) = errors(result)
    assert line.startswith("error: ")
    return line


def commands(result):
    """Return the words of each command that --dry_run printed, as a shell splits them."""
    assert result.returncode == 0 and not errors(result)
    return [shlex.split(line) for line in result.stdout.splitlines()]
