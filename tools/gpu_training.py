"""A step of ``measure_gpu.py``: a short training of vit_nano, dense and with every method, on images drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import monotonic

import timm
import torch
import torch.nn.functional as F
from gpu_steps import Bench, noting, reduced_by
from torch import Tensor, nn

import effvit
from effvit.protocols import Json

__all__ = ["train_nano"]


def drawn_gratings(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (number, 1, 28, 28) of gratings in noise, and (number,) which of ten directions they have."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (number,), generator=rng)
    angle = labels[:, None, None] * (math.pi / 10)
    phase = 2 * math.pi * torch.rand(number, 1, 1, generator=rng)
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    waves = torch.sin(1.2 * (angle.cos() * column + angle.sin() * row) + phase)
    images = waves + torch.randn(number, 28, 28, generator=rng)
    return images.unsqueeze(1), labels


def train_nano(bench: Bench, batch_size: int, iterations: int) -> dict[str, Json]:
    """A short training of vit_nano_patch4_28, dense and with every method, on gratings drawn here.

    AdamW at 1e-3, autocast to the dtype, the same batches for all. Returns for each the images a second, the mean loss
    of the first and the last tenth of the iterations, and the top-1 accuracy on other gratings in percent.
    """
    images, labels = (y.to(bench.device) for y in drawn_gratings(batch_size * min(iterations, 50), seed=0))
    held_out = tuple(y.to(bench.device) for y in drawn_gratings(2 * batch_size, seed=1))
    end = bench.end_of(1)
    found: dict[str, Json] = {}
    left_out: dict[str, str] = {}
    for method in (None, *effvit.list_methods()):
        bench.check()
        name = method or "dense"
        if monotonic() > end:
            left_out[name] = "its turn came after the time of the step"
            continue
        with noting(name, left_out):
            torch.manual_seed(0)
            model = timm.create_model("vit_nano_patch4_28", depth=2 if bench.dry else 12).to(bench.device)
            if method is not None:
                model = reduced_by(model, method, images[:batch_size])
            found[name] = trained(bench, model, images, labels, held_out, batch_size, iterations)
    return {"models": found, "left_out": dict(left_out), "batch_size": batch_size, "iterations": iterations}


def trained(
    bench: Bench,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    held_out: Sequence[Tensor],
    batch_size: int,
    iterations: int,
) -> dict[str, Json]:
    """Train the model and say how fast it was and what it learnt; arguments and result as of ``train_nano``."""
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    begin = monotonic()
    for iteration in range(iterations):
        bench.check()
        rows = torch.arange(iteration * batch_size, (iteration + 1) * batch_size, device=images.device) % len(images)
        with torch.autocast(bench.device.type, dtype=bench.dtype):
            loss = F.cross_entropy(model(images[rows]).float(), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()  # waits for the device
    seconds = monotonic() - begin
    tenth = max(1, iterations // 10)
    with torch.inference_mode(), torch.autocast(bench.device.type, dtype=bench.dtype):
        right = (model.eval()(held_out[0]).argmax(1) == held_out[1]).float().mean()
    return {
        "images_per_second": batch_size * iterations / seconds,
        "first_loss": sum(values[:tenth]) / tenth,
        "last_loss": sum(values[-tenth:]) / tenth,
        "top1": 100 * float(right),
    }
