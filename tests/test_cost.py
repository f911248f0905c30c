"""The cost model against what it does not share code with: published figures, counters that watch a forward pass, other methods' schedules."""
import json
import math

import ptflops
import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn

from vitprune_nb.vit import cost
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.cost import Widths, block_macs, block_terms, block_widths, cost_table, count_macs, model_macs, model_params, n_tokens, reduction, speed_up
from vitprune_nb.engine.macs import cost_of


def shape(name, **kwargs):
    with torch.device('meta'): return timm.create_model(name, **kwargs).eval()


SMALL, BASE, TINY = (shape(f'deit_{s}_patch16_224') for s in ('small', 'base', 'tiny'))


@pytest.mark.parametrize('name, gmacs, mparams', [
    ('deit_tiny_patch16_224', 1.254, 5.717), ('deit_small_patch16_224', 4.599, 22.051), ('deit_base_patch16_224', 17.564, 86.568),
    ('vit_tiny_patch16_224', 1.254, 5.717), ('vit_small_patch16_224', 4.599, 22.051), ('vit_base_patch16_224', 17.564, 86.568),
    ('vit_base_patch16_384', 55.484, 86.859)])
def test_known_costs(name, gmacs, mparams):
    m = shape(name)
    assert round(model_macs(m)/1e9, 3) == gmacs
    assert round(model_params(m)/1e6, 3) == mparams


@pytest.mark.parametrize('name, gmacs', [('vit_tiny_patch16_384', 4.70), ('vit_small_patch16_384', 15.52), ('vit_base_patch16_384', 55.54),
                                         ('vit_base_patch16_224', 17.58), ('vit_large_patch16_224', 61.60), ('vit_base_patch32_384', 13.06)])
def test_timm_benchmark_file(name, gmacs):   # counted with norms and softmax, before the fused kernel
    assert model_macs(shape(name))/1e9 == pytest.approx(gmacs, rel=.005)


@pytest.mark.parametrize('name, gmacs', [('resnet152', 11.5), ('regnety_160', 15.9), ('vit_base_patch16_224', 17.6)])
def test_counter_gives_published_costs_of_other_networks(name, gmacs):
    assert round(count_macs(shape(name), torch.zeros(1, 3, 224, 224, device='meta'))/1e9, 1) == gmacs


@pytest.mark.parametrize('name, kwargs', [
    ('deit_tiny_patch16_224', {}), ('deit_small_distilled_patch16_224', {}), ('vit_small_patch14_reg4_dinov2', dict(img_size=224)),
    ('vit_tiny_patch16_224', dict(img_size=(96, 160), num_classes=0)), ('vit_small_patch16_224', dict(global_pool='avg', class_token=False)),
    ('deit_small_patch16_224', dict(img_size=32, patch_size=4, init_values=1e-5, num_classes=10)), ('vit_base_patch16_224', dict(qk_norm=True, depth=3)),
    ('vit_tiny_patch16_224', dict(mlp_ratio=2.5, in_chans=1)), ('test_vit', {}), ('vit_giant_patch14_clip_224', {})])
def test_formula_is_what_a_forward_pass_does(name, kwargs):
    m = shape(name, **kwargs)
    if kwargs.get('in_chans') == 1: assert model_macs(m) == count_macs(m, torch.zeros(1, 1, 224, 224, device='meta'))
    else: assert model_macs(m) == count_macs(m)
    assert cost_table(m).params.iloc[-1] == sum(p.numel() for p in m.parameters()) == cost_table(m).params[:-1].sum()


@pytest.mark.parametrize('fused', [True, False])
def test_counter_does_not_depend_on_the_attention_kernel(fused):
    was = use_fused_attn()
    set_fused_attn(fused)
    try: m = shape('deit_tiny_patch16_224')
    finally: set_fused_attn(was)
    assert count_macs(m) == model_macs(m)


def test_ptflops_agrees_on_unfused_attention():
    was = use_fused_attn()
    set_fused_attn(False)
    try: m = timm.create_model('deit_tiny_patch16_224').eval()
    finally: set_fused_attn(was)
    macs, params = ptflops.get_model_complexity_info(m, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend='aten')
    assert macs == pytest.approx(model_macs(m), rel=.005)   # it also counts norms and softmax
    assert params == model_params(m)


@pytest.mark.parametrize('nq, nkv, nmlp', [(5, 5, 5), (3, 5, 3), (5, 5, 2), (1, 5, 1), (2, 4, 3)])
def test_block_against_counted_einsums(nq, nkv, nmlp, D=8, H=2, M=20):
    "A block written with einsum and counted by PyTorch; shares nothing with timm or with the formula."
    from torch.utils.flop_counter import FlopCounterMode
    x = torch.randn(5, D)
    wq, wk, wv = (torch.randn(D, H, D//H) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        q = torch.einsum('nd,dhe->hne', x[:nq], wq)
        k, v = (torch.einsum('nd,dhe->hne', x[:nkv], w) for w in (wk, wv))
        o = torch.einsum('hnm,hme->nhe', torch.einsum('hne,hme->hnm', q, k).softmax(-1), v)
        torch.einsum('nhe,hed->nd', o, torch.randn(H, D//H, D))
        (x[:nmlp] @ torch.randn(D, M)) @ torch.randn(M, D)
    assert counter.get_total_flops() == 2*block_macs(nq, nkv, nmlp, D, M)


def evit(rho, fuse):
    n, counts = 197, []
    for i in range(12):
        left = 1 + math.ceil(rho*(n - 1)) + fuse if i in (3, 6, 9) else n
        counts.append((n, n, left)); n = left
    return counts


def tome(r):
    n, counts = 197, []
    for _ in range(12):
        left = n - min(r, (n - 1)//2)
        counts.append((n, n, left)); n = left
    return counts


def life(rho):
    return [(1 + int(196*rho**sum(i > b for b in (3, 6, 9))),)*3 for i in range(12)]


@pytest.mark.parametrize('model, counts, extra, gmacs', [
    *((SMALL, evit(r, True), 0, g) for r, g in ((.9, 4.022), (.8, 3.477), (.7, 3.029), (.6, 2.635), (.5, 2.309))),
    *((SMALL, evit(r, False), 0, g) for r, g in ((.9, 3.988), (.8, 3.444), (.7, 2.997), (.6, 2.608), (.5, 2.282))),
    (BASE, evit(.7, True), 0, 11.610), *((SMALL, tome(r), 0, g) for r, g in ((8, 3.416), (13, 2.703), (16, 2.291))),
    *((BASE, tome(r), 0, g) for r, g in ((8, 13.104), (13, 10.367), (16, 8.772))), (TINY, tome(13), 0, .731),
    *((SMALL, life(r), 2*197*384**2, g) for r, g in ((.9, 4.081), (.8, 3.599), (.7, 3.191))),
    (BASE, life(.7), 2*197*768**2, 12.262), (TINY, life(.7), 2*197*192**2, .860)])
def test_schedules_of_other_methods(model, counts, extra, gmacs):
    assert round(model_macs(model, counts, extra)/1e9, 3) == gmacs


@pytest.mark.parametrize('eta, percent', [(.5, 42.3), (.75, 63.5)])
def test_patch_slimming_saving_of_a_layer(eta, percent):
    k = 197*(1 - eta)
    assert round(100*reduction(block_macs(k, 197, k, 384, 1536), block_macs(197, 197, 197, 384, 1536)), 1) == percent


def test_cls_only_in_the_last_block():
    saved = model_macs(SMALL) - model_macs(SMALL, [(197, 197, 197)]*11 + [(1, 197, 1)])
    assert round(saved/1e9, 3) == .319
    assert round(100*saved/block_macs(197, 197, 197, 384, 1536), 1) == 84.2


@pytest.mark.parametrize('place', range(3))
def test_macs_rise_with_each_count(place):
    def at(n): return block_macs(*(n if i == place else 50 for i in range(3)), 384, 1536)
    assert at(10) < at(20) < at(20.5) < at(50)


def cut_block(qkv, proj, fc1, fc2, heads, head_dim):
    b = shape('deit_tiny_patch16_224', depth=1).blocks[0]
    b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2 = (torch.nn.Linear(*io) for io in (qkv, proj, fc1, fc2))
    b.attn.num_heads, b.attn.head_dim = heads, head_dim
    return b


@pytest.mark.parametrize('linears, heads, widths', [
    (((192, 576), (192, 192), (192, 768), (768, 192)), (3, 64), (192, 192, 192, 192, 192, 192, 768, 768)),
    (((192, 384), (128, 192), (192, 768), (768, 192)), (2, 64), (192, 128, 128, 128, 192, 192, 768, 768)),   # a head less
    (((192, 576), (150, 192), (192, 768), (768, 192)), (3, 64), (192, 192, 192, 150, 192, 192, 768, 768)),   # V computed, then gathered
    (((192, 534), (150, 192), (192, 768), (768, 192)), (3, 64), (192, 192, 150, 150, 192, 192, 768, 768)),   # V not even computed
    (((100, 576), (192, 192), (90, 300), (300, 192)), (3, 64), (100, 192, 192, 192, 192, 90, 300, 300))])    # gated inputs
def test_widths_of_cut_blocks(linears, heads, widths):
    b = cut_block(*linears, *heads)
    w = block_widths(b)
    assert w == Widths(*widths)
    rows, weights = block_terms(1, 1, 1, w), sum(l.weight.numel() for l in (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2))
    assert sum(rows.values()) - rows['QKᵀ and AV'] == weights   # one token passes each weight once


def test_table_sums_to_the_total_for_pruned_counts():
    counts = [(197 - 10*i, 197, 197 - 10*i) for i in range(12)]
    for by in ('part', 'block'):
        t = cost_table(SMALL, counts, extra=1000, by=by)
        assert t.macs[:-1].sum() == t.macs.iloc[-1] == model_macs(SMALL, counts, 1000)
        assert t.share[:-1].sum() == pytest.approx(1)
        assert list(t.columns) == ['part', 'tokens', 'macs', 'share', 'params']


@pytest.mark.parametrize('at, fate', [('before', 'remove'), ('queries', 'remove'), ('queries', 'idle'), ('middle', 'remove')])
def test_a_slim_vit_does_what_its_counts_say(at, fate):
    from vitprune_nb.engine.slim import SlimViT
    from vitprune_nb.engine.policy import Policy, Step
    vit = timm.create_model('test_vit', num_classes=7).eval()
    slim = SlimViT(vit, Policy({2: Step(at=at, fate=fate, keep=tuple(range(0, 100, 3)))}))
    counts = slim.policy.counts(len(vit.blocks), n_tokens(vit), vit.num_prefix_tokens)
    assert count_macs(slim) == model_macs(slim, counts) == model_macs(vit, counts) < model_macs(slim)
    assert model_macs(slim) == model_macs(vit) == count_macs(vit)
    assert n_tokens(slim) == n_tokens(vit) == 101


def test_counting_leaves_no_trace():
    m = timm.create_model('test_vit').train()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    count_macs(m)
    assert m.training and all(p.requires_grad for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


@pytest.mark.parametrize('counts, words', [
    ([(197, 197, 197)]*11, 'counts: got 11 entries; allowed: 12'), ([(197, 197, 197)]*13, 'counts: got 13 entries'),
    ([(197, 197, 197)]*11 + [(-1, 197, 1)], r'counts\[11\]: got \(-1, 197, 1\)'), ([(198, 198, 198)]*12, 'each from 0 to 197'),
    ([(1, 0, 1)]*12, 'nkv of at least 1'), ([(1, 2)]*12, r'counts\[0\]: got \(1, 2\)'), ([197]*12, r'counts\[0\]: got \(197,\)'),
    ([('a', 1, 1)]*12, r"counts\[0\]: got \('a', 1, 1\)"), ([(math.nan, 1, 1)]*12, r'counts\[0\]: got \(nan, 1, 1\)')])
def test_bad_counts_are_refused(counts, words):
    with pytest.raises(VitpruneError, match=words): model_macs(SMALL, counts)


@pytest.mark.parametrize('name, words', [('resnet18', 'ResNet'), ('swin_tiny_patch4_window7_224', 'SwinTransformer'), ('mixer_b16_224', 'MlpMixer'),
                                         ('vit_base_r50_s16_224', 'HybridEmbed'), ('vit_base_patch16_siglip_224', 'pools by attention'),
                                         ('vit_small_patch16_18x2_224', 'ParallelThingsBlock'), ('vit_giant_patch14_reg4_dinov2', None)])
def test_other_networks_are_refused_by_name(name, words):
    m = shape(name)
    if words is None: assert model_macs(m) == count_macs(m)   # SwiGLU, packed into fc1
    else:
        with pytest.raises(VitpruneError, match=words): model_macs(m)


@pytest.mark.parametrize('new, old', [(1, 0), (1, -1), (-1, 1)])
def test_impossible_ratios_are_refused(new, old):
    with pytest.raises(VitpruneError): reduction(new, old)
    with pytest.raises(VitpruneError): speed_up(new, old)


@pytest.mark.parametrize('new, old', [(3.2, 4.6), (1, 2), (5, 4)])
def test_reduction_and_speed_up_say_the_same(new, old):
    assert speed_up(new, old) == pytest.approx(1/(1 - reduction(new, old)))


# --- formula or forward pass: which, and that either is right

VITS = [('vit_tiny_patch16_224', {}), ('vit_base_patch32_224', {}), ('deit_tiny_distilled_patch16_224', {}), ('deit3_small_patch16_224', {}), ('flexivit_small', {}),
        ('vit_small_patch14_dinov2', {}), ('vit_small_patch14_reg4_dinov2', {}), ('vit_little_patch16_reg4_gap_256', {}), ('vit_wee_patch16_reg1_gap_256', {}),
        ('vit_medium_patch16_gap_240', {}), ('vit_small_patch8_224', dict(img_size=64)), ('test_vit', {}), ('test_vit2', {}), ('vit_tiny_patch16_384', {}),
        ('vit_betwixt_patch16_reg1_gap_256', {}), ('vit_giant_patch14_reg4_dinov2', dict(depth=2)), ('vit_base_patch16_clip_224', {}),
        ('vit_tiny_patch16_224', dict(img_size=(48, 96), dynamic_img_size=True)), ('vit_tiny_patch16_224', dict(img_size=64, dynamic_img_pad=True)),
        ('vit_tiny_patch16_224', dict(in_chans=1, img_size=64, class_token=False, global_pool='avg')), ('vit_tiny_patch16_224', dict(img_size=64, num_classes=0)),
        ('vit_tiny_patch16_224', dict(img_size=64, qk_norm=True, scale_mlp_norm=True, scale_attn_norm=True))]
OTHERS = ['cait_xxs24_224', 'vit_relpos_small_patch16_224', 'vit_relpos_medium_patch16_cls_224', 'vit_srelpos_small_patch16_224', 'beit_base_patch16_224', 'eva02_tiny_patch14_224',
          'vit_base_patch16_siglip_224', 'test_vit3', 'vit_small_patch16_18x2_224', 'vit_small_r26_s32_224', 'vitamin_small_224', 'swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256',
          'mixer_s32_224', 'resmlp_12_224', 'gmlp_ti16_224', 'convnext_atto', 'convnextv2_atto', 'resnet18', 'resnet152', 'regnety_002', 'efficientnet_b0', 'mobilenetv3_small_050',
          'xcit_nano_12_p16_224', 'pit_ti_224', 'levit_128s', 'poolformer_s12', 'convmixer_768_32', 'crossvit_tiny_240', 'coat_lite_tiny', 'twins_pcpvt_small', 'pvt_v2_b0',
          'maxvit_nano_rw_256', 'coatnet_nano_rw_224', 'tnt_s_legacy_patch16_224', 'convit_tiny', 'volo_d1_224', 'mobilevit_xxs', 'edgenext_xx_small', 'efficientformer_l1',
          'fastvit_t8', 'hiera_tiny_224', 'davit_tiny', 'focalnet_tiny_srf', 'nest_tiny', 'vgg11', 'densenet121', 'naflexvit_base_patch16_gap']


REAL = ()   # networks that the 'meta' device cannot run


def watched(model, side=None):
    "MACs by PyTorch's counter, with nothing of ours but the size of the image."
    x = torch.zeros(1, *(side or cost._input_size(model)), device=next(model.parameters()).device)
    model.requires_grad_(False)
    with cost.flop_counter() as counter: model(x)
    return counter.get_total_flops()/2


@pytest.mark.parametrize('name, kwargs', VITS)
def test_formulas_are_used_where_they_are_right(name, kwargs):
    if not timm.is_model(name): pytest.skip(f'timm {timm.__version__} has no {name}')
    m = shape(name, **kwargs)
    found = cost_of(m)
    assert (found['counted'], found['reduction']) == ('by formula', 0)
    assert found['macs'] == pytest.approx(watched(m), rel=1e-3)


@pytest.mark.parametrize('name', OTHERS)
def test_everything_else_is_counted(name):
    if not timm.is_model(name): pytest.skip(f'timm {timm.__version__} has no {name}')
    m = timm.create_model(name).eval() if name in REAL else shape(name)
    found, table = cost_of(m), cost.count_table(m)
    assert (found['counted'], found['reduction'], found['params']) == ('by a forward pass', 0, model_params(m))
    assert found['macs'] == pytest.approx(watched(m), rel=1e-3)
    assert table.macs[:-1].sum() == table.macs.iloc[-1] == found['macs'] and table.params[:-1].sum() == found['params']
    with pytest.raises(VitpruneError, match='counts what a forward pass does'): model_macs(m)


def test_too_little_memory_is_no_fault_of_the_network():
    class Large(torch.nn.Linear):
        def forward(self, x): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    large = Large(3, 3)
    with pytest.raises(RuntimeError, match="can't allocate memory"): count_macs(large, torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="can't allocate memory"): cost.count_table(large)


def adapted(where):
    m = timm.create_model('test_vit', num_classes=7).eval()
    D = m.embed_dim
    if where == 'head': m.head = torch.nn.Sequential(torch.nn.Linear(D, 300), torch.nn.GELU(), torch.nn.Linear(300, 7))
    if where == 'adapter': m.blocks[1].ls1 = torch.nn.Linear(D, D)
    if where == 'low rank': m.blocks[2].attn.qkv.register_parameter('lora', torch.nn.Parameter(torch.zeros(4, D)))
    if where == 'norm': m.norm = torch.nn.Linear(D, D)
    if where == 'overlap': m.patch_embed.proj = torch.nn.Conv2d(3, D, 32, 16, padding=8)
    if where == 'subclass':
        class Twice(type(m)):
            def forward_features(self, x, **kw): return super().forward_features(x, **kw) + super().forward_features(x.flip(-1), **kw)
        m.__class__ = Twice
    return m


@pytest.mark.parametrize('where', ['head', 'adapter', 'low rank', 'norm', 'overlap', 'subclass'])
def test_a_vit_with_parts_of_its_own_is_counted(where):
    m = adapted(where)
    found = cost_of(m)
    assert found['counted'] == 'by a forward pass' and found['macs'] == watched(m)


@pytest.mark.parametrize('size, patch', [(72, 16), ((40, 64), 16), (30, 8)])
def test_padded_images_are_counted_as_they_are_computed(size, patch):
    m = timm.create_model('vit_tiny_patch16_224', img_size=size, patch_size=patch, depth=2, dynamic_img_pad=True, dynamic_img_size=True).eval()
    assert cost.not_by_formula(m) == 'whose images are padded'
    assert cost_of(m)['macs'] == watched(m)


@pytest.mark.parametrize('where', ['head', 'adapter'])
def test_a_pruned_model_around_such_a_vit(where):
    from vitprune_nb.engine.slim import NormScore, Policy, SlimViT, Step
    m = adapted(where)
    for policy in (Policy({2: Step(keep=range(0, 100, 3))}), Policy({1: Step('middle', 'fuse', score=NormScore(), count=20)})):
        slim = SlimViT(m, policy)
        found = cost_of(slim)
        assert found['counted'] == 'by a forward pass' and found['macs'] == watched(slim) and found['reduction'] == 1 - watched(slim)/watched(m)
    ragged = SlimViT(m, Policy({1: Step(score=NormScore(), threshold=6.)}), 'packed')
    images = torch.randn(3, 3, *m.patch_embed.img_size)
    with pytest.raises(VitpruneError, match='images: got None; allowed: images to count on'): cost_of(ragged)
    assert cost_of(ragged, images)['macs'] == round(count_macs(ragged, images)/3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_number_formats_cost_the_same(dtype):
    m = timm.create_model('resnet10t', num_classes=5).eval()
    assert cost_of(m.to(dtype))['macs'] == cost_of(m.float())['macs']


def test_grey_networks_without_a_config():
    m = timm.create_model('resnet10t', in_chans=1, num_classes=5).eval()
    del m.pretrained_cfg
    assert cost_of(m)['macs'] == watched(m, (1, 224, 224))


def test_a_network_that_takes_no_image_is_refused():
    with pytest.raises(VitpruneError, match='model: got Linear; allowed: a network that takes an image of shape'): cost_of(torch.nn.Linear(3, 4))


@pytest.mark.parametrize('name, gmacs, counted', [('resnet152', 11.5, True), ('regnety_002', .2, True), ('cait_xxs24_224', 2.5, True), ('vit_tiny_patch16_224', 1.3, False)])   # as published
@pytest.mark.parametrize('by', ['part', 'block'])
def test_the_command_line_counts_any_network_and_says_so(name, gmacs, counted, by, capsys):
    from vitprune_nb.cli import main
    assert main(['cost', name, '--by', by, '--json']) == 0
    *_, line, said = capsys.readouterr().out.splitlines()
    said = json.loads(said)
    assert round(said['macs']/1e9, 1) == gmacs and f'{said["macs"]/1e9:.3f} G MACs' in line
    assert line.endswith('counted by a forward pass') == counted == (said['counted'] == 'by a forward pass')
