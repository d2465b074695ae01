"""Find the method and schedule that reach a target speed-up on this machine with the least loss or change of outputs.

Speed is measured, beside the dense model in the same rounds; multiply-adds decide only if a number of them is asked
for. On images with labels settings are chosen by their cross-entropy loss, on others by the divergence of their outputs
from the dense model's: both are called the penalty of a setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.draws import drawn
from effvit.measure.fidelity import Outputs, classified, compare_outputs, outputs
from effvit.measure.free_choices import FreeModel, default_models, random_controls
from effvit.measure.ideal import Parts, mean_counts, plain_parts
from effvit.measure.ladders import Family, Place, can_take, families, has_windows, usable_part, weakest
from effvit.measure.moves import improved
from effvit.measure.profiler import Measurement, Options, machine, profile_models, setup_of
from effvit.measure.records import as_json
from effvit.measure.resume import fingerprint, refuse_other_conditions
from effvit.measure.staircase import predicted, shortened, staircase_of, staircase_of_macs, token_counts
from effvit.measure.values import (
    DIVERGENCE,
    LOSS,
    Candidate,
    Classified,
    FreeChoices,
    Judged,
    Staircase,
    Tuning,
    TuningConditions,
)
from effvit.measure.variants import reduce_by
from effvit.messages import one_line
from effvit.protocols import Json, Settings
from effvit.reducers import METHODS
from effvit.reducers.block_schedule import BlockSchedule
from effvit.schedule import check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SEARCHES", "families", "front", "tune"]

# Of the minutes, after which a step gives way to the next.
SHARES = {"ladders": 0.4, "schedules": 0.65, "last": 0.9, "free": 1.0}
STRONGER = tuple(1 + 0.03 * rung for rung in range(11))  # times what a schedule takes, where it misses the aim
SEARCHES = {"moves": improved, "monte_carlo": drawn}  # for schedules that harm less
Key = tuple[str, str]
"""A method and its settings as JSON."""


class OutOfTime(Exception):
    """The minutes that were given are over."""


@dataclass
class Clock:
    """How long a search may go on.

    Attributes:
        minutes: In all; None for no limit.
        share: Of the minutes, until which it may go on now.
        begin: When it began, in seconds of ``time.monotonic``.
    """

    minutes: float | None
    share: float = SHARES["ladders"]
    begin: float = field(default_factory=lambda: monotonic())

    def check(self) -> None:
        """Raise ``OutOfTime`` where the share is used up."""
        if self.minutes is not None and monotonic() - self.begin > 60 * self.share * self.minutes:
            raise OutOfTime


@dataclass(frozen=True)
class Aim:
    """What a setting has to reach: a speed-up over the dense model, or a number of multiply-adds."""

    speedup: float | None
    macs: int | None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.macs is None):
            raise ValueError("give one aim: a speedup such as 1.5, or macs")
        if self.speedup is not None and not self.speedup > 1:
            raise ValueError(f"speedup must be above 1, got {self.speedup}")

    def __str__(self) -> str:
        return f"a speed-up of {self.speedup}" if self.macs is None else f"{self.macs} multiply-adds"

    def target(self) -> dict[str, float | None]:
        """As files of results hold it."""
        return {"speedup": self.speedup} if self.macs is None else {"macs": self.macs}

    def is_reached(self, candidate: Candidate) -> bool:
        """Whether a measured setting reaches it, and is faster than the dense model beyond doubt."""
        enough = candidate.speedup >= self.speedup if self.speedup is not None else candidate.macs <= (self.macs or 0)
        return enough and is_faster(candidate)


@dataclass(frozen=True)
class Effort:
    """How much a search measures: rounds of its steps and of what decides, schedules to judge for each method, and how.

    ``search`` is one of ``SEARCHES``.
    """

    rounds: int
    final_rounds: int
    moves: int
    search: str

    def named(self) -> dict[str, Json]:
        """As files of results hold it."""
        return {"rounds": self.rounds, "final_rounds": self.final_rounds}


def is_faster(candidate: Candidate) -> bool:
    """Whether the interval of the speed-up lies above 1."""
    return candidate.interval[0] > 1


def key_of(method: str, settings: Settings) -> Key:
    """What tells a setting from others, the same for tuples and lists."""
    return method, json.dumps(as_json(settings), sort_keys=True)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto front in speed-up and penalty, slowest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.speedup, c.penalty)):
        if not best or candidate.penalty < best[-1].penalty:
            best.append(candidate)
    return best[::-1]


def tune(
    dense: nn.Module,
    images: Tensor,
    *,
    speedup: float | None = None,
    macs: int | None = None,
    labels: Tensor | None = None,
    data: str | None = None,
    methods: Sequence[str] | None = None,
    batch_size: int = 8,
    rounds: int = 8,
    final_rounds: int = 40,
    moves: int = 60,
    search: str = "moves",
    minutes: float | None = None,
    host: str | None = None,
    before: Tuning | None = None,
    on_run: Callable[[str], None] | None = None,
    on_candidate: Callable[[Candidate | Judged, Tuning], None] | None = None,
    **options: Unpack[Options],
) -> Tuning:
    """The setting with the least penalty among those that reach the aim.

    The penalty is the cross-entropy loss where labels are given, else the divergence from the dense model's outputs.
    The strength of each family is bisected, all families in the same interleaved rounds. From the weakest setting of
    each method that reaches the aim, reduction then moves between blocks (``effvit.measure.moves``), or is drawn for
    them at random (``effvit.measure.draws``), at no more than the latency that the dense blocks have at these token
    counts (``effvit.measure.staircase``). The settings found and their neighbours are measured once more with more
    rounds, and a family that misses the aim then goes on to stronger settings. The one chosen is measured again alone
    with the dense model; that is the speed-up it is returned with, and if its interval lies below the aim, the choice
    goes on without it.

    Hosts with windows keep to the ladders: their tokens come back in every block, so that no reduction moves.

    It is then timed beside what needs no search (``effvit.measure.free_choices``): random choices of as many tokens,
    and the methods at their defaults. A default that is no worse and no slower is returned in its place.

    Args:
        dense: A model of timm that methods here can reduce.
        images: (B, channels, H, W), normalised as the model takes them.
        speedup: Wished speed-up over the dense model, above 1; or
        macs: Multiply-adds of one image not to exceed.
        labels: (B,) int64 class of each image, as the model numbers them; None for images without.
        data: What the result calls the labelled set.
        methods: Methods to choose from; None means all that have ladders.
        batch_size: Images in the batch that is timed.
        rounds: Of each step of the bisection.
        final_rounds: Of the last measurement.
        moves: Schedules to compare for each method on the way from a ladder's; 0 keeps to the ladders.
        search: How these are found: "moves" of reduction between two blocks of the best so far, or "monte_carlo",
            drawn at random.
        minutes: To stop in; what is left out then stands in ``untried``.
        host: What the result calls the model.
        before: A search to go on with, on the same model, images and machine.
        on_run: Called with a model's name after each timed run.
        on_candidate: Called with each setting that was judged or measured, and the search so far.
        options: Further keywords of ``profile_models``: threads, device, dtype, compile.

    Returns:
        The best setting beside all that were tried.

    Raises:
        ValueError: Not exactly one aim, an aim out of reach, not a label for each image, a model or method that cannot
            be tuned, a search to go on with that was made under other conditions.
    """
    check_choice("search", search, SEARCHES)
    aim, effort = Aim(speedup, macs), Effort(rounds, final_rounds, moves, search)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    if moves < 0:
        raise ValueError(f"moves must be at least 0, got {moves}; 0 keeps to the ladders of the methods")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"every image has one label, got {len(images)} images and {len(labels)} labels")
    ladders = families(dense, methods)
    measured_by = measure_of(images, labels, data)
    conditions = conditions_of(dense, batch_size, images, {**effort.named(), **measured_by}, options)
    empty = Tuning(machine(conditions.device), conditions, aim.target(), None, [], [], host)
    trials = Trials(
        dense, images, labels, ladders, batch_size, aim, effort, empty, Clock(minutes), on_run, on_candidate, options
    )
    if before is not None:
        refuse_other_conditions(before, empty)
        trials.go_on_from(before)
    return trials.search()


def measure_of(images: Tensor, labels: Tensor | None, data: str | None) -> dict[str, Json]:
    """What settings are chosen by, and on which images."""
    found: dict[str, Json] = {
        "measure": DIVERGENCE if labels is None else LOSS,
        "images": len(images),
        "pixels": fingerprint([images]),
    }
    if labels is not None:
        found["labels"] = fingerprint([labels])
    return found if data is None else found | {"data": data}


def conditions_of(
    dense: nn.Module, batch_size: int, images: Tensor, named: Mapping[str, Json], options: Options
) -> TuningConditions:
    """What a search with these options of ``profile_models`` holds for; ``named`` is further said of it."""
    setup = setup_of(options)
    others = {name: str(value) for name, value in options.items() if name not in setup}
    size = (images.shape[1], images.shape[2], images.shape[3])
    weights = fingerprint(dense.state_dict().values())
    return TuningConditions(batch_size, size, {**named, "weights": weights, **others}, **setup)


@dataclass
class Trials:
    """Settings of a dense model that are tried beside it.

    Attributes:
        dense: The model.
        images: (B, channels, H, W) to run on and to compare outputs on.
        labels: (B,) int64 their classes; None without.
        families: Ladders of settings; those of rearranged schedules are added to them.
        batch_size: Images in the batch that is timed.
        aim: What to reach.
        effort: How much to measure.
        empty: The result as long as nothing was tried.
        clock: How long to go on.
        on_run: Called with a name after each timed run.
        on_candidate: Called with each setting judged or measured, and the search so far.
        options: Of ``profile_models``.
        tried: What was measured.
        judged: What was compared with the dense outputs, and not measured.
        staircase: What the blocks cost, once it was measured.
        left: Step -> what is still to be done of it.
        free: What the choice was held against, once it was.
    """

    dense: nn.Module
    images: Tensor
    labels: Tensor | None
    families: list[Family]
    batch_size: int
    aim: Aim
    effort: Effort
    empty: Tuning
    clock: Clock
    on_run: Callable[[str], None] | None
    on_candidate: Callable[[Candidate | Judged, Tuning], None] | None
    options: Options
    tried: dict[Key, Candidate] = field(default_factory=dict)
    judged: dict[Key, Judged] = field(default_factory=dict)
    staircase: Staircase | None = None
    left: dict[str, str] = field(default_factory=dict)
    free: FreeChoices | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """(channels, H, W) of an image."""
        return self.empty.conditions.input_size

    @cached_property
    def host(self) -> Parts:
        """The model, as what is asked of it."""
        return plain_parts(self.dense)

    @cached_property
    def reference(self) -> Outputs:
        """Outputs of the dense model."""
        return outputs(self.dense, self.images)

    @cached_property
    def dense_classified(self) -> Classified | None:
        """How well the dense model classifies the images; None without labels."""
        return None if self.labels is None else classified(self.reference, self.labels)

    def go_on_from(self, before: Tuning) -> None:
        """Take over what an earlier search measured."""
        self.tried = {key_of(candidate.method, candidate.settings): candidate for candidate in before.tried}
        self.judged = {key_of(judged.method, judged.settings): judged for judged in before.judged or ()}
        self.staircase = before.staircase

    def so_far(self, best: Candidate | None = None) -> Tuning:
        """The search as it stands."""
        tried = list(self.tried.values())
        judged = [judged for key, judged in self.judged.items() if key not in self.tried]
        return replace(
            self.empty,
            best=best,
            front=front(tried),
            tried=tried,
            judged=judged or None,
            staircase=self.staircase,
            untried=list(self.left.values()) or None,
            dense=self.dense_classified,
            free=self.free,
        )

    # -- the steps of a search ----------------------------------------------------------------------------------------

    def search(self) -> Tuning:
        """The result, of as much as there is time for."""
        names = ", ".join(dict.fromkeys(family.method for family in self.families))
        self.left["ladders"] = f"the ladders of {names} to their ends"
        if self.effort.moves:
            self.left["schedules"] = f"schedules block by block of {names}"
        self.left["last"] = "the last measurement of what is chosen, alone with the dense model"
        try:
            found = self.weakest_places()
            del self.left["ladders"]
        except OutOfTime:
            found = self.weakest_known()
        self.clock.share = SHARES["schedules"]
        with suppress(OutOfTime):
            self.rearrange(found)
        self.clock.share = SHARES["last"]
        try:
            best = self.chosen(found)
            del self.left["last"]
        except OutOfTime:
            best = self.nearest(self.known_places())
        if best is None and not self.left:
            self.refuse_unreached(found)
        self.clock.share = SHARES["free"]
        return self.so_far(best and self.held_against_free(best))

    def refuse_unreached(self, found: set[Place]) -> None:
        """Raise a ValueError where there are faster settings than the dense model, but none that reaches the aim.

        With an aim of multiply-adds also where no setting comes down to them, and none was timed.
        """
        methods = ", ".join(dict.fromkeys(family.method for family in self.families))
        if self.aim.macs is not None and not found:
            last = [reduce_by(self.dense, family.method, family.ladder[-1]) for family in self.families]
            fewest = min(multiply_adds(model, self.size, self.images) for model in last)
            raise ValueError(
                f"no setting of {methods} comes down to {self.aim}: the fewest are {fewest}, {fewest / 1e9:.4g} GMACs; "
                "allow as many, or name other methods"
            )
        faster = [candidate.speedup for candidate in self.tried.values() if is_faster(candidate)]
        if faster:
            raise ValueError(
                f"no setting of {methods} reaches {self.aim} here (fastest {max(faster):.2f}x); ask for less, or "
                "measure with a larger batch_size, where reduction pays more"
            )

    def weakest_places(self) -> set[Place]:
        """The weakest setting of each family that reaches the aim, by bisection; for a speed-up also its neighbours."""
        macs = self.aim.macs

        def reaches(rungs: dict[int, int]) -> dict[int, bool]:
            places = [Place(*item) for item in rungs.items()]
            if macs is not None:
                self.clock.check()
                counts = [multiply_adds(self.reduced(place), self.size, self.images) for place in places]
                return dict(zip(rungs, (count <= macs for count in counts), strict=True))
            self.measure(places, self.effort.rounds)
            return {place.ladder: self.candidate(place).speedup >= (self.aim.speedup or 0) for place in places}

        rungs = weakest(reaches, [len(family.ladder) for family in self.families])
        found = {Place(ladder, rung) for ladder, rung in rungs.items() if rung is not None}
        if macs is not None:
            return found
        # Few rounds may have stopped the bisection a rung early or late.
        beside = {Place(ladder, rung + step) for ladder, rung in found for step in (-1, 1)}
        return found | {place for place in beside if self.exists(place)}

    def rearrange(self, found: set[Place]) -> None:
        """Add to ``found`` the first rung of a new ladder for each method, whose blocks were given other shares."""
        starts: dict[str, list[Place]] = {}
        for place in sorted(found):
            if self.aim.macs is not None or (self.is_measured(place) and self.aim.is_reached(self.candidate(place))):
                starts.setdefault(self.families[place.ladder].method, []).append(place)
        names = list(starts) if self.effort.moves and not has_windows(self.dense) else []
        steps = self.steps() if names else None
        for number, method in enumerate(names):
            self.left["schedules"] = f"schedules block by block of {', '.join(names[number:])}"
            best = min(starts[method], key=lambda place: self.penalty(*self.named(place)) or 0.0)
            ladder = self.moved(*self.named(best), steps) if steps is not None else []
            if ladder:
                self.families.append(Family(method, tuple(ladder)))
                found.add(Place(len(self.families) - 1, 0))
        self.left.pop("schedules", None)

    def moved(self, method: str, settings: Settings, steps: Staircase) -> Sequence[Settings]:
        """A ladder from the schedule that the search ends with; empty if it ends where it began."""
        grid, depth = self.host.patch_embed.grid_size, len(self.host.blocks)
        start = METHODS[method].block_schedule(settings, depth)
        if start is None:
            return []

        def cost(schedule: BlockSchedule) -> float | None:
            counts = token_counts(method, schedule.settings(), depth, grid)
            return None if counts is None else predicted(steps, grid[0] * grid[1], counts)

        search = SEARCHES[self.effort.search]
        best = search(start, cost, lambda s: self.penalty(method, s.settings()), self.effort.moves)
        if best == start:
            return []
        ladder = usable_part(self.dense, method, [best.scaled(factor).settings() for factor in STRONGER])
        if self.aim.macs is None:
            return ladder
        models = (reduce_by(self.dense, method, rung) for rung in ladder)
        macs = [multiply_adds(model, self.size, self.images) for model in models]
        return [rung for rung, count in zip(ladder, macs, strict=True) if count <= self.aim.macs]

    def steps(self) -> Staircase:
        """What the blocks cost at each number of tokens: measured once, or multiply-adds."""
        models = {} if self.aim.macs is not None else shortened(self.dense)
        if not models:
            return staircase_of_macs(self.dense, multiply_adds(self.dense, self.size, self.images))
        if self.staircase is None:
            named = {f"{count} tokens": model for count, model in models.items()}
            dense, *speeds = self.profile(named, self.effort.rounds)
            median = float(np.median(dense.seconds))
            seconds = {count: median / speed.speedup for count, speed in zip(models, speeds, strict=True)}
            self.staircase = staircase_of(seconds, len(self.host.blocks))
        return self.staircase

    def chosen(self, finals: set[Place]) -> Candidate | None:
        """The setting with the least penalty among those that reach the aim; None if none does.

        Args:
            finals: Settings that may reach it.
        """
        rounds, finals, fresh = self.effort.final_rounds, set(finals), sorted(finals)
        while True:
            while fresh:
                self.measure(fresh, rounds)
                finals |= set(fresh)
                fresh = self.stronger(finals)
            reached = self.reached(finals)
            if not reached:
                return None
            winner = min(reached, key=lambda place: self.candidate(place).penalty)
            if self.aim.speedup is None:
                return self.candidate(winner)
            # The best of many noisy figures is too good on average: the winner has to reach the aim once more, alone.
            self.measure([winner], rounds, again=True)
            alone = self.candidate(winner)
            if alone.interval[1] >= self.aim.speedup and is_faster(alone):
                return alone
            fresh = self.stronger(finals)

    def held_against_free(self, best: Candidate) -> Candidate:
        """The setting, or the default of a method that is no worse and no slower; fills ``free`` if there is time."""
        self.left["free"] = "the comparison of the choice with random choices and the defaults of the methods"
        with suppress(OutOfTime):
            self.free = self.compared_with_free(best)
            del self.left["free"]
        return best if self.free is None else self.free.better_default or best

    def compared_with_free(self, best: Candidate) -> FreeChoices:
        """The setting, its random controls and the defaults of the methods, timed in the same rounds."""
        choice, reason = reduce_by(self.dense, best.method, best.settings), None
        try:
            random = random_controls(choice, self.images)
        except (TypeError, ValueError) as error:  # a method that restores tokens, or drops them where no control can
            random, reason = [], one_line(error)
        defaults = default_models(self.dense, list(dict.fromkeys(family.method for family in self.families)))
        models = [FreeModel(best.method, best.settings, choice), *random, *defaults]
        speeds = self.profile({str(number): own.model for number, own in enumerate(models)}, self.effort.final_rounds)
        found = [self.timed(*own, speed) for own, speed in zip(models, speeds[1:], strict=True)]
        fast = [candidate for candidate in found[1 + len(random) :] if self.aim.is_reached(candidate)]
        for candidate in fast:
            self.tried[key_of(candidate.method, candidate.settings)] = candidate
        return FreeChoices(found[0], found[1 : 1 + len(random)], fast, reason)

    # -- places -------------------------------------------------------------------------------------------------------

    def named(self, place: Place) -> tuple[str, Settings]:
        """Method and settings of a place."""
        family = self.families[place.ladder]
        return family.method, family.ladder[place.rung]

    def reduced(self, place: Place) -> nn.Module:
        """The model with the settings of a place."""
        return reduce_by(self.dense, *self.named(place))

    def is_measured(self, place: Place) -> bool:
        """Whether its speed is known."""
        return key_of(*self.named(place)) in self.tried

    def candidate(self, place: Place) -> Candidate:
        """What was measured of a place."""
        return self.tried[key_of(*self.named(place))]

    def exists(self, place: Place) -> bool:
        """Whether the ladder has that rung."""
        return 0 <= place.rung < len(self.families[place.ladder].ladder)

    def known_places(self) -> set[Place]:
        """The places whose speed is known."""
        every = (Place(number, rung) for number, f in enumerate(self.families) for rung in range(len(f.ladder)))
        return {place for place in every if self.is_measured(place)}

    def weakest_known(self) -> set[Place]:
        """Of each ladder the weakest place that is known to reach the aim."""
        first: dict[int, Place] = {}
        for place in self.reached(self.known_places()):
            first.setdefault(place.ladder, place)
        return set(first.values())

    def nearest(self, places: Iterable[Place]) -> Candidate | None:
        """Of the places that reach the aim, the one with the least penalty."""
        reached = [self.candidate(place) for place in self.reached(places)]
        return min(reached, key=lambda candidate: candidate.penalty, default=None)

    def reached(self, places: Iterable[Place]) -> list[Place]:
        """Those of the places that reach the aim, as far as it is known now."""
        return [place for place in sorted(places) if self.aim.is_reached(self.candidate(place))]

    def stronger(self, finals: set[Place]) -> list[Place]:
        """The next rung of each family that misses the aim now; none where multiply-adds say what reaches it."""
        if self.aim.speedup is None:
            return []
        short = {place.ladder for place in finals} - {place.ladder for place in self.reached(finals)}
        last = {ladder: max(place.rung for place in finals if place.ladder == ladder) for ladder in sorted(short)}
        following = [Place(ladder, rung + 1) for ladder, rung in last.items()]
        return [place for place in following if self.exists(place)]

    # -- measurements -------------------------------------------------------------------------------------------------

    def measure(self, places: Iterable[Place], rounds: int, again: bool = False) -> None:
        """Time the settings and the dense model in the same rounds, but those that so many rounds were spent on.

        Args:
            places: Where the settings stand.
            rounds: To time them in.
            again: Time all of them, whatever is known.
        """
        named = {
            f"{place.ladder}.{place.rung}": place
            for place in places
            if again or not self.is_measured(place) or (self.candidate(place).rounds or 0) < rounds
        }
        if not named:
            return
        models = {name: self.reduced(place) for name, place in named.items()}
        for speed in self.profile(models, rounds)[1:]:
            method, settings = self.named(named[speed.name])
            key = key_of(method, settings)
            self.tried[key] = self.timed(method, settings, models[speed.name], speed)
            self.tell(self.tried[key])

    def profile(self, models: Mapping[str, nn.Module], rounds: int) -> list[Measurement]:
        """Speeds of the dense model and of others beside it; ``OutOfTime`` also in the midst of it."""

        def after_run(name: str) -> None:
            if self.on_run is not None:
                self.on_run(name)
            self.clock.check()

        self.clock.check()
        beside = {"dense": self.dense, **models}
        return profile_models(
            beside, self.size, self.batch_size, rounds=rounds, images=self.images, on_run=after_run, **self.options
        )

    def timed(self, method: str, settings: Settings, model: nn.Module, speed: Measurement) -> Candidate:
        """A setting with the speed that was measured of its model, and all else that is told of it."""
        key = key_of(method, settings)
        before = self.tried.get(key)
        known = before or self.judged.get(key) or self.judge(method, settings, model)
        macs = before.macs if before else multiply_adds(model, self.size, self.images)
        of_images = (known.fidelity, len(speed.seconds), known.classified)
        return Candidate(method, settings, macs, speed.speedup, speed.interval, *of_images)

    def judge(self, method: str, settings: Settings, model: nn.Module) -> Judged:
        """The outputs of a setting's model beside the dense model's, and beside the labels where there are any."""
        own = outputs(model, self.images)
        labelled = None if self.labels is None else classified(own, self.labels)
        return Judged(method, settings, compare_outputs(self.reference, own), labelled)

    def penalty(self, method: str, settings: Settings) -> float | None:
        """Loss of a setting, or divergence where there are no labels; None where the model cannot take it."""
        key = key_of(method, settings)
        known = self.tried.get(key) or self.judged.get(key)
        if known is None:
            self.clock.check()
            if not can_take(self.dense, method, settings):
                return None
            known = self.judged[key] = self.judge(method, settings, reduce_by(self.dense, method, settings))
            self.tell(known)
        return known.penalty

    def tell(self, candidate: Candidate | Judged) -> None:
        """Tell the caller of a setting that is known now."""
        if self.on_candidate is not None:
            self.on_candidate(candidate, self.so_far())


def multiply_adds(model: nn.Module, size: tuple[int, int, int], images: Tensor) -> int:
    """Multiply-adds of one image, from sizes; of the mean token counts where the images decide them."""
    counts = None
    if isinstance(model, ReducedHost) and model.variable_length:
        counts = [round(count) for count in mean_counts(model, images)]
    return sum(closed_form_macs(model, size, token_counts=counts).values())
