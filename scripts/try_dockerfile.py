"""Tries the steps of a Dockerfile without Docker, in a throwaway view of this machine's files.

    sudo python3 scripts/try_dockerfile.py docker/Dockerfile

The view is an overlay in memory with a root of its own: the machine's files are not changed, and
all is gone at the end. It stands in for the base image, so this machine should be like that one
(Debian 12 with Python 3.11 for docker/Dockerfile). COPY, RUN, USER, WORKDIR and ENV are carried out
as Docker would; at the end the entry point must show its help. Needs root, and a kernel that lets
it mount.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSIDE = "OURO_TRY_DOCKERFILE"
"""Set in the process that has mounts of its own."""

SHARED = ("/proc", "/dev", "/sys")
FROM_HOST = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl", "/etc/pip.conf")
"""What a container gets from where it runs; elsewhere than on the root file system at times."""


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Instruction:
    """One instruction: its kind in capitals, and the rest with continued lines joined."""

    kind: str
    rest: str


def instructions(text: str) -> Iterator[Instruction]:
    """A Dockerfile's instructions in order, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for line in filter(str.strip, joined.splitlines()):
        kind, _, rest = line.partition(" ")
        yield Instruction(kind.upper(), rest.strip())


@dataclass
class Image:
    """A file tree and what the instructions so far have set."""

    tree: Path
    folder: str = "/"
    user: tuple[int, int] = (0, 0)
    environment: dict[str, str] = field(default_factory=lambda: os.environ | {"PATH": PATH})

    def run(self, command: list[str]) -> None:
        """Run in the tree as the image's user; raises if the command fails."""
        print("+", *command, flush=True)
        uid, gid = self.user
        in_folder = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", self.folder, *command]
        subprocess.run(
            ["chroot", f"--userspec={uid}:{gid}", "--groups=", str(self.tree), *in_folder],
            check=True,
            env=self.environment | {"HOME": self.home(uid)},
        )

    def home(self, uid: int) -> str:
        for line in (self.tree / "etc/passwd").read_text().splitlines():
            if line.split(":")[2] == str(uid):
                return line.split(":")[5]
        return "/"

    def copy(self, sources: list[str], target: str, owner: str | None) -> None:
        place = self.tree / self.folder.lstrip("/") / target
        for name in sources:
            source = ROOT / name
            into = place / source.name if target.endswith("/") else place
            if source.is_dir():
                shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, into)
            if owner:
                path = f"/{into.resolve().relative_to(self.tree)}"
                change = ["chroot", str(self.tree), "chown", "--recursive", owner, path]
                subprocess.run(change, check=True)

    def apply(self, step: Instruction) -> None:
        """Carry out one instruction; those that only describe the image do nothing here."""
        if step.kind == "RUN":
            self.run(["/bin/sh", "-c", step.rest])
        elif step.kind == "USER":
            uid, gid = step.rest.split(":")
            self.user = int(uid), int(gid)
        elif step.kind == "WORKDIR":
            self.folder = step.rest
            (self.tree / step.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.kind == "COPY":
            *sources, target = [word for word in step.rest.split() if not word.startswith("--")]
            owner = re.search(r"--chown=(\S+)", step.rest)
            self.copy(sources, target, owner and owner[1])
        elif step.kind == "ENV":
            name, _, value = step.rest.partition("=")
            self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        elif step.kind == "ENTRYPOINT":
            self.run([*json.loads(step.rest), "--help"])


def mount_view(scratch: Path) -> Path:
    """An overlay over `/` whose changes are in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(scratch)], check=True)
    upper, work, tree = (scratch / name for name in ("upper", "work", "tree"))
    for folder in (upper, work, tree):
        folder.mkdir()
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(tree)], check=True)
    for path in SHARED:
        subprocess.run(["mount", "--rbind", path, f"{tree}{path}"], check=True)
    for path in filter(os.path.ismount, FROM_HOST):
        subprocess.run(["mount", "--bind", path, f"{tree}{path}"], check=True)
    return tree


def main(arguments: list[str]) -> int:
    """Try the Dockerfile named; the exit status says whether every step worked."""
    if len(arguments) != 1:
        sys.exit(f"usage: {sys.argv[0]} DOCKERFILE")
    if INSIDE not in os.environ:
        if os.getuid() != 0:
            sys.exit("try_dockerfile: needs root, to make a file tree of its own")
        command = ["unshare", "--mount", "--propagation=private", sys.executable, *sys.argv]
        return subprocess.run(command, env=os.environ | {INSIDE: "1"}).returncode
    with tempfile.TemporaryDirectory() as scratch:
        tree = mount_view(Path(scratch))
        try:
            image = Image(tree)
            # The Python image's name for it.
            (tree / "usr/local/bin/python").symlink_to("/usr/bin/python3")
            for step in instructions(Path(arguments[0]).read_text()):
                image.apply(step)
        except subprocess.CalledProcessError as error:
            print(f"FAILED with {error.returncode}", file=sys.stderr)
            return 1
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", scratch], check=True)
    print(f"Every step of {arguments[0]} works.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
