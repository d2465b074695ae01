"""Hosts: timm's plain vision transformers with a reduction method in their blocks, and ``sparsify``.

A host is a subclass of the timm class that adds methods only; an existing model becomes one by copying its
module objects around the same parameters. So state_dict keys, heads, resizing, layer decay and everything else
that timm does with the class go on working, and the model that was given stays as it is.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

import timm
import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices, to_2tuple
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tiny_vit import TinyVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from effvit.block import BlockList, call_block, copy_shared, rehouse, set_child, token_block, with_gradients
from effvit.hosts.closed_form import PlainViT, plain_vit
from effvit.hosts.hiera import ReducedHiera
from effvit.hosts.hieradet import ReducedHieraDet
from effvit.hosts.refusals import is_file_name, is_sharded, reason_against, reason_against_class
from effvit.hosts.sam import ReducedSAM
from effvit.hosts.stages import Stage, map_stage
from effvit.hosts.surface import (
    BlockFeatures,
    Intermediates,
    Reduced,
    check_images,
    patch_grid,
    record_name,
    refuse_mask,
    refuse_open_sizes,
)
from effvit.hosts.swin import ReducedSwin, ReducedSwinV2
from effvit.hosts.tiny_vit import ReducedTinyViT
from effvit.hosts.windows import ReducedWindows, reduce_windows
from effvit.layers.macs import Terms
from effvit.protocols import Layer, PatchEmbedding, Setting, Settings, Size
from effvit.recording import refuse_legacy_onnx
from effvit.recover import FILLS, AttentionRecovery, check_fill, restore, to_grid, unpacked
from effvit.reducers import METHODS, Reducer
from effvit.reducers.keep_rate import HasKeepRate
from effvit.reducers.registry import register_reducer
from effvit.schedule import block_number, check_fraction, check_switch, per_block
from effvit.tokens import LEAST_POLICY, TokenMap, fix_traced_size, flat_rows, take_rows

__all__ = [
    "HOST_CLASSES",
    "ReducedDistilled",
    "ReducedEva",
    "ReducedViT",
    "TokenFeatures",
    "as_host",
    "check_host",
    "check_model_name",
    "list_methods",
    "method_settings",
    "patch_embedding",
    "place_reducers",
    "register_host",
    "sparsify",
]

ReducedT = TypeVar("ReducedT", bound=Reduced)
HostT = TypeVar("HostT", bound=nn.Module)


class TokenFeatures(NamedTuple):
    """Tokens and where they are.

    Attributes:
        x: (B, P+N, C) tokens; padded to the longest image for a method with variable counts.
        tokens: Their TokenMap.
    """

    x: Tensor
    tokens: TokenMap


class AttentionPool(Protocol):
    """timm's attention pooling."""

    def __call__(self, x: Tensor, /, attn_mask: Tensor | None = None) -> Tensor: ...


class ReducedHost(Intermediates, Reduced):
    """What all hosts share: the loop over the blocks and everything that must know the tokens moved.

    Attributes:
        recovery: The trained module of the fill "attention", else None.
        head_reads_patches: The head reads patch tokens although it pools the class token.
        biases_pairs: Attention adds a bias to the logits of each pair of tokens.
        masks_pairs: Attention multiplies the softmax map by a factor for each pair of tokens.
    """

    recovery: AttentionRecovery | None
    head_reads_patches = False
    biases_pairs = False
    masks_pairs = False
    _depth: int  # blocks of the whole host, of which features_only may leave some out
    token_drop: PatchDropoutWithIndices | None

    # What timm's class brings along.
    blocks: BlockList
    patch_embed: PatchEmbedding
    patch_drop: nn.Module
    cls_token: Tensor | None
    norm_pre: Layer
    norm: Layer
    attn_pool: AttentionPool | None
    fc_norm: Layer
    head_drop: Layer
    head: nn.Module
    embed_dim: int
    num_prefix_tokens: int
    global_pool: str
    pool_include_prefix: bool
    grad_checkpointing: bool

    if TYPE_CHECKING:

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...

        def _pos_embed(self, x: Tensor) -> Tensor: ...

        def set_grad_checkpointing(self, enable: bool = True) -> None: ...

    @property
    def packable(self) -> bool:
        """Batches can be packed, see ``AttnState.packable``."""
        return not (self.biases_pairs or self.masks_pairs)

    @property
    def num_class_tokens(self) -> int:
        """Class-like tokens: 1 with a class token, 2 with a distillation token too, else 0."""
        return 0 if self.cls_token is None else 1

    @property
    def reducers(self) -> dict[int, Reducer]:
        """{block: reducer} of the blocks that reduce."""
        return {i: block.reducer for i, block in enumerate(self.blocks) if block.reducer is not None}

    @property
    def variable_length(self) -> bool:
        """Token counts depend on the image."""
        return any(reducer.variable_length for reducer in self.reducers.values())

    def _settle(self) -> None:
        """Make room for token maps in a copy of a dense model, once, before its blocks are replaced."""
        _keep_drop_indices(self)

    # -- what one forward pass does ----------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> tokens (B, P+N, C), and what the blocks share: a rotary table or a bias of pairs."""
        raise NotImplementedError

    def _block_positions(self, positions: Tensor | None, block: int) -> Tensor | None:
        return positions

    def _start(self, x: Tensor, memory: bool, reference: bool = False) -> tuple[Tensor, Tensor | None, TokenMap]:
        self.check_whole()
        check_images(x, self)
        refuse_open_sizes(x, self)
        reducers = list(self.reducers.values())
        if reducers:
            refuse_legacy_onnx(f"a model reduced by {self.method}")
        grid = patch_grid(x, self)
        if getattr(self, "dynamic_img_size", False):
            for reducer in reducers:
                reducer.check_size(grid)
            check_counts(self, grid)
        x, positions = self._embed(x)
        return self._enter(x, positions, grid, memory, reference)

    def _enter(
        self, x: Tensor, positions: Tensor | None, grid: Size, memory: bool, reference: bool
    ) -> tuple[Tensor, Tensor | None, TokenMap]:
        """What enters the first block, of the embedded tokens x (B, P + H*W, C) of a full grid."""
        tokens = TokenMap.full(x, grid, self.num_prefix_tokens, self.num_class_tokens)
        tokens = tokens.remember(x) if memory else tokens
        for reducer in islice(self.reducers.values(), 1):
            tokens = reducer.start(x, tokens)
        if self.token_drop is not None:
            full = x
            index: Tensor | None
            x, index = self.token_drop(x)
            if index is not None:
                tokens = tokens.refer(full) if reference else tokens
                tokens = tokens.keep(index, index.shape[1])
                tokens = replace(tokens, history=tokens.history._replace(present=index))
        return x, positions, tokens

    def _forward_blocks(
        self,
        x: Tensor,
        take: Sequence[int] = (),
        num_blocks: int | None = None,
        memory: bool = False,
        reference: bool = False,
    ) -> tuple[TokenFeatures, list[TokenFeatures]]:
        """The one loop over the blocks.

        Args:
            x: Images (B, 3, H, W).
            take: Blocks whose output is returned too.
            num_blocks: Blocks to run, None for all.
            memory: Let the maps remember dropped patches, for dense recovery by "last" or "attention".
            reference: Let the maps keep the full grid from before the first reduction, for "reconstruct".

        Returns:
            Output of the last block run, and of the blocks in ``take``; packed where the method packs.
        """
        x, positions, tokens = self._start(x, memory, reference)
        taken = []
        for i, block in enumerate(islice(self.blocks, num_blocks)):
            if memory and block.reducer is not None and not block.reducer.keeps_every_patch:
                tokens = self._remember(x, tokens)
            if reference and block.reducer is not None and tokens.reference is None:
                tokens = tokens.refer(x)
            block_positions = self._block_positions(positions, i)
            if self.grad_checkpointing:
                x, tokens = checkpoint(call_block, block, x, tokens, block_positions)
            else:
                x, tokens = call_block(block, x, tokens, block_positions)
            if i in take:
                taken.append(TokenFeatures(x, tokens))
        return TokenFeatures(x, tokens), taken

    def forward_tokens(self, x: Tensor, memory: bool = False, *, block: int | None = None) -> TokenFeatures:
        """Final tokens and their TokenMap, or those of an earlier block.

        Args:
            x: Images (B, 3, H, W).
            memory: Let the map remember the features of dropped patches, which the fills "last" and "attention" need,
                and those of all patches before the first reduction, which "reconstruct" needs.
            block: Number of a block, negative from the last: its tokens are returned, not normalised, and the blocks
                behind it are not run. None: the last block, and the norm behind it.

        Returns:
            Tokens (B, P+N, C) as the block left them, and where they are.

        Raises:
            ValueError: A block that the model does not have.
        """
        if block is None:
            (x, tokens), _ = self._forward_blocks(x, memory=memory, reference=memory)
            return TokenFeatures(*unpacked(self._norm_tokens(x), tokens))
        stop = block_number(block, len(self.blocks)) + 1
        final, _ = self._forward_blocks(x, num_blocks=stop, memory=memory, reference=memory)
        return TokenFeatures(*unpacked(*final))

    def trace_tokens(self, x: Tensor, memory: bool = False) -> list[TokenFeatures]:
        """Tokens (not normalised) and TokenMap after every block, for pictures and statistics."""
        _, taken = self._forward_blocks(x, take=range(len(self.blocks)), memory=memory, reference=memory)
        return [TokenFeatures(*unpacked(*features)) for features in taken]

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """What each reducing block makes of the patches of an image (1, 3, H, W)."""
        trace = self.trace_tokens(x)
        acting = [block for block, reducer in self.reducers.items() if not reducer.serves]
        return [map_stage(trace[block].tokens, block) for block in acting]

    def closed_form(self, size: Size, token_counts: Sequence[int] | None = None) -> Terms:
        """MACs of one image (H, W) by term; ``token_counts`` as for ``effvit.measure.closed_form``."""
        return plain_vit(cast(PlainViT, self), self.patch_embed, size, token_counts)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised tokens (B, P+N, C), made so that timm's ``forward_head`` is exact on them.

        With class-token pooling these are the tokens left. With any other pooling merged tokens are given back
        once for each patch they stand for, so that a mean weights them by size (patches that patch dropout left out are
        in no pool); soft clusters give way to all patches, reconstructed before the norm; padding of images with fewer
        tokens holds their mean.
        """
        refuse_mask(self, attn_mask, is_causal)
        (x, tokens), _ = self._forward_blocks(x)
        return self._finished(x, tokens)

    def _finished(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """What ``forward_features`` returns, of the tokens x that leave the last block."""
        return self._poolable(*self._normalised(x, tokens))

    def _remember(self, x: Tensor, tokens: TokenMap) -> TokenMap:
        """The map that remembers the tokens x which enter a block that drops some."""
        return tokens.remember(x)

    def _norm_tokens(self, x: Tensor) -> Tensor:
        """The norm behind the last block, of prefix and patch tokens."""
        return self.norm(x)

    @property
    def _pools_patches(self) -> bool:
        return self.global_pool != "token" or self.head_reads_patches

    def _normalised(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        """Normalised tokens and their map, soft clusters restored to all patches if the head pools them."""
        if tokens.soft and self._pools_patches:
            x, tokens = restore(x, tokens)
        return unpacked(self._norm_tokens(x), tokens)

    def _poolable(self, x: Tensor, tokens: TokenMap) -> Tensor:
        if not self._pools_patches:
            return x
        if tokens.policy is not None:
            return self._left_alone(x, tokens, tokens.policy)
        if tokens.size is not None:
            prefix, patches = tokens.split(x)  # (B, P, C), (B, N, C)
            return torch.cat([prefix, self._repeated(patches, tokens, tokens.size)], dim=1)
        if tokens.valid is not None:
            mean = self._pooled_mean(x, tokens, tokens.sequence_mask())
            return torch.where(tokens.sequence_mask().unsqueeze(-1), x, mean)
        return x

    def _repeated(self, patches: Tensor, tokens: TokenMap, size: Tensor) -> Tensor:
        """Tokens (B, N, C) of a map with sizes, once for each patch they stand for, and their mean for dropped ones."""
        carriers = tokens.carriers()  # (B, K)
        if tokens.complete:
            return take_rows(patches, flat_rows(carriers, patches.shape[1]))
        weight = size[:, tokens.num_prefix :].unsqueeze(-1).to(patches.dtype)  # (B, N, 1)
        mean = (patches * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)  # (B, 1, C)
        carried = take_rows(patches, flat_rows(carriers.clamp(min=0), patches.shape[1]))
        return torch.where((carriers < 0).unsqueeze(-1), mean, carried)

    def _pooled_mean(self, x: Tensor, tokens: TokenMap, weight: Tensor) -> Tensor:
        """Mean (B, 1, C) of what the head pools of tokens x (B, P+N, C) that have these weights (B, P+N)."""
        weight = weight.unsqueeze(-1).to(x.dtype)  # (B, P+N, 1)
        if not getattr(self, "pool_include_prefix", False):
            x, weight = x[:, tokens.num_prefix :], weight[:, tokens.num_prefix :]
        return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=LEAST_POLICY)

    def _left_alone(self, x: Tensor, tokens: TokenMap, policy: Tensor) -> Tensor:
        """Tokens x (B, P+N, C), those that the policy drops in the mean of the others, so that pools miss them."""
        kept = policy.unsqueeze(-1).to(x.dtype)  # (B, P+N, 1)
        return kept * x + (1 - kept) * self._pooled_mean(x, tokens, policy)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Class scores (B, num_classes) of images (B, 3, H, W)."""
        scores = self._class_scores(x, attn_mask, is_causal)
        return with_gradients(scores, self.recovery) if self.training else scores  # only maps need the recovery

    def _class_scores(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self.global_pool != "map" or self.attn_pool is None:
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        refuse_mask(self, attn_mask, is_causal)
        (x, tokens), _ = self._forward_blocks(x)
        x, tokens = self._normalised(x, tokens)
        return self.token_scores(x, tokens)

    def token_scores(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Class scores (B, num_classes) of normalised tokens x (B, P+N, C), as ``forward_tokens`` returns them."""
        if self.global_pool == "map" and tokens.pool_weight() is not None:
            return self._attention_pooled(x, tokens)
        return self.forward_head(self._poolable(x, tokens))

    def _attention_pooled(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """Class scores by attention pooling of the normalised tokens of a map with sizes or a policy."""
        assert self.attn_pool is not None
        # Attention pooling over merged tokens: a bias of log size equals pooling the un-merged sequence.
        bias = replace(tokens, key_weight=tokens.pool_weight()).key_bias(x.dtype)
        assert bias is not None
        if not getattr(self, "pool_include_prefix", True):
            x, bias = x[:, tokens.num_prefix :], bias[..., tokens.num_prefix :]  # (B, N, C), (B, 1, 1, N)
        return self.head(self.head_drop(self.fc_norm(self.attn_pool(x, attn_mask=bias.to(x.dtype)))))

    def _intermediates(self, x: Tensor, take: Sequence[int], num_blocks: int | None) -> BlockFeatures:
        _, memory, reference = FILLS[self.recover]
        final, taken = self._forward_blocks(x, take, num_blocks, memory, reference)
        patches, prefixes = [], []
        for features in taken:
            y, tokens = unpacked(*features)
            patches.append(to_grid(y, tokens, self.recover, self.recovery))  # (B, H*W, C)
            prefixes.append(tokens.split(y)[0])
        return BlockFeatures(patches, prefixes, final.tokens.grid, lambda: self._finished(*final))

    # -- settings ----------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What the method does, as settings: JSON-plain, defaults included, a copy.

        They follow ``set_keep_rate``, any other change of the reducers, and what ``effvit.calibrate`` learnt.

        Raises:
            ValueError: Reducers changed by hand so that no settings describe them.
        """
        return self._recorded_settings() | METHODS[self.method].learnt_settings(self.reducers, self._depth)

    def _recorded_settings(self) -> Settings:
        """``settings`` without what ``state_dict`` holds."""
        given = super().settings
        planned = METHODS[self.method].plan(self._depth, **given)
        behind = {b: reducer for b, reducer in planned.items() if b >= len(self.blocks)}  # cut off by features_only
        now = self.reducers | behind
        values = {name: _values(now, name) for name in given}
        changed = {name: value for name, value in values.items() if value != _values(planned, name)}
        if not changed and now.keys() == planned.keys():
            return given
        spelt_out = given | {name: _one_or_each(value) for name, value in values.items() if value}
        spelt_out |= (
            {"reduce_at": [b for b, reducer in now.items() if not reducer.serves]} if "reduce_at" in given else {}
        )
        for settings in (given | {name: _one_or_each(value) for name, value in changed.items() if value}, spelt_out):
            if _describes(self.method, self._depth, settings, now):
                return settings
        raise ValueError(
            f"the reducers of this model were changed by hand, and no settings of {self.method} describe them; "
            "make the model you want by effvit.sparsify"
        )

    def token_counts(self, grid: tuple[int, int] | None = None) -> list[int]:
        """Patch tokens leaving each block for an image of that patch grid, largest possible if they depend on it."""
        height, width = grid or self.patch_embed.grid_size
        counts, left = [], height * width
        for block in self.blocks:
            if block.reducer is not None:
                left = block.reducer.count_on(left, (height, width))
            counts.append(left)
        return counts

    def set_keep_rate(self, keep_rate: float | Sequence[float] | None) -> None:
        """Change the keep rate of the reducing blocks, e.g. by a schedule over training.

        Args:
            keep_rate: One rate in (0, 1] for all reducing blocks, or one for each, which ``settings`` then tell; None
                restores the rates the model was made with.

        Raises:
            ValueError: A rate out of range, or a method that has no keep rate.
        """
        self.check_keep_rate()
        reducers = {b: r for b, r in self.reducers.items() if isinstance(r, HasKeepRate)}
        instead = [
            name for name in ("num_tokens", "num_clusters", "min_radius") if self._settings.get(name) is not None
        ]
        if not reducers or instead:
            cause = f"{instead[0]} stands in its place" if instead else "its settings let no block reduce"
            raise ValueError(f"{self.method}: a keep rate would have no effect, no block uses one ({cause})")
        before = {block: reducer.keep_rate for block, reducer in reducers.items()}
        given = per_block("keep_rate", keep_rate, tuple(reducers))
        rates = {
            b: reducers[b].base_keep_rate if r is None else check_fraction("keep_rate", r) for b, r in given.items()
        }
        try:
            for block, rate in rates.items():
                reducers[block].keep_rate = rate
            check_counts(self, self.patch_embed.grid_size)
        except ValueError:
            for block, rate in before.items():
                reducers[block].keep_rate = rate
            raise

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's new classifier, and pooling if one is given that can be applied to the tokens left."""
        super().reset_classifier(num_classes, global_pool)  # type: ignore[misc]
        if self.attn_pool is None:
            set_child(self, "attn_pool", None)

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """timm's resize, if the settings leave tokens on the new grid."""
        new_patch: Size = to_2tuple(patch_size or self.patch_embed.patch_size)
        size: Size = to_2tuple(img_size or self.patch_embed.img_size)
        check_counts(self, (size[0] // new_patch[0], size[1] // new_patch[1]))
        super().set_input_size(img_size, patch_size)  # type: ignore[misc]
        check_counts(self, self.patch_embed.grid_size)  # a hybrid embedding has another grid than its patch size says
        for reducer in self.reducers.values():
            reducer.resize(self.patch_embed.grid_size)


class ReducedViT(ReducedHost, VisionTransformer):
    """timm's ``VisionTransformer`` with a reduction method."""

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.norm_pre(self._pos_embed(self.patch_embed(x))), None


class ReducedDistilled(ReducedHost, VisionTransformerDistilled):
    """timm's ``VisionTransformerDistilled`` with a reduction method."""

    _embed = ReducedViT._embed

    @property
    def num_class_tokens(self) -> int:
        return 2


class ReducedEva(ReducedHost, Eva):
    """timm's ``Eva`` (EVA, EVA02, DINOv3, PE, rope ViTs) with a reduction method."""

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rope = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(fix_traced_size(x, 1)), rope  # a trace holds the rotary table of one grid

    def _block_positions(self, positions: Tensor | None, block: int) -> Tensor | None:
        return positions[block] if self.rope_mixed and positions is not None else positions


HOST_CLASSES: dict[type[nn.Module], type[ReducedHost]] = {
    VisionTransformer: ReducedViT,
    VisionTransformerDistilled: ReducedDistilled,
    Eva: ReducedEva,
}

WINDOW_CLASSES: dict[type[nn.Module], type[ReducedWindows]] = {
    TinyVit: ReducedTinyViT,
    VisionTransformerSAM: ReducedSAM,
    SwinTransformer: ReducedSwin,
    SwinTransformerV2: ReducedSwinV2,
    Hiera: ReducedHiera,
    HieraDet: ReducedHieraDet,
}


def register_host(host_class: type[HostT], reduced_class: type[ReducedHost] | None = None) -> type[HostT]:
    """Let ``sparsify`` take models of a class of your own. It can stand above the class as a decorator.

    Args:
        host_class: A subclass of a class without windows that ``sparsify`` takes, such as timm's ``VisionTransformer``.
        reduced_class: Subclass of ``host_class`` and of the base's reduced class, which runs the blocks. None: it is
            made of the two, which needs a class that leaves the forward pass of its base alone.

    Returns:
        The class.

    Raises:
        TypeError: No subclass of a class that ``sparsify`` takes, one of a class with windows, a class that overrides
            what a reduced model runs in its own way, or a ``reduced_class`` that is no subclass of both.
        ValueError: The class is registered already, with another ``reduced_class``.
    """
    if not isinstance(host_class, type):
        raise TypeError(
            f"register_host takes a class of models, got {type(host_class).__name__}; give the class itself"
        )
    base = next((cls for cls in host_class.__mro__ if cls in HOST_CLASSES), None)
    if base is None and host_class in WINDOW_CLASSES:
        raise TypeError(f"{host_class.__qualname__} has windows and needs no registration: give its models to sparsify")
    if base is None:
        raise TypeError(reason_against_class(host_class, {*HOST_CLASSES, *WINDOW_CLASSES}, WINDOW_CLASSES))
    known = HOST_CLASSES[base]
    if base is host_class:
        if reduced_class not in (None, known):
            raise ValueError(f"{host_class.__qualname__} is registered already, with {known.__qualname__}")
        return host_class
    if reduced_class is None:
        own = {name for cls in host_class.__mro__[: host_class.__mro__.index(base)] for name in vars(cls)}
        run = {name for cls in known.__mro__[: known.__mro__.index(base)] for name in vars(cls) if hasattr(base, name)}
        clash = sorted(name for name in own & run if not name.startswith("__"))
        if clash:
            raise TypeError(
                f"{host_class.__qualname__} overrides {', '.join(clash)}, which a reduced model runs in its own way, "
                "so that its tokens would not be computed as you wrote; give reduced_class, a subclass of "
                f"{known.__qualname__} and {host_class.__qualname__} that does both"
            )
        module = {"__module__": host_class.__module__}
        reduced_class = type(f"Reduced{host_class.__name__}", (known, host_class), module)
    elif not issubclass(reduced_class, known) or not issubclass(reduced_class, host_class):
        raise TypeError(
            f"reduced_class must be a subclass of {known.__qualname__} and {host_class.__qualname__}, got "
            f"{reduced_class.__qualname__}"
        )
    HOST_CLASSES[host_class] = reduced_class
    return host_class


def check_counts(model: ReducedHost, grid: tuple[int, int]) -> None:
    """Raise a ValueError if the settings leave no token in some block for an image of that patch grid.

    On a host that takes images of any size only an image without patches can fail.
    """
    left = grid[0] * grid[1]
    if left < 1:
        raise ValueError(f"the patch grid is {grid[0]} x {grid[1]}: images must hold at least one patch")
    for block, count in enumerate(model.token_counts(grid)):
        if count < 1:
            raise ValueError(
                f"{model.method} would leave {count} of {left} patch tokens in block {block} "
                f"for a patch grid of {grid[0]} x {grid[1]}; reduce less or in fewer blocks"
            )
        left = count


def list_methods(pattern: str = "*") -> list[str]:
    """Names of the reduction methods that match a shell-style pattern."""
    return [name for name in METHODS if fnmatch.fnmatch(name, pattern)]


def _nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def method_settings(method: str) -> Settings:
    """The settings of a method and their defaults.

    Raises:
        ValueError: An unknown method; the message names the nearest.
        TypeError: No name.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, one of {', '.join(METHODS)}, got {method!r}")
    if method not in METHODS:
        known = f"known are {', '.join(METHODS)}"
        raise ValueError(f"unknown method {method!r}; {_nearest(method, tuple(METHODS), known)}")
    return METHODS[method].defaults()


def check_settings(method: str, settings: Mapping[str, object]) -> None:
    """Raise a ValueError for a setting the method does not have, naming the methods that do."""
    known = method_settings(method)
    for name in settings:
        if name in known:
            continue
        owners = [other for other in METHODS if name in METHODS[other].defaults()]
        close = difflib.get_close_matches(str(name), known, n=1)
        owned = f"it belongs to {', '.join(owners)}; " if owners else ""
        if close and not owners:
            owned = f"did you mean {close[0]}? "
        raise ValueError(f"{method} has no setting {name!r}; {owned}{method} takes {', '.join(known)}")


def _plain(value: Setting) -> Setting:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list, range)) else value


def _values(reducers: Mapping[int, Reducer], name: str) -> dict[int, Setting]:
    """{block: value} of a setting that reducers hold under its own name."""
    return {b: _plain(getattr(reducer, name)) for b, reducer in reducers.items() if hasattr(reducer, name)}


def _one_or_each(values: Mapping[int, Setting]) -> Setting:
    """One value if all blocks have the same, else the list of them."""
    first, *others = values.values()
    return first if all(value == first for value in others) else [first, *others]


def _describes(method: str, depth: int, settings: Settings, reducers: Mapping[int, Reducer]) -> bool:
    """True if a model made with the settings does what the reducers {block: reducer} do."""
    try:
        planned = METHODS[method].plan(depth, **settings)
    except (TypeError, ValueError):  # a list whose length is not that of the blocks
        return False
    active = {b: r for b, r in reducers.items() if b in planned or not _is_idle(r)}
    acting = {b: r for b, r in active.items() if not _is_idle(r)}  # an idle one may stand where one only serves another
    return active.keys() == planned.keys() and all(_values(acting, n) == _values(planned, n) for n in settings)


def _is_idle(reducer: Reducer) -> bool:
    """True if all tokens stay, so that ``plan`` would leave the block out."""
    if reducer.serves:
        return all(_is_idle(other) for other in reducer.serves)
    return getattr(reducer, "keep_rate", None) == 1 and getattr(reducer, "r", 0) == 0


def sparsify(
    model: nn.Module | str,
    method: str | type[Reducer],
    *,
    recover: str | None = None,
    share: bool = True,
    **settings: Setting,
) -> ReducedHost | ReducedWindows:
    """A cheaper version of a timm vision transformer that drops, merges or samples tokens as it goes.

    Args:
        model: A timm model or the name of one (then created without pretrained weights; for others call
            ``timm.create_model`` and give the model), plain or with windows (``effvit.hosts.windows``). It may be
            reduced already: its method is replaced. What the reducers have learnt (DyMU's thresholds, parameters of
            a method of your own) and the module ``recovery`` stay where the new ones are of the same method and
            shapes; otherwise a warning names what the new model is without.
        method: One of ``effvit.list_methods()``, or the class of a method, which is registered if it was not.
        recover: How dense maps (``forward_intermediates``, ``features_only``) fill dropped patches, one of
            ``effvit.recover.FILLS``: "last", "nearest", "zero", "reconstruct" or "attention", which is trained and
            adds a module ``recovery``, which a classifier carries along unused. None means what the model has if it is
            reduced by the same method already, else "reconstruct" for Expedite and "last" for the other methods.
            Stages with windows end with full maps: there is nothing to choose.
        share: Share every parameter and buffer with the given model: training either one trains both, and moving or
            casting the new one moves or casts both. False gives the new model copies, as a student needs that learns
            from its teacher.
        settings: Settings of the method in its paper's words, e.g. ``keep_rate`` and ``reduce_at`` for EViT, ATS
            and Zero-TPrune, ``r`` for ToMe, ``num_prop`` for GTP. See ``effvit.method_settings(method)``.

    Returns:
        A new model, on the same parameters and buffers or on copies of them; the given one is left unchanged. timm's
        ``save_for_hf`` and ``push_to_hf_hub`` write what was done to the host, so that ``timm.create_model`` makes the
        same model from the folder, if the host was made by ``timm.create_model``.

    Raises:
        ValueError: Unknown method, model name or setting; a value out of range; a schedule that leaves no token;
            a method that needs a class token on a host without one.
        TypeError: A model, block or attention class whose tokens cannot be reduced correctly.
    """
    if isinstance(method, type):
        method = register_reducer(method).name
    check_settings(method, settings)
    check_switch("share", share)
    dense = _create_host(model) if isinstance(model, str) and not is_file_name(model) else model
    if not isinstance(dense, nn.Module):
        raise TypeError(reason_against(dense, {*HOST_CLASSES, *WINDOW_CLASSES}, WINDOW_CLASSES))
    if recover is None:
        recover = METHODS[method].recover
        if isinstance(dense, Reduced) and dense.method == method:
            recover = dense.recover
    check_fill(recover)
    window_class = type(dense) if isinstance(dense, ReducedWindows) else WINDOW_CLASSES.get(type(dense))
    if window_class is not None:
        if recover != METHODS[method].recover:
            raise ValueError(
                f"every stage of a {window_class.__bases__[-1].__name__} ends with full maps, so there is nothing to "
                f"fill by recover {recover!r}; leave recover out"
            )
        reduced = reduce_windows(dense, window_class, method, settings, share)
        return _described(reduced, dense, method, settings, recover)
    host_class = type(dense) if isinstance(dense, ReducedHost) else HOST_CLASSES.get(type(dense))
    if host_class is None or is_sharded(dense):
        raise TypeError(reason_against(dense, {*HOST_CLASSES, *WINDOW_CLASSES}, WINDOW_CLASSES))
    host = rehouse(copy_shared(dense, share), host_class)
    if not isinstance(dense, ReducedHost):
        host._depth = len(host.blocks)
        host._settle()
    plan = METHODS[method].plan(host._depth, **settings)
    _described(host, dense, method, settings, recover)
    set_child(host, "recovery", _recovery(host) if recover == "attention" else None)
    if not isinstance(dense, ReducedHost):
        for i, block in enumerate(host.blocks):
            host.blocks[i] = token_block(block, i)
    lost = ["recovery"] if host.recovery is None and getattr(dense, "recovery", None) is not None else []
    lost += place_reducers(host, plan)
    check_host(host)
    check_counts(host, host.patch_embed.grid_size)
    if lost:
        warnings.warn(
            f"{dense.method} had learnt {', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''}, which the new model is "
            f"without: {method} with these settings and recover {recover!r} cannot hold it; the given model keeps it",
            stacklevel=2,
        )
    return host


def place_reducers(host: ReducedHost, plan: Mapping[int, Reducer]) -> list[str]:
    """Let {block: reducer} act in the blocks, in place of what acts there; names of what is lost of that."""
    lost: list[str] = []
    for i, block in enumerate(host.blocks):
        former, reducer = block.reducer, plan.get(i)
        set_child(block, "reducer", reducer)
        if reducer is not None:
            reducer.settle(host, i)
            reducer.resize(host.patch_embed.grid_size)
            if former is not None and reducer.take_over(former):
                continue
            reducer.begin_anew()
        if former is not None and former.has_learnt:
            lost += [f"blocks.{i}.reducer.{name}" for name in former.state_dict()]
    return lost


def as_host(dense: nn.Module) -> ReducedHost:
    """A model of a class in HOST_CLASSES with nothing reduced: its blocks and sizes, whatever part of it holds them."""
    host = sparsify(dense, "uniform", recover=None, share=True, **METHODS["uniform"].off())
    assert isinstance(host, ReducedHost)
    return host


def patch_embedding(model: nn.Module) -> PatchEmbedding | None:
    """What cuts images into patches of a known size, whatever part of the model holds it; None where nothing does."""
    own: PatchEmbedding | None = getattr(model, "patch_embed", None)
    if type(model) in HOST_CLASSES and not hasattr(own, "img_size"):
        return as_host(model).patch_embed
    return own


def _described(
    host: ReducedT, dense: nn.Module, method: str, settings: Mapping[str, Setting], recover: str
) -> ReducedT:
    """The host, which now says what was done to the dense model."""
    host.method = method
    host._settings = {name: _plain(value) for name, value in {**METHODS[method].defaults(), **settings}.items()}
    host.recover = recover
    host.host_name = dense.host_name if isinstance(dense, Reduced) else _recorded_name(dense)
    record_name(host)
    host.note_placement()
    return host


def _recorded_name(dense: nn.Module) -> str | None:
    """timm's name of a model that ``timm.create_model`` made; None for others, whose keywords nobody has recorded."""
    cfg = getattr(dense, "pretrained_cfg", None)
    return cfg["architecture"] if cfg and getattr(dense, "_model_args", None) is not None else None


def check_model_name(name: str) -> None:
    """Raise a ValueError, which names the nearest, unless timm knows the model; a tag may follow the name."""
    architecture = name.partition(".")[0]
    if timm.is_model(architecture):
        return
    if is_file_name(name):
        raise ValueError(
            f"{name!r} names a file or a folder, not an architecture; give a name of timm.list_models(), and the "
            "weights apart"
        )
    advice = _nearest(architecture, timm.list_models(), "timm.list_models() has those that there are")
    raise ValueError(f"unknown model {name!r}; {advice}")


def _create_host(name: str) -> nn.Module:
    check_model_name(name)
    return timm.create_model(name)


def _recovery(host: ReducedHost) -> AttentionRecovery:
    """The module of the fill "attention": the one the model has, or a new one with a quarter of its heads."""
    known: AttentionRecovery | None = getattr(host, "recovery", None)
    if known is not None:
        return known
    weight, heads = next(host.parameters()), host.blocks[-1].attn.num_heads
    return AttentionRecovery(
        host.embed_dim, max(1, heads // 4), host.embed_dim // heads, device=weight.device, dtype=weight.dtype
    ).train(host.training)


def _keep_drop_indices(host: ReducedHost) -> None:
    """Move timm's patch dropout behind the embedding, where its choice can enter the TokenMap."""
    drop = getattr(host, "patch_drop", None)  # not of every class
    token_drop = None
    if isinstance(drop, (PatchDropout, PatchDropoutWithIndices)):
        token_drop = PatchDropoutWithIndices(drop.prob, drop.num_prefix_tokens, drop.ordered).train(drop.training)
    set_child(host, "token_drop", token_drop)
    if drop is not None:
        identity = None if isinstance(host, (Eva, NaFlexVit)) else nn.Identity().train(host.training)
        set_child(host, "patch_drop", identity)


def check_host(host: ReducedHost) -> None:
    """Raise a ValueError if the host lacks what the method's scores or its kind of sequence need."""
    if host.recover == "attention" and all(reducer.keeps_every_patch for reducer in host.reducers.values()):
        raise ValueError(
            f"{host.method} with these settings drops no patch, so recover 'attention' would have nothing to learn; "
            f"use recover {METHODS[host.method].recover!r}"
        )
    for reducer in host.reducers.values():
        if reducer.needs_class_token and host.num_class_tokens == 0:
            raise ValueError(
                f"{host.method} scores patches by the class token, but this {type(host).__bases__[-1].__name__} has "
                f"none (num_prefix_tokens={host.num_prefix_tokens}); use a host with one, or a method without that "
                "need such as 'tome' or 'zero_tprune'"
            )
        if getattr(reducer, "ragged", "") == "packed" and not host.packable:
            kind = type(host).__bases__[1].__name__
            has = f"bias of pairs of tokens, as this {kind} has for relative positions"
            if host.masks_pairs:
                has = f"mask behind the softmax, as this {kind} has against reading later tokens"
            raise ValueError(
                f"{host.method} with ragged='packed' runs on kernels for packed batches, which take no {has}; use "
                "ragged='padded'"
            )
        dropping = reducer.variable_length and not reducer.keeps_every_patch
        if dropping and host.global_pool in ("map", "prr"):
            raise ValueError(
                f"{host.method} keeps a different number of tokens for each image, which attention pooling "
                f"(global_pool={host.global_pool!r}) cannot tell from padding; "
                "call reset_classifier(num_classes, 'token') on the host first, or use another method"
            )
