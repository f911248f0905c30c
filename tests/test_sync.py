"""Notebooks and package say the same, and the notebooks are clean."""
import json, re, shutil, signal, subprocess, sys
from collections import Counter

import nbformat, pytest
from conftest import BIN, ROOT, clean_env

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import environment, failures, notebooks, read_cells, rests, run_all, WANTED
from vitprune_nb.evidence.report import target
from vitprune_nb.evidence.results import read_rows
from vitprune_nb.experiment import method_options, read_experiment, stages, units

NOTEBOOKS = notebooks()
SETUP = ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md')
IDS = [p.relative_to(ROOT/'nbs').as_posix() for p in NOTEBOOKS]
NAMED = {p.stem: p for p in NOTEBOOKS if p.parent.name != 'solutions'}   # lessons by name, wherever they lie
CORE = NAMED['00_core'].relative_to(ROOT)
MACHINE_PATH = re.compile(r'(?<![\w.:/~$])/(?:home|root|Users|work|tmp|var|private|mnt|content)/[\w.]')


def export(repo):
    "What `make export` does."
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([BIN/command], cwd=repo, env=clean_env(), check=True, capture_output=True, text=True)


def differences(repo, copy):
    "What a fresh clean + export of `repo`, done in `copy`, would change: a list of sentences."
    for name in SETUP: shutil.copy(repo/name, copy)
    shutil.copytree(repo/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    export(copy)
    old, new = ({p.relative_to(root).as_posix(): p.read_bytes() for d in ('nbs', 'vitprune_nb') for p in (root/d).rglob('*')
                 if p.is_file() and '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts} for root in (repo, copy))
    found = [f'{p}: nothing exports it; delete it' for p in sorted(old.keys() - new.keys())]
    found += [f'{p}: missing; run `make export`' for p in sorted(new.keys() - old.keys())]
    return found + [f'{p}: out of date; run `make export`' for p in sorted(old.keys() & new.keys()) if old[p] != new[p]]


def test_package_is_what_the_notebooks_export(tmp_path):
    assert differences(ROOT, tmp_path) == []


@pytest.mark.parametrize('spoil, expected', [
    (lambda repo: (repo/'vitprune_nb/core.py').open('a').write('\nx = 1\n'), 'vitprune_nb/core.py: out of date'),
    (lambda repo: (repo/'vitprune_nb/stray.py').write_text('x = 1\n'), 'vitprune_nb/stray.py: nothing exports it'),
    (lambda repo: (repo/'vitprune_nb/data.py').unlink(), 'vitprune_nb/data.py: missing'),
    (lambda repo: recount(repo/CORE), f'{CORE.as_posix()}: out of date'),
])
def test_the_check_can_fail(tmp_path, spoil, expected):
    repo, copy = tmp_path/'repo', tmp_path/'copy'
    repo.mkdir(), copy.mkdir()
    for name in SETUP: shutil.copy(ROOT/name, repo)
    for name in ('nbs', 'vitprune_nb'): (repo/name).mkdir()
    (repo/CORE).parent.mkdir(exist_ok=True)
    for name in ('00_core', '01_data'): shutil.copy(NAMED[name], repo/CORE.parent)
    export(repo)
    spoil(repo)
    found = differences(repo, copy)
    assert len(found) == 1 and found[0].startswith(expected)


def recount(path):
    "Give a notebook's first code cell an execution count, as a plain save in Jupyter does."
    nb = json.loads(path.read_text(encoding='utf-8'))
    next(c for c in nb['cells'] if c['cell_type'] == 'code')['execution_count'] = 7
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def test_a_failing_notebook_is_named_at_the_end_with_its_cell(tmp_path):
    "And what it leaves in its process reaches no other notebook."
    cells = [nbformat.v4.new_code_cell(s) for s in ('import sys\nassert not hasattr(sys, "mark")\nsys.mark = x = 1', 'def f(): assert x == 2, "x is odd"\nf()')]
    for name, some in (('bad', cells), ('good', cells[:1])): nbformat.write(nbformat.v4.new_notebook(cells=some), tmp_path/f'{name}.ipynb')
    code = 'import sys; from pathlib import Path; sys.path.insert(0, "tests"); import notebooks; sys.exit(notebooks.each([*map(Path, sys.argv[1:])], 1))'
    both = [tmp_path/'bad.ipynb', tmp_path/'good.ipynb']
    run = subprocess.run([sys.executable, '-c', code, *both], cwd=ROOT, env=clean_env(PYTHONUNBUFFERED='1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 1 and run.stdout.count('- Completed ') == 2 and run.stdout.splitlines()[-1] == f'{both[0]} failed'
    text, = failures(run.stdout.splitlines(keepends=True))
    assert text.startswith(f'FAILED: AssertionError in {tmp_path}/bad.ipynb:\nWhile Executing Cell #2') and text.endswith('AssertionError: x is odd\n')
    assert failures(['Starting a.ipynb\n', '- Completed a.ipynb\n', 'Success.\n']) == []


def says(*lines, then=''):
    "A command that writes these lines, as a test of notebooks does."
    return [sys.executable, '-c', f'import sys, time; print(*sys.argv[1:], sep="\\n", flush=True); {then}', *lines]


def test_notebooks_may_take_long_in_all_but_not_stand_still(capfd, monkeypatch):
    three, alarms, real = ['- Completed a', '- Completed b', '- Completed c'], [], signal.alarm
    monkeypatch.setattr(signal, 'alarm', lambda s: alarms.append(s) or real(s))
    assert run_all(says(*three), 3, stall=100) == 0
    assert alarms == [100]*4 + [0]                         # each line gives the next one as much time
    assert '3 of 3 notebooks ran' in capfd.readouterr().out
    assert run_all(says(*three), 4, stall=100) == 1        # one is missing
    assert run_all(says(*three, then='sys.exit(3)'), 3, stall=100) == 1
    capfd.readouterr()
    assert run_all(says(*three, then='time.sleep(600)'), 3, stall=1) == 1
    assert 'none began or ended for 1 s' in capfd.readouterr().err


def test_what_a_notebook_run_says_is_heard_at_once(monkeypatch):
    "In a pipe Python keeps some 8,000 characters back, dozens of notebooks: they would seem to stand still."
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    code = 'import os; print("- Completed a", end=""); os._exit(0)'       # nothing is flushed at the end
    said = subprocess.run([sys.executable, '-c', code], env=environment(1), capture_output=True, text=True)
    assert said.stdout == '- Completed a'


def test_recording_leaves_a_cell_alone_until_its_file_is_named(monkeypatch):
    cell = "#| slow\nnet = load(os.environ['VITPRUNE_GALLERY'])"
    monkeypatch.delenv('VITPRUNE_GALLERY', raising=False)
    assert rests(cell) and rests(cell, slow=True)
    monkeypatch.setenv('VITPRUNE_GALLERY', 'a file')
    assert rests(cell) and not rests(cell, slow=True)
    assert rests('#| slow\n1') and not rests('#| slow\n1', slow=True)
    assert rests('#| cuda\n1', slow=True) and not rests('1') and not rests("os.environ['VITPRUNE_NONE']")


def test_the_gallery_is_recorded_from_the_weights_that_make_record_is_given():
    recipe = re.search(r'^record: .*\n(\t.*)$', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M)[1]
    wanted = {v for p in NOTEBOOKS for _, c in read_cells(p) if rests(c) for v in WANTED.findall(c)}
    assert 'VITPRUNE_GALLERY=$(abspath $(WEIGHTS))' in recipe and wanted == {'VITPRUNE_GALLERY', 'VITPRUNE_OFFICIAL'}


def test_there_are_notebooks():
    assert 'index.ipynb' in IDS and '00_core' in NAMED and any(i.startswith('solutions/') for i in IDS)


def test_a_number_means_one_lesson():
    lessons = [p.stem for p in NOTEBOOKS if p.parent.name != 'solutions' and p.stem[:2].isdigit()]
    assert [n for n, k in Counter(stem.partition('_')[0] for stem in lessons).items() if k > 1] == []
    worked = {p.stem for p in NOTEBOOKS if p.parent.name == 'solutions' and p.stem[:2].isdigit()}
    assert worked <= set(lessons)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=IDS)
def test_notebook_is_valid_and_clean(path):
    text = path.read_text(encoding='utf-8')
    nb = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    assert 'widgets' not in nb.metadata, 'widget state: clear it in JupyterLab before saving'
    code = [c for c in nb.cells if c.cell_type == 'code']
    assert [c.id for c in code if c.execution_count is not None] == []
    assert [c.id for c in code for o in c.outputs if o.output_type == 'error'] == []
    assert [c.id for c in code for o in c.outputs if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})] == []


@pytest.mark.parametrize('path', NOTEBOOKS, ids=IDS)
def test_notebook_names_no_path_of_a_machine(path):
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        shown = [o.get('text', '') or o.get('data', {}).get('text/plain', '') for o in cell.get('outputs', [])]
        for text in (cell.source, *shown):
            assert not MACHINE_PATH.search(text), f'cell {cell.id}: {MACHINE_PATH.search(text).group()}…'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=IDS)
def test_notebook_links_lead_somewhere(path):
    nb = nbformat.read(path, as_version=4)
    links = re.findall(r'\]\(([^)#\s]+\.ipynb)(?:#[^)]*)?\)', '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown'))
    assert [l for l in links if '://' not in l and not (path.parent/l).is_file()] == []


def test_make_record_repeats_the_short_runs_on_cifar100():
    "The changes that stand in the Makefile are those that the recorded rows were made with."
    makefile = (ROOT/'Makefile').read_text(encoding='utf-8')
    changes = {name: re.findall(r'--set (\S+)', re.search(rf'^{var} = (.*)$', makefile, re.M)[1]) for name, var in re.findall(r'call cifar100,(\w+),\$\((\w+)\)', makefile)}
    assert len(changes) == 4
    for name, asked in dict(changes, cifar100=[]).items():
        plan, rows = read_experiment(ROOT/'configs'/'cifar100_cpu.toml', asked), read_rows(ROOT/'data'/'results'/f'{name}.csv')
        want = Counter((u.method, u.reduction, u.seed, s != 'none') for u in units(plan) for s in stages(plan, u))
        assert Counter((r['method'], target(r), r['seed'], r['recovery'] != 'none') for r in rows) == want, name
        assert {r['recovery'].partition(',')[0] for r in rows} - {'none'} == ({f"epochs {plan.recover['epochs']}"} if plan.recover else set()), name
        for r in rows:
            if r['method'] != 'dense':
                made = r['schedule']['options']
                assert {**method_options(plan, r['method'], target(r)), 'seed': r['seed']}.items() >= made.items(), (name, made)


@pytest.mark.parametrize('name, file', [('UNTRAINED', 'chance'), ('DRAWS', 'seeds'), ('KEPT', 'kept')])
def test_make_tournament_repeats_the_runs_beside_it(name, file):
    asked = re.findall(r'--set (\S+)', re.search(rf'^{name} = (.*)$', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M)[1])
    plan, rows = read_experiment(ROOT/'configs'/'tournament.toml', asked), read_rows(ROOT/'data'/'results'/f'tournament_{file}.csv')
    want = Counter((u.name, u.seed, u.reduction, s != 'none') for u in units(plan) for s in stages(plan, u))
    assert Counter((r['method'], r['seed'], target(r), r['recovery'] != 'none') for r in rows) == want
    for r in rows:
        if r['method'] in plan.methods: assert {**method_options(plan, r['method'], target(r)), 'seed': r['seed']}.items() >= r['schedule']['options'].items()


def test_make_tournament_repeats_the_runs_of_other_lengths():
    makefile = (ROOT/'Makefile').read_text(encoding='utf-8')
    lengths = re.search(r'^LENGTHS = (.*)$', makefile, re.M)[1].split()
    folder = ROOT/'data'/'results'
    assert [f'tournament_{t}_passes.csv' for t in lengths] == sorted(p.name for p in folder.glob('tournament_*_passes.csv'))
    for t in lengths:
        numbers = {'1': f'{float(t):g}', 'call of,$(1)/2': f'{float(t)/2:g}', 'call of,0.04/$(1)': f'{.04/float(t):g}'}
        text = re.search(r'^LENGTH = (.*)$', makefile, re.M)[1]
        for what in ('call of,$(1)/2', 'call of,0.04/$(1)', '1'): text = text.replace(f'$({what})', numbers[what])
        plan, rows = read_experiment(ROOT/'configs'/'tournament.toml', re.findall(r'--set (\S+)', text)), read_rows(folder/f'tournament_{t}_passes.csv')
        want = Counter((u.name, u.reduction, s != 'none') for u in units(plan) for s in stages(plan, u))
        assert Counter((r['method'], target(r), r['recovery'] != 'none') for r in rows) == want
        for r in rows:
            if r['method'] != 'dense': assert {**method_options(plan, r['method'], .35), 'seed': 0}.items() >= r['schedule']['options'].items()


def test_make_tournament_repeats_the_trials_of_vtp():
    makefile, folder = (ROOT/'Makefile').read_text(encoding='utf-8'), ROOT/'data'/'results'
    line = lambda name: re.search(rf'^{name} = (.*)$', makefile, re.M)[1]
    trials = re.findall(r'call gates,([\d.]+)\)', makefile)
    assert sorted(f'tournament_vtp_{t}.csv' for t in trials) == sorted(p.name for p in folder.glob('tournament_vtp_0*.csv'))
    runs = [('tournament_recipe', f'{line("GATES")} --set options.vtp.l1={t}', f'tournament_vtp_{t}') for t in trials]
    for config, text, file in [*runs, ('tournament', line('WEAKER'), 'tournament_vtp')]:
        plan, rows = read_experiment(ROOT/'configs'/f'{config}.toml', re.findall(r'--set (\S+)', text)), read_rows(folder/f'{file}.csv')
        want = Counter((u.name, u.reduction, s != 'none') for u in units(plan) for s in stages(plan, u))
        assert Counter((r['method'], target(r), r['recovery'] != 'none') for r in rows) == want
        for r in rows:
            if r['method'] != 'dense': assert {**method_options(plan, 'vtp', .35), 'seed': 0}.items() >= r['schedule']['options'].items()
