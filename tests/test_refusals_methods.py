"""What methods and their options do not accept, each with the error that says so."""
import copy, math

import pytest, torch
from vitprune_nb.data import calibration, embedded
from vitprune_nb.engine.channels import choose
from vitprune_nb.engine.macs import cost_of
from vitprune_nb.engine.policy import Policy, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods import avit, cosine, dynamicvit, evit, evovit, idlevit, life, patch_slimming, power, scop, tome, vtp
from vitprune_nb.methods.base import METHODS, Method, calibration_images, method, prune, read_options, recover, turn
from vitprune_nb.train import objectives
from vitprune_nb.vit.model import create_vit


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10).eval()


@pytest.fixture(scope='module')
def train_set(): return embedded('train').subset(range(0, 5000, 50))


def shy(v):
    if v > 1/3: raise VitpruneError('no further')
    return None, v


@pytest.mark.parametrize('make, low, share, text', [
    (lambda v: ('a step', round(v*10)/10), 0, .35, 'reduction: got 0.35; allowed: 0.300 or 0.400, the nearest that can be had'),
    (lambda v: (None, v/2), 0, .6, 'reduction: got 0.6; allowed: at most 0.50'),
    (lambda v: (None, .3 + v/2), 0, .2, 'reduction: got 0.2; allowed: at least 0.30'),
    (shy, 0, .5, 'allowed: at most 0.33'), (shy, .4, .5, 'no further'),
])
def test_a_dial_that_does_not_reach(make, low, share, text):
    with pytest.raises(VitpruneError) as e: turn(make, low, 1, share)
    assert text in str(e.value)


@pytest.mark.parametrize('name, options, text', [
    ('magic', {}, 'method: got magic'), ('uniform', dict(reduction=.3, eps=.1), 'eps: got 0.1'),
    ('vtp', dict(ratio=.3, reduction=.3), 'got'), ('life', dict(keep=.3), 'got'), ('random', {}, 'got'),
    ('life', dict(eps=.5), 'eps: got 0.5; allowed: nothing for life, which does not read it. It reads reduction'),
    *(('vtp', o, f'{list(o)[-1]}: got') for o in (dict(ratio=1.), dict(ratio=-.1), dict(l1=-1), dict(multiple=True), dict(seed=None), dict(dtype='fp8'))),
    *(('life', o, f'{list(o)[-1]}: got') for o in (dict(keep_rate=0), dict(keep_rate=[.7, 1.2]), dict(stages=(4, 'x')), dict(U=0))),
    *(('cosine', o, f'{list(o)[-1]}: got') for o in (dict(score_threshold=1), dict(rounds=.5))),
    ('both', dict(reduction=.3, channels=1.5), 'channels: got 1.5; allowed: a share in [0, 1]'),
    *(('uniform', o, f'{list(o)[-1]}: got') for o in (dict(reduction=1), dict(reduction=math.nan), dict(reduction=.3, calibration=0), dict(reduction=.3, keys='none'))),
])
def test_options_that_a_method_does_not_take(name, options, text):
    with pytest.raises(VitpruneError) as e: read_options(name, options)
    assert text in str(e.value)


def test_work_images_models_and_passes(tiny, train_set, tmp_path):
    made = prune('patch-slimming', tiny, train_set, reduction=.3, calibration=8, work=tmp_path/'work')
    for f, text in ((lambda: prune('patch-slimming', tiny, train_set, reduction=.2, calibration=8, work=tmp_path/'work'), 'Another options was used there'),
                    (lambda: prune('uniform', made, train_set, reduction=.3), 'whose tokens are pruned'),
                    (lambda: calibration_images(tiny, train_set, 101), 'calibration: got 101; allowed: 1 to 100'),
                    (lambda: recover(made, train_set, epochs=0), 'epochs: got 0; allowed: a positive number'),
                    (lambda: recover(made, train_set, test_set=[1]), 'test_set: got list; allowed: an ImageSet with images'),
                    (lambda: prune('both', tiny, train_set, reduction=.3, sparse_epochs=0, calibration=101), 'calibration: got 101; allowed: 1 to 100'),
                    (lambda: prune('vtp', tiny, train_set, ratio=.999), 'ratio: got 0.999; allowed: at most')):
        with pytest.raises(VitpruneError) as e: f()
        assert text in str(e.value)


def test_a_method_that_misses_the_budget(tiny, train_set):
    @method('stripes', 'keep every second patch', color='gold')
    class Stripes(Method):
        def plan(self, job, state, value): return Policy({0: Step(keep=range(0, 16, 2))}, 'stripes')
        def build(self, job, state, plan, trained=None): return SlimViT(job.model, plan)
    try:
        with pytest.raises(VitpruneError, match='reduction: got 0.3; allowed: about 0.451, what stripes saves on this model'):
            prune('stripes', tiny, train_set, reduction=.3)
    finally: METHODS.pop('stripes')


def test_gates_that_are_not_there(tiny):
    with pytest.raises(VitpruneError): vtp.gates(tiny)
    with pytest.raises(VitpruneError, match='If its gates are folded already'): vtp.fold_gates(tiny)
    scores = vtp.importance(vtp.add_gates(copy.deepcopy(tiny)))
    with pytest.raises(VitpruneError, match='ratio: got 0.99; allowed: at most .* A higher one would empty a layer or a head'):
        choose(scores, .99, 2)


def test_lives_that_cannot_be():
    with pytest.raises(VitpruneError, match='a removal after block 1, before t_base = 2'): life.LifePlan((4, 2, 2, 1), 2)
    with pytest.raises(VitpruneError, match='the same score for every patch of image 0'): life.standardise(torch.ones(2, 64))


@pytest.mark.parametrize('counts', [[], [0, 0], [10, 20], [10, -5], [math.nan, 1], ['4', '2']])
def test_moments_of_what_is_no_schedule(counts):
    with pytest.raises(VitpruneError, match='^counts: got .* allowed: numbers of patches that never rise'): life.life_moments(counts)
    assert life.life_moments((4, 4, 2, 1)) == (11/4, math.sqrt(11)/4) and life.life_moments([4, 0]) == (1, 0)


@pytest.mark.parametrize('n', [0, -5, 1.5])
def test_no_schedule_without_patches(n):
    with pytest.raises(VitpruneError, match=f'^n_patches: got {n}; allowed: a whole number, 1 or more'): life.stage_counts(.5, (4, 7), 12, n)


def test_a_life_may_be_a_number():
    assert life.beta(5., 5).item() == .5 and life.beta(5, torch.tensor([5, 6]), 1).tolist() == [.5, pytest.approx(1/(1 + math.e))]


@pytest.mark.parametrize('rounds', [0, -1, 1.5])
def test_a_search_of_no_rounds(rounds, tiny, train_set):
    for f in (lambda: turn(lambda v: (None, v), 0, 1, .3, rounds=rounds), lambda: patch_slimming.for_budget(tiny, train_set, rounds=rounds)):
        with pytest.raises(VitpruneError, match=f'^rounds: got {rounds}; allowed: a whole number, 1 or more'): f()


@pytest.mark.parametrize('f, text', [
    (lambda: dynamicvit.KeepPredictor(3), 'dim: got 3; allowed: a whole number, 4 or more'),
    (lambda: dynamicvit.KeepPredictor(8.), 'dim: got 8.0'),
    *((lambda d=d: avit.fit_gate(torch.rand(20, 12), d), f'depth: got {d}; allowed: a number from 1 to 12') for d in (50, 0, math.nan)),
    (lambda: avit.fit_gate(torch.rand(20, 12), 5., gamma=0.), 'gamma: got 0.0; allowed: a number above 0, or None'),
])
def test_widths_depths_and_gates_that_cannot_be(f, text):
    with pytest.raises(VitpruneError) as e: f()
    assert text in str(e.value)


def test_the_smallest_predictor_looks():
    torch.manual_seed(0)
    assert dynamicvit.KeepPredictor(4).log_probs(torch.randn(1, 5, 4), torch.ones(1, 5)).std() > 0


@pytest.mark.parametrize('scores, rate, text', [
    (torch.rand(2, 16), .5, 'scores: got shape (2, 16); allowed: finite scores of shape (4, 16)'),
    (torch.full((4, 16), math.nan), .5, 'scores: got'), ([[1.]], .5, 'scores: got list'),
    *((torch.rand(4, 16), r, f'keep_rate: got {r}; allowed: a number in (0, 1]') for r in (-1, 0, 2, math.nan)),
])
def test_places_that_cannot_be_chosen(scores, rate, text, tiny):
    with pytest.raises(VitpruneError) as e: scop.scop_policy(tiny, scores, rate)
    assert text in str(e.value)


@pytest.mark.parametrize('f, text', [
    (lambda: evit.EvitPlan(196, 0., (4,)), 'keep_rate: got 0.0'),
    (lambda: tome.merge_schedule(12, -1), 'r: got -1'),
    (lambda: tome.merge_schedule(12, 8, 2), 'inflection: got 2'),
    (lambda: Step('before', 'tome', score=tome.KeySimilarity(2), count=3), 'at: got before'),
])
def test_plans_and_steps_that_cannot_be(f, text):
    with pytest.raises(VitpruneError) as e: f()
    assert text in str(e.value)


def test_a_model_without_a_head_does_not_recover(train_set):
    headless = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=0)
    with pytest.raises(VitpruneError, match=r'model: got one without a head \(num_classes=0\); allowed: a classifier, to train on labels'):
        recover(SlimViT(headless, Policy({1: Step(keep=range(8))})), train_set, epochs=.2)


@pytest.mark.parametrize('weight', [-1., -1e-9, math.nan, math.inf, True, None, '1'])
@pytest.mark.parametrize('make', [power.mass_penalty, avit.ponder_loss, lambda w: avit.depth_loss(3, w), lambda w: idlevit.token_cut({}, w), idlevit.feature_mse,
                                  objectives.token_mse, lambda w: objectives.ratio_loss((.5,), w), lambda w: objectives.kl_to_teacher(weight=w), lambda w: evovit.two_heads(None, w)])
def test_a_weight_that_turns_a_loss_round(make, weight):
    with pytest.raises(VitpruneError, match='^weight: got '): make(weight)


def test_the_second_head_has_a_share_of_the_loss():
    for weight in (1, 1., 1.5):
        with pytest.raises(VitpruneError, match=r'weight: got 1(.\d)?; allowed: a share in \[0, 1\)'): evovit.two_heads(None, weight)
    for weight in (0, .5, .999): assert evovit.two_heads(None, weight).__name__ == f'two_heads({weight:g})'


# --- cosine

TWO = torch.tensor([[[1., 0.], [0., 1.]]])
COSINE = torch.tensor([[.99, .5], [.2, -.3]])


def toy(): return cosine.Seen([TWO]*2, torch.tensor([[[.2, .4]], [[.6, .8]]]), torch.ones(2, 1, 2), [TWO[:, 0]]*2)


@pytest.fixture(scope='module')
def clear():
    "Half of the labels are skip, and one feature says which."
    g = torch.Generator().manual_seed(0)
    sign = torch.rand(40, 50, generator=g) < .5
    easy = torch.randn(40, 50, 8, generator=g)
    easy[..., 0] += 6*sign
    return cosine.Seen([easy], torch.where(sign, .99, 0.)[None], torch.ones(1, 40, 50), [easy.mean(1)])


@pytest.mark.parametrize('f, text', [
    *((lambda b=b: cosine.keep_labels(COSINE, b), 'cosine_threshold: got') for b in (0, 1, 1.2, math.nan)),
    (lambda: cosine.keep_labels(COSINE, scale='degrees'), "scale: got degrees; allowed: 'scaled' or 'raw'"),
    (lambda: toy().threshold_for(1), 'share: got 1; allowed: a number in (0, 1)'),
    (lambda: cosine.fit_pruner(cosine.Seen([], torch.zeros(0, 0, 0), torch.zeros(0, 0, 0), [])), 'seen: got no tokens; allowed: captured tokens'),
    (lambda: cosine.fit_pruner(torch.nn.Linear(2, 2)), 'Make them with collect'),
    (lambda: cosine.reentries(torch.ones(3, 4).bool()), 'kept: got shape (3, 4); allowed: (B, L, P)'),
    (lambda: cosine.random_policy([3, 2], 4, 'entering'), "keys: got entering; allowed: 'all' or 'kept'"),
    (lambda: cosine.random_policy([3, 2], 4, seed=-1), 'seed: got -1'),
    (lambda: cosine.calibration_error(torch.full((5,), .2), torch.ones(1)), 'p, y: got shapes (5,) and (1,)'),
    (lambda: cosine.calibration_error(torch.ones(0), torch.ones(0)), 'that are not empty'),
    *((lambda p=p: cosine.calibration_error(torch.tensor([.5, p]), torch.ones(2)), 'allowed: probabilities, in [0, 1]') for p in (1.5, -.5, math.nan)),
])
def test_labels_and_tokens_that_cannot_be(f, text):
    with pytest.raises(VitpruneError) as e: f()
    assert text in str(e.value)


def test_a_pruner_that_cannot_learn(clear):
    learnt = cosine.fit_pruner(clear, .9, epochs=1)
    for f, text in ((lambda: cosine.fit_pruner(clear, .9999), 'single class of labels; the largest scaled cosine is 0.995'),
                    (lambda: cosine.fit_pruner(clear, 1.5), 'cosine_threshold: got 1.5; allowed: a number in (0, 1)'),
                    (lambda: cosine.label_report(learnt, clear, 0), 'score_threshold: got 0; allowed: a number in (0, 1)')):
        with pytest.raises(VitpruneError) as e: f()
        assert text in str(e.value)


def test_pruners_of_models(tiny, train_set):
    few, images = calibration(embedded('train'), 6), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = cosine.collect(tiny, few, batch_size=6)
    pruner = cosine.fit_pruner(seen, seen.threshold_for(.5), epochs=1)
    wider = create_vit('test_vit', img_size=32, patch_size=8)
    for f, text in ((lambda: cosine.walk(tiny, images, keys='some'), "keys: got some; allowed: 'all' or 'kept'"),
                    (lambda: cosine.collect(tiny, few.subset([])), 'ds: got no images; allowed: an ImageSet with images'),
                    (lambda: cosine.join(seen, toy()), 'captures of one model'),
                    (lambda: cosine.cosine_policy(pruner, 1.), 'score_threshold: got 1.0; allowed: a number in (0, 1)'),
                    (lambda: cosine.cosine_policy(pruner, keys='none'), "keys: got none; allowed: 'all' or 'kept'"),
                    (lambda: cosine.cosine_policy(pruner, counts=[1, 2]), '4 numbers of patches'),
                    (lambda: SlimViT(wider, cosine.cosine_policy(pruner), 'packed')(images), 'pruner: got one for tokens of width 48'),
                    (lambda: cosine.train_rounds(tiny, few, .5, rounds=-1), 'rounds: got -1; allowed: an integer, 0 or more'),
                    (lambda: cost_of(SlimViT(tiny, cosine.cosine_policy(pruner), 'packed')), 'images: got None; allowed: images to count on')):
        with pytest.raises(VitpruneError) as e: f()
        assert text in str(e.value)
