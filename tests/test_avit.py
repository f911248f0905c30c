"A-ViT where its notebook does not look: other ViTs, other precisions, its losses, files, a run that is killed."
import json, math

import pytest
import torch

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import export_onnx
from vitprune_nb.engine.fates import fate_of, fate_to_value
from vitprune_nb.engine.macs import counts_of, macs_of
from vitprune_nb.engine.policy import Policy
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.avit import (EPS, HaltingScore, MeanField, avit_policy, depth_loss, depth_prior, fit_gate,
                                      mean_depth, owned, ponder_loss, reads_of)
from vitprune_nb.methods.base import METHODS, prune, read_options, recover
from vitprune_nb.train.objectives import Seen, plus, supervised
from vitprune_nb.train.trainer import TrainConfig, Trainer
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(reg_tokens=3),
         'average': dict(global_pool='avg'), 'qk norm and layer scale': dict(qk_norm=True, init_values=.7),
         'no class token': dict(name='vit_tiny_patch16_224', global_pool='avg', class_token=False)}


def vit(depth=6, **kw):
    torch.manual_seed(0)
    net = create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth,
                     num_heads=3, num_classes=10, **kw).eval()
    for b in net.blocks:                                     # channel 0 grows with depth, and differs between tokens
        b.attn.proj.weight.data[0] *= 20
        b.mlp.fc2.bias.data[0] = .5
    return net


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def gate(net, depth, gamma=4.):
    "Constants with which patches halt around a depth."
    x = images(8, 5).to(next(net.parameters()))
    maps = net.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
    return fit_gate(torch.stack([m[..., 0].flatten() for m in maps], 1).float(), depth, gamma)


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def oracle(net, image, gamma, beta):
    """One image, token by token. Prefix tokens stay keys, for the engine keeps them; nothing ends early. Where
    the head averages and none is left, the patch with most left goes on, and gives nothing."""
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    going, left, read = list(range(len(x))), [1.]*len(x), torch.zeros_like(x)
    for number, block in enumerate(net.blocks, 1):
        y, a = x[going], block.attn
        q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(block.norm1(y)).chunk(3, 1))
        P = ((a.q_norm(q) @ a.k_norm(k).transpose(1, 2))*a.scale).softmax(-1)
        y = y + block.ls1(a.proj((P @ v).transpose(0, 1).flatten(1)))
        x[going] = y + block.ls2(block.mlp(block.norm2(y)))
        for j in going:
            h = 1/(1 + math.exp(-(gamma*x[j, 0].item() + beta)))
            give = left[j] if number == len(net.blocks) or left[j] - h <= EPS else h
            read[j] += give*x[j]
            left[j] -= give
        was, going = going, [j for j in going if j < p or left[j] > 0]
        if not [j for j in going if j >= p] and net.global_pool == 'avg': going.append(next(j for j in was if j >= p))
    read = net.norm(read)
    if net.global_pool == 'avg': return net.head(net.fc_norm(read[p:].mean(0)))
    if hasattr(net, 'head_dist'): return (net.head(read[0]) + net.head_dist(read[1]))/2
    return net.head(net.fc_norm(read[0]))


@pytest.mark.parametrize('kind', KINDS)
def test_an_oracle_in_double_precision(kind):
    net, left = vit(**KINDS[kind]).double(), set()
    x = images().double()
    for case in range(5):
        constants = gate(net, 1.5 + case, (2., 8.)[case % 2])
        with torch.no_grad():
            want = torch.stack([oracle(net, image, *constants) for image in x])
            for mode in ('mask', 'packed'):
                slim = SlimViT(net, avit_policy(net, *constants), mode)
                assert (slim(x) - want).abs().max() < 1e-9, (kind, constants, mode)
                left |= {tuple(n) for n in slim.kept(x).sum(-1).tolist()}
    assert len(left) > 6                                             # counts differ from image to image


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('depth', [1.5, 3., 5.])
def test_modes_agree_and_macs_are_counted(kind, depth):
    net, x = vit(**KINDS[kind]), images()
    policy = avit_policy(net, *gate(net, depth))
    check_policy(net, policy, x)
    slim = SlimViT(net, policy, 'packed')
    assert sum(macs_of(slim, x[i:i + 1]) for i in range(3)) == count_macs(slim, x)
    assert macs_of(slim, x) == pytest.approx(count_macs(slim, x)/3, rel=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_the_two_ends_of_the_dial(kind):
    net, x = vit(**KINDS[kind]), images()
    whole = SlimViT(net, avit_policy(net, 4., -1e4), 'packed')
    assert torch.allclose(whole(x), net(x), atol=1e-5) and whole.kept(x).all()
    first = SlimViT(net, avit_policy(net, 4., 1e4), 'packed')
    one = embed_and_first_block(net, x)
    assert torch.allclose(first(x), net.forward_head(net.norm(one)), atol=1e-5)
    assert first.kept(x)[:, 1:].sum() <= 5*3                          # of an average, one patch goes on


def embed_and_first_block(net, x): return net.blocks[0](net.norm_pre(net._pos_embed(net.patch_embed(x))))


@pytest.mark.parametrize('kind', ['cls', 'dist', 'registers'])
def test_an_image_is_finished_when_the_head_has_its_answer(kind):
    net, x, cut = vit(**KINDS[kind]), images(8), 0
    for token in (net.cls_token, getattr(net, 'dist_token', None)):   # what is read halts before the patches
        if token is not None: token.data[..., 0] += 1.
    for depth in (2., 3., 4.):
        slim, long = (SlimViT(net, avit_policy(net, *gate(net, depth, 1.)), mode) for mode in ('packed', 'mask'))
        early, record = slim.eval().kept(x).sum(-1), []
        long.train()                   # in training nothing is cut short
        with torch.no_grad(): assert torch.allclose(slim(x), long(x, record=record), atol=1e-5)
        late = torch.stack([torch.full((8,), 64), *(d.keep[:, d.n_prefix:].sum(1) for d in record)], 1)
        p = reads_of(net)
        read = torch.stack([(d.scores[:, :p] > 0).any(1) for d in record], 1)   # is any still read?
        assert torch.equal(early[:, 1:], late[:, 1:]*read)
        cut += (late[:, 1:]*~read).sum().item()
        long.eval()
    assert cut > 0


def test_no_image_depends_on_its_batch():
    net, x = vit(), images(6)
    slim = SlimViT(net, avit_policy(net, *gate(net, 3.)), 'packed')
    together = slim.kept(x)
    assert len({tuple(k) for k in together.sum(-1).tolist()}) > 1
    for i in range(6): assert torch.equal(slim.kept(x[i:i + 1])[0], together[i])
    assert torch.equal(slim(x), slim(x))


def test_a_permutation_of_the_patches_changes_nothing():
    net, x = vit(), images()
    slim = SlimViT(net, avit_policy(net, *gate(net, 3.)), 'mask')
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want, embed, seen = slim(x), net.patch_embed.forward, slim.kept(x)
        pos = net.pos_embed.clone()
        net.patch_embed.forward = lambda v: embed(v)[:, order]
        net.pos_embed[:, 1:] = pos[:, 1:][:, order]
        assert torch.allclose(slim(x), want, atol=1e-5) and torch.equal(slim.kept(x), seen[..., order])


def losses(net, constants, x, depth=4.):
    slim, record = SlimViT(net, avit_policy(net, *constants), 'mask').train(), []
    out = slim(x, record=record)
    seen = Seen(x, torch.tensor([1, 2, 3]), out, slim, TrainConfig(), decisions=record)
    return slim, record, plus(supervised, ponder_loss(1.), depth_loss(depth, 1.))(seen)


@pytest.mark.parametrize('seed', range(20))
def test_the_losses_are_the_slow_form(seed):
    g = torch.Generator().manual_seed(seed)
    net = vit()
    constants = gate(net, 1.5 + 4*torch.rand((), generator=g).item(), 1 + 8*torch.rand((), generator=g).item())
    slim, record, found = losses(net, constants, images(seed=seed))
    rest = owned(record)
    cost, given = [], torch.zeros(6, dtype=torch.float64)
    for b in range(3):
        for k in range(65):
            h = [a - c for a, c in zip(rest[b, :-1, k].tolist(), rest[b, 1:, k].tolist())]
            last = max(i for i in range(6) if rest[b, i, k] > 0)
            assert sum(h) == pytest.approx(1, abs=1e-5) and all(v == 0 for v in h[last + 1:])
            assert last == 5 or rest[b, last + 1, k] == 0
            cost.append(last + 1 + h[last])
            if k: given += torch.tensor(h)/(3*64)
    assert found['ponder'].item() == pytest.approx(sum(cost)/len(cost), abs=1e-4)
    want = [math.exp(-(l - 4)**2/2) for l in range(1, 7)]
    want = [w/sum(want) for w in want]
    kl = sum(w*math.log(w/max(s, 1e-6)) for w, s in zip(want, given.tolist()))
    assert found['depth'].item() == pytest.approx(kl, abs=1e-3)
    assert depth_prior(6, 4.).tolist() == pytest.approx(want, abs=1e-6)


def test_each_loss_pulls_where_it_should():
    "The ponder loss makes scores higher; cross-entropy reaches them through CLS alone."
    net = vit()
    constants = gate(net, 4., 1.)
    slim, _, found = losses(net, constants, images())
    slim.zero_grad()
    found['ponder'].backward(retain_graph=True)
    bias = slim.model.blocks[0].mlp.fc2.bias
    assert bias.grad[0] < 0                                           # descent raises channel 0
    slim.zero_grad()
    found['classification'].backward(retain_graph=True)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in slim.parameters())
    slim.zero_grad()
    found['depth'].backward()
    assert bias.grad[0] != 0


def test_the_trainer_lowers_the_ponder_cost(few):
    net = vit()
    slim = SlimViT(net, avit_policy(net, *gate(net, 5., 1.)), 'mask')
    cfg = TrainConfig(epochs=6, lr=3e-3, batch_size=10, dtype='fp32', warmup=0.)
    tr = Trainer(slim, few, cfg, objective=ponder_loss(1.))
    cost = [tr.one_step() for _ in range(30)]
    assert sum(cost[-5:]) < sum(cost[:5]) - 2.5                       # half a block less, in the mean of five


def test_the_gate_hits_its_depth():
    g = torch.Generator().manual_seed(3)
    for case in range(20):
        t = (3*torch.rand((), generator=g)*torch.randn(2000, 12, generator=g)).cumsum(1) + 10*torch.randn((), generator=g)
        depth = 1.5 + 10*torch.rand((), generator=g).item()
        gamma, beta = fit_gate(t, depth, (None, 5.)[case % 2])
        assert mean_depth(t, gamma, beta) == pytest.approx(depth, abs=.05)
        for more in (.1, 1.): assert mean_depth(t, gamma, beta + more) <= mean_depth(t, gamma, beta)


def test_half_precision_stays_in_its_dtype():
    for kw in ({}, dict(global_pool='avg')):
        net = vit(**kw)
        policy = avit_policy(net, *gate(net, 3.))
        out = SlimViT(net.bfloat16(), policy, 'packed')(images().bfloat16())
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@pytest.mark.parametrize('given, said', [
    (dict(offset=float('nan')), 'offset: got nan'), (dict(offset='1'), 'offset: got 1'), (dict(gamma=0.), 'gamma: got 0.0'),
    (dict(gamma=-1.), 'gamma: got -1.0'), (dict(beta=-10.), 'beta: got -10.0'), (dict(depth=7.), 'depth: got 7.0'), (dict(depth=0.), 'depth: got 0.0'),
    (dict(ponder_weight=-1.), 'ponder_weight: got -1.0'), (dict(depth_weight='x'), 'depth_weight: got x'),
    (dict(ponder_epochs=-1.), 'ponder_epochs: got -1.0'), (dict(offset=1., reduction=.3), 'either reduction or offset'),
    (dict(reduction=.99), 'reduction: got 0.99'), (dict(keep_rate=.5), 'nothing for avit'), (dict(calibration=1000), 'calibration: got 1000')])
def test_bad_options(few, given, said):
    with pytest.raises(VitpruneError, match=said): prune('avit', vit(), few, **dict(calibration=6, ponder_epochs=0.) | given)


def test_bad_constants_and_one_block():
    with pytest.raises(VitpruneError, match='gamma: got 0'): avit_policy(vit(), 0., 1.)
    with pytest.raises(VitpruneError, match='beta: got inf'): avit_policy(vit(), 1., math.inf)
    with pytest.raises(VitpruneError, match='model: got one of a single block'):
        prune('avit', vit(depth=1), embedded('train').subset(range(20)), calibration=6)


@pytest.mark.parametrize('reduction', [.1, .35, .6])
@pytest.mark.parametrize('pool', ['token', 'avg'])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction, pool):
    net = vit(global_pool=pool)
    slim = prune('avit', net, few, reduction=reduction, calibration=20, ponder_epochs=2, batch_size=10, dtype='fp32')
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.mode == 'packed'
    assert counts_of(slim) == [tuple(c) for c in slim.info['counts']]
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict() and back.info['counts'] == slim.info['counts']
    assert isinstance(back.scorers[0], HaltingScore) and back.policy.steps[1].fate == MeanField(int(pool == 'token'))
    before = slim.info['counts']
    recover(slim, few, 2, lr=1e-3, batch_size=10, dtype='fp32')
    assert slim.info['counts'] != before and slim.mode == 'packed'   # other weights, other counts: measured again


def test_one_training_serves_all_budgets(few):
    how = dict(calibration=20, ponder_epochs=2, batch_size=10, dtype='fp32')
    free, *budgets = (prune('avit', vit(), few, **how, **kw) for kw in ({}, dict(reduction=.2), dict(reduction=.5)))
    for slim in budgets:
        assert all(torch.equal(a, b) for a, b in zip(free.state_dict().values(), slim.state_dict().values()))
        assert (slim.info['gamma'], slim.info['beta']) == (free.info['gamma'], free.info['beta'])
    assert free.info['offset'] == 0 and budgets[0].info['offset'] < budgets[1].info['offset']


def test_its_default_and_its_fate():
    m, config = read_options('avit', {})
    assert m is METHODS['avit'] and config.offset is None and config.ponder_epochs == 1
    for reads in (0, 1, 2):
        assert fate_of(fate_to_value(MeanField(reads))) == MeanField(reads)
        assert MeanField(reads).just_leave == (reads > 0)
    policy = avit_policy(vit(), 2., -3.)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))).to_dict() == policy.to_dict()


def test_no_file_for_counts_that_depend_on_the_image(tmp_path):
    slim = SlimViT(vit(depth=2), avit_policy(vit(depth=2), 2., 0.), 'packed').eval()
    with pytest.raises(VitpruneError, match='computes the same operations for all images'): export_onnx(slim, tmp_path/'m.onnx', images(2))
    assert not (tmp_path/'m.onnx').exists()


def test_killed_it_ends_with_the_same_weights(few, tmp_path, monkeypatch):
    how = dict(reduction=.3, calibration=20, ponder_epochs=11, batch_size=10, dtype='fp32')       # 55 steps
    whole = prune('avit', vit(depth=4), few, **how)
    real = Trainer.one_step
    def dies(tr):
        if tr.step == 52: raise KeyboardInterrupt                     # after its checkpoint
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('avit', vit(depth=4), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('avit', vit(depth=4), few, work=tmp_path/'w', **how)
    assert again.info['offset'] == whole.info['offset']
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'avit', '--reduction', '0.35', '--calibration', '20', '--ponder-epochs', '0', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'avit' and abs(record['reduction'] - .35) < .02
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'avit', '--beta', '-10', '--out', str(tmp_path/'p')]) == 2
    assert 'a number together with gamma' in capsys.readouterr().err
