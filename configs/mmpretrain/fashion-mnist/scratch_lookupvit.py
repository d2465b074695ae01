# LookupViT (2407.12753) on the shape of vit-nano: 9 compressed tokens; a loss for each of its two classifiers.
_base_ = "_base_/three-epochs.py"

custom_imports = dict(imports=["effvit.dense.openmmlab", "effvit.dense.classifiers"], allow_failed_imports=False)

model = dict(
    type="EffViTClassifier",
    model_name="lookupvit_small_patch16_224",
    img_size=28,
    patch_size=4,
    in_chans=1,
    embed_dim=96,
    num_heads=3,
    compressed_grid=3,
    compressed_pos_grid=3,
)
