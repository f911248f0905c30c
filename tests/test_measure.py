"""Timing and memory where a notebook on a CPU cannot look: the CUDA path, real when there is a GPU and acted out when there is none."""
import time

import pytest
import torch
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
