"""A budget of MACs is met or refused, in both directions, whatever the method; and a dial of a method replaces the default one."""
import json
import math

import pytest
import timm
import torch

from vitprune_nb.cli import BUDGET, main, prune_options
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.cost import meet_budget, tolerance_of
from vitprune_nb.data import embedded
from vitprune_nb.demo import rival_plans
from vitprune_nb.engine.slim import Policy, SlimViT, Step
from vitprune_nb.experiment import read_experiment
from vitprune_nb.methods.base import METHODS, Method, method, prune, turn
from vitprune_nb.engine.macs import cost_of, macs_of
from vitprune_nb.methods.patch_slimming import for_budget
from vitprune_nb.engine.plan import ramp_plan, uniform_plan
from vitprune_nb.vit.model import course_model

PLANS = ('patch-slimming', 'uniform', 'attention', 'random')


def quick(name): # what a method is told so that it looks at 8 images and trains on none
    options = METHODS[name].options
    return {k: 0 for k in options if k.endswith('_epochs')} | ({'calibration': 8} if 'calibration' in options else {})


def vit(depth=6, side=64, **kwargs):     # 64 patches
    torch.manual_seed(0)
    return timm.create_model('vit_tiny_patch16_224', **dict(img_size=side, patch_size=8, embed_dim=48, num_heads=3, depth=depth, num_classes=10) | kwargs).eval()


@pytest.fixture(scope='module')
def few(): return embedded('train').subset(range(0, 5000, 250))


def asked(name, reduction, few, model=None, **options):
    return prune(name, vit() if model is None else model, few, reduction=reduction, **quick(name) | options)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('reduction', [.25, .45])
def test_every_method_saves_what_is_asked(name, reduction, few):
    model = vit()
    slim = asked(name, reduction, few, model)
    assert tolerance_of(model) == .02
    assert abs(slim.info['reduction'] - reduction) <= .02 and abs(1 - macs_of(slim)/macs_of(model) - reduction) <= .02


@pytest.mark.parametrize('name', PLANS)
@pytest.mark.parametrize('reduction, words', [(.01, 'at least 0.1'), (.05, 'at least 0.1'), (.99, 'at most 0.')])
def test_budgets_on_either_side_of_what_plans_can_save(name, reduction, words, few):
    "The last block computes CLS alone: six blocks cannot save less than most of one of them."
    with pytest.raises(VitpruneError, match=f'reduction: got {reduction}; allowed: {words}'): asked(name, reduction, few)


@pytest.mark.parametrize('name, reduction, options, words', [
    ('vtp', .97, {}, 'at most 0.'),
    ('life', .9, {}, 'at most 0.'), ('life', .5, dict(stages=[5]), 'at most 0.'), ('cosine', .995, {}, 'at most 0.')])
def test_budgets_out_of_reach_of_the_others(name, reduction, options, words, few):
    with pytest.raises(VitpruneError, match=f'reduction: got {reduction}; allowed: .*{words}'): asked(name, reduction, few, **options)


def test_a_cut_in_coarse_multiples(few):
    with pytest.raises(VitpruneError, match='reduction: got 0.18; allowed: .* the nearest that can be had'):
        asked('vtp', .18, few, vit(depth=1, embed_dim=96), whole_heads=True, multiple=96)


@pytest.mark.parametrize('name', PLANS)
def test_one_block_has_one_reduction(name, few):
    with pytest.raises(VitpruneError, match='reduction: got 0.3; allowed: at least 0.6|model: got a single block'): asked(name, .3, few, vit(depth=1))


def test_a_search_in_steps_of_all_patches_says_what_it_can_have(few):
    model = course_model()
    with pytest.raises(VitpruneError, match=r'reduction: got 0.45; allowed: 0\.\d{3} or 0\.\d{3}, the nearest that can be had, for this model with step=1000') as e:
        asked('patch-slimming', .45, few, model, step=1000)
    for share in (float(w) for w in str(e.value).split('allowed: ')[1].split(', the')[0].split(' or ')):
        assert abs(asked('patch-slimming', share, few, model, step=1000).info['reduction'] - share) < 1e-3    # what it names can be had


def test_what_a_refusal_names_can_be_had(few):
    "The bounds of uniform plans, asked for."
    for reduction in (.01, .97):
        with pytest.raises(VitpruneError) as e: asked('uniform', reduction, few)
        share = float(str(e.value).split('allowed: at ')[1].split()[1])
        assert abs(asked('uniform', round(share - (reduction > .5)*5e-4, 4), few).info['reduction'] - share) <= .01


@pytest.mark.parametrize('name', ['uniform', 'life'])
def test_few_patches_are_met_to_half_of_one(name, few):
    model = vit(side=32)
    assert tolerance_of(model) == .5/16
    assert abs(asked(name, .3, few, model, **(dict(stages=[1, 2, 3]) if name == 'life' else {})).info['reduction'] - .3) <= .5/16


def test_the_budget_of_a_model_with_cut_channels_is_its_own(few):
    "What is asked is saved on the model that is given; the record says what both cuts save together."
    cut = prune('vtp', vit(), few, ratio=.3, sparse_epochs=0)
    both = asked('uniform', .3, few, cut)
    assert abs(1 - macs_of(both)/macs_of(cut) - .3) <= .01
    assert both.info['reduction'] == pytest.approx(1 - (1 - cost_of(cut)['reduction'])*macs_of(both)/macs_of(cut), abs=1e-6)


def test_a_method_that_forgets_its_budget_is_found_out(few):
    class Fixed(Method):
        def plan(self, job, state, value): return self.steps
        def build(self, job, state, plan, trained=None): return SlimViT(job.model, Policy(plan, self.name))

    @method('lazy', 'keep everything')
    class Lazy(Fixed): steps = {}

    @method('greedy', 'keep CLS')
    class Greedy(Fixed): steps = {0: Step(keep=())}
    try:
        with pytest.raises(VitpruneError, match='reduction: got 0.4; allowed: about 0.000, what lazy saves on this model'): prune('lazy', vit(), few, reduction=.4)
        with pytest.raises(VitpruneError, match='reduction: got 0.4; allowed: about 0.9.*what greedy saves'): prune('greedy', vit(), few, reduction=.4)
    finally: del METHODS['lazy'], METHODS['greedy']


def test_plans_and_rivals_of_the_demo(few):
    model = vit()
    scores = torch.rand(6, 65)
    for make in (lambda r: uniform_plan(model, scores, r), lambda r: ramp_plan(model, r), lambda r: for_budget(model, [torch.rand(2, 3, 64, 64)], r),
                 lambda r: rival_plans(model, few.subset(range(4)), r)):
        with pytest.raises(VitpruneError, match='reduction: got 0.02; allowed: at least 0.1'): make(.02)
    assert abs(ramp_plan(model, .5).reduction(model) - .5) <= .01


# --- turning a dial that does not rise steadily

@pytest.mark.parametrize('saved, wanted', [
    (lambda v: .5*math.sin(math.pi*v)**2, .1), (lambda v: .4 if v < .5 else v - .3, .4), (lambda v: .6*v + .05*math.sin(40*v), .33),
    (lambda v: .382 if v < .7 else .378 if v < .75 else v, .378), (lambda v: .9 - .8*v, .3)])
def test_the_best_setting_that_was_seen_counts(saved, wanted):
    dial, model, got = turn(lambda v: (f'at {v}', saved(v)), 0., 1., wanted)
    assert abs(got - wanted) <= .02 and got == saved(dial) and model == f'at {dial}'


@pytest.mark.parametrize('saved, wanted, words', [
    (lambda v: .1 if v < .3 else .8, .45, '0.100 or 0.800'), (lambda v: .2 + .1*v, .05, 'at least 0.200'), (lambda v: .5*v, .8, 'at most 0.500'),
    (lambda v: -.1 + .05*v, .3, 'at most -0.050'), (lambda v: .3 if .4 < v < .6 else .1, .2, '0.100 or 0.300')])
def test_a_dial_that_cannot_says_what_it_can(saved, wanted, words):
    with pytest.raises(VitpruneError, match=f'reduction: got {wanted}; allowed: {words}'): turn(lambda v: (None, saved(v)), 0., 1., wanted)


def test_settings_that_are_refused_do_not_end_the_search():
    def shy(v):
        if v > .3 and v < .9: raise VitpruneError('not here')
        return None, v
    assert turn(shy, 0., 1., .2)[2] == pytest.approx(.2, abs=2e-3)
    with pytest.raises(VitpruneError, match=r'reduction: got 0.6; allowed: 0.300 or 0.938'): turn(shy, 0., 1., .6)
    with pytest.raises(VitpruneError, match='not here'): turn(shy, .4, .8, .6)


def test_meeting_a_budget():
    assert meet_budget(.3, [.1, .309, .5], .01) is None
    with pytest.raises(VitpruneError, match='0.100 or 0.500, the nearest that can be had, for this model with step=9. Ask for that'): meet_budget(.3, [.05, .1, .5, .7], .01, 'step=9')


# --- a dial of the method instead of the default budget

@pytest.mark.parametrize('name, dials', [('patch-slimming', dict(eps=.1)), ('vtp', dict(ratio=.3)), ('life', dict(keep_rate='0.8')),
                                         ('cosine', dict(cosine_threshold=.95)), ('cosine', dict(score_threshold=.4)), ('cosine', dict(cosine_threshold=.9, score_threshold=.4))])
def test_a_dial_replaces_the_default_budget(name, dials):
    assert 'reduction' not in prune_options(name, dict(dials), 0, None)


@pytest.mark.parametrize('name, given', [('patch-slimming', dict(step=5.)), ('vtp', dict(l1=.1)), ('life', dict(stages='2,4')), ('cosine', dict(rounds=1)), ('uniform', {}), ('random', dict(keys='all'))])
def test_other_options_leave_the_default_budget(name, given):
    assert prune_options(name, dict(given), 0, None)['reduction'] == BUDGET == .45


def test_a_budget_with_the_label_of_cosine_stays_a_budget():
    assert prune_options('cosine', dict(cosine_threshold=.95, reduction=.2), 0, None) == dict(cosine_threshold=.95, reduction=.2)


@pytest.mark.parametrize('words', ['--cosine-threshold 0.95', '--cosine-threshold 0.9 --score-threshold 0.5', '--score-threshold 0.3'])
def test_cosine_on_the_course_model_by_its_own_dials(words, tmp_path, capsys):
    assert main(f'prune --method cosine {words} --calibration 16 --out {tmp_path/"o"} --json'.split()) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path/'o'/'config.json').read_text())['info']['reduction'] == said['reduction']


@pytest.mark.parametrize('words, said', [
    ('--method life --stages 10 --predictor-epochs 0 --backbone-epochs 0', '0.45 is the default of life; give --reduction or --keep-rate.'),
    ('--step 1000 --calibration 4', '0.45 is the default of patch-slimming; give --reduction or --eps.'),
    ('--method patch-slimming --reduction 0.01 --calibration 4', "allowed: at least 0.069 for this model with step=3 and keys='entering'"),
    ('--method uniform --reduction 0.01 --calibration 4', 'reduction: got 0.01; allowed: at least 0.069')])
def test_the_command_line_says_whose_budget_it_was(words, said, tmp_path, capsys):
    assert main(f'prune {words} --out {tmp_path/"o"}'.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1 and not list(tmp_path.iterdir())
    assert ('default' in err) == ('--reduction 0' not in words)


@pytest.mark.parametrize('name, dial, value', [('vtp', 'ratio', .4), ('life', 'keep_rate', .7), ('cosine', 'score_threshold', .5), ('patch-slimming', 'eps', .02)])
def test_a_run_has_its_own_reductions(name, dial, value, tmp_path):
    for methods in ([name], ['uniform']):       # also for a method that this run does not use
        (tmp_path/'c.toml').write_text(f'methods = {json.dumps(methods)}\nreductions = [0.3]\n[options.{name}]\n{dial} = {value}\n')
        with pytest.raises(VitpruneError, match=f'options.{name}.{dial}: got {value}; allowed: no value of its own, for a run turns this dial until each of its reductions is met'):
            read_experiment(tmp_path/'c.toml')


def test_a_run_may_fix_the_label_of_cosine(tmp_path):
    (tmp_path/'c.toml').write_text('methods = ["cosine"]\n[options.cosine]\ncosine_threshold = 0.95\n')
    assert read_experiment(tmp_path/'c.toml').options == dict(cosine=dict(cosine_threshold=.95))
