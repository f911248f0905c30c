"""The engine against forward passes written from scratch here, random policies, and torch.export."""
import json, random, subprocess, sys

import pytest
import torch

from vitprune_nb.engine.slim import SlimViT, check_policy
from vitprune_nb.engine.policy import ClsAttention, NormScore, Policy, RandomScore, Step
from vitprune_nb.vit.model import create_vit

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
from vitprune_nb.engine.policy import SCORERS, _step_from_dict
assert "vitprune_nb.methods.{module}" not in sys.modules
try: _step_from_dict(dict(at="before", fate="remove", count=3, score=dict(kind="{module}")))
except TypeError: pass      # a scorer that needs its width
print(SCORERS["{module}"].__module__)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f'vitprune_nb.methods.{module}'
