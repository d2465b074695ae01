"""A vision tower: a host whose tokens leave at some block, or behind its projector, and what attention says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from torch import Tensor, nn

from effvit.attention import AttnState, Beside, SumMap, sum_beside
from effvit.block import BlockList, ReducibleBlock, rehouse, set_child, token_block
from effvit.hosts.closed_form import PlainViT, block_sizes, entrance, plain_block, positions, run_blocks, scoring
from effvit.hosts.host import HOST_CLASSES, ReducedHost
from effvit.hosts.naflex import Images, ReducedNaFlex
from effvit.hosts.refusals import reason_against
from effvit.hosts.tower_costs import projected_form, tower_block, tower_embedding, tower_positions
from effvit.hosts.towers import ReducedTower
from effvit.layers.macs import Terms
from effvit.protocols import Size
from effvit.reducers.base import Reducer
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.matching import mean_keys
from effvit.schedule import block_number
from effvit.tokens import TokenMap, wide_dtype, wide_product

__all__ = [
    "KEYS",
    "RECEIVED",
    "ROWS",
    "Read",
    "Tower",
    "TowerCost",
    "TowerOutput",
    "attention_received",
    "leaving_block",
    "tower_host",
]

Read = Callable[[AttnState], Tensor]


def class_row_attention(state: AttnState) -> Tensor:
    """(B, N) attention of the class token to the patches, the mean over the heads; the other columns are left out."""
    return state.class_rows()[:, :, 0, state.keys.num_prefix :].mean(dim=1)


def class_logits(state: AttnState) -> Tensor:
    """(B, N) the same before the softmax (GlobalCom2, 2501.05179)."""
    q, k = state.map_factors()
    logits = wide_product(q[:, :, :1], k.transpose(-2, -1))  # (B, heads, 1, P+N)
    logits = logits if state.pairs is None else logits + state.pairs.leading(1)
    return logits[:, :, 0, state.keys.num_prefix :].mean(dim=1)


def one_head_attention(state: AttnState) -> Tensor:
    """(B, N) attention of the class token with all heads taken as one of C channels (PruMerge, 2403.15388).

    Raises:
        ValueError: Relative positions, whose biases belong to single heads.
    """
    if state.pairs is not None:
        raise ValueError(
            "all heads are taken as one, but the relative positions of this tower bias each head in its own way; use "
            "'visionzip' or 'class_attention', which read the heads one by one"
        )
    wide = wide_dtype(state.q.dtype)
    q = state.q[:, :, :1].to(wide).transpose(1, 2).flatten(2)  # (B, 1, C)
    k = state.k.to(wide).transpose(1, 2).flatten(2)  # (B, P+N, C)
    logits = wide_product(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5  # (B, 1, P+N)
    logits = logits if state.bias is None else logits + state.bias[:, 0]
    return logits.softmax(dim=-1)[:, 0, state.keys.num_prefix :]


def attention_received(state: AttnState) -> Tensor:
    """(B, N) attention each patch gets, the mean over heads and queries: the map is summed a piece at a time.

    What class-free towers have in place of a class token (HoliTom, 2505.21334, for SigLIP).
    """
    sums = sum_beside(state, SumMap()).sums
    assert sums is not None
    return sums.received.mean(dim=1)[:, state.keys.num_prefix :] / state.q.shape[2]


def averaged_keys(state: AttnState) -> Tensor:
    """(B, N, D) keys of the patches, the mean over the heads."""
    return mean_keys(state.k)[:, state.keys.num_prefix :]


def joined_keys(state: AttnState) -> Tensor:
    """(B, N, C) keys of the patches, the heads side by side."""
    return state.k.detach().transpose(1, 2).flatten(2)[:, state.keys.num_prefix :].to(wide_dtype(state.k.dtype))


RECEIVED = "received"
"""The name of ``attention_received``, which needs no class token."""

ROWS: dict[str, Read] = {
    "attention": class_row_attention,
    "logits": class_logits,
    "one_head": one_head_attention,
    RECEIVED: attention_received,
}
"""What attention says of the patches, (B, N) by the name that ``Selector.row`` gives."""

KEYS: dict[str, Read] = {"mean": averaged_keys, "joined": joined_keys}
"""Keys of the patches, (B, N, D) by the name that ``Selector.keys`` gives."""


def one_row(at: BlockSizes) -> int:
    """MACs of the class token's row of q k^T, in all heads."""
    return (at.prefix + at.tokens) * at.heads * at.head_dim


READ_MACS: dict[Read, Callable[[BlockSizes], int]] = {
    class_row_attention: lambda at: at.class_rows,
    class_logits: one_row,
    one_head_attention: one_row,
    attention_received: lambda at: at.map_entries * at.head_dim,
    averaged_keys: lambda at: 0,
    joined_keys: lambda at: 0,
}
"""MACs of what is read beside the attention of the block itself."""


class Observer(Reducer):
    """Hands what it reads of a block's attention to whoever runs the tower; all tokens stay."""

    name = "observer"
    summary = "reads the attention of a block"
    cost_term = "selection"

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__()
        self.reads = tuple(reads)

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens

    def cost(self, at: BlockSizes) -> Change:
        macs = sum(READ_MACS[read](at) for read in self.reads)
        return Change(keys=at.tokens, queries=at.tokens, left=at.tokens, macs=macs)

    def note(self, state: AttnState) -> tuple[Tensor, ...]:
        return tuple(read(state).detach() for read in self.reads)

    def after(self, x: Tensor, tokens: TokenMap, note: tuple[Tensor, ...]) -> tuple[Tensor, TokenMap]:
        seen = tokens.carry if isinstance(tokens.carry, tuple) else ()
        return x, replace(tokens, carry=(*seen, *note))


class LastObserver(Observer):
    """An observer of a block behind those the tokens leave: its first norm, queries and keys are all that is made."""

    def forward(
        self, x: Tensor, tokens: TokenMap, block: ReducibleBlock, positions: Tensor | None
    ) -> tuple[Tensor, TokenMap]:
        beside: Beside[AttnState] = Beside()
        block.attn(block._attention_input(x), tokens, positions, beside=beside, attends=False)
        return self.after(x, tokens, self.note(beside.value))


class TowerOutput(NamedTuple):
    """What leaves the blocks of a tower.

    Attributes:
        prefix: (B, P, C) prefix tokens.
        patches: (B, N, C) patch tokens.
        tokens: Their map.
        notes: What was read, in the order of the blocks and of the reads in each.
    """

    prefix: Tensor
    patches: Tensor
    tokens: TokenMap
    notes: tuple[Tensor, ...]


class TowerCost(NamedTuple):
    """What a tower computes for one image.

    Attributes:
        terms: MACs by term, what is read of the attention as "selection".
        grid: (H, W) of the patches.
        left: Patch tokens that leave the last block.
        once: Of the terms, what a batch of images shares: positions that are made for a grid.
    """

    terms: Terms
    grid: Size
    left: int
    once: Terms


def tower_host(model: nn.Module) -> ReducedHost:
    """The model as a host on its own modules, none of which is changed; one that is reduced already stays so.

    Raises:
        TypeError: A model that ``sparsify`` does not take.
    """
    host_class = type(model) if isinstance(model, ReducedHost) else HOST_CLASSES.get(type(model))
    if host_class is None:
        raise TypeError(
            f"{reason_against(model, HOST_CLASSES)}; or run the tower and give what leaves it, merger included, as "
            "tokens= and grid="
        )
    host = rehouse(model, host_class)
    if isinstance(host, ReducedTower) and host.tower is not host:
        set_child(host, "encoder", rehouse(host.tower, type(host.tower)))
    if isinstance(model, ReducedHost):
        return host
    host.method = Observer.name
    host.note_placement()
    host._settle()
    set_blocks(host, [token_block(block, place) for place, block in enumerate(host.blocks)])
    return host


def set_blocks(host: ReducedHost, blocks: Sequence[ReducibleBlock]) -> None:
    """Give the host these blocks in a new container, so that the model it was made of keeps its own."""
    holder = host.tower if isinstance(host, ReducedTower) else host
    container: BlockList = host.blocks[: len(blocks)]
    for place, block in enumerate(blocks):
        container[place] = block
    set_child(holder, "blocks", container)  # type: ignore[arg-type]


def leaving_block(host: ReducedHost, block: int | None) -> int:
    """Number of the block whose output leaves; None: the last one in front of a projector, else the last but one.

    Raises:
        ValueError: A block that the model does not have, or one whose output the projector does not read.
    """
    depth, projects = len(host.blocks), isinstance(host, ReducedTower) and host._projects
    number = block_number((-1 if projects else -2) if block is None else block, depth)
    if projects and number != depth - 1:
        raise ValueError(
            f"the projector of this {type(host).__bases__[-1].__name__} reads the last block, {depth - 1}, got block="
            f"{block}; leave block out, or create the tower without its projector"
        )
    return number


class Tower(nn.Module):
    """A host up to a block, on the modules of the model that it was made of, which stays as it is.

    Attributes:
        merge: Side in patches of the cells that a projector of its own makes one token of; None without one.
        fills_cells: That projector pads a grid that is not cut into whole cells.

    Args:
        host: As ``tower_host`` gives it.
        block: Number of the block whose output leaves. Blocks behind it and behind all that are read are not run, and
            of one that is read behind it only what is read.
        reads: Blocks, counted from 0, or from the last one, -1, and what to read of their attention; the notes are in
            the order of the blocks.

    Raises:
        ValueError: A block that the host does not have, or that reduces tokens itself, so that its attention is not
            that of the tokens that leave.
    """

    def __init__(self, host: ReducedHost, block: int, reads: Sequence[tuple[int, Read]]) -> None:
        super().__init__()
        self.host, self.block = host, block
        self.merge: int | None = None
        self.fills_cells = False
        if isinstance(host, ReducedTower) and host._projects:
            self.merge, self.fills_cells = host.merge, host.fills_cells
        places: dict[int, list[Read]] = {}
        for place, read in reads:
            places.setdefault(block_number(place, len(host.blocks)), []).append(read)
        self.num_notes = len(reads)
        self.stop = max(self.block, *places) + 1 if places else self.block + 1
        self._check_reads(places)
        set_blocks(
            host,
            [
                observed(own, LastObserver if block < place == self.stop - 1 else Observer, places.get(place))
                for place, own in enumerate(host.blocks[: self.stop])
            ],
        )

    def _check_reads(self, places: Mapping[int, object]) -> None:
        """Raise a ValueError unless what is read belongs to the tokens that leave."""
        for place in places:
            early = place < self.block  # of a block in front, all patches must be there, and leave too
            between = range(self.stop) if early else range(min(self.block + 1, place), place + 1)
            reducing = [i for i in between if i in self.host.reducers]
            if reducing:
                raise ValueError(
                    f"scores are read in block {place} and tokens leave block {self.block}, but {self.host.method} "
                    f"reduces tokens in block {reducing[0]}, so that they are scores of other tokens; let it reduce in "
                    "earlier blocks alone, choose another block, or use a method that needs features alone, such as "
                    "'divprune'"
                )

    @property
    def channels(self) -> int:
        """Channels of a token that leaves: those of a patch, or what the tower's own projector makes of them."""
        if self.merge is None:
            return self.host.embed_dim
        assert isinstance(self.host, ReducedTower)
        return projected_form(self.host.tower, (self.merge, self.merge))[1]

    @property
    def reducing(self) -> list[int]:
        """Blocks of the tower in which a method reduces tokens; none of a dense one."""
        return [i for i, reducer in self.host.reducers.items() if not isinstance(reducer, Observer)]

    def cost(self, size: Size) -> TowerCost:
        """MACs of one image (H, W): of the blocks that run, of the last one that is only read what is read, and of the
        tower's own projector.
        """
        host = cast(PlainViT, self.host)
        form: Callable[..., Terms] = plain_block
        if isinstance(self.host, ReducedTower):
            terms, grid = tower_embedding(self.host.tower, size)
            form, once = tower_block, tower_positions(self.host.tower, grid)
        else:
            terms, grid = entrance(host, self.host.patch_embed, size)
            once = positions(host, self.host.patch_embed, grid)
        run = self.stop - 1 if self.block < self.stop - 1 else self.stop
        of_blocks, left, _ = run_blocks(host, host.blocks[:run], grid, None, form)
        terms += of_blocks
        if run < self.stop:
            block, keys = host.blocks[run], host.num_prefix_tokens + left
            terms += scoring(block, keys)
            terms[Observer.cost_term] += self.host.reducers[run].cost(block_sizes(host, block, grid, left)).macs
        if self.merge is not None:
            assert isinstance(self.host, ReducedTower)
            terms += projected_form(self.host.tower, grid)[0]
        return TowerCost(terms, grid, left, once)

    def __repr__(self) -> str:
        method = f", {self.host.method}" if self.reducing else ""
        return f"Tower({type(self.host).__bases__[-1].__name__}{method}, block={self.block})"

    def forward(self, images: Images) -> TowerOutput:
        """What leaves the blocks for images (B, 3, H, W), or for patches of images of one grid (NaFlex)."""
        x = self.host.on_one_grid(images) if isinstance(self.host, ReducedNaFlex) else images
        if isinstance(self.host, ReducedTower) and self.merge is not None:
            self.host._check_cells(x)  # type: ignore[arg-type]
        final, (taken,) = self.host._forward_blocks(x, take=(self.block,))  # type: ignore[arg-type]
        prefix, patches = taken.tokens.split(taken.x)
        carried = final.tokens.carry if isinstance(final.tokens.carry, tuple) else ()
        return TowerOutput(prefix, patches, taken.tokens, carried[len(carried) - self.num_notes :])

    def projected(self, output: TowerOutput) -> Tensor | None:
        """(B, cells, C') what the tower's own projector makes of the patches, all of which are there; None without."""
        if self.merge is None:
            return None
        assert isinstance(self.host, ReducedTower)
        return self.host.project(output.patches, output.tokens.grid)


def observed(block: ReducibleBlock, observer: type[Observer], reads: Sequence[Read] | None) -> ReducibleBlock:
    """The block itself, or where something is read of it one on the same modules with an observer."""
    if reads is None:
        return block
    seen = rehouse(block, type(block))
    set_child(seen, "reducer", observer(reads))
    return seen
