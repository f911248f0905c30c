"""Every method runs in bfloat16, as training and evaluation do where a CPU has it."""
import pytest, torch

from vitprune_nb.core import autocast, set_seed
from vitprune_nb.data import data_config, embedded, eval_transform
from vitprune_nb.methods.base import METHODS, prune
from vitprune_nb.vit.model import create_vit

POOL = embedded('train').subset(range(0, 5000, 60))


@pytest.fixture(scope='module')
def model():
    set_seed(0)
    return create_vit('deit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10).eval()


@pytest.mark.parametrize('name', list(METHODS))
def test_every_method_runs_in_bfloat16(name, model):
    untrained = {k: 0 for k in METHODS[name].own if k.endswith('_epochs')}
    looks = dict(calibration=16) if 'calibration' in METHODS[name].options else {}
    slim = prune(name, model, POOL, reduction=.3, **untrained, **looks)
    ready = POOL.but(transform=eval_transform(data_config(model)))
    x = torch.stack([ready[i][0] for i in range(8)])
    for mode in ('mask', 'packed'):
        slim.set_mode(mode)
        with torch.no_grad(), autocast('cpu', 'bf16', slim): got, here = slim(x).float(), slim.kept(x)
        with torch.no_grad(): want, there = slim(x), slim.kept(x)
        assert torch.isfinite(got).all(), mode
        same = (here == there).all(2).all(1)        # scores a rounding apart may choose another patch
        assert not same.any() or (got - want)[same].abs().max() < .1*want.abs().max() + .05, mode
    loss_mode = slim.set_mode('mask').train()
    with autocast('cpu', 'bf16', loss_mode): loss = loss_mode(x).float().logsumexp(-1).mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in slim.parameters() if p.grad is not None)
