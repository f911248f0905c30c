"""Models of other kinds than the course's own: what every method makes of them, and heads that an empty image would leave nothing to read."""
import pytest
import torch

from vitprune_nb import data

from vitprune_nb.evidence import results
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.methods.base import METHODS, prune
from vitprune_nb.engine.plan import ramp_plan, uniform_plan
from vitprune_nb.engine.policy import NormScore, Policy, RandomScore, Step
from vitprune_nb.vit.model import create_vit, evaluate

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
P, L = 16, 4


def vit(**kw):
    torch.manual_seed(0)
    return create_vit('vit_tiny_patch16_224', **TINY | kw)


@pytest.fixture(scope='module')
def averages(): return vit(global_pool='avg')


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def few(): return data.load_data(split='train', limit=12)


# --- a head that averages patches needs one

LEAVES_NONE = {
    'keep=()': {1: Step(keep=())},
    'queries of the last block': {L - 1: Step('queries', keep=())},
    'count=0': {2: Step(score=NormScore(), count=0)},
    'merged into CLS': {1: Step('middle', 'merge', score=NormScore(), count=0)},
    'dropped after a fused token': {1: Step(fate='fuse', score=NormScore(), count=4), 2: Step('queries', keep=())},
}


@pytest.mark.parametrize('case', LEAVES_NONE)
@pytest.mark.parametrize('kind', [dict(global_pool='avg'), dict(global_pool='avg', class_token=False, reg_tokens=2)])
def test_a_policy_that_leaves_an_average_nothing_is_refused(case, kind):
    with pytest.raises(VitpruneError, match='policy: got a step that leaves no patch in block index .; allowed: at least one patch'):
        SlimViT(vit(**kind), Policy(LEAVES_NONE[case]))
    if kind.get('class_token', True): assert torch.isfinite(SlimViT(vit(), Policy(LEAVES_NONE[case]))(torch.randn(2, 3, 32, 32))).all(), 'CLS is read'


@torch.no_grad()
@pytest.mark.parametrize('steps', [{1: Step(fate='idle', keep=())}, {1: Step(fate='halt', keep=())}, {1: Step(fate='fuse', keep=())}, {1: Step(fate='halt', keep=(1, 2)), 2: Step(keep=())}])
def test_patches_that_come_back_are_averaged(averages, images, steps):
    check_policy(averages, Policy(steps), images)


@torch.no_grad()
def test_an_average_over_prefix_tokens_too_needs_no_patch(images):
    check_policy(vit(global_pool='avg', pool_include_prefix=True), Policy({2: Step(keep=())}), images)


@torch.no_grad()
@pytest.mark.parametrize('at', ['before', 'queries', 'middle'])
@pytest.mark.parametrize('fate', ['remove', 'merge'])
@pytest.mark.parametrize('prefix', [{}, dict(class_token=False)])
def test_a_threshold_leaves_the_best_patch_to_an_average(images, at, fate, prefix):
    model = vit(global_pool='avg', **prefix)
    p = Policy({1: Step(at, fate, score=RandomScore(0), threshold=.5), 2: Step(at, fate, score=RandomScore(0), threshold=2.)})
    check_policy(model, p, images) if not prefix else None
    slims = {m: SlimViT(model, p, m) for m in ('mask', 'packed')}
    a, b = (s(images) for s in slims.values())
    assert torch.isfinite(a).all() and torch.allclose(a, b, atol=1e-4)
    kept = slims['packed'].kept(images)[:, 3]
    assert (kept.sum(-1) == 1).all() and (kept.int().argmax(-1) == RandomScore(0).table[model.num_prefix_tokens:][:P].argmax()).all()


@torch.no_grad()
def test_a_threshold_still_empties_an_image_whose_cls_is_read(images):
    slim = SlimViT(vit(), Policy({1: Step(score=NormScore(), threshold=1e9)}), 'packed')
    assert slim.kept(images)[:, 1:].sum() == 0 and torch.isfinite(slim(images)).all()


@pytest.mark.parametrize('kind', [dict(global_pool='avg'), dict(global_pool='avg', class_token=False), dict(global_pool='avg', reg_tokens=3)])
@pytest.mark.parametrize('method', ['uniform', 'attention'])
def test_uniform_plans_leave_an_average_something_to_read(few, images, kind, method):
    model = vit(**kind)
    if method == 'attention' and not kind.get('class_token', True):
        with pytest.raises(VitpruneError, match='kind: got cls; allowed: another kind for a model without a CLS token'): prune(method, model, few, reduction=.4, calibration=4)
        return
    slim = prune(method, model, few, reduction=.4, calibration=4)
    counts = [len(k) for k in slim.plan.keep]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1, 'all blocks alike, the last one too'
    assert torch.isfinite(slim(images)).all() and .38 <= slim.info['reduction'] <= .5


def test_the_cheapest_uniform_and_ramp_plans(averages):
    scores = torch.rand(L, P + 1)
    assert [len(k) for k in uniform_plan(averages, scores, .785).keep] == [1]*L
    with pytest.raises(VitpruneError, match='reduction: got 0.85; allowed: at most 0.79'): uniform_plan(averages, scores, .85)
    assert len(ramp_plan(averages, .4).keep[-1]) == 1 and ramp_plan(vit(), .4).keep[-1] == ()
    with pytest.raises(VitpruneError, match='model: got a single block, of which only CLS is read; allowed: two blocks or more'): uniform_plan(vit(depth=1), torch.rand(1, P + 1), .3)


# --- logits that are no answer

def no_answer(kind):
    model = vit(depth=1)
    with torch.no_grad():
        if kind == 'NaN weight': model.head.weight[3, 0] = float('nan')
        if kind == 'infinite bias': model.head.bias[2] = float('inf')
        if kind == 'all minus infinity': model.head.bias.fill_(-float('inf'))
    return model.half() if kind == 'too large for half' else model


@pytest.mark.parametrize('kind', ['NaN weight', 'infinite bias', 'all minus infinity'])
def test_no_accuracy_for_logits_that_are_not_finite(few, kind):
    from vitprune_nb.methods.cosine import run_slim
    model = no_answer(kind)
    slim = SlimViT(model, Policy({0: Step(score=NormScore(), count=5)}))
    for answer in (lambda: evaluate(model, few), lambda: results.answers(model, few), lambda: run_slim(slim, few), lambda: evaluate(slim, few)):
        with pytest.raises(VitpruneError, match='model: got NaN or infinite logits for 12 of 12 images; allowed: finite logits'): answer()


def test_images_without_an_answer_are_counted():
    from vitprune_nb.vit.model import classes_of
    logits = torch.tensor([[0., 1.], [float('nan'), 1.], [2., 1.], [3., float('inf')]])
    assert classes_of(logits[[0, 2]]).tolist() == [1, 0]
    with pytest.raises(VitpruneError, match='for 2 of 4 images'): classes_of(logits)


# --- what looks at a model leaves it as it was

def looks():
    from vitprune_nb.methods.cosine import collect, run_slim
    from vitprune_nb.methods.significance import significance
    from vitprune_nb.papers.imagenet import features
    slim = lambda m: SlimViT(m, Policy({0: Step(score=NormScore(), count=5)}))
    return dict(evaluate=evaluate, answers=results.answers, features=features, significance=significance, collect=collect,
                run_slim=lambda m, ds: run_slim(slim(m), ds))


@pytest.mark.parametrize('look', list(looks()))
@pytest.mark.parametrize('training', [True, False])
def test_the_mode_comes_back_after_an_error_too(few, look, training):
    model = vit().train(training)
    ready = few.but(transform=data.eval_transform(data.data_config(model)))
    def damaged(im): raise OSError('no such image')
    looks()[look](model, ready)
    assert all(m.training is training for m in model.modules())
    with pytest.raises(OSError): looks()[look](model, few.but(transform=damaged))
    assert all(m.training is training for m in model.modules())


def test_run_slim_counts_what_macs_of_counts(few):
    from vitprune_nb.engine.macs import macs_of
    from vitprune_nb.methods.cosine import run_slim
    cut = prune('vtp', vit(), few, ratio=.3, sparse_epochs=0)
    ragged = SlimViT(cut.model, Policy({1: Step(score=RandomScore(), threshold=.5)}), 'packed')
    for model in (cut, ragged):                     # cut channels are padded where the next layer reads them
        assert run_slim(model, few)['macs'] == pytest.approx(macs_of(model, few), rel=1e-9)


# --- every method on every kind of model

@pytest.mark.parametrize('name', sorted(METHODS))
def test_every_option_is_read(few, monkeypatch, name):
    m, read = METHODS[name], set()
    class Spy(m.config):
        def __getattribute__(self, key):
            read.add(key)
            return super().__getattribute__(key)
    monkeypatch.setattr(type(m), 'config', Spy)
    given = {k: 1 for k in m.own if k.endswith('_epochs')} | {k: 8 for k in m.own if k == 'calibration'}
    for dial in (dict(reduction=.3), {m.dial: dict(cosine=.6).get(name)} if m.dial else {}):
        if dial: prune(name, vit(), few, **given, **dial)
    assert set(m.own) - read == set()


def kinds():
    from timm.models.vision_transformer import VisionTransformer
    def direct(**kw):
        torch.manual_seed(0)
        return VisionTransformer(**TINY | kw).eval()
    return {
        'tall': lambda: vit(img_size=(64, 32), patch_size=(8, 4)),
        'wide': lambda: vit(img_size=(32, 64)),
        'one channel': lambda: vit(in_chans=1),
        'no head': lambda: vit(num_classes=0),
        'one block': lambda: vit(depth=1),
        'no class token': lambda: vit(global_pool='avg', class_token=False),
        'averages': lambda: vit(global_pool='avg'),
        'half': lambda: vit().half(),
        'bfloat16': lambda: vit().bfloat16(),
        'double': lambda: vit().double(),
        'built directly': direct,
        'directly, registers': lambda: direct(reg_tokens=2, no_embed_class=True),
        'compiled': lambda: torch.compile(vit(), backend='eager'),
    }

METHOD_OPTIONS = {
    'vtp': dict(sparse_epochs=.5, batch_size=4, dtype='fp32'), 'life': dict(predictor_epochs=.5, backbone_epochs=.5, batch_size=4, dtype='fp32'),
    **{m: dict(calibration=8) for m in ('patch-slimming', 'uniform', 'attention', 'random', 'cosine')},
}
RGB = 'input_size: got (1, 32, 32); allowed: three channels: pictures are read as RGB'
CLS = 'a model that reads its CLS token'
SENTENCES = {   # what does not work, and what is said
    **{('one channel', m): RGB for m in METHOD_OPTIONS},
    ('no head', 'vtp'): 'model: got one without a head (num_classes=0); allowed: a classifier, for vtp trains on labels',
    ('no head', 'life'): 'model: got one without a head (num_classes=0); allowed: a classifier, for life trains on labels',
    ('one block', 'patch-slimming'): 'reduction: got 0.3; allowed: at least', ('one block', 'random'): 'reduction: got 0.3; allowed: at least',
    ('one block', 'uniform'): 'model: got a single block', ('one block', 'attention'): 'model: got a single block', ('one block', 'life'): 'model: got a single block',
    ('no class token', 'patch-slimming'): CLS, ('no class token', 'random'): CLS, ('averages', 'patch-slimming'): CLS, ('averages', 'random'): CLS,
    ('no class token', 'attention'): 'another kind for a model without a CLS token', ('no class token', 'life'): 'without a class token',
    **{(kind, m): f'model: got one in torch.{t}; allowed: float32, for {m} trains' for m in ('vtp', 'life')
       for kind, t in dict(half='float16', bfloat16='bfloat16', double='float64').items()},
}


@pytest.mark.parametrize('method', METHOD_OPTIONS)
@pytest.mark.parametrize('kind', kinds())
def test_every_method_on_every_kind(kind, method, few, tmp_path):
    "Pruned, finite, cheaper, and the same after a reload; or one sentence."
    from vitprune_nb.engine.store import load_pruned, save_pruned
    model, options = kinds()[kind](), dict(reduction=.3, **METHOD_OPTIONS[method])
    before = [p.detach().clone() for p in model.parameters()]
    if (kind, method) in SENTENCES:
        with pytest.raises(VitpruneError) as e: prune(method, model, few, **options)
        assert SENTENCES[kind, method] in str(e.value) and '\n' not in str(e.value)
        return
    pruned, weight = prune(method, model, few, **options), before[0]
    x = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    with torch.no_grad(): y = pruned(x)
    assert y.shape == (2, model.num_classes or 48) and y.dtype == weight.dtype and torch.isfinite(y).all()
    assert pruned.info['reduction'] > .2 and not torch.equal(y, model(x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), 'the dense model is left as it is'
    with torch.no_grad(): assert torch.equal(load_pruned(save_pruned(pruned, tmp_path/'m'))(x), y)


OTHERS = [name for name in METHODS if name not in METHOD_OPTIONS]


@pytest.mark.parametrize('method', OTHERS)
@pytest.mark.parametrize('kind', ['plain', *list(kinds())[::4]])
def test_methods_that_came_later(kind, method, few, tmp_path):
    "As above, for methods that stand in no table: what they cannot do they say in one sentence."
    from vitprune_nb.engine.store import load_pruned, save_pruned
    quick = dict(calibration=8, batch_size=4, dtype='fp32') | {k: .5 for k in METHODS[method].options if k.endswith('_epochs')}
    options = {k: v for k, v in quick.items() if k in METHODS[method].options}
    model = (kinds()[kind] if kind in kinds() else lambda: vit())()
    try: pruned = prune(method, model, few, reduction=.3, **options)
    except VitpruneError as e:
        assert kind != 'plain' and 'allowed: ' in str(e) and '\n' not in str(e)
        return
    weight = next(model.parameters())
    x = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    with torch.no_grad():
        y = pruned(x)
        assert torch.isfinite(y).all() and torch.equal(load_pruned(save_pruned(pruned, tmp_path/'m'))(x), y)


def test_a_model_without_a_head_may_be_pruned_without_training(few):
    pruned = prune('vtp', vit(num_classes=0), few, reduction=.3, sparse_epochs=0)
    assert pruned(torch.randn(2, 3, 32, 32)).shape == (2, 48)


@pytest.mark.parametrize('size', [(32, 64), (64, 32), (48, 48)])
@pytest.mark.parametrize('augment', ['none', 'light', 'deit'])
def test_images_for_training_have_the_shape_of_the_model(size, augment):
    from PIL import Image
    cfg = data.data_config(vit(img_size=size))
    for picture in (Image.new('RGB', (32, 32)), Image.new('RGB', (100, 40))):
        assert data.train_transform(cfg, augment)(picture).shape == (3, *size)


@pytest.mark.parametrize('size, whole', [((32, 32), True), ((64, 224), True), ((224, 64), True), ((72, 80), False)])
def test_the_shorter_side_says_whether_images_are_cropped(size, whole):
    assert (data.data_config(vit(img_size=size))['crop_pct'] == 1) == whole


def test_a_compiled_model_in_a_slimvit(images):
    model = vit()
    slim = SlimViT(torch.compile(model, backend='eager'), Policy({1: Step(keep=(1, 2))}))
    assert slim.model is model and torch.equal(slim(images), SlimViT(model, Policy({1: Step(keep=(1, 2))}))(images))


# --- a head that tells other classes apart than the images show

def test_a_head_of_another_size_is_not_scored(few):
    from vitprune_nb.methods.cosine import run_slim
    from vitprune_nb.train.recipe import TrainConfig
    from vitprune_nb.train.trainer import fit
    wide, before = vit(num_classes=1000), vit(num_classes=1000).state_dict()
    cfg = TrainConfig(epochs=.1, batch_size=4, dtype='fp32')
    for score in (lambda: evaluate(wide, few), lambda: results.answers(wide, few), lambda: evaluate(SlimViT(wide), few), lambda: run_slim(SlimViT(wide), few), lambda: fit(wide, few, cfg, few)):
        with pytest.raises(VitpruneError, match='data: got embedded with 10 classes; allowed: images of the 1000 classes that this model tells apart'): score()
    assert all(torch.equal(v, before[k]) for k, v in wide.state_dict().items())
    fit(wide, few, cfg)                                          # to train a part of a head is fine
    bare = torch.nn.Sequential(vit(num_classes=1000))            # what does not say how many it has is believed
    ready = few.but(transform=data.eval_transform(data.data_config(wide)))
    assert evaluate(bare, ready)['images'] == results.answers(bare, ready).size == 12
