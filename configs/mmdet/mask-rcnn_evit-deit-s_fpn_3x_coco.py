# The schedule of mmdet's 3x: 36 epochs, steps at 27 and 33.
_base_ = "mask-rcnn_evit-deit-s_fpn_1x_coco.py"

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
