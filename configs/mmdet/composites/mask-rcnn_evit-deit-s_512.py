# EViT (2202.07800) on the DeiT-S of mask-rcnn_deit-s_512.py; trains with the same command, for a GPU; not trained here.
_base_ = "mask-rcnn_deit-s_512.py"

model = dict(backbone=dict(model_name="evit_deit_small_patch16_224", keep_rate=0.7, reduce_at=(3, 6, 9)))
