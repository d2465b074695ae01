# EViT's fine-tuning (finetune.sh of youweiliang/evit@5ca95a7): 30 epochs from trained weights without warm-up, a rate
# of 2e-5 for 512 pictures here for 8 x 256, weight decay 1e-6, otherwise DeiT's recipe. The official code keeps the
# model in eval mode while it trains, hence no drop path.
_base_ = "deit.py"

model = dict(pretrained=True, drop_path_rate=0.0)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-5 * 2048 / 512, weight_decay=1e-6))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=2e-6, by_epoch=True)]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=2048)
