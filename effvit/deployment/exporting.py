"""A model recorded, written to a file, read back and held to its own eager run before the file is put in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from effvit.deployment.formats import FORMATS, Run, check_installed
from effvit.messages import one_line, plain
from effvit.schedule import check_choice, check_count

__all__ = ["TOLERANCE", "Agreement", "compare", "export", "record"]

TOLERANCE = 1e-3  # of the largest score; float32 kernels of two runtimes differ by 1e-6, a wrong graph by 1e-2 and more
RECORDED = 2  # images that a program of any batch size is recorded with: torch.export takes sizes 0 and 1 for fixed
OTHER_SIZES = (1, 3, 5)  # batches that such a program is held to


class Agreement(NamedTuple):
    """What a file was held to, and how near it came.

    Attributes:
        batch_sizes: Of the batches compared.
        distance: Largest difference of a score from the eager one, as a share of the largest eager score of its image;
            NaN if one of the file's scores is.
        same_class: Images whose highest score is that of the same class.
    """

    batch_sizes: tuple[int, ...]
    distance: float
    same_class: int


def export(
    model: nn.Module,
    path: Path,
    images: Tensor,
    *,
    to: str,
    batch_size: int | None = None,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Write the model for another runtime, once what was written agrees with the model on other images and batches.

    The file is written to a folder beside ``path``, read back and run there, and moved only then: where the path had a
    file before, it stays unless the new one is right.

    Args:
        model: A classifier in eval mode on the CPU: images (B, C, H, W) -> scores (B, classes).
        path: Of the file; its ending is that of the format.
        images: (N, C, H, W), two or more as the model takes them. It is recorded with the first and compared on the
            others, which are repeated where the batches need more.
        to: A key of ``FORMATS``.
        batch_size: The only one that the file takes; None for any.
        tolerance: Largest difference of a score allowed, as a share of the largest score of its image.

    Raises:
        ValueError: Arguments that do not fit, a model that cannot be recorded, or a file that does not agree with it.
        TypeError: A model that returns no tensor, or that refuses to be recorded.
        ImportError: The format needs packages that are not installed.
    """
    check_choice("to", to, FORMATS)
    form = FORMATS[to]
    if path.suffix != form.suffix:
        raise ValueError(f"a file of {to} must end in {form.suffix}, got {plain(path)}")
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, one to record and another to compare, got {len(images)}")
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    if model.training:
        raise ValueError("the model is in training mode, which records dropout; call model.eval() first")
    check_installed(to)
    sizes = OTHER_SIZES if batch_size is None else (batch_size,) * len(OTHER_SIZES)
    with torch.no_grad():
        expected = [(batch, _scores(model, batch)) for batch in _other_batches(images, sizes)]
        program = record(model, _cycled(images, 0, batch_size or RECORDED), any_batch=batch_size is None)
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            form.write(program, draft)
            found = compare(form.read(draft), expected)
            if not found.distance <= tolerance:  # nor NaN
                raise ValueError(
                    f"nothing was written: scores of the {to} file differ from the model's by {found.distance:.1e} of "
                    f"the largest, more than {tolerance:.1e}, and {found.same_class} of {sum(sizes)} images get the "
                    "same class. If all do, a choice between almost equal tokens may have fallen otherwise: try other "
                    "images, or a higher tolerance"
                )
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, path.parent / file.name)
    return found


def record(model: nn.Module, images: Tensor, any_batch: bool) -> ExportedProgram:
    """The program that ``torch.export`` records of a run on images (B, C, H, W).

    Args:
        model: In eval mode.
        images: For a program of any batch size, more than one.
        any_batch: Whether the program takes batches of other sizes.

    Raises:
        ValueError, TypeError: The model refuses, or torch.export cannot follow it.
    """
    shapes = ({0: Dim("batch")},) if any_batch else None
    try:
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    except (ValueError, TypeError):  # the model's own refusals, which name a remedy
        raise
    except Exception as error:  # of several modules of torch, most of them private
        raise ValueError(f"torch.export cannot record a {type(model).__name__}: {one_line(error)}") from error


def compare(run: Run, expected: list[tuple[Tensor, Tensor]]) -> Agreement:
    """How near a file comes to the model on batches of images with the model's scores.

    Raises:
        ValueError: It does not run on one of the batches, or gives scores of another shape.
    """
    shares: list[Tensor] = []
    same_class = 0
    for images, scores in expected:
        try:
            found = run(images)
        except Exception as error:  # each runtime has its own
            raise ValueError(
                f"nothing was written: the file does not run on a batch of {len(images)}: {one_line(error)}"
            ) from error
        if found.shape != scores.shape:
            raise ValueError(
                f"nothing was written: the file gives scores {tuple(found.shape)} of a batch of {len(images)}, the "
                f"model {tuple(scores.shape)}"
            )
        largest = scores.abs().amax(1).clamp_min(torch.finfo(scores.dtype).tiny)  # (B,)
        shares.append((found - scores).abs().amax(1) / largest)
        same_class += int((found.argmax(1) == scores.argmax(1)).sum())
    return Agreement(tuple(len(images) for images, _ in expected), float(torch.cat(shares).max()), same_class)


def _scores(model: nn.Module, images: Tensor) -> Tensor:
    scores = model(images)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        kind = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise TypeError(
            f"export takes models that return scores (B, classes); this {type(model).__name__} gives {kind}"
        )
    if not scores.isfinite().all():
        raise ValueError("the model's own scores are not finite, so that nothing can be held to them")
    return scores


def _other_batches(images: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Batches that begin with the last image and go backwards, since the first ones are recorded."""
    start = 0
    for size in sizes:
        yield _cycled(images.flip(0), start, size)
        start += size


def _cycled(images: Tensor, start: int, number: int) -> Tensor:
    """So many images from one on, again from the first after the last."""
    return images[torch.arange(start, start + number) % len(images)]
