"""Learning the thresholds of a method from batches of images, without labels and without training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost
from effvit.reducers import METHODS
from effvit.reducers.dymu import DyMU

__all__ = ["calibrate", "needs_calibration", "ranking"]


@contextmanager
def ranking(model: ReducedHost) -> Iterator[list[Tensor]]:
    """Let every forward merge the most similar tokens of its batch, and list the thresholds that this amounts to.

    The list is emptied when a forward begins and afterwards holds one scalar for each reducing block.
    """
    found: list[Tensor] = []
    reducers = [reducer for reducer in model.reducers.values() if isinstance(reducer, DyMU)]
    handles = [model.register_forward_pre_hook(lambda *_: found.clear())]
    handles += [r.register_forward_hook(lambda _m, _x, output: found.append(output[1].carry)) for r in reducers]
    try:
        for reducer in reducers:
            reducer.ranking = True
        yield found
    finally:
        for reducer in reducers:
            reducer.ranking = False
        for handle in handles:
            handle.remove()


def needs_calibration(model: nn.Module) -> TypeGuard[ReducedHost]:
    """Whether the model has thresholds that are neither given nor learnt, without which it refuses to run."""
    reducers = model.reducers.values() if isinstance(model, ReducedHost) else ()
    return any(isinstance(r, DyMU) and r.given is None and not r.has_learnt for r in reducers)


def calibrate(model: ReducedHost, batches: Iterable[Tensor]) -> list[float]:
    """Learn the thresholds of a model reduced by "dymu" (DyMU, 2504.17040, section 3.1; tome.py@c57d75a).

    Every batch runs through the model once. In each block the r * B most similar tokens of the whole batch are
    merged, whatever image they are in, and the largest similarity left is the batch's threshold; the next block sees
    the merged tokens. The block's threshold is the plain mean over all batches, whatever their size, those of
    earlier calls included. The larger the batches, the better the estimate; the authors take about 250 000 images in
    batches of 64 on each of two GPUs (README and threshold_finding.sh@c57d75a).

    Officially the model is in train mode; here it is in eval mode, so that dropout does not disturb the
    statistics, and without gradients. Afterwards the model is in the mode it was in. The mean is kept in float64.
    Under an initialised ``torch.distributed`` each process gives its own batches to its own copy of the model, and
    all end with the mean over the batches of all processes.

    Args:
        model: Reduced by a method with thresholds, which are updated after every batch. Not wrapped by
            DistributedDataParallel; give its ``module``.
        batches: Image batches (B, 3, H, W) as the model takes them, prepared as for inference. It is read once, one
            batch after another, so a progress bar can be wrapped around it.

    Returns:
        The threshold of every block, 1.0 (nothing can be merged) for blocks that do not reduce: a value for the
        setting ``thresholds``.

    Raises:
        TypeError: A model that is not reduced; a batch that is no tensor.
        ValueError: A method without thresholds, thresholds given in the settings, no batch at all, or images of
            another shape than the model's.
    """
    reducers = check_calibrates(model)
    modes = {module: module.training for module in model.modules()}
    before = torch.tensor([float(r.threshold) for r in reducers], dtype=torch.float64)
    number = int(max(int(r.num_batches) for r in reducers))
    total, seen = torch.zeros_like(before), 0
    try:
        model.eval()
        with torch.no_grad(), ranking(model) as found:
            for images in batches:
                model(check_batch(images))
                total += torch.stack(found).cpu()
                seen += 1
                _set(reducers, before, number, total, seen)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if dist.is_available() and dist.is_initialized():
        every = torch.cat([total, torch.tensor([seen])]).to(reducers[0].threshold.device)  # (number of reducers + 1,)
        dist.all_reduce(every)
        total, everywhere = every[:-1].cpu(), int(every[-1])
        if everywhere:
            _set(reducers, before, number, total, everywhere)
    if seen == 0:
        raise ValueError("batches holds no batch of images, so there is nothing to calibrate on; give at least one")
    return [float(r.threshold) if isinstance(r, DyMU) else 1.0 for r in (b.reducer for b in model.blocks)]


def _set(reducers: list[DyMU], before: Tensor, number: int, total: Tensor, seen: int) -> None:
    """Thresholds as means over ``number`` batches before and ``seen`` new ones."""
    means = (before * number + total) / (number + seen)
    for reducer, mean in zip(reducers, means.tolist(), strict=True):
        reducer.set_threshold(mean, number + seen)


def check_calibrates(model: ReducedHost) -> list[DyMU]:
    """The reducers of a model whose thresholds can be learnt, else an error that says why not."""
    if not isinstance(model, ReducedHost):
        raise TypeError(
            f"expected a model made by effvit.sparsify(..., 'dymu'), got {type(model).__name__}; "
            "a model in DistributedDataParallel is its attribute module"
        )
    if not issubclass(METHODS[model.method], DyMU):
        raise ValueError(f"{model.method} has no thresholds to calibrate; methods that have are dymu")
    reducers = [reducer for reducer in model.reducers.values() if isinstance(reducer, DyMU)]
    if not reducers:
        raise ValueError(f"dymu has r 0 in every block (r_total={model.settings['r_total']}): nothing to calibrate")
    if reducers[0].given is not None:
        raise ValueError(
            "the settings give thresholds, which calibration would not change; make the model with thresholds=None and "
            "preset=None"
        )
    return reducers


def check_batch(images: object) -> Tensor:
    """The batch, if it is a tensor; its shape is checked by the model."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"expected batches of images (B, 3, H, W) as tensors, got {type(images).__name__}; "
            "for a loader of (images, labels) give (images for images, _ in loader)"
        )
    return images
