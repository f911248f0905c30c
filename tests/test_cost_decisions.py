"""What a decision costs: predicted MACs against those that PyTorch counts in a forward pass, for every scorer, fate and place."""
import itertools

import pytest
import timm
import torch

from vitprune_nb.methods.vtp import add_gates, importance
from vitprune_nb.engine.channels import choose
from vitprune_nb.methods.cosine import CosineScore
from vitprune_nb.vit.cost import flop_counter, model_macs
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.methods.life import LifeScore, life_plan
from vitprune_nb.papers.life_tables import RandomLife, StageAttention, StagePredictor
from vitprune_nb.engine.attention import VIEWS
from vitprune_nb.engine.macs import cost_of, counts_of, extra_macs, macs_of
from vitprune_nb.engine.policy import POINTS, ClsAttention, NormScore, Policy, RandomScore, Scorer, Step, decision_macs
from vitprune_nb.engine.channels import slice_model

SMALL = dict(img_size=48, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5)   # 36 patches
MODELS = {'plain': ('vit_tiny_patch16_224', {}), 'q and k norm': ('vit_tiny_patch16_224', dict(qk_norm=True, init_values=1e-5)),
          'dist': ('deit_tiny_distilled_patch16_224', {}), 'registers': ('vit_tiny_patch16_224', dict(reg_tokens=4, qkv_bias=False)),
          'averaged': ('vit_tiny_patch16_224', dict(global_pool='avg', pre_norm=True))}
SCORERS = {'norm': NormScore, 'random': RandomScore, 'cls_attention': ClsAttention, 'life': lambda: LifeScore(48, 3., 1., 4), 'random life': lambda: RandomLife(48, 3., 1., 4),
           'cosine': lambda: CosineScore(48, 16), 'cosine, context': lambda: CosineScore(48, 16, context=True),
           'predictor': lambda: StagePredictor(48), 'attention': lambda: StageAttention(48, 3)}
IMAGES = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(2))


def vit(name):
    torch.manual_seed(0)
    model, kwargs = MODELS[name]
    return timm.create_model(model, **SMALL, **kwargs).eval()


def sliced(ratio=.3):
    torch.manual_seed(0)
    net = add_gates(vit('plain'))
    for p in net.parameters():
        if p.ndim == 1: torch.nn.init.uniform_(p, .5, 1.5)
    return slice_model(net, choose(importance(net), ratio, 3))


def counted(model, images):
    with flop_counter() as counter, torch.no_grad(): model(images)
    return counter.get_total_flops()/2/len(images)


def agree(slim):
    assert macs_of(slim) == pytest.approx(counted(slim.eval(), IMAGES[:2]), rel=1e-3)


FIVE = ('remove', 'idle', 'fuse', 'merge', 'halt')      # a method may have registered more
PLACES = [(s, f, a) for s, f, a in itertools.product(SCORERS, FIVE, POINTS)
          if (s != 'cosine, context' or f == 'idle')]   # its context wants the same patches in every block


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('scorer, fate, at', PLACES)
def test_two_decisions_cost_what_is_counted(name, scorer, fate, at):
    net = vit(name)
    policy = Policy({1: Step(at, fate, score=SCORERS[scorer](), count=20), 2: Step(at, fate, score=SCORERS[scorer](), count=7)})
    agree(SlimViT(net, policy, 'gather'))


@pytest.mark.parametrize('name', ['plain', 'registers'])
@pytest.mark.parametrize('first, second', list(itertools.product(
    [('before', 'fuse'), ('queries', 'fuse'), ('middle', 'fuse'), ('queries', 'merge'), ('middle', 'idle')],
    [('before', 'remove'), ('before', 'merge'), ('queries', 'merge'), ('middle', 'merge'), ('middle', 'fuse')])))
def test_the_second_decision_sees_what_the_first_one_left(name, first, second):
    "Fused tokens are compared with the others and have keys of their own; idle ones are still there."
    score = lambda at: ClsAttention() if at == 'middle' else StagePredictor(48)
    agree(SlimViT(vit(name), Policy({0: Step(*first, score=score(first[0]), count=20), 1: Step(*second, score=score(second[0]), count=7)})))


@pytest.mark.parametrize('first', ['remove', 'fuse', 'merge'])
@pytest.mark.parametrize('second', [*itertools.product(['queries', 'middle'], ['remove', 'idle', 'fuse', 'merge'])])
def test_two_steps_of_one_block(first, second):
    at, fate = second
    both = (Step('before', first, score=StagePredictor(48), count=20), Step(at, fate, score=StagePredictor(48), count=7))
    agree(SlimViT(vit('dist'), Policy({1: both, 3: Step('before', 'merge', score=NormScore(), count=3)})))


@pytest.mark.parametrize('scorer, fate, at', [p for p in PLACES if p[0] in ('cls_attention', 'life', 'predictor')])
def test_models_with_cut_channels(scorer, fate, at):
    net = sliced()
    agree(SlimViT(net, Policy({1: Step(at, fate, score=SCORERS[scorer](), count=20), 3: Step(at, fate, score=SCORERS[scorer](), count=7)})))


@pytest.mark.parametrize('fate', FIVE)
@pytest.mark.parametrize('at', POINTS)
def test_fixed_positions_cost_only_their_fate(fate, at):
    net = vit('dist')
    policy = Policy({0: Step(at, fate, keep=range(0, 36, 2)), 2: Step(at, fate, keep=range(0, 36, 4))})
    slim, n = SlimViT(net, policy), [38, 20]
    agree(slim)
    deciding = decision_macs(policy, policy.counts(4, 38, 2), net.blocks, 38, 2)
    assert deciding == (sum(k*k*48 for k in n) if fate == 'merge' else 0)


def test_life_pays_once_and_everyone_who_asks_three_times_pays_three_times():
    net = vit('plain')
    p = life_plan(net, .5, (1, 2, 3))
    life, anew = (SlimViT(net, q) for q in (p.policy(p.score(48)), Policy({i: Step(score=p.score(48, seed=i), count=p.counts[i]) for i in (1, 2, 3)})))
    for s in (life, anew): agree(s)
    assert extra_macs(life, counts_of(life)) == 2*48**2 + 36*48
    assert extra_macs(anew, counts_of(anew)) == 3*2*48**2 + (36 + 18 + 9)*48


def test_deit_small_with_three_cuts_by_the_attention_of_cls():
    "The case of EViT's schedule, keep rate 0.7: the row of CLS costs its products alone, for queries and keys are there."
    with torch.device('meta'): net = timm.create_model('deit_small_patch16_224').eval()
    cuts = Policy({i: Step('middle', 'remove', score=ClsAttention(), count=k) for i, k in ((3, 137), (6, 96), (9, 67))})
    slim, counts = SlimViT(net, cuts), cuts.counts(12, 197)
    with torch.device('meta'), flop_counter() as counter, torch.no_grad(): slim(torch.zeros(1, 3, 224, 224))
    assert cost_of(slim)['macs'] == counter.get_total_flops()//2
    assert round(model_macs(net, counts)/1e9, 3) == 2.98
    assert cost_of(slim)['macs'] - model_macs(net, counts) == (197 + 138 + 97)*384


def ragged(net, at, fate):
    "A step that keeps about nine in ten patches, more of them in one image than in another."
    with torch.no_grad(): norms = net.norm_pre(net._pos_embed(net.patch_embed(IMAGES)))[:, net.num_prefix_tokens:].norm(dim=-1)
    return Step(at, fate, score=NormScore(), threshold=norms.quantile(.1).item())


def agree_on_average(slim):
    "In a pack an image costs what it costs alone; what a scorer spends on the padding of its batch is nobody's."
    assert len(set(slim.trace(IMAGES).rows[0][2].tolist())) > 1       # they do differ
    alone = sum(counted(slim, x[None]) for x in IMAGES)/len(IMAGES)
    assert macs_of(slim, IMAGES) == pytest.approx(alone, rel=1e-3)
    assert counted(slim, IMAGES) >= alone*(1 - 1e-6)


@pytest.mark.parametrize('name', ['plain', 'registers'])
@pytest.mark.parametrize('scorer, at', sorted({(s, a) for s, _, a in PLACES if s != 'random life'}))
def test_ragged_batches_cost_their_mean_counts(name, scorer, at):
    net, fate = vit(name), 'idle' if scorer == 'cosine, context' else 'remove'
    again = Step(at, 'idle', score=SCORERS[scorer](), count=9)
    agree_on_average(SlimViT(net, Policy({0: ragged(net, 'before', fate), 1: again, 3: ragged(net, 'middle', fate)}), 'packed'))


@pytest.mark.parametrize('fate', FIVE)
@pytest.mark.parametrize('at', POINTS)
def test_ragged_batches_with_every_fate(fate, at):
    net = vit('plain')
    agree_on_average(SlimViT(net, Policy({0: ragged(net, at, fate), 2: ragged(net, at, fate)}), 'packed'))


def test_merging_unequal_numbers_costs_the_mean_of_their_squares():
    net, images = vit('plain'), IMAGES*torch.linspace(.5, 1.5, 6)[:, None, None, None]
    first = Step('before', score=NormScore(), threshold=ragged(net, 'before', 'remove').threshold)
    slim = SlimViT(net, Policy({0: first, 2: Step('middle', 'merge', score=NormScore(), count=1)}), 'packed')
    counts, alone = counts_of(slim, images), [counted(slim, x[None]) for x in images]
    assert counts[2][3] > 1.05*counts[2][0]**2
    assert macs_of(slim, images) == pytest.approx(sum(alone)/len(alone), rel=1e-6)


class Projected(Scorer):
    "A method's own score with a matrix of its own, on all tokens."
    def __init__(self): super().__init__(); self.fc = torch.nn.Linear(48, 64)
    def forward(self, t): return self.fc(t.x).norm(dim=-1)
    def macs(self, n, dim, n_prefix=1): return (n + n_prefix)*dim*64


@pytest.mark.parametrize('name', MODELS)
def test_a_score_that_nobody_knows(name):
    agree(SlimViT(vit(name), Policy({0: Step('queries', 'fuse', score=Projected(), count=11), 2: Step(score=Projected(), count=3)})))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('needs', [('cls_row',), ('keys',), ('values',), ('column_sums',), ('cls_row', 'keys'), ('cls_row', 'column_sums')])
@pytest.mark.parametrize('first', ['before', 'queries', 'middle'])
def test_views_cost_what_is_counted(name, needs, first):
    "In the middle of a block from its own attention, before a block from the one before; shared where two steps want the same."
    class Sees(Scorer):
        def forward(self, t):
            assert all((getattr(t, v) is not None) == (v in needs) for v in VIEWS)
            return t.x.norm(dim=-1)
    Sees.needs = needs
    steps = {1: Step(first, score=Sees(), count=20), 2: (Step('before', score=Sees(), count=11), Step('middle', 'fuse', score=Sees(), count=6))}
    agree(SlimViT(vit(name), Policy(steps), 'gather'))
    agree_on_average(SlimViT(vit(name), Policy({0: ragged(vit(name), 'before', 'remove')} | steps), 'packed'))
