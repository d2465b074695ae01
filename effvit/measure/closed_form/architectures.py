"""Closed forms of the architectures, from the equations of their papers as ``effvit.architectures`` reads them."""

from __future__ import annotations

from typing import Any

from torch import nn

from effvit.architectures.dumbbell import DumbbellUnit, GroupBlock, SemanticLayers
from effvit.architectures.semantic_tokens import SemanticBlock
from effvit.layers.windows import live_cells
from effvit.measure.closed_form.hosts import attend, classifier, embedding, feedforward, plain_block, window_block
from effvit.measure.closed_form.terms import Size, Terms, attention, convolutions, layers, norm, windows
from effvit.recover import RestoreBlock

__all__ = ["casvit", "lookupvit", "sit", "stvit", "stvit_swin", "supertoken"]


def cross_block(block: Any, queries: int, keys: int, pairs: int | None = None, normed: int | None = None) -> Terms:
    """A ``CrossBlock``; ``pairs`` if not every query sees every key, ``normed`` if not both sets are normalised."""
    terms = norm(block.norm1, queries + keys if normed is None else normed)
    terms += layers("projection", block.attn.q, queries) + layers("projection", block.attn.kv, keys)
    terms += attention(queries * keys if pairs is None else pairs, block.attn.q.out_features)
    return terms + layers("projection", block.attn.proj, queries) + feedforward(block, queries)


def seeds(pool: Any, grid: Size, out: Size, number: int = 1) -> Terms:
    """Pooling of ``number`` grids onto smaller ones: by maximum for None, or learned."""
    if pool is None:
        return Terms()
    terms = layers("pooling", pool, number * grid[0] * grid[1])
    points = out[0] * -(-grid[0] // out[0]) * out[1] * -(-grid[1] // out[1])
    # Bilinear samples, of four weights each, of the offsets, and then of the channels and the mask.
    terms["pooling"] += number * points * 4 * (2 + pool.conv.in_channels + 1)
    return terms


def stvit(model: Any, size: Size) -> Terms:
    """STViT on DeiT (2303.08685): semantic tokens generated from all patches, then alone."""
    terms, (height, width) = embedding(model.patch_embed, size)
    patches, semantic = height * width, model.semantic_grid[0] * model.semantic_grid[1]
    for i, block in enumerate(model.blocks):
        layer = i - model.num_base
        if layer == 0:
            terms += seeds(block.pool, (height, width), block.out) + cross_block(block, semantic, patches)
        elif 0 < layer < model.num_stgm:
            terms += cross_block(block, semantic, semantic + patches, normed=2 * semantic + patches)
        else:
            terms += plain_block(block, patches if layer < 0 else semantic)
    if model.recovery is not None:
        terms += cross_block(model.recovery, patches, semantic)
    return terms + classifier(model, semantic if model.recovery is None else patches, patches)


def stvit_swin(model: Any, size: Size) -> Terms:
    """STViT-R and STViT on Swin (2303.08685): semantic tokens of each window in the third stage."""
    size = -(-size[0] // 4) * 4, -(-size[1] // 4) * 4
    terms, size = convolutions("embedding", model.stem, size)
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            size = -(-size[0] // 2), -(-size[1] // 2)
            terms += layers("embedding", stage.downsample, size[0] * size[1])
        for block in stage.blocks:
            if isinstance(block, DumbbellUnit):
                terms += window_block(block.block, size)
                more, semantic = semantic_layers(block.semantic, size)
                terms += more + recovery(block.recover, size, semantic)
            elif isinstance(block, SemanticLayers):
                more, size = semantic_layers(block, size)
                terms += more
            else:
                terms += group_block(block, size) if isinstance(block, GroupBlock) else window_block(block, size)
    final = model.norm if model.out_norms is None else model.out_norms[-1]
    return terms + norm(final, size[0] * size[1]) + pooled_head(model.head, size)


def semantic_layers(module: SemanticLayers, size: Size) -> tuple[Terms, Size]:
    """Two layers that generate semantic tokens of a map of image tokens, and the blocks on them; and their grid."""
    first: Any = module.stgm1
    samples, window = first.window, first.stride
    number = windows(size, window)
    if first.mask_mode == "correct":
        grid = live_cells(size[0], window, samples), live_cells(size[1], window, samples)
    else:
        grid = -(-size[0] // window) * samples, -(-size[1] // window) * samples
    tokens, patches = grid[0] * grid[1], size[0] * size[1]
    terms = seeds(first.pool, (window, window), (samples, samples), number)
    if first.conv_pos is not None:
        terms += layers("pooling", first.conv_pos, number * samples**2)
    if first.key_form == "dense":
        terms += window_cross(first, grid, size) + window_cross(module.stgm2, grid, size)
    else:
        kernel = first.CLS_KERNEL if first.key_form == "cls" else first.kernel
        near = min(kernel, size[0]) * min(kernel, size[1])
        pairs = number * samples**2 * (samples**2 + near)
        terms += cross_block(first, tokens, tokens + patches, pairs, normed=tokens + patches)
        assert isinstance(module.stgm2, SemanticBlock)
        terms += cross_block(module.stgm2, tokens, tokens + patches, normed=2 * tokens + patches)
    for block in module.blocks:
        terms += group_block(block, grid)
    return terms, grid


def window_cross(block: Any, queries: Size, keys: Size) -> Terms:
    """A ``WindowCrossBlock``: by windows, or on the whole map of keys if that has fewer pairs."""
    tokens, others = queries[0] * queries[1], keys[0] * keys[1]
    pairs = windows(queries, block.window) * block.window**2 * block.kernel**2
    outside = Terms()
    if block.mask_mode == "correct":
        pairs = min(pairs, tokens * others)
    else:  # all that is outside has one key and one value
        outside = norm(block.norm1, 1) + layers("projection", block.attn.kv, 1)
    return cross_block(block, tokens, others, pairs) + outside


def group_block(block: Any, grid: Size) -> Terms:
    """Self-attention of semantic tokens, of all or of those of a window."""
    tokens = grid[0] * grid[1]
    pairs = tokens**2 if block.samples is None else windows(grid, block.samples) * block.samples**4
    return cross_block(block, tokens, tokens, pairs, normed=tokens)


def recovery(block: Any, size: Size, semantic: Size) -> Terms:
    """Image tokens asked back from the semantic tokens."""
    if isinstance(block, RestoreBlock):
        return window_cross(block, size, semantic)
    return cross_block(block, size[0] * size[1], semantic[0] * semantic[1])


def pooled_head(head: Any, size: Size) -> Terms:
    """timm's ClassifierHead on a map: the mean over all positions, then its linear layers."""
    terms = layers("head", head, 1)
    if head.global_pool.pool_type == "avg":
        terms["pooling"] += size[0] * size[1] * head.in_features
    return terms


def supertoken(model: Any, size: Size) -> Terms:
    """Super-token ViT (2211.11167): attention between the soft superpixels of a map."""
    terms, size = convolutions("embedding", model.stem, size)
    for stage in model.stages:
        more, size = convolutions("embedding", stage.downsample, size)
        terms += more
        pixels = size[0] * size[1]
        for block in stage.blocks:
            cell = block.attn.cell
            terms += layers("embedding", block.pos_embed, pixels) + norm(block.norm1, pixels)
            tokens = pixels if cell == (1, 1) else windows(size, cell)
            terms += attend(block.attn.refine, tokens, tokens) + feedforward(block, pixels)
            if cell != (1, 1):
                # Nine super tokens a pixel: association in each round, new tokens in each, and the way back.
                products = 2 * block.attn.n_iter + 1
                terms["association"] += products * 9 * tokens * cell[0] * cell[1] * block.norm1.normalized_shape[0]
    terms += layers("head", model.proj, size[0] * size[1]) + norm(model.norm, size[0] * size[1])
    return terms + pooled_head(model.head, size)


def lookupvit(model: Any, size: Size) -> Terms:
    """LookupViT (2407.12753): M compressed tokens that gather from N patches and infuse back into them."""
    terms, grid = embedding(model.patch_embed, size)
    patches, dim = grid[0] * grid[1], model.embed_dim
    rows, columns = model.compressed_grid
    compressed = rows * columns
    for height, width in (grid, model.compressed_pos_grid):  # a resize is a product by rows, then one by columns
        terms["embedding"] += rows * width * dim * (height + columns)
    for i, block in enumerate(model.blocks):
        cross = block.cross
        terms += norm(block.norm_p, compressed) + norm(block.norm_l, patches) + attention(compressed * patches, dim)
        for layer, tokens in ((cross.q, compressed), (cross.k, patches), (cross.v, patches), (cross.proj, compressed)):
            terms += layers("projection", layer, tokens)
        terms += plain_block(block, compressed)
        if i < len(model.blocks) - 1:  # nothing reads the patches of the last block
            terms += norm(block.norm_c, compressed) + layers("projection", block.infuse.v, compressed)
            terms["attention"] += compressed * patches * dim
            terms += layers("projection", block.infuse.proj, patches)
            terms += norm(block.norm3, patches) + layers("mlp", block.mlp_lookup, patches)
    return terms + norm(model.norm, compressed) + layers("head", model.head, 1)


def sit(model: Any, size: Size) -> Terms:
    """SiT (2111.12624): between stages, N tokens are mixed into K."""
    terms, grid = embedding(model.patch_embed, size)
    left, prefix = grid[0] * grid[1], model.num_prefix_tokens
    for i, block in enumerate(model.blocks):
        if i in model.slim_before:
            stage = model.slim_before[i]
            terms += layers("reduction", model.slimming[stage], left)
            terms["reduction"] += left * model.num_tokens[stage] * model.embed_dim
            left = model.num_tokens[stage]
        terms += plain_block(block, prefix + left)
    return terms + classifier(model, left, left)


def casvit(model: Any, size: Size) -> Terms:
    """CAS-ViT (2408.03703): gates and depthwise convolutions in place of the attention map."""
    terms, size = convolutions("embedding", model.stem, size)
    for stage in model.stages:
        more, size = convolutions("embedding", stage.downsample, size)
        terms += more
        pixels = size[0] * size[1]
        for block in stage.blocks:
            terms += layers("local", block.local, pixels) + norm(block.norm1, pixels)
            attn = block.attn
            for part in (attn.qkv, attn.gates_q.spatial, attn.gates_k.spatial, attn.dwconv, attn.proj):
                terms += layers("attention", part, pixels)
            for gates in (attn.gates_q, attn.gates_k):
                terms += layers("attention", gates.channel, 1)
                terms["pooling"] += pixels * attn.proj.in_channels
            terms += feedforward(block, pixels)
    return terms + norm(model.norm, size[0] * size[1]) + pooled_head(model.head, size)
