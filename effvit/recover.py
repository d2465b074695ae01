"""From the tokens that are left back to full (B, C, H, W) maps: fills without weights, and attention with them.

A fill is exact where nothing was reduced. Merged patches take the feature of their token ("unmerge by
source"); the fills differ in what a patch gets that no token stands for any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.layers.cross_attention import CrossAttention, CrossBlock, WindowCrossBlock
from effvit.protocols import Device
from effvit.schedule import check_choice
from effvit.tokens import TokenMap, flat_rows, fx_leaf, take_rows, wide_dtype, widened, without_autocast

__all__ = [
    "FILLS",
    "NORMS",
    "AttentionRecovery",
    "Fill",
    "RestoreBlock",
    "TokenRecoveringAttention",
    "TokenRecovery",
    "check_fill",
    "closeness",
    "reconstruct_tokens",
    "register_fill",
    "restore",
    "to_grid",
    "to_map",
    "to_small_map",
    "unpacked",
]

NORMS = ("l2", "l1", "official")


def check_fill(fill: str) -> None:
    """Raise a ValueError unless ``fill`` names one of FILLS."""
    check_choice("recover", fill, FILLS)


def nearest_token(tokens: TokenMap) -> Tensor:
    """(B, H*W) token whose anchor is closest on the grid to each patch (Euclidean; ties: the first token)."""
    width = tokens.grid[1]
    patch = torch.arange(tokens.grid[0] * width, device=tokens.source.device)
    row = torch.div(tokens.anchor, width, rounding_mode="floor")  # (B, N)
    column = tokens.anchor - row * width
    patch_row = torch.div(patch, width, rounding_mode="floor")[None, :, None]  # (1, H*W, 1)
    patch_column = patch[None, :, None] - patch_row * width  # (1, H*W, 1)
    distance = (row.unsqueeze(1) - patch_row) ** 2 + (column.unsqueeze(1) - patch_column) ** 2  # (B, H*W, N)
    if tokens.valid is not None:
        far = tokens.grid[0] ** 2 + width**2
        distance = distance.masked_fill(~tokens.valid.unsqueeze(1), far)
    return distance.argmin(-1)


@fx_leaf
def closeness(x: Tensor, centres: Tensor, temperature: float) -> Tensor:
    """-temperature * |x - c|^2 of every token to every centre, up to a term of each token alone.

    The term, -temperature * |x|^2, changes no softmax, order or normalised weight over the centres; without it
    one fused product remains, and what cancels in |x|^2 - 2 x c + |c|^2 does not cost precision.

    Args:
        x: (B, N, C) tokens.
        centres: (B, M, C).
        temperature: Factor on the squared distance.

    Returns:
        (B, N, M) in float32 (float64 for float64), also under autocast.
    """
    x, centres = widened(x), centres.to(wide_dtype(x.dtype))
    with without_autocast(x):
        offset = centres.square().sum(-1).mul(-temperature).unsqueeze(1)  # (B, 1, M)
        return torch.baddbmm(offset, x, centres.transpose(1, 2), alpha=2 * temperature)


@fx_leaf
def reconstruct_tokens(
    z: Tensor,
    patches: Tensor,
    centres: Tensor,
    temperature: float = 5e-3,
    k: int | None = None,
    norm: str = "l2",
    usable: Tensor | None = None,
) -> Tensor:
    """Every patch as a mixture of the k tokens it was most alike (Expedite, 2210.01035, token reconstruction).

    Weights are exp(-temperature * D) with D the squared distance between the patch and the token at a former
    depth, kept for the k nearest (more where distances tie) and normalised for each patch. Defaults are those of
    scripts/amg.py@75a1c30. Unless norm is "official", the smallest distance of a patch is subtracted first: that
    cancels in the normalisation, but a patch far from all tokens is reconstructed like any other, while the
    official weights underflow and make it small or zero (temperature * D above 27).

    Args:
        z: (B, M, C') tokens to mix.
        patches: (B, N, C) features of all patches at the former depth.
        centres: (B, M, C) features of the tokens at that depth.
        temperature: Factor on the squared distance.
        k: Tokens a patch is a mixture of; None means 20, or all where there are fewer.
        norm: "l2": weights have Euclidean norm one, as officially, so that they sum to between 1 and sqrt(k);
            "l1": they sum to one, a mean; "official": as "l2", with the underflow of the official code.
        usable: (B, M) False for tokens that take part only if a patch has no other.

    Returns:
        (B, N, C').

    Raises:
        ValueError: k larger than M, or an unknown norm.
    """
    check_choice("norm", norm, NORMS)
    number = centres.shape[1]
    if k is not None and not 1 <= k <= number:
        raise ValueError(
            f"k must be at least 1 and at most the number of tokens, got {k} for {number} tokens; "
            "use a smaller k, or None for 20 at most"
        )
    logits = closeness(patches, centres, temperature)  # (B, N, M)
    if usable is not None:
        logits = logits.masked_fill(~usable.unsqueeze(1), torch.finfo(logits.dtype).min)
    nearest = logits.detach().topk(k or min(20, number), dim=-1).values  # (B, N, k)
    largest = nearest[..., :1]  # (B, N, 1)
    if norm == "official":  # the true distances, which are not negative
        largest = (patches.to(logits.dtype).square().sum(-1, keepdim=True) * temperature).maximum(largest)
    weights = (logits - largest).exp().masked_fill(logits < nearest[..., -1:], 0)
    weights = F.normalize(weights, p=1.0 if norm == "l1" else 2.0, dim=-1)
    with without_autocast(z):
        return weights.to(z.dtype) @ z


def _reconstruct(patches: Tensor, tokens: TokenMap) -> Tensor:
    """Fill "reconstruct" of to_grid: patches (B, N, C) -> (B, H*W, C)."""
    reference = tokens.reference
    if reference is None:
        raise ValueError(
            "recover 'reconstruct' needs features from before the reduction to compare the patches in, but this "
            "TokenMap holds no reference; get it from forward_tokens(x, memory=True) or use recover 'nearest' or 'zero'"
        )
    centres = reference.centres
    if centres is None:
        centres = take_rows(reference.patches, flat_rows(tokens.anchor, tokens.num_patches))  # (B, N, C)
    usable = tokens.valid
    if tokens.fused is not None:  # a fused token is not what its anchor was
        usable = ~tokens.fused if usable is None else usable & ~tokens.fused
    options = (reference.temperature, reference.k, reference.norm)
    mixture = reconstruct_tokens(patches, reference.patches, centres, *options, usable)  # (B, H*W, C)
    if tokens.soft:
        return mixture
    return torch.where(tokens.on_its_own().unsqueeze(-1), _spread(patches, tokens.source), mixture)


def _spread(patches: Tensor, source: Tensor) -> Tensor:
    """Patch tokens (B, N, C) at the places whose source (B, H*W) they are: (B, H*W, C), the first one at -1."""
    return take_rows(patches, flat_rows(source.clamp(min=0), patches.shape[1]))


def unpacked(x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
    """Padded tokens (B, P+N, C) of x, which may be packed (1, T, C), and their map."""
    return (tokens.unpack(x), replace(tokens, packed=False)) if tokens.packed else (x, tokens)


def restore(x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
    """The full sequence (B, P + H*W, C), reconstructed, and its map, as if nothing had been reduced before.

    Args:
        x: (B, P+N, C) tokens.
        tokens: Their map, with a reference; errors as in to_grid with "reconstruct".
    """
    if not tokens.moved:
        return x, tokens
    x, tokens = unpacked(x, tokens)
    x = torch.cat([tokens.split(x)[0], to_grid(x, tokens, "reconstruct")], dim=1)
    return x, TokenMap.full(x, tokens.grid, tokens.num_prefix, tokens.num_class)


def to_grid(x: Tensor, tokens: TokenMap, fill: str = "last", recovery: AttentionRecovery | None = None) -> Tensor:
    """Patch tokens of x (B, P+N, C) put back on the full grid: (B, H*W, C) in image order.

    Args:
        x: Tokens as the reduced blocks return them; packed (1, T, C) if ``tokens.packed``.
        tokens: The map that came with x.
        fill: What a dropped patch gets. "last": the feature it had when it entered the block that dropped it
            (needs ``tokens.memory``); "nearest": the feature of the nearest token that is left; "zero": zeros;
            "reconstruct": a mixture of the tokens it was most alike before the first reduction, see
            ``reconstruct_tokens`` (needs ``tokens.reference``); "attention": what ``recovery`` makes of the feature
            "last" gives it (needs ``tokens.memory``). Patches summed up in a fused token count as dropped for "last",
            "reconstruct" and "attention", as carried for the others. In soft clusters no token stands for a patch:
            "reconstruct" mixes all of them, the others take the feature of the nearest cluster. Where
            ``tokens.complete``, there is nothing to fill and all but "reconstruct" are the same.
        recovery: The trained module of the fill "attention".

    Raises:
        ValueError: An unknown fill, "last" or "attention" for a map made without memory, "reconstruct" without
            reference, "attention" without ``recovery``.
    """
    check_fill(fill)
    if not tokens.moved:
        return _patches(x, tokens)
    if tokens.complete and not FILLS[fill].reference:
        return _spread(_patches(x, tokens), tokens.source)
    return FILLS[fill].grid(x, tokens, recovery)


def _patches(x: Tensor, tokens: TokenMap) -> Tensor:
    """(B, N, C) patch tokens of x, which may be packed."""
    x, tokens = unpacked(x, tokens)
    return tokens.split(x)[1]


def _fill_nearest(x: Tensor, tokens: TokenMap, recovery: AttentionRecovery | None) -> Tensor:
    source = torch.where(tokens.source < 0, nearest_token(tokens), tokens.source)
    return _spread(_patches(x, tokens), source)


def _fill_zero(x: Tensor, tokens: TokenMap, recovery: AttentionRecovery | None) -> Tensor:
    return _spread(_patches(x, tokens), tokens.source).masked_fill((tokens.source < 0).unsqueeze(-1), 0)


def _fill_reconstruct(x: Tensor, tokens: TokenMap, recovery: AttentionRecovery | None) -> Tensor:
    return _reconstruct(_patches(x, tokens), tokens)


def _fill_last(x: Tensor, tokens: TokenMap, recovery: AttentionRecovery | None) -> Tensor:
    return _recalled(x, tokens, "last")


def _fill_attention(x: Tensor, tokens: TokenMap, recovery: AttentionRecovery | None) -> Tensor:
    grid = _recalled(x, tokens, "attention")
    if recovery is None:
        raise ValueError("recover 'attention' is trained: give its module, model.recovery, to to_grid or to_map")
    recovered: Tensor = recovery(grid, _patches(x, tokens), tokens.valid)
    return torch.where(tokens.on_its_own().unsqueeze(-1), grid, recovered)


def _recalled(x: Tensor, tokens: TokenMap, fill: str) -> Tensor:
    """(B, H*W, C) every patch as it was last part of the sequence."""
    if tokens.memory is None:
        raise ValueError(
            f"recover {fill!r} needs the features the dropped patches had, but this TokenMap holds no memory; "
            "get it from forward_tokens(x, memory=True) or use recover 'nearest' or 'zero'"
        )
    return tokens.recall(x).features()


class Fill(NamedTuple):
    """What dropped patches get on the full grid.

    Attributes:
        grid: (x (B, P+N, C), tokens, recovery) -> (B, H*W, C); x is packed if the tokens are, ``recovery`` is None but
            for "attention". Called for maps with dropped patches, and for all reduced ones with ``reference``.
        memory: It needs ``tokens.memory``, the features that dropped patches had.
        reference: It needs ``tokens.reference``, the full grid from before the first reduction.
    """

    grid: Callable[[Tensor, TokenMap, AttentionRecovery | None], Tensor]
    memory: bool = False
    reference: bool = False


FILLS: dict[str, Fill] = {
    "last": Fill(_fill_last, memory=True),
    "nearest": Fill(_fill_nearest),
    "zero": Fill(_fill_zero),
    "reconstruct": Fill(_fill_reconstruct, reference=True),
    "attention": Fill(_fill_attention, memory=True),
}


def register_fill(
    name: str, grid: Callable[[Tensor, TokenMap], Tensor], *, memory: bool = False, reference: bool = False
) -> None:
    """Add a fill, so that ``sparsify(..., recover=name)`` and ``to_map`` know it.

    Args:
        name: A word that is no fill yet.
        grid: (x (B, P+N, C), tokens) -> (B, H*W, C). ``tokens.split(x)`` gives prefix and patch tokens,
            ``tokens.source`` (B, H*W) the patch token that stands for each patch, -1 for a dropped one.
        memory: ``tokens.recall(x).features()``, the features that dropped patches had, are needed.
        reference: ``tokens.reference``, the patches from before the first reduction, is needed.

    Raises:
        ValueError: A fill of that name is known.
    """
    if name in FILLS:
        raise ValueError(f"the fill {name!r} is known already; give it another name than {', '.join(FILLS)}")
    FILLS[name] = Fill(lambda x, tokens, recovery: grid(*unpacked(x, tokens)), memory, reference)


def refuse_own_grids(tokens: TokenMap) -> None:
    """Raise a ValueError for images with grids of their own, of which there is no one map."""
    if tokens.layout.own is not None:
        raise ValueError(
            f"the images have grids of their own, of {', '.join(map(str, tokens.layout.own))} patches, so there is no "
            "one map (B, C, H, W) of them; give images of one size, or use forward_intermediates(output_fmt='NLC')"
        )


def to_map(x: Tensor, tokens: TokenMap, fill: str = "last", recovery: AttentionRecovery | None = None) -> Tensor:
    """Full feature map (B, C, H, W) of x; arguments and errors as in to_grid.

    Raises:
        ValueError: As to_grid, and for images with grids of their own.
    """
    refuse_own_grids(tokens)
    return to_grid(x, tokens, fill, recovery).transpose(1, 2).unflatten(2, tokens.grid).contiguous()


def to_small_map(x: Tensor, tokens: TokenMap) -> Tensor:
    """The tokens of x (B, P+N, C) as the map (B, C, h, w) of the smaller grid they are, for a head that takes its size.

    CubistMerge and Expedite leave such a grid, ``tokens.cells``; where nothing was reduced it is that of the patches.

    Raises:
        ValueError: Tokens that are no grid, and images with grids of their own.
    """
    if tokens.cells is None and tokens.moved:
        raise ValueError(
            "the tokens left are no grid of their own, as those of cubistmerge and expedite are; use to_map, which "
            "gives the full map"
        )
    refuse_own_grids(tokens)
    patches = tokens.split(x)[1]
    return patches.transpose(1, 2).unflatten(2, tokens.cells or tokens.grid).contiguous()


class AttentionRecovery(nn.Module):
    """Trained recovery of dropped patches by attention to the tokens left: ``X' = X + MHA(LN(X), LN(S))``.

    The recovery of STViT-R (2303.08685) without its MLP and, to be cheap beside a whole model, with fewer heads, for
    any method and host: X are the patches as they were last carried and S the patch tokens of the map's own depth. One
    module serves all depths. The projection starts at zero, so that an untrained module gives the fill "last", and a
    checkpoint of the host, which has nothing about the module, leaves it as it is.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        head_dim: Channels of a head; None means ``dim // num_heads``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: dim not a multiple of num_heads, and no head_dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.attn = CrossAttention(dim, num_heads, head_dim=head_dim, device=device, dtype=dtype)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.attn.proj.bias)

    def init_weights(self) -> None:
        """Draw the weights anew, as the constructor does."""
        for module in (self.norm, self.attn.q, self.attn.kv):
            module.reset_parameters()
        self._start_at_zero()

    reset_parameters = init_weights  # the name that Eva's initialisation looks for

    def forward(self, x: Tensor, s: Tensor, valid: Tensor | None = None) -> Tensor:
        """Patches x (B, N, C) and tokens left s (B, M, C), False in ``valid`` (B, M) for padding -> (B, N, C)."""
        mask = None if valid is None else valid[:, None, None]  # (B, 1, 1, M)
        return x + self.attn.attend(self.attn.q(self.norm(x)), self.attn.kv(self.norm(s)), mask)


class TokenRecoveringAttention(nn.Module):
    """Recover a full sequence from the tokens left by cross-attention (HoT, 2311.12028, token recovering attention).

    ``out = queries + attention(queries, kept, kept)``: no norm, no MLP. The queries are learned, one for each
    position of a sequence of fixed length, as in hot_mixste.py@873b5bd, or given, for example the tokens from
    before the pruning, which fits any length. Parameters are named as there (``x_token`` of the model and
    ``cross_attention.*`` in one module here).

    Deviation: learned queries start small and random. The official zeros make all positions equal at first, so
    that only the residual path tells them apart; ``zero_init`` asks for them.

    Args:
        dim: Channels.
        num_queries: Length of the sequence to recover; None if queries are given to ``forward``.
        num_heads: Attention heads.
        zero_init: Start learned queries at zero.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: dim not a multiple of num_heads, or zero_init without learned queries.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int | None = None,
        num_heads: int = 8,
        zero_init: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if num_queries is None and zero_init:
            raise ValueError("zero_init is for learned queries, but num_queries is None; leave it out or give a number")
        self.num_heads = num_heads
        self.zero_init = zero_init
        self.register_parameter("x_token", None)
        if num_queries is not None:
            self.x_token = nn.Parameter(torch.empty(1, num_queries, dim, device=device, dtype=dtype))
        self.linear_q = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.linear_k = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.linear_v = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_queries()

    def reset_queries(self) -> None:
        """Initialise learned queries: a normal distribution of 0.02 cut at two units, or zeros."""
        if self.x_token is None:
            return
        if self.zero_init:
            nn.init.zeros_(self.x_token)
        else:
            nn.init.trunc_normal_(self.x_token, std=0.02)

    def forward(self, kept: Tensor, queries: Tensor | None = None) -> Tensor:
        """The recovered sequence.

        Args:
            kept: (B, K, C) tokens left.
            queries: (B, F, C), or (1, F, C) for all images; None for the learned ones.

        Returns:
            (B, F, C).

        Raises:
            ValueError: No queries, or two kinds of them.
        """
        if (queries is None) == (self.x_token is None):
            raise ValueError(
                "give queries to a module without learned ones (num_queries=None), and none to a module with them"
            )
        queries = self.x_token if queries is None else queries
        queries = queries.expand(kept.shape[0], -1, -1)  # (B, F, C)
        q, k, v = (self._heads(y) for y in (self.linear_q(queries), self.linear_k(kept), self.linear_v(kept)))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, F, C)
        return queries + self.proj(out)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, D)


class TokenRecovery(CrossBlock):
    """Trained recovery of image tokens X from a few tokens S, ``X' = MHA(X, S) + X`` and an MLP (STViT-R, 2303.08685).

    ``forward(x, s)``: image tokens x (B, N, C), as they were before S was made of them, attend to the tokens s
    (B, Ns, C) and keep their place: (B, N, C). This is the last layer of the released dumbbell unit on global attention
    (changsn/STViT-R@b4a27a0 models/swin_transformer.py, blocks 5, 11 and 17 of stage 2). Arguments as ``CrossBlock``.
    """


class RestoreBlock(WindowCrossBlock):
    """``TokenRecovery`` by windows, for dense tasks on maps of any size (STViT-R on Swin, 2303.08685).

    The image tokens of a window attend to the semantic tokens in a larger window around theirs: with the released
    sizes, 49 image tokens attend to 27 x 27 semantic tokens, of which the 3 x 3 in the middle came from their own
    window (``RestoreBlock`` of mmdet/models/backbones/layers.py@8b8eb1e of changsn/STViT-R-Object-Detection).

    Args:
        dim: Channels.
        num_heads: Heads.
        window: Side of a window of image tokens.
        samples: Side of its semantic tokens.
        kernel: Side of the key windows on the semantic grid; 9 times ``samples`` if None.
        mask_mode: As for ``WindowCrossBlock``.
        kwargs: Those of ``CrossBlock``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 7,
        samples: int = 3,
        kernel: int | None = None,
        mask_mode: str = "correct",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dim, num_heads, window, samples, 9 * samples if kernel is None else kernel, mask_mode, **kwargs
        )

    def forward(self, x: Tensor, s: Tensor) -> Tensor:  # type: ignore[override]  # maps, and one map of keys
        """Image tokens x (B, H, W, C), as they were before s was made of them, and s (B, h, w, C) -> (B, H, W, C).

        s has ``samples`` rows for each window of x; rows and columns of which no part is on the map may be missing.
        """
        x = x + self.drop_path1(self.cross(x, s, x.shape[1:3], self.window))
        return self.feedforward(x)
