"""What several test files share."""
import os, subprocess, sys
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
