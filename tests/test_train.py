"""What a notebook cannot show: runs that are really killed, two processes in place of one, and the course recipe from end to end."""
import os, random, signal, socket, subprocess, sys
import pytest
import torch
from conftest import ONE_THREAD, ROOT, start
from train_script import RANDOM, run, tiny_vit, train_set
from vitprune_nb.errors import VitpruneError
from vitprune_nb.files import sha256
from vitprune_nb.train.course import train_course
from vitprune_nb.train.trainer import TrainConfig, fit, load_checkpoint, read_log
from vitprune_nb.vit.model import create_vit

SCRIPT = 'train_script.py'
pytestmark = pytest.mark.usefixtures('one_thread')


def apart(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)


def test_kill_9_changes_nothing(tmp_path):
    "Killed while writing a checkpoint, then killed at a random step in the middle of an epoch, then left alone."
    out, log = tmp_path/'killed', lambda rows: [(r['step'], r['lr'], r['loss']) for r in rows]
    half = start(SCRIPT, 'random', out, 'half-write')
    half.communicate(timeout=300)
    assert half.returncode == -signal.SIGKILL
    assert load_checkpoint(out/'checkpoint.pt')['step'] == 5           # the first checkpoint is whole; of the second …
    assert len(list(out.glob('.checkpoint.pt.*.tmp'))) == 1            # … half a temporary file is left

    stop = random.choice([s for s in range(11, 46) if s % 5 and s % 12])
    second = start(SCRIPT, 'random', out)
    seen = []
    for line in second.stdout:
        seen.append(int(line.split()[1]))
        if seen[-1] == stop: os.kill(second.pid, signal.SIGKILL); break
    assert second.wait(timeout=60) == -signal.SIGKILL
    second.stdout.close()
    assert seen[0] == 6, 'resumed after the checkpoint of step 5'
    assert 0 <= stop - load_checkpoint(out/'checkpoint.pt')['step'] <= 5, f'killed at step {stop}'

    third = start(SCRIPT, 'random', out)
    third.communicate(timeout=300)
    assert third.returncode == 0 and not list(out.glob('.*.tmp'))
    whole, rows = run('random', tmp_path/'whole')
    assert apart(torch.load(out/'final.pt', weights_only=True), whole.state_dict()) == 0, f'killed at step {stop}'
    assert log(read_log(out/'log.csv')) == log(rows)


def test_two_processes_give_the_weights_of_one(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1', f'--master_port={port}', str(ROOT/'tests'/SCRIPT),
                    'plain', str(tmp_path/'two')], env=ONE_THREAD, check=True, timeout=300, capture_output=True)
    model, rows = run('plain', tmp_path/'one')
    assert apart(torch.load(tmp_path/'two/final.pt', weights_only=True), model.state_dict()) < 1e-5
    assert apart(tiny_vit().state_dict(), model.state_dict()) > 1e-3
    assert [r['loss'] for r in read_log(tmp_path/'two/log.csv')] == pytest.approx([r['loss'] for r in rows], abs=1e-4)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    cfg = TrainConfig(**dict(RANDOM, epochs=.2))
    fit(tiny_vit(), train_set(), cfg, out=tmp_path)
    file = tmp_path/'checkpoint.pt'; whole = file.read_bytes()
    for bad in (b'', b'not a checkpoint', whole[:len(whole)//2], whole[:100] + bytes(200) + whole[300:]):
        file.write_bytes(bad)
        with pytest.raises(VitpruneError, match='checkpoint: got .*; allowed: a checkpoint that this trainer wrote') as e: fit(tiny_vit(), train_set(), cfg, out=tmp_path)
        assert '\n' not in str(e.value)
        assert file.read_bytes() == bad, 'left as it was'


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    cfg = dict(RANDOM, epochs=.2)
    fit(tiny_vit(), train_set(), TrainConfig(**cfg), out=tmp_path)
    with pytest.raises(VitpruneError, match='Changed: lr was 0.002 and is 0.001'): fit(tiny_vit(), train_set(), TrainConfig(**dict(cfg, lr=1e-3)), out=tmp_path)
    with pytest.raises(VitpruneError, match='on these training images'): fit(tiny_vit(), train_set().subset(range(160)), TrainConfig(**cfg), out=tmp_path)
    done = fit(tiny_vit(seed=1), train_set(), TrainConfig(**cfg), out=tmp_path)          # the same one: finished, so nothing is left to do
    assert done == read_log(tmp_path/'log.csv') and done[-1]['step'] == 2


def test_nan_stops_before_the_weights(tmp_path):
    calls = []
    def bad(model):
        calls.append(1)
        return model.head.weight.sum()*(float('nan') if len(calls) == 4 else 0.)
    model = tiny_vit()
    with pytest.raises(VitpruneError, match='training stopped at step 3: got loss nan .*; allowed: finite ones'):
        fit(model, train_set(), TrainConfig(**dict(RANDOM, save_every=1)), out=tmp_path, loss=bad)
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path/'checkpoint.pt')['step'] == 3


def test_an_infinite_gradient_stops_too(tmp_path):
    model = tiny_vit()
    with pytest.raises(VitpruneError, match='got loss .* and gradient norm (inf|nan)'):
        fit(model, train_set(), TrainConfig(**RANDOM), loss=lambda m: (m.head.bias - m.head.bias.detach()).abs().sqrt().sum())   # value 0, slope infinite
    assert apart(tiny_vit().state_dict(), model.state_dict()) == 0


def test_workers_and_evaluation_change_nothing():
    cfg = TrainConfig(**dict(RANDOM, epochs=.5))
    plain, watched = tiny_vit(), tiny_vit()
    fit(plain, train_set(), cfg)
    fit(watched, train_set(), cfg, test_set=train_set().subset(range(16)), workers=2)
    assert apart(plain.state_dict(), watched.state_dict()) == 0


def test_a_pruned_model_trains(tmp_path):
    from vitprune_nb.engine import slim as engine
    model = engine.SlimViT(tiny_vit(), engine.Policy({1: engine.Step(keep=tuple(range(8)))}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = fit(model, train_set(), TrainConfig(**dict(RANDOM, epochs=.3, patch_drop=())), test_set=train_set().subset(range(16)), out=tmp_path)
    assert 'top1' in rows[-1] and apart(before, model.state_dict()) > 0 and not model.training
    with pytest.raises(VitpruneError, match='patch_drop: got 0.5'): fit(model, train_set(), TrainConfig(**RANDOM))


def test_course_recipe_end_to_end(tmp_path):
    "The whole of `train_course` on a few embedded images, from random weights of the right shape."
    from safetensors.torch import load_file, save_file
    weights = tmp_path/'big.safetensors'
    save_file(create_vit('vit_small_patch14_dinov2', img_size=112, num_classes=0).state_dict(), weights)
    info = train_course(weights, 'embedded', tmp_path/'run', device='cpu', test_limit=10, epochs=.001, batch_size=8, patch_drop=(.5,))
    file = tmp_path/'run/model'/info['file']
    assert info['images'] == 10 and [r['patch_drop'] for r in info['recipe']] == [(.5,)]*2 and info['weights_sha256'] == sha256(weights)
    assert sha256(file) == info['sha256']
    model = create_vit(info['model'], **info['kwargs'])
    model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
