"""Runs every step of the Dockerfile in a clean folder, as far as a machine without Docker can, and says what it left out.

    python scripts/check_dockerfile.py --target cpu

Each COPY takes what the build context would hold after .dockerignore, each RUN is run in a shell with the stage's
environment; absolute paths are put below the folder. Users are not made: that needs root.
"""

import argparse
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
KEPT_CACHES = ("PIP_NO_CACHE_DIR", "UV_NO_CACHE")
NEEDS_ROOT = re.compile(r"^(groupadd|useradd|chown|apt-get)\b")


class Stage(NamedTuple):
    """One stage: what it begins from, and its instructions."""

    name: str
    source: str
    instructions: list[tuple[str, str]]


def read_stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name."""
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in re.sub(
        r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    ).splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            current = stages[name.strip()] = Stage(name.strip(), source.strip(), [])
        elif current is not None:
            current.instructions.append((word, rest.strip()))
    return stages


class Build:
    """A stage being carried out.

    Attributes:
        skipped: What could not be done here, in words.
    """

    def __init__(self, stages: dict[str, Stage], folder: Path, arguments: dict[str, str]) -> None:
        self._stages, self._folder, self._arguments = stages, folder, arguments
        self.skipped: list[str] = []
        self._done: dict[str, dict[str, str]] = {}

    def run(self, name: str) -> dict[str, str]:
        """Carries out a stage, after those that it needs; returns its environment."""
        if name in self._done:
            return self._done[name]
        stage = self._stages.get(name)
        if stage is None:
            self.skipped.append(f"FROM {name}: this machine's Python stands for it")
            return {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin", "PWD": "/"}
        root = self._folder / name
        environment = dict(self.run(stage.source))
        if stage.source in self._stages:
            shutil.copytree(self._folder / stage.source, root, symlinks=True, copy_function=os.link)
        root.mkdir(parents=True, exist_ok=True)
        for word, rest in stage.instructions:
            print(f"[{name}] {word} {rest[:100]}", flush=True)
            self._instruction(word, rest, root, environment)
        self._done[name] = environment
        return environment

    def _instruction(self, word: str, rest: str, root: Path, environment: dict[str, str]) -> None:
        match word:
            case "ENV":
                for key, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                    if key in KEPT_CACHES:
                        self.skipped.append(f"ENV {key}={value}: packages come from this machine's cache")
                        continue
                    environment[key] = _expand(value, environment)
            case "ARG":
                key, _, value = rest.partition("=")
                environment[key] = self._arguments.get(key, value)
            case "WORKDIR":
                environment["PWD"] = rest
                self._inside(root, rest).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(rest, root, environment)
            case "RUN":
                self._shell(rest, root, environment)
            case "USER" | "HEALTHCHECK" | "SHELL":
                self.skipped.append(f"{word} {rest}")
            case "CMD":
                self._command(rest, root, environment)
            case _:
                raise SystemExit(f"check_dockerfile.py does not know {word}")

    def _copy(self, rest: str, root: Path, environment: dict[str, str]) -> None:
        words = shlex.split(rest)
        options = [entry for entry in words if entry.startswith("--")]
        *sources, target = [entry for entry in words if not entry.startswith("--")]
        origin = next((option.removeprefix("--from=") for option in options if option.startswith("--from=")), None)
        if origin:
            self.run(origin)
        destination = self._inside(root, target if target.startswith("/") else f"{environment['PWD']}/{target}")
        for source in sources:
            found = self._folder / origin / source.lstrip("/") if origin else context_file(source)
            if found.is_dir():
                ignore = None if origin else shutil.ignore_patterns("__pycache__")
                link = os.link if origin else shutil.copy2
                shutil.copytree(
                    found, destination, symlinks=True, dirs_exist_ok=True, ignore=ignore, copy_function=link
                )
            else:
                into = destination / found.name if target.endswith("/") else destination
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)
        if origin:
            _move_scripts(destination, self._folder / origin, root)

    def _shell(self, command: str, root: Path, environment: dict[str, str]) -> None:
        parts = [part.strip() for part in command.split("&&")]
        kept = [part for part in parts if not NEEDS_ROOT.match(part)]
        self.skipped += [f"RUN {part}: needs root" for part in parts if part not in kept]
        if kept:
            self._execute(["bash", "-euo", "pipefail", "-c", self._below(" && ".join(kept), root)], root, environment)

    def _command(self, rest: str, root: Path, environment: dict[str, str]) -> None:
        environment["COMMAND"] = rest

    def _execute(self, command: list[str], root: Path, environment: dict[str, str]) -> None:
        host = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "UV_", "SSL_", "HOME"))}
        own = {key: self._below(value, root) for key, value in environment.items()}
        done = subprocess.run(command, cwd=self._inside(root, environment["PWD"]), env=host | own, check=False)
        if done.returncode:
            raise SystemExit(f"failed with {done.returncode}: {shlex.join(command)}")

    @staticmethod
    def _inside(root: Path, path: str) -> Path:
        return root / path.lstrip("/")

    def _below(self, text: str, root: Path) -> str:
        """The text with the image's own absolute folders put below the stage's root."""
        return re.sub(r"(?<![\w/.-])/(opt/venv|app)\b", rf"{root}/\1", text)


def context_file(name: str) -> Path:
    """A file or folder of the build context.

    Raises:
        SystemExit: .dockerignore keeps it out of the context, or it is not there.
    """
    rules = [line.strip() for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.strip()]
    is_in = True
    for rule in rules:
        pattern = rule.lstrip("!")
        if fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/"):
            is_in = rule.startswith("!")
    if not is_in or not (ROOT / name).exists():
        raise SystemExit(f"COPY {name}: it is not in the build context (.dockerignore)")
    return ROOT / name


def _expand(value: str, environment: dict[str, str]) -> str:
    return VARIABLE.sub(lambda match: environment.get(match[1], ""), value)


def _move_scripts(copied: Path, old: Path, new: Path) -> None:
    """Has the scripts of a copied environment name its new place: in an image both have the same path."""
    for script in (copied / "bin").glob("*") if (copied / "bin").is_dir() else ():
        if script.is_file() and not script.is_symlink() and str(old).encode() in (content := script.read_bytes()):
            mode = script.stat().st_mode
            script.unlink()  # it is a link to the old one
            script.write_bytes(content.replace(str(old).encode(), str(new).encode()))
            script.chmod(mode)


def main() -> None:
    """Builds a target in a folder and runs its command there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build takes it"
    )
    parser.add_argument("--folder", type=Path, help="where; by default a temporary one that is deleted")
    given = parser.parse_args()
    stages = read_stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    arguments = dict(entry.split("=", 1) for entry in given.build_arg)
    with tempfile.TemporaryDirectory(prefix="ultrathink-image-") as temporary:
        folder = given.folder or Path(temporary)
        build = Build(stages, folder, arguments)
        environment = build.run(given.target)
        size = sum(file.lstat().st_size for file in (folder / given.target).rglob("*") if file.is_file())
        command = environment.pop("COMMAND").strip("[]").replace('"', "").replace(",", " ").split()
        print(f"[{given.target}] CMD {' '.join(command)}", flush=True)
        build._execute(command, folder / given.target, environment)
        print(f"the image's own files: {size / 2**20:,.0f} MiB over the base image")
    print("left out here:")
    for line in build.skipped:
        print(f"  {line}")


if __name__ == "__main__":
    main()
