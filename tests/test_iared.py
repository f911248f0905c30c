"IA-RED² where its notebook does not look: other ViTs, its gradient, several groups at once, files, a run that is killed."
import itertools, json, math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import export_onnx
from vitprune_nb.engine.macs import counts_of, macs_of
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, Job, prune, read_options, recover
from vitprune_nb.methods.iared import (Interpreter, group_starts, iared_policy, log_chances, make_interpreters,
                                       policy_gradient, reward)
from vitprune_nb.train.trainer import Trainer
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(reg_tokens=3),
         'average': dict(global_pool='avg'), 'no prefix': dict(name='vit_tiny_patch16_224', class_token=False, global_pool='avg'),
         'qk norm and layer scale': dict(qk_norm=True, init_values=.7), 'norm before': dict(name='vit_tiny_patch16_224', pre_norm=True)}
QUICK = dict(policy_epochs=0., block_epochs=0., calibration=20)


def vit(depth=6, **kw):
    torch.manual_seed(0)
    return create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3,
                      num_classes=10, **kw).eval()


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def loud(nets, seed=0, by=.4):
    g = torch.Generator().manual_seed(seed)
    for net in nets:
        for p in net.parameters(): p.data += by*torch.randn(p.shape, generator=g)
    return nets


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def probabilities(s, x, p): # one image (n, D) -> a list for its patches, head by head, nothing folded
    y, d = F.layer_norm(x, x.shape[1:]), s.dim//s.heads
    ask = y[0] if p else F.layer_norm(x.mean(0), x.shape[1:])
    odds = lambda j, h: (s.query(ask)[h*d:(h + 1)*d] @ s.key(y[j])[h*d:(h + 1)*d]).item()/math.sqrt(d)
    return [sum(1/(1 + math.exp(-odds(j, h))) for h in range(s.heads))/s.heads for j in range(p, len(x))]


def oracle(net, policy, image):
    "One image, a list of tokens; where the head averages, one patch stays."
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    for i, block in enumerate(net.blocks):
        if i in policy.steps:
            found = probabilities(policy.steps[i].score, x, p)
            stay = [p + j for j, v in enumerate(found) if v > policy.steps[i].threshold]
            if not stay and net.global_pool == 'avg': stay = [p + max(range(len(found)), key=found.__getitem__)]
            x = x[[*range(p), *stay]]
        x = block(x[None])[0]
    return net.forward_head(net.norm(x[None]))[0]


@pytest.mark.parametrize('kind', KINDS)
def test_an_oracle_in_double_precision(kind):
    net, g, left = vit(**KINDS[kind]).double(), torch.Generator().manual_seed(1), set()
    for case in range(4):
        nets = [s.double() for s in loud(make_interpreters(48, (1, 2, 3, 6)[case], 3, case), case)]
        policy = iared_policy(nets, sorted((torch.randperm(6, generator=g)[:3] + 1).tolist()), .3 + .13*case)
        x = images(seed=case).double()
        with torch.no_grad():
            want = torch.stack([oracle(net, policy, image) for image in x])
            for mode in ('mask', 'packed'):
                slim = SlimViT(net, policy, mode)
                assert (slim(x) - want).abs().max() < 1e-9, (kind, case, mode)
                left |= {tuple(n) for n in slim.kept(x).sum(-1).tolist()}
    assert len(left) > 8                                             # counts differ from image to image


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threshold', [0., .3, .5, .7, 1.])
def test_modes_agree_and_macs_are_counted(kind, threshold):
    net, x = vit(**KINDS[kind]), images()
    policy = iared_policy(loud(make_interpreters(48, 3, 3)), group_starts(6), threshold)
    check_policy(net, policy, x)
    slim = SlimViT(net, policy, 'packed')
    assert all(macs_of(slim, image) == count_macs(slim, image) for image in x.split(1))
    assert macs_of(slim, x) == pytest.approx(count_macs(slim, x)/3, rel=5e-3)     # a batch also scores its padding
    if threshold == 0.: assert slim.kept(x).all() and torch.allclose(slim(x), net(x), atol=1e-5)
    if threshold == 1.: assert (slim.kept(x).sum(-1) == (1 if net.global_pool == 'avg' else 0)).all()


def test_the_folded_product_has_the_gradients_of_the_plain_one():
    for case in range(20):
        g = torch.Generator().manual_seed(case)
        heads, dim = (1, 2, 3, 5)[case % 4], (12, 16, 31)[case % 3]
        s, d = loud([Interpreter(dim, heads)], case)[0].double(), dim//heads
        x, ask = (torch.randn(2, *n, dim, generator=g, dtype=torch.float64) for n in ((7,), ()))
        q, k = s.query(s.norm(ask)).unflatten(-1, (heads, d)), s.key(s.norm(x)).unflatten(-1, (heads, d))
        plain = torch.einsum('bhd,bnhd->bnh', q, k)/math.sqrt(d)
        torch.testing.assert_close(s.odds(x, ask), plain)
        w = torch.randn(plain.shape, generator=g, dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad((o*w).sum(), list(s.parameters())) for o in (s.odds(x, ask), plain)), strict=True):
            torch.testing.assert_close(a, b)


def test_before_the_first_block_a_patch_is_judged_by_itself():
    net, x = vit(), images(2)
    x[1, :, :16] = x[0, :, :16]                                      # the upper half is the same
    found = []
    SlimViT(net, iared_policy(loud(make_interpreters(48, 3, 1)), [1], .5), 'mask')(x, record=found)
    p = found[0].scores[:, 1:]
    torch.testing.assert_close(p[0, :32], p[1, :32])
    assert (p[0, 32:] - p[1, 32:]).abs().min() > 0


class Told(Interpreter):
    "Draws what it is told."
    def soft_keep(self, t, scores): return F.pad(self.choice.expand(len(scores), -1), (t.n_prefix, 0), value=1.)


@pytest.mark.parametrize('seed', range(3))
def test_two_groups_at_once_have_the_gradient_of_the_expected_reward(seed):
    "All 16 × 16 choices of two interpreters for four patches; a second 'drop' of one that has left is no choice."
    torch.manual_seed(seed)
    net = create_vit('deit_tiny_patch16_224', img_size=16, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=3).eval().requires_grad_(False)
    nets = loud([Told(48, 3), Told(48, 2)], seed)
    slim, x = SlimViT(net, iared_policy(nets, [1, 3]), 'mask').train(), torch.randn(1, 3, 16, 16)
    label, bits = net(x).argmax(1), [torch.tensor([i >> j & 1 for j in range(4)]).float() for i in range(16)]
    expected, ours, chances = 0., 0., 0.
    for a, b in itertools.product(bits, bits):
        if (b > a).any(): continue                                   # who has left cannot be kept
        nets[0].choice, nets[1].choice, decisions = a, b, []
        logits = slim(x, record=decisions)
        chance = log_chances(decisions).exp().sum()
        R = reward(logits.argmax(1) == label, b.mean()[None], .7).sum()
        expected, chances = expected + chance*R, chances + chance.item()
        seen = SimpleNamespace(images=x, labels=label, logits=logits, decisions=decisions, model=slim)
        ours = ours - 4*chance.detach()*policy_gradient(.7, 'greedy')(seen)['policy']
    assert abs(chances - 1) < 1e-5
    weights = [p for s in nets for p in s.parameters()]
    slopes = torch.autograd.grad(ours, weights, retain_graph=True), torch.autograd.grad(expected, weights)
    for g, w in zip(*slopes, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-3)
        assert w.abs().max() > 1e-7


def test_the_mean_as_a_baseline_takes_one_share_of_the_batch():
    "E[(R - mean) grad] = (1 - 1/B) E[R grad], for independent images."
    p = torch.tensor([.3, .6, .8], dtype=torch.float64)
    value = lambda b, u: torch.tensor([1., -2., .5])[b]*u + b
    plain, less = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for u in itertools.product((0., 1.), repeat=3):
        chance = math.prod(q if v else 1 - q for q, v in zip(p.tolist(), u))
        R = torch.tensor([value(b, v) for b, v in enumerate(u)], dtype=torch.float64)
        grad = torch.tensor(u, dtype=torch.float64) - p
        plain, less = plain + chance*R*grad, less + chance*(R - R.mean())*grad
    torch.testing.assert_close(less, plain*2/3)


def test_it_draws_while_it_learns_and_decides_when_it_rests():
    net, nets = vit(), make_interpreters(48, 3, 2)
    slim, shares = SlimViT(net, iared_policy(nets, [1, 4]), 'mask').train(), []
    nets[0].requires_grad_(False)
    for seed in range(2):
        torch.manual_seed(seed)
        decisions = []
        slim(images(40), record=decisions)
        assert decisions[0].keep.dtype == torch.bool and decisions[1].keep.is_floating_point()
        assert torch.equal(decisions[0].keep[:, 1:], decisions[0].scores[:, 1:] > .5)
        u, p = decisions[1].keep[:, 1:], decisions[1].scores[:, 1:]
        assert set(u.unique().tolist()) == {0., 1.} and not decisions[1].keep.requires_grad and p.requires_grad
        shares.append(u)
    assert (shares[0] != shares[1]).any() and abs((shares[0] - p).mean()) < .05
    assert not any(d.is_floating_point() for d in (lambda r: (slim.eval()(images(), record=r), [d.keep for d in r])[1])([]))


def test_what_is_drawn_runs_as_it_would_be_removed():
    net, nets = vit(), loud(make_interpreters(48, 3, 2))
    slim, decisions = SlimViT(net, iared_policy(nets, [2, 5]), 'mask').train(), []
    logits, left, steps = slim(images(1), record=decisions), torch.ones(64).bool(), {}
    for d in decisions:
        left = left & (d.keep[0, 1:] > .5)
        steps[d.block] = type(slim.policy.steps[1])(keep=tuple(left.nonzero()[:, 0].tolist()))
    with torch.no_grad(): torch.testing.assert_close(SlimViT(net, type(slim.policy)(steps))(images(1)), logits.detach(), atol=1e-5, rtol=1e-4)


def test_rewards_and_what_is_refused(few):
    assert reward(torch.tensor([True, False]), torch.tensor([.5, .5]), 3.).tolist() == [.75, -3.]
    for given, said in ((dict(penalty=-1.), 'penalty'), (dict(penalty='x'), 'penalty'), (dict(baseline='critic'), 'baseline')):
        with pytest.raises(VitpruneError, match=said): policy_gradient(**given)
    for given, said in ((dict(threshold=1.), 'threshold'), (dict(threshold=-.1), 'threshold'), (dict(threshold='x'), 'threshold'),
                        (dict(penalty=-1.), 'penalty'), (dict(baseline='x'), 'baseline'), (dict(starts=[3, 9]), 'starts'),
                        (dict(starts=[]), 'starts'), (dict(policy_epochs=-1.), 'policy_epochs'), (dict(block_epochs='x'), 'block_epochs'),
                        (dict(reduction=.3, threshold=.5), 'threshold'), (dict(reduction=.999), 'reduction'), (dict(keep_rate=.5), 'keep_rate')):
        with pytest.raises(VitpruneError, match=said): prune('iared', vit(), few, **QUICK | given)
    with pytest.raises(VitpruneError, match='heads: got 49'): Interpreter(48, 49)
    seen = SimpleNamespace(decisions=[SimpleNamespace(keep=torch.ones(2, 5).bool(), n_prefix=1)])
    with pytest.raises(VitpruneError, match='none that was drawn'): policy_gradient()(seen)
    m, config = read_options('iared', {})
    assert m is METHODS['iared'] and m.default(config) == .5 and config.penalty == 1. and config.baseline == 'greedy'


@pytest.mark.parametrize('reduction', [.2, .35, .55])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction):
    slim = prune('iared', vit(), few, reduction=reduction, **QUICK)
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.mode == 'packed' and slim.info['starts'] == [1, 3, 5]
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict() and len(back.scorers) == 3
    before = [s.query.weight.clone() for s in slim.scorers]
    assert len(recover(slim, few, 1, batch_size=10, dtype='fp32')) == 1
    assert all(torch.equal(a, s.query.weight) for a, s in zip(before, slim.scorers))      # a recovery leaves the policy alone
    counts = counts_of(slim)
    assert counts[0] == counts[1] and counts[0][2] >= counts[2][2] >= counts[4][2]


def test_each_phase_trains_its_own_part(few):
    "Interpreters one after the other, each from where it began; the blocks before a group rest with all before them."
    trained = []
    class Watched(type(METHODS['iared'])): pass
    def train(self, model, recipe, name, frozen_parts=(), **kw):
        still = {id(p) for part in frozen_parts for p in part.parameters()}
        moves = [i for i, s in enumerate(model.scorers) if id(s.query.weight) not in still]
        trained.append((name, len(model.scorers), moves, id(model.head.weight) not in still, recipe.freeze, 'objective' in kw))
    job = Job(vit(), few, read_options('iared', dict(batch_size=10))[1])
    job.train = train.__get__(job)
    Watched().prepare(job)
    assert trained == [(f'prepared/{phase}-{g}', g, [g - 1] if phase == 'policy' else [], phase == 'blocks',
                        0 if phase == 'policy' else 2*(g - 1), phase == 'policy') for g in (1, 2, 3) for phase in ('policy', 'blocks')]


def test_more_reward_for_fewer_patches_takes_patches_away(few, monkeypatch):
    "If all answers were right, the policy would learn to drop what it can."
    monkeypatch.setattr('vitprune_nb.methods.iared.reward', lambda right, share, penalty: 1 - share.square())
    how = dict(calibration=20, batch_size=10, dtype='fp32', block_epochs=0., starts=[3])
    before, after = (prune('iared', vit(), few, policy_epochs=e, lr=1e-2, **how) for e in (0., 8.))
    kept = lambda slim: SlimViT(slim.model, slim.policy, 'mask').kept(images(20)).float()[:, 3:].mean()
    assert kept(after) < kept(before) - .1


@pytest.mark.parametrize('step', [3, 8])                             # in the policy's phase, and in that of the blocks
def test_killed_it_ends_with_the_same_weights(few, tmp_path, monkeypatch, step):
    how = dict(policy_epochs=1., block_epochs=1., batch_size=10, dtype='fp32', starts=[2, 4], calibration=20)
    whole = prune('iared', vit(depth=4), few, **how)
    real, steps = Trainer.one_step, itertools.count()
    def dies(tr):
        if next(steps) == step: raise KeyboardInterrupt
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('iared', vit(depth=4), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('iared', vit(depth=4), few, work=tmp_path/'w', **how)
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_a_permutation_of_the_patches_changes_nothing():
    net, order = vit(), torch.randperm(64, generator=torch.Generator().manual_seed(3))
    slim = SlimViT(net, iared_policy(loud(make_interpreters(48, 3, 3)), group_starts(6)), 'packed')
    a, embed = slim(images()), net._pos_embed
    net._pos_embed = lambda x: torch.cat([(t := embed(x))[:, :1], t[:, 1:][:, order]], 1)
    assert (a - slim(images())).abs().max() < 1e-5


def test_half_precision_stays_in_its_dtype():
    slim = SlimViT(vit(), iared_policy(loud(make_interpreters(48, 3, 3)), group_starts(6)), 'packed').bfloat16()
    out = slim(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_an_export_is_refused_with_a_reason(tmp_path):
    slim = SlimViT(vit(), iared_policy(make_interpreters(48, 3, 3), group_starts(6)), 'packed').eval()
    with pytest.raises(VitpruneError) as e: export_onnx(slim, tmp_path/'m.onnx', images())
    assert 'the same operations for all images' in str(e.value)


def test_from_the_command_line(tmp_path, capsys):
    out, still = str(tmp_path/'o'), ['--policy-epochs', '0', '--block-epochs', '0', '--calibration', '20']
    assert main(['prune', '--method', 'iared', '--reduction', '0.35', *still, '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'iared' and abs(record['reduction'] - .35) < .02 and record['starts'] == [1, 5, 9]
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'iared', '--threshold', '1', *still, '--out', str(tmp_path/'p')]) == 2
    assert 'a number in [0, 1)' in capsys.readouterr().err
