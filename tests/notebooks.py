"""Run every notebook, solutions included.

python tests/notebooks.py          as tests, as nbdev_test does; exit code 1 when one fails, none is found or nothing moves for half an hour
python tests/notebooks.py --keep [NAME …]   in a kernel, top to bottom, outputs kept and execution counts dropped
python tests/notebooks.py --record [NAME …]   the same for the notebooks with slow cells, and those cells too: the rows of data/results/ are measured again
"""
import functools, json, os, re, signal, subprocess, symtable, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WORKERS, STALL = 2, 30*60   # processes; seconds without any notebook that begins or ends, of which each takes about a minute


def notebooks():
    "All notebooks, in reading order."
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not p.name.startswith(('_', '.')) and '.ipynb_checkpoints' not in p.parts)


def read_cells(path):
    "(kind, source) of each cell of a notebook."
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]


def environment(workers):
    "Threads shared out among the workers, no display, the embedded data, and this environment's commands first."
    env = {k: v for k, v in os.environ.items() if not k.startswith('VITPRUNE_')}
    threads = str(max(1, (os.cpu_count() or 1)//max(1, workers)))
    # unbuffered: a line that waits in a buffer looks like a notebook that stands still
    return dict(env, OMP_NUM_THREADS=threads, MPLBACKEND='agg', PYTHONUNBUFFERED='1', PATH=f'{BIN}{os.pathsep}{os.environ.get("PATH", "")}')


def lines_of(proc, stall):
    "Lines that a process writes; it is killed, with all that it started, when none comes for `stall` seconds."
    def kill(*_): os.killpg(proc.pid, signal.SIGKILL)
    signal.signal(signal.SIGALRM, kill)
    signal.alarm(stall)
    for line in proc.stdout:
        signal.alarm(stall)
        yield line
    proc.wait()
    signal.alarm(0)


def run_all(command, n, stall=STALL, cwd=ROOT, env=None):
    "Run a command that tests notebooks; 0 when it succeeds and all `n` notebooks ran, however long that takes."
    start, done, said = time.monotonic(), 0, []
    proc = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, encoding='utf-8', errors='replace', start_new_session=True)
    for line in lines_of(proc, stall):
        done += line.count('- Completed ')   # what else writes to the pipe may stand before it
        said.append(line.replace(f'{ROOT}/', ''))
        print(said[-1], end='', flush=True)
    for text in failures(said): print(text)
    print(f'{done} of {n} notebooks ran in {time.monotonic() - start:.0f} s')
    if proc.returncode < 0: print(f'notebooks: stopped, since none began or ended for {stall} s', file=sys.stderr)
    return 0 if proc.returncode == 0 and done == n > 0 else 1


def each(paths, workers):
    """nbdev's test of each notebook in a process of its own, so that what one leaves in memory ends with it: 0 when all pass.
    In nbdev_test's two processes, which run one after the other, it adds up to many gigabytes."""
    import multiprocessing
    from multiprocessing.connection import wait
    import matplotlib.pyplot, pandas, timm, torch   # noqa: F401  read once, before the processes part
    from nbdev.config import get_config
    from nbdev.test import test_nb
    fork, left, running, took, failed = multiprocessing.get_context('fork'), list(paths), {}, {}, []
    flags = get_config().tst_flags.split()
    def one(path): sys.exit(not test_nb(path, skip_flags=flags, do_print=True, basepath=ROOT)[0])
    while left or running:
        while left and len(running) < workers:
            path = left.pop(0)
            p = fork.Process(target=one, args=(path,))
            p.start()
            running[p.sentinel] = p, path, time.monotonic()
        for done in wait(list(running)):
            p, path, start = running.pop(done)
            p.join()
            took[path] = time.monotonic() - start
            if p.exitcode: failed.append(path)
    for path in sorted(took, key=took.get, reverse=True): print(f'{path}: {took[path]:.0f} s')
    for path in failed: print(f'{path} failed')
    return int(bool(failed))


def test(workers=WORKERS):
    "Every notebook as nbdev_test runs it, with three guards that it lacks: each in a process of its own; it stops when nothing moves; and it fails when fewer notebooks ran than there are."
    return run_all([sys.executable, Path(__file__).resolve(), '--each', str(workers)], len(notebooks()), env=environment(workers))


def failures(lines, tail=8):
    "What nbdev_test said of each notebook that failed, shortened: error and notebook, the cell, the end of the traceback. It stands far up in the log otherwise."
    starts = [i for i, l in enumerate(lines) if re.match(r'[\w.]+ in \S.*\.ipynb:$', l)]
    out = []
    for i, end in zip(starts, [*starts[1:], len(lines)]):
        block = lines[i:end]
        last = next((j for j, l in enumerate(block) if l.startswith(('Starting ', '- Completed '))), len(block))
        block = [l for l in block[:last] if l.strip()]
        head = [l for l in block if l.startswith('While Executing Cell')][:1]
        out.append(''.join(['FAILED: ', block[0], *head, *block[2 + len(head):][-tail:]]))
    return out


FLAGGED = re.compile(r'^#\s*\|\s*(slow|cuda|notest)\b', re.M)   # the flags of settings.ini's tst_flags
SLOW = re.compile(r'^#\s*\|\s*slow\b', re.M)
WANTED = re.compile(r"os\.environ\['(VITPRUNE_\w+)'\]")      # what a cell cannot do without


def rests(source, slow=False):
    "Whether a cell keeps the outputs that it has: one flagged cuda, a slow one unless it is asked for, and one that names a file of the user's which nobody has given."
    if not FLAGGED.search(source): return False
    return not (slow and SLOW.search(source)) or any(v not in os.environ for v in WANTED.findall(source))


def runnable(path):
    "The code cells of a notebook that a test may run."
    return [s for kind, s in read_cells(path) if kind == 'code' and not s.lstrip().startswith('%') and not FLAGGED.search(s)]


@functools.cache
def names(source):
    "The names that a cell binds, and those that it looks for elsewhere."
    def used(table):
        own = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (s.is_global() or table.get_type() == 'module')}
        return own.union(*map(used, table.get_children()))
    table = symtable.symtable(source, 'cell', 'exec')
    binds = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    # a method that is added to a class belongs to it
    return binds | set(re.findall(r'^@patch\b.*\n(?:@.*\n)*def \w+\(self:\s*(\w+)', source, re.M)), used(table) - binds


def needed(cells, wanted):
    "The cells without which `wanted`, a set of names, would lack something, in their order."
    said, chosen, wanted = [names(c) for c in cells], set(), set(wanted)
    said = said[:max((i + 1 for i, (binds, _) in enumerate(said) if binds & wanted), default=0)]   # what comes later only binds the names anew
    while more := {i for i, (binds, _) in enumerate(said) if binds & wanted} - chosen:
        chosen |= more
        wanted = set().union(*(said[i][1] for i in more))
    return [cells[i] for i in sorted(chosen)]


def run_cells(cells, have):
    "Run them in the namespace `have`, and return it."
    for c in cells: exec(compile(c, '<cell>', 'exec'), have)
    return have


def execute(path, slow=False):
    "Run one notebook in a kernel and keep its outputs; cells flagged cuda, and slow unless it is asked for, keep the outputs they have."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    for c in nb.cells:
        if c.cell_type == 'code' and rests(c.source, slow): c.metadata['tags'] = ['flagged']
    NotebookClient(nb, timeout=None if slow else 900, kernel_name='python3', resources=dict(metadata=dict(path=path.parent)),
                   skip_cells_with_tag='flagged', coalesce_streams=True,
                   store_widget_state=False).execute()
    for c in nb.cells:
        c.metadata.pop('tags', None)
        if 'outputs' in c: c.outputs = [o for o in c.outputs if o.output_type != 'stream' or o.text.strip()]   # a bar leaves blanks where it was
    nbformat.write(nb, path)


def keep(names, slow=False):
    "Execute all notebooks (or those whose path holds one of `names`) in place, in reading order; the first error stops. `slow`: only notebooks with slow cells, and these cells too."
    os.environ.update(environment(1))
    del os.environ['MPLBACKEND']   # the kernel's own backend puts figures into the notebook
    for p in notebooks():
        if names and not any(n in str(p) for n in names) or slow and not SLOW.search('\n'.join(s for _, s in read_cells(p))): continue
        start = time.monotonic()
        execute(p, slow)
        print(f'{p.relative_to(ROOT)}: done after {time.monotonic() - start:.0f} s', flush=True)
    return subprocess.run([BIN/'nbdev_clean'], cwd=ROOT).returncode


if __name__ == '__main__':
    how, names = sys.argv[1:2], sys.argv[2:]
    if how == ['--each']: sys.exit(each(notebooks(), int(names[0])))
    if how not in ([], ['--keep'], ['--record']): sys.exit(__doc__)
    sys.exit(keep(names, how == ['--record']) if how else test())
