# HoT (2311.12028) on the ViT of upernet_vit.py: a third of the patches stays from block 3 on, as of its 243 frames, and
# attention that is trained with the heads recovers the others from them. Frames have learned queries of their own; here
# the queries are the patches as they were dropped, so that images of any size can be recovered.
_base_ = "upernet_vit.py"

model = dict(backbone=dict(model_name="hot_deit_tiny_patch16_224", recover="attention"))
