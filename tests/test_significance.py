"""Patch significance: the repaired bound on random networks, any ViT against the oracle, properties, and what is refused."""
import json, math, re

import pytest, torch
from conftest import ROOT
from vitprune_nb.data import calibration, data_config, embedded, eval_transform
from vitprune_nb.errors import VitpruneError
from vitprune_nb.evidence.measure import peak_memory
from vitprune_nb.methods import significance as sig
from vitprune_nb.papers import bound as judge
from vitprune_nb.vit.model import capture, course_model, create_vit

pytestmark = pytest.mark.usefixtures('one_thread')


# the bound

def slow_network(Z, attn, weights, masks, O, shortcut):
    "Tokens after the last block, one token, head and channel at a time; a dropped one stays as it is, or is O(0) without a shortcut."
    z = Z.tolist()
    for P, W, m in zip(attn, weights, masks):
        heads, tokens, channels = range(len(P)), range(len(z)), range(len(z[0]))
        new = []
        for i in tokens:
            x = [0. if not m[i] else sum(P[h][i][j]*z[j][a]*W[h][a][b] for h in heads for j in tokens for a in channels)
                 for b in channels]
            new.append(z[i] if shortcut and not m[i] else [v + shortcut*s for v, s in zip(O(x), z[i])])
        z = new
    return torch.tensor(z, dtype=torch.float64)


def bound_case(seed):
    "(error, bound, equation 9) of CLS for one random network."
    g = torch.Generator().manual_seed(seed)
    def draw(*s): return torch.randn(*s, generator=g, dtype=torch.float64)
    L, H, N, d = (int(torch.randint(*r, (), generator=g)) for r in ((2, 5), (1, 4), (3, 6), (2, 4)))
    attn, W, Z = draw(L, H, N, N).mul(2).softmax(-1), draw(L, H, d, d), draw(N, d)
    A, B, b = draw(d, d), draw(d, d), draw(d)
    masks = (torch.rand(N, generator=g) < torch.linspace(.8, .2, L)[:, None]).double()
    masks[:, 0], masks[-1, 1:], t, shortcut = 1, 0, int(torch.randint(L - 1, (), generator=g)), seed % 2
    masks[t:, -1] = 0                                                      # one patch at least is dropped in block t
    def longest(x): return [math.hypot(*x)] + [0.]*(d - 1)
    def mlp(x): return ((A.new_tensor(x) @ A + b).relu() @ B).tolist()     # mlp(0) is not 0
    O, C = longest, 1.
    if seed % 4 > 1: O, C = mlp, float(torch.linalg.matrix_norm(A, 2)*torch.linalg.matrix_norm(B, 2))
    full, some = torch.ones(L, N), masks.clone()
    full[t + 1:], some[:t] = masks[t + 1:], 1        # blocks before t are dense, those after it pruned in both
    def run(masks, upto=L): return slow_network(Z, *(v[:upto].tolist() for v in (attn, W, masks)), O, shortcut)
    gains, lost = torch.linalg.matrix_norm(W, 2), (run(some, t + 1) - run(full, t + 1)).norm(dim=1)
    assert lost[masks[t] > 0].max() == 0
    printed = torch.tensor(math.nan)
    if not shortcut:
        M, Zt = C*torch.einsum('lh,lhij->lij', gains, attn), run(full, t)
        assert (lost <= M[t] @ Zt.norm(dim=1) + 1e-9).all()                # u <= M n, too
        x = (1 - masks[t])[:, None]*(M[t] @ Zt.abs())                      # equation 9, channel by channel
        for l in range(t + 1, L): x = masks[l][:, None]*(M[l] @ x)
        printed = x[0].norm()
    after = (v[t + 1:] for v in (attn, gains, masks))
    return (run(some) - run(full))[0].norm(), sig.error_bound(*after, lost, C, float(shortcut))[0], printed


@pytest.fixture(scope='module')
def cases():
    out = torch.tensor([bound_case(seed) for seed in range(60)])
    return out[out[:, 0] > 0].T


def test_the_repaired_bound_is_never_below_the_error(cases):
    error, bound, _ = cases
    assert len(error) >= 30 and (error <= bound*(1 + 1e-9)).all() and (error > .9*bound).any()


def test_the_lesson_says_what_the_networks_say(cases):
    error, bound, printed = cases
    path, = (ROOT/'nbs').rglob('3_methods/10_significance.ipynb')
    said, = (''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['id'] == 'fa010013')
    assert re.search(r'Of the (\d+) networks with an error', said)[1] == str(len(error))
    assert re.search(r'median error is ([\d.]+) of the bound', said)[1] == f'{(error/bound).median():.2f}'
    assert re.search(r'in none of (\d+) either', said)[1] == str((~printed.isnan()).sum().item()) and not (printed < error).any()


def test_the_oracle_is_the_network_of_equation_5():
    "Identity, heads without weights, no shortcut: two blocks by matrices."
    g = torch.Generator().manual_seed(0)
    P = torch.randn(2, 2, 4, 4, generator=g, dtype=torch.float64).softmax(-1)
    Z, m, eye = torch.rand(4, 3, generator=g, dtype=torch.float64), torch.tensor([[1., 1, 1, 0], [1, 0, 1, 0]]).double(), torch.eye(3).double()
    want = m[1][:, None]*(P[1].sum(0) @ (m[0][:, None]*(P[0].sum(0) @ Z)))
    got = slow_network(Z, P.tolist(), [[eye.tolist()]*2]*2, m.tolist(), lambda x: x, 0)
    torch.testing.assert_close(got, want)


# the scores

def test_sums_over_paths_reach_their_largest_value_and_do_not_pass_it():
    "(H + 1)^L, where all tokens look at CLS alone."
    stare = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    stare[..., 0] = 1
    most = sig.Gram(torch.arange(5) < 1, 1, dtype=torch.float64)
    for _ in range(12): most.step(stare, torch.ones(5).bool())
    assert most.diagonal().sum().item()/3**12 == pytest.approx(1)


def test_a_head_that_averages_reads_a_row_of_equal_weights():
    assert torch.allclose(sig.Gram(torch.full((1, 5), .2), 1).diagonal()[0], torch.full((5,), .04, dtype=torch.float64))
    assert sig.Gram(torch.arange(5) < 1, 7).diagonal().shape == (7, 5)


@pytest.mark.parametrize('channels', [3, 9])     # more tokens than channels, and fewer
def test_the_energy_of_a_token_is_the_squared_length_of_its_values(channels):
    g = torch.Generator().manual_seed(0)
    P, z = torch.rand(1, 2, 5, 5, generator=g), torch.randn(1, 5, channels, generator=g)
    torch.testing.assert_close(sig.value_energy(P, z), (P @ z.abs()[:, None]).square().sum((1, 3)))


SMALL = dict(img_size=32, patch_size=8, depth=3, num_classes=5)
NETS = {'registers, q/k norm, LayerScale': (dict(reg_tokens=4, qk_norm=True, init_values=.1), 'vit_tiny_patch16_224', 1),
        'CLS and DIST': ({}, 'deit_tiny_distilled_patch16_224', 2),
        'mean of the patches': (dict(global_pool='avg', class_token=False), 'vit_tiny_patch16_224', 1)}


@pytest.mark.parametrize('name', NETS)
def test_any_vit_agrees_with_the_oracle(name):
    kwargs, timm_name, rows = NETS[name]
    torch.manual_seed(0)
    net, pixels = create_vit(timm_name, **kwargs, **SMALL), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fast, read = sig.batch_scores(net, pixels), sig.readout(net)
    assert len(read) == rows
    with torch.no_grad(), capture(net) as c: net(pixels)
    maps = [P[1] for P in c.attention], [z[1] for z in c.tokens], torch.ones(3, read.shape[1])
    for l in range(3):
        slow = sig.path_scores_brute(*maps, l, shortcut=True, read=read)
        torch.testing.assert_close(fast[1, l]/fast[1, l].max(), slow/slow.max(), rtol=0, atol=1e-5)
    low = sig.batch_scores(net.bfloat16(), pixels)         # maps and tokens in bfloat16, sums in float32
    assert low.dtype == torch.float64 and (low - fast).abs().sum() < .02*fast.sum()


def test_token_0_is_a_patch_like_any_other_without_a_class_token():
    "Masks may drop it, and the scores are the oracle's; where it is CLS, or is read, they may not."
    torch.manual_seed(0)
    net, pixels = create_vit('vit_tiny_patch16_224', global_pool='avg', class_token=False, **SMALL), torch.randn(2, 3, 32, 32)
    masks = torch.ones(3, 16).bool()
    masks[1:, :5], masks[2, 9:] = False, False
    fast, read = sig.batch_scores(net, pixels, masks=masks), sig.readout(net)
    with torch.no_grad(), capture(net) as c: net(pixels)
    for l in range(3):
        slow = sig.path_scores_brute([P[1] for P in c.attention], [z[1] for z in c.tokens], masks, l, shortcut=True, read=read)
        torch.testing.assert_close(fast[1, l]/fast[1, l].max(), slow/slow.max(), rtol=0, atol=1e-5)
    with pytest.raises(VitpruneError, match='one that drops token 0'): sig.gram_scores(c.attention, c.tokens[:-1], masks, read=torch.eye(16)[:1])
    with_cls = create_vit('vit_tiny_patch16_224', global_pool='avg', **SMALL)
    with pytest.raises(VitpruneError, match='one that drops token 0'): sig.batch_scores(with_cls, pixels, masks=torch.arange(17).expand(3, -1) > 0)


@pytest.fixture(scope='module')
def seen():
    model = course_model()
    images = calibration(embedded('train'), 8).but(transform=eval_transform(data_config(model)))
    x = torch.stack([images[i][0] for i in range(8)])
    with torch.no_grad(), sig.capture_once(model) as cap: model(x)
    return model, images, cap


@pytest.mark.parametrize('shortcut', [True, False])
def test_float32_is_enough(seen, shortcut):
    cap = seen[2]
    a = sig.gram_scores(cap.attention, cap.tokens[:-1], None, shortcut)
    b = sig.gram_scores([P.double() for P in cap.attention], [z.double() for z in cap.tokens[:-1]], None, shortcut)
    assert ((a - b).abs()/b.clamp_min(1e-300))[b > 0].max() < 1e-4


def test_the_batch_size_changes_nothing(seen):
    model, images, _ = seen
    a, b = (sig.significance(model, images, batch_size=n) for n in (3, 8))
    assert ((a - b).abs()/b.clamp_min(1e-300))[b > 0].max() < 1e-5


def test_memory_does_not_depend_on_the_number_of_images():
    tiny, images = create_vit('test_vit'), calibration(embedded('train'), 24)
    few, many = (peak_memory(lambda: sig.significance(tiny, images.subset(range(n)), batch_size=4)) for n in (8, 24))
    assert many < 1.1*few


def test_a_permutation_of_the_patches_permutes_the_scores(seen):
    attn, tokens = [P[:2].double() for P in seen[2].attention], [z[:2].double() for z in seen[2].tokens[:-1]]
    perm = torch.cat([torch.zeros(1).long(), torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1])
    shuffled = sig.gram_scores([P[:, :, perm][..., perm] for P in attn], [z[:, perm] for z in tokens])
    torch.testing.assert_close((shuffled/sig.gram_scores(attn, tokens)[:, perm])[:-1], torch.ones(11, 65).double())


def test_a_random_score_is_that_of_its_seed():
    tiny, images = create_vit('test_vit'), calibration(embedded('train'), 1)
    a, b, c = (sig.significance(tiny, images, kind='random', seed=s) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


# what is refused

BY_HAND = dict(attn=[torch.tensor([[[.5, .5], [0, 1]], [[0, 1], [0, 1]]])], gains=[torch.tensor([1., 2.])], masks=[[1, 0]], lost=[0., 3.])
NESTED = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])


def broken():
    torch.manual_seed(0)
    net = create_vit('test_vit')
    net.blocks[1].mlp.fc1.weight.data[0, 0] = math.nan
    return net


def few(n=1): return calibration(embedded('train'), 1).subset(range(n))


@pytest.mark.parametrize('call, said', [
    (lambda: sig.error_bound(**BY_HAND | dict(lost=[0., math.nan])), 'lost: got [0.0, nan]; allowed: lengths (N,)'),
    (lambda: sig.error_bound(**BY_HAND | dict(lost=[0., -1.])), 'lost: got [0.0, -1.0]; allowed: lengths (N,)'),
    (lambda: sig.error_bound(**BY_HAND | dict(masks=[])), 'got 1, 1 and 0 blocks; allowed: equally many of each'),
    (lambda: sig.error_bound(**BY_HAND | dict(masks=[[1]])), 'masks: got 1 tokens; allowed: 2'),
    (lambda: sig.error_bound(**BY_HAND, own=-1.), 'lipschitz, own: got (1.0, -1.0)'),
    (lambda: sig.check_masks(NESTED.flip(0), 3, 3), 'masks: got a token that is dropped and comes back'),
    (lambda: sig.check_masks(1 - NESTED, 3, 3), 'masks: got one that drops token 0'),
    (lambda: sig.check_masks(NESTED, 3, 6), 'allowed: (L, N) = (3, 6)'),
    (lambda: sig.attention_scores([torch.ones(1, 2, 3, 3)/3], 'diag'), "kind: got diag; allowed: 'row', 'column' or 'cls'"),
    (lambda: sig.read_tokens(create_vit('test_vit', global_pool='avg')), "with global_pool='avg'; allowed: a model that reads its CLS token"),
    (lambda: sig.batch_scores(create_vit('test_vit'), torch.zeros(1, 3, 160, 160), 'magic'), 'kind: got magic; allowed: shortcut, exact'),
    (lambda: sig.batch_scores(create_vit('test_vit'), torch.zeros(1, 3, 160, 160), masks=torch.ones(3, 65)), '(L, N) = (6, 101)'),
    (lambda: sig.batch_scores(create_vit('vit_tiny_patch16_224', global_pool='avg', class_token=False, **SMALL), torch.zeros(1, 3, 32, 32), 'cls'),
     'another kind for a model without a CLS token'),
    (lambda: sig.significance(create_vit('test_vit'), few(), kind='best'), 'kind: got best; allowed: shortcut, exact'),
    (lambda: sig.significance(create_vit('test_vit'), few(0)), 'got no images'),
    (lambda: sig.significance(broken(), few()), 'NaN or infinite scores'),
    (lambda: judge.bootstrap_mean(torch.ones(1)), 'at least two values and one draw'),
])
def test_bad_input_is_refused(call, said):
    with pytest.raises(VitpruneError) as e: call()
    assert said in str(e.value)


@pytest.mark.parametrize('t, drop, said', [(12, (3, 65), 't: got 12; allowed: a block index, 0 to 11'), (-1, (3, 65), 't: got -1'),
                                           (3, (3, 64), '(S, N) with N = 65'), (3, (1, 3, 65), '(B, S, N) with B = 8')])
def test_bad_sets_of_patches_are_refused(seen, t, drop, said):
    with pytest.raises(VitpruneError) as e: judge.drop_errors(seen[0], seen[2].tokens, t, torch.zeros(drop, dtype=torch.bool))
    assert said in str(e.value)


def test_the_right_form_wants_the_tokens_after_the_last_block_too(seen):
    model, _, cap = seen
    with pytest.raises(VitpruneError) as e: judge.bound_scores(cap.attention, cap.tokens[:-1], judge.head_gains(model))
    assert 'got 12, 12 and 12; allowed: L maps, L + 1' in str(e.value)
