# UPerNet on a frozen DINOv2 ViT-B/14 (2304.07193), with mmseg's recipe for ViT-B unchanged. That is our choice: DINOv2
# does not use this head. Images of 512 pixels are padded on all sides to 37 x 37 patches, as in DINOv2.
_base_ = "upernet_dinov3-b_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="vit_base_patch14_dinov2.lvd142m", centre_padding=True))
