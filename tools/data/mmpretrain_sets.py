"""The scenes of `data.scenes` as a data set of mmpretrain, and a sampler that never shows an image twice.

For configs run by tools/train.py and tools/test.py: ``custom_imports = dict(imports=["data.mmpretrain_sets"])``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any, ClassVar

import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.cutouts import CLASSES
from data.scenes import Cutouts, scene_draws
from effvit.schedule import check_count, check_fraction

__all__ = ["CutoutScenes", "FreshSampler"]

Sample = dict[str, Any]  # inputs: (3, H, W) uint8; data_samples: a DataSample with the class


@DATASETS.register_module()
class CutoutScenes(Dataset[Sample]):
    """`data.scenes.Cutouts` in mmpretrain's form.

    Args:
        split: "train" or "test".
        length: Number of images of an epoch.
        data_root: What ``tools/get_data.py`` fetched into; None is its default.
        seed: Of everything that is drawn.
        exchange_colours: Share of the images, in (0, 1], in which red, green and blue are exchanged, so that a model
            does not learn the few drawings of a class by their colours; None: of none.
    """

    METAINFO: ClassVar[dict[str, tuple[str, ...]]] = {"classes": CLASSES}

    def __init__(
        self,
        split: str,
        length: int,
        data_root: str | os.PathLike[str] | None = None,
        seed: int = 0,
        exchange_colours: float | None = None,
    ) -> None:
        self.scenes = Cutouts(split, data_root, length=length, seed=seed)
        self.exchange_colours = 0.0
        if exchange_colours is not None:
            self.exchange_colours = check_fraction("exchange_colours", exchange_colours)
        self.metainfo = self.METAINFO

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        orders = colour_orders(scene_draws(self.scenes.split, indices, self.scenes.seed), self.exchange_colours)
        drawn = zip(self.scenes.__getitems__(indices), orders, strict=True)
        return [packed(image[order], label) for (image, label), order in drawn]


def colour_orders(draws: Tensor, share: float) -> Tensor:
    """(B, 3) order of the channels of each image of these ``scene_draws``, another than red, green, blue in a share."""
    uniform = draws[:, 1, -1]  # the one that the labelled object leaves
    orders = torch.tensor([*permutations(range(3))])  # (6, 3), the first is the order as it is
    if not share:
        return orders[:1].expand(len(draws), -1)
    return orders[torch.where(uniform < share, 1 + (uniform / share * 5).long(), 0)]


def packed(image: Tensor, label: int) -> Sample:
    """An image and its class as mmpretrain's models take them."""
    return {"inputs": image, "data_samples": DataSample().set_gt_label(label)}


@DATA_SAMPLERS.register_module()
class FreshSampler(Sampler[int]):
    """Indices that go on from epoch to epoch, for data sets without an end: epoch e of n images has e n to e n + n - 1.

    The order is that of the indices, so a run that is resumed after an epoch sees what it would have seen. Of several
    processes each takes every so manieth index.

    Args:
        dataset: Its length is the number of images of an epoch.
        first_epoch: Number of the first epoch, for a run that starts from the weights of another one.
        seed: Given by mmengine; nothing is shuffled.
    """

    def __init__(self, dataset: Dataset[Any], first_epoch: int = 0, seed: int | None = None) -> None:
        self.length = len(dataset)  # type: ignore[arg-type]  # mmengine's data sets have one
        self.first_epoch = check_count("first_epoch", first_epoch)
        self.epoch = 0
        self.rank, self.processes = get_dist_info()

    def __iter__(self) -> Iterator[int]:
        begin = (self.first_epoch + self.epoch) * self.length
        return iter(range(begin + self.rank, begin + self.length, self.processes))

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.processes))

    def set_epoch(self, epoch: int) -> None:
        """Called by mmengine before each epoch, after resuming too."""
        self.epoch = epoch
