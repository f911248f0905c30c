"""Timing where the notebook cannot look: interrupted grids, memory that runs out, compiled models, a GPU."""

import pytest
import torch
from vitprune_nb.papers import timing
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.results import read_rows

TINY = dict(backbones=['test_vit'], dtypes=['fp32'], engines=['eager'], devices=['cpu'], budgets=(.3,), repeats=2, warmup=1, img_size=64)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def cases(file): return [(r['batch'], r['method']) for r in read_rows(file)]


def test_an_interrupted_grid_goes_on_and_repeats_nothing(tmp_path, monkeypatch):
    file, real, done = tmp_path/'t.csv', timing.time_case, []

    def once(case, **how):
        if done: raise KeyboardInterrupt
        done.append(case)
        return real(case, **how)

    monkeypatch.setattr(timing, 'time_case', once)
    with pytest.raises(KeyboardInterrupt): list(timing.timing_grid(file, batches=(1, 2), methods=('uniform', 'life'), **TINY))
    assert cases(file) == [(1, 'dense'), (1, 'uniform'), (1, 'life')]
    first = file.read_text()
    monkeypatch.setattr(timing, 'time_case', real)
    assert [r['batch'] for r in timing.timing_grid(file, batches=(1, 2), methods=('uniform', 'life'), **TINY)] == [2]*3
    assert file.read_text().startswith(first) and len(set(cases(file))) == len(cases(file)) == 6


def test_rows_of_another_machine_budget_or_size_do_not_count_as_done(tmp_path, monkeypatch):
    file = tmp_path/'t.csv'
    run = lambda **new: len(list(timing.timing_grid(file, batches=(1,), methods=('uniform',), **{**TINY, **new})))
    assert [run(), run(), run(budgets=(.4,)), run(img_size=80), run()] == [2, 0, 2, 2, 0]
    real = timing.environment
    monkeypatch.setattr(timing, 'environment', lambda d: dict(real(d), device_name='another'))
    assert run() == 2


def test_a_case_that_does_not_fit_costs_a_sentence(tmp_path, monkeypatch):
    file, real, said = tmp_path/'t.csv', timing.time_case, []

    def full(case, **how):
        if case.batch == 1: raise torch.OutOfMemoryError('out of memory')
        return real(case, **how)

    monkeypatch.setattr(timing, 'time_case', full)
    rows = list(timing.timing_grid(file, batches=(1, 2), methods=('uniform',), say=said.append, **TINY))
    assert {r['batch'] for r in rows} == {2} and said == ['test_vit, cpu, fp32, eager, batch 1: left out, it does not fit into memory.']


@pytest.mark.parametrize('engine', ['compile', 'frozen'])
def test_a_model_that_cannot_be_compiled_costs_a_sentence(engine, monkeypatch):
    said = []
    monkeypatch.setattr(timing, 'compile_error', lambda d: '')

    def broken(net):
        def call(x): raise RuntimeError('no compiler')
        return call

    rows = list(timing.timing_grid(None, batches=(1,), methods=('uniform',), say=said.append, **dict(TINY, engines=[engine], compiler=broken)))
    assert rows == [] and len(said) == 1 and 'torch.compile failed' in said[0] and 'no compiler' in said[0]
    monkeypatch.setattr(timing, 'compile_error', lambda d: 'RuntimeError: no g++')
    assert list(timing.timing_grid(None, batches=(1,), methods=('uniform',), say=said.append, **dict(TINY, engines=[engine]))) == []
    assert said[1].endswith('left out, torch.compile does not work here (RuntimeError: no g++).')


def test_static_shapes_go_through_the_compiler_in_one_graph():
    compiler = lambda net: torch.compile(net, backend='eager', fullgraph=True, dynamic=False)
    rows = timing.time_case(timing.Case('test_vit', 'cpu', 'fp32', 'compile', 2), .3, ('patch slimming, keys entering', 'life', 'vtp'), repeats=1, warmup=1, compiler=compiler, img_size=64)
    assert [r['method'] for r in rows] == ['dense', 'patch slimming, keys entering', 'life', 'vtp'] and rows[0]['schedule']['engine'] == 'compile'


@pytest.mark.parametrize('engine', ['compile', 'frozen'])
def test_only_the_frozen_engine_runs_with_constant_weights(engine):
    import torch._inductor.config as config
    seen = []

    def compiler(net):
        def call(x):
            seen.append(config.freezing)
            return net(x)
        return call

    rows = timing.time_case(timing.Case('test_vit', 'cpu', 'fp32', engine, 1), .3, ('uniform',), repeats=1, warmup=1, compiler=compiler, img_size=64)
    assert {r['schedule']['engine'] for r in rows} == {engine} and set(seen) == {engine == 'frozen'} and not config.freezing


def test_frozen_weights_reach_the_compiled_code():
    from torch._inductor.utils import run_and_get_code
    if error := timing.compile_error('cpu'): pytest.skip(error)
    net, x, found = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).eval(), torch.randn(32, 64), {}
    for engine in ('compile', 'frozen'):
        torch._dynamo.reset()
        with torch.inference_mode(), timing.constants(engine):
            out, code = run_and_get_code(torch.compile(net, dynamic=False), x)
            torch.testing.assert_close(out, net(x))
        found[engine] = '_frozen_param' in ''.join(code)
    assert found == dict(compile=False, frozen=True)


@pytest.mark.parametrize('bad, said', [
    (dict(methods=('tome',)), 'methods: got'), (dict(batches=(0,)), 'batches: got 0'), (dict(batches=(1.5,)), 'batches: got 1.5'), (dict(dtypes=['fp16']), 'dtypes: got fp16'), (dict(engines=['jit']), 'engines: got jit'),
    (dict(budgets=(1.,)), 'budget: got 1.0'), (dict(budgets=('half',)), 'budget: got half'), (dict(budgets=(.99,)), 'reduction: got 0.99'), (dict(backbones=['resnet_nonsense']), 'model: got resnet_nonsense'),
    (dict(shares=torch.ones(2, 3)), 'shares: got'), (dict(repeats=0), 'repeats: got 0')])
def test_bad_input_gets_one_sentence_and_writes_nothing(bad, said, tmp_path):
    with pytest.raises(VitpruneError, match=said): list(timing.timing_grid(tmp_path/'t.csv', **{**TINY, 'batches': (1,), **bad}))
    assert not (tmp_path/'t.csv').exists()


def test_given_shares_decide_the_cost():
    net = timing.create_vit('test_vit', img_size=64)
    few, many = torch.full((4, 6), .5), torch.full((4, 6), .75)
    less, more = (timing.skip_policy(net, s, 1., 4)[1] for s in (few, many))
    assert less < more < timing.model_macs(net)


@needs_cuda
def test_the_grid_runs_on_a_gpu(tmp_path):
    rows = list(timing.timing_grid(tmp_path/'t.csv', batches=(2,), **dict(TINY, devices=['cuda'], dtypes=['fp32', 'bf16'])))
    assert {r['device'] for r in rows} == {'cuda'} and {r['dtype'] for r in rows} == {'fp32', 'bf16'} and {r['method'] for r in rows} == {'dense', *timing.TIMED}
