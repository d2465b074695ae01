# Mask2Former (2112.01527) on a frozen DINOv3 ViT-L/16 (2508.10104), with mmseg's recipe for ResNet-50 unchanged and a
# neck that makes four resolutions. Both are our choice: DINOv3 has a ViT-Adapter in place of the neck, a head 2048
# channels wide and tests at 896 pixels, and its code does not say how that was trained. Blocks and final norm are as
# there (facebookresearch/dinov3@6876159, dinov3/eval/segmentation/models/__init__.py).
_base_ = "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["mmdet.models", "effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="vit_large_patch16_dinov3.lvd1689m",
        out_indices=(4, 11, 17, 23),
        final_norm=True,
        frozen=True,
        pretrained=True,
    ),
    neck=dict(type="MultiLevelNeck", in_channels=[1024] * 4, out_channels=256, scales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[256] * 4),
)

optim_wrapper = dict(constructor="TrainedOptimWrapperConstructor")
