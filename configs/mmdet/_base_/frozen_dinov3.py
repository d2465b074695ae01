# A frozen DINOv3 ViT-S/16 (2508.10104) as the backbone of a detector, and an optimizer for the rest: that of ViTDet
# (vitdet_recipe.py) without rates by layer. hsouri/bob-detection@c622b27 (2310.19909) freezes the backbones of ViTDet
# likewise and tries rates of 8e-5 to 3e-4. DINOv3's own detector is a DETR.
frozen_dinov3 = dict(
    _delete_=True,
    type="EffViT",
    model_name="vit_small_patch16_dinov3.lvd1689m",
    out_indices=(11,),
    final_norm=True,
    frozen=True,
    pretrained=True,
)
frozen_optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="TrainedOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
