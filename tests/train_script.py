"""One small training run in a process of its own, for test_train.py.

python train_script.py RECIPE OUT [steps | half-write]   prints each step as it ends; saves the final weights as OUT/final.pt
    steps       nothing more
    half-write  in its second checkpoint the process writes half of the file and kills itself
torchrun --nproc_per_node 2 train_script.py RECIPE OUT   the same run in two processes
"""
import io, os, signal, sys
from pathlib import Path
import torch
from conftest import part
from vitprune_nb.core import set_seed
from vitprune_nb.data import calibration, embedded
from vitprune_nb.engine.policy import ClsAttention, Policy, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.train.recipe import TrainConfig
from vitprune_nb.train.trainer import fit
from vitprune_nb.vit.model import create_vit

RANDOM = dict(epochs=4, batch_size=16, lr=2e-3, augment='light', mixup=.8, cutmix=1., patch_drop=(.5, 0), drop_path=.1, ema=.9, clip_grad=.5,
              dtype='fp32', save_every=5, log_every=1)     # everything that draws random numbers; epochs of 12 steps
PLAIN = dict(epochs=.5, batch_size=16, lr=1e-3, augment='none', label_smoothing=0., dtype='fp32', save_every=1000, log_every=1)
COUNTS = RANDOM | dict(patch_drop=())
RECIPES = dict(random=RANDOM, plain=PLAIN, counts=COUNTS)


def tiny_vit(seed=0):
    set_seed(seed)
    return create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)


def train_set(): return calibration(embedded('train'), 192)


def fewer(slim, done):
    "Half of 16 patches at the end of training, all at its beginning."
    slim.set_policy(Policy({1: Step('middle', 'fuse', score=slim.scorers[0], count=16 - int(8*done))}))


def run(recipe, out, callback=None, model=None):
    counts = recipe == 'counts'
    model = model or tiny_vit()
    if counts: model = SlimViT(model, Policy({1: Step('middle', 'fuse', score=ClsAttention(), count=8)}))
    rows = fit(model, train_set(), TrainConfig(**RECIPES[recipe]), out=out, callback=callback, before_step=fewer if counts else None)
    return model, rows


def die_in_second_checkpoint():
    whole, calls = torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) < 2: return whole(state, path)
        data = io.BytesIO(); whole(state, data)
        with open(path, 'wb') as f: f.write(data.getvalue()[:len(data.getvalue())//2]); f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save


if __name__ == '__main__':
    torch.set_num_threads(1)
    recipe, out, mode = sys.argv[1], Path(sys.argv[2]), (sys.argv + ['steps'])[3]
    if mode == 'half-write': die_in_second_checkpoint()
    model, _ = run(recipe, out, callback=lambda rows: print('step', rows[-1]['step'], flush=True))
    if int(os.environ.get('RANK', 0)) == 0: torch.save(model.state_dict(), out/'final.pt')
    part()
