"""What a notebook cannot show: a search that is really killed, and what its state file refuses."""
import itertools, math, os, random, signal
import pytest, torch
from conftest import start
from patch_slimming_script import SETTINGS, images, run, tiny_vit
from vitprune_nb.methods import patch_slimming
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.store import load_slim, save_slim
from vitprune_nb.methods.base import prune
from vitprune_nb.methods.patch_slimming import Plan, Search, calibration_loader, for_budget, patch_step, top_down
from vitprune_nb.methods.significance import capture_once, coherent_scores
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


def test_a_tuned_block_is_asked_again_when_it_keeps_more_patches():
    "Weights tuned for few patches whose own error is above eps for more of them give way to the dense ones."
    s = Search(tiny_vit(), images(), batch_size=2)
    state = s.child(s.root, 0)
    s.tune(state, 1, 3, 3e-5)                                  # as in the paper: nothing holds its own output
    own = s.measure(s.child(state, 3), s.n_patches)
    tuned = s.blocks[4]
    assert s.tuned == [4] and own > 0
    for eps, kept in ((own*1.01, True), (own*.99, False)):
        patch_slimming._use(s, state, tuned)
        error = s.measure(state, 3)
        patch_slimming._use(s, state, s.model.blocks[4])
        assert error < s.measure(state, 3)                     # the tuned block is the better one
        patch_slimming._use(s, state, tuned)
        again = patch_slimming._try(s, state, 3, eps, 0, 3e-5)
        assert (s.blocks[4] is tuned, again == error) == (kept, kept)


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


@pytest.mark.parametrize('batch_size', [6, 2])
def test_a_search_by_coherent_scores_knows_its_masks_in_every_batch(batch_size):
    model, ds = tiny_vit(), images()
    search = Search(model, ds, 'coherent', batch_size=batch_size)
    node = search.root
    for k in (0, 2, 4): node = search.child(node, k)                     # blocks 6, 5 and 4
    masks = torch.ones(6, 17, dtype=torch.bool)
    for l, m in node['masks'].items(): masks[min(l, 5)] = m
    seen = ds.but(transform=_transform(model))
    with torch.no_grad(), capture_once(model) as cap: model(torch.stack([seen[i][0] for i in range(len(seen))]))
    want = coherent_scores(cap.attention, cap.tokens[:-1], masks)[2]
    torch.testing.assert_close(patch_slimming._mean_score(search, node)/want, torch.ones(17).double(), rtol=0, atol=1e-4)


BAD_STEPS = (0, -1, 2.5, 'a', True, math.nan, math.inf)


@pytest.mark.parametrize('step', BAD_STEPS)
def test_a_step_that_is_none(step):
    with pytest.raises(VitpruneError, match='^step: got'): patch_step(step, 64)


@pytest.mark.parametrize('eps', [0, -1, math.nan, '1', True])
def test_an_error_that_is_none(eps):
    with pytest.raises(VitpruneError, match=f'^eps: got {eps}; allowed: a positive relative error'): top_down(tiny_vit(), images(), eps=eps)


def broken():
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight.data[0, 0] = math.nan
    return model


@pytest.mark.parametrize('call, said', [
    (lambda: top_down(tiny_vit(), images(), tune_epochs=-1), 'tune_epochs: got -1'),
    (lambda: top_down(tiny_vit(), images(), lr=0), 'lr: got 0; allowed: a positive number'),
    (lambda: top_down(tiny_vit(), images(), step=0), 'step: got 0'),
    (lambda: top_down(broken(), images()), 'weights or images that give NaN'),
    (lambda: top_down(tiny_vit(), images(), eps=1e-30), 'misses it even with all its'),
    (lambda: Search(tiny_vit(), images(), keys='none'), "keys: got none; allowed: 'entering', 'all', 'kept'"),
    (lambda: Search(tiny_vit(), images(), error='last'), "error: got last; allowed: 'next' or 'cls'"),
    (lambda: Search(tiny_vit(), images(), 'best'), 'scores: got best; allowed: shortcut, exact'),
    (lambda: Search(tiny_vit(), images().subset([])), 'at least one calibration image'),
    (lambda: Search(tiny_vit(), []), 'at least one calibration image'),
    (lambda: Search(tiny_vit(), [3]), 'ds: got a batch of int; allowed: batches of images (B, 3, H, W)'),
    (lambda: calibration_loader(tiny_vit(), 5, 2), 'an iterable of batches of images'),
    (lambda: for_budget(tiny_vit(), images(), 0), 'reduction: got 0'),
    (lambda: for_budget(tiny_vit(), images(), .999), "for this model with keys='entering'"),
    (lambda: for_budget(tiny_vit(), images(), .01), 'reduction: got 0.01; allowed: at least 0.'),
    (lambda: for_budget(tiny_vit(), images(), .25, step=1000), 'the nearest that can be had, for this model with step=1000'),
])
def test_bad_input_is_refused(call, said):
    with pytest.raises(VitpruneError) as e: call()
    assert said in str(e.value) and '\n' not in str(e.value)


def test_half_a_state_is_refused(tmp_path):
    (tmp_path/'s.safetensors').write_bytes(b'half')
    with pytest.raises(VitpruneError, match='a file written by a patch slimming search'): run(tmp_path/'s.safetensors')


def test_a_search_with_tuned_blocks_does_not_run_again():
    search = Search(tiny_vit(), images(), batch_size=2)
    state = search.child(search.root, 0)
    search.tune(state, 1, 3, 3e-4)
    assert search.tuned
    with pytest.raises(VitpruneError, match='one whose blocks are tuned already'): search.run(SETTINGS['eps'])


def test_a_budget_with_tuned_blocks_goes_on_after_a_kill(tmp_path, monkeypatch):
    "Stopped in the middle: the model of an undisturbed search, and no finished block is searched again."
    how, calls, real = dict(reduction=.53, tune_epochs=1, lr=3e-4, batch_size=2, calibration=4), [], Search.measure
    def counted(search, node, k):
        calls.append(node['l'])
        if len(calls) == stop: raise KeyboardInterrupt
        return real(search, node, k)
    monkeypatch.setattr(Search, 'measure', counted)
    stop, go = None, lambda work: prune('patch-slimming', tiny_vit(), images(), work=work, **how)
    whole = go(None)
    n, block = len(calls), max(len([*g]) for _, g in itertools.groupby(calls))    # the most for one block
    assert whole.info['tune_epochs'] == 1 and abs(whole.info['reduction'] - .53) < .02
    stop = at = int(.6*n)
    calls.clear()
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'work')
    calls.clear()
    stop = None
    again = go(tmp_path/'work')
    assert len(calls) <= n - at + 1 + block, (len(calls), n)
    assert again.info == whole.info and all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
