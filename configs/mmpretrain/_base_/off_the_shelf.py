# Evaluation on ImageNet-1k of methods that need no training: python tools/test.py CONFIG. Pictures are resized to 256
# and cropped to 224, as DeiT is evaluated.
_base_ = ["mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py", "mmpretrain::_base_/default_runtime.py"]

custom_imports = dict(imports=["effvit.dense.classifiers"], allow_failed_imports=False)

model = dict(
    type="EffViTClassifier",
    pretrained=True,
    data_preprocessor=dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
)
train_dataloader = None
val_dataloader = None
val_evaluator = None
test_cfg = dict()
