"""`make lab`: JupyterLab starts on the map, and its kernel is this environment's."""
import sys

import pytest
from conftest import ROOT, jupyter_lab

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import notebooks


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with jupyter_lab(ROOT, tmp_path_factory.mktemp('jupyter'), 'nbs/index.ipynb') as ask: yield ask


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
