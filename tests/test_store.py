"""What a pruned folder gives back: the same logits, or a refusal."""
import copy, functools, itertools, json, math, os, shutil

import numpy as np, pytest, timm, torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from timm.layers import DropPath, LayerNorm, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune_nb.methods.vtp import add_gates, importance
from vitprune_nb.engine.channels import choose
from vitprune_nb.errors import VitpruneError
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.engine.macs import cost_of
from vitprune_nb.engine.store import load_pruned, save_pruned
from vitprune_nb.engine.plan import Plan, model_name, ramp_plan
from vitprune_nb.engine.policy import NormScore, Policy, RandomScore, SCORERS, Step
from vitprune_nb.engine.channels import slice_model
from vitprune_nb.vit.model import create_vit

FIXTURES = ROOT/'tests/fixtures'
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)


def make(name='vit_tiny_patch16_224', **kwargs):
    "A small ViT whose every number is random, so that no part of it is without effect."
    torch.manual_seed(0)
    return shake(timm.create_model(name, **{**SMALL, **kwargs}))


def shake(model):
    for p in model.parameters(): p.data += .2*torch.randn_like(p)
    return model.eval()


def pixels(model, n=3):
    vit = getattr(model, 'model', model)
    w = vit.patch_embed.proj.weight
    return torch.randn(n, w.shape[1], *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(1)).to(w.dtype)


STATIC = Policy({1: Step(keep=(0, 2, 5, 9, 11)), 2: Step('queries', keep=(2, 5))}, 'static')
def dynamic(): return Policy({0: Step(count=11, score=NormScore()), 2: Step('middle', 'merge', score=RandomScore(3), count=6)}, 'dynamic')
def cut(model): return slice_model(g := add_gates(copy.deepcopy(model)), choose(importance(g), .3, model.blocks[0].attn.num_heads))
PRUNED = {'static': lambda m: SlimViT(m, STATIC), 'dynamic': lambda m: SlimViT(m, dynamic(), 'packed'), 'sliced': cut,
          'both': lambda m: SlimViT(cut(m), STATIC)}


def comes_back(model, folder):
    "The model read from the folder that it was just saved to; logits are equal, and so are types."
    saved = save_pruned(model, folder)
    back = load_pruned(saved)
    x = pixels(model)
    with torch.no_grad(): want, got = model.eval()(x), back(x)
    assert want.dtype == got.dtype and torch.equal(want, got)
    assert {k: (v.dtype, v.shape) for k, v in model.state_dict().items()} == {k: (v.dtype, v.shape) for k, v in back.state_dict().items()}
    return back


@pytest.mark.parametrize('name', sorted(p.name for p in FIXTURES.iterdir()))
def test_folders_of_version_0_give_the_logits_that_they_gave(name):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(): got = load_pruned(FIXTURES/name)(x)
    torch.testing.assert_close(got, load_file(FIXTURES/name/'logits.safetensors')['logits'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', sorted(p.name for p in FIXTURES.iterdir()))
def test_folders_of_version_0_can_be_saved_again(name, tmp_path):
    comes_back(load_pruned(FIXTURES/name), tmp_path/'again')


VARIANTS = {
    'plain': {}, 'relu': dict(act_layer='relu'), 'quick_gelu': dict(act_layer='quick_gelu'), 'gelu_tanh': dict(act_layer='gelu_tanh'),
    'timm gelu': dict(act_layer='gelu'), 'silu': dict(act_layer='silu'),
    'eps 0.1': dict(norm_layer=functools.partial(LayerNorm, eps=.1)), 'torch norm': dict(norm_layer=nn.LayerNorm),
    'RMSNorm': dict(norm_layer=RmsNorm), 'qk_norm, eps': dict(qk_norm=True, norm_layer=functools.partial(LayerNorm, eps=.02)),
    'prefix in the mean': dict(global_pool='avg', pool_include_prefix=True), 'average': dict(global_pool='avg'),
    'average, no class token': dict(global_pool='avg', class_token=False), 'registers': dict(reg_tokens=2),
    'registers, no_embed_class': dict(reg_tokens=2, no_embed_class=True), 'no_embed_class': dict(no_embed_class=True),
    'pos_embed none': dict(pos_embed='none'), 'no final norm': dict(final_norm=False), 'fc_norm': dict(fc_norm=True),
    'average without fc_norm': dict(global_pool='avg', fc_norm=False), 'pre_norm': dict(pre_norm=True),
    'no proj bias': dict(proj_bias=False), 'no qkv bias': dict(qkv_bias=False), 'LayerScale': dict(init_values=.1),
    'mlp_ratio 2.6': dict(mlp_ratio=2.6), 'mlp_ratio odd': dict(mlp_ratio=41.5/24), 'one channel': dict(in_chans=1), 'no head': dict(num_classes=0),
    'drop rates': dict(drop_rate=.1, pos_drop_rate=.1, proj_drop_rate=.2, attn_drop_rate=.3, drop_path_rate=.4),
    'padding': dict(img_size=36, dynamic_img_pad=True, dynamic_img_size=True), 'dynamic size': dict(dynamic_img_size=True),
    'not square': dict(img_size=(32, 48)), 'patches not square': dict(img_size=(32, 64), patch_size=(8, 16)),
    'scaled attention': dict(scale_attn_norm=True), 'scaled mlp': dict(scale_mlp_norm=True),
    'stem norm': dict(embed_norm_layer=LayerNorm), 'one block': dict(depth=1),
    'DIST token': dict(name='deit_tiny_distilled_patch16_224'), 'DeiT-3': dict(name='deit3_small_patch16_224'),
    'DeiT-3 without LayerScale': dict(name='deit3_small_patch16_224', init_values=0),
    'CLIP': dict(name='vit_base_patch32_clip_quickgelu_224'), 'DINOv2': dict(name='vit_small_patch14_reg4_dinov2'),
    'SigLIP': dict(name='vit_base_patch16_siglip_gap_224'), 'MAE-like': dict(name='vit_small_patch16_18x2_224'),
}


NOT_CUT = 'allowed: blocks of LayerNorm, plain attention and a two-layer MLP'
NOT_PRUNED = {(v, k): NOT_CUT for v in ('RMSNorm', 'scaled attention', 'scaled mlp') for k in ('sliced', 'both')}
NOT_PRUNED |= {('one block', k): 'policy: got a step for block index' for k in ('static', 'dynamic', 'both')}
NOT_PRUNED |= {('MAE-like', k): 'ParallelThingsBlock' for k in PRUNED}


@pytest.mark.parametrize('kind', PRUNED)
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_vit_comes_back_or_cannot_be_pruned_so(variant, kind, tmp_path):
    model, words = make(**VARIANTS[variant]), NOT_PRUNED.get((variant, kind))
    if words is None: return comes_back(PRUNED[kind](model), tmp_path/'m')
    with pytest.raises(VitpruneError, match=words): PRUNED[kind](model)


# --- what no constructor argument says

def head_of_5(m): m.reset_classifier(5)
def average_after_all(m): m.reset_classifier(7, 'avg')
def own_head_size(m): m.head = nn.Linear(24, 4)
def no_head(m): m.reset_classifier(0)
def one_eps(m): m.blocks[1].norm2.eps = .3
def drop_path(m): m.blocks[1].drop_path1 = DropPath(.25)
def slow_attention(m):
    for b in m.blocks: b.attn.fused_attn = False
def other_size(m): m.set_input_size((48, 48))
def own_scale(m): m.blocks[0].attn.scale *= 2
LATER = dict(head_of_5=head_of_5, average_after_all=average_after_all, own_head_size=own_head_size, no_head=no_head, one_eps=one_eps, drop_path=drop_path,
             slow_attention=slow_attention, other_size=other_size, own_scale=own_scale)


@pytest.mark.parametrize('kind', PRUNED)
@pytest.mark.parametrize('name', LATER)
def test_changes_to_the_dense_model_come_back(name, kind, tmp_path):
    torch.manual_seed(3)
    m = make()
    LATER[name](m)
    comes_back(PRUNED[kind](shake(m)), tmp_path/'m')


@pytest.mark.parametrize('kind', PRUNED)
@pytest.mark.parametrize('name', ['head_of_5', 'own_head_size', 'no_head', 'one_eps', 'drop_path'])
def test_changes_to_the_pruned_model_come_back(name, kind, tmp_path):
    pruned = PRUNED[kind](make())
    LATER[name](getattr(pruned, 'model', pruned))
    back = comes_back(pruned, tmp_path/'m')
    if name == 'drop_path': assert getattr(back, 'model', back).blocks[1].drop_path1.drop_prob == .25


@pytest.mark.parametrize('kind', PRUNED)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats_come_back(dtype, kind, tmp_path):
    pruned = PRUNED[kind](make()).to(dtype)
    assert next(comes_back(pruned, tmp_path/'m').parameters()).dtype == dtype


def test_two_number_formats_in_one_model_come_back(tmp_path):
    slim = SlimViT(make(), dynamic())
    slim.model.cls_token.data = slim.model.cls_token.data.half()
    assert comes_back(slim, tmp_path/'m').model.cls_token.dtype == torch.float16


def test_a_vit_built_directly_comes_back(tmp_path):
    torch.manual_seed(0)
    m = shake(VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5, act_layer='relu'))
    slim = SlimViT(m, STATIC)
    slim.plan = Plan('p', model_name(m), 16, 1, [range(16), range(9), range(2)])
    assert model_name(comes_back(slim, tmp_path/'m').model) == model_name(m)


def test_a_shared_scorer_stays_shared(tmp_path):
    from vitprune_nb.methods.cosine import CosineScore
    score = CosineScore(24, 8)
    slim = SlimViT(make(), Policy({0: Step(count=12, score=score), 2: Step(count=5, score=score)}, 'shared'))
    back = comes_back(slim, tmp_path/'m')
    assert back.policy.steps[0].score is back.policy.steps[2].score and len(back.scorers) == 1


def test_compiled_models_and_frozen_parts(tmp_path):
    slim = SlimViT(make(), STATIC)
    slim.train()
    slim.model.blocks[0].eval()
    save_pruned(torch.compile(slim, backend='eager'), tmp_path/'m')
    assert slim.training and not slim.model.blocks[0].training
    with torch.no_grad(): assert torch.equal(load_pruned(tmp_path/'m')(pixels(slim)), slim.eval()(pixels(slim)))


# --- what cannot be built again

def hook(m): m.blocks[1].register_forward_hook(lambda mod, args, out: out*2)
def pre_hook(m): m.patch_embed.register_forward_pre_hook(lambda mod, args: (args[0] + 1,))
def own_activation(m): m.blocks[2].mlp.act = nn.Softplus()
def mixed_activations(m): m.blocks[2].mlp.act = nn.ReLU()
def own_head(m): m.head = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 5))
def head_without_bias(m): m.head = nn.Linear(24, 5, bias=False)
def own_forward(m): m.norm.forward = lambda x: x
def tied(m): m.blocks[1].mlp.fc2.weight = m.blocks[0].mlp.fc2.weight
def same_block(m): m.blocks[2] = m.blocks[1]
def weight_norm(m): nn.utils.parametrizations.weight_norm(m.head)
def no_weights(m): m.to('meta')
ODD = dict(hook=(hook, 'blocks.1 has hooks'), pre_hook=(pre_hook, 'patch_embed has hooks'), own_activation=(own_activation, 'Softplus'), mixed=(mixed_activations, 'blocks.2.mlp.act is ReLU'),
           own_head=(own_head, 'head is Sequential'), head_without_bias=(head_without_bias, 'head.bias is None'), own_forward=(own_forward, 'computes something else'),
           tied=(tied, 'are the same tensor'), same_block=(same_block, 'are the same tensor'), weight_norm=(weight_norm, 'ParametrizedLinear'), no_weights=(no_weights, 'one without weights'))


@pytest.mark.parametrize('name', ODD)
def test_what_cannot_be_built_again_is_refused(name, tmp_path):
    change, why = ODD[name]
    slim = SlimViT(make(), STATIC)
    change(slim.model)
    with pytest.raises(VitpruneError, match=why) as e: save_pruned(slim, tmp_path/'m')
    assert '\n' not in str(e.value) and list(tmp_path.iterdir()) == []


def test_a_class_of_ones_own_is_refused(tmp_path):
    class Mine(VisionTransformer):
        def forward(self, x): return super().forward(x) + 1
    with pytest.raises(VitpruneError, match='kind: got .*Mine'): save_pruned(SlimViT(Mine(**SMALL), STATIC), tmp_path/'m')
    with pytest.raises(VitpruneError, match='info: got'): save_pruned(SlimViT(make(), STATIC), tmp_path/'m', what=object())
    assert list(tmp_path.iterdir()) == []


# --- grids

def test_a_pruned_model_refuses_another_grid(tmp_path):
    for policy in (STATIC, dynamic()):
        slim = SlimViT(make(dynamic_img_size=True), policy)
        with pytest.raises(VitpruneError, match='a grid of 6 by 6 patches; allowed: 4 by 4'): slim(torch.randn(1, 3, 48, 48))
        with pytest.raises(VitpruneError, match='a grid of 2 by 8 patches'): slim(torch.randn(1, 3, 16, 64))       # as many patches, elsewhere
        slim.model.set_input_size((48, 48))
        with pytest.raises(VitpruneError, match='6 by 6'): cost_of(slim)
        with pytest.raises(VitpruneError, match=r'grid is \(4, 4\), where its config builds \(6, 6\)'): save_pruned(slim, tmp_path/'m')
    assert SlimViT(make(dynamic_img_size=True))(torch.randn(1, 3, 48, 48)).shape == (1, 5)       # nothing is dropped: nothing to be wrong about


def test_a_plan_refuses_another_grid(tmp_path):
    plan = ramp_plan(make(), .3)
    plan.save(tmp_path/'p.json')
    with pytest.raises(VitpruneError, match='one of 2 by 8 patches; allowed: 4 by 4'): Plan.load(tmp_path/'p.json').slim(make(img_size=(16, 64)))
    assert Plan.load(tmp_path/'p.json') == plan and plan.slim(make()).grid == (4, 4)


# --- classes

def images(classes, n=2, split='test', name='mine'):
    from vitprune_nb.data import ImageSet
    g = np.random.default_rng(0)
    return ImageSet(g.integers(0, 255, (n*len(classes), 32, 32, 3), dtype=np.uint8), np.repeat(np.arange(len(classes)), n), classes, name, split, 'x'*64)


NAMES = ['ape', 'bat', 'cow', 'dog', 'elk']


def named(tmp_path, names=NAMES):
    slim = SlimViT(make(), STATIC)
    slim.classes = names
    return load_pruned(save_pruned(slim, tmp_path/'named'))


def test_class_names_are_kept_and_matched(tmp_path):
    from vitprune_nb.vit.model import evaluate
    model = named(tmp_path)
    ds = images(NAMES)
    assert model.classes == NAMES
    order = [3, 0, 4, 1, 2]
    mixed = ds.but(classes=[NAMES[i] for i in order], targets=np.asarray([order.index(t) for t in ds.targets]))
    assert evaluate(model, mixed)['correct'] == evaluate(model, ds)['correct']
    full = ds.subset([i for i, t in enumerate(ds.targets) if t in (1, 3)])
    some = full.but(classes=['bat', 'dog'], targets=[{1: 0, 3: 1}[t] for t in full.targets])
    assert evaluate(model, some)['correct'] == evaluate(model, full)['correct']


def test_a_wrapped_model_scores_by_the_names_of_the_model_inside(tmp_path):
    from vitprune_nb.data import load_data
    from vitprune_nb.engine.plan import Plan
    from vitprune_nb.evidence.results import answers
    from vitprune_nb.methods.base import prune
    from vitprune_nb.methods.baselines import chance_of
    from vitprune_nb.methods.cosine import run_slim
    from vitprune_nb.vit.model import course_model, evaluate
    model, ds = course_model(), load_data(limit=30)
    mixed = ds.but(classes=ds.classes[::-1], targets=9 - ds.targets)
    slim = Plan('by hand', 'deit_small_patch16_224', 64, 1, [range(20, 64)]*12).slim(model)
    loaded = load_pruned(save_pruned(slim, tmp_path/'slim'))
    train = load_data('embedded', 'train', limit=200)
    cut = load_pruned(save_pruned(prune('vtp', model, train, ratio=.1, sparse_epochs=0), tmp_path/'cut'))
    blind = chance_of(prune('attention', cut, train, reduction=.4, calibration=8), cut)
    for m in (SlimViT(model), slim, loaded, blind):
        assert m.classes == model.classes
        assert evaluate(m, mixed)['correct'] == evaluate(m, ds)['correct'] == run_slim(m, mixed)['correct']
        assert (answers(m, mixed) == answers(m, ds)).all()
    slim.classes = tuple(model.classes)
    assert load_pruned(save_pruned(slim, tmp_path/'tuple')).classes == model.classes


@pytest.mark.parametrize('whose', ['the lesson', 'the package'])
def test_a_lesson_that_defines_a_scorer_again_stops_no_one_from_saving(tmp_path, monkeypatch, whose):
    "Either class may be in the register, and either in the model: in a notebook, and in every process that ran one."
    again = type('NormScore', (NormScore,), dict(__module__='__main__'))
    monkeypatch.setitem(SCORERS, 'norm', again if whose == 'the lesson' else NormScore)
    model = SlimViT(make(), Policy({1: Step(score=(NormScore if whose == 'the lesson' else again)(), count=7)}))
    x = pixels(model)
    assert torch.equal(load_pruned(save_pruned(model, tmp_path/'m'))(x), model(x))


def test_other_class_names_are_refused(tmp_path):
    from vitprune_nb.methods.base import recover
    from vitprune_nb.vit.model import evaluate
    model, wrong = named(tmp_path), images([*NAMES[:4], 'zebra'])
    for call in (lambda: evaluate(model, wrong), lambda: recover(model, wrong), lambda: recover(model, images(NAMES), test_set=wrong)):
        with pytest.raises(VitpruneError, match='with the class zebra; allowed: the classes that the model tells apart, elk among them'): call()
    assert evaluate(model, wrong.but(classes=NAMES))['images'] == 10
    model.classes = None
    assert evaluate(model, wrong)['images'] == 10                   # folders of version 0 have no names


def test_prune_names_classes_where_it_trains_on_them_and_a_new_head_forgets_them(tmp_path):
    from vitprune_nb.methods.base import prune, recover
    ds = images(NAMES, split='train')
    pruned = prune('evit', make(depth=4), ds, keep_rate=.7, finetune_epochs=1)
    assert load_pruned(save_pruned(pruned, tmp_path/'a')).classes == NAMES
    pruned.model.reset_classifier(3)
    with pytest.warns(UserWarning, match='5 class names for a head of 3'): save_pruned(pruned, tmp_path/'b')
    assert load_pruned(tmp_path/'b').classes is None
    pruned = prune('attention', make(depth=4), ds, reduction=.3, calibration=4)     # looks at images of any kind
    assert pruned.classes is None
    recover(pruned, ds)
    assert load_pruned(save_pruned(pruned, tmp_path/'c')).classes == NAMES


@pytest.mark.parametrize('name, options', [('tome', {}), ('evit', dict(finetune_epochs=0)), ('attention', dict(calibration=4))])
def test_images_that_a_method_only_looks_at_do_not_name_the_classes(tmp_path, name, options):
    "A model without names, pruned on pictures of something else, is scored on its own images as before."
    from vitprune_nb.methods.base import prune
    from vitprune_nb.vit.model import evaluate
    model, own = make(depth=4), images(['b', 'a', 'd', 'c', 'e'], 4)
    pruned = prune(name, model, images(list('abcde'), split='train'), reduction=.2, **options)
    assert pruned.classes is None
    assert evaluate(pruned, own)['correct'] == evaluate(pruned, own.but(classes=list('vwxyz')))['correct']
    named = load_pruned(save_pruned(pruned, tmp_path/'a'))
    named.classes = own.classes
    assert evaluate(named, own.but(classes=list('edcba'), targets=[[3, 4, 1, 2, 0][t] for t in own.targets]))['correct'] == evaluate(pruned, own)['correct']


def test_other_class_names_will_do_where_no_labels_are_read(tmp_path):
    "Nor are they remembered; a model that is cut and then pruned keeps the names that it had."
    from vitprune_nb.methods.base import prune
    model, wrong = make(depth=4), images([*NAMES[:4], 'zebra'], split='train')
    model.classes = NAMES
    cut = prune('vtp', model, wrong, ratio=.3, sparse_epochs=0)
    both = prune('attention', cut, wrong, reduction=.3, calibration=4)
    assert cut.classes == both.classes == NAMES
    for m in (model, cut):
        with pytest.raises(VitpruneError, match='with the class zebra; allowed: the classes that the model tells apart, elk among them'):
            prune('evit', m, wrong, keep_rate=.7, finetune_epochs=1)
    assert prune('uniform', model, images(['zebra']), reduction=.3, calibration=2).classes == NAMES


def test_the_command_line_says_which_class_differs(tmp_path, capsys):
    from PIL import Image
    from vitprune_nb.cli import main
    named(tmp_path)
    def tree(root, names):
        for split, c in itertools.product(('train', 'test'), names):
            (root/split/c).mkdir(parents=True)
            for i in range(2): Image.fromarray(np.full((32, 32, 3), 40*i + 9, np.uint8)).save(root/split/c/f'{i}.png')
        return str(root)
    good, bad = tree(tmp_path/'good', NAMES), tree(tmp_path/'bad', [*NAMES[:4], 'zebra'])
    run = lambda *words: (main([*words, '--device', 'cpu']), capsys.readouterr())
    code, said = run('eval', str(tmp_path/'named'), '--data', good)
    assert code == 0, said.err
    code, said = run('eval', str(tmp_path/'named'), '--data', bad)
    assert code == 2 and said.err.count('\n') == 1 and 'zebra' in said.err and '--rename-classes' in said.err
    assert run('eval', str(tmp_path/'named'), '--data', bad, '--rename-classes')[0] == 0
    code, said = run('bench', str(tmp_path/'named'), '--data', bad, '--batch', '2', '--repeats', '2', '--warmup', '1')
    assert code == 0 and 'other classes' in said.err, said.err


# --- files that somebody has changed

def places(value, path=()):
    "Every place in a JSON value."
    yield path
    for k, v in (value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()): yield from places(v, (*path, k))


def put(value, path, new):
    "A copy with another value at a place; `REMOVE` takes it away."
    value = copy.deepcopy(value)
    if not path: return new
    at = functools.reduce(lambda v, k: v[k], path[:-1], value)
    if new is REMOVE: del at[path[-1]]
    else: at[path[-1]] = new
    return value


REMOVE = object()
BAD_VALUES = [REMOVE, None, True, -1, 0, 3, 2**31, 10**12, 10**400, .5, -.5, 1e308, math.nan, math.inf, '', 'x', '../../etc/passwd', 'os.system', '\udfff', 'ß'*5000, [], [[]],
              [1, 2], [-1], ['x'], {}, {'x': 1}, {'kind': 'norm'}, {'kind': 'life', 'dim': 30000}, {'kind': 'random', 'size': 10**9}]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Pruned folders of both formats."
    root = tmp_path_factory.mktemp('folders')
    for f in FIXTURES.iterdir():
        shutil.copytree(f, root/f'0-{f.name}')
        save_pruned(load_pruned(f), root/f'2-{f.name}')
    return root


def load_changed(folder, name, content):
    "None if the changed folder loads and runs, else the refusal; any other exception is a failure of the test."
    file = folder/name
    good = file.read_bytes()
    try:
        file.write_bytes(content)
        model = load_pruned(folder)
        with torch.no_grad(): model(pixels(model, 2))
    except VitpruneError as e: return str(e)
    finally: file.write_bytes(good)


def changes(folder, name):
    value = json.loads((folder/name).read_text())
    return [(name, p, i) for p in places(value) for i in range(len(BAD_VALUES)) if p or BAD_VALUES[i] is not REMOVE]


def test_every_change_to_a_json_file_loads_or_is_refused_in_a_sentence(folders):
    g = np.random.default_rng(23)
    every = [(f, *c) for f in sorted(folders.iterdir()) for n in ('config.json', 'plan.json') if (f/n).is_file() for c in changes(f, n)]
    refused = 0
    for k in g.permutation(len(every))[:int(os.environ.get('VITPRUNE_FUZZ', 600))]:
        folder, name, path, i = every[k]
        content = json.dumps(put(json.loads((folder/name).read_text()), path, BAD_VALUES[i]))
        why = load_changed(folder, name, content.encode())
        refused += why is not None
        if why is not None: assert '\n' not in why and len(why) < 1500, (folder.name, name, path, BAD_VALUES[i], why)
    assert refused > 200


@pytest.mark.parametrize('content', [b'', b'{', b'\xff\xfe{}', b'[]', b'null', b'"x"', b'{"a":' * 5000, b'[' * 10**5, b'\x00', b'{} {}', 'é'.encode('latin-1'), b'{"model": NaN}'])
@pytest.mark.parametrize('name', ['config.json', 'plan.json'])
def test_what_is_no_json_is_refused(folders, name, content):
    why = load_changed(folders/'2-slim', name, content)
    assert why and '\n' not in why and str(folders/'2-slim') in why


@pytest.mark.parametrize('name', ['0-slim', '0-both', '2-life', '2-sliced'])
def test_changed_folders_cost_one_line(folders, name, capsys):
    from vitprune_nb.cli import main
    file, g = folders/name/'config.json', np.random.default_rng(1)
    good, every = file.read_bytes(), changes(folders/name, 'config.json')
    try:
        for k in g.permutation(len(every))[:12]:
            _, path, i = every[k]
            file.write_text(json.dumps(put(json.loads(good), path, BAD_VALUES[i])))
            code, said = main(['cost', str(folders/name)]), capsys.readouterr()
            assert code == 0 or code == 2 and said.err.count('\n') == 1 and said.err.startswith('vitprune: '), (path, BAD_VALUES[i], said.err)
    finally: file.write_bytes(good)


def test_nothing_in_a_folder_names_a_file_outside(folders, tmp_path):
    shutil.copytree(folders/'2-slim', tmp_path/'m')
    outside = tmp_path/'outside.safetensors'
    save_file({'head.bias': torch.zeros(5)}, outside)
    for key in ('weights', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained', 'cache_dir', 'embed_layer', 'block_fn', 'device'):
        for f in ('2-slim', '0-slim'):
            config = json.loads((folders/f/'config.json').read_text())
            config['kwargs'][key] = str(outside)
            assert load_changed(folders/f, 'config.json', json.dumps(config).encode()), key
    import hashlib
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    plan = json.loads((tmp_path/'m/plan.json').read_text())
    for file in ('../outside.safetensors', str(outside), '..\\outside.safetensors', '.', '..', 'config.json'):
        plan['weights'] = dict(file=file, sha256=digest)
        assert 'weights.file' in load_changed(tmp_path/'m', 'plan.json', json.dumps(plan).encode())
    shutil.copy(outside, tmp_path/'m/beside.safetensors')
    plan['weights'] = dict(file='beside.safetensors', sha256=digest)
    (tmp_path/'m/plan.json').write_text(json.dumps(plan))
    assert list(load_pruned(tmp_path/'m').plan.weights) == ['head.bias']


def test_a_config_for_a_larger_model_is_refused_before_memory_is_asked_for(folders):
    for key, value in (('embed_dim', 2**20), ('depth', 1000), ('num_classes', 2**20), ('img_size', [2**20, 2**20]), ('mlp_ratio', 1e5)):
        config = json.loads((folders/'2-life/config.json').read_text())
        config['kwargs'][key] = value
        if key == 'img_size': config['data']['input_size'] = [3, *value]
        if key == 'depth': config['drop_path'] = [[0., 0.]]*1000
        assert load_changed(folders/'2-life', 'config.json', json.dumps(config).encode()), key


def test_the_right_file_of_weights(folders, tmp_path):
    shutil.copytree(folders/'2-sliced', tmp_path/'m')
    file = tmp_path/'m/model.safetensors'
    state = load_file(file)
    first = 'head.weight'
    for new in {'short': {k: v for k, v in state.items() if k != first}, 'long': dict(state, more=torch.zeros(1)), 'shape': dict(state, **{first: torch.zeros(3)}),
                      'kind': dict(state, **{first: state[first].long()})}.values():
        save_file(new, file)
        with pytest.raises(VitpruneError, match='weights that fit its config.json'): load_pruned(tmp_path/'m')
    file.unlink()
    with pytest.raises(VitpruneError, match='a pruned model, with model.safetensors in it'): load_pruned(tmp_path/'m')


def test_tokens_and_channels_cut_together(tmp_path):
    "A plan around cut channels: its positions are constants that no file holds."
    from vitprune_nb.engine.channels import prunable_layers
    from vitprune_nb.engine.plan import ramp_plan
    m = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    scores = {n: torch.rand(l.in_features, generator=torch.Generator().manual_seed(0)) for n, l in prunable_layers(m).items()}
    both = ramp_plan(m, .3).slim(slice_model(m, choose(scores, .4, 3))).eval()
    back, x = load_pruned(save_pruned(both, tmp_path/'both')), torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(back(x), both(x))
    assert not any(v.is_meta for v in back.buffers())
