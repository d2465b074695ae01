# STViT-R on Swin-B (2303.08685): the published log of changsn/STViT-R@b4a27a0, with a drop path of 0.4.
_base_ = "stvit-r-swin-s_8xb128-300e_in1k.py"

model = dict(model_name="stvit_r_swin_base_patch4_window7_224", drop_path_rate=0.4)
