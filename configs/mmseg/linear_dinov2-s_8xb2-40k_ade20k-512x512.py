# A linear classifier of the patches of a frozen DINOv2 ViT-S/14 (2304.07193). The numbers are those of the configs that
# DINOv2 publishes with its linear heads, read in a copy of the one for ViT-B (Jiawei-Yang/Denoising-ViT@2d08bd8,
# evaluation/configs/vitb_ade20k_linear_config.py): crops of 512 pixels, AdamW at 1e-3 with a weight decay of 1e-4, 40k
# iterations of 16 images; in testing, windows of 512 pixels every 341. The head (BNHead), the final norm on the last
# map and the padding to 37 x 37 patches are in facebookresearch/dinov2@b8931f7, notebooks/semantic_segmentation.ipynb.
# Images are loaded as mmseg does it.
_base_ = [
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_40k.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab", "effvit.dense.linear_head"], allow_failed_imports=False)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type="EffViT",
        model_name="vit_small_patch14_dinov2.lvd142m",
        out_indices=(11,),
        final_norm=True,
        frozen=True,
        centre_padding=True,
        pretrained=True,
    ),
    decode_head=dict(
        type="LinearHead",
        in_channels=384,
        num_classes=150,
        dropout_ratio=0,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="TrainedOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=0, end=40000, by_epoch=False),
]
train_dataloader = dict(batch_size=2)
