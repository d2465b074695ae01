# The linear classifier on a frozen DINOv2 ViT-B/14; all else as for ViT-S.
_base_ = "linear_dinov2-s_8xb2-40k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="vit_base_patch14_dinov2.lvd142m"), decode_head=dict(in_channels=768))
