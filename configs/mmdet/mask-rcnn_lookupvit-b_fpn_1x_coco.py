# LookupViT-B (2407.12753) with 10 x 10 compressed tokens, its largest setting; maps are its lookup tokens. Its
# abstract names no dense task, and no weights are public: the recipe is that of plain ViTs.
_base_ = "_base_/mask-rcnn_vit.py"

model = dict(
    backbone=dict(model_name="lookupvit_base_patch16_224", compressed_grid=10, pretrained=False),
    neck=dict(in_channels=768),
)
