"""Hosts with windows, once: what a method does to a batch of small grids, in every network that attends inside windows.

What lies between the windows of such a network needs the full map, so no token leaves for good. A method that has one
of the two forms of ``effvit.reducers.grids`` fits:

- Groups (ToMe): as many tokens of each window share one, merged before attention and given back behind it, and so are
  the same ones around the MLP, as in token merging for Stable Diffusion (2303.17604). Tokens are compared as they enter
  attention: its keys are not there yet. Position biases are those of the tokens that groups keep the place of.
- Smaller grids (Expedite, CubistMerge): the windows become smaller grids, which make up a smaller map, and the blocks
  work on that, with windows as small as the grids, until the full map is restored, as Expedite does in the windows of
  SAM (hourglass_image_encoder.py@75a1c30). Position biases are interpolated at the distances of the cells. A stage ends
  with full maps; stages that follow shrink their own windows.

A network is a ``Family``: timm's classes of its parts, and what stands in their place. Blocks are counted through, from
the first with attention inside windows. Padding of the last windows takes part in attention, as in timm's models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from effvit.block import copy_shared, rehouse
from effvit.hosts.stages import Stage
from effvit.hosts.surface import Reduced, check_batch
from effvit.layers.windows import from_windows, num_windows, to_windows
from effvit.protocols import Layer, Setting, Size
from effvit.recording import compile_each_size, refuse_fx, refuse_legacy_onnx, refuse_open_sides
from effvit.reducers import METHODS, Reducer
from effvit.reducers.grids import Groups, SmallGrids
from effvit.tokens import wide_dtype, wide_product

__all__ = [
    "Cut",
    "Family",
    "GroupedAttention",
    "GroupingBlock",
    "ReducedWindows",
    "ScaledGroupingBlock",
    "Span",
    "check_square",
    "interpolated_biases",
    "reduce_windows",
    "replace_attributes",
    "restore_attributes",
    "run_blocks",
    "window_methods",
]

WindowsT = TypeVar("WindowsT", bound="ReducedWindows")
WHOLE: Size = (0, 0)  # window of a block that attends to the whole map
PART_WEIGHT = (
    3.0  # squared norm of a part's feature beside that of 1 of the token: parts apart differ more than any two tokens
)
APART = -100.0  # what Swin (2103.14030) adds to the logits of tokens that are no neighbours


def window_methods() -> list[str]:
    """Methods that leave a rectangle or as many tokens of every window."""
    return [name for name, method in METHODS.items() if method.groups() or method.shrinks()]


# -- one map, cut into windows ---------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a map is cut into windows.

    Attributes:
        window: (h, w) of a window.
        size: (H, W) of the map.
        shift: Rows and columns that the map is rolled up and left before it is padded and cut.
    """

    window: Size
    size: Size
    shift: Size = (0, 0)

    @property
    def area(self) -> int:
        """Tokens of a window."""
        return self.window[0] * self.window[1]

    @property
    def number(self) -> int:
        """Windows of a map."""
        return num_windows(self.size[0], self.window[0]) * num_windows(self.size[1], self.window[1])

    @property
    def num_parts(self) -> int:
        """Codes of ``parts``."""
        padded = any(side % window for side, window in zip(self.size, self.window, strict=True))
        shifted = any(self.shift)
        return 8 if shifted and padded else 4 if shifted else 2 if padded else 1

    def windows(self, x: Tensor) -> Tensor:
        """Map x (B, H, W, C) -> (B*nW, h*w, C), with zeros in the padding."""
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        return to_windows(x, self.window)

    def map(self, windows: Tensor) -> Tensor:
        """Inverse of ``windows``: (B*nW, h*w, C) -> (B, H, W, C)."""
        x = from_windows(windows, self.window, self.size)
        return x.roll(self.shift, (1, 2)) if any(self.shift) else x

    def parts(self, like: Tensor) -> Tensor:
        """Which parts of a window its tokens belong to, as codes: (nW, h*w) int64 on the device of ``like``.

        Parts of a shifted window are no neighbours in the image and do not attend to each other; bits 0 and 1 say
        whether a column and a row are behind the edge, counted from the padded end as in timm's mask. The next bit says
        padding, which attends and is attended to as any token.
        """
        late, real = [], []
        for side, window, shift in zip(self.size, self.window, self.shift, strict=True):
            place = torch.arange(num_windows(side, window) * window, device=like.device)
            late.append(place >= place.shape[0] - shift)
            real.append(place < side)
        part = 2 * late[0].long()[:, None] + late[1].long()  # (rows, columns)
        outside = ~(real[0][:, None] & real[1])
        part = part + (4 if any(self.shift) else 1) * outside.long()
        return to_windows(part[None, :, :, None], self.window).squeeze(-1)


def compared_in_parts(features: Tensor, cut: Cut) -> Tensor:
    """Features (B*nW, N, D) by which tokens of the same part of a window are always more alike than those of two.

    Cosines of two tokens of one part become (PART_WEIGHT + cosine) / (PART_WEIGHT + 1), of two parts cosine /
    (PART_WEIGHT + 1), and 1 within the padding: so padding shares a token with padding, and what may not attend to each
    other is not merged, as long as a part has partners.

    Args:
        features: What tokens are compared by.
        cut: How the map was cut.

    Returns:
        The same features where windows have one part; else (B*nW, N, D + parts) in float32 (float64 for float64).
    """
    if cut.num_parts == 1:
        return features
    features = F.normalize(features.detach().to(wide_dtype(features.dtype)), dim=-1)
    parts = cut.parts(features)  # (nW, N)
    is_part = parts.unsqueeze(-1) == torch.arange(cut.num_parts, device=parts.device)  # (nW, N, parts)
    codes = is_part.to(features.dtype) * PART_WEIGHT**0.5
    return torch.cat([features, codes.repeat(features.shape[0] // parts.shape[0], 1, 1)], dim=-1)


# -- groups ----------------------------------------------------------------------------------------------


class Among(NamedTuple):
    """The tokens that attention is among: groups, each at the place of one of its tokens.

    Attributes:
        anchor: (B*nW, K) place of each in the window.
        size: (B*nW, K) tokens each counts for as a key; None: one.
        window: (h, w) of a window.
        part: (B*nW, K) part of the window each belongs to, where some do not attend to each other; None: all do.
    """

    anchor: Tensor
    size: Tensor | None
    window: Size
    part: Tensor | None = None


class GroupedAttention(nn.Module):
    """Attention of a timm module among groups of the tokens of each window.

    A subclass supplies position biases if it has some, and its projections if they are not timm's usual one for all
    three.
    """

    num_heads: int
    qkv: Layer
    proj: Layer
    scale_of_logits: float | None = None  # None: one over the root of the width of a head

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B*nW, K, C) -> q, k, v, each (B*nW, heads, K, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _position_bias(self, q: Tensor, among: Among) -> Tensor | None:
        """(B*nW, heads, K, K) added to the logits for the places of the groups; None where nothing is added."""
        return None

    def _output(self, y: Tensor) -> Tensor:
        """The last layers: (B*nW, K, heads * D) -> (B*nW, K, C)."""
        return self.proj(y)

    def forward(self, x: Tensor, among: Among) -> Tensor:
        """Attention of x (B*nW, K, C), normalised as timm's module gets it: (B*nW, K, C)."""
        q, k, v = self._project(x)
        bias = self._position_bias(q, among)
        if among.size is not None:
            weight = among.size.log()[:, None, None]  # (B*nW, 1, 1, K)
            bias = weight if bias is None else bias + weight.to(bias.dtype)
        if among.part is not None:
            apart = among.part[:, None, :, None] != among.part[:, None, None, :]  # (B*nW, 1, K, K)
            mask = torch.zeros_like(apart, dtype=q.dtype).masked_fill(apart, APART)
            bias = mask if bias is None else bias + mask
        dropout: nn.Module | None = getattr(self, "attn_drop", None)
        dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        mask_of_logits = None if bias is None else bias.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask_of_logits, dropout_p, scale=self.scale_of_logits)
        return self._output(y.transpose(1, 2).flatten(2))


class GroupingBlock(nn.Module):
    """A block of a timm network in which groups of the tokens of each window share one, for attention and for the MLP.

    A subclass says what surrounds the two in timm's block.

    Attributes:
        reducer: Makes the groups.
    """

    reducer: Reducer
    attn: GroupedAttention
    mlp: Layer
    norm1: Layer
    norm2: Layer
    drop_path1: Layer
    drop_path2: Layer

    def cut(self, size: Size) -> Cut:
        """How the block cuts a map of that size."""
        raise NotImplementedError

    def area(self, cut: Cut) -> int:
        """Tokens that absolute numbers are meant for: those of a window, also where the whole map is one."""
        return cut.area

    def _enter(self, x: Tensor) -> Tensor:
        """The map x as it is cut for attention."""
        return self.norm1(x)

    def _compared(self, windows: Tensor, cut: Cut) -> Tensor:
        """What the tokens of windows (B*nW, N, C) are compared by."""
        return compared_in_parts(windows, cut)

    def _attention_branch(self, y: Tensor) -> Tensor:
        """What is added to the map, given the output y of attention."""
        return self.drop_path1(y)

    def _between(self, x: Tensor) -> Tensor:
        """The map between attention and MLP."""
        return x

    def _mlp_branch(self, x: Tensor) -> Tensor:
        """What is added to tokens or maps x."""
        return self.mlp(self.norm2(x))

    def compared(self, x: Tensor) -> tuple[Cut, Tensor, Tensor]:
        """How the map x (B, H, W, C) is cut, its windows (B*nW, N, C), and what their tokens are compared by."""
        cut = self.cut((x.shape[1], x.shape[2]))
        windows = cut.windows(self._enter(x))
        return cut, windows, self._compared(windows, cut)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, H, W, C) -> (B, H, W, C)."""
        cut, windows, features = self.compared(x)
        groups = self.reducer.group(features, x, self.area(cut))
        del features
        merged, size = groups.merge(windows)  # (B*nW, K, C), (B*nW, K)
        y: Tensor = self.attn(merged, Among(groups.anchor, size, cut.window, attending_parts(groups, cut)))
        x = x + self._attention_branch(cut.map(groups.spread(y)))
        x = self._between(x)
        if cut.number * merged.shape[1] >= cut.size[0] * cut.size[1]:  # of a small map in padded windows
            return x + self.drop_path2(self._mlp_branch(x))
        y = self._mlp_branch(groups.merge(cut.windows(x))[0])  # (B*nW, K, C)
        return x + self.drop_path2(cut.map(groups.spread(y)))

    def stage(self, x: Tensor, number: int) -> Stage:
        """The groups of the first image of the map x that enters the block."""
        cut, _, features = self.compared(x[:1])
        groups = self.reducer.group(features, x[:1], self.area(cut))
        return window_stage(groups.target, cut, groups.anchor.shape[1], number)


class ScaledGroupingBlock(GroupingBlock):
    """A grouping block with LayerScale on both branches."""

    ls1: Layer
    ls2: Layer

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(y))

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


def attending_parts(groups: Groups, cut: Cut) -> Tensor | None:
    """(B*nW, K) part of its window that each group belongs to, where parts do not attend to each other."""
    if not any(cut.shift):
        return None
    parts = cut.parts(groups.anchor) % 4  # without the bit of the padding, (nW, N)
    return parts.repeat(groups.anchor.shape[0] // parts.shape[0], 1).gather(1, groups.anchor)


def window_stage(target: Tensor, cut: Cut, number: int, block: int) -> Stage:
    """The stage of a map whose windows have ``number`` tokens each, which carry the tokens of ``target`` (nW, N)."""
    first = torch.arange(target.shape[0], device=target.device).unsqueeze(1) * number
    labels = cut.map((target + first).unsqueeze(-1))[0, ..., 0]  # (H, W)
    return Stage(block, target.shape[0] * number, labels.cpu().numpy())


# -- smaller grids ---------------------------------------------------------------------------------------


class Span(NamedTuple):
    """The blocks of a stage that work on a map of smaller grids.

    Attributes:
        reducer: Makes the smaller grids.
        first: Block before which it does.
        last: Block before which, or behind which, if there is none, the full map is restored.
        window: (h, w) of the windows that become smaller grids.
    """

    reducer: Reducer
    first: int
    last: int
    window: Size

    @property
    def cells(self) -> Size:
        """(h, w) of a smaller grid."""
        return self.reducer.cells(self.window)


class Shrunk(NamedTuple):
    """A map while it is smaller.

    Attributes:
        grids: The smaller grids it was made of, and the way back.
        cut: How the full map was cut.
        small: How the small one is cut.
    """

    grids: SmallGrids
    cut: Cut
    small: Cut

    @classmethod
    def of(cls, x: Tensor, span: Span) -> Shrunk:
        """The map x (B, H, W, C), made smaller."""
        cut = Cut(span.window, (x.shape[1], x.shape[2]))
        cells = span.cells
        rows, columns = (num_windows(n, w) * c for n, w, c in zip(cut.size, cut.window, cells, strict=True))
        grids = span.reducer.shrink(cut.windows(x).unflatten(1, cut.window), x)
        return cls(grids, cut, Cut(cells, (rows, columns)))

    @property
    def map(self) -> Tensor:
        """The small map (B, h, w, C)."""
        return self.small.map(self.grids.x.flatten(1, 2))

    def restore(self, x: Tensor) -> Tensor:
        """The full map (B, H, W, C), given what became of the small one."""
        return self.cut.map(self.grids.restore(self.small.windows(x)))


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    span: Span | None,
    take: Collection[int] = (),
    checkpointing: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The blocks of a stage on the map x (B, H, W, C).

    Args:
        blocks: The blocks, or the first of them.
        x: The map.
        span: Those that work on smaller grids.
        take: Blocks whose output is returned too.
        checkpointing: Compute the blocks again in the backward pass.

    Returns:
        The full map behind the last block, and behind each of ``take``.
    """
    shrunk: Shrunk | None = None
    taken = []
    for i, block in enumerate(blocks):
        if span is not None and i == span.first:
            shrunk = Shrunk.of(x, span)
            x = shrunk.map
        if span is not None and shrunk is not None and i == span.last:
            x, shrunk = shrunk.restore(x), None
        x = checkpoint(block, x) if checkpointing else block(x)
        if i in take:
            taken.append(x if shrunk is None else shrunk.restore(x))
    return (x if shrunk is None else shrunk.restore(x)), taken


def interpolated_biases(biases: Tensor, first: Size, distances: tuple[Tensor, Tensor]) -> Tensor:
    """Position biases by rows and columns apart, interpolated linearly at other distances.

    Args:
        biases: (heads, H, W), of distances one token apart.
        first: Distance of the first row and of the first column of them.
        distances: (h,) along rows and (w,) along columns, in tokens.

    Returns:
        (heads, h, w).
    """
    rows, columns = (
        (1 - (distance.unsqueeze(1) - torch.arange(start, start + number, device=biases.device)).abs()).clamp(min=0)
        for distance, start, number in zip(distances, first, biases.shape[1:], strict=True)
    )  # (h, H), (w, W)
    return wide_product(wide_product(rows, biases), columns.T).to(biases.dtype)


# -- the whole model -------------------------------------------------------------------------------------


class Blocks(Protocol):
    """What holds blocks: a stage, or a model of one."""

    blocks: nn.Sequential


class Family(NamedTuple):
    """timm's classes of the parts of a network, and what stands in their place.

    Attributes:
        block: timm's block.
        attention: timm's attention.
        grouping_block: Subclass of both ``GroupingBlock`` and timm's block.
        grouped_attention: Subclass of both ``GroupedAttention`` and timm's attention.
        shrink: Changes a block, rehoused, for windows that became smaller grids: (block, window, cells) -> None. It
            replaces plain attributes by ``replace_attributes``.
        shrunk_attention: Subclass of timm's attention that ``shrink`` puts in its place.
        plain_attention: timm's attention on the parameters of what stands in its place.
        unreduced_attention: Subclass of timm's attention that ``plain_attention`` gives; None: it gives timm's own.
        shrunk_block: Subclass of timm's block for windows that became smaller grids; None: the one of blocks where
            nothing is reduced serves.
        unreduced_block: Subclass of timm's block that stands in its place where nothing is reduced; None: timm's own.
    """

    block: type[nn.Module]
    attention: type[nn.Module]
    grouping_block: type[GroupingBlock]
    grouped_attention: type[GroupedAttention]
    shrink: Callable[[Any, Size, Size], None]
    shrunk_attention: type[nn.Module]
    plain_attention: Callable[[nn.Module], nn.Module]
    unreduced_attention: type[nn.Module] | None = None
    shrunk_block: type[nn.Module] | None = None
    unreduced_block: type[nn.Module] | None = None


def replace_attributes(module: nn.Module, **values: object) -> None:
    """Set plain attributes of a module, which ``restore_attributes`` sets back."""
    module.__dict__["former"] = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)


def restore_attributes(module: nn.Module) -> None:
    """Undo ``replace_attributes``, if it was called."""
    for name, value in module.__dict__.pop("former", {}).items():
        setattr(module, name, value)


class ReducedWindows(Reduced):
    """What hosts with windows share; a subclass of timm's class too.

    Attributes:
        family: The parts of the network.
        reason: Why it needs its full maps, for messages.
        holds_blocks: The model itself holds the blocks, so that feature extractors would look into what acts there.
        open_sides: Sides of the images, 0 to 2, that may be unknown to ``torch.export``, which follows the windows.
        untraceable: Why ``torch.fx`` cannot trace it, behind its name.
    """

    family: ClassVar[Family]
    reason: ClassVar[str]
    holds_blocks: ClassVar[bool] = False
    open_sides: ClassVar[int] = 0
    untraceable: ClassVar[str] = ", timm's own too, pads its windows as the size of a map asks"
    _depth: int

    def own_stages(self) -> None:
        """Take stages along, copied around the same parameters, so that those of the model given stay as they are."""

    def window_stages(self) -> list[Any]:
        """What holds the blocks of each stage."""
        raise NotImplementedError

    def numbered_stages(self) -> Iterator[tuple[Any, int]]:
        """(what holds the blocks of a stage, the first block's number)."""
        start = 0
        for stage in self.window_stages():
            yield stage, start
            start += len(stage.blocks)

    def all_blocks(self) -> list[Any]:
        """The blocks by their numbers."""
        return [block for stage in self.window_stages() for block in stage.blocks]

    def block_window(self, block: Any) -> Size:
        """(h, w) of the windows of a plain block of this network; the whole map has no window: (0, 0)."""
        raise NotImplementedError

    @property
    def stage_starts(self) -> list[int]:
        """Blocks that pool the map they begin a stage with, in which no method acts: none, but in some networks."""
        return []

    @property
    def window_areas(self) -> list[int]:
        """Tokens of a window of each block with attention; 0 where the whole map is one."""
        windows = (self.block_window(block) for stage in self.window_stages() for block in stage.blocks)
        return [rows * columns for rows, columns in windows]

    def check_parts(self) -> None:
        """Raise a TypeError for blocks or attention of classes that the family does not know."""
        family = self.family
        blocks = {family.block, family.grouping_block, family.shrunk_block, family.unreduced_block}
        attentions = {family.attention, family.grouped_attention, family.shrunk_attention, family.unreduced_attention}
        for i, block in enumerate(self.all_blocks()):
            for what, part, known in (("", block, blocks), (".attn", block.attn, attentions)):
                if type(part) not in known:
                    raise TypeError(
                        f"blocks.{i}{what} is a {type(part).__name__}, which token reduction does not know in a "
                        f"{type(self).__bases__[-1].__name__}; choose a host built from timm's own"
                    )

    def check_run(self, x: Tensor) -> None:
        """Raise a named error for what is no batch of images, and for recorders that would fix what sizes decide."""
        extractors = ", or timm's create_feature_extractor, which does not look into its blocks"
        self.check_whole()
        refuse_fx(
            x,
            f"a {type(self).__bases__[-1].__name__}{self.untraceable}",
            "use torch.export" + ("" if self.holds_blocks else extractors),
            extractors=self.holds_blocks,
        )
        refuse_legacy_onnx(f"a model reduced by {self.method}")
        refuse_open_sides(x.shape[-2:], self.open_sides, f"a {type(self).__bases__[-1].__name__}", "padded windows")
        compile_each_size(x.shape[-2:])
        check_batch(x, self, getattr(self, "in_chans", 3))

    def forward_features(self, x: Tensor) -> Tensor:
        """Final map of images (B, 3, H, W), as timm's method gives it."""
        self.check_run(x)
        y: Tensor = super().forward_features(x)  # type: ignore[misc]
        return y

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's method, with its arguments."""
        self.check_run(x)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]

    def make_plain(self) -> None:
        """Take the method out of the blocks."""
        for stage in self.window_stages():
            stage.blocks, stage.span = plain_blocks(stage, self.family), None

    def place(self, method: str, settings: Mapping[str, Setting]) -> None:
        """Let a method act in the blocks, in place of what acts there.

        Raises:
            ValueError: Settings that do not fit the windows.
        """
        plan = METHODS[method].plan(self._depth, **settings)
        stages = [(stage, start, plain_blocks(stage, self.family)) for stage, start in self.numbered_stages()]
        self.check_windows(plan, [block for _, _, blocks in stages for block in blocks])
        spans = [planned_span(blocks, plan, start, self.block_window) for _, start, blocks in stages]
        for (stage, start, blocks), span in zip(stages, spans, strict=True):
            stage.span = span
            for i, block in enumerate(blocks):
                reducer = plan.get(start + i)
                if reducer is not None and reducer.groups():
                    reducer.block = start + i
                    blocks[i] = grouping_block(block, self.family, reducer)
            if span is not None:
                span.reducer.block = start + span.first
                for i in range(span.first, span.last):
                    if self.family.shrunk_block is not None:
                        blocks[i] = rehouse(blocks[i], self.family.shrunk_block)
                    self.family.shrink(blocks[i], span.window, span.cells)
            stage.blocks = blocks

    def check_windows(self, plan: Mapping[int, Reducer], blocks: Iterable[nn.Module]) -> None:
        """Raise a ValueError for a method of smaller grids where none of the plain blocks has windows."""
        shrinking = [reducer.name for reducer in plan.values() if reducer.shrinks()]
        if shrinking and all(self.block_window(block) == WHOLE for block in blocks):
            raise ValueError(
                f"{shrinking[0]} makes windows smaller, but the blocks of this {type(self).__bases__[-1].__name__} "
                "attend to whole maps; use method "
                f"{' or '.join(repr(name) for name, method in METHODS.items() if method.groups())}"
            )

    def set_keep_rate(self, keep_rate: object) -> NoReturn:
        """Refused: the rate decides how blocks and windows are laid out.

        Raises:
            ValueError: Always.
        """
        self.check_keep_rate()
        raise ValueError(
            f"the rate of a {type(self).__bases__[-1].__name__} is fixed with its windows, got {keep_rate}; make the "
            f"model anew: effvit.sparsify(model, {self.method!r}, keep_rate=...)"
        )

    def forward_tokens(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: what leaves the blocks is a map, of which no TokenMap tells.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"a {type(self).__bases__[-1].__name__} gives its tokens back in every window, so that none are left over "
            "and no TokenMap tells of them; call forward_features or forward_intermediates for maps, and trace_stages "
            "for what its blocks merge"
        )

    trace_tokens = forward_tokens

    def stage_maps(self, x: Tensor) -> Iterator[Tensor]:
        """The map (B, H, W, C) that enters the blocks of each stage, for images (B, 3, H, W)."""
        raise NotImplementedError

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """What each reducing block makes of the map of an image (1, 3, H, W); smaller grids once, by nearest centre."""
        self.check_run(x)
        return [
            found
            for (stage, start), entering in zip(self.numbered_stages(), self.stage_maps(x[:1]), strict=True)
            for found in trace_blocks(stage.blocks, entering, stage.span, start)
        ]


def trace_blocks(blocks: nn.Sequential, x: Tensor, span: Span | None, start: int) -> list[Stage]:
    """What the reducing blocks of a stage, whose first is number ``start``, make of the map x (1, H, W, C)."""
    entering = [x, *run_blocks(blocks, x, span, range(len(blocks)))[1]]
    found = [b.stage(m, start + i) for i, (b, m) in enumerate(zip(blocks, entering, strict=False)) if is_grouping(b)]
    if span is not None:
        shrunk = Shrunk.of(entering[span.first], span)
        found.append(window_stage(shrunk.grids.labels(), shrunk.cut, shrunk.small.area, start + span.first))
    return found


def is_grouping(block: nn.Module) -> TypeGuard[GroupingBlock]:
    """Whether groups of tokens share one in a block."""
    return isinstance(block, GroupingBlock)


def check_square(cells: Size, host: str) -> None:
    """Raise a ValueError for smaller grids that are not square in a network whose windows must be."""
    if cells[0] != cells[1]:
        raise ValueError(
            f"what is left of a window must be square in the square windows of a {host}, got {cells[0]} x {cells[1]}; "
            "give a square num_clusters or a keep_rate (expedite), or r_h equal to r_w (cubistmerge)"
        )


def plain_blocks(stage: Blocks, family: Family) -> nn.Sequential:
    """The blocks of a stage on the same parameters, without a method; those of the stage are left as they are."""
    blocks = rehouse(stage.blocks, nn.Sequential)
    block: Any
    for i, block in enumerate(blocks):
        plain: Any = rehouse(block, family.unreduced_block or family.block)
        plain._modules.pop("reducer", None)
        restore_attributes(plain)
        plain.attn = family.plain_attention(block.attn)
        blocks[i] = plain
    return blocks


def grouping_block(block: nn.Module, family: Family, reducer: Reducer) -> GroupingBlock:
    """A plain block with groups that the reducer makes."""
    new = rehouse(block, family.grouping_block)
    new.attn = rehouse(cast(nn.Module, new.attn), family.grouped_attention)
    new.reducer = reducer
    return new


def planned_span(
    blocks: nn.Sequential, plan: Mapping[int, Reducer], start: int, window_of: Callable[[Any], Size]
) -> Span | None:
    """The blocks of a stage, whose first is number ``start``, that a method of smaller grids lets work on them.

    Raises:
        ValueError: A stage without windows among them; a method that would make smaller windows smaller still.
    """
    at = [i for i, reducer in plan.items() if reducer.shrinks()]
    if not at:
        return None
    shrinking = at[0]
    if len(at) > 1:
        raise ValueError(
            f"{plan[shrinking].name} makes the windows of a host smaller once, got blocks "
            f"{', '.join(map(str, at))}; give one block"
        )
    end = min((i for i in plan if i > shrinking), default=start + len(blocks))
    first, last = max(shrinking - start, 0), min(end - start, len(blocks))
    if first >= last:
        return None
    windows = [window_of(block) for block in blocks]
    window = next((window for window in windows if window != WHOLE), None)
    if window is None:
        last_block = start + len(blocks) - 1
        raise ValueError(
            f"{plan[shrinking].name} makes windows smaller, but the stage that ends with block {last_block} attends "
            f"to whole maps alone; let it begin behind block {last_block}"
            + (f", or before block {start} with expedite's restore_at={start}" if start else "")
        )
    span = Span(copy.copy(plan[shrinking]), first, last, window)  # each stage names its own first block in errors
    return None if span.cells == window else span


def reduce_windows(
    dense: nn.Module, host_class: type[WindowsT], method: str, settings: Mapping[str, Setting], share: bool = True
) -> WindowsT:
    """The model with a method in its windows; the one given stays as it is.

    Args:
        dense: timm's model, or one that is reduced already: its method is replaced.
        host_class: Class of the reduced model.
        method: One of ``window_methods``.
        settings: As for ``effvit.sparsify``; blocks are those with attention, and ``r`` is counted in each window.
        share: On the same parameters and buffers, else on copies of them.

    Raises:
        ValueError: Another method, or settings that do not fit the windows.
        TypeError: Blocks or attention that the family does not know.
    """
    if method not in window_methods():
        raise ValueError(
            f"{method} does not work inside windows: {host_class.reason}; use method "
            f"{' or '.join(map(repr, window_methods()))}, which merge or cluster inside each window and restore "
            "its tokens"
        )
    host = rehouse(copy_shared(dense, share), host_class)
    host.check_parts()
    host.own_stages()
    if not isinstance(dense, ReducedWindows):
        host._depth = len(host.all_blocks())
    host.place(method, settings)
    return host
