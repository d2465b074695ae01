# Super-token SViT-S (2211.11167): main.py and README of hhb072/STViT@c9ed9a4, DeiT's recipe. The README has a drop
# path of 0.1, run.sh one of 0.3.
_base_ = "_base_/deit.py"

model = dict(model_name="supertoken_small_224", drop_path_rate=0.1)
