# Dense ViT-B (2106.10270), the baseline of the methods on it.
_base_ = "_base_/setr_pup_vit-b.py"
