# Super-token SViT-B (2211.11167) fine-tuned at 384 x 384 from the official weights at 224 x 224.
_base_ = "_base_/supertoken_384px.py"

model = dict(model_name="supertoken_base_384", pretrained="checkpoints/stvit-base-224.pth")
