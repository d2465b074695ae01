# Super-token SViT-B (2211.11167): as SViT-S, with a drop path of 0.4 (README of hhb072/STViT@c9ed9a4).
_base_ = "_base_/deit.py"

model = dict(model_name="supertoken_base_224", drop_path_rate=0.4)
