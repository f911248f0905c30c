"""What measuring, exporting and the tables of the papers do not accept, each with the error that says so."""
import math, os

import pytest, torch
from vitprune_nb.data import calibration, embedded
from vitprune_nb.engine.channels import choose
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence import measure, results
from vitprune_nb.methods.vtp import add_gates, importance
from vitprune_nb.papers import channel_tables, cosine_claims, imagenet, overhead
from vitprune_nb.run import spread_answers
from vitprune_nb.vit.cost import model_macs
from vitprune_nb.vit.model import create_vit

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_vit('deit_tiny_patch16_224', **SMALL).eval()


@pytest.fixture(scope='module')
def scores(model): return importance(add_gates(create_vit('deit_tiny_patch16_224', **SMALL)))


@pytest.mark.parametrize('f, text', [
    (lambda: measure.summary([0.], 1), 'all above 0'),
    *((lambda t=t: measure.summary([1., t], 1), 'at least one time, finite and all above 0') for t in (math.inf, math.nan)),
    *((lambda b=b: measure.summary([1.], b), f'batch: got {b}; allowed: a whole number of images, 1 or more') for b in (-3, 0, 1.5)),
    *((lambda d=d: measure.dtype_name(d), f"dtype: got {d}; allowed: 'auto', 'fp32' or 'bf16'") for d in ('banana', 'float32')),
    (lambda: measure.dtype_name('banana', x=torch.zeros(1).double()), 'dtype: got banana'),
    (lambda: measure.time_reduction([dict(name='dense', times_ms=[1.], batch=4)], 'dense'), 'allowed: the rows of one bench'),
    (lambda: overhead.saved_time(5., .4), 'reduction: got 5.0; allowed: a share, at most 1'),
    (lambda: imagenet.train_hours(1, 100., efficiency=5.), 'efficiency: got 5.0; allowed: a share in (0, 1]'),
    (lambda: cosine_claims.given_policy(torch.full((2, 3), .5), 2, 48, 16, 'entering'), "keys: got entering; allowed: 'all' or 'kept'"),
    *((lambda p=p: spread_answers(p, 3), f'parts: got {list(map(len, p))}; allowed: shares of 3 images in turn') for p in ([[True]], [[True], [True, True]], [])),
    (lambda: measure.ratio_interval([1.], [1., 2.]), 'times: got 1 and 2 times'),
    (lambda: results.mcnemar(-1, 2), 'allowed: counts, 0 or more'),
    (lambda: results.mean_interval([1.]), 'values: got [1.0]; allowed: two or more finite numbers'),
    (lambda: results.mean_error(.02, .03, 0, 6), 'sessions: got 0'),
    (lambda: overhead.fixed_time([1e9], [5.]), 'two or more models'),
])
def test_times_and_answers_that_cannot_be(f, text):
    with pytest.raises(VitpruneError) as e: f()
    assert text in str(e.value)


def test_names_of_dtypes():
    assert [measure.dtype_name(d) for d in ('bf16', torch.bfloat16, torch.float16, torch.float64)] == ['bf16', 'bf16', 'fp16', 'torch.float64']
    assert measure.dtype_name('fp32', x=torch.zeros(1).double()) == 'torch.float64' and measure.dtype_name('fp32', x=torch.zeros(1)) == 'fp32'


def test_what_costs_more_takes_longer():
    assert overhead.saved_time(-.1, .5) == pytest.approx(-.05) and overhead.saved_time(1, 0) == 1


@pytest.mark.parametrize('f, text', [
    (lambda m, s: channel_tables.random_channels(choose(s, .3, 3), 5), 'heads: got 5; allowed: a divisor of 48'),
    (lambda m, s: channel_tables.uniform_channels(s, 1, 3), 'ratio: got 1'),
    (lambda m, s: channel_tables.uniform_at(m, s, 2*model_macs(m)), 'above 0 and at most'),
    (lambda m, s: channel_tables.uniform_at(m, s, 0), 'macs: got 0'),
    (lambda m, s: channel_tables.uniform_cost(m, 1), 'ratio: got 1'),
    (lambda m, s: channel_tables.uniform_cost(m, .4, 'some'), "rows: got some; allowed: 'none', 'hidden', 'all'"),
    (lambda m, s: channel_tables.channel_row(m, calibration(embedded('test'), 20), 'small', 'cpu', speed=1), 'field: got speed'),
    (lambda m, s: channel_tables.record_table(m, images=10**6, path=os.devnull), 'n: got 1000000'),
    (lambda m, s: channel_tables.ChannelRun(l1s=(-1,)), 'l1s: got (-1,); allowed: numbers, 0 or more'),
    (lambda m, s: channel_tables.ChannelRun(l1s=()), 'l1s: got ()'),
    (lambda m, s: channel_tables.ChannelRun(ratios=(1,)), 'ratios: got (1,); allowed: shares in (0, 1)'),
    (lambda m, s: channel_tables.ChannelRun(ratios=(0.,)), 'ratios: got (0.0,)'),
    (lambda m, s: channel_tables.ChannelRun(baselines=('best',)), "baselines: got ['best']; allowed: 'uniform', 'random'"),
])
def test_channels_and_tables_that_cannot_be(f, text, model, scores):
    with pytest.raises(VitpruneError) as e: f(model, scores)
    assert text in str(e.value)


def test_exports_that_cannot_be(model, tmp_path):
    pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    from vitprune_nb.deploy import OnnxModel, export_onnx, onnx_ops
    x, file = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), tmp_path/'m.onnx'
    training = create_vit('deit_tiny_patch16_224', **SMALL).train()
    for f, text in ((lambda: export_onnx(training, file, x), 'model: got a VisionTransformer in training mode; allowed: a module in eval mode'),
                    (lambda: export_onnx(model, tmp_path/'m.pt', x), 'allowed: a file name that ends in .onnx'),
                    (lambda: export_onnx(model, file, x[0]), 'images: got torch.Size([3, 32, 32])'),
                    (lambda: export_onnx(model, file, x[:1], dynamic=True), 'two at least'),
                    (lambda: export_onnx(lambda x: x, file, x), 'allowed: a module in eval mode'),
                    (lambda: export_onnx(model, file, x, tol=-1.), 'in ONNX Runtime; allowed: at most -1'),
                    (lambda: export_onnx(model, file, x, classes=['cat']), 'classes: got 1 names; allowed: 10, as many as'),
                    (lambda: export_onnx(model, 5, x), 'path: got 5; allowed: a file name that ends in .onnx'),
                    (lambda: OnnxModel(tmp_path/'none.onnx'), 'allowed: an existing ONNX file'),
                    (lambda: OnnxModel(5), 'path: got 5; allowed: an existing ONNX file'),
                    (lambda: onnx_ops(5), 'path: got 5; allowed: an existing ONNX file'),
                    (lambda: onnx_ops(tmp_path/'none.onnx'), 'an existing ONNX file')):
        with pytest.raises(VitpruneError) as e: f()
        assert text in str(e.value)
    assert not file.exists()
    runs = OnnxModel(export_onnx(model, file, x))
    (tmp_path/'half.onnx').write_bytes(file.read_bytes()[:999])
    for f, text in ((lambda: runs(x.double()), 'torch.float64 of shape (2, 3, 32, 32)'),
                    (lambda: runs(x[:, :1]), 'Export again for another batch'),
                    (lambda: OnnxModel(file, threads=0), 'threads: got 0'),
                    (lambda: OnnxModel(tmp_path/'half.onnx'), 'that this onnxruntime can run')):
        with pytest.raises(VitpruneError) as e: f()
        assert text in str(e.value)
