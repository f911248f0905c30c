"""What several test files share."""
import contextlib, json, os, re, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

ONE_THREAD = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')   # for scripts that tests start and kill


def clean_env(**more):
    "The caller's environment without settings that change what the course does."
    return {k: v for k, v in os.environ.items() if not k.startswith('VITPRUNE_')} | dict(MPLBACKEND='agg', TERM='dumb') | more


@pytest.fixture(scope='session')
def vitprune():
    "Runs the installed console script: vitprune('cost', '--json') -> CompletedProcess."
    def run(*args, cwd=None, timeout=240, **env):
        return subprocess.run([BIN/'vitprune', *map(str, args)], cwd=cwd, env=clean_env(**env), capture_output=True, text=True, timeout=timeout)
    return run


@pytest.fixture
def one_thread():
    "As in scripts started with ONE_THREAD: another number of threads adds in another order."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(script, *args):
    "A Python script of this folder as a process that a test can kill."
    return subprocess.Popen([sys.executable, str(ROOT/'tests'/script), *map(str, args)], env=ONE_THREAD, stdout=subprocess.PIPE, text=True)


NO_CONNECTION = re.compile('Rendezvous[A-Za-z]*Error|EADDRINUSE|connectFullMesh')      # before anything was computed


def part():
    "Two processes that are done wait for each other: one that leaves early closes connections that the other still uses."
    import torch.distributed as dist
    if dist.is_initialized(): dist.barrier(); dist.destroy_process_group()


def two_processes(script, *args):
    "What torchrun prints of a script of this folder in two processes; once more when they could not reach each other, which is the machine's fault."
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr=127.0.0.1', '--nproc_per_node=2', str(ROOT/'tests'/script)]
    for last in (False, True):
        r = subprocess.run([*words, *map(str, args)], env=ONE_THREAD, capture_output=True, text=True, timeout=600)
        if r.returncode == 0: return r.stdout
        if last or not NO_CONNECTION.search(r.stderr): break
    raise AssertionError(r.stderr[-6000:])


@contextlib.contextmanager
def jupyter_lab(root, home, page, *options, token='for-this-test-only', **env):
    "A server as `make lab` starts it but without a browser: ask(path, method) -> JSON; `ask.address(page)` opens a page."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    dirs = {f'JUPYTER_{k}_DIR': str(home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    dirs |= {f'JUPYTERLAB_{k}_DIR': str(home/k.lower()) for k in ('SETTINGS', 'WORKSPACES')}
    words = [BIN/'jupyter', 'lab', page, '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root',
             f'--IdentityProvider.token={token}', '--ServerApp.disable_check_xsrf=True', *options]
    proc = subprocess.Popen(words, cwd=root, env=clean_env(**dirs, **env), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True)
    def ask(path, method='GET', body=None):
        head = {'Authorization': f'token {token}', 'Content-Type': 'application/json'}
        req = urllib.request.Request(f'http://127.0.0.1:{port}{path}', method=method, data=body and json.dumps(body).encode(),
                                     headers=head)
        with urllib.request.urlopen(req, timeout=30) as r:
            text = r.read().decode()
            return json.loads(text) if r.headers.get_content_type() == 'application/json' and text else text
    ask.address = lambda page: f'http://127.0.0.1:{port}/lab/tree/{page}?token={token}&reset'
    try:
        for _ in range(240):
            try:
                ask('/api/status')
                break
            except (urllib.error.URLError, ConnectionError):
                assert proc.poll() is None, 'the server stopped'
                time.sleep(.25)
        yield ask
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(proc.pid, signal.SIGTERM)
        proc.wait(timeout=30)
