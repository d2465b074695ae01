"""Find the selector that hands over at most so many tokens of a tower with the least loss or change of outputs.

What a language model would make of them is not known here. The tower's own last blocks and head read them in its place
(``effvit.measure.read_on``), so the tower needs a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from effvit.measure.costs import macs_of
from effvit.measure.fidelity import Outputs, classified, compare_outputs, outputs
from effvit.measure.profiler import Measurement, Options, machine, profile_models
from effvit.measure.read_on import ReadOn
from effvit.measure.records import as_json
from effvit.measure.selections import Exit, Selecting, all_tokens, check_selectors, list_image_selectors, select
from effvit.measure.tune import conditions_of, front, measure_of
from effvit.measure.values import Candidate, Classified, Fidelity, FreeChoices, Tuning
from effvit.measure.variants import reduce_by
from effvit.messages import one_line
from effvit.protocols import Size
from effvit.schedule import check_count
from effvit.selectors import TokenSelector, count_tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CONTROLS", "most_tokens", "tune_tokens"]

CONTROLS = ("random", "uniform")
SEEDS = range(3)  # of the random control


class Tried(NamedTuple):
    """A selection that can be made, and how far its outputs are from those of all tokens."""

    selecting: Selecting
    method: str
    model: TokenSelector
    fidelity: Fidelity
    classified: Classified | None

    @property
    def penalty(self) -> float:
        """The loss on labelled images, else the divergence."""
        return self.fidelity.divergence if self.classified is None else self.classified.loss


def most_tokens(method: str, grid: Size, limit: int) -> int:
    """The largest number of tokens up to ``limit`` that a selector gives for a grid of cells (H, W).

    Raises:
        ValueError: It gives none of them; the message is that for ``limit``.
    """
    try:
        count_tokens(method, grid, keep=limit)
    except ValueError:
        for keep in range(limit - 1, 0, -1):
            if gives(method, grid, keep):
                return keep
        raise
    return limit


def gives(method: str, grid: Size, keep: int) -> bool:
    """Whether a selector leaves ``keep`` tokens of a grid."""
    try:
        return count_tokens(method, grid, keep=keep) == keep
    except ValueError:
        return False


def tune_tokens(
    dense: nn.Module,
    images: Tensor,
    tokens: int,
    *,
    labels: Tensor | None = None,
    data: str | None = None,
    selectors: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    leaving: Exit | None = None,
    batch_size: int = 8,
    rounds: int = 10,
    host: str | None = None,
    on_run: Callable[[str], None] | None = None,
    **options: Unpack[Options],
) -> Tuning:
    """The selector with the least penalty among those that hand over at most ``tokens`` tokens of an image.

    Each is asked for the largest number that it can give. The penalty is the cross-entropy loss where labels are
    given, else the divergence from the outputs with all tokens; the tower's own last blocks and head read what is
    handed over. All are timed beside the tower that hands over everything. The choice is held against as many patches
    at random, the mean of three draws, and evenly spaced ones, which are named in its place where they are as good.

    Args:
        dense: A timm ViT with a classifier.
        images: (B, channels, H, W), normalised as the model takes them.
        tokens: Most tokens to hand over.
        labels: (B,) int64 class of each image; None for images without.
        data: What the result calls the labelled set.
        selectors: Those to choose from, at their default settings; None: all for single images.
        methods: Reduction methods to try inside the tower too, each at its defaults, beside none.
        leaving: Where tokens leave, by default behind block -2; single patches alone, of a tower without a projector.
        batch_size: Images in the batch that is timed.
        rounds: To time them in.
        host: What the result calls the model.
        on_run: Called with a model's name after each timed run.
        options: Further keywords of ``profile_models``: threads, device, dtype, compile.

    Returns:
        The best beside all that were tried; what could not be tried stands in ``untried`` with the reason.

    Raises:
        ValueError: More tokens than the tower has patches, or a number that no selector can give.
    """
    leaving = leaving or Exit()
    check_count("tokens", tokens, 1)
    everything = all_tokens(dense, leaving)
    grid: Size = everything.patch_embed.grid_size
    if tokens > grid[0] * grid[1]:
        raise ValueError(
            f"tokens must be in 1 to {grid[0] * grid[1]}, the patches of this tower, got {tokens}; ask for fewer"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"every image has one label, got {len(images)} images and {len(labels)} labels")
    names = [name for name in list_image_selectors() if name not in CONTROLS] if selectors is None else list(selectors)
    check_selectors(names)
    reference = outputs(dense, images)

    def tried(tower: nn.Module, within: str, own: Selecting) -> Tried:
        model = select(tower, own, leaving)
        assert isinstance(model, TokenSelector), "images one by one"
        found = outputs(ReadOn(dense, model), images)
        method = " + ".join(filter(None, [within, own.method]))
        return Tried(own, method, model, *judged(reference, found, labels))

    found: list[Tried] = []
    left_out: list[str] = []
    for within in ("", *methods):
        tower = reduce_by(dense, within, {}) if within else dense
        for name in names:
            try:
                found.append(tried(tower, within, Selecting(name, most_tokens(name, grid, tokens), {})))
            except (TypeError, ValueError) as error:
                left_out.append(f"{' + '.join(filter(None, [within, name]))}: {one_line(error)}")
    if not found:
        raise ValueError(f"no selector here hands over {tokens} tokens of this tower: {'; '.join(left_out)}")
    choice = min(found, key=lambda own: own.penalty)
    keep = choice.selecting.keep
    controls = [tried(dense, "", Selecting("random", keep, {"seed": seed})) for seed in SEEDS]
    controls.append(tried(dense, "", Selecting("uniform", keep, {})))
    models: dict[str, nn.Module] = {"all tokens": everything}
    models |= {str(number): own.model for number, own in enumerate([*found, *controls])}
    size = (images.shape[1], images.shape[2], images.shape[3])
    speeds = profile_models(models, size, batch_size, rounds=rounds, images=images, on_run=on_run, **options)[1:]
    timed = [
        candidate(own, speed, macs_of(own.model, size, images).total)
        for own, speed in zip([*found, *controls], speeds, strict=True)
    ]
    own_candidates, of_controls = timed[: len(found)], timed[len(found) :]
    best = own_candidates[found.index(choice)]
    free = FreeChoices(best, of_controls[:-1], of_controls[-1:])
    named = {"rounds": rounds, "block": as_json(everything.settings["block"]), **measure_of(images, labels, data)}
    conditions = conditions_of(dense, batch_size, images, named, options)
    return Tuning(
        machine(conditions.device),
        conditions,
        {"tokens": tokens},
        free.better_default or best,
        front([*own_candidates, *of_controls[-1:]]),
        timed,
        host,
        untried=left_out or None,
        dense=None if labels is None else classified(reference, labels),
        free=free,
    )


def judged(reference: Outputs, own: Outputs, labels: Tensor | None) -> tuple[Fidelity, Classified | None]:
    """How far outputs are from those of the dense model, and how well they classify."""
    return compare_outputs(reference, own), None if labels is None else classified(own, labels)


def candidate(own: Tried, speed: Measurement, macs: int) -> Candidate:
    """A selection with what was measured of it."""
    settings = {"keep": own.selecting.keep, **own.selecting.settings}
    of_images = (own.fidelity, len(speed.seconds), own.classified)
    return Candidate(own.method, settings, macs, speed.speedup, speed.interval, *of_images)
