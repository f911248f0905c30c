"""What a notebook cannot show: a search that is really killed, and what its state file refuses."""
import os, random, signal
import pytest, torch
from conftest import start
from patch_slimming_script import images, run, tiny_vit
from vitprune_nb.methods import patch_slimming
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.store import load_slim, save_slim
from vitprune_nb.methods.patch_slimming import Plan, Search, top_down
from vitprune_nb.engine.plan import weights_hash

SCRIPT = 'patch_slimming_script.py'
pytestmark = pytest.mark.usefixtures('one_thread')


def test_kill_9_changes_nothing(tmp_path):
    "Killed while writing a state, then killed between two states, then left alone: the plan and the tuned weights of an undisturbed search."
    out = tmp_path/'killed'
    out.mkdir()
    half = start(SCRIPT, out, 'half-write')
    seen = half.communicate(timeout=300)[0].split('\n')
    assert half.returncode == -signal.SIGKILL and seen[0] == 'block 6' and seen[1:] == ['']
    assert len(list(out.glob('.search.safetensors.*.tmp'))) == 1                 # half a temporary file is left …
    assert not (out/'plan.json').exists()

    stop = random.choice([4, 3, 2])
    second, seen = start(SCRIPT, out), []
    for line in second.stdout:
        seen.append(int(line.split()[1]))
        if seen[-1] == stop: os.kill(second.pid, signal.SIGKILL); break
    assert second.wait(timeout=60) == -signal.SIGKILL
    second.stdout.close()
    assert seen[0] == 5, '… but the state of block 6 is whole, and the search goes on behind it'

    third = start(SCRIPT, out)
    rest = third.communicate(timeout=300)[0].split('\n')[:-1]
    assert third.returncode == 0 and int(rest[0].split()[1]) < stop + 1 and rest[-1] == 'block 1'
    whole, plan = run(tmp_path/'whole.safetensors'), Plan.load(out/'plan.json')
    assert plan == whole, f'killed at block {stop}'
    assert whole.weights and plan.weights.keys() == whole.weights.keys()
    assert all(torch.equal(plan.weights[k], v) for k, v in whole.weights.items()), f'killed at block {stop}'


@pytest.fixture(scope='module')
def state(tmp_path_factory):
    file = tmp_path_factory.mktemp('state')/'search.safetensors'
    run(file)
    return file


@pytest.mark.parametrize('what, other', [
    ('eps', dict(eps=.5)), ('tune_epochs', dict(tune_epochs=1)), ('lr', dict(lr=1e-4)), ('keys', dict(keys='all')), ('error', dict(error='cls')),
    ('step', dict(step=3)), ('scores', dict(scores='row')), ('model_hash', dict(model=lambda: tiny_vit(1))), ('images_hash', dict(ds=lambda: images().subset(range(5)))),
])
def test_state_of_another_search_is_refused(state, what, other):
    before = state.read_bytes()
    with pytest.raises(VitpruneError) as e: run(state, **{k: v() if callable(v) else v for k, v in other.items()})
    text = str(e.value)
    assert what in text.split('; allowed')[0] and 'allowed: the file of this very search' in text and '\n' not in text
    assert state.read_bytes() == before


@pytest.mark.parametrize('keys', ['entering', 'kept'])
def test_tuned_weights_reach_the_saved_model_and_nothing_else(tmp_path, monkeypatch, keys):
    model, ds = tiny_vit(), images()
    before = weights_hash(model)
    monkeypatch.setattr(patch_slimming, '_try', lambda search, node, k, eps, epochs, lr: search.tune(node, k, epochs, lr))   # also where eps is met
    plan = top_down(model, ds, .08, tune_epochs=1, lr=3e-4, batch_size=2, keys=keys)
    slim = plan.slim(model)
    assert weights_hash(model) == before and plan.weights and not model.training
    x = torch.stack([image for image, _ in ds.but(transform=_transform(model))])
    with torch.no_grad():
        want = slim(x)
        assert torch.equal(load_slim(save_slim(slim, tmp_path/'m'))(x), want)
        plan.save(tmp_path/'plan.json')
        assert torch.equal(Plan.load(tmp_path/'plan.json').slim(model)(x), want)
        assert not torch.equal(Plan(**{**vars(plan), 'weights': None}).slim(model)(x), want)


@pytest.mark.parametrize('keys', ['entering', 'all'])
def test_the_block_in_front_of_a_tuned_one_can_meet_eps(keys):
    "With all its patches it loses nothing but what the tuned block moved."
    def front(eps):
        s = Search(tiny_vit(), images(), batch_size=2, keys=keys)
        state = s.child(s.root, 0)
        before, after = s.measure(state, 1), s.tune(state, 1, 3, 3e-5, eps)
        return bool(s.tuned), after < before, s.measure(s.child(state, 1), s.n_patches)
    literal = front(None)
    assert literal[:2] == (True, True) and literal[2] > 0
    for eps in (2*literal[2], literal[2]/2, literal[2]/1000):
        tuned, better, error = front(eps)
        assert error <= eps and tuned == better
    assert not tuned                      # nothing so close to the dense block was found


def _transform(model):
    from vitprune_nb.data import data_config, eval_transform
    return eval_transform(data_config(model))


def test_any_calibration_set():
    "An ImageSet, a plain PyTorch data set, a loader and a list of batches of the same images give the same plan."
    model, ds = tiny_vit(), images()
    seen = ds.but(transform=_transform(model))
    pairs = [seen[i] for i in range(len(seen))]
    loader = torch.utils.data.DataLoader(pairs, batch_size=3)
    plans = [top_down(model, d, .01, batch_size=3) for d in (ds, loader, [x for x, _ in loader])]
    assert len({str(p.keep) for p in plans}) == 1 and len({p.info['images_hash'] for p in plans}) == 1


def test_a_model_in_training_mode_stays_so():
    model = tiny_vit().train()
    plan = top_down(model, images(), .01)
    assert model.training and plan.keep == top_down(tiny_vit(), images(), .01).keep
