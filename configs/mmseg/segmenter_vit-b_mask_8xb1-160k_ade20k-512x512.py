# Dense ViT-B (2106.10270), the baseline of the methods on it.
_base_ = "_base_/segmenter_vit-b.py"
