"""Chance beside every method: as many tokens and channels at the same places, drawn at random."""
import pytest, torch

from vitprune_nb.core import set_seed
from vitprune_nb.data import data_config, embedded, eval_transform
from vitprune_nb.engine.macs import counts_of
from vitprune_nb.engine.policy import Policy, RandomScore, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, prune
from vitprune_nb.methods.baselines import chance_of, chance_policy, mean_counts
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
        stays = any(s.fate.stays for _, s in theirs.policy.each())
        total = (want - got).sum(0).abs().max()
        assert total < 1 if stays else total <= .5*len(model.blocks)
    drawn = chance_of(theirs, model, seed=2).set_mode('mask').kept(images)
    assert not torch.equal(drawn, other), 'another seed draws other tokens'


def test_chance_chooses_anew_where_its_method_does(model, images):
    theirs = prune('evovit', model, POOL, keep_rate=.5, finetune_epochs=0)
    renewed = {i: s.score.renew for i, s in theirs.policy.each()}
    assert sorted(renewed.values()) != [True]*len(renewed), 'a stage of one block would show nothing'
    kept = chance_of(theirs, model, seed=1).set_mode('mask').kept(images)
    for i in range(min(renewed) + 1, max(renewed) + 1): assert torch.equal(kept[:, i], kept[:, i - 1]) == (not renewed[i])


def some(at='before', fate='remove'): return Step(at, fate, score=RandomScore(), threshold=.5)
def best(n, at='before'): return Step(at, score=RandomScore(), count=n)
def blocks(*patches): return [tuple(1 + n for n in (p if isinstance(p, tuple) else (p,)*3)) + (0.,) for p in patches]       # with CLS


@pytest.mark.parametrize('steps, counts, want', [
    ({1: (some(), some('middle'))}, blocks(16, (11.6, 11.6, 5.2), 5.2, 5.2), {(1, 'before'): 12, (1, 'middle'): 5}),
    ({1: (some(), best(5, 'queries'))}, blocks(16, (5, 12.1, 5), 5, 5), {(1, 'before'): 12}),
    ({0: some(), 1: best(5), 3: some()}, blocks(8.2, 5, 5, 6.), {(0, 'before'): 8, (3, 'before'): 5}),
    ({0: some(), 1: some()}, blocks(10.375, 6.25, 6.25, 6.25), {(0, 'before'): 10, (1, 'before'): 6}),
    ({0: some(fate='idle'), 1: some(fate='idle')}, blocks(2.4, 2.4, 16, 16), {(0, 'before'): 2, (1, 'before'): 3})])
def test_mean_counts_know_the_place_of_a_step_and_how_long_it_holds(steps, counts, want, model):
    wide = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10).eval()
    slim = SlimViT(wide, Policy(steps), 'packed').eval()
    slim.info['counts'] = counts
    assert mean_counts(slim) == want
    blind = chance_of(slim, wide)
    assert [n for _, _, n in counts_of(blind)] == pytest.approx([c[2] for c in counts], abs=1.01)


def test_an_average_has_a_patch_to_read(images):
    net = create_vit('deit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10, global_pool='avg').eval()
    slim = SlimViT(net, Policy({2: some()}), 'packed').eval()
    slim.info['counts'] = blocks(64, 64, .2, .2)
    assert mean_counts(slim) == {(2, 'before'): 1} and torch.isfinite(chance_of(slim, net)(images)).all()


def test_what_cannot_be_counted_is_refused(model, images):
    ragged = Policy({1: some(), 2: some('middle')})
    for call, said in ((lambda: mean_counts(None), 'pruned: got NoneType'), (lambda: mean_counts(model), 'pruned: got VisionTransformer'),
                       (lambda: mean_counts(SlimViT(model, ragged, 'packed')), 'images: got None'), (lambda: chance_policy(ragged, 64), 'counts: got None'),
                       (lambda: chance_policy(ragged, 64, counts={(1, 'before'): 3}), 'counts: got'), (lambda: chance_policy(ragged, 64, seed='a'), 'seed: got a')):
        with pytest.raises(VitpruneError, match=said): call()
    assert chance_of(SlimViT(model, ragged, 'packed').eval(), model, images=images).policy.name == 'chance'
