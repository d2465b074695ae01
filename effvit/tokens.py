"""TokenMap: the one value that says which patch of the image is where in a shortened token sequence.

Every reduction - pruning, merging, fusing - is one composition, ``source' = target[source]``, so indices
always refer to the full patch grid, dense recovery is one gather and a picture of the tokens is one lookup.
Class scores need none of that, so a reduction only leaves its step, and ``Trail`` composes when somebody asks.

The functions here are the only index arithmetic of the package. They gather and scatter whole rows of the
flattened ``(B * N, C)`` sequence: on a CPU that is four to nine times faster than ``gather`` with an expanded
index, and it exports to ONNX with a dynamic batch. ``torch.fx`` keeps each of them as one node.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from effvit.recording import count_in_graph, graphs_count, is_recorded

__all__ = [
    "Compact",
    "Fused",
    "History",
    "Kept",
    "Layout",
    "Memory",
    "Moved",
    "Ranges",
    "Reference",
    "Step",
    "TokenMap",
    "Trail",
    "autocast_enabled",
    "compact",
    "fix_traced_size",
    "flat_rows",
    "fx_leaf",
    "packed_rows",
    "ranges_of",
    "rows_in_sequence",
    "scattered_places",
    "take_rows",
    "trimmed",
    "true_places",
    "wide_dtype",
    "wide_product",
    "widened",
    "without_autocast",
]

LEAST_POLICY = 1e-6  # of a token that is dropped, where its logarithm must be finite
LEAST_SLOTS = 4  # of an image in a graph that reads counts: its compiler must know that half of them are no single one

P = ParamSpec("P")
R = TypeVar("R")


def fx_leaf(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``torch.fx`` record a function as one node, so that it may branch on shapes, dtypes and values.

    ``torch.fx.wrap`` does so only where the calling module's globals are patched, which misses methods that a
    subclass in another module calls.
    """

    @wraps(function)
    def leaf(*args: P.args, **kwargs: P.kwargs) -> R:
        for argument in args:
            if type(argument) is Tensor:  # as nearly all are, at every call
                continue
            placeholder = argument.trail.patches if isinstance(argument, TokenMap) else argument
            if isinstance(placeholder, Proxy):
                return placeholder.tracer.create_proxy("call_function", leaf, args, kwargs)
        return function(*args, **kwargs)

    return leaf


@fx_leaf
def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype scores, softmax and token sizes are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@fx_leaf
def widened(x: Tensor) -> Tensor:
    """x in its ``wide_dtype``."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; the meta device has none."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context in which products keep the dtype of their factors: for distances, which bf16 products would blur."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


@fx_leaf
def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64), whatever their dtype and under autocast too: for what decides.

    Casting the factors is not enough: inside autocast the product itself casts them back.
    """
    a = widened(a)
    with without_autocast(a):
        return a @ b.to(a.dtype)


@fx_leaf
def fix_traced_size(x: Tensor, *dims: int) -> Tensor:
    """x itself; under ``torch.jit.trace`` a view that later inputs of other sizes along ``dims`` do not fit into.

    A trace records the branch that its example takes, such as whether a map is padded. Where branches depend on a
    size, a traced model must refuse any other instead of computing something else.
    """
    if not torch.jit.is_tracing():
        return x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # it warns of constants, which are meant here
        return x.expand([int(side) if dim in dims else -1 for dim, side in enumerate(x.shape)])


class Ranges(NamedTuple):
    """Numbers that every block makes rows of, counted once for a batch.

    Attributes:
        images: (B, 1) numbers of the images.
        sequence: (B, L) numbers of the places in a sequence.
        prefix: (B, P) numbers of the prefix tokens where patches count from 0: -P to -1.
    """

    images: Tensor
    sequence: Tensor
    prefix: Tensor

    def first(self, length: int, offset: int) -> Tensor:
        """(B, 1) row of place ``offset`` of each image in the flattened ``(B * length, C)`` sequence."""
        return torch.add(self.sequence[:, offset : offset + 1], self.images, alpha=length)

    def behind_prefix(self, *index: Tensor) -> Tensor:
        """The P prefix tokens in front of patch tokens ``index``, each (B, K)."""
        if self.prefix.shape[1] == 0 and len(index) == 1:
            return index[0]
        return torch.cat([self.prefix, *index], dim=1)


@fx_leaf
def ranges_of(x: Tensor, length: int, num_prefix: int) -> Ranges:
    """Ranges for x (B, ...) and sequences of ``length`` places, the first ``num_prefix`` for prefix tokens."""
    images = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    prefix = images[:, :0]
    if num_prefix:
        prefix = torch.arange(-num_prefix, 0, device=x.device).expand(x.shape[0], -1)
    return Ranges(images, torch.arange(length, device=x.device).expand(x.shape[0], -1), prefix)


@fx_leaf
def flat_rows(index: Tensor, length: int, offset: int = 0, ranges: Ranges | None = None) -> Tensor:
    """Row numbers in the flattened ``(B * length, C)`` sequence of the tokens ``index + offset``.

    Args:
        index: (B, K) token positions of each image.
        length: Tokens an image has in the sequence to gather from.
        offset: Tokens in front of position 0, which are put in front of the result too.
        ranges: Those of the batch, for ``length`` places at least and as many prefix tokens; None: made here.

    Returns:
        (B, offset + K) int64.
    """
    ranges = ranges_of(index, offset + 1, offset) if ranges is None else ranges
    return ranges.behind_prefix(index) + ranges.first(length, offset)


@fx_leaf
def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x.flatten(0, 1)``: x (B, N, C), rows (B', K) -> (B', K, C); likewise without the C."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, *x.shape[2:])


@fx_leaf
def position_of(index: Tensor, like: Tensor, valid: Tensor | None = None) -> Tensor:
    """Inverse of a selection: index (B, K) -> (B, N) as ``like``, the place in ``index`` or -1 where absent."""
    rank = torch.arange(index.shape[1], device=index.device).expand_as(index)
    if valid is not None:
        rank = rank.masked_fill(~valid, -1)
    return torch.full_like(like, -1).scatter(1, index, rank)


@fx_leaf
def true_places(mask: Tensor, number: int) -> Tensor:
    """Places (number,) of the True entries of the flattened mask, in order, for who knows how many there are.

    As ``mask.flatten().nonzero()``, which reads their number from the device.
    """
    mask = mask.flatten()
    if mask.device.type == "cpu":
        return torch.nonzero_static(mask, size=number).squeeze(1)
    return scattered_places(mask, number)


def scattered_places(mask: Tensor, number: int) -> Tensor:
    """``true_places`` of a mask (N,) by operators that every device has, none of which reads."""
    rank = mask.cumsum(0) * mask  # 1 for the first that is True, 0 for what is False
    places = rank.new_empty(number + 1)
    return places.scatter_(0, rank, torch.arange(len(mask), device=mask.device))[1:]


class Compact(NamedTuple):
    """The kept tokens of each image in front.

    Attributes:
        order: (B, width) tokens in their new order.
        valid: (B, width) True for slots that hold one; None if all do.
        lengths: Kept tokens of each image, if they were read from the device.
    """

    order: Tensor
    valid: Tensor | None
    lengths: tuple[int, ...] | None


@fx_leaf
def compact(
    order: Tensor, kept: Tensor, width: int, trim: bool, keep_mask: bool = False, packed: bool = False
) -> Compact:
    """The kept tokens of each image in front, for a method whose number of tokens depends on the image.

    The numbers are read from the device once, to trim or to pack, unless ``kept`` is recorded. A graph compiled by
    ``effvit.compile`` reads the largest of them, to trim.

    Args:
        order: (B, N) tokens of each image in their new order.
        kept: (B, N) True where the token in ``order`` stays.
        width: Slots of each image, at least the largest number of kept tokens.
        trim: Cut to the largest number kept in the batch, unless ``kept`` is recorded.
        keep_mask: Return the mask even if no slot is empty.
        packed: The tokens are to be packed, which needs the mask, and the numbers.
    """
    number = order.shape[1]
    place = torch.arange(number, device=order.device)
    place = torch.where(kept, place, place + number).sort(dim=1).values % number
    return trimmed(order.gather(1, place), kept.sum(1), width, trim, keep_mask, packed)


@fx_leaf
def trimmed(
    order: Tensor,
    counts: Tensor,
    width: int,
    trim: bool,
    keep_mask: bool = False,
    packed: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> Compact:
    """``compact`` where the kept tokens are in front already: (B,) ``counts`` of those in ``order`` (B, N).

    ``lengths`` are the counts as numbers of Python, for who knows them; None: read where they are needed.
    """
    number = order.shape[1]
    if (trim or packed) and graphs_count():
        least = min(LEAST_SLOTS, number)
        width = count_in_graph(counts.amax().clamp(min=least), least, number)
    else:
        width = min(width, number)
        if lengths is None and (trim or packed) and not is_recorded(counts):
            lengths = tuple(counts.tolist())  # the one read of a block
        if trim and lengths is not None:
            width = min(width, max(lengths))
    order = order[:, :width]
    if lengths is not None and min(lengths) == width and not (keep_mask or packed):
        return Compact(order, None, lengths)
    return Compact(order, torch.arange(width, device=order.device) < counts.unsqueeze(1), lengths)


@fx_leaf
def _rotary_rows(table: Tensor, anchor: Tensor) -> Tensor:
    if table.ndim == 4:
        index = anchor[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.gather(2, index)  # (B, heads or 1, N, D)
    heads_last = table.unsqueeze(1) if table.ndim == 2 else table.transpose(0, 1)  # (H*W, heads or 1, D)
    return heads_last[anchor].transpose(1, 2)  # (B, heads or 1, N, D)


@fx_leaf
def _all_valid(images: Tensor, length: int) -> Tensor:
    return torch.ones(1, 1, dtype=torch.bool, device=images.device).expand(images.shape[0], length)


@fx_leaf
def _pack(x: Tensor, tokens: TokenMap) -> Tensor:
    return take_rows(x, _rows_in_use(tokens).unsqueeze(0))  # (1, T, C)


@fx_leaf
def _unpack(x: Tensor, mask: Tensor) -> Tensor:
    padded = x.new_zeros((mask.numel(), *x.shape[2:]))
    rows = true_places(mask, x.shape[1])  # (T,)
    return padded.index_copy(0, rows, x.squeeze(0)).unflatten(0, mask.shape)  # (B, P+N, C)


def _rows_in_use(tokens: TokenMap) -> Tensor:
    """(T,) rows of the flattened padded sequence that hold a token."""
    mask = tokens.sequence_mask()
    if not graphs_count():
        return true_places(mask, sum(tokens.sequence_lengths()))
    known = tokens.trail.composed
    if "rows" not in known:  # once for a map: a compiler does not know that a size read again is the same
        every = tokens.valid is None
        number = mask.numel() if every else count_in_graph(mask.sum(), 2, mask.numel())
        known["rows"] = scattered_places(mask.flatten(), number)
    return known["rows"]


class Reference(NamedTuple):
    """Features in which all patches can be compared with the tokens left: those from before the first reduction.

    Attributes:
        patches: (B, H*W, C) features of the full grid.
        centres: (B, N, C) features of the tokens where they stand for soft clusters, so that every patch is a
            mixture of several; None: each patch is carried by one token at most, which is as its anchor was.
        temperature: Factor on the squared distance.
        k: Tokens a patch is reconstructed from; None means 20, or all where there are fewer.
        norm: "l2", "l1" or "official", see ``effvit.recover.reconstruct_tokens``.
    """

    patches: Tensor
    centres: Tensor | None = None
    temperature: float = 5e-3
    k: int | None = None
    norm: str = "l2"


class Memory(NamedTuple):
    """The last feature every patch had while a token stood for it, left in the sequences it was part of.

    Remembering a sequence keeps it and costs index arithmetic, no copy of features; ``features`` reads them all. Until
    then none is freed, which gradients would not let happen either.

    Attributes:
        sequences: Sequences (B, P+N, C), or (1, T, C) packed, in which some patch was carried last.
        rows: (B, H*W) row of each patch in all of them, flattened and one after another.
    """

    sequences: tuple[Tensor, ...]
    rows: Tensor

    def features(self) -> Tensor:
        """(B, H*W, C) feature of every patch."""
        return take_rows(torch.cat([x.flatten(0, 1) for x in self.sequences]).unsqueeze(0), self.rows)


class Layout(NamedTuple):
    """What all maps of one batch share.

    Attributes:
        grid: (H, W) patch grid.
        num_prefix: P, prefix tokens in front.
        num_class: Of these, the class-like tokens: 1 class, 2 with a distillation token, 0 without either.
        ranges: Numbers of the images, of the P + H*W places in the full sequence and of the prefix tokens.
        own: Patches of each image, where each has a grid of its own in the upper left corner of this one. None: all.
    """

    grid: tuple[int, int]
    num_prefix: int
    num_class: int
    ranges: Ranges
    own: tuple[int, ...] | None = None


class Step(Protocol):
    """What one reduction did with the tokens of a map, as the indices that it has at hand anyway."""

    @property
    def order(self) -> Tensor:
        """(B, K) old token whose position each new one keeps."""

    @property
    def fuses(self) -> bool:
        """Whether the last new token sums up patches that it does not stand for one by one."""

    def target(self, like: Tensor) -> Tensor:
        """Old token -> new token, -1 for one that is dropped: (B, N) as ``like``."""


class Moved(NamedTuple):
    """A step whose targets are known: (B, N), and (B, K) in ``order``."""

    targets: Tensor
    order: Tensor
    fuses: bool = False

    def target(self, like: Tensor) -> Tensor:
        return self.targets


class Kept(NamedTuple):
    """Only the tokens in ``order`` (B, K) stayed, where ``valid`` (B, K) is not False."""

    order: Tensor
    valid: Tensor | None = None
    fuses: bool = False

    def target(self, like: Tensor) -> Tensor:
        return position_of(self.order, like, self.valid)


class Fused(NamedTuple):
    """All tokens that are not in front of one place in ``order`` (B, K) were fused into the token there.

    The place is (B, 1) in each image, behind which there is padding; None: the last.
    """

    order: Tensor
    place: Tensor | None = None
    fuses: bool = True

    def target(self, like: Tensor) -> Tensor:
        if self.place is None:
            target = position_of(self.order, like)
            return torch.where(target < 0, self.order.shape[1] - 1, target)
        target = position_of(self.order, like, self.marked() | (self.rank() < self.place))
        return torch.where(target < 0, self.place, target)

    def rank(self) -> Tensor:
        """(K,) places."""
        return torch.arange(self.order.shape[1], device=self.order.device)

    def marked(self) -> Tensor:
        """(B, K) or (K,) True for the fused token."""
        return self.rank() == (self.order.shape[1] - 1 if self.place is None else self.place)


@dataclass(eq=False)
class Trail:
    """Which token carries each patch, and which patch each token sits on: composed when they are asked for, once.

    Attributes:
        patches: (B, H*W) numbers of the patches.
        former: The trail before the last step; None where the tokens are the patches of the full grid.
        step: The last step.
        composed: What was asked for so far, and the rows in use where a graph counts. (``cached_property`` locks
            in Python 3.11, which torch.compile refuses.)
    """

    patches: Tensor
    former: Trail | None = None
    step: Step | None = None
    composed: dict[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Slots that an image has in the sequence, beside its prefix tokens."""
        return (self.patches if self.step is None else self.step.order).shape[1]

    @property
    def source(self) -> Tensor:
        """(B, H*W) patch -> the token that carries it, -1 once it is dropped."""
        if self.former is None or self.step is None:
            return self.patches
        if "source" not in self.composed:
            target = self.step.target(self.patches[:, :1].expand(-1, self.former.width))
            former = self.former.source
            self.composed["source"] = torch.where(former < 0, former, target.gather(1, former.clamp(min=0)))
        return self.composed["source"]

    @property
    def anchor(self) -> Tensor:
        """(B, N) token -> the patch whose position it keeps."""
        if self.former is None or self.step is None:
            return self.patches
        if "anchor" not in self.composed:
            self.composed["anchor"] = self.former.anchor.gather(1, self.step.order)
        return self.composed["anchor"]

    @property
    def fused(self) -> Tensor | None:
        """(B, N) True for a token that sums up patches it does not stand for one by one; None: no token does."""
        if self.former is None or self.step is None:
            return None
        former = self.former.fused
        if not self.step.fuses and former is None:
            return None
        if "fused" not in self.composed:
            if former is None:
                former = torch.zeros_like(self.patches[:, :1], dtype=torch.bool).expand(-1, self.former.width)
            fused = former.gather(1, self.step.order)
            if isinstance(self.step, Fused) and self.step.place is not None:
                fused = fused | self.step.marked()
            elif self.step.fuses:
                fused = torch.cat([fused[:, :-1], torch.ones_like(fused[:, :1])], dim=1)
            self.composed["fused"] = fused
        return self.composed["fused"]


class History(NamedTuple):
    """What a map keeps of the blocks before, each for a reader that may ask for it.

    Attributes:
        memory: Last feature every patch had while it was carried, for dense recovery.
        reference: Features that patches are reconstructed from, for the fill "reconstruct".
        present: (B, K) patches that entered the first block, where patch dropout left the others out. None: all.
    """

    memory: Memory | None = None
    reference: Reference | None = None
    present: Tensor | None = None


NO_HISTORY = History()


@dataclass(frozen=True)
class TokenMap:
    """Where every patch of a batch of images is in the current token sequence.

    A sequence is ``num_prefix`` prefix tokens (class, distillation, register; never reduced) followed by N
    patch tokens. The law every method keeps: ``source[b, anchor[b, i]] == i`` for every (valid) token i.

    Attributes:
        trail: Which token carries each patch; ``source``, ``anchor``, ``fused`` and ``width`` read it.
        layout: Patch grid and prefix tokens; ``grid``, ``num_prefix`` and ``num_class`` read it.
        num_tokens: N; the largest possible N for a method whose count depends on the image.
        moved: False while the tokens still are the full grid in image order.
        complete: Every patch is carried by a token that stands for it: none was dropped or fused.
        size: (B, P+N) patches a merged token stands for: its weight in a mean; 1 for prefix tokens. None: one each.
        key_weight: (B, P+N) factor on the attention a token receives as a key; 1 for prefix tokens. None: one each.
        valid: (B, N) False for the padding of an image with fewer tokens than its neighbours. None: all valid.
        lengths: Patch tokens of each image as numbers of Python, where ``valid`` comes from reading them. None: unread.
        history: What is kept of the blocks before; ``memory``, ``reference`` and ``present`` read it.
        carry: What a method hands from block to block (GTP: its graph).
        policy: (B, P+N) 1 for a token that stays and 0 for one that a method which learns has dropped, while it trains
            and no token leaves: attention multiplies it in (``attention.policy_softmax``). None: every token stays.
        packed: The sequence is one row (1, T, C) of all valid tokens of all images, without padding.
        cells: (h, w) where the tokens, in order of rows, are a smaller grid of their own. None: they are none, or all.
    """

    trail: Trail
    layout: Layout
    num_tokens: int
    moved: bool = False
    complete: bool = True
    size: Tensor | None = None
    key_weight: Tensor | None = None
    valid: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    history: History = NO_HISTORY
    carry: Tensor | tuple[Tensor, ...] | None = None
    policy: Tensor | None = None
    packed: bool = False
    cells: tuple[int, int] | None = None

    @classmethod
    def full(cls, x: Tensor, grid: tuple[int, int], num_prefix: int, num_class: int) -> TokenMap:
        """The map of an unreduced sequence x (B, P + H*W, C)."""
        number = grid[0] * grid[1]
        ranges = ranges_of(x, num_prefix + number, num_prefix)
        patches = ranges.sequence[:, :number]  # (B, H*W)
        return cls(Trail(patches), Layout(grid, num_prefix, num_class, ranges), num_tokens=number)

    @property
    def source(self) -> Tensor:
        """(B, H*W) patch -> the token that carries it now, -1 once it is dropped."""
        return self.trail.source

    @property
    def anchor(self) -> Tensor:
        """(B, N) token -> the one patch whose position it keeps (RoPE, pictures)."""
        return self.trail.anchor

    @property
    def fused(self) -> Tensor | None:
        """(B, N) True for a token that sums up patches it does not stand for one by one (EViT's). None: no."""
        return self.trail.fused

    @property
    def width(self) -> int:
        """Slots that an image has beside its prefix tokens: N, where packed that of the image with most tokens."""
        return self.trail.width

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) patch grid."""
        return self.layout.grid

    @property
    def num_prefix(self) -> int:
        """P, prefix tokens in front."""
        return self.layout.num_prefix

    @property
    def num_class(self) -> int:
        """Class-like tokens among the prefix tokens."""
        return self.layout.num_class

    @property
    def memory(self) -> Memory | None:
        """Last feature every patch had while it was carried, if it was remembered."""
        return self.history.memory

    @property
    def reference(self) -> Reference | None:
        """Features that patches are reconstructed from, if they were kept."""
        return self.history.reference

    @property
    def present(self) -> Tensor | None:
        """(B, K) patches that entered the first block; None: all."""
        return self.history.present

    def relabel(
        self,
        step: Step,
        num_tokens: int,
        size: Tensor | None = None,
        key_weight: Tensor | None = None,
        valid: Tensor | None = None,
        packed: bool = False,
        keeps_every_patch: bool = False,
        anchor: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> TokenMap:
        """The map after a step: after token i of this one went into token ``step.target(...)[:, i]`` of a new sequence.

        Args:
            step: Where the tokens went.
            num_tokens: Tokens of the new sequence, or the largest possible number of them.
            size: New sizes (B, P+num_tokens).
            key_weight: New key weights, likewise.
            valid: New padding mask (B, num_tokens).
            packed: Whether the new sequence is packed.
            keeps_every_patch: Whether every token went into one that stands for all its patches.
            anchor: (B, num_tokens) patches whose positions the new tokens keep, for a caller that has them.
            lengths: Patch tokens of each image, if they were read.

        Raises:
            ValueError: The tokens stand for soft clusters, which cannot be followed through another reduction.
        """
        if self.soft:
            raise ValueError(
                "tokens that stand for soft clusters cannot be reduced again, since a patch is a mixture of several; "
                "restore the full grid first (effvit.recover.restore)"
            )
        return TokenMap(
            Trail(self.trail.patches, self.trail, step, {} if anchor is None else {"anchor": anchor}),
            self.layout,
            num_tokens,
            moved=True,
            complete=self.complete and keeps_every_patch,
            size=size,
            key_weight=key_weight,
            valid=valid,
            lengths=lengths,
            history=self.history,
            carry=self.carry,
            packed=packed,
        )

    def rows(self, index: Tensor) -> Tensor:
        """Rows (B, P+K) of the prefix tokens and the tokens ``index`` (B, K) in the flattened padded sequence."""
        return flat_rows(index, self.num_prefix + self.width, self.num_prefix, self.layout.ranges)

    def keep(
        self,
        index: Tensor,
        num_tokens: int,
        valid: Tensor | None = None,
        packed: bool = False,
        rows: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> TokenMap:
        """The map after only some tokens were kept.

        Args:
            index: (B, num_tokens) tokens to keep, in their new order.
            num_tokens: Tokens of the new sequence, or the largest possible number of them.
            valid: (B, num_tokens) False where the new sequence has only padding.
            packed: Whether the new sequence is packed.
            rows: ``self.rows(index)``, for a caller that has them.
            lengths: Tokens that each image keeps, if they were read.
        """
        size, key_weight = self.size, self.key_weight
        if size is not None or key_weight is not None:
            rows = self.rows(index) if rows is None else rows
            size = None if size is None else take_rows(size, rows)
            key_weight = None if key_weight is None else take_rows(key_weight, rows)
        return self.relabel(Kept(index, valid), num_tokens, size, key_weight, valid, packed, lengths=lengths)

    def select(self, x: Tensor, index: Tensor, num_tokens: int) -> tuple[Tensor, TokenMap]:
        """Keep the prefix tokens and some patch tokens of x (B, P+N, C).

        Args:
            x: The tokens of this map.
            index: (B, num_tokens) patch tokens to keep, in their new order.
            num_tokens: How many.

        Returns:
            (B, P+num_tokens, C) and their map.
        """
        rows = self.rows(index)
        return take_rows(x, rows), self.keep(index, num_tokens, rows=rows)

    def fuse(self, ranked: Tensor, kept: int) -> TokenMap:
        """The map after ``ranked[:, :kept]`` were kept and all other tokens fused into one more, the last.

        The fused token keeps the position of its first member, ``ranked[:, kept]``; ranked is (B, kept + 1).
        """
        return self.relabel(Fused(ranked), kept + 1)

    @property
    def num_patches(self) -> int:
        """Patches of the whole image, H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def soft(self) -> bool:
        """Whether the tokens stand for soft clusters, so that every patch is a mixture of several."""
        return self.reference is not None and self.reference.centres is not None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, P+N, C) -> prefix tokens (B, P, C) and patch tokens (B, N, C)."""
        return x[:, : self.num_prefix], x[:, self.num_prefix :]

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, P+N) bias on attention logits: log of the key weights, -inf for padding. None: no key has one.

        It is in float32 (float64 for float64) for tokens of ``dtype``, and broadcast over heads and queries, so the
        fused kernels take it and no N x N mask is made.
        """
        bias = None
        if self.key_weight is not None:
            bias = self.key_weight.to(wide_dtype(dtype)).log()
        if self.valid is not None:
            mask = self.sequence_mask()
            bias = mask.to(wide_dtype(dtype)).log() if bias is None else bias.masked_fill(~mask, float("-inf"))
        return None if bias is None else bias[:, None, None]

    def sizes(self, x: Tensor) -> Tensor:
        """(B, P+N) patches that each of the tokens x (B, P+N, C) stands for, in float32 or wider."""
        return torch.ones_like(x[..., 0], dtype=wide_dtype(x.dtype)) if self.size is None else self.size

    def pool_weight(self) -> Tensor | None:
        """(B, P+N) weight of each token where attention pools: its size, nearly 0 if a policy drops it. None: one each.

        A policy takes no gradient from it, which its logarithm has none to give of where it is 0.
        """
        if self.policy is None:
            return self.size
        weight = self.policy.detach().clamp(min=LEAST_POLICY)
        return weight if self.size is None else weight * self.size

    def position_table(self, table: Tensor) -> Tensor:
        """A rotary table for the current tokens.

        Args:
            table: (H*W, D), or (heads, H*W, D) for one block of a "mixed" table; (B, heads or 1, H*W, D) where images
                have grids of their own.

        Returns:
            The table itself while nothing moved, else (B, 1, N, D) or (B, heads, N, D).
        """
        return _rotary_rows(table, self.anchor) if self.moved else table

    def carriers(self) -> Tensor:
        """(B, K) token that carries each of the K patches that entered the first block, in their order there."""
        return self.source if self.present is None else self.source.gather(1, self.present)

    def sequence_mask(self) -> Tensor:
        """(B, P+N) True where a padded sequence holds a token."""
        if self.valid is None:
            return _all_valid(self.layout.ranges.images, self.num_prefix + self.width)
        if graphs_count():  # of a bool that is padded and then summed, inductor (torch 2.11) makes C++ that is invalid
            return F.pad(self.valid.long(), (self.num_prefix, 0), value=1) > 0
        return F.pad(self.valid, (self.num_prefix, 0), value=True)

    def pack(self, x: Tensor) -> Tensor:
        """Padded (B, P+N, ...) -> (1, T, ...) of the valid tokens of all images, one image after another."""
        return _pack(x, self)

    def unpack(self, x: Tensor) -> Tensor:
        """Packed (1, T, ...) -> padded (B, P+N, ...), zeros in the padding."""
        return _unpack(x, self.sequence_mask())

    def recall(self, x: Tensor) -> Memory:
        """The last feature every patch had while a token stood for it: in x, if one still does.

        Args:
            x: (B, P+N, C) tokens of this map; (1, T, C) packed.
        """
        rows = rows_in_sequence(self, self.rows(self.source.clamp(min=0)))[0][:, self.num_prefix :]  # (B, H*W)
        if self.complete or self.memory is None:
            return Memory((x,), rows)
        former = self.memory.sequences
        rows = rows + sum(sequence.shape[0] * sequence.shape[1] for sequence in former)
        return Memory((*former, x), torch.where(self.on_its_own(), rows, self.memory.rows))

    def remember(self, x: Tensor) -> TokenMap:
        """The map that remembers what ``recall`` gives, for when its tokens are gone."""
        return replace(self, history=self.history._replace(memory=self.recall(x)))

    def refer(self, x: Tensor) -> TokenMap:
        """The map that keeps the patches of the full grid in x (B, P + H*W, C) to be compared with later."""
        reference = Reference(x[:, self.num_prefix :])
        return replace(self, history=self.history._replace(reference=reference))

    def on_its_own(self) -> Tensor:
        """(B, H*W) True for a patch that is carried by a token which stands for it (not dropped, not fused)."""
        carried = self.source >= 0
        if self.fused is None:
            return carried
        return carried & ~self.fused.gather(1, self.source.clamp(min=0))

    def counts(self) -> Tensor:
        """(B,) number of patch tokens of every image."""
        if self.valid is not None:
            return self.valid.sum(1)
        return torch.full_like(self.layout.ranges.images[:, 0], self.width)

    def sequence_lengths(self) -> list[int]:
        """Tokens of each image, prefix tokens included; read from the device only where nobody has read them."""
        lengths = self.lengths
        if lengths is None and self.valid is not None:
            lengths = tuple(self.counts().tolist())
        if lengths is None:
            lengths = (self.width,) * self.layout.ranges.images.shape[0]
        return [self.num_prefix + length for length in lengths]

    def labels(self) -> Tensor:
        """(B, H, W) token that carries each patch, -1 where it was dropped: what a picture is drawn from."""
        return self.source.unflatten(1, self.grid)


@fx_leaf
def rows_in_sequence(tokens: TokenMap, *rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of the flattened padded sequence, of any shape, as rows of the sequence as it is: packed or not."""
    if not tokens.packed:
        return rows
    place = tokens.sequence_mask().flatten().cumsum(0) - 1  # (B * (P+N),)
    return tuple(place[each] for each in rows)


@fx_leaf
def packed_rows(tokens: TokenMap, index: Tensor, left: TokenMap) -> Tensor:
    """Rows (1, T) of the input sequence, padded or packed, that hold the tokens ``index`` of all images."""
    return left.pack(rows_in_sequence(tokens, tokens.rows(index))[0])
