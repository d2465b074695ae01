"""What must be installed: checked once at import, with an error that names what was found and what to install."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["TIMM", "check_timm", "missing_package"]

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


def missing_package(module: str, package: str, extra: str) -> ImportError:
    """The error of a module of this package that needs an optional one."""
    return ImportError(
        f"{module} needs {package}, which comes with the extra {extra}: install effvit[{extra}] "
        "(README, section on OpenMMLab, has the steps), or use the models without it"
    )
