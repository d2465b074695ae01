# STViT (2303.08685) on the shape of vit-nano: 9 semantic tokens after a third of the blocks.
_base_ = "_base_/three-epochs.py"

model = dict(
    model_name="stvit_deit_tiny_patch16_224",
    img_size=28,
    patch_size=4,
    in_chans=1,
    embed_dim=96,
    num_heads=3,
    semantic_grid=3,
)
