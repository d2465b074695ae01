"""Check every method on every timm model that is a plain vision transformer, one with windows that methods know, or the
tower of a vision-language model.

For each name, a method that reduces nothing must give timm's output bit for bit, and its default setting must
run, be finite and remove tokens; or the pair must be refused for one of the reasons in REASONS. All else
is wrong. Models are the real architectures cut to DEPTH blocks and a GRID of patches, with random weights.

    python tools/check_hosts.py --pattern "*dinov3*" --methods evit tome --json hosts.json
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import is_model_in_modules, list_modules
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import effvit
from effvit.hosts.host import WINDOW_CLASSES, patch_embedding
from effvit.hosts.towers import TOWERS
from effvit.reducers import METHODS

__all__ = ["REASONS", "Outcome", "build", "check", "find_hosts", "main", "report", "summary"]

PLAIN_CLASSES = (
    *(VisionTransformer, VisionTransformerDistilled, Eva),
    *(Beit, VisionTransformerRelPos, NaFlexVit),
    *TOWERS,
)
DEPTH = 2
GRID = (5, 6)  # not square, so that swapped rows and columns show
TOWER_GRID = (6, 12)  # likewise, of whole cells for every projector
# Arguments that make small models of timm's modules with windows: padded ones, and maps that one window covers.
IMAGE = (96, 128)
WITH_WINDOWS: dict[str, dict[str, Any]] = {
    "hiera": {"stages": (1, 2, 2, 2), "img_size": IMAGE},
    "hieradet_sam2": {"stages": (1, 2, 3, 2), "global_att_blocks": (4,)},
    "swin_transformer": {"depths": (2, 1, 1, 1), "img_size": IMAGE},
    "swin_transformer_v2": {"depths": (2, 1, 1, 1), "img_size": IMAGE},
    "tiny_vit": {"depths": (1, 1, 2, 1)},
    "vision_transformer_sam": {"depth": DEPTH, "global_attn_indexes": (1,), "img_size": IMAGE},
}
# What a pair may be refused for: a word for the table, and the message that says so.
REASONS = {
    "block class": r"^blocks\.\d+ is an? \w+, which token reduction does not know",
    "attention class": r"^blocks\.\d+\.attn is an? \w+, which token reduction does not know",
    "no class token": r"scores patches by the class token, but this \w+ has none",
    "windows": r"does not work inside windows",
    "attention pooling": r"which attention pooling .* cannot tell from padding",
}
# What takes the place of defaults. No windows of noise are as alike under random weights as ALGM's threshold asks: at
# this one all are merged.
OF_NOISE: dict[str, dict[str, Any]] = {"algm": {"threshold": -1.0}}


class Outcome(NamedTuple):
    """What one check of a host with a method came to.

    Attributes:
        result: "good", "refused" or "wrong".
        reason: For "refused" a key of REASONS, for "wrong" what happened, else empty.
    """

    result: str
    reason: str = ""


Outcomes = dict[str, dict[str, dict[str, Outcome]]]  # {host: {method: {check: outcome}}}


def small_arguments(name: str, naflex: bool = False) -> dict[str, Any] | None:
    """Arguments that make a small model of timm's ``name``; None if it is no vision transformer that methods know.

    With ``naflex`` a ``NaFlexVit`` of it, None if timm makes none of that name.
    """
    for module, arguments in WITH_WINDOWS.items():
        if is_model_in_modules(name, [module]):
            with torch.device("meta"):
                known = not naflex and type(timm.create_model(name, **arguments)) in WINDOW_CLASSES
            return dict(arguments) if known else None
    small: dict[str, Any] = {"depth": DEPTH} | ({"use_naflex": True} if naflex else {})
    with torch.device("meta"):
        try:
            model = timm.create_model(name, **small)
        except AssertionError:  # the number of key heads is given for each block: take the first and a middle one
            model = timm.create_model(name, **({"use_naflex": True} if naflex else {}))
            heads = [block.attn.num_heads // block.attn.num_kv_groups for block in model.blocks]
            small["num_kv_heads"] = (heads[0], heads[len(heads) // 2])
        except (TypeError, ValueError):
            if naflex:  # builders that do not know the word, and configurations that NaFlexVit lacks
                return None
            raise
    if type(model) not in PLAIN_CLASSES or (naflex and type(model) is not NaFlexVit):
        return None
    embed = patch_embedding(model)
    assert embed is not None
    if type(model) in TOWERS:
        return small | {"img_size": tuple(TOWER_GRID[i] * embed.patch_size[i] for i in (0, 1))}
    stride = [pixels // patches for pixels, patches in zip(embed.img_size, embed.grid_size, strict=True)]
    return small | {"img_size": (GRID[0] * stride[0], GRID[1] * stride[1])}


def find_hosts(pattern: str = "*", naflex: bool = False) -> dict[str, dict[str, Any]]:
    """{name: arguments of a small one} of all vision transformers that methods know, if the name matches the pattern.

    With ``naflex`` of those of which timm makes a ``NaFlexVit`` by ``use_naflex=True``. Every name of the modules that
    know one of PLAIN_CLASSES or have windows is created, on the meta device.
    """
    contents = {name: vars(sys.modules.get(f"timm.models.{name}", object)).values() for name in list_modules()}
    modules = [name for name, content in contents.items() if any(cls in content for cls in PLAIN_CLASSES)]
    names = sorted({name for module in (*modules, *WITH_WINDOWS) for name in timm.list_models(module=module)})
    arguments = {name: small_arguments(name, naflex) for name in names if fnmatch.fnmatch(name, pattern)}
    return {name: small for name, small in arguments.items() if small is not None}


def build(name: str, small: dict[str, Any]) -> nn.Module:
    """The small model of ``name`` with random weights, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim not in (
                2,
                4,
            ):  # biases, norms, LayerScale (1e-5 at first) and tokens are constants
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def everything(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Class scores, final features, and the maps of all blocks."""
    final, maps = model.forward_intermediates(x)
    return [model(x), final, *maps]


def check_off(dense: nn.Module, method: str, x: Tensor, expected: list[Tensor]) -> Outcome:
    """Whether the method gives timm's numbers bit for bit when it reduces nothing."""
    own = everything(effvit.sparsify(dense, method, **METHODS[method].off()), x)
    if not all(torch.equal(a, b) for a, b in zip(own, expected, strict=True)):
        return Outcome("wrong", "differs from timm although nothing is reduced")
    return Outcome("good")


def check_default(dense: nn.Module, method: str, x: Tensor, expected: list[Tensor]) -> Outcome:
    """Whether the default setting, or that of OF_NOISE, removes tokens and gives finite scores, features and maps."""
    model = effvit.sparsify(dense, method, **OF_NOISE.get(method, {}))
    if type(dense) in WINDOW_CLASSES:
        return check_windows(model, x, expected)
    if "thresholds" in model.settings:
        effvit.calibrate(model, [x])
    scores, features = model(x), model.forward_tokens(x, memory=True)
    dense_map = effvit.to_map(*features)
    if scores.shape != expected[0].shape or dense_map.shape != expected[-1].shape:
        return Outcome("wrong", f"shapes are {tuple(scores.shape)} and {tuple(dense_map.shape)}")
    if not all(y.isfinite().all() for y in (scores, features.x, dense_map)):
        return Outcome("wrong", "output is not finite")
    left = int(features.tokens.counts()[0])
    if not 0 < left < features.tokens.num_patches:
        return Outcome("wrong", f"{left} of {features.tokens.num_patches} tokens are left")
    return Outcome("good")


def check_windows(model: nn.Module, x: Tensor, expected: list[Tensor]) -> Outcome:
    """Whether a model reduced in its windows gives finite scores, features and maps of full size, and others."""
    own = everything(model, x)
    if [y.shape for y in own] != [y.shape for y in expected]:
        return Outcome("wrong", f"shapes are {', '.join(str(tuple(y.shape)) for y in own)}")
    if not all(y.isfinite().all() for y in own):
        return Outcome("wrong", "output is not finite")
    if all(torch.equal(a, b) for a, b in zip(own, expected, strict=True)):  # a head at its start hides most of it
        return Outcome("wrong", "nothing is reduced")
    return Outcome("good")


CHECKS: dict[str, Callable[[nn.Module, str, Tensor, list[Tensor]], Outcome]] = {
    "off": check_off,
    "default": check_default,
}


@torch.no_grad()
def check(dense: nn.Module, methods: Sequence[str], x: Tensor) -> dict[str, dict[str, Outcome]]:
    """{method: {check: outcome}} of the host ``dense`` on the images x."""
    expected = everything(dense, x)
    return {method: {name: attempt(name, dense, method, x, expected) for name in CHECKS} for method in methods}


def attempt(name: str, dense: nn.Module, method: str, x: Tensor, expected: list[Tensor]) -> Outcome:
    """The outcome of one check; an error that is no documented refusal is a finding, not the end."""
    try:
        return CHECKS[name](dense, method, x, expected)
    except Exception as error:
        documented = isinstance(error, (ValueError, TypeError))
        for label, message in REASONS.items():
            if documented and re.search(message, str(error)):
                return Outcome("refused", label)
        return Outcome("wrong", f"{type(error).__name__}: {error}")


def summary(outcomes: Outcomes) -> str:
    """Table of the outcomes, the reasons of refusals with their numbers, and everything that is wrong."""
    methods = list(next(iter(outcomes.values()), {}))
    lines = [
        f"{len(outcomes)} hosts of timm {timm.__version__}, {DEPTH} blocks, {GRID[0]} x {GRID[1]} patches, of towers "
        f"{TOWER_GRID[0]} x {TOWER_GRID[1]}",
        f"{'':<12}{'nothing reduced':^27}{'default setting':^27}",
        f"{'method':<12}" + "".join(f"{head:>9}" for head in ("exact", "refused", "wrong", "runs", "refused", "wrong")),
    ]
    refused, wrong = [], []
    for method in methods:
        cells = ""
        for name in CHECKS:
            ended = {host: by_method[method][name] for host, by_method in outcomes.items()}
            results = Counter(outcome.result for outcome in ended.values())
            cells += "".join(f"{results[result]:>9}" for result in ("good", "refused", "wrong"))
            reasons = Counter(outcome.reason for outcome in ended.values() if outcome.result == "refused")
            refused += [f"  {method}, {name}: {number} {reason}" for reason, number in reasons.most_common()]
            wrong += [f"  {h}, {method}, {name}: {o.reason}" for h, o in ended.items() if o.result == "wrong"]
        lines.append(f"{method:<12}{cells}")
    return "\n".join([*lines, "refused:", *(refused or ["  none"]), "wrong:", *(wrong or ["  none"])])


def report(outcomes: Outcomes) -> dict[str, Any]:
    """The outcomes JSON-plain: for each host, method and check the result, and the reason behind a colon."""
    hosts = {
        host: {
            method: {name: ": ".join(filter(None, outcome)) for name, outcome in by_check.items()}
            for method, by_check in by_method.items()
        }
        for host, by_method in outcomes.items()
    }
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    return {"depth": DEPTH, "grid": GRID, "tower_grid": TOWER_GRID, "versions": versions, "hosts": hosts}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pattern", default="*", help="shell-style pattern of timm names")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--naflex", action="store_true", help="make them NaFlexVit models by use_naflex=True")
    parser.add_argument("--json", type=Path, help="file to write every outcome to")
    args = parser.parse_args(argv)

    hosts = find_hosts(args.pattern, args.naflex)
    if not hosts:
        parser.error(f"no vision transformer of timm that methods know matches {args.pattern!r}")
    outcomes: Outcomes = {}
    started = time.monotonic()
    for number, (name, small) in enumerate(hosts.items(), 1):
        dense = build(name, small)
        outcomes[name] = check(dense, args.methods, torch.randn(1, 3, *small.get("img_size", IMAGE)))
        print(f"{number}/{len(hosts)} {time.monotonic() - started:.0f} s {name}", file=sys.stderr)
    print(summary(outcomes))
    if args.json:
        args.json.write_text(json.dumps(report(outcomes), indent=1) + "\n")
    return int("wrong" in {o.result for host in outcomes.values() for m in host.values() for o in m.values()})


if __name__ == "__main__":
    sys.exit(main())
