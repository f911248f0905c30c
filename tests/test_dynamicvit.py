"""DynamicViT where its lesson does not look: training against a slow form, two phases, resuming, saving, the command line."""
import copy, json

import pytest
import torch
import torch.nn.functional as F
from train_script import tiny_vit, train_set

from vitprune_nb.cli import main
from vitprune_nb.engine.policy import Policy, Tokens
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.base import METHODS, prune
from vitprune_nb.methods.dynamicvit import (KeepPredictor, dynamic_objective, dynamic_policy, dynamic_recipe, make_predictors,
                                            quarter_stages, stage_counts)
from vitprune_nb.train.recipe import make_optimizer
from vitprune_nb.train.trainer import Trainer
from vitprune_nb.vit.model import create_vit

QUICK = dict(keep_rate=.5, predictor_epochs=.1, joint_epochs=.1, batch_size=16, dtype='fp32')


def loud(policy, seed):
    "Predictors that are far from equal odds."
    g = torch.Generator().manual_seed(seed)
    for _, s in policy.each():
        for p in s.score.parameters(): p.data += .3*torch.randn(p.shape, generator=g)
    return policy


def slow_training(model, policy, images):
    "Logits, normalised tokens and products of decisions: masks by hand, in fp64-free plain steps, with torch's own Gumbel noise."
    x, H = model._pos_embed(model.patch_embed(images)), model.blocks[0].attn.num_heads
    B, n, D = x.shape
    kept, seen = torch.ones(B, n - 1), []
    for i, block in enumerate(model.blocks):
        if i in policy.steps:
            s = policy.steps[i].score
            f = s.inner(x[:, 1:])
            half = D//2
            mean = torch.stack([(f[b, :, half:]*kept[b, :, None]).sum(0)/kept[b].sum().clamp_min(1e-6) for b in range(B)])
            lp = s.outer(torch.cat([f[..., :half], mean[:, None].expand(B, n - 1, D - half)], -1))
            kept = kept*F.gumbel_softmax(lp, hard=True)[..., 0]
            seen.append(kept)
        hide = torch.cat([torch.ones(B, 1), kept], 1)
        G = hide[:, None, :] + (1 - hide[:, None, :])*torch.eye(n)
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(B, n, 3, H, D//H).permute(2, 0, 3, 1, 4)
        e = (q @ k.transpose(-1, -2)*(D//H)**-.5).exp()*G[:, None]
        a = (e/e.sum(-1, keepdim=True)) @ v
        x = x + block.attn.proj(a.transpose(1, 2).reshape(B, n, D))
        x = x + block.mlp(block.norm2(x))
    x = model.norm(x)
    return model.head(x[:, 0]), x, seen


@pytest.mark.parametrize('seed', range(20))
def test_training_is_the_slow_form_loss_and_gradient(seed):
    g = torch.Generator().manual_seed(seed)
    net, teacher = tiny_vit(seed), tiny_vit(seed + 100)
    rate = .4 + .5*torch.rand(1, generator=g).item()
    policy = loud(dynamic_policy(net, rate), seed)
    slim = SlimViT(net, policy, 'mask').train()
    images, labels = torch.randn(4, 3, *net.patch_embed.img_size, generator=g), torch.randint(0, net.num_classes, (4,), generator=g)
    recipe = dynamic_recipe(1e-3, 1, label_smoothing=0., augment='none', batch_size=16, dtype='fp32')
    objective = dynamic_objective(rate, len(policy.steps), 2., .5, .5)
    tr = Trainer(slim, train_set(), recipe, teacher, objective)
    torch.manual_seed(seed)
    losses = tr.losses(images, labels)
    ours = torch.autograd.grad(sum(losses.values()), list(slim.parameters()), allow_unused=True)

    torch.manual_seed(seed)
    logits, tokens, kept = slow_training(net, policy, images)
    with torch.no_grad():
        their_tokens = teacher.forward_features(images)
        theirs = teacher.forward_head(their_tokens)
    stay = kept[-1].detach() > .5
    expected = dict(classification=F.cross_entropy(logits, labels),
                    ratio=2*sum((k.mean(1) - rate**(s + 1)).square().mean() for s, k in enumerate(kept))/len(kept),
                    kl=.5*(theirs.softmax(-1)*(theirs.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean(),
                    token_mse=.5*(tokens[:, 1:][stay] - their_tokens[:, 1:][stay]).square().mean() if stay.any() else logits.sum()*0)
    assert set(losses) == set(expected)
    for name, value in expected.items(): assert abs(losses[name].item() - value.item()) < 1e-5, name
    slow = torch.autograd.grad(sum(expected.values()), list(slim.parameters()), allow_unused=True)
    for (name, _), a, b in zip(slim.named_parameters(), ours, slow, strict=True):
        assert a is not None and torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


def test_an_image_that_keeps_nothing_has_finite_scores():
    t = Tokens(torch.randn(2, 9, 16), None, torch.arange(9).expand(2, 9), 3, 1, {}, kept=torch.zeros(2, 9))
    assert torch.isfinite(KeepPredictor(16)(t)).all()


def test_very_sure_predictors_still_rank():
    p = KeepPredictor(8)
    torch.manual_seed(0)
    for w in p.parameters(): torch.nn.init.normal_(w, std=3.)
    for w in p.outer[4].parameters(): w.data.neg_()
    scores = p(Tokens(torch.randn(1, 50, 8), None, torch.arange(50)[None], 3, 1, {}))[0, 1:]
    assert scores.max() > 30 and len(scores.unique()) == 49


def test_a_frozen_predictor_draws_nothing():
    "In training it decides as at inference; one that learns draws."
    net = tiny_vit()
    slim = SlimViT(net, loud(dynamic_policy(net, .5, [2]), 0), 'mask').train()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    def kept(seed):
        torch.manual_seed(seed)
        seen = []
        slim(x, record=seen)
        return seen[0].keep.float()
    assert any(not torch.equal(kept(0), kept(s)) for s in range(1, 5))
    for p in slim.scorers.parameters(): p.requires_grad_(False)
    still = kept(0)
    assert all(torch.equal(kept(s), still) for s in range(1, 5))
    slim.eval()
    assert torch.equal(kept(0), still)


def test_stages_and_counts():
    assert [quarter_stages(n) for n in (1, 2, 4, 6, 12, 24)] == [[1], [1, 2], [2, 3, 4], [2, 4, 5], [4, 7, 10], [7, 13, 19]]
    assert stage_counts(196, .5, 3) == [98, 49, 24] and stage_counts(4, .3, 3) == [1, 1, 1] and stage_counts(196, 1., 3) == [196]*3
    net = tiny_vit()
    for bad in ([], [0], [2, 2], [3, 2], [len(net.blocks) + 1], [1.5]):
        with pytest.raises(VitpruneError, match='stages: got'): dynamic_policy(net, .5, bad)
    with pytest.raises(VitpruneError, match='keep_rate: got 0'): dynamic_policy(net, 0)


def test_new_predictors_leave_the_generators_alone():
    torch.manual_seed(3); a = torch.rand(1)
    torch.manual_seed(3); make_predictors(16, 2, seed=9); b = torch.rand(1)
    assert a == b
    assert all((x == y).all() for x, y in zip(make_predictors(16, 2, 1)[0].parameters(), make_predictors(16, 2, 1)[0].parameters()))


def test_the_network_learns_a_hundred_times_slower():
    slim = SlimViT(tiny_vit(), dynamic_policy(tiny_vit(), .5), 'mask')
    opt = make_optimizer(slim, dynamic_recipe(1e-3, 1))
    rate = {id(p): g['lr']*g.get('lr_scale', 1.) for g in opt.param_groups for p in g['params']}
    for n, p in slim.named_parameters():
        assert rate[id(p)] == pytest.approx(1e-3 if n.startswith('scorers') else 1e-5), n


def test_phases_move_what_they_should():
    net = tiny_vit()
    before = copy.deepcopy(net.state_dict())
    first = prune('dynamicvit', net, train_set(), **QUICK | dict(joint_epochs=0.))
    both = prune('dynamicvit', net, train_set(), **QUICK)
    moved = lambda m, k: bool((m.state_dict()[k] != before[k]).any())
    assert not any(moved(first, k) for k in before) and moved(both, 'blocks.0.attn.qkv.weight') and moved(both, 'head.weight')
    fresh = make_predictors(net.embed_dim, 3)[0]
    assert (first.scorers[0].outer[4].weight != fresh.outer[4].weight).any()
    assert all((net.state_dict()[k] == before[k]).all() for k in before)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    net, data = tiny_vit(), train_set()
    whole = prune('dynamicvit', net, data, work=tmp_path/'a', **QUICK)
    method, real = METHODS['dynamicvit'], type(METHODS['dynamicvit']).build
    def stop(*a, **k):
        if k or len(a) > 4: raise KeyboardInterrupt      # after the training, before anything is saved
        return real(*a, **k)
    monkeypatch.setattr(type(method), 'build', stop)
    with pytest.raises(KeyboardInterrupt): prune('dynamicvit', net, data, work=tmp_path/'b', **QUICK)
    monkeypatch.undo()
    assert {p.name for p in (tmp_path/'b').iterdir()} >= {'predictors', 'joint'}
    (tmp_path/'b'/'joint'/'checkpoint.pt').unlink()      # killed before the second phase had saved
    again = prune('dynamicvit', net, data, work=tmp_path/'b', **QUICK)
    assert all((a == b).all() for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_saved_and_loaded(tmp_path):
    slim = prune('dynamicvit', tiny_vit(), train_set(), reduction=.3, predictor_epochs=0., joint_epochs=0.)
    save_pruned(slim, tmp_path/'m')
    back, x = load_pruned(tmp_path/'m'), torch.randn(2, 3, *slim.patch_embed.img_size)
    with torch.no_grad(): assert (back(x) == slim(x)).all()
    assert isinstance(back.scorers[0], KeepPredictor) and back.info['patches'] == slim.info['patches']
    policy = Policy.from_dict(slim.policy.to_dict())
    assert policy.counts(4, 17) == slim.policy.counts(4, 17)


def test_it_prunes_a_model_that_averages_its_patches():
    net = create_vit('vit_small_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10,
                     class_token=False, global_pool='avg')
    slim = prune('dynamicvit', net, train_set(), **QUICK)
    assert torch.isfinite(slim(torch.randn(2, 3, 32, 32))).all()


def test_the_command_line_reads_its_options(capsys, tmp_path):
    bad = {'--keep-rate 0': 'keep_rate: got 0.0; allowed: a number in (0, 1]', '--kl-weight -1': 'kl_weight: got -1.0',
           '--keep-rate 0.5 --reduction 0.3': 'either reduction or keep_rate', '--eps 0.1': 'nothing for dynamicvit'}
    for words, said in bad.items():
        assert main(f'prune --method dynamicvit {words} --out {tmp_path/"o"}'.split()) == 2
        assert said in capsys.readouterr().err, words
    out = str(tmp_path/'o')
    words = '--keep-rate 0.7 --stages 4,7,10 --predictor-epochs 0 --joint-epochs 0 --json'.split()
    assert main(['prune', '--method', 'dynamicvit', *words, '--out', out]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['keep_rate'] == .7 and abs(record['reduction'] - .35) < .01
