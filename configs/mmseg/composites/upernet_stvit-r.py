# STViT-R (2303.08685) on the widths and depths of upernet_swin.py.
_base_ = "upernet_swin.py"

model = dict(backbone=dict(model_name="stvit_r_swin_small_patch4_window7_dense"))
