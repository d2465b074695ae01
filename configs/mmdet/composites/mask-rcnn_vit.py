# Dense: a small plain ViT with patches of 8 pixels, from random weights. Its neck is mmdet's FPN on one map. No norm
# lies between blocks and heads: under those of out_norm and of ViTDet's neck the heads stay at chance in so short a
# training.
_base_ = "_base_/mask-rcnn_composites.py"

strides = [8, 16, 32]

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="deit_tiny_patch16_224",
        patch_size=8,
        embed_dim=128,
        depth=8,
        num_heads=4,
        img_size=128,
        out_indices=(7,),
    ),
    neck=dict(_delete_=True, type="FPN", in_channels=[128], out_channels=64, num_outs=len(strides)),
    rpn_head=dict(anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        mask_roi_extractor=dict(featmap_strides=strides),
    ),
)
