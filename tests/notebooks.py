"""Run every notebook, solutions included.

python tests/notebooks.py          as tests (nbdev_test); exit code 1 when one fails, none is found or the time is up
python tests/notebooks.py --keep [NAME …]   in a kernel, top to bottom, outputs kept and execution counts dropped
"""
import os, re, signal, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WORKERS, LIMIT = 2, 20*60   # processes; seconds for all notebooks together


def notebooks():
    "All notebooks, in reading order."
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not p.name.startswith(('_', '.')) and '.ipynb_checkpoints' not in p.parts)


def environment(workers):
    "Threads shared out among the workers, no display, the embedded data, and this environment's commands first."
    env = {k: v for k, v in os.environ.items() if not k.startswith('VITPRUNE_')}
    threads = str(max(1, (os.cpu_count() or 1)//max(1, workers)))
    return dict(env, OMP_NUM_THREADS=threads, MPLBACKEND='agg', PATH=f'{BIN}{os.pathsep}{os.environ.get("PATH", "")}')


def test(workers=WORKERS, limit=LIMIT):
    "nbdev_test, with the two guards it lacks: a time limit, and a failure when fewer notebooks ran than there are."
    files, done, start = notebooks(), 0, time.monotonic()
    proc = subprocess.Popen([BIN/'nbdev_test', '--n_workers', str(workers), '--do_print', '--timing'], cwd=ROOT, env=environment(workers),
                            stdout=subprocess.PIPE, text=True, encoding='utf-8', start_new_session=True)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(proc.pid, signal.SIGKILL))
    signal.alarm(limit)
    for line in proc.stdout:
        done += line.startswith('- Completed')
        print(line.replace(f'{ROOT}/', ''), end='', flush=True)
    rc = proc.wait(); signal.alarm(0)
    print(f'{done} of {len(files)} notebooks ran in {time.monotonic() - start:.0f} s')
    if rc < 0: print(f'notebooks: stopped after {limit} s, the limit', file=sys.stderr)
    return 0 if rc == 0 and done == len(files) > 0 else 1


SLOW = re.compile(r'^#\s*\|\s*(slow|cuda|notest)\b', re.M)   # the flags of settings.ini's tst_flags


def execute(path):
    "Run one notebook in a kernel and keep its outputs; cells flagged slow or cuda keep the outputs they have."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    for c in nb.cells:
        if c.cell_type == 'code' and SLOW.search(c.source): c.metadata['tags'] = ['flagged']
    NotebookClient(nb, timeout=900, kernel_name='python3', resources=dict(metadata=dict(path=path.parent)),
                   skip_cells_with_tag='flagged', coalesce_streams=True).execute()
    for c in nb.cells: c.metadata.pop('tags', None)
    nbformat.write(nb, path)


def keep(names):
    "Execute all notebooks (or those whose path holds one of `names`) in place, in reading order; the first error stops."
    os.environ.update(environment(1))
    del os.environ['MPLBACKEND']   # the kernel's own backend puts figures into the notebook
    for p in notebooks():
        if names and not any(n in str(p) for n in names): continue
        start = time.monotonic()
        execute(p)
        print(f'{p.relative_to(ROOT)}: done after {time.monotonic() - start:.0f} s', flush=True)
    return subprocess.run([BIN/'nbdev_clean'], cwd=ROOT).returncode


if __name__ == '__main__': sys.exit(keep([a for a in sys.argv[1:] if a != '--keep']) if '--keep' in sys.argv[1:] else test())
