# ALGM (2406.09936), threshold and blocks of its ViT-B on ADE20K (tue-mps/algm-segmenter@674eaa2); masks are restored in
# front of the head.
_base_ = "_base_/segmenter_vit-b.py"

model = dict(backbone=dict(model_name="algm_vit_base_patch16_224", threshold=0.94))
