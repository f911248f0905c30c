"""What a lesson found is said in numbers, and each of them is what a cell of the lesson prints; what it prints from recorded rows is what the rows say."""
import contextlib, io, re, sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tests'))
import verdicts
from notebooks import names, needed, run_cells, runnable
from verdicts import LESSONS, cells, numbers, origins, results, same, sentences, torn, verdict


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
    assert lost(by_hand.replace('7.7). Chance', '7.7), and chance'))[0]       # one sentence, two cells


def test_few_numbers_are_found_by_accident():
    "Each number of the verdicts, one or two units of its last digit off: how often does some cell print the whole sentence all the same?"
    tries = hits = 0
    for lesson in LESSONS:
        for s, b in sentences(verdict(lesson)[0]):
            there = verdicts.printed(lesson, b).values()
            exact = [n for n in results(s) if n[2] > 0 or n[3]]
            for i, (text, value, decimals, percent) in enumerate(exact):
                for off in (-2, -1, 1, 2):
                    wrong = [*exact[:i], (text, value + off*10.**-decimals, decimals, percent), *exact[i + 1:]]
                    tries, hits = tries + 1, hits + any(all(any(same(n, o) for o in v) for n in wrong) for v in there)
    assert hits < tries/6, f'{hits} of {tries}'


def from_rows(lesson):
    "The cells that say a number of the verdict and read recorded rows: (cell, the cells that it needs)."
    used = {where for _, ns in origins(lesson) for where in ns.values()} | {f'{lesson}/{c["id"]}' for c in verdict(lesson)[1]}
    out = []
    for c in cells(LESSONS[lesson]):
        if f'{lesson}/{c["id"]}' not in used: continue
        source = ''.join(c['source'])
        before = needed(runnable(LESSONS[lesson]), names(source)[1])
        if "'results'" in '\n'.join([*before, source]): out.append((c, [s for s in before if s != source]))
    return out


@pytest.mark.parametrize('lesson', [n for n in LESSONS if from_rows(n)])
def test_what_a_verdict_reads_from_rows_is_what_the_rows_say(lesson):
    for cell, before in from_rows(lesson):
        have, shown = dict(__name__='lesson'), io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()): run_cells(before, have)
        with contextlib.redirect_stdout(shown): run_cells([''.join(cell['source'])], have)
        printed = ''.join(''.join(o.get('text', '')) for o in cell['outputs'])
        assert shown.getvalue().strip() == printed.strip(), f'{cell["id"]}: python tests/notebooks.py --keep {lesson}'
