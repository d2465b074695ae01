"""``effvit doctor``: what is installed, whether it runs, and the command that installs what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from packaging.requirements import Requirement

import effvit
from effvit.cli import options
from effvit.cli.output import tell
from effvit.measure.records import SCHEMA
from effvit.messages import one_line, plain

__all__ = ["Extra", "Package", "add_command", "core_problem", "extras", "packages_of"]

# What each extra is for; the others of pyproject.toml are for work on the package itself.
PURPOSES = {
    "mm": "effvit train, effvit test, effvit check-data of a config, effvit.dense.openmmlab",
    "transformers": "effvit.dense.transformers, not beside mm",
    "demo": "effvit demo, images named photographs:*",
    "export": "effvit export",
    "imagenet": "effvit evaluate on the archives of ILSVRC 2012",
}
# mmcv compiles its operators only where it finds these and torch, which pip's isolated builds hide from it; without
# them it installs all the same, and no detector can be built. tests/test_doctor.py holds them to pyproject.toml.
MMCV_BUILD = ("setuptools>=80,<82", "wheel", "packaging", "ninja", "psutil")
FLAGS = "-O2 -g0"  # likewise
FORKED = {f"onedl-{name}": name for name in ("mmcv", "mmengine", "mmpretrain", "mmsegmentation")} | {
    "onedl-mmdetection": "mmdet"
}


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit doctor``."""

    json: bool


class Package(NamedTuple):
    """A distribution that the package needs.

    Attributes:
        name: Of the distribution, as pip has it.
        needed: Its versions, such as ">=1.0.31,<1.1"; "" for any.
        found: The version installed, or None.
        fits: Whether that is one of the versions needed.
    """

    name: str
    needed: str
    found: str | None
    fits: bool


class Extra(NamedTuple):
    """What a set of optional packages is for, and what is the matter with it.

    Attributes:
        name: Of the extra, as in ``effvit[name]``.
        purpose: What needs it.
        packages: Those it consists of.
        problems: Sentences on what is missing or cannot work; none if all is well.
        install: The command that mends it; None where pip cannot.
    """

    name: str
    purpose: str
    packages: list[Package]
    problems: list[str]
    install: str | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "doctor",
        help="what is installed, what is missing for which command, and how to install it",
        description="Print versions and devices, run a small reduced model, and say what is missing for which command. "
        "The status is 0 unless the package itself does not run.",
    )
    command.add_argument("--json", action="store_true", help="the same as one JSON object, also for effvit report")
    command.set_defaults(run=run_doctor)


def run_doctor(arguments: Arguments) -> int:
    """Print the findings; returns 1 if the core of the package does not run."""
    core, optional = packages_of(None), extras()
    devices = ["cpu"] + ([_accelerator()] if torch.accelerator.is_available() else [])
    problem = core_problem(core, devices)
    if arguments.json:
        found = {
            "schema": SCHEMA,
            "kind": "doctor",
            "effvit": effvit.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "devices": {device: _device_name(device) for device in devices},
            "core": {"problem": problem, "packages": [package._asdict() for package in core]},
            "extras": {
                extra.name: {**extra._asdict(), "packages": [package._asdict() for package in extra.packages]}
                for extra in optional
            },
        }
        print(json.dumps(found, indent=1))
        return int(problem is not None)
    lines = [
        f"effvit {effvit.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"devices: {', '.join(f'{device} ({_device_name(device)})' for device in devices)}",
        f"core: {_versions(core)}",
        f"  {problem or 'a reduced model runs on ' + ' and '.join(devices)}",
    ]
    for extra in optional:
        lines.append(f"{extra.name} ({extra.purpose}): {_versions(extra.packages)}")
        lines += [f"  {text}" for text in extra.problems]
        lines += [f"  install: {extra.install}"] if extra.problems and extra.install else []
    for line in lines:
        tell(line)
    return int(problem is not None)


def _accelerator() -> str:
    return str(torch.accelerator.current_accelerator())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def _versions(packages: Sequence[Package]) -> str:
    return ", ".join(f"{package.name} {package.found or 'missing'}" for package in packages)


def packages_of(extra: str | None) -> list[Package]:
    """Distributions that the installed package names in its metadata: its own for None, else those of an extra.

    Raises:
        ImportError: The package is imported from a folder and was never installed.
    """
    try:
        requirements = importlib.metadata.requires(effvit.__name__) or []
    except importlib.metadata.PackageNotFoundError as error:
        folder = Path(effvit.__file__).parents[1]
        raise ImportError(
            f"effvit is imported from {plain(folder)} without being installed, so that nothing says what it needs; run "
            f"pip install -e {plain(folder)}"
        ) from error
    found = []
    for requirement in map(Requirement, requirements):
        condition = requirement.marker
        of_core = condition is None or condition.evaluate({"extra": ""})
        if of_core if extra is None else condition is not None and not of_core and condition.evaluate({"extra": extra}):
            version = _installed(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            found.append(Package(requirement.name, str(requirement.specifier), version, fits))
    return found


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def core_problem(packages: Sequence[Package], devices: Sequence[str]) -> str | None:
    """Why the package does not run: a package it needs, or an error of a small reduced model; None if it runs."""
    lacking = _lacking(packages)
    if lacking:
        return f"{'; '.join(lacking)}: pip install --upgrade effvit"
    for device in devices:
        try:
            model = effvit.sparsify(timm.create_model("vit_nano_patch4_28"), "evit", keep_rate=0.5).to(device).eval()
            with torch.inference_mode():
                finite = bool(model(torch.zeros(1, 1, 28, 28, device=device)).isfinite().all())
        except Exception as error:  # whatever it is, it is what the caller asked for
            return f"a reduced model does not run on {device}: {type(error).__name__}: {one_line(error)}"
        if not finite:
            return f"a reduced model gives values on {device} that are not finite"
    return None


def _lacking(packages: Sequence[Package]) -> list[str]:
    return [
        f"needs {package.name}{package.needed}, found {package.found or 'none'}"
        for package in packages
        if not package.fits
    ]


def extras() -> list[Extra]:
    """The optional parts of the package and what is the matter with each."""
    found = []
    for name, purpose in PURPOSES.items():
        packages = packages_of(name)
        problems = _lacking(packages)
        install: str | None = f"pip install 'effvit[{name}]'"
        if not packages:  # of another Python, or an installation older than the extra
            problems, install = [f"the installed effvit has no such extra for Python {platform.python_version()}"], None
        elif name == "mm":
            problems += _problems_of_openmmlab()
            install = _install_openmmlab(packages)
        found.append(Extra(name, purpose, packages, problems, install))
    return found


def _problems_of_openmmlab() -> list[str]:
    """What versions do not tell: distributions that overwrite each other, and an mmcv without operators."""
    problems = [
        f"{fork} and {original} overwrite each other's files: pip uninstall both, then install again"
        for fork, original in FORKED.items()
        if _installed(fork) and _installed(original)
    ]
    spec = find_spec("mmcv")  # finds it without importing it
    if spec is not None and spec.origin is not None and not [*Path(spec.origin).parent.glob("_ext.*")]:
        problems.append("mmcv is installed without its compiled operators (mmcv._ext): pip uninstall it first")
    return problems


def _install_openmmlab(packages: Sequence[Package]) -> str:
    """Three steps in one line, since mmcv must be built where it finds torch; its build needs g++.

    Without debug symbols it takes less than half of the time.
    """
    needed = {package.name: f"'{package.name}{package.needed}'" for package in packages}
    first = " ".join([needed["torch"], *(f"'{text}'" for text in MMCV_BUILD)])
    mmcv = needed["onedl-mmcv"]
    build = f"CFLAGS='{FLAGS}' CXXFLAGS='{FLAGS}' pip install --no-build-isolation {mmcv}"
    return f"pip install {first} && {build} && pip install 'effvit[mm]'"
