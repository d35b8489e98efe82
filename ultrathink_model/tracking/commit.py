"""The commit that this code was checked out at."""

import subprocess
from pathlib import Path

SECONDS = 10


def current_commit() -> str | None:
    """The commit's hash, with `-dirty` after it where files differ from it; None where the code is in no checkout."""
    here = Path(__file__).resolve()
    # Installed into somebody's environment, it lies within a repository that is not its own.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
