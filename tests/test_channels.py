"""Channel pruning against oracles that share no code with it: masks on a dense model, an attention written head by head, Torch-Pruning, ONNX Runtime."""
import copy, json

import pytest
import torch
from timm.models.vision_transformer import Attention

from vitprune_nb.methods import vtp as ch

from vitprune_nb.engine import channels as surgery
from vitprune_nb.engine import store
from vitprune_nb.core import set_seed
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.cost import count_macs, model_macs, model_params, n_tokens
from vitprune_nb.engine.slim import Policy, SlimViT, Step, check_policy
from vitprune_nb.methods.significance import capture_once
from vitprune_nb.vit.model import capture, create_vit

ARGS = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)
ZOO = {'deit': {}, 'registers, LayerScale': dict(name='vit_small_patch14_reg4_dinov2', init_values=.1), 'distilled': dict(name='deit_tiny_distilled_patch16_224'),
       'average pool': dict(name='vit_tiny_patch16_224', global_pool='avg'), 'no qkv bias': dict(name='vit_tiny_patch16_224', qkv_bias=False),
       'q/k norm, pre-norm': dict(name='vit_tiny_patch16_224', pre_norm=True, qk_norm=True), 'no proj bias': dict(name='vit_tiny_patch16_224', proj_bias=False)}
WAYS = [(0., {}), (.3, {}), (.7, {}), (.95, {}), (.5, dict(multiple=8)), (.5, dict(whole_heads=True)), (.6, dict(whole_heads=True, multiple=16))]


def vit(name='deit_tiny_patch16_224', seed=0, **kwargs):
    "Random weights, biases and norms, large enough that every channel matters."
    set_seed(seed)
    m = create_vit(name, **{**ARGS, **kwargs})
    with torch.no_grad():
        for p in m.parameters(): p.add_(.2*torch.randn_like(p))
    return m


def gated_vit(m, seed=0):
    "A copy with gates of both signs."
    g, gen = ch.add_gates(copy.deepcopy(m)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a in ch.gates(g).values(): a.copy_(torch.randn(len(a), generator=gen))
    return g


@pytest.fixture(scope='module')
def dense(): return vit()


@pytest.fixture(scope='module')
def gated(dense): return gated_vit(dense)


@pytest.fixture(scope='module')
def images(): return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def masked(model, plan, values, x):
    "Logits of a dense model whose layers read their inputs times gate times 0/1 mask."
    hooks = []
    for name, size in plan.sizes.items():
        m = torch.zeros(size); m[list(plan.keep[name])] = 1
        m = m*values[name].detach()
        hooks.append(model.get_submodule(name).register_forward_pre_hook(lambda _, args, m=m: (args[0]*m,)))
    try: return model(x)
    finally: [h.remove() for h in hooks]


@torch.no_grad()
@pytest.mark.parametrize('kind', ZOO)
def test_slicing_is_masking(kind):
    m = vit(**ZOO[kind])
    g, x = gated_vit(m), torch.randn(3, 3, *m.patch_embed.img_size)
    for ratio, how in WAYS:
        plan = ch.choose(ch.importance(g), ratio, 3, **how)
        want, sliced = masked(m, plan, ch.gates(g), x), surgery.slice_model(g, plan)
        assert (sliced(x) - want).abs().max() <= 1e-5, (kind, ratio, how)
        assert (ch.harden(copy.deepcopy(g), plan)(x) - want).abs().max() <= 1e-5
        assert (want - m(x)).abs().max() > 1e-2, 'the gates do matter'
        assert count_macs(sliced) == model_macs(sliced, extra=surgery.padding_macs(sliced))
        assert model_params(sliced) == sum(p.numel() for p in sliced.state_dict().values() if p.is_floating_point())


@torch.no_grad()
@pytest.mark.parametrize('seed', range(8))
def test_random_plans(dense, gated, images, seed):
    gen = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(len(a), generator=gen) for n, a in ch.gates(gated).items()}
    plan = ch.choose(scores, float(torch.rand((), generator=gen))*.9, 3)
    assert (surgery.slice_model(gated, plan)(images) - masked(dense, plan, ch.gates(gated), images)).abs().max() <= 1e-5


@torch.no_grad()
def test_head_by_head(gated):
    "One sliced attention layer against a softmax written out, with each head's own channels and the dense scale."
    plan = ch.choose(ch.importance(gated), .5, 3)
    folded, sliced = ch.fold_gates(copy.deepcopy(gated)), surgery.slice_model(gated, plan)
    x, cols, out = torch.randn(2, 17, 48), list(plan.keep['blocks.1.attn.qkv']), list(plan.keep['blocks.1.attn.proj'])
    attn = folded.blocks[1].attn
    xn = folded.blocks[1].norm1(x)[..., cols]
    q, k, v = (xn @ attn.qkv.weight[i*48:(i + 1)*48][:, cols].T + attn.qkv.bias[i*48:(i + 1)*48] for i in range(3))
    y = torch.zeros(2, 17, 48)
    for h in range(3):
        s, mine = slice(16*h, 16*h + 16), [c for c in out if c//16 == h]
        e = torch.exp(q[..., s] @ k[..., s].transpose(1, 2)/16**.5)
        y[..., mine] = e/e.sum(-1, keepdim=True) @ v[..., mine]
    want = y[..., out] @ attn.proj.weight[:, out].T + attn.proj.bias
    b = sliced.blocks[1]
    assert torch.allclose(b.attn(b.norm1(x)), want, atol=1e-5)
    assert b.attn.scale == attn.scale == 16**-.5
    b.attn.fused_attn = False
    assert torch.allclose(b.attn(b.norm1(x)), want, atol=1e-5)


@torch.no_grad()
def test_torch_pruning_cuts_the_same_hidden_channels(dense, images):
    tp = pytest.importorskip('torch_pruning')
    g = ch.add_gates(copy.deepcopy(dense))
    sizes = {n: len(a) for n, a in ch.gates(g).items()}
    keep = {n: sorted(torch.randperm(s, generator=torch.Generator().manual_seed(s + i)).tolist()[:s//2]) if n.endswith('fc2') else range(s)
            for i, (n, s) in enumerate(sizes.items())}
    ours = surgery.slice_model(g, ch.ChannelPlan(keep, sizes, .5, 0.))
    theirs = copy.deepcopy(dense)
    with torch.enable_grad(): graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=images)   # it follows autograd
    for i, b in enumerate(theirs.blocks):
        gone = sorted(set(range(192)) - set(keep[f'blocks.{i}.mlp.fc2']))
        graph.get_pruning_group(b.mlp.fc1, tp.prune_linear_out_channels, idxs=gone).prune()
    assert [b.mlp.fc1.weight.shape for b in theirs.blocks] == [b.mlp.fc1.weight.shape for b in ours.blocks] == [(96, 48)]*3
    assert torch.allclose(theirs(images), ours(images), atol=1e-5)
    assert (theirs(images) - dense(images)).abs().max() > 1e-2


@torch.no_grad()
def test_the_literal_rule_drops_negative_gates(gated):
    plan = ch.choose(ch.importance(gated, 'literal'), .5, 3)
    values = ch.gates(gated)
    gone = torch.cat([values[n][[i for i in range(s) if i not in set(plan.keep[n])]] for n, s in plan.sizes.items()])
    assert gone.max() < .2 and gone.min() < -2      # the most negative gates went first
    right = ch.choose(ch.importance(gated, 'gate'), .5, 3)
    kept = torch.cat([values[n][list(right.keep[n])] for n in right.sizes])
    assert kept.min() < -2


def test_ratio_zero_and_the_highest_ratio(dense, gated, images):
    scores = ch.importance(gated)
    assert ch.choose(scores, 0., 3).removed == 0
    sizes = sum(len(s) for s in scores.values())
    top = 1 - 3*(3 + 3)/sizes      # three layers with one channel and three heads with one, in each of three blocks
    plan = ch.choose(scores, top, 3)
    assert [len(k) for k in plan.keep.values()] == [1, 3, 1, 1]*3
    with torch.no_grad(): assert torch.isfinite(surgery.slice_model(gated, plan)(images)).all()
    with pytest.raises(VitpruneError, match='A higher one would empty a layer or a head'): ch.choose(scores, top + 2/sizes, 3)


@pytest.mark.parametrize('multiple', [1, 5, 7, 32, 48])
@pytest.mark.parametrize('ratio', [0., .1, .5, .9])
def test_a_layer_that_is_no_multiple_is_rounded_to_one(gated, multiple, ratio):
    "48 and 192 channels: in multiples of 32, the first keep 32 at most."
    scores = ch.importance(gated)
    for whole in (False, True):
        plan = ch.choose(scores, ratio, 3, multiple, whole)
        for n, kept in plan.keep.items():
            if whole and n.endswith('attn.proj'): assert len(kept) % 16 == 0           # whole heads, whatever the multiple is
            else: assert len(kept) % multiple == 0 and 0 < len(kept) <= plan.sizes[n]
        if not ratio and multiple == 32: assert {len(k) for n, k in plan.keep.items() if n.endswith(('qkv', 'fc1'))} == {32}


def test_a_multiple_that_no_layer_has(gated):
    scores = ch.importance(gated)
    for multiple in (49, 4096):
        with pytest.raises(VitpruneError, match=f'multiple: got {multiple}; allowed: at most 48, the channels of the smallest layer'): ch.choose(scores, .4, 3, multiple)
    heads = {n: s for n, s in scores.items() if n.endswith(('attn.proj', 'fc2'))}
    assert len(ch.choose(heads, .4, 3, 64, True).keep['blocks.0.mlp.fc2']) % 64 == 0   # whole heads are not rounded to it


@torch.no_grad()
def test_ties_and_nan(gated):
    flat = {n: torch.ones(len(a)) for n, a in ch.gates(gated).items()}
    assert ch.choose(flat, .4, 3).keep == ch.choose(flat, .4, 3).keep
    broken = copy.deepcopy(gated)
    ch.gates(broken)['blocks.1.mlp.fc1'][3] = float('nan')
    with pytest.raises(VitpruneError, match='NaN or infinity in the gates of blocks.1.mlp.fc1'): ch.importance(broken)


@torch.no_grad()
def test_round_trip(gated, images, tmp_path):
    for i, (ratio, how) in enumerate(WAYS):
        sliced = surgery.slice_model(gated, ch.choose(ch.importance(gated), ratio, 3, **how))
        back = store.load_sliced(store.save_sliced(sliced, tmp_path/str(i), method='vtp'))
        assert torch.equal(back(images), sliced(images)) and not back.training
        config = json.loads((tmp_path/str(i)/'config.json').read_text())
        assert config['info'] == dict(method='vtp') and len(config['shapes']) == 3
    weights = (tmp_path/'1'/'model.safetensors').read_bytes()
    (tmp_path/'1'/'model.safetensors').write_bytes(weights[:len(weights)//2])
    with pytest.raises(VitpruneError, match='allowed: weights that fit its config.json'): store.load_sliced(tmp_path/'1')
    assert not list(tmp_path.glob('.*.tmp'))


@torch.no_grad()
def test_onnx(gated, images, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    sliced = surgery.slice_model(gated, ch.choose(ch.importance(gated), .5, 3))
    torch.onnx.export(sliced, (images,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    session = ort.InferenceSession(str(tmp_path/'m.onnx'))
    got = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), sliced(images), atol=1e-4)


@pytest.mark.parametrize('steps', [{1: Step(keep=(1, 4, 9))}, {0: Step('middle', keep=(1, 4, 9, 12)), 2: Step(keep=(4,))}, {1: Step('middle', 'idle', keep=(3, 8))},
                                   {0: Step('queries', keep=(1, 4, 9)), 2: Step('queries', keep=())}])
def test_patches_and_channels_together(dense, gated, images, steps):
    sliced = surgery.slice_model(gated, ch.choose(ch.importance(gated), .5, 3))
    policy = Policy(steps)
    check_policy(sliced, policy, images)
    counts = policy.counts(3, n_tokens(dense), 1)
    both = SlimViT(sliced, policy)
    assert count_macs(both) == model_macs(both, counts, surgery.padding_macs(both, counts))
    left = lambda m, c=None: (model_macs(m, c) - embed)/(model_macs(dense) - embed)
    embed = model_macs(dense, [(0, 0, 0)]*3)
    assert left(sliced, counts) == pytest.approx(left(sliced)*left(dense, counts), abs=.03)


def test_a_sliced_model_learns(gated, images):
    sliced = surgery.slice_model(gated, ch.choose(ch.importance(gated), .5, 3)).train()
    sliced(images).square().mean().backward()
    for n, p in sliced.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, n


@pytest.mark.parametrize('seed', range(4))
def test_attention_of_a_sliced_block_is_the_one_of_timm(gated, seed):
    torch.manual_seed(seed)
    scores = {n: torch.rand(len(g)) for n, g in ch.gates(gated).items()}
    attn = surgery.slice_model(gated, ch.choose(scores, .5, 3)).blocks[seed % 3].attn
    assert isinstance(attn, surgery.SlicedAttention)
    x = torch.randn(2, 17, attn.qkv.in_features, requires_grad=True)
    for kwargs in ({}, dict(attn_mask=torch.rand(17, 17) > .3), dict(attn_mask=torch.randn(2, 1, 17, 17)), dict(is_causal=True)):
        ours, timms = attn(x, **kwargs), Attention.forward(attn, x, **kwargs)
        assert torch.allclose(ours, timms, atol=1e-5)
        back = [torch.autograd.grad(y.square().sum(), (x, attn.qkv.weight, attn.proj.weight)) for y in (ours, timms)]
        for a, b in zip(*back): assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_whoever_watches_a_sliced_block_sees_all_of_it(gated, images):
    sliced = surgery.slice_model(gated, ch.choose(ch.importance(gated), .5, 3))
    want, seen = sliced(images), []
    for watch in (capture, capture_once):
        with watch(sliced) as cap: assert torch.allclose(sliced(images), want, atol=1e-5)
        assert len(cap.attention) == 3 and all(torch.allclose(a.sum(-1), torch.ones(())) for a in cap.attention)
    hooks = [b.attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for b in sliced.blocks]
    sliced(images); SlimViT(sliced, Policy({1: Step(keep=(1, 4, 9))}))(images)
    assert len(seen) == 6
    for h in hooks: h.remove()
    assert torch.equal(sliced(images), want)


def test_slicing_leaves_the_model_alone(gated, images):
    before = {k: v.clone() for k, v in gated.state_dict().items()}
    surgery.slice_model(gated, ch.choose(ch.importance(gated), .5, 3))
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())
    assert len(ch.gates(gated)) == 12


@pytest.mark.parametrize('name, words', [('swin_tiny_patch4_window7_224', 'SwinTransformer'), ('vit_giant_patch14_reg4_dinov2', r'blocks\[0\].mlp is of another kind')])
def test_other_networks_are_refused_by_name(name, words):
    with torch.device('meta'): m = create_vit(name, **(dict(depth=1, embed_dim=48, num_heads=3) if 'giant' in name else {}))
    with pytest.raises(VitpruneError, match=words): ch.add_gates(m)


def images_folder(root):
    "An ImageFolder tree of 12 random classes, four images each."
    from torchvision.transforms.functional import to_pil_image
    for split in ('train', 'val'):
        for c in range(12):
            (root/split/f'n{c:04d}').mkdir(parents=True)
            for i in range(4): to_pil_image(torch.rand(3, 40, 40)).save(root/split/f'n{c:04d}'/f'{i}.png')
    return root


SMALL = dict(epochs=1, batch_size=20, layer_decay=1., dtype='fp32')


def test_tables_from_an_image_folder(tmp_path):
    "ImageNet-100 in small: some of the classes of an ImageFolder tree, trained with the paper's augmentation, pruned at two rates, fine-tuned."
    from vitprune_nb.papers.channel_tables import channel_table, paper_run
    from vitprune_nb.data import class_subset, load_data
    from vitprune_nb.train.recipe import TrainConfig
    images_folder(tmp_path/'tree')
    train, test = (class_subset(load_data(tmp_path/'tree', s), 10) for s in ('train', 'test'))
    assert [len(train.classes), len(train), len(test)] == [10, 40, 40]
    cfg = TrainConfig(**{**ch.PAPER, **SMALL})
    run = paper_run(l1s=(1e-4,), ratios=(.2, .6), sparse=cfg, tune=cfg)
    table = lambda: channel_table(vit(), train, test, tmp_path/'rows.csv', tmp_path/'runs', run, 'tiny', 'cpu')
    dense, *rows = table()
    said = [(r['method'], r['schedule']['ratio'], r['recovery']) for r in rows]
    assert said == [(m, ratio, k) for ratio in (.2, .6) for m in ('vtp', 'uniform', 'random') for k in ('none', 'fine-tuned')]
    assert all(r['images'] == 40 for r in rows) and dense['macs'] > rows[0]['macs'] > rows[6]['macs'] == rows[10]['macs']
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
    assert table() == [dense, *rows], 'nothing is made twice'
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()} == files


class Stop(BaseException): "What a kill looks like from inside."


def test_a_stopped_table_goes_on(tmp_path, monkeypatch):
    "Stopped at every possible place, in training and between rows, the table ends with the rows of an undisturbed run."
    from vitprune_nb.papers import channel_tables as ct
    from vitprune_nb.train import trainer as train
    from vitprune_nb.data import calibration, embedded
    sets = [calibration(embedded(s), 20) for s in ('train', 'test')]
    cfg = train.TrainConfig(**dict(SMALL, batch_size=5, save_every=1, lr=1e-2))
    run = ct.ChannelRun(l1s=(1e-3,), ratios=(.5,), baselines=('random',), start=.5, sparse=cfg, tune=cfg)
    table = lambda name: ct.channel_table(vit(), *sets, tmp_path/f'{name}.csv', tmp_path/name, run, 'tiny', 'cpu')
    want = table('calm')
    calls = dict(left=3)
    def counted(f):
        def g(*a, **k):
            calls['left'] -= 1
            if calls['left'] < 0: raise Stop
            return f(*a, **k)
        return g
    monkeypatch.setattr(train.Trainer, 'one_step', counted(train.Trainer.one_step))
    monkeypatch.setattr(ct, 'append_rows', counted(ct.append_rows))
    for stops in range(20):     # noqa: B007 (counted)
        try: got = table('stopped'); break
        except Stop: calls['left'] = 3
    assert 3 < stops < 20
    plain = lambda rows: [{k: v for k, v in r.items() if k not in ('date', 'commit')} for r in rows]
    assert plain(got) == plain(want)
    assert len((tmp_path/'stopped.csv').read_text().splitlines()) == 1 + len(want)


@torch.no_grad()
@pytest.mark.parametrize('ratio', [.1, .4, .8])
def test_cost_of_a_plan_and_of_its_baselines(dense, gated, ratio):
    from vitprune_nb.papers.channel_tables import random_channels, uniform_at, uniform_channels
    scores = ch.importance(gated)
    plan = ch.choose(scores, ratio, 3)
    cost = surgery.plan_cost(dense, plan)
    sliced = surgery.slice_model(gated, plan)
    assert cost == (count_macs(sliced), model_params(sliced)) == surgery.plan_cost(gated, plan)
    chance = surgery.slice_model(gated, random_channels(plan, 3, seed=5))
    assert (count_macs(chance), model_params(chance)) == cost
    even = uniform_at(dense, scores, cost[0])
    assert cost[0] <= surgery.plan_cost(dense, even)[0] <= 1.03*cost[0]
    shares = [len(k)/even.sizes[n] for n, k in even.keep.items()]
    assert max(shares) - min(shares) < .05, 'every layer loses the same share, but for the guard of the heads'
    assert uniform_channels(scores, 0., 3).removed == 0


@torch.no_grad()
def test_patch_slimming_on_a_sliced_model(dense, gated, images, tmp_path):
    "Plans of patch slimming run on a VTP-pruned model in all modes, and counted MACs are tokens times widths."
    from vitprune_nb.vit.cost import block_terms, block_widths
    from vitprune_nb.data import calibration, embedded
    from vitprune_nb.methods.patch_slimming import top_down
    from vitprune_nb.engine.plan import KEYS, Plan, ramp_plan
    sliced = surgery.slice_model(gated, ch.choose(ch.importance(gated), .5, 3))
    with torch.enable_grad(): found = top_down(dense, calibration(embedded('train'), 8), eps=.5)
    N = n_tokens(dense)
    for plan in (found, ramp_plan(sliced, .3)):
        for keys in KEYS:
            both, counts = plan.slim(sliced, keys), plan.counts(keys)
            check_policy(sliced, plan.policy(keys), images)
            assert count_macs(both) == model_macs(both, counts, surgery.padding_macs(both, counts))
            for n, old, new in zip(counts, dense.blocks, sliced.blocks):
                full, channels, patches, together = (block_terms(*c, block_widths(b)) for c, b in (((N,)*3, old), ((N,)*3, new), (n, old), (n, new)))
                assert all(together[t]*full[t] == channels[t]*patches[t] for t in full), 'each term is tokens times weights, so what is left multiplies'
    plan.save(tmp_path/'plan.json')
    back = store.load_sliced(store.save_sliced(Plan.load(tmp_path/'plan.json').slim(sliced), tmp_path/'both'))
    assert torch.equal(back(images), plan.slim(sliced)(images))
    assert plan.slim(sliced)(images).ne(sliced(images)).any() and sliced(images).ne(dense(images)).any()


def pruned(model, ratio=.4, l1=1e-4, rule='folded', **how):
    "The whole way, without training."
    ch.l1_penalty(l1)
    gated = ch.add_gates(copy.deepcopy(model))
    return surgery.slice_model(gated, surgery.choose(ch.importance(gated, rule), ratio, 3, **how))


BAD = {
    'ratio 1': (lambda m: pruned(m, 1), 'ratio: got 1; allowed: a share in [0, 1). Use 0 to keep every channel.'),
    'negative ratio': (lambda m: pruned(m, -.1), 'ratio: got -0.1; allowed: a share in [0, 1)'),
    'ratio that empties a layer': (lambda m: pruned(m, .999), 'ratio: got 0.999; allowed: at most 0.982 for this model. A higher one would empty a layer or a head.'),
    'negative λ': (lambda m: pruned(m, l1=-1e-4), 'l1: got -0.0001; allowed: a number, 0 or more'),
    'gates folded already': (lambda m: ch.fold_gates(ch.fold_gates(ch.add_gates(copy.deepcopy(m)))), 'model: got one without gates; allowed: a model after add_gates. If its gates are folded already'),
    'gates twice': (lambda m: ch.add_gates(ch.add_gates(copy.deepcopy(m))), 'model: got one that has gates'),
    'pruned twice': (lambda m: pruned(pruned(m)), 'model: got one whose channels are cut already; allowed: a dense model'),
    'ratio as text': (lambda m: pruned(m, '0.4'), 'ratio: got 0.4; allowed: a share in [0, 1)'),
    'λ is NaN': (lambda m: pruned(m, l1=float('nan')), 'l1: got nan; allowed: a number, 0 or more'),
    'unknown rule': (lambda m: pruned(m, rule='l2'), "rule: got l2; allowed: 'folded', 'gate', 'literal'"),
    'multiple 0': (lambda m: pruned(m, multiple=0), 'multiple: got 0; allowed: a positive integer'),
    'a channel that is not there': (lambda m: surgery.ChannelPlan({"a": (0, 3)}, {"a": 3}, .4, 0.), 'below 3'),
    'gates of zero': (lambda m: ch.add_gates(copy.deepcopy(m), 0), 'value: got 0; allowed: a number other than 0'),
    'saving a dense model': (lambda m: store.save_sliced(m, "nowhere"), 'model: got one whose channels are not cut'),
    'folder without a model': (lambda m: store.load_sliced('nowhere'), 'folder: got nowhere; allowed: a pruned model'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(name, dense):
    call, message = BAD[name]
    with pytest.raises(VitpruneError) as e: call(dense)
    assert message in str(e.value) and '\n' not in str(e.value)
