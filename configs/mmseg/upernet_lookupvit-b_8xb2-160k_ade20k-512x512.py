# LookupViT-B (2407.12753) with 10 x 10 compressed tokens. Its abstract names no dense task, and no weights are
# public: the recipe is mmseg's for ViT-B.
_base_ = "upernet_vit-b_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="lookupvit_base_patch16_224", compressed_grid=10, pretrained=False),
)
