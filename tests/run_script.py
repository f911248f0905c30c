"""An experiment in processes of their own, for test_run.py.

python run_script.py CONFIG OUT             run it in this process; the rows are printed as JSON
python run_script.py CONFIG OUT KILLS SEED  kill -9 it KILLS times at random moments, then let it finish; prints how long each process lived
torchrun --nproc_per_node 2 run_script.py CONFIG OUT   the same run in two processes
"""
import json, os, random, signal, sys, time
import torch
from conftest import part
from vitprune_nb.run import run_config


def child(config, out):
    "Run the experiment in a forked process, so that a kill costs no second import; returns its pid."
    pid = os.fork()
    if pid: return pid
    code = 1
    try: run_config(config, out=out); code = 0
    finally: os._exit(code)


def ends_within(pid, seconds):
    "Wait for a process at most so long; its status, or None when it still runs."
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        time.sleep(.002)


def alone(config, out):
    "Seconds that the experiment takes when nobody disturbs it."
    start = time.monotonic()
    assert ends_within(child(config, out), 600) == 0
    return time.monotonic() - start


def killed(config, out, kills, seed):
    "Kill it at moments drawn from the length of an undisturbed run; then let it finish."
    draw, whole, lived = random.Random(seed), alone(config, out + '-alone'), []
    for _ in range(kills):
        pid, wait = child(config, out), draw.uniform(0, whole)
        status = ends_within(pid, wait)
        if status is None: os.kill(pid, signal.SIGKILL); _, status = os.waitpid(pid, 0); lived.append(round(wait, 2))
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    assert ends_within(child(config, out), 600) == 0
    print(json.dumps(dict(whole=whole, lived=lived)))


if __name__ == '__main__':
    torch.set_num_threads(1)
    config, out = sys.argv[1:3]
    if len(sys.argv) > 3: killed(config, out, int(sys.argv[3]), int(sys.argv[4]))
    else:
        r = run_config(config, out=out)
        if int(os.environ.get('RANK', 0)) == 0: print(json.dumps(r['rows']))
        part()
