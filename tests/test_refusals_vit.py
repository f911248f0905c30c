"""What the foundations do not accept, each with the error that says so."""
import json

import numpy as np, pandas as pd, pytest, torch
from vitprune_nb import data
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit import cost, model as vit, recipe, redundancy

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)


def shape(name, **kwargs):
    "A model without weights."
    with torch.device('meta'): return vit.create_vit(name, **kwargs)


def tiny(**kwargs): return vit.create_vit('vit_tiny_patch16_224', **{**SMALL, **kwargs})


@pytest.fixture(scope='module')
def beit(): return vit.create_vit('beit_base_patch16_224', embed_dim=48, depth=2, num_heads=3)


def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_model_of_other_blocks(beit):
    for f in (vit.standard_blocks, lambda m: vit.capture(m).__enter__()):
        with pytest.raises(VitpruneError, match='timm.models.beit.Block'): f(beit)
    assert n_hooks(beit) == 0
    with pytest.raises(VitpruneError, match='model: got SwinTransformer'):
        vit.standard_blocks(shape('swin_tiny_patch4_window7_224'))


def test_a_mask_while_capturing():
    net = tiny().eval()
    with pytest.raises(VitpruneError, match='attn_mask: got a mask; allowed: None while capturing'):
        with vit.capture(net): net.forward_features(torch.randn(2, 3, 32, 32), attn_mask=torch.zeros(17, 17))
    assert n_hooks(net) == 0


PIXELS = np.zeros((4, 8, 8, 3), dtype=np.uint8)


def pictures(targets=(0, 1, 2, 1), classes='abc', images=PIXELS): return data.ImageSet(images, targets, list(classes), 'toy', 'test', 'x')


@pytest.mark.parametrize('targets, said', [
    ([0, 1], 'got 2 for 4 images; allowed: one for each image'), ([0, 1, 2, 1, 0], 'got 5 for 4 images'), ([], 'got 0 for 4 images'),
    ([0, -1, 2, 1], 'got class index [-1]; allowed: 0 to 2, one for each name'), ([0, 1, 2, 3], 'got class index [3]; allowed: 0 to 2'),
    ([0., 1., 2., 1.], 'got float64 of shape (4,); allowed: whole numbers, a class index for each image'), ([0, 1, 2, .5], 'got float64'),
    ([True, False, True, True], 'got bool'), ([[0], [1], [2], [1]], 'got int64 of shape (4, 1)'), (3, 'got int64 of shape ()'), (['a', 'b', 'c', 'b'], 'of shape (4,); allowed'),
    ([[0], [1, 2]], 'got '), (None, 'got object of shape ()'),
])
def test_labels_that_do_not_fit_their_images(targets, said):
    for make in (pictures, lambda t: pictures().but(targets=t)):
        with pytest.raises(VitpruneError) as e: make(targets)
        assert str(e.value).startswith('targets: ') and said in str(e.value)


def test_labels_images_and_names_are_changed_together():
    few = pictures()
    for change in (dict(classes=['a', 'b']), dict(images=PIXELS[:2])):
        with pytest.raises(VitpruneError, match='^targets: got '): few.but(**change)
    assert few.but(classes=['a', 'b'], targets=[0, 1, 1, 1]).classes == ['a', 'b'] and len(few.but(images=PIXELS[:1], targets=[2])) == 1
    assert few.but(classes=[*'abcd']).targets.tolist() == [0, 1, 2, 1] and len(few.subset([])) == 0 and len(few.subset([3, 3, 0])) == 3
    for kind in (list, tuple, np.uint8, torch.tensor):
        found = pictures(np.array([0, 1, 2, 1], kind) if kind is np.uint8 else kind([0, 1, 2, 1])).targets
        assert found.dtype == np.int64 and found.tolist() == [0, 1, 2, 1]
    assert pictures([-1]*4, '').targets.tolist() == [-1]*4                     # no names: nothing to number
    assert len(pictures([], '', [])) == 0


class Always(torch.nn.Module):
    def forward(self, x): return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()


def test_answers_and_their_interval():
    few = data.calibration(data.embedded('test'), 10)
    with pytest.raises(VitpruneError, match='batch_size: got 0'): vit.evaluate(Always(), few, batch_size=0)
    with pytest.raises(VitpruneError, match='correct: got 3 of 2'): vit.wilson_interval(3, 2)
    with pytest.raises(VitpruneError, match='NaN or infinite logits for 1 of 2 images'):
        vit.classes_of(torch.tensor([[0., 2.], [float('nan'), 2.]]))


@pytest.mark.parametrize('name, text', [
    ('swin_tiny_patch4_window7_224', 'model: got SwinTransformer'),
    ('vit_base_r50_s16_224', 'whose patches come from a HybridEmbed'),
    ('resnet18', 'model: got'),
])
def test_models_that_the_cost_model_does_not_know(name, text):
    with pytest.raises(VitpruneError) as e: cost.vit_blocks(shape(name))
    assert text in str(e.value)


@pytest.mark.parametrize('name, kwargs', [
    ('cait_xxs24_224', dict(depth=2, img_size=64)),
    ('vit_tiny_patch16_224', dict(img_size=72, depth=2, dynamic_img_pad=True)),
    ('vit_relpos_small_patch16_224', dict(depth=2, img_size=64)),
    ('swin_tiny_patch4_window7_224', {}),
])
def test_the_reason_why_no_formula_counts_is_in_the_error(name, kwargs):
    m = vit.create_vit(name, **kwargs)
    assert cost.not_by_formula(m)
    with pytest.raises(VitpruneError) as e: cost.model_macs(m)
    assert cost.not_by_formula(m) in str(e.value)


@pytest.mark.parametrize('counts, text', [
    ([(5, 5, 5)], 'counts: got 1 entries; allowed: 2'),
    ([(5, 5, 5), (-1, 5, 5)], 'counts[1]: got (-1, 5, 5)'),
    ([(6, 5, 5)]*2, 'each from 0 to 5, the tokens'),
    ([5, 5], 'counts[0]: got (5,)'),
    ([(5, 0, 5)]*2, 'nkv of at least 1'),
    ([(5, float('nan'), 5)]*2, 'counts[0]: got (5, nan, 5)'),
])
def test_counts_that_no_block_can_have(counts, text):
    with pytest.raises(VitpruneError) as e: cost.check_counts(counts, 2, 5)
    assert text in str(e.value)


@pytest.mark.parametrize('f, text', [
    (lambda m: cost.model_macs(m, [(17, 17, 17)]*3), 'counts: got 3 entries; allowed: 4'),
    (lambda m: cost.model_macs(m, extra=-1), 'extra: got -1'),
    (lambda m: cost.cost_table(m, by='head'), "by: got head; allowed: 'part' or 'block'"),
    (lambda m: cost.reduction(1, 0), 'new, old: got (1, 0)'),
    (lambda m: cost.speed_up(0, 1), 'two costs above 0'),
    (lambda m: cost.meet_budget(.45, [.069, .812, .03], .01),
     'reduction: got 0.45; allowed: 0.069 or 0.812, the nearest that can be had, for this model with these options.'),
    (lambda m: cost.meet_budget(.01, [.069, .2], .01), 'allowed: at least 0.069'),
    (lambda m: cost.meet_budget(.9, [.069, .8], .01), 'allowed: at most 0.800'),
    (lambda m: cost.meet_budget(.4, [], .02), 'found: got []; allowed: one share or more'),
    *((lambda m, c=c: cost.block_macs(*c, 48, 192), f'nq, nkv, nmlp: got {c}; allowed: numbers of tokens, 0 or more') for c in ((-1, 5, 5), (5, -1, 5), (5, 5, -1))),
])
def test_costs_that_cannot_be(f, text):
    with pytest.raises(VitpruneError) as e: f(tiny())
    assert text in str(e.value)


def test_heads_of_no_width_multiply_nothing():
    assert cost.block_macs(5, 5, 5, 48, 192, attn_dim=0) == 5*2*48*192 and cost.block_macs(5, 5, 5, 48, 192, attn_dim=48) == cost.block_macs(5, 5, 5, 48, 192)


TOKENS = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('f, text', [
    (lambda: redundancy.patch_similarity(TOKENS[:, :1]), 'tokens: got shape (4, 1, 16); allowed: (B, n, D) with two patches or more'),
    (lambda: redundancy.patch_similarity(TOKENS[0]), 'tokens: got shape (9, 16)'),
    *((lambda f=f: f(TOKENS, TOKENS[:, 1:]), 'after: got shape (4, 8, 16); allowed: the shape of `before`, (4, 9, 16)')
      for f in (redundancy.adjacent_similarity, redundancy.relative_update, redundancy.norm_growth)),
    (lambda: redundancy.depth_summary(toy(), 'cosine'), 'column: got cosine; allowed: within'),
    (lambda: redundancy.depth_summary(toy(), 'within', share=1), 'share: got 1; allowed: a number in (0, 1)'),
    (lambda: redundancy.similarity_by_depth(torch.nn.Linear(2, 2), data.calibration(data.embedded('test'), 10).but(transform=lambda im: im)),
     'model: got Linear'),
    (lambda: redundancy.similarity_by_depth(tiny(), [1, 2]), 'ds: got list; allowed: an ImageSet with images'),
    (lambda: redundancy.similarity_by_depth(tiny(), data.embedded('test').subset([])), 'ds: got no images'),
])
def test_tokens_that_cannot_be_compared(f, text):
    with pytest.raises(VitpruneError) as e: f()
    assert text in str(e.value)


def toy(): return pd.DataFrame(dict(image=range(5), depth=0, within=[0., 1, 2, 3, 4]))


@pytest.mark.parametrize('change, text', [
    (dict(kwargs=dict(checkpoint_path='evil.pth')), 'kwargs: got checkpoint_path'),
    (dict(kwargs=dict(pretrained_cfg=dict(file='evil.pth'))), 'kwargs: got pretrained_cfg'),
    (dict(kwargs=dict(block_fn='os.system')), 'kwargs: got block_fn'),
    (dict(kind='ResNet'), 'VisionTransformerDistilled'),
    (dict(act='os.system'), 'act: got os.system'),
])
def test_a_recipe_that_nobody_wrote(change, text):
    r = json.loads(json.dumps(recipe.recipe_of(tiny())))
    if 'kwargs' in change: change = dict(kwargs=r['kwargs'] | change['kwargs'])
    with pytest.raises(VitpruneError) as e: recipe.from_recipe(dict(r, **change))
    assert text in str(e.value)
