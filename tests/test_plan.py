"""What a plan, its file and the plans to beat refuse."""
import pytest, torch
from vitprune_nb.engine.plan import Plan, pick, ramp_plan, random_plan, score_plan, uniform_plan, weights_hash
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


@pytest.mark.parametrize('scores, given', [(torch.rand(6, 16), 'shape (6, 16)'), (torch.rand(5, 17), 'shape (5, 17)'), (torch.rand(6, 17, 1), 'shape (6, 17, 1)'), ([[1.]], 'list'),
                                           (torch.full((6, 17), torch.nan), 'NaN or infinity'), (torch.rand(6, 17).log_().fill_diagonal_(-torch.inf), 'NaN or infinity')])
def test_scores_that_cannot_be(tiny, scores, given):
    counts = Plan('by hand', 'test_vit', 16, 1, [range(k) for k in (16, 9, 9, 6, 3, 0)])
    for call in (lambda: uniform_plan(tiny, scores, .3), lambda: score_plan(counts, scores)):
        assert f'scores: got {given}; allowed: finite scores of shape (6, 17)' in refusal(call)
    if given != 'shape (6, 16)': assert f'scores: got {given}; allowed: finite scores of shape (6, ' in refusal(lambda: pick([16, 9, 9, 6, 3, 0], scores))


@pytest.mark.parametrize('counts', [[17, 3, 0], [3, 1.5, 0], [3, True, 0], [3, 0, -1]])
def test_counts_that_cannot_be_kept(counts): assert f'counts: got {counts}; allowed: whole numbers from 0 to 16' in refusal(lambda: pick(counts, torch.rand(3, 17)))


def test_a_block_without_any_score_has_no_say(tiny):
    "Its shares would be 0/0, and the scores of all the others would count for nothing."
    scores = torch.zeros(6, 17)
    scores[1, 1:] = torch.arange(16.)
    scores[3, 1:] = 2*torch.arange(16.)                       # twice the scores, the same shares
    kept = uniform_plan(tiny, scores, .3).keep[0]
    assert kept == tuple(range(16 - len(kept), 16)) and 0 < len(kept) < 16
    scores[3, 5] = -1e-9
    assert 'scores: got -1e-09; allowed: scores of 0 or more' in refusal(lambda: uniform_plan(tiny, scores, .3))
    scores[3, 5], scores[:, 0], scores[5] = 8., -1., -1.      # CLS is no patch, and nothing reads those of the last block
    assert uniform_plan(tiny, scores, .3).keep[0] == kept


@pytest.mark.parametrize('plan', [Plan('by hand', '', 16, 1, [range(16)]*5), Plan('by hand', '', 15, 1, [range(15)]*6), Plan('by hand', '', 16, 2, [range(16)]*6)])
def test_a_plan_saves_nothing_of_a_model_of_another_shape(plan, tiny):
    said = refusal(lambda: plan.reduction(tiny))
    assert said.startswith('model: got one of 6 blocks, 16 patches and 1 prefix token(s); allowed: one of ') and 'as in the plan' in said
    assert 0 < Plan('by hand', 'any other name', 16, 1, [range(8)]*6).reduction(tiny) < .5


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
