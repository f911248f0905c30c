"""Timing and memory where a notebook on a CPU cannot look: the CUDA path, real when there is a GPU and acted out when there is none; and bad input."""
import math, re, time
from types import SimpleNamespace

import pytest
import torch
from vitprune_nb.core import evaluating
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence import measure, results
from vitprune_nb.papers import overhead
from vitprune_nb.papers.imagenet import mean_over_images
from vitprune_nb.vit.model import wilson_interval
from vitprune_nb.evidence.measure import bench, peak_memory, stopwatch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def test_events_enclose_the_call_and_are_waited_for(monkeypatch):
    seen = []

    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self): seen.append('record')
        def elapsed_time(self, end): seen.append('elapsed'); return 1.5

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda d: seen.append('wait'))
    assert stopwatch('cuda')(lambda: seen.append('call')) == 1.5
    assert seen == ['wait', 'record', 'call', 'record', 'wait', 'elapsed']


def test_another_clock_on_cuda_waits_before_and_after(monkeypatch):
    seen, ticks = [], iter((1., 3.))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda d: seen.append('wait'))
    time_ms = stopwatch('cuda', clock=lambda: (seen.append('clock'), next(ticks))[1])
    assert time_ms(lambda: seen.append('call')) == 2000
    assert seen == ['wait', 'clock', 'call', 'wait', 'clock']


@needs_cuda
def test_bench_and_memory_on_cuda():
    net = torch.nn.Linear(4096, 4096, bias=False)
    x = torch.randn(512, 4096)
    wall = time.perf_counter()
    row, = bench(dict(net=net), x, warmup=2, repeats=20, device='cuda')
    wall = (time.perf_counter() - wall)*1e3
    assert row['device'] == 'cuda' and 0 < sum(row['times_ms']) < wall
    on_gpu = x.cuda()
    assert abs(peak_memory(lambda: on_gpu + 1, 'cuda') - on_gpu.numel()*4) <= 2**21


RIGHT = [True, False, True, True, False]
INTERVALS = dict(ratio=lambda **k: measure.ratio_interval([1., 2., 3.], [2., 2., 2.], **k), paired=lambda **k: results.paired_difference(RIGHT, RIGHT[::-1], **k),
                 images=lambda **k: mean_over_images([.3, .4, .8], **k), mean=lambda **k: results.mean_interval([1, 2, 3], **k), session=lambda **k: results.next_session([1, 2, 3], **k),
                 wilson=lambda **k: wilson_interval(5, 10, **k))
DRAWN = ('ratio', 'paired', 'images')


@pytest.mark.parametrize('name', INTERVALS)
@pytest.mark.parametrize('level', [95, 1, 0, -.5, math.nan, True, None, '0.95'])
def test_a_level_is_a_share(name, level):
    "95 is no level: it gave NaN or an error of SciPy; -.5 turned the interval round."
    with pytest.raises(VitpruneError, match=r'^level: got .*; allowed: a share in \(0, 1\)'): INTERVALS[name](level=level)


@pytest.mark.parametrize('name', DRAWN)
@pytest.mark.parametrize('how, said', [*((dict(draws=n), 'draws: got .*; allowed: an integer from 1 to a million') for n in (0, -1, 2.5, True, None, 10**7)),
                                       *((dict(seed=s), 'seed: got .*; allowed: an integer from 0') for s in (-1, 1.5, None, True, 2**32))])
def test_draws_and_seeds_of_a_bootstrap(name, how, said):
    with pytest.raises(VitpruneError, match=said): INTERVALS[name](**how)


@pytest.mark.parametrize('name', INTERVALS)
def test_a_higher_level_is_wider(name):
    ends = lambda level: (lambda r: (r['low'], r['high']) if isinstance(r, dict) else r[-2:])(INTERVALS[name](level=level))
    (low, high), (lower, higher) = ends(.5), ends(.99)
    assert lower <= low <= high <= higher and lower < higher


def test_the_mean_of_one_image_has_no_interval():
    for values in ([.3], []):
        with pytest.raises(VitpruneError, match='allowed: one finite number an image, of two images or more'): mean_over_images(values)
    assert mean_over_images([.3, .3])[0] == pytest.approx(.3)


X, NET = torch.zeros(4, 3, 8, 8), torch.nn.Flatten()
ROWS = [dict(name=n, times_ms=[ms]*3, batch=4, device='cpu', dtype='fp32', threads=1, repeats=3) for n, ms in (('dense', 20.), ('slim', 12.))]


@pytest.mark.parametrize('call, said', [
    (lambda: measure.bench({}, X), 'models: got {}; allowed: a dict of at least one name'),
    (lambda: measure.bench(dict(net=NET), X, repeats=0), 'repeats: got 0; allowed: a positive integer'),
    (lambda: measure.bench(dict(net=NET), X[:0]), 'a tensor of at least one image'),
    (lambda: measure.summary([], 1), 'times_ms: got []'),
    (lambda: measure.ratio_interval([], []), 'new: got []; allowed: a list of times in ms, at least one'),
    (lambda: measure.time_reduction(ROWS, 'densest'), "base: got densest; allowed: one of ['dense', 'slim']"),
    (lambda: measure.time_reduction(ROWS, 'dense', macs=dict(dense=1)), "macs: got ['dense']"),
    (lambda: results.paired_difference([], []), 'right or wrong (bool) for each image'),
    (lambda: results.mean_interval([1., float('nan')]), 'values: got'),
    (lambda: results.mean_error(-.1, .03, 1, 6), 'between, within: got (-0.1, 0.03)'),
    (lambda: results.next_session([1.]), 'two or more'),
    (lambda: overhead.saved_time(.5, 1.2), 'fixed: got 1.2'),
    (lambda: overhead.shortfall(dict(a=1.), dict(a=1.), 1.), 'reduction: got 1.0'),
    (lambda: overhead.operator_ms(NET, [1.]), 'x: got [1.0]'),
    (lambda: overhead.operator_ms(NET, X, 0), 'repeats: got 0')])
def test_bad_input_is_named(call, said):
    with pytest.raises(VitpruneError, match=re.escape(said)): call()


def test_a_model_comes_back_as_it_was():
    "Part by part its mode, its device, and weights that can be trained again."
    class Moved(torch.nn.Linear):
        places = []
        def to(self, place): # as a move between devices does: new tensors
            self.places.append(str(place))
            self.weight = torch.nn.Parameter(self.weight.detach().clone())
            return self
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(), torch.nn.Linear(3, 3)).train()
    net[2].eval()
    with evaluating(net) as place: assert (place.type, net.training, torch.is_inference_mode_enabled()) == ('cpu', False, True)
    assert [m.training for m in net.modules()] == [True, True, True, False]
    moved = Moved(3, 3)
    with pytest.raises(ZeroDivisionError), evaluating(moved, device='cpu'): raise ZeroDivisionError
    assert moved.training and Moved.places == ['cpu', 'cpu'] and not moved.weight.is_inference()
    moved(torch.ones(2, 3)).sum().backward()


def test_models_that_share_a_part_go_back_to_where_all_were():
    "Where each was is looked up before the first is moved, and the shared part with it."
    class Placed(torch.nn.Module):
        def __init__(self, shared): super().__init__(); self.shared, self.now = shared, shared[0]
        def parameters(self): return iter([SimpleNamespace(device=self.shared[0])])
        def to(self, place): self.shared[0] = self.now = place
    shared = ['elsewhere']
    one, other = Placed(shared), Placed(shared)
    with evaluating(one, other, device='cpu') as place: assert one.now == other.now == place == torch.device('cpu')
    assert one.now == other.now == 'elsewhere'


@needs_cuda
def test_a_model_that_was_asked_on_a_gpu_can_be_trained_where_it_was():
    net = torch.nn.Linear(3, 3)
    with evaluating(net, device='cuda') as place: assert net.weight.device.type == place.type == 'cuda'
    assert net.weight.device.type == 'cpu'
    net(torch.ones(2, 3)).sum().backward()


@needs_cuda
def test_models_that_share_a_network_come_back_whole():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    both = torch.nn.Sequential(net, torch.nn.BatchNorm1d(3))
    bench(dict(net=net, both=both), torch.zeros(2, 3), warmup=1, repeats=1, device='cuda')
    assert {t.device.type for t in (*both.parameters(), *both.buffers())} == {'cpu'}
