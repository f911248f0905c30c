"""What the engine does not accept, each with the error that says so."""
import json

import pytest, torch
from vitprune_nb.engine import store
from vitprune_nb.engine.channels import ChannelPlan, choose, slice_model
from vitprune_nb.engine.fates import fate_of
from vitprune_nb.engine.macs import counts_of, macs_of
from vitprune_nb.engine.modes import MODES, run_blocks, static_indices
from vitprune_nb.engine.policy import ClsAttention, GivenCounts, NormScore, Policy, Scorer, Step, Tokens, parse_schedule, select
from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.wrapper import TimmParts
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.evovit import Represented
from vitprune_nb.methods.vtp import add_gates, importance
from vitprune_nb.vit.model import create_vit

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)


@pytest.fixture(scope='module')
def model(): return create_vit('deit_tiny_patch16_224', qk_norm=True, **SMALL).eval()


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens(): return Tokens(torch.zeros(1, 5, 8), None, torch.arange(5)[None], 0, 1, {})


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


best = lambda k, fate='remove', at='before': Step(at, fate, score=NormScore(), count=k)
some = lambda fate: Step('before', fate, score=GivenCounts([3, 9, 14]), threshold=0.)


@torch.no_grad()
@pytest.mark.parametrize('steps, refused', [
    ({}, ()), ({1: best(6)}, ['mask']), ({1: best(16)}, ()), ({1: Step('queries', keep=(2, 5, 9))}, ['mask']), ({1: best(6, 'fuse')}, ['mask']),
    ({1: best(6, 'merge', 'middle')}, ['mask']), ({1: best(6, 'idle')}, ()), ({1: best(6, Represented())}, ['mask']), ({1: best(6, 'halt')}, ()),
    ({1: some('halt')}, ()), ({1: some('idle')}, ()), ({1: best(9), 2: best(6, 'halt')}, ['mask', 'gather', 'packed']),
    ({1: some('remove')}, ['mask', 'packed']), ({1: some('fuse')}, ['mask', 'packed'])])
def test_a_head_that_averages_asks_which_tokens_are_there(steps, refused, images):
    "timm's two calls give the logits, or raise an error where an average of all features is another one."
    torch.manual_seed(0)
    net = averaging().eval()
    net.head.weight.mul_(1000)
    found, policy = [], Policy(steps)
    for mode in MODES:
        if mode == 'gather' and policy.ragged: continue
        slim = SlimViT(net, policy, mode).eval()
        features, logits = slim.forward_features(images), slim(images)
        gap = (slim.backbone.readout(features) - logits).abs().max()
        try: again = slim.forward_head(features)
        except VitpruneError as e:
            found.append(mode)
            assert gap > 1e-3 and 'present: got None; allowed: a tensor (B, n)' in str(e) and 'Call the model itself' in str(e)
        else: torch.testing.assert_close(again, logits, atol=5e-4, rtol=0)
        assert torch.equal(slim.forward_traced(images)[0], logits)
    assert found == list(refused)


@torch.no_grad()
def test_a_head_that_reads_cls_needs_no_word_on_the_others(model, images):
    for mode in MODES:
        slim = SlimViT(model, Policy({1: best(6), 2: best(3, 'fuse')}), mode).eval()
        torch.testing.assert_close(slim.forward_head(slim.forward_features(images)), slim(images))


@pytest.mark.parametrize('step', [dict(fate='halt', count=6), dict(count=16)])      # the second keeps them all, more or less
def test_tokens_of_a_soft_decision_are_weighed_in_training(images, step):
    class Soft(Scorer):
        def forward(self, t): return t.x[..., 0]
        def soft_keep(self, t, scores): return scores.sigmoid()
    slim = SlimViT(averaging(), Policy({1: Step(score=Soft(), **step)}), 'mask')
    features = slim.train().forward_features(images)
    with pytest.raises(VitpruneError, match='present: got None'): slim.forward_head(features)
    slim.eval().forward_head(slim.forward_features(images))


def test_a_check_wants_two_images(model, images):
    policy = Policy({1: Step(score=NormScore(), count=8)})
    for x in (images[:1], [images[0], images[1]]):
        with pytest.raises(VitpruneError, match='^images: got .*; allowed: a tensor of two images or more'): check_policy(model, policy, x)


@pytest.mark.parametrize('x, text', [(torch.zeros(0, 3, 32, 32), 'images: got shape (0, 3, 32, 32); allowed: (B, 3, H, W) of one image or more'),
                                     (torch.zeros(3, 32, 32), 'images: got shape (3, 32, 32)'), ([1], 'images: got list; allowed: an ImageSet')])
def test_images_on_which_nothing_can_be_counted(x, text, model):
    slim = SlimViT(model, Policy({1: Step(score=NormScore(), threshold=0.)}), 'packed')
    for count in (counts_of, macs_of):
        with pytest.raises(VitpruneError) as e: count(slim, x)
        assert text in str(e.value)


def test_channels_that_cannot_be_chosen():
    scores = {'blocks.0.attn.proj': torch.rand(48), 'blocks.0.mlp.fc1': torch.rand(50)}
    for heads in (5, 0, -3, 1.5, True):
        with pytest.raises(VitpruneError, match=f'^heads: got {heads}; allowed: a divisor of 48, the attention outputs of blocks.0.attn.proj'): choose(scores, .4, heads)
    for none in ({}, None):
        with pytest.raises(VitpruneError, match='^scores: got'): choose(none, .4, 3)
    assert set(choose(scores, .4, 3).keep) == set(scores)


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


@pytest.mark.parametrize('make, text', [
    (lambda: Step(at='after', count=3), "at: got after; allowed: 'before', 'queries', 'middle'"),
    (lambda: Step(fate='eaten', keep=()), 'fate: got eaten'),
    (lambda: Step(keep=(1,), count=2), 'exactly one of'),
    (lambda: Step(keep=(1, 1)), 'different patch indices'),
    (lambda: Step(count=2), 'a scorer together with count'),
    (lambda: Policy({5: Step(keep=())}).counts(4, 197), 'policy: got a step for block index 5; allowed: 0 to 3'),
    (lambda: Policy({0: Step(threshold=.5, score=NormScore())}).counts(2, 6), 'whose counts depend on the image'),
    (lambda: Policy({0: Step(keep=(), fate='halt'), 1: Step(keep=(), fate='fuse')}), "'halt' without 'fuse'"),
    (lambda: Policy({0: Step(count=2, score=ClsAttention())}).counts(2, 6), "'middle' for the scorer ClsAttention"),
    (lambda: Policy({2: (Step('queries', keep=()), Step('middle', keep=()))}), 'queries remove, middle remove in block index 2'),
    (lambda: Policy({2: (Step(fate='idle', keep=()), Step('middle', keep=()))}), 'before idle, middle remove'),
    (lambda: Policy.from_dict(dict(name='x', steps={'0': dict(count=1, score=dict(kind='oracle'))})), 'score: got oracle; allowed: '),
    (lambda: parse_schedule(0, 3), 'keep_rate: got 0; allowed: a number in (0, 1]. Use 1'),
    *((lambda bad=bad: parse_schedule(bad, 3), ': got ') for bad in (-1, 1.2, [1, .5], {9: .5}, 'x', [True]*3)),
    (lambda: fate_of('eaten'), "fate: got eaten; allowed: 'remove', 'idle'"),
    (lambda: fate_of({'kind': 'idle', 'x': 1}), "fate: got {'kind': 'idle', 'x': 1}; allowed: 'idle' with what its config() gives"),
    *((lambda step=step: select(step, tokens()), 'scores: got None; allowed: a tensor (B, n)')
      for step in (Step(score=NormScore(), count=2), Step(score=NormScore(), threshold=0.))),
    (lambda: static_indices({0: Step(count=9, score=NormScore()), 1: Step(keep=(2,))}, 17), 'static positions in block index 1 after a per-image step'),
    (lambda: static_indices({1: Step(keep=(2, 5, 9)), 2: Step(keep=(3,))}, 17), 'patch 3 kept in block index 2 though'),
    (lambda: run_blocks(torch.zeros(1, 17, 48), [], {}, 'fast'), "mode: got fast; allowed: 'mask', 'gather', 'packed'"),
    (lambda: ChannelPlan({'a': ()}, {'a': 3}, .4, 0.), 'keep: got 0 channels for a'),
])
def test_a_step_policy_schedule_or_plan_that_cannot_be(make, text):
    with pytest.raises(VitpruneError) as e: make()
    assert text in str(e.value)


def test_half_a_schedule_file(tmp_path):
    (tmp_path/'s.json').write_text('{"1": ')
    with pytest.raises(VitpruneError, match='allowed: valid JSON'): parse_schedule(tmp_path/'s.json', 4)


# --- pruned models in folders

BY_IMAGE = Policy({1: Step(count=7, score=NormScore())}, 'by norm')


def weighty(**kwargs):
    torch.manual_seed(0)
    return create_vit('vit_tiny_patch16_224', **{**SMALL, **kwargs}).eval()


def with_hook(m): m.blocks[1].mlp.register_forward_hook(lambda mod, args, out: 2*out)
def own_head(m): m.head = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Linear(48, 10))
def own_activation(m): m.blocks[0].mlp.act = torch.nn.Softplus()
def tied(m): m.blocks[1].mlp.fc1.weight = m.blocks[0].mlp.fc1.weight
def own_forward(m): m.blocks[3].ls1.forward = lambda x: 3*x


@pytest.mark.parametrize('change, text', [
    (with_hook, 'blocks.1.mlp has hooks'), (own_head, 'one whose head is Sequential'), (own_activation, 'Softplus'),
    (tied, 'are the same tensor'), (own_forward, 'computes something else than its class says'),
])
def test_a_model_that_cannot_be_built_again(change, text, tmp_path):
    m = SlimViT(weighty(), BY_IMAGE)
    change(m.model)
    with pytest.raises(VitpruneError) as e: store.save_pruned(m, tmp_path/'odd')
    assert text in str(e.value) and not (tmp_path/'odd').exists()


@pytest.mark.parametrize('bad', [5, None, ''])
def test_what_is_no_path(bad):
    for read, argument in ((store.read_config, 'folder'), (store.load_slim, 'folder'), (store.load_sliced, 'folder'), (store.load_pruned, 'folder'), (store.open_model, 'model')):
        with pytest.raises(VitpruneError, match=f'^{argument}: got '): read(bad)


def test_a_model_may_be_named_by_a_path(tmp_path):
    store.save_pruned(SlimViT(weighty(), BY_IMAGE), tmp_path/'m')
    assert store.open_model(tmp_path/'m').policy.name == 'by norm'
    with pytest.raises(VitpruneError, match='^model: got .*none; allowed: '): store.open_model(tmp_path/'none')


def test_folders_of_another_kind(tmp_path):
    slim = SlimViT(weighty(), BY_IMAGE)
    store.save_pruned(slim, tmp_path/'slim')
    for f, text in ((lambda: store.save_pruned(weighty(), tmp_path/'odd'), 'allowed: a pruned model'),
                    (lambda: store.save_pruned(slim, tmp_path/'slim'), 'which is not empty'),
                    (lambda: store.save_sliced(slim, tmp_path/'odd'), 'channels are not cut'),
                    (lambda: store.load_sliced(tmp_path/'slim'), 'allowed: a sliced model')):
        with pytest.raises(VitpruneError, match=text): f()
    assert not (tmp_path/'odd').exists()
    cut = slice_model(weighty(), choose(importance(add_gates(weighty())), .3, 3))
    store.save_pruned(cut, tmp_path/'cut')
    with pytest.raises(VitpruneError, match='allowed: a model with a policy'): store.load_slim(tmp_path/'cut')


@pytest.mark.parametrize('new, kwargs, text', [
    (dict(mode='fast'), {}, "mode: Input should be 'mask', 'gather' or 'packed'"),
    ({}, dict(depth='4'), 'depth is a whole number'),
    ({}, dict(checkpoint_path='evil.pth'), 'checkpoint_path'),
    ({}, dict(embed_dim=96), 'cls_token is [1, 1, 48] in the file and [1, 1, 96] by its config'),
    (dict(act='os.system'), {}, 'act: got os.system'),
    (dict(format='vitprune model 9'), {}, 'A newer vitprune'),
    (dict(sigma=1), {}, 'sigma: Extra inputs'),
    (None, {}, 'allowed: valid JSON'),
])
def test_a_config_that_was_changed(new, kwargs, text, tmp_path):
    file = store.save_pruned(SlimViT(weighty(), BY_IMAGE), tmp_path/'m')/'config.json'
    good = json.loads(file.read_text())
    if new is None: file.write_bytes(b'\xff\xfe')
    else: file.write_text(json.dumps(good | new | dict(kwargs=good['kwargs'] | kwargs)))
    with pytest.raises(VitpruneError) as e: store.load_pruned(tmp_path/'m')
    assert text in str(e.value)
    file.write_text(json.dumps(good))
    assert isinstance(store.load_pruned(tmp_path/'m'), SlimViT)
