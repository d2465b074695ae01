# SiT (2111.12624) on the shape of vit-nano: 24 of 49 patch tokens after half of the blocks, then 12 and 6; without
# distillation.
_base_ = "_base_/three-epochs.py"

model = dict(
    model_name="sit_lvvit_tiny_224",
    stem="patch",
    img_size=28,
    patch_size=4,
    in_chans=1,
    embed_dim=96,
    depth=12,
    num_heads=3,
    stage_blocks=[6, 2, 2, 2],
)
