"""Whole experiments that are really killed, shared by two processes, and refused."""
import json, random, subprocess, sys

import numpy as np, pytest, torch
from conftest import ONE_THREAD, ROOT, two_processes
from PIL import Image
from vitprune_nb.cli import main
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.store import load_pruned
from vitprune_nb.evidence.results import FIELDS, read_rows
from vitprune_nb.run import run_config

pytestmark = pytest.mark.usefixtures('one_thread')
SCRIPT = str(ROOT/'tests'/'run_script.py')
CLOCK = {'date', 'note', 'commit', 'throughput'} | {f'{a}_{b}' for a in ('latency', 'throughput') for b in ('ms', 'low', 'high')}
TINY = '''
model = "deit_tiny_patch16_224"
model_args = { img_size = 32, patch_size = 8, embed_dim = 48, depth = 3, num_heads = 3 }
device = "cpu"
methods = ["uniform", "vtp", "random"]
reductions = [0.25]
calibration = 8
time_batch = 4
repeats = 2
train = { epochs = 1, batch_size = 12, augment = "light", save_every = 1, dtype = "fp32" }
recover = { epochs = 1, lr = 1e-3, batch_size = 12, save_every = 1, dtype = "fp32" }
[options.vtp]
sparse_epochs = 1
batch_size = 12
dtype = "fp32"
'''


def tree(root, test='test', classes=('cat', 'dog', 'fox'), size=32, each=12, seed=0):
    "A tiny ImageFolder tree: each class has a tint of its own, under noise."
    rng = np.random.default_rng(seed)
    for split in ('train', test):
        for k, c in enumerate(classes):
            (root/split/c).mkdir(parents=True)
            for i in range(each):
                a = rng.integers(0, 120, (size, size, 3)); a[..., k % 3] += 8
                Image.fromarray(a.astype(np.uint8)).save(root/split/c/f'{i:02}.png')
    return root


@pytest.fixture
def config(tmp_path):
    "A TOML file beside its images."
    tree(tmp_path/'images')
    file = tmp_path/'tiny.toml'
    file.write_text(f'data = "images"\n{TINY}')
    return file


def steady(rows): return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def script(*args, **kw):
    r = subprocess.run([sys.executable, *map(str, args)], env=ONE_THREAD, capture_output=True, text=True, timeout=600, **kw)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout


def check_same(out, alone, n):
    "The CSVs of two folders hold the same n rows, and those of `out` are whole."
    rows = read_rows(out/'results.csv')
    assert steady(rows) == steady(read_rows(alone/'results.csv')) and len(rows) == n
    assert len({(r['method'], r['recovery']) for r in rows}) == n, 'none doubled'
    assert not list(out.rglob('.*.tmp')) and not any((out/'work').iterdir())
    assert (out/'results_pairs.csv').read_text() == (alone/'results_pairs.csv').read_text()
    for name in ('report.md', 'accuracy_macs.png'): assert (out/name).stat().st_size > 1000, name
    for p in [*alone.rglob('*.npy'), *alone.rglob('model.safetensors')]: assert (out/p.relative_to(alone)).read_bytes() == p.read_bytes(), p.name


def test_kill_9_at_random_moments_loses_and_doubles_nothing(config, tmp_path):
    seed = random.randrange(10**6)
    said = json.loads(script(SCRIPT, config, tmp_path/'run', 6, seed).splitlines()[-1])
    assert len(said['lived']) >= 1, f'seed {seed}: {said}'
    check_same(tmp_path/'run', tmp_path/'run-alone', 7)
    assert {p.name for p in (tmp_path/'run/models').iterdir()} == {'uniform-0.25-s0', 'vtp-0.25-s0', 'random-0.25-s0'}
    assert load_pruned(tmp_path/'run/models/vtp-0.25-s0').num_classes == 3
    rows = read_rows(tmp_path/'run/results.csv')
    dense = next(r for r in rows if r['method'] == 'dense')
    for r in rows:
        assert r['images'] == 36 and r['batch'] == 4 and r['latency_ms'] > 0 and r['correct'] <= 36 and r['note']['processes'] == 1 and r['note']['dtype'] == 'fp32'
        assert r['method'] == 'dense' or abs(1 - r['macs']/dense['macs'] - .25) < .08


def test_kill_9_on_an_imagenet_tree_with_a_timm_name(tmp_path):
    "train/ and val/, synsets as class names, and a thousand-class head that is cut down to them; nothing is trained before pruning."
    tree(tmp_path/'imagenet', 'val', ('n01440764', 'n01443537', 'n01484850'), size=40, each=6)
    file = tmp_path/'imagenet.toml'
    file.write_text('''
model = "vit_tiny_patch16_224"
model_args = { img_size = 32, patch_size = 8, embed_dim = 48, depth = 3, num_heads = 3 }
weights = "weights.safetensors"
data = "imagenet"
device = "cpu"
methods = ["attention", "patch-slimming", "cosine"]
reductions = [0.25, 0.3]
calibration = 6
recover = { epochs = 1, batch_size = 6, augment = "deit", mixup = 0.8, distill = 0.5, dtype = "fp32", save_every = 1 }
''')
    from safetensors.torch import save_file
    from vitprune_nb.core import set_seed
    from vitprune_nb.vit.model import create_vit
    set_seed(0)                              # on some random networks cosine labels cannot save 30%
    model = create_vit('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    save_file(model.state_dict(), tmp_path/'weights.safetensors')
    said = json.loads(script(SCRIPT, file, tmp_path/'run', 3, random.randrange(10**6)).splitlines()[-1])
    rows = read_rows(tmp_path/'run/results.csv')
    assert steady(rows) == steady(read_rows(tmp_path/'run-alone/results.csv')) and len(rows) == 13, said
    assert {r['split'] for r in rows} == {'test'} and {r['data'] for r in rows} == {'imagenet'} and {r['images'] for r in rows} == {18}


def test_two_processes_give_the_rows_of_one(config, tmp_path):
    one = run_config(config, out=tmp_path/'one', changes=['time_batch=0'])
    file = tmp_path/'two.toml'
    file.write_text(config.read_text().replace('time_batch = 4', 'time_batch = 0'))
    two_processes(SCRIPT, file, tmp_path/'two')
    two = read_rows(tmp_path/'two/results.csv')
    assert [(r['method'], r['recovery'], r['images']) for r in two] == [(r['method'], r['recovery'], r['images']) for r in one['rows']]
    for a, b in zip(one['rows'], two):       # two halves of a batch add up in another order
        assert b['macs'] == pytest.approx(a['macs'], rel=.01) and abs(a['correct'] - b['correct']) <= 2
    assert {r['note']['processes'] for r in two} == {2}
    assert sorted(p.name for p in (tmp_path/'two').iterdir()) == sorted(p.name for p in (tmp_path/'one').iterdir())
    assert not any((tmp_path/'two/work').iterdir()), 'private folders of the second process are gone'


@pytest.fixture
def short(config):
    "The same with one method and no training."
    config.write_text('data = "images"\n' + TINY.partition('train =')[0].replace('"uniform", "vtp", "random"', '"uniform"') + '[recover]\nepochs = 0.4\nbatch_size = 12\n')
    return config


@pytest.fixture
def fair(short):
    "With equal training, and chance beside the method."
    head = 'training = 0.4\nchance = true\nchance_recovered = [0.25]\n'
    short.write_text(head + short.read_text().replace('epochs = 0.4\n', 'dtype = "fp32"\n'))
    return short


@pytest.mark.parametrize('change, words', [
    ('methods=lief', 'methods: got lief; allowed: .*attention, .* Did you mean life?'),
    ('reductions=1.0', 'reductions: got 1.0; allowed: shares in'),
    ('reductions=[]', 'reductions: got .*; allowed: a list with at least one entry'),
    ('tset_images=5', 'config: got tset_images; .* Did you mean test_images?'),
    ('recover.epoch=1', 'recover: got epoch; .* Did you mean epochs?'),
    ('recover.epochs=-1', 'epochs: got -1; allowed: a positive number'),
    ('options.uniform.ratio=0.5', 'options.uniform: got ratio'),
    ('data=nowhere', 'data: got nowhere; allowed: .* an existing folder'),
    ('weights=nowhere.pth', 'weights: got nowhere.pth; allowed: an existing checkpoint file'),
    ('dense=nowhere.pth', 'dense: got nowhere.pth; allowed: an existing checkpoint file'),
    ('recover.batch_size=37', 'batch_size: got 37; allowed: at most 36'),
    ('calibration=37', 'calibration: got 37; allowed: at most 36'),
    ('model=deit_tinny_patch16_224', 'model: got deit_tinny_patch16_224; .* Close ones: deit_tiny_patch16_224'),
    ('time_batch=37', 'time_batch: got 37; allowed: at most 36'),
    ('classes=4', 'classes: got 4; allowed: 1 to 3'),
    ('device=tpu', "device: got tpu"),
    ('results=rows.txt', 'results: got rows.txt; allowed: a file that ends in .csv'),
    ('calibration', 'set: got calibration; allowed: KEY=VALUE'),
])
def test_bad_settings_are_refused_before_anything_is_written(short, tmp_path, change, words):
    with pytest.raises(VitpruneError, match=words) as e: run_config(short, out=tmp_path/'out', changes=[change])
    assert '\n' not in str(e.value)
    assert not (tmp_path/'out').exists()


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(VitpruneError, match='config: got .*nowhere.toml; allowed: an existing TOML file'): run_config(tmp_path/'nowhere.toml')
    file = tmp_path/'bad.toml'
    for text in ('methods = [', 'a = 1\na = 2', '\0'):
        file.write_text(text)
        with pytest.raises(VitpruneError, match='config: got .*bad.toml; allowed: a TOML file'): run_config(file)
    file.write_bytes(b'name = "\xff"')
    with pytest.raises(VitpruneError, match='allowed: a TOML file'): run_config(file)


def test_a_run_is_not_continued_with_other_settings(short, tmp_path):
    out = tmp_path/'out'
    first = run_config(short, out=out)
    before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    for change, words in [('recover.epochs=0.8', 'recover.epochs was 0.4 and is 0.8'), ('test_images=12', 'test_hash was .*; test_images was 0 and is 12'),
                          ('options.uniform.keys=kept', 'options.uniform.keys was None and is kept'), ('dtype=bf16', 'dtype was fp32 and is bf16')]:
        with pytest.raises(VitpruneError, match=words): run_config(short, out=out, changes=[change])
    (short.parent/'images/test/cat/00.png').unlink()
    with pytest.raises(VitpruneError, match='test_hash was'): run_config(short, out=out)
    assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before
    with pytest.raises(VitpruneError, match='rows are of another one'): run_config(short, out=tmp_path/'new', results=first['results'])
    assert read_rows(first['results']) == first['rows'], 'left as it was'


def test_changed_code_is_refused_unless_accepted(short, tmp_path):
    run_config(short, out=tmp_path/'out')
    file = tmp_path/'out/settings.json'
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(dict(settings, code=dict(settings['code'], **{'engine.plan': '0123456789ab'}))))
    with pytest.raises(VitpruneError, match='Changed since: engine.plan. .* --accept-code'): run_config(short, out=tmp_path/'out')
    again = run_config(short, out=tmp_path/'out', accept_code=True)
    assert len(again['rows']) == 3 and json.loads(file.read_text())['before'][0]['code']['engine.plan'] == '0123456789ab'
    gone = dict(settings, code=dict(settings['code'], surgery='0123456789ab'))
    file.write_text(json.dumps(gone))
    with pytest.raises(VitpruneError, match='Changed since: surgery. '): run_config(short, out=tmp_path/'out')     # a module that is no more


def test_a_method_with_other_options_is_done_again_and_nothing_else(short, tmp_path):
    out, two = tmp_path/'out', 'methods=uniform,random'
    first = run_config(short, out=out, changes=[two])
    change = [two, 'options.uniform.keys=kept']
    with pytest.raises(VitpruneError, match='or say --redo to make the rows of uniform again'): run_config(short, out=out, changes=change)
    with pytest.raises(VitpruneError, match='Changed: dtype was'): run_config(short, out=out, changes=[*change, 'dtype=bf16'], redo=True)
    assert read_rows(first['results']) == first['rows'], 'a refusal drops nothing'
    again = run_config(short, out=out, changes=change, redo=True)
    stay = [r for r in first['rows'] if r['method'] != 'uniform']
    assert again['rows'][:len(stay)] == stay and len(again['rows']) == len(first['rows'])
    assert {r['schedule']['keys'] for r in again['rows'] if r['method'] == 'uniform'} == {'kept'}
    assert sorted(read_rows(again['results']), key=str) == sorted(again['rows'], key=str)
    assert json.loads((out/'settings.json').read_text())['before'][0]['options'] == {}
    whole = {p: p.read_bytes() for p in out.rglob('*') if p.is_file() and p.name != 'log.jsonl'}
    assert run_config(short, out=out, changes=change, redo=True)['rows'] == again['rows'], 'nothing is done twice'
    assert {p: p.read_bytes() for p in whole} == whole
    assert load_pruned(out/'models/uniform-0.25-s0').info['keys'] == 'kept', 'the old model must not stay'
    assert main(['run', str(short), '--out', str(out), '--set', two, '--set', 'options.uniform.keys=all']) == 2
    assert main(['run', str(short), '--out', str(out), '--set', two, '--set', 'options.uniform.keys=all', '--redo']) == 0
    assert load_pruned(out/'models/uniform-0.25-s0').info['keys'] == 'all'


def test_options_of_a_method_without_rows_may_change(short, tmp_path):
    out, two = tmp_path/'out', 'methods=uniform,random'
    run_config(short, out=out, changes=['options.random.keys=kept'])
    with pytest.raises(VitpruneError, match='options.uniform.keys was None and is kept.* --redo to make the rows of uniform again'):
        run_config(short, out=out, changes=[two, 'options.random.keys=all', 'options.uniform.keys=kept'])
    r = run_config(short, out=out, changes=[two, 'options.random.keys=all'])
    assert {r['schedule']['keys'] for r in r['rows'] if r['method'] == 'random'} == {'all'}
    with pytest.raises(VitpruneError, match='options.random.keys was all and is kept'):
        run_config(short, out=out, changes=[two, 'options.random.keys=kept'])


def test_a_model_that_was_finished_without_recovery_may_get_one(fair, tmp_path):
    out, at_once = tmp_path/'out', tmp_path/'at_once'
    first = run_config(fair, out=out, changes=['chance_recovered=[]'])
    model = out/'models/chance-of-uniform-0.25-s0'
    (model/'notes.txt').write_text('mine')
    plain = load_pruned(model).state_dict()
    more = run_config(fair, out=out)
    run_config(fair, out=at_once)
    new = [r for r in more['rows'] if r not in first['rows']]
    assert not more['failed'] and [(r['method'], r['recovery'] == 'none') for r in new] == [('chance of uniform', False)]
    there, wanted = load_pruned(model).state_dict(), load_pruned(at_once/'models/chance-of-uniform-0.25-s0').state_dict()
    assert all(torch.equal(there[k], wanted[k]) for k in wanted) and any(not torch.equal(there[k], plain[k]) for k in plain)
    assert (model/'notes.txt').read_text() == 'mine' and not list((out/'work').iterdir())


def test_chance_has_the_counts_of_the_row_beside_it_also_when_it_is_asked_for_later(tmp_path):
    "Recovery moves the counts of a method whose images decide; chance before recovery has those before it."
    file, out, at_once = tmp_path/'ats.toml', tmp_path/'out', tmp_path/'at_once'
    train = 'epochs = {}, lr = 5e-3, batch_size = 20, dtype = "fp32"'
    file.write_text(TINY.partition('methods')[0].replace('patch_size = 8', 'patch_size = 4') + f"""methods = ["ats"]
reductions = [0.3]
calibration = 8
train_images = 100
test_images = 20
train = {{ {train.format(1)} }}
recover = {{ {train.format(4)} }}
""")
    before, after = (r['macs'] for r in run_config(file, out=out)['rows'] if r['method'] == 'ats')
    assert before != after
    chance = lambda r: next(r['macs'] for r in r['rows'] if r['method'] == 'chance of ats')
    assert chance(run_config(file, out=out, changes=['chance=true'])) == chance(run_config(file, out=at_once, changes=['chance=true']))


def test_an_experiment_may_grow(short, tmp_path):
    first = run_config(short, out=tmp_path/'out')
    more = run_config(short, out=tmp_path/'out', changes=['methods=uniform,random', 'reductions=0.25,0.3'])
    assert more['rows'][:3] == first['rows'] and len(more['rows']) == 9 and read_rows(more['results']) == more['rows']


def test_a_method_that_fails_is_named_and_the_others_go_on(short, tmp_path):
    r = run_config(short, out=tmp_path/'out', changes=['reductions=0.25,0.97'])
    assert list(r['failed']) == ['uniform 97%'] and 'reduction: got 0.97' in r['failed']['uniform 97%'] and len(r['rows']) == 3
    events = [json.loads(l) for l in (tmp_path/'out/log.jsonl').read_text().splitlines()]
    assert [(e['unit'], e['why']) for e in events if e['event'] == 'failed'] == [('uniform-0.97-s0', r['failed']['uniform 97%'])]


def test_the_dense_model_can_be_given(config, tmp_path):
    "The dense model of one run as the start of another: nothing is trained, and its accuracy is the same."
    first = run_config(config, out=tmp_path/'first', changes=['methods=uniform', 'time_batch=0'])
    again = run_config(config, out=tmp_path/'again', changes=['methods=random', 'time_batch=0', f'dense={tmp_path/"first/dense.safetensors"}'])
    assert again['rows'][0]['correct'] == first['rows'][0]['correct'] and again['rows'][0]['weights'].startswith('dense.safetensors')
    assert not (tmp_path/'again/dense').exists()


def test_a_dry_run_writes_nothing(short, tmp_path, capsys):
    r = run_config(short, out=tmp_path/'out', dry_run=True)
    shown = capsys.readouterr().out
    assert not (tmp_path/'out').exists() and r['plan'] in shown and 'uniform 25%' in shown and '3 rows, about' in shown
    assert f'{r["macs"]/1e9:.3f}' in shown and f'{.75*r["macs"]/1e9:.3f}' in shown


def test_rows_have_the_columns_of_the_course(short, tmp_path):
    r = run_config(short, out=tmp_path/'out', results=tmp_path/'rows/mine.csv')
    columns = (tmp_path/'rows/mine.csv').read_text().splitlines()[0].split(',')
    own = [c for c in columns if '.' in c]
    assert [c for c in columns if c not in own] == list(FIELDS) and {'note.target', 'schedule.options.reduction'} <= set(own)
    assert {c.split('.')[0] for c in own} == {'schedule', 'note'} and (tmp_path/'rows/mine_pairs.csv').is_file()
    for row in r['rows']: assert row['backbone'] == 'deit_tiny_patch16_224' and 'sha256' in row['weights'] and row['data_hash']


def test_the_command(short, tmp_path, capsys):
    "Exit codes: 0 when all is done, 1 when a method failed, 2 and one line for bad input."
    from vitprune_nb import cli
    words = ['run', str(short), '--out', str(tmp_path/'out')]
    assert cli.main([*words, '--dry-run']) == 0 and not (tmp_path/'out').exists()
    assert cli.main([*words, '--json']) == 0
    out = capsys.readouterr().out
    assert len(json.loads(out.splitlines()[-1])['rows']) == 3 and 'top-1' in out
    assert cli.main([*words, '--set', 'reductions=0.25,0.97']) == 1
    assert 'vitprune: uniform 97% failed: reduction: got 0.97' in capsys.readouterr().err
    for bad, words_of in [(['--set', 'dtype=bf16'], 'dtype was fp32 and is bf16'), (['--device', 'tpu'], 'device: got tpu'), (['--results', 'x.txt'], 'results: got x.txt'),
                          (['--data', 'nowhere'], 'data: got nowhere'), (['--weights', 'nowhere.pth'], 'weights: got nowhere.pth')]:
        assert cli.main([*words, *bad]) == 2
        err = capsys.readouterr().err
        assert words_of in err and err.count('\n') == 1
