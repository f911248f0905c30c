"""ONNX files of pruned models, run by ONNX Runtime: the same logits for images that the export never saw, and nothing left behind when it fails."""
import json, sys

import numpy as np
import pytest
import torch

pytest.importorskip('onnxruntime')
from vitprune_nb import deploy
from vitprune_nb.core import set_seed
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.channels import choose, prunable_layers, slice_model
from vitprune_nb.methods.life import life_plan
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.engine.plan import ramp_plan
from vitprune_nb.engine.slim import ClsAttention, NormScore, Policy, SlimViT, Step
from vitprune_nb.vit.model import create_vit


@pytest.fixture(scope='module')
def static():
    set_seed(0)
    m = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.1*torch.randn_like(p))
    scores = {n: torch.rand(l.in_features, generator=torch.Generator().manual_seed(i)) for i, (n, l) in enumerate(prunable_layers(m).items())}
    cut, plan, life = slice_model(m, choose(scores, .4, 3)), ramp_plan(m, .4), life_plan(m, .7, (1, 2))
    alive = lambda net: SlimViT(net, life.policy(life.score(48))).eval()
    return {'dense': m, 'patch slimming': plan.slim(m), 'vtp': cut, 'life': alive(m), 'patch slimming + vtp': plan.slim(cut), 'life + vtp': alive(cut)}


@pytest.fixture(scope='module')
def images(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize('name', ['patch slimming', 'vtp', 'life', 'patch slimming + vtp', 'life + vtp'])
def test_the_file_says_what_the_model_says(static, images, tmp_path, name):
    import onnxruntime
    path = deploy.export_onnx(static[name], tmp_path/'m.onnx', images)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    unseen = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    got = session.run(None, {session.get_inputs()[0].name: unseen.numpy()})[0]
    assert np.abs(got - static[name](unseen).numpy()).max() <= 1e-4
    assert np.abs(got - static['dense'](unseen).numpy()).max() > 1e-3, 'pruning did something'
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx'], 'one file, weights inside'
    assert count_macs(static[name], images) < count_macs(static['dense'], images)


@torch.no_grad()
def test_ties_are_broken_alike(static, tmp_path):
    "A constant image: patches that score exactly alike are kept by position, in the file as in the model."
    from vitprune_nb.engine.policy import RandomScore
    class Flat(NormScore):
        def forward(self, t): return (t.x*0).sum(-1)
    m = SlimViT(static['dense'], Policy({1: Step(score=Flat(), count=5)})).eval()
    x = torch.randn(2, 3, 32, 32)
    f = deploy.OnnxModel(deploy.export_onnx(m, tmp_path/'m.onnx', x))
    y = torch.randn(2, 3, 32, 32)
    assert deploy.logit_gap(f, m, y) <= 1e-4
    other = SlimViT(static['dense'], Policy({1: Step(score=RandomScore(3), count=5)})).eval()
    assert (other(y) - m(y)).abs().max() > 1e-3, 'which five matters'


@torch.no_grad()
@pytest.mark.parametrize('name', ['dense', 'patch slimming', 'vtp', 'life', 'life + vtp', 'fused', 'merged', 'idle', 'average'])
def test_any_batch(static, images, tmp_path, name):
    "Other sizes than that of the example, and the right logits for each."
    dense = static['dense']
    more = dict(fused={1: Step('middle', 'fuse', score=ClsAttention(), count=6)}, merged={1: Step(fate='merge', score=NormScore(), count=6)},
                idle={1: Step('queries', 'idle', score=NormScore(), count=6)}, average={1: Step(score=NormScore(), count=6)})
    if name == 'average': dense = create_vit('vit_tiny_patch16_224', global_pool='avg', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)
    m = SlimViT(dense, Policy(more[name])).eval() if name in more else static[name]
    f = deploy.OnnxModel(deploy.export_onnx(m, tmp_path/'m.onnx', images, dynamic=True))
    assert isinstance(f.input.shape[0], str)
    for n in (1, 3, 8): assert deploy.logit_gap(f, m, torch.randn(n, 3, 32, 32)) <= 1e-4


def test_a_file_that_would_be_fixed_to_its_batch_is_refused(images, tmp_path):
    class Counts(torch.nn.Module):
        def forward(self, x): return x.flatten(1)[:, :5]*len(x)      # Python's number, not the graph's
    with pytest.raises(VitpruneError, match='dynamic: got True; allowed: False for this Counts, whose file takes 2 images. Export one file for each batch size.'):
        deploy.export_onnx(Counts().eval(), tmp_path/'m.onnx', images, dynamic=True)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_the_file_knows_its_images_and_classes(static, images, tmp_path):
    import onnxruntime
    from vitprune_nb.data import data_config
    names = ['plane', 'car', 'bird', 'Katze', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    m = SlimViT(static['dense'], Policy({1: Step(keep=(1, 2, 3))})).eval()
    f = deploy.OnnxModel(deploy.export_onnx(m, tmp_path/'a.onnx', images))
    want = data_config(static['dense'])
    assert f.about == dict(input_size=[3, 32, 32], mean=list(want['mean']), std=list(want['std']), interpolation=want['interpolation'], crop_pct=want['crop_pct'])
    assert deploy.OnnxModel(deploy.export_onnx(m, tmp_path/'b.onnx', images, classes=names)).about['classes'] == names
    m.classes = names
    path = deploy.export_onnx(m, tmp_path/'c.onnx', images)
    said = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider']).get_modelmeta().custom_metadata_map
    assert json.loads(said['classes']) == names and json.loads(said['mean']) == list(want['mean'])
    assert deploy.OnnxModel(deploy.export_onnx(static['life'], tmp_path/'d.onnx', images)).about['input_size'] == [3, 32, 32]
    with pytest.raises(VitpruneError, match='classes: got 2 names; allowed: 10, as many as the model has logits'): deploy.export_onnx(m, tmp_path/'e.onnx', images, classes=names[:2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.onnx', 'b.onnx', 'c.onnx', 'd.onnx']


def test_quantisation_finds_more_products_after_its_preprocessing(static, images, tmp_path):
    from vitprune_nb.vit.model import course_model
    net = course_model()
    left, gap = deploy.quantised(ramp_plan(net, .4).slim(net), tmp_path/'q.onnx', images)
    assert left == {'as exported': 46, 'pre-processed': 24}, 'QKᵀ and AV of twelve blocks'
    assert 0 < gap < .5 and [p.name for p in tmp_path.iterdir()] == ['q.onnx']
    assert deploy.quantised(static['dense'], tmp_path/'d.onnx', images)[0] == {'as exported': 6, 'pre-processed': 6}


def test_a_threshold_does_not_export_and_leaves_nothing(static, images, tmp_path):
    ragged = SlimViT(static['dense'], Policy({1: Step(score=NormScore(), threshold=7.)}), 'packed').eval()
    with pytest.raises(VitpruneError, match='one that computes the same operations for all images. The exporter says: '): deploy.export_onnx(ragged, tmp_path/'m.onnx', images)
    assert list(tmp_path.iterdir()) == []
    row, = deploy.try_exports(dict(ragged=ragged), images)
    assert not row['exports'] and row['gap'] is None and row['reason'] and '\n' not in row['reason']


def test_a_file_that_says_something_else_is_not_kept(static, images, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, 'logit_gap', lambda *a: 1.)
    monkeypatch.setattr(deploy, '_write', lambda model, path, *a: path.write_bytes(b''))
    monkeypatch.setattr(deploy, 'OnnxModel', lambda path: None)
    with pytest.raises(VitpruneError, match='logits that differ by 1.0e.00 in ONNX Runtime; allowed: at most 0.0001'): deploy.export_onnx(static['dense'], tmp_path/'m.onnx', images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('missing', ['onnx', 'onnxruntime', 'onnxscript'])
def test_without_the_runtime(static, images, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(VitpruneError, match=f'an environment without {missing}; .* Run `pip install onnx onnxruntime onnxscript`.'): deploy.export_onnx(static['dense'], tmp_path/'m.onnx', images)
    assert list(tmp_path.iterdir()) == []


BAD = {
    'training': (dict(train=True), 'model: got a VisionTransformer in training mode'),
    'no module': (dict(model=lambda x: x), 'allowed: a module in eval mode'),
    'other ending': (dict(path='m.pt'), 'allowed: a file name that ends in .onnx'),
    'one image without batch': (dict(images=torch.randn(3, 32, 32)), 'images: got torch.Size([3, 32, 32])'),
    'no images': (dict(images=torch.randn(0, 3, 32, 32)), 'images: got torch.Size([0, 3, 32, 32])'),
    'no tensor': (dict(images=[1]), 'images: got [1]'),
    'double': (dict(images=torch.randn(2, 3, 32, 32).double()), 'allowed: float32 images'),
    'one image for any batch': (dict(images=torch.randn(1, 3, 32, 32), dynamic=True), 'two at least'),
    'meta': (dict(meta=True), 'model: got one on another device'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(static, images, tmp_path, case):
    kw, message = BAD[case]
    m = kw.get('model', static['dense'])
    if kw.get('meta'): m = create_vit('deit_tiny_patch16_224', depth=1).to('meta')
    if kw.get('train'): m = create_vit('deit_tiny_patch16_224', depth=1).train()
    with pytest.raises(VitpruneError) as e: deploy.export_onnx(m, tmp_path/kw.get('path', 'm.onnx'), kw.get('images', images), kw.get('dynamic', False))
    assert message in str(e.value) and '\n' not in str(e.value)
    assert list(tmp_path.iterdir()) == []
