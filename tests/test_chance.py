"""Chance beside every method: as many tokens and channels at the same places, drawn at random."""
import pytest, torch

from vitprune_nb.core import set_seed
from vitprune_nb.data import data_config, embedded, eval_transform
from vitprune_nb.engine.macs import counts_of
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.methods.base import METHODS, prune
from vitprune_nb.methods.baselines import chance_of
from vitprune_nb.vit.model import create_vit

POOL = embedded('train').subset(range(0, 5000, 60))


@pytest.fixture(scope='module')
def model():
    set_seed(0)
    return create_vit('deit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10).eval()


@pytest.fixture(scope='module')
def images(model):
    ready = POOL.but(transform=eval_transform(data_config(model)))
    return torch.stack([ready[i][0] for i in range(12)])


@pytest.mark.parametrize('name', list(METHODS))
def test_chance_has_the_counts_of_its_method_and_none_of_its_choices(name, model, images, tmp_path):
    untrained = {k: 0 for k in METHODS[name].own if k.endswith('_epochs')}
    looks = dict(calibration=16) if 'calibration' in METHODS[name].options else {}
    if name == 'both': looks |= dict(channels=.1)      # else the last of four blocks is all that its patches save
    theirs = prune(name, model, POOL, reduction=.45 if name == 'both' else .3, **untrained, **looks)
    blind = chance_of(theirs, model, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save_pruned(blind, tmp_path/'blind')
    again = load_pruned(tmp_path/'blind')
    with torch.no_grad(): assert torch.allclose(again(images), blind(images), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if hasattr(theirs.model, 'channels'): assert blind.model.channels['shapes'] == theirs.model.channels['shapes']
    if not theirs.policy.steps: return
    ours, other = (m.set_mode('mask').kept(images) for m in (theirs, blind))
    assert not torch.equal(ours, other)
    assert not blind.policy.ragged
    if not theirs.policy.ragged: assert counts_of(blind) == counts_of(theirs)
    else:
        want, got = (torch.tensor(counts_of(m))[:, [0, 2]] for m in (theirs, blind))       # who asks, and who is in the MLP
        assert (want - got).abs().max() < 1, 'the mean, rounded'
        assert abs((want - got).sum(0)).max() < 1 or not any(s.fate.stays for _, s in theirs.policy.each())
    drawn = chance_of(theirs, model, seed=2).set_mode('mask').kept(images)
    assert not torch.equal(drawn, other), 'another seed draws other tokens'


def test_chance_chooses_anew_where_its_method_does(model, images):
    theirs = prune('evovit', model, POOL, keep_rate=.5, finetune_epochs=0)
    renewed = {i: s.score.renew for i, s in theirs.policy.each()}
    assert sorted(renewed.values()) != [True]*len(renewed), 'a stage of one block would show nothing'
    kept = chance_of(theirs, model, seed=1).set_mode('mask').kept(images)
    for i in range(min(renewed) + 1, max(renewed) + 1): assert torch.equal(kept[:, i], kept[:, i - 1]) == (not renewed[i])
