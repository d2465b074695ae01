# SiT-S from its dense teacher (2111.12624): exp/sit_lvvit_small/train.sh and main.py of Sense-X/SiT@f577808. 125
# epochs and 10 more at the lowest rate, which is set once an epoch; the reverse modules learn five times as fast. The
# teacher is the official LV-ViT-S:
#   effvit convert official.pth --model lvvit_small_4c_224 --out checkpoints/lvvit_small_4c_224.safetensors
_base_ = "_base_/deit.py"

model = dict(
    type="SiTClassifier",
    model_name="sit_lvvit_small_224",
    teacher=dict(model_name="lvvit_small_4c_224", pretrained="checkpoints/lvvit_small_4c_224.safetensors"),
    token_weight=2.0,
    distill_weight=2.0,
    temperature=1.0,
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4 * 1024 / 512), paramwise_cfg=dict(custom_keys={"model.reverse": dict(lr_mult=5.0)})
)
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=125)]
train_cfg = dict(max_epochs=135)
