# Dense: the ViT whose weights come with the package, fine-tuned.
_base_ = "_base_/mask-rcnn_garments.py"
