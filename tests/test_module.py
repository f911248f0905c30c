"""A pruned model used as a module: names of parameters, moving averages, DDP, compilation, dtypes, and every way to look inside."""
import copy, io, pickle

import pytest
import torch
from torch.func import functional_call

from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.significance import capture_once
from vitprune_nb.methods.cosine import CosineScore
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.methods.life import life_plan
from vitprune_nb.engine.modes import MODES
from vitprune_nb.engine.policy import ClsAttention, NormScore, Policy, RandomScore, Step
from vitprune_nb.vit.model import capture, create_vit

P, L, D = 16, 4, 48


def vit(name='vit_tiny_patch16_224', **kw):
    torch.manual_seed(0)
    return create_vit(name, **dict(img_size=32, patch_size=8, embed_dim=D, depth=L, num_heads=3, num_classes=10) | kw)


def policies(model):
    life = life_plan(model, .6, (1, 2))
    return {
        'dense': (None, 'gather'),
        'static': (Policy({1: Step('queries', keep=(1, 4, 6)), 3: Step('queries', keep=())}), 'gather'),
        'life': (life.policy(life.score(D)), 'gather'),
        'soft': (life.policy(life.score(D), 'soft'), 'mask'),
        'cosine': (Policy({i: Step('queries', 'idle', score=CosineScore(D), threshold=.5) for i in range(L)}), 'packed'),
        'ragged': (Policy({1: Step(score=RandomScore(1), threshold=.5), 2: Step('middle', score=RandomScore(2), threshold=.5)}), 'packed'),
        'fused': (Policy({1: Step('middle', 'fuse', score=ClsAttention(), count=6)}), 'gather'),
        'merged': (Policy({2: Step('before', 'merge', score=NormScore(), count=5)}), 'mask'),
        'halted': (Policy({1: Step('before', 'halt', score=RandomScore(), count=6), 2: Step('middle', 'halt', score=RandomScore(), count=3)}), 'packed'),
    }

KINDS = ('dense', 'static', 'life', 'soft', 'cosine', 'ragged', 'fused', 'merged', 'halted')


def slim_of(kind, model=None):
    model = model or vit()
    return SlimViT(model, *policies(model)[kind]).eval()


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def equal(a, b, tol=1e-5): return torch.allclose(a, b, atol=tol)


# --- names

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_parameters_have_the_names_of_the_state_dict(kind, images):
    slim = slim_of(kind)
    named, state = dict(slim.named_parameters()), slim.state_dict()
    assert set(named) <= set(state) and all(torch.equal(state[n], p) for n, p in named.items())
    assert {n for n in named if not n.startswith('scorers.')} == {n for n, _ in slim.model.named_parameters()}
    assert len(named) == len(list(slim.parameters()))
    other = {n: torch.randn_like(p)*.1 for n, p in named.items()}
    assert str(slim.load_state_dict(other)) == '<All keys matched successfully>'
    assert all(torch.equal(p, other[n]) for n, p in slim.named_parameters()), 'every one was loaded'


@torch.no_grad()
@pytest.mark.parametrize('spelling', ['timm', 'with model.', 'inside another module'])
def test_both_spellings_load(spelling, images):
    slim, other = slim_of('life'), slim_of('life', vit(num_classes=10))
    for p in other.parameters(): p.add_(.05*torch.randn_like(p))
    state = other.state_dict()
    if spelling == 'with model.': state = {n if n.startswith('scorers.') else f'model.{n}': v for n, v in state.items()}
    if spelling != 'inside another module': slim.load_state_dict(state)
    else: torch.nn.ModuleDict(dict(net=slim)).load_state_dict(torch.nn.ModuleDict(dict(net=other)).state_dict())
    assert equal(slim(images), other(images), 0)


def test_what_is_missing_is_named_as_in_timm():
    slim = slim_of('static')
    state = slim.state_dict()
    del state['cls_token'], state['blocks.2.mlp.fc1.bias']
    state['nothing'] = torch.zeros(1)
    with pytest.raises(RuntimeError) as e: slim.load_state_dict(state)
    assert '"cls_token", "blocks.2.mlp.fc1.bias"' in str(e.value) and 'Unexpected key(s) in state_dict: "nothing"' in str(e.value)


@pytest.mark.parametrize('kind', KINDS)
def test_functional_call_by_name(kind, images):
    slim = slim_of(kind)
    before = {n: p.detach().clone() for n, p in slim.named_parameters()}
    with torch.no_grad():
        y = slim(images)
        other = {n: p + .01*torch.randn_like(p) for n, p in slim.named_parameters()}
        twin = copy.deepcopy(slim)
        twin.load_state_dict(other)
        for names in (other, {n if n.startswith('scorers.') else f'model.{n}': p for n, p in other.items()}):
            assert equal(functional_call(slim, names, (images,)), twin(images)) and not equal(twin(images), y)
        assert equal(slim(images), y, 0)
    assert all(isinstance(p, torch.nn.Parameter) and torch.equal(p, before[n]) for n, p in slim.named_parameters()), 'nothing of it stays'
    grads = torch.func.grad(lambda p: functional_call(slim, p, (images,)).square().sum())({n: p.detach() for n, p in slim.named_parameters()})
    assert all(grads[n].abs().sum() > 0 for n in ('cls_token', 'pos_embed', 'head.bias', 'blocks.1.attn.qkv.weight'))


@torch.no_grad()
def test_a_distilled_model_and_registers_too(images):
    for model in (vit('deit_tiny_distilled_patch16_224'), vit(reg_tokens=2), vit(global_pool='avg', class_token=False)):
        slim = SlimViT(model, Policy({1: Step(keep=(1, 2, 3))}))
        assert [n for n, _ in slim.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert functional_call(slim, {n: p*0 for n, p in model.state_dict().items()}, (images,)).abs().max() == 0


# --- moving averages and training

@pytest.mark.parametrize('kind', ['static', 'life', 'cosine', 'fused'])
@torch.no_grad()
def test_moving_averages(kind, images):
    from timm.utils import ModelEmaV3
    slim = slim_of(kind)
    averages = dict(timm=ModelEmaV3(slim, decay=.5), torch=torch.optim.swa_utils.AveragedModel(slim, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.5)))
    by_name = {n: v.clone() for n, v in slim.state_dict().items()}
    averages['torch'].update_parameters(slim)
    was = {n: p.clone() for n, p in slim.named_parameters()}
    for p in slim.parameters(): p.add_(.02*torch.randn_like(p))
    averages['timm'].update(slim)
    averages['torch'].update_parameters(slim)
    for n, p in slim.named_parameters(): by_name[n].lerp_(p, .5)
    want = copy.deepcopy(slim)
    for n, p in want.named_parameters(): p.copy_((was[n] + p)/2)
    logits = want(images)
    want.load_state_dict(by_name)
    assert equal(want(images), logits)
    for name, ema in averages.items(): assert equal(ema.module.eval()(images), logits), name


@pytest.mark.parametrize('kind', ['dense', 'static', 'life', 'soft', 'fused', 'merged'])
def test_ddp_trains_whatever_the_policy(kind, images, tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    slim = slim_of(kind).train()
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net = DistributedDataParallel(slim)
        for _ in range(3):                        # the second pass is the one that misses gradients
            net.zero_grad()
            net(images).square().sum().backward()
    finally: dist.destroy_process_group()
    taught = {n for n, p in slim.named_parameters() if p.grad is not None}
    untaught = {id(p) for p in slim.untaught()}
    assert taught == {n for n, p in slim.named_parameters() if id(p) not in untaught}
    assert (kind in ('soft', 'fused') or not any(n.startswith('scorers.') for n in taught)) and (kind != 'soft' or any(n.startswith('scorers.') for n in taught))


def test_scorers_of_a_finished_model_ask_for_no_gradient(tmp_path):
    from vitprune_nb import data
    from vitprune_nb.engine.store import load_pruned, save_pruned
    from vitprune_nb.methods.base import prune
    few = data.load_data(split='train', limit=16)
    model = vit()
    done = prune('life', model, few, keep_rate=.6, predictor_epochs=0, backbone_epochs=0)
    assert len(done.untaught()) > 0
    for slim in (done, load_pruned(save_pruned(done, tmp_path/'m'))):
        assert not any(p.requires_grad for p in slim.scorers.parameters()) and all(p.requires_grad for p in slim.model.parameters())
        slim.train()(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in slim.parameters() if p.requires_grad)


def test_a_shared_scorer_still_learns_in_its_soft_model(images):
    "A hard model made beside the soft one does not take the scorer's gradients away."
    model = vit()
    plan = life_plan(model, .6, (1, 2))
    score = plan.score(D)
    soft, _ = SlimViT(model, plan.policy(score, 'soft'), 'mask').train(), SlimViT(model, plan.policy(score))
    soft(images).square().sum().backward()
    assert all(p.requires_grad for p in score.parameters()) and score.cls.weight.grad.abs().sum() > 0


# --- copies, dtypes, compilation

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_copies_give_the_same_logits(kind, images):
    slim = slim_of(kind)
    y, file = slim(images), io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(images), y)
        assert {id(s.score) for s in twin.policy.steps.values() if s.score is not None} == {id(s) for s in twin.scorers}, 'the policy asks the copies'
        for p in twin.parameters(): p.zero_()
    assert torch.equal(slim(images), y)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_dtypes(kind, dtype, images):
    slim = slim_of(kind)
    y = slim(images)
    out = slim.to(dtype)(images.to(dtype))
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert (out.float() - y).abs().max() < (.5 if dtype != torch.float64 else 1e-4)       # half may choose other patches
    assert torch.equal(slim.double()(images.double()), slim(images.double()))


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_compiled(kind, images):
    slim = slim_of(kind)
    assert equal(torch.compile(slim, backend='eager')(images), slim(images))


# --- a look inside

@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_captured_layers_are_all_there_on_the_full_grid(kind, images):
    slim = slim_of(kind)
    y, mode = slim(images), slim.mode
    with capture(slim) as cap: again = slim(images)
    assert equal(again, y, 1e-4) and slim.mode == mode and slim.layers is None
    assert [tuple(t.shape) for t in cap.tokens] == [(3, P + 1, D)]*(L + 1)
    assert [tuple(a.shape) for a in cap.attention] == [(3, 3, P + 1, P + 1)]*L and [tuple(c.shape) for c in cap.cls_rows] == [(3, 3, P + 1)]*L
    computed = torch.stack(cap.computed, 1)
    assert torch.equal(computed[..., 1:], slim.kept(images)) and computed[..., 0].all()
    for l in range(L):
        still = ~cap.computed[l]
        if 'halted' != kind: assert torch.equal(cap.tokens[l + 1][still], cap.tokens[l][still]), 'who was not computed keeps the value'
        assert (cap.tokens[l + 1][cap.computed[l]] != cap.tokens[l][cap.computed[l]]).any(-1).all()
        sums = cap.attention[l].sum(-1)[cap.computed[l][:, None].expand(-1, 3, -1)]
        assert equal(sums, torch.ones_like(sums)) or kind == 'fused' and l == 2 or kind == 'fused' and l == 3 and (sums < 1).all()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in slim.modules())
    with capture(slim, attention=False) as cap: slim(images)
    assert (len(cap.attention), len(cap.cls_rows)) == (0, L)


@torch.no_grad()
def test_a_captured_dense_policy_is_the_dense_capture(images):
    slim = slim_of('dense')
    with capture(slim) as a, capture(slim.model) as b:
        slim(images)
        if not b.tokens: slim.model(images)
    for x, z in zip(a.tokens + a.attention + a.cls_rows, b.tokens + b.attention + b.cls_rows, strict=True): assert equal(x, z)


@torch.no_grad()
def test_a_static_plan_by_hand(images):
    "Removed before block 2: block 1 is dense, and what was removed keeps its value from there; the rest sees only the rest."
    model, keep = vit(), (1, 4, 6)
    slim, rows = SlimViT(model, Policy({1: Step(keep=keep)})), [0, 2, 5, 7]
    with capture(model) as dense: model(images)
    x = dense.tokens[1]
    with capture(slim) as cap: slim(images)
    for l, block in enumerate(model.blocks):
        if not l: continue
        x = x.clone()
        with capture(model): kept = block(x[:, rows])
        x[:, rows] = kept
        assert equal(cap.tokens[l + 1], x)
        assert equal(cap.attention[l][:, :, rows][..., rows].sum(-1), torch.ones(3, 3, 4)) and cap.attention[l].sum() == pytest.approx(3*3*4, abs=1e-3)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_forward_intermediates(kind, mode, images):
    slim = slim_of(kind)
    if mode == 'gather' and any(s.ragged for s in slim.policy.steps.values()): pytest.skip('a threshold does not run in gather')
    slim.set_mode(mode)
    with capture(slim) as cap: slim(images)
    final, maps = slim.forward_intermediates(images)
    assert equal(final, slim.forward_features(images), 0) and [tuple(m.shape) for m in maps] == [(3, D, 4, 4)]*L
    for l, m in enumerate(maps): assert equal(m.flatten(2).mT, cap.tokens[l + 1][:, 1:], 1e-4), l
    out = slim.forward_intermediates(images, [0, -1], return_prefix_tokens=True, norm=True, output_fmt='NLC', output_dict=True)
    assert set(out) == {'image_features', 'image_intermediates', 'image_intermediates_prefix', 'computed'}
    kept = slim.kept(images)
    for j, l in enumerate((0, L - 1)):
        assert equal(out['image_intermediates'][j], slim.model.norm(cap.tokens[l + 1])[:, 1:], 1e-4)
        assert equal(out['image_intermediates_prefix'][j], slim.model.norm(cap.tokens[l + 1])[:, :1], 1e-4)
        assert torch.equal(out['computed'][j], kept[:, l])
    only = slim.forward_intermediates(images, 2, intermediates_only=True, stop_early=True)
    assert len(only) == 2 and equal(only[1], maps[3], 0)
    early = slim.forward_intermediates(images, [1], intermediates_only=True, stop_early=True, output_dict=True)
    assert equal(early['image_intermediates'][0], maps[1], 0) and early['computed'][0].shape == (3, 4, 4)


@torch.no_grad()
def test_without_steps_it_is_timms_own(images):
    for model in (vit(), vit(reg_tokens=2), vit(global_pool='avg', class_token=False, img_size=(32, 16), patch_size=(8, 4))):
        slim, x = SlimViT(model), torch.randn(2, 3, *model.patch_embed.img_size)
        for kw in (dict(), dict(indices=2, norm=True), dict(indices=[1, 3], return_prefix_tokens=True, output_fmt='NLC'), dict(indices=(0,), stop_early=True, intermediates_only=True),
                   dict(return_prefix_tokens=True, intermediates_only=True)):
            flat = lambda t: [t] if isinstance(t, torch.Tensor) else [v for u in t for v in flat(u)]
            for a, b in zip(flat(slim.forward_intermediates(x, **kw)), flat(model.forward_intermediates(x, **kw)), strict=True): assert a.shape == b.shape and equal(a, b)
        for kw in (dict(), dict(n=3, reshape=True), dict(n=[0, 2], return_prefix_tokens=True, norm=True)):
            for a, b in zip(flat(slim.get_intermediate_layers(x, **kw)), flat(model.get_intermediate_layers(x, **kw)), strict=True): assert a.shape == b.shape and equal(a, b)


def test_intermediates_have_gradients(images):
    slim = slim_of('static')
    maps = slim.forward_intermediates(images, intermediates_only=True)
    maps[3].sum().backward()
    assert slim.model.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0 and slim.model.patch_embed.proj.weight.grad.abs().sum() > 0


WATCHED = {'block': lambda b: b, 'attn': lambda b: b.attn, 'qkv': lambda b: b.attn.qkv, 'attn_drop': lambda b: b.attn.attn_drop, 'proj': lambda b: b.attn.proj,
           'norm1': lambda b: b.norm1, 'norm2': lambda b: b.norm2, 'mlp': lambda b: b.mlp, 'fc1': lambda b: b.mlp.fc1, 'drop_path1': lambda b: b.drop_path1}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_hooks_fire_once_for_each_block(kind, mode, images):
    slim = slim_of(kind)
    if mode == 'gather' and any(s.ragged for s in slim.policy.steps.values()): pytest.skip('a threshold does not run in gather')
    slim.set_mode(mode)
    y = slim(images)
    for name, part in WATCHED.items():
        before, after = [], []
        handles = [part(b).register_forward_pre_hook(lambda m, args, l=l: before.append((l, args[0].shape))) for l, b in enumerate(slim.blocks)]
        handles += [part(b).register_forward_hook(lambda m, args, out, l=l: after.append((l, out.shape))) for l, b in enumerate(slim.blocks)]
        assert equal(slim(images), y), name
        for h in handles: h.remove()
        assert [l for l, _ in before] == [l for l, _ in after] == list(range(L)), name
        if name == 'attn_drop': assert all(len(s) == 4 and s[:2] == (3, 3) for _, s in before), 'attention maps (B, H, queries, keys)'
    assert equal(slim(images), y, 0) and 'forward' not in slim.blocks[1].__dict__ and 'forward' not in slim.blocks[1].attn.__dict__


@pytest.mark.parametrize('part', ['block', 'attn', 'qkv'])
def test_what_a_hook_returns_counts(part, images):
    slim = slim_of('static')
    y = slim(images)
    handle = WATCHED[part](slim.blocks[1]).register_forward_hook(lambda m, args, out: out*2)
    assert not equal(slim(images), y)
    handle.remove()
    assert equal(slim(images), y, 0)


def test_backward_hooks(images):
    slim, seen = slim_of('static'), []
    handles = [b.attn.register_full_backward_hook(lambda m, gi, go, l=l: seen.append((l, go[0].shape))) for l, b in enumerate(slim.blocks)]
    slim(images).sum().backward()
    assert seen == [(3, (3, 1, D)), (2, (3, 4, D)), (1, (3, 4, D)), (0, (3, P + 1, D))]
    for h in handles: h.remove()


@torch.no_grad()
def test_unfused_attention_is_what_timm_was_told(images):
    slim = slim_of('static')
    y, seen = slim(images), []
    for b in slim.blocks: b.attn.fused_attn = False
    handle = slim.blocks[1].attn.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out))
    assert equal(slim(images), y) and len(seen) == 1 and seen[0].shape == (3, 3, 4, P + 1)
    assert equal(seen[0].sum(-1), torch.ones(3, 3, 4))
    handle.remove()


BAD = {
    'capture in training': (lambda s, x: s.train().capture().__enter__(), 'slim: got a SlimViT in training; allowed: one in eval mode. Call slim.eval().'),
    'a mask': (lambda s, x: s.forward_intermediates(x, attn_mask=torch.ones(17, 17)), 'attn_mask: got a mask; allowed: None for a pruned model'),
    'other format': (lambda s, x: s.forward_intermediates(x, output_fmt='NHWC'), "output_fmt: got NHWC; allowed: 'NCHW' or 'NLC'"),
    'too many blocks': (lambda s, x: s.forward_intermediates(x, 5), 'indices: got 5; allowed: how many of the last blocks, at most 4'),
    'no such block': (lambda s, x: s.get_intermediate_layers(x, [4]), 'indices: got [4]; allowed: how many of the last blocks, at most 4, or block indices from -4 to 3'),
    'wrapped twice': (lambda s, x: SlimViT(s), 'model: got a SlimViT, whose tokens are pruned; allowed: a dense ViT'),
    'scores of a pruned model': (lambda s, x: capture_once(s).__enter__(), 'look inside it, use capture(slim) or slim.forward_intermediates(images)'),
    'a compiled dense model': (lambda s, x: capture(torch.compile(s.model, backend='eager')).__enter__(), 'model: got one from torch.compile; allowed: the module before it was compiled. Pass model._orig_mod.'),
    'a compiled pruned model': (lambda s, x: capture(torch.compile(s, backend='eager')).__enter__(), 'model: got one from torch.compile'),
}


@pytest.mark.parametrize('case', BAD)
def test_what_it_refuses(case, images):
    call, message = BAD[case]
    with pytest.raises(VitpruneError) as e: call(slim_of('static'), images)
    assert message in str(e.value) and '\n' not in str(e.value)
