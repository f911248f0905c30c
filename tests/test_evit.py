"EViT where a notebook does not look: other ViTs, other precisions, files, the falling keep rate in a run that is killed."
import json
import math

import pytest
import torch

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.engine.fates import FATES, fate_of
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.policy import ClsAttention, Policy, Step
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, prune, read_options, recover
from vitprune_nb.methods.evit import EvitPlan, evit_recipe, evit_stages, falling_rate, keep_rate_warmup
from vitprune_nb.train.trainer import fit
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')


def vit(depth=6, **kw):
    torch.manual_seed(0)
    return create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
                      **kw).eval()


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def oracle(net, image, rate, stages, fuse):
    "One image, token lists in Python, prefix tokens beside CLS never leave; double precision."
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    for number, block in enumerate(net.blocks, 1):
        a, y = block.attn, block.norm1(x)
        q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(y).chunk(3, 1))
        P = ((a.q_norm(q) @ a.k_norm(k).transpose(1, 2))*a.scale).softmax(-1)
        x = x + block.ls1(a.proj((P @ v).transpose(0, 1).flatten(1)))
        if number in stages:
            score = {i: sum(P[h, 0, i].item() for h in range(a.num_heads))/a.num_heads for i in range(p, len(x))}
            best = sorted(score, key=score.get, reverse=True)
            k = math.ceil(rate*len(best))
            rows = [x[i] for i in (*range(p), *best[:k])]
            if fuse and best[k:]: rows.append(torch.stack([score[i]*x[i] for i in best[k:]]).sum(0))
            x = torch.stack(rows)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return net.forward_head(net.norm(x[None]))[0]


@pytest.mark.parametrize('kind', ['cls', 'dist', 'registers', 'qk norm and layer scale', 'average'])
@pytest.mark.parametrize('fuse', [True, False])
def test_an_oracle_in_double_precision(kind, fuse):
    net = {'cls': lambda: vit(), 'dist': lambda: vit(name='deit_tiny_distilled_patch16_224'), 'registers': lambda: vit(reg_tokens=3),
           'qk norm and layer scale': lambda: vit(qk_norm=True, init_values=.7), 'average': lambda: vit(global_pool='avg')}[kind]().double()
    x, g = images().double(), torch.Generator().manual_seed(1)
    for case in range(5):
        rate = .03 + .97*torch.rand((), generator=g).item()
        stages = tuple(sorted((torch.randperm(6, generator=g)[:1 + case % 4] + 1).tolist()))
        policy = EvitPlan(64, rate, stages, fuse).policy()
        with torch.no_grad():
            want = torch.stack([oracle(net, image, rate, stages, fuse) for image in x])
            for mode in ('mask', 'gather', 'packed'):
                gap = (SlimViT(net, policy, mode)(x) - want).abs().max().item()
                assert gap < 2e-6, (kind, rate, stages, mode, gap)      # scores are fp32


@pytest.mark.parametrize('rate, stages, fuse', [(.7, (2, 4, 5), True), (.5, (1,), True), (.3, (1, 2, 3, 4, 5, 6), False), (.01, (6,), True),
                                                 (.99, (2, 4), True), (1., (2, 4), True)])
def test_modes_agree_and_macs_are_counted(rate, stages, fuse):
    net = vit()
    plan = EvitPlan(64, rate, stages, fuse)
    check_policy(net, plan.policy(), images())
    slim = SlimViT(net, plan.policy())
    assert macs_of(slim) == count_macs(slim, images())/3
    if rate == 1: assert torch.equal(slim(images()), net(images())) and not plan.policy().steps


def test_published_macs_of_deit_s_and_b():
    with torch.device('meta'): nets = {n: create_vit(f'deit_{n}_patch16_224') for n in ('small', 'base')}
    def giga(size, rate, fuse=True): return macs_of(SlimViT(nets[size], EvitPlan(196, rate, (4, 7, 10), fuse).policy()))/1e9
    for rate, printed in ((.9, 4.0), (.8, 3.5), (.7, 3.0), (.6, 2.6), (.5, 2.3)): assert round(giga('small', rate), 1) == printed
    assert round(giga('base', .7), 1) == 11.6
    tokens = [n[2] for n in EvitPlan(196, .7, (4, 7, 10)).policy().counts(12, 197)]
    assert tokens == [197]*3 + [140]*3 + [100]*3 + [72]*3


def test_the_fused_token_competes_with_its_new_attention():
    "A fused token that leaves later is in the next sum once, by its own attention; no size enters the attention."
    net, seen = vit(), []
    slim = SlimViT(net, EvitPlan(64, .5, (2, 3)).policy(), 'mask')
    slim(images(), record=seen)
    first, second = seen
    assert first.keep.sum(1).tolist() == [33]*3 and second.keep.shape[1] == 66 and second.keep.sum(1).tolist() == [18]*3
    assert (second.pos[:, -1] == -1).all() and not FATES['attention_sum'].sized
    assert second.scores[:, -1].gt(0).all()


def test_a_static_step_has_nothing_to_weigh_by():
    slim = SlimViT(vit(), Policy({1: Step('middle', 'attention_sum', keep=range(9))}))
    with pytest.raises(VitpruneError, match='a step with score and count'): slim(images())


def test_half_precision_stays_in_its_dtype():
    net = vit().bfloat16()
    slim = SlimViT(net, EvitPlan(64, .5, (2, 4)).policy())
    out = slim(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_gradients_flow_through_the_weights_of_the_sum():
    x = torch.tensor([[[0.], [3.], [5.], [7.]]])
    class Seen: pass
    s = Seen()
    s.x = x
    scores, keep = torch.tensor([[.4, .3, .2, .1]], requires_grad=True), torch.tensor([[True, True, False, False]])
    fused, size, some = fate_of('attention_sum').meet(s, keep, ~keep, scores)
    fused.sum().backward()
    assert abs(fused.item() - 1.7) < 1e-6 and scores.grad.tolist() == [[0., 0., 5., 7.]] and size.tolist() == [[1.]] and some.item()


def test_stages_and_options():
    assert evit_stages(12) == (4, 7, 10) and evit_stages(24) == (8, 14, 20) and evit_stages(2) == (1, 2) and evit_stages(1) == (1,)
    for given, said in ((dict(stages=[4, 4]), 'stages'), (dict(stages=[7]), 'stages'), (dict(stages=[0]), 'stages'), (dict(keep_rate=1.5), 'keep_rate'),
                        (dict(keep_rate=0.), 'keep_rate'), (dict(warmup_share=2.), 'warmup_share'), (dict(fuse=3), 'fuse'), (dict(calibration=8), 'calibration')):
        with pytest.raises(VitpruneError, match=said): prune('evit', vit(), embedded('train').subset(range(20)), **given)
    m, config = read_options('evit', dict(keep_rate=.6))
    assert m is METHODS['evit'] and config.finetune_epochs == 1. and m.default(config) == .6 and m.default(read_options('evit', {})[1]) == .7


@pytest.mark.parametrize('reduction', [.1, .35, .6])
@pytest.mark.parametrize('fuse', [True, False])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction, fuse):
    net = vit()
    slim = prune('evit', net, few, reduction=reduction, fuse=fuse, finetune_epochs=0)
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.info['fuse'] is fuse
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict()
    assert isinstance(next(iter(back.policy.steps.values())).score, ClsAttention)
    teacher = vit()
    logs = recover(slim, few, 1, batch_size=10, dtype='fp32', teacher=teacher, recipe=dict(distill=.5))
    assert all(math.isfinite(r['distillation']) for r in logs)


def test_tokens_during_the_warm_up(few):
    "Never fewer than a step before, all at first, those of the plan at the end, each as its keep rate says."
    net, plan, seen = vit(), EvitPlan(64, .4, (2, 4)), []
    slim, given = SlimViT(net, plan.policy()), None
    warm, given = keep_rate_warmup(plan, .6), slim.policy
    def watch(model, done):
        warm(model, done)
        seen.append([n for *_, n in model.policy.counts(6, 65)])
        now = EvitPlan(64, falling_rate(done, .4, .6), (2, 4)).policy(model.scorers[0])
        assert model.policy.to_dict() == now.to_dict()
    fit(slim, few, evit_recipe(1e-4, epochs=4, batch_size=5, dtype='fp32'), before_step=watch)
    assert seen[0] == [65]*6 and seen[-1] == [n for *_, n in plan.policy().counts(6, 65)]
    assert all(a[-1] >= b[-1] for a, b in zip(seen, seen[1:])) and len({s[-1] for s in seen}) > 5
    assert slim.policy is given


def test_killed_in_the_warm_up_it_ends_with_the_same_weights(few, tmp_path, monkeypatch):
    how = dict(keep_rate=.5, finetune_epochs=12, batch_size=10, dtype='fp32', warmup_share=1.)
    whole = prune('evit', vit(), few, **how)
    from vitprune_nb.train.trainer import Trainer
    real = Trainer.one_step
    def dies(tr):
        if tr.step == 53: raise KeyboardInterrupt
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('evit', vit(), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('evit', vit(), few, work=tmp_path/'w', **how)
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'evit', '--reduction', '0.35', '--finetune-epochs', '0', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'evit' and abs(record['reduction'] - .35) < .01 and record['stages'] == [4, 7, 10]
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'evit', '--stages', '9,3', '--out', str(tmp_path/'p')]) == 2
    assert 'rising block numbers from 1 to 12' in capsys.readouterr().err
