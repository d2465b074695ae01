"""timm's transformer blocks with one slot for a reducer: tokens and their map -> the tokens left and theirs.

A block offers a reducer its two halves, ``attend`` and ``feedforward``, and knows nothing of any method.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar, overload

from timm.layers import DropPath
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from effvit.attention import (
    ATTENTION_CLASSES,
    AttnState,
    Beside,
    EditMap,
    Pick,
    Pooled,
    PoolMap,
    PoolTokens,
    TokenAttention,
)
from effvit.protocols import Layer
from effvit.tokens import TokenMap, take_rows

if TYPE_CHECKING:
    from effvit.reducers.base import Reducer

__all__ = [
    "BLOCK_CLASSES",
    "BlockList",
    "ReducibleBlock",
    "call_block",
    "copy_shared",
    "rehouse",
    "set_child",
    "token_block",
    "with_gradients",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_model(model: object) -> None:
    """Raise a TypeError for what is no model, such as its name."""
    if not isinstance(model, nn.Module):
        remedy = "; timm.create_model makes one of a name" if isinstance(model, str) else ""
        raise TypeError(f"expected a model, an nn.Module, got {type(model).__name__}{remedy}")


class BlockList(Protocol):
    """The blocks of a reduced model, in order."""

    def __iter__(self) -> Iterator[ReducibleBlock]: ...

    @overload
    def __getitem__(self, i: int, /) -> ReducibleBlock: ...

    @overload
    def __getitem__(self, i: slice, /) -> BlockList: ...

    def __setitem__(self, i: int, block: nn.Module, /) -> None: ...

    def __len__(self) -> int: ...


def copy_shared(model: ModuleT, share: bool = True) -> ModuleT:
    """A copy of the model that shares all parameters and buffers; with ``share=False`` one that has its own.

    The position biases that timm's TinyViT and LeViT keep between forward passes are left out: they may have gradients,
    and then cannot be copied.
    """
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            memo[id(module.attention_bias_cache)] = {}
    return copy.deepcopy(model, memo)


def rehouse(module: nn.Module, cls: type[ModuleT]) -> ModuleT:
    """A new object of ``cls`` with the state of ``module``: same parameters, children, hooks and settings.

    ``cls`` must add methods only. The object given is left as it was; containers are copied one level deep, so
    replacing a child of the new one does not touch the old.
    """
    new = cls.__new__(cls)
    value: object
    for name, value in module.__dict__.items():
        new.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    return new


def set_child(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Set an optional child; None leaves a plain attribute.

    ``nn.Module`` would keep a None among the children once the slot was registered, and printers that walk ``_modules``
    (``fvcore.nn.flop_count_str``, DeepSpeed's profiler in timm's benchmark.py) fail on it.
    """
    parent._modules.pop(name, None)
    setattr(parent, name, child)


class ReducibleBlock(nn.Module):
    """The forward pass shared by the block classes; a subclass supplies the two residual branches."""

    reducer: Reducer | None

    # What timm's class brings along.
    attn: TokenAttention
    norm1: Layer
    norm2: Layer
    mlp: Layer
    drop_path1: Layer

    # Whether the norms stand behind attention and MLP, not before them.
    post_norm = False

    def _attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def _attention_branch(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _mlp_branch(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(
        self,
        x: Tensor,
        tokens: TokenMap,
        positions: Tensor | None = None,
        pick: Pick | None = None,
        edit_map: EditMap | None = None,
    ) -> tuple[Tensor, AttnState]:
        """First half of the block: x plus its attention branch.

        Args:
            x: (B, P+N, C) tokens; (1, T, C) packed.
            tokens: Their map.
            positions: What the host knows of positions for this block, see ``effvit.attention.TokenAttention.forward``.
            pick: Chooses the query rows that go on, see ``attention``.
            edit_map: Receives the softmax map, see ``attention``.

        Returns:
            The tokens that go on, (B, P+K, C), and the AttnState, whose ``tokens`` is their map.
        """
        if tokens.packed and self.training and isinstance(self.drop_path1, DropPath):
            raise ValueError(
                "a packed batch is one row, so drop_path cannot drop single images from it; "
                "train with ragged='padded' (batching='padded' of a NaFlexVit) or with drop_path_rate=0"
            )
        if isinstance(edit_map, PoolTokens):
            if edit_map.pools(tokens):
                return self._attend_pooled(x, tokens, positions, edit_map)
            edit_map = None
        beside: Beside[AttnState] = Beside()
        y = self.attn(self._attention_input(x), tokens, positions, pick, edit_map, beside)
        state = beside.value
        if state.rows is not None:
            x = take_rows(x, state.rows)
        return x + self._attention_branch(y), state

    def _attend_pooled(
        self, x: Tensor, tokens: TokenMap, positions: Tensor | None, pooling: PoolTokens
    ) -> tuple[Tensor, AttnState]:
        """``attend`` of tokens that are pooled on the way."""
        beside: Beside[AttnState] = Beside()
        if not pooling.maps:
            self.attn(self._attention_input(x), tokens, positions, beside=beside, attends=False)
            x, tokens, _ = pooling.pool(x, beside.value)
            return self.attend(x, tokens, positions)
        left: Beside[Tensor] = Beside()

        def pool(state: AttnState) -> Pooled:
            pooled = pooling.pool(x, state)
            left.value = pooled.x
            return pooled._replace(x=self._attention_input(pooled.x))

        y = self.attn(self._attention_input(x), tokens, positions, None, PoolMap(pool), beside)
        return left.value + self._attention_branch(y), beside.value

    def feedforward(self, x: Tensor) -> Tensor:
        """Second half of the block: x plus its MLP branch, (B, P+N, C) -> (B, P+N, C)."""
        return x + self._mlp_branch(self.mlp(self.norm2(x)))

    def forward(
        self,
        x: Tensor,
        tokens: TokenMap | None = None,
        positions: Tensor | None = None,
        beside: Beside[TokenMap] | None = None,
    ) -> Tensor:
        """One block on the tokens x (B, P+N, C), whose map is ``tokens``; see ``call_block``.

        Args:
            x: (B, P+N, C) tokens; (1, T, C) packed.
            tokens: Their map.
            positions: What the host knows of positions for this block, see ``effvit.attention.TokenAttention.forward``.
            beside: Takes the map of the K tokens left.

        Returns:
            (B, P+K, C).

        Raises:
            TypeError: No map, as in timm's ``model.blocks(x)``.
        """
        if tokens is None:
            raise TypeError(
                "a block of a reduced model needs the TokenMap of its tokens, so model.blocks(x) and loops over the "
                "blocks do not work; call model.trace_tokens(images) for the tokens behind every block, "
                "model.forward_tokens(images) for the last, or model.forward_intermediates(images) for maps"
            )
        reducer = self.reducer
        if reducer is not None:
            x, tokens = reducer(x, tokens, self, positions)
        else:
            x = self.attend(x, tokens, positions)[0]  # dropping the state frees q, k and v before the MLP runs
            x = self.feedforward(x)
        if beside is not None:
            beside.value = tokens
        return x


class TokenBlock(ReducibleBlock, Block):
    """timm's ViT ``Block`` for token maps."""

    ls1: Layer
    ls2: Layer
    drop_path2: Layer

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(y))

    def _mlp_branch(self, y: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(y))


class EvaTokenBlock(ReducibleBlock, EvaBlock):
    """timm's ``EvaBlock`` (LayerScale as plain parameters) for token maps."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None
    drop_path2: Layer

    def _attention_branch(self, y: Tensor) -> Tensor:
        return self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)

    def _mlp_branch(self, y: Tensor) -> Tensor:
        return self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


BLOCK_CLASSES: dict[type[nn.Module], type[ReducibleBlock]] = {Block: TokenBlock, EvaBlock: EvaTokenBlock}


def call_block(
    block: nn.Module, x: Tensor, tokens: TokenMap, positions: Tensor | None = None
) -> tuple[Tensor, TokenMap]:
    """One block on the tokens x (B, P+N, C) of the map: (B, P+K, C) and the map of the K tokens left."""
    beside: Beside[TokenMap] = Beside()
    x = block(x, tokens, positions, beside)
    return x, beside.value


def token_block(block: nn.Module, position: int) -> ReducibleBlock:
    """The block rehoused for token maps, with an empty reducer slot.

    Raises:
        TypeError: A block or attention class without a place between attention and MLP to reduce tokens at, or
            one this package does not know. Computing something near it would be silently wrong.
    """
    known = BLOCK_CLASSES.get(type(block))
    if known is None:
        raise TypeError(
            f"blocks.{position} is a {type(block).__name__}, which token reduction does not know; "
            f"supported are {', '.join(cls.__name__ for cls in BLOCK_CLASSES)}: choose a host built from them"
        )
    attn = block.attn
    assert isinstance(attn, nn.Module)
    known_attn = ATTENTION_CLASSES.get(type(attn))
    if known_attn is None:
        raise TypeError(
            f"blocks.{position}.attn is a {type(attn).__name__}, which token reduction does not know; "
            f"supported are {', '.join(cls.__name__ for cls in ATTENTION_CLASSES)}: choose a host built from them"
        )
    new = rehouse(block, known)
    new.attn = rehouse(attn, known_attn)
    set_child(new, "reducer", None)
    return new


def with_gradients(x: Tensor, module: nn.Module | None) -> Tensor:
    """``x`` as it is, through which the parameters of a module that had no part in it get a gradient of zero.

    For modules that only serve maps, in a model that trains as a classifier: DistributedDataParallel stops at the
    second step of a model with parameters that get no gradient. No value of a parameter is read.
    """
    for parameter in () if module is None else module.parameters():
        if parameter.requires_grad:
            x = x + parameter[:0].sum()
    return x
