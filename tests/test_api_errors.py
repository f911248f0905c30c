"""Bad input to the API: each refusal names the argument, what was given, what is allowed, and what to do next."""
import copy, json

import pytest, torch
from vitprune_nb import data
from vitprune_nb.vit import cost
from vitprune_nb.engine import slim as engine
from vitprune_nb.engine import store
from vitprune_nb.evidence import measure
from vitprune_nb.methods import patch_slimming
from vitprune_nb.evidence import results
from vitprune_nb.vit import model as vit
from vitprune_nb.core import pick_device
from vitprune_nb.errors import VitpruneError


@pytest.fixture(scope='module')
def tiny():
    return vit.create_vit('test_vit', num_classes=10, img_size=32, patch_size=8)   # 16 patches, 6 blocks


@pytest.fixture(scope='module')
def cal():
    return data.load_data(split='train', limit=4)


CASES = {
    'keep rate 0': (lambda m, cal, tmp: engine.parse_schedule(0, 6), 'keep_rate: got 0; allowed: a number in (0, 1]'),
    'schedule longer than the model': (lambda m, cal, tmp: engine.parse_schedule([1.]*7, 6), '6'),
    'step for a block that is not there': (lambda m, cal, tmp: engine.SlimViT(m, engine.Policy({6: engine.Step(keep=(0,))})), 'policy: got a step for block index 6; allowed: 0 to 5'),
    'patch that is not there': (lambda m, cal, tmp: engine.SlimViT(m, engine.Policy({0: engine.Step(keep=(0, 16))})), 'policy: got patch 16 in block index 0; allowed: 0 to 15'),
    'plan that brings a patch back': (lambda m, cal, tmp: patch_slimming.Plan('p', 'test_vit', 16, 1, [(0,), (0, 1), (), (), (), ()]), 'nested patches'),
    'plan of another model': (lambda m, cal, tmp: patch_slimming.Plan('p', 'deit_tiny_patch16_224', 16, 1, [()]*6).slim(m), 'model: got test_vit with 6 blocks'),
    'Swin': (lambda m, cal, tmp: engine.SlimViT(vit.create_vit('swin_tiny_patch4_window7_224')), 'SwinTransformer'),
    'no such timm model': (lambda m, cal, tmp: vit.create_vit('deit_huge'), "model: got deit_huge; allowed: a name from timm.list_models"),
    'more saved than there is': (lambda m, cal, tmp: patch_slimming.for_budget(m, cal, 1.), 'reduction: got 1.0; allowed: a share in (0, 1)'),
    'negative tolerance': (lambda m, cal, tmp: patch_slimming.top_down(m, cal, -.1), 'eps: got -0.1; allowed: a positive relative error'),
    'tolerance that is no number': (lambda m, cal, tmp: patch_slimming.top_down(m, cal, float('nan')), 'eps: got nan; allowed: a positive relative error'),
    'tolerance that no block can meet': (lambda m, cal, tmp: patch_slimming.top_down(m, cal, 1e-30), 'misses it even with all its 16 patches'),
    'no calibration images': (lambda m, cal, tmp: patch_slimming.top_down(m, cal.subset([])), 'ds: got no images; allowed: at least one calibration image'),
    'empty loader': (lambda m, cal, tmp: patch_slimming.top_down(m, []), 'ds: got no images; allowed: at least one calibration image'),
    'step of no patches': (lambda m, cal, tmp: patch_slimming.top_down(m, cal, step=0), 'step: got 0; allowed: a share in (0, 1) or a whole number of patches'),
    'NaN in the weights': (lambda m, cal, tmp: patch_slimming.top_down(_nan(m), cal), 'model: got weights or images that give NaN or infinite tokens'),
    'tuned plan for other weights': (lambda m, cal, tmp: patch_slimming.Plan('p', 'test_vit', 16, 1, [()]*6, dict(model_hash='0'), {'head.bias': m.head.bias}).slim(m), 'model: got a test_vit with other weights'),
    'plan whose weights are gone': (lambda m, cal, tmp: patch_slimming.Plan.load(_half_plan(m, tmp)), 'a plan with its weights, p.safetensors, unchanged beside it'),
    'plan that is none': (lambda m, cal, tmp: patch_slimming.Plan.load(_written(tmp/'p.json', '[1]')), 'allowed: a plan written by Plan.save'),
    'tolerance 0': (lambda m, cal, tmp: patch_slimming.top_down(m, cal, 0), 'eps: got 0; allowed: a positive relative error'),
    'data folder that is not there': (lambda m, cal, tmp: data.load_data(tmp/'none'), "allowed: 'embedded', 'cifar10', 'cifar100' or an existing folder"),
    'data folder without train/': (lambda m, cal, tmp: data.load_data(tmp, 'train'), 'allowed: a folder that holds train/'),
    'more calibration images than there are': (lambda m, cal, tmp: data.calibration(cal, 5), 'n: got 5; allowed: 1 to 4'),
    'folder without a model': (lambda m, cal, tmp: store.load_slim(tmp), 'a pruned model, with config.json in it'),
    'counts of another depth': (lambda m, cal, tmp: cost.model_macs(m, [(17, 17, 17)]*5), 'counts: got 5 entries; allowed: 6'),
    'no repeats': (lambda m, cal, tmp: measure.bench(dict(a=m), torch.zeros(1, 3, 32, 32), repeats=0), 'repeats: got 0; allowed: a positive integer'),
    'device that is not there': (lambda m, cal, tmp: pick_device('tpu'), 'device: got tpu'),
    'field that no row has': (lambda m, cal, tmp: results.make_row('dense', colour='blue'), 'field: got colour'),
    'damaged results file': (lambda m, cal, tmp: results.read_rows(_written(tmp/'r.csv', 'a,b\n1,2\n')), 'a CSV whose columns are'),
}


def _nan(model):
    model = copy.deepcopy(model)
    model.blocks[1].attn.qkv.weight.data[0, 0] = float('nan')
    return model


def _half_plan(model, tmp):
    patch_slimming.Plan('p', 'test_vit', 16, 1, [()]*6, {}, {'head.bias': model.head.bias.detach()}).save(tmp/'p.json')
    (tmp/'p.safetensors').unlink()
    return tmp/'p.json'


def _written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize('name', CASES)
def test_refusal_says_what_to_do(name, tiny, cal, tmp_path):
    call, message = CASES[name]
    with pytest.raises(VitpruneError) as e: call(tiny, cal, tmp_path)
    assert message in str(e.value)
    assert '\n' not in str(e.value) and ': got ' in str(e.value) and '; allowed: ' in str(e.value)


def test_truncated_image_is_named(tmp_path):
    (tmp_path/'test'/'cat').mkdir(parents=True)
    image = data.embedded('test').image(0)
    image.save(tmp_path/'test'/'cat'/'good.png')
    image.save(tmp_path/'test'/'cat'/'half.png')
    half = (tmp_path/'test'/'cat'/'half.png').read_bytes()
    (tmp_path/'test'/'cat'/'half.png').write_bytes(half[:len(half)//2])
    ds = data.load_data(tmp_path)
    with pytest.raises(VitpruneError, match='half.png'): [ds[i] for i in range(2)]
    assert len(data.load_data(tmp_path, skip_damaged=True)) == 1


def test_checkpoint_of_another_shape(tmp_path):
    from safetensors.torch import save_file
    save_file(vit.create_vit('test_vit').state_dict(), tmp_path/'w.safetensors')
    with pytest.raises(VitpruneError, match='weights: got'): vit.create_vit('deit_tiny_patch16_224', weights=tmp_path/'w.safetensors')


def test_damaged_pruned_model(tiny, tmp_path):
    slim = engine.SlimViT(tiny, engine.Policy({0: engine.Step(keep=(0, 1, 2))}))
    folder = store.save_slim(slim, tmp_path/'m')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text('{')
    with pytest.raises(VitpruneError, match='valid JSON'): store.load_slim(folder)
    (folder/'config.json').write_text(json.dumps(config))
    weights = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(weights[:len(weights)//2])
    with pytest.raises(VitpruneError, match='model.safetensors'): store.load_slim(folder)
