"ToMe where its notebook does not look: other ViTs, other precisions, odd counts, files, export, the command line."
import json

import pytest
import torch
import torch.nn.functional as F

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import OnnxModel, export_onnx, logit_gap
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.modes import run_blocks
from vitprune_nb.engine.policy import NormScore, Policy, Step
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, prune, read_options, recover
from vitprune_nb.methods.tome import KeySimilarity, MergeMatched, merge_counts, merge_groups, merge_schedule, tome_policy
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')


def vit(depth=6, **kw):
    torch.manual_seed(0)
    return create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
                      **kw).eval()


KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(name='vit_tiny_patch16_224', reg_tokens=3),
         'qk norm and layer scale': dict(name='vit_tiny_patch16_224', qk_norm=True, init_values=.7),
         'average': dict(name='vit_tiny_patch16_224', global_pool='avg'),
         'no class token': dict(name='vit_tiny_patch16_224', global_pool='avg', class_token=False)}


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def oracle(net, image, wanted, proportional):
    "One image: lists of tokens that really move, merged pair by pair."
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    size = [1]*len(x)
    for block, r in zip(net.blocks, wanted):
        a = block.attn
        q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(block.norm1(x)).chunk(3, 1))
        q, k = a.q_norm(q), a.k_norm(k)
        weight = (q @ k.transpose(1, 2)*a.scale).exp()*(torch.tensor(size, dtype=x.dtype) if proportional else 1.)
        P = weight/weight.sum(-1, keepdim=True)
        x = x + block.ls1(a.proj((P @ v).transpose(0, 1).flatten(1)))
        found = []
        for i in range(0, len(x), 2):
            for j in range(1, len(x), 2):
                if min(i, j) >= p: found.append((F.cosine_similarity(k[:, i].mean(0), k[:, j].mean(0), dim=0).item(), i, j))
        best = {}
        for c, i, j in sorted(found): best[i] = (c, j)                   # the last one is the largest
        go = sorted(best, key=lambda i: best[i][0], reverse=True)[:min(r, (len(x) - p)//2)]
        rows = list(x)
        for i in go:
            j = best[i][1]
            rows[j] = (rows[i]*size[i] + rows[j]*size[j])/(size[i] + size[j])
            size[j] += size[i]
        even = [i for i in range(p, len(x)) if i % 2 == 0 and i not in go]
        line = [*range(p), *even, *(i for i in range(p, len(x)) if i % 2)] if go else range(len(x))
        x, size = torch.stack([rows[i] for i in line]), [size[i] for i in line]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    assert sum(size) == net.patch_embed.num_patches + p
    x = net.norm(x[None])
    return net.forward_head(x)[0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('proportional', [True, False])
def test_an_oracle_in_double_precision(kind, proportional):
    net, g = vit(**KINDS[kind]).double(), torch.Generator().manual_seed(1)
    x = images().double()
    for _ in range(4):
        r, tilt = 14*torch.rand((), generator=g).item(), 2*torch.rand((), generator=g).item() - 1
        wanted = merge_schedule(6, r, tilt)
        with torch.no_grad():
            want = torch.stack([oracle(net, image, wanted, proportional) for image in x])
            for mode in ('mask', 'gather', 'packed'):
                gap = (SlimViT(net, tome_policy(net, wanted, proportional), mode)(x) - want).abs().max().item()
                assert gap < 2e-6, (kind, wanted, mode, gap)            # sizes are fp32


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('wanted', [[0]*6, [8]*6, [1, 0, 5, 0, 0, 9], [64]*6, [0, 0, 0, 0, 0, 3]])
def test_modes_agree_and_macs_are_counted(kind, wanted):
    net = vit(**KINDS[kind])
    policy = tome_policy(net, wanted)
    check_policy(net, policy, images())
    slim = SlimViT(net, policy)
    assert macs_of(slim) == count_macs(slim, images())/3
    if not any(wanted): assert torch.equal(slim(images()), net(images())) and not policy.steps


@pytest.mark.parametrize('n_tokens, n_prefix', [(65, 1), (66, 2), (64, 0), (68, 4), (5, 1), (3, 1), (2, 1), (6, 5), (7, 3)])
def test_there_is_room_for_every_merge(n_tokens, n_prefix):
    "Never more than side A has to give, and at least one token on side B to take it."
    n = n_tokens
    for r in merge_counts(n_tokens, n_prefix, [10**6]*9):
        a, b = ([i for i in range(n_prefix, n) if i % 2 == s] for s in (0, 1))
        assert 0 <= r <= len(a) and (b or not r)
        n -= r
    assert n >= max(n_prefix, 1)


def test_schedules_are_never_off_by_more_than_a_half():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        L, r, tilt = int(torch.randint(1, 25, (), generator=g)), 30*torch.rand((), generator=g).item(), 2*torch.rand((), generator=g).item() - 1
        out = merge_schedule(L, r, tilt)
        assert len(out) == L and min(out) >= 0 and abs(sum(out) - L*r) <= .5 + 1e-6
        if L > 1 and tilt <= -.5 and r > 8: assert out[0] > out[-1]
    assert merge_schedule(3, 2, 1) == [0, 2, 4] and merge_schedule(3, 2, -1) == [4, 2, 0] and merge_schedule(3, 0) == [0]*3


def test_sizes_and_weighted_means_are_kept():
    net, x = vit(), torch.randn(2, 65, 48, generator=torch.Generator().manual_seed(3))
    for p in (True, False):
        for mode in ('mask', 'gather', 'packed'):
            seen = []
            real = MergeMatched.meet
            def meet(self, s, keep, drop, scores):
                size = s.size if p else s.memory.get('tome sizes', torch.ones(2, 66)).gather(1, s.pos.clamp_min(0))
                before = (s.x*(size*s.there())[..., None]).sum(1)
                real(self, s, keep, drop, scores)
                size = (s.size if p else s.memory['tome sizes'].gather(1, s.pos.clamp_min(0)))*keep
                seen.append((size.sum(1), before, (s.x*size[..., None]).sum(1)))
            fate = type('Watched', (MergeMatched,), dict(meet=meet))(p)
            steps = {i: Step('middle', fate, score=s.score, count=s.count) for i, s in tome_policy(net, [7]*6, p).steps.items()}
            with torch.no_grad(): run_blocks(x, net.blocks, steps, mode)
            assert len(seen) == 6
            for total, before, after in seen:
                assert total.tolist() == [65., 65.] and torch.allclose(before, after, atol=1e-4)


def test_groups_are_the_tokens_that_are_left():
    for kind in ('cls', 'dist', 'no class token'):
        net = vit(**KINDS[kind])
        slim = SlimViT(net, tome_policy(net, [9, 0, 3, 7, 2, 11]), 'packed')
        groups = merge_groups(slim, images())
        assert groups.shape == (3, 6, slim.n_tokens) and slim.mode == 'packed' and not slim.scorers[0]._forward_hooks
        kept, p = slim.kept(images()), slim.num_prefix_tokens
        for b in range(3):
            for l in range(6): assert set(groups[b, l].tolist()) == {*range(p), *(kept[b, l].nonzero().squeeze(1) + p).tolist()}
        assert (groups[:, :, :p] == torch.arange(p)).all()
        for l in range(1, 6):                                            # who is together stays together
            for b in range(3):
                pairs = set(zip(groups[b, l - 1].tolist(), groups[b, l].tolist()))
                assert len(pairs) == len(groups[b, l - 1].unique())


def test_a_zero_key_is_like_nobody():
    "Keys of length 0 give a cosine of 0, no NaN."
    net = vit(depth=2)
    d = 48
    net.blocks[0].attn.qkv.weight.data[d:2*d] = 0
    net.blocks[0].attn.qkv.bias.data[d:2*d] = 0
    out = SlimViT(net, tome_policy(net, [5, 5]))(images())
    assert torch.isfinite(out).all()


def test_gradients_reach_all_tokens_and_keys_get_none_from_the_choice():
    net, x = vit(), images()
    slim = SlimViT(net, tome_policy(net, [9]*6)).train()
    slim(x).square().sum().backward()
    assert net.pos_embed.grad.abs().sum(-1).gt(0).all()
    same = SlimViT(net, tome_policy(net, [9]*6), 'mask').train()
    got = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    same(x).square().sum().backward()
    for n, p in net.named_parameters(): assert torch.allclose(p.grad, got[n], atol=2e-4*max(1, got[n].abs().max().item())), n


def test_half_precision_stays_in_its_dtype():
    net = vit().bfloat16()
    out = SlimViT(net, tome_policy(net, [8]*6))(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_a_scorer_without_partners_is_refused():
    slim = SlimViT(vit(), Policy({1: Step('middle', 'tome', score=NormScore(), count=40)}))
    with pytest.raises(VitpruneError, match='whose scorer finds no partners'): slim(images())
    for at in ('before', 'queries'):
        with pytest.raises(VitpruneError, match="'middle' for the fate tome"): Step(at, 'tome', score=NormScore(), count=40)
    for bad in (0, True, 1.5, 'x', None):
        with pytest.raises(VitpruneError, match='head_dim'): KeySimilarity(bad)
    with pytest.raises(VitpruneError, match='proportional'): MergeMatched('no')
    for bad in ([-1], [1.5], ['8'], [8, None]):
        with pytest.raises(VitpruneError, match='wanted: got'): tome_policy(vit(), bad)
    with pytest.raises(VitpruneError, match='slim: got'): merge_groups(slim_of_norms(), images())


def slim_of_norms(): return SlimViT(vit(), Policy({1: Step('middle', score=NormScore(), count=40)}))


@pytest.mark.parametrize('given, said', [
    (dict(r=-1.), 'r: got -1.0; allowed: a number from 0 to a million'), (dict(r=float('nan')), 'r: got nan'), (dict(r=float('inf')), 'r: got inf'),
    (dict(r='8'), "r: got 8"), (dict(r=[8]), 'r: got'), (dict(r=1e7), 'r: got'), (dict(inflection=1.5), 'inflection: got 1.5'),
    (dict(proportional=1), 'proportional: got 1'), (dict(r=4., reduction=.3), 'either reduction or r'), (dict(reduction=.99), 'reduction: got 0.99; allowed: at most'),
    (dict(keep_rate=.5), 'nothing for tome')])
def test_bad_options(few, given, said):
    with pytest.raises(VitpruneError, match=said): prune('tome', vit(), few, **given)


@pytest.mark.parametrize('reduction', [.05, .35, .6])
@pytest.mark.parametrize('proportional, inflection', [(True, 0.), (False, -1.)])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction, proportional, inflection):
    net = vit()
    slim = prune('tome', net, few, reduction=reduction, proportional=proportional, inflection=inflection)
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.info['proportional'] is proportional
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict()
    step = next(iter(back.policy.steps.values()))
    assert step.score.head_dim == 16 and step.fate == MergeMatched(proportional) and step.fate != MergeMatched(not proportional)
    before = slim(images())
    recover(slim, few, 1, batch_size=10, dtype='fp32')
    assert not torch.equal(slim(images()), before)


def test_the_default_is_the_papers_r():
    m, config = read_options('tome', {})
    assert m is METHODS['tome'] and config.r is None and config.proportional and config.inflection == 0
    slim = prune('tome', vit(), embedded('train').subset(range(10)))
    assert slim.info['r'] == 13*64/196 and len(slim.info['tokens']) == 6


def test_it_is_exported(tmp_path):
    net = vit(depth=3)
    slim = SlimViT(net, tome_policy(net, [9, 4, 6]))
    x = images(2)
    assert logit_gap(OnnxModel(export_onnx(slim, tmp_path/'tome.onnx', x)), slim, x) < 1e-4


def test_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'tome', '--reduction', '0.35', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'tome' and abs(record['reduction'] - .35) < .01 and len(record['tokens']) == 12
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'tome', '--r', '4', '--inflection', '-3', '--out', str(tmp_path/'p')]) == 2
    assert 'inflection: got -3.0; allowed: a number from -1 to 1' in capsys.readouterr().err
