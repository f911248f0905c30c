"ATS where its notebook does not look: other ViTs, other precisions, batches, files, the command line."
import json

import pytest
import torch

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import export_onnx
from vitprune_nb.engine.macs import counts_of, macs_of
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.ats import AdaptiveSampling, ats_policy, draw
from vitprune_nb.methods.base import METHODS, prune, read_options, recover
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')


def vit(depth=6, **kw):
    torch.manual_seed(0)
    net = create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3, num_classes=10,
                     **kw).eval()
    for b in net.blocks: b.attn.qkv.weight.data *= 6         # attention that is not flat
    return net


KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(name='vit_tiny_patch16_224', reg_tokens=3),
         'qk norm and layer scale': dict(name='vit_tiny_patch16_224', qk_norm=True, init_values=.7),
         'average': dict(name='vit_tiny_patch16_224', global_pool='avg'), 'norm before': dict(name='vit_tiny_patch16_224', pre_norm=True)}


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def chosen(scores, K, how):
    "Which of a list of scores are drawn: points and parts one after the other, in exact fractions of the total."
    order = sorted(range(len(scores)), key=scores.__getitem__)
    total, ends, run = sum(scores), [], 0.
    for j in order: run += scores[j]/total; ends.append(run)
    if how == 'exact':
        points = [(2*k + 1)/(2*K) for k in range(K)]
        return {order[next((i for i, e in enumerate(ends) if e >= y), len(ends) - 1)] for y in points}
    c = [(e - ends[0])/(ends[-1] - ends[0]) for e in ends]
    low = min(v for v in c if v > 0)
    points = [low + (1 - low)*k/(K - 1) for k in range(K)]
    return {order[min(range(len(c)), key=lambda i: abs(c[i] - y))] for y in points}


def oracle(net, image, K, blocks, how):
    "One image, tokens in a list; prefix tokens beside CLS never leave and never enter the score."
    p, x = net.num_prefix_tokens, net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    for number, block in enumerate(net.blocks, 1):
        a, y = block.attn, block.norm1(x)
        q, k, v = (t.unflatten(1, (a.num_heads, -1)).transpose(0, 1) for t in a.qkv(y).chunk(3, 1))
        P = ((a.q_norm(q) @ a.k_norm(k).transpose(1, 2))*a.scale).softmax(-1)
        x = x + block.ls1(a.proj((P @ v).transpose(0, 1).flatten(1)))
        if number in blocks:
            s = [sum(P[h, 0, j].item() for h in range(a.num_heads))*sum(v[h, j].square().sum().item() for h in range(a.num_heads))**.5
                 for j in range(p, len(x))]
            x = x[[*range(p), *sorted(p + j for j in chosen(s, K, how))]]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return net.forward_head(net.norm(x[None]))[0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', ['exact', 'official'])
def test_an_oracle_in_double_precision(kind, how):
    net, g = vit(**KINDS[kind]).double(), torch.Generator().manual_seed(1)
    x, left = images().double(), set()
    for case in range(4):
        K = int(torch.randint(3, 90, (), generator=g))
        blocks = sorted((torch.randperm(6, generator=g)[:1 + case] + 1).tolist())
        with torch.no_grad():
            want = torch.stack([oracle(net, image, K, blocks, how) for image in x])
            for mode in ('mask', 'packed'):
                slim = SlimViT(net, ats_policy(net, K, blocks, how), mode)
                assert (slim(x) - want).abs().max() < 1e-9, (kind, K, blocks, mode)
                left |= {tuple(n) for n in slim.kept(x).sum(-1).tolist()}
    assert len(left) > 4                                             # counts differ from image to image


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('K', [1, 9, 64, 10**5])
def test_modes_agree_and_macs_are_counted(kind, K):
    net = vit(**KINDS[kind])
    policy = ats_policy(net, K)
    check_policy(net, policy, images())
    slim = SlimViT(net, policy, 'packed')
    x = images()
    assert sum(macs_of(slim, x[i:i + 1]) for i in range(3)) == count_macs(slim, x)
    assert macs_of(slim, x) == pytest.approx(count_macs(slim, x)/3, rel=1e-6)
    if K == 10**5: assert torch.allclose(slim(images()), net(images()), atol=1e-5) and slim.kept(images()).all()


@pytest.mark.parametrize('seed', range(30))
def test_drawing_is_the_slow_form(seed):
    g = torch.Generator().manual_seed(seed)
    n, K = int(torch.randint(2, 40, (), generator=g)), int(torch.randint(2, 60, (), generator=g))
    s = (3*torch.rand((), generator=g)*torch.randn(4, n, generator=g, dtype=torch.float64)).exp()
    here = torch.rand(4, n, generator=g) > .3
    here[:, :2] = True
    s = s*here
    s /= s.sum(1, keepdim=True)
    for how in ('exact', 'official'):
        got = draw(s, here, K, how)
        for b in range(4):
            index = here[b].nonzero().squeeze(1).tolist()
            assert {index[j] for j in chosen(s[b, here[b]].tolist(), K, how)} == set(got[b].nonzero().squeeze(1).tolist())
            if how == 'exact': assert got[b][s[b] >= 1/K + 1e-9].all() and 1 <= got[b].sum() <= min(K, len(index))
            elif len(index) > 2: assert not got[b, min(index, key=lambda j: s[b, j])] and got[b, s[b].argmax()]


def test_odd_scores():
    yes = torch.ones(1, 3, dtype=torch.bool)
    for how in ('exact', 'official'):
        assert draw(torch.tensor([[0., 0., 0.]]), yes, 5, how).sum() == 1                      # nothing says who: one stays
        assert draw(torch.tensor([[0., 1., 0.]]), yes, 5, how).tolist() == [[False, True, False]]
        assert draw(torch.tensor([[0., .4, .6]]), torch.tensor([[True, False, False]]), 5, how).tolist() == [[True, False, False]]
        assert not draw(torch.tensor([[.5, .5]]), torch.zeros(1, 2, dtype=torch.bool), 5, how).any()
    with pytest.raises(VitpruneError, match='sampling: got near'): draw(torch.tensor([[.5, .5]]), yes[:, :2], 5, 'near')


def test_no_image_depends_on_its_batch():
    net, x = vit(), images(6)
    for how in ('exact', 'official'):
        slim = SlimViT(net, ats_policy(net, 64, sampling=how), 'packed')
        together = slim.kept(x)
        assert len(set(together.sum(-1)[:, -1].tolist())) > 1
        for i in range(6): assert torch.equal(slim.kept(x[i:i + 1])[0], together[i])


def test_a_model_without_a_class_token_is_refused(few):
    net = vit(name='vit_tiny_patch16_224', global_pool='avg', class_token=False)
    with pytest.raises(VitpruneError, match='without a class token'): prune('ats', net, few, samples=8)


def test_half_precision_stays_in_its_dtype():
    net = vit().bfloat16()
    out = SlimViT(net, ats_policy(net, 40), 'packed')(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@pytest.mark.parametrize('given, said', [
    (dict(samples=0), 'samples: got 0'), (dict(samples=1.5), 'samples: got 1.5'), (dict(samples='9'), 'samples: got 9'), (dict(samples=2**21), 'samples: got 2097152'),
    (dict(blocks=[0]), 'blocks: got'), (dict(blocks=[7]), 'blocks: got'), (dict(blocks=[4, 4]), 'blocks: got'), (dict(sampling='near'), 'sampling: got near'),
    (dict(samples=9, reduction=.3), 'either reduction or samples'), (dict(reduction=.99), 'reduction: got 0.99'), (dict(keep_rate=.5), 'nothing for ats'),
    (dict(calibration=1000), 'calibration: got 1000')])
def test_bad_options(few, given, said):
    with pytest.raises(VitpruneError, match=said): prune('ats', vit(), few, **dict(calibration=6) | given)


@pytest.mark.parametrize('reduction', [.1, .35, .6])
@pytest.mark.parametrize('sampling', ['exact', 'official'])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction, sampling):
    if sampling == 'official' and reduction == .1: return            # it loses a patch a block whatever K is
    slim = prune('ats', vit(), few, reduction=reduction, sampling=sampling, calibration=20)
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.mode == 'packed'
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict() and back.info['counts'] == slim.info['counts']
    assert isinstance(back.scorers[0], AdaptiveSampling) and back.scorers[0].sampling == sampling
    before = slim.info['counts']
    recover(slim, few, 2, lr=1e-3, batch_size=10, dtype='fp32')
    assert slim.info['counts'] != before and slim.mode == 'packed'   # other weights, other counts: measured again


def test_the_default_is_as_many_points_as_patches(few):
    m, config = read_options('ats', {})
    assert m is METHODS['ats'] and config.samples is None and config.sampling == 'exact'
    slim = prune('ats', vit(), few, calibration=10)
    assert slim.info['samples'] == 64 and slim.info['blocks'] == [2, 3, 4, 5, 6]
    assert counts_of(slim) == [tuple(c) for c in slim.info['counts']]


def test_no_file_for_counts_that_depend_on_the_image(tmp_path):
    slim = SlimViT(vit(depth=2), ats_policy(vit(depth=2), 30), 'packed').eval()
    with pytest.raises(VitpruneError, match='computes the same operations for all images'): export_onnx(slim, tmp_path/'m.onnx', images(2))
    assert not (tmp_path/'m.onnx').exists()


def test_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'ats', '--reduction', '0.35', '--calibration', '20', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'ats' and abs(record['reduction'] - .35) < .02 and record['blocks'] == list(range(4, 13))
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'ats', '--blocks', '9,3', '--out', str(tmp_path/'p')]) == 2
    assert 'rising block numbers from 1 to 12' in capsys.readouterr().err
