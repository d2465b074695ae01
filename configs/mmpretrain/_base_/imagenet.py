# ImageNet-1k with the augmentation of Swin and DeiT (RandAugment 9, erasing 0.25, Mixup 0.8, CutMix 1.0, smoothing
# 0.1), AdamW at 1e-3 for 1024 pictures, 300 epochs of which 20 warm up: mmpretrain's own files. Pictures lie in
# data/imagenet/{train,val} as mmpretrain has them.
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab", "effvit.dense.classifiers"], allow_failed_imports=False)

model = dict(
    type="EffViTClassifier",
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    data_preprocessor=dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)
train_dataloader = dict(batch_size=128)
