"""One small search with block fine-tuning in a process of its own, for test_patch_slimming.py.

python patch_slimming_script.py OUT [search | half-write]   prints each block as its state is written; saves OUT/plan.json with its weights
    search      nothing more
    half-write  while writing its second state the process writes half of the file and kills itself
"""
import os, signal, sys
from pathlib import Path
import torch
from vitprune_nb.methods import patch_slimming
from vitprune_nb.core import set_seed
from vitprune_nb.data import calibration, embedded
from vitprune_nb.vit.model import create_vit

SETTINGS = dict(eps=.08, tune_epochs=2, lr=3e-4)


def tiny_vit(seed=0):
    set_seed(seed)
    return create_vit('test_vit', img_size=64, num_classes=10)   # 16 patches, 6 blocks


def images(): return calibration(embedded('train'), 6)


def run(checkpoint, model=None, ds=None, **other):
    return patch_slimming.top_down(model or tiny_vit(), ds or images(), batch_size=2, checkpoint=checkpoint, **{**SETTINGS, **other})


def die_in_second_state():
    import safetensors.torch as st
    whole, calls = st.save_file, []

    def save(tensors, path, metadata=None):
        whole(tensors, path, metadata)
        calls.append(path)
        if len(calls) == 2:
            os.truncate(path, os.path.getsize(path)//2)
            os.kill(os.getpid(), signal.SIGKILL)
    st.save_file = save


if __name__ == '__main__':
    torch.set_num_threads(1)
    out, mode = Path(sys.argv[1]), (sys.argv + ['search'])[2]
    if mode == 'half-write': die_in_second_state()
    saved = patch_slimming._save_state

    def tell(search, path, settings, node, errors):
        saved(search, path, settings, node, errors)
        print('block', node['l'] + 1, flush=True)
    patch_slimming._save_state = tell
    run(out/'search.safetensors').save(out/'plan.json')
