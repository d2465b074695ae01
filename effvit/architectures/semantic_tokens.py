"""The parts that make semantic tokens (STViT, arXiv 2303.08685): seeds pooled in space, and the layers that use them.

STViT's few tokens are cluster centres. They start as seeds, image tokens X pooled onto a small grid, and the
layers of the semantic token generation module (STGM) let them attend to X: ``SeedBlock`` is its first layer,
``SemanticBlock`` every later one. No shape here is bound to a whole image; windows of a Swin are a batch.

No source of STViT on global attention is public. The block and max pooling are those of the released STViT-R
(changsn/STViT-R@b4a27a0, models/layers.py), the order of the layers is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from effvit.layers.cross_attention import CrossAttention, CrossBlock, CrossSettings
from effvit.layers.macs import Terms, layers
from effvit.protocols import Device, Factory, Size
from effvit.tokens import fx_leaf, wide_dtype, wide_product, widened

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "SEED_POOLS",
    "LearnedSeeds",
    "SeedBlock",
    "SemanticBlock",
    "check_seed_grid",
    "generate",
    "max_seeds",
    "seed_terms",
    "soft_assignment",
]

SEED_POOLS = ("max", "learned")


def check_seed_grid(grid: tuple[int, int], out: tuple[int, int]) -> None:
    """Raise a ValueError unless a patch grid (H, W) has a patch for every seed of ``out`` (h, w)."""
    if grid[0] < out[0] or grid[1] < out[1]:
        raise ValueError(
            f"{out[0]} x {out[1]} semantic tokens need a grid of at least as many patches in either direction, got "
            f"{grid[0]} x {grid[1]}; use larger images or a smaller semantic grid"
        )


def bins(length: int, number: int) -> list[slice]:
    """Bins of adaptive pooling: bin i of n covers floor(i L / n) to ceil((i + 1) L / n); neighbours may overlap."""
    return [slice(i * length // number, -(-(i + 1) * length // number)) for i in range(number)]


@fx_leaf
def max_seeds(x: Tensor, grid: tuple[int, int], out: tuple[int, int]) -> Tensor:
    """Image tokens pooled onto a smaller grid, the largest value of each channel (STViT-R's released pooling).

    The result is that of torch's ``adaptive_max_pool2d``, for which the ONNX exporter has no rule. Rows and then
    columns are pooled as slices, in the layout the tokens have. Equal largest values share the gradient.

    Args:
        x: Image tokens (B, H*W, C) in image order.
        grid: (H, W).
        out: (h, w), at most (H, W).

    Returns:
        Seeds (B, h*w, C).

    Raises:
        ValueError: The grid is smaller than ``out``.
    """
    check_seed_grid(grid, out)
    x = x.unflatten(1, grid)  # (B, H, W, C)
    x = torch.stack([x[:, rows].amax(1) for rows in bins(grid[0], out[0])], dim=1)  # (B, h, W, C)
    x = torch.stack([x[:, :, columns].amax(2) for columns in bins(grid[1], out[1])], dim=2)  # (B, h, w, C)
    return x.flatten(1, 2)


@fx_leaf
def window_points(out: tuple[int, int], samples: tuple[int, int], like: Tensor) -> Tensor:
    """(h*n, w*m, 2) evenly spaced sampling points, n x m in each of h x w windows, as ``grid_sample`` wants them.

    Where h*n is the number of rows and w*m that of columns, the points are the centres of the patches.
    """
    y, x = (
        (2 * torch.arange(number * each, device=like.device, dtype=like.dtype) + 1) / (number * each) - 1
        for number, each in zip(out, samples, strict=True)
    )
    return torch.stack([x.expand(len(y), -1), y.unsqueeze(1).expand(-1, len(x))], dim=-1)


@fx_leaf
def sample_windows(maps: Tensor, points: Tensor, out: tuple[int, int]) -> Tensor:
    """maps (B, C, H, W) at points (B, h*n, w*m, 2), bilinear: (B, C, h, w, n*m)."""
    sampled = F.grid_sample(maps, points, padding_mode="border", align_corners=False)  # (B, C, h*n, w*m)
    return sampled.unflatten(3, (out[1], -1)).unflatten(2, (out[0], -1)).transpose(3, 4).flatten(4)


class LearnedSeeds(nn.Module):
    """Seeds by learned pooling inside and between windows (STViT, 2303.08685, the paper's own pooling).

    Known, though from notes on the paper only: a depth-wise convolution, LayerNorm, GELU and a convolution predict a
    mask, which weights the tokens inside a window, and an offset, which lets a window reach into its neighbours. The
    released code pools by maximum instead (``max_seeds``) and no weights of this pooling are public, so the rest is
    our choice: a window is one cell of the semantic grid, sampled bilinearly at ceil(H/h) x ceil(W/w) points; the
    depth-wise kernel is 3 x 3, the last one 1 x 1 with three channels, the mask's logit and the offset; the mask is a
    softmax over a window's points; the offset is the mean over the window, bounded by tanh to one window. The last
    convolution starts at zero, so that a new model pools windows by their mean.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = LayerNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.proj = nn.Conv2d(dim, 3, 1, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start as mean pooling."""
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)

    reset_parameters = init_weights

    def forward(self, x: Tensor, grid: tuple[int, int], out: tuple[int, int]) -> Tensor:
        """Seeds (B, h*w, C) of image tokens (B, H*W, C); arguments and errors as ``max_seeds``."""
        check_seed_grid(grid, out)
        maps = x.transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        wide = wide_dtype(x.dtype)
        predicted = self.proj(self.act(self.norm(self.conv(maps)))).to(wide)  # (B, 3, H, W)
        mask, offset = predicted.split([1, 2], dim=1)  # (B, 1, H, W), (B, 2, H, W)
        samples = -(-grid[0] // out[0]), -(-grid[1] // out[1])
        points = window_points(out, samples, offset).expand(maps.shape[0], -1, -1, -1)  # (B, h*n, w*m, 2)
        shift = sample_windows(offset, points, out).mean(-1).tanh()  # (B, 2, h, w), in windows
        right, down = shift.unbind(1)
        shift = torch.stack([right * (2 / out[1]), down * (2 / out[0])], dim=-1)  # (B, h, w, 2), of the width 2
        points = points + shift.repeat_interleave(samples[0], 1).repeat_interleave(samples[1], 2)  # (B, h*n, w*m, 2)
        sampled = sample_windows(torch.cat([maps.to(wide), mask], dim=1), points, out)  # (B, C+1, h, w, n*m)
        seeds = (sampled[:, :-1] * sampled[:, -1:].softmax(-1)).sum(-1)  # (B, C, h, w)
        return seeds.flatten(2).transpose(1, 2).to(x.dtype)


def soft_assignment(attn: CrossAttention, q: Tensor, kv: Tensor, num_patches: int) -> Tensor:
    """How much of each semantic token belongs to each patch, from the attention that made the tokens.

    The attention of token s to patch p, averaged over heads, is read the other way round: transposed and normalised
    over s. This is done with logarithms, since the attention a patch gets may underflow for all tokens. Our choice;
    the paper knows only the trained recovery of STViT-R.

    Args:
        attn: The attention.
        q: Its projected queries (B, Ns, C).
        kv: Its projected keys and values (B, Nk, 2C); those of the patches come last.
        num_patches: Np.

    Returns:
        (B, Np, Ns) in the wide dtype; rows sum to one.
    """
    q, k = attn.split_heads(q), attn.split_heads(kv.chunk(2, dim=-1)[0])  # (B, heads, Ns, D), (B, heads, Nk, D)
    scale = (attn.q.out_features // attn.num_heads) ** -0.5
    logits = wide_product(widened(q) * scale, k.transpose(-2, -1))  # (B, heads, Ns, Nk)
    weights = logits.log_softmax(-1)[..., -num_patches:]  # (B, heads, Ns, Np)
    return weights.logsumexp(1).transpose(1, 2).softmax(-1)


def generate(block: CrossBlock, s: Tensor, keys: Tensor, num_patches: int = 0) -> tuple[Tensor, Tensor | None]:
    """One layer of the STGM: the block on queries s (B, Ns, C) and keys (B, Nk, C).

    Returns:
        The semantic tokens (B, Ns, C), and the ``soft_assignment`` (B, Np, Ns) of the last ``num_patches`` keys;
        None for 0.
    """
    q: Tensor = block.attn.q(block.norm1(s))
    kv: Tensor = block.attn.kv(block.norm1(keys))
    assignment = soft_assignment(block.attn, q, kv, num_patches) if num_patches else None
    y: Tensor = block.drop_path1(block.ls1(block.attn.attend(q, kv)))
    return block.feedforward(s + y), assignment


class SeedBlock(CrossBlock):
    """The first layer of the STGM, ``S1' = MHA(P, X) + P`` and the MLP, with seeds P pooled from X (eq. 1-6).

    Args:
        dim: Channels.
        num_heads: Heads.
        out: (h, w), the semantic grid.
        seed_pool: "max", as released, or "learned", as the paper describes (see ``LearnedSeeds``).
        kwargs: Those of ``CrossBlock``.

    Raises:
        ValueError: An unknown ``seed_pool``.
    """

    def __init__(
        self, dim: int, num_heads: int, out: tuple[int, int], seed_pool: str = "max", **kwargs: Unpack[CrossSettings]
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if seed_pool not in SEED_POOLS:
            raise ValueError(f"seed_pool must be {' or '.join(map(repr, SEED_POOLS))}, got {seed_pool!r}")
        self.out = out
        self.pool: LearnedSeeds | None = None
        if seed_pool == "learned":
            self.pool = LearnedSeeds(dim, device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    def seeds(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """P (B, h*w, C) of image tokens (B, H*W, C)."""
        pool: Callable[..., Tensor] = max_seeds if self.pool is None else self.pool
        return pool(x, grid, self.out)

    def forward(  # type: ignore[override]  # keys and queries come from the same tokens
        self, x: Tensor, grid: tuple[int, int], assign: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Image tokens (B, H*W, C) on their grid -> S1 (B, h*w, C) and, if asked for, ``generate``'s assignment."""
        return generate(self, self.seeds(x, grid), x, x.shape[1] if assign else 0)


class SemanticBlock(CrossBlock):
    """A later layer of the STGM, ``S2' = MHA(S1 + G, [S1; X]) + S1 + G`` and the MLP (eq. 1-6).

    The residual is the block's own query as in the released code; second-hand notes of the paper print P. The keys
    hold S1 without G, as released.

    Args:
        dim: Channels.
        num_heads: Heads.
        num_centres: Rows of G, the learned global cluster centres, one a semantic token; 0 for none.
        kwargs: Those of ``CrossBlock``.
    """

    def __init__(self, dim: int, num_heads: int, num_centres: int = 0, **kwargs: Unpack[CrossSettings]) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.global_centres: nn.Parameter | None = None
        if num_centres:
            empty = torch.empty(1, num_centres, dim, device=kwargs.get("device"), dtype=kwargs.get("dtype"))
            self.global_centres = nn.Parameter(empty)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw G from N(0, 0.02), truncated."""
        if self.global_centres is not None:
            trunc_normal_(self.global_centres, std=0.02)

    reset_parameters = init_weights

    def forward(  # type: ignore[override]  # also the assignment
        self, s: Tensor, x: Tensor, assign: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """S (B, Ns, C) and image tokens (B, N, C) -> the next S and, if asked for, ``generate``'s assignment."""
        query = s if self.global_centres is None else s + self.global_centres
        return generate(self, query, torch.cat([s, x], dim=1), x.shape[1] if assign else 0)


def seed_terms(pool: LearnedSeeds | None, grid: Size, out: Size, number: int = 1) -> Terms:
    """Pooling of ``number`` grids onto smaller ones: by maximum for None, or learned."""
    if pool is None:
        return Terms()
    terms = layers("pooling", pool, number * grid[0] * grid[1])
    points = out[0] * -(-grid[0] // out[0]) * out[1] * -(-grid[1] // out[1])
    # Bilinear samples, of four weights each, of the offsets, and then of the channels and the mask.
    terms["pooling"] += number * points * 4 * (2 + pool.conv.in_channels + 1)
    return terms
