"IdleViT where a notebook does not look: other ViTs, other precisions, files, its losses, a run that is killed."
import json

import pytest
import torch
import torch.nn.functional as F

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import OnnxModel, export_onnx, logit_gap
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.policy import Policy, Step, Tokens
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, prune, read_options, recover
from vitprune_nb.methods.idlevit import (ClsLogits, IdlePlan, cut_losses, feature_mse, first_idle, idle_recipe, mean_logits,
                                         normed_inputs, token_cut)
from vitprune_nb.train.objectives import Seen, kl_to_teacher, plus, supervised
from vitprune_nb.train.trainer import Trainer
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(reg_tokens=3), 'average': dict(global_pool='avg'),
         'qk norm and layer scale': dict(qk_norm=True, init_values=.7), 'no bias': dict(qkv_bias=False)}


def vit(depth=6, **kw):
    torch.manual_seed(0)
    net = create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
                     **kw).eval()
    for b in net.blocks:     # timm begins with zeros, and without a bias there is no q times the bias of the keys
        if b.attn.qkv.bias is not None: torch.nn.init.normal_(b.attn.qkv.bias, std=.5)
    return net


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def oracle(net, image, plan):
    "One image in double precision: all keys, a mean over heads, the selected gathered and put back."
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    for number, block in enumerate(net.blocks, 1):
        a = block.attn
        def qkv(z, a=a, block=block):
            q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(block.norm1(z)).chunk(3, 1))
            return a.q_norm(q), a.k_norm(k), v
        rows = list(range(len(x)))
        if number in plan.counts:
            q, k, _ = qkv(x)
            logit = sum(k[h] @ q[h, 0] for h in range(a.num_heads)).tolist()
            best = sorted(range(p, len(x)), key=lambda i: -logit[i])
            rows = [*range(p), *best[:plan.counts[number]]]
        z = x[rows]
        q, k, v = qkv(z)
        z = z + block.ls1(a.proj((((q @ k.transpose(1, 2))*a.scale).softmax(-1) @ v).transpose(0, 1).flatten(1)))
        z = z + block.ls2(block.mlp(block.norm2(z)))
        x = torch.stack([z[rows.index(i)] if i in rows else x[i] for i in range(len(x))])
    return net.forward_head(net.norm(x[None]))[0]


@pytest.mark.parametrize('kind', KINDS)
def test_an_oracle_in_double_precision(kind):
    net, x, g = vit(**KINDS[kind]).double(), images().double(), torch.Generator().manual_seed(1)
    for case in range(4):
        plan = IdlePlan(64, .05 + .9*torch.rand((), generator=g).item(), 6, 1 + case)
        with torch.no_grad():
            want = torch.stack([oracle(net, image, plan) for image in x])
            for mode in ('mask', 'gather', 'packed'):
                gap = (SlimViT(net, plan.policy(), mode)(x) - want).abs().max().item()
                assert gap < 1e-9, (kind, plan, mode, gap)


@pytest.mark.parametrize('kind', KINDS)
def test_modes_agree_on_other_vits(kind):
    net = vit(**KINDS[kind])
    check_policy(net, IdlePlan(64, .5, 6, 2).policy(), images())
    full = IdlePlan(64, 1., 6, 2).policy()
    assert not full.steps and torch.equal(SlimViT(net, full)(images()), net(images()))


@pytest.mark.parametrize('kind', KINDS)
def test_the_score_is_the_logit_of_cls_but_for_a_constant(kind):
    net = vit(**KINDS[kind]).double()
    g = torch.Generator().manual_seed(4)
    block, x = net.blocks[3], torch.randn(2, 70, 48, generator=g).double()
    for p in block.attn.parameters(): p.data += .1*torch.randn(p.shape, generator=g)      # biases, too
    t = Tokens(x, None, torch.arange(70).expand(2, 70), 3, net.num_prefix_tokens, {}, layer=block)
    y = block.norm1(x)
    away = ClsLogits()(t) - mean_logits(block.attn, y, y)[:, 0]
    assert (away - away[:, :1]).abs().max() < 1e-5                                 # scores are fp32
    if kind == 'cls': assert away.abs().max() > 1e-3                                # the bias of the keys is left out


@pytest.mark.parametrize('rate, first', [(.7, 3), (.02, 1), (.99, 6), (.3, 2)])
@pytest.mark.parametrize('kind', KINDS)
def test_macs_are_counted(rate, first, kind):
    slim = SlimViT(vit(**KINDS[kind]), IdlePlan(64, rate, 6, first).policy())
    assert macs_of(slim) == count_macs(slim, images())/3


def test_macs_of_deit_s():
    with torch.device('meta'): net = create_vit('deit_small_patch16_224')
    slim = SlimViT(net, IdlePlan(196, .7, 12, 5).policy())
    blocks = 2*3.133 - 3.133                                                       # keys of those selected, without a score
    assert abs(macs_of(slim)/1e9 - blocks) < .004 and abs(macs_of(slim)/macs_of(net) - .682) < .001


def test_what_it_cannot_do_is_refused(few):
    net = vit(class_token=False, global_pool='avg', name='vit_tiny_patch16_224')
    with pytest.raises(VitpruneError, match='without a class token'): prune('idlevit', net, few, keep_rate=.5, finetune_epochs=0)
    with pytest.raises(VitpruneError, match='without a class token'): SlimViT(net, IdlePlan(64, .5, 6, 3).policy())(images())


def test_idle_patches_are_untouched_and_come_back():
    slim = SlimViT(vit(), IdlePlan(64, .5, 6, 2).policy()).eval()
    with torch.no_grad(): _, maps = slim.forward_intermediates(images(), output_fmt='NLC')
    kept = slim.kept(images())
    for i in range(1, 6): assert torch.equal(maps[i][~kept[:, i]], maps[i - 1][~kept[:, i]])
    assert ((kept[:, 2:] & ~kept[:, 1:-1]).sum((0, 2)) > 0).all()


def test_a_permutation_of_the_patches_changes_nothing():
    net, order = vit(), torch.randperm(64, generator=torch.Generator().manual_seed(3))
    slim, first, second = SlimViT(net, IdlePlan(64, .5, 6, 2).policy()), [], []
    a = slim(images(), record=first)
    embed = net._pos_embed
    net._pos_embed = lambda x: torch.cat([(t := embed(x))[:, :1], t[:, 1:][:, order]], 1)
    b = slim(images(), record=second)
    assert (a - b).abs().max() < 1e-5
    for d, e in zip(first, second): assert torch.equal(d.keep[:, 1:][:, order], e.keep[:, 1:])


def test_it_follows_a_step_after_which_tokens_are_gone():
    net = vit()
    steps = {1: Step(score=ClsLogits(), count=40), 3: Step(fate='idle', score=ClsLogits(), count=9), 4: Step('middle', 'fuse', score=ClsLogits(), count=20)}
    check_policy(net, Policy(steps), images())


def test_half_precision_stays_in_its_dtype():
    out = SlimViT(vit().bfloat16(), IdlePlan(64, .5, 6, 3).policy())(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def slow_losses(net, teacher, plan, x, y):
    "The paper's losses, image by image and token by token, from the masked model written out."
    total = {n: 0. for n in ('classification', 'token_cut', 'kl', 'feature')}
    def whole(model): return model.norm(forward(model)[0])
    def forward(model, cuts=()):
        z, seen = model._pos_embed(model.patch_embed(x)), []
        for number, block in enumerate(model.blocks, 1):
            a = block.attn
            q, k, v = (t.unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for t in a.qkv(block.norm1(z)).chunk(3, -1))
            logits = q @ k.transpose(2, 3)*a.scale
            m = torch.ones(len(x), z.shape[1])
            if number in cuts:
                best = logits.mean(1)[:, 0, 1:].argsort(descending=True)[:, :plan.counts[number]] + 1
                m = torch.zeros_like(m).scatter(1, best, 1.)
                m[:, 0] = 1.
                seen.append((logits.mean(1).softmax(-1), m))
            out = a.proj(((logits + (m[:, None, None] - 1)*1e5).softmax(-1) @ v).transpose(1, 2).flatten(2))
            z = z + out*m[..., None]
            z = z + block.mlp(block.norm2(z))*m[..., None]
        return z, seen
    z, seen = forward(net, plan.counts)
    z = net.norm(z)
    for W, m in seen:
        n = m.shape[1]
        for b in range(len(x)):
            for i in range(n):
                within = (m[b, i]*m[b]*W[b, i]).sum()
                across = ((m[b, i] - m[b]).abs()*W[b, i])[1:].sum()
                total['token_cut'] = total['token_cut'] + 20*((within - m[b, i])**2 + across**2)/(len(seen)*len(x)*n)
    t = whole(teacher)
    u, w = F.normalize(z[:, 0], dim=-1), F.normalize(t[:, 0], dim=-1)
    total['feature'] = 1000*((u - w)**2).mean()
    p = teacher.head(t[:, 0]).log_softmax(-1)
    total['kl'] = 10*(p.exp()*(p - net.head(z[:, 0]).log_softmax(-1))).sum(-1).mean()
    total['classification'] = F.cross_entropy(net.head(z[:, 0]), y)
    return total


@pytest.mark.parametrize('seed', range(3))
def test_training_is_the_slow_form_loss_and_gradient(seed, few):
    net, teacher, plan = vit(depth=4), vit(depth=4), IdlePlan(64, .4 + .2*seed, 4, 2)
    for p in teacher.parameters(): p.data += .02*torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    slim = SlimViT(net, plan.policy(), 'mask').train()
    cfg = idle_recipe(1e-4, epochs=1, batch_size=10, dtype='fp32', label_smoothing=0., augment='none')
    x, y = images(2, seed), torch.tensor([3, 7])
    with normed_inputs(slim) as inputs:
        tr = Trainer(slim, few, cfg, teacher, plus(supervised, token_cut(inputs), kl_to_teacher(weight=10.), feature_mse()))
        ours = tr.losses(x, y)
        tr.close()
    got = torch.autograd.grad(sum(ours.values()), list(net.parameters()))
    want = slow_losses(net, teacher, plan, x, y)
    assert ours.keys() == want.keys()
    for n in want: assert abs(ours[n].item() - want[n].item()) < 1e-4*max(1, abs(want[n].item())), n
    slow = torch.autograd.grad(sum(want.values()), list(net.parameters()))
    for a, b in zip(got, slow): torch.testing.assert_close(a, b, atol=2e-4*max(1., b.abs().max().item()), rtol=1e-3)


def test_cut_losses_at_their_ends():
    "None idles: nothing to cut. Two islands: nothing crosses. All attention across: both at their worst."
    far = torch.full((1, 5, 5), -60.)
    kept = torch.tensor([[1., 1., 1., 0., 0.]])
    islands = far.clone()
    islands[:, :3, :3] = islands[:, 3:, 3:] = 0.
    assert all(abs(v.item()) < 1e-6 for v in cut_losses(torch.randn(1, 5, 5), torch.ones(1, 5)))
    assert all(abs(v.item()) < 1e-6 for v in cut_losses(islands, kept))
    crossing = far.clone()
    crossing[:, :3, 3:] = crossing[:, 3:, 1:3] = 0.
    intra, inter = cut_losses(crossing, kept)
    assert abs(intra.item() - 3/5) < 1e-6 and abs(inter.item() - 1.) < 1e-6
    to_cls = far.clone()
    to_cls[:, :, 0] = 0.
    assert all(abs(v.item()) < 1e-6 for v in cut_losses(to_cls, kept))             # CLS is kept, and free for all


def test_the_feature_is_what_the_head_reads(few):
    for kind in ('cls', 'average'):
        net = vit(**KINDS[kind])
        slim = SlimViT(net, Policy({}), 'mask')
        a, b = torch.randn(2, 2, 65, 48, generator=torch.Generator().manual_seed(1))
        seen = Seen(images(2), torch.tensor([1, 2]), torch.zeros(2, 10), slim, None, tokens=a, teacher_tokens=b)
        read = (lambda t: t[:, 1:].mean(1)) if kind == 'average' else (lambda t: t[:, 0])
        want = 3*F.mse_loss(F.normalize(read(a)), F.normalize(read(b)))
        assert abs(feature_mse(3.)(seen)['feature'].item() - want.item()) < 1e-6


def test_mean_logits_normalise_keys_where_the_model_does():
    net = vit(qk_norm=True)
    a, y = net.blocks[1].attn, torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    q, k, _ = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in a.qkv(y).chunk(3, -1))
    want = (a.q_norm(q) @ a.k_norm(k).transpose(2, 3)*a.scale).mean(1)
    assert (mean_logits(a, y, y) - want).abs().max() < 1e-6
    assert (mean_logits(a, y[:, :1], y) - want[:, :1]).abs().max() < 1e-6


def test_hooks_leave_no_trace(few):
    net = vit()
    slim = SlimViT(net, IdlePlan(64, .5, 6, 3).policy(), 'mask')
    with pytest.raises(KeyboardInterrupt):
        with normed_inputs(slim): raise KeyboardInterrupt
    trained = prune('idlevit', net, few, keep_rate=.5, batch_size=10, dtype='fp32', finetune_epochs=.2)
    for m in (net, trained): assert not any(b.norm1._forward_hooks for b in m.blocks)


def test_plan_and_options():
    assert [first_idle(n) for n in (12, 24, 16, 1)] == [5, 8, 6, 1]
    assert list(IdlePlan(196, .7, 12, 5).counts.values()) == [137]*3 + [96]*3 + [67]*2
    assert list(IdlePlan(196, .5, 24, 7).counts.values()) == [98]*6 + [49]*6 + [24]*6
    assert list(IdlePlan(9, .01, 3, 1).counts.values()) == [1, 1, 1]
    for given, said in ((dict(first=7), 'first'), (dict(first=0), 'first'), (dict(first=[3]), 'first'), (dict(keep_rate=1.5), 'keep_rate'),
                        (dict(keep_rate=0.), 'keep_rate'), (dict(cut_weight=-1.), 'cut_weight'), (dict(distill_weight='x'), 'distill_weight'),
                        (dict(calibration=8), 'calibration'), (dict(reduction=.99), 'reduction'), (dict(reduction=.3, keep_rate=.5), 'keep_rate')):
        with pytest.raises(VitpruneError, match=said): prune('idlevit', vit(), embedded('train').subset(range(20)), **given)
    m, config = read_options('idlevit', dict(keep_rate=.6))
    assert m is METHODS['idlevit'] and config.finetune_epochs == 1. and m.default(config) == .6 and m.default(read_options('idlevit', {})[1]) == .7
    with pytest.raises(VitpruneError, match='keep_rate: got 0'): IdlePlan(64, 0., 6, 3)


@pytest.mark.parametrize('reduction', [.1, .35, .55])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction):
    slim = prune('idlevit', vit(), few, reduction=reduction, finetune_epochs=0)
    assert abs(slim.info['reduction'] - reduction) < .02
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict() and len(back.scorers) == 1
    assert len(recover(slim, few, 1, batch_size=10, dtype='fp32')) == 1


@pytest.mark.parametrize('weights', [dict(cut_weight=0.), dict(distill_weight=0.), dict(cut_weight=0., distill_weight=0.), dict(keep_rate=1.)])
def test_losses_may_be_left_out(few, weights):
    slim = prune('idlevit', vit(), few, **dict(keep_rate=.5) | weights, batch_size=10, dtype='fp32', finetune_epochs=.4)
    assert torch.isfinite(slim(images())).all()


def test_killed_it_ends_with_the_same_weights(few, tmp_path, monkeypatch):
    how = dict(keep_rate=.5, finetune_epochs=11, batch_size=10, dtype='fp32')
    whole = prune('idlevit', vit(depth=4), few, **how)
    real = Trainer.one_step
    def dies(tr):
        if tr.step == 52: raise KeyboardInterrupt
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('idlevit', vit(depth=4), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('idlevit', vit(depth=4), few, work=tmp_path/'w', **how)
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_it_is_exported_as_it_is(tmp_path):
    slim = SlimViT(vit(), IdlePlan(64, .5, 6, 3).policy()).eval()
    exported = OnnxModel(export_onnx(slim, tmp_path/'m.onnx', images(), dynamic=True))
    assert logit_gap(exported, slim, images(5, seed=1)) < 1e-4


def test_channels_cut_first(few):
    "A model of which VTP has cut channels: its blocks are narrower, and score and cost read them as they are."
    narrow = prune('vtp', vit(), few, reduction=.2, sparse_epochs=0.)
    slim = prune('idlevit', narrow, few, keep_rate=.5, finetune_epochs=0)
    check_policy(slim.model, slim.policy, images())
    assert macs_of(slim) == count_macs(slim, images())/3 and len({slim.scorers[0].macs_in(b, 64) for b in slim.blocks}) > 1


def test_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'idlevit', '--reduction', '0.35', '--finetune-epochs', '0', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'idlevit' and abs(record['reduction'] - .35) < .01 and record['first'] == 5
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'idlevit', '--first', '13', '--out', str(tmp_path/'p')]) == 2
    assert 'a block number from 1 to 12' in capsys.readouterr().err
