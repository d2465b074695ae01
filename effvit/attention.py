"""timm's attention modules for token sequences that shrink: biases, sampled query rows, packed batches.

Each class below has the parameters and names of the timm module it extends and computes the same numbers bit
for bit while nothing is reduced. The fused ``scaled_dot_product_attention`` is used unless a method truly needs
the softmax map; what a method scores tokens with (the class token's row, the keys) is computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from effvit.protocols import Layer
from effvit.recording import graphs_count, is_exported, is_recorded
from effvit.tokens import TokenMap, fx_leaf, take_rows, wide_dtype, wide_product, widened

__all__ = [
    "ATTENTION_CLASSES",
    "AttnState",
    "Beside",
    "CausalMask",
    "Images",
    "MapSums",
    "PairBias",
    "Picked",
    "PoolMap",
    "PoolTokens",
    "Pooled",
    "SumMap",
    "attend_one_by_one",
    "attend_together",
    "bias_as_features",
    "biases_between",
    "class_attention",
    "jagged_attention",
    "map_sums",
    "masked_attention",
    "policy_softmax",
    "sum_beside",
]

T = TypeVar("T")


class Beside(Generic[T]):
    """What belongs to a module's output beside the tensor that it returns: the map of a block, the state of attention.

    The caller hands a new one to each call, so forward hooks, wrappers and feature extractors meet a plain tensor, as
    they do in timm, and may replace it; nothing is stored on a module.
    """

    value: T


class Picked(NamedTuple):
    """Which tokens stay as queries: the choice of a method that prunes between scores and attention.

    Attributes:
        rows: (B, P+K) row numbers in the flattened input sequence; (1, T) for a packed sequence.
        tokens: The map of the selected tokens.
    """

    rows: Tensor
    tokens: TokenMap


class MapSums(NamedTuple):
    """What is left of a softmax map that was not kept.

    Attributes:
        diagonal: (B, heads, P+N) attention of each token to itself.
        received: (B, heads, P+N) attention that each token gets from all queries.
    """

    diagonal: Tensor
    received: Tensor


class SumMap(NamedTuple):
    """Asks attention for the MapSums of its softmax map, given as ``edit_map``.

    Attributes:
        weigh: Weight of each query in ``received``, (B, heads, P+N) from the state; None: 1.
        hold: Keep the map in the state if it is one piece.
    """

    weigh: Callable[[AttnState], Tensor] | None = None
    hold: bool = False


class Pooled(NamedTuple):
    """Tokens that were pooled by what a block's attention scored of them.

    Attributes:
        x: (B, P+K, C) the tokens.
        tokens: Their map.
        weights: (B, heads, P+K, P+K) the softmax map, pooled with them; None: they get an attention of their own.
    """

    x: Tensor
    tokens: TokenMap
    weights: Tensor | None


class PoolMap(NamedTuple):
    """Asks attention for the product of a pooled softmax map with values of the pooled tokens, given as ``edit_map``.

    Attributes:
        pool: Pools the tokens as attention gets them, normalised, given the state before, which holds no values.
    """

    pool: Callable[[AttnState], Pooled]


class PoolTokens(NamedTuple):
    """Asks a block to pool its tokens by the scores of its attention, before their values are made.

    Attributes:
        pools: Whether any of the tokens of a map are pooled; else the attention is the ordinary one.
        pool: Pools (B, P+N, C) the tokens that entered the block, given the state of their attention.
        maps: Whether the softmax map is pooled with them.
    """

    pools: Callable[[TokenMap], bool]
    pool: Callable[[Tensor, AttnState], Pooled]
    maps: bool


@fx_leaf
def biases_between(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Entries of a table for the queries and keys of each image.

    Args:
        table: (heads, F, F), or (1, heads, F, F), between the F places of the full sequence.
        queries: (B, Q) places of the queries.
        keys: (B, K) places of the keys.

    Returns:
        (B, heads, Q, K).
    """
    number = table.shape[-1]
    pairs = (queries * number).unsqueeze(2) + keys.unsqueeze(1)  # (B, Q, K)
    entries = table.reshape(-1, number * number).index_select(1, pairs.flatten())  # (heads, B * Q * K)
    return entries.unflatten(1, pairs.shape).transpose(0, 1)


class PairBias(NamedTuple):
    """The bias of each pair of query and key in one block of a host with relative positions.

    It belongs to two places of the full sequence. Tokens keep the place of their anchor, so that of any two of them is
    an entry of the host's table, gathered when it is asked for.

    Attributes:
        table: (heads, F, F) between the F places of the full sequence, prefix tokens in front; or (1, heads, F, F).
            While nothing moved it is used as it is, since kernels are chosen by its dimensions and timm's shall run.
        places: (B, P+N) place of each token in the full sequence.
        moved: False while the tokens are the full sequence.
    """

    table: Tensor
    places: Tensor
    moved: bool

    @classmethod
    def of(cls, table: Tensor, tokens: TokenMap) -> PairBias:
        """The bias between the tokens of a map that is not packed."""
        ranges = tokens.layout.ranges
        places = ranges.behind_prefix(tokens.anchor) + tokens.num_prefix if tokens.moved else ranges.sequence
        return cls(table, places, tokens.moved)

    def whole(self) -> Tensor:
        """Between all tokens: (B, heads, P+N, P+N); the table itself, for all images, while nothing moved."""
        return biases_between(self.table, self.places, self.places) if self.moved else self.table

    def leading(self, number: int) -> Tensor:
        """Of the first ``number`` tokens as queries, which may be those of class: (B or 1, heads, number, P+N)."""
        if not self.moved:
            return self.table[..., :number, :]
        return biases_between(self.table, self.places[:, :number], self.places)

    def picked(self, rows: Tensor) -> Tensor:
        """Of the queries in the rows (B, Q) of the flattened sequence: (B, heads, Q, P+N)."""
        return biases_between(self.table, take_rows(self.places, rows), self.places)


class CausalMask(NamedTuple):
    """The mask of one block of a causal host, which is applied to the softmax map and does not renormalise its rows.

    A token stands at the place of its anchor, in whatever order the sequence holds it. Prefix tokens stand behind all
    patches, so that their rows stay as they are.

    Attributes:
        places: (B, P+N) place of each token; H*W for prefix tokens. (1, P+N) for all images if none is selected.
        soft_mask: Factor in [0, 1] on entries whose key is behind their query; 0 is the plain causal mask.
        moved: False while the tokens are the full sequence, whose mask is the same for all images.
    """

    places: Tensor
    soft_mask: float
    moved: bool = False

    @classmethod
    def of(cls, tokens: TokenMap, soft_mask: float) -> CausalMask:
        """The mask between the tokens of a map that is not packed."""
        places = tokens.layout.ranges.behind_prefix(tokens.anchor)  # (B, P+N), negative for prefix tokens
        return cls(torch.where(places < 0, tokens.num_patches, places), soft_mask, tokens.moved)

    def applied(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """The map with the mask.

        Args:
            weights: (B, heads, Q, P+N) the softmax map.
            rows: (B, Q) rows of its queries in the flattened sequence; None: all tokens in order.
        """
        keys = self.places if self.moved or rows is not None else self.places[:1]
        queries = keys if rows is None else take_rows(self.places, rows)
        later = (keys.unsqueeze(1) > queries.unsqueeze(2)).unsqueeze(1)  # (B or 1, 1, Q, P+N)
        return torch.where(later, weights * self.soft_mask, weights)


class AttnState(NamedTuple):
    """What one block's attention knows, for a reducer to score tokens with.

    Attributes:
        q: (B, heads, P+N, D) queries after norm and RoPE; (1, heads, T, D) for a packed sequence.
        k: Keys, likewise.
        v: Values, likewise; none of their channels where no values are made of the tokens that entered.
        scale: Factor on q k^T.
        tokens: The map of the tokens that leave the attention: the selected ones if any were selected.
        keys: The map of the tokens that entered it, to which q, k and v belong.
        bias: (B, 1, 1, P+N) its key bias in fp32 (fp64 for fp64), made once for scores and attention; None for none.
        x: The normalised tokens that entered it, to tell where NaN scores come from.
        rows: The selected rows of the input sequence, None for all.
        weights: (B, heads, P+N, P+N) softmax map, only for a method that asked for it (and where it is not too large).
        sums: Its diagonal and column sums, likewise.
        pairs: The bias of each pair of tokens in a host with relative positions; None in others.
        mask: The mask of a causal host; None in others.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    tokens: TokenMap
    keys: TokenMap
    bias: Tensor | None
    x: Tensor | None = None
    rows: Tensor | None = None
    weights: Tensor | None = None
    sums: MapSums | None = None
    pairs: PairBias | None = None
    mask: CausalMask | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        tokens: TokenMap,
        x: Tensor | None = None,
        pair_table: Tensor | None = None,
        mask: CausalMask | None = None,
    ) -> AttnState:
        """The state before any selection: all tokens of the map, which makes the key bias."""
        pairs = None if pair_table is None else PairBias.of(pair_table, tokens)
        return cls(q, k, v, scale, tokens, tokens, tokens.key_bias(q.dtype), x, pairs=pairs, mask=mask)

    @property
    def packable(self) -> bool:
        """Whether attention treats all pairs of tokens alike, as kernels for packed batches do."""
        return self.pairs is None and self.mask is None

    def pair_bias(self) -> Tensor | None:
        """(B or 1, heads, P+K, P+N) bias of the queries that go on with all keys; None without relative positions."""
        if self.pairs is None:
            return None
        return self.pairs.whole() if self.rows is None else self.pairs.picked(self.rows)

    def class_rows(self) -> Tensor:
        """Attention of the class-like tokens to all tokens, (B, heads, num_class, P+N), in fp32 (fp64 for fp64).

        These are rows of the softmax map, computed from num_class queries: O(N) memory beside the fused kernel. No mask
        changes them.
        """
        num_class = self.keys.num_class
        if self.weights is not None:
            return self.weights[:, :, :num_class]
        if self.keys.packed:
            q, k = class_queries(self.q, self.keys), unpack_heads(self.k, self.keys)
        else:
            q, k = self.q[:, :, :num_class], self.k
        wide = wide_dtype(q.dtype)
        logits = wide_product(q.to(wide) * self.scale, k.transpose(-2, -1))  # (B, heads, num_class, P+N)
        if self.pairs is not None:
            logits = logits + self.pairs.leading(num_class)
        return (logits if self.bias is None else logits + self.bias).softmax(dim=-1)

    def softmax_map(self) -> Tensor:
        """The whole softmax map (B, heads, P+N, P+N), in fp32 (fp64 for fp64), since methods rank tokens by it.

        In a causal host it has the mask, as attention applies it, so that its rows do not sum to 1.
        """
        q, k = self.map_factors()
        logits = wide_product(q, k.transpose(-2, -1))
        weights = (logits if self.pairs is None else logits + self.pairs.whole()).softmax(dim=-1)
        return weights if self.mask is None else self.mask.applied(weights)

    def map_factors(self) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, P+N, D or D+1) in fp32 (fp64 for fp64) whose products are the map's logits.

        But for the bias of pairs, which features cannot hold. A key bias rides in one more feature, 1 for the queries,
        so the map is not passed over again to add it.
        """
        wide = wide_dtype(self.q.dtype)
        q, k = self.q.to(wide) * self.scale, self.k.to(wide)
        if self.bias is not None:
            q = F.pad(q, (0, 1), value=1)  # (B, heads, P+N, D+1)
            k = torch.cat([k, self.bias.transpose(-2, -1).expand(-1, k.shape[1], -1, -1)], dim=-1)
        return q, k


def class_attention(state: AttnState) -> Tensor:
    """Head-mean attention of the class token to every patch token, (B, N).

    With a distillation token the rows of both are averaged, as EViT's author advises (issue 15 of youweiliang/evit,
    whose code does not run with one). Register tokens neither score nor are scored.
    """
    return state.class_rows().mean(dim=(1, 2))[:, state.keys.num_prefix :]


Pick = Callable[[AttnState], Picked]
MapEdit = Callable[[Tensor], Tensor] | SumMap | PoolMap  # what attention takes
EditMap = Callable[[Tensor], Tensor] | SumMap | PoolTokens  # what a block takes

# Entries of a softmax map that are formed at once on a CPU: 2 MiB, which stay in its cache until they are applied.
CACHED_ENTRIES = 2**19

# From so many keys on, flash attention on a GPU gains more over the fused kernel that takes a mask than it costs to
# carry the bias in eight more features: by the bytes copied and the products saved on paper; measure_gpu.py tells.
FLASH_KEYS = 512
FLASH_WIDTH = 256  # features of a head, at most
POLICY_EPS = 1e-6  # of the official softmax with a policy
LEAST_BIAS = -1000.0  # what stands for -inf where a bias is a product: its exponential is 0 in every dtype


def map_sums(weights: Tensor, weigh: Tensor | None = None) -> MapSums:
    """Diagonal and column sums of a softmax map (B, heads, N, N), its rows weighted by ``weigh`` (B, heads, N)."""
    received = weights.sum(dim=-2) if weigh is None else wide_product(weigh.unsqueeze(-2), weights).squeeze(-2)
    return MapSums(weights.diagonal(dim1=-2, dim2=-1), received)


def policy_softmax(weights: Tensor, policy: Tensor) -> Tensor:
    """Softmax map in which a policy says how much each key counts (DynamicViT, 2106.02034, eq. 6 to 8).

    A token that is dropped is a key for itself alone. The policy is a factor, and not a bias on the logits, so that it
    has a gradient where it is 0 too. Follows softmax_with_policy of models/dyvit.py in raoyongming/DynamicViT@1322e62,
    whose exponentials are those of the map over the largest of their row.

    Args:
        weights: (B, heads, T, T) softmax map.
        policy: (B, T) 1 for the tokens that stay, 0 for those that are dropped.

    Returns:
        (B, heads, T, T).
    """
    length = policy.shape[1]
    own = torch.eye(length, dtype=policy.dtype, device=policy.device)  # (T, T)
    counted = policy.unsqueeze(1) + (1 - policy).unsqueeze(1) * own  # (B, T, T)
    exponentials = weights / weights.amax(dim=-1, keepdim=True) * counted.unsqueeze(1)
    return (exponentials + POLICY_EPS / length) / (exponentials.sum(dim=-1, keepdim=True) + POLICY_EPS)


def piece_entries(q: Tensor) -> int:
    """Entries of the map of q (B, heads, N, D) to form at once: as many as the MLP has hidden features, or fit a cache.

    So the map takes no more memory than the MLP does, and one of up to 4 D tokens is a single piece but for a CPU.
    """
    entries = 4 * q.numel()
    return min(entries, CACHED_ENTRIES) if q.device.type == "cpu" else entries


def piece_shape(q: Tensor) -> tuple[int, int]:
    """Heads, and rows of each, of a piece of the map of q (B, heads, N, D): some rows of one head, or whole heads."""
    entries, length = piece_entries(q), q.shape[2]
    return max(1, entries // length**2), max(1, min(length, entries // length))


def is_one_piece(state: AttnState) -> bool:
    """Whether the softmax map of the state is formed whole.

    What is recorded must hold for other batches and sizes, so its map is one piece, which compilers fuse as they can. A
    map with a bias or a mask of pairs is one piece beside that of the biases or of the mask.
    """
    q = state.q
    if not state.packable or is_recorded(q) or torch.jit.is_tracing():
        return True
    return q.shape[0] * q.shape[1] * q.shape[2] ** 2 <= piece_entries(q)


def has_gradient(q: Tensor) -> bool:
    """Whether autograd follows q, and would keep every piece of a map that is applied.

    False for what is exported or traced, where a map that is applied and summed costs less than both apart.
    """
    if not torch.is_grad_enabled() or (is_recorded(q) and not torch.compiler.is_dynamo_compiling()):
        return False
    return q.requires_grad


def sum_in_pieces(state: AttnState, weigh: Tensor | None, out: Tensor | None) -> MapSums:
    """``map_sums`` of the state's map, of which only a piece is held: some heads, or some rows of one head.

    Args:
        state: What attention knows.
        weigh: (B, heads, P+N) weight of each row.
        out: (B, heads, P+N, D), filled with the map times the values; None: only the sums are wanted.
    """
    length = state.q.shape[2]
    heads, rows = piece_shape(state.q)
    q, k = (y.flatten(0, 1) for y in state.map_factors())
    k = k.transpose(1, 2).contiguous()  # (B * heads, D, P+N): its products with few rows are 1.3 times as fast so
    diagonal, received = q.new_empty(q.shape[:2]), q.new_zeros(q.shape[:2])
    row_weights = None if weigh is None else weigh.flatten(0, 1).unsqueeze(1)
    values = state.v.flatten(0, 1)
    applied = None if out is None else out.flatten(0, 1)
    held = q.new_empty(heads, rows, length)
    for first in range(0, len(q), heads):
        maps = slice(first, first + heads)
        for start in range(0, length, rows):
            span = slice(start, start + rows)
            part = q[maps, span]
            weights = held[: part.shape[0], : part.shape[1]]
            torch.bmm(part, k[maps], out=weights)
            torch.softmax(weights, dim=-1, out=weights)
            if applied is not None:
                applied[maps, span] = weights.to(values.dtype) @ values[maps]
            diagonal[maps, span] = weights.diagonal(start, 1, 2)
            if row_weights is None:
                received[maps] += weights.sum(1)
            else:
                received[maps] += wide_product(row_weights[maps, :, span], weights).squeeze(1)
    return MapSums(*(y.unflatten(0, state.q.shape[:2]) for y in (diagonal, received)))


def sum_beside(state: AttnState, summing: SumMap) -> AttnState:
    """The state with the sums of its map, which is not applied to the values."""
    with torch.no_grad():
        weigh = None if summing.weigh is None else summing.weigh(state)
        if is_one_piece(state):
            weights = state.softmax_map()
            return state._replace(sums=map_sums(weights, weigh), weights=weights if summing.hold else None)
        return state._replace(sums=sum_in_pieces(state, weigh, None))


def sum_and_apply(state: AttnState, summing: SumMap) -> tuple[AttnState, Tensor]:
    """The state with the sums of its map, and the map's product with the values, (B, heads, P+N, D)."""
    weigh = None if summing.weigh is None else summing.weigh(state)
    if is_one_piece(state):
        weights = state.softmax_map()
        sums, out = map_sums(weights, weigh), weights.to(state.v.dtype) @ state.v
        return state._replace(sums=sums, weights=weights if summing.hold else None), out
    out = torch.empty_like(state.v, memory_format=torch.contiguous_format)
    return state._replace(sums=sum_in_pieces(state, weigh, out)), out


def unpack_heads(x: Tensor, tokens: TokenMap) -> Tensor:
    """Packed (1, heads, T, D) -> padded (B, heads, P+N, D)."""
    return tokens.unpack(x.transpose(1, 2)).transpose(1, 2)


@fx_leaf
def class_queries(q: Tensor, tokens: TokenMap) -> Tensor:
    """Queries (B, heads, num_class, D) of the class-like tokens in packed queries (1, heads, T, D)."""
    lengths = tokens.sequence_mask().sum(1)
    first = (lengths.cumsum(0) - lengths).unsqueeze(1) + torch.arange(tokens.num_class, device=q.device)
    return take_rows(q.transpose(1, 2), first).transpose(1, 2)


def take_heads(x: Tensor, rows: Tensor) -> Tensor:
    """Sequence rows of x (B, heads, N, D), numbered as in take_rows: (B', heads, K, D)."""
    return take_rows(x.transpose(1, 2), rows).transpose(1, 2)


@fx_leaf
def variable_length_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: TokenMap,
    keys: TokenMap,
    dropout_p: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention inside each image of a packed batch: q (1, heads, Tq, D), k and v (1, heads, Tk, D).

    On a CPU, and in a trace, which knows no nested tensors, one fused call an image; elsewhere one call on jagged
    nested tensors, which dispatch to the variable-length flash or memory-efficient kernels. The lengths are those that
    the maps know, so none is read from the device.

    Args:
        q: Queries of all images, one image after another.
        k: Keys, likewise.
        v: Values, likewise.
        queries: Map of the tokens of the queries.
        keys: Map of those of the keys.
        dropout_p: Attention dropout.
        key_bias: (1, Tk) bias on the logits of each key, None for none.

    Returns:
        (1, heads, Tq, D).
    """
    if graphs_count() and not dropout_p:
        counts = queries.sequence_mask().sum(1), keys.sequence_mask().sum(1)
        operator: Callable[..., Tensor] = torch.ops.effvit.packed_attention  # of effvit.packed_operator
        return operator(q, k, v, *counts, key_bias)
    if q.device.type == "cpu" or torch.jit.is_tracing():
        return attend_one_by_one(q, k, v, queries.sequence_lengths(), keys.sequence_lengths(), dropout_p, key_bias)
    return attend_together(q, k, v, Images.of(queries), Images.of(keys), dropout_p, key_bias)


class Images(NamedTuple):
    """How many tokens each image of a packed batch has, prefix tokens included.

    Attributes:
        counts: (B,) on the device of the tokens.
        lengths: The same as numbers of Python.
    """

    counts: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, tokens: TokenMap) -> Images:
        """Those of a map."""
        return cls(tokens.sequence_mask().sum(1), tokens.sequence_lengths())

    @property
    def offsets(self) -> Tensor:
        """(B+1,) first row of each image in the packed sequence, and its end."""
        return F.pad(self.counts.cumsum(0), (1, 0))


def attend_together(
    q: Tensor, k: Tensor, v: Tensor, queries: Images, keys: Images, dropout_p: float, key_bias: Tensor | None
) -> Tensor:
    """``variable_length_attention`` by one call on jagged nested tensors."""
    if key_bias is None:
        return jagged_attention(q, k, v, queries, keys, dropout_p)
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    q, k, v = bias_as_features(q, k, v, key_bias, scale)
    return jagged_attention(q, k, v, queries, keys, dropout_p, scale)[..., :width]


def attend_one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: list[int],
    k_lengths: list[int],
    dropout_p: float,
    key_bias: Tensor | None,
) -> Tensor:
    """``variable_length_attention`` by one fused call an image, of images of so many tokens."""
    masks: Sequence[Tensor | None]
    masks = [None] * len(k_lengths) if key_bias is None else key_bias[:, None, None].to(q.dtype).split(k_lengths, dim=3)
    images = zip(q.split(q_lengths, dim=2), k.split(k_lengths, dim=2), v.split(k_lengths, dim=2), masks, strict=True)
    outputs = [F.scaled_dot_product_attention(qi, ki, vi, mask, dropout_p) for qi, ki, vi, mask in images]
    return torch.cat(outputs, dim=2)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pair_bias: Tensor | None,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """``biased_attention``, or that without a bias, or with one of pairs (B or 1, heads, Tq, Tk) as the mask."""
    if pair_bias is not None:
        mask = pair_bias if bias is None else pair_bias + bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), dropout_p=dropout_p, scale=scale)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    return biased_attention(q, k, v, bias, dropout_p, scale)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    mask: CausalMask,
    drop: nn.Dropout,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention with a mask on its softmax map, which no fused kernel takes.

    Args:
        q: (B, heads, Q, D).
        k: (B, heads, P+N, D).
        v: (B, heads, P+N, D).
        scale: Factor on q k^T.
        bias: (B, 1, 1, P+N) bias on the logits of each key; None: none.
        mask: The mask.
        drop: Attention dropout.
        rows: (B, Q) rows of the queries in the flattened sequence; None: all tokens in order.

    Returns:
        (B, heads, Q, D).
    """
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, heads, Q, P+N)
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    dropped: Tensor = drop(mask.applied(logits.softmax(dim=-1), rows))
    return dropped.to(v.dtype) @ v


@fx_leaf
def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout_p: float, scale: float | None = None
) -> Tensor:
    """Fused attention of q, k and v (B, heads, N, D) with a bias on the logits of each key, (B, 1, 1, Tk).

    As a mask, or as features of q and k where that lets flash attention run, which takes no mask. ``scale`` is the
    factor on q k^T, None for 1 / sqrt(D).
    """
    if not bias_keeps_from_flash(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout_p, scale=scale)
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = bias_as_features(q, k, v, bias[:, 0, 0], scale)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)[..., :width]


def bias_keeps_from_flash(q: Tensor, k: Tensor) -> bool:
    """Whether flash attention would run but for a mask, on enough keys to pay for features in its place."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or is_exported():
        return False
    available = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return available and k.shape[2] >= FLASH_KEYS and q.shape[-1] + 8 <= FLASH_WIDTH


def bias_as_features(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, heads, N, D + 8) whose products hold the bias, for kernels that take no mask.

    The bias is split into a high and a low part, so that it keeps its precision in bfloat16. Flash attention wants
    equal widths of q, k and v in multiples of 8.

    Args:
        q: (B, heads, Tq, D).
        k: (B, heads, Tk, D).
        v: (B, heads, Tk, D).
        key_bias: (B, Tk); -inf becomes ``LEAST_BIAS``.
        scale: Factor on q k^T.
    """
    bias = widened(key_bias).clamp(min=LEAST_BIAS) / scale  # (B, Tk)
    high = bias.to(k.dtype)
    low = (bias - high).to(k.dtype)
    columns = F.pad(torch.stack([high, low], dim=-1), (0, 6))[:, None].expand(-1, k.shape[1], -1, -1)
    ones = F.pad(torch.ones_like(q[..., :2]), (0, 6))  # (B, heads, Tq, 8)
    return torch.cat([q, ones], dim=-1), torch.cat([k, columns], dim=-1), F.pad(v, (0, 8))


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Images,
    keys: Images,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """Attention inside each image by one call on jagged nested tensors.

    Args:
        q: (1, heads, Tq, D) queries of all images, one image after another.
        k: (1, heads, Tk, D), likewise.
        v: (1, heads, Tk, D), likewise.
        queries: How many queries each image has.
        keys: How many keys.
        dropout_p: Attention dropout.
        scale: Factor on q k^T; None: 1 / sqrt(D).

    Returns:
        (1, heads, Tq, D).
    """

    def jagged(x: Tensor, images: Images) -> Tensor:
        rows = x.squeeze(0).transpose(0, 1).contiguous()  # (T, heads, D)
        least, most = min(images.lengths), max(images.lengths)  # else the kernels would read them from the offsets
        nested = torch.nested.nested_tensor_from_jagged(rows, images.offsets, min_seqlen=least, max_seqlen=most)
        return nested.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        jagged(q, queries), jagged(k, keys), jagged(v, keys), dropout_p=dropout_p, scale=scale
    )
    return out.transpose(1, 2).values().transpose(0, 1).unsqueeze(0)  # (1, heads, Tq, D)


def _rotate_patches(x: Tensor, tokens: TokenMap, rope: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply the rotary table of the full grid by ``turn`` to the patch tokens of x (B, heads, P+N, D)."""
    table = tokens.position_table(rope)
    if tokens.packed:  # prefix tokens lie between the images: give them the identity rotation (sin 0, cos 1)
        sin, cos = torch.zeros_like(table[:, :, :1]).expand(-1, -1, tokens.num_prefix, -1).chunk(2, dim=-1)
        still = torch.cat([sin, cos + 1], dim=-1)  # (B, heads or 1, P, D)
        table = tokens.pack(torch.cat([still, table], dim=2).transpose(1, 2)).transpose(1, 2)
        return turn(x, table)
    prefix, patches = x[:, :, : tokens.num_prefix], x[:, :, tokens.num_prefix :]
    return torch.cat([prefix, turn(patches, table)], dim=2)


class TokenAttention(nn.Module):
    """The forward pass shared by the three attention modules; a subclass supplies ``_project``.

    The one entry point is ``forward``, so that hooks, FSDP wrapping and FLOP attribution of the attention
    module hold for everything it computes.
    """

    # What timm's class brings along.
    num_heads: int
    head_dim: int
    scale: float
    fused_attn: bool
    attn_drop: nn.Dropout
    gate: Layer | None
    q_norm: Layer
    k_norm: Layer
    norm: Layer
    proj: Layer
    proj_drop: Layer
    # Of some of timm's classes alone.
    num_kv_groups: int = 1
    rotate_half: bool = False
    own_scale: float | None = None  # factor on q k^T where it is not 1 / sqrt(D)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, C) -> q, k, v, each (B, heads, N, D)."""
        return (*self._score(x), self._values(x))

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) -> q, k, each (B, heads, N, D), of which scores are made where no values are wanted."""
        raise NotImplementedError

    def _values(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> v (B, heads, N, D)."""
        raise NotImplementedError

    def _pair_table(self, shared: Tensor | None) -> Tensor | None:
        """Bias between the places of the full sequence, given what the blocks share; None in a host without one."""
        return None

    def _causal_mask(self, tokens: TokenMap) -> CausalMask | None:
        """The mask between the tokens; None in a host that is not causal."""
        return None

    def _rotate(self, x: Tensor, tokens: TokenMap, positions: Tensor) -> Tensor:
        """Tokens x (B, heads, P+N, D) turned by the rotary table that the blocks share."""
        return _rotate_patches(x, tokens, positions, self._turn)

    def _turn(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens x (B, heads, N, D) turned by a table of sines and cosines that broadcasts with them, (..., N, 2D)."""
        return apply_rot_embed_cat(x, table, half=self.rotate_half)

    def _split_heads(self, x: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = qkv.reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _apart(self, projection: Layer, x: Tensor) -> Tensor:
        """q, k or v (B, heads, N, D) by a projection of its own; with grouped queries k and v have fewer heads."""
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _part(self, x: Tensor, qkv: Layer, bias: Tensor | None, first: int, parts: int) -> tuple[Tensor, ...]:
        """Some of the three parts (B, heads, N, D) of a layer that gives q, k and v at once.

        Args:
            x: (B, N, C) tokens.
            qkv: The layer.
            bias: (3C,) bias beside that of the layer.
            first: 0 for q, 1 for k, 2 for v.
            parts: How many.
        """
        width = self.num_heads * self.head_dim
        rows = slice(first * width, (first + parts) * width)
        # A layer in place of timm's, such as LoRA's, does more than its weight says.
        if type(qkv) is nn.Linear:
            y = F.linear(x, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])
        else:
            y = qkv(x)[..., rows]
        y = y if bias is None else y + bias[rows]
        return y.unflatten(-1, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        x: Tensor,
        tokens: TokenMap,
        positions: Tensor | None = None,
        pick: Pick | None = None,
        edit_map: MapEdit | None = None,
        beside: Beside[AttnState] | None = None,
        attends: bool = True,
    ) -> Tensor:
        """Self-attention of the tokens, and what a reducer may score them with.

        Args:
            x: (B, P+N, C) normalised tokens, or (1, T, C) packed.
            tokens: Their map; its key bias enters the softmax.
            positions: Rotary table of the full grid, (H*W, D) or (heads, H*W, D); in a host with relative positions the
                bias that its blocks share, (heads, P+H*W, P+H*W), with or without a dimension in front.
            pick: Given, called with the state before attention; only the rows it selects are computed.
            edit_map: Given, the softmax map is materialised, passed through it and kept in the state. A ``SumMap``
                asks for sums of the map alone: it is formed in pieces, or beside the fused kernel where autograd
                would keep it. A ``PoolMap`` gives the map of fewer tokens, of which the values are computed.
            beside: Takes the AttnState.
            attends: False for the state alone, of a block whose output nobody needs.

        Returns:
            (B, P+K, C) output of the selected rows; x itself where nothing attends.
        """
        pools = isinstance(edit_map, PoolMap)
        gate = self.gate(x).sigmoid() if self.gate is not None and attends and not pools else None
        if pools or not attends:
            q, k = self._score(x)
            v = k[..., :0]
        else:
            q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        pair_table = self._pair_table(positions)
        if positions is not None and pair_table is None:
            q, k = (self._rotate(y, tokens, positions).type_as(v) for y in (q, k))
        if self.num_kv_groups > 1:
            k, v = (y.repeat_interleave(self.num_kv_groups, dim=1) for y in (k, v))

        state = AttnState.of(q, k, v, self.scale, tokens, x, pair_table, self._causal_mask(tokens))
        if not attends:
            if beside is not None:
                beside.value = state
            return x
        bias = state.bias
        if pick is not None:
            rows, selected = pick(state)
            # Made anew, since what ``_replace`` gives comes out empty of a graph that dynamo breaks in this branch.
            pairs, mask = state.pairs, state.mask
            state = AttnState(q, k, v, self.scale, selected, tokens, bias, x, rows, pairs=pairs, mask=mask)
            q = take_heads(q, rows)
            gate = take_rows(gate, rows) if gate is not None else None
        if isinstance(edit_map, SumMap) and (has_gradient(q) or (self.training and self.attn_drop.p > 0)):
            state = sum_beside(state, edit_map)
            edit_map = None
        if isinstance(edit_map, PoolMap):
            y, pooled, weights = edit_map.pool(state)
            assert weights is not None
            state = state._replace(tokens=pooled)
            gate = self.gate(y).sigmoid() if self.gate is not None else None
            v = self._values(y).repeat_interleave(self.num_kv_groups, dim=1)
            out = self.attn_drop(weights.to(v.dtype)) @ v
        elif tokens.policy is not None:
            weights = policy_softmax(state._replace(mask=None).softmax_map(), tokens.policy)
            weights = weights if state.mask is None else state.mask.applied(weights)
            state = state._replace(weights=weights)
            out = self.attn_drop(weights.to(v.dtype)) @ v
        elif isinstance(edit_map, SumMap):
            state, out = sum_and_apply(state, edit_map)
        elif edit_map is not None:
            weights = edit_map(state.softmax_map())
            state = state._replace(weights=weights)
            dropped: Tensor = self.attn_drop(weights.to(v.dtype))
            out = dropped @ v
        elif state.tokens.packed:
            if not tokens.packed:
                k, v = (tokens.pack(y.transpose(1, 2)).transpose(1, 2) for y in (k, v))
            dropout_p = self.attn_drop.p if self.training else 0.0
            # (1, T): without the padding, a bias says something only where keys have weights.
            of_keys = tokens.pack(bias[:, 0, 0]) if bias is not None and tokens.key_weight is not None else None
            q = q if self.own_scale is None else q * (self.own_scale * q.shape[-1] ** 0.5)  # kernels take no scale
            out = variable_length_attention(q, k, v, state.tokens, tokens, dropout_p, of_keys)
        elif state.mask is not None:
            out = masked_attention(q, k, v, self.scale, bias, state.mask, self.attn_drop, state.rows)
        elif self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = fused_attention(q, k, v, bias, state.pair_bias(), dropout_p, self.own_scale)
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)  # (B, heads, Nq, P+N)
            pair_bias = state.pair_bias()
            if pair_bias is not None:
                logits = logits + pair_bias
            if bias is not None:
                logits = logits + bias.to(logits.dtype)
            dropped = self.attn_drop(logits.softmax(dim=-1))
            out = dropped @ v

        out = self.norm(out.transpose(1, 2).flatten(2))  # (B, P+K, heads * D)
        if gate is not None:
            out = out * gate
        if beside is not None:
            beside.value = state
        return self.proj_drop(self.proj(out))


class PlainTokenAttention(TokenAttention, Attention):
    """timm's ``Attention`` (ViT, DeiT, DINOv2, SigLIP ...) for token maps."""

    qkv: Layer

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._split_heads(x, self.qkv(x))

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self._part(x, self.qkv, None, 0, 2)
        return q, k

    def _values(self, x: Tensor) -> Tensor:
        return self._part(x, self.qkv, None, 2, 1)[0]


class RopeTokenAttention(TokenAttention, AttentionRope):
    """timm's ``AttentionRope`` (PE, rope ViTs, grouped-query attention) for token maps."""

    qkv: Layer | None
    q_proj: Layer
    k_proj: Layer
    v_proj: Layer

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return TokenAttention._project(self, x) if self.qkv is None else self._split_heads(x, self.qkv(x))

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.qkv is None:
            return self._apart(self.q_proj, x), self._apart(self.k_proj, x)
        q, k = self._part(x, self.qkv, None, 0, 2)
        return q, k

    def _values(self, x: Tensor) -> Tensor:
        return self._apart(self.v_proj, x) if self.qkv is None else self._part(x, self.qkv, None, 2, 1)[0]


class EvaTokenAttention(TokenAttention, EvaAttention):
    """timm's ``EvaAttention`` (EVA, EVA02, DINOv3: no key bias) for token maps."""

    qkv: Layer | None
    q_proj: Layer
    k_proj: Layer
    v_proj: Layer
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    qkv_bias_separate: bool

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            return TokenAttention._project(self, x)  # of BEiT's attention too, which has this method
        bias = self._bias()
        if bias is None:
            return self._split_heads(x, self.qkv(x))
        # A layer in place of timm's, such as LoRA's, does more than its weight says: timm would leave that out.
        if self.qkv_bias_separate or type(self.qkv) is not nn.Linear:
            return self._split_heads(x, self.qkv(x) + bias)
        return self._split_heads(x, F.linear(x, self.qkv.weight, bias))

    def _bias(self) -> Tensor | None:
        """(3C,) bias of the joint projection, of which timm keeps the parts; None without one."""
        return None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.qkv is None:
            return self._apart(self.q_proj, x), self._apart(self.k_proj, x)
        q, k = self._part(x, self.qkv, self._bias(), 0, 2)
        return q, k

    def _values(self, x: Tensor) -> Tensor:
        return self._apart(self.v_proj, x) if self.qkv is None else self._part(x, self.qkv, self._bias(), 2, 1)[0]


ATTENTION_CLASSES: dict[type[nn.Module], type[TokenAttention]] = {
    Attention: PlainTokenAttention,
    AttentionRope: RopeTokenAttention,
    EvaAttention: EvaTokenAttention,
}
