"""Random command lines and calls: one line for what a user can mend, nothing left behind, and no traceback."""
import json, os, random, subprocess, sys

import fuzz, fuzz_calls, pytest


@pytest.fixture(scope='module')
def arena(tmp_path_factory):
    "Made in a process of its own, which warms up once and forks for every case."
    return tmp_path_factory.mktemp('fuzz')


def misbehaved(arena, kind, n, seed):
    "How n cases end: {number: (what it was, what is wrong)}, and how often which exit code."
    out = arena/f'{kind}-{seed}.json'
    subprocess.run([sys.executable, fuzz.__file__, f'--{kind}s', str(n), '--seed', str(seed), '--json', str(out)], check=True, timeout=3600)
    found = json.loads(out.read_text(encoding='utf-8'))
    return found['bad'], found['codes']


@pytest.mark.parametrize('kind, n', [('line', 150), ('call', 80)])
def test_a_sample(arena, kind, n):
    bad, codes = misbehaved(arena, kind, n, 1)
    assert bad == []
    assert sum(codes.values()) == n and codes['0'] > n/8 and codes['2'] > n/4      # work is done, and much is refused


@pytest.mark.slow
@pytest.mark.parametrize('kind, n', [('line', 1500), ('call', 400)])
def test_all(arena, kind, n):
    bad, codes = misbehaved(arena, kind, n, 0)
    assert bad == [] and sum(codes.values()) == n


def test_the_harness_sees_a_traceback_and_what_is_left(tmp_path, monkeypatch, capsys):
    "A bug, a file that stays, a file of the user's that changes: each is found."
    from vitprune_nb import cli
    for d in ('new', 'tmp', 'user', 'case', 'zoo'): (tmp_path/d).mkdir()
    (tmp_path/'zoo/file').write_text('mine')
    a = object.__new__(fuzz.Arena)
    a.folder, a.new, a.zoo, a.seed = tmp_path, tmp_path/'new', tmp_path/'zoo', 0
    a.before, a.top = fuzz.snapshot(a.zoo), sorted(os.listdir('/'))
    def wrong(work):
        a.fresh(random.Random(0))
        code, out, err, _ = fuzz.run_child(work, a.new, 60)
        return a.judge(['cost'], code, out, err)
    refuse = lambda: cli.main(['cost', '--colour'])
    assert wrong(refuse) == [] and wrong(lambda: 0) == []
    assert 'traceback: ZeroDivisionError' in wrong(lambda: 1/0)[0]
    assert wrong(lambda: open('left', 'w').close() or refuse()) == ["left ['left']"]
    assert wrong(lambda: os.kill(os.getpid(), 9)) == ['exit code -9']
    assert 'file changed' in wrong(lambda: (tmp_path/'zoo/file').write_text('yours') and refuse())[0]


def test_the_same_seed_makes_the_same_cases():
    lines = lambda seed: [fuzz.command_line(random.Random(f'line {seed} {i}')) for i in range(50)]
    calls = lambda seed: [fuzz_calls.random_call(random.Random(f'call {seed} {i}'), None)[0] for i in range(50)]
    assert lines(3) == lines(3) != lines(4) and calls(3) == calls(3) != calls(4)
    assert {words[0] for words, _ in lines(3)} == set(fuzz.COMMANDS)
