"""Find the method and schedule that reach a target speed-up on this machine with the least change to the outputs.

Speed is measured, beside the dense model in the same rounds; multiply-adds decide only if a number of them is asked
for. The change of the outputs needs images without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, nn

from effvit.hosts.host import ReducedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.fidelity import Outputs, compare_outputs, outputs
from effvit.measure.ideal import PlainViT, mean_counts
from effvit.measure.profiler import Options, machine, profile_models, setup_of
from effvit.measure.values import Candidate, Tuning, TuningConditions
from effvit.measure.variants import reduce_by
from effvit.protocols import Settings
from effvit.reducers import METHODS

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Family", "families", "front", "tune"]

TUNED = tuple(name for name, method in METHODS.items() if method.ladders(12, 196))


@dataclass(frozen=True)
class Family:
    """Settings of one method that differ in strength alone.

    Attributes:
        method: Name of the method.
        ladder: Settings from weak to strong.
    """

    method: str
    ladder: tuple[Settings, ...]


class Place(NamedTuple):
    """Where a setting stands: the number of the ladder, and that of its rung."""

    ladder: int
    rung: int


def families(dense: nn.Module, methods: Sequence[str] = TUNED) -> list[Family]:
    """Ladders of settings of the methods for a plain ViT; settings the model cannot take are left out.

    Raises:
        TypeError: A model that is no plain ViT.
        ValueError: A method that is not tuned, or none that the model can take.
    """
    unknown = [method for method in methods if method not in TUNED]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not tuned; tuned are {', '.join(TUNED)}")
    if not hasattr(dense, "blocks"):
        raise TypeError(f"tuned are plain ViTs, whose blocks follow each other in 'blocks', not {type(dense).__name__}")
    host = cast("PlainViT", dense)
    depth, patches = len(host.blocks), host.patch_embed.num_patches
    found = []
    for method in methods:
        for ladder in METHODS[method].ladders(depth, patches):
            usable = usable_part(dense, method, ladder)
            if usable:
                found.append(Family(method, tuple(usable)))
    if not found:
        raise ValueError(f"{type(dense).__name__} can take none of {', '.join(methods)}")
    return found


def usable_part(dense: nn.Module, method: str, ladder: Sequence[Settings]) -> Sequence[Settings]:
    """The ladder from the first setting the model can take to the last before one that leaves no token."""
    start = next((rung for rung, settings in enumerate(ladder) if can_take(dense, method, settings)), len(ladder))
    ladder = ladder[start:]
    end = weakest(lambda rungs: {0: not can_take(dense, method, ladder[rungs[0]])}, [len(ladder)])[0]
    return ladder[:end]


def can_take(dense: nn.Module, method: str, settings: Settings) -> bool:
    """True if the model accepts these settings."""
    try:
        reduce_by(dense, method, settings)
    except (ValueError, TypeError):
        return False
    return True


def weakest(reaches: Callable[[dict[int, int]], Mapping[int, bool]], lengths: Sequence[int]) -> dict[int, int | None]:
    """For each ladder the first rung that reaches the aim, by bisection of all ladders side by side.

    Args:
        reaches: Ladder -> rung to try; returns for each whether that rung reaches it. Higher rungs reach more.
        lengths: Rungs of each ladder.

    Returns:
        Ladder -> rung, None where even the last does not reach it.
    """
    low, high = dict.fromkeys(range(len(lengths)), 0), dict(enumerate(lengths))
    while any(low[ladder] < high[ladder] for ladder in low):
        tried = {ladder: (low[ladder] + high[ladder]) // 2 for ladder in low if low[ladder] < high[ladder]}
        for ladder, reached in reaches(tried).items():
            if reached:
                high[ladder] = tried[ladder]
            else:
                low[ladder] = tried[ladder] + 1
    return {ladder: rung if rung < lengths[ladder] else None for ladder, rung in low.items()}


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto front in speed-up and divergence, slowest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.speedup, c.fidelity.divergence)):
        if not best or candidate.fidelity.divergence < best[-1].fidelity.divergence:
            best.append(candidate)
    return best[::-1]


def tune(
    dense: nn.Module,
    images: Tensor,
    *,
    speedup: float | None = None,
    macs: int | None = None,
    methods: Sequence[str] = TUNED,
    batch_size: int = 8,
    rounds: int = 8,
    final_rounds: int = 40,
    on_run: Callable[[str], None] | None = None,
    **options: Unpack[Options],
) -> Tuning:
    """The setting with the least divergence from the dense model among those that reach the aim.

    The strength of each family is bisected, all families in the same interleaved rounds. The weakest settings that
    reach the aim and their neighbours are measured once more with more rounds, and a family that misses the aim then
    goes on to stronger settings. The one chosen is measured again alone with the dense model; that is the speed-up it
    is returned with, and if its interval lies below the aim, the choice goes on without it.

    Args:
        dense: A timm ViT that methods here can reduce.
        images: (B, channels, H, W), normalised as the model takes them.
        speedup: Wished speed-up over the dense model, above 1; or
        macs: Multiply-adds of one image not to exceed.
        methods: Methods to choose from.
        batch_size: Images in the batch that is timed.
        rounds: Of each step of the bisection.
        final_rounds: Of the last measurement.
        on_run: Called with a model's name after each timed run.
        options: Further keywords of ``profile_models``: threads, device, dtype, compile.

    Returns:
        The best setting beside all that were tried; it does not name the host.

    Raises:
        ValueError: Not exactly one aim, an aim out of reach, or a model or method that cannot be tuned.
    """
    if (speedup is None) == (macs is None):
        raise ValueError("give one aim: a speedup such as 1.5, or macs")
    if speedup is not None and not speedup > 1:
        raise ValueError(f"speedup must be above 1, got {speedup}")
    trials = Trials(dense, images, tuple(families(dense, methods)), batch_size, on_run, options)
    finals = trials.weakest_places(speedup, macs, rounds)
    best = trials.chosen(finals, speedup, final_rounds)
    if best is None:
        fastest = max((candidate.speedup for candidate in trials.tried.values()), default=1.0)
        aim = f"a speed-up of {speedup}" if macs is None else f"{macs} multiply-adds"
        raise ValueError(
            f"no setting of {', '.join(methods)} reaches {aim} here (fastest {fastest:.2f}x); ask for less, or "
            "measure with a larger batch_size, where reduction pays more"
        )
    named = {"images": len(images), "rounds": rounds, "final_rounds": final_rounds}
    setup = setup_of(options)
    others = {name: str(value) for name, value in options.items() if name not in setup}
    conditions = TuningConditions(
        batch_size=batch_size,
        input_size=trials.size,
        options={**named, **others},
        **setup,
    )
    tried = list(trials.tried.values())
    return Tuning(
        machine=machine(conditions.device),
        conditions=conditions,
        target={"speedup": speedup} if macs is None else {"macs": macs},
        best=best,
        front=front(tried),
        tried=tried,
    )


@dataclass
class Trials:
    """Settings of a dense model that are tried beside it.

    Attributes:
        dense: The model.
        images: (B, channels, H, W) to run on and to compare outputs on.
        families: Ladders of settings.
        batch_size: Images in the batch that is timed.
        on_run: Called with a name after each timed run.
        options: Of ``profile_models``.
        tried: What has been tried, by its place on the ladders.
    """

    dense: nn.Module
    images: Tensor
    families: Sequence[Family]
    batch_size: int
    on_run: Callable[[str], None] | None
    options: Options
    tried: dict[Place, Candidate] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int, int]:
        """(channels, H, W) of an image."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    @cached_property
    def reference(self) -> Outputs:
        """Outputs of the dense model."""
        return outputs(self.dense, self.images)

    def reduced(self, place: Place) -> nn.Module:
        """The model with the settings of a place."""
        family = self.families[place.ladder]
        return reduce_by(self.dense, family.method, family.ladder[place.rung])

    def measure(self, places: Iterable[Place], rounds: int) -> None:
        """Time the settings and the dense model in the same rounds; outputs and multiply-adds are looked at once."""
        named = {f"{place.ladder}.{place.rung}": place for place in places}
        models = {"dense": self.dense, **{name: self.reduced(place) for name, place in named.items()}}
        speeds = profile_models(
            models,
            self.size,
            self.batch_size,
            rounds=rounds,
            images=self.images,
            on_run=self.on_run,
            **self.options,
        )
        for speed in speeds[1:]:
            place = named[speed.name]
            known = self.tried.get(place) or self._compared(place, models[speed.name])
            self.tried[place] = replace(known, speedup=speed.speedup, interval=speed.interval)

    def _compared(self, place: Place, model: nn.Module) -> Candidate:
        """The setting of a place with all but its speed."""
        family = self.families[place.ladder]
        macs = multiply_adds(model, self.size, self.images)
        distances = compare_outputs(self.reference, outputs(model, self.images))
        return Candidate(family.method, family.ladder[place.rung], macs, 1.0, (1.0, 1.0), distances)

    def weakest_places(self, speedup: float | None, macs: int | None, rounds: int) -> set[Place]:
        """The weakest setting of each family that reaches the aim, by bisection; for a speed-up also its neighbours."""

        def reaches(rungs: dict[int, int]) -> dict[int, bool]:
            places = [Place(*item) for item in rungs.items()]
            if macs is not None:
                counts = [multiply_adds(self.reduced(place), self.size, self.images) for place in places]
                return dict(zip(rungs, (count <= macs for count in counts), strict=True))
            self.measure(places, rounds)
            return {place.ladder: self.tried[place].speedup >= (speedup or 0) for place in places}

        rungs = weakest(reaches, [len(family.ladder) for family in self.families])
        found = {Place(ladder, rung) for ladder, rung in rungs.items() if rung is not None}
        if speedup is None:
            return found
        # Few rounds may have stopped the bisection a rung early or late.
        beside = {Place(ladder, rung + step) for ladder, rung in found for step in (-1, 1)}
        return found | {place for place in beside if self.exists(place)}

    def exists(self, place: Place) -> bool:
        """Whether the ladder has that rung."""
        return 0 <= place.rung < len(self.families[place.ladder].ladder)

    def chosen(self, finals: set[Place], speedup: float | None, rounds: int) -> Candidate | None:
        """The setting with the least divergence among those that reach the aim; None if none does.

        Args:
            finals: Settings that may reach it.
            speedup: The aim; None means that all of them reach it.
            rounds: Of each measurement.
        """
        finals, fresh = set(finals), sorted(finals)
        while True:
            while fresh:
                self.measure(fresh, rounds)
                finals |= set(fresh)
                fresh = self.stronger(finals, speedup)
            reached = self.reached(finals, speedup)
            if not reached:
                return None
            winner = min(reached, key=lambda place: self.tried[place].fidelity.divergence)
            if speedup is None:
                return self.tried[winner]
            # The best of many noisy figures is too good on average: the winner has to reach the aim once more, alone.
            self.measure([winner], rounds)
            if self.tried[winner].interval[1] >= speedup:
                return self.tried[winner]
            fresh = self.stronger(finals, speedup)

    def reached(self, places: Iterable[Place], speedup: float | None) -> list[Place]:
        """Those of the places that reach the aim, as far as it is known now."""
        return [place for place in places if speedup is None or self.tried[place].speedup >= speedup]

    def stronger(self, finals: set[Place], speedup: float | None) -> list[Place]:
        """The next rung of each family that misses the aim now."""
        short = {place.ladder for place in finals} - {place.ladder for place in self.reached(finals, speedup)}
        last = {ladder: max(place.rung for place in finals if place.ladder == ladder) for ladder in sorted(short)}
        following = [Place(ladder, rung + 1) for ladder, rung in last.items()]
        return [place for place in following if self.exists(place)]


def multiply_adds(model: nn.Module, size: tuple[int, int, int], images: Tensor) -> int:
    """Multiply-adds of one image, from sizes; of the mean token counts where the images decide them."""
    counts = None
    if isinstance(model, ReducedHost) and model.variable_length:
        counts = [round(count) for count in mean_counts(model, images)]
    return sum(closed_form_macs(model, size, token_counts=counts).values())
