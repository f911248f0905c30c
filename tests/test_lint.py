"""No line that looks like a check and checks nothing, none that ruff finds fault with, none too long for a screen, and no name that nothing binds."""
import ast, builtins, re, subprocess, sys

import nbformat, pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import FLAGGED, names, notebooks, read_cells


def idle_checks(code):
    "Lines of Python that compare and throw the answer away, or assert what is always true."
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Compare, ast.BoolOp)):
            # `a and f()` is a statement; `a == b and c == d` is an idle check
            if isinstance(node.value, ast.Compare) or not any(isinstance(n, ast.Call) for n in ast.walk(node.value)): found.append(node.lineno)
        if isinstance(node, ast.Assert):
            t = node.test
            if isinstance(t, ast.Tuple) and t.elts or isinstance(t, ast.Constant) and t.value: found.append(node.lineno)
    return found


def plain_python(source):
    "A notebook cell without lines that only IPython understands."
    return '\n'.join('' if re.match(r'\s*[%!]', l) else l for l in source.splitlines())


def test_the_lint_sees_idle_checks():
    assert idle_checks('x = 1\nx == 1') == [2]
    assert idle_checks('assert (x == 1, "text")') == [1]
    assert idle_checks('assert 1') == [1]
    assert idle_checks('a < b and b < c') == [1]
    assert idle_checks('assert x == 1\nok = x == 1\nx and print(x)\nassert f(), "text"') == []


@pytest.mark.parametrize('path', sorted([*(ROOT/'tests').glob('*.py'), *(ROOT/'vitprune_nb').rglob('*.py')]), ids=lambda p: str(p.relative_to(ROOT)))
def test_file_has_no_idle_check(path):
    assert idle_checks(path.read_text(encoding='utf-8')) == []


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_notebook_has_no_idle_check(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']
    assert [c.id for c in code if idle_checks(plain_python(c.source))] == []


@pytest.mark.parametrize('path', sorted((ROOT/'tests').glob('test_*.py')), ids=lambda p: p.name)
def test_every_test_can_fail(path):
    "A test function asserts or expects an exception: itself, through a helper of its file, or through a `check_…` of the package."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    def checks(f, seen=()):
        for n in ast.walk(f):
            if isinstance(n, ast.Assert) or isinstance(n, ast.Attribute) and n.attr in ('raises', 'fail', 'assert_close'): return True
            name = n.id if isinstance(n, ast.Name) else None
            if (name or '').startswith('check_'): return True
            if name in functions and name not in seen and functions[name] is not f and checks(functions[name], (*seen, name)): return True
        return False
    assert [n for n, f in functions.items() if n.startswith('test_') and not checks(f)] == []


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_notebook_leaves_gradients_on(path):
    "nbdev_test runs several notebooks in one process; one that turns gradients off for good breaks those after it."
    code = ''.join(c.source + '\n' for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code')
    assert not re.findall(r'set_grad_enabled\((\w+)\)', code)[-1:] == ['False']


def test_ruff_finds_nothing():
    said = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format=concise', 'vitprune_nb', 'tests'],
                          cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_ruff_finds_a_fault(tmp_path):
    "The rules are those of pyproject.toml, and they see an unused import and a default that is shared."
    (tmp_path/'a.py').write_text('import os\ndef f(x=[]): return x\n')
    said = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format=concise', '--config', ROOT/'pyproject.toml', tmp_path],
                          capture_output=True, text=True)
    assert said.returncode == 1 and 'F401' in said.stdout and 'B006' in said.stdout, said.stdout + said.stderr


WIDTH = 110


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_no_code_line_is_cut_off_on_the_screen(path):
    long = [l for kind, s in read_cells(path) if kind == 'code' for l in s.splitlines() if len(l) > WIDTH]
    assert long == []


KNOWN = set(dir(builtins)) | {'__file__', 'display', 'get_ipython'}    # a module's, and the kernel's


def nowhere(cells):
    "Names that a cell looks for and no cell binds, slow ones included, which no test runs."
    bound, wanted = zip(*(names(c) for c in cells))
    return sorted(set().union(*wanted) - KNOWN.union(*bound))


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_every_name_of_a_lesson_is_bound_in_it(path):
    cells = [s for kind, s in read_cells(path) if kind == 'code' and not s.lstrip().startswith('%')]
    assert not cells or nowhere(cells) == []


def test_a_name_that_is_nowhere_is_noticed():
    assert nowhere(['import torch', 'def f(x): return ready(x)', 'y = [f(z) for z in torch.ones(2)]']) == ['ready']


def left_by_flagged(cells):
    "(name, start of the cell) wherever a cell that tests run reads a name that a cell which they leave out has bound last."
    last, found = {}, []
    for source in cells:
        binds, used = names(source)
        flagged = bool(FLAGGED.search(source))
        if not flagged: found += [(n, source[:60]) for n in sorted(used) if last.get(n)]
        last.update(dict.fromkeys(binds, flagged))
    return found


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_what_reads_a_slow_cell_is_slow_itself(path):
    "Otherwise it fails in the tests or, worse, reads what an earlier cell left under the same name."
    assert left_by_flagged([s for kind, s in read_cells(path) if kind == 'code' and not s.lstrip().startswith('%')]) == []


def test_a_name_that_a_slow_cell_leaves_is_noticed():
    assert left_by_flagged(['t = 1', '#| slow\nt = 2', 'print(t)', 't = 3', 'print(t)']) == [('t', 'print(t)')]
