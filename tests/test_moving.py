"""Pictures that move: what a control does to them, the stills in the lessons, and a real JupyterLab in a real browser."""
import base64, importlib.util, io, itertools, json, random, re, shutil, sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from conftest import ROOT, jupyter_lab
from vitprune_nb import viz
from vitprune_nb.core import PALETTE
from vitprune_nb.data import photo
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.cost import Widths, block_terms

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import needed, run_cells, runnable


@pytest.fixture(autouse=True)
def no_figures():
    "No test leaves a figure open for the next."
    yield
    plt.close('all')


# a control and its picture, without a browser

def bar(**heights):
    "A picture in which every value can be seen."
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.bar(list(heights), [float(str(v)[:4]) if not isinstance(v, Image.Image) else v.size[0] for v in heights.values()])
    return figure


def parts(box): return box.children[0].children, box.children[1]


def test_numbers_words_ranges_and_widgets_become_controls():
    import ipywidgets as W
    own = W.FloatText(3.)
    controls, _ = parts(viz.sliders(bar, keep_rate=[.1, .2, .4], size=('1', '2'), block=range(2, 9, 3), own=own))
    kinds = [W.SelectionSlider, W.Dropdown, W.Play, W.IntSlider, W.FloatText]
    assert [type(c) for c in controls] == kinds and controls[-1] is own
    assert controls[0].description == 'keep rate' and [c.value for c in controls] == [.2, '1', 2, 2, 3.]
    assert controls[0].options == (('0.1', .1), ('0.2', .2), ('0.4', .4)) and (controls[3].min, controls[3].max, controls[3].step) == (2, 8, 3)


def test_each_value_has_its_picture_and_none_is_drawn_twice():
    drawn = []
    def draw(**values):
        drawn.append(values)
        return bar(**values)
    (rate, size), seen = parts(viz.sliders(draw, rate=[1, 2, 3], size=['1', '2']))
    pictures = {}
    for _ in range(2):
        for rate.value, size.value in itertools.product([1, 2, 3], ['1', '2']):
            pictures.setdefault((rate.value, size.value), set()).add(bytes(seen.value))
    assert len(pictures) == 6 and all(len(p) == 1 for p in pictures.values()) and len(set.union(*pictures.values())) == 6
    assert len(drawn) == 6
    assert pictures[3, '2'] == {viz.figure_png(bar(rate=3, size='2'))}       # the picture of the plain function
    assert plt.get_fignums() == []


def test_the_play_button_and_the_slider_move_each_other():
    (play, number), seen = parts(viz.sliders(bar, block=range(1, 5)))
    first = bytes(seen.value)
    play.value = 3
    assert number.value == 3 and bytes(seen.value) != first
    number.value = 1
    assert play.value == 1 and bytes(seen.value) == first


def test_values_that_cannot_be_hashed_are_values_too():
    (menu,), seen = parts(viz.sliders(bar, picture=[('small', Image.new('RGB', (9, 9))), ('large', Image.new('RGB', (20, 9)))]))
    first = bytes(seen.value)
    menu.index = 1
    assert bytes(seen.value) != first


@pytest.mark.parametrize('bad', [3, 'word', None, [], (), range(0), {}, {1, 2}, .5, iter([1])])
def test_what_is_no_control_is_refused(bad):
    with pytest.raises(VitpruneError, match='block: got .*; allowed: a list of values, a range, or a widget'): viz.sliders(bar, block=bad)


def test_without_ipywidgets_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(VitpruneError, match='pip install ipywidgets'): viz.sliders(bar, block=[1])


# the diagrams against slow forms

def test_the_filled_area_of_a_block_is_its_macs():
    draw = random.Random(0)
    for _ in range(40):
        n, w = draw.randint(2, 300), Widths(*(draw.randint(1, 90) for _ in range(8)))
        counts = [draw.randint(0, n) for _ in range(3)]
        whole = block_terms(n, n, n, w)
        ax = viz.show_block(whole, counts, n)
        areas = {p.get_gid(): p.get_width()*p.get_height() for p in ax.patches if p.get_gid()}
        plt.close(ax.figure)
        for part, macs in block_terms(*counts, w).items():
            assert areas[part]/(100*n)*sum(whole.values()) == pytest.approx(macs, abs=1e-6*sum(whole.values()))


def all_ways(weights, masks, start, shortcut):
    "What reaches token 0, by walking every path."
    total, tokens = 0., range(len(masks[0]))
    for path in itertools.product(*([[*tokens, 'stay'] if shortcut else tokens]*len(weights))):
        at, share = start, 1.
        for w, m, to in zip(weights, masks, path):
            if to != 'stay': at, share = to, share*float(w[to][at])*float(m[to])
        total += share*(at == 0)
    return total


def test_what_arrives_is_the_sum_over_all_ways_and_every_arrow_carries_its_number():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        blocks, n = 1 + seed % 3, 2 + seed % 4
        weights = torch.rand(blocks, n, n, generator=g)
        masks = torch.rand(blocks, n, generator=g) < .7
        masks[:, 0], start, shortcut = True, seed % n, bool(seed % 2)
        ax, arrives = viz.show_paths(weights, masks, start, list('ABCDE')[:n], shortcut)
        assert arrives == pytest.approx(all_ways(weights, masks, start, shortcut), rel=1e-5)
        said = {t.get_text() for t in ax.texts}
        first = {f'{weights[0, i, start]:.3f}' for i in range(n) if masks[0, i] and (blocks == 1) <= (i == 0)}
        if blocks == 1 or not shortcut and masks[1:].all(): assert first <= said
        assert arrives == 0 or f'{arrives:.3f}' in said
        plt.close(ax.figure)


def test_frames_stand_around_patches_that_return_and_grey_on_those_that_idle():
    kept = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < .5
    picture = np.asarray(photo('cat'))/255
    for block in range(1, 7):
        ax = viz.show_returns(photo('cat'), kept, block)
        back = [p for p in range(16) if block > 1 and kept[block - 1, p] and not kept[block - 2, p]]
        assert [p.get_xy() for p in ax.patches] == [(p % 4*56 - .5, p//4*56 - .5) for p in back]
        drawn = np.asarray(ax.images[0].get_array())
        for p in range(16):
            cell = np.s_[p//4*56:p//4*56 + 56, p % 4*56:p % 4*56 + 56]
            assert np.array_equal(drawn[cell], picture[cell]) == bool(kept[block - 1, p])


@pytest.mark.parametrize('bad, said', [
    (dict(block=0), 'block: got 0; allowed: a block from 1 to 3'), (dict(block=4), 'block: got 4'), (dict(block=-1), 'block: got -1'),
    (dict(kept=np.ones(4)), 'kept: got shape (4,); allowed: (L, P)'), (dict(kept=np.ones((3, 5))), 'kept: got 5 values'),
    (dict(image=np.zeros((8, 8))), 'image: got an array of shape (8, 8)')])
def test_bad_input_of_show_returns(bad, said):
    with pytest.raises(VitpruneError, match=re.escape(said)): viz.show_returns(**dict(image=photo('cat'), kept=np.ones((3, 4)), block=1) | bad)


# the stills that lie in the lessons

def cells_of(lesson):
    "The cells of a lesson as they lie in the repository, by their ids."
    return {c['id']: c for c in json.loads((ROOT/'nbs'/f'{lesson}.ipynb').read_text(encoding='utf-8'))['cells']}


def stills(cell):
    "The pictures under a cell, as arrays (H, W, 3)."
    found = [o['data']['image/png'] for o in cell['outputs'] if 'image/png' in o.get('data', {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(f))).convert('RGB')) for f in found]


def text_of(cell):
    "All that a cell printed or returned."
    return '\n'.join(''.join(o.get('text', o.get('data', {}).get('text/plain', ''))) for o in cell['outputs'])


def panels(picture, side=40):
    "The images within a picture, row by row: what is not white in a rectangle at least `side` wide and high."
    areas, _ = ndimage.label((picture < 253).any(-1))
    boxes = [b for b in ndimage.find_objects(areas) if min(s.stop - s.start for s in b) >= side]
    rows = []
    for box in sorted(boxes, key=lambda b: b[0].start):
        if not rows or box[0].start > rows[-1][0][0].start + side//2: rows.append([])
        rows[-1].append(box)
    return [[picture[b] for b in sorted(row, key=lambda b: b[1].start)] for row in rows]


def middles(panel, n=8, reach=2):
    "(n, n, 3) colours in the middle of the n·n patches of a panel."
    ys, xs = (((np.arange(n) + .5)*s/n).astype(int) for s in panel.shape[:2])
    return np.array([[panel[y - reach:y + reach, x - reach:x + reach].reshape(-1, 3).mean(0) for x in xs] for y in ys])


def greyed(panel):
    "Which of the 8·8 patches of a panel are shadows."
    m = middles(panel)
    return (np.ptp(m, axis=-1) < 2) & (m.mean(-1) > 190) & (m.mean(-1) < 228)


def red_sides(panel, n=8):
    "(n, n, 4) bool: is there a line of a frame above, below, left and right of each patch?"
    color = np.array([int(PALETTE['vermillion'][i:i + 2], 16) for i in (1, 3, 5)])
    red = np.pad(np.abs(panel.astype(int) - color).sum(-1) < 90, 2)
    height, width = (s/n for s in panel.shape[:2])
    def at(y, x): return red[round(y*height):round(y*height) + 5, round(x*width):round(x*width) + 5].any()
    sides = (0, .5), (1, .5), (.5, 0), (.5, 1)
    return np.array([[[at(r + a, c + b) for a, b in sides] for c in range(n)] for r in range(n)])


def sides_of(back):
    "The same, as it must be: a side is a line if the patch or its neighbour there has returned."
    wide = np.pad(back, 1)
    return np.stack([back | wide[:-2, 1:-1], back | wide[2:, 1:-1], back | wide[1:-1, :-2], back | wide[1:-1, 2:]], -1)


def test_the_walk_is_the_plan_that_was_found():
    "Lesson 11: coloured patches of the still, block by block, are the numbers that the search printed."
    cells = cells_of('3_methods/11_patch_slimming')
    kept = json.loads(re.search(r'patches kept: (\[.*\])', text_of(cells['8bd4745f']))[1])
    still, = stills(cells['11aa0005'])
    rows = panels(still)
    assert [len(row) for row in rows] == [12]*6
    for row, first in zip(rows, (12, 11, 9, 8, 6, 1)):
        for block, panel in enumerate(row, 1):
            m = middles(panel)
            if block < first: assert (np.abs(m - .82*255) < 3).all()      # not decided yet
            else: assert (np.ptp(m, axis=-1) > 60).sum() == kept[block - 1]


def test_the_pictures_of_three_bounds_are_the_plans_that_were_found():
    cells = cells_of('3_methods/11_patch_slimming')
    kept = json.loads(re.search(r'patches kept: (\[.*\])', text_of(cells['8bd4745f']))[1])
    pictures = stills(cells['11aa000b'])
    left = [[int((~greyed(p)).sum()) for p in panels(s)[0][1:]] for s in pictures]
    assert len(left) == 3 and left[1] == [kept[b] for b in (0, 5, 7, 8, 9, 10, 11)]     # at 0.02
    assert left[0][2] > left[1][2] > left[2][2]


def test_idle_and_returned_patches_are_those_of_the_table():
    "Lesson 14: shadows and frames of the still are the counts that the table holds."
    cells = cells_of('3_methods/14_cosine')
    table = text_of(cells['bb56e8ff']).splitlines()
    at = next(i for i, line in enumerate(table) if line.startswith('frog'))
    idle, back = ([int(n) for n in line.split()[-12:]] for line in table[at:at + 2])
    still, = stills(cells['14aa0002'])
    blocks = [p for row in panels(still) for p in row]
    assert len(blocks) == 12 and sum(idle) > 100 and sum(back) > 100
    grey = [greyed(p) for p in blocks]
    assert [int(g.sum()) for g in grey] == idle
    returned = [np.zeros((8, 8), bool), *(before & ~now for before, now in zip(grey, grey[1:]))]
    assert [int(r.sum()) for r in returned] == back
    for panel, r in zip(blocks, returned): assert (red_sides(panel) == sides_of(r)).all()


STILLS = [('1_foundations/03_cost', 'block_figure', '03aa0002', ()), ('3_methods/10_significance', 'path_figure', '10aa0002', ())]
LONG = [('3_methods/11_patch_slimming', 'walk_figure', '11aa0005', ()),
        ('3_methods/14_cosine', 'returns_figure', '14aa0002', ())]


def unlike(a, b):
    "Share of the pixels that differ; pictures of two versions of Matplotlib may differ by a few pixels in size."
    if abs(a.shape[0] - b.shape[0]) > 8 or abs(a.shape[1] - b.shape[1]) > 8: return 1.
    a = np.asarray(Image.fromarray(a).resize(b.shape[1::-1]))
    return float((np.abs(a.astype(int) - b).max(-1) > 40).mean())


@pytest.mark.parametrize('lesson, name, cell, more', [*STILLS, *(pytest.param(*s, marks=pytest.mark.slow) for s in LONG)])
def test_a_still_is_what_its_cells_draw(lesson, name, cell, more):
    with torch.random.fork_rng(devices=[]): have = run_cells(needed(runnable(ROOT/'nbs'/f'{lesson}.ipynb'), {name, *more}), dict(__name__='still'))
    png = viz.figure_png(have[name], dpi=100)
    still, = stills(cells_of(lesson)[cell])
    fresh = np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))
    assert unlike(still, fresh) < .02
    assert unlike(still, fresh[:, ::-1]) > .05       # the measure sees a wrong picture


# a real JupyterLab in a real browser

BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
FLAGS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync']
RUN_ALL = '''async () => {
    const app = window.jupyterapp, widget = app.shell.currentWidget;
    await widget.context.ready; await widget.sessionContext.ready; await widget.sessionContext.session.kernel.info;
    await app.commands.execute('notebook:run-all-cells');
    return widget.context.model.toJSON().cells.flatMap(c => (c.outputs || []).filter(o => o.output_type == 'error')
        .map(o => o.ename + ': ' + o.evalue)) }'''
BYTES = '''async image => { const data = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return btoa(Array.from(data, b => String.fromCharCode(b)).join('')) }'''


@pytest.fixture
def page():
    "A page of a headless browser."
    if importlib.util.find_spec('playwright') is None: pytest.skip('needs playwright: pip install playwright')
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None: pytest.skip('needs a browser on the PATH: ' + ', '.join(BROWSERS))
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=browser, args=FLAGS)
        yield opened.new_page(viewport=dict(width=1300, height=1000))
        opened.close()


def without_slow_cells(lesson, folder):
    "A copy of a lesson that a reader's `Run All` would run in minutes."
    nb = json.loads((ROOT/'nbs'/f'{lesson}.ipynb').read_text(encoding='utf-8'))
    flagged = re.compile(r'^#\s*\|\s*(slow|cuda)\b', re.M)
    nb['cells'] = [c for c in nb['cells'] if c['cell_type'] == 'code' and not flagged.search(''.join(c['source']))]
    (folder/'lesson.ipynb').write_text(json.dumps(nb), encoding='utf-8')


def picture_of(image):
    "What a widget shows now, as an array; None while it changes."
    try: return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.evaluate(BYTES)))).convert('RGB'))
    except Exception: return None


def changed(page, image, before, seconds=60):
    "The picture after it has changed."
    for _ in range(4*seconds):
        now = picture_of(image)
        if now is not None and (now.shape != before.shape or (now != before).any()): return now
        page.wait_for_timeout(250)
    raise AssertionError(f'the picture did not change in {seconds} s')


@pytest.mark.parametrize('lesson', ['6_reference/28_gallery',
                                    *(pytest.param(l, marks=pytest.mark.slow) for l in ('3_methods/11_patch_slimming', '3_methods/14_cosine'))])
def test_the_slider_moves_the_picture_in_jupyterlab(lesson, page, tmp_path):
    without_slow_cells(lesson, tmp_path)
    settings = tmp_path/'jupyter'/'settings'/'@jupyterlab'/'notebook-extension'
    settings.mkdir(parents=True)
    (settings/'tracker.jupyterlab-settings').write_text('{"windowingMode": "none"}')      # cells out of sight are there, too
    with jupyter_lab(tmp_path, tmp_path/'jupyter', 'lesson.ipynb', '--LabApp.expose_app_in_browser=True') as lab:
        page.set_default_timeout(15*60*1000)
        page.goto(lab.address('lesson.ipynb'))
        page.locator('.jp-NotebookPanel .jp-Cell').first.wait_for()
        assert page.evaluate(RUN_ALL) == []
        boxes = page.locator('.widget-vbox:has(img.widget-image)')
        boxes.first.wait_for()
        for i in range(boxes.count()):
            box = boxes.nth(i)
            image, handle = box.locator('img.widget-image'), box.locator('.noUi-handle').first
            handle.scroll_into_view_if_needed()
            before = changed(page, image, np.zeros((1, 1, 3)))
            handle.press('ArrowRight')
            after = changed(page, image, before)
            handle.press('ArrowLeft')
            assert (changed(page, image, after) == before).all()      # and back
            play = box.locator('.widget-play button')
            if play.count():
                play.first.click()
                changed(page, image, before)
                play.nth(1).click()
