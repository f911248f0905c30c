"""What several test files share."""
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def clean_env(**more):
    "The caller's environment without settings that change what the course does."
    return {k: v for k, v in os.environ.items() if not k.startswith('VITPRUNE_')} | dict(MPLBACKEND='agg', TERM='dumb') | more


@pytest.fixture(scope='session')
def vitprune():
    "Runs the installed console script: vitprune('cost', '--json') -> CompletedProcess."
    def run(*args, cwd=None, timeout=240, **env):
        return subprocess.run([BIN/'vitprune', *map(str, args)], cwd=cwd, env=clean_env(**env), capture_output=True, text=True, timeout=timeout)
    return run
