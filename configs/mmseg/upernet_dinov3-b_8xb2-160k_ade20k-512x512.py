# UPerNet on a frozen DINOv3 ViT-B/16 (2508.10104), with mmseg's recipe for ViT-B unchanged. That is our choice: DINOv3
# does not use this head. As its other ones, it reads every quarter of the blocks under the final norm
# (facebookresearch/dinov3@6876159, dinov3/eval/segmentation/models/__init__.py).
_base_ = "mmseg::vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="vit_base_patch16_dinov3.lvd1689m",
        out_indices=(2, 5, 8, 11),
        final_norm=True,
        frozen=True,
        pretrained=True,
    ),
)

optim_wrapper = dict(constructor="TrainedOptimWrapperConstructor")
