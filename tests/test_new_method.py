"""A method that is defined here, and nowhere else, reaches everything that the others reach."""
import json
from typing import Annotated

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field

from vitprune_nb.cli import main
from vitprune_nb.deploy import OnnxModel, export_onnx, logit_gap
from vitprune_nb.engine.macs import cost_of
from vitprune_nb.engine.policy import Policy, Scorer, Step, register_scorer
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.engine.store import load_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.measure import bench
from vitprune_nb.evidence.results import read_rows
from vitprune_nb.methods.base import METHODS, Config, Method, method, option, prune
from vitprune_nb.vit.cost import count_macs
from vitprune_nb.vit.model import create_vit
from vitprune_nb.viz import method_color


@register_scorer('brightness')
class Brightness(Scorer):
    "The mean of the token."
    def macs(self, n, dim, n_prefix=1): return 0.
    def forward(self, t): return t.x.float().mean(-1)


class ToyConfig(Config):
    after: Annotated[int, Field(ge=1)] = option(1, 'block after which patches leave', 'a block number, 1 or more', 'N')
    share: Annotated[float, Field(gt=0, le=1)]|None = option(None, 'share of the patches that stay', 'a share in (0, 1]', 'SHARE', dial=True)
    keep_rate: Annotated[float, Field(gt=0, le=1)] = option(.5, 'one number', 'a number in (0, 1]', 'SHARE')   # life's may be a list


@pytest.fixture
def toy():
    @method('toy', 'keep the brightest patches', 'a test', '#123456')
    class Toy(Method):
        config, ends = ToyConfig, (1., 0.)
        def default(self, c): return .5 if c.share is None else c.share

        def plan(self, job, state, share):
            count = max(1, round(share*job.model.patch_embed.num_patches))
            return Policy({job.config.after: Step(score=Brightness(), count=count)}, 'toy')

        def build(self, job, state, plan, trained=None): return SlimViT(job.model, plan)
    yield METHODS['toy']
    del METHODS['toy']


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (('train', 8), ('test', 6)):
        for k, name in enumerate(('cat', 'dog', 'fox')):
            (tmp_path/'images'/split/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (32, 32, 3))
                pixels[..., k] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/'images'/split/name/f'{i}.png')
    return tmp_path/'images'


def test_the_command_line_has_its_options_and_its_help(toy, capsys):
    assert main(['prune', '--help']) == 0
    said = ' '.join(capsys.readouterr().out.split())
    for words in ('toy keep the brightest patches', '--after N toy: block after which patches leave [default: 1]',
                  '--share SHARE toy: share of the patches that stay, instead of --reduction',
                  'toy: one number'): assert words in said           # each method's own words for a name that they share


@pytest.mark.parametrize('words, said', [
    ('--after 0', 'after: got 0; allowed: a block number, 1 or more.'),
    ('--share 2', 'share: got 2.0; allowed: a share in (0, 1].'),
    ('--share 0.5 --reduction 0.3', 'share: got 0.5; allowed: either reduction or share.'),
    ('--eps 0.1', 'eps: got 0.1; allowed: nothing for toy, which does not read it. It reads reduction, seed, after, share, keep_rate.'),
    ('--keep-rate 0.5,0.7', 'keep_rate: got [0.5, 0.7]; allowed: a number in (0, 1].')])
def test_what_it_refuses_is_said_in_its_words(toy, tmp_path, capsys, words, said):
    assert main(f'prune --method toy {words} --out {tmp_path/"o"}'.split()) == 2
    assert said in capsys.readouterr().err and not (tmp_path/'o').exists()


def test_pruned_saved_evaluated_and_timed_from_the_command_line(toy, tmp_path, capsys):
    out = str(tmp_path/'o')
    assert main(['prune', '--method', 'toy', '--reduction', '0.3', '--keep-rate', '0.7', '--out', out, '--json']) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record['method'] == 'toy' and record['keep_rate'] == .7 and abs(record['reduction'] - .3) < .01 and 0 < record['share'] < 1
    for words in (['eval', out, '--limit', '40'], ['bench', out, '--batch', '2', '--repeats', '1', '--warmup', '1'], ['cost', out]):
        assert main([*words, '--json']) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])['model'] == out
    back = load_pruned(out)
    assert isinstance(back.policy.steps[1].score, Brightness) and cost_of(back)['macs'] == record['macs']


def test_cost_timing_and_export(toy, images, tmp_path):
    from vitprune_nb.data import load_data
    net = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=3).eval()
    slim = prune('toy', net, load_data(images, 'train'), share=.5)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert cost_of(slim)['macs'] == count_macs(slim, x)/2
    assert {r['name'] for r in bench({'dense': net, 'toy': slim}, x, 1, 1)} == {'dense', 'toy'}
    assert logit_gap(OnnxModel(export_onnx(slim, tmp_path/'toy.onnx', x)), slim, x) < 1e-4
    assert method_color('toy') == '#123456'


def test_a_run_from_a_toml_file_with_its_report(toy, images, tmp_path, capsys):
    (tmp_path/'toy.toml').write_text(f'''
data = "{images}"
model = "deit_tiny_patch16_224"
model_args = {{ img_size = 32, patch_size = 8, embed_dim = 48, depth = 4, num_heads = 3 }}
device = "cpu"
methods = ["toy", "uniform"]
reductions = [0.3]
calibration = 6
time_batch = 2
repeats = 1
recover = {{ epochs = 0.5, batch_size = 6, dtype = "fp32" }}
[options.toy]
after = 2
''')
    assert main(['run', str(tmp_path/'toy.toml'), '--out', str(tmp_path/'run')]) == 0, capsys.readouterr().err
    rows = [r for r in read_rows(tmp_path/'run'/'results.csv') if r['method'] == 'toy']
    assert len(rows) == 2 and all(r['latency_ms'] for r in rows)
    assert 'toy' in (tmp_path/'run'/'report.md').read_text()
    bad = (tmp_path/'toy.toml').read_text().replace('after = 2', 'behind = 2')
    (tmp_path/'toy.toml').write_text(bad)
    assert main(['run', str(tmp_path/'toy.toml'), '--out', str(tmp_path/'run2')]) == 2
    assert 'options.toy: got behind; allowed: after, share, keep_rate' in capsys.readouterr().err


def test_a_method_without_a_plan_says_so(images):
    from vitprune_nb.data import load_data
    @method('empty', 'nothing yet')
    class Empty(Method): pass
    try:
        with pytest.raises(NotImplementedError, match='Empty.plan'):
            prune('empty', create_vit('test_vit', img_size=32, num_classes=3), load_data(images, 'train'), reduction=.3)
        with pytest.raises(VitpruneError, match='has no other dial'):
            prune('empty', create_vit('test_vit', img_size=32, num_classes=3), load_data(images, 'train'))
    finally: del METHODS['empty']


def test_training_that_nobody_counts_is_refused():
    class Untold(Method):
        config, trains = ToyConfig, True
    with pytest.raises(VitpruneError, match='method: got untold, which trains without an option that says how long; allowed: an option whose name ends in _epochs'):
        method('untold', 'a test')(Untold)
    assert 'untold' not in METHODS and Untold.name == ''
    class Told(Untold):
        def passes(self, c): return 2*c.after
    method('untold', 'a test')(Told)
    assert METHODS.pop('untold').passes(ToyConfig(after=3)) == 6


def test_a_model_in_place_of_the_name_is_said_so():
    model = create_vit('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    with pytest.raises(VitpruneError) as said: prune(model, 'evit', None)
    assert str(said.value) == "method: got a VisionTransformer; allowed: a name. The name comes first: prune('evit', model, images)."
