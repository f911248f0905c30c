"""What a reader who tried to break the methods found, each with the right value."""
import numpy as np
import pytest
import torch
from vitprune_nb.data import calibration, embedded
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.store import save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.results import over_draws
from vitprune_nb.methods.base import prune, recover
from vitprune_nb.methods.baselines import chance_of
from vitprune_nb.train.recipe import TrainConfig
from vitprune_nb.train.trainer import fit
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
