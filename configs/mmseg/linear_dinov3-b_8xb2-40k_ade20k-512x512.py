# The linear classifier on a frozen DINOv3 ViT-B/16; all else as for ViT-S.
_base_ = "linear_dinov3-s_8xb2-40k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="vit_base_patch16_dinov3.lvd1689m"), decode_head=dict(in_channels=768))
