"""What a reduction method is: one Reducer a block, made by the method's ``plan``."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effvit.attention import AttnState, EditMap, Pick
from effvit.protocols import Host, Settings, Size
from effvit.recording import graphs_count, is_recorded, refuse_open_sides
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.grids import Groups, SmallGrids
from effvit.tokens import TokenMap, fx_leaf

if TYPE_CHECKING:
    from effvit.block import ReducibleBlock
    from effvit.reducers.block_schedule import BlockSchedule

__all__ = [
    "Reducer",
    "check_bounded",
    "check_distinct",
    "check_finite",
    "check_group",
    "check_weights",
    "refuse_recording",
]


CHECK_FINITE = "EFFVIT_CHECK_FINITE"  # "1": check on every device


def stays_unread(values: Tensor) -> bool:
    """Whether checks leave the values alone, since they are recorded or to read them would stop a device's queue."""
    if is_recorded(values):
        return True
    return values.device.type != "cpu" and not (os.environ.get(CHECK_FINITE) == "1" or torch.is_anomaly_enabled())


@fx_leaf
def check_finite(scores: Tensor, origin: str, x: Tensor | None, rows: int = 1) -> Tensor:
    """``scores``, or an error that says where NaN came from; a top-k of NaN would be an arbitrary choice.

    Checked where that is cheap: on a CPU. Elsewhere reading a value would stop the queue of the device, so scores are
    checked only with ``EFFVIT_CHECK_FINITE=1`` in the environment or under ``torch.autograd.detect_anomaly``. What is
    recorded or transformed (see ``is_recorded``) is never checked. An image has so many ``rows`` of scores.
    """
    if stays_unread(scores):
        return scores
    total = scores.sum().item()
    if math.isnan(total) and scores.isnan().any():  # infinities of both signs have no sum either
        image = int(scores.isnan().flatten(1).any(1).nonzero()[0]) // rows
        cause = (
            "the tokens that entered the block hold NaN or infinity already: look at the input and earlier blocks"
            if x is not None and not x.isfinite().all()
            else "the tokens that entered the block are finite: its own weights hold NaN or its products overflow"
        )
        raise ValueError(f"{origin} are NaN for image {image} of the batch; {cause}")
    return scores


@fx_leaf
def check_bounded(values: Tensor, origin: str) -> Tensor:
    """``values``, or an error that names the first image with an infinite one; checked where ``check_finite`` checks.

    For what is divided by its norm: infinite rows have no direction.
    """
    if not stays_unread(values) and not math.isfinite(values.sum().item()):  # or the sum alone overflows
        unbounded = values.isinf().flatten(1).any(1)
        if unbounded.any():
            image = int(unbounded.nonzero()[0])
            raise ValueError(
                f"{origin} are infinite for image {image} of the batch; give finite ones, as a tower that overflows in "
                "float16 does in bfloat16 or float32"
            )
    return values


@fx_leaf
def check_weights(values: Tensor, origin: str, remedy: str) -> Tensor:
    """``values`` (B, N), or an error unless those of every image are finite, at least 0 and not all 0.

    Checked where ``check_finite`` checks.
    """
    if not stays_unread(values):
        for rule, bad in (
            ("infinite", values.isinf().any(1)),
            ("negative", (values < 0).any(1)),
            ("all 0", (values == 0).all(1)),
        ):
            if bad.any():
                raise ValueError(f"{origin} are {rule} for image {int(bad.nonzero()[0])} of the batch; {remedy}")
    return values


@fx_leaf
def check_distinct(ids: Tensor, valid: Tensor | None, number: int, origin: str) -> Tensor:
    """``ids`` (B, K), or an error unless those of every image are different places of 0 to ``number`` - 1.

    Checked where ``check_finite`` checks.

    Args:
        ids: Places.
        valid: (B, K) False where they are padding.
        number: Places there are.
        origin: What they are.
    """
    if not stays_unread(ids):
        slots = torch.arange(ids.shape[1], device=ids.device)
        place = ids if valid is None else torch.where(valid, ids, slots % number)
        twice = (ids if valid is None else torch.where(valid, ids, number + slots)).sort(dim=1).values.diff(dim=1) == 0
        for rule, bad in ((f"no places of 0 to {number - 1}", (place < 0) | (place >= number)), ("doubled", twice)):
            if bad.any():
                raise ValueError(f"{origin} are {rule} in image {int(bad.any(1).nonzero()[0])} of the batch")
    return ids


@fx_leaf
def check_group(group: Tensor, ids: Tensor, valid: Tensor | None, origin: str) -> Tensor:
    """``group`` (B, N), or an error unless it holds places of ``ids`` (B, K) or -1, a token that stays its own.

    Checked where ``check_finite`` checks; arguments as of ``check_distinct``.
    """
    if not stays_unread(group):
        if ((group < -1) | (group >= ids.shape[1])).any():
            raise ValueError(
                f"{origin} must be -1 or a place of 0 to {ids.shape[1] - 1}, got {group.unique().tolist()}"
            )
        own = group.gather(1, ids if valid is None else ids * valid) == torch.arange(ids.shape[1], device=ids.device)
        wrong = ~(own if valid is None else own | ~valid).all(1)
        if wrong.any():
            raise ValueError(
                f"{origin} of image {int(wrong.nonzero()[0])} of the batch puts a token that stays into another one; "
                "group[ids[k]] must be k"
            )
    return group


@fx_leaf
def refuse_recording(x: Tensor, cause: str, remedy: str) -> None:
    """Raise a ValueError if ``x`` is recorded or transformed: for shapes or results that depend on values.

    Under ``torch.compile`` the graph breaks here, and only ``fullgraph=True`` meets the refusal.
    """
    message = f"{cause}, so it cannot be compiled into one graph, exported, traced or transformed; {remedy}"
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(message)
    elif is_recorded(x):
        raise ValueError(message)


FEW_PATCHES = 100  # below it, defaults that are meant for 196 patches take too much (docs/accuracy.md)


class Reducer(nn.Module):
    """One block's share of a method. It sees patches only through the TokenMap.

    A method is a subclass with ``plan``, whose keyword arguments are the method's settings, ``count``, and the places
    of a block at which it acts: ``before`` it; inside attention, on the query rows (``pick``) or on the softmax map
    (``map_edit``); between attention and MLP (``reduce``); and ``after`` the block.

    Attributes:
        name: The method's name, as in ``effvit.list_methods()``.
        summary: One line on the method with its source.
        needs_class_token: The method scores patches by the class token.
        variable_length: The method keeps a different number of tokens for each image.
        reads_counts: How many tokens stay is read from the device, once each time the block runs. Nothing else may be
            read from it, and nothing at all where this is False: a GPU would stand still. Only the first pass of a
            model may read more, to tell of weights that have learnt nothing.
        graph_reads_counts: ``effvit.compile`` makes one graph that reads the numbers of tokens; else it compiles the
            MLPs alone.
        keeps_every_patch: No patch is dropped: each is part of a merged token or of a cluster.
        takes_padding: In a batch of images with grids of their own, whose ``TokenMap.layout.own`` tells their patches,
            padding is never scored, merged or kept, and counts are those of the image. Else images of equal grids run
            together.
        open_sides: Sides of the patch grid, 0 to 2, of which ``torch.export`` can follow the token counts where they
            are unknown; see ``check_size``.
        learns: The method learns something beside the weights, which state_dict holds.
        soft: Its tokens stand for soft clusters; what needs all patches gets them reconstructed.
        has_sizes: Its tokens have sizes, by which heads that pool patches weight them where every patch is kept.
        place: Where in its block tokens leave, one of ``effvit.reducers.static_selection.PLACES``, for a method that
            acts at several places. None: at the one place where it acts.
        serves: Reducers of other blocks that this one only prepares for: it does nothing where they do nothing.
        recover: The fill of dense maps unless another is asked for, one of ``effvit.recover.FILLS``.
        cost_term: Term of the closed form that ``cost`` adds its MACs to.
        block: The block this reducer sits in, for messages.
        any_size: The host takes images of any size (``dynamic_img_size``), so that absolute numbers meet grids they
            were not chosen for: there they bend to the grid, and each block leaves at least one patch. On a host of
            one size, numbers that do not fit its grid are an error.
    """

    name: str
    summary: str
    needs_class_token = False
    variable_length = False
    reads_counts = False
    graph_reads_counts = False
    keeps_every_patch = False
    takes_padding = False
    open_sides = 2
    learns = False
    soft = False
    has_sizes = True
    place: str | None = None
    serves: tuple[Reducer, ...] = ()
    recover = "last"
    cost_term = "reduction"
    block: int = -1
    any_size: bool = False

    @classmethod
    def plan(cls, depth: int, *args: Any, **settings: Any) -> dict[int, Reducer]:
        """{block: reducer} for a model of ``depth`` blocks; blocks where nothing is reduced are left out."""
        raise NotImplementedError

    @classmethod
    def off(cls) -> Settings:
        """Settings under which nothing is reduced, so that the model is its host."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> Settings:
        """Settings under which every part of the method acts on a host of four blocks and 20 to 40 patches.

        The tests of the contract run the method with them, those of ``effvit.testing`` too.
        """
        return {}

    @classmethod
    def example_in_windows(cls) -> Settings:
        """The same on a host with windows of 4 x 4 tokens, where a method may act in other blocks."""
        return cls.example()

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        """Settings from weak to strong for ``effvit.measure.tune``, a list for each way to spread them over the blocks.

        None for a method that must be calibrated or trained before its outputs say anything.

        Args:
            depth: Blocks of the host.
            num_patches: Patches of its images.
        """
        return []

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        """What the settings take in each block, for ``effvit.measure.tune`` to move between blocks.

        None, for a method or settings without a value for each block: then only ``ladders`` are tried.

        Args:
            settings: A rung of a ladder.
            depth: Blocks of the host.
        """
        return None

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        """Settings that ``effvit demo`` compares on images of so many patches; none leave the method out.

        Unless a method says otherwise, that of the middle of its first ladder.
        """
        rungs = next(iter(cls.ladders(12, num_patches)), [])
        return rungs[len(rungs) // 2 :][:1]

    @classmethod
    def defaults(cls) -> Settings:
        """The method's settings and their defaults, read from the signature of ``plan``."""
        parameters = inspect.signature(cls.plan).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def has_learnt(self) -> bool:
        """Whether ``state_dict`` holds something that the settings do not tell."""
        return bool(self.state_dict())

    def take_over(self, former: Reducer) -> bool:
        """Go on from what a reducer of the same method has learnt, sharing its parameters; False if it does not fit."""
        own: dict[str, Tensor] = self.state_dict()
        state: dict[str, Tensor] = former.state_dict(keep_vars=True)
        fits = own.keys() == state.keys() and all(own[name].shape == state[name].shape for name in own)
        if not fits or type(former) is not type(self):
            return False
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(state[name].requires_grad)  # load_state_dict turns what it assigns into that
        shared = {n: value if isinstance(value, nn.Parameter) else value.clone() for n, value in state.items()}
        self.load_state_dict(shared, assign=True)
        return True

    def begin_anew(self) -> None:
        """Say what is missing of a reducer that was made by ``effvit.sparsify`` and took nothing over."""

    @classmethod
    def learnt_settings(cls, reducers: Mapping[int, Reducer], depth: int) -> Settings:
        """Settings that stand for what the reducers {block: reducer} of a model have learnt; none for most methods."""
        return {}

    def settle(self, host: Host, block: int) -> None:
        """Take a place in a host; the method's own parameters are made here, at the host's widths.

        Args:
            host: The ReducedHost, whose ``blocks`` are in place: ``embed_dim``, ``num_prefix_tokens`` and
                ``blocks[block].attn.num_heads`` give the sizes, its parameters device and dtype.
            block: Number of the block.
        """
        self.block = block
        self.any_size = bool(getattr(host, "dynamic_img_size", False))

    def resize(self, grid: Size) -> None:
        """Take note that the images of the host have this patch grid (H, W) now; first behind ``settle``."""

    def count(self, num_tokens: int, num_patches: int) -> int:
        """Patch tokens left of ``num_tokens``; an upper bound for a method whose count depends on the image.

        Args:
            num_tokens: Patch tokens that enter the block.
            num_patches: Patches of the whole image.
        """
        raise NotImplementedError

    def count_on(self, num_tokens: int, grid: tuple[int, int]) -> int:
        """``count`` for an image of that patch grid (H, W), for a method whose count depends on its shape."""
        return self.count(num_tokens, grid[0] * grid[1])

    def cost(self, at: BlockSizes) -> Change:
        """The block's closed form: what enters its two halves, and the MACs of the method beside them.

        It restates the arithmetic of the paper and not that of ``count``; the tests hold the two together.

        Raises:
            NotImplementedError: The method has no closed form.
        """
        raise NotImplementedError

    def start_cost(self, num_patches: int, dim: int) -> int:
        """MACs of ``start`` on patches of ``dim`` channels."""
        return 0

    def check_size(self, grid: tuple[int, int]) -> None:
        """Raise a ValueError where ``torch.export`` would fix a size silently, or compute on counts for hours."""
        refuse_open_sides(grid, self.open_sides, f"{self.name} in block {self.block}", "token counts")

    def refuse_packed_recording(self, x: Tensor) -> None:
        """Raise a ValueError if x is recorded, for a block that packs its batch; a graph that counts can do so."""
        if graphs_count():
            return
        refuse_recording(
            x,
            f"{self.name} in block {self.block}: a batch with ragged='packed' is as long as its images need",
            "use ragged='padded', which gives the same result",
        )

    def start(self, x: Tensor, tokens: TokenMap) -> TokenMap:
        """The map to begin with, given the embedded tokens x (B, P+H*W, C) of the full grid."""
        return tokens

    def forward(
        self, x: Tensor, tokens: TokenMap, block: ReducibleBlock, positions: Tensor | None
    ) -> tuple[Tensor, TokenMap]:
        """Run the block, and the method at its places in it: x (B, P+N, C) -> (B, P+K, C) and the map of the K tokens.

        A method fills the places it needs and leaves this one alone.
        """
        x, tokens = self.before(x, tokens)
        x, state = block.attend(x, tokens, positions, self.pick(), self.map_edit())
        x, tokens = self.reduce(x, state.tokens, state)
        note = self.note(state)
        del state  # queries, keys and values need not stay in memory while the MLP runs
        return self.after(block.feedforward(x), tokens, note)

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        """Before the block: x (B, P+N, C) -> (B, P+K, C) that enter it, and their map."""
        return x, tokens

    def pick(self) -> Pick | None:
        """What chooses the query rows that attention computes, see ``effvit.attention``; None for all."""
        return None

    def map_edit(self) -> EditMap | None:
        """What to do with the softmax map before it is applied, or with the tokens; None if the method needs no map."""
        return None

    def reduce(self, x: Tensor, tokens: TokenMap, state: AttnState) -> tuple[Tensor, TokenMap]:
        """x (B, P+N, C) after the attention residual -> (B, P+K, C) that enter the MLP, and their map."""
        return x, tokens

    def note(self, state: AttnState) -> Any:
        """What ``after`` needs to know of the attention, whose queries, keys and values are freed before the MLP."""
        return None

    def after(self, x: Tensor, tokens: TokenMap, note: Any) -> tuple[Tensor, TokenMap]:
        """Behind the block: x (B, P+N, C) -> (B, P+K, C) that leave it, and their map."""
        return x, tokens

    def group(self, features: Tensor, x: Tensor, area: int) -> Groups:
        """Which tokens of each small grid share one in this block, for a host that needs all of them behind it.

        Only for a method that merges as many tokens of every grid, see ``effvit.reducers.grids``.

        Args:
            features: (B*nW, N, D) what the tokens of the grids are compared by, as cosines.
            x: (B, ...) tokens of whole images, of which each has as many grids, for messages.
            area: Tokens that absolute numbers of the settings are meant for; a grid of more merges more in proportion.
        """
        raise NotImplementedError

    def cells(self, grid: Size) -> Size:
        """(h, w) of what ``shrink`` leaves of a grid (H, W).

        Raises:
            ValueError: Settings that do not fit the grid.
        """
        raise NotImplementedError

    def shrink(self, x: Tensor, images: Tensor) -> SmallGrids:
        """Smaller grids in place of x (B*nW, H, W, C), for the blocks of a host until all tokens are needed again.

        Only for a method that leaves a rectangle of every grid, see ``effvit.reducers.grids``.

        Args:
            x: The grids.
            images: (B, ...) tokens of the whole images, of which each has as many grids, for messages.
        """
        raise NotImplementedError

    def restore_macs(self, grid: Size, dim: int) -> int:
        """MACs of the way back from what ``shrink`` made of one grid (H, W) with ``dim`` channels."""
        return 0

    @classmethod
    def groups(cls) -> bool:
        """Whether the method can ``group`` the tokens of small grids."""
        return cls.group is not Reducer.group

    @classmethod
    def shrinks(cls) -> bool:
        """Whether the method can ``shrink`` small grids."""
        return cls.shrink is not Reducer.shrink

    def origin(self, scores: str) -> str:
        """Who computed the scores, for messages."""
        return f"{self.name} in block {self.block}: {scores}"
