# Segmenter with a mask transformer (2105.05633) on ViT-B, mmseg's recipe.
_base_ = "mmseg::segmenter/segmenter_vit-b_mask_8xb1-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="vit_base_patch16_224",
        img_size=512,
        out_indices=(11,),
        out_norm=True,
        drop_path_rate=0.1,
        pretrained=True,
    ),
)
