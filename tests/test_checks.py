"""An exercise's check passes a right answer, and neither the untouched stub nor an answer that looks right and is not."""
import ast, copy, itertools, math, sys

import pytest
import torch
from conftest import ROOT
from fastcore.test import test_close as close, test_eq as eq, test_fail as fail

from vitprune_nb.engine.channels import ChannelPlan, choose
from vitprune_nb.engine.policy import Policy, Step
from vitprune_nb.methods import vtp
from vitprune_nb.methods.significance import coherent_scores
from vitprune_nb.papers.bound import spearman
from vitprune_nb.vit.model import create_vit

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import notebooks, read_cells

LESSONS = {p.stem: p for p in notebooks() if p.parent.name != 'solutions'}


def defined(path, name):
    "The source of a function or value that a notebook defines; the last one of that name."
    found = []
    for kind, source in read_cells(path):
        if kind != 'code' or source.lstrip().startswith('%'): continue
        for node in ast.parse(source).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if getattr(node, 'name', getattr(target, 'id', None)) != name: continue
            first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
            found.append('\n'.join(source.splitlines()[first - 1:node.end_lineno]))
    assert found, f'{path.name} does not define {name}'
    return found[-1]


def gated_model():
    torch.manual_seed(0)
    model = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn_like(p))
        vtp.add_gates(model)
        for g in vtp.gates(model).values(): g.copy_(torch.randn(len(g)))
    return model


def names(lesson):
    "What the checks of a lesson find in its notebook, as small as it may be."
    have = dict(torch=torch, math=math, copy=copy, itertools=itertools, test_eq=eq, test_close=close, test_fail=fail)
    if lesson == '10_significance':
        have |= dict(spearman=spearman, coherent_scores=coherent_scores)
        exec(defined(LESSONS[lesson], 'random_case'), have)
    if lesson == '12_channels':
        gated = gated_model()
        have |= dict(gated=gated, x=torch.randn(4, 3, 32, 32), scores=vtp.importance(gated), importance=vtp.importance, choose=choose,
                     gates=vtp.gates, prunable_layers=vtp.prunable_layers, ChannelPlan=ChannelPlan)
    if lesson == '04b_policy': have |= dict(Policy=Policy, Step=Step)
    return have


def mean_of_heads(right, have): return lambda attn: right(attn).mean(1, keepdim=True).expand(-1, attn[0].shape[1])
def by_columns(right, have): return lambda attn: right([P.mT for P in attn])
def pearson(right, have): return lambda a, b: torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a[:-1, 1:], b[:-1, 1:])])
def sign(right, have): return lambda a, b: right(a, b).sign()
def with_cls(right, have): return lambda a, b: spearman(a[:-1], b[:-1])
def norm_first(right, have): return lambda attn, tokens, masks, t: right(attn, [z*2 for z in tokens], masks, t)
def globally(right, have): return lambda scores, ratio: choose(scores, ratio, 1)
def smallest(right, have): return lambda scores, ratio: right({n: -s for n, s in scores.items()}, ratio)
def nothing(right, have): return lambda model: {}
def alike(right, have): return lambda model: {n: torch.ones_like(s) for n, s in right(model).items()}
def no_gain(right, have): return lambda model: {n: l.weight.norm(dim=0) for n, l in vtp.prunable_layers(model).items()}
def one_layer(right, have): return lambda model: dict(list(right(model).items())[:1])
def both_stages(right, have): return lambda pairs, reduction: right([dict(p, recovery='none') for p in pairs], reduction)
def told_apart(right, have): return lambda pairs, reduction: {frozenset((p['a'], p['b'])) for p in pairs} - right(pairs, reduction)
def all_budgets(right, have): return lambda pairs, reduction: right([dict(p, reduction=reduction) for p in pairs], reduction)
def the_odds(right, have): return 2.
def minus(right, have): return -right
def idle_for_good(right, have): return right[0], right[1][:1]*6
def no_class_token(right, have): return [(16, 16, 16)]*6, right[1]

ANSWERS = [('02_vit', 'check_undo', 'added', [the_odds, minus]),
           ('04b_policy', 'check_counts', 'counts', [idle_for_good, no_class_token]),
           ('10_significance', 'check_diagonal', 'diagonal_wins', [mean_of_heads, by_columns]),
           ('10_significance', 'check_agreement', 'agreement', [pearson, sign, with_cls]),
           ('10_significance', 'check_brute_coherent', 'brute_coherent', [norm_first]),
           ('12_channels', 'check_local', 'choose_local', [globally, smallest]),
           ('12_channels', 'check_product', 'product_importance', [nothing, alike, no_gain, one_layer]),
           ('30_cifar100', 'check_open', 'stays_open', [both_stages, told_apart, all_budgets])]


@pytest.mark.parametrize('lesson, check, answer, wrong', ANSWERS, ids=[a[1] for a in ANSWERS])
def test_check_passes_the_right_answer_only(lesson, check, answer, wrong):
    have = names(lesson)
    solutions = ROOT/'nbs'/'solutions'/f'{lesson}.ipynb'
    exec(defined(LESSONS[lesson], check), have)
    check = have[check]
    exec(defined(LESSONS[lesson], answer), have)
    with pytest.raises(AssertionError): check(have[answer])     # the stub
    exec(defined(solutions, answer), have)
    right = have[answer]
    check(right)
    for make in wrong:
        with pytest.raises(AssertionError): check(make(right, have))
