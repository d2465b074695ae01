# A linear classifier of the patches of a frozen DINOv3 ViT-S/16 (2508.10104). All numbers are those of
# facebookresearch/dinov3@6876159, dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml, and of config.py
# beside it (dropout of 0.1). It differs from DINOv2's by dropout, a weight decay of 1e-3 and a cosine in place of the
# line, which in the warm-up is a line there too.
_base_ = "linear_dinov2-s_8xb2-40k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vit_small_patch16_dinov3.lvd1689m", centre_padding=False),
    decode_head=dict(dropout_ratio=0.1),
)

optim_wrapper = dict(optimizer=dict(weight_decay=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, T_max=40000, begin=0, end=40000, by_epoch=False),
]
