"""What a pruned folder gives back: the same logits, or a refusal."""
import copy, functools, itertools, json, math, os, shutil
from pathlib import Path

import numpy as np, pytest, timm, torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from timm.layers import DropPath, LayerNorm, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune_nb.channels import add_gates, choose, importance
from vitprune_nb.core import VitpruneError
from vitprune_nb.engine import SlimViT
from vitprune_nb.methods import cost_of, load_pruned, save_pruned
from vitprune_nb.plan import Plan, model_name, ramp_plan
from vitprune_nb.policy import NormScore, Policy, RandomScore, Step
from vitprune_nb.store import load_slim
from vitprune_nb.surgery import slice_model

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
REFUSED = {'18x2', 'no'}


@pytest.mark.parametrize('kind', PRUNED)
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_vit_comes_back_or_is_refused_at_saving(variant, kind, tmp_path):
    try: pruned = PRUNED[kind](make(**VARIANTS[variant]))
    except VitpruneError: pytest.skip('not a model that can be pruned in this way')
    comes_back(pruned, tmp_path/'m')
