"""What the engine does not accept, each with the error that says so."""
import pytest, torch
from vitprune_nb.engine.policy import NormScore, Policy, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.engine.wrapper import TimmParts
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.model import create_vit

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)


@pytest.fixture(scope='module')
def model(): return create_vit('deit_tiny_patch16_224', qk_norm=True, **SMALL).eval()


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def averaging(): return create_vit('vit_tiny_patch16_224', global_pool='avg', **SMALL)


@pytest.mark.parametrize('make, text', [
    (lambda m: SlimViT(m, Policy({0: Step(score=NormScore(), threshold=.5)})), "mode: got gather; allowed: 'packed' or 'mask' for a threshold"),
    (lambda m: SlimViT(m, mode='fast'), "mode: got fast; allowed: 'mask', 'gather' or 'packed'"),
    (lambda m: SlimViT(m, Policy({7: Step(keep=())})), 'block index 7'),
    (lambda m: SlimViT(m, Policy({0: Step(keep=(99,))})), 'patch 99'),
    (lambda m: SlimViT(m, Policy({0: Step(keep=(1, 2)), 1: Step(keep=(3,))})), 'got patch 3 kept in block index 1 though an earlier block dropped it'),
    (lambda m: SlimViT(averaging(), Policy({2: Step(keep=())})), 'average'),
    (lambda m: Policy({0: Step(threshold=.5)}), 'score'),
    (lambda m: SlimViT(create_vit('resnet18', num_classes=10)), 'model: got'),
    (lambda m: SlimViT(create_vit('swin_tiny_patch4_window7_224', num_classes=10)), 'model: got'),
    (lambda m: TimmParts.check(create_vit('resnet18', num_classes=10)), 'model: got'),
    (lambda m: SlimViT(m, Policy({0: Step(count=9, score=NormScore()), 1: Step(keep=(2,))}), mode='mask').set_mode('gather'),
     'static positions in block index 1 after a per-image step'),
    (lambda m: SlimViT(m, Policy({1: Step(keep=(2,))})).set_policy(Policy({0: Step(count=9, score=NormScore())})),
     'policy: got other scorers, NormScore; allowed: the scorers that the model was made with'),
])
def test_a_policy_or_model_that_cannot_be(make, text, model):
    with pytest.raises(VitpruneError) as e: make(model)
    assert text in str(e.value)


def test_scores_that_are_no_numbers(images):
    nan = create_vit('deit_tiny_patch16_224', **SMALL)
    with torch.no_grad(): nan.pos_embed[0, 3] = float('nan')
    with pytest.raises(VitpruneError, match='score: got NaN from NormScore'):
        SlimViT(nan, Policy({1: Step(score=NormScore(), count=8)}))(images)


def test_packed_does_not_train(model, images):
    slim = SlimViT(model, Policy({1: Step(keep=(2, 5))}), 'packed').train()
    try:
        with pytest.raises(VitpruneError, match='mode: got packed in training'): slim(images)
    finally: model.eval()


def test_another_grid_than_that_of_the_policy():
    wide = create_vit('deit_tiny_patch16_224', dynamic_img_size=True, **SMALL)
    fixed, images = SlimViT(wide, Policy({1: Step(keep=(2, 5, 9))}, 'three')), torch.randn(1, 3, 48, 48)
    with pytest.raises(VitpruneError, match="images: got a grid of 6 by 6 patches; allowed: 4 by 4 patches, for which 'three' was made"):
        fixed(images)
    wide.set_input_size((48, 48))
    with pytest.raises(VitpruneError, match='6 by 6'): fixed.n_tokens      # noqa: B018
