# The linear classifier on a frozen DINOv3 ViT-L/16; all else as for ViT-S.
_base_ = "linear_dinov3-s_8xb2-40k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vit_large_patch16_dinov3.lvd1689m", out_indices=(23,)),
    decode_head=dict(in_channels=1024),
)
