# Super-token ViT B (2211.11167); see S. Drop path of the classifier (README of hhb072/STViT@c9ed9a4).
_base_ = "upernet_supertoken-s_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="supertoken_base_224", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)
