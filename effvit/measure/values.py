"""What measurements say, as values: of models beside each other, of a search for a setting, of the tokens of an image.

Their fields are those of files of results (``effvit.measure.records``), in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

from effvit.protocols import Json, Settings

__all__ = [
    "Accuracy",
    "BlockTime",
    "Candidate",
    "Classified",
    "Conditions",
    "Consistency",
    "Cost",
    "Evaluated",
    "Evaluation",
    "EvaluationConditions",
    "Fidelity",
    "FreeChoices",
    "Judged",
    "Machine",
    "Metrics",
    "ObjectPatches",
    "Published",
    "Record",
    "Staircase",
    "TokenRecord",
    "TokenStage",
    "Tuning",
    "TuningConditions",
]

LOSS, DIVERGENCE = "loss", "divergence"
MEASURES = {LOSS: "cross-entropy loss on labelled images", DIVERGENCE: "divergence from the dense model's outputs"}
"""What a search can choose settings by, and what that is."""

INLINE = {"inline": True}  # of a field whose entries stand in a file among those of its owner

Machine: TypeAlias = Mapping[str, Json]
"""What a measurement was made with: system, processor, cores, device and versions; further entries are only shown."""


@dataclass(frozen=True)
class Accuracy:
    """Share of the images that a model classifies correctly.

    Attributes:
        value: In percent.
        metric: Such as "top-1".
        data: Images it was measured on.
        origin: Who measured it.
        images: How many images; None in files that do not hold it.
    """

    value: float
    metric: str
    data: str
    origin: str
    images: int | None = None

    @property
    def standard_error(self) -> float | None:
        """Of a share p of n images drawn independently, sqrt(p (1 - p) / n), in percent points; None without n."""
        share = self.value / 100
        return None if self.images is None else 100 * math.sqrt(share * (1 - share) / self.images)


@dataclass(frozen=True)
class Published:
    """A top-1 accuracy that a paper or its authors state.

    Attributes:
        value: In percent, as printed.
        data: Images it holds for.
        source: Where it stands, and of which weights.
    """

    value: float
    data: str
    source: str


@dataclass(frozen=True)
class Fidelity:
    """Distances of a model's outputs from those of the dense model.

    Attributes:
        divergence: Kullback-Leibler divergence of the class probabilities from the dense model's, nats, mean over
            images.
        feature_distance: One less the cosine of the features in front of the classifier, mean over images.
        agreement: Share of the images with the same first class; None in files that do not hold it.
        images: Number of images; None in files that do not hold it.
    """

    divergence: float
    feature_distance: float
    agreement: float | None = None
    images: int | None = None


@dataclass(frozen=True)
class Classified:
    """How well a model classifies labelled images.

    Attributes:
        loss: Cross-entropy of the class probabilities, nats, mean over images.
        top1: Share of the images whose first class is their label, in percent.
        images: Number of images.
    """

    loss: float
    top1: float
    images: int


@dataclass(frozen=True)
class ObjectPatches:
    """What a model keeps of the patches that show the labelled object, see ``effvit.measure.object_patches``.

    Attributes:
        tokens: Share of them that are tokens of their own, behind each block: mean over images.
        represented: Share of them that some token stands for, likewise.
        images: Number of images.
    """

    tokens: Sequence[float]
    represented: Sequence[float]
    images: int


@dataclass(frozen=True)
class Consistency:
    """How often a prediction stays the same when the image is shifted, see ``effvit.measure.shifts``.

    Attributes:
        shifts: Distances in pixels.
        same: Share of the predictions that stay, for each distance: mean over directions and images.
        images: Number of images.
    """

    shifts: Sequence[int]
    same: Sequence[float]
    images: int


@dataclass(frozen=True)
class BlockTime:
    """Where the time of one block goes.

    Attributes:
        block: Name or number of the block, "rest" for what is outside all blocks.
        seconds: Part -> median seconds of a batch.
    """

    block: str | int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class HandedOver:
    """The tokens of an image that a vision tower hands over, and what it costs a language model to read them.

    Attributes:
        tokens: Number for an image, a mean where it depends on the image.
        text: Tokens of a text that are read behind them.
        reader: Sizes of the language model, as ``effvit.measure.reader.Reader`` writes them; None: nobody said.
        prefill_macs: Its multiply-adds for both, before the first word is written; None without a reader.
        cache_bytes: Bytes of its keys and values of both; None without a reader.
    """

    tokens: float
    text: int = 0
    reader: str | None = None
    prefill_macs: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        name: Name of the model.
        host: Name of the baseline if it is the dense model behind this one, else None.
        method: Reduction method, None for a model without.
        settings: Settings of the method.
        parameters: Number of parameters.
        macs: Multiply-adds of one image (a mean for a method whose tokens depend on the image).
        uncounted: Operators that ``macs`` leaves out without a reason -> calls, see ``effvit.measure.flops``.
        tokens: Mean number of patch tokens that leave each block; None for a model without them.
        images_per_second, latency, peak_memory, speedup, interval, seconds: As in
            ``effvit.measure.profiler.Measurement``.
        resolved: The interval of the speed-up excludes 1.
        mac_ratio: Multiply-adds of the baseline over those of the model; None for a model without any.
        ideal_speedup: Speed-up of the dense blocks at the same token counts with nothing else to do; None where there
            is no such model (see ``effvit.measure.ideal``).
        efficiency: Speed over that ideal's.
        efficiency_interval: Its bootstrap 95 % interval.
        breakdown: Where the time goes, see ``effvit.measure.breakdown``; None if it was not asked for.
        accuracy: None if it was not measured.
        fidelity: How close the outputs are to the baseline's; None for a model that is not a reduced form of it, and
            without images.
        handed: What a tower hands over whose tokens are selected; None for any other model.
    """

    name: str
    host: str | None
    method: str | None
    settings: Settings
    parameters: int
    macs: int
    uncounted: Mapping[str, int]
    tokens: Sequence[float] | None
    images_per_second: float
    latency: Mapping[str, float]
    peak_memory: int
    speedup: float
    interval: tuple[float, float]
    resolved: bool
    mac_ratio: float | None
    ideal_speedup: float | None
    efficiency: float | None
    efficiency_interval: tuple[float, float] | None
    breakdown: Sequence[BlockTime] | None
    seconds: Sequence[float]
    accuracy: Accuracy | None
    fidelity: Fidelity | None
    handed: HandedOver | None = None


@dataclass(frozen=True)
class Conditions:
    """What a measurement holds for.

    Attributes:
        batch_size: Images in the batch.
        input_size: (channels, H, W) of an image.
        compile: The models ran through ``torch.compile``.
        cuda_graphs: The models were replayed as CUDA graphs.
        options: Further keywords of ``effvit.measure.profiler.profile_models`` that were given, such as rounds.
        threads: CPU threads.
        device: Where it ran.
        dtype: Of weights and images, without "torch.".
        clock: "wall" or "cuda events".
        images: Names of the images, or "noise".
        notes: What a tool adds: "weights", how they were trained.
    """

    batch_size: int
    input_size: tuple[int, int, int]
    compile: bool
    cuda_graphs: bool
    options: Mapping[str, Json] = field(metadata=INLINE)
    threads: int
    device: str
    dtype: str
    clock: str
    images: Sequence[str] | str
    notes: Mapping[str, str | None] = field(metadata=INLINE, default_factory=dict)

    @property
    def weights(self) -> str | None:
        """How the weights were trained, where it is said."""
        return self.notes.get("weights")


@dataclass(frozen=True)
class Record:
    """What models cost beside each other; the first is the baseline."""

    kind: ClassVar[str] = "profile"
    machine: Machine
    conditions: Conditions
    models: Sequence[Cost]

    def with_weights(self, weights: str | None) -> Record:
        """The record that says how the weights were trained."""
        return replace(self, conditions=replace(self.conditions, notes={"weights": weights}))


@dataclass(frozen=True)
class Evaluated:
    """How well one model classifies labelled images, and what it costs.

    Attributes:
        name, host, method, settings, parameters, macs, mac_ratio, tokens: As of a ``Cost``.
        accuracy: Measured here.
        published: What was published of the same model and settings, where a figure is known.
        object_patches: What is kept of the object; None where it was not measured.
        consistency: Under shifts of the image; None where it was not measured.
    """

    name: str
    host: str | None
    method: str | None
    settings: Settings
    parameters: int
    macs: int
    mac_ratio: float | None
    tokens: Sequence[float] | None
    accuracy: Accuracy
    published: Published | None = None
    object_patches: ObjectPatches | None = None
    consistency: Consistency | None = None


@dataclass(frozen=True)
class EvaluationConditions:
    """What an evaluation holds for.

    Attributes:
        batch_size: Images in a batch.
        input_size: (channels, H, W) of an image.
        device: Where it ran.
        dtype: Of weights and images, without "torch.".
        weights: Where the weights are from, and how they were trained.
    """

    batch_size: int
    input_size: tuple[int, int, int]
    device: str
    dtype: str
    weights: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """How well models classify the same labelled images, with no measurement of speed; the first is the baseline."""

    kind: ClassVar[str] = "accuracy"
    machine: Machine
    conditions: EvaluationConditions
    models: Sequence[Evaluated]


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried.

    Attributes:
        method: Name of the method.
        settings: Settings that differ from its defaults.
        macs: Multiply-adds of one image.
        speedup: Over the dense model.
        interval: Its bootstrap 95 % interval.
        fidelity: Distances of the outputs from the dense model's.
        rounds: It was timed in; None in files that do not hold it.
        classified: How well it classifies the images; None where they have no labels.
    """

    method: str
    settings: Settings
    macs: int
    speedup: float
    interval: tuple[float, float]
    fidelity: Fidelity
    rounds: int | None = None
    classified: Classified | None = None

    @property
    def penalty(self) -> float:
        """What a search wants little of: the loss on labelled images, else the divergence from the dense model."""
        return _penalty(self.fidelity, self.classified)


@dataclass(frozen=True)
class Judged:
    """A setting whose outputs were compared and whose speed was predicted, not measured.

    Attributes:
        method: Name of the method.
        settings: Settings that differ from its defaults.
        fidelity: Distances of the outputs from the dense model's.
        classified: As of a ``Candidate``.
    """

    method: str
    settings: Settings
    fidelity: Fidelity
    classified: Classified | None = None

    @property
    def penalty(self) -> float:
        """As of a ``Candidate``."""
        return _penalty(self.fidelity, self.classified)


def _penalty(fidelity: Fidelity, classified: Classified | None) -> float:
    return fidelity.divergence if classified is None else classified.loss


@dataclass(frozen=True)
class FreeChoices:
    """What is had without a search, on the images and in the timed rounds of the setting that the search chose.

    Attributes:
        choice: The setting the search chose, timed beside the others.
        random: Controls that drop patches at random to the token counts of the choice, one for each seed.
        defaults: The searched methods at their default settings, as far as these reach the aim.
        no_random: Why the choice has no random control; None where it has.
    """

    choice: Candidate
    random: Sequence[Candidate]
    defaults: Sequence[Candidate]
    no_random: str | None = None

    @property
    def random_penalty(self) -> float | None:
        """Penalty of the random controls, the mean over seeds; None without controls."""
        return sum(control.penalty for control in self.random) / len(self.random) if self.random else None

    @property
    def beats_random(self) -> bool | None:
        """Whether the penalty of the choice lies below that of its random controls; None without controls."""
        return None if self.random_penalty is None else self.choice.penalty < self.random_penalty

    @property
    def better_default(self) -> Candidate | None:
        """The best of the defaults that are no slower than the choice and no worse; None where it beats them all.

        A tie goes to the default, which needs no search.
        """
        as_good = [own for own in self.as_near_defaults if own.speedup >= self.choice.speedup]
        return min(as_good, key=lambda own: own.penalty, default=None)

    @property
    def as_near_defaults(self) -> list[Candidate]:
        """The defaults with no larger penalty than the choice, slower ones among them."""
        return [own for own in self.defaults if own.penalty <= self.choice.penalty]


@dataclass(frozen=True)
class Staircase:
    """What one dense block costs at each number of tokens.

    Attributes:
        tokens: Patch tokens, ascending.
        seconds: Of a batch in one block at so many; between them it is interpolated. Multiply-adds of an image where
            the aim is given in them, or where blocks cannot be timed by themselves.
        rest: What is outside the blocks, in the same unit.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    rest: float


@dataclass(frozen=True)
class TuningConditions:
    """What a search for a setting holds for.

    Attributes:
        batch_size: Images in the batch that was timed.
        input_size: (channels, H, W) of an image.
        options: What settings were chosen by ("measure", a key of ``MEASURES``), number of images and of rounds,
            fingerprints of weights, images and labels, the labelled set ("data"), and further keywords of
            ``profile_models`` that were given.
        threads: CPU threads.
        device: Where it ran.
        dtype: Of weights and images, without "torch.".
    """

    batch_size: int
    input_size: tuple[int, int, int]
    options: Mapping[str, Json] = field(metadata=INLINE)
    threads: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Tuning:
    """What a search for a setting found.

    Attributes:
        machine: As of a ``Record``.
        conditions: What it holds for.
        target: The aim: {"speedup": factor}, {"macs": limit}, or {"tokens": limit} of tokens that a tower hands over.
        best: The setting with the least penalty among those that reach the aim, or the default settings of a method
            that turned out no worse and no slower; None if none that reaches the aim was measured faster than the
            dense model, or the search was left before it had chosen.
        front: The Pareto front in speed-up and penalty, slowest first.
        tried: All that were measured.
        host: Name of the dense model, where it has one.
        judged: Settings on the way to a schedule that were not timed.
        staircase: What the predictions of their speed come from.
        untried: What was left out for want of time, a sentence each.
        dense: How well the dense model classifies the images; None where they have no labels.
        free: What the choice was held against; None if none was made, for want of time, and in files from before.
    """

    kind: ClassVar[str] = "tune"
    machine: Machine
    conditions: TuningConditions
    target: Mapping[str, float | None]
    best: Candidate | None
    front: Sequence[Candidate]
    tried: Sequence[Candidate]
    host: str | None = None
    judged: Sequence[Judged] | None = None
    staircase: Staircase | None = None
    untried: Sequence[str] | None = None
    dense: Classified | None = None
    free: FreeChoices | None = None

    @property
    def measure(self) -> str:
        """What settings were chosen by, a key of ``MEASURES``."""
        return str(self.conditions.options.get("measure", DIVERGENCE))


@dataclass(frozen=True)
class TokenStage:
    """Which patches are together after one block.

    Attributes:
        block: Its number.
        tokens: Tokens that leave it.
        labels: Rows with the token of each patch, -1 where it was dropped.
        fused: Tokens that stand for all patches dropped before.
        soft: Tokens are mixtures of all patches; labels name the one with the largest share.
        handed_over: The tokens leave a tower there; None where they go on to the next block.
    """

    block: int
    tokens: int
    labels: Sequence[Sequence[int]]
    fused: Sequence[int]
    soft: bool
    handed_over: bool | None = None


@dataclass(frozen=True)
class Metrics:
    """What the evaluators of a config of mmdet, mmseg or mmpretrain said of a model.

    Attributes:
        config: The config.
        checkpoint: What the weights are from, None for the pretrained ones that the config names.
        metrics: Name -> value, None for one that is not finite.
    """

    kind: ClassVar[str] = "metrics"
    config: str
    checkpoint: str | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class TokenRecord:
    """The tokens that a model leaves of one image.

    Attributes:
        model: Name of the model.
        host: Name of the dense host, None for a model that was asked for by its own name.
        method: Reduction method, None for a model without.
        settings: Settings of the method.
        name: Name of the image.
        note: What to know when looking at it.
        picture: What the model sees of the image, as a data URI.
        stages: After each block that changes the tokens.
    """

    kind: ClassVar[str] = "tokens"
    model: str
    host: str | None
    method: str | None
    settings: Settings
    name: str
    note: str | None
    picture: str
    stages: Sequence[TokenStage]
