"""What is no number, no seed, no device and no path, wherever it is given: one sentence, and nothing is left."""
import math

import numpy as np, pytest, torch
from vitprune_nb import cli, core, data, experiment, viz
from vitprune_nb.engine import slim as engine
from vitprune_nb.evidence import measure
from vitprune_nb.methods import base as methods
from vitprune_nb.engine import plan
from vitprune_nb.engine import policy
from vitprune_nb.train import recipe
from vitprune_nb.train import trainer as train
from vitprune_nb.vit import model as vit
from vitprune_nb.errors import VitpruneError

PICTURE = np.zeros((4, 4, 3))
SEEDS = (-1, 2**32, 1.5, True, None, '3', math.nan)


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return vit.create_vit('test_vit', num_classes=10, img_size=32, patch_size=8)


@pytest.fixture(scope='module')
def images(): return data.embedded('train').subset(range(0, 5000, 500))


@pytest.mark.parametrize('device', ['cpu:x', 'cpu:1', 'cuda:99', 'mps:1', 'meta', '', ':', None, 3, True, [], torch.device('meta')])
def test_a_device_that_is_none(device, tiny, images):
    doors = [core.pick_device, core.environment, lambda d: methods.prune('uniform', tiny, images, reduction=.3, device=d)]
    if device is not None: doors.append(lambda d: vit.evaluate(tiny, images, device=d))      # None: where the model is
    for door in doors:
        with pytest.raises(VitpruneError, match='^device: got'): door(device)


@pytest.mark.parametrize('seed', SEEDS)
def test_a_seed_that_is_none(seed, images):
    for door in (core.set_seed, lambda s: train.TrainConfig(seed=s), lambda s: methods.read_options('life', dict(seed=s)), lambda s: experiment.Experiment(seeds=(s,)), lambda s: data.calibration(images, 3, s),
                 lambda s: data.class_subset(images, 3, s), lambda s: data.load_data(None, seed=s), lambda s: policy.pyramid(6, 16, {2: .5}, s),
                 core.fold_seed, lambda s: core.fold_seed(s, 1), lambda s: plan.random_plan(plan.Plan('p', 'test_vit', 16, 1, [(0,)]*6), s)):
        with pytest.raises(VitpruneError, match='^seeds?: got'): door(seed)


@pytest.mark.parametrize('counter', [-1, 2**40, 1.9, None])
def test_a_counter_that_is_none(counter):
    with pytest.raises(VitpruneError, match='^counter: got'): core.fold_seed(0, counter)
    assert core.fold_seed(0, np.int64(3)) == core.fold_seed(np.uint8(0), 3) != core.fold_seed(0, 4)


@pytest.mark.parametrize('name', [f.name for f in train.dataclasses.fields(train.TrainConfig)])
@pytest.mark.parametrize('value', [math.nan, math.inf, True, '3', None, [math.nan]])
def test_no_field_of_a_recipe_takes_what_is_no_number(name, value):
    if value is None and train.TrainConfig.__dataclass_fields__[name].default is None: return      # None has a meaning there
    with pytest.raises(VitpruneError, match=f'^{name}: got'): train.TrainConfig(**{name: value})


@pytest.mark.parametrize('name, value', [('step', math.nan), ('step', 1.5), ('whole_heads', 1), ('whole_heads', 'x'), ('keys', []), ('rule', 3), ('stages', [[1]]), ('stages', [True]), ('rounds', 10**20),
                                         ('sparse_epochs', 1e99), ('U', '1.5'), ('multiple', 2.), ('calibration', np.float64(3)), ('keep_rate', [[.5]])])
def test_no_option_takes_a_wrong_type(name, value):
    m = next(m for m in ('patch-slimming', 'vtp', 'life', 'cosine') if name in methods.METHODS[m].options)
    with pytest.raises(VitpruneError, match=f'^{name}: got'): methods.read_options(m, {name: value})


def test_numbers_of_numpy_are_numbers(images):
    assert methods.read_options('uniform', dict(calibration=np.int64(3), reduction=np.float32(.5)))[1].calibration == 3
    assert len(data.calibration(images, np.int64(3), np.int32(7))) == 3 and train.TrainConfig(seed=np.int64(5)).seed == 5


@pytest.mark.parametrize('change', ['name=a\\u0000', 'methods=[[1]]', 'methods=[3]', 'seeds=4294967296', 'seeds=[true]', 'reductions=[nan]', 'recover.epochs=nan', 'recover.patch_drop=3', 'train.seed="x"',
                                    'options.vtp.l1="x"', 'options.uniform=3', 'workers=999999', 'repeats=99999999999', 'recover=1979-05-27', 'a.b=1', '=1', 'test_images=1e3', 'classes=true'])
def test_odd_settings_of_a_run(change, tmp_path, capsys):
    (tmp_path/'c.toml').write_text('methods = ["uniform"]\nreductions = [0.3]\n')
    code = cli.main(['run', str(tmp_path/'c.toml'), '--out', str(tmp_path/'r'), '--set', change.replace('\\u0000', '\0')])
    out, err = capsys.readouterr()
    assert (code, out, err.count('\n')) == (2, '', 1) and ': got ' in err
    assert [p.name for p in tmp_path.iterdir()] == ['c.toml']


@pytest.mark.parametrize('call', [
    lambda m, x: engine.SlimViT(m)(3), lambda m, x: engine.SlimViT(m)(x[0]), lambda m, x: engine.SlimViT(m)(x[:, :1]), lambda m, x: engine.SlimViT(m, {}), lambda m, x: engine.SlimViT(m, mode=[]),
    lambda m, x: policy.Step(keep=(1.5,)), lambda m, x: policy.Step(keep=(True,)), lambda m, x: policy.Step(score=3, count=2), lambda m, x: policy.Step(score=policy.NormScore(), threshold=math.nan),
    lambda m, x: policy.Policy([1]), lambda m, x: policy.Policy({True: policy.Step(keep=(0,))}), lambda m, x: policy.Policy.from_dict({'steps': {'a': {}}, 'name': 'x'}), lambda m, x: policy.parse_schedule({'a': .5}, 6),
    lambda m, x: policy.parse_schedule(.5, 0), lambda m, x: plan.Plan('m', 'test_vit', 16, 1, [(1.5,)]), lambda m, x: plan.Plan('m', 3, 16, 1, [(1,)]), lambda m, x: plan.uniform_plan(m, x, .3),
    lambda m, x: measure.bench({'a': 3}, x), lambda m, x: measure.bench({'a': m}, x, dtype=[]), lambda m, x: measure.ratio_interval(['a'], [1.]), lambda m, x: measure.ratio_interval([1.], [math.nan]),
    lambda m, x: vit.evaluate(None, x), lambda m, x: vit.evaluate(m, x), lambda m, x: methods.cost_of(3), lambda m, x: methods.cost_of([1]), lambda m, x: methods.load_pruned(3), lambda m, x: methods.load_pruned(None), lambda m, x: methods.prune('uniform', m, x, reduction=.3), lambda m, x: methods.recover(m, x),
    lambda m, x: train.fit(m, x, train.TrainConfig()), lambda m, x: data.load_data(3), lambda m, x: data.load_data('a\0'), lambda m, x: data.load_data(limit=1.5), lambda m, x: data.loader(3)])
def test_calls_with_a_wrong_type(call, tiny):
    with pytest.raises(VitpruneError, match=': got (?s:.*); allowed: '): call(tiny, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize('name, options', [('patch-slimming', dict(eps=.5, calibration=4)), ('patch-slimming', dict(reduction=.15, calibration=4, step=4)), ('uniform', dict(reduction=.3, calibration=4)),
                                           ('life', dict(keep_rate=.7, predictor_epochs=0, backbone_epochs=0)), ('cosine', dict(score_threshold=.5, cosine_threshold=.5, calibration=4))])
def test_a_model_with_cut_channels_is_pruned_by_every_method_of_patches(name, options, tiny, images):
    cut = methods.prune('vtp', tiny, images, ratio=.2, sparse_epochs=0)
    try: both = methods.prune(name, cut, images, **options)
    except VitpruneError as e: assert 'leaves both labels in some block' in str(e)     # cosine on random weights
    else: assert methods.cost_of(both)['macs'] <= methods.cost_of(cut)['macs'] and torch.isfinite(both(torch.zeros(2, 3, 32, 32))).all()


@pytest.mark.parametrize('call, text', [
    *((lambda m, n=n: recipe.freeze_first(m, n), f'freeze: got {n}; allowed: a whole number from 0 to 6') for n in (-1, 7, 1.5, True)),
    *((lambda m, s=s: recipe.set_patch_drop(m, s), f'patch_drop: got {s}; allowed: a share in [0, 1)') for s in (1.5, 1, -.1, math.nan)),
    *((lambda m, r=r: recipe.set_drop_path(m, r), f'drop_path: got {r}; allowed: a number in [0, 1)') for r in (2., 1, -.1, math.nan)),
    (lambda m: data.to_sheet(np.zeros((4, 2, 2, 3), np.uint8), 0), 'columns: got 0; allowed: a whole number, 1 or more'),
    (lambda m: data.from_sheet(np.zeros((4, 4, 3), np.uint8), 0), 'size: got 0; allowed: a whole number, 1 or more'),
    (lambda m: viz.show_images([PICTURE], columns=0), 'columns: got 0; allowed: a whole number, 1 or more'),
    (lambda m: viz.as_image(np.zeros((0, 0, 3))), 'image: got an array of shape (0, 0, 3); allowed: one with pixels'),
    (lambda m: viz.as_image(torch.zeros(3, 0, 4)), 'image: got a tensor of shape (3, 0, 4); allowed: one with pixels'),
    *((lambda m, soft=soft: viz.patch_mask(soft, 4, 4), 'kept: got values other than 0 and 1') for soft in ([.9, .1, .01, .2], torch.tensor([2, 0, 0, 1]))),
    *((lambda m, f=f: f(PICTURE, torch.tensor([[.9, .1, .01, .2]]).requires_grad_()), 'kept: got values other than 0 and 1')
      for f in (viz.show_kept, lambda im, kept: viz.show_returns(im, kept, 1)))])
def test_numbers_out_of_range(call, text, tiny):
    before = [p.requires_grad for p in tiny.parameters()]
    with pytest.raises(VitpruneError) as e: call(tiny)
    assert text in str(e.value) and [p.requires_grad for p in tiny.parameters()] == before


@pytest.mark.parametrize('kept', [[True, False, False, True], [1, 0, 0, 1], np.array([1., 0., 0., 1.]), torch.tensor([1, 0, 0, 1]).bfloat16()])
def test_ones_and_zeros_are_a_mask(kept):
    assert viz.patch_mask(kept, 2, 2).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize('error, words', [(MemoryError(), 'out of memory'), (UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'bad'), 'another encoding'), (torch.OutOfMemoryError('x'), 'out of memory'),
                                          (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 'out of memory'), (KeyboardInterrupt(), 'interrupted'), (OSError(28, 'No space left on device'), 'No space')])
def test_what_a_library_raises_is_told_in_a_line(error, words, capsys):
    assert cli.explain(error) in (2, 130)
    err = capsys.readouterr().err
    assert err.startswith('vitprune: ') and words in err and err.count('\n') == 1


def test_a_bug_is_not_hidden(capsys):
    for e in (KeyError('a'), RuntimeError('shape'), TypeError('x'), RecursionError()): assert cli.explain(e) is None
    assert capsys.readouterr().err == ''
