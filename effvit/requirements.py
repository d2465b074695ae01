"""What must be installed: checked once at import, with an error that names what was found and what to install."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TIMM", "check_timm", "optional"]

TIMM = (1, 0, 31), (1, 1, 0)  # from, and below: as in pyproject.toml


def check_timm() -> None:
    """Raise an ImportError unless the installed timm is one whose classes this package extends."""
    try:
        found = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    lowest, above = TIMM
    if numbers is None or not lowest <= tuple(map(int, numbers.groups())) < above:
        wanted = f"timm>={'.'.join(map(str, lowest))},<{'.'.join(map(str, above[:2]))}"
        raise ImportError(
            f"effvit extends the classes of timm and was tested with {wanted}, but found timm {found}; "
            f"install it: pip install '{wanted}'"
        )


@contextmanager
def optional(package: str, extra: str, module: str) -> Iterator[None]:
    """Where a module of this package imports an optional one: an ImportError that names the extra if it is missing.

    What the package itself misses is not ours to name, so that error stays as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        # mmcv is built against the installed torch, which pip does not do in one step.
        way = "run the commands that `effvit doctor` prints for it" if extra == "mm" else f"install effvit[{extra}]"
        raise ImportError(
            f"{module} needs {package}, which comes with the extra {extra}: {way}, or use the models without it"
        ) from error
