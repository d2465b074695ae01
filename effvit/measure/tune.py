"""Find the method and schedule that reach a wished speed-up on this machine with the least change of the outputs.

Speed is measured, beside the dense model in the same rounds; multiply-adds decide only if a number of them is asked
for. The change of the outputs needs pictures without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

import effvit
from effvit.hosts.host import ReducedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.fidelity import Fidelity, compare_outputs, outputs
from effvit.measure.ideal import mean_counts
from effvit.measure.profiler import machine, profile_models
from effvit.measure.records import SCHEMA
from effvit.reducers import METHODS

__all__ = ["Candidate", "Family", "families", "front", "tune"]

TUNED = tuple(name for name, method in METHODS.items() if method.ladders(12, 196))


@dataclass(frozen=True)
class Family:
    """Settings of one method that differ in strength alone.

    Attributes:
        method: Name of the method.
        ladder: Settings from weak to strong.
    """

    method: str
    ladder: tuple[dict[str, Any], ...]


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
    """

    method: str
    settings: dict[str, Any]
    macs: int
    speedup: float
    interval: tuple[float, float]
    fidelity: Fidelity


def families(dense: nn.Module, methods: Sequence[str] = TUNED) -> list[Family]:
    """Ladders of settings of the methods for a plain ViT; settings the model cannot take are left out.

    Raises:
        TypeError: A model that is no plain ViT.
        ValueError: A method that is not tuned, or none that the model can take.
    """
    unknown = [method for method in methods if method not in TUNED]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not tuned; tuned are {', '.join(TUNED)}")
    host: Any = dense
    if not hasattr(host, "blocks"):
        raise TypeError(f"tuned are plain ViTs, whose blocks follow each other in 'blocks', not {type(dense).__name__}")
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


def usable_part(dense: nn.Module, method: str, ladder: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ladder from the first setting the model can take to the last before one that leaves no token."""
    start = next((rung for rung, settings in enumerate(ladder) if can_take(dense, method, settings)), len(ladder))
    ladder = ladder[start:]
    end = weakest(lambda rungs: {0: not can_take(dense, method, ladder[rungs[0]])}, [len(ladder)])[0]
    return ladder[:end]


def can_take(dense: nn.Module, method: str, settings: Mapping[str, Any]) -> bool:
    """True if the model can be reduced so."""
    try:
        effvit.sparsify(dense, method, **settings)
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
    """Those that no other one beats in both speed-up and divergence, slowest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.speedup, c.fidelity["divergence"])):
        if not best or candidate.fidelity["divergence"] < best[-1].fidelity["divergence"]:
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
    **conditions: Any,
) -> dict[str, Any]:
    """The setting with the least divergence from the dense model among those that reach the aim.

    The strength of each family is bisected, all families in the same interleaved rounds. The weakest settings that
    reach the aim and their neighbours are measured once more with more rounds, and a family that misses the aim then
    goes on to stronger settings. The one chosen is measured again alone with the dense model; that is the speed-up it
    is returned with, and if its interval lies below the aim, the choice goes on without it.

    Args:
        dense: A timm ViT that methods here can reduce.
        images: (B, channels, H, W) pictures, normalised as the model takes them.
        speedup: Wished speed-up over the dense model, above 1; or
        macs: Multiply-adds of one image not to exceed.
        methods: Methods to choose from.
        batch_size: Images in the batch that is timed.
        rounds: Of each step of the bisection.
        final_rounds: Of the last measurement.
        on_run: Called with a model's name after each timed run.
        conditions: Further keywords of ``profile_models``: threads, device, dtype, compile.

    Returns:
        {"schema", "kind": "tune", "machine", "conditions", "target", "best", "front", "tried"}: ``best`` is a
        ``Candidate`` as a dict, ``front`` and ``tried`` are lists of them.

    Raises:
        ValueError: Not exactly one aim, an aim out of reach, or a model or method that cannot be tuned.
    """
    if (speedup is None) == (macs is None):
        raise ValueError("give one aim: a speedup such as 1.5, or macs")
    if speedup is not None and not speedup > 1:
        raise ValueError(f"speedup must be above 1, got {speedup}")
    found = families(dense, methods)
    size = (images.shape[1], images.shape[2], images.shape[3])
    reference = outputs(dense, images)
    tried: dict[str, Candidate] = {}

    def measure(chosen: Mapping[str, tuple[str, dict[str, Any]]], number: int) -> None:
        models: dict[str, nn.Module] = {"dense": dense}
        for name, (method, settings) in chosen.items():
            models[name] = effvit.sparsify(dense, method, **settings)
        speeds = profile_models(models, size, batch_size, rounds=number, images=images, on_run=on_run, **conditions)
        for speed in speeds[1:]:
            model = models[speed.name]
            method, settings = chosen[speed.name]
            known = tried.get(speed.name)
            tried[speed.name] = (
                replace(known, speedup=speed.speedup, interval=speed.interval)
                if known is not None
                else Candidate(
                    method,
                    settings,
                    multiply_adds(model, size, images),
                    speed.speedup,
                    speed.interval,
                    compare_outputs(reference, outputs(model, images)),
                )
            )

    def rung_name(ladder: int, rung: int) -> str:
        return f"{ladder}.{rung}"

    def named(places: Iterable[tuple[int, int]]) -> dict[str, tuple[str, dict[str, Any]]]:
        return {rung_name(i, rung): (found[i].method, found[i].ladder[rung]) for i, rung in places}

    def reaches(rungs: dict[int, int]) -> dict[int, bool]:
        if macs is not None:
            chosen = named(rungs.items()).values()
            counts = [multiply_adds(effvit.sparsify(dense, m, **s), size, images) for m, s in chosen]
            return dict(zip(rungs, (count <= macs for count in counts), strict=True))
        measure(named(rungs.items()), rounds)
        return {i: tried[rung_name(i, rung)].speedup >= (speedup or 0) for i, rung in rungs.items()}

    rungs = {i: rung for i, rung in weakest(reaches, [len(f.ladder) for f in found]).items() if rung is not None}
    finals = set(rungs.items())
    if speedup is not None:  # few rounds may have stopped the bisection a rung early or late
        finals |= {
            (i, rung + step) for i, rung in finals for step in (-1, 1) if 0 <= rung + step < len(found[i].ladder)
        }

    def in_reach() -> list[tuple[int, int]]:
        return [place for place in finals if speedup is None or tried[rung_name(*place)].speedup >= speedup]

    def stronger() -> list[tuple[int, int]]:
        """The next rung of each family that misses the aim now."""
        short = sorted(set(rungs) - {i for i, _ in in_reach()})
        following = [(i, 1 + max(rung for j, rung in finals if j == i)) for i in short]
        return [(i, rung) for i, rung in following if rung < len(found[i].ladder)]

    fresh = sorted(finals)
    while True:
        while fresh:
            measure(named(fresh), final_rounds)
            finals |= set(fresh)
            fresh = stronger()
        reached = in_reach()
        if not reached:
            fastest = max((candidate.speedup for candidate in tried.values()), default=1.0)
            aim = f"a speed-up of {speedup}" if macs is None else f"{macs} multiply-adds"
            raise ValueError(
                f"no setting of {', '.join(methods)} reaches {aim} here (fastest {fastest:.2f}x); ask for less, or "
                "measure with a larger batch_size, where reduction pays more"
            )
        winner = min(reached, key=lambda place: tried[rung_name(*place)].fidelity["divergence"])
        if speedup is None:
            break
        # The best of many noisy figures is too good on average: the winner has to reach the aim once more, alone.
        measure(named([winner]), final_rounds)
        if tried[rung_name(*winner)].interval[1] >= speedup:
            break
        fresh = stronger()
    best = tried[rung_name(*winner)]
    return {
        "schema": SCHEMA,
        "kind": "tune",
        "machine": machine(str(conditions.get("device", "cpu"))),
        "conditions": {
            "batch_size": batch_size,
            "input_size": list(size),
            "images": len(images),
            "rounds": rounds,
            "final_rounds": final_rounds,
            **{name: str(value).removeprefix("torch.") for name, value in conditions.items()},
        },
        "target": {"speedup": speedup} if macs is None else {"macs": macs},
        "best": asdict(best),
        "front": [asdict(candidate) for candidate in front(list(tried.values()))],
        "tried": [asdict(candidate) for candidate in tried.values()],
    }


def multiply_adds(model: nn.Module, size: tuple[int, int, int], images: Tensor) -> int:
    """Multiply-adds of one image, from sizes; of the mean token counts where the images decide them."""
    counts = None
    if isinstance(model, ReducedHost) and model.variable_length:
        counts = [round(count) for count in mean_counts(model, images)]
    return sum(closed_form_macs(model, size, token_counts=counts).values())
