"""What an install gives: a console script, quick imports, a README whose code runs."""
import configparser, json, re, subprocess, sys

import pytest
from conftest import ROOT, clean_env

sys.path.insert(0, str(ROOT/'tests'))
import readme

MODULES = sorted('.'.join(p.relative_to(ROOT/'vitprune_nb').with_suffix('').parts)
                 for p in (ROOT/'vitprune_nb').rglob('*.py') if not p.stem.startswith('_'))


def python(code, cwd):
    "What a fresh Python, somewhere else, prints."
    r = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=clean_env(), capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()


def test_console_script_and_version(vitprune, tmp_path):
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    r = vitprune('--version', cwd=tmp_path)
    assert (r.returncode, r.stdout.strip(), r.stderr) == (0, config['DEFAULT']['version'], '')


def test_settings_are_the_one_source_of_the_version(tmp_path):
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    version, lesson = config['DEFAULT']['version'], next((ROOT/'nbs').rglob('27_package.ipynb'))
    assert python('import vitprune_nb as v; print(v.__version__, v.__doc__[:25])', tmp_path) == f'{version} What most people need of'
    assert json.dumps(f'__version__ = "{version}"')[1:-1] in lesson.read_text(encoding='utf-8')


def test_import_from_anywhere(tmp_path):
    assert python('import vitprune_nb, pathlib; print(pathlib.Path(vitprune_nb.__file__).parent)', tmp_path) == str(ROOT/'vitprune_nb')
    assert python('from vitprune_nb.data import load_data; print(len(load_data()))', tmp_path) == '2000'


def test_installed_requirements_agree():
    r = subprocess.run([sys.executable, '-m', 'pip', '--disable-pip-version-check', 'check'], env=clean_env(), capture_output=True, text=True)
    assert r.returncode == 0, r.stdout


def test_package_imports_no_build_tool(tmp_path):
    "nbdev and fastcore stay out of a user's programs."
    code = f'import importlib, sys\nfor m in {MODULES}: importlib.import_module("vitprune_nb." + m)\n' \
           'print(sorted({"nbdev", "fastcore", "execnb", "IPython", "pytest"} & set(sys.modules)))'
    assert python(code, tmp_path) == '[]'


HEAVY = {'torch', 'timm', 'torchvision', 'numpy', 'pandas', 'matplotlib', 'scipy', 'accelerate', 'pydantic', 'PIL', 'onnx', 'IPython'}


def test_import_is_cheap(tmp_path):
    """`import vitprune_nb` loads itself alone; the modules that a method needs load, beside torch and
    timm, nothing that draws, tabulates or trains."""
    code = '''
import sys, torch, timm
start = set(sys.modules)
import vitprune_nb
package = set(sys.modules)
import vitprune_nb.engine.slim, vitprune_nb.methods.patch_slimming, vitprune_nb.vit.model
print(sorted(package - start), sorted({m.split('.')[0] for m in set(sys.modules) - package}))'''
    package, modules = re.findall(r'\[(.*?)\]', python(code, tmp_path))
    assert package == "'vitprune_nb'"
    assert set(re.findall(r"'(\w+)'", modules)) & HEAVY <= {'PIL', 'pydantic', 'scipy'}


def test_help_is_quick(tmp_path):
    "It loads none of the libraries that take time to load."
    code = '''
import contextlib, io, sys
from vitprune_nb.cli import main
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit): main(['--help'])
assert 'prune' in said.getvalue()
print(sorted({m.split('.')[0] for m in sys.modules}))'''
    assert set(re.findall(r"'(\w+)'", python(code, tmp_path))) & HEAVY == set()


def test_readme_quickstart_prints_what_it_says():
    """The first line is exact. Accuracy may differ by one image in a hundred where another processor rounds otherwise."""
    said = re.search(r'<!-- quickstart-output:start -->\s*```text\n(.*?)\n```', readme.README.read_text(encoding='utf-8'), re.S)[1]
    printed = readme.run_quickstart()
    number = r'\d+(?:\.\d+)?'
    assert re.sub(number, '#', printed) == re.sub(number, '#', said)
    for a, b in zip(re.findall(number, printed), re.findall(number, said)): assert float(a) == pytest.approx(float(b), rel=.01, abs=.01)


def test_readme_blocks_are_up_to_date():
    text = readme.README.read_text(encoding='utf-8')
    for name, block in readme.blocks().items():
        shown = text.split(f'<!-- {name}:start -->')[1].split(f'<!-- {name}:end -->')[0].strip()
        assert shown == block.strip(), f'{name} is out of date: run `python tests/readme.py`'


def test_map_lists_every_lesson():
    shown = '\n'.join(s for kind, s in readme.read_cells(readme.INDEX) if kind == 'markdown')
    assert readme.lesson_table('') in shown, 'run `python tests/readme.py`'
    assert [l['name'] for l in readme.lessons() if not (l['title'] and l['summary'] and l['time'])] == []


@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md', 'data/README.md'])
def test_links_of_the_pages_lead_somewhere(page):
    links = re.findall(r'\]\(([^)#\s]+)\)|(?:src|href)="([^"#]+)"', (ROOT/page).read_text(encoding='utf-8'))
    links = [a or b for a, b in links]
    assert [l for l in links if '://' not in l and not ((ROOT/page).parent/l).exists()] == []
