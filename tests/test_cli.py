"""The command line: each command, its JSON, the effect of every option, and what bad input costs."""
import html, json, os, re, shutil, signal, subprocess, time

import pytest, torch
from vitprune_nb.data import SETS
from vitprune_nb import cli, data
from vitprune_nb.engine.store import open_model
from vitprune_nb.files import sha256
from vitprune_nb.methods import cosine
from vitprune_nb.vit import model as vit

COMMANDS = 'demo train eval cost prune bench run'.split()


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    "A folder with a tiny checkpoint (two seeds), a pruned model made from it, and 40 images as an ImageFolder tree."
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp('shop')
    for seed in (0, 1):
        torch.manual_seed(seed)
        m = vit.create_vit('test_vit', num_classes=10, img_size=32, patch_size=4)   # 64 patches, 6 blocks
        m.head.weight.data.normal_(std=.5)
        save_file(m.state_dict(), folder/f'w{seed}.safetensors')
    m.blocks[2].mlp.fc1.weight.data[0, 0] = float('nan')
    save_file(m.state_dict(), folder/'nan.safetensors')
    for v in (m.blocks[2].mlp.fc1.weight, m.patch_embed.proj.weight, m.pos_embed): v.data.zero_()      # no patch differs from another
    save_file(m.state_dict(), folder/'flat.safetensors')
    seen = cosine.collect(open_model('test_vit', folder/'w0.safetensors'), data.calibration(data.embedded('train'), 16))
    (folder/'labels').write_text(f'{seen.threshold_for(.4)} {seen.threshold_for(.7)}')
    for split, n in (('train', 3), ('test', 1)):
        ds = data.embedded(split)
        for i in [int(j) for k in range(10) for j in (ds.targets == k).nonzero()[0][:n]]:
            p = folder/'tree'/split/ds.classes[ds.targets[i]]/f'{i}.png'
            p.parent.mkdir(parents=True, exist_ok=True)
            ds.image(i).save(p)
    for name, how in (('pruned', '--method uniform --calibration 8'), ('cut', '--method vtp --sparse-epochs 0')):
        assert cli.main(['prune', 'test_vit', '--weights', f'{folder}/w0.safetensors', *how.split(), '--out', f'{folder}/{name}']) == 0
    shutil.copytree(folder/'cut', folder/'broken')
    (folder/'broken/model.safetensors').write_bytes(b'no weights')
    return folder


def labelled(line, shop):
    "A command line with cosine thresholds at which this model has labels of both kinds."
    label, other = (shop/'labels').read_text().split()
    return line.replace('LABEL', label).replace('OTHER', other)


@pytest.fixture
def ask(shop, capsys):
    "Runs a command line in this process; T stands for the tiny model. ask('cost T') -> the JSON object."
    def run(line, **places):
        tiny = f'test_vit --weights {shop}/w0.safetensors'
        words = labelled(line.replace(' T', f' {tiny}').format(shop=shop, **places), shop).split()
        code = cli.main([*words, '--json'])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1])
    return run


def check_record(r):
    "The shared keys mean the same everywhere."
    assert isinstance(r['macs'], int) and isinstance(r['params'], int) and 0 <= r['reduction'] < 1
    if 'top1' in r: assert 0 <= r['top1_low'] <= r['top1'] <= r['top1_high'] <= 1
    if 'throughput' in r: assert r['throughput'] == pytest.approx(1e3*r['batch']/r['latency_ms'])


def test_cost(ask):
    r = ask('cost')
    check_record(r)
    assert r['model'] == 'course' and r['reduction'] == 0 and 1.3e9 < r['macs'] < 1.5e9 and 21e6 < r['params'] < 22e6
    assert ask('cost deit_small_patch16_224')['macs'] == pytest.approx(4.6e9, rel=.01)


def test_eval(ask):
    r = ask('eval T --limit 20')
    check_record(r)
    assert {'model', 'data', 'images', 'top1', 'batch', 'device'} <= r.keys() and (r['data'], r['images']) == ('embedded', 20)


def test_eval_of_the_course_model(vitprune):
    "Through the console script, in a process of its own: results on standard output, nothing else there."
    r = vitprune('eval', '--limit', '30', '--json', '--device', 'cpu')
    assert r.returncode == 0, r.stderr
    first, second, last = r.stdout.splitlines()
    record = json.loads(last)
    check_record(record)
    assert first.startswith('course on embedded test: top-1 ') and record['images'] == 30 and record['device'] == 'cpu'
    assert record['top1'] > .5


def test_bench(ask):
    r = ask('bench {shop}/pruned --batch 4 --repeats 2 --warmup 1')
    check_record(r)
    assert r['speed_up'] > 0 and r['reduction'] == pytest.approx(.45, abs=.02)


def test_prune_writes_a_model_that_the_others_read(ask, tmp_path):
    r = ask('prune T --out {out} --calibration 8', out=tmp_path/'p')
    check_record(r)
    assert r['reduction'] == pytest.approx(.45, abs=.03) and sorted(p.name for p in (tmp_path/'p').iterdir()) == ['config.json', 'model.safetensors', 'plan.json']
    assert ask('cost {out}', out=tmp_path/'p')['macs'] == r['macs']
    assert ask('eval {out} --limit 10', out=tmp_path/'p')['macs'] == r['macs']


SHORT = {'vtp': '--sparse-epochs 1 --batch 10', 'life': '--predictor-epochs 1 --backbone-epochs 1 --batch 10', 'cosine': '--calibration 8', 'attention': '--calibration 8'}
DIALS = {'vtp': '--ratio 0.4 --l1 1e-4', 'life': '--keep-rate 0.7 --stages 2,4', 'cosine': '--cosine-threshold LABEL --score-threshold 0.5', 'attention': '--reduction 0.4'}

@pytest.mark.parametrize('method', DIALS)
def test_methods_by_their_own_dial(vitprune, ask, shop, tmp_path, method):
    "Each new method in a process of its own; every command reads what it wrote."
    out = tmp_path/'p'
    r = vitprune('prune', 'test_vit', '--weights', shop/'w0.safetensors', '--data', shop/'tree', '--method', method, *labelled(DIALS[method], shop).split(), *SHORT[method].split(),
                 '--out', out, '--json', '--device', 'cpu')
    assert (r.returncode, r.stderr.rpartition('\r')[2]) == (0, '')
    record = json.loads(r.stdout.splitlines()[-1])
    check_record(record)
    assert record['method'] == method and sorted(p.name for p in tmp_path.iterdir()) == ['p']
    dial = {'vtp': ('ratio', .4), 'life': ('keep_rate', .7), 'cosine': ('score_threshold', .5)}.get(method)
    assert dial is None or record[dial[0]] == dial[1]
    assert method == 'cosine' or .15 < record['reduction'] < .6
    assert ask('cost {out}', out=out)['macs'] == record['macs']
    read = ask('eval {out} --limit 10 --data {shop}/tree', out=out)
    assert read['params'] == record['params'] and (method == 'cosine' or read['macs'] == record['macs'])
    assert ask('bench {out} --batch 2 --repeats 2 --warmup 1', out=out)['speed_up'] > 0


@pytest.mark.parametrize('method', DIALS)
def test_methods_at_one_budget(ask, tmp_path, method):
    r = ask(f'prune T --method {method} --reduction 0.3 --data {{shop}}/tree {SHORT[method]} --out {{out}}', out=tmp_path/'p')
    assert r['reduction'] == pytest.approx(.3, abs=.02) and r['macs'] == ask('cost {out}', out=tmp_path/'p')['macs']


def test_two_methods_in_a_row(ask, shop, tmp_path):
    "Patches of a model whose channels are cut: the reductions multiply."
    both = ask('prune {shop}/cut --method uniform --calibration 8 --reduction 0.3 --out {out}', out=tmp_path/'p')
    cut = ask('cost {shop}/cut')
    assert 1 - both['macs']/cut['macs'] == pytest.approx(.3, abs=.03) and both['reduction'] > cut['reduction']
    check_record(ask('eval {out} --limit 10', out=tmp_path/'p'))


def test_demo(vitprune, tmp_path, monkeypatch):
    "The whole thing, with few images; a report that needs nothing but itself."
    r = vitprune('demo', '--out', tmp_path/'demo', '--images', '20', '--calibration', '4', '--repeats', '1', '--batch', '10', '--json', timeout=500)
    assert r.returncode == 0, r.stderr
    record = json.loads(r.stdout.splitlines()[-1])
    check_record({k: v for k, v in record.items() if k != 'throughput'})
    assert [x['method'] for x in record['rows']] == ['dense', 'patch_slimming', 'uniform', 'random']
    assert sorted(p.name for p in (tmp_path/'demo').glob('[!.]*')) == ['accuracy_macs.png', 'kept.png', 'model', 'report.html', 'results.csv']
    page = (tmp_path/'demo/report.html').read_text()
    assert page.count('src="data:image/png;base64,') == 3 and not re.search(r'(src|href)="(?!data:)', page)
    monkeypatch.chdir(tmp_path)
    exec('\n'.join(re.findall('^>>> (.*?)(?:</pre>)?$', html.unescape(page), re.M)), given := {})     # what the page tells a reader to type
    assert given['model'].num_classes == 10 and 'vitprune eval demo/model' in page
    table = [l for l in r.stdout.splitlines() if l.startswith(('dense ', 'patch slimming ', 'uniform ', 'random '))]
    assert len(table) == 4
    assert record['model'] == str(tmp_path/'demo/model')


def test_train(ask, tmp_path):
    "A real run, five steps long, from random weights of the right shape."
    from safetensors.torch import save_file
    save_file(vit.create_vit('vit_small_patch14_dinov2', img_size=112).state_dict(), tmp_path/'w.safetensors')
    r = ask('train --weights {w} --data {shop}/tree --epochs 1 --batch 6 --limit 10 --out {out} --device cpu', w=tmp_path/'w.safetensors', out=tmp_path/'run')
    assert 0 <= r['top1_low'] <= r['top1'] <= r['top1_high'] <= 1 and (r['images'], r['batch']) == (10, 6)
    assert (tmp_path/'run/model/log.csv').is_file() and (tmp_path/'run/model/course.json').is_file()


# --- every option changes something

BASE_PRUNE = 'prune T --method random --calibration 8 --data {shop}/tree --reduction 0.4 --out {out}'

@pytest.mark.parametrize('base, option, key', [
    ('cost test_vit', '--weights {shop}/w0.safetensors', 'macs'),
    ('eval T --limit 20', '--data {shop}/tree', 'data'),
    ('eval T', '--limit 20', 'images'),
    ('eval test_vit --limit 30 --weights {shop}/w0.safetensors', '--weights {shop}/w1.safetensors', 'correct'),
    ('bench T --repeats 1 --warmup 1 --batch 2', '--batch 3', 'batch'),
    ('bench T --repeats 1 --warmup 1 --batch 2', '--repeats 2', 'repeats'),
    ('bench T --repeats 1 --warmup 1 --batch 2', '--dtype bf16', 'dtype'),
])
def test_option_changes_the_outcome(ask, base, option, key):
    assert ask(base)[key] != ask(f'{base} {option}')[key]


@pytest.mark.parametrize('option', ['--reduction 0.6', '--seed 1', '--keys all', '--method uniform', '--calibration 4 --method uniform', '--data embedded --method uniform',
                                    '--weights {shop}/w1.safetensors --method patch-slimming'])
def test_prune_option_changes_the_policy(ask, tmp_path, option):
    method = re.findall(r'--method \S+', option)
    base = BASE_PRUNE if not method or option.startswith('--method') else BASE_PRUNE.replace('--method random', method[0])
    policy = lambda name: json.loads((tmp_path/name/'config.json').read_text())['policy']
    ask(base, out=tmp_path/'a'), ask(f'{base} {option}', out=tmp_path/'b')
    assert policy('a') != policy('b')


OPTIONS = {'vtp': ('--ratio 0.3', ['--ratio 0.4', '--reduction 0.4', '--l1 10', '--gate-start 0.01', '--rule gate', '--multiple 8', '--whole-heads', '--sparse-epochs 2', '--lr 0.01', '--batch 6', '--seed 1']),
           'life': ('--keep-rate 0.7', ['--keep-rate 0.5', '--keep-rate 0.9,0.8,0.7', '--reduction 0.2', '--stages 3,5', '--t-base 1', '--U 3', '--predictor-epochs 2',
                                        '--backbone-epochs 2', '--lr 0.01', '--batch 15', '--seed 1']),
           'cosine': ('--cosine-threshold LABEL --score-threshold 0.5', ['--cosine-threshold OTHER', '--score-threshold 0.6', '--reduction 0.2', '--keys kept', '--rounds 1',
                                                                        '--calibration 9', '--seed 1']),
           'attention': ('', ['--reduction 0.3', '--keys all', '--calibration 9', '--method uniform'])}

def content(folder):
    "What a pruned model is, without what is remembered of its making."
    config = json.loads((folder/'config.json').read_text())
    return [config.get(k) for k in ('policy', 'shapes')], sha256(folder/'model.safetensors')

@pytest.mark.parametrize('method', OPTIONS)
def test_options_of_a_method_change_the_model(ask, tmp_path, method):
    "Each of them does; a run without any is repeated to the bit."
    dial, options = OPTIONS[method]
    def make(name, more):       # of an option given twice, the second counts
        ask(f'prune T --method {method} --data {{shop}}/tree {SHORT[method]} {"" if "--reduction" in more else dial} {more} --out {{out}}', out=tmp_path/name)
        return content(tmp_path/name)
    first = make('base', '')
    assert make('again', '') == first
    for i, more in enumerate(options): assert make(str(i), more) != first, more


def test_prune_eps(ask, tmp_path):
    base = 'prune T --calibration 8 --out {out} --eps'
    loose, tight = ask(f'{base} 0.5', out=tmp_path/'a'), ask(f'{base} 0.0001', out=tmp_path/'b')
    assert loose['macs'] < tight['macs']


@pytest.mark.parametrize('option', ['--keys kept', '--step 9', '--step 0.5', '--tune-epochs 30', '--calibration 9', '--seed 3'])
def test_prune_eps_option_changes_the_model(ask, tmp_path, option):
    "Each of them moves a patch of the plan or, for block tuning, the weights as well."
    from safetensors.torch import load_file
    base = 'prune T --eps 0.05 --calibration 8 --data {shop}/tree --out {out}'
    ask(base, out=tmp_path/'a'), ask(f'{base} {option}', out=tmp_path/'b')
    plan = lambda n: [json.loads((tmp_path/n/'plan.json').read_text())[k] for k in ('keep', 'info')]
    weights = lambda n: load_file(tmp_path/n/'model.safetensors')
    assert plan('a')[1] != plan('b')[1]
    same = all(torch.equal(v, weights('b')[k]) for k, v in weights('a').items())
    assert same == ('tune' not in option)


def test_prune_recover_trains_the_pruned_model(ask, tmp_path):
    from safetensors.torch import load_file
    base = 'prune T --method uniform --calibration 4 --data {shop}/tree --out {out} --recover'
    weights = {}
    for name, more in (('a', '0'), ('b', '2'), ('c', '2 --recover-lr 0.01')):
        r = ask(f'{base} {more}', out=tmp_path/name)
        assert r['recover'] == float(more.split()[0])
        weights[name] = load_file(tmp_path/name/'model.safetensors')
    differ = lambda a, b: any(not torch.equal(v, weights[b][k]) for k, v in weights[a].items())
    assert differ('a', 'b') and differ('b', 'c')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b', 'c']


LONG = {'search and recovery': ('--calibration 8 --eps 0.05 --tune-epochs 30 --recover 120 --recover-lr 0.001', ('search.safetensors', 'recover/checkpoint.pt'), ('0.05', '0.04')),
        'vtp': ('--method vtp --ratio 0.3 --sparse-epochs 40 --batch 10', ('prepared/checkpoint.pt',), ('40', '41')),
        'life': ('--method life --keep-rate 0.7 --predictor-epochs 1 --backbone-epochs 40 --batch 10', ('backbone/checkpoint.pt',), ('0.7', '0.6'))}

@pytest.mark.parametrize('case', LONG)
def test_pipeline_survives_kill_9(shop, tmp_path, case):
    "Killed in each of its long parts, then left alone: the model of an undisturbed run, and no traces."
    from conftest import BIN, clean_env
    options, signs, change = LONG[case]
    line = f'prune test_vit --weights {shop}/w0.safetensors --data {shop}/tree {options} --device cpu --out'
    start = lambda out: subprocess.Popen([BIN/'vitprune', *line.split(), str(out)], env=clean_env(OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, work = tmp_path/'p', tmp_path/'p.unfinished'
    for sign in signs:
        proc, end = start(out), time.time() + 300
        while not (work/sign).exists() and proc.poll() is None and time.time() < end: time.sleep(.01)
        assert proc.poll() is None, proc.communicate()[1]
        os.kill(proc.pid, signal.SIGKILL)
        proc.communicate()
        assert not out.exists() and (work/sign).is_file()
    assert cli.main([*line.replace(*change).split(), str(out)]) == 2          # other options: one line, and nothing is touched
    assert (work/signs[-1]).is_file() and not out.exists()
    for folder in (out, tmp_path/'whole'):
        proc = start(folder)
        assert proc.wait(timeout=300) == 0, proc.communicate()[1]
        proc.communicate()
    assert content(out) == content(tmp_path/'whole')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['p', 'whole']


def test_an_image_that_cannot_be_read_this_time_costs_no_training(shop, tmp_path, monkeypatch, capsys):
    "An error of the network drive after the first checkpoint, twice: what was trained stays, and the same command line ends it."
    import errno
    from vitprune_nb.methods.base import Job
    out, state = tmp_path/'p', tmp_path/'p.unfinished/finetune/checkpoint.pt'
    line = f'prune test_vit --weights {shop}/w0.safetensors --data {shop}/tree --method evit --keep-rate 0.7 --finetune-epochs 1 --batch 10 --device cpu --out {out}'
    real, usual = data.Image.open, Job.settings
    monkeypatch.setattr(Job, 'settings', lambda self, size: usual(self, size) | dict(save_every=1))
    def stale(*args, **kw):
        if state.is_file(): raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*args, **kw)
    monkeypatch.setattr(data.Image, 'open', stale)
    for _ in range(2):
        assert cli.main(line.split()) == 2 and os.strerror(errno.ESTALE) in capsys.readouterr().err
        assert state.is_file() and not out.exists()
    monkeypatch.undo()
    assert cli.main(line.split()) == 0 and [p.name for p in tmp_path.iterdir()] == ['p']


@pytest.mark.parametrize('budget', ['', '--reduction 0.45'])
def test_a_budget_that_is_refused_is_in_nobodys_way(shop, tmp_path, capsys, budget):
    "Asked for or the default: the next budget meets a free name."
    line = f'prune test_vit --weights {shop}/w0.safetensors --data {shop}/tree --method life --stages 5 --predictor-epochs 1 --backbone-epochs 0 --batch 10 --device cpu --out {tmp_path}/p'
    assert cli.main([*line.split(), *budget.split()]) == 2
    err = capsys.readouterr().err
    assert 'reduction: got 0.45; allowed: at most 0.' in err and ('is the default of life' in err) == (not budget)
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*line.split(), '--reduction', '0.1']) == 0


@pytest.fixture(scope='module')
def strange(shop, tmp_path_factory):
    "The images of the shop in folders of other names."
    folder = tmp_path_factory.mktemp('strange')/'tree'
    shutil.copytree(shop/'tree', folder)
    for split in ('train', 'test'):
        for place in list((folder/split).iterdir()): place.rename(place.with_name(f'my {place.name}'))
    return folder


def test_images_of_other_classes_will_do_where_no_labels_are_read(ask, strange, tmp_path, capsys):
    "What is remembered are the classes of the model."
    out = tmp_path/'p'
    r = ask('prune course --method uniform --reduction 0.3 --calibration 2 --data {data} --out {out}', data=strange, out=out)
    assert r['reduction'] == pytest.approx(.3, abs=.03) and open_model(str(out)).classes == data.CIFAR10
    assert ask('eval {out} --limit 10', out=out)['images'] == 10
    for more in ('--method vtp --sparse-epochs 1', '--method uniform --recover 1'):
        assert cli.main(f'prune course {more} --data {strange} --out {tmp_path}/o'.split()) == 2
        err = capsys.readouterr().err.rpartition('\r')[2]
        assert 'with the class my airplane' in err and 'allowed: the classes that the model tells apart' in err and err.endswith('Rename the folders.\n')
    assert [p.name for p in tmp_path.iterdir()] == ['p']


def test_prune_force(ask, tmp_path, capsys):
    out = tmp_path/'p'
    ask('prune T --method uniform --calibration 4 --out {out}', out=out)
    assert cli.main(['prune', '--out', str(out)]) == 2 and '--force' in capsys.readouterr().err
    assert ask('prune T --method uniform --calibration 4 --reduction 0.6 --force --out {out}', out=out)['reduction'] > .55
    (out/'notes.txt').write_text('mine')
    assert cli.main(['prune', '--out', str(out), '--force']) == 2 and (out/'notes.txt').exists()


def test_by_and_json_change_what_is_printed(capsys):
    outputs = set()
    for words in (['cost'], ['cost', '--by', 'block'], ['cost', '--json']):
        assert cli.main(words) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 3


class Reached(Exception):
    "Ends a command at the moment its work would begin, and carries what it was called with."


def reached(monkeypatch, target, line):
    "The arguments with which a command line calls a library function, by name."
    import importlib, inspect
    module, name = target.rsplit('.', 1)
    module = importlib.import_module(module)
    signature = inspect.signature(getattr(module, name))
    def stop(*a, **kw):
        bound = signature.bind(*a, **kw)
        bound.apply_defaults()
        raise Reached({k: str(v) for k, v in bound.arguments.items()})
    monkeypatch.setattr(module, name, stop)
    with pytest.raises(Reached) as e: cli.main(line.split())
    return e.value.args[0]


@pytest.mark.parametrize('target, line, option, name', [
    ('vitprune_nb.vit.model.evaluate', 'eval --limit 5 --device cpu', '--batch 7', 'batch_size'),
    ('vitprune_nb.vit.model.evaluate', 'eval --limit 5 --device cpu', '--dtype bf16', 'dtype'),
    ('vitprune_nb.evidence.measure.bench', 'bench --batch 2', '--warmup 5', 'warmup'),
    ('vitprune_nb.evidence.measure.bench', 'bench --batch 2', '--data {tree}', 'x'),
    *(('vitprune_nb.demo.run_demo', 'demo', o, n) for o, n in [('--out x', 'out'), ('--data x', 'data'), ('--reduction 0.3', 'reduction'), ('--images 9', 'images'),
        ('--calibration 9', 'calibration_images'), ('--repeats 9', 'repeats'), ('--batch 9', 'batch'), ('--seed 9', 'seed'), ('--device auto', 'device')]),
    *(('vitprune_nb.train.course.train_course', 'train --weights a', o, n) for o, n in [('--weights b', 'weights'), ('--data b', 'data'), ('--out b', 'out'), ('--limit 9', 'test_limit'),
        ('--epochs 9', 'recipe'), ('--lr 9', 'recipe'), ('--batch 9', 'recipe'), ('--seed 9', 'recipe'), ('--dtype fp32', 'recipe'), ('--device cpu', 'device')]),
])
def test_option_reaches_the_library(monkeypatch, shop, target, line, option, name):
    with monkeypatch.context() as m: before = reached(m, target, line)
    with monkeypatch.context() as m: after = reached(m, target, f'{line} {option.format(tree=shop/"tree")}')
    assert before[name] != after[name] and [k for k in before if before[k] != after[k]] == [name]


@pytest.mark.parametrize('command', ['eval', 'bench', 'prune --out {out}', 'demo --out {out}', 'train --weights {w} --data embedded'])
def test_device_is_not_ignored(command, tmp_path, shop, capsys):
    assert cli.main([*command.format(out=tmp_path/'o', w=shop/'w0.safetensors').split(), '--device', 'tpu']) == 2
    assert 'device: got tpu' in capsys.readouterr().err and not (tmp_path/'o').exists()


def test_data_of_the_environment(ask, shop, monkeypatch):
    monkeypatch.setenv('VITPRUNE_DATA', str(shop/'tree'))
    assert ask('eval T')['data'] == 'tree'
    assert ask('eval T --data embedded --limit 10')['data'] == 'embedded'


# --- bad input: one line, exit code 2, no traceback, nothing left behind

BAD = {
    'no such command': ('prun', "No such command 'prun'"),
    'no such option': ('eval --fast', 'No such option'),
    'not a number': ('eval --limit many', "Invalid value for '--limit'"),
    'missing option': ('prune', "Missing option '--out'"),
    'too many words': ('cost a b', 'unexpected extra argument'),
    'no such model': ('cost deit_huge', 'model: got deit_huge; allowed: a name from timm.list_models'),
    'no such folder': ('eval {tmp}/model', "/model; allowed: 'course', a timm name, or an existing folder"),
    'folder without a model': ('eval {tmp}', 'a pruned model, with config.json in it'),
    'Swin': ('prune swin_tiny_patch4_window7_224 --out {tmp}/o', 'SwinTransformer'),
    'no such checkpoint': ('eval --weights {tmp}/w.pth', 'w.pth; allowed: an existing checkpoint file'),
    'checkpoint of another model': ('cost deit_tiny_patch16_224 --weights {shop}/w0.safetensors', 'a checkpoint with the shapes of this VisionTransformer'),
    'checkpoint that is none': ('cost --weights {tmp}/text.pth', 'It is a text file'),
    'no such data': ('eval --data {tmp}/images', "allowed: 'embedded', 'cifar10', 'cifar100' or an existing folder"),
    'data without a split': ('eval --data {tmp}', 'allowed: a folder that holds val/ or test/'),
    'classes that do not fit': ('eval deit_tiny_patch16_224 --limit 5', 'images of the 1000 classes'),
    'no images': ('eval --limit 0', 'limit: got 0'),
    'batch of none': ('bench --batch 0', 'batch: got 0'),
    'unknown dtype': ('eval --limit 5 --dtype int3', "dtype: got int3; allowed: 'auto', 'fp32' or 'bf16'"),
    'unknown method': ('prune --method magic --out {tmp}/o', 'method: got magic; allowed: '),
    'reduction of everything': ('prune --reduction 1 --out {tmp}/o', 'reduction: got 1.0; allowed: a share in (0, 1)'),
    'two budgets': ('prune --reduction 0.4 --eps 0.1 --out {tmp}/o', 'eps: got 0.1; allowed: either reduction or eps'),
    'tolerated error of zero': ('prune test_vit --eps 0 --out {tmp}/o', 'eps: got 0.0; allowed: a positive relative error'),
    'negative error': ('prune test_vit --eps -0.1 --out {tmp}/o', 'eps: got -0.1'),
    'error that no block can meet': ('prune test_vit --weights {shop}/w0.safetensors --data {shop}/tree --calibration 2 --eps 1e-30 --out {tmp}/o', 'even with all its 64 patches'),
    'no calibration images': ('prune --eps 0.1 --calibration 0 --out {tmp}/o', 'calibration: got 0; allowed: a whole number, 1 or more'),
    'step of no patches': ('prune test_vit --eps 0.1 --step 0 --out {tmp}/o', 'step: got 0'),
    'negative tuning': ('prune --eps 0.1 --tune-epochs -1 --out {tmp}/o', 'tune_epochs: got -1'),
    'negative recovery': ('prune --recover -1 --out {tmp}/o', 'recover: got -1.0'),
    "option of another method": ('prune --method uniform --step 3 --out {tmp}/o', 'step: got 3.0; allowed: nothing for uniform, which does not read it. It reads'),
    'VTP with a threshold of cosine': ('prune --method vtp --score-threshold 0.5 --out {tmp}/o', 'allowed: nothing for vtp, which does not read it'),
    'more calibration images than there are': ('prune T --method attention --calibration 1000 --data {shop}/tree --out {tmp}/o', 'calibration: got 1000; allowed: 1 to 30'),
    'two dials': ('prune --method vtp --ratio 0.3 --reduction 0.4 --out {tmp}/o', 'ratio: got 0.3; allowed: either reduction or ratio'),
    'recovery rate without recovery': ('prune --recover-lr 0.1 --out {tmp}/o', 'recover-lr: got 0.1; allowed: nothing without --recover'),
    'training on other classes': ('prune test_vit --method vtp --out {tmp}/o', 'images of the 1000 classes'),
    'all channels': ('prune --method vtp --ratio 1 --out {tmp}/o', 'ratio: got 1.0; allowed: a share in [0, 1)'),
    'a ratio that empties a layer': ('prune T --method vtp --ratio 0.999 --data {shop}/tree --out {tmp}/o', 'ratio: got 0.999; allowed: at most 0.9'),
    'negative penalty': ('prune --method vtp --l1 -1 --out {tmp}/o', 'l1: got -1.0; allowed: a number, 0 or more'),
    'unknown rule': ('prune --method vtp --rule best --out {tmp}/o', "rule: got best; allowed: 'folded'"),
    'channels cut twice': ('prune {shop}/cut --method vtp --out {tmp}/o', 'model: got one whose channels are cut already'),
    'gates that start at nothing': ('prune --method vtp --gate-start 0 --out {tmp}/o', 'gate_start: got 0.0'),
    'negative epochs': ('prune --method vtp --sparse-epochs -1 --out {tmp}/o', 'sparse_epochs: got -1.0'),
    'learning rate of zero': ('prune --method vtp --lr 0 --out {tmp}/o', 'lr: got 0.0; allowed: a number above 0'),
    'a rate that diverges': ('prune T --method vtp --lr 1e30 --sparse-epochs 2 --batch 10 --data {shop}/tree --out {tmp}/o', 'training stopped at step'),
    'no patch kept': ('prune --method life --keep-rate 0 --out {tmp}/o', 'keep_rate: got 0.0; allowed: a number in (0, 1]'),
    'a schedule that rises': ('prune --method life --keep-rate 0.5,1.5 --out {tmp}/o', 'keep_rate: got [0.5, 1.5]; allowed: a number in (0, 1]'),
    'rates for other stages': ('prune T --method life --keep-rate 0.9,0.8 --stages 1,2,3 --data {shop}/tree --out {tmp}/o', 'keep_rate: got [0.9, 0.8]; allowed: one number, or 3'),
    'stages that fall': ('prune T --method life --stages 4,2 --data {shop}/tree --out {tmp}/o', 'stages: got [4, 2]; allowed: rising block numbers'),
    'a stage behind the model': ('prune T --method life --stages 4,6 --data {shop}/tree --out {tmp}/o', 'stages: got [4, 6]; allowed: rising block numbers from 1 to 5'),
    'a stage before t_base': ('prune T --method life --stages 2,4 --t-base 3 --data {shop}/tree --out {tmp}/o', 'a removal after block 2, before t_base = 3'),
    'stages that are no numbers': ('prune --method life --stages 4;7 --out {tmp}/o', 'stages: got 4;7; allowed: a number, or several'),
    'constant scores': ('prune test_vit --weights {shop}/flat.safetensors --method life --predictor-epochs 1 --batch 10 --data {shop}/tree --out {tmp}/o', 'the same score for every patch'),
    'no steepness': ('prune --method life --U 0 --out {tmp}/o', 'U: got 0.0; allowed: a number above 0'),
    'a budget out of reach': ('prune T --method life --reduction 0.95 --data {shop}/tree --out {tmp}/o', 'reduction: got 0.95; allowed: at most 0.'),
    'cosine of 1': ('prune --method cosine --cosine-threshold 1 --out {tmp}/o', 'cosine_threshold: got 1.0; allowed: a number in (0, 1)'),
    'score of 0': ('prune --method cosine --score-threshold 0 --out {tmp}/o', 'score_threshold: got 0.0; allowed: a number in (0, 1)'),
    'one class of labels': ('prune T --method cosine --cosine-threshold 0.00001 --score-threshold 0.5 --calibration 4 --out {tmp}/o', 'one that leaves both labels in some block'),
    'half a round': ('prune --method cosine --rounds 0.5 --out {tmp}/o', "Invalid value for '--rounds'"),
    'negative rounds': ('prune --method cosine --rounds -1 --out {tmp}/o', 'rounds: got -1'),
    'keys that cosine has not': ('prune T --method cosine --keys entering --calibration 4 --out {tmp}/o', "keys: got entering; allowed: 'all' or 'kept'"),
    'damaged cut model': ('eval {shop}/broken', 'weights that fit its config.json'),
    'NaN in the weights': ('prune test_vit --weights {shop}/nan.safetensors --data {shop}/tree --calibration 2 --eps 0.1 --out {tmp}/o', 'NaN or infinite tokens; allowed: finite weights'),
    'recovery on other classes': ('prune test_vit --eps 0.1 --recover 1 --out {tmp}/o', 'images of the 1000 classes'),
    'unknown keys': ('prune test_vit --calibration 2 --keys none --out {tmp}/o', "keys: got none; allowed: 'entering'"),
    'pruned twice': ('prune {shop}/pruned --out {tmp}/o', 'a model that is not pruned yet'),
    'folder in use': ('prune --out {tmp}', 'which is not empty; allowed: a new or empty folder'),
    'demo into a file': ('demo --out {tmp}/text.pth', 'out: got'),
    'training without a start': ('train --weights {tmp}/w.pth --data embedded', 'w.pth; allowed: an existing checkpoint file'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_costs_one_line(name, tmp_path, shop, capsys):
    line, message = BAD[name]
    (tmp_path/'text.pth').write_text('not weights')
    code = cli.main(line.replace(' T', ' test_vit --weights {shop}/w0.safetensors').format(tmp=tmp_path, shop=shop).split())
    out, err = capsys.readouterr()
    err = err.rpartition('\r')[2]   # what a progress bar wiped
    assert (code, out, err.count('\n')) == (2, '', 1) and err.startswith('vitprune: ') and message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['text.pth']


@pytest.mark.parametrize('name', ['no such option', 'no such folder', 'folder in use'])
def test_bad_input_in_a_process_of_its_own(name, vitprune, tmp_path, shop):
    line, message = BAD[name]
    (tmp_path/'text.pth').write_text('')
    r = vitprune(*line.format(tmp=tmp_path, shop=shop).split())
    assert (r.returncode, r.stdout, r.stderr.count('\n')) == (2, '', 1) and message in r.stderr and 'Traceback' not in r.stderr


def test_a_folder_that_cannot_be_written(vitprune, tmp_path, monkeypatch, capsys):
    "A failing disk is told in one line as well, and what was begun is removed."
    import safetensors.torch
    def full(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    assert cli.main(['prune', 'test_vit', '--method', 'uniform', '--calibration', '2', '--out', str(tmp_path/'o')]) == 2
    err = capsys.readouterr().err
    assert 'No space is left on the disk' in err and f'{tmp_path}/o;' in err and err.count('\n') == 1 and list(tmp_path.iterdir()) == []


# --- help

@pytest.mark.parametrize('command', COMMANDS)
def test_help_teaches(command, capsys):
    assert cli.main([command, '--help']) == 0
    out = capsys.readouterr().out
    assert 'Examples:' in out and f'  vitprune {command}' in out and '--json' in out
    options = re.findall(r'^  (--\S+)(.*)', out, re.M)
    assert len(options) >= 3 and max(map(len, out.splitlines())) <= 130


def test_help_names_every_data_set(capsys):
    "The help is written out, since data sets need torch and help must be quick."
    cli.main(['eval', '--help'])
    said = capsys.readouterr().out
    assert all(repr(name) in said for name in SETS)


def test_help_of_an_option_that_one_method_reads_otherwise():
    "What most methods say, then the others by name; the longest text is not said of all."
    from vitprune_nb.methods.base import METHODS
    users = {m: row.options['lr'] for m, row in METHODS.items() if 'lr' in row.options}
    said = lambda users, of: cli.option('lr', users, of).annotation.__metadata__[0].help
    usual, of_life = users['vtp'].description, users['life'].description
    assert usual != of_life and said(users, len(METHODS)) == f'{usual}; life: {of_life}  [default: life: 1e-5]'
    assert said({'vtp': users['vtp'], 'evit': users['evit']}, 3) == usual
    assert said({'vtp': users['vtp'], 'life': users['life']}, 9) == f'vtp: {usual}; life: {of_life}  [default: life: 1e-5]'


def test_help_without_a_command(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf'^  {c} ', out, re.M) for c in COMMANDS)


def test_a_reader_that_leaves_early():
    "`vitprune cost | head -1` ends quietly."
    import subprocess
    from conftest import BIN, clean_env
    r = subprocess.run(f'"{BIN}/vitprune" cost --by block | head -1', shell=True, env=clean_env(), capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and r.stderr == '' and len(r.stdout.splitlines()) == 1
