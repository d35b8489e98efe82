"""Packages that only some formats need: imported when they are used, and missed with the name of their extra."""

import importlib
import importlib.util
from types import ModuleType

from ultrathink_model.errors import DependencyError


def require(package: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        DependencyError: It is not installed.
    """
    require_all([package], extra)
    return importlib.import_module(package)


def require_all(packages: list[str], extra: str) -> None:
    """Refuses to go on without packages, before anything has been computed.

    Raises:
        DependencyError: One is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise DependencyError(
            f"{', '.join(missing)} is not installed; `pip install 'ultrathink-model[{extra}]'`, or in a checkout "
            f"`.venv/bin/uv pip install --python .venv/bin/python --constraint constraints.txt -e '.[{extra}]'`."
        )
