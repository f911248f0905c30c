"""The rooms of the package: every import runs downward, and no method needs another."""
import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT/'vitprune_nb'
FLOORS = [['errors'], ['files'], ['core'], ['data', 'viz'], ['vit'], ['engine'], ['train'], ['evidence'], ['methods'],
          ['experiment', 'deploy', 'demo', 'gallery', 'papers'], ['run'], ['cli']]   # from the ground up
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FAMILY = dict(significance='patch_slimming', baselines='patch_slimming', life_run='life')   # files that belong to another one's method
JOINED = dict(both={'vtp', 'patch_slimming'})   # methods that put others together


def modules():
    "Dotted names within the package, and their sources."
    files = [p for p in PACKAGE.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')]
    return {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts): p.read_text(encoding='utf-8') for p in files}


def imports(name, source, known):
    "Modules of the package that a module imports, at its top or anywhere in it."
    here, found = name.split('.'), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix('vitprune_nb.') for a in node.names if a.name.startswith('vitprune_nb.')}
        if not isinstance(node, ast.ImportFrom): continue
        module = (node.module or '').split('.') if node.module else []
        if node.level: base = here[:len(here) - node.level] + module
        elif module[:1] == ['vitprune_nb']: base = module[1:]
        else: continue
        dotted = '.'.join(base)
        found |= {dotted} if dotted in known else {'.'.join([*base, a.name]) for a in node.names}
    return found & set(known)


def faults(sources):
    "What is wrong with the imports of these modules, as sentences."
    arrows, said = {m: imports(m, s, sources) for m, s in sources.items()}, []
    room = lambda m: m.split('.')[0]
    for m, targets in arrows.items():
        for t in sorted(targets):
            if FLOOR[room(t)] > FLOOR[room(m)]: said.append(f'{m} imports {t}, which is above it')
            if room(t) == 'papers' and room(m) not in ('papers', 'cli'): said.append(f'{m} imports {t}, which only papers may')
            a, b = (x.removeprefix('methods.') for x in (m, t))
            theirs = {FAMILY.get(a, a), *JOINED.get(a, ())}
            if room(m) == room(t) == 'methods' and b != 'base' and FAMILY.get(b, b) not in theirs:
                said.append(f'{m} imports {t}, another method')
    done, path = set(), []
    def visit(m):
        if m in path: said.append('circle: ' + ' -> '.join([*path[path.index(m):], m])); return
        if m in done: return
        path.append(m)
        for t in sorted(arrows[m]): visit(t)
        path.pop(); done.add(m)
    for m in sorted(arrows): visit(m)
    return said


def test_every_module_has_a_room():
    assert sorted({m.split('.')[0] for m in modules()} - set(FLOOR)) == []


def test_imports_run_downward_without_circles():
    assert faults(modules()) == []


@pytest.mark.parametrize('name, line, said', [
    ('vit.cost', 'from ..engine.slim import SlimViT', 'vit.cost imports engine.slim, which is above it'),
    ('engine.policy', 'from vitprune_nb.cli import main', 'engine.policy imports cli, which is above it'),
    ('engine.policy', 'def late():\n    import vitprune_nb.papers.timing', 'engine.policy imports papers.timing, which is above it'),
    ('demo', 'from .papers.timing import time_case', 'demo imports papers.timing, which only papers may'),
    ('methods.life', 'from .cosine import collect', 'methods.life imports methods.cosine, another method'),
    ('methods.both', 'from .cosine import collect', 'methods.both imports methods.cosine, another method'),
    ('vit.cost', 'from .model import create_vit', 'circle: vit.cost -> vit.model -> vit.cost'),
])
def test_the_check_can_fail(name, line, said):
    sources = modules()
    sources[name] += f'\n{line}\n'
    if 'circle' in said: sources['vit.model'] += '\nfrom .cost import model_macs\n'
    assert said in faults(sources)
