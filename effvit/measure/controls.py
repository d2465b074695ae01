"""What a method has to beat: the same token counts without a look at the image, and smaller images at the same MACs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import NamedTuple, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from effvit.block import copy_shared, set_child
from effvit.hosts.host import HOST_CLASSES, ReducedHost, sparsify
from effvit.hosts.surface import Reduced, patch_grid
from effvit.hosts.towers import ReducedTower
from effvit.hosts.windows import ReducedWindows
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.costs import macs_of
from effvit.measure.ideal import mean_counts, plain_parts
from effvit.protocols import Setting, Size
from effvit.reducers import METHODS, Reducer
from effvit.reducers.static_selection import Random, StaticSelection
from effvit.schedule import check_choice, check_number

__all__ = [
    "CONTROLS",
    "SEED",
    "Resized",
    "ResolutionControl",
    "control_name",
    "control_names",
    "control_of",
    "place_of",
    "resolution_control",
    "with_controls",
]

STATIC = [name for name, method in METHODS.items() if issubclass(method, StaticSelection) and method.any_number]
RESOLUTION = "resolution"
CONTROLS = [*STATIC, RESOLUTION]
"""What ``with_controls`` can put beside a model."""

SEED = ", seed "  # behind the name of a random control, before its seed

STEPS = {"block": "before", "queries": "pick", "mlp": "reduce"}
"""Place of a control -> the step of a ``Reducer`` that drops tokens there."""


class Resizable(Protocol):
    """What is asked of timm's plain ViTs."""

    in_chans: int

    def set_input_size(self, img_size: Size) -> None:
        """Take images (H, W) of another size, with the position table interpolated."""
        ...


class ResolutionControl(NamedTuple):
    """A dense model on smaller images.

    Attributes:
        model: The model, on copies of the weights, with its positions interpolated.
        size: (H, W) in pixels of the images it takes.
        macs: Its multiply-adds.
    """

    model: nn.Module
    size: Size
    macs: int


def control_of(
    model: nn.Module, method: str = "random", *, images: Tensor | None = None, share: bool = True, **settings: Setting
) -> ReducedHost:
    """The same host with as many tokens in every block as its method leaves, chosen without a look at the image.

    Patches are dropped in the blocks and at the place in the block where the method acts, so that the multiply-adds are
    those of the method without its own scores and products. EViT's fused token counts as one more patch, a merged token
    as one. Where a head pools patches and the method gives it all of them (clusters of Expedite, LV-ViT's head on every
    patch of merged tokens), the control's head still pools those that are left.

    Args:
        model: A plain ViT, reduced by a method; it is left as it is.
        method: The control, "random" or "uniform".
        images: (B, channels, H, W) as the model takes them, to count the tokens on. Needed for methods whose counts
            depend on the image (ATS, DyMU, ALGM): the control keeps the mean count of each block, rounded to a whole
            number. None: those of the size the model is made for.
        share: As for ``effvit.sparsify``.
        settings: Further settings of the control, which is ``seed`` for "random".

    Returns:
        The control, which fills dense maps as the model does.

    Raises:
        TypeError: No plain ViT reduced by a method.
        ValueError: No control of that name; counts that depend on the image, without images; a method that restores
            patches, or that drops at a place where a control cannot.
    """
    if isinstance(model, ReducedWindows):
        raise TypeError(
            f"a {type(model).__bases__[-1].__name__} gives its tokens back in every window, so that none are left out, "
            "and a control has no patches to choose; compare with the dense model (effvit.measure.fidelity) and with "
            "other settings (effvit.measure.tune)"
        )
    if not isinstance(model, ReducedHost):
        raise TypeError(
            f"a control follows a plain ViT that effvit.sparsify has reduced by a method, got a {type(model).__name__}"
        )
    check_choice("method", method, STATIC)
    drops = drops_of(model, images)
    places = {block: place_of(model.reducers[block]) for block in drops}
    if len(set(places.values())) > 1:
        raise ValueError(f"a control drops patches at one place of its blocks, but {model.method} at several: {places}")
    bare = copy_shared(model)  # whose thresholds and scores the control does not miss
    for block in bare.blocks:
        set_child(block, "reducer", None)
    schedule: dict[str, Setting] = {"reduce_at": list(drops), "num_tokens": list(drops.values())}
    schedule |= {"place": next(iter(places.values()), "block")}
    control = sparsify(bare, method, recover=model.recover, share=share, **schedule, **settings)
    return cast(ReducedHost, control)


def labelled(controls: Sequence[str], seeds: Sequence[int]) -> dict[str, tuple[str, int | None]]:
    """{what a control is called: (control, seed)}; a random one for each seed, the others without."""
    found: dict[str, tuple[str, int | None]] = {}
    for control in controls:
        check_choice("control", control, CONTROLS)
        if control == Random.name:
            found |= {f"{control}{SEED}{seed}": (control, seed) for seed in seeds}
        else:
            found[control] = control, None
    return found


def control_name(name: str, label: str) -> str:
    """What a control of a model is called beside it; of a random one the label ends with its seed."""
    return f"{name}, control {label}"


def control_names(names: Sequence[str], controls: Sequence[str], seeds: Sequence[int] = (0,)) -> list[str]:
    """The names of models, the dense one first, and behind each of the others those of its controls.

    Arguments and errors as for ``with_controls``.
    """
    labels = labelled(controls, seeds)
    others = [[name, *(control_name(name, label) for label in labels)] for name in names[1:]]
    return [*names[:1], *(name for group in others for name in group)]


def with_controls(
    models: Mapping[str, nn.Module], controls: Sequence[str], images: Tensor, seeds: Sequence[int] = (0,)
) -> dict[str, nn.Module]:
    """The models, each but the first followed by its controls, named as ``control_names`` says.

    Args:
        models: Name -> model, the dense one first and the others reduced forms of it; calibrated.
        controls: Some of CONTROLS: "random", "uniform", or "resolution" for the dense model on smaller images.
        images: (B, channels, H, W) that token counts and multiply-adds are means over where they depend on the image.
        seeds: Of the random controls.

    Raises:
        TypeError, ValueError: No control of that name, or a model without it: see ``control_of`` and
            ``resolution_control``.
    """
    labels = labelled(controls, seeds)
    (first, dense), *others = models.items()
    channels, height, width = images.shape[1:]
    found: dict[str, nn.Module] = {first: dense}
    for name, model in others:
        found[name] = model
        for label, (control, seed) in labels.items():
            if control == RESOLUTION:
                smaller = resolution_control(dense, macs_of(model, (channels, height, width), images).total)
                beside: nn.Module = Resized(smaller.model, smaller.size)
            else:
                order = control_of if seed is None else partial(control_of, seed=seed)
                beside = order(model, control, images=images)
            found[control_name(name, label)] = beside
    return found


class Resized(nn.Module):
    """A classifier that is handed images of another size than it takes.

    Attributes:
        model: The classifier.
        size: (H, W) of the images it takes, to which all are resized, bicubically and with antialiasing.
    """

    def __init__(self, model: nn.Module, size: Size) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.num_classes = model.num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, num_classes) of images (B, channels, H, W) of any size."""
        if tuple(x.shape[-2:]) != tuple(self.size):
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        scores: Tensor = self.model(x)
        return scores


def drops_of(model: ReducedHost, images: Tensor | None) -> dict[int, int]:
    """{block: patch tokens left} of the blocks that leave fewer than enter them; arguments as for ``control_of``."""
    if images is None and model.variable_length:
        raise ValueError(
            f"how many tokens {model.method} keeps depends on the image; give images=, on which to take the mean counts"
        )
    grid = model.patch_embed.grid_size if images is None else patch_grid(images, model)
    if images is None or not model.variable_length:
        counts = model.token_counts(grid)
    else:
        counts = [round(count) for count in mean_counts(model, images)]
    drops: dict[int, int] = {}
    for block, (entering, left) in enumerate(pairwise([prod(grid), *counts])):
        if left > entering:
            raise ValueError(
                f"{model.method} restores {left} tokens from {entering} in block {block}, but a control has no "
                "features to give back to the patches it dropped; compare with settings that restore none"
            )
        if left < entering:
            drops[block] = left
    return drops


def place_of(reducer: Reducer) -> str:
    """Where in its block a reducer drops tokens: one of ``effvit.reducers.static_selection.PLACES``.

    Raises:
        ValueError: It acts at several of them, or behind the block.
    """
    if reducer.place is not None:
        return reducer.place
    kind = type(reducer)
    acts = [step for step in (*STEPS.values(), "after") if getattr(kind, step) is not getattr(Reducer, step)]
    places = [place for place, step in STEPS.items() if [step] == acts]
    if not places:
        raise ValueError(
            f"a control drops patches in one of before, pick and reduce, but {reducer.name} acts in {', '.join(acts)}, "
            "so the place at which its tokens leave is not known; make the control by effvit.sparsify(host, 'random', "
            "reduce_at=..., num_tokens=..., place=...)"
        )
    return places[0]


def resolution_control(dense: nn.Module, macs: float) -> ResolutionControl:
    """The same model on images as small as its multiply-adds have to be, with nothing trained.

    What anybody can do without a method. The grid is the largest of whole patches, in the proportions of the model's
    own and at most as large, whose dense multiply-adds do not exceed the target.

    Args:
        dense: A plain ViT of timm that is not reduced; it is left as it is.
        macs: Multiply-adds of one image, for instance ``effvit.count_flops(reduced, size).total``.

    Raises:
        TypeError: No such ViT, or one without a closed form.
        ValueError: Fewer multiply-adds than one patch takes.
    """
    if isinstance(dense, Reduced):
        raise TypeError(f"the model is reduced by {dense.method} already; give its dense host")
    if type(dense) not in HOST_CLASSES:
        known = ", ".join(cls.__name__ for cls in HOST_CLASSES)
        raise TypeError(f"smaller images are for a plain ViT, which is one of {known}, got a {type(dense).__name__}")
    check_number("macs", macs, "positive")
    parts = plain_parts(dense)
    cell = parts.cell if isinstance(parts, ReducedTower) else 1
    patch, (height, width) = parts.patch_embed.patch_size, parts.patch_embed.grid_size
    longer = max(height, width)
    for side in range(longer, 0, -cell):
        rows, columns = (cell * max(1, round(whole * side / longer / cell)) for whole in (height, width))
        size = rows * patch[0], columns * patch[1]
        cost = sum(closed_form_macs(dense, (cast("Resizable", dense).in_chans, *size)).values())
        if cost <= macs:
            model = copy_shared(dense, share=False)
            if hasattr(model, "set_input_size") and not isinstance(parts, ReducedTower):  # others take any size
                cast("Resizable", model).set_input_size(size)
            return ResolutionControl(model, size, cost)
    least = "one patch" if cell == 1 else f"one cell of {cell} x {cell} patches"
    raise ValueError(f"macs must be at least {cost}, which this model takes for {least}, got {macs}")
