"""What a lesson found is said in numbers, and each of them is what a cell of the lesson prints; what it prints from recorded rows is what the rows say."""
import ast, contextlib, io, re, sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tests'))
import verdicts
from notebooks import FLAGGED, names, needed, run_cells
from verdicts import LESSONS, bare, cells, numbers, origins, results, said, same, sentences, torn, verdict


@pytest.mark.parametrize('lesson', LESSONS)
def test_every_number_of_a_verdict_is_printed_by_the_lesson(lesson):
    text, code = verdict(lesson)
    found = origins(lesson)
    assert [(n, s) for s, ns in found for n, where in ns.items() if not where] == [], 'say what a cell prints: python tests/verdicts.py'
    assert torn(lesson) == []
    assert found or code, 'a verdict without a number'
    assert not re.search(r'(printed|table) above|stands? in the recorded', text), 'say what it says'


def test_a_number_that_is_not_printed_is_noticed(monkeypatch):
    by_hand = '\n- Patches win by 4.3 points (1.0 to 7.7). Chance has 89.0% of 300 images.\n'
    there = {'a': numbers('+4.3% (+1.0% to +7.7%)'), 'b': numbers('chance 0.8904 top-1')}
    monkeypatch.setattr(verdicts, 'printed', lambda lesson, bullet: there)
    def lost(text):
        monkeypatch.setattr(verdicts, 'verdict', lambda lesson: (text, []))
        return [n for _, ns in origins('02_vit') for n, where in ns.items() if not where], torn('02_vit')
    assert lost(by_hand) == ([], [])
    assert lost(by_hand.replace('89.0%', '89.1%')) == (['89.1'], [])
    assert lost(by_hand.replace('1.0 to', '1.1 to'))[1] == ['1.1 to 7.7']
    assert lost(by_hand.replace('by 4.3', 'by −4.3'))[0] and not lost(by_hand.replace('by 4.3', 'by +4.3'))[0]
    assert lost(by_hand.replace('7.7). Chance', '7.7), and chance'))[0]       # one sentence, two cells


def test_few_numbers_are_found_by_accident():
    "Each number of the verdicts, one or two units of its last digit off: how often does some cell print the whole sentence all the same?"
    tries = hits = 0
    for lesson in LESSONS:
        for s, b in sentences(verdict(lesson)[0]):
            there = verdicts.printed(lesson, b).values()
            exact = [n for n in results(s) if n[2] > 0 or n[3]]
            for i, (text, value, decimals, *kind) in enumerate(exact):
                for off in (-2, -1, 1, 2):
                    wrong = [*exact[:i], (text, value + off*10.**-decimals, decimals, *kind), *exact[i + 1:]]
                    tries, hits = tries + 1, hits + any(all(any(same(n, o) for o in v) for n in wrong) for v in there)
    assert hits < tries/6, f'{hits} of {tries}'


MEASURED = re.compile(r'^(?!def |    |#).*\b(course_model|train_gates|fit|run_config|record_table)\(', re.M)


def from_rows(lesson):
    "The cells that say a number of the verdict and read recorded rows: (cell, the cells that it needs). What needs a model as well is left out."
    used = {where for _, ns in origins(lesson) for where in ns.values()}
    out, before = [], []
    for c in cells(LESSONS[lesson]):
        source = ''.join(c['source'])
        if c['cell_type'] != 'code' or source.lstrip().startswith('%') or FLAGGED.search(source): continue
        if f'{lesson}/{c["id"]}' in used:
            needs = needed(before, names(source)[1])
            if "'results'" in '\n'.join([*needs, source]) and not any(MEASURED.search(s) for s in needs): out.append((c, needs))
        before.append(source)
    return out


def shown_by(source, have):
    "What a cell prints and displays, as text."
    out = io.StringIO()
    def display(*things):
        for o in things: print(bare(o.to_html()) if hasattr(o, 'to_html') else getattr(o, 'data', repr(o)))
    have.update(display=display)
    *first, last = ast.parse(source).body
    with contextlib.redirect_stdout(out):
        if not isinstance(last, ast.Expr): exec(source, have)
        else:
            exec(compile(ast.Module(first, []), '<cell>', 'exec'), have)
            value = eval(compile(ast.Expression(last.value), '<cell>', 'eval'), have)
            if value is not None and not source.rstrip().endswith(';'): display(value)
    return out.getvalue()


@pytest.mark.parametrize('lesson', [n for n in LESSONS if from_rows(n)])
def test_what_a_verdict_reads_from_rows_is_what_the_rows_say(lesson):
    for cell, before in from_rows(lesson):
        with contextlib.redirect_stdout(io.StringIO()): have = run_cells(before, dict(__name__='lesson', display=lambda *things: None))
        now, then = (numbers(t) for t in (shown_by(''.join(cell['source']), have), said(cell)))
        assert then and {n[1] for n in then} <= {n[1] for n in now}, f'{cell["id"]}: python tests/notebooks.py --keep {lesson}'
