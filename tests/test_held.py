"""What a reader who tried to break the methods found, each with the right value."""
import numpy as np
import pytest
import torch
from vitprune_nb.data import calibration, embedded
from vitprune_nb.engine.macs import counts_of, macs_of
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.results import over_draws
from vitprune_nb.methods.avit import fit_gate, mean_depth
from vitprune_nb.methods.base import METHODS, prune, recover
from vitprune_nb.methods.baselines import chance_of
from vitprune_nb.train.recipe import TrainConfig
from vitprune_nb.train.trainer import fit
from vitprune_nb.vit.cost import model_macs
from vitprune_nb.vit.model import create_vit

SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
UNTRAINED = {'avit': dict(ponder_epochs=0, calibration=8), 'iared': dict(policy_epochs=0, block_epochs=0, calibration=8),
             'scop': dict(contest_epochs=0, finetune_epochs=0)}


def net(**other):
    torch.manual_seed(0)
    model = create_vit('deit_tiny_patch16_224', **SHAPE | other).eval()
    with torch.no_grad():
        for b in model.blocks: b.attn.qkv.weight.mul_(4)
    return model


@pytest.fixture(scope='module')
def pool(): return calibration(embedded('train'), 16)


@pytest.fixture(scope='module')
def x(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('cls', [True, False])
def test_a_head_that_pools_prefix_and_patches(cls, pool, x):
    model = net(global_pool='avg', class_token=cls, pool_include_prefix=True)
    kept = prune('scop', model, pool, keep_rate=1., **UNTRAINED['scop'])
    torch.testing.assert_close(kept(x), model(x), atol=1e-5, rtol=1e-5)
    assert prune('scop', model, pool, keep_rate=.5, **UNTRAINED['scop'])(x).isfinite().all()
    assert prune('iared', model, pool, threshold=.6, **UNTRAINED['iared'])(x).isfinite().all()


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16, torch.float64])
def test_interpreters_have_the_numbers_of_the_model(kind, pool, x):
    slim = prune('iared', net().to(kind), pool, threshold=.5, **UNTRAINED['iared'])
    assert slim(x.to(kind)).dtype == kind


@pytest.mark.parametrize('name', ['scop', 'avit'])          # the others' scorers say that they see NaN
def test_a_training_that_ends_in_ruins_is_refused(name, pool):
    with pytest.raises(VitpruneError, match='training stopped at step 1: got answers that are not finite after'): prune(name, net(), pool, lr=1e30, **dict(calibration=8) if name == 'avit' else {})


def test_the_last_update_is_looked_at_before_it_is_saved(pool, tmp_path):
    cfg = TrainConfig(epochs=1., batch_size=16, lr=1e30, dtype='fp32', augment='none', warmup=0.)     # one step: its loss was fine
    with pytest.raises(VitpruneError, match='training stopped at step 1: got answers that are not finite after'): fit(net(), pool, cfg, out=tmp_path)
    assert not (tmp_path/'checkpoint.pt').exists()


@pytest.mark.parametrize('name', ['power', 'evovit', 'idlevit', 'iared', 'scop'])
def test_labels_beyond_the_head(name, pool):
    with pytest.raises(VitpruneError, match='train_set: got class number 9; allowed: 0 to 2'):
        prune(name, net(num_classes=3), pool, **({'calibration': 8} if name == 'iared' else {}))


def test_a_recovery_that_could_not_count_does_not_begin(pool):
    slim = prune('avit', net(), pool, offset=1., **UNTRAINED['avit'])
    before = {k: v.clone() for k, v in slim.state_dict().items()}
    with pytest.raises(VitpruneError, match='calibration: got 8; allowed: 1 to 4'): recover(slim, pool.subset(range(4)), epochs=1, batch_size=4)
    assert all(torch.equal(v, before[k]) for k, v in slim.state_dict().items())


def test_patch_dropout_and_a_contest(pool):
    with pytest.raises(VitpruneError, match='patch_drop: got patch dropout together with a contest'): prune('scop', net(patch_drop_rate=.3), pool)


def test_whose_chance(pool):
    model = net()
    slim = prune('tome', model, pool, reduction=.3)
    for args, text in (((model, model), 'pruned: got VisionTransformer'), ((slim, model, 1.5), 'seed: got 1.5'), ((slim, model, 2**70), 'seed: got'),
                       ((slim, net(depth=6)), 'dense: got one of blocks'), ((slim, net(img_size=64)), 'dense: got one of blocks')):
        with pytest.raises(VitpruneError, match=text): chance_of(*args)
    assert macs_of(chance_of(slim, model)) < macs_of(model)


def test_draws_that_cannot_be_compared():
    a = np.ones(8, bool)
    with pytest.raises(VitpruneError, match='ours, draws: got shapes'): over_draws(a, [a, a[:5]])
    with pytest.raises(VitpruneError, match='ours, draws: got values of bool, int64'): over_draws(a.astype(int), [a])
    with pytest.raises(VitpruneError, match='ours, draws: got shapes'): over_draws(a, [])


def test_printed_macs_are_of_the_images_that_were_looked_at(pool, tmp_path, vitprune):
    slim = prune('avit', net(), pool, offset=1., **UNTRAINED['avit'])
    save_pruned(slim, tmp_path/'slim')
    said = {b: vitprune('eval', tmp_path/'slim', '--limit', 40, '--batch', b).stdout for b in (1, 40)}
    less = {b: text[text.index('('):].split('less')[0].split('(')[-1] for b, text in said.items()}
    assert less[1] == less[40], said


@pytest.mark.parametrize('depth', [2, 3, 4])
def test_the_gate_of_few_blocks_is_alive(depth, pool):
    t = torch.randn(200, depth, generator=torch.Generator().manual_seed(0)).cumsum(1)
    gamma, beta = fit_gate(t, depth)
    assert mean_depth(t, gamma, beta) == pytest.approx(depth, abs=.01) and mean_depth(t, gamma, beta + 3.) < depth - .1
    slim = prune('avit', net(depth=depth), pool, offset=0., **UNTRAINED['avit'])
    assert -20 < slim.info['beta'] < 20


@pytest.mark.parametrize('name, dial', [('ats', dict(samples=5)), ('avit', dict(offset=1.)), ('iared', dict(threshold=.5)),
                                        ('cosine', dict(reduction=.2))])
def test_macs_of_a_batch_are_the_mean_of_those_of_its_images(name, dial, pool):
    untrained = {k: 0 for k in METHODS[name].own if k.endswith('_epochs')}
    slim = prune(name, net(), pool, **dial, **untrained, calibration=8)
    x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    one_by_one = [macs_of(slim, x[i:i + 1]) for i in range(12)]
    assert macs_of(slim, x) == pytest.approx(sum(one_by_one)/12, rel=1e-6) and len(set(one_by_one)) > 1
    assert counts_of(slim) == [tuple(c) for c in slim.info['counts']] and len(slim.info['counts'][0]) == 4


def test_counts_with_a_fourth_number():
    model = net()
    assert model_macs(model, [(6, 6, 6, 45)]*4) == pytest.approx((model_macs(model, [(3, 3, 3)]*4) + model_macs(model, [(9, 9, 9)]*4))/2)
    for bad in ((6, 6, 6, -1), (6, 6, 6, 17*17 + 1), (6, 6, 6, 'x'), (6, 6, 6, 36, 1), (6, 6)):
        with pytest.raises(VitpruneError, match=r'counts\[0\]: got'): model_macs(model, [bad]*4)


def test_chance_after_channels_and_tokens(pool, x):
    model = net()
    cut = prune('vtp', model, pool, ratio=.3, sparse_epochs=0)
    both = prune('uniform', cut, pool, reduction=.3, calibration=8)
    blind, tokens = chance_of(both, model), chance_of(both, cut)
    assert blind.model.channels['shapes'] == tokens.model.channels['shapes'] == both.model.channels['shapes']
    assert macs_of(blind) == macs_of(tokens) == macs_of(both)
    assert all(torch.equal(a, b) for a, b in zip(tokens.model.parameters(), cut.model.parameters(), strict=True))
    assert not torch.equal(blind(x), tokens(x))
    other = prune('vtp', model, pool, ratio=.5, sparse_epochs=0)
    for bad in (other, 3, torch.nn.Linear(2, 2), both):
        with pytest.raises(VitpruneError, match='dense: got'): chance_of(both, bad)
    with pytest.raises(VitpruneError, match='dense: got a model whose channels are cut'): chance_of(cut, cut)


def test_a_refused_call_leaves_no_mark(pool, tmp_path):
    mine, new = tmp_path/'mine', tmp_path/'new'
    mine.mkdir()
    (mine/'notes.txt').write_text('mine')
    for work in (mine, new):
        with pytest.raises(VitpruneError, match='depth'): prune('avit', net(), pool, offset=0., depth=9., work=work, **UNTRAINED['avit'])
    assert [p.name for p in mine.iterdir()] == ['notes.txt'] and not new.exists()


def test_options_said_otherwise_are_the_same_run(pool, tmp_path):
    one = prune('evit', net(), pool, reduction=.3, finetune_epochs=0, stages=(2, 3), work=tmp_path/'w')
    two = prune('evit', net(), pool, reduction=np.float64(.3), finetune_epochs=0, stages=[2, 3], lr=None, work=tmp_path/'w')
    assert one.info == two.info
    with pytest.raises(VitpruneError, match='Another options was used there'): prune('evit', net(), pool, reduction=.2, finetune_epochs=0, stages=(2, 3), work=tmp_path/'w')


@pytest.mark.parametrize('name, option, value', [('patch-slimming', 'calibration', 10**30), ('avit', 'batch_size', 2**40), ('avit', 'gamma', 1e300), ('avit', 'ponder_epochs', 1e9), ('ats', 'samples', 2**31)])
def test_options_beyond_all_bounds(name, option, value, pool):
    with pytest.raises(VitpruneError, match=rf'{option}: got .*(The largest is|It must be below) [\d,.e+]+\.$'): prune(name, net(), pool, **{'reduction': .3, option: value} if option != 'samples' else {option: value})


def test_numbers_of_a_scorer_that_are_no_sizes(pool, tmp_path):
    slim = prune('avit', net(), pool, offset=0., gamma=1e6, beta=-1e5, **UNTRAINED['avit'])
    save_pruned(slim, tmp_path/'slim')
    assert load_pruned(tmp_path/'slim').info['gamma'] == 1e6
    save_pruned(prune('ats', net(), pool, samples=2**20, calibration=8), tmp_path/'ats')
    assert load_pruned(tmp_path/'ats').info['samples'] == 2**20


@pytest.mark.parametrize('off', [torch.no_grad, torch.inference_mode])
def test_training_where_gradients_are_switched_off(off, pool):
    model = net()
    before = model.head.weight.clone()
    with off(): fit(model, pool, TrainConfig(epochs=1, batch_size=8, dtype='fp32'))
    assert not torch.equal(model.head.weight, before)


def test_switches_of_the_command_line_go_both_ways(tmp_path, vitprune):
    said = {flag: vitprune('prune', '--method', 'tome', '--reduction', .2, flag, '--out', tmp_path/flag).stdout for flag in ('--proportional', '--no-proportional')}
    assert {flag: load_pruned(tmp_path/flag).info['proportional'] for flag in said} == {'--proportional': True, '--no-proportional': False}
