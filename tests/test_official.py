"Comparisons with somebody's code: what is refused, what is left as it was, and rows that are replaced."
import functools, subprocess, sys

import pytest
from vitprune_nb.engine.policy import Policy, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.measure import bench
from vitprune_nb.evidence.results import append_rows, make_row, read_rows
from vitprune_nb.papers.official import OFFICIAL, Official, clone_of, commit_of, compare, main, plain, race, their_modules

CODE = '''
import helper
def logits(model, images, keep):
    x = model.blocks[0](model._pos_embed(model.patch_embed(images)))[:, :helper.MORE + keep]
    return model.forward_head(model.norm(model.blocks[1:](x)))
'''


class Toy(Official):
    method, repo = 'toy', 'somebody/toy'
    models, settings = (('vit_tiny_patch16_224', dict(img_size=32, depth=2, embed_dim=48, num_heads=3)),), (dict(keep=1), dict(keep=3))
    raced = dict(keep=1)
    def theirs(self, load, model, keep): return functools.partial(load('toy_net').logits, model, keep=keep)
    def ours(self, model, keep): return SlimViT(model, Policy({1: Step(keep=range(keep))}))
    def wrong(self, model, keep): return self.ours(model, keep - 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(OFFICIAL, 'toy', Toy())
    code = tmp_path/'code'
    (code/'toy').mkdir(parents=True)
    (code/'toy'/'toy_net.py').write_text(CODE)
    (code/'toy'/'helper.py').write_text('MORE = 1')
    return code


def test_equal_code_agrees_and_a_slip_is_seen(folder):
    right = compare('toy', folder, say=lambda text: None)
    assert [r['schedule'] for r in right] == [dict(keep=k, model='img_size 32, depth 2, embed_dim 48, num_heads 3') for k in ('1', '3')]
    assert all(r['note']['gap_double'] < 1e-12 and r['note']['spoilt'] > 1e-3 for r in right)
    (folder/'toy'/'helper.py').write_text('MORE = 2')
    assert compare('toy', folder, say=lambda text: None)[0]['note']['gap_double'] > 1e-3


@pytest.mark.parametrize('text', [CODE, 'import a_package_of_2019', 'import sys; sys.exit()', 'logits = None', CODE.replace('MORE', 'LESS'), CODE + 'import sys; sys.path.clear(); raise ValueError'])
def test_the_interpreter_is_as_it_was(folder, text):
    (folder/'toy'/'toy_net.py').write_text(text)
    modules, path, writes = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    before = sorted(p.name for p in folder.rglob('*'))
    if text == CODE: compare('toy', folder, say=lambda text: None)
    else:
        with pytest.raises(VitpruneError, match='was raised .*; allowed: a checkout of somebody/toy that runs'):
            compare('toy', folder, say=lambda text: None)
    assert not {m for m in set(sys.modules) - modules if m in ('toy_net', 'helper')}
    assert (sys.path, sys.dont_write_bytecode) == (path, writes)
    assert sorted(p.name for p in folder.rglob('*')) == before, 'nothing is written into their folder'


@pytest.mark.parametrize('code, said', [(CODE.replace('return model', 'if len(x) == 1: return x[:, 0]\n    return model'), r'logits: got \[1, 48\]'),
                                        (CODE.replace('    return', '    return x[0, :1, :1].expand(1, 10)\n    return'), r'logits: got \[1, 10\]')])
def test_logits_of_another_shape(folder, code, said):
    (folder/'toy'/'toy_net.py').write_text(code)
    with pytest.raises(VitpruneError, match=said): compare('toy', folder, say=lambda text: None)


def test_not_a_number_is_not_small(folder):
    (folder/'toy'/'toy_net.py').write_text(CODE.replace('return model.forward_head', 'return x.new_tensor(torch.nan if len(x) == 1 else 0.) + model.forward_head')
                                           .replace('import helper', 'import helper, torch'))
    with pytest.raises(VitpruneError, match='whose logits are not finite'): compare('toy', folder, say=lambda text: None)


def test_a_module_of_ours_comes_back(folder):
    own = sys.modules['helper'] = object()
    try:
        with their_modules(folder/'toy') as load: assert load('helper').MORE == 1
        assert sys.modules['helper'] is own
    finally: del sys.modules['helper']


def test_rows_of_what_was_compared_are_replaced(folder, tmp_path, capsys):
    file, words = tmp_path/'official.csv', [str(folder), '--methods', 'toy', '--results', str(tmp_path/'official.csv')]
    append_rows(file, [make_row('other', note=dict(gap_double=1.)), make_row('toy', note='a row that compares nothing')])
    kept = read_rows(file)
    for methods in ('toy', 'toy,toy'):
        assert main([methods if w == 'toy' else w for w in words]) == 0
        assert [r['method'] for r in read_rows(file)] == ['other', 'toy', 'toy', 'toy'] and read_rows(file)[:2] == kept


SMALL = Toy.models[0]


def test_a_race_times_both_and_says_how_they_differ(folder):
    said = []
    theirs, ours = race('toy', folder, SMALL, batch=2, repeats=3, say=said.append)
    assert [(r['schedule']['keep'], r['schedule']['code'], r['batch']) for r in (theirs, ours)] == [('1', c, 2) for c in ('theirs', 'ours')]
    note = ours['note']
    assert note['slip'] < 1e-5 and note['faster'] == pytest.approx(theirs['latency_ms']/ours['latency_ms'], abs=1e-4)
    assert 'faster' not in theirs['note'] and said[0].startswith('toy: ours is ')
    (folder/'toy'/'helper.py').write_text('MORE = 2')
    assert race('toy', folder, SMALL, batch=2, repeats=1)[1]['note']['slip'] > 1e-3


def test_slow_code_loses_the_race(folder, monkeypatch):
    took = dict(theirs=[4., 5., 4.], ours=[2., 2., 9.])
    monkeypatch.setattr('vitprune_nb.papers.official.bench', lambda *args: [dict(r, times_ms=took[r['name']], latency_ms=sorted(took[r['name']])[1]) for r in bench(*args)])
    theirs, ours = race('toy', folder, SMALL, batch=1, repeats=3)
    assert (theirs['latency_ms'], ours['latency_ms'], ours['note']['faster']) == (4., 2., 2.)


@pytest.mark.parametrize('text, given, said', [
    ('import a_package_of_2019', {}, 'ModuleNotFoundError was raised'), (CODE.replace('return model', 'return torch.nan*model').replace('import helper', 'import helper, torch'), {}, 'not finite'),
    (CODE, dict(batch=0), 'batch: got 0'), (CODE, dict(batch=-1), 'batch: got -1'), (CODE, dict(repeats=0), 'repeats: got 0')])
def test_races_that_cannot_be_run(folder, text, given, said):
    (folder/'toy'/'toy_net.py').write_text(text)
    with pytest.raises(VitpruneError, match=said): race('toy', folder, SMALL, **{**dict(batch=1, repeats=1), **given})


def test_races_and_comparisons_replace_their_own_rows(folder, tmp_path, monkeypatch):
    monkeypatch.setattr('vitprune_nb.papers.official.race', functools.partial(race, model=SMALL, batch=1, repeats=1))
    file, words = tmp_path/'official.csv', [str(folder), '--methods', 'toy', '--results', str(tmp_path/'official.csv')]
    append_rows(file, [make_row('toy', schedule='model', note='repository'), make_row('toy', schedule=3., note=4.), make_row('toy', note=dict(repository='old', gap_double=1.)),
                       make_row('toy', note=dict(repository='old'))])
    kept = read_rows(file)[:2]
    for more in ([], ['--race'], ['--race'], []): assert main(words + more) == 0
    rows = read_rows(file)
    assert rows[:2] == kept
    assert sorted('gap_double' in r['note'] for r in rows[2:]) == [False, False, True, True] and all(r['note']['repository'] == 'somebody/toy' for r in rows[2:])


def test_what_was_compared_before_a_failure_is_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(OFFICIAL, 'other', type('Other', (Toy,), dict(method='other', repo='somebody/other'))())
    (folder/'other').mkdir()
    (folder/'other'/'toy_net.py').write_text('import a_package_of_2019')
    file = tmp_path/'official.csv'
    assert main([str(folder), '--methods', 'toy,other', '--results', str(file)]) == 2
    assert [r['method'] for r in read_rows(file)] == ['toy', 'toy'] and 'somebody/other' in capsys.readouterr().err


def test_ctrl_c_is_one_line(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr('vitprune_nb.papers.official.compare', interrupted)
    assert main([str(folder), '--methods', 'toy', '--results', str(tmp_path/'new.csv')]) == 130
    assert capsys.readouterr().err == 'official: interrupted\n' and not (tmp_path/'new.csv').exists()


@pytest.mark.parametrize('words, said', [
    (['nowhere'], 'code: got nowhere'), (['{code}', '--methods', 'Toy'], 'methods: got Toy; allowed: tome, ats'),
    (['{code}', '--methods', ''], 'methods: got '), (['{code}', '--methods', 'toy,'], 'methods: got '),
    (['{code}', '--methods', 'toy,evit'], 'git clone https://github.com/youweiliang/evit'), (['{file}'], 'code: got '),
    (['{code}', '--methods', 'toy', '--results', '{mine}'], 'results: got '), (['{code}', '--methods', 'toy', '--results', '{code}'], 'results: got '),
    (['{code}', '--methods', 'toy', '--results', '{file}/x.csv'], 'got ')])
def test_bad_words_are_one_sentence_and_touch_nothing(folder, tmp_path, capsys, words, said):
    (tmp_path/'mine.csv').write_text('a,b\n1,2\n')
    (tmp_path/'file').write_text('x')
    places = dict(code=folder, file=tmp_path/'file', mine=tmp_path/'mine.csv')
    words = [w.format(**places) for w in words]
    if '--results' not in words: words += ['--results', str(tmp_path/'new.csv')]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith('official: ') and said in err and err.count('\n') == 1, err
    assert (tmp_path/'mine.csv').read_text() == 'a,b\n1,2\n' and not (tmp_path/'new.csv').exists()


def test_where_a_clone_stands(tmp_path):
    assert commit_of(tmp_path) == '' and clone_of(OFFICIAL['evit'], 'F') == 'git clone https://github.com/youweiliang/evit F/evit'
    git = lambda *words: subprocess.run(['git', '-C', str(tmp_path), *words], check=True, capture_output=True, text=True).stdout
    git('init', '-q')
    assert commit_of(tmp_path) == '', 'no commit yet'
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '--allow-empty', '-m', 'x')
    assert commit_of(tmp_path) == git('rev-parse', 'HEAD').strip() != ''
    (tmp_path/'a').write_text('1')
    git('add', 'a')
    assert commit_of(tmp_path) == git('rev-parse', 'HEAD').strip() + '+'


def test_settings_in_plain_words():
    assert plain(dict(a=1, b=[2, 3])) == 'a 1, b [2, 3]' and plain([4, 8]) == plain((4, 8)) == '4 8' and plain(.5) == '0.5' and plain({}) == ''
