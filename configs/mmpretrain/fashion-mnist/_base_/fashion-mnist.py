# Fashion-MNIST (1708.07747) as `python tools/get_data.py fashion_mnist` unpacks it; link or copy it to
# data/fashion_mnist. DeiT's optimiser (mmpretrain's schedule) over 24 epochs for two cores; augmentation and learning
# rate are our choice.
_base_ = ["mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py", "mmpretrain::_base_/default_runtime.py"]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    type="TimmClassifier",
    model_name="vit_nano_patch4_28",
    num_classes=10,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    data_preprocessor=dict(num_classes=10, mean=[72.93], std=[90.015]),
    train_cfg=dict(augments=dict(type="CutMix", alpha=1.0), probs=0.3),
)

data = dict(type="FashionMNIST", data_prefix="data/fashion_mnist/FashionMNIST/raw", download=False)
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **data,
        test_mode=False,
        pipeline=[
            dict(type="RandomCrop", crop_size=28, padding=2),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(**data, test_mode=True, pipeline=[dict(type="PackInputs")]),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=1)
test_evaluator = val_evaluator

optim_wrapper = dict(
    type="BFloat16OptimWrapper",
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys={"cls_token": dict(decay_mult=0.0), "pos_embed": dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(base_batch_size=128)
train_cfg = dict(by_epoch=True, max_epochs=24, val_interval=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=2, end=24, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
