# Objects on photographs (tools/data/scenes.py), made on the spot of what `python tools/get_data.py emoji fashion_mnist
# photographs` fetches; no image is shown twice, so "epoch" means 20,480 images. The learning rate is constant after the
# warm-up: a run can be prolonged (--cfg-options train_cfg.max_epochs=...) and resumed at any epoch, and
# vit-nano_cutouts_cooldown.py lowers the rate from any checkpoint of it.
_base_ = ["mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py", "mmpretrain::_base_/default_runtime.py"]

custom_imports = dict(imports=["effvit.dense.openmmlab", "data.mmpretrain_sets"], allow_failed_imports=False)

model = dict(
    type="PatchTaughtClassifier",
    model_name="vit_nano_patch8_96",
    num_classes=25,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    data_preprocessor=dict(num_classes=25, mean=[127.5, 127.5, 127.5], std=[63.75, 63.75, 63.75]),
)

load_from = "work_dirs/vit-nano_start.pth"  # tools/start_weights.py vit_nano_patch8_96 --like vit_nano_patch4_28

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type="FreshSampler"),
    dataset=dict(type="CutoutScenes", split="train", length=20_480, data_root=None, exchange_colours=0.5, patch_size=8),
)
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CutoutScenes", split="test", length=4000, data_root=None),
)
test_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CutoutScenes", split="test", length=10_000, data_root=None),
)
val_evaluator = dict(type="Accuracy", topk=1)
test_evaluator = val_evaluator

optim_wrapper = dict(
    type="BFloat16OptimWrapper",
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys={"cls_token": dict(decay_mult=0.0), "pos_embed": dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(base_batch_size=64)
train_cfg = dict(by_epoch=True, max_epochs=27, val_interval=4)
param_scheduler = [dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=160)]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=1, max_keep_ckpts=3))
randomness = dict(seed=0)
