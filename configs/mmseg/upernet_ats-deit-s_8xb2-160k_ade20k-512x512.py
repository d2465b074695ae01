# ATS (2111.15667): at most as many samples as patches from block 4 on, its setting for ImageNet.
_base_ = "upernet_deit-s_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="ats_deit_small_patch16_224", reduce_at=tuple(range(3, 12))))
