"""A stage of training depends on weights, images and recipe, and on nothing that happened in the process before it."""
import dataclasses, functools, json, random, subprocess, sys

import numpy as np, pytest, torch
from conftest import ONE_THREAD, ROOT
from train_script import tiny_vit
from vitprune_nb.methods import base, vtp as channels
from vitprune_nb.train import course
from vitprune_nb.engine import slim as engine
from vitprune_nb.train import trainer as train
from vitprune_nb.core import set_seed
from vitprune_nb.errors import VitpruneError
from vitprune_nb.data import calibration, embedded
from vitprune_nb.evidence.dense import train_dense
from vitprune_nb.train.objectives import penalty, plus, supervised
from vitprune_nb.train.recipe import frozen
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.methods.base import prune, recover
from vitprune_nb.engine.channels import choose, slice_model
from vitprune_nb.train.recipe import TrainConfig
from vitprune_nb.train.trainer import Trainer, fit, load_checkpoint, pick_accelerator
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')
PLAIN = dict(epochs=1, batch_size=8, lr=2e-3, augment='none', dtype='fp32', save_every=1, log_every=1)   # three steps
STAGES = dict(
    plain={}, freeze=dict(freeze=1), drop_path=dict(drop_path=.3), patch_drop=dict(patch_drop=(.5,)), ema=dict(ema=.5),
    mix=dict(mixup=.8, cutmix=1., augment='light'), clip=dict(clip_grad=.05, freeze=2), distill=dict(distill=.5))


@functools.cache
def images(n=24): return calibration(embedded('train'), n)
def recipe(kind, **more): return TrainConfig(**{**PLAIN, **STAGES[kind], **more})
def weights(model): return {k: v.clone() for k, v in model.state_dict().items()}
def steady(rows): return [(r['step'], r['lr'], r['loss']) for r in rows]


def same(a, b):
    a, b = ({k: v for k, v in (x if isinstance(x, dict) else weights(x)).items()} for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def reloaded(model):
    "What a file with these weights gives."
    new = tiny_vit(seed=5)
    new.load_state_dict(weights(model))
    return new


def train_on(model, kind, seed=0, **kw):
    teacher = dict(teacher=tiny_vit(seed=3)) if 'distill' in STAGES[kind] else {}
    return fit(model, images(), recipe(kind, seed=seed), **teacher, **kw)


@pytest.mark.parametrize('second', STAGES)
@pytest.mark.parametrize('first', [*STAGES, 'head alone', 'broken'])
def test_a_stage_after_any_other_gives_what_it_gives_after_a_reload(first, second):
    model = tiny_vit()
    if first == 'broken':
        calls = []
        def bad(m):
            calls.append(1)
            return m.head.weight.sum()*(float('nan') if len(calls) == 3 else 1.)
        with pytest.raises(VitpruneError, match='training stopped at step 2'):
            train_on(model, 'freeze', objective=plus(supervised, penalty('bad', bad)))
    elif first == 'head alone':
        with frozen(model.blocks, model.norm): train_on(model, 'plain')
    else: train_on(model, first)
    other = reloaded(model)
    torch.rand(3); np.random.rand(3); random.random()       # wherever the generators stand
    rows = train_on(model, second, seed=1)
    assert steady(rows) == steady(train_on(other, second, seed=1))
    assert same(model, other)


def test_the_clip_does_not_see_what_is_not_trained():
    "By hand: gradients of an earlier stage on parameters that are frozen now."
    def one(stale):
        model = tiny_vit()
        if stale: model.head(torch.ones(1, 48)).sum().mul(1e3).backward()
        with frozen(model.head):
            trainer = Trainer(model, images(), recipe('plain', clip_grad=.1))
            trainer.one_step()
        return model
    assert same(one(False), one(True))


def test_gradients_that_the_caller_left_are_gone():
    model, other = tiny_vit(), tiny_vit()
    model(torch.randn(2, 3, 32, 32)).sum().mul(1e3).backward()
    for m in (model, other): train_on(m, 'clip')
    assert same(model, other)


def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
def stop(rows): raise KeyboardInterrupt


@pytest.mark.parametrize('how', ['finished', 'interrupted', 'refused', 'not finite'])
def test_what_a_stage_leaves_behind(how, tmp_path):
    "Weights; everything else is as it was, however the stage ends."
    model, teacher = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3,
                                num_classes=10, drop_path_rate=.2, patch_drop_rate=.25), tiny_vit(3).train()
    teacher.blocks[1].eval()
    model.norm.requires_grad_(False)
    modes, flags = [m.training for m in teacher.modules()], [p.requires_grad for p in model.parameters()]
    modules, attributes, keys = list(model.modules()), set(vars(model)), list(model.state_dict())
    forward, acc = model.forward, pick_accelerator('cpu')
    everything = {k: v for kind in ('freeze', 'drop_path', 'patch_drop', 'ema', 'mix', 'distill') for k, v in STAGES[kind].items()}
    cfg = TrainConfig(**{**PLAIN, **everything})
    if how == 'refused': fit(tiny_vit(), images(), recipe('plain'), out=tmp_path)
    set_seed(3)
    before = states()
    try:
        fit(model, images(), cfg, teacher=teacher, accelerator=acc, out=tmp_path, callback=stop if how == 'interrupted' else None,
            objective=plus(supervised, penalty('bad', lambda m: m.head.weight.sum()*float('nan'))) if how == 'not finite' else None)
        assert how == 'finished'
    except (KeyboardInterrupt, VitpruneError): assert how != 'finished'
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in teacher.modules()] == modes
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and list(model.state_dict()) == keys
    assert not any(m.training for m in model.modules()) and set(vars(model)) == attributes
    assert model.forward == forward and not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert states() == before
    assert not acc._models and not acc._optimizers


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    "Neither one of other shapes, of which some would fit, nor one of a run that trained other parameters."
    fit(tiny_vit(), images(), recipe('plain'), out=tmp_path)
    deeper = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    before = weights(deeper)
    with pytest.raises(VitpruneError, match='checkpoint of this VisionTransformer, with its shapes'):
        fit(deeper, images(), recipe('plain'), out=tmp_path)
    assert same(deeper, before)
    model = tiny_vit(1)
    with frozen(model.blocks), pytest.raises(VitpruneError, match='a run with the parameters that learn'):
        fit(model, images(), recipe('plain'), out=tmp_path)
    assert same(model, tiny_vit(1))


def test_a_teacher_of_the_same_weights_is_refused():
    model = tiny_vit()
    slim = engine.SlimViT(model, engine.Policy({1: engine.Step(keep=tuple(range(8)))}))
    for student, teacher in ((model, model), (slim, model)):
        with pytest.raises(VitpruneError, match='teacher: got one that shares weights .* copy.deepcopy'):
            fit(student, images(), recipe('distill'), teacher=teacher)


def test_a_callback_that_looks_at_the_model_changes_nothing():
    def look(model):
        def callback(rows): model.eval(); model(torch.randn(2, 3, 32, 32)).sum().backward()
        return callback
    model, other = tiny_vit(), tiny_vit()
    for m, callback in ((model, None), (other, look(other))): fit(m, images(), recipe('drop_path', freeze=1), callback=callback)
    assert same(model, other)


def test_the_device_of_an_earlier_stage_does_not_stay():
    from accelerate.state import AcceleratorState, PartialState
    pick_accelerator('cpu')
    try:
        PartialState().device = torch.device('meta')          # as after training on another device
        assert pick_accelerator('cpu').device.type == 'cpu'
    finally: AcceleratorState._reset_state(reset_partial_state=True)


# Methods: in memory against from a file

def dense(**kwargs):
    set_seed(0)
    return create_vit('test_vit', img_size=64, num_classes=10, **kwargs)    # 16 patches, 6 blocks


METHODS = {
    'patch-slimming': dict(reduction=.3, calibration=6), 'uniform': dict(reduction=.3, calibration=6),
    'attention': dict(reduction=.3, calibration=6), 'random': dict(reduction=.3, calibration=6),
    'vtp': dict(reduction=.3, batch_size=8, dtype='fp32'), 'life': dict(reduction=.3, batch_size=8, dtype='fp32'),
    'cosine': dict(reduction=.2, calibration=6, rounds=1)}
TUNED = [('patch-slimming', dict(budget, tune_epochs=1, calibration=6, batch_size=2, lr=3e-4)) for budget in (dict(eps=.08), dict(reduction=.45))]
AFTER = dict(epochs=1, batch_size=8, lr=1e-3, dtype='fp32')


def trained_dense():
    "A dense model as a session leaves it: trained with dropped paths, then partly frozen."
    model = dense()
    fit(model, images(), recipe('drop_path', freeze=1))
    model.blocks[0].requires_grad_(False)
    return model


@pytest.mark.parametrize('name, options', [*METHODS.items(), *TUNED])
@pytest.mark.parametrize('start', [dense, trained_dense])
def test_recovery_in_the_same_process_is_that_after_a_reload(name, options, start, tmp_path):
    model = start()
    pruned = prune(name, model, images(), **options)
    back = load_pruned(save_pruned(pruned, tmp_path/'pruned'))
    assert back.info == pruned.info and getattr(back, 'plan', None) == getattr(pruned, 'plan', None)
    assert getattr(pruned, 'plan', None) is None or pruned.plan.weights is None
    assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in back.parameters()]
    rows = [steady(recover(m, images(), **AFTER)) for m in (pruned, back)]
    assert rows[0] == rows[1] and same(pruned, back) and pruned.info == back.info
    rows = [steady(recover(m, images(), **AFTER, recipe=dict(freeze=2, drop_path=.1))) for m in (pruned, back)]   # and once more
    assert rows[0] == rows[1] and same(pruned, back)


@pytest.mark.parametrize('name', ['uniform', 'vtp', 'cosine'])
def test_dropout_of_the_model_itself_is_there_before_and_after_a_reload(name, tmp_path):
    model = dense(drop_path_rate=.2, proj_drop_rate=.1, attn_drop_rate=.1, pos_drop_rate=.1, drop_rate=.1)
    pruned = prune(name, model, images(), **METHODS[name])
    back = load_pruned(save_pruned(pruned, tmp_path/'pruned'))
    rows = [steady(recover(m, images(), **AFTER)) for m in (pruned, back)]
    assert rows[0] == rows[1] and same(pruned, back)
    plain = prune(name, dense(), images(), **METHODS[name])
    assert steady(recover(plain, images(), **AFTER)) != rows[0], 'it is no dropout that does nothing'


def test_methods_do_not_depend_on_what_was_pruned_before():
    model, order = dense(), ['life', 'vtp', 'cosine', 'uniform']
    def all_of(names):
        done = {}
        for n in names:
            done[n] = prune(n, model, images(), **METHODS[n])
            recover(done[n], images(), **AFTER)
        return done
    before = weights(model)
    there, back = all_of(order), all_of(order[::-1])
    for n in order: assert same(there[n], back[n]), n
    assert same(model, before) and all(p.grad is None for p in model.parameters())


# Stopped at every possible place, and done again by new objects

class Killed(BaseException): "Nothing catches it."


@pytest.fixture
def often(monkeypatch):
    "A checkpoint after every step, wherever the caller says nothing else."
    whole = train.fit
    def fit(model, ds, cfg, *args, **kwargs): return whole(model, ds, dataclasses.replace(cfg, save_every=1), *args, **kwargs)
    for module in (train, channels, base): monkeypatch.setattr(module, 'fit', fit)


@pytest.fixture
def count(monkeypatch):
    "Counts steps of training; `count.stop = n` kills before step n of what follows."
    class Count: steps, stop = 0, None
    whole = Trainer.one_step
    def one_step(self):
        if Count.steps == Count.stop: raise Killed
        Count.steps += 1
        return whole(self)
    monkeypatch.setattr(Trainer, 'one_step', one_step)
    return Count


def do_prune(name, options):
    def run(out): return weights(prune(name, dense(), images(), **options, work=out/'work'))
    return run


def do_recover(name, options):
    def run(out):
        pruned = prune(name, dense(), images(), **options, work=out/'work')
        log = recover(pruned, images(), **AFTER, out=out/'recover', recipe=dict(freeze=1, ema=.5))
        return dict(weights(pruned), log=torch.tensor(steady(log)), macs=torch.tensor(pruned.info['reduction']))
    return run


def do_channels(out):
    gated = channels.train_gates(tiny_vit(), images(), recipe('drop_path'), 1e-3, out=out/'sparse')
    sliced = slice_model(gated, choose(channels.importance(gated), .3, 3))
    train.fit(sliced, images(), recipe('freeze'), out=out/'tune')
    return weights(sliced)


def do_dense(out):
    stages = (dict(PLAIN, patch_drop=(.5,)), dict(PLAIN, freeze=2, clip_grad=.1), dict(PLAIN, drop_path=.2, clip_grad=.1))
    model = tiny_vit()
    train_dense(model, images(), images(10), out/'dense', stages, device='cpu')
    return weights(model)


PROCEDURES = dict(
    vtp=do_prune('vtp', METHODS['vtp']), life=do_prune('life', METHODS['life']), recover_vtp=do_recover('vtp', METHODS['vtp']),
    recover_life=do_recover('life', METHODS['life']), recover_cosine=do_recover('cosine', METHODS['cosine']),
    recover_tuned=do_recover(*TUNED[0]), channels=do_channels, train_dense=do_dense)


@pytest.mark.parametrize('name', PROCEDURES)
def test_stopped_anywhere_it_ends_the_same(name, often, count, tmp_path):
    run = PROCEDURES[name]
    whole, steps = run(tmp_path/'whole'), count.steps
    assert steps >= 3
    for n in range(steps):
        count.steps, count.stop = 0, n
        with pytest.raises(Killed): run(tmp_path/f'{n}')
        count.stop = None
        assert same(run(tmp_path/f'{n}'), whole), f'stopped before step {n} of {steps}'
        assert count.steps == steps, 'nothing was done twice'


def test_stopped_at_every_step_it_ends_the_same(often, count, tmp_path):
    "One step in each process."
    for name in ('recover_life', 'train_dense'):
        whole, left = PROCEDURES[name](tmp_path/f'{name} whole'), 50
        while left:
            count.steps, count.stop, left = 0, 1, left - 1
            try: got = PROCEDURES[name](tmp_path/name)
            except Killed: continue
            break
        count.stop = None
        assert left and same(got, whole), name


def test_the_course_recipe_resumed_after_its_first_stage(monkeypatch, count, tmp_path):
    "`train` with only its first stage finished."
    from safetensors.torch import save_file
    big = dict(img_size=112, num_classes=0, embed_dim=48, depth=5, num_heads=3)
    small = dict(img_size=32, patch_size=4, embed_dim=48, depth=5, num_heads=3, init_values=1e-5, num_classes=10)
    monkeypatch.setattr(course, 'COURSE', dict(course.COURSE, kwargs=small))
    monkeypatch.setattr(course, '_big_model', lambda file: create_vit('vit_small_patch14_dinov2', weights=file, **big))
    set_seed(0)
    save_file(create_vit('vit_small_patch14_dinov2', **big).state_dict(), tmp_path/'big.safetensors')
    monkeypatch.setattr(course, 'load_data', lambda data, split, **kw: images(24) if split == 'train' else images(10))
    def run(out):
        course.train_course(tmp_path/'big.safetensors', 'embedded', out, 'cpu', epochs=1., batch_size=8, lr=1e-3, save_every=1, dtype='fp32')
        return load_checkpoint(out/'stage2'/'checkpoint.pt')['model']      # the stored model is rounded
    whole, steps = run(tmp_path/'whole'), count.steps
    for n in range(1, steps):
        count.steps, count.stop = 0, n
        with pytest.raises(Killed): run(tmp_path/f'{n}')
        count.stop = None
        assert same(run(tmp_path/f'{n}'), whole), n


# The folder of a run

def test_checkpoints_of_other_options_are_not_gone_on_from(often, count, tmp_path):
    "They were: the new λ took up the gates of the old one without a word."
    count.stop = 2
    with pytest.raises(Killed): prune('vtp', dense(), images(), **METHODS['vtp'], work=tmp_path/'work')
    count.stop = None
    for other, word in ((dict(l1=1e-2), 'options'), (dict(seed=1), 'options')):
        with pytest.raises(VitpruneError, match=f'work: got .*Another {word} was used there'):
            prune('vtp', dense(), images(), **{**METHODS['vtp'], **other}, work=tmp_path/'work')
    with pytest.raises(VitpruneError, match='Another data_hash'): prune('vtp', dense(), images(16), **METHODS['vtp'], work=tmp_path/'work')
    with pytest.raises(VitpruneError, match='Another method was used'): prune('life', dense(), images(), **METHODS['life'], work=tmp_path/'work')
    assert same(prune('vtp', dense(), images(), **METHODS['vtp'], work=tmp_path/'work'), prune('vtp', dense(), images(), **METHODS['vtp']))


def test_a_refusal_leaves_no_folder(tmp_path):
    for name, bad in (('life', dict(METHODS['life'], stages=(9,))), ('uniform', dict(reduction=.3, calibration=6, batch_size=0))):
        with pytest.raises(VitpruneError): prune(name, dense(), images(), **bad, work=tmp_path/'work')
        assert not (tmp_path/'work').exists()


def test_pruning_leaves_the_generators_where_they_stood():
    model = dense()
    before = states()
    for name, options in METHODS.items():
        prune(name, model, images(), **options)
        assert states() == before, name


def test_what_a_kill_left_of_a_write_goes_with_the_next(tmp_path):
    "Of dead processes only, and only of the file or folder that is written."
    from vitprune_nb.files import write_atomic, write_folder_atomic
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    alive = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    names = {(what, p): tmp_path/f'.{what}.{p.pid}.vitprune.tmp' for what in ('a.csv', 'b', 'other') for p in (dead, alive)}
    for (what, _), place in names.items():
        if what == 'a.csv': place.write_text('half')
        else: place.mkdir(); (place/'half').write_text('')
    with write_atomic(tmp_path/'a.csv') as file: file.write_text('whole')
    with write_folder_atomic(tmp_path/'b') as folder: (folder/'whole').write_text('')
    alive.communicate(b'\n')
    assert [k for k, v in names.items() if not v.exists()] == [('a.csv', dead), ('b', dead)]
    assert sorted(p.name for p in (tmp_path/'b').iterdir()) == ['whole']


# Real kills

def kills(folder, n, seed):
    r = subprocess.run([sys.executable, str(ROOT/'tests'/'stages_script.py'), str(folder), str(n), str(seed)],
                       env=ONE_THREAD, capture_output=True, text=True, timeout=7200)
    assert r.returncode == 0, f'seed {seed}: {r.stderr[-2000:]}'
    said = json.loads(r.stdout.splitlines()[-1])
    assert sum(said['kills'].values()) == n and not said['differ'], said


def test_kill_9_at_random_moments(tmp_path): kills(tmp_path, 12, random.randrange(10**6))


@pytest.mark.slow
def test_kill_9_at_two_hundred_random_moments(tmp_path): kills(tmp_path, 200, random.randrange(10**6))
