"""Run every notebook, solutions included.

python tests/notebooks.py          as tests (nbdev_test); exit code 1 when one fails, none is found or the time is up
python tests/notebooks.py --keep   in a kernel, top to bottom, outputs kept and execution counts dropped
"""
import os, signal, subprocess, sys, time
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


def keep():
    "Execute all notebooks in place, in reading order; the first error stops."
    for p in notebooks():
        start = time.monotonic()
        rc = subprocess.run([BIN/'jupyter', 'execute', '--inplace', '--timeout=900', '--log-level=ERROR', p], cwd=ROOT, env=environment(1)).returncode
        print(f'{p.relative_to(ROOT)}: {"done" if rc == 0 else "FAILED"} after {time.monotonic() - start:.0f} s', flush=True)
        if rc: return rc
    return subprocess.run([BIN/'nbdev_clean'], cwd=ROOT).returncode


if __name__ == '__main__': sys.exit(keep() if '--keep' in sys.argv[1:] else test())
