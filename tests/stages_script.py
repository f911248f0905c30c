"""Training, pruning, running and recovering in processes that are killed at random moments, for test_stages.py.

python stages_script.py FOLDER KILLS SEED   prints, as JSON, how many kills there were of what, and what came out otherwise than undisturbed
"""
import contextlib, dataclasses, hashlib, importlib, io, json, os, random, shutil, signal, sys, time
from pathlib import Path

import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vitprune_nb import run
from vitprune_nb.methods import base, vtp as channels
from vitprune_nb.train import course
from vitprune_nb.train import trainer as train
from vitprune_nb.cli import main
from vitprune_nb.core import environment, set_seed
from vitprune_nb.data import load_data
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.methods.base import recover
from vitprune_nb.evidence.results import read_rows
from vitprune_nb.vit.model import create_vit

CLOCK = {'date', 'note', 'commit', 'latency_ms', 'throughput'}      # what a second run measures anew
WHOLE_FIT, RECIPE = train.fit, dict(batch_size=6, augment='light', dtype='fp32')
SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
BIG = dict(img_size=112, num_classes=0, embed_dim=48, depth=5, num_heads=3)
SMALL = dict(img_size=32, patch_size=4, embed_dim=48, depth=5, num_heads=3, init_values=1e-5, num_classes=10)


def fit_often(model, images, cfg, *args, **kwargs):
    "A checkpoint after every second step, so that there is something to go on from."
    return WHOLE_FIT(model, images, dataclasses.replace(cfg, save_every=2), *args, **kwargs)


for module in (train, channels, course, run, base): module.fit = fit_often
course.COURSE = dict(course.COURSE, kwargs=SMALL)
course._big_model = lambda weights: create_vit('vit_small_patch14_dinov2', weights=weights, **BIG)


def prepare(root):
    "What every child would import and ask anew; images, checkpoints, a pruned model and a configuration, shared by all runs."
    for name in ('accelerate', 'matplotlib.pyplot', 'torch._dynamo', 'vitprune_nb.methods.life_run', 'vitprune_nb.evidence.report'): importlib.import_module(name)
    environment()
    rng = np.random.default_rng(0)
    for split, each in (('train', 10), ('test', 6)):
        for k, name in enumerate(('cat', 'dog', 'fox')):
            (root/'images'/split/name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 120, (32, 32, 3)); pixels[..., k] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(root/'images'/split/name/f'{i}.png')
    set_seed(0)
    save_file(create_vit('vit_small_patch14_dinov2', **BIG).state_dict(), root/'big.safetensors')
    save_file(create_vit('test_vit', img_size=64, num_classes=3).state_dict(), root/'test_vit.safetensors')
    (root/'tiny.toml').write_text('''
data = "images"
model = "deit_tiny_patch16_224"
model_args = { img_size = 32, patch_size = 8, embed_dim = 48, depth = 3, num_heads = 3 }
device = "cpu"
methods = ["life", "vtp", "cosine", "uniform"]
reductions = [0.25]
calibration = 6
control = true
train = { epochs = 1, batch_size = 6, dtype = "fp32", drop_path = 0.1 }
recover = { epochs = 1, batch_size = 6, dtype = "fp32", freeze = 1, distill = 0.5 }
[options.life]
batch_size = 6
dtype = "fp32"
[options.vtp]
batch_size = 6
dtype = "fp32"
''')
    words = ['prune', 'test_vit', '--weights', root/'test_vit.safetensors', '--data', root/'images', '--device', 'cpu']
    assert main([*map(str, words), '--method', 'cosine', '--calibration', '6', '--reduction', '0.2', '--out', str(root/'skips')]) == 0


def cli_prune(root, out, *words):
    return main([str(w) for w in ('prune', 'test_vit', '--weights', root/'test_vit.safetensors', '--data', root/'images',
                                  '--device', 'cpu', '--out', out/'pruned', '--recover', 1, '--force', *words)])


def train_once(root, out):
    course.train_course(root/'big.safetensors', root/'images', out/'course', 'cpu', **RECIPE, epochs=1.)
    return 0


def recover_once(root, out):
    model = load_pruned(root/'skips')
    recipe = dict(augment='deit', ema=.9, freeze=1)
    recover(model, load_data(root/'images', 'train'), 2., batch_size=6, dtype='fp32', out=out/'work', recipe=recipe)
    shutil.rmtree(out/'again', ignore_errors=True)
    save_pruned(model, out/'again')
    return 0


RUNS = dict(
    train=train_once,
    life=lambda root, out: cli_prune(root, out, '--method', 'life', '--batch', 6, '--reduction', .3),
    vtp=lambda root, out: cli_prune(root, out, '--method', 'vtp', '--batch', 6, '--reduction', .3),
    cosine=lambda root, out: cli_prune(root, out, '--method', 'cosine', '--calibration', 6, '--rounds', 1, '--reduction', .2),
    tuned=lambda root, out: cli_prune(root, out, '--method', 'patch-slimming', '--calibration', 6, '--batch', 3,
                                      '--eps', .05, '--tune-epochs', 1),
    run=lambda root, out: main(['run', str(root/'tiny.toml'), '--out', str(out/'run')]),
    recover=recover_once)


def result(out):
    "All that a finished run leaves and that no clock decides: weights, rows, plans, logs."
    found = {}
    for p in sorted(p for p in out.rglob('*') if p.is_file()):
        name = str(p.relative_to(out))
        if p.suffix == '.safetensors':
            found[name] = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in load_file(p).items()}
        elif p.name == 'checkpoint.pt':
            found[name] = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in train.load_checkpoint(p)['model'].items()}
        elif p.name == 'results.csv': found[name] = [{k: v for k, v in r.items() if k not in CLOCK} for r in read_rows(p)]
        elif p.name == 'log.csv': found[name] = [(r['step'], r['lr'], r['loss']) for r in train.read_log(p)]
        elif p.name == 'results_pairs.csv' or p.suffix == '.npy': found[name] = p.read_bytes().hex()
        elif p.name in ('config.json', 'plan.json'):
            found[name] = {k: v for k, v in json.loads(p.read_text()).items() if k not in ('commit', 'date')}
        elif p.name.endswith('.tmp') or '.unfinished' in name: found[name] = 'left over'
    return found


def child(what, root, out):
    "A run in a forked process, so that a kill costs no second import; returns its pid."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        out.mkdir(exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): code = RUNS[what](root, out)
    except BaseException as e: print(f'{what}: {type(e).__name__}: {e}', file=sys.stderr)
    finally: os._exit(code)


def ends_within(pid, seconds):
    "Wait for a process at most so long; its exit code, or None when it still runs."
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.001)


def killed(what, root, out, most, seconds, draw):
    "Start it, kill it at most so often at random moments, let it finish; returns the number of kills."
    for n in range(most):
        pid = child(what, root, out)
        code = ends_within(pid, draw.uniform(0, seconds))
        if code is not None:
            assert code == 0, f'{what} ended with {code} after {n} kills'
            return n
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    code = ends_within(child(what, root, out), 600)
    assert code == 0, f'{what} ended with {code} after {most} kills'
    return most


def all_kills(folder, kills, seed):
    draw, root = random.Random(seed), Path(folder)
    prepare(root)
    whole, seconds, done, differ = {}, {}, dict.fromkeys(RUNS, 0), []
    for what in RUNS:
        start = time.monotonic()
        assert ends_within(child(what, root, root/what), 600) == 0, what
        whole[what], seconds[what] = result(root/what), time.monotonic() - start
    while sum(done.values()) < kills:
        what = min(done, key=lambda w: (done[w], draw.random()))
        out = root/f'{what}-{draw.randrange(10**9)}'
        most = min(draw.randint(1, 6), kills - sum(done.values()))
        done[what] += (n := killed(what, root, out, most, seconds[what], draw))
        got = result(out)
        if got != whole[what]:
            differ.append(dict(run=what, kills=n, files=[k for k in {**got, **whole[what]} if got.get(k) != whole[what].get(k)], out=str(out)))
        else: shutil.rmtree(out)
    return dict(seed=seed, kills=done, seconds={k: round(v, 2) for k, v in seconds.items()}, differ=differ)


if __name__ == '__main__':
    torch.set_num_threads(1)
    print(json.dumps(all_kills(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
