"""Super-token vision transformer (SViT, arXiv 2211.11167): four stages, of which the first attend by super tokens.

Facts from hhb072/STViT@c9ed9a4 (models/stvit.py), whose class is called STViT although it is not the STViT of
2303.08685. Deviations: the constant kernels in the official files are dropped, see ``effvit.layers.super_tokens``; qkv
weights are put in timm's order; each downsampling opens a stage instead of ending the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    LayerScale2d,
    calculate_drop_path_rates,
    to_2tuple,
)
from timm.models._input import update_model_args
from torch import Tensor, nn

from effvit.architectures.base import (
    ChannelsLastStem,
    PyramidBackbone,
    check_per_stage,
    conv_stage_terms,
    conv_stages,
    pooled_head,
)
from effvit.hosts._names import renamed
from effvit.hosts.stages import Stage, soft_stage
from effvit.hosts.surface import check_batch
from effvit.layers.macs import Terms, attend, feedforward, layers, norm, windows
from effvit.layers.super_tokens import (
    SuperTokenAttention,
    associate,
    from_cells,
    nearest_super_token,
    neighbours,
    to_cells,
)
from effvit.protocols import Device, Factory, Size
from effvit.recording import compile_each_size, refuse_open_sides

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SuperTokenViT", "SuperTokens"]


class SuperTokens(NamedTuple):
    """How one block sees a batch of images.

    Attributes:
        association: (B, n, p, 9) weights of the p pixels of each of n cells on the cell's super token and its
            neighbours, in raster order; last round.
        labels: (B, H, W) number of the super token each pixel of the stage's map belongs to most.
        grid: (rows, columns) of cells, n = rows * columns.
        cell: (h, w) pixels of a cell, p = h * w.
    """

    association: Tensor
    labels: Tensor
    grid: tuple[int, int]
    cell: tuple[int, int]


class SharedSettings(TypedDict):
    """Keywords of ``SuperTokenAttention`` that are the same in all stages."""

    qkv_bias: bool
    qk_scale: float | None
    attn_drop: float


class AttentionSettings(SharedSettings):
    """Keywords of ``SuperTokenAttention`` that a block hands on."""

    num_heads: int
    cell: Size
    n_iter: int


class DepthwiseResidual(nn.Conv2d):
    """x plus its depthwise convolution of size 3."""

    def __init__(self, dim: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y


class ConvMlp(nn.Module):
    """MLP of a map whose hidden layer also looks at its neighbours, behind the activation."""

    def __init__(
        self, dim: int, hidden: int, drop: float = 0.0, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.conv = DepthwiseResidual(hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop2(self.fc2(self.conv(self.drop1(self.act(self.fc1(x))))))
        return y


class SuperTokenBlock(nn.Module):
    """Depthwise position embedding, super-token attention and MLP, each with a residual; maps (B, C, H, W).

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        init_values: Initial LayerScale; None for none.
        drop_path: Rate of stochastic depth of the last two branches.
        proj_drop: Dropout of both branches.
        attention: Remaining arguments of SuperTokenAttention.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **attention: Unpack[AttentionSettings],
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        scaled = init_values is not None
        self.pos_embed = DepthwiseResidual(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = SuperTokenAttention(dim, proj_drop=proj_drop, **attention, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if scaled else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.mlp: nn.Module = ConvMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.ls2 = LayerScale2d(dim, init_values, **dd) if scaled else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        y: Tensor = self.attn(self.norm1(x.permute(0, 2, 3, 1)))  # (B, H, W, C): no copy of a channels-last map
        y = self.drop_path1(self.ls1(y))
        x = x + y.permute(0, 3, 1, 2)  # (B, C, H, W)
        y = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + y

    def closed_form(self, size: Size) -> Terms:
        """MACs by term on a map (H, W)."""
        pixels, cell = size[0] * size[1], self.attn.cell
        terms = layers("embedding", self.pos_embed, pixels) + norm(self.norm1, pixels)
        tokens = pixels if cell == (1, 1) else windows(size, cell)
        terms += attend(self.attn.refine, tokens, tokens) + feedforward(self, pixels)
        if cell != (1, 1):
            # Nine super tokens a pixel: association in each round, new tokens in each, and the way back.
            products = 2 * self.attn.n_iter + 1
            terms["association"] += products * 9 * tokens * cell[0] * cell[1] * self.norm1.normalized_shape[0]
        return terms


# Official names, in order of application; the stem and the final layers follow timm's pyramids.
RENAMED = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^layers\.", "stages."),
    (r"\.pos_embed\.conv\.", ".pos_embed."),
    (r"\.norm1\.norm\.", ".norm1."),
    (r"\.attn\.stoken_refine\.", ".attn.refine."),
    (r"\.mlp2\.conv\.conv\.", ".mlp.conv."),
    (r"\.mlp2\.", ".mlp."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.downsample\.proj\.0\.", ".downsample.conv."),
    (r"\.downsample\.proj\.1\.", ".downsample.bn."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


class SuperTokenViT(PyramidBackbone):
    """Super-token vision transformer (SViT, 2211.11167) for images of any size.

    Args:
        num_classes: Classes; 0 for none.
        global_pool: timm's pooling in front of the classifier.
        in_chans: Channels of the images.
        dims: Channels of the four stages.
        depths: Blocks of the stages.
        num_heads: Heads of the stages.
        stoken_size: Side of a cell, or its rows and columns, in each stage; 1 lets all pixels attend to each other.
            No weight depends on it: see ``set_stoken_size``.
        n_iter: Rounds of association in each stage.
        mlp_ratio: Hidden channels of the MLPs over the stage's.
        qkv_bias: Biases of q, k and v.
        qk_scale: Factor on the attention logits; None for head width ** -0.5.
        layerscale: Stages whose blocks have LayerScale.
        init_values: Its initial value.
        projection: Channels of the final projection, what the classifier sees.
        drop_rate: Dropout in front of the classifier.
        proj_drop_rate: Dropout of attention output and MLP (officially ``drop_rate``, which also drops behind the
            stem; it is 0 in all published trainings).
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_norm: Give every stage's map a LayerNorm for dense prediction. There is no official dense model.

    Raises:
        ValueError: Lists of different lengths, or a value out of its range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        stoken_size: Sequence[int | Sequence[int]] = (8, 4, 1, 1),
        n_iter: Sequence[int] = (1, 1, 1, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layerscale: Sequence[bool] = (False, False, False, False),
        init_values: float = 1e-6,
        projection: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: Factory = {"device": device, "dtype": dtype}
        check_per_stage(len(dims), depths=depths, num_heads=num_heads, n_iter=n_iter, layerscale=layerscale)
        check_attention(dims, num_heads, n_iter)
        cells = _cells(stoken_size, len(dims))
        shared: SharedSettings = {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "attn_drop": attn_drop_rate}
        super().__init__(
            dims,
            num_classes,
            global_pool,
            in_chans,
            num_features=projection,
            drop_rate=drop_rate,
            out_norm=partial(LayerNorm2d, **dd) if out_norm else None,
            **dd,
        )
        self.num_heads = list(num_heads)
        self.stem = _stem(in_chans, dims[0], dd)
        rates: list[list[float]] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def make_blocks(i: int) -> list[nn.Module]:
            scale = init_values if layerscale[i] else None
            form: AttentionSettings = {"num_heads": num_heads[i], "cell": cells[i], "n_iter": n_iter[i], **shared}
            return [SuperTokenBlock(dims[i], mlp_ratio, scale, rate, proj_drop_rate, **dd, **form) for rate in rates[i]]

        self.stages = conv_stages(dims, make_blocks, **dd)
        self.proj: nn.Module = nn.Conv2d(dims[-1], projection, 1, **dd)
        self.norm: nn.Module = nn.BatchNorm2d(projection, **dd)
        self.init_weights(needs_reset=False)

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        refuse_open_sides(x.shape[-2:], 0, "a super-token SViT", "token counts")
        compile_each_size(x.shape[-2:])

    def _finish(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.proj(x))
        return F.silu(y)

    def _prune_final(self) -> None:
        self.proj, self.norm = nn.Identity(), nn.Identity()

    def set_stoken_size(self, stoken_size: Sequence[int | Sequence[int]]) -> None:
        """Change the cells of the stages, for instance to (16, 8, 2, 1) for dense prediction at high resolution.

        Attention between all pixels of a stage is quadratic in their number; at 512 x 512 the official code tries
        these larger cells. Weights of one setting run with any other, with another result.

        Raises:
            ValueError: Not one positive size for each stage.
        """
        cells = _cells(stoken_size, len(self.stages))
        for stage, cell in zip(self.stages, cells, strict=True):
            blocks: Iterable[SuperTokenBlock] = stage.blocks
            for block in blocks:
                block.attn.cell = cell
        update_model_args(self, stoken_size=cells)  # for a model that is saved and built again

    @torch.no_grad()
    def super_tokens(self, x: Tensor, stage: int = 0, block: int = -1) -> SuperTokens:
        """The super tokens of images (B, in_chans, H, W) as one block forms them.

        Args:
            x: Images.
            stage: Number of the stage; its map has a pixel for 4 * 2**stage pixels of the image a side.
            block: Number of the block in the stage, negative ones from the end.

        Raises:
            ValueError: The blocks of this stage have none, because every pixel attends to all others.
        """
        check_batch(x, self, self.in_chans)
        blocks = self.stages[stage].blocks
        block = range(len(blocks))[block]
        attn: SuperTokenAttention = blocks[block].attn
        if attn.cell == (1, 1):
            raise ValueError(
                f"stage {stage} has no super tokens, its stoken_size is 1; ask for another stage, or give it cells "
                "with set_stoken_size"
            )
        x = self.stages[stage].downsample(self.stages[:stage](self.stem(x)))
        x = blocks[block].pos_embed(blocks[:block](x))
        x = blocks[block].norm1(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        weights = associate(to_cells(x, attn.cell), attn.n_iter)  # (B, rows, columns, 9, p)
        labels = from_cells(nearest_super_token(weights).unsqueeze(-1), attn.cell, like=x).squeeze(-1)  # (B, H, W)
        grid = (weights.shape[1], weights.shape[2])
        return SuperTokens(weights.flatten(1, 2).transpose(2, 3), labels, grid, attn.cell)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: attention between the soft superpixels of a map."""
        terms, size = conv_stage_terms(self.stem, self.stages, size)
        terms += layers("head", self.proj, size[0] * size[1]) + norm(self.norm, size[0] * size[1])
        return terms + pooled_head(self.head, size)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """Shares of each stage's last super tokens in its pixels of an image (1, 3, H, W); for eval mode."""
        stages, last = [], -1
        for i, stage in enumerate(self.stages):
            last += len(stage.blocks)
            if stage.blocks[-1].attn.cell != (1, 1):
                tokens = self.super_tokens(x, stage=i)
                shares = all_shares(tokens)  # (H, W, n)
                stages.append(soft_stage(last, shares.flatten(0, 1), (shares.shape[0], shares.shape[1])))
        return stages

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Official weights under our names, and the names dropped: the constant kernels of unfold and fold.

        qkv goes from [q|k|v] of each head to q, k and v of all heads; other weights only change their shape.
        """
        adapted, dropped = {}, []
        for official, value in state.items():
            name = renamed(official, RENAMED)
            if re.search(r"\.attn\.(un)?fold\.weights$", name):
                dropped.append(official)
                continue
            if name != official:
                name, value = self._own_layout(name, value)
            adapted[name] = value
        unused = self.pruned_names(adapted)
        return {name: value for name, value in adapted.items() if name not in unused}, dropped + unused

    def _own_layout(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """One renamed official weight: downsampling opens a stage here, attention is linear, gamma a vector."""
        if ".downsample." in name:
            return re.sub(r"^stages\.(\d)", lambda match: f"stages.{int(match[1]) + 1}", name), value
        if ".attn.refine." in name:
            if ".qkv." in name:
                heads = self.num_heads[int(name.split(".")[1])]
                value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            return name, value.flatten(1) if value.ndim == 4 else value
        return name, value.flatten() if name.endswith(".gamma") else value


def check_attention(dims: Sequence[int], num_heads: Sequence[int], n_iter: Sequence[int]) -> None:
    """Raise a ValueError unless the heads divide the channels of every stage and there is a round of association."""
    if any(dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
        raise ValueError(f"num_heads must divide the channels of its stage, got {list(num_heads)} for {list(dims)}")
    if min(n_iter) < 1:
        raise ValueError(f"n_iter must be at least 1 in every stage, got {list(n_iter)}")


def _stem(in_chans: int, dim: int, dd: Factory) -> ChannelsLastStem:
    """Four convolutions to stride 4, each with GELU and then BatchNorm."""
    widths = ((in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1))
    layers: list[nn.Module] = []
    for ingoing, outgoing, stride in widths:
        layers += [
            nn.Conv2d(ingoing, outgoing, 3, stride=stride, padding=1, **dd),
            nn.GELU(),
            nn.BatchNorm2d(outgoing, **dd),
        ]
    return ChannelsLastStem(*layers)


def _cells(stoken_size: Sequence[int | Sequence[int]], stages: int) -> list[tuple[int, int]]:
    """(rows, columns) of the cells of every stage, checked."""
    cells: list[tuple[int, ...]] = [tuple(to_2tuple(size)) for size in stoken_size]
    sides = [side for cell in cells for side in cell]
    if (
        len(cells) != stages
        or any(len(cell) != 2 for cell in cells)
        or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides)
    ):
        raise ValueError(
            f"stoken_size needs a positive whole number, or one for rows and one for columns, for each of the {stages} "
            f"stages, got {list(stoken_size)}"
        )
    return [(cell[0], cell[1]) for cell in cells]


def all_shares(tokens: SuperTokens) -> Tensor:
    """(H, W, n) shares of all super tokens of the first image: zero but for the nine around each pixel."""
    association, (rows, columns) = tokens.association[0], tokens.grid  # (n, p, 9)
    numbers = torch.arange(1, rows * columns + 1, device=association.device).view(1, rows, columns, 1)
    table = neighbours(numbers).view(rows * columns, 1, 9).expand_as(association)  # (n, p, 9), 0 outside the grid
    shares = association.new_zeros(*association.shape[:2], rows * columns + 1).scatter_add(-1, table, association)
    cells = shares[..., 1:].unflatten(0, (1, rows, columns))  # (1, rows, columns, p, n)
    return from_cells(cells, tokens.cell, like=tokens.labels.unsqueeze(-1))[0]
