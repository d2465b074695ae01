# EViT (2202.07800): 70 % of the patches stay after blocks 4, 7 and 10, the setting of its tables.
# Pyramid and rates by layer as for Mask R-CNN on plain ViTs, pictures and heads as for Swin.
_base_ = "_base_/cascade-mask-rcnn_3x.py"

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="evit_vit_base_patch16_224",
        keep_rate=0.7,
        reduce_at=(3, 6, 9),
        out_indices=(11,),
        drop_path_rate=0.1,
        pretrained=True,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5),
)
optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.7, bias_decay_mult=1.0),
)
