"""The engine against forward passes written from scratch here, random policies, and torch.export."""
import dataclasses, itertools, json, random, subprocess, sys

import pytest
import torch

from vitprune_nb.engine.fates import Fate
from vitprune_nb.engine.modes import MODES
from vitprune_nb.engine.policy import POINTS, ClsAttention, GivenCounts, NormScore, Policy, RandomScore, Scorer, Step
from vitprune_nb.engine.slim import BACKBONES, SlimViT, TimmViT, check_policy
from vitprune_nb.engine.store import save_pruned
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.life import LifeLeft, life_plan
from vitprune_nb.vit.cost import block_macs, model_macs
from vitprune_nb.vit.model import capture, create_vit

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
P, L = 16, 4


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_vit('deit_tiny_patch16_224', **SMALL)


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def embed(m, x): return m.norm_pre(m._pos_embed(m.patch_embed(x)))


def attention_of_rows(attn, x, rows):
    """Attention output of some rows, head by head, with a softmax written out."""
    B, N, D = x.shape
    d = D//attn.num_heads
    q, k, v = (attn.qkv(x)[..., i*D:(i + 1)*D] for i in range(3))
    outs = []
    for h in range(attn.num_heads):
        s = slice(h*d, (h + 1)*d)
        e = torch.exp(q[:, rows, s] @ k[..., s].transpose(1, 2)/d**.5)
        outs.append(e/e.sum(-1, keepdim=True) @ v[..., s])
    return attn.proj(torch.cat(outs, -1))


@torch.no_grad()
def test_removal_is_slicing_between_timm_blocks(model, images):
    keep = {1: (0, 3, 5, 8, 11, 15), 3: (3, 8)}
    x, left = embed(model, images), list(range(P + 1))
    for i, block in enumerate(model.blocks):
        if i in keep:
            want = [0] + [p + 1 for p in keep[i]]
            x, left = x[:, [left.index(t) for t in want]], want
        x = block(x)
    slim = SlimViT(model, Policy({i: Step(keep=k) for i, k in keep.items()}))
    assert torch.allclose(slim(images), model.head(model.norm(x)[:, 0]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('fate', ['idle', 'remove'])
def test_queries_only_by_hand(model, images, fate):
    """Patch slimming's equation 2: only kept rows are updated; keys and values come from all tokens of the block."""
    keep = {1: (0, 3, 5, 8), 2: (3, 8)}
    x = embed(model, images)
    for i, b in enumerate(model.blocks):
        rows = [0] + [p + 1 for p in keep.get(i, range(P))] if fate == 'idle' or i in keep else list(range(x.shape[1]))
        if fate == 'remove' and i == 2: rows = [0, 2, 4]           # patches 3 and 8 among (CLS, 0, 3, 5, 8)
        y = x.clone()
        y[:, rows] = x[:, rows] + attention_of_rows(b.attn, b.norm1(x), rows)
        y[:, rows] = y[:, rows] + b.mlp(b.norm2(y[:, rows]))
        x = y[:, rows] if fate == 'remove' and i in keep else y
    slim = SlimViT(model, Policy({i: Step('queries', fate, keep=k) for i, k in keep.items()}))
    assert torch.allclose(slim(images), model.head(model.norm(x)[:, 0]), atol=1e-5)


@torch.no_grad()
def test_last_block_cls_only_changes_no_logit(model, images):
    slim = SlimViT(model, Policy({L - 1: Step('queries', keep=())}))
    assert torch.allclose(slim(images), model(images), atol=1e-5)


def random_policy(seed):
    r = random.Random(seed)
    steps, k, fate = {}, P, r.choice(['remove', 'idle', 'fuse', 'merge', 'halt'])
    for i in range(L):
        if r.random() < .4: continue
        at = r.choice(['before', 'queries', 'middle'])
        score = r.choice([NormScore(), RandomScore(seed)] + ([ClsAttention()] if at == 'middle' else []))
        k = r.randint(1, k)
        steps[i] = Step(at, fate, score=score, **(dict(count=k) if r.random() < .6 else dict(threshold=r.uniform(.1, .7))))
    return Policy(steps, f'random {seed} {fate}')


@pytest.mark.parametrize('seed', range(25))
def test_random_policies_agree_in_all_modes(model, images, seed):
    check_policy(model, random_policy(seed), images)


def test_gradients_flow_through_mask_and_gather(model, images):
    for mode in ('mask', 'gather'):
        slim = SlimViT(model, Policy({1: Step(keep=(1, 4, 9))}), mode).train()
        slim(images).sum().backward()
        g = model.blocks[3].mlp.fc1.weight.grad
        assert g is not None and torch.isfinite(g).all() and g.abs().sum() > 0
        model.zero_grad(); model.eval()


@torch.no_grad()
def test_static_gather_exports(model, images):
    slim = SlimViT(model, Policy({1: Step(keep=(1, 4, 9)), 3: Step('queries', keep=())})).eval()
    exported = torch.export.export(slim, (images,)).module()
    assert torch.allclose(exported(images), slim(images), atol=1e-5)


def test_engine_offers_the_names_of_policy_and_attention():
    from vitprune_nb.engine import attention
    from vitprune_nb.engine import slim as engine
    from vitprune_nb.engine import modes
    from vitprune_nb.engine import policy
    for module in (policy, attention): assert all(getattr(engine, n) is getattr(module, n) for n in module.__all__ if hasattr(engine, n))
    assert {'Step', 'Policy', 'Tokens', 'Scorer', 'register_scorer', 'SCORERS', 'select', 'parse_schedule', 'schedule_policy', 'pyramid',
            'attend', 'fuse_tokens', 'merge_tokens', 'attn_branch', 'mlp_branch', 'Trace'} <= set(dir(engine))
    assert engine.Trace is modes.Trace


def test_policy_written_by_the_first_version_loads():
    saved = {'name': 'old', 'steps': {'1': {'at': 'before', 'fate': 'remove', 'count': 6, 'score': {'kind': 'random', 'seed': 2, 'size': 4096}},
                                      '2': {'at': 'middle', 'fate': 'fuse', 'threshold': 0.5, 'score': {'kind': 'cls_attention'}},
                                      '3': {'at': 'queries', 'fate': 'remove', 'keep': []}}}
    policy = Policy.from_dict(saved)
    assert isinstance(policy.steps[1].score, RandomScore) and isinstance(policy.steps[2].score, ClsAttention)
    assert json.loads(json.dumps(policy.to_dict())) == saved


def test_only_cls_may_be_static_after_a_per_image_step(model, images):
    check_policy(model, Policy({1: Step(score=NormScore(), count=6), 3: Step('queries', keep=())}, 'static end'), images)


@pytest.mark.parametrize('module', ['life', 'cosine'])
def test_a_saved_policy_finds_the_methods_of_the_course(module):
    "In a process that has not imported the method's module."
    code = f'''import sys
from vitprune_nb.engine.policy import SCORERS, Step
assert "vitprune_nb.methods.{module}" not in sys.modules
try: Step.from_dict(dict(at="before", fate="remove", count=3, score=dict(kind="{module}")))
except TypeError: pass      # a scorer that needs its width
print(SCORERS["{module}"].__module__)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f'vitprune_nb.methods.{module}'


# --- every fate, place and mode on every kind of timm ViT

KINDS = {'DeiT': ('deit_tiny_patch16_224', {}), 'distilled': ('deit_tiny_distilled_patch16_224', {}),
         'registers': ('vit_tiny_patch16_224', dict(reg_tokens=3)), 'LayerScale': ('vit_tiny_patch16_224', dict(init_values=.1)),
         'q/k norm, no bias': ('vit_tiny_patch16_224', dict(qk_norm=True, qkv_bias=False)),
         'average': ('vit_tiny_patch16_224', dict(global_pool='avg')),
         'no class token': ('vit_tiny_patch16_224', dict(global_pool='avg', class_token=False)),
         'norm before': ('vit_tiny_patch16_224', dict(pre_norm=True)),
         'DINOv2': ('vit_small_patch14_reg4_dinov2', dict(init_values=.1))}
BUDGETS = {'static': lambda k: dict(keep=tuple(range(0, 2*k, 2))), 'count': lambda k: dict(score=NormScore(), count=k),
           'threshold': lambda k: dict(score=RandomScore(1), threshold=1 - k/16)}


def kind(name):
    torch.manual_seed(3)
    model, kwargs = KINDS[name]
    return create_vit(model, **SMALL, **kwargs)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('at', POINTS)
@pytest.mark.parametrize('fate', ['remove', 'idle', 'fuse', 'merge', 'halt'])
def test_every_fate_and_place_in_all_modes(name, at, fate, images):
    net = kind(name)
    for what, budget in BUDGETS.items():
        check_policy(net, Policy({1: Step(at, fate, **budget(8)), 2: Step(at, fate, **budget(4))}, f'{what} {at} {fate}'), images)


@pytest.mark.parametrize('name', ['DeiT', 'registers', 'average'])
@pytest.mark.parametrize('second', [*itertools.product(['queries', 'middle'], ['remove', 'idle', 'fuse', 'merge'])], ids='-'.join)
@pytest.mark.parametrize('first', ['remove', 'fuse', 'merge'])
def test_two_steps_of_a_block_in_all_modes(name, first, second, images):
    net = kind(name)
    for what, budget in BUDGETS.items():
        both = Step('before', first, **budget(8)), Step(*second, **budget(4))
        check_policy(net, Policy({1: both[::-1], 3: Step(*second, **({'keep': (0,)} if what == 'static' else budget(2)))}, what), images)


@torch.no_grad()
def test_two_steps_of_a_block_are_one_after_the_other(model, images):
    "Before block 2 six patches are left, and in it only CLS asks: slicing, then a row of attention."
    x = embed(model, images)
    x = model.blocks[0](x)[:, [0, 1, 4, 6, 9, 12, 16]]
    b = model.blocks[1]
    x = x[:, :1] + attention_of_rows(b.attn, b.norm1(x), [0])
    x = x + b.mlp(b.norm2(x))
    for block in model.blocks[2:]: x = block(x)
    steps = Step('queries', keep=()), Step(keep=(0, 3, 5, 8, 11, 15))
    for mode in MODES: torch.testing.assert_close(SlimViT(model, Policy({1: steps}), mode)(images), model.head(model.norm(x)[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize('steps, said', [
    ((Step('queries', keep=()), Step('middle', keep=())), 'queries remove, middle remove in block index 1'),
    ((Step(keep=(1, 2)), Step(keep=(1,))), 'before remove, before remove in block index 1'),
    ((Step(fate='idle', keep=(1, 2)), Step('queries', keep=(1,))), 'before idle, queries remove in block index 1'),
    ((), 'no Step in block index 1'),
    ((Step(keep=()), 3), 'Step')])
def test_steps_that_do_not_fit_together_are_refused(steps, said):
    with pytest.raises(VitpruneError, match=said): Policy({1: steps})


def test_a_block_with_several_steps_is_saved_as_a_list():
    policy = Policy({0: Step(keep=(0, 1, 2)), 1: (Step('queries', keep=()), Step(score=RandomScore(3), count=1))})
    saved = json.loads(json.dumps(policy.to_dict()))
    assert isinstance(saved['steps']['0'], dict) and [s['at'] for s in saved['steps']['1']] == ['before', 'queries']
    assert json.loads(json.dumps(Policy.from_dict(saved).to_dict())) == saved


# --- views

class Sees(Scorer):
    "Scores that are one of the views; what it saw is kept."
    def __init__(self, needs): super().__init__(); self.needs, self.saw = needs, []
    def forward(self, t):
        self.saw.append(t)
        if t.cls_row is not None: return t.cls_row.mean(1)
        if t.column_sums is not None: return t.column_sums
        return (t.keys if t.values is None else t.values).norm(dim=-1).mean(1)


def first_images(t, n):
    "Views of the first image at the places of its tokens: {view: (n, …)}."
    there = t.present[0] if t.present is not None else torch.ones_like(t.pos[0], dtype=torch.bool)
    views = dict(cls_row=t.cls_row[0].mT, keys=t.keys[0].transpose(0, 1), values=t.values[0].transpose(0, 1), column_sums=t.column_sums[0])
    some = there & (t.pos[0] >= 0)
    return {k: v.new_zeros(n, *v.shape[1:]).index_put((t.pos[0][some],), v[some]) for k, v in views.items()}


@torch.no_grad()
@pytest.mark.parametrize('name', ['DeiT', 'registers', 'q/k norm, no bias'])
@pytest.mark.parametrize('at', POINTS)
@pytest.mark.parametrize('early', ['remove', 'idle', 'fuse', 'merge'])
@pytest.mark.parametrize('where', POINTS)
def test_views_are_the_same_in_all_modes(name, at, early, where, images):
    "Static steps leave sizes and holes behind; then a scorer looks."
    net, seen = kind(name), {}
    n = net.num_prefix_tokens + P
    for mode in MODES:
        score = Sees(('cls_row', 'keys', 'values', 'column_sums'))
        SlimViT(net, Policy({1: Step(at, early, keep=(1, 4, 9, 12, 14)), 2: Step(where, score=score, count=2)}), mode).eval()(images)
        seen[mode] = first_images(score.saw[0], n)
    for mode in ('gather', 'packed'):
        for view, want in seen['mask'].items(): torch.testing.assert_close(seen[mode][view], want, atol=1e-5, rtol=1e-4, msg=f'{mode}: {view}')


@torch.no_grad()
@pytest.mark.parametrize('at', ['before', 'middle'])
def test_views_of_a_dense_block_are_those_of_its_map(model, images, at):
    with capture(model) as cap: model(images)
    rows = cap.attention[1]                                    # of block index 1, which a step before block index 2 sees, too
    for mode in MODES:
        score = Sees(('cls_row', 'column_sums'))
        SlimViT(model, Policy({1 if at == 'middle' else 2: Step(at, score=score, count=2)}), mode).eval()(images)
        torch.testing.assert_close(score.saw[0].cls_row, rows[:, :, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(score.saw[0].column_sums, rows.mean(1).sum(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_column_sums_count_each_query_as_much_as_it_is_kept(model, images):
    "After a soft decision; at 0 and 1 they are those of the hard choice."
    class Soft(Scorer):
        def forward(self, t): return kept
        def soft_keep(self, t, scores): return kept
    def sums(training, count):
        score = Sees('column_sums')
        slim = SlimViT(model, Policy({0: Step(score=Soft(), count=count), 1: Step('middle', score=score, count=2)}), 'mask')
        slim.train(training)(images)
        return score.saw[0].column_sums
    kept = torch.rand(3, P + 1, generator=torch.Generator().manual_seed(2))
    kept[:, 0] = 1
    x, own = embed(model, images), torch.eye(P + 1, dtype=torch.bool)
    for block in model.blocks[:2]:
        a = block.attn
        q, k, v = a.qkv(block.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        e = (q @ k.mT*a.scale).exp()*torch.where(own, 1., kept[:, None, None])
        rows = e/e.sum(-1, keepdim=True)
        want = torch.einsum('bhij,bi->bj', rows, kept)/a.num_heads
        x = x + a.proj((rows @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(sums(True, P), want, atol=1e-5, rtol=1e-4)
    kept = (kept > .5).float()
    kept[:, 0], kept[:, 1:], n = 1, (kept[:, 1:].argsort(1).argsort(1) >= P - 9).float(), 9
    there = kept.bool()
    torch.testing.assert_close(sums(True, P)[there], sums(False, n)[there], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('needs', ['cls_row', ('keys',), 'values', ('column_sums', 'keys')])
@pytest.mark.parametrize('at', POINTS)
def test_policies_with_views_agree(model, images, at, needs):
    check_policy(model, Policy({1: Step(at, 'fuse', score=Sees(needs), count=9), 2: Step(at, 'merge', score=Sees(needs), count=5), 3: Step(at, score=Sees(needs), count=2)}), images)
    score = Sees(needs)
    with torch.no_grad(): SlimViT(model, Policy({1: Step(at, score=score, count=9)}), 'mask')(images)
    cut = score(score.saw[0])[:, 1:].median().item()
    check_policy(model, Policy({1: Step(at, score=Sees(needs), threshold=cut), 3: Step(at, 'idle', score=Sees(needs), threshold=cut)}), images)


@torch.no_grad()
@pytest.mark.parametrize('at', POINTS)
def test_a_scorer_is_handed_the_block_that_it_decides_for(model, images, at):
    for mode in MODES:
        score = Sees('keys')
        steps = {1: Step(at, 'idle', score=score, count=9), 2: Step(at, 'fuse' if at != 'queries' else 'remove', score=score, count=5), 3: Step(at, score=score, count=2)}
        SlimViT(model, Policy(steps), mode).eval()(images)
        assert [t.block for t in score.saw] == [1, 2, 3] and all(t.layer is model.blocks[t.block] for t in score.saw), mode


def test_views_that_cannot_be_had_are_refused(model):
    with pytest.raises(VitpruneError, match="'middle' for the scorer Sees"): SlimViT(model, Policy({0: Step(score=Sees('keys'), count=3)}))
    with pytest.raises(VitpruneError, match='needs: got .*rows'): SlimViT(model, Policy({1: Step(score=Sees(('rows',)), count=3)}))
    with pytest.raises(VitpruneError, match='without a class token'): SlimViT(kind('no class token'), Policy({1: Step(score=ClsAttention(), count=3)}))


# --- soft decisions

class SoftGate(Scorer):
    "A linear score whose sigmoid is how much is kept."
    def __init__(self, seed=0):
        super().__init__()
        self.fc, self.saw = torch.nn.Linear(48, 1), []
        torch.nn.init.normal_(self.fc.weight, generator=torch.Generator().manual_seed(seed))
    def forward(self, t): self.saw.append(t.kept); return self.fc(t.x)[..., 0]
    def soft_keep(self, t, scores): return scores.sigmoid()


def soft_by_hand(net, x, gates):
    "Explicit N × N matrices, head by head: e^l * G, G 1 on the diagonal; a gate before a block multiplies what is kept."
    x, p = embed(net, x), net.num_prefix_tokens
    B, N, D = x.shape
    kept = torch.ones(B, N)
    for i, b in enumerate(net.blocks):
        if i in gates:
            g = gates[i].fc(x)[..., 0].sigmoid()
            kept = kept*torch.cat([torch.ones(B, p), g[:, p:]], 1)
        G = kept[:, None, :].expand(B, N, N)*(1 - torch.eye(N)) + torch.eye(N)
        y, d = b.norm1(x), D//b.attn.num_heads
        q, k, v = b.attn.qkv(y).split(D, -1)
        heads = []
        for h in range(b.attn.num_heads):
            s = slice(h*d, (h + 1)*d)
            e = torch.exp(q[..., s] @ k[..., s].mT/d**.5)*G
            heads.append(e/e.sum(-1, keepdim=True) @ v[..., s])
        x = x + b.ls1(b.attn.proj(torch.cat(heads, -1)))
        x = x + b.ls2(b.mlp(b.norm2(x)))
    x = net.norm(x)
    if net.global_pool == 'token': return net.head(x[:, 0]), kept
    w = kept[:, p:, None]
    return net.head(net.fc_norm((x[:, p:]*w).sum(1)/w.sum(1))), kept


@pytest.mark.parametrize('name', ['DeiT', 'registers', 'average', 'LayerScale'])
def test_soft_decisions_by_hand_with_gradients(name, images):
    net, gates = kind(name).train(), {1: SoftGate(1), 3: SoftGate(2)}
    slim, record = SlimViT(net, Policy({i: Step(score=g, count=9 - 2*i) for i, g in gates.items()}), 'mask').train(), []
    out = slim(images, record)
    want, kept = soft_by_hand(net, images, gates)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    assert gates[1].saw[0] is None and gates[3].saw[0].shape == kept.shape and (gates[3].saw[0][:, :net.num_prefix_tokens] == 1).all()
    torch.testing.assert_close(record[1].keep, record[1].scores.sigmoid())
    asked = [gates[1].fc.weight, gates[3].fc.weight, net.blocks[0].attn.qkv.weight]
    ours, theirs = (torch.autograd.grad(o.square().sum(), asked, retain_graph=True) for o in (out, want))
    for a, b in zip(ours, theirs): assert a.abs().max() > 0; torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert slim.untaught() == [] and slim.set_mode('gather').untaught() != []


def test_soft_in_training_is_hard_in_eval(model, images):
    gates = {1: SoftGate(1), 2: SoftGate(2)}
    policy = Policy({i: Step(score=g, count=9 - 2*i) for i, g in gates.items()})
    check_policy(model, policy, images)
    record = []
    with torch.no_grad(): SlimViT(model, policy, 'mask').eval()(images, record)
    assert [d.keep.sum(1).tolist() for d in record] == [[8]*3, [6]*3]


@pytest.mark.parametrize('step', [Step('queries', score=SoftGate(), count=3), Step(fate='idle', score=SoftGate(), count=3)])
def test_soft_decisions_where_nobody_leaves_are_refused(model, images, step):
    with pytest.raises(VitpruneError, match='soft decision'): SlimViT(model, Policy({1: step}), 'mask').train()(images)
    model.eval()


# --- decisions on record

@torch.no_grad()
@pytest.mark.parametrize('fate', ['remove', 'idle', 'fuse', 'merge', 'halt'])
def test_the_record_is_the_same_in_all_modes(model, images, fate):
    policy = Policy({0: Step('middle', fate, keep=(0, 2, 3, 6, 7, 9, 11, 12)), 1: (Step(score=NormScore(), count=7), Step('middle', fate, score=ClsAttention(), count=5)),
                     3: Step('queries', score=RandomScore(2), count=2)})
    found = {}
    for mode in MODES:
        record = []
        out = SlimViT(model, policy, mode).eval()(images, record)
        assert torch.equal(out, SlimViT(model, policy, mode).eval()(images))
        assert [(d.block, d.at) for d in record] == [(0, 'middle'), (1, 'before'), (1, 'middle'), (3, 'queries')]
        assert [d.scores is None for d in record] == [True, False, False, False]
        found[mode] = [[sorted(d.pos[b][d.keep[b]].tolist()) for b in range(3)] for d in record]
        features = []
        SlimViT(model, policy, mode).eval().forward_features(images, features)
        assert len(features) == 4
    assert found['mask'] == found['gather'] == found['packed']


# --- one order for several steps

def lives(model): plan = life_plan(model, .6, (1, 2, 3)); return plan.policy(plan.score(48, seed=3))


class Alone(LifeLeft):
    "The same scores without the promise: each step sorts anew."
    follows = None


@torch.no_grad()
@pytest.mark.parametrize('name', ['DeiT', 'registers', 'distilled'])
def test_one_sort_serves_all_later_steps(name, images, monkeypatch):
    net, sorts = kind(name), []
    once = lives(net)
    anew = Policy({i: dataclasses.replace(s, score=Alone()) if isinstance(s.score, LifeLeft) else s for i, s in once.steps.items()})
    real = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, 'argsort', lambda *a, **kw: sorts.append(1) or real(*a, **kw))
    slims = {mode: SlimViT(net, once, mode).eval() for mode in MODES} | {'anew': SlimViT(net, anew, 'gather').eval()}
    want = slims['mask'](images)
    for slim in slims.values(): torch.testing.assert_close(slim(images), want, atol=1e-5, rtol=0)
    sorts.clear(); slims['gather'](images)
    assert len(sorts) == 1
    for slim in slims.values(): assert torch.equal(slim.kept(images), slims['mask'].kept(images)) and slim.trace(images).counts == slims['mask'].trace(images).counts
    record, theirs = [], []
    slims['gather'](images, record), slims['mask'](images, theirs)
    for a, b in zip(record, theirs, strict=True): assert [sorted(p[k].tolist()) for p, k in zip(a.pos, a.keep)] == [sorted(p[k].tolist()) for p, k in zip(b.pos, b.keep)]
    torch.testing.assert_close(record[-1].scores.sort(1).values, theirs[-1].scores[theirs[-1].present].view(len(images), -1).sort(1).values)


@torch.no_grad()
def test_one_sort_is_exported(model, images):
    slim = SlimViT(model, lives(model)).eval()
    program = torch.export.export(slim, (images,))
    assert sum('sort' in str(n.target) for n in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(images), slim(images), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize('between', [Step('middle', 'fuse', score=NormScore(), count=5), Step('middle', 'merge', score=NormScore(), count=5),
                                     Step('middle', 'idle', score=NormScore(), count=2), Step('middle', score=NormScore(), count=5)])
def test_other_steps_between_those_of_one_order(model, images, between):
    steps = lives(model).steps
    check_policy(model, Policy({1: (steps[1], between), 2: dataclasses.replace(steps[2], count=4), 3: (dataclasses.replace(steps[3], count=3), Step('queries', keep=()))}), images)


# --- backbones

def test_another_backbone_needs_only_an_adapter(model, images, tmp_path):
    "A network whose tokens come and are read in another way, in its own words."
    class Other(torch.nn.Module):
        def __init__(self, vit): super().__init__(); self.inner, self.out = vit, torch.nn.Linear(48, 7)
    class OfOther(TimmViT):
        blocks, n_prefix = property(lambda self: self.model.inner.blocks), 1
        has_cls, averages, drops_patches, channels = True, False, False, 3
        @staticmethod
        def check(model): assert isinstance(model, Other)
        def grid(self, images=None): return (4, 4)
        def embed(self, images): return embed(self.model.inner, images)
        def norm(self, x): return x
        def readout(self, x, present=None, pre_logits=False): return self.model.out(x[:, 0])
    BACKBONES[Other] = OfOther
    try:
        other, policy = Other(model).eval(), Policy({1: Step(score=NormScore(), count=6), 2: Step('middle', 'fuse', score=ClsAttention(), count=3)})
        with torch.no_grad():
            a, b, c = (SlimViT(other, policy, mode)(images) for mode in MODES)
            torch.testing.assert_close(SlimViT(other)(images), other.out(model.blocks(embed(model, images))[:, 0]))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0); torch.testing.assert_close(a, c, atol=1e-5, rtol=0)
        assert a.shape == (3, 7)
        with pytest.raises(VitpruneError, match='model: got Other; allowed: a timm VisionTransformer'): save_pruned(SlimViT(other, policy), tmp_path/'m')
        assert not (tmp_path/'m').exists()
    finally: del BACKBONES[Other]


def test_the_stem_costs_what_is_left_when_the_blocks_are_taken_off(model):
    assert TimmViT(model).stem_macs() == model_macs(model) - sum(block_macs(*[P + 1]*3, 48, 192) for _ in range(L))


@pytest.mark.parametrize('kind', ['a plan', 'lives', 'no policy'])
def test_torch_compile_sees_one_graph(kind):
    from vitprune_nb.engine.plan import ramp_plan
    from vitprune_nb.methods.life import life_plan
    net = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    lives = life_plan(net, .6, (1, 2))
    slim = {'a plan': lambda: ramp_plan(net, .4).slim(net), 'lives': lambda: SlimViT(net, lives.policy(lives.score(48))),
            'no policy': lambda: SlimViT(net)}[kind]().eval()
    with torch.inference_mode(): found = torch._dynamo.explain(slim)(torch.randn(2, 3, 32, 32))
    torch._dynamo.reset()
    assert (found.graph_count, found.graph_break_count) == (1, 0), [str(b.reason)[:200] for b in found.break_reasons]


def test_an_average_of_nobody_is_finite():
    "Soft decisions may drop all patches of an image of a model that reads their mean."
    class KeepsNone(NormScore):
        def soft_keep(self, t, scores): return scores*0.
    net = create_vit('vit_small_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=10,
                     class_token=False, global_pool='avg')
    slim = SlimViT(net, Policy({1: Step(score=KeepsNone(), count=4)}), 'mask').train()
    logits = slim(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    assert torch.isfinite(logits).all() and all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('freezes', [False, True])
def test_a_fate_has_the_last_word_before_the_head_reads(model, images, mode, freezes):
    seen = []

    class Turned(Fate):
        "Once, after the last block, the sign of CLS is turned."
        ends, kind = True, 'turned'
        def __init__(self): self.freezes = self.acts = freezes
        def meet(self, s, keep, drop, scores): s.freeze(drop)
        def end(self, s):
            seen.append((s.x.shape, len(s.memory)))
            s.x = torch.cat([-s.x[:, :1], s.x[:, 1:]], 1)

    class Notes(NormScore):
        def forward(self, t):
            t.memory[t.block] = True
            return super().forward(t)

    def run(fate): return SlimViT(model, Policy({i: Step(fate=fate(), score=score, count=9 - i) for i in (1, 2, 3)}), mode).eval()
    score = Notes()
    with torch.no_grad():
        plain = run(lambda: 'remove')
        s = plain._stream(images)
        want = model.head(model.norm(-s.x[:, 0]))
        got = run(Turned)(images)
        gone = SlimViT(model, Policy({1: Step(fate=Turned(), score=score, count=P)}), mode).eval()(images)      # none is
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(got, plain(images), atol=1e-3)
    assert seen[0] == ((3, P + 1 if freezes or mode == 'mask' else 7, 48), 3)
    assert seen[1] == ((3, P + 1, 48), 1) and torch.isfinite(gone).all()


@torch.no_grad()
@pytest.mark.parametrize('fused', [True, False])
def test_a_scale_changed_by_hand_counts_where_timm_reads_it(images, fused):
    "timm's fused kernel does not look at attn.scale, its written-out attention does; keep everything is the plain model."
    torch.manual_seed(0)
    net = create_vit('deit_tiny_patch16_224', **SMALL)
    plain = net(images)
    for block in net.blocks: block.attn.fused_attn, block.attn.scale = fused, 9.
    assert torch.allclose(net(images), plain, atol=1e-5) == fused
    rules = dict(dense=Policy({}), cls=Policy({1: Step('middle', score=ClsAttention(), count=P)}),
                 ragged=Policy({1: Step('middle', score=ClsAttention(), threshold=-1.)}))
    for name, policy in rules.items():
        for mode in ('mask', 'packed') if policy.ragged else ('mask', 'gather', 'packed'):
            assert torch.allclose(SlimViT(net, policy, mode)(images), net(images), atol=1e-5), (name, mode)


@pytest.mark.parametrize('seed', range(4))
def test_given_counts_are_kept_in_every_block_and_in_any_batch(model, images, seed):
    counts = {1: (15, 9, 4), 2: (7, 6, 3), 3: (2, 5, 0)}
    def slim(rows):
        return SlimViT(model, Policy({i: Step(score=GivenCounts([c[b] for b in rows], seed), threshold=0.) for i, c in counts.items()}), 'packed').eval()
    kept = slim(range(3)).kept(images)
    assert kept.sum(-1).tolist() == [[16, *c] for c in zip(*counts.values(), strict=True)]
    for b in range(3): assert torch.equal(slim([b]).kept(images[b:b + 1])[0], kept[b])
    assert (kept[:, 1:] <= kept[:, :-1]).all(), 'one order for all blocks'
