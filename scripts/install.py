"""Makes the environment `make` runs in: a venv with a pinned build of everything, CPU or CUDA.

Standard library only, since it runs before anything is installed. Each step that is done is written
down with a hash of what it was made from, so a second run costs nothing and an interrupted one goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
BUILDS = ("auto", "cpu", "cuda")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's index of CPU wheels; where it cannot be reached, pip's own configuration is asked."""

CPU_TORCH_HELP = f"""Let this machine reach {CPU_INDEX}, or put the wheel of torch's CPU build
(torch-<version>+cpu-...whl) into a folder and name the folder: PIP_FIND_LINKS=/that/folder"""


@dataclass(frozen=True)
class Step:
    """One thing to install: what to say, the files it depends on, and how to do it."""

    name: str
    says: str
    made_from: tuple[str, ...]
    run: Callable[[Path], None]

    def key(self) -> str:
        """Changes when the step must be done again."""
        digest = hashlib.sha256(f"{self.says}\n{self.made_from}".encode())
        for name in self.made_from:
            digest.update((ROOT / name).read_bytes())
        return digest.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Bring the venv up to date; exits with a message that names the fix where it cannot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    parser.add_argument("--dev", action="store_true", help="also what tests and checks need")
    parser.add_argument("--no-project", action="store_true", help="only what Ouro Serve needs")
    parser.add_argument(
        "--build", choices=BUILDS, default="auto", help="auto: CUDA if there is a GPU"
    )
    options = parser.parse_args(arguments)
    need_python(sys.argv[1:] if arguments is None else arguments)
    if platform.system() != "Linux":
        stop("vLLM has wheels for Linux only. Fix: use Linux, WSL, or the Dockerfile in docker/.")

    venv = options.venv.absolute()
    build = options.build
    if build == "auto":
        build = "cuda" if has_gpu() else "cpu"
    steps = plan(build, options.dev, not options.no_project)
    stamp = Stamp(venv)
    other = "cpu" if build == "cuda" else "cuda"
    if other in stamp.done:
        stop(
            f"{venv} holds the {other} build, and two vLLMs do not fit in one environment.\n"
            f"Fix: make clean, then the same command; or stay with what is there: BUILD={other}"
        )
    todo = [step for step in steps if not stamp.holds(step)]
    if not todo:
        return
    if todo[0].name == "venv":
        todo = steps

    if build == "cpu":
        need_libraries()
    started = time.monotonic()
    print(f"Installing Ouro Serve ({build} build) into {venv}", flush=True)
    for step in todo:
        print(f"[{steps.index(step) + 1}/{len(steps)}] {step.says}", flush=True)
        step.run(venv)
        stamp.add(step)
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


def plan(build: str, dev: bool = False, project: bool = True) -> list[Step]:
    """Every step of a build, in order; leaving some out changes no other."""
    steps = [Step("venv", "a virtual environment", (), make_venv)]
    if build == "cuda":
        steps.append(listed("cuda", "vLLM for CUDA and what it needs (several GB)"))
    else:
        steps.append(listed("cpu", "vLLM's CPU build and pinned packages", "--no-deps"))
        says = f"{pinned_torch()}, CPU build (about 190 MB)"
        steps.append(Step("torch-cpu", says, ("requirements/torch-cpu.txt",), pip_torch))
    if dev:
        steps.append(listed("dev", "test and check tools", "--no-deps"))
        if build == "cpu":
            steps.append(listed("kernels", "triton, for kernel tests", "--no-deps"))
            oldest = ("requirements/kernels-oldest.txt",)
            says = "the oldest triton that kernels are tested with"
            steps.append(Step("kernels-oldest", says, oldest, pip_oldest_triton))
    if project:
        files = ("pyproject.toml", "ouro_runtime/__init__.py")
        steps.append(Step("project", "Ouro Serve itself (editable)", files, pip_project))
    return steps


def listed(name: str, says: str, *options: str) -> Step:
    """The step that installs a list of requirements/."""
    file = f"requirements/{name}.txt"
    return Step(name, says, (file,), lambda venv: pip(venv, *options, "-r", file))


class Stamp:
    """The steps a venv has behind it, in a file inside the venv."""

    def __init__(self, venv: Path) -> None:
        self.path = venv / "ouro-installed.json"
        self.done: dict[str, str] = {}
        # Without its interpreter (a deleted or replaced Python) a venv is no venv.
        if python_of(venv).exists() and self.path.exists():
            try:
                self.done = json.loads(self.path.read_text())
            except ValueError:
                self.done = {}

    def holds(self, step: Step) -> bool:
        return self.done.get(step.name) == step.key()

    def add(self, step: Step) -> None:
        """Write `step` down; whatever a new venv once held is gone with the old one."""
        if step.name == "venv":
            self.done = {}
        self.done[step.name] = step.key()
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.done, indent=1) + "\n")
        part.replace(self.path)


def need_python(arguments: list[str]) -> None:
    """Return on Python 3.11 or newer; else run this again with a newer one, or say what to do."""
    if sys.version_info >= OLDEST:
        return
    for name in ("python3.11", "python3.12", "python3.13"):
        newer = shutil.which(name)
        if newer:
            os.execv(newer, [newer, __file__, *arguments])
    stop(
        f"Ouro Serve needs Python 3.11 or newer; {sys.executable} is {python_version()}.\n"
        "Fix: install one and name it, for example: make serve PYTHON=python3.11"
    )


def need_libraries() -> None:
    """Say before a long download what pip cannot bring."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        stop(
            "vLLM's CPU build needs libnuma, a small system library.\n"
            "Fix: apt-get install libnuma1 (Debian, Ubuntu) or dnf install numactl-libs (Fedora)"
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        print(
            "Note: no C++ compiler found. vLLM compiles the model with it when it starts: install "
            "g++, or serve more slowly without: make serve ARGS=--enforce-eager",
            flush=True,
        )


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU with a working driver."""
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and "GPU" in asked.stdout


def make_venv(venv: Path) -> None:
    try:
        import ensurepip  # noqa: F401
        import venv as module
    except ImportError:
        stop(
            f"{sys.executable} cannot make virtual environments.\n"
            f"Fix: install the package python{sys.version_info[0]}.{sys.version_info[1]}-venv "
            "(Debian, Ubuntu), or name another Python: make serve PYTHON=..."
        )
    # A venv that works is kept: its packages may be the right ones, and pip will tell.
    works = output([python_of(venv), "-c", f"import sys, pip; print(sys.version_info >= {OLDEST})"])
    if works != "True":
        module.EnvBuilder(with_pip=True, clear=venv.exists()).create(venv)


def pip_torch(venv: Path) -> None:
    """Install torch's CPU build, and make sure that it is one."""
    torch = pinned_torch()
    print(f"      looking at {CPU_INDEX}", flush=True)
    options = ["--no-deps", "--timeout", "15", "--retries", "1"]
    found = run_pip(venv, *options, "--index-url", CPU_INDEX, f"{torch}+cpu", quiet=True)
    if found != 0:
        print("      not reached; looking where pip is configured to look", flush=True)
        if run_pip(venv, "--no-deps", torch) != 0:
            stop(f"pip found no {torch} for this Python and machine.\nFix: {CPU_TORCH_HELP}")
    cuda = output([python_of(venv), "-c", "import torch; print(torch.version.cuda)"])
    if cuda != "None":
        run_pip(venv, torch, command=("uninstall", "-y"), quiet=True)
        stop(
            f"pip found {torch} built for CUDA {cuda} only, not a CPU build.\nFix: {CPU_TORCH_HELP}"
        )


def pip_oldest_triton(venv: Path) -> None:
    """Into a folder of its own: a venv holds one triton, and the kernels are tested with two."""
    folder = venv / "triton-oldest"
    shutil.rmtree(folder, ignore_errors=True)
    pip(venv, "--no-deps", "--target", str(folder), "-r", "requirements/kernels-oldest.txt")


def pip_project(venv: Path) -> None:
    # No build isolation: setuptools is on the lists, so nothing more is downloaded.
    pip(venv, "--no-deps", "--no-build-isolation", "-e", ".")


def pip(venv: Path, *arguments: str) -> None:
    """`pip install`, or stop with what to do."""
    if run_pip(venv, *arguments) != 0:
        stop(
            "pip failed, see above. Once that is mended the same command goes on where it stopped."
        )


def run_pip(
    venv: Path, *arguments: str, command: tuple[str, ...] = ("install",), quiet: bool = False
) -> int:
    """Run pip in the venv and show how far it is; if it fails and is not `quiet`, all it said."""
    line = [python_of(venv), "-m", "pip", *command, *arguments]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    said: list[str] = []
    with subprocess.Popen(
        [str(part) for part in line],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        show = Progress()
        for text in process.stdout:
            said.append(text)
            show.line(text)
        show.close()
    if process.returncode != 0 and not quiet:
        print("".join(said), file=sys.stderr)
    return process.returncode


class Progress:
    """pip's hundreds of lines as one that moves, or as a line now and then where none can."""

    EVERY_SECONDS = 10

    def __init__(self) -> None:
        self.moves = sys.stdout.isatty()
        self.count = 0
        self.shown = time.monotonic()

    def line(self, text: str) -> None:
        """Take in a line of pip's output."""
        found = re.match(r"(Collecting|Installing collected packages|Building) *:? *([^ ,]*)", text)
        if not found:
            return
        doing, what = found.groups()
        if doing == "Collecting":
            self.count += 1
            self.show(f"package {self.count}: {what.strip()}")
        elif doing.startswith("Installing"):
            self.show("unpacking", always=True)

    def show(self, text: str, always: bool = False) -> None:
        if self.moves:
            print(f"\r\033[K      {text}", end="", flush=True)
        elif always or time.monotonic() - self.shown > self.EVERY_SECONDS:
            self.shown = time.monotonic()
            print(f"      {text}", flush=True)

    def close(self) -> None:
        if self.moves:
            print("\r\033[K", end="", flush=True)


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def python_version() -> str:
    return platform.python_version()


def pinned_torch() -> str:
    """`torch==x.y.z` of requirements/torch-cpu.txt."""
    lines = (ROOT / "requirements" / "torch-cpu.txt").read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith("torch=="))


def output(command: list[object]) -> str:
    """A command's output, or an empty string if it failed."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def stop(message: str) -> NoReturn:
    sys.exit(f"\ninstall: {message}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on where it stopped.")
