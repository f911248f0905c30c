"PoWER where a notebook does not look: other ViTs, soft against hard, its losses, files, a run that is killed."
import itertools, json

import pytest
import torch
import torch.nn.functional as F

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import OnnxModel, export_onnx, logit_gap
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, Job, prune, read_options, recover
from vitprune_nb.methods.power import (PowerPlan, SoftExtract, clip_retention, mass_penalty, power_recipe, ranks,
                                       retention, retention_rate, soft_policy)
from vitprune_nb.train.objectives import plus, supervised
from vitprune_nb.train.trainer import Trainer
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(reg_tokens=3), 'average': dict(global_pool='avg'),
         'qk norm and layer scale': dict(qk_norm=True, init_values=.7), 'no bias': dict(qkv_bias=False)}
NO_TRAINING = dict(search_epochs=0, finetune_epochs=0)


def vit(depth=6, **kw):
    torch.manual_seed(0)
    return create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
                      **kw).eval()


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def falling(g, depth=6):
    "Random masses; a third of them rise again, which the plan does not follow."
    m = (64*torch.rand(depth, generator=g)).sort(descending=True).values
    return tuple(m[torch.randperm(depth, generator=g)].tolist() if torch.rand((), generator=g) < .3 else m.tolist())


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def attention(block, x): # (n, D) -> its attention (H, n, n), and what it adds (n, D)
    a = block.attn
    q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(block.norm1(x)).chunk(3, 1))
    P = (a.q_norm(q) @ a.k_norm(k).transpose(1, 2)*a.scale).softmax(-1)
    return P, block.ls1(a.proj((P @ v).transpose(0, 1).flatten(1)))


def oracle(net, image, counts):
    "One image: add up the columns one entry at a time, sort in Python, keep the best, by falling score."
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    for block, k in zip(net.blocks, counts, strict=True):
        P, update = attention(block, x)
        x = x + update
        paid = P.mean(0).tolist()
        score = [sum(row[j] for row in paid) for j in range(len(x))]
        best = sorted(range(p, len(x)), key=lambda j: -score[j])[:k]
        x = x[[*range(p), *best]]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return net.forward_head(net.norm(x[None]))[0]


@pytest.mark.parametrize('kind', KINDS)
def test_an_oracle_in_double_precision(kind):
    net, x, g = vit(**KINDS[kind]).double(), images().double(), torch.Generator().manual_seed(1)
    for case in range(4):
        plan = PowerPlan(64, falling(g), .5 + case/2)
        with torch.no_grad():
            want = torch.stack([oracle(net, image, plan.counts) for image in x])
            for mode in ('mask', 'gather', 'packed'):
                gap = (SlimViT(net, plan.policy(), mode)(x) - want).abs().max().item()
                assert gap < 1e-9, (kind, plan, mode, gap)


@pytest.mark.parametrize('kind', KINDS)
def test_modes_agree_on_other_vits(kind):
    net = vit(**KINDS[kind])
    check_policy(net, PowerPlan(64, (60., 50., 40., 30., 9., 1.)).policy(), images())
    full = PowerPlan(64, (64.,)*6).policy()
    assert not full.steps and torch.equal(SlimViT(net, full)(images()), net(images()))


@pytest.mark.parametrize('kind', KINDS)
def test_soft_with_zeros_and_ones_is_the_hard_choice(kind):
    "Who is kept not at all neither answers nor asks, so that later blocks rank as if it were gone."
    net, g = vit(**KINDS[kind]).double(), torch.Generator().manual_seed(2)
    for _ in range(4):
        plan = PowerPlan(64, tuple((1 + 63*torch.rand(6, generator=g)).sort(descending=True).values.tolist()))
        soft = SlimViT(net, soft_policy(net), 'mask').double().train()
        for (_, s), k in zip(soft.policy.each(), plan.counts, strict=True): s.score.r.data[k:] = 0
        hard = SlimViT(net, plan.policy(), 'mask').eval()
        with torch.no_grad():
            assert (soft(images().double()) - hard(images().double())).abs().max() < 1e-6, plan      # scores and weights of averages are fp32
            soft.eval()
            assert (soft(images().double()) - net(images().double())).abs().max() < 1e-12        # in eval mode all stay


def slow_losses(net, r, x, y, weight):
    "Cross-entropy and penalty, image by image, from the soft form written out."
    total = 0.
    for image, label in zip(x, y, strict=True):
        z, kept = net._pos_embed(net.patch_embed(image[None]))[0], torch.ones(65)
        for i, block in enumerate(net.blocks):
            a = block.attn
            q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(block.norm1(z)).chunk(3, 1))
            e = (q @ k.transpose(1, 2)*a.scale).exp()*torch.where(torch.eye(65).bool(), 1., kept)
            P = e/e.sum(-1, keepdim=True)
            z = z + a.proj((P @ v).transpose(0, 1).flatten(1))
            score = (P.mean(0)*kept[:, None]).sum(0)[1:].tolist()
            order = sorted(range(64), key=lambda j, s=score: -s[j])
            kept = torch.stack([kept[0], *(kept[1 + j]*r[i][order.index(j)] for j in range(64))])
            z = z + block.mlp(block.norm2(z))
        total = total + F.cross_entropy(net.head(net.norm(z)[:1]), label[None])/len(x)
    return dict(classification=total, mass=weight*sum((i + 1)*v for i, block in enumerate(r) for v in block))


@pytest.mark.parametrize('seed', range(3))
def test_the_search_is_the_slow_form_loss_and_gradient(seed, few):
    net, g = vit(depth=4), torch.Generator().manual_seed(seed)
    slim = SlimViT(net, soft_policy(net), 'mask').train()
    with torch.no_grad():
        for _, s in slim.policy.each(): s.score.r.copy_(torch.rand(64, generator=g))
    x, y = images(2, seed), torch.tensor([3, 7])
    tr = Trainer(slim, few, power_recipe(1e-4, epochs=1, batch_size=10, dtype='fp32', augment='none'), None, plus(supervised, mass_penalty(.01)))
    ours = tr.losses(x, y)
    tr.close()
    weights = list(net.parameters()) + [s.score.r for _, s in slim.policy.each()]
    got = torch.autograd.grad(sum(ours.values()), weights)
    want = slow_losses(net, [s.score.r for _, s in slim.policy.each()], x, y, .01)
    for n in want: assert abs(ours[n].item() - want[n].item()) < 1e-4*max(1, abs(want[n].item())), n
    slow = torch.autograd.grad(sum(want.values()), weights)
    for a, b in zip(got, slow, strict=True): torch.testing.assert_close(a, b, atol=2e-4*max(1., b.abs().max().item()), rtol=1e-3)
    assert torch.allclose(got[-1], torch.full((64,), .04)) and got[-2].sub(.03).abs().max() > 0    # the last block: the penalty alone


def test_ranks_and_retention():
    assert ranks(torch.tensor([[.1, .5, .3, .5]])).tolist() == [[3, 0, 2, 1]]
    g, soft = torch.Generator().manual_seed(0), SlimViT(vit(), soft_policy(vit()), 'mask')
    for _ in range(5):
        s = torch.rand(2, 9, generator=g)
        assert ranks(s).tolist() == [[sum(v > w for v in row) for w in row] for row in s.tolist()]
    with torch.no_grad():
        for _, s in soft.policy.each(): s.score.r.copy_(torch.linspace(-1, 2, 64))
    assert retention(soft).shape == (6, 64) and 0 <= retention(soft).min() and retention(soft).max() <= 1
    clip_retention(soft, 0.)
    assert all(torch.equal(s.score.r.detach(), torch.linspace(-1, 2, 64).clamp(0, 1)) for _, s in soft.policy.each())
    assert retention_rate(40) == .1 and retention_rate(10**6) == 3e-3


@pytest.mark.parametrize('masses', [(60., 50., 40., 30., 20., 1.), (64.,)*5 + (0.,), (5., 60., 3., 3., 2.9, 2.9), (64.,)*6])
@pytest.mark.parametrize('kind', KINDS)
def test_macs_are_counted(masses, kind):
    slim = SlimViT(vit(**KINDS[kind]), PowerPlan(64, masses).policy())
    assert macs_of(slim) == count_macs(slim, images())/3


def test_counts_never_rise_and_one_stays():
    assert PowerPlan(64, (60.9, 61.5, 12.2, 0.)).counts == [60, 60, 12, 1]
    assert PowerPlan(64, (60.9, 61.5, 12.2, 0.), 2.).counts == [64, 64, 24, 2] and PowerPlan(64, (0.,)*3, 64.).counts == [64]*3
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        m = falling(g)
        now = [PowerPlan(64, m, s).counts for s in (.2, .7, 1., 1.3, 5.)]
        assert all(a >= b for c in now for a, b in zip(c, c[1:])) and all(a <= b for c, d in zip(now, now[1:]) for a, b in zip(c, d))
        assert all(1 <= k <= 64 for c in now for k in c)


def test_what_is_refused():
    for given, said in ((dict(scale=0.), 'scale'), (dict(scale=-1.), 'scale'), (dict(scale='x'), 'scale'), (dict(mass_weight=-1.), 'mass_weight'),
                        (dict(mass_weight='x'), 'mass_weight'), (dict(retention_lr=0.), 'retention_lr'), (dict(search_epochs=-1.), 'search_epochs'),
                        (dict(calibration=8), 'calibration'), (dict(reduction=.99), 'reduction'), (dict(reduction=.3, scale=1.), 'scale')):
        with pytest.raises(VitpruneError, match=said): prune('power', vit(), embedded('train').subset(range(20)), **NO_TRAINING | given)
    for masses, said in (((), 'masses'), ((65.,), 'masses'), ((-1.,), 'masses')):
        with pytest.raises(VitpruneError, match=said): PowerPlan(64, masses)
    with pytest.raises(VitpruneError, match='scale: got 0'): PowerPlan(64, (3.,), 0.)
    m, config = read_options('power', {})
    assert m is METHODS['power'] and m.default(config) == 1. and m.at(.5) == 1.


@pytest.mark.parametrize('reduction', [.1, .35, .55])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction):
    slim = prune('power', vit(), few, reduction=reduction, **NO_TRAINING)
    assert abs(slim.info['reduction'] - reduction) < .02 and len(slim.info['patches']) == 6
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict() and len(back.scorers) == 1
    assert len(recover(slim, few, 1, batch_size=10, dtype='fp32')) == 1


def test_the_search_finds_fewer_and_a_budget_is_met_after_it(few):
    how = dict(search_epochs=4, finetune_epochs=1, batch_size=10, dtype='fp32', mass_weight=.01)
    slim = prune('power', vit(), few, **how)
    m = slim.info['masses']
    assert slim.info['scale'] == 1 and m[0] > m[-1] and m[-1] < 6 and slim.info['patches'] == PowerPlan(64, tuple(m)).counts
    scaled = prune('power', vit(), few, reduction=.3, **how)
    assert scaled.info['masses'] == m and abs(scaled.info['reduction'] - .3) < .02 and scaled.info['scale'] > 1
    assert not torch.equal(scaled.head.weight, vit().head.weight) and not any(isinstance(s, SoftExtract) for s in scaled.scorers)


def test_without_a_penalty_everything_stays(few):
    job = Job(vit(), few, read_options('power', dict(mass_weight=0., batch_size=10, dtype='fp32', retention_lr=1e-6))[1])
    assert METHODS['power'].prepare(job).min() > .99


@pytest.mark.parametrize('step', [52, 57])                        # in the search, after its checkpoint; and in retraining
def test_killed_it_ends_with_the_same_weights(few, tmp_path, monkeypatch, step):
    how = dict(search_epochs=11, finetune_epochs=1, batch_size=10, dtype='fp32')
    whole = prune('power', vit(depth=4), few, **how)
    real, steps = Trainer.one_step, itertools.count()
    def dies(tr):
        if next(steps) == step: raise KeyboardInterrupt
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('power', vit(depth=4), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('power', vit(depth=4), few, work=tmp_path/'w', **how)
    assert whole.info['patches'] == again.info['patches']
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_a_permutation_of_the_patches_changes_nothing():
    net, order = vit(), torch.randperm(64, generator=torch.Generator().manual_seed(3))
    slim = SlimViT(net, PowerPlan(64, (50., 40., 30., 20., 10., 1.)).policy())
    a, embed = slim(images()), net._pos_embed
    net._pos_embed = lambda x: torch.cat([(t := embed(x))[:, :1], t[:, 1:][:, order]], 1)
    assert (a - slim(images())).abs().max() < 1e-5


def test_half_precision_stays_in_its_dtype():
    out = SlimViT(vit().bfloat16(), PowerPlan(64, (50., 40., 30., 20., 10., 1.)).policy())(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_it_is_exported_as_it_is(tmp_path):
    slim = SlimViT(vit(), PowerPlan(64, (50., 40., 30., 20., 10., 1.)).policy()).eval()
    exported = OnnxModel(export_onnx(slim, tmp_path/'m.onnx', images(), dynamic=True))
    assert logit_gap(exported, slim, images(5, seed=1)) < 1e-4


def test_from_the_command_line(tmp_path, capsys):
    out, still = str(tmp_path/'o'), ['--search-epochs', '0', '--finetune-epochs', '0']
    assert main(['prune', '--method', 'power', '--reduction', '0.35', *still, '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'power' and abs(record['reduction'] - .35) < .02 and len(record['patches']) == 12
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'power', '--scale', '0', *still, '--out', str(tmp_path/'p')]) == 2
    assert 'a number above 0' in capsys.readouterr().err
