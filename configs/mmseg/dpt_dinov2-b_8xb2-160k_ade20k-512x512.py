# DPT (2103.13413) on a frozen DINOv2 ViT-B/14 (2304.07193), with mmseg's recipe for ViT-B unchanged. That is our
# choice: DINOv2 trains this head for depth alone. As there, it reads every quarter of the blocks without the final
# norm, class tokens included, of images padded on all sides (facebookresearch/dinov2@b8931f7, dinov2/hub/depthers.py).
_base_ = "mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="vit_base_patch14_dinov2.lvd142m",
        out_indices=(2, 5, 8, 11),
        output_cls_token=True,
        frozen=True,
        centre_padding=True,
        pretrained=True,
    ),
)

optim_wrapper = dict(constructor="TrainedOptimWrapperConstructor")
