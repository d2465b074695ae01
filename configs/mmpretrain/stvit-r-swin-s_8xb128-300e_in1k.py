# STViT-R on Swin-S (2303.08685): config.py and the published log of changsn/STViT-R@b4a27a0, Swin's recipe with
# gradients clipped at 5.
_base_ = "_base_/imagenet.py"

model = dict(model_name="stvit_r_swin_small_patch4_window7_224", drop_path_rate=0.3)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
