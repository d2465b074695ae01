"""Which of a model's classes a label means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from effvit.data.labelled import Label, LabelledImages
from effvit.messages import plain, shown

__all__ = ["class_numbers", "model_labels"]

WORDNET = re.compile(r"n\d{8}")


def model_labels(images: LabelledImages, model: nn.Module, name: str) -> list[int]:
    """The model's number for the class of every image.

    Args:
        images: The set, all of it: which classes it has is told from it.
        model: A classifier of timm, with ``num_classes``.
        name: Its name, for errors.

    Raises:
        ValueError: The model has no classifier, a number that it does not have, or as ``class_numbers``.
    """
    count: object = getattr(model, "num_classes", None)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"top-1 needs a classifier, but {name} has num_classes={count}; name a model that has classes")
    if all(isinstance(label, int) for label in images.labels):
        numbers = cast("Sequence[int]", images.labels)
        outside = [index for index, number in enumerate(numbers) if not 0 <= number < count]
        if outside:
            first = outside[0]
            raise ValueError(
                f"labels must be 0 to {count - 1}, the classes of {name}, but {len(outside)} of {len(numbers)} in "
                f"{plain(images.place)} are not, the first is {numbers[first]} of {plain(images.names[first])}; number "
                "classes as the model does"
            )
        return list(numbers)
    known = class_numbers(sorted({str(label) for label in images.labels}), model, count, name, images.place)
    return [known[label] for label in images.labels]


def class_numbers(
    names: Sequence[str], model: nn.Module, count: int, model_name: str, place: str
) -> Mapping[Label, int]:
    """Name of a class -> the model's number for it.

    In this order: the model's own names of its classes (``label_names`` of its pretrained configuration); the order of
    ImageNet where the names are WordNet ids and the model has as many classes as one of ImageNet's sets, so that a
    folder with some of the classes will do; else the order of the names, as torchvision numbers folders, if there are
    as many as classes of the model.

    Raises:
        ValueError: The names are not the model's.
    """
    own: Sequence[str] | None = getattr(model, "pretrained_cfg", {}).get("label_names")
    subset: str | None = infer_imagenet_subset({"num_classes": count})
    if own is not None and len(own) == count:
        return _by_name(names, own, f"the classes that {model_name} names", place)
    if subset is not None and all(WORDNET.fullmatch(name) for name in names):
        return _by_name(names, ImageNetInfo(subset).label_names(), f"those of {subset}", place)
    if len(names) == count:
        return {name: number for number, name in enumerate(names)}
    few = f"{', '.join(map(plain, names[:3]))}{' ...' if len(names) > 3 else ''}"
    raise ValueError(
        f"{plain(place)} has {len(names)} classes ({few}), but {model_name} has {count}; if these are ImageNet's, name "
        f"folders by WordNet ids, else give all {count} classes, or a .csv of paths and numbers"
    )


def _by_name(names: Sequence[str], known: Sequence[str], whose: str, place: str) -> Mapping[Label, int]:
    numbers: dict[Label, int] = {name: number for number, name in enumerate(known)}
    foreign = [name for name in names if name not in numbers]
    if foreign:
        raise ValueError(
            f"classes must be {whose}, such as {shown(known[0])}, but {len(foreign)} of {len(names)} in {plain(place)} "
            f"are not, the first is {shown(foreign[0])}; rename them, or give a .csv of paths and numbers"
        )
    return numbers
