"SCOP for patches where its notebook does not look: other ViTs, its contest, its doubles, files, a run that is killed."
import itertools, json

import pytest
import torch

from vitprune_nb.cli import main
from vitprune_nb.data import embedded
from vitprune_nb.deploy import OnnxModel, export_onnx, logit_gap
from vitprune_nb.engine.macs import macs_of
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, Job, prune, read_options, recover
from vitprune_nb.methods.scop import Contest, clip_beta, contest_rate, knockoff, scop_policy
from vitprune_nb.train.recipe import even_recipe
from vitprune_nb.train.trainer import Trainer
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'cls': {}, 'dist': dict(name='deit_tiny_distilled_patch16_224'), 'registers': dict(reg_tokens=3),
         'average': dict(global_pool='avg'), 'no prefix': dict(name='vit_tiny_patch16_224', class_token=False, global_pool='avg'),
         'qk norm and layer scale': dict(qk_norm=True, init_values=.7), 'norm before': dict(name='vit_tiny_patch16_224', pre_norm=True)}
NO_TRAINING = dict(contest_epochs=0., finetune_epochs=0.)


def vit(depth=6, **kw):
    torch.manual_seed(0)
    return create_vit(kw.pop('name', 'deit_tiny_patch16_224'), img_size=32, patch_size=4, embed_dim=48, depth=depth, num_heads=3,
                      num_classes=10, **kw).eval()


def images(n=3, seed=0): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def some_scores(depth=6, seed=0): return torch.randn(depth, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 100))


def loop(net, beta, image, double):
    "One image and its double, patch by patch."
    p, streams = net.num_prefix_tokens, [net.norm_pre(net._pos_embed(net.patch_embed(x[None])))[0] for x in (image, double)]
    for b, block in zip(beta, net.blocks, strict=True):
        real, other = (block.ls1(block.attn(block.norm1(x[None])))[0] for x in streams)
        mixed = torch.stack([real[j] if j < p else b[j - p]*real[j] + (1 - b[j - p])*other[j] for j in range(len(real))])
        streams = [x + u for x, u in zip(streams, (mixed, other))]
        streams = [x + block.ls2(block.mlp(block.norm2(x))) for x in streams]
    return net.forward_head(net.norm(streams[0][None]))[0]


@pytest.mark.parametrize('kind', KINDS)
def test_the_contest_is_the_loop_in_double_precision(kind):
    net = vit(**KINDS[kind]).double()
    for seed in range(4):
        contest, x = Contest(net).double(), images(seed=seed).double()
        with torch.no_grad():
            contest.beta.fill_(1.)
            assert (contest(x) - net(x)).abs().max() < 1e-9
            contest.beta.uniform_()
            want = torch.stack([loop(net, contest.beta, x[b], x[b - 1]) for b in range(3)])
            assert (contest(x) - want).abs().max() < 1e-9, (kind, seed)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rate', [.02, .4, 1.])
def test_modes_agree_and_macs_are_counted(kind, rate):
    net = vit(**KINDS[kind])
    policy = scop_policy(net, some_scores(), rate)
    check_policy(net, policy, images())
    slim = SlimViT(net, policy)
    assert macs_of(slim) == count_macs(slim, images())/3
    if rate == 1.:
        assert torch.allclose(slim(images()), net(images()), atol=1e-5)
        assert list(policy.steps) == ([] if net.global_pool == 'avg' else [5])


def slow_policy(net, scores, rate, image):
    "One image, patch by patch: whoever is not kept is passed by, but its key and value are there."
    p, k, x = net.num_prefix_tokens, max(1, round(rate*64)), net.norm_pre(net._pos_embed(net.patch_embed(image[None])))[0]
    for i, (s, block) in enumerate(zip(scores.tolist(), net.blocks, strict=True)):
        last = i == len(net.blocks) - 1 and net.global_pool != 'avg'
        keep = [] if last else sorted(range(64), key=lambda j, s=s: -s[j])[:k]
        rows = [*range(p), *(p + j for j in keep)]
        y = x + block.ls1(block.attn(block.norm1(x[None])))[0]
        y = y + block.ls2(block.mlp(block.norm2(y)))
        x = torch.stack([y[j] if j in rows else x[j] for j in range(len(x))])
    return net.forward_head(net.norm(x[None]))[0]


@pytest.mark.parametrize('kind', KINDS)
def test_the_pruned_model_is_an_oracle_in_double_precision(kind):
    net = vit(**KINDS[kind]).double()
    for seed in range(4):
        scores, x, rate = some_scores(seed=seed), images(seed=seed).double(), .2 + .2*seed
        with torch.no_grad():
            want = torch.stack([slow_policy(net, scores, rate, image) for image in x])
            for mode in ('mask', 'gather', 'packed'):
                assert (SlimViT(net, scop_policy(net, scores, rate), mode)(x) - want).abs().max() < 1e-9, (kind, seed, mode)


def test_exchanging_both_turns_the_sign():
    "In the first block, where both streams are as they came: beta for one is 1 - beta for the other."
    net, x, updates = vit(depth=1), images(2), []
    a, b = Contest(net), Contest(net)
    with torch.no_grad():
        a.beta.uniform_()
        b.beta.copy_(1 - a.beta)
    assert torch.allclose(a.scores, -b.scores, atol=1e-6)
    def see(module, args): updates.append(args[0].chunk(2)[0] - net._pos_embed(net.patch_embed(now)))
    net.blocks[0].norm2.register_forward_pre_hook(see)
    with torch.no_grad():
        for contest, now in ((a, x), (b, x.flip(0))): contest(now)
    # image 0 with double 1, and image 1 with double 0; CLS is not mixed
    torch.testing.assert_close(updates[0][0, 1:], updates[1][0, 1:], atol=1e-5, rtol=1e-4)
    assert (updates[0][0, 0] - updates[1][0, 0]).abs().max() > 1e-3


def test_doubles():
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(knockoff(x)[1:], x[:-1]) and torch.equal(knockoff(x)[0], x[-1])
    torch.manual_seed(0)
    y = knockoff(x, 'phases')
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), atol=1e-5, rtol=1e-4)
    power = lambda t: torch.fft.rfft2(t).abs()[..., 1:-1]
    torch.testing.assert_close(power(y), power(x), atol=1e-3, rtol=1e-3)
    cross = lambda t: (lambda f: f[:, 0]*f[:, 1].conj())(torch.fft.rfft2(t)[..., 1:-1])
    torch.testing.assert_close(cross(y), cross(x), atol=1e-2, rtol=1e-3)                # colours stay together
    assert (y - x).abs().mean() > .3 and not torch.equal(knockoff(x, 'phases'), y)
    with pytest.raises(VitpruneError, match='knockoff'): knockoff(x, 'twin')


def test_the_contest_moves_beta_alone_and_stays_inside(few):
    net = vit()
    job = Job(vit(), few, read_options('scop', dict(batch_size=10, dtype='fp32', contest_epochs=4., contest_lr=.3))[1])
    scores = METHODS['scop'].prepare(job)
    assert scores.shape == (6, 64) and scores.abs().max() <= 1 and scores[:5].abs().mean() > .3
    assert scores[5].abs().max() == 0                                # the last block has no say
    for k, v in net.state_dict().items(): assert torch.equal(job.model.state_dict()[k], v), k
    contest = Contest(net)
    with torch.no_grad(): contest.beta.copy_(torch.linspace(-1, 2, 64).expand(6, 64))
    clip_beta(contest, 0.)
    assert contest.beta.min() == 0 and contest.beta.max() == 1
    assert contest_rate(250) == 4e-3 and contest_rate(10) == .1


def test_a_place_that_alone_tells_the_label_wins(few):
    "A network that reads patch 5 alone, whose doubles answer wrongly, learns that it must be real."
    net = vit(depth=1, global_pool='avg')
    class Toy(Contest):
        def forward(self, x): return torch.stack([self.beta[0, 5]*4 + 0*self.beta.sum()]*len(x))[:, None]*torch.eye(10)[0]
    toy = Toy(net)
    zeros = few.subset([i for i, t in enumerate(few.targets) if t == 0])
    tr = Trainer(toy, zeros, even_recipe(.05, epochs=10, batch_size=len(zeros), weight_decay=0., warmup=0., dtype='fp32'))
    for _ in range(5): tr.one_step()
    tr.close()
    assert toy.scores[0, 5] > .2 and toy.scores[0, :5].abs().max() == 0


def test_what_is_refused(few):
    for given, said in ((dict(keep_rate=0.), 'keep_rate'), (dict(keep_rate=1.1), 'keep_rate'), (dict(keep_rate='x'), 'keep_rate'),
                        (dict(knockoff='twin'), 'knockoff'), (dict(contest_lr=0.), 'contest_lr'), (dict(contest_epochs=-1.), 'contest_epochs'),
                        (dict(finetune_epochs='x'), 'finetune_epochs'), (dict(reduction=.3, keep_rate=.5), 'keep_rate'),
                        (dict(reduction=.99), 'reduction'), (dict(calibration=8), 'calibration')):
        with pytest.raises(VitpruneError, match=said): prune('scop', vit(), few, **NO_TRAINING | given)
    with pytest.raises(VitpruneError, match='batch_size: got 1'): prune('scop', vit(), few, batch_size=1)
    m, config = read_options('scop', {})
    assert m is METHODS['scop'] and m.default(config) == .5 and config.knockoff == 'other'


@pytest.mark.parametrize('reduction', [.2, .35, .55])
def test_a_budget_a_file_and_a_recovery(few, tmp_path, reduction):
    slim = prune('scop', vit(), few, reduction=reduction, **NO_TRAINING)
    assert abs(slim.info['reduction'] - reduction) < .02 and slim.info['patches'][-1] == 0 and len(set(slim.info['patches'])) == 2
    save_pruned(slim, tmp_path/'p')
    back = load_pruned(tmp_path/'p')
    assert torch.equal(back(images()), slim(images())) and back.policy.to_dict() == slim.policy.to_dict()
    assert len(recover(slim, few, 1, batch_size=10, dtype='fp32')) == 1


@pytest.mark.parametrize('kind', ['other', 'phases'])
@pytest.mark.parametrize('step', [3, 7])                             # in the contest, and in fine-tuning
def test_killed_it_ends_with_the_same_weights(few, tmp_path, monkeypatch, step, kind):
    how = dict(contest_epochs=1., finetune_epochs=1., batch_size=10, dtype='fp32', knockoff=kind)
    whole = prune('scop', vit(depth=4), few, **how)
    real, steps = Trainer.one_step, itertools.count()
    def dies(tr):
        if next(steps) == step: raise KeyboardInterrupt
        return real(tr)
    monkeypatch.setattr(Trainer, 'one_step', dies)
    with pytest.raises(KeyboardInterrupt): prune('scop', vit(depth=4), few, work=tmp_path/'w', **how)
    monkeypatch.setattr(Trainer, 'one_step', real)
    again = prune('scop', vit(depth=4), few, work=tmp_path/'w', **how)
    assert whole.policy.to_dict() == again.policy.to_dict()
    for k, v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k


def test_half_precision_stays_in_its_dtype():
    slim = SlimViT(vit(), scop_policy(vit(), some_scores(), .4)).bfloat16()
    out = slim(images().bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_it_is_exported_as_it_is(tmp_path):
    slim = SlimViT(vit(), scop_policy(vit(), some_scores(), .4)).eval()
    exported = OnnxModel(export_onnx(slim, tmp_path/'m.onnx', images(), dynamic=True))
    assert logit_gap(exported, slim, images(5, seed=1)) < 1e-4


def test_from_the_command_line(tmp_path, capsys):
    out, still = str(tmp_path/'o'), ['--contest-epochs', '0', '--finetune-epochs', '0']
    assert main(['prune', '--method', 'scop', '--reduction', '0.35', *still, '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'scop' and abs(record['reduction'] - .35) < .02 and len(record['patches']) == 12
    assert main(['cost', out, '--json']) == 0
    assert main(['prune', '--method', 'scop', '--keep-rate', '0', *still, '--out', str(tmp_path/'p')]) == 2
    assert 'a number in (0, 1]' in capsys.readouterr().err
