"""What a refusal allows is allowed: bounds can be typed as they are printed, and no range is empty."""
import re

import numpy as np
import pandas as pd
import pytest
import torch

from vitprune_nb import cli, data, viz

from vitprune_nb.papers import imagenet

from vitprune_nb.methods import life

from vitprune_nb.evidence import measure

from vitprune_nb.methods import patch_slimming

from vitprune_nb.papers import timing

from vitprune_nb.train import trainer as train
from vitprune_nb.errors import VitpruneError, at_least, at_most
from vitprune_nb.engine.plan import Plan, uniform_plan
from vitprune_nb.methods.significance import significance
from vitprune_nb.vit.model import create_vit


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return create_vit('test_vit', num_classes=10, img_size=32, patch_size=8, depth=3)


@pytest.fixture(scope='module')
def cal():
    return data.calibration(data.embedded('train'), 4)


def refusal(call, *words):
    with pytest.raises(VitpruneError) as e: call(*words)
    return str(e.value)


@pytest.mark.parametrize('v', [.0100001, .01999, .123456, .5, .999, *np.random.default_rng(0).uniform(.01, 1, 50)])
def test_bounds_are_rounded_to_the_side_that_is_allowed(v):
    assert float(at_most(v).split()[-1]) <= v < float(at_most(v).split()[-1]) + .01
    assert v <= float(at_least(v).split()[-1])*(1 + 1e-15) <= 1.11*v
    assert v*1e-9 <= float(at_least(v*1e-9).split()[-1])*(1 + 1e-15)


def test_where_nothing_is_left_that_is_said():
    assert at_most(.004) == at_most(-.02) == 'no budget at all' and at_least(float('inf')) == 'at least inf'


def test_the_largest_budget_that_a_refusal_prints_can_be_had(tiny, cal):
    scores = significance(tiny, cal)
    for plan in (lambda r: uniform_plan(tiny, scores, r), lambda r: patch_slimming.for_budget(tiny, cal, r)):
        text = refusal(plan, .999)
        most = float(re.search(r'at most (0\.\d+) for this model', text)[1])
        assert isinstance(plan(most), Plan) and 'at most' in refusal(plan, most + .04)   # beyond the tolerance, half a patch of 16


def test_the_smallest_tolerance_that_a_refusal_prints_can_be_had(tiny, cal):
    text = refusal(patch_slimming.top_down, tiny, cal, 1e-30)
    least = float(re.search(r'at least (\S+) for this model', text)[1])
    for _ in range(3):      # a later block may be the next to miss it
        try: found = patch_slimming.top_down(tiny, cal, least)
        except VitpruneError as e:
            assert (more := float(re.search(r'at least (\S+) for this model', str(e))[1])) > least
            least = more
        else: break
    assert isinstance(found, Plan)


NONE_LEFT = {
    'stages of one block': (lambda tmp: life.stage_counts(.7, 1, 1, 196), 'model: got a single block; allowed: two blocks or more'),
    'no images to train on': (lambda tmp: train.Batches(data.embedded('train').subset([]), train.TrainConfig()), 'ds: got no images; allowed: at least one training image'),
    'no images to calibrate on': (lambda tmp: data.calibration(data.embedded('train').subset([]), 1), 'ds: got no images; allowed: an ImageSet with images'),
    'one image for two sets': (lambda tmp: imagenet.fidelity_sets(_one_image(tmp), 1), 'with one image; allowed: two images or more'),
    'a model without blocks': (lambda tmp: viz.show_kept(data.embedded().image(0), np.zeros((0, 4)), layers=[0]), 'kept: got shape (0, 4); allowed: (L, P)'),
    'no rows of a bench': (lambda tmp: measure.time_reduction([], 'dense'), 'rows: got no rows'),
    'no pruned rows to draw': (lambda tmp: timing.draw_realised(pd.DataFrame(dict(method=['dense']))), 'table: got no pruned rows')}


def _one_image(tmp):
    (tmp/'one'/'val'/'cat').mkdir(parents=True)
    data.embedded().image(0).save(tmp/'one'/'val'/'cat'/'0.png')
    return tmp/'one'


@pytest.mark.parametrize('name', NONE_LEFT)
def test_no_refusal_allows_an_empty_range(name, tmp_path):
    call, words = NONE_LEFT[name]
    text = refusal(call, tmp_path)
    assert words in text and not re.search(r'1 to 0|0 to -1|one of \[\]|at most (0|-\S+)[ ,.]', text)


@pytest.mark.parametrize('words, said', [('--images 0', 'images: got 0; allowed: a positive number'), ('--calibration 0', 'calibration: got 0; allowed: a positive number'),
                                         ('--calibration 5001', 'calibration: got 5001; allowed: 1 to 5000'), ('--images -3', 'images: got -3')])
def test_the_demo_names_its_own_options(words, said, tmp_path, capsys):
    assert cli.main(['demo', '--out', str(tmp_path/'d'), *words.split()]) == 2
    err = capsys.readouterr().err
    assert f'vitprune: {said}' in err and err.count('\n') == 1 and not (tmp_path/'d').exists()
