# EViT from scratch on DeiT-S (2202.07800), run_code.sh of youweiliang/evit@5ca95a7: DeiT's recipe for 16 x 128
# pictures, 8 x 256 here; all tokens stay for 10 epochs, then the keep rate falls to 0.7 over 100. The official moving
# average of the weights is saved there and never evaluated, so it is left out.
_base_ = "_base_/deit.py"

model = dict(model_name="evit_deit_small_patch16_224", keep_rate=0.7)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=5e-4 * 2048 / 512))
auto_scale_lr = dict(base_batch_size=2048)
custom_hooks = [dict(type="KeepRateHook", keep_rate=0.7, start_epoch=10, epochs=100)]
