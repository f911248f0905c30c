"""Life regression: what its parts refuse, what is saved with them, and gradients against central differences."""
import pytest, torch
from torch import nn
from vitprune_nb.engine.slim import Policy, SlimViT, Step, check_policy
from vitprune_nb.engine.store import load_slim, save_slim
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods import life
from vitprune_nb.methods.life import LifeLeft, LifePlan, life_plan, load_predictor, save_predictor, stage_counts, standardise
from vitprune_nb.methods.life_run import life_recipe
from vitprune_nb.papers.life_tables import LifeCase, rival
from vitprune_nb.vit.model import create_vit


def tiny(**changes): return create_vit('test_vit', **dict(dict(img_size=64, patch_size=8, depth=6), **changes)).eval()


def images(n=3): return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def pruned(net, kind='count', mode='gather'):
    p = life_plan(net, .7, (2, 4))
    return SlimViT(net, p.policy(p.score(net.embed_dim), kind), mode).eval()


def without_weights():
    s = pruned(tiny())
    nn.init.zeros_(s.policy.steps[2].score.cls.weight)
    return s(images())


RATES, STAGES = 'allowed: a number in (0, 1]', 'rising block numbers from 1 to 11'
REFUSED = {
    **{f'keep rate {r}': (lambda r=r: stage_counts(r, 4, 12, 196), RATES) for r in (0, 1.2, True, 'half')},
    **{f'stages {s}': (lambda s=s: stage_counts(.7, s, 12, 196), STAGES) for s in ((4, 4), (7, 4), (0, 4), (4, 12), ())},
    'one block': (lambda: stage_counts(.7, 1, 1, 196), 'model: got a single block; allowed: two blocks or more'),
    'rates for other stages': (lambda: stage_counts([.7, .8], (4, 7, 10), 12, 196), 'one number, or 3: one a stage'),
    'counts that rise': (lambda: LifePlan((4, 2, 3), 1), 'counts: got 3 patches in block 3 after 2 in block 2; allowed: counts that never rise'),
    'a removal too early': (lambda: LifePlan((4, 2, 2, 1), 2), 'stages: got a removal after block 1, before t_base = 2; allowed: stages from 2 on'),
    'no patch': (lambda: LifePlan((4, 4, 0), 1), 'counts: got (4, 4, 0)'),
    'a late base': (lambda: LifePlan((4, 4, 2, 1), 4), 't_base: got 4; allowed: a block number from 0 to 3'),
    'a base after a stage': (lambda: life_plan(tiny(), .5, (2, 4), t_base=3), 'before t_base = 3'),
    'stages of 12 blocks': (lambda: life_plan(tiny()), 'rising block numbers from 1 to 5'),
    'no class token': (lambda: life_plan(tiny(class_token=False, global_pool='avg'), .5, 1), 'without a class token'),
    'flat scores': (lambda: standardise(torch.ones(2, 64)), 'scores: got the same score for every patch of image 0 of the batch'),
    'a predictor of zeros': (without_weights, 'the same score for every patch of image 0'),
    'an unknown kind': (lambda: pruned(tiny(), 'hard'), 'kind: got hard'),
    'no steepness': (lambda: life.beta(torch.tensor(5.), 1, 0), 'U: got 0; allowed: a number above 0'),
    'lives without a predictor': (lambda: SlimViT(tiny(), Policy({1: Step(score=LifeLeft(), count=3)}))(images()), 'a LifeScore in an earlier block'),
    'a recipe that stands still': (lambda: life_recipe(0), 'lr: got 0'),
    'a case without steepness': (lambda: LifeCase(U=0), 'U: got 0'),
    'a case without epochs': (lambda: LifeCase(epochs=0), 'epochs: got 0'),
    'a case with fewer epochs than none': (lambda: LifeCase(backbone_epochs=-1), 'backbone_epochs: got -1'),
    'an unknown rival': (lambda: rival('best', tiny(), None), 'rival: got best'),
    'no predictor': (lambda: load_predictor('none.safetensors', None, 64), 'a file that save_predictor wrote'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_name(name):
    call, text = REFUSED[name]
    with pytest.raises(VitpruneError) as said: call()
    assert text in str(said.value)


def test_a_predictor_comes_back_and_only_where_it_fits(tmp_path):
    s = pruned(tiny())
    plan = life_plan(tiny(), .7, (2, 4))
    save_predictor(s, tmp_path/'p.safetensors')
    again = load_predictor(tmp_path/'p.safetensors', plan, s.model.embed_dim)
    old = s.policy.steps[2].score
    assert torch.equal(again.patch.weight, old.patch.weight.half().float())
    with pytest.raises(VitpruneError, match='a life predictor of width 384'): load_predictor(tmp_path/'p.safetensors', plan, 384)


def test_the_one_predictor_is_saved_with_the_model(tmp_path):
    s = pruned(tiny())
    save_slim(s, tmp_path/'pruned')
    with torch.no_grad(): assert torch.equal(load_slim(tmp_path/'pruned')(images()), s(images()))


@pytest.mark.parametrize('kind', ['count', 'life', 'soft'])
def test_every_mode_agrees(kind):
    net = tiny()
    p = life_plan(net, .6, (2, 3, 4), 1)
    assert max(check_policy(net, p.policy(p.score(net.embed_dim), kind), images()).values()) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('mode', ['mask', 'packed'])
def test_a_life_of_t_reaches_block_t(dtype, mode):
    "Equation 4 at the tie, in every precision: life 4 is used in block 4 and gone in block 5; with keep rate 1 all lives are 6 = T, and nothing goes."
    class Four(life.LifeScore):
        def lives(self, x, n_prefix=1, present=None):
            tau = super().lives(x, n_prefix, present)
            return torch.cat([tau[:, :n_prefix], torch.full_like(tau[:, n_prefix:], 4.)], 1)
    net = tiny().to(dtype)
    whole = life_plan(net, 1, (2, 4))
    for score, want in ((Four(64, whole.mu, whole.sigma, 6), [64]*4 + [0, 0]), (whole.score(64), [64]*6)):
        slim = SlimViT(net, whole.policy(score.to(dtype), 'life'), mode).eval()
        assert slim.kept(images().to(dtype)).sum(-1).tolist() == [want]*3


def test_gradients_are_those_of_central_differences():
    torch.manual_seed(0)
    net = create_vit('test_vit', img_size=32, patch_size=8, depth=4).double().train()
    p = life_plan(net, .6, (1, 2))
    score = p.score(net.embed_dim).double()
    soft, hard = SlimViT(net, p.policy(score, 'soft'), 'mask').train(), SlimViT(net, p.policy(score)).train()
    x, y = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([1, 2])
    def loss(): return nn.functional.cross_entropy(soft(x), y)
    weights = dict(norm=score.norm.weight, cls=score.cls.weight, patch=score.patch.weight)
    exact = dict(zip(weights, torch.autograd.grad(loss(), list(weights.values()))))
    def at(weight, index, by):
        with torch.no_grad():
            weight[index] += by
            value = loss().item()
            weight[index] -= by
        return value
    for name, index in [('norm', (3,)), ('norm', (20,)), ('cls', (0, 0)), ('cls', (7, 30)), ('patch', (5, 11)), ('patch', (40, 2))]:
        slow = (at(weights[name], index, 1e-6) - at(weights[name], index, -1e-6))/2e-6
        assert abs(exact[name][index].item() - slow) < 1e-8 and slow != 0
    assert torch.autograd.gradcheck(standardise, torch.randn(2, 6, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.grad(hard(x).sum(), score.patch.weight, allow_unused=True)[0] is None     # a step has no slope


def test_the_rate_that_is_asked_for_is_that_of_the_backbone():
    "As the option says: the predictor learns at 1e-3 whatever it is."
    from types import SimpleNamespace
    from vitprune_nb.methods.base import METHODS, read_options
    model, rates = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10), {}
    for lr in (None, .5):
        method, config = read_options('life', dict(keep_rate=.7, lr=lr))
        job = SimpleNamespace(model=model, config=config, train_set=range(40), batch_for=lambda epochs: 8, settings=lambda n: dict(batch_size=n),
                              train=lambda slim, recipe, name, still: rates.setdefault(name, []).append(recipe.lr))
        method.finish(job, None, life_plan(model, .7, (1, 2)))
    assert rates == dict(predictor=[1e-3, 1e-3], backbone=[1e-5, .5])
    option = METHODS['life'].options['lr']
    assert 'of the backbone; the predictor learns at 1e-3' in option.description and float(option.json_schema_extra['shown']) == 1e-5
