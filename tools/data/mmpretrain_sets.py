"""The scenes of `data.scenes` as a data set of mmpretrain, a sampler that never shows an image twice, and a classifier
that is also taught what each patch shows.

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
from mmpretrain.models import TimmClassifier
from mmpretrain.registry import DATASETS, MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from data.cutouts import CLASSES
from data.scenes import Cutouts, Scenes, patch_coverage, scene_draws
from effvit.schedule import check_count, check_fraction, check_number

__all__ = ["CutoutScenes", "FreshSampler", "PatchTaughtClassifier"]

Sample = dict[str, Any]  # inputs: (3, H, W) uint8; data_samples: a DataSample with the class, perhaps of each patch too
SHOWS = 0.5  # share of a patch that the object covers from which on the patch is of its class
UNTAUGHT = -100  # label of a patch that only its border covers; cross_entropy leaves it out


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
        patch_size: Of the patches whose classes come with the image as ``patch_label`` (N,): the object's from a
            coverage of SHOWS on, ``len(CLASSES)`` of one without any of it, UNTAUGHT between. None: without.
    """

    METAINFO: ClassVar[dict[str, tuple[str, ...]]] = {"classes": CLASSES}

    def __init__(
        self,
        split: str,
        length: int,
        data_root: str | os.PathLike[str] | None = None,
        seed: int = 0,
        exchange_colours: float | None = None,
        patch_size: int | None = None,
    ) -> None:
        self.scenes = Cutouts(split, data_root, length=length, seed=seed)
        self.patch_size = patch_size
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
        drawn = self.scenes.scenes(indices)
        samples = [
            {"inputs": image[order], "data_samples": DataSample().set_gt_label(label)}
            for image, label, order in zip(drawn.images, drawn.labels, orders, strict=True)
        ]
        if self.patch_size is not None:
            for sample, label in zip(samples, patch_labels(drawn, self.patch_size), strict=True):
                sample["data_samples"].patch_label = label
        return samples


def colour_orders(draws: Tensor, share: float) -> Tensor:
    """(B, 3) order of the channels of each image of these ``scene_draws``, another than red, green, blue in a share."""
    uniform = draws[:, 1, -1]  # the one that the labelled object leaves
    orders = torch.tensor([*permutations(range(3))])  # (6, 3), the first is the order as it is
    if not share:
        return orders[:1].expand(len(draws), -1)
    return orders[torch.where(uniform < share, 1 + (uniform / share * 5).long(), 0)]


def patch_labels(drawn: Scenes, patch_size: int) -> Tensor:
    """(B, N) int64, the class of each patch as ``CutoutScenes`` says."""
    coverage = patch_coverage(drawn.masks, patch_size)
    labels = torch.where(coverage >= SHOWS, drawn.labels[:, None], UNTAUGHT)  # (B, N)
    return labels.masked_fill(coverage == 0, len(CLASSES))


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


@MODELS.register_module()
class PatchTaughtClassifier(TimmClassifier):
    """A plain ViT that is taught the class of the image, and by a head of its own what each patch shows.

    A small ViT has to find the object before it can learn what it is; labels of patches teach it both at once (token
    labelling, 2104.10858, with masks in place of a teacher). The head of the patches lies in the model as
    ``patch_head`` and is left out when weights are exported; nothing else of the model differs from timm's.

    Args:
        model_name: A ViT of timm.
        patch_weight: Of the patches' loss beside the image's.
        background_weight: Of a patch without any of the object, beside 1 of a patch of it.
        kwargs: Those of ``TimmClassifier``.
    """

    class_weights: Tensor

    def __init__(
        self, model_name: str, *, patch_weight: float = 1.0, background_weight: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(model_name, **kwargs)
        classes = self.model.num_classes
        self.model.patch_head = nn.Linear(self.model.embed_dim, classes + 1)
        self.patch_weight = check_number("patch_weight", patch_weight)
        weights = [1.0] * classes + [check_number("background_weight", background_weight)]
        self.register_buffer("class_weights", torch.tensor(weights), persistent=False)

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        """Scalars of images (B, 3, H, W): "loss" of the class token, "patch_loss" of the patches."""
        tokens = self.model.forward_features(inputs)
        losses: dict[str, Tensor] = self._get_loss(self.model.forward_head(tokens), data_samples, **kwargs)
        scores = self.model.patch_head(tokens[:, self.model.num_prefix_tokens :])  # (B, N, classes + 1)
        target = torch.stack([sample.patch_label for sample in data_samples])
        patches = F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), self.class_weights)
        return {**losses, "patch_loss": self.patch_weight * patches}
