"""Multiply-adds of whole detectors and segmenters of mmdet and mmseg, backbone, neck and heads apart."""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmengine", "mm", "effvit.dense.dense_flops"):
    import mmengine  # noqa: F401

from dataclasses import replace
from typing import Protocol, TypeAlias, cast

import torch
from mmengine.model import BaseModule
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effvit.measure.flops import FlopReport, count_flops

__all__ = ["count_dense_flops", "count_parts"]

Maps: TypeAlias = tuple[Tensor, ...]
Meta: TypeAlias = dict[str, tuple[int, int] | tuple[float, float]]


class Limit(Protocol):
    """How many regions a stage of a detector lets through."""

    max_per_img: int


class Limits(Protocol):
    """A detector's ``test_cfg``."""

    rpn: Limit
    rcnn: Limit


class Heads(Protocol):
    """A ``roi_head``: box and mask heads on regions; those of a cascade have stages."""

    with_mask: bool

    def _bbox_forward(self, features: Maps, regions: Tensor) -> object: ...
    def _mask_forward(self, *features_and_regions: int | Maps | Tensor) -> object: ...
    def _refine_roi(self, features: Maps, regions: Tensor, metas: list[Meta], numbers: tuple[int, ...]) -> object: ...


class DenseModel(Protocol):
    """What is asked of a detector of mmdet, or of a segmenter of mmseg as far as it has it."""

    test_cfg: Limits
    with_rpn: bool
    roi_head: Heads

    def extract_feat(self, image: Tensor) -> Maps: ...
    def rpn_head(self, features: Maps) -> object: ...
    def decode_head(self, features: Maps) -> object: ...
    def _forward(self, image: Tensor, samples: list[BaseDataElement]) -> object: ...


class Inference(nn.Module):
    """What a model computes of an image before post-processing, as a function of the image alone.

    The second stage of a detector depends on what the first finds. Here it always gets as many regions as it may at
    most: box heads the proposals and mask heads the detections that the model's ``test_cfg`` lets through.
    """

    model: DenseModel

    def __init__(self, model: DenseModel, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        limits = model.test_cfg if hasattr(model, "roi_head") else None
        self.proposals = random_regions(limits.rpn.max_per_img if limits else 0, size)
        self.detections = random_regions(limits.rcnn.max_per_img if limits else 0, size)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        leaves: list[object] = tree_leaves(self._outputs(image))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def _outputs(self, image: Tensor) -> object:
        model = self.model
        meta: Meta = {"img_shape": self.size, "ori_shape": self.size, "batch_input_shape": self.size}
        meta |= {"pad_shape": self.size, "scale_factor": (1.0, 1.0)}
        if hasattr(model, "roi_head"):
            features = model.extract_feat(image)
            proposals = [model.rpn_head(features)] if model.with_rpn else []
            return [*proposals, *self._second_stage(features, meta)]
        if isinstance(getattr(model, "decode_head", None), BaseModule):  # so that its work counts as its own
            return model.decode_head(model.extract_feat(image))
        return model._forward(image, [BaseDataElement(metainfo=meta)])

    def _second_stage(self, features: Maps, meta: Meta) -> list[object]:
        head = self.model.roi_head
        proposals, detections = (regions.to(features[0]) for regions in (self.proposals, self.detections))
        stages: int | None = getattr(head, "num_stages", None)  # of a cascade
        if stages is None:
            masks = [head._mask_forward(features, detections)] if head.with_mask else []
            return [head._bbox_forward(features, proposals), *masks]
        boxes = head._refine_roi(features, proposals, [meta], (len(proposals),))
        masks = [head._mask_forward(stage, features, detections) for stage in range(stages)] if head.with_mask else []
        return [boxes, *masks]


def random_regions(number: int, size: tuple[int, int]) -> Tensor:
    """(number, 5) regions of an image of any size and place: index of the image, which is 0, and corners."""
    corners = torch.rand(number, 2, 2, generator=torch.Generator().manual_seed(0))
    corners = corners.sort(1).values * torch.tensor(size[::-1])  # (number, low and high, x and y)
    return torch.cat([torch.zeros(number, 1), corners.flatten(1)], dim=1)


def count_dense_flops(model: nn.Module, size: tuple[int, int]) -> FlopReport:
    """Multiply-accumulates (MACs) of one image in a detector or segmenter, without its post-processing.

    Two-stage detectors are counted with as many proposals and detections as their ``test_cfg`` lets through. Sampling
    of regions (RoIAlign) is not a product of matrices and listed in ``uncounted``.

    Args:
        model: A detector of mmdet or segmenter of mmseg. An image has as many channels as its data preprocessor has
            means, three without any.
        size: (H, W) of the image as the backbone gets it.

    Raises:
        ValueError: A size below 1.
    """
    if min(size) < 1:
        raise ValueError(f"the size of an image is (H, W), both at least 1, got {size}")
    mean: Tensor | None = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    report = count_flops(Inference(cast(DenseModel, model), size), (3 if mean is None else len(mean), *size))
    modules = {name.removeprefix("model."): macs for name, macs in report.by_module.items() if name != "model"}
    return replace(report, by_module=modules)


def count_parts(model: nn.Module, report: FlopReport) -> dict[str, tuple[int, int]]:
    """Part of the model, such as "backbone" -> its parameters and MACs.

    Parts that inference does not use have no MACs; what belongs to none is called "elsewhere".
    """
    parts = {
        name: (sum(parameter.numel() for parameter in part.parameters()), report.by_module.get(name, 0))
        for name, part in model.named_children()
        if name != "data_preprocessor"
    }
    elsewhere = report.total - sum(macs for _, macs in parts.values())
    return parts | ({"elsewhere": (0, elsewhere)} if elsewhere else {})
