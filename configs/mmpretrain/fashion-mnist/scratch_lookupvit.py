# LookupViT (2407.12753) on the shape of vit-nano: 9 compressed tokens; without the second classifier, since mmpretrain's
# TimmClassifier takes one answer.
_base_ = "_base_/four-epochs.py"

model = dict(
    model_name="lookupvit_small_patch16_224",
    img_size=28,
    patch_size=4,
    in_chans=1,
    embed_dim=96,
    num_heads=3,
    compressed_grid=3,
    compressed_pos_grid=3,
    lookup_head=False,
)
