"""What is the user's stays as it is: other people's files, permissions, full disks, links, and two processes in one folder."""
import errno, hashlib, json, os, shutil, stat, subprocess, sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_env

from vitprune_nb import cli, files
from vitprune_nb.errors import VitpruneError
from vitprune_nb.files import (MARK, append_text, check_output, claim, is_ours, only_one, publish,
                               remove, sha256, sign, sweep, write_atomic, write_folder_atomic)
from vitprune_nb.experiment import Experiment, Ledger, read_experiment
from vitprune_nb.engine.store import load_pruned
from vitprune_nb.run import run_config

pytestmark = pytest.mark.usefixtures('one_thread')
DEAD = 2**22 + 1     # larger than any process number
TOML = '''
model = "deit_tiny_patch16_224"
model_args = { img_size = 32, patch_size = 8, embed_dim = 48, depth = 3, num_heads = 3 }
methods = ["uniform"]
reductions = [0.25]
calibration = 4
train_images = 20
test_images = 10
device = "cpu"
train = { epochs = 1, batch_size = 10, dtype = "fp32" }
'''
PRUNE = 'prune test_vit --method uniform --calibration 2 --device cpu'
DEMO = 'demo --images 10 --calibration 2 --repeats 1 --batch 10 --reduction 0.45'


def snapshot(*places):
    "{path: (mode, content)} of everything under some folders; where a link leads, not what is there."
    found = {}
    for place in map(Path, places):
        for p in [place, *place.rglob('*')]:
            if p.is_symlink(): found[str(p)] = ('link', os.readlink(p))
            elif p.is_dir(): found[str(p)] = (stat.S_IMODE(p.stat().st_mode), 'folder')
            else: found[str(p)] = (stat.S_IMODE(p.stat().st_mode), hashlib.sha256(p.read_bytes()).hexdigest())
    return found


def check_kept(before, allowed=()):
    "Nothing of a snapshot changed but what is allowed to, by name."
    now = snapshot(next(iter(before)))
    assert {p: v for p, v in now.items() if p in before and Path(p).name not in allowed} == \
           {p: v for p, v in before.items() if Path(p).name not in allowed}


def fill(folder, *names):
    "A user's files; a name that ends in / is a folder with a file in it."
    for name in names:
        p = folder/name
        if name.endswith('/'):
            p.mkdir(parents=True)
            p = p/'mine.txt'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(f'years of work in {name}')
    return folder


def refused(line, capsys):
    "The one line on standard error of a command that is refused."
    code = cli.main([str(w) for w in line])
    err = capsys.readouterr().err.rpartition('\r')[2]
    assert code == 2 and err.count('\n') == 1 and err.startswith('vitprune: '), err
    return err


@pytest.fixture
def toml(tmp_path):
    file = tmp_path/'config'/'tiny.toml'
    file.parent.mkdir()
    file.write_text(TOML)
    return file


# --- demo

@pytest.mark.parametrize('name', ['model/', 'results.csv', 'report.html', 'kept.png/', 'accuracy_macs.png'])
def test_a_demo_takes_no_name_of_the_user(tmp_path, capsys, name):
    proj = fill(tmp_path/'proj', name, 'notes.txt', '.env')
    before = snapshot(proj)
    assert name.rstrip('/') in refused([*DEMO.split(), '--out', proj], capsys)
    assert snapshot(proj) == before


def test_a_demo_beside_other_files_and_again(tmp_path, capsys):
    proj = fill(tmp_path/'proj', 'src/', '.env', 'notes.txt', '.new-idea/')
    before = snapshot(proj)
    for _ in range(2): assert cli.main([*DEMO.split(), '--out', str(proj)]) == 0
    check_kept(before)
    assert {p.name for p in proj.iterdir()} - {'src', '.env', 'notes.txt', '.new-idea'} == \
           {'model', 'results.csv', 'report.html', 'kept.png', 'accuracy_macs.png', MARK}
    (proj/'results.csv').write_text((proj/'results.csv').read_text() + '\n')      # the user went on with it
    before = snapshot(proj)
    assert 'results.csv' in refused([*DEMO.split(), '--out', proj], capsys)
    (proj/'model'/'notes.txt').write_text('mine')
    (proj/'results.csv').unlink()
    assert 'model' in refused([*DEMO.split(), '--out', proj], capsys) and (proj/'model'/'notes.txt').exists()


# --- run

MINE = ('dense/', 'sub/.git/', '.env', '.venv/', '.notes.tmp', 'sub/.x.new', 'notes.txt', 'work.txt', 'models-old/')

def test_a_run_in_somebodys_project(tmp_path, toml):
    proj = fill(tmp_path/'proj', *MINE)
    before = snapshot(proj)
    first = run_config(toml, out=proj)
    check_kept(before)
    fill(proj, 'rows/.cache/', 'models/uniform-mine/', 'answers/.notes.tmp', 'shared/', 'work/.mine')
    before = snapshot(proj)
    with pytest.raises(VitpruneError, match='shared vitprune did not make'): run_config(toml, out=proj)
    assert snapshot(proj) == before
    shutil.rmtree(proj/'shared')
    del before[str(proj/'shared')], before[str(proj/'shared'/'mine.txt')]
    change = ['options.uniform.keys=kept']
    with pytest.raises(VitpruneError, match='redo'): run_config(toml, out=proj, changes=change)
    assert snapshot(proj) == before
    again = run_config(toml, out=proj, changes=change, redo=True)
    assert again['rows'][0] == first['rows'][0] and load_pruned(proj/'models/uniform-0.25-s0').info['keys'] == 'kept'
    for name in [*MINE, 'rows/.cache/', 'models/uniform-mine/', 'answers/.notes.tmp', 'work/.mine']:
        p = proj/name
        assert (p/'mine.txt' if name.endswith('/') else p).read_text() == f'years of work in {name}'


def test_redo_takes_no_model_that_holds_more(tmp_path, toml):
    run_config(toml, out=tmp_path/'run')
    (tmp_path/'run/models/uniform-0.25-s0/figure.py').write_text('mine')
    before = snapshot(tmp_path)
    with pytest.raises(VitpruneError, match='which holds figure.py'): run_config(toml, out=tmp_path/'run', changes=['options.uniform.keys=kept'], redo=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('name', ['models/', 'work/', 'rows/', 'answers', 'shared/', 'settings.json', 'log.jsonl', 'dense.safetensors', 'report.md',
                                  'accuracy_macs.png', 'results.csv', 'results_pairs.csv', MARK])
def test_a_run_takes_no_name_of_the_user(tmp_path, toml, name):
    proj = fill(tmp_path/'proj', name, '.notes.tmp')
    before = snapshot(proj)
    with pytest.raises(VitpruneError) as e: run_config(toml, out=proj)
    assert name.rstrip('/') in str(e.value) and snapshot(proj) == before


def test_a_run_writes_into_no_csv_of_the_user(tmp_path, toml):
    mine = fill(tmp_path/'mine', 'table.csv', 'rows_pairs.csv')
    before = snapshot(mine)
    for results in (mine/'table.csv', mine/'rows.csv'):
        with pytest.raises(VitpruneError, match='table.csv|rows_pairs.csv'): run_config(toml, out=tmp_path/'run', results=results)
        assert snapshot(mine) == before and not (tmp_path/'run').exists()


def test_the_users_words_in_a_report_stay(tmp_path, toml):
    run_config(toml, out=tmp_path/'run')
    with open(tmp_path/'run/report.md', 'a') as f: f.write('\nWhat I make of it.\n')
    before = snapshot(tmp_path/'run')
    with pytest.raises(VitpruneError, match='report.md'): run_config(toml, out=tmp_path/'run')
    assert snapshot(tmp_path/'run') == before


def test_a_run_of_a_version_without_marks_goes_on(tmp_path, toml):
    first = run_config(toml, out=tmp_path/'run', results=tmp_path/'mine/rows.csv')
    (tmp_path/'run'/MARK).unlink()
    again = run_config(toml, out=tmp_path/'run', results=tmp_path/'mine/rows.csv')
    assert again['rows'] == first['rows'] and is_ours(tmp_path/'mine/rows_pairs.csv', tmp_path/'run')


@pytest.mark.parametrize('name', ['..', '.', '.git', '.hidden', '-x', '../up', 'a/b', '/tmp/x', 'a'*101, '', 'a\n'])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(VitpruneError, match='name: got'): Experiment(name=name)


def test_names_that_are_names():
    for name in ('a', 'cifar-100', 'v1.2_b', 'über', '3'): assert Experiment(name=name).name == name


@pytest.mark.parametrize('results', ['../rows.csv', '/tmp/rows.csv', '~/rows.csv', 'sub/../../rows.csv'])
def test_a_config_writes_in_its_own_folder(toml, results):
    toml.write_text(f'results = "{results}"\n{TOML}')
    with pytest.raises(VitpruneError, match='results: got .*or below it. Give it on the command line'): read_experiment(toml)
    toml.write_text(f'results = "sub/rows.csv"\n{TOML}')
    assert Path(read_experiment(toml).results) == toml.parent/'sub/rows.csv'


# --- prune

def test_prune_replaces_its_own_folders_only(tmp_path, capsys):
    hub = tmp_path/'hub'                                   # another library's model: the same file names
    hub.mkdir()
    (hub/'config.json').write_text('{"model_type": "vit"}')
    (hub/'model.safetensors').write_bytes(b'\0'*8)
    before = snapshot(hub)
    assert 'not empty' in refused([*PRUNE.split(), '--out', hub, '--force'], capsys) and snapshot(hub) == before
    assert cli.main([*PRUNE.split(), '--out', str(tmp_path/'p')]) == 0
    for _ in range(2): assert cli.main([*PRUNE.split(), '--reduction', '0.3', '--out', str(tmp_path/'p'), '--force']) == 0
    (tmp_path/'p'/'.hidden').write_text('mine')
    before = snapshot(tmp_path/'p')
    assert 'not empty' in refused([*PRUNE.split(), '--out', tmp_path/'p', '--force'], capsys) and snapshot(tmp_path/'p') == before


def test_a_folder_of_the_user_that_is_called_unfinished(tmp_path, capsys):
    for name in ('notes.txt', 'options.json'):
        work = fill(tmp_path/name, 'p.unfinished/', f'p.unfinished/{name}')
        before = snapshot(work)
        assert 'was not made by vitprune' in refused([*PRUNE.split(), '--recover', '1', '--out', work/'p'], capsys)
        assert snapshot(work) == before


# --- links and places

def test_links_lead_nowhere(tmp_path, toml, capsys):
    there = fill(tmp_path/'there', 'mine/')
    (tmp_path/'link').symlink_to(there)
    (tmp_path/'dangling').symlink_to(tmp_path/'nowhere')
    before = snapshot(tmp_path)
    for name in ('link', 'dangling'):
        for line in (PRUNE.split(), [*PRUNE.split(), '--force'], DEMO.split(), ['run', toml]):
            assert 'which is a link to' in refused([*line, '--out', tmp_path/name], capsys)
            assert snapshot(tmp_path) == before
    (tmp_path/'rows.csv').symlink_to(there/'rows.csv')
    assert 'which is a link' in refused(['run', toml, '--out', tmp_path/'r', '--results', tmp_path/'rows.csv'], capsys)
    assert not (tmp_path/'r').exists() and not (there/'rows.csv').exists()


@pytest.mark.parametrize('part', ['model', 'results.csv'])
def test_links_inside_a_folder(tmp_path, capsys, part):
    there, proj = fill(tmp_path/'there', 'mine/'), tmp_path/'proj'
    proj.mkdir()
    (proj/part).symlink_to(there if part == 'model' else there/'mine'/'mine.txt')
    before = snapshot(tmp_path)
    assert part in refused([*DEMO.split(), '--out', proj], capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('line', [PRUNE, DEMO, 'run {toml}', 'train --weights {toml} --data embedded'])
def test_places_that_cannot_be_written(tmp_path, toml, capsys, line):
    file = tmp_path/'file'
    file.write_text('mine')
    words, before = line.format(toml=toml).split(), snapshot(tmp_path)
    for out, said in ((file, 'which is a file'), (file/'x', 'is no folder'), (tmp_path/('x'*300), 'names of at most 255 bytes'),
                      ('/dev/null', 'a device'), ('/proc/x/y', '')):
        assert said in refused([*words, '--out', out], capsys)
        assert snapshot(tmp_path) == before


def test_the_current_folder(tmp_path, toml, capsys, monkeypatch):
    monkeypatch.chdir(fill(tmp_path/'proj', 'notes.txt'))
    assert 'which cannot be replaced' in refused([*PRUNE.split(), '--out', '.'], capsys)
    assert cli.main(['run', str(toml), '--out', '.']) == 0 and Path('notes.txt').read_text() == 'years of work in notes.txt'
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path/'empty')
    assert 'which cannot be replaced' in refused([*PRUNE.split(), '--out', '.'], capsys) and not os.listdir()


def test_too_little_room_is_said_first(tmp_path, toml, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 10**4, 10**4))
    for line in (PRUNE.split(), DEMO.split(), ['run', toml]):
        assert '0 MB free; allowed: a disk with' in refused([*line, '--out', tmp_path/'o'], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ['config']


# --- permissions

@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_permissions_are_the_umasks(tmp_path, toml, umask):
    old = os.umask(umask)
    try:
        (tmp_path/'by-hand').mkdir()
        (tmp_path/'by-hand'/'a.txt').write_text('')
        for line in (f'{PRUNE} --out {tmp_path}/p', f'{PRUNE} --out {tmp_path}/p --force', f'{DEMO} --out {tmp_path}/demo', f'run {toml} --out {tmp_path}/run'):
            assert cli.main(line.split()) == 0
    finally: os.umask(old)
    mode = lambda p: stat.S_IMODE(p.stat().st_mode)
    folder, file = mode(tmp_path/'by-hand'), mode(tmp_path/'by-hand'/'a.txt')
    assert (folder, file) == (0o777 & ~umask, 0o666 & ~umask)
    made = [p for d in ('p', 'demo', 'run') for p in [tmp_path/d, *(tmp_path/d).rglob('*')]]
    assert len([p for p in made if p.suffix == '.safetensors']) == 4 and len(made) > 20
    assert {str(p.relative_to(tmp_path)): oct(mode(p)) for p in made if mode(p) != (folder if p.is_dir() else file)} == {}


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    file = tmp_path/'private.csv'
    file.write_text('old')
    for mode in (0o600, 0o664):
        file.chmod(mode)
        with write_atomic(file) as tmp: tmp.write_text('new')
        assert stat.S_IMODE(file.stat().st_mode) == mode


# --- disks that fail

class Failing:
    "Raises ENOSPC at the nth call of what it stands for, and at all later ones unless it is said to fail once."
    def __init__(self, real, n, code=errno.ENOSPC, once=False):
        self.real, self.n, self.calls, self.code, self.once = real, n, 0, code, once
    def __call__(self, *args, **kw):
        self.calls += 1
        if self.calls == self.n or self.calls > self.n and not self.once: raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **kw)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 6])
@pytest.mark.parametrize('what', ['fsync', 'replace'])
@pytest.mark.parametrize('line', [f'{PRUNE} --force', DEMO])
def test_a_disk_that_is_full_at_some_point(tmp_path, capsys, monkeypatch, line, what, n):
    "The folder of an earlier command is exactly as it was, and so is everything beside it."
    out = tmp_path/'o'
    if n > 2: assert cli.main([*line.split(), '--out', str(out)]) == 0
    capsys.readouterr()
    before = snapshot(tmp_path)
    failing = Failing(getattr(os, what), n, once=what == 'replace')   # where no name can be changed any more, none can be changed back
    monkeypatch.setattr(files.os, what, failing)
    code = cli.main([*line.split(), '--out', str(out)])
    monkeypatch.undo()
    err = capsys.readouterr().err.rpartition('\r')[2]
    if failing.calls < n: assert code == 0
    else:
        assert code == 2 and err.count('\n') == 1 and 'No space is left on the disk: free some' in err
        now = snapshot(tmp_path)
        assert {p: v for p, v in now.items() if Path(p).name != MARK} == {p: v for p, v in before.items() if Path(p).name != MARK}
        assert not [p for p in now if '.vitprune.' in p and not p.endswith(MARK)]
        if out.exists(): assert load_pruned(out if 'prune' in line else out/'model').num_classes


@pytest.fixture
def small_disk(tmp_path):
    "A file system of its own, of 12 MB."
    place = tmp_path/'disk'
    place.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', place], capture_output=True).returncode: pytest.skip('no right to mount')
    yield place
    subprocess.run(['umount', '-l', place], check=True)     # torch may still hold a file open


def test_a_disk_that_is_really_full(small_disk, tmp_path, toml, vitprune):
    fill(small_disk, 'notes.txt')
    (small_disk/'ballast').write_bytes(b'x'*11_990_000)
    before = snapshot(small_disk)
    for line in (PRUNE, DEMO, f'run {toml}'):
        r = vitprune(*line.split(), '--out', small_disk/'o', OMP_NUM_THREADS='1')
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'MB free; allowed: a disk with' in r.stderr
        assert snapshot(small_disk) == before
    import torch
    from safetensors.torch import save_file
    weights = dict(a=torch.zeros(1_000_000))
    writers = [lambda tmp: save_file(weights, tmp), lambda tmp: torch.save(weights, tmp), lambda tmp: tmp.write_bytes(b'x'*4_000_000)]
    for write in writers:
        with pytest.raises(VitpruneError, match='w.bin; allowed: a place that can be written. No space is left'):
            with write_atomic(small_disk/'new'/'w.bin') as tmp: write(tmp)
        with pytest.raises(VitpruneError, match='No space is left'):
            with write_folder_atomic(small_disk/'model') as new: write(new/'w.bin')
        with pytest.raises(VitpruneError, match='No space is left'): append_text(small_disk/'notes.txt', 'x'*4_000_000)
        assert snapshot(small_disk) == before


def test_a_disk_that_is_read_only(small_disk, tmp_path, toml, capsys):
    subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
    for line in (PRUNE.split(), DEMO.split(), ['run', toml]):
        assert 'you may not write in' in refused([*line, '--out', small_disk/'o'], capsys)


@pytest.mark.parametrize('code', [errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG])
def test_every_trouble_of_a_disk_is_a_sentence(tmp_path, code):
    for writer in (write_atomic, write_folder_atomic):
        with pytest.raises(VitpruneError, match='allowed: a place that can be written. [A-Z]'):
            with writer(tmp_path/'a'/'b'): raise OSError(code, os.strerror(code))
        with pytest.raises(FileNotFoundError):
            with writer(tmp_path/'a'/'b'): open(tmp_path/'nowhere')
    assert not list(tmp_path.iterdir())


# --- two at once

@pytest.mark.parametrize('case', ['prune', 'run', 'demo', 'train'])
def test_two_in_one_folder(tmp_path, toml, capsys, case):
    lines = dict(prune=PRUNE.split(), run=['run', toml], demo=DEMO.split(), train=[])
    out = tmp_path/'o'
    if case == 'train':
        with only_one(out), pytest.raises(VitpruneError, match='a folder in which nothing is going on'): small_training(out)
    else:
        with only_one(out, beside=case == 'prune'):
            before = snapshot(tmp_path)
            assert 'a folder in which nothing is going on' in refused([*lines[case], '--out', out], capsys)
            assert snapshot(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config']
    if case == 'train': small_training(out)
    else: assert cli.main([*map(str, lines[case]), '--out', str(out)]) == 0
    assert not list(tmp_path.rglob('*.lock'))


def small_training(out):
    from vitprune_nb.data import calibration, embedded
    from vitprune_nb.train.recipe import TrainConfig
    from vitprune_nb.train.trainer import fit
    from vitprune_nb.vit.model import create_vit
    model = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10)
    return fit(model, calibration(embedded('train'), 10), TrainConfig(epochs=1, batch_size=10, dtype='fp32'), out=out)


def test_a_lock_goes_with_its_process(tmp_path):
    code = f'import time\nfrom vitprune_nb.files import only_one\nwith only_one({str(tmp_path/"o")!r}): print("locked", flush=True); time.sleep(60)'
    proc = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=clean_env(OMP_NUM_THREADS='1'), cwd=ROOT)
    assert proc.stdout.readline() == 'locked\n'
    with pytest.raises(VitpruneError, match='nothing is going on'), only_one(tmp_path/'o'): pass
    proc.kill()
    proc.communicate()
    with only_one(tmp_path/'o'): pass
    assert not list((tmp_path/'o').iterdir())


@pytest.mark.parametrize('name', ['checkpoint.pt', 'log.csv', 'config.json', MARK])
def test_a_training_takes_no_file_of_the_user(tmp_path, name):
    out = fill(tmp_path/'o', name, 'notes.txt')
    before = snapshot(out)
    with pytest.raises(VitpruneError, match=name): small_training(out)
    assert snapshot(out) == before


def test_a_training_of_a_version_without_marks_goes_on(tmp_path):
    rows = small_training(tmp_path/'o')
    (tmp_path/'o'/MARK).unlink()
    assert [r['step'] for r in small_training(tmp_path/'o')] == [r['step'] for r in rows]


@pytest.mark.parametrize('name', ['model/', 'stage1/', 'stage2'])
def test_the_course_takes_no_name_of_the_user(tmp_path, toml, capsys, name):
    out = fill(tmp_path/'o', name)
    before = snapshot(out)
    assert name.rstrip('/') in refused(['train', '--weights', toml, '--data', 'embedded', '--out', out], capsys)
    assert snapshot(out) == before


# --- the tools

def test_only_files_of_dead_processes_are_swept(tmp_path):
    keep = ['.notes.tmp', '.a.vitprune.tmp', f'a.{DEAD}.vitprune.tmp', f'.a.{os.getppid()}.vitprune.tmp', f'.a.x{DEAD}.vitprune.tmp', '.vitprune.tmp']
    fill(tmp_path, *keep, f'.a.csv.{DEAD}.vitprune.tmp', f'.model.{DEAD}.vitprune.tmp/')
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)


def test_a_kill_between_two_renames_loses_no_folder(tmp_path):
    def save(text):
        with write_folder_atomic(tmp_path/'m', lambda f: True) as new: (new/'a').write_text(text)
    save('old')
    (tmp_path/'m').rename(tmp_path/f'.m.{DEAD}.vitprune.old')
    with pytest.raises(VitpruneError, match='which is not empty'):
        with write_folder_atomic(tmp_path/'m'): pass
    assert (tmp_path/'m'/'a').read_text() == 'old'
    save('new')
    assert [p.name for p in tmp_path.iterdir()] == ['m'] and (tmp_path/'m'/'a').read_text() == 'new'


def test_a_write_sweeps_and_restores_nothing_of_a_neighbour(tmp_path):
    "model.v2 was killed between its two renames: saving model leaves its old and its new folder alone."
    left = {f'.model.v2.{DEAD}.vitprune.{end}' for end in ('old', 'tmp')}
    fill(tmp_path, *(f'{name}/' for name in left))
    for _ in range(2):
        with write_folder_atomic(tmp_path/'model', lambda f: True) as new: (new/'a').write_text('model')
        with write_atomic(tmp_path/'model.csv') as tmp: tmp.write_text('rows')
    assert {p.name for p in tmp_path.iterdir()} == left | {'model', 'model.csv'}
    with pytest.raises(VitpruneError, match='which is not empty'):      # v2's own next write brings its old folder back
        with write_folder_atomic(tmp_path/'model.v2'): pass
    assert {p.name for p in tmp_path.iterdir()} == {'model', 'model.csv', 'model.v2'}


def of_a_dead_process(path, end='old'):
    "The temporary name that a process which is gone gave to a path."
    return Path(str(files.temporary_path(path)).replace(f'.{os.getpid()}.', f'.{DEAD}.')).with_suffix(f'.{end}')


@pytest.mark.parametrize('name', ['m', 'x'*230, '.hidden', '漢'*67, '漢'*85, 'x'*200, 'x'*201, 'a\udcff'])
def test_a_long_or_hidden_name_comes_back_too(tmp_path, name):
    with write_folder_atomic(tmp_path/name) as new: (new/'a').write_text('old')
    (tmp_path/name).rename(of_a_dead_process(tmp_path/name))
    with pytest.raises(VitpruneError, match='which is not empty'):
        with write_folder_atomic(tmp_path/name): pass
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize('one, other', [('x'*200 + '-a', 'x'*200 + '-b'), ('漢'*67 + 'a', '漢'*67 + 'b'), ('x'*200, 'x'*200 + '-b'), ('a\udcff', 'a\udcfe'), ('a\udcff', 'a')])
def test_names_that_begin_alike_are_told_apart(tmp_path, one, other):
    "The only copy of the first lies under its temporary name: saving the second leaves it alone, and the first's own next write finds it."
    with write_folder_atomic(tmp_path/one) as new: (new/'a').write_text('one')
    (tmp_path/one).rename(of_a_dead_process(tmp_path/one))
    of_a_dead_process(tmp_path/one, 'tmp').mkdir()
    for _ in range(2):
        with write_folder_atomic(tmp_path/other, lambda f: True) as new: (new/'a').write_text('other')
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(VitpruneError, match='which is not empty'):
        with write_folder_atomic(tmp_path/one): pass
    assert {p.name: (p/'a').read_text() for p in tmp_path.iterdir()} == {one: 'one', other: 'other'}


@pytest.mark.parametrize('name', ['r.csv', 'x'*195, 'x'*230, '漢'*80])
def test_what_a_write_within_a_write_left_is_swept(tmp_path, name):
    outer = of_a_dead_process(tmp_path/name, 'tmp')
    inner = of_a_dead_process(outer, 'tmp')
    fill(tmp_path, outer.name, inner.name)
    assert max(len(os.fsencode(p.name)) for p in (outer, inner)) <= 255
    with write_atomic(tmp_path/name) as tmp:
        with write_atomic(tmp) as within: within.write_text('rows')
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path/name).read_text() == 'rows'


def test_a_kill_while_publishing_loses_no_folder(tmp_path):
    def stage(text):
        (tmp_path/'stage'/'model').mkdir(parents=True)
        (tmp_path/'stage'/'model'/'a').write_text(text)
        return tmp_path/'stage'
    out = tmp_path/'out'
    out.mkdir()
    publish(stage('one'), out)
    (out/'model').rename(out/f'.model.{DEAD}.vitprune.old')             # killed between the two renames
    shutil.rmtree(tmp_path/'stage')
    publish(stage('two'), out)
    assert (out/'model'/'a').read_text() == 'two'
    assert sorted(p.name for p in out.iterdir()) == ['.vitprune.json', 'model']


def in_threads(*calls):
    "What functions of no arguments raise, each in a thread of its own and all at once."
    import threading
    raised, gate = [], threading.Barrier(len(calls))
    def run(call):
        gate.wait()
        try: call()
        except BaseException as e: raised.append(e)
    threads = [threading.Thread(target=run, args=(c,)) for c in calls]
    for t in threads: t.start()
    while any(t.is_alive() for t in threads): yield raised
    yield raised


@pytest.mark.parametrize('places', [('real/a', 'real/a', 'real/a'), ('real/a', 'link/a', 'link/../real/a')])
@pytest.mark.parametrize('writer', [write_atomic, write_folder_atomic])
def test_threads_that_write_one_file_take_turns(tmp_path, places, writer):
    import time
    (tmp_path/'real').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'real')
    options, part = ({}, '') if writer is write_atomic else (dict(may_replace=lambda f: True), 'part')
    file, texts = tmp_path/'real/a'/part, [k*20 for k in 'abc']
    def write(place, text):
        with writer(tmp_path/place, **options) as tmp, open(tmp/part, 'w') as f:
            for c in text:
                f.write(c)
                f.flush()
                time.sleep(.002)
    def read():
        try: return file.read_text()
        except FileNotFoundError: return texts[0]         # before the first, and while folders change places
    said = [(*raised, read()) for raised in in_threads(*(lambda p=p, t=t: write(p, t) for p, t in zip(places, texts)))]
    wrong = [now for *_, now in said if now not in texts]
    assert said[-1][:-1] == () and wrong == [] and file.read_text() in texts
    assert [p.name for p in (tmp_path/'real').iterdir()] == ['a']


def test_a_mark_knows_what_all_threads_wrote(tmp_path):
    (tmp_path/'real').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'real')
    def write(k):
        owner = tmp_path/('real', 'link')[k % 2]
        for i in range(5):
            with write_atomic(owner/f'{k}-{i}', owner=owner) as tmp: tmp.write_text(f'{k} {i}')
        claim(tmp_path/'real', f'log-{k}')
    *_, raised = in_threads(*(lambda k=k: write(k) for k in range(4)))
    names = {f'{k}-{i}' for k in range(4) for i in range(5)}
    assert raised == [] and set(files.made_in(tmp_path/'real')) == names | {f'log-{k}' for k in range(4)}
    assert all(is_ours(tmp_path/'real'/n) for n in names)


def test_one_thread_sweeps_no_write_of_another(tmp_path):
    with write_atomic(tmp_path/'a') as tmp, write_folder_atomic(tmp_path/'m') as new:
        tmp.write_text('a')
        (new/'part').write_text('m')
        sweep(tmp_path)
    assert ((tmp_path/'a').read_text(), (tmp_path/'m'/'part').read_text()) == ('a', 'm')
    for left in (tmp, new): fill(tmp_path, f'{left.name}/' if left == new else left.name)      # of a killed process that had our number
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'm']


def test_a_kill_between_mark_and_rename_locks_nobody_out(tmp_path):
    with write_atomic(tmp_path/'r', owner=tmp_path) as tmp: tmp.write_text('one')
    (tmp_path/'new').write_text('two')
    sign(tmp_path, {tmp_path/'r': tmp_path/'new'})          # killed here: the mark knows both, the file is the old one
    assert is_ours(tmp_path/'r')
    os.replace(tmp_path/'new', tmp_path/'r')
    assert is_ours(tmp_path/'r')
    (tmp_path/'r').write_text('three')
    assert not is_ours(tmp_path/'r')


def test_nothing_is_published_over_the_users(tmp_path):
    stage, out = fill(tmp_path/'stage', 'a', 'b/'), fill(tmp_path/'out', 'b/')
    before = snapshot(tmp_path)
    with pytest.raises(VitpruneError, match='whose b vitprune did not make'): publish(stage, out)
    assert snapshot(tmp_path) == before


def test_marks_of_somebody_else(tmp_path):
    for text in ('{}', '[]', 'x', '{"made by vitprune": 3}', '{"made by vitprune": {"a": "b"}}', ''):
        (tmp_path/MARK).write_text(text)
        with pytest.raises(VitpruneError, match='that vitprune did not write'): claim(tmp_path, 'a')
        assert (tmp_path/MARK).read_text() == text


def test_long_and_odd_names(tmp_path):
    for name in ('n'*255, 'ü'*127, 'a b', 'x\ny', '-f', '\udcff'):
        with write_atomic(tmp_path/name) as tmp: tmp.write_text(name.encode('utf-8', 'ignore').decode())
        assert (tmp_path/name).is_file()
        with write_folder_atomic(tmp_path/'d'/name) as new: (new/'a').write_text('')
    for bad in ('', ' ', 'a\0b'):
        with pytest.raises(VitpruneError, match='out: got'): check_output(bad)


def test_a_ledger_forgets_on_a_full_disk_nothing(tmp_path, monkeypatch):
    from vitprune_nb.evidence.results import make_row
    book = Ledger(tmp_path/'rows', tmp_path/'r.csv')
    for m in ('life', 'vtp'): book.add(f'{m}-0.3-s0-none', make_row(m, seed=0))
    before = snapshot(tmp_path)
    monkeypatch.setattr(files.os, 'replace', Failing(os.replace, 1))
    with pytest.raises(VitpruneError, match='No space is left'): book.drop('life')
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    book.drop('life')
    assert book.keys() == ['vtp-0.3-s0-none']


def test_a_kill_while_a_folder_is_removed_leaves_no_half_of_it_under_its_name(tmp_path, monkeypatch):
    work = tmp_path/'pruned.unfinished'
    claim(work, 'config.json'), (work/'config.json').write_text('{}'), (work/'sub').mkdir(), (work/'sub'/'a').write_text('a')
    monkeypatch.setattr(files.shutil, 'rmtree', lambda p: Path(p, MARK).unlink() or killed())
    with pytest.raises(KeyboardInterrupt): remove(work)
    assert not work.exists() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setattr(files, '_is_alive', lambda pid: False)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def killed(): raise KeyboardInterrupt


def test_a_plan_never_replaces_weights_that_are_no_plans(tmp_path):
    from safetensors.torch import save_file
    from vitprune_nb.engine.plan import Plan
    plan = Plan('uniform', 'vit_tiny_patch16_224', 4, 1, [[0, 1], [0]], weights={'a': torch.ones(2)})
    save_file({'mine': torch.zeros(3)}, tmp_path/'model.safetensors')
    before = (tmp_path/'model.safetensors').read_bytes()
    for name in ('model.json', 'model', 'model.txt', 'model.safetensors'):
        with pytest.raises(VitpruneError, match='path'): plan.save(tmp_path/name)
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors'] and (tmp_path/'model.safetensors').read_bytes() == before
    plan.save(tmp_path/'plan.json')
    plan.weights['a'] += 1
    plan.save(tmp_path/'plan.json')
    assert Plan.load(tmp_path/'plan.json').weights['a'].tolist() == [2, 2]
    save_file({'a': torch.full((2,), 3.)}, tmp_path/'old.safetensors')      # as plans were saved before they were marked
    old = json.loads((tmp_path/'plan.json').read_text(encoding='utf-8'))
    old['weights'] = dict(file='old.safetensors', sha256=sha256(tmp_path/'old.safetensors'))
    (tmp_path/'old.json').write_text(json.dumps(old), encoding='utf-8')
    plan.save(tmp_path/'old.json')
    assert Plan.load(tmp_path/'old.json').weights['a'].tolist() == [2, 2]
