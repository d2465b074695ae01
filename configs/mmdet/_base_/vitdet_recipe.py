# Backbone and optimizer of ViTDet (2203.16527; detectron2 projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py and
# configs/common/optim.py): AdamW, rate 1e-4, weight decay 0.1 but for norms and position embeddings, rates that fall by
# 0.7 a layer, 250 warm-up iterations.
# There the batch is 64 and training takes 100 epochs; schedule and batch of 16 here are mmdet's.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.7, bias_decay_mult=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
vit_backbone = dict(
    _delete_=True,
    type="EffViT",
    model_name="deit_small_patch16_224",
    out_indices=(11,),
    drop_path_rate=0.1,
    pretrained=True,
)
