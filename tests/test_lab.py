"""`make lab`: JupyterLab starts on the map, and its kernel is this environment's."""
import contextlib, json, os, signal, socket, subprocess, sys, time, urllib.error, urllib.request

import pytest
from conftest import BIN, ROOT, clean_env

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import notebooks

TOKEN = 'for-this-test-only'


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A running server, started as `make lab` starts it but without a browser: lab(path, method) -> JSON."
    home = tmp_path_factory.mktemp('jupyter')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    dirs = {f'JUPYTER_{k}_DIR': str(home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')} | {f'JUPYTERLAB_{k}_DIR': str(home/k.lower()) for k in ('SETTINGS', 'WORKSPACES')}
    proc = subprocess.Popen([BIN/'jupyter', 'lab', 'nbs/index.ipynb', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root',
                             f'--IdentityProvider.token={TOKEN}', '--ServerApp.disable_check_xsrf=True'], cwd=ROOT, env=clean_env(**dirs),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    def ask(path, method='GET', body=None):
        req = urllib.request.Request(f'http://127.0.0.1:{port}{path}', method=method, data=body and json.dumps(body).encode(),
                                     headers={'Authorization': f'token {TOKEN}', 'Content-Type': 'application/json'})
        with urllib.request.urlopen(req, timeout=30) as r:
            text = r.read().decode()
            return json.loads(text) if r.headers.get_content_type() == 'application/json' and text else text
    try:
        for _ in range(240):
            try: ask('/api/status'); break
            except (urllib.error.URLError, ConnectionError):
                assert proc.poll() is None, 'the server stopped'
                time.sleep(.25)
        yield ask
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(proc.pid, signal.SIGTERM)
        proc.wait(timeout=30)


def test_server_is_up(lab):
    assert lab('/api/status')['kernels'] == 0


def test_the_map_is_there_and_readable(lab):
    page = lab('/api/contents/index.ipynb')
    assert page['type'] == 'notebook' and page['content']['cells'][0]['source'].startswith('# ')
    assert '<title>JupyterLab</title>' in lab('/lab/tree/index.ipynb')


def test_all_lessons_are_listed(lab):
    for folder in {p.parent for p in notebooks()}:
        listed = {e['name'] for e in lab(f'/api/contents/{folder.relative_to(ROOT/"nbs").as_posix()}')['content']}
        assert {p.name for p in folder.glob('*.ipynb')} <= listed


def test_a_kernel_starts(lab):
    assert lab('/api/kernelspecs')['default'] == 'python3'
    kernel = lab('/api/kernels', 'POST', dict(name='python3'))
    try: assert lab(f'/api/kernels/{kernel["id"]}')['name'] == 'python3'
    finally: lab(f'/api/kernels/{kernel["id"]}', 'DELETE')
