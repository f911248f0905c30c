"""The command line: each command, its JSON, the effect of every option, and what bad input costs."""
import json, os, re, signal, subprocess, time

import pytest, torch
from vitprune_nb import cli, data, vit

COMMANDS = 'demo train eval cost prune bench'.split()


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
    for split, n in (('train', 3), ('test', 1)):
        ds = data.embedded(split)
        for i in [int(j) for k in range(10) for j in (ds.targets == k).nonzero()[0][:n]]:
            p = folder/'tree'/split/ds.classes[ds.targets[i]]/f'{i}.png'
            p.parent.mkdir(parents=True, exist_ok=True)
            ds.image(i).save(p)
    assert cli.main(['prune', 'test_vit', '--weights', f'{folder}/w0.safetensors', '--method', 'uniform', '--calibration', '8', '--out', f'{folder}/pruned']) == 0
    return folder


@pytest.fixture
def ask(shop, capsys):
    "Runs a command line in this process; T stands for the tiny model. ask('cost T') -> the JSON object."
    def run(line, **places):
        tiny = f'test_vit --weights {shop}/w0.safetensors'
        words = line.replace(' T', f' {tiny}').format(shop=shop, **places).split()
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


def test_demo(vitprune, tmp_path):
    "The whole thing, with few images; a report that needs nothing but itself."
    r = vitprune('demo', '--out', tmp_path/'demo', '--images', '20', '--calibration', '4', '--repeats', '1', '--batch', '10', '--json', timeout=500)
    assert r.returncode == 0, r.stderr
    record = json.loads(r.stdout.splitlines()[-1])
    check_record({k: v for k, v in record.items() if k != 'throughput'})
    assert [x['method'] for x in record['rows']] == ['dense', 'patch_slimming', 'uniform', 'random']
    assert sorted(p.name for p in (tmp_path/'demo').iterdir()) == ['accuracy_macs.png', 'kept.png', 'model', 'report.html', 'results.csv']
    page = (tmp_path/'demo/report.html').read_text()
    assert page.count('src="data:image/png;base64,') == 3 and not re.search(r'(src|href)="(?!data:)', page)
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
    for name, more in (('a', '0'), ('b', '2'), ('c', '2 --lr 0.01')):
        r = ask(f'{base} {more}', out=tmp_path/name)
        assert r['recover'] == float(more.split()[0])
        weights[name] = load_file(tmp_path/name/'model.safetensors')
    differ = lambda a, b: any(not torch.equal(v, weights[b][k]) for k, v in weights[a].items())
    assert differ('a', 'b') and differ('b', 'c')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b', 'c']


def test_pipeline_survives_kill_9(shop, tmp_path):
    "Killed in the search and again in the fine-tuning, then left alone: the model of an undisturbed run, and no traces."
    from conftest import BIN, clean_env
    from safetensors.torch import load_file
    line = f'prune test_vit --weights {shop}/w0.safetensors --data {shop}/tree --calibration 8 --eps 0.05 --tune-epochs 30 --recover 120 --lr 0.001 --device cpu --out'
    start = lambda out: subprocess.Popen([BIN/'vitprune', *line.split(), str(out)], env=clean_env(OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, work = tmp_path/'p', tmp_path/'p.unfinished'
    for sign in ('search.safetensors', 'recover/checkpoint.pt'):
        proc, end = start(out), time.time() + 300
        while not (work/sign).exists() and proc.poll() is None and time.time() < end: time.sleep(.01)
        assert proc.poll() is None, proc.communicate()[1]
        os.kill(proc.pid, signal.SIGKILL)
        proc.communicate()
        assert not out.exists() and (work/sign).is_file()
    assert cli.main([*line.replace('0.05', '0.04').split(), str(out)]) == 2          # other options: one line, and nothing is touched
    assert (work/'plan.json').is_file() and not out.exists()
    for folder in (out, tmp_path/'whole'):
        proc = start(folder)
        assert proc.wait(timeout=300) == 0, proc.communicate()[1]
        proc.communicate()
    a, b = (load_file(f/'model.safetensors') for f in (out, tmp_path/'whole'))
    assert all(torch.equal(a[k], v) for k, v in b.items())
    assert (out/'plan.json').read_text() == (tmp_path/'whole'/'plan.json').read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['p', 'whole']


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
    ('vitprune_nb.vit.evaluate', 'eval --limit 5 --device cpu', '--batch 7', 'batch_size'),
    ('vitprune_nb.vit.evaluate', 'eval --limit 5 --device cpu', '--dtype bf16', 'dtype'),
    ('vitprune_nb.measure.bench', 'bench --batch 2', '--warmup 5', 'warmup'),
    ('vitprune_nb.measure.bench', 'bench --batch 2', '--data {tree}', 'x'),
    *(('vitprune_nb.demo.run_demo', 'demo', o, n) for o, n in [('--out x', 'out'), ('--data x', 'data'), ('--reduction 0.3', 'reduction'), ('--images 9', 'images'),
        ('--calibration 9', 'calibration_images'), ('--repeats 9', 'repeats'), ('--batch 9', 'batch'), ('--seed 9', 'seed'), ('--device auto', 'device')]),
    *(('vitprune_nb.train.train_course', 'train --weights a', o, n) for o, n in [('--weights b', 'weights'), ('--data b', 'data'), ('--out b', 'out'), ('--limit 9', 'test_limit'),
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
    'Swin': ('cost swin_tiny_patch4_window7_224', 'SwinTransformer'),
    'no such checkpoint': ('eval --weights {tmp}/w.pth', 'w.pth; allowed: an existing .safetensors or .pth file'),
    'checkpoint of another model': ('cost deit_tiny_patch16_224 --weights {shop}/w0.safetensors', 'a checkpoint of deit_tiny_patch16_224'),
    'checkpoint that is none': ('cost --weights {tmp}/text.pth', 'a checkpoint of course'),
    'no such data': ('eval --data {tmp}/images', "allowed: 'embedded', 'cifar10', 'cifar100' or an existing folder"),
    'data without a split': ('eval --data {tmp}', 'allowed: a folder that holds val/ or test/'),
    'classes that do not fit': ('eval deit_tiny_patch16_224 --limit 5', 'images of the 1000 classes'),
    'no images': ('eval --limit 0', 'limit: got 0'),
    'batch of none': ('bench --batch 0', 'batch: got 0'),
    'unknown dtype': ('eval --limit 5 --dtype int3', "dtype: got int3; allowed: 'auto', 'fp32' or 'bf16'"),
    'unknown method': ('prune --method magic --out {tmp}/o', 'method: got magic; allowed: patch-slimming'),
    'reduction of everything': ('prune --reduction 1 --out {tmp}/o', 'reduction: got 1.0; allowed: a share in (0, 1)'),
    'two budgets': ('prune --reduction 0.4 --eps 0.1 --out {tmp}/o', 'either --reduction or --eps'),
    'tolerated error of zero': ('prune test_vit --eps 0 --out {tmp}/o', 'eps: got 0.0; allowed: a positive relative error'),
    'negative error': ('prune test_vit --eps -0.1 --out {tmp}/o', 'eps: got -0.1'),
    'error that no block can meet': ('prune test_vit --weights {shop}/w0.safetensors --data {shop}/tree --calibration 2 --eps 1e-30 --out {tmp}/o', 'even with all its 64 patches'),
    'no calibration images': ('prune --eps 0.1 --calibration 0 --out {tmp}/o', 'n: got 0; allowed: 1 to'),
    'step of no patches': ('prune test_vit --eps 0.1 --step 0 --out {tmp}/o', 'step: got 0'),
    'tuned blocks without an error': ('prune --tune-epochs 3 --out {tmp}/o', 'tune-epochs: got 3; allowed: 0 with a MAC budget'),
    'negative tuning': ('prune test_vit --eps 0.1 --tune-epochs -1 --out {tmp}/o', 'tune_epochs: got -1'),
    'negative recovery': ('prune --recover -1 --out {tmp}/o', 'recover: got -1.0'),
    'rival that searches': ('prune test_vit --method uniform --step 3 --calibration 2 --out {tmp}/o', 'step: got 3'),
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
    code = cli.main(line.format(tmp=tmp_path, shop=shop).split())
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
    assert capsys.readouterr().err == 'vitprune: No space left on device\n' and list(tmp_path.iterdir()) == []


# --- help

@pytest.mark.parametrize('command', COMMANDS)
def test_help_teaches(command, capsys):
    assert cli.main([command, '--help']) == 0
    out = capsys.readouterr().out
    assert 'Examples:' in out and f'  vitprune {command}' in out and '--json' in out
    options = re.findall(r'^  (--\S+)(.*)', out, re.M)
    assert len(options) >= 3 and max(map(len, out.splitlines())) <= 130


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
