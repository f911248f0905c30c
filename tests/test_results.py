"""What a notebook cannot show about result files: a process that dies in the middle of a write."""
import csv, json, math, subprocess, sys
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.measure import ratio_interval
from vitprune_nb.evidence.results import FIELDS, append_rows, make_row, mcnemar, mean_interval, read_cell, read_rows, update_block, write_cell
from vitprune_nb.papers.imagenet import mean_over_images
from vitprune_nb.vit.model import wilson_interval

DIE = """
import os, sys
from pathlib import Path
from vitprune_nb.evidence.results import append_rows, make_row
die = lambda *a, **k: os._exit(9)
match sys.argv[2]:
    case 'writing':
        write = Path.write_text
        def half(self, text, **k): write(self, text[:len(text)//2], **k); die()
        Path.write_text = half
    case 'syncing': os.fsync = die
    case 'renaming': os.replace = die
append_rows(sys.argv[1], [make_row('new')]*50)
"""


@pytest.mark.parametrize('moment', ['writing', 'syncing', 'renaming'])
def test_a_killed_append_leaves_the_old_file_whole(tmp_path, moment):
    file = tmp_path/'r.csv'
    append_rows(file, [make_row('old', seed=1), make_row('old', seed=2)])
    before = file.read_bytes()
    died = subprocess.run([sys.executable, '-c', DIE, str(file), moment], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert file.read_bytes() == before
    assert append_rows(file, [make_row('next')]) == 3
    assert [r['method'] for r in read_rows(file)] == ['old', 'old', 'next']


def test_a_killed_first_write_leaves_no_file(tmp_path):
    file = tmp_path/'r.csv'
    died = subprocess.run([sys.executable, '-c', DIE, str(file), 'renaming'], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert not file.exists()
    assert append_rows(file, [make_row('first')]) == 1


def test_every_field_survives_the_round_trip(tmp_path):
    sample = {str: 'ä, "b"\n|c', int: 7, float: 1/3}
    row = {k: sample[t] for k, t in FIELDS.items()}
    append_rows(tmp_path/'r.csv', [row])
    assert read_rows(tmp_path/'r.csv') == [row]


def test_a_file_without_a_final_newline_is_continued_properly(tmp_path):
    file = tmp_path/'r.csv'
    append_rows(file, [make_row('a', note='x')])
    file.write_bytes(file.read_bytes().rstrip(b'\n'))
    append_rows(file, [make_row('b')])
    assert [r['method'] for r in read_rows(file)] == ['a', 'b']


@pytest.mark.parametrize('right, n', [(0, 1), (1, 1), (0, 50), (25, 50), (49, 50), (50, 50), (8400, 10_000), (2, 3)])
def test_wilson_solves_its_quadratic(right, n):
    "Both ends solve (p - x)^2 = z^2 x(1 - x)/n, and each is the root on its side of p."
    z, p = 1.959963984540054, right/n
    low, high = wilson_interval(right, n)
    for x in (low, high): assert (p - x)**2 == pytest.approx(z*z*x*(1 - x)/n, abs=1e-12)
    assert 0 <= low <= p <= high <= 1 and low < high


@pytest.mark.parametrize('b, c', [(0, 0), (1, 0), (1, 5), (22, 5), (60, 40), (319, 379), (108, 30)])
def test_mcnemar_counts_coins(b, c):
    n, k = b + c, min(b, c)
    coins = Fraction(2*sum(math.comb(n, i) for i in range(k + 1)), 2**n)
    assert mcnemar(b, c) == pytest.approx(float(min(1, coins)), rel=1e-10)


def test_bootstraps_draw_the_same_rounds_as_by_hand():
    rng = np.random.default_rng(5)
    new, old = rng.uniform(5, 6, 9), rng.uniform(9, 12, 9)
    draw = np.random.default_rng(0)
    i = draw.integers(0, 9, (2000, 9))
    for paired, j in (True, i), (False, draw.integers(0, 9, (2000, 9))):
        ends = np.quantile(np.median(new[i], 1)/np.median(old[j], 1), (.025, .975))
        assert ratio_interval(new, old, paired)[1:] == pytest.approx(tuple(ends), rel=1e-12)
    assert mean_over_images(new)[1:] == pytest.approx(tuple(np.quantile(new[i].mean(1), (.025, .975))), rel=1e-12)
    assert ratio_interval([3.], [6.]) == (.5, .5, .5)           # of one round there is no interval


def test_student_interval_of_three_runs():
    "t for 2 degrees of freedom has a closed form: t = (2q - 1)/sqrt(2q(1 - q))."
    t = .95/math.sqrt(2*.975*.025)
    assert mean_interval([1., 2., 6.]) == pytest.approx((3, 3 - t*math.sqrt(7/3), 3 + t*math.sqrt(7/3)), rel=1e-12)


OLD = dict(schedule=dict(method='life', keep_rate=.7, stages=[4, 7, 10], step=None, counts=[[54.5, 65.0], [3.25, 1.0]],
                         options=dict(lr=1e-5, seed=0), allocator=dict(MALLOC='0'), dial='', single=False, rule='keys of all'),
           note=dict(target=.35, seconds=3, speed_up=[1.9, 1.8, 2.0], patch_drop=[], only=[5]))
KNOWN = dict(OLD, schedule={k: v for k, v in OLD['schedule'].items() if k not in ('step', 'dial')})


def old_file(path, **cells):
    "A results file as it was written before settings had columns of their own."
    row = dict({k: '' for k in FIELDS}, method='life', seed='3', top1='0.5', **cells)
    with open(path, 'w', encoding='utf-8', newline='') as f:
        w = csv.DictWriter(f, FIELDS, lineterminator='\n')
        w.writeheader()
        w.writerow(row)
    return path


def test_a_file_of_json_cells_is_read_and_continued(tmp_path):
    file = old_file(tmp_path/'r.csv', **{k: json.dumps(v) for k, v in OLD.items()})
    row, = read_rows(file)
    assert {k: row[k] for k in KNOWN} == KNOWN and (row['method'], row['seed'], row['top1']) == ('life', 3, .5)
    assert append_rows(file, [make_row('dense', note='64 calibration images')]) == 2
    with open(file, encoding='utf-8') as f: first, second = csv.DictReader(f)
    assert first['schedule.keep_rate'] == '0.7' and first['schedule.stages'] == '4 7 10' and first['note.target'] == '0.35'
    assert first['schedule.counts'] == '(54.5 65.0) (3.25 1.0)' and first['schedule.allocator.MALLOC'] == '"0"'
    assert first['schedule'] == first['note'] == second['schedule.keep_rate'] == '' and second['note'] == '64 calibration images'
    assert read_rows(file)[0] == row


def test_columns_grow_and_rows_stay(tmp_path):
    rows = [make_row('a', schedule=[4, 7]), make_row('b', schedule=dict(x=1, y=dict(z='w'))), make_row('c', note=dict(x=.5)),
            make_row('d', schedule='4 7', note=7), make_row('e', schedule=dict(y='flat'))]
    for n, row in enumerate(rows): assert append_rows(tmp_path/'r.csv', [row]) == n + 1
    assert read_rows(tmp_path/'r.csv') == rows
    assert [r['schedule'] for r in rows] == [[4, 7], dict(x=1, y=dict(z='w')), None, '4 7', dict(y='flat')]


@pytest.mark.parametrize('cells', [dict(schedule='text', settings='1'), dict(schedule='', settings='1', inner='2')])
def test_two_values_for_one_setting_are_refused(tmp_path, cells):
    names = [k for f in FIELDS for k in ([f, 'schedule.a', 'schedule.a.b'] if f == 'schedule' else [f])]
    row = dict({k: '' for k in names}, method='life', schedule=cells['schedule'])
    row |= {'schedule.a': cells['settings'], 'schedule.a.b': cells.get('inner', '')}
    with open(tmp_path/'r.csv', 'w', encoding='utf-8', newline='') as f:
        w = csv.DictWriter(f, names)
        w.writeheader()
        w.writerow(row)
    with pytest.raises(ValueError, match='row 1; allowed: one value for each setting'): read_rows(tmp_path/'r.csv')


def test_any_cell_comes_back():
    rng = np.random.default_rng(0)
    def value(depth=0):
        kind = rng.integers(6 if depth < 3 else 5)
        if kind == 0: return int(rng.integers(-10**6, 10**6))
        if kind == 1: return float(rng.normal()*10.0**rng.integers(-9, 9))
        if kind == 2: return bool(rng.integers(2))
        if kind == 3: return ''.join(rng.choice(list('a1.( )",[]{}e-\\ntrue'), rng.integers(1, 9)))
        if kind == 4: return None
        return [value(depth + 1) for _ in range(rng.integers(4))]
    for _ in range(3000):
        v = value()
        back = read_cell(write_cell(v))
        assert (back, type(back)) == (v, type(v)) and write_cell(v)[:1] not in ('{', '[')


def test_no_recorded_cell_holds_json():
    files = sorted((ROOT/'data'/'results').glob('*.csv'))
    assert len(files) > 20
    for file in files:
        with open(file, encoding='utf-8', newline='') as f:
            for row in csv.DictReader(f): assert not [v for v in row.values() if v[:1] in ('{', '[')], file


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    file, row = tmp_path/'r.csv', make_row('a')
    for path in (tmp_path/'none.csv', tmp_path):
        with pytest.raises(ValueError, match='allowed: an existing CSV file'): read_rows(path)
    append_rows(file, [row])
    whole = file.read_text(encoding='utf-8')
    for bad in ('', 'a,b\n1,2\n', whole.replace('method', 'methods', 1), '\x00\xff', '# a text\n'):
        file.write_text(bad, encoding='utf-8')
        with pytest.raises(ValueError, match='a CSV whose columns are'): read_rows(file)
        with pytest.raises(ValueError, match='a CSV whose columns are'): append_rows(file, [row])
        assert file.read_text(encoding='utf-8') == bad
    for bad in (whole + 'short,row\n', whole.rstrip() + ',one more\n'):
        file.write_text(bad, encoding='utf-8')
        with pytest.raises(ValueError, match=r'row \d; allowed: \d+ values in every row'): read_rows(file)


def test_a_block_is_replaced_only_between_its_marks(tmp_path):
    file, start, end = tmp_path/'t.md', '<!-- a:start -->', '<!-- a:end -->'
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match='allowed: an existing Markdown file'): update_block(path, 'a', 'new')
    for bad in ('', start, f'{end} {start}', f'{start}{start}{end}', f'{start}{end}{end}', '<!-- b:start --><!-- b:end -->'):
        file.write_text(bad, encoding='utf-8')
        with pytest.raises(ValueError, match='followed by one'): update_block(file, 'a', 'new')
        assert file.read_text(encoding='utf-8') == bad
    file.write_bytes(f'before\r\n{start} old {end}after'.encode())
    with pytest.raises(ValueError, match='text without the two markers'): update_block(file, 'a', f'x {end}')
    assert update_block(file, 'a', 'new') and not update_block(file, 'a', 'new')
    assert file.read_bytes() == f'before\r\n{start}\nnew\n{end}after'.encode()


@pytest.mark.parametrize('field', ['top1', 'top1_low', 'top1_high'])
@pytest.mark.parametrize('value', [45., 1.0001, -.01, '91.2'])
def test_a_percentage_is_no_share(field, value, tmp_path):
    with pytest.raises(VitpruneError, match=f'{field}: got {value}; allowed: a share in .0, 1.. Divide a percentage by 100'): make_row('dense', **{field: value})
    row = make_row('dense', **{field: 1})
    assert row[field] == 1. and make_row('dense', **{field: '0'})[field] == 0.
    append_rows(tmp_path/'r.csv', [row])
    text = (tmp_path/'r.csv').read_text()
    (tmp_path/'r.csv').write_text(text.replace(',1.0,', f',{value},'))
    with pytest.raises(VitpruneError, match='row 1'): read_rows(tmp_path/'r.csv')
