"""Checkpoints: no file runs code, whatever door it comes through; other people's are read as what they are, whole or not at all."""
import argparse, configparser, json, os, re, subprocess, sys, warnings

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, clean_env
from safetensors.torch import save_file

from vitprune_nb import run

from vitprune_nb.vit import model as vit, weights
from vitprune_nb.core import data_path
from vitprune_nb.errors import VitpruneError
from vitprune_nb.experiment import Experiment
from vitprune_nb.engine import store
from vitprune_nb.engine.plan import weights_hash

KWARGS = dict(img_size=32, patch_size=8, num_classes=10)   # of timm's test_vit: 6 blocks, 64 wide
OLDEST = os.path.join(sys.prefix, 'oldest-timm')


def oldest_allowed():
    "The oldest timm of settings.ini."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return re.search(r'timm>=([\d.]+)', config['DEFAULT']['requirements'])[1]


# --- no code from a file

@pytest.fixture(scope='module', params=['newest', 'oldest'])
def tried(request, tmp_path_factory):
    "What each door said to hostile files, under the timm that is installed and under the oldest that is allowed."
    where = dict(newest=[], oldest=[OLDEST])[request.param]
    if where: assert os.path.isdir(os.path.join(OLDEST, 'timm')), f'{OLDEST} holds no timm: `make install-dev` puts timm {oldest_allowed()} there'
    env = clean_env(PYTHONPATH=os.pathsep.join([*where, str(ROOT), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')
    r = subprocess.run([sys.executable, '-W', 'ignore', ROOT/'tests'/'weights_script.py', tmp_path_factory.mktemp('doors')],
                       env=env, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, r.stderr[-2000:]
    found = json.loads(r.stdout)
    assert (found['timm'] == oldest_allowed()) if where else (found['timm'] == timm.__version__)
    return found


def test_the_hostile_files_would_run_code(tried):
    controls = {k: d['ran'] for k, d in tried['doors'].items() if d['kind'] == 'control'}
    assert len(controls) == 8 and all(controls.values()), controls


def test_no_door_runs_code(tried):
    doors = {k: d for k, d in tried['doors'].items() if d['kind'] != 'control'}
    assert len(doors) > 150
    assert [k for k, d in doors.items() if d['ran']] == []


def test_every_door_refuses_in_a_sentence(tried):
    doors = {k: d for k, d in tried['doors'].items() if d['kind'] != 'control'}
    assert {k: d['kind'] for k, d in doors.items() if d['kind'] not in ('VitpruneError', 'exit 2')} == {}
    assert {k: d['text'] for k, d in doors.items() if '\n' in d['text'].strip() or not d['text'].strip()} == {}
    assert tried['left'] == [], 'nothing is left of what was refused'


# --- how other people save

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return weights.create_vit('test_vit', **KWARGS)


@pytest.fixture(scope='module')
def state(model): return model.state_dict()


def under(prefix, state): return {prefix + k: v for k, v in state.items()}
def headless(state): return {k: v for k, v in state.items() if not k.startswith('head')}
def zeros(state): return {k: torch.zeros_like(v) for k, v in state.items()}


def adam(state):
    "The state of an optimizer."
    return {'state': {i: {'step': torch.tensor(1.), 'exp_avg': v} for i, v in enumerate(state.values())}, 'param_groups': [{'lr': .1}]}


WRAPPED = {   # name: (what is saved, words of the warning; None: none)
    'plain': (lambda s: s, None),
    'net and acc': (lambda s: {'net': s, 'acc': 91.2, 'epoch': 3}, None),
    'model, with the options of a training': (lambda s: {'model': s, 'args': argparse.Namespace(lr=.1)}, None),
    'state_dict': (lambda s: {'state_dict': s}, None),
    'model_state_dict and optimizer': (lambda s: {'model_state_dict': s, 'optimizer_state_dict': adam(s)}, r'optimizer_state_dict.state.0.step … \(160\)'),
    'Lightning': (lambda s: {'state_dict': under('model.', s) | {'loss.weight': torch.ones(3)}, 'epoch': 1}, 'state_dict.loss.weight'),
    'DDP': (lambda s: under('module.', s), None),
    'DDP of a compiled one': (lambda s: {'model': under('module._orig_mod.', s)}, None),
    'compiled DDP': (lambda s: under('_orig_mod.module.', s), None),
    'compiled blocks': (lambda s: {k.replace('blocks.0.', 'blocks.0._orig_mod.'): v for k, v in s.items()}, None),
    'backbone in a task': (lambda s: {'state_dict': under('backbone.', s) | under('neck.', {'weight': torch.ones(2)})}, 'state_dict.neck.weight'),
    'a prefix nobody knows': (lambda s: under('my.own.vit.', s), None),
    'two wrappers': (lambda s: {'checkpoint': {'weights': under('module.', s)}}, None),
    'EMA as timm saves it': (lambda s: {'state_dict': zeros(s), 'state_dict_ema': s}, r'state_dict.cls_token … \(80\)'),
    'EMA of PyTorch': (lambda s: under('module.', s) | {'n_averaged': torch.tensor(4)}, 'n_averaged'),
    'DINO, student and teacher': (lambda s: {'student': under('module.backbone.', zeros(s)), 'teacher': under('backbone.', s), 'epoch': 3}, r'student.module.backbone.cls_token … \(80\)'),
    'MAE with its decoder': (lambda s: {'model': s | {'mask_token': torch.ones(1, 1, 8), 'decoder_pos_embed': torch.ones(1, 17, 8), 'decoder_pred.weight': torch.ones(2, 2)}},
                             'decoder_pos_embed, decoder_pred.weight, mask_token'),
    'a head for distillation': (lambda s: s | {'head_dist.weight': torch.ones(10, 64), 'head_dist.bias': torch.ones(10)}, 'head_dist.weight, head_dist.bias'),
}

DOORS = {
    'create_vit': lambda f: weights.create_vit('test_vit', f, **KWARGS),
    'load_weights': lambda f: weights.load_weights(weights.create_vit('test_vit', **KWARGS), f),
    'command line': lambda f: store.open_model('test_vit', f),
    'dense model of a run': lambda f: run.start_model(Experiment(model='test_vit', model_args=dict(img_size=32, patch_size=8), dense=str(f)), list('abcdefghij')),
    'start of a run': lambda f: run.start_model(Experiment(model='test_vit', model_args=dict(img_size=32, patch_size=8), weights=str(f), train=dict(epochs=1)), list('abcdefghij')),
}


def loaded(door, file):
    "(the model, its warnings)"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        found = DOORS[door](file)
    return found, [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('form', WRAPPED)
def test_other_peoples_checkpoints(form, door, model, state, tmp_path):
    save, words = WRAPPED[form]
    torch.save(save(dict(state)), tmp_path/'w.pth')
    found, said = loaded(door, tmp_path/'w.pth')
    assert weights_hash(found) == weights_hash(model)
    if words is None: assert said == []
    else: assert len(said) == 1 and re.search(f'w.pth: left out, for this model does not use them: {words}$', said[0]), said


@pytest.mark.parametrize('door', DOORS)
def test_files_are_what_they_hold(door, model, state, tmp_path):
    save_file(state, tmp_path/'st.pth')
    torch.save(state, tmp_path/'zip.safetensors')
    torch.save(state, tmp_path/'old.bin', _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir(): assert weights_hash(loaded(door, file)[0]) == weights_hash(model), file.name


def test_the_course_model_through_every_door_is_the_course_model():
    file = data_path('model', 'course_vit_s.safetensors')
    expected = weights_hash(vit.course_model())
    assert weights_hash(store.open_model('course', file)) == expected
    assert weights_hash(weights.create_vit(vit.COURSE['model'], file, **vit.COURSE['kwargs'])) == expected
    assert weights_hash(run.start_model(Experiment(dense=str(file)), list('abcdefghij'))) == expected


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(dtype, state, tmp_path):
    torch.save({k: v.to(dtype) for k, v in state.items()}, tmp_path/'w.pth')
    for door in DOORS:
        for k, v in loaded(door, tmp_path/'w.pth')[0].state_dict().items():
            assert v.dtype == torch.float32 and torch.equal(v, state[k].to(dtype).float()), (door, k)


# --- what does not fit is refused, and nothing is half loaded

TWO = r'a checkpoint of one network\. It holds several, under '
FIT = r'a checkpoint with the shapes of this VisionTransformer\. '
OTHERS = {   # name: (what is saved, the sentence)
    'two networks under prefixes': (lambda s: under('student.', s) | under('teacher.', s), TWO + 'student, teacher: save the one'),
    'two tables': (lambda s: {'best': s, 'last': s}, TWO + 'best, last: save the one'),
    'int8': (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, r'floating-point weights\. cls_token, say, is torch.int8'),
    'quantised': (lambda s: s | {'head.weight': torch.quantize_per_tensor(s['head.weight'], .01, 0, torch.qint8)}, r'floating-point weights\. head.weight, say, is torch.qint8'),
    'no tensors': (lambda s: {'epoch': 3, 'best': {'acc': 3.}}, 'with tensors by name. It holds none'),
    'a list': (lambda s: [s], 'with tensors by name. It holds a list'),
    'a whole model': (lambda s: torch.nn.Linear(2, 2), r'It holds a torch.nn.modules.linear.Linear, and to read that would be to run code'),
    'numbers of NumPy': (lambda s: {'net': s, 'acc': np.float64(91.2)}, r'It holds a numpy\S+scalar, and to read that would be to run code'),
    'more blocks': (lambda s: s | {k.replace('blocks.0', 'blocks.6'): v for k, v in s.items() if 'blocks.0' in k}, FIT + r'12 of its tensors do not fit; blocks.6.\S+, say, is \S+ in the file and nothing in the model'),
    'fewer blocks': (lambda s: {k: v for k, v in s.items() if 'blocks.5' not in k}, FIT + '12 of its tensors do not fit; blocks.5.norm1.weight, say, is nothing in the file'),
    'a wrapped one with fewer blocks': (lambda s: {'net': under('module.', {k: v for k, v in s.items() if 'blocks.5' not in k})}, FIT + '12 of its tensors do not fit; blocks.5'),
    'half a block': (lambda s: {k: v for k, v in s.items() if k != 'blocks.3.mlp.fc1.bias'}, FIT + '1 of its tensors does not fit; blocks.3.mlp.fc1.bias, say, is nothing in the file'),
    'another width': (lambda s: s | {'blocks.1.mlp.fc1.weight': torch.ones(128, 64)}, FIT + r'1 of its tensors does not fit; blocks.1.mlp.fc1.weight, say, is \(128, 64\) in the file and \(192, 64\) in the model'),
    'a distillation token': (lambda s: s | {'dist_token': torch.ones(1, 1, 64), 'pos_embed': torch.ones(1, 18, 64)}, FIT + '2 of its tensors do not fit; dist_token, say'),
    'an attention pool': (lambda s: s | {'attn_pool.q.weight': torch.ones(64, 64)}, FIT + '1 of its tensors does not fit; attn_pool.q.weight'),
    'a layer before the head': (lambda s: s | {'pre_logits.fc.weight': torch.ones(64, 64)}, FIT + 'It has a layer before the head, pre_logits'),
    'names of another library': (lambda s: {f'vit.encoder.layer.{i}.attention.attention.query.weight': torch.ones(2, 2) for i in range(6)}, FIT + r'78 of .* The file holds vit.encoder.layer.0.\S+'),
    'a ResNet': (lambda s: {'state_dict': timm.create_model('resnet18').state_dict()}, FIT + r'.* The file holds conv1.weight, bn1.weight … \(5\), layer1'),
    'a name with control characters': (lambda s: {'\x1b[31mred\nline': torch.ones(2)}, r'The file holds \\x1b\[31mred\\nline\.$'),
}


@pytest.mark.parametrize('door', ['load_weights', 'command line', 'dense model of a run'])
@pytest.mark.parametrize('form', OTHERS)
def test_what_does_not_fit_is_refused(form, door, state, tmp_path):
    save, sentence = OTHERS[form]
    torch.save(save(dict(state)), tmp_path/'w.pth')
    headed = door == 'dense model of a run' and form in ('names of another library', 'a ResNet', 'a name with control characters')
    with pytest.raises(VitpruneError, match='a checkpoint with a head' if headed else sentence) as e: loaded(door, tmp_path/'w.pth')
    what = 'dense' if 'run' in door else 'weights'
    assert str(e.value).startswith(f'{what}: got {tmp_path/"w.pth"}; allowed: ') and '\n' not in str(e.value)


@pytest.mark.parametrize('form', OTHERS)
def test_a_refused_checkpoint_changes_nothing(form, state, tmp_path):
    torch.manual_seed(1)
    other = weights.create_vit('test_vit', **KWARGS)
    before = weights_hash(other)
    torch.save(OTHERS[form][0](dict(state)), tmp_path/'w.pth')
    with pytest.raises(VitpruneError): weights.load_weights(other, tmp_path/'w.pth')
    assert weights_hash(other) == before


def test_files_that_are_no_checkpoint(tmp_path, state):
    torch.save(state, tmp_path/'w.pth'); whole = (tmp_path/'w.pth').read_bytes()
    save_file(state, tmp_path/'w.safetensors'); tensors = (tmp_path/'w.safetensors').read_bytes()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path/'script.pt')
    np.save(tmp_path/'a.npy', np.ones(3)); np.savez(tmp_path/'a.npz', a=np.ones(3))
    bad = {'empty.pth': (b'', 'It is empty'), 'text.pth': (b'a checkpoint, one day\n'*9, 'It is a text file'), 'page.bin': (b'\n<!DOCTYPE html><p>404', 'It is a web page'),
           'lfs.safetensors': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'It is a Git LFS pointer'), 'keras.pth': (b'\x89HDF\r\n' + bytes(90), 'It is an HDF5 file'),
           'cut.pth': (whole[:len(whole)//2], 'damaged, cut short'), 'cut.safetensors': (tensors[:len(tensors)//2], 'damaged, cut short'), 'zeros.pth': (bytes(2000), 'damaged, cut short'),
           'noise.bin': (bytes(range(256))*20, 'damaged, cut short')}
    for name, (content, _) in bad.items(): (tmp_path/name).write_bytes(content)
    says = {k: v for k, (_, v) in bad.items()} | {'script.pt': 'It is a TorchScript archive', 'a.npy': 'It is a NumPy array', 'a.npz': 'It is a NumPy archive'}
    for name, words in says.items():
        for door in DOORS:
            with pytest.raises(VitpruneError, match=f'allowed: a readable .safetensors or .pth checkpoint. .*{words}') as e: loaded(door, tmp_path/name)
            assert '\n' not in str(e.value)
    with open(tmp_path/'huge.pth', 'wb') as f: f.truncate(2**34)
    (tmp_path/'folder.pth').mkdir()
    for given, words in {tmp_path/'huge.pth': 'a readable', tmp_path/'folder.pth': 'an existing', tmp_path/'none.pth': 'an existing', 'x'*5000: 'an existing', 7: 'an existing', '': 'an existing'}.items():
        with pytest.raises(VitpruneError, match=f'allowed: {words}'): weights.read_checkpoint(given)


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")], ids=type)
def test_too_little_memory_is_no_damage(error, tmp_path, state, monkeypatch):
    torch.save(state, tmp_path/'w.pth')
    def full(*_, **__): raise error
    monkeypatch.setattr(torch, 'load', full)
    with pytest.raises(type(error)) as e: weights.read_checkpoint(tmp_path/'w.pth')
    assert e.value is error
    error.args = ("can't allocate memory: you tried to allocate 99999999 bytes.",)       # more than the file can hold
    with pytest.raises(VitpruneError, match='damaged, cut short'): weights.read_checkpoint(tmp_path/'w.pth')


def test_a_damaged_table_of_contents(tmp_path, state):
    "The end of the archive is there, what it points at is not."
    torch.save(state, tmp_path/'w.pth'); whole = (tmp_path/'w.pth').read_bytes()
    (tmp_path/'w.pth').write_bytes(whole.replace(b'PK\1\2', b'PK\1\3'))
    with pytest.raises(VitpruneError, match='allowed: a readable .safetensors or .pth checkpoint. It is damaged, cut short') as e: weights.read_checkpoint(tmp_path/'w.pth')
    assert '\n' not in str(e.value)


def test_a_checkpoint_that_contains_itself(tmp_path, state):
    state = dict(state); state['again'] = state
    torch.save(state, tmp_path/'w.pth')
    with pytest.raises(VitpruneError, match=TWO): weights.create_vit('test_vit', tmp_path/'w.pth', **KWARGS)


# --- shapes tell which model

@pytest.mark.parametrize('kwargs', [dict(), dict(img_size=48), dict(patch_size=4), dict(num_classes=3), dict(num_classes=0), dict(reg_tokens=4), dict(reg_tokens=4, no_embed_class=True),
                                    dict(in_chans=1), dict(init_values=1e-5), dict(global_pool='avg'), dict(qkv_bias=False), dict(qk_norm=True), dict(no_embed_class=True)])
def test_shapes_tell(kwargs, tmp_path):
    made = weights.create_vit('test_vit', **KWARGS | kwargs)
    torch.save({'state_dict': under('model.', made.state_dict())}, tmp_path/'w.ckpt')
    found = store.open_model('test_vit', tmp_path/'w.ckpt')
    x = torch.randn(2, kwargs.get('in_chans', 3), *made.patch_embed.img_size)
    with torch.inference_mode(): assert torch.equal(found(x), made(x))


def test_registers_of_dinov2(tmp_path):
    made = weights.create_vit('vit_small_patch14_reg4_dinov2', img_size=56, depth=12)
    save_file(made.state_dict(), tmp_path/'w.safetensors')
    found = store.open_model('vit_small_patch14_reg4_dinov2', tmp_path/'w.safetensors')
    assert (found.num_reg_tokens, found.patch_embed.img_size) == (4, (56, 56)) and weights_hash(found) == weights_hash(made)


def test_a_grid_that_is_no_square_is_used_as_it_is(tmp_path):
    "7 × 28 patches are as many as 14 × 14: timm's newer filter would resize them."
    wide = dict(img_size=(56, 224), patch_size=8, num_classes=10)
    made = weights.create_vit('vit_tiny_patch16_224', **wide, depth=1)
    torch.save(made.state_dict(), tmp_path/'w.pth')
    assert weights_hash(weights.create_vit('vit_tiny_patch16_224', tmp_path/'w.pth', **wide, depth=1)) == weights_hash(made)
    with pytest.raises(VitpruneError, match=r'pos_embed, say, is \(1, 33, 64\).*Positions that form no square'):
        torch.save(weights.create_vit('test_vit', **KWARGS | dict(img_size=(32, 64))).state_dict(), tmp_path/'w.pth')
        store.open_model('test_vit', tmp_path/'w.pth')


@pytest.mark.parametrize('name', ['resnet18', 'deit_tiny_distilled_patch16_224', 'cait_xxs24_224'])
def test_models_of_other_kinds(name, tmp_path):
    made = weights.create_vit(name, num_classes=7)
    torch.save({'net': made.state_dict()}, tmp_path/'w.pth')
    assert weights_hash(store.open_model(name, tmp_path/'w.pth')) == weights_hash(made)


def test_a_head_that_does_not_fit_is_said(tmp_path, state):
    torch.save({'teacher': under('backbone.', headless(state)) | {'head.mlp.0.weight': torch.ones(2, 2)}}, tmp_path/'w.pth')
    found, said = loaded('create_vit', tmp_path/'w.pth')
    assert [s.partition('w.pth: ')[2] for s in said] == ['left out, for this model does not use them: teacher.head.mlp.0.weight', 'it has no head that fits, so the head of the model stays untrained']
    assert torch.equal(found.blocks[3].mlp.fc1.weight, state['blocks.3.mlp.fc1.weight'])
    assert store.open_model('test_vit', tmp_path/'w.pth').num_classes == 0, 'the file has no head'
    with pytest.raises(VitpruneError, match='dense: got .*; allowed: a checkpoint with a head. Give .train.'): loaded('dense model of a run', tmp_path/'w.pth')
    torch.save(state, tmp_path/'w.pth')
    assert loaded('create_vit', tmp_path/'w.pth')[1] == []
    five = weights.create_vit('test_vit', tmp_path/'w.pth', **KWARGS | dict(num_classes=0))
    assert five.num_classes == 0


# --- arguments that are not heeded are refused

@pytest.mark.parametrize('keys, words', [
    (dict(model_args=dict(img_size=64)), 'model_args: got .*; allowed: nothing for the course model'),
    (dict(model_args=dict(num_classes=100), model='test_vit'), 'model_args: got .*; allowed: arguments other than num_classes'),
    (dict(pretrained=True), 'pretrained: got True; allowed: false for the course model'),
    (dict(pretrained=True, train=dict(epochs=1)), 'pretrained: got True; allowed: false for the course model'),
    (dict(pretrained=True, weights='w.pth', model='test_vit'), 'pretrained: got True; allowed: false beside weights'),
    (dict(model_args=dict(checkpoint_path='w.pth'), model='test_vit'), 'model_args: got checkpoint_path; allowed: img_size, '),
    (dict(model_args=dict(device='meta'), model='test_vit'), 'model_args: got device; allowed: img_size, '),
    (dict(model_args=dict(block_fn='os.system'), model='test_vit'), 'model_args: got block_fn; allowed: img_size, '),
    (dict(model_args=dict(img_size=dict(a=1)), model='test_vit'), 'model_args.img_size: got .*; allowed: a number, a word'),
    (dict(model_args=dict(img_sise=32), model='test_vit'), 'Did you mean img_size?'),
])
def test_arguments_of_a_run_are_heeded_or_refused(keys, words):
    with pytest.raises(VitpruneError, match=words): run.start_model(Experiment(**keys), list('abcdefghij'))


def test_model_args_of_the_course_model_are_heeded_where_it_is_trained_anew():
    found = run.start_model(Experiment(model_args=dict(img_size=64, depth=2), train=dict(epochs=1)), list('abcde'))
    assert (found.patch_embed.img_size, len(found.blocks), found.num_classes) == ((64, 64), 2, 5)


@pytest.mark.parametrize('kwargs', [dict(embed_dim=-3), dict(num_heads=0), dict(norm_layer='nope'), dict(img_size='a'), dict(patch_size=0), dict(block_fn=3), dict(depth='two')])
def test_arguments_that_timm_cannot_use(kwargs):
    with pytest.raises(VitpruneError, match='^kwargs: got .*; allowed: what timm.create_model takes for test_vit'): weights.create_vit('test_vit', **kwargs)


def test_weights_and_the_hub_at_once(tmp_path):
    with pytest.raises(VitpruneError, match='pretrained: got True; allowed: False beside weights'): weights.create_vit('test_vit', tmp_path/'w.pth', pretrained=True)


def test_a_head_without_its_bias_is_left_alone_as_a_whole(tmp_path):
    one, other = (vit.create_vit('test_vit', **KWARGS) for _ in range(2))
    torch.nn.init.ones_(one.head.weight)
    save_file({k: v for k, v in one.state_dict().items() if k != 'head.bias'}, tmp_path/'w.safetensors')
    before = other.head.weight.clone()
    with pytest.warns(UserWarning, match='stays untrained'): weights.load_weights(other, tmp_path/'w.safetensors')
    assert torch.equal(other.head.weight, before) and torch.equal(other.cls_token, one.cls_token)


def test_the_norm_of_a_head_of_other_classes_is_loaded(tmp_path):
    "ConvNeXt's head holds a norm, which every number of classes can use."
    seven, five = (vit.create_vit('test_convnext', num_classes=n) for n in (7, 5))
    for p in seven.head.parameters(): torch.nn.init.constant_(p, .25)
    save_file(seven.state_dict(), tmp_path/'w.safetensors')
    before = five.head.fc.weight.clone()
    with pytest.warns(UserWarning, match='it has no head that fits'): weights.load_weights(five, tmp_path/'w.safetensors')
    assert torch.equal(five.head.norm.weight, seven.head.norm.weight) and torch.equal(five.head.norm.bias, seven.head.norm.bias)
    assert torch.equal(five.head.fc.weight, before) and torch.equal(five.stem[0].weight, seven.stem[0].weight)
