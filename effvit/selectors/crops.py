"""A tower and a selector of the crops of an image as one module, as LLaVA-NeXT and InternVL cut large images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effvit.layers.macs import Terms
from effvit.protocols import Size
from effvit.selectors.base import Selector
from effvit.selectors.parts import PartSelector, SelectedParts, check_budget, choose_in_parts, lay_out
from effvit.selectors.select import SelectingTower, refuse_unused

__all__ = ["CropSelector"]


class CropSelector(SelectingTower):
    """A tower and a selector as one module, the parts of an image (P, 3, H, W) -> SelectedParts.

    The module of ``effvit.select_parts``, as ``effvit.TokenSelector`` is of ``effvit.select_tokens``. Its multiply-adds
    and times are those of all parts of one image.

    Args:
        tower: As for ``select_parts``, and so are method, crops and thumbnail.
        method: A selector, by its name or itself.
        crops: (rows, columns) of crops.
        thumbnail: Where it stands among the parts: "first" (LLaVA-NeXT), "last" (InternVL), or None.
        asked: keep, block, merge, scores, max_norm and settings, as for ``effvit.TokenSelector``.

    Attributes:
        layout: How the image is cut.

    Raises:
        TypeError: A tower that ``sparsify`` does not take; crops that are no two whole numbers.
        ValueError: What ``select_parts`` refuses of the arguments.
    """

    def __init__(
        self, tower: nn.Module, method: str | Selector, *, crops: Size, thumbnail: str | None = "first", **asked: Any
    ) -> None:
        super().__init__(tower, method, **asked)
        self.layout = lay_out(crops, thumbnail)
        self.views = self.layout.number
        self.settings |= {"crops": list(self.layout.crops), "thumbnail": thumbnail}
        if self.fixed_grid is not None:
            check_budget(self.selector, self.layout, self.fixed_grid)
            self.selector.count_all(self.keep, self.fixed_grid, self.views)

    def forward(self, parts: Tensor, relevance: Tensor | None = None, image_size: Size | None = None) -> SelectedParts:
        """The tokens that leave the parts (P, 3, H, W) of one image.

        Args:
            parts: The crops row by row, and the thumbnail.
            relevance: (P, N), as for ``select_tokens``.
            image_size: (height, width) of the image, as for ``select_parts``.
        """
        refuse_unused(self.selector, image_size=image_size)
        self.layout.check(parts)
        return choose_in_parts(self.selector, self.read(parts, relevance), self.layout, self.keep, image_size)

    def closed_form(self, size: Size) -> Terms:
        """MACs of all parts (H, W) by term, of an image that fills them; errors as of ``TokenSelector.closed_form``."""
        selector = self.selector
        if not isinstance(selector, PartSelector):
            return self.view_by_view(size)
        terms, sizes = self.tower_terms(size)
        if type(selector).cost_parts is PartSelector.cost_parts:
            raise TypeError(
                f"the selector {selector.name!r} has no closed form; give it a cost_parts, or use effvit.count_flops "
                "instead"
            )
        terms["selection"] += selector.cost_parts(sizes, self.layout, self.keep)
        return terms
