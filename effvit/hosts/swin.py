"""Swin (2103.14030) and Swin V2 (2111.09883) as hosts: shifted windows with their masks, full maps from stage to stage.

``effvit.hosts.windows`` says what methods do in the windows. Parts of a shifted window that are no neighbours in the
image do not attend to each other and share no token. Smaller grids make up a map whose windows are shifted in
proportion. Swin's table of position biases is interpolated at the distances of their cells; Swin V2's comes from a
network, which is asked for these distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    get_relative_position_index,
)
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, SwinTransformerV2Stage
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from effvit.block import copy_shared, rehouse
from effvit.hosts.surface import SPARSIFIED, check_images, record_name
from effvit.hosts.window_form import WindowForm, stage_terms
from effvit.hosts.windows import (
    Among,
    Cut,
    Family,
    GroupedAttention,
    GroupingBlock,
    ReducedWindows,
    Span,
    interpolated_biases,
    replace_attributes,
    restore_attributes,
    run_blocks,
)
from effvit.layers.macs import SelfAttention, Terms, attend, attention, convolutions, layers, norm
from effvit.protocols import Layer, Size
from effvit.tokens import wide_dtype

__all__ = ["ReducedSwin", "ReducedSwinV2", "cell_bias_table", "swin"]

LARGEST_SCALE = math.log(100.0)  # of Swin V2's cosines (2111.09883, section 3.3)


def biases_at(table: Tensor, index: Tensor, anchor: Tensor) -> Tensor:
    """Biases between the places of groups.

    Args:
        table: (distances, heads).
        index: (N, N) distance of each pair of places.
        anchor: (B*nW, K) place of each group.

    Returns:
        (B*nW, heads, K, K).
    """
    pairs = index[anchor.unsqueeze(2), anchor.unsqueeze(1)]  # (B*nW, K, K)
    return table.T.index_select(1, pairs.flatten()).unflatten(1, pairs.shape).transpose(0, 1)


# -- Swin ------------------------------------------------------------------------------------------------


class GroupedWindowAttention(GroupedAttention, WindowAttention):
    """timm's attention of a Swin among groups of tokens."""

    qkv: Layer
    proj_drop: Layer
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def _position_bias(self, q: Tensor, among: Among) -> Tensor:
        return biases_at(self.relative_position_bias_table, self.relative_position_index, among.anchor)

    def _output(self, y: Tensor) -> Tensor:
        return self.proj_drop(self.proj(y))


class _ShiftedWindows(GroupingBlock):
    """A grouping block with timm's shifted windows."""

    window_size: Size
    shift_size: Size

    def cut(self, size: Size) -> Cut:
        return Cut(self.window_size, size, self.shift_size)


class GroupingSwinBlock(_ShiftedWindows, SwinTransformerBlock):
    """timm's block of a Swin with groups of tokens."""


def cell_bias_table(table: Tensor, window: Size, cells: Size) -> Tensor:
    """Position biases between the cells of a window, interpolated at their distances.

    Args:
        table: ((2h-1)(2w-1), heads) biases of a window of h x w tokens.
        window: (h, w).
        cells: (h', w') of the smaller grid, whose cells are h/h' x w/w' tokens.

    Returns:
        ((2h'-1)(2w'-1), heads).
    """
    grid = table.T.unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1))  # (heads, 2h-1, 2w-1)
    distances = cell_distances(cells[0], window[0], table), cell_distances(cells[1], window[1], table)
    return interpolated_biases(grid, (1 - window[0], 1 - window[1]), distances).flatten(1).T


def cell_distances(cells: int, window: int, like: Tensor) -> Tensor:
    """(2 * cells - 1,) distances between the cells along a window, in tokens, from the largest negative one on."""
    cell = torch.arange(1 - cells, cells, device=like.device, dtype=wide_dtype(like.dtype))
    return cell * (window / cells)


class CellAttention(WindowAttention):
    """timm's attention of a Swin among the cells of each window.

    Attributes:
        cells: (h', w') of the smaller grid.
    """

    cells: Size
    window_size: Size
    relative_position_bias_table: Tensor

    def _get_rel_pos_bias(self) -> Tensor:
        table = cell_bias_table(self.relative_position_bias_table, self.window_size, self.cells)
        index = get_relative_position_index(*self.cells, device=table.device)
        return table.T[:, index].unsqueeze(0)  # (1, heads, h'w', h'w')


# -- Swin V2 ---------------------------------------------------------------------------------------------


class GroupedWindowAttentionV2(GroupedAttention, WindowAttentionV2):
    """timm's attention of a Swin V2 among groups of tokens: scaled cosines, biases from a network."""

    scale_of_logits = 1.0
    qkv: nn.Linear
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    qkv_bias_separate: bool
    logit_scale: Tensor
    cpb_mlp: Layer
    proj_drop: Layer
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv: Tensor
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            # A layer in place of timm's, such as LoRA's, does more than its weight says.
            apart = self.qkv_bias_separate or type(self.qkv) is not nn.Linear
            qkv = self.qkv(x) + bias if apart else F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=LARGEST_SCALE).exp()
        return q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v

    def _position_bias(self, q: Tensor, among: Among) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)  # (distances, heads)
        return biases_at(16 * table.sigmoid(), self.relative_position_index, among.anchor)

    def _output(self, y: Tensor) -> Tensor:
        return self.proj_drop(self.proj(y))


class GroupingSwinV2Block(_ShiftedWindows, SwinTransformerV2Block):
    """timm's block of a Swin V2 with groups of tokens; its norms come behind attention and MLP."""

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(y))

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))


TABLES_V2 = ("relative_coords_table", "relative_position_index")  # that timm makes anew for other windows


class CellAttentionV2(WindowAttentionV2):
    """timm's attention of a Swin V2 among the cells of each window, which ``window_size`` counts.

    The tables of the whole window stay as buffers, so that they move and are cast with the model that shares them.

    Attributes:
        full_window: (h, w) of the window in tokens.
    """

    full_window: Size
    window_size: Size
    pretrained_window_size: Size

    def shrink(self, cells: Size) -> None:
        """Let the window be one of so many cells."""
        self.full_window = self.window_size
        for name in TABLES_V2:
            self.register_buffer(f"full_{name}", getattr(self, name), persistent=False)
        self.set_window_size(cells)
        own_table(self)

    def _init_buffers(self) -> None:
        super()._init_buffers()
        plain_attention_v2(self)._init_buffers()

    def _make_pair_wise_relative_positions(self, device: Any = None, dtype: Any = None) -> tuple[Tensor, Tensor]:
        _, index = super()._make_pair_wise_relative_positions(device=device, dtype=dtype)
        like = torch.empty(0, device=device)
        sides = []
        for cells, window, pretrained in zip(
            self.window_size, self.full_window, self.pretrained_window_size, strict=True
        ):
            distance = 8 * cell_distances(cells, window, like) / max((pretrained or window) - 1, 1)
            sides.append(distance.sign() * (distance.abs() + 1).log2() / math.log2(8))
        table = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).unsqueeze(0)  # (1, 2h'-1, 2w'-1, 2)
        return table.to(dtype), index


def own_table(attn: WindowAttentionV2) -> None:
    """Let the table of coordinates be no view, as timm makes it for other windows.

    ``Reduced._apply`` casts buffers in place: the tensor behind a view would stay, which torch.export does not accept.
    """
    table: Tensor = attn.relative_coords_table
    attn.relative_coords_table = table.clone()


# -- both ------------------------------------------------------------------------------------------------


class _CellBlock(nn.Module):
    """A block on windows that became smaller grids, whose masks follow from the map they make up.

    timm's buffer stays that of whole windows, for a model with another method.
    """

    attn_mask: Tensor | None

    def _init_buffers(self) -> None:
        whole: Any = rehouse(self, type(self).__bases__[-1])
        restore_attributes(whole)
        whole._init_buffers()
        self.attn_mask = whole.attn_mask


class CellSwinBlock(_CellBlock, SwinTransformerBlock):
    """timm's block of a Swin on smaller grids."""


class CellSwinV2Block(_CellBlock, SwinTransformerV2Block):
    """timm's block of a Swin V2 on smaller grids."""


def shrink_block(block: Any, window: Size, cells: Size) -> None:
    """Let a plain block work on windows that became smaller grids."""
    shift = tuple(s * c // w for s, c, w in zip(block.shift_size, cells, window, strict=True))
    area = cells[0] * cells[1]
    replace_attributes(block, window_size=cells, window_area=area, shift_size=shift, dynamic_mask=True)
    if isinstance(block.attn, WindowAttentionV2):
        block.attn = rehouse(block.attn, CellAttentionV2)
        block.attn.shrink(cells)
    else:
        block.attn = rehouse(block.attn, CellAttention)
        block.attn.cells = cells


def plain_attention_v2(attn: nn.Module) -> WindowAttentionV2:
    """timm's attention of a Swin V2, for whole windows again where it was for their cells."""
    plain = rehouse(attn, WindowAttentionV2)
    window: Size | None = plain.__dict__.pop("full_window", None)
    if window is not None:
        plain.window_size = window
        for name in TABLES_V2:
            table = getattr(plain, f"full_{name}")
            delattr(plain, f"full_{name}")
            plain.register_buffer(name, table, persistent=False)
    return plain


class _WindowStage(nn.Module):
    """A stage of which some blocks may see smaller grids in place of each window.

    Attributes:
        span: These blocks.
    """

    span: Span | None
    downsample: Layer
    blocks: nn.Sequential
    grad_checkpointing: bool

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) of the stage before -> (B, H', W', C')."""
        x, _ = run_blocks(self.blocks, self.downsample(x), self.span, checkpointing=self.grad_checkpointing)
        return x


@register_notrace_module
class WindowStage(_WindowStage, SwinTransformerStage):
    """timm's stage of a Swin with windows that a method may shrink."""


@register_notrace_module
class WindowStageV2(_WindowStage, SwinTransformerV2Stage):
    """timm's stage of a Swin V2 with windows that a method may shrink."""


class _ReducedShiftedWindows(ReducedWindows):
    """What both reduced Swins share."""

    stage_class: ClassVar[type[_WindowStage]]
    layers: nn.Sequential
    dynamic_img_size: bool

    def own_stages(self) -> None:
        self.layers = rehouse(self.layers, nn.Sequential)
        for i, stage in enumerate(self.layers):
            self.layers[i] = rehouse(stage, self.stage_class)

    def window_stages(self) -> list[Any]:
        return list(self.layers)

    def block_window(self, block: Any) -> Size:
        rows, columns = block.window_size
        return rows, columns

    def stage_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for stage in self.window_stages():
            yield stage.downsample(x)
            x = stage(x)

    def check_run(self, x: Tensor) -> None:
        super().check_run(x)
        check_images(x, self)

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """timm's method with its arguments; behind ``to_empty`` the masks too, which timm's Swin V2 leaves out."""
        super().init_weights(*args, **kwargs)  # type: ignore[misc]
        reinit_non_persistent_buffers(self)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """timm's resize with its arguments, if the settings fit the new windows."""
        copy_shared(self)._resize(*args, **kwargs)  # a size that does not fit leaves the model as it is
        self._resize(*args, **kwargs)

    def _resize(self, *args: Any, **kwargs: Any) -> None:
        self.make_plain()
        # timm records window_size as a keyword of the host; in a name of the zoo it may be a setting of the method.
        self.pretrained_cfg = self.pretrained_cfg | {"architecture": SPARSIFIED}
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        for module in self.modules():
            if isinstance(module, WindowAttentionV2):
                own_table(module)
        record_name(self)
        self.place(self.method, self._settings)


class ReducedSwin(_ReducedShiftedWindows, SwinTransformer):
    """timm's ``SwinTransformer`` with a reduction method in its windows."""

    family = Family(
        SwinTransformerBlock,
        WindowAttention,
        GroupingSwinBlock,
        GroupedWindowAttention,
        shrink_block,
        CellAttention,
        lambda attn: rehouse(attn, WindowAttention),
        shrunk_block=CellSwinBlock,
    )
    stage_class = WindowStage
    reason = "the stages of a SwinTransformer end with full maps, and its windows move from block to block"

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term."""
        return swin(self, size)


class ReducedSwinV2(_ReducedShiftedWindows, SwinTransformerV2):
    """timm's ``SwinTransformerV2`` with a reduction method in its windows."""

    family = Family(
        SwinTransformerV2Block,
        WindowAttentionV2,
        GroupingSwinV2Block,
        GroupedWindowAttentionV2,
        shrink_block,
        CellAttentionV2,
        plain_attention_v2,
        shrunk_block=CellSwinV2Block,
    )
    stage_class = WindowStageV2
    reason = "the stages of a SwinTransformerV2 end with full maps, and its windows move from block to block"

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term."""
        return swin(self, size)


def position_macs(attn: Any, cut: Cut, tokens: int, grouped: bool) -> int:
    """MACs of the position biases of a block, which all windows share."""
    if isinstance(attn, WindowAttentionV2):
        distances = (2 * cut.window[0] - 1) * (2 * cut.window[1] - 1)
        return layers("attention", attn.cpb_mlp, distances).total()
    if isinstance(attn, CellAttention):
        (height, width), (rows, columns) = (
            (2 * first - 1, 2 * second - 1) for first, second in (attn.window_size, attn.cells)
        )
        return attn.num_heads * rows * width * (height + columns)
    return 0


def attend_in_windows(attn: SelfAttention, keys: int, queries: int, pairs: int) -> Terms:
    """Projections and products of a Swin's attention, without what its position biases cost."""
    if not isinstance(attn, WindowAttentionV2):
        return attend(attn, keys, queries, pairs)
    return attention(pairs, attn.dim) + layers("projection", nn.ModuleList([attn.qkv, attn.proj]), keys)


FORM = WindowForm(lambda block, size: block.window_size, position_macs, attend_in_windows)


def swin(model: Any, size: Size) -> Terms:
    """MACs of timm's Swin or Swin V2, reduced or not, on one image (H, W) by term."""
    terms, grid = convolutions("embedding", model.patch_embed, size)
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
            terms += layers("embedding", stage.downsample, grid[0] * grid[1])
        terms += stage_terms(stage.blocks, getattr(stage, "span", None), grid, FORM)
    return terms + norm(model.norm, grid[0] * grid[1]) + layers("head", model.head, 1)
