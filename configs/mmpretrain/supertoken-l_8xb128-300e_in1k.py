# Super-token SViT-L (2211.11167): as SViT-S, with a drop path of 0.6; the README of hhb072/STViT@c9ed9a4 advises 0.4
# for 260 epochs and 0.6 for the last 40.
_base_ = "_base_/deit.py"

model = dict(model_name="supertoken_large_224", drop_path_rate=0.6)
