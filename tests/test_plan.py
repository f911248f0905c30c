"""What a plan, its file and the plans to beat refuse."""
import pytest, torch
from vitprune_nb.engine.plan import Plan, pick, ramp_plan, random_plan, uniform_plan, weights_hash
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')


def toy(keep=((0, 1, 2, 3), (2, 0), ())): return Plan('toy', 'any', 4, 1, list(keep))


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return create_vit('test_vit', img_size=64)      # 16 patches, 6 blocks


def tuned(model):
    return Plan('by hand', 'test_vit', 16, 1, [range(16)]*6, dict(model_hash=weights_hash(model)), {'blocks.0.mlp.fc2.bias': torch.ones(64)})


def refusal(call):
    with pytest.raises(VitpruneError) as e: call()
    return str(e.value)


@pytest.mark.parametrize('call, said', [
    (lambda: toy([(0, 1), (0, 2)]), 'keep[1]: got patch [2], which block index 0 drops; allowed: nested patches'),
    (lambda: toy([(0, 4)]), 'keep[0]: got [0, 4]; allowed: different patch indices from 0 to 3. CLS is kept anyway'),
    (lambda: toy([(1, 1)]), 'keep[0]: got [1, 1]; allowed: different patch indices'),
    (lambda: toy([]), 'keep: got no blocks'),
    (lambda: Plan('toy', 3, 4, 1, [(0,)]), 'model: got 3; allowed: text'),
    (lambda: Plan('toy', 'any', 0, 1, [()]), 'n_patches: got 0; allowed: a whole number, 1 or more'),
    (lambda: Plan('toy', 'any', 4, -1, [()]), 'n_prefix: got -1; allowed: a whole number, 0 or more'),
    (lambda: Plan('toy', 'any', 4, 1, 'ab'), 'keep: got ab; allowed: a list with the patch indices of each block'),
    (lambda: toy().counts('some'), "keys: got some; allowed: 'entering', 'all', 'kept'"),
    (lambda: pick([1, 2, 0], torch.zeros(3, 4)), 'counts: got [1, 2, 0]; allowed: numbers that never rise with depth'),
])
def test_a_plan_that_is_none(call, said): assert said in refusal(call)


def test_a_plan_for_another_model(tiny):
    assert 'The plan was made for that one' in refusal(lambda: toy().slim(tiny))
    wide = Plan('by hand', 'test_vit', 16, 1, [range(16)]*6, grid=(2, 8))
    assert '4 by 4 patches; allowed: 2 by 8 patches' in refusal(lambda: wide.slim(tiny))


def test_fine_tuned_blocks_want_the_weights_around_them(tiny):
    plan = tuned(tiny)
    plan.check(tiny)
    torch.manual_seed(1)
    assert 'got a test_vit with other weights; allowed: the one whose blocks this plan fine-tuned' in refusal(lambda: plan.slim(create_vit('test_vit', img_size=64)))


@pytest.mark.parametrize('reduction, said', [(1.2, 'reduction: got 1.2'), (0, 'reduction: got 0'), (.999, 'for this model with keys='), (.001, 'reduction: got 0.001; allowed: at least 0.')])
@pytest.mark.parametrize('rival', [lambda m, r: uniform_plan(m, torch.rand(6, 17), r), ramp_plan])
def test_a_budget_that_cannot_be_met(tiny, rival, reduction, said): assert said in refusal(lambda: rival(tiny, reduction))


@pytest.mark.parametrize('scores', [torch.rand(6, 16), torch.full((6, 17), torch.nan), [[1.]]])
def test_scores_of_another_shape(tiny, scores): assert 'allowed: finite scores of shape (6, 17)' in refusal(lambda: uniform_plan(tiny, scores, .3))


def test_random_plans_of_two_seeds_differ():
    plan = Plan('by hand', 'any', 64, 1, [range(64), range(32), range(4)])
    assert random_plan(plan, 1) == random_plan(plan, 1) != random_plan(plan, 2)


def test_files_that_hold_no_plan(tmp_path):
    toy().save(tmp_path/'plan.json')
    other = tmp_path/'other.json'
    other.write_text('{"keep": [[0]]}')
    assert 'a plan written by Plan.save' in refusal(lambda: Plan.load(other))
    outside = '"weights": {"file": "../w.safetensors", "sha256": "0"}'
    other.write_text((tmp_path/'plan.json').read_text().replace('"weights": null', outside))
    assert 'weights.file: String should match pattern' in refusal(lambda: Plan.load(other))
    assert 'plan: got nowhere.json; allowed: an existing JSON file' in refusal(lambda: Plan.load('nowhere.json'))


def test_weights_beside_a_plan_are_its_own(tiny, tmp_path):
    plan = tuned(tiny)
    (tmp_path/'model.safetensors').write_bytes(b'trained for weeks')
    assert 'model.safetensors is free, or the weights of a plan' in refusal(lambda: plan.save(tmp_path/'model.json'))
    assert (tmp_path/'model.safetensors').read_bytes() == b'trained for weeks'
    assert 'path: got' in refusal(lambda: plan.save(tmp_path/'plan.safetensors'))
    for _ in range(2): plan.save(tmp_path/'tuned.json')                # again: its own weights may be replaced
    (tmp_path/'tuned.safetensors').unlink()
    assert 'a plan with its weights, tuned.safetensors, unchanged beside it' in refusal(lambda: Plan.load(tmp_path/'tuned.json'))
