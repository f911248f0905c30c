"""Charts: what is drawn lies inside the axes, and only what would hide something is moved aside."""
import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitprune_nb import demo, viz
from vitprune_nb.evidence import report
from vitprune_nb.evidence.results import make_row


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def bars(ax):
    "The ends of all error bars, in pixels of the page."
    ax.figure.draw_without_rendering()     # until then, limits may be old
    return np.concatenate([c.lines[0].get_transform().transform(s) for c in ax.containers for s in c.lines[2][0].get_segments()])


def moved(ax):
    "By how many points of the page each curve is moved."
    return [((c.lines[0].get_transform().transform((1., 1.)) - ax.transData.transform((1., 1.)))*72/ax.figure.dpi).round(6).tolist() for c in ax.containers]


def row(method, gmacs, top1, **more): return dict(method=method, macs=gmacs*1e9, top1=top1, top1_low=top1 - .03, top1_high=top1 + .02, **more)


@pytest.mark.parametrize('apart', [0, 8])
@pytest.mark.parametrize('rows', [[row('dense', 1.42, .95), row('life', .784, .93), row('random', .784, .91), row('uniform', .783, .92)],
                                  [row('life', .5, .7), row('tome', .5, .6)], [row('life', .5, .7)],
                                  [row(n, c, .5 + c/5) for n in ('life', 'tome') for c in (.2, .5, 1.4)]])
def test_all_points_lie_inside(rows, apart):
    ax = viz.accuracy_macs(rows, apart=apart)
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    for r in rows: assert left < r['macs']/1e9 < right and low < 100*r['top1_low'] < 100*r['top1_high'] < high
    assert all(ax.bbox.contains(*p) for p in bars(ax)), 'where they are drawn, too'
    drawn = [p for c in ax.containers for p in c.lines[0].get_xydata().tolist()]
    assert sorted(drawn) == pytest.approx(np.array(sorted([r['macs']/1e9, 100*r['top1']] for r in rows)))


def test_the_chart_of_a_demo(monkeypatch):
    "The three pruned models share a cost and stand apart; dense stands at its own."
    figures = []
    monkeypatch.setattr(demo, 'kept_picture', lambda *_: plt.figure())
    monkeypatch.setattr(demo, 'picture', lambda fig: figures.append(fig) or b'')
    costs = dict(dense=1.42, patch_slimming=.783973, uniform=.783646, random=.783973)
    demo._charts(None, None, [row(n, c, .9, schedule=[64]*12) for n, c in costs.items()])
    ax, = figures[1].axes
    assert moved(ax) == [[0, 0], [-8, 0], [0, 0], [8, 0]]
    assert all(ax.bbox.contains(*p) for p in bars(ax)) and ax.get_xlim() == pytest.approx((.72001, 1.48364), abs=1e-3)


def test_the_chart_of_a_run():
    "`draw_experiment`: all of the first panel, and the costs of the enlarged one."
    kind = dict(split='test', images=100, data_hash='a'*64, weights='w', correct=None)
    made = lambda method, gmacs, top1, target: make_row(**row(method, gmacs, top1, **kind, recovery='none', note=dict(target=target)))
    axes = report.draw_experiment([made('dense', 2, .8, 0.), made('life', 1.4, .78, .3), made('life', .9, .7, .5), made('tome', 1.4, .3, .3)])
    whole, near = axes[0]
    assert all(whole.bbox.contains(*p) for p in bars(whole)) and moved(whole) == [[0, 0]]*2
    for ax in (whole, near): assert ax.get_xlim() == pytest.approx((.845, 2.055))
