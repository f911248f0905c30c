"Evo-ViT where a notebook does not look: other ViTs, other precisions, files, two heads, a run that is killed."
import json

import pytest
import torch
import torch.nn.functional as F

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import OnnxModel, export_onnx, logit_gap
from vitprune_nb.engine.fates import fate_of
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.policy import NormScore, Policy, Step, schedule_policy
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, prune, read_options, recover
from vitprune_nb.methods.evovit import (EvoPlan, GlobalAttention, blocks_then_stages, evo_recipe, evo_stages, second_head,
                                        two_heads)
from vitprune_nb.train.trainer import Trainer, fit
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(reg_tokens=3), 'average': dict(global_pool='avg'),
         'qk norm and layer scale': dict(qk_norm=True, init_values=.7), 'average behind the norm': dict(global_pool='avg', fc_norm=False)}


def vit(depth=6, loud=1., **kw):
    torch.manual_seed(0)
    net = create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
                     **kw).eval()
    for b in net.blocks: b.attn.qkv.weight.data[:96] *= loud        # attention that is far from even: else none comes back
    return net


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def oracle(net, image, plan, layer_wise):
    """One image; patches lie in the order of their rank, as in the paper's code, and are put back at the end; the
    representative is carried through a stage."""
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    place, g, token, k = list(range(len(x) - p)), None, None, plan.patches
    for number, block in enumerate(net.blocks, 1):
        if number in plan.stages or layer_wise and number > plan.stages[0]:
            order = sorted(range(len(g)), key=lambda i: -g[i])
            x = torch.cat([x[:p], x[p:][order]])
            g, place, k = [g[i] for i in order], [place[i] for i in order], plan.count
            if plan.representative:
                w = torch.tensor(g[k:], dtype=x.dtype)
                token = ((w/w.sum())[:, None]*x[p + k:]).sum(0, keepdim=True)
        enters = torch.cat([x[:p + k], *([] if token is None else [token])])
        a, y = block.attn, block.norm1(enters)
        q, key, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(y).chunk(3, 1))
        P = ((a.q_norm(q) @ a.k_norm(key).transpose(1, 2))*a.scale).softmax(-1)
        leaves = enters + block.ls1(a.proj((P @ v).transpose(0, 1).flatten(1)))
        leaves = leaves + block.ls2(block.mlp(block.norm2(leaves)))
        waits = x[p + k:]
        if token is not None:
            waits, token = waits + leaves[-1] - token[0], leaves[-1:]
        x = torch.cat([leaves[:p + k], waits])
        paid = P[:, 0, p:p + k].sum(0).tolist()
        g = paid if number < plan.stages[0] else [.5*old + .5*new for old, new in zip(g, paid)] + g[k:]
    back = sorted(range(len(place)), key=place.__getitem__)
    return net.forward_head(net.norm(torch.cat([x[:p], x[p:][back]])[None]))[0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('representative', [False, True])
def test_an_oracle_in_double_precision(kind, representative):
    net, x, g, back = vit(loud=8., **KINDS[kind]).double(), images().double(), torch.Generator().manual_seed(1), 0
    for case in range(4):
        rate = .05 + .9*torch.rand((), generator=g).item()
        stages = tuple(sorted((torch.randperm(5, generator=g)[:1 + (case + 1) % 3] + 2).tolist()))
        plan = EvoPlan(64, rate, 6, stages, representative)
        policy = plan.policy(layer_wise=case == 3)
        with torch.no_grad():
            want = torch.stack([oracle(net, image, plan, case == 3) for image in x])
            for mode in ('mask', 'gather', 'packed'):
                gap = (SlimViT(net, policy, mode)(x) - want).abs().max().item()
                assert gap < 1e-5, (kind, rate, stages, mode, gap)      # scores are fp32
        kept = SlimViT(net, policy).kept(x)[:, stages[0] - 1:]
        back += (kept[:, 1:] & ~kept[:, :-1]).sum().item()
    assert back > 0 or 'qk norm' in kind                                # which makes all keys equally long again


@pytest.mark.parametrize('fate, tokens', [('represented', 34), ({'kind': 'represented'}, 34), ('idle', 33), ('remove', 33)])
def test_a_schedule_chooses_anew_wherever_tokens_stay(fate, tokens):
    "Of 64 patches 32 are computed in three blocks, with CLS and, where there is one, the representative."
    policy = schedule_policy([1, .5, .5, .5], 4, 64, NormScore(), fate=fate)
    assert policy.counts(4, 65) == [(65,)*3, *[(tokens,)*3]*3]
    assert len(policy.steps) == (1 if fate == 'remove' else 3)


@pytest.mark.parametrize('kind', KINDS)
def test_modes_agree_on_other_vits(kind):
    net = vit(loud=8., **KINDS[kind])
    for representative in (False, True): check_policy(net, EvoPlan(64, .4, 6, (2, 5), representative).policy(), images())
    full = EvoPlan(64, 1., 6, (2, 5)).policy()
    assert not full.steps and torch.equal(SlimViT(net, full)(images()), net(images()))


@pytest.mark.parametrize('rate, stages', [(.5, (3, 5)), (.02, (2,)), (.99, (2, 3, 4, 5, 6)), (.3, (6,))])
@pytest.mark.parametrize('representative', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_macs_are_counted(kind, rate, stages, representative):
    slim = SlimViT(vit(**KINDS[kind]), EvoPlan(64, rate, 6, stages, representative).policy())
    assert macs_of(slim) == count_macs(slim, images())/3


def test_published_macs_of_deit():
    for name, printed in (('tiny', .8), ('small', 3.0), ('base', 11.7)):
        with torch.device('meta'): net = create_vit(f'deit_{name}_patch16_224')
        assert round(macs_of(SlimViT(net, EvoPlan(196, .5, 12, (5, 9)).policy()))/1e9, 1) == printed


def test_a_model_without_class_token_is_refused(few):
    net = vit(class_token=False, global_pool='avg', name='vit_tiny_patch16_224')
    with pytest.raises(VitpruneError, match='without a class token'): prune('evovit', net, few, keep_rate=.5, finetune_epochs=0)


def test_a_permutation_of_the_patches_changes_nothing():
    "Scores go with the patches: the same tokens in another order give the same logits and the permuted choice."
    net, order = vit(loud=8.), torch.randperm(64, generator=torch.Generator().manual_seed(3))
    slim, first, second = SlimViT(net, EvoPlan(64, .5, 6, (3, 5), True).policy()), [], []
    a = slim(images(), record=first)
    embed = net._pos_embed
    net._pos_embed = lambda x: torch.cat([(t := embed(x))[:, :1], t[:, 1:][:, order]], 1)
    b = slim(images(), record=second)
    assert (a - b).abs().max() < 1e-5
    for d, e in zip(first, second): assert torch.equal(d.keep[:, 1:][:, order], e.keep[:, 1:])


def test_the_average_wants_tokens_that_stay():
    score, again = GlobalAttention(), GlobalAttention(renew=False)
    policy = Policy({2: Step(score=score, count=20), 3: Step(fate='idle', score=again, count=9)})
    with pytest.raises(VitpruneError, match='tokens that left before block index 3'): SlimViT(vit(), policy)(images())
    ok = Policy({2: Step(score=score, count=20)})
    assert torch.isfinite(SlimViT(vit(), ok)(images())).all()                # nothing follows
    static = Policy({2: Step(fate='represented', keep=range(9))})
    with pytest.raises(VitpruneError, match='a step with score and count'): SlimViT(vit(), static)(images())
    with pytest.raises(VitpruneError, match="at: got middle"): Step('middle', 'represented', score=NormScore(), count=3)


def test_a_repeated_ranking_without_one_before_renews():
    a, b = (Policy({2: Step(fate='idle', score=s, count=20)}) for s in (GlobalAttention(renew=False), GlobalAttention()))
    assert torch.equal(SlimViT(vit(), a)(images()), SlimViT(vit(), b)(images()))


def test_other_shares_of_the_newest_attention():
    "With a share of 1 nothing is remembered: the ranking is that of the last attention, and who waited keeps the old value."
    net, seen = vit(), []
    scorers = GlobalAttention(1.), GlobalAttention(1., renew=False)
    SlimViT(net, EvoPlan(64, .5, 6, (2, 4)).policy(scorers=scorers))(images(), record=seen)
    waits = ~seen[0].keep
    assert torch.equal(seen[2].scores[waits], seen[0].scores[waits])
    assert not torch.isclose(seen[2].scores[:, 1:], seen[0].scores[:, 1:]).all()
    assert torch.equal(seen[1].scores, seen[0].scores) and torch.equal(seen[1].keep, seen[0].keep)


def test_half_precision_stays_in_its_dtype():
    net = vit().bfloat16()
    for representative in (False, True):
        out = SlimViT(net, EvoPlan(64, .5, 6, (3, 5), representative).policy())(images().bfloat16())
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_gradients_reach_the_patches_that_wait():
    "Through the representative, and through the mean that a second head reads; CLS's own head gives them none."
    net, x = vit(), images()
    plan = EvoPlan(64, .25, 6, (2,))
    def gradient(plan, read):
        slim, found = SlimViT(net, plan.policy()), []
        hooks = net.norm.register_forward_hook(lambda *a: found.append(a[-1])), net.blocks[0].register_forward_hook(
            lambda m, a, out: (out.retain_grad(), found.append(out))[0])
        logits, record = slim(x, record=(record := [])), record
        for h in hooks: h.remove()
        read(logits, found[1]).backward()
        return found[0].grad[~record[0].keep].abs().max().item()
    own, mean = (lambda logits, tokens: logits.square().sum()), (lambda logits, tokens: tokens[:, 1:].mean(1).square().sum())
    assert gradient(plan, own) == 0. and gradient(plan, mean) > 0.
    assert gradient(EvoPlan(64, .25, 6, (2,), True), own) > 0.


@pytest.mark.parametrize('kind', ['cls', 'dist', 'average', 'average behind the norm'])
def test_the_second_head_reads_what_the_first_does_not(kind, few):
    net = vit(**KINDS[kind])
    plan, head = EvoPlan(64, .5, 6, (3, 5)), second_head(net)
    slim = SlimViT(net, plan.policy())
    cfg = evo_recipe(1e-4, epochs=1, batch_size=10, dtype='fp32', label_smoothing=0., augment='none')
    tr = Trainer(slim, few, cfg, objective=two_heads(head, .25))
    x, y = images(4), torch.tensor([0, 3, 5, 9])
    losses = tr.losses(x, y)
    with torch.no_grad():
        tokens, whole = [], SlimViT(net, plan.policy())
        handle = net.norm.register_forward_hook(lambda *a: tokens.append(a[-1]))
        logits = whole.train()(x)
        handle.remove()
        x = tokens[0]
        other = x[:, 0] if 'average' in kind else x[:, net.num_prefix_tokens:].mean(1)
        other = (net.head if kind != 'average' else torch.nn.Sequential(net.fc_norm, net.head))(other)
        want = {'classification': .75*F.cross_entropy(logits, y), 'second_head': .25*F.cross_entropy(other, y)}
    assert losses.keys() == want.keys()
    for name in want: assert abs(losses[name].item() - want[name].item()) < 1e-5, name
    sum(losses.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in head.parameters())
    tr.close()


def test_two_heads_want_all_tokens(few):
    net = vit()
    slim = SlimViT(net, Policy({2: Step(score=NormScore(), count=9)}))
    with pytest.raises(VitpruneError, match='all 65'):
        fit(slim, few, evo_recipe(1e-4, epochs=1, batch_size=10, dtype='fp32'), objective=two_heads(second_head(net)))


def test_the_choice_in_training(few):
    "Before each block for a share of the steps, then at the stages; with two heads the log has both losses."
    net, plan, seen = vit(), EvoPlan(64, .5, 6, (3, 5)), []
    slim, switch = SlimViT(net, plan.policy()), blocks_then_stages(plan, .6)
    def watch(model, done):
        switch(model, done)
        seen.append([s.score.renew for _, s in model.policy.each()])
    head = second_head(net)
    slim.scorers[0].second = head
    before = head[1].weight.clone()
    log = fit(slim, few, evo_recipe(1e-3, epochs=2, batch_size=10, dtype='fp32', ema=.5), before_step=watch, objective=two_heads(head))
    assert seen == ([[True]*4]*2)*6 + ([[True, False]*2]*2)*4                # for the model and its average
    assert set(log[-1]) >= {'classification', 'second_head'} and not torch.equal(head[1].weight, before)


def test_stages_and_options():
    assert evo_stages(12) == (5, 9) and evo_stages(24) == (9, 17) and evo_stages(2) == (2,)
    for given, said in ((dict(stages=[4, 4]), 'stages'), (dict(stages=[7]), 'stages'), (dict(stages=[1, 3]), 'stages'), (dict(stages=[0]), 'stages'),
                        (dict(keep_rate=1.5), 'keep_rate'), (dict(keep_rate=0.), 'keep_rate'), (dict(block_share=2.), 'block_share'),
                        (dict(representative=3), 'representative'), (dict(second_weight=1.), 'second_weight'), (dict(calibration=8), 'calibration'),
                        (dict(reduction=.9), 'reduction'), (dict(reduction=.3, keep_rate=.5), 'keep_rate'), (dict(stages='5'), 'stages')):
        with pytest.raises(VitpruneError, match=said): prune('evovit', vit(), embedded('train').subset(range(20)), **given)
    with pytest.raises(VitpruneError, match='two blocks or more'): prune('evovit', vit(depth=1), embedded('train').subset(range(20)))
    m, config = read_options('evovit', dict(keep_rate=.6))
    assert m is METHODS['evovit'] and config.finetune_epochs == 1. and m.default(config) == .6 and m.default(read_options('evovit', {})[1]) == .5
    with pytest.raises(VitpruneError, match='keep_rate: got 0'): EvoPlan(64, 0., 6, (3,))


@pytest.mark.parametrize('reduction', [.1, .35, .55])
@pytest.mark.parametrize('representative', [False, True])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction, representative):
    slim = prune('evovit', vit(), few, reduction=reduction, representative=representative, finetune_epochs=0)
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.info['representative'] is representative
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict()
    fates = {s.fate for _, s in back.policy.each()}
    assert fates == {fate_of('represented' if representative else 'idle')} and len(back.scorers) == 2
    assert len(recover(slim, few, 1, batch_size=10, dtype='fp32')) == 1


@pytest.mark.parametrize('representative', [False, True])
def test_it_is_exported_as_it_is(tmp_path, representative):
    slim = SlimViT(vit(), EvoPlan(64, .5, 6, (3, 5), representative).policy()).eval()
    exported = OnnxModel(export_onnx(slim, tmp_path/'m.onnx', images(), dynamic=True))
    assert logit_gap(exported, slim, images(5, seed=1)) < 1e-4


def test_killed_while_it_chooses_it_ends_with_the_same_weights(few, tmp_path, monkeypatch):
    how = dict(keep_rate=.5, finetune_epochs=12, batch_size=10, dtype='fp32', block_share=.9)
    whole = prune('evovit', vit(), few, **how)
    real = Trainer.one_step
    def dies(tr):
        if tr.step == 53: raise KeyboardInterrupt
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('evovit', vit(), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('evovit', vit(), few, work=tmp_path/'w', **how)
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'evovit', '--reduction', '0.35', '--finetune-epochs', '0', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'evovit' and abs(record['reduction'] - .35) < .01 and record['stages'] == [5, 9]
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'evovit', '--stages', '9,3', '--out', str(tmp_path/'p')]) == 2
    assert 'rising block numbers from 2 to 12' in capsys.readouterr().err
