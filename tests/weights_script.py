"""Every door through which weights come in, tried with files that run code when they are unpickled, for test_weights.py.

python weights_script.py WORK    prints a JSON object: timm's version, and for each door what it said and whether the code ran
"""
import contextlib, io, json, os, pickle, shutil, sys
from pathlib import Path

import numpy as np
import timm
import timm.models._builder as builder
import timm.models._hub as hub
import torch

from vitprune_nb import cli

from vitprune_nb.train import course

from vitprune_nb.evidence import dense

from vitprune_nb.papers import imagenet

from vitprune_nb.methods import life


from vitprune_nb.methods import patch_slimming

from vitprune_nb.train import trainer as train

from vitprune_nb.vit import weights as vit
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.store import load_slim
from vitprune_nb.engine.store import load_pruned
from vitprune_nb.engine.store import load_sliced

WORK = Path(sys.argv[1]).resolve()
MARK = WORK/'it-ran'
FIXTURES = Path(__file__).resolve().parent/'fixtures'
TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
NAME = 'vit_tiny_patch16_224'


class Evil:
    def __reduce__(self): return os.mkdir, (str(MARK),)


def hostile_files(folder):
    "The same code in every wrapping: PyTorch's two formats, a bare pickle, NumPy's, under all names, beside good weights."
    folder.mkdir()
    state = vit.create_vit(NAME, **TINY).state_dict()
    torch.save({'state_dict': state, 'extra': Evil()}, folder/'evil.pth')
    torch.save(Evil(), folder/'old.pt', _use_new_zipfile_serialization=False)
    (folder/'bare.bin').write_bytes(pickle.dumps({'model': Evil()}))
    np.save(folder/'array.npy', np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(folder/'archive.npz', weight=np.array([Evil()], dtype=object))
    for name in ('evil', 'old', 'bare'):   # names that lie
        source = next(folder.glob(f'{name}.*'))
        shutil.copy(source, folder/f'{name}.safetensors')
    return sorted(folder.iterdir())


def pruned_folder(kind, where, weights=None, **config):
    "A pruned model of the fixtures whose files were tampered with."
    folder = WORK/'folders'/where
    shutil.copytree(FIXTURES/kind, folder)
    if weights: shutil.copy(weights, folder/'model.safetensors')
    old = json.loads((folder/'config.json').read_text())
    kwargs = old['kwargs'] | config.pop('kwargs', {})
    (folder/'config.json').write_text(json.dumps(old | dict(kwargs=kwargs) | config))
    return folder


def experiment(name, **keys):
    "A TOML file."
    file = WORK/f'{name}.toml'
    file.write_text('\n'.join(f'{k} = {v if isinstance(v, (int, bool)) else json.dumps(v) if not isinstance(v, str) else repr(v)}'.replace('True', 'true') for k, v in keys.items()))
    return file


class Missing(Exception): pass


def hub_with(file):
    "From now on the hub has this file and no other."
    def download(*a, filename='', **kw):
        if filename.endswith('.safetensors'): raise Missing
        return str(file)
    hub.hf_hub_download, hub.EntryNotFoundError = download, Missing
    for module in (hub, builder): module.has_hf_hub = lambda *a, **kw: True


def readers(file):
    "{name: function}: the doors that differ in how they read a file."
    return {
        'read_checkpoint': lambda: vit.read_checkpoint(file),
        'create_vit': lambda: vit.create_vit(NAME, file, **TINY),
        'trainer checkpoint': lambda: train.load_checkpoint(file),
        'life predictor': lambda: life.load_predictor(file, life.life_plan(vit.create_vit(NAME, **TINY), .5, stages=(1,)), 48),
        'recipe of a dense model': lambda: dense.recipe_of(file),
        'patch slimming search': lambda: patch_slimming._load_state(None, str(file), {}),
        'vitprune cost test_vit --weights': lambda: cli.main(['cost', 'test_vit', '--weights', str(file)]),
    }


def doors(file):
    "{name: function}: all doors, for one hostile file."
    f, words = str(file), lambda line: [w.replace('FILE', f) for w in line.split()]
    sources = {'checkpoint_path': f, 'weights': f, 'pretrained_cfg': dict(file=f), 'pretrained_cfg_overlay': dict(file=f),
               'pretrained': True, 'cache_dir': f, 'features_only': True}
    found = readers(file) | {
        'load_weights': lambda: vit.load_weights(vit.create_vit(NAME, **TINY), file),
        'fit_vit': lambda: vit.fit_vit('test_vit', file),
        'create_vit from the hub': lambda: vit.create_vit('vit_tiny_patch16_224', pretrained=True),
        'create_vit from the hub, another file name': lambda: vit.create_vit('vit_medium_patch32_clip_224.tinyclip_laion400m', pretrained=True),
        'native_32px': lambda: course.native_32px(f, torch.randn(8, 3, 32, 32)),
        'train_course': lambda: course.train_course(f, 'embedded', WORK/'course'),
        'fidelity_model': lambda: imagenet.fidelity_model(NAME, f),
        'dense.main': lambda: dense.main(words('--data embedded --weights FILE --model test_vit --out') + [str(WORK/'dense')]),
        'imagenet.main': lambda: imagenet.main(words('--model test_vit --weights FILE --out') + [str(WORK/'f.csv')]),
    }
    for kind, load in dict(slim=load_slim, sliced=load_sliced, life=load_pruned, cosine=load_pruned, both=load_pruned).items():
        where = f'{file.name}-{kind}'
        found[f'{kind} folder, model.safetensors'] = lambda k=kind, w=where, g=load: g(pruned_folder(k, w, file))
    for k, v in sources.items():
        if k != 'weights': found[f'create_vit, {k}'] = lambda k=k, v=v: vit.create_vit(NAME, **{k: v, 'pretrained' if 'cfg' in k else 'num_classes': 10})
        for kind in ('slim', 'sliced'):
            found[f'{kind} folder, kwargs.{k}'] = lambda k=k, v=v, kind=kind: load_pruned(pruned_folder(kind, f'{file.name}-{kind}-{k}', kwargs={k: v}))
        folder = lambda k=k, v=v: str(pruned_folder('slim', f'{file.name}-cli-{k}', kwargs={k: v, 'pretrained': True}))
        found[f'vitprune cost FOLDER, kwargs.{k}'] = lambda folder=folder: cli.main(['cost', folder()])
        if k not in ('weights', 'pretrained'):
            change = f'model_args.{k}={json.dumps(v) if not isinstance(v, dict) else "{file = " + json.dumps(f) + "}"}'.replace('True', 'true')
            line = ['run', str(experiment('plain', model='test_vit', data='embedded')), '--set', change, '--set', 'pretrained=true', '--out', str(WORK/'run')]
            found[f'vitprune run --set model_args.{k}'] = lambda line=line: cli.main(line)
    for command in ('cost', 'eval', 'bench', 'prune'):
        more = ['--out', str(WORK/'pruned')] if command == 'prune' else []
        for model in ('course', 'test_vit'):
            found[f'vitprune {command} {model} --weights'] = lambda c=command, m=model, more=more: cli.main([c, m, '--weights', f, *more])
    found['vitprune train --weights'] = lambda: cli.main(words('train --data embedded --weights FILE --out') + [str(WORK/'train')])
    for key in ('weights', 'dense'):
        config = experiment(f'{file.name}-{key}', model='test_vit', data='embedded', **{key: f})
        found[f'vitprune run, {key} in the TOML'] = lambda c=config: cli.main(['run', str(c), '--out', str(WORK/'run')])
        line = ['run', str(experiment('plain', model='test_vit', data='embedded')), '--set', f'{key}={f}', '--out', str(WORK/'run')]
        found[f'vitprune run --set {key}='] = lambda line=line: cli.main(line)
    found['vitprune run --weights'] = lambda: cli.main(['run', str(experiment('plain', model='test_vit', data='embedded')), '--weights', f, '--out', str(WORK/'run')])
    return found


def tried(door):
    "What a door said: (what came out, how many lines on standard error, whether the code ran)."
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = door()
        text, kind = err.getvalue(), f'exit {code}' if isinstance(code, int) else 'no error'
    except VitpruneError as e: text, kind = str(e), 'VitpruneError'
    except BaseException as e: text, kind = str(e), type(e).__name__
    ran = MARK.exists()
    if ran: MARK.rmdir()
    return dict(kind=kind, text=text, ran=ran)


def main():
    os.chdir(WORK)
    found = {}
    for file in hostile_files(WORK/'hostile'):
        hub_with(file)
        with contextlib.suppress(Exception), open(file, 'rb') as f: torch.load(f, weights_only=False)
        if not MARK.exists():
            with contextlib.suppress(Exception): list(dict(np.load(file, allow_pickle=True)))
            with contextlib.suppress(Exception): np.load(file, allow_pickle=True)['weight']
        found[f'control: {file.name}'] = dict(kind='control', text='', ran=MARK.exists())
        if MARK.exists(): MARK.rmdir()
        every = doors if file.name in ('evil.pth', 'old.safetensors') else readers
        for name, door in every(file).items(): found[f'{file.name}: {name}'] = tried(door)
    left = sorted(p.name for p in WORK.iterdir() if p.name not in ('hostile', 'folders') and p.suffix != '.toml')
    print(json.dumps(dict(timm=timm.__version__, doors=found, left=left)))


main()
