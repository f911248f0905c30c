"""Random command lines and random calls, each in a forked child, with a look at what they said and what they left behind.

    python tests/fuzz.py                     1,500 command lines and 400 calls, from seed 0
    python tests/fuzz.py --lines 300 --calls 80 --seed 5
    python tests/fuzz.py --only 17 --lines   one of them again, with everything that it printed

A case is decided by its kind, the seed and its number. Most of it is valid, one or two places are not, so that deep code is reached.
"""
import argparse, contextlib, hashlib, json, math, os, random, re, select, shutil, signal, stat, sys, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# --- the zoo: good and bad things to point at

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_home(home):
    "A clone in small: a course model of six narrow blocks, and thirty images that are shipped with it."
    import numpy as np, torch
    from PIL import Image
    from safetensors.torch import save_file
    from vitprune_nb import data
    from vitprune_nb.vit import model as vit
    write(home/'data/README.md', 'the data of a small clone')
    torch.manual_seed(0)
    kwargs = dict(img_size=32, patch_size=8, num_classes=10)
    model = vit.create_vit('test_vit', **kwargs)
    model.head.weight.data.normal_(std=.5)
    write(home/'data/model/README.md', 'weights')
    save_file(model.state_dict(), home/'data/model/w.safetensors')
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()
    info = dict(model='test_vit', kwargs=kwargs, file='w.safetensors', sha256=digest(home/'data/model/w.safetensors'))
    write(home/'data/model/course.json', json.dumps(info))
    pixels, manifest = np.random.default_rng(0), {}
    for split, n in (('train', 4), ('test', 2)):
        for k, c in enumerate(data.CIFAR10):
            file = home/'data/embedded'/split/f'{c}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(20*k, 256, (32, 32*n, 3), dtype=np.uint8)).save(file)
            manifest[f'{split}/{c}.png'] = digest(file)
    write(home/'data/embedded/manifest.json', json.dumps(manifest))
    return model


def make_trees(zoo, classes):
    "Image folders, good and bad."
    import numpy as np
    from PIL import Image
    pixels = np.random.default_rng(1)
    def tree(name, splits, classes, size=32):
        for split, n in splits.items():
            for k, c in enumerate(classes):
                for i in range(n):
                    file = zoo/name/split/c/f'{i}.png'
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.integers(15*k, 256, (size, size, 3), dtype=np.uint8)).save(file)
    tree('tree', dict(train=3, test=2), classes)
    tree('big pictures', dict(train=2, val=1), classes, 70)
    tree('three', dict(train=3, test=2), ['a', 'b', 'ü'])
    tree('only_test', dict(test=2), classes)
    tree('differ', dict(train=2), classes); tree('differ', dict(test=2), [*classes[1:], 'zebra'])
    tree('damaged', dict(train=2, test=2), classes)
    for split in ('train', 'test'):
        file = zoo/'damaged'/split/classes[3]/'0.png'
        file.write_bytes(file.read_bytes()[:60])
    for d in ('empty/train', 'empty/test', 'no_images/train/a', 'no_images/test/a', 'void'): (zoo/d).mkdir(parents=True)
    write(zoo/'file', 'a file')


def make_weights(zoo, model):
    "Checkpoints, good and bad."
    import torch
    from safetensors.torch import save_file
    from vitprune_nb.vit import model as vit
    state = model.state_dict()
    save_file(state, zoo/'w.safetensors')
    torch.save(state, zoo/'w.pth')
    torch.save(dict(state_dict=state, epoch=3), zoo/'wrapped.pth')
    torch.save(dict(net=state, acc=81.5), zoo/'net.pth')
    save_file({f'model.{k}': v for k, v in state.items()}, zoo/'prefix.safetensors')
    save_file(vit.create_vit('test_vit', img_size=32, patch_size=8, num_classes=3).state_dict(), zoo/'w3.safetensors')
    save_file({k: v.half() for k, v in state.items()}, zoo/'half.safetensors')
    save_file({k: v*math.nan for k, v in state.items()}, zoo/'nan.safetensors')
    save_file({k: v for k, v in state.items() if not k.startswith('head')}, zoo/'headless.safetensors')
    save_file({k: v for k, v in state.items() if 'blocks.2' not in k}, zoo/'gap.safetensors')
    save_file(vit.create_vit('test_vit', img_size=112, patch_size=28, num_classes=0).state_dict(), zoo/'big.safetensors')
    save_file({}, zoo/'nothing.safetensors')
    save_file({**state, 'blocks.0.mlp.fc1.weight': torch.zeros(3, 3)}, zoo/'shape.safetensors')
    save_file({**state, 'pos_embed': torch.zeros(7), 'patch_embed.proj.weight': torch.zeros(2, 2)}, zoo/'flat.safetensors')
    for name, value in (('list', [1, 2]), ('number', 3), ('none', None), ('text', {'a': 'b'}), ('tensor', torch.zeros(3)), ('numbers', {'head.weight': 3, 1: 2})):
        torch.save(value, zoo/f'{name}.pth')
    torch.save(model, zoo/'pickled.pth')
    write(zoo/'text.safetensors', 'no weights'); write(zoo/'text.pth', 'no weights'); write(zoo/'empty.pth', '')
    write(zoo/'cut.safetensors', (zoo/'w.safetensors').read_bytes()[:5000]); write(zoo/'cut.pth', (zoo/'w.pth').read_bytes()[:5000])
    (zoo/'folder.pth').mkdir()


ODD_JSON = [None, True, -1, 0, 3, 10**30, 1e300, .5, '', 'x', 'ü', '../..', [], [[]], [1, 'a'], {}, {'a': 1}, [None], math.nan, -math.inf, [0, 0], 'gather', [10**20], '7']


def spoil(config, rng):
    "A copy of a JSON value with one place taken away, added or replaced."
    config = json.loads(json.dumps(config))
    here = config
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = rng.choice(keys)
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < .7: here = here[key]
        else: break
    how = rng.random()
    if how < .3: del here[key]
    elif how < .9: here[key] = rng.choice(ODD_JSON)
    elif isinstance(here, dict): here['colour'] = 'blue'
    else: here.append(rng.choice(ODD_JSON))
    return config


def make_folders(zoo, seed):
    "Pruned models by four methods, and forty broken ones."
    from vitprune_nb import cli
    tiny, rng = ['test_vit', '--weights', str(zoo/'w.safetensors'), '--data', str(zoo/'tree'), '--device', 'cpu'], random.Random(seed)
    for name, options in dict(uniform='--method uniform --calibration 4', planned='--reduction 0.3 --calibration 4', cut='--method vtp --sparse-epochs 0 --ratio 0.2',
                              life='--method life --predictor-epochs 0 --backbone-epochs 0 --keep-rate 0.7').items():
        code = cli.main(['prune', *tiny, *options.split(), '--out', str(zoo/name)])
        assert code == 0, (name, code)
    assert cli.main(['prune', str(zoo/'cut'), *tiny[3:], '--method', 'uniform', '--calibration', '4', '--reduction', '0.3', '--out', str(zoo/'both')]) == 0
    raw = ['', '{', '[]', 'null', '3', '{"a": 1}', '\xff\xfe{', '{}', '[' * 9000, '{"model": NaN}']
    for i in range(40):
        source, target = zoo/rng.choice(['uniform', 'planned', 'planned', 'cut', 'life', 'both']), zoo/f'broken/{i}'
        shutil.copytree(source, target)
        files = [p.name for p in sorted(source.glob('*.json'))]
        name, how = rng.choice(files), rng.random()
        if how < .7: write(target/name, json.dumps(spoil(json.loads((target/name).read_text()), rng)))
        elif how < .9: write(target/name, rng.choice(raw).encode('latin-1'))
        elif how < .95: write(target/'model.safetensors', (target/'model.safetensors').read_bytes()[:rng.choice([0, 7, 500, 9000])])
        else: (target/rng.choice(['config.json', 'model.safetensors'])).unlink()


def make_zoo(arena, seed=0):
    "Everything, below ARENA; the environment is set so that only it is seen."
    zoo = arena/'zoo'
    for d in (zoo, arena/'new', arena/'tmp', arena/'user', arena/'case'): d.mkdir(parents=True)
    os.environ.update(VITPRUNE_HOME=str(zoo/'clone'), HOME=str(arena/'user'), TMPDIR=str(arena/'tmp'), MPLBACKEND='agg', MPLCONFIGDIR=str(arena/'mpl'),
                      HF_HUB_OFFLINE='1', HF_HOME=str(arena/'user'), TERM='dumb', COLUMNS='200')
    for k in ('VITPRUNE_DATA', 'RANK'): os.environ.pop(k, None)
    tempfile.tempdir = None
    from vitprune_nb import data
    model = make_home(zoo/'clone')
    make_trees(zoo, data.CIFAR10)
    make_weights(zoo, model)
    make_folders(zoo, seed)
    for p in (arena/'new', arena/'tmp', arena/'user', arena/'case'): empty(p)
    return zoo


# --- what is on the disk

def snapshot(folder):
    "Everything below a folder: kind, mode, size and content, the last by the time of its change."
    out = {}
    for base, dirs, files in os.walk(folder):
        for name in [*dirs, *files]:
            p = os.path.join(base, name)
            s = os.lstat(p)
            folder_like = stat.S_ISDIR(s.st_mode)
            out[os.path.relpath(p, folder)] = (s.st_mode, s.st_ino) if folder_like else (s.st_mode, s.st_ino, s.st_size, s.st_mtime_ns)
    return out


def changes(before, after):
    "What differs between two snapshots, in words."
    return [f'{p} is gone' for p in before.keys() - after.keys()] + [f'{p} is new' for p in after.keys() - before.keys()] \
        + [f'{p} changed' for p in before.keys() & after.keys() if before[p] != after[p]]


def empty(folder):
    for p in folder.iterdir(): shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()


# --- values

NUMBERS = ['nan', 'inf', '-inf', '-1', '0', '0.0', '-0.0', '1', '1.5', '2', '1e99', '1e-99', '1e999', '99999999999999999999', '4294967296', '-9223372036854775809',
           'x', '', ' ', '½', '٣', 'True', '0x10', '1_0', '1,2', '--', '1e', 'None', '3' * 400]
WORDS = ['', ' ', 'x', 'ü', '💥', 'a' * 3000, 'a\nb', '..', '.', '/', '-', '--', 'None', 'null', '\udcff', '../..', '~', '%s%n', '{}', 'auto', 'all', '7', 'Ω/ω', "'", '[1]', '\x1b[31m']
PATHS = ['', '.', '..', '/', '~', 'none', 'none/none', '{zoo}/file', '{zoo}/file/x', '{zoo}/void', '{zoo}/tree', '{zoo}/w.safetensors', '{zoo}/w.pth/', '/dev/null', '/dev/full', '/proc/self/mem',
         'a' * 300, 'a\nb', 'ü', '\udcff', '-', '{zoo}/broken/0/config.json', '{zoo}/text.pth', '{zoo}/uniform', '//', '{zoo}/../zoo/tree', './/x/../y', 'x' + '/x' * 400]
DEVICES = ['tpu', 'cpu:x', 'cpu:1', 'cpu:0', 'cpu:', 'cuda', 'cuda:99', 'cuda:-1', 'mps', 'mps:1', 'CPU', '', 'cpu ', 'meta', 'xpu', '3', ':', 'auto:0', 'cpu,cpu', 'hpu', 'privateuseone']
GOOD_MODELS = ['test_vit --weights {zoo}/w.safetensors'] * 6 + ['course'] * 3 + ['{zoo}/uniform', '{zoo}/planned', '{zoo}/cut', '{zoo}/life', '{zoo}/both']
DENSE_MODELS = ['test_vit --weights {zoo}/w.safetensors'] * 4 + ['course'] * 2 + ['{zoo}/cut']
OTHER_MODELS = ['test_vit', 'test_vit2', 'test_vit3', 'resnet10t', 'test_vit4', 'test_resnet', 'no_such', 'swin_s3_tiny_224', 'test_vit.r160_in1k', 'mobilenetv3_small_050', 'vit_tiny_patch16_224']
GOOD_DATA = ['{zoo}/tree', '{zoo}/tree', '{zoo}/big pictures', 'embedded']
BAD_DATA = ['{zoo}/three', '{zoo}/only_test', '{zoo}/differ', '{zoo}/damaged', '{zoo}/empty', '{zoo}/no_images', '{zoo}/void', '{zoo}/file', 'cifar10', 'cifar100', 'imagenet']
GOOD_WEIGHTS = ['{zoo}/w.safetensors', '{zoo}/w.pth', '{zoo}/wrapped.pth', '{zoo}/half.safetensors']
BAD_WEIGHTS = ['{zoo}/' + n for n in ('w3.safetensors net.pth prefix.safetensors nan.safetensors headless.safetensors gap.safetensors nothing.safetensors shape.safetensors flat.safetensors list.pth '
               'number.pth none.pth text.pth tensor.pth numbers.pth pickled.pth text.safetensors empty.pth cut.safetensors cut.pth folder.pth tree').split()]
BROKEN = [f'{{zoo}}/broken/{i}' for i in range(40)]


class Option:
    "An option of a command: values that are fine, and values that are not."
    def __init__(self, good, bad=(), often=.3): self.good, self.bad, self.often = list(good), [*bad], often


def number(*good, often=.3): return Option(good, NUMBERS, often)
def word(*good, often=.3): return Option(good, WORDS, often)
def path(*good, bad=(), often=.3): return Option(good, [*bad, *bad, *PATHS], often)


OUTS = ['p'] * 6 + ['deep/er/p', './p', 'p/', '{new}/p', 'ü', 'a b', '.', 'p.tmp']
BAD_OUTS = ['{zoo}/uniform', '{zoo}/tree', '{zoo}/file', '{zoo}', '{zoo}/void', '{new}', '../case/link', '../case/link/p', '{zoo}/clone', '{zoo}/clone/data', '../zoo/life', '/proc/x', '/dev/null/x']
DATA, WEIGHTS, DEVICE = path(*GOOD_DATA, bad=BAD_DATA, often=.6), path(*GOOD_WEIGHTS, bad=BAD_WEIGHTS, often=.1), Option(['cpu', 'auto'], DEVICES, .3)
DTYPE, BATCH, SEED, FLAG = word('fp32', 'bf16', 'auto'), number(2, 4, 10), number(0, 1, 7, often=.2), Option([None], ['1', 'x'], .2)
COMMANDS = {
    'cost': {'--weights': WEIGHTS, '--by': word('part', 'block'), '--json': FLAG},
    'eval': {'--weights': WEIGHTS, '--data': DATA, '--limit': number(3, 8, often=.7), '--device': DEVICE, '--dtype': DTYPE, '--batch': BATCH, '--json': FLAG},
    'bench': {'--weights': WEIGHTS, '--data': DATA, '--batch': number(1, 2, often=1.), '--repeats': number(1, 2, often=1.), '--warmup': number(1, 2, often=1.), '--device': DEVICE, '--dtype': DTYPE, '--json': FLAG},
    'prune': {'--weights': WEIGHTS, '--data': DATA, '--calibration': number(2, 5, often=.0), '--device': DEVICE, '--seed': SEED, '--recover': number(0, .4, 1, often=.15), '--force': FLAG, '--json': FLAG},
    'demo': {'--data': DATA, '--reduction': number(.3, .45), '--images': number(3, 10, often=1.), '--calibration': number(2, 4, often=1.), '--repeats': number(1, often=1.), '--batch': number(2, 3, often=1.),
             '--seed': SEED, '--device': Option(['cpu'], DEVICES), '--json': FLAG},
    'train': {'--weights': path(bad=BAD_WEIGHTS, often=1.), '--data': path('{zoo}/tree', 'embedded', bad=BAD_DATA, often=.8), '--epochs': number(.1, 1, often=.9), '--lr': number(1e-4), '--batch': number(2, 4), '--limit': number(2, 5),
              '--seed': SEED, '--device': DEVICE, '--dtype': DTYPE, '--json': FLAG},
    'run': {'--data': DATA, '--weights': WEIGHTS, '--results': path('r.csv', bad=['{zoo}/file', 'r.txt']), '--dry-run': Option([None], ['1'], .4), '--accept-code': FLAG, '--redo': FLAG, '--device': DEVICE, '--json': FLAG},
}
METHODS = {
    'patch-slimming': {'--reduction': number(.2, .3, .4), '--eps': number(.1, .5, often=0), '--keys': word('entering', 'all', 'kept'), '--step': number(1, .2, 4), '--tune-epochs': number(0, 1, often=0),
                       '--calibration': number(2, 5, often=1.), '--batch': BATCH, '--lr': number(1e-4)},
    'uniform': {'--reduction': number(.2, .3, .4), '--keys': word('entering', 'all', 'kept'), '--calibration': number(2, 5, often=1.), '--batch': BATCH},
    'attention': {'--reduction': number(.2, .3, .4), '--keys': word('entering', 'all', 'kept'), '--calibration': number(2, 5, often=1.), '--batch': BATCH},
    'random': {'--reduction': number(.2, .3, .4), '--keys': word('entering', 'all', 'kept'), '--calibration': number(2, 5, often=1.), '--batch': BATCH},
    'vtp': {'--ratio': number(.1, .3), '--l1': number(0, 1e-4), '--gate-start': number(1, .1), '--rule': word('folded', 'gate', 'literal'), '--multiple': number(1, 8), '--whole-heads': FLAG,
            '--sparse-epochs': number(0, 0, .4, often=1.), '--batch': number(4, 10), '--lr': number(1e-4)},
    'life': {'--keep-rate': word('0.7', '0.9,0.8', '0.5'), '--stages': word('2,4', '3', '2'), '--t-base': number(1, 2, often=.1), '--U': number(1.5, 3), '--predictor-epochs': number(0, 0, .4, often=1.),
             '--backbone-epochs': number(0, 0, .3, often=1.), '--batch': number(4, 10), '--lr': number(1e-5)},
    'cosine': {'--keys': word('all', 'kept'), '--cosine-threshold': number(.9, .95), '--score-threshold': number(.3, .5), '--rounds': number(0, 1), '--calibration': number(2, 5, often=1.), '--batch': BATCH},
}


# --- command lines

def words_of(name, value): return [name] if value is None else [name, str(value)]


def prune_words(rng):
    "(method, options, where they come from) of a prune."
    method = rng.choice([*METHODS])
    own = METHODS[method]
    chosen = {k: rng.choice(o.good) for k, o in own.items() if rng.random() < o.often}
    if method == 'patch-slimming' and rng.random() < .3:
        chosen.pop('--reduction', None)
        chosen |= {'--eps': rng.choice(own['--eps'].good), **({'--tune-epochs': 1} if rng.random() < .3 else {})}
    dial = dict(vtp='--ratio', life='--keep-rate', cosine='--score-threshold').get(method)
    if dial and rng.random() < .4: chosen.pop(dial, None); chosen['--reduction'] = rng.choice([.1, .2, .3])
    if method == 'cosine' and '--reduction' in chosen: chosen.pop('--cosine-threshold', None)
    return method, {'--method': method, **chosen}, {**own, '--reduction': number(.3), '--method': word(*METHODS)}


def line_parts(rng):
    "(command, first word, options, what they may be) of a valid command line."
    command = rng.choices([*COMMANDS], weights=[11, 13, 7, 41, 6, 6, 16])[0]
    about = dict(COMMANDS[command])
    chosen = {k: rng.choice(o.good) for k, o in about.items() if o.good and rng.random() < o.often}
    first = ''
    if command in ('cost', 'eval', 'bench'): first = rng.choice(GOOD_MODELS)
    if command == 'prune':
        first = rng.choice(DENSE_MODELS)
        _, more, kinds = prune_words(rng)
        about, chosen = about | kinds, chosen | more
    if command in ('prune', 'demo', 'train', 'run'):
        about['--out'] = path(*OUTS, bad=BAD_OUTS * 2, often=1.)
        chosen['--out'] = rng.choice(OUTS)
    if command == 'train': chosen['--weights'] = '{zoo}/big.safetensors'
    if command == 'run': first = 'CONFIG'
    if first.startswith('{zoo}/'): chosen.pop('--weights', None)
    if ' ' in first and '--weights' in chosen: first = 'test_vit'
    return command, first, chosen, about


def harm(rng, command, first, chosen, about, extra):
    "One thing that is wrong, or at least odd; returns the first word."
    how = rng.random()
    if how < .55:
        name = rng.choice([*about])
        if about[name].bad: chosen[name] = rng.choice(about[name].bad)
    elif how < .65:
        others = {k: o for t in [*COMMANDS.values(), *METHODS.values()] for k, o in t.items()}
        name = rng.choice([*others])
        chosen[name] = rng.choice(others[name].good or ['x'])
    elif how < .7 and chosen:
        name = rng.choice([*chosen])
        extra += words_of(name, rng.choice(about[name].bad + about[name].good or ['x']) if name in about else 'x')
    elif how < .75 and chosen: chosen.pop(rng.choice([*chosen]))
    elif how < .8: extra.append(rng.choice(['--colour', 'x', '-h', '--help', '', '--', '-1', '--json=1', '--out', '--data']))
    elif command in ('cost', 'eval', 'bench', 'prune'):
        first = rng.choice(BROKEN * 2 + OTHER_MODELS + PATHS + WORDS[:6] + GOOD_MODELS)
    elif command == 'run' and how < .9: extra += ['--set', rng.choice(SETS)]
    elif command == 'run': first = rng.choice(PATHS + ['{zoo}/uniform/config.json'])
    return first


def command_line(rng):
    "(words, TOML text or None, options of the arena) of a random command line; {zoo} stands for the folder of all that is there."
    command, first, chosen, about = line_parts(rng)
    extra, toml = [], None
    faults = rng.choices([0, 1, 2], weights=[20, 50, 30])[0]
    if command == 'run':
        spoilt = sum(rng.random() < .6 for _ in range(faults))
        toml, faults = config_text(rng, spoilt), faults - spoilt
        if rng.random() < .2: extra += ['--set', rng.choice(GOOD_SETS)]
    for _ in range(faults): first = harm(rng, command, first, chosen, about, extra)
    pairs = [words_of(k, v) for k, v in chosen.items()]
    rng.shuffle(pairs)
    model, *rest = first.split(' ', 1) if '--weights' in first else [first]
    return [command, *([model] if model or first or rng.random() < .02 else []), *(rest[0].split() if rest else []), *[w for p in pairs for w in p], *extra], toml


# --- experiments

TOML = ['nan', 'inf', '-inf', '-1', '0', '1', '1.5', '1e99', '99999999999999999999', '"x"', '""', '" "', '[]', '[[]]', '{}', '{a = 1}', '1979-05-27', '07:32:00', '1979-05-27T07:32:00Z', 'true', 'false',
        '"\\u0000"', "'ü'", '[1, "a"]', '[nan]', '[0.3, 0.3]', '["uniform", 3]', '"../.."', '".."', '"."', '"3"', '[true]', '0x10', '[[1]]', '{ uniform = 3 }', '"cpu:x"', '"cuda:99"', '"none"', '"/"',
        '9223372036854775807', '[18446744073709551616]', '"a\\nb"', "'" + 'a' * 300 + "'", '[{a = 1}]', '-0.0', '["none"]', '4294967296', '[4294967296]']
GOOD_SETS = ['test_images=4', 'reductions=0.3', 'methods=uniform', 'seeds=1', 'recover={}', 'time_batch=2', 'name=other', 'methods=uniform,random', 'device=cpu', 'batch_size=3']
SETS = ['', '=', 'a', '=1', 'a=', 'a=1', 'x.y=1', 'methods=', 'methods=none', 'methods=3', 'methods=[3]', 'reductions=a', 'reductions=nan', 'seeds=-1', 'seeds=x', 'seeds=4294967296', 'recover=3', 'recover.epochs=x', 'recover.epochs=nan',
        'recover.colour=1', 'train.epochs=inf', 'train.patch_drop=3', 'train.patch_drop=[2]', 'train.batch_size=0', 'options.uniform=3', 'options.uniform.keys=3', 'options.vtp.l1=nan', 'options.none.a=1', 'options.life.stages="a"',
        'name=..', 'name=', 'name=a/b', 'name=1', 'name=\udcff', 'name.a=1', 'dense=1', 'dense=none', 'data=', 'data=3', 'classes=99', 'classes=-1', 'classes=true', 'test_images=1e3', 'test_images=nan', 'model=', 'model=no', 'model_args=3',
        'model_args.img_size=0', 'model_args.img_size=x', 'model_args.colour=1', 'model_args.depth=0', 'time_batch=999', 'workers=-1', 'workers=1.5', 'workers=999999', 'repeats=0', 'dtype=int8', 'device=cpu:x', 'device=cuda:99', 'results=x',
        'results=.csv', 'pretrained=true', 'pretrained=1', 'control=3', 'options.uniform.calibration=true', 'a.b.c.d=1', '.=1', '..=1', 'methods=[]', 'seeds=[]', 'x=[', 'recover.distill=2', 'recover.seed=-1', 'batch_size=99999999999999999999',
        'recover.distill=0.5', 'model_args={weights="x"}', 'model_args.checkpoint_path="{zoo}/pickled.pth"', 'model_args.num_classes=3', 'options.patch-slimming.step=0', 'options.cosine.cosine_threshold=0.99999', 'options.cosine.rounds=1e3']
RECIPES = dict(epochs=['0.2', '1'], batch_size=['4', '5'], lr=['1e-3'], augment=['"none"', '"light"', '"deit"'], mixup=['0.5'], label_smoothing=['0.1'], freeze=['1'], drop_path=['0.1'], ema=['0.9'], clip_grad=['0'], dtype=['"fp32"'],
               warmup=['0.1'], layer_decay=['1', '0.8'], patch_drop=['[]'], weight_decay=['0'], save_every=['1'], log_every=['1'], seed=['3'])
OPTIONS = {'uniform': dict(keys=['"all"'], calibration=['3'], batch_size=['2']), 'patch-slimming': dict(step=['2'], keys=['"kept"']), 'vtp': dict(sparse_epochs=['0'], rule=['"gate"'], whole_heads=['true']),
           'life': dict(predictor_epochs=['0'], backbone_epochs=['0'], stages=['[2, 4]', '[3]'], U=['2.0']), 'cosine': dict(rounds=['0'], cosine_threshold=['0.9']), 'random': dict(keys=['"all"']), 'attention': {}}


def config_parts(rng):
    "{table: {key: TOML}} of a valid, short experiment."
    methods = rng.sample(['uniform', 'random', 'attention', 'patch-slimming', 'vtp', 'life', 'cosine'], rng.choice([1, 1, 2]))
    top = dict(methods=json.dumps(methods), reductions=rng.choice(['[0.3]', '[0.2, 0.3]', '[0.25]']), calibration=rng.choice(['3', '4']), test_images='10', data=rng.choice(['"embedded"', '"../zoo/tree"']))
    for key, values in dict(model=['"course"', '"test_vit"'], seeds=['[0]', '[1]', '[0, 1]'], control=['true', 'false'], batch_size=['5', '64'], dtype=['"fp32"', '"bf16"'], device=['"cpu"', '"auto"'], workers=['0'], time_batch=['0', '2'],
                            repeats=['1'], results=['"rows.csv"'], name=['"short"', '"a.b-c"'], train_images=['20', '0'], classes=['0', '4', '10']).items():
        if rng.random() < .25: top[key] = rng.choice(values)
    if '"test_vit"' == top.get('model'): top |= dict(model_args='{ img_size = 32, patch_size = 8 }')
    elif rng.random() < .1: top['dense'] = '"../zoo/w.safetensors"'; top['model'] = '"test_vit"'; top['model_args'] = '{ img_size = 32, patch_size = 8 }'
    if top.get('classes') not in (None, '0', '10') or 'model_args' in top and 'dense' not in top: needs_head = True
    else: needs_head = rng.random() < .1
    tables = {'': top}
    recipe = lambda: {k: rng.choice(v) for k, v in RECIPES.items() if k in ('epochs', 'batch_size') or rng.random() < .15}
    if needs_head and 'dense' not in top: tables['train'] = dict(recipe(), epochs='0.2')
    if rng.random() < .25: tables['recover'] = dict(recipe(), epochs='0.2')
    for m in methods:
        wanted = {k: rng.choice(v) for k, v in OPTIONS[m].items() if rng.random() < .5 or k.endswith('_epochs')}
        if wanted: tables[f'options.{m}'] = wanted
    return tables


def config_text(rng, faults):
    "A TOML file with so many faults."
    tables = config_parts(rng)
    for _ in range(faults):
        table = tables[rng.choice([*tables])] if rng.random() < .5 else tables['']
        how = rng.random()
        if how < .6 and table: table[rng.choice([*table])] = rng.choice(TOML)
        elif how < .8:
            table = tables['']
            table[rng.choice('name model model_args pretrained weights dense data classes train_images test_images methods reductions seeds calibration options train recover control batch_size dtype device workers time_batch repeats results'.split())] = rng.choice(TOML)
        elif how < .9: table[rng.choice(['colour', 'Methods', '"a b"', 'epoch', 'keep_rate', 'reduction'])] = rng.choice(TOML)
        else: tables[rng.choice(['train', 'recover', 'options.vtp', 'options.life', 'options.cosine', 'options.none', 'options', 'name'])] = {rng.choice([*RECIPES, 'l1', 'stages', 'keep_rate', 'rounds', 'multiple', 't_base']): rng.choice(TOML)}
    text = '\n'.join((f'[{name}]\n' if name else '') + ''.join(f'{k} = {v}\n' for k, v in t.items()) for name, t in tables.items())
    if faults and rng.random() < .05: text = rng.choice(['', '\ufeff' + text, text[:len(text)//2], '[', text + '\n' + text, '\0', 'a = ' + '[' * 3000])
    return text


# --- a child

def run_child(work, cwd, timeout):
    "What `work()` printed and how it ended, in a forked child: (code, stdout, stderr, seconds). Code 70: an exception came through."
    files = [tempfile.TemporaryFile(dir='/dev/shm' if os.path.isdir('/dev/shm') else '/tmp') for _ in range(2)]
    sys.stdout.flush(); sys.stderr.flush()
    start, pid = time.perf_counter(), os.fork()
    if pid == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            for fd, f in zip((1, 2), files): os.dup2(f.fileno(), fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = os.fdopen(1, 'w', encoding='utf-8'), os.fdopen(2, 'w', encoding='utf-8', errors='backslashreplace')
            os.chdir(cwd)
            code = work()
        except SystemExit as e: code = e.code if isinstance(e.code, int) else 71
        except BaseException: traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException): sys.stdout.flush(); sys.stderr.flush()
            os._exit(code if isinstance(code, int) and 0 <= code < 256 else 72)
    code = None
    poll = os.pidfd_open(pid)
    if not select.select([poll], [], [], timeout)[0]:
        with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
        code = 'timeout'
    os.close(poll)
    status = os.waitpid(pid, 0)[1]
    if code is None: code = os.waitstatus_to_exitcode(status)
    said = []
    for f in files:
        f.seek(0); said.append(f.read().decode('utf-8', 'backslashreplace')); f.close()
    return code, *said, time.perf_counter() - start


def shown(text): return text.rpartition('\r')[2]   # what a progress bar wiped


def no_constant(name): raise ValueError(f'{name} is no JSON')


class Arena:
    "The folder in which everything happens, and the check of a single case."
    def __init__(self, folder, seed=0):
        self.folder, self.seed = Path(folder), seed
        self.new, self.zoo = self.folder/'new', self.folder/'zoo'
        code, out, err, _ = run_child(lambda: make_zoo(self.folder, seed) and 0, '/', 300)
        if code != 0: raise RuntimeError(f'the zoo could not be made:\n{out}\n{err}')
        os.environ.update(VITPRUNE_HOME=str(self.zoo/'clone'), HOME=str(self.folder/'user'), TMPDIR=str(self.folder/'tmp'), MPLBACKEND='agg', MPLCONFIGDIR=str(self.folder/'mpl'),
                          HF_HUB_OFFLINE='1', HF_HOME=str(self.folder/'user'), TERM='dumb', COLUMNS='200')
        for k in ('VITPRUNE_DATA', 'RANK'): os.environ.pop(k, None)
        tempfile.tempdir = None
        self.before, self.top = snapshot(self.zoo), sorted(os.listdir('/'))

    def fresh(self, rng):
        "An empty place for what a case writes, with a link that leads into the zoo."
        for p in (self.new, self.folder/'tmp', self.folder/'user', self.folder/'case'): empty(p)
        self.new.mkdir(exist_ok=True)
        for p in sorted(snapshot(self.zoo).keys() - self.before.keys(), reverse=True):     # of a case that was told to write there
            (os.rmdir if os.path.isdir(self.zoo/p) else os.unlink)(self.zoo/p)
        (self.folder/'case/target').mkdir()
        os.symlink(self.folder/'case/target', self.folder/'case/link')

    def left(self):
        "What a case left in the place for results, and in all other places."
        here = sorted(os.listdir(self.new)) if self.new.is_dir() else ['nothing, the folder itself is gone']
        here += [f'../case/link/{n}' for n in os.listdir(self.folder/'case/target')]
        other = [f'{d}/{n}' for d in ('tmp', 'user') for n in os.listdir(self.folder/d)]
        other += changes(self.before, snapshot(self.zoo))
        other += [f'/{n}' for n in sorted(set(os.listdir('/')) ^ set(self.top))]
        if not os.path.islink(self.folder/'case/link'): other.append('the link is gone')
        return here, other

    def line(self, number):
        "Run a command line; returns (words, what is wrong with it, code, stdout, stderr, seconds)."
        rng = random.Random(f'line {self.seed} {number}')
        words, toml = command_line(rng)
        self.fresh(rng)
        config = self.folder/'case/config.toml'
        if toml is not None: config.write_bytes(toml.encode('utf-8', 'surrogateescape'))
        fill = lambda w: w.replace('{zoo}', str(self.zoo)).replace('{new}', str(self.new)) if '{zoo}' in w or '{new}' in w else w
        words = [str(config) if w == 'CONFIG' else fill(w) for w in words]
        from vitprune_nb import cli
        code, out, err, seconds = run_child(lambda: cli.main(list(words)), self.new, 300)
        return words, self.judge(words, code, out, err), code, out, err, seconds

    def outputs(self, words):
        "Where a command line is allowed to write, as paths that begin in its folder."
        named = [w for k, w in zip(words, words[1:]) if k in ('--out', '--results') and w]
        named += [re.sub(r'(\.\w*)?$', rf'_{kind}\1', w, count=1) for w in named for kind in ('pairs', 'answers')]
        return [os.path.relpath(os.path.join(self.new, w), self.new) for w in named] + ['demo', 'runs', 'rows.csv', 'rows_pairs.csv', 'rows_answers.csv']

    def judge(self, words, code, out, err):
        "What a command line did that it must not do."
        wrong, lines, (here, other) = [], shown(err).splitlines(), self.left()
        if 'Traceback (most recent call last)' in err or code == 70: wrong.append('traceback: ' + (err.strip().splitlines() or ['?'])[-1][:200])
        elif code not in (0, 1, 2): wrong.append(f'exit code {code}')
        elif code == 1 and words[0] != 'run': wrong.append('exit code 1')
        elif code == 2 and (len(lines) != 1 or not lines[0].startswith('vitprune: ')): wrong.append(f'{len(lines)} lines on standard error: {lines[:3]}')
        elif code == 1 and not (lines and all(l.startswith('vitprune: ') for l in lines)): wrong.append(f'lines on standard error: {lines[:3]}')
        if code == 0 and '--json' in words and '--help' not in words and '-h' not in words:
            try: json.loads(out.splitlines()[-1], parse_constant=no_constant)
            except (ValueError, IndexError) as e: wrong.append(f'no JSON: {e}')
        if code == 2 and here: wrong.append(f'left {here[:5]}')
        stray = [n for n in here if not any(o == '.' or o.startswith(n) for o in self.outputs(words))]
        if code != 2:        # new files in a folder of the zoo that was named are what was asked for
            there = [os.path.relpath(os.path.join(self.new, o), self.zoo) for o in self.outputs(words)]
            other = [c for c in other if not (c.endswith(' is new') and any(c.startswith(f'{o}/') for o in there))]
        if code != 2 and stray: wrong.append(f'left {stray}')
        if other: wrong.append(f'elsewhere: {other[:5]}')
        return wrong

    def call(self, number):
        "Make a call; returns (its text, what is wrong with it, code, stdout, stderr, seconds)."
        import fuzz_calls
        rng = random.Random(f'call {self.seed} {number}')
        self.fresh(rng)
        text, work, strict = fuzz_calls.random_call(rng, self.zoo)
        code, out, err, seconds = run_child(lambda: fuzz_calls.outcome(work), self.new, 300)
        (here, other), wrong = self.left(), []
        if code not in (0, 2): wrong.append(f'code {code}: ' + (err.strip().splitlines() or ['?'])[-1][:200])
        if code == 0 and strict: wrong.append(f'accepted {strict}')
        if code == 2 and here: wrong.append(f'left {here}')
        if other: wrong.append(f'elsewhere: {other[:5]}')
        return text, wrong, code, out, err, seconds


def warm():
    "Import once what cases need, so that a child starts in milliseconds."
    import torch
    torch.set_num_threads(1)
    import accelerate, matplotlib.pyplot, pandas, safetensors.torch, scipy, timm, torchvision, torchvision.transforms   # noqa
    from vitprune_nb import cli, demo, deploy, experiment, run, viz   # noqa
    from vitprune_nb.core import load_methods
    from vitprune_nb.train import course
    load_methods()
    import timm.data, timm.loss, timm.optim, timm.scheduler, timm.utils, torch.utils.flop_counter   # noqa
    timm.list_models()
    from vitprune_nb.vit import model as vit
    small = dict(img_size=32, patch_size=8, num_classes=10)     # the course's ViT-S and its start, in small
    vit.COURSE.update(model='test_vit', kwargs=small)
    hashes = experiment.code_hashes()
    experiment.code_hashes = lambda *_: hashes                  # of the same code each time
    course._big_model = lambda weights: vit.create_vit('test_vit', weights=weights, img_size=112, patch_size=28, num_classes=0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        timm.create_model('test_vit', img_size=32, patch_size=8)


def sites(err):
    "Where in this package an exception came from: the last frame of ours and the exception."
    ours = re.findall(r'File "[^"]*vitprune_nb/([\w/]+)\.py", line (\d+), in (\w+)', err)
    last = (err.strip().splitlines() or ['?'])[-1][:110]
    return f'{ours[-1][0]}.{ours[-1][2]}:{ours[-1][1]} {last}' if ours else last


def fuzz(kind, numbers, arena, verbose=False, say=print):
    "Run cases; returns [(number, what it was, what is wrong with it)] of those that misbehave, and the counts of exit codes."
    bad, codes = [], Counter()
    for i in numbers:
        what, wrong, code, out, err, seconds = getattr(arena, kind)(i)
        codes[code] += 1
        if verbose: say(f'{what}\n--- {code} in {seconds:.2f} s\n{out}\n---\n{err}')
        if wrong:
            bad.append((i, what, wrong, sites(err)))
            say(f'{kind} {i}: {sites(err) if code == 70 else wrong[0][:200]}', flush=True)
        if seconds > 60: say(f'{kind} {i} took {seconds:.0f} s: {what}')
    return bad, codes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--lines', type=int, nargs='?', const=-1)
    parser.add_argument('--calls', type=int, nargs='?', const=-1)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, nargs='*')
    parser.add_argument('--start', type=int, default=0)
    parser.add_argument('--json', metavar='FILE', help='what misbehaves, and the exit codes')
    a = parser.parse_args()
    if a.lines is None and a.calls is None: a.lines, a.calls = 1500, 400
    sys.path.insert(0, str(ROOT/'tests'))
    warm()
    with tempfile.TemporaryDirectory(prefix='vitprune-fuzz-') as d:
        arena, failed = Arena(d, a.seed), 0
        for kind, n in (('line', a.lines), ('call', a.calls)):
            if n is None: continue
            start = time.time()
            bad, codes = fuzz(kind, a.only if a.only else range(a.start, a.start + n), arena, bool(a.only))
            failed += len(bad)
            if a.json: Path(a.json).write_text(json.dumps(dict(bad=bad, codes=codes)), encoding='utf-8'); failed = 0
            print(f'{kind}s: {sum(codes.values())} in {time.time() - start:.0f} s, exit codes {dict(codes)}, {len(bad)} misbehave, of them {sum("traceback" in str(b[2]) or "code " in str(b[2]) for b in bad)} tracebacks')
            groups = {}
            for i, what, wrong, site in bad: groups.setdefault((re.sub(r'\d+', 'N', site if 'traceback' in wrong[0] or 'code' in wrong[0] else wrong[0]))[:150], []).append((i, what, wrong))
            for site, cases in sorted(groups.items(), key=lambda g: -len(g[1])):
                print(f'{len(cases):4} × {site}')
                for i, what, wrong in cases[:3]: print(f'       {i}: {str(what)[:400]}\n            {str(wrong)[:300]}')
    return failed > 0


if __name__ == '__main__': sys.exit(main())
