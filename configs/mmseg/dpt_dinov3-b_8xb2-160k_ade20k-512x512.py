# DPT (2103.13413) on a frozen DINOv3 ViT-B/16 (2508.10104), with mmseg's recipe for ViT-B unchanged. That is our
# choice: DINOv3 has this head for depth alone. As there, it reads every quarter of the blocks under the final norm
# (facebookresearch/dinov3@6876159, dinov3/eval/depth/models/__init__.py); the class tokens are read as in mmseg.
_base_ = "dpt_dinov2-b_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="vit_base_patch16_dinov3.lvd1689m", final_norm=True, centre_padding=False))
