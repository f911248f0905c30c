"""An exercise's check passes the worked answer, and neither the untouched stub nor answers that look right and are not.

A new check gets an entry in WRONG: the lesson, the call as the lesson makes it, and wrong answers as Python text.
In it, `right` is the worked answer, and all names of the worked solutions are there; a class or a function is called `wrong`.
"""
import ast, builtins, copy, functools, re, sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tests'))
from notebooks import names, needed, notebooks, read_cells, run_cells, runnable
from vitprune_nb.errors import VitpruneError

LESSONS = {p.stem: p for p in notebooks() if p.parent.name != 'solutions'}
WORKED = {name: ROOT/'nbs'/'solutions'/f'{name}.ipynb' for name in LESSONS}
REFUSED = (AssertionError, VitpruneError)
WRONG = {}


def case(lesson, call, *wrong): WRONG[lesson, call] = wrong


def answers(call):
    "The names that a call of a check is given."
    tree = ast.parse(call, mode='eval').body
    return [n.id for a in tree.args for n in ast.walk(a) if isinstance(n, ast.Name)]


@functools.lru_cache(maxsize=1)
def worked(lesson):
    "The worked solutions of a lesson, as far as its checks and answers need them."
    wanted = {n for name, call in WRONG if name == lesson for n in (*answers(call), call.partition('(')[0])}
    with torch.random.fork_rng(devices=[]): return run_cells(needed(runnable(WORKED[lesson]), wanted), dict(__name__='worked'))


def exercises(lesson):
    "The cells of a lesson's exercises: (all of its text, its code cells)."
    cells = read_cells(LESSONS[lesson])
    start = next((i for i, (kind, s) in enumerate(cells) if kind == 'markdown' and re.search('^## Exercises', s, re.M)), len(cells))
    text = '\n\n'.join(s for kind, s in cells[start:] if kind == 'markdown')
    return text[text.find('## Exercises'):], [s for kind, s in cells[start:] if kind == 'code']


def stub(lesson, wanted):
    "What the lesson holds in place of these answers: the statements that define them."
    found = []
    for source in exercises(lesson)[1]:
        for node in ast.parse(source).body:
            targets = [n.id for t in getattr(node, 'targets', []) for n in ast.walk(t) if isinstance(n, ast.Name)]
            if {getattr(node, 'name', None), *targets} & set(wanted):
                first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
                found.append('\n'.join(source.splitlines()[first - 1:node.end_lineno]))
    assert found, f'{lesson}: no stub of {" and ".join(wanted)}'
    return found


def made(text, have, right):
    "A wrong answer."
    here = dict(have, right=right, functools=functools, copy=copy, re=re, torch=torch)
    if not text.startswith(('class ', 'def ', '@')): return eval(text, here)
    exec(text, here)
    return here['wrong']


### the answers

# foundations

case('02_vit', 'check_undo(added)', '2.', '-right')                                   # the odds instead of their logarithm
case('02_vit', 'check_rollout(rollout)',
     'lambda maps: right(maps[::-1])',                                                # the first block on the left
     'lambda maps: right([2*P - torch.eye(P.shape[-1]) for P in maps])',              # no shortcut
     'lambda maps: right([P[:, :1] for P in maps])',                                  # the first head alone
     'lambda maps: torch.stack([right([P[:, h:h + 1] for P in maps]) for h in range(maps[0].shape[1])]).mean(0)',     # each head by itself
     'lambda maps: right(maps).mT')
case('02_vit', 'check_updates(captured_updates)',
     'lambda cap: [((b - a).norm()/a.norm()).expand(1, 2) for a, b in zip(cap.tokens, cap.tokens[1:])]',      # one number for all tokens
     'lambda cap: [(b - a).norm(dim=-1) for a, b in zip(cap.tokens, cap.tokens[1:])]',    # not relative
     'lambda cap: [(b - a).norm(dim=-1)/b.norm(dim=-1) for a, b in zip(cap.tokens, cap.tokens[1:])]',
     'lambda cap: [(b.norm(dim=-1) - a.norm(dim=-1))/a.norm(dim=-1) for a, b in zip(cap.tokens, cap.tokens[1:])]',
     'lambda cap: [(b - a).norm(dim=-1)/cap.tokens[0].norm(dim=-1) for a, b in zip(cap.tokens, cap.tokens[1:])]')     # of the first token

case('03_cost', 'check_crossover(crossover)', 'lambda dim, mlp_dim: 4*dim + 2*mlp_dim', 'lambda dim, mlp_dim: 6*dim',
     'lambda dim, mlp_dim: 0')                                                        # the other root
case('03_cost', 'check_life(life_counts)',
     'lambda rho: right(rho, late=False)',                                            # a block early
     'lambda rho: [(n - 1,)*3 for n, *_ in right(rho)]',                              # without CLS
     'lambda rho: [(1 + round(n*196),)*3 for n in [1.]*4 + [rho]*3 + [rho**2]*3 + [rho**3]*2]')   # not rounded down
case('03_cost', 'check_tome(tome_counts)',
     'lambda r: [(left, left, left) for _, _, left in right(r)]',                     # merged before attention
     'lambda r: [(197 - r*i, 197 - r*i, 197 - r*(i + 1)) for i in range(12)]',        # more than half of them
     '''def wrong(r, n=197):                                                          # half of all tokens, CLS among them
    return [(m := n, m, n := n - min(r, n//2)) for _ in range(12)]''')

case('04_redundancy', 'check_expected(one_pair, half_alike)',
     '(2/64, .5)',                                                                    # shares of patches, not of pairs
     '(1/4032, 496/4032)', '(66/4096, 1056/4096)',                                    # each pair once; each patch with itself
     '(0., 992/4032)', '(2/4032, 1024/4032)')
case('04_redundancy', 'check_centred(centred_similarity)',
     'lambda tokens: patch_similarity(tokens - tokens.mean((0, 1)))',                 # the mean of all images
     'lambda tokens: patch_similarity(tokens - tokens.mean(-1, keepdim=True))',       # of the features
     'lambda tokens: torch.full((len(tokens),), -1/(tokens.shape[1] - 1))',           # the smallest possible, whatever the tokens
     '''def wrong(tokens):                                                            # to unit length first
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    return patch_similarity(unit - unit.mean(1, keepdim=True))''')
case('04_redundancy', 'check_skippable(skippable)',
     'lambda a, b, t, g: ((1 + adjacent_similarity(a, b))/2 > t) & ((norm_growth(a, b) - 1).abs() < g - 1)',  # shrunk is not measured as grown is
     'lambda a, b, t, g: (1 + adjacent_similarity(a, b))/2 > t',                      # no look at the length
     'lambda a, b, t, g: right(a, b, t, 1e9) & (norm_growth(a, b) < g)',              # a shrunken token passes
     'lambda a, b, t, g: right(a, b, (1 + t)/2, g)')                                  # the cosine as it is

case('04b_policy', 'check_counts(counts)',
     'right[0], right[1][:1]*6',                                                      # idle for good
     '[(16, 16, 16)]*6, right[1]', 'right[::-1]')                                     # no CLS
case('04b_policy', 'check_rate(rate_for)',
     'lambda net, reduction: right(net, reduction) + 1/64',
     'lambda net, reduction: right(net, reduction) - 1/64',
     'lambda net, reduction: 1 - reduction*12/8')                                     # costs fall as the patches do

case('05a_recipe', 'check_noticed(noticed)', 'True')
case('05a_recipe', 'check_compare(compare)',
     'lambda a, b: {k: v[::-1] for k, v in right(a, b).items()}',
     'lambda a, b: {k: v for k, v in right(a, b).items() if k not in recipe_of(a)["kwargs"]}',   # top level only
     'lambda a, b: {k: (v, recipe_of(b)[k]) for k, v in recipe_of(a).items() if v != recipe_of(b)[k]}')

# engine

case('04c_attention', 'check_wasted(wasted)',
     'lambda lens: len(lens)*max(lens)/sum(lens) - 1',                                # of what is needed
     'lambda lens: 1 - min(lens)/max(lens)',
     'lambda lens: (max(lens) - min(lens))/(2*max(lens))', 'lambda lens: 1 - sorted(lens)[len(lens)//2]/max(lens)')
case('04c_attention', 'check_merge(merge_by_hand)',
     'lambda x, keep: merge_tokens(x[None], keep[None], ~keep[None], torch.ones(1, len(x)), 0)[0][0]',    # into CLS as well
     'lambda x, keep: right(F.normalize(x, dim=-1), keep)',
     '''def wrong(x, keep):                                                           # the dot product decides
    best, out = [max((j for j in range(1, len(x)) if keep[j]), key=lambda j: x[i] @ x[j]) for i in range(len(x))], x.clone()
    for j in range(len(x)): out[j] = torch.stack([x[j]] + [x[i] for i in range(len(x)) if not keep[i] and best[i] == j]).mean(0)
    return out''')

case('04d_modes', 'check_same(same)', 'dict(before=True, queries=True)', 'dict(before=False, queries=False)', 'dict(before=False, queries=True)')
case('04d_modes', 'check_one_by_one(one_by_one)',
     'lambda x, blocks, policy: run_blocks(x, blocks, {}).x[:, 0]',                   # nothing removed
     'lambda x, blocks, policy: right(x[:1].expand_as(x), blocks, policy)',
     'lambda x, blocks, policy: torch.cat([run_blocks(v[None], blocks, policy.steps, "packed").x.mean(1) for v in x])',
     'lambda x, blocks, policy: run_blocks(x, blocks, policy.steps, "packed").x[:, 0]',        # all at once
     'lambda x, blocks, policy: run_blocks(x, blocks, policy.steps, "mask").x[:, 0]')

case('04e_fates', 'check_average(Average)',
     '''class wrong(right):                                                           # those that left earlier count again
    def meet(self, s, keep, drop, scores): super().meet(s, keep, ~keep, scores)''',
     '''class wrong(right):                                                           # the sum
    def meet(self, s, keep, drop, scores): s.x = torch.cat([s.x[:, :1] + (drop[..., None]*s.x).sum(1, keepdim=True), s.x[:, 1:]], 1)''',
     '''class wrong(right):                                                           # in place of CLS
    def meet(self, s, keep, drop, scores):
        cls = s.x[:, :1]
        super().meet(s, keep, drop, scores)
        s.x = torch.cat([s.x[:, :1] - cls, s.x[:, 1:]], 1)''',
     '''class wrong(right):                                                           # the mean of those who stay
    def meet(self, s, keep, drop, scores): super().meet(s, keep, keep, scores)''')

case('05_engine', 'check_same(same)', 'dict(token=True, avg=True)', 'dict(token=False, avg=True)', 'dict(token=False, avg=False)')
case('05_engine', 'check_centre(CentreScore())',
     '''class wrong(right):                                                           # a grid of 4×4, whatever comes
    def forward(self, t):
        p = (t.pos - t.n_prefix).clamp_min(0)
        return -((p//4 - 1.5)**2 + (p % 4 - 1.5)**2).float()''',
     '''class wrong(right):                                                           # the grid of those that are left
    def forward(self, t):
        n, p = round((int(t.pos.max()) + 1 - t.n_prefix)**.5), (t.pos - t.n_prefix).clamp_min(0)
        return -((p//n - (n - 1)/2)**2 + (p % n - (n - 1)/2)**2).float()''',
     '''class wrong(right):                                                           # the border wins
    def forward(self, t): return -super().forward(t)''',
     '''class wrong(right):                                                           # the middle of the list
    def forward(self, t): return -(t.pos - t.pos.float().mean(-1, keepdim=True)).abs()''',
     '''class wrong(right):                                                           # the place in the tensor
    def forward(self, t):
        p = torch.arange(16)
        d = torch.cat([torch.zeros(1), -((p//4 - 1.5)**2 + (p % 4 - 1.5)**2)])[:t.pos.shape[1]]
        return d.expand_as(t.pos)''')

case('05b_store', 'check_same_bytes(same_bytes)', 'False')
case('05b_store', 'check_renamed(renamed)',
     '''def wrong(folder, new):                                                       # whatever is given
    file = folder/'config.json'
    file.write_text(re.sub(r'"classes": ?\\[.*?\\]', '"classes": ' + str(list(new)).replace("'", '"'), file.read_text(), flags=re.S))''',
     '''def wrong(folder, new):                                                       # another number is refused too late
    config = read_config(folder)
    (folder/'config.json').write_text(config.model_copy(update=dict(classes=new)).model_dump_json(indent=1))
    assert len(new) == config.kwargs['num_classes']''',
     '''def wrong(folder, new):                                                       # ten of whatever kind
    text = (folder/'config.json').read_text()
    if len(new) < 10: raise ValueError('too few')
    config = __import__('json').loads(text)
    (folder/'config.json').write_text(__import__('json').dumps(dict(config, classes=list(new))))''',
     'lambda folder, new: right(folder, sorted(new, reverse=True))')

case('05c_macs', 'check_all_kept(saved)', '1.', '-.01')                               # the decision would cost something
case('05c_macs', 'check_share(decision_share)',
     'lambda model: (extra_macs(model, counts_of(model)) if counts_of(model) else 0.)/model_macs(getattr(model, "model", model))',    # of the dense
     'lambda model: extra_macs(model, counts_of(model))/macs_of(model) if counts_of(model) else 0.',    # padding too
     'lambda model: right(model)/(1 - right(model))')                                 # of the rest

case('10b_plan', 'check_eta(eta_for)',
     'lambda share, n, d: share/.8465',                                               # true of one ViT
     'lambda share, n, d: share',                                                     # keys and values go, too
     'lambda share, n, d: share*(12*n*d*d + 2*n*n*d)/(2*n*n*d + 10*n*d*d)',           # more than all queries
     'lambda share, n, d: (e := share*(12*n*d*d + 2*n*n*d)/(10*n*d*d)) and (e if e <= 1 else None)')      # no attention product
case('10b_plan', 'check_widen(widen)',
     '''def wrong(plan, extra):                                                       # highest index first
    flip = lambda p: dataclasses.replace(p, keep=[[p.n_patches - 1 - i for i in k] for k in p.keep])
    return flip(right(flip(plan), extra))''',
     '''def wrong(plan, extra):                                                       # from those that it kept before it was widened
    before = [range(plan.n_patches), *plan.keep]
    new = [sorted([*k, *[i for i in b if i not in k][:extra]]) for b, k in zip(before, plan.keep)]
    return dataclasses.replace(plan, keep=[*new[:-1], plan.keep[-1]])''',
     'lambda plan, extra: right(plan, 2*extra)')

case('12b_surgery', 'check_price(price)',
     'lambda w: dict(right(w), **{"attn.proj": w.out})',                              # without the value rows
     'lambda w: dict(right(w), **{"mlp.fc2": w.out})',                                # without those of fc1
     'lambda w: {n: v*17 for n, v in right(w).items()}',                              # for all tokens
     'lambda w: dict(right(w), **{"mlp.fc1": 4*w.out})')                              # whatever the MLP
case('12b_surgery', 'check_even(even_heads)',
     'lambda plan, scores, heads: right(plan, {n: -s for n, s in scores.items()}, heads)',
     'lambda plan, scores, heads: right(plan, scores, 1)',                            # no heads
     '''def wrong(plan, scores, heads):                                               # rounded to the nearest
    keep = dict(plan.keep)
    for n, k in plan.keep.items():
        if not n.endswith('attn.proj'): continue
        s = scores[n].view(heads, -1)
        best = s.topk(max(1, round(len(k)/heads)), dim=1).indices + torch.arange(heads)[:, None]*s.shape[1]
        keep[n] = best.flatten().sort().values.tolist()
    return ChannelPlan(keep, plan.sizes, plan.ratio, plan.threshold)''',
     '''def wrong(plan, scores, heads):                                               # the first of each head
    return right(plan, {n: -torch.arange(len(s)).float() for n, s in scores.items()}, heads)''')

# methods

case('10_significance', 'check_diagonal(diagonal_wins)',
     'lambda attn: right([P[:1] for P in attn])',                                     # the first image
     'lambda attn: right(attn).mean(1, keepdim=True).expand(-1, attn[0].shape[1])',   # the mean of the heads
     'lambda attn: torch.stack([P.diagonal(dim1=-2, dim2=-1).mean((0, 2)) for P in attn])',   # the mean weight on oneself
     'lambda attn: right([P.mT for P in attn])')                                      # columns
case('10_significance', 'check_brute_coherent(brute_coherent)',
     'lambda attn, tokens, masks, t: right(attn, [z*2 for z in tokens], masks, t)',
     '''def wrong(attn, tokens, masks, t):                                            # the norm of each path, then the sum
    total, heads = 0, attn[0].shape[0]
    for path in itertools.product(range(heads), repeat=len(attn) - t):
        one = [P[[h]] for P, h in zip(attn[t:], path)]
        total = total + right(one, tokens[t:], masks[t:], 0)
    return total''')
case('10_significance', 'check_overlap(top_overlap)',
     'lambda a, b, k: right(-a, -b, k)',                                              # the smallest
     'lambda a, b, k: (a.topk(k).indices == b.topk(k).indices).float().mean(-1)',     # in the same order
     'lambda a, b, k: right(a, b, k)*k/a.shape[-1]')                                  # of all
case('10_significance', 'check_set_score(set_score)',
     'lambda attn, tokens, drop, t: (drop.double() @ right(attn, tokens, torch.eye(drop.shape[1], dtype=torch.bool), t).sqrt())**2',   # lengths added
     '''def wrong(attn, tokens, drop, t):                                             # the norm first
    return drop.double() @ right(attn, tokens, torch.eye(drop.shape[1], dtype=torch.bool), t)''',
     'lambda attn, tokens, drop, t: right(attn[:t + 1] + [P*0 for P in attn[t + 1:]], tokens, drop, t)',     # the later blocks forgotten
     'lambda attn, tokens, drop, t: right(attn, [z.square() for z in tokens], drop, t)')

case('11_patch_slimming', 'check_passes(passes)',
     'lambda counts, step: sum(1 + (k - behind)//step for k, behind in zip(counts, [*counts[1:], 0]))',      # rounded down
     'lambda counts, step: right(counts, step) - len(counts)',                        # only those that fail
     'lambda counts, step: sum(1 + math.ceil(k/step) for k in counts)')               # each block from nothing
case('11_patch_slimming', 'check_per_image(per_image_keep)',
     '''def wrong(scores, counts):                                                    # every block by itself
    rank = scores[:, :, 1:].argsort(-1, descending=True).argsort(-1)
    return rank < torch.tensor(counts)[None, :, None]''',
     'lambda scores, counts: right(scores[..., [0, 0, *range(1, scores.shape[-1] - 1)]], counts)',           # CLS takes a place
     'lambda scores, counts: right(scores.mean(0, keepdim=True).expand_as(scores), counts)')                 # the same for all

case('12_channels', 'check_local(choose_local)',
     'lambda scores, ratio: choose(scores, ratio, 1)',                                # one threshold for all
     'lambda scores, ratio: right({n: -s for n, s in scores.items()}, ratio)',        # the smallest
     '''def wrong(scores, ratio):                                                      # rounded down
    many = {n: max(1, len(s) - int(ratio*len(s))) for n, s in scores.items()}
    keep = {n: s.argsort(descending=True)[:many[n]].sort().values.tolist() for n, s in scores.items()}
    return ChannelPlan(keep, {n: len(s) for n, s in scores.items()}, ratio, math.nan)''',
     '''def wrong(scores, ratio):                                                      # rounded up
    many = {n: max(1, len(s) - math.ceil(ratio*len(s))) for n, s in scores.items()}
    keep = {n: s.argsort(descending=True)[:many[n]].sort().values.tolist() for n, s in scores.items()}
    return ChannelPlan(keep, {n: len(s) for n, s in scores.items()}, ratio, math.nan)''',
     '''def wrong(scores, ratio):                                                      # none may stay
    keep = {n: s.argsort(descending=True)[:len(s) - round(ratio*len(s))].sort().values.tolist() for n, s in scores.items()}
    return ChannelPlan(keep, {n: len(s) for n, s in scores.items()}, ratio, math.nan)''')
case('12_channels', 'check_product(product_importance)',
     'lambda model: {}', 'importance',
     'lambda model: {n: torch.ones_like(s) for n, s in right(model).items()}',
     'lambda model: {n: l.weight.norm(dim=0) for n, l in prunable_layers(model).items()}',                   # without the gains of norms
     'lambda model: dict(list(right(model).items())[:1])',
     'lambda model: {n: l.weight.norm(dim=0)*(importance(model)[n]/gates(model)[n].abs() if "qkv" in n else 1) for n, l in prunable_layers(model).items()}',  # the first norm's gain only
     '''def wrong(model):                                                              # gains with their sign
    signs = {'attn.qkv': 'norm1', 'mlp.fc1': 'norm2'}
    gain = lambda n: next((model.get_submodule(n.replace(k, v)).weight.sign() for k, v in signs.items() if n.endswith(k)), 1)
    return {n: s*gain(n) for n, s in right(model).items()}''')

case('13_life', 'check_rate(rate_for)',
     'lambda model, target, stages: 1 - target',                                      # patches for MACs
     'lambda model, target, stages: right(model, 1 - target, stages)',
     'lambda model, target, stages: right(model, target, (4, 7, 10))')                # the usual stages
case('13_life', 'check_agreement(agreement)',
     'lambda lives, counts: right(lives[:1], counts)',                                # the first image
     'lambda lives, counts: right(lives - 1, counts)',                                # a block late
     'lambda lives, counts: right(lives, [n - 1 for n in counts])',                   # CLS counted
     '''def wrong(lives, counts):                                                      # argsort taken for the rank
    rank = lives.argsort(dim=1, descending=True)
    return torch.stack([((lives >= t) == (rank < n)).float().mean() for t, n in enumerate(counts, 1)])''',
     'lambda lives, counts: right(lives - 1e-3, counts)',                             # > for ≥
     'lambda lives, counts: right(lives, counts).mean().expand(len(counts))')
case('13_life', 'check_rank_life(RankLife)',
     '''class wrong(right):                                                           # without the half
    def lives(self, x, n_prefix=1, present=None):
        tau = super().lives(x, n_prefix, present)
        return torch.cat([tau[:, :n_prefix], tau[:, n_prefix:] - .5], 1)''',
     '''class wrong(right):                                                           # the worst patch first
    def lives(self, x, n_prefix=1, present=None):
        tau = LifeScore.lives(self, x, n_prefix, present)
        rank = tau[:, n_prefix:].argsort(dim=1).argsort(1)
        own = torch.tensor([max(t for t, n in enumerate(self.counts, 1) if n > r) for r in range(self.counts[0])])
        return torch.cat([tau[:, :n_prefix], own[rank] + .5], 1)''',
     '''class wrong(right):                                                           # argsort taken for the rank
    def lives(self, x, n_prefix=1, present=None):
        tau = LifeScore.lives(self, x, n_prefix, present)
        rank = tau[:, n_prefix:].argsort(dim=1, descending=True)
        own = torch.tensor([max(t for t, n in enumerate(self.counts, 1) if n > r) for r in range(self.counts[0])])
        return torch.cat([tau[:, :n_prefix], own[rank] + .5], 1)''')

case('14_cosine', 'check_free_last(free_last)',
     'lambda policy, n: Policy({**policy.steps, n - 1: Step("before", "idle", keep=())}, policy.name)',      # keys go as well
     'lambda policy, n: Policy({n - 1: Step("queries", "idle", keep=())}, policy.name)',                     # the other steps are lost
     'lambda policy, n: Policy({**policy.steps, n - 2: Step("queries", "idle", keep=())}, policy.name)',     # a block early
     'lambda policy, n: Policy({**policy.steps, 3: Step("queries", "idle", keep=())}, policy.name)')         # always the fourth
case('14_cosine', 'check_longest_idle(longest_idle)',
     'lambda kept: (~kept).sum(1)',                                                   # all of them together
     'lambda kept: right(~kept)')                                                     # the longest run at work
case('14_cosine', 'check_update_labels(update_labels)',
     'lambda a, b, share: torch.cat([right(a[i:i + 1], b[i:i + 1], share) for i in range(len(a))])',         # image by image
     '''def wrong(a, b, share):                                                       # the length itself
    r = (b - a).norm(dim=-1)
    return r.flatten().argsort(stable=True).argsort().view_as(r) >= round(share*r.numel())''',
     '''def wrong(a, b, share):                                                       # the angle
    r = 1 - F.cosine_similarity(a, b, dim=-1)
    return r.flatten().argsort(stable=True).argsort().view_as(r) >= round(share*r.numel())''',
     '''def wrong(a, b, share):                                                       # of the token afterwards
    r = (b - a).norm(dim=-1)/b.norm(dim=-1)
    return r.flatten().argsort(stable=True).argsort().view_as(r) >= round(share*r.numel())''',
     '''def wrong(a, b, share):                                                       # of the mean of both lengths
    r = (b - a).norm(dim=-1)/(a.norm(dim=-1)*b.norm(dim=-1))**.5
    return r.flatten().argsort(stable=True).argsort().view_as(r) >= round(share*r.numel())''',
     'lambda a, b, share: ~right(a, b, share)')

case('15_dynamicvit', 'check_masked(masked)',
     'lambda logits, D: logits.masked_fill(D[:, None]*D + torch.eye(len(D)) == 0, -torch.inf).softmax(-1)',      # what left sees itself alone
     'lambda logits, D: logits.masked_fill(D == 0, -torch.inf).softmax(-1)',          # without the diagonal
     'lambda logits, D: logits.softmax(-1)*D',                                        # rows that do not sum to 1
     'lambda logits, D: right(logits.T, D).T')                                        # the other way round
case('15_dynamicvit', 'check_expected(expected)',
     'lambda odds: (odds > 0).float().mean(1)',                                       # what inference would keep
     'lambda odds: odds.sigmoid().mean()',                                            # over all images
     'lambda odds: odds.mean(1).sigmoid()',                                           # of the mean odds
     'lambda odds: odds.softmax(1).mean(1)')

case('16_evit', 'check_lost(lost_attention)',
     'lambda slim, images: right(slim, images)[:1]*2',                                # the first stage twice
     'lambda slim, images: [1 - v for v in right(slim, images)]',                     # what stays
     'lambda slim, images: [v*len(images) for v in right(slim, images)]',             # the sum over images
     'lambda slim, images: right(slim, images[:1])')
case('16_evit', 'check_mean(MeanToken)',
     '''class wrong(right):                                                           # none leaves: 0/0
    def meet(self, s, keep, drop, scores):
        token, size, some = super().meet(s, keep, drop, scores)
        return token/drop.any(1)[:, None, None], size, some''',
     'AttentionSum',
     '''class wrong(right):                                                           # a plain mean
    def meet(self, s, keep, drop, scores): return super().meet(s, keep, drop, torch.ones_like(scores))''',
     '''class wrong(right):                                                           # of all of them
    def meet(self, s, keep, drop, scores):
        token, size, some = super().meet(s, keep, drop, scores)
        return (scores[..., None]*s.x).sum(1, keepdim=True)/scores.sum(1, keepdim=True)[..., None], size, some''',
     '''class wrong(right):                                                           # with sizes
    sized = True
    def meet(self, s, keep, drop, scores):
        token, size, some = super().meet(s, keep, drop, scores)
        return token, drop.sum(1, keepdim=True).float(), some''')

case('17_tome', 'check_reach(reach)',
     '''def wrong(groups):                                                            # to its first patch
    places = torch.cartesian_prod(torch.arange(8.), torch.arange(8.))
    return (places - places[groups]).norm(dim=1).mean().item()''',
     '''def wrong(groups):                                                            # steps along rows and columns
    places = torch.cartesian_prod(torch.arange(8.), torch.arange(8.))
    together = (groups[:, None] == groups[None]).float()
    return (places - together @ places/together.sum(1, keepdim=True)).abs().sum(1).mean().item()''',
     'lambda groups: right(groups)*64/max(1, 64 - len(groups.unique()))')             # over those that were merged
case('17_tome', 'check_tokens(TokenSimilarity)',
     'KeySimilarity',
     '''class wrong(right):                                                           # tokens, and keys asked for all the same
    needs = KeySimilarity.needs''',
     '''class wrong(KeySimilarity):                                                   # nothing asked for, keys used
    needs = ()''',
     '''class wrong(right):                                                           # the least similar
    def features(self, t): return t.x*torch.where(torch.arange(t.x.shape[1]) % 2 == 0, 1., -1.)[:, None]''')

case('18_ats', 'check_expected(expected)',
     'lambda scores, K: (scores*K).clamp(max=1).sum().item()',                        # evenly spread points
     'lambda scores, K: (1 - scores**K).sum().item()',                                # not always
     'lambda scores, K: right(scores, K)/K')
case('18_ats', 'check_attention(AttentionSampling)',
     'AdaptiveSampling',
     '''class wrong(right):                                                           # the first head
    def weigh(self, t, candidates):
        s = t.cls_row[:, 0].masked_fill(~candidates, 0.)
        return s/s.sum(1, keepdim=True).clamp_min(1e-12)''',
     '''class wrong(right):                                                           # all alike
    def weigh(self, t, candidates): return candidates/candidates.sum(1, keepdim=True)''',
     '''class wrong(right):                                                           # values asked for all the same
    needs = AdaptiveSampling.needs''')

case('18b_power', 'check_counts(counts_above)',
     'lambda r, t: (r > t).sum(1).tolist()',                                          # more than the block before, or none
     'lambda r, t: [max(1, n) for n in (r > t).sum(1).tolist()]',
     'lambda r, t: right(1 - r, t)')
case('18b_power', 'check_queries(QueriesOnly)',
     'ColumnAttention',
     '''class wrong(right):                                                           # CLS alone
    def forward(self, t): return t.cls_row.float().mean(1)''',
     '''class wrong(right):                                                           # CLS twice
    def forward(self, t): return super().forward(t) - t.cls_row.float().mean(1)''')

case('19_evovit', 'check_came_back(came_back)',
     'lambda slim, images: [v*len(images) for v in right(slim, images)]',
     '''def wrong(slim, images):                                                      # those that stayed in
    record = []
    slim(images, record=record)
    record = [d for d in record if slim.policy.steps[d.block].score.renew]
    return [(b.keep & a.keep).float().sum(1).mean().item() for a, b in zip(record, record[1:])]''',
     'lambda slim, images: [0., *right(slim, images)]')                               # the first stage as well
case('19_evovit', 'check_fair(FairAttention)',
     'GlobalAttention',
     '''class wrong(right):                                                           # to a sum of one
    def average(self, t, seen, old):
        shared = seen.clone()
        shared[:, :t.n_prefix] = 0
        return GlobalAttention.average(self, t, seen/shared.sum(1, keepdim=True).clamp_min(1e-12), old)''',
     '''class wrong(right):                                                           # with what all had
    def average(self, t, seen, old):
        shared, all_old = seen.clone(), old.clone()
        shared[:, :t.n_prefix] = all_old[:, :t.n_prefix] = 0
        return GlobalAttention.average(self, t, seen*all_old.sum(1, keepdim=True)/shared.sum(1, keepdim=True).clamp_min(1e-12), old)''')

case('19b_idlevit', 'check_rounds(rounds)',
     '''def wrong(slim, images):                                                      # CLS as well
    record = []
    slim(images, record=record)
    times = sum(d.keep.long() for d in record)
    return [(times == n).float().mean().item() for n in range(len(record) + 1)]''',
     'lambda slim, images: [v*64 for v in right(slim, images)]',                      # numbers
     'lambda slim, images: right(slim, images)[::-1]')                                # how many it sits out
case('19b_idlevit', 'check_share(ClsShare)',
     'ClsLogits',
     '''class wrong(right):                                                           # not scaled
    def forward(self, t):
        scale, t.layer.attn.scale = t.layer.attn.scale, 1.
        try: return super().forward(t)
        finally: t.layer.attn.scale = scale''',
     '''class wrong(right):                                                           # the softmax of the mean
    def forward(self, t): return ClsLogits().forward(t).softmax(-1)''',
     '''class wrong(right):                                                           # no keys on the bill
    def macs_in(self, layer, n, n_prefix=1): return ClsLogits().macs_in(layer, n, n_prefix)''',
     '''class wrong(right):                                                           # no biases
    def forward(self, t):
        qkv = t.layer.attn.qkv
        bias, qkv.bias = qkv.bias, None
        try: return super().forward(t)
        finally: qkv.bias = bias''')

case('20_avit', 'check_depth(common_depth)',
     'lambda model, macs: len(model.blocks)*macs/macs_of(model)',                     # stem and head as well
     'lambda model, macs: right(model, macs) + 1',
     'lambda model, macs: round(right(model, macs))')
case('20_avit', 'check_threshold(Threshold)',
     '''class wrong(HaltingScore):                                                    # the method's own rule
    def __init__(self, gamma, beta, reads, theta): super().__init__(gamma, beta, reads)''',
     '''class wrong(right):                                                           # a block late
    def owns(self, x, rest): return torch.where(rest > 1 - self.theta, rest - self.gives(x), torch.zeros_like(rest))''',
     '''class wrong(right):                                                           # the other side of it
    def __init__(self, gamma, beta, reads, theta): super().__init__(gamma, beta, reads, 1 - theta)''')
case('20b_iared', 'check_penalty(penalty_for)',
     'lambda share, accuracy: accuracy/(1 - accuracy)',                               # whatever is kept
     'lambda share, accuracy: accuracy*(1 - share)**2/(1 - accuracy)',
     'lambda share, accuracy: (1 - accuracy)/accuracy/(1 - share**2)')
case('20b_iared', 'check_token(TokenInterpreter)',
     '''@register_scorer('asks_cls')
class wrong(right):                                                           # CLS asks after all
    def asks(self, t): return t.x[:, 0]''',
     '''class wrong(right): pass                                                      # under the name of another''',
     '''@register_scorer('starts_with_nothing')
class wrong(right):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.token = nn.Parameter(torch.zeros(dim))''')
case('20c_scop', 'check_drift(drift)',
     'lambda steps, lr: min(.5, lr*steps)',                                           # a rate that stays
     'lambda steps, lr: lr*steps/2',                                                  # through the wall
     'lambda steps, lr: min(1., right(steps, lr))*2')                                 # of the score
case('20c_scop', 'check_shuffled(shuffled)',
     'lambda images, patch, generator: torch.cat([right(x[None], patch, generator) for x in images])',       # each image its own places
     'lambda images, patch, generator: right(images, patch, torch.Generator().manual_seed(1))',              # always the same
     'lambda images, patch, generator: images.flatten(2)[..., torch.randperm(images[0, 0].numel(), generator=generator)].view_as(images)',    # pixels
     'lambda images, patch, generator: right(images, patch, generator).flip(-1)')     # mirrored

case('22_both', 'check_left(left)',
     'lambda t, c: t*c',
     'lambda t, c: t*c*c',                                                            # channels at both ends everywhere
     'lambda t, c: right(t, c)*t')
case('22_both', 'check_order(PatchesFirst)',
     'Both',                                                                          # channels first
     '''class wrong(right):                                                           # the shares the wrong way round
    def plan(self, job, gated, reduction):
        job.config = job.config.model_copy(update=dict(channels=1 - job.config.channels))
        return super().plan(job, gated, reduction)''',
     '''class wrong(right):                                                           # no channel is cut
    def plan(self, job, gated, reduction): return super().plan(job, gated, reduction)._replace(channels=self.channel_plan(job, gated, 0.))''',
     '''class wrong(right):                                                           # channels as if no patch had gone
    def plan(self, job, gated, reduction): return super().plan(job, gated, reduction)._replace(channels=self.cut(job, gated, (1 - reduction)**job.config.channels))''')

case('25_methods', 'check_first(First)',
     'Uniform',
     '''class wrong(right):                                                           # the bottom of the image
    def plan(self, job, scores, reduction):
        p = Uniform.plan(self, job, scores, reduction)
        return Plan('first', p.model, p.n_patches, p.n_prefix, [range(p.n_patches - len(k), p.n_patches) for k in p.keep], dict(keys=job.config.keys))''',
     '''class wrong(right):                                                           # one patch too many
    def plan(self, job, scores, reduction):
        p = Uniform.plan(self, job, scores, reduction)
        return Plan('first', p.model, p.n_patches, p.n_prefix, [range(min(len(k) + 1, p.n_patches)) for k in p.keep], dict(keys=job.config.keys))''')
case('25_methods', 'check_two_cuts(two_cuts)',
     'lambda model, data, r: right(model, data, 1 - (1 - r/2)**2)',                   # half of it each
     'lambda model, data, r: right(model, data, 1 - (1 - r)**2)',                     # all of it each
     'lambda model, data, r: prune("vtp", model, data, reduction=r, sparse_epochs=0)')

case('30b_pull', 'check_steps(steps_for)',
     'lambda sigma, l1, lr, start: right(0., l1, lr, start)',                         # no noise
     'lambda sigma, l1, lr, start: 2*(1 - CLOSED)*start/lr*(1 + sigma/l1)',
     'lambda sigma, l1, lr, start: right(sigma, l1, lr, start)/2',                    # the rate of the start throughout
     'lambda sigma, l1, lr, start: 95*(1 + (sigma/l1)**2)**.5')                       # of one rate and start only
case('30b_pull', 'check_same(same_gates)',
     'lambda l1, batch, new: l1*batch/new', 'lambda l1, batch, new: l1*(new/batch)**.5', 'lambda l1, batch, new: l1',
     'lambda l1, batch, new: l1*4/new**.5', 'lambda l1, batch, new: .04*(batch/new)**.5',
     'lambda l1, batch, new: l1/2 if batch != new else l1')

# evidence

case('21_measure', 'check_disagreements(p_none, p_two, in_a_row)',
     '(1., .25, 5)',                                                                  # one-sided
     '(0., .5, 6)', '(1., .5, 5)')
case('21_measure', 'check_holm(holm)',
     'lambda p: [min(1., v*len(p)) for v in p]',                                  # Bonferroni
     'lambda p: sorted(right(p))',                                                # in the order of size
     'lambda p: [v*(len(p) - sorted(p).index(v)) for v in p]',                    # neither capped nor held up
     'lambda p: [max(v*(len(p) - i) for i, v in enumerate(sorted(p)[:sorted(p).index(w) + 1])) for w in p]',   # not capped
     'lambda p: [min(1., v*len(p)/(sorted(p).index(v) + 1)) for v in p]')         # Benjamini and Hochberg's
case('21_measure', 'check_rounds(best_rounds)',
     'lambda between, within, cost: cost**.5*between/within',
     'lambda between, within, cost: cost*within/between',
     'lambda between, within, cost: (cost*within/between)**.5')
case('21_measure', 'check_lead(lead)',
     '''def wrong(table, a, b):                                                       # by position, whatever the session
    return mean_interval(table[table.method == a].realised.to_numpy() - table[table.method == b].realised.to_numpy())''',
     'lambda table, a, b: right(table, b, a)',
     '''def wrong(table, a, b):                                                       # as if they had not been paired
    (x, low, high), (y, _, _) = (mean_interval(table[table.method == m].realised.to_numpy()) for m in (a, b))
    return x - y, low - y, high - y''')
case('25c_report', 'check_frontier(frontier)',
     '''def wrong(rows, when):                                                        # of two alike none is left
    mine = [r for r in rows if stage(r) == when or r["method"] == "dense"]
    return sorted((r for r in mine if not any(o is not r and o["macs"] <= r["macs"] and o["top1"] >= r["top1"] for o in mine)), key=lambda r: r["macs"])''',
     'lambda rows, when: right(rows, when)[::-1]',
     'lambda rows, when: [r for r in right(rows, when) if r["method"] != "dense"]',
     'lambda rows, when: sorted((r for r in rows if stage(r) == when), key=lambda r: r["macs"])',
     '''def wrong(rows, when):                                                        # each new best, also where the next costs no more
    out = []
    for r in sorted((r for r in rows if stage(r) == when or r["method"] == "dense"), key=lambda r: r["macs"]):
        if not out or r["top1"] > out[-1]["top1"]: out.append(r)
    return out''',
     'lambda rows, when: [r["own"] for r in right([dict(r, macs=1 - target(r), own=r) for r in rows], when)]')    # what it should have cost

case('30c_behind', 'check_draws(lead_over_draws)',
     'lambda method, draws: right(method, sorted(draws)[-2:])',                       # the best two draws
     'lambda method, draws: tuple(-v for v in right(method, draws))',                 # chance minus method
     'lambda method, draws: (lambda m, l, h: (m, m - (m - l)*1.96/4.303, m + (h - m)*1.96/4.303))(*right(method, draws))')   # as if the spread were known
case('30c_behind', 'check_open(stays_open)',
     'lambda pairs, reduction: right([dict(p, recovery="none") for p in pairs], reduction)',                 # both stages
     'lambda pairs, reduction: {frozenset((p["a"], p["b"])) for p in pairs} - right(pairs, reduction)',      # those told apart
     'lambda pairs, reduction: right([dict(p, reduction=reduction) for p in pairs], reduction)')             # all budgets
case('30_tournament', 'check_share(share)', '.7', '1 - right', '.7*.65')              # passes, not work
case('30_tournament', 'check_worth(worth)',
     'lambda rows: {k: 1 - v for k, v in right(rows).items()}',
     'lambda rows: {k: max(v, 0.) for k, v in right(rows).items()}',                   # no choice is worse than chance
     'lambda rows: right([r for r in rows if target(r) != .45])',
     'lambda rows: right([dict(r, recovery="none") if r["method"].startswith("chance") else r for r in rows])',  # chance after recovery
     'lambda rows: {(m, b): (next(r["top1"] for r in rows if r["method"] == m and target(r) == b) - c)/(.8 - c) for m, b in right(rows)'
     ' for c in [next(r["top1"] for r in rows if r["method"] == f"chance of {m}")]}')                            # of any budget
case('31_imagenet', 'check_cosine(cosine_of)', 'lambda e: 1 - e', 'lambda e: 1 - e*e', 'lambda e: (1 - e*e)**.5')
case('31_imagenet', 'check_worst(worst)',
     'lambda values, share: -right(-np.asarray(values), share)',                      # the best
     'lambda values, share: float(np.max(values))',
     'lambda values, share: float(np.quantile(values, 1 - share))')
case('31_imagenet', 'check_fits(fits)',
     'lambda hours, epochs, v: max(1, int(train_hours(epochs, v, gpus=1)/hours))',    # rounded down
     'lambda hours, epochs, v: math.ceil(train_hours(epochs, v, gpus=1)/hours) + 1',
     'lambda hours, epochs, v: max(1, train_hours(epochs, v, gpus=1)/hours)',         # a part of a GPU
     'lambda hours, epochs, v: right(24*hours, epochs, v)')                           # days

case('32_timing', 'check_slower(surely_slower)',
     'lambda table: table[table.time_reduction_low < 0]',                             # a gain stays open
     'lambda table: table[table.time_reduction_high > 0]')
case('32_timing', 'check_even(break_even)',
     'lambda a, b, macs, extra: extra/(a + b*macs/1e9)',                              # of the whole time
     'lambda a, b, macs, extra: extra/(b*macs)', 'lambda a, b, macs, extra: extra/b')
case('32_timing', 'check_bound(launch_bound)',
     'lambda calls, macs, tera, us: not right(calls, macs, tera, us)',
     'lambda calls, macs, tera, us: right(calls, macs, tera, 1000*us)',               # milliseconds
     'lambda calls, macs, tera, us: right(1, macs, tera, us)')                        # one call
case('33_deploy', 'check_padded(run_padded)',
     'lambda net, images: torch.cat([net(b) for b in images.split(2) if len(b) == 2] or [torch.zeros(0, 10)])',    # the rest is left out
     'lambda net, images: torch.cat([right(net, images), right(net, images)[:1]])',   # a row of padding stays
     'lambda net, images: right(net, images.flip(0))')
case('33_deploy', 'check_counts(with_counts)',
     'lambda slim, images: SlimViT(slim.model)',                                      # nothing pruned
     '''def wrong(slim, images):                                                      # rounded down
    s, kept = right(slim, images), slim.kept(images).float().sum(-1).mean(0)
    return SlimViT(s.model, Policy({i: dataclasses.replace(t, count=int(kept[i])) for i, t in s.policy.steps.items()}, 'x'), 'gather')''',
     '''def wrong(slim, images):                                                      # rounded up
    s, kept = right(slim, images), slim.kept(images).float().sum(-1).mean(0)
    return SlimViT(s.model, Policy({i: dataclasses.replace(t, count=max(1, math.ceil(kept[i]))) for i, t in s.policy.steps.items()}, 'x'), 'gather')''',
     '''def wrong(slim, images):                                                      # the median
    s, kept = right(slim, images), slim.kept(images).float().sum(-1).median(0).values
    return SlimViT(s.model, Policy({i: dataclasses.replace(t, count=max(1, int(kept[i]))) for i, t in s.policy.steps.items()}, 'x'), 'gather')''',
     '''def wrong(slim, images):                                                      # and none where none is kept
    s, kept = right(slim, images), slim.kept(images).float().sum(-1).mean(0)
    return SlimViT(s.model, Policy({i: dataclasses.replace(t, count=round(kept[i].item())) for i, t in s.policy.steps.items()}, 'x'), 'gather')''',
     '''def wrong(slim, images):                                                      # what the first image keeps
    return right(slim, images[:1])''',
     '''def wrong(slim, images):                                                      # CLS counted
    s = right(slim, images)
    return SlimViT(s.model, Policy({i: dataclasses.replace(t, count=t.count + 1) for i, t in s.policy.steps.items()}, 'x'), 'gather')''',
     'lambda slim, images: SlimViT(slim.model, right(slim, images).policy, "packed")')

# papers

case('11b_patch_figures', 'check_saving(one_block_saving)',
     'lambda rate: 12*right(rate)',                                                   # of the block
     'lambda rate: right(rate)*block_macs(197, 197, 197, 384, 1536)/(block_macs(197, 197, 197, 384, 1536) - block_macs(1, 197, 1, 384, 1536))',
     'lambda rate: rate/12')
case('11b_patch_figures', 'check_safe(safe_rate)',
     'lambda table, block, points: right(table.assign(block=block), block, points)',  # of any block
     'lambda table, block, points: right(table, block, points/100)',                  # shares
     'lambda table, block, points: min(table[(table.block == block) & (100*table.low > -points)].rate, default=0)')
case('11b_patch_figures', 'check_nested(nested_counts)',
     'lambda rates, n: [n - round(r*n) for r in rates]',                              # may rise
     'lambda rates, n: [min(n - round(r*n) for r in rates[:i + 1]) for i in range(len(rates))]',             # too few
     'lambda rates, n: [max(int((1 - r)*n) for r in rates[i:]) for i in range(len(rates))]',                 # the kept rounded down
     'lambda rates, n: [max(right(rates, n))]*len(rates)')                            # too many

case('11c_patch_tables', 'check_words(words_allow)',
     'lambda dim: (least*(dim/384)**2, most*(dim/384)**2)',                          # everything with the square of the width
     'lambda dim: right(dim)[::-1]',
     'lambda dim: tuple(v*dim/384 for v in right(384))',                              # in proportion to the width
     'lambda dim: tuple(v - 196*768*dim for v in right(dim))')                        # no patch embedding
case('11c_patch_tables', 'check_range(cost_range)',
     'lambda old, percent: right(old, percent)[::-1]',
     'lambda old, percent: (old*(percent - .05)/100, old*(percent + .05)/100)',       # what is saved
     'lambda old, percent: (old*(1 - (percent + .5)/100), old*(1 - (percent - .5)/100))')    # no digit
case('11c_patch_tables', 'check_same(same_time)',
     'lambda rows: [r["name"] for r in rows if r["time_reduction_low"] <= r["mac_reduction"]]',
     'lambda rows: [r["name"] for r in rows if r["time_reduction_low"] > 0]',
     'lambda rows: [r["name"] for r in rows if r["time_reduction_high"] >= r["mac_reduction"]]')
case('12c_channel_tables', 'check_share(share_left)', 'lambda p: 1 - p', 'lambda p: (1 - p)**2', 'lambda p: 1 - right(p)')
case('12c_channel_tables', 'check_best(best_at_cost)',
     'lambda rows, macs: max((r for r in rows if r["macs"] <= macs), key=lambda r: r["top1"], default=None)',    # a tie goes to the dearer
     'lambda rows, macs: max((r for r in rows if r["macs"] < macs), key=lambda r: (r["top1"], -r["macs"]), default=None)',
     '''def wrong(rows, macs):                                                         # the last of a tie
    best = None
    for r in rows:
        if r['macs'] <= macs and (best is None or r['top1'] >= best['top1']): best = r
    return best''',
     'lambda rows, macs: max((r for r in rows if r["macs"] <= macs), key=lambda r: r["macs"], default=None)')
case('13c_life_tables', 'check_steps(steps_needed)',
     'lambda lr, share, dim: max(1, int(share/(lr*dim**.5)))',                        # rounded down
     'lambda lr, share, dim: max(1, math.ceil(share/lr))',
     'lambda lr, share, dim: share/(lr*dim**.5)',                                     # a part of a step
     'lambda lr, share, dim: right(lr, share, dim) + 1')
case('13c_life_tables', 'check_present(present)',
     'lambda lives, U: right(lives[:1], U)',                                          # the first image
     'lambda lives, U: right(lives - 1, U)',                                          # a block late
     'lambda lives, U: right(lives, U)/lives.shape[1]',                               # the share
     'lambda lives, U: torch.stack([(lives >= t).float().sum(1).mean() for t in range(1, 13)])')             # counted hard
case('13c_life_tables', 'check_new_scores(new_scores)',
     '''def wrong(plan, dim):                                                         # one predictor for all
    score = plan.score(dim)
    return Policy({i: Step(score=score, count=s.count) for i, s in right(plan, dim).steps.items()}, 'new scores')''',
     '''def wrong(plan, dim):                                                         # a block early
    return Policy({i - 1: s for i, s in right(plan, dim).steps.items()}, 'new scores')''',
     '''def wrong(plan, dim):                                                         # the first stage only
    return Policy(dict(list(right(plan, dim).steps.items())[:1]), 'new scores')''')
case('14b_cosine_claims', 'check_padding_waste(padding_waste)',
     'lambda kept: (len(kept)*kept.sum(-1).amax(0).sum()/kept.sum() - 1).item()',     # of what is needed
     'lambda kept: sum(right(kept[:, [l]]) for l in range(kept.shape[1]))/kept.shape[1]',                    # mean of the blocks
     'lambda kept: 1 - kept.float().mean().item()')                                   # of all patches
case('14b_cosine_claims', 'check_similar_batches(similar_batches)',
     'lambda counts, size: right(torch.arange(len(counts)), size)',                   # as they arrive
     'lambda counts, size: [p for p in right(counts, size) if len(p) == size]',       # the last is lost
     'lambda counts, size: [counts[p].tolist() for p in right(counts, size)]')        # counts, not indices

# reference

case('00_core', 'check_fold(equal)', 'True')
case('00_core', 'check_temp_seed(temp_seed)',
     '''@contextlib.contextmanager
def wrong(seed):                                                                      # restored, but never seeded
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try: yield
    finally:
        random.setstate(states[0]); np.random.set_state(states[1]); torch.set_rng_state(states[2])''',
     '''@contextlib.contextmanager
def wrong(seed):                                                                      # PyTorch only
    state = torch.get_rng_state()
    yield set_seed(seed)
    torch.set_rng_state(state)''',
     '''@contextlib.contextmanager
def wrong(seed):                                                                      # not after an error
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield set_seed(seed)
    random.setstate(states[0]); np.random.set_state(states[1]); torch.set_rng_state(states[2])''',
     '''@contextlib.contextmanager
def wrong(seed):                                                                      # seeded anew
    try: yield set_seed(seed)
    finally: set_seed(0)''',
     '''@contextlib.contextmanager
def wrong(seed):                                                                      # back to the start of the stream
    old = torch.initial_seed()
    try: yield set_seed(seed)
    finally: set_seed(old)''')
case('02b_weights', 'check_unwrap(unwrap)',
     "lambda saved, names: {n: saved.get('module.' + n) for n in names}",                  # one wrapper alone
     "lambda saved, names: {n: next(t for k, t in saved.items() if k.endswith(n)) for n in names if any(k.endswith(n) for k in saved)}",
     "lambda saved, names: {n: saved[k] for n in names for k in saved if k.endswith(n)}",
     'lambda saved, names: {n: next(t for k, t in saved.items() if k.endswith(n)) for n in names}',    # prefixes mixed
     'lambda saved, names: {n: next(t for k, t in reversed(saved.items()) if k.endswith(n)) for n in names}',
     'lambda saved, names: {n: saved.get(next(k for k in saved if k.endswith(names[0])).removesuffix(names[0]) + n) for n in names}')    # the first prefix
case('02b_weights', 'check_loads(loads)',
     'lambda value: isinstance(value, (int, str, torch.Tensor))',                      # no options of a training
     'lambda value: not callable(value)',                                              # a path is none
     'lambda value: isinstance(value, (int, str, torch.Tensor, argparse.Namespace))',    # numbers with a fraction, lists, dtypes
     'lambda value: not callable(value) and not isinstance(value, Path)')    # an array is none
case('00a_errors', 'check_at_most(said)', "'at most 0.46'", "'at most 0.457'", "'at most 0.4'")
case('00a_errors', 'check_one_of(one_of)',
     '''def wrong(argument, given, allowed):                                          # nobody says what is allowed
    require(given in allowed, argument, given, 'another one')
    return given''',
     'lambda argument, given, allowed: right(argument, given, allowed[:2])',
     'lambda argument, given, allowed: right(argument, given, allowed) and None',
     '''def wrong(argument, given, allowed):                                          # another kind of error
    try: return right(argument, given, allowed)
    except VitpruneError as e: raise KeyError(*e.args)''',
     '''def wrong(argument, given, allowed):                                          # no list of one
    *first, last = map(repr, allowed)
    require(given in allowed, argument, given, f"{', '.join(first)} or {last}")
    return given''')
case('00b_files', 'check_two_writers(wins)', "'the first to finish'", "'an error'", "'a mixture'")
case('00b_files', 'check_copy_atomic(copy_atomic)',
     'lambda source, target: (target.unlink(), shutil.copyfile(source, target))',
     '''def wrong(source, target):                                                    # something is left over
    shutil.copyfile(source, target.with_suffix('.tmp'))
    target.with_suffix('.tmp').replace(target)''',
     'lambda source, target: shutil.copy(source, target)',
     'lambda source, target: shutil.copy2(source, target)',
     'lambda source, target: target.write_bytes(source.read_bytes())',
     '''def wrong(source, target):                                                    # for a moment it is not there
    new = source.read_bytes()
    target.unlink()
    target.write_bytes(new)''',
     '''def wrong(source, target):                                                    # nobody hears of it
    try: right(source, target)
    except Exception: pass''')
case('01_data', 'check_fifteen(each)', '[15]*10', '[1.5]*10', '[2]*5 + [1]*5')
case('01_data', 'check_content_hash(content_hash)',
     "lambda ds: right(ds.subset([0])) + str(list(ds.targets))",                      # the first image
     'lambda ds: ds.digest',
     "lambda ds: right(ds) + str(ds.images[0])",                                      # where the tree lies
     "lambda ds: ''.join(sorted(hashlib.sha256(im.tobytes() if isinstance(im, np.ndarray) else Path(im).read_bytes()).hexdigest() for im in ds.images))",    # in any order
     'lambda ds: ds.digest + str(list(ds.targets)) + str([(im.tobytes() if isinstance(im, np.ndarray) else im.read_bytes())[-1] for im in ds.images])',    # the last byte
     'lambda ds: ds.digest + str(list(ds.targets)) if isinstance(ds.images, np.ndarray) else right(ds)')    # no array's pixels
case('06_viz', 'check_returns(only_leave, blocks)', '(True, [0, 3, 4, 6, 7])', '(False, [0, 3, 6])', '(False, [0, 3, 4, 6])')
case('06_viz', 'check_death_map(death_map)',
     'lambda kept: right(kept).reshape(-1)[:4].reshape(2, 2)',                        # two rows, whatever comes
     'lambda kept: right(kept) - 1',                                                  # counted from 0
     'lambda kept: right(kept).T',
     'lambda kept: kept.argmin(0).reshape(2, 2)')                                     # the first that it sits out
case('06_viz', 'check_palette(extra)', "'#FF0000'", "'#777777'", "'#FFFFFF'")
case('07_recipe', 'check_steps(n_steps, whole_from)',
     '(1760, 1564)', '(1757, 781)', '(3515, 3125)')                                  # a batch that is not full; batches of 32
case('07_recipe', 'check_slowdown(slowdown)',
     'lambda cfg: cfg.head_lr_scale/cfg.layer_decay**11',
     'lambda cfg: 1/cfg.layer_decay**12',                                             # the head's own rate forgotten
     'lambda cfg: 1/right(cfg)')
case('08_train', 'check_stay_close(stay_close)',
     '''def wrong(model, strength):                                                   # the weights themselves remembered
    start = dict(model.named_parameters())
    return lambda m: strength*sum((p - start[n]).square().sum() for n, p in m.named_parameters())''',
     '''def wrong(model, strength):                                                   # weight decay
    return lambda m: strength*sum(p.square().sum() for p in m.parameters())''',
     'lambda model, strength: right(model, -strength)',
     '''def wrong(model, strength):                                                   # L1
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    return lambda m: strength*sum((p - start[n]).abs().sum() for n, p in m.named_parameters())''',
     '''def wrong(model, strength):                                                   # the MLPs alone
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "mlp" in n}
    return lambda m: strength*sum((p - start[n]).square().sum() for n, p in m.named_parameters() if n in start)''',
     'lambda model, strength: right(model, 10*strength)')
case('08b_teacher', 'check_imagenet(bytes_and_share)',
     '(1251*1024*4, .4)',                                                             # one logit for each image
     '(1_281_167*1000*4, .4)', '(right[0], .25)')                                     # the last batch; the share beside a dense student
case('08b_teacher', 'check_fields(fields)', "right - {'dtype'}", "right | {'lr'}", "{'seed', 'batch_size'}")
case('08a_objectives', 'check_ponder(ponder)',
     '''def wrong(weight):                                                            # CLS as well
    @looks_at('decisions')
    def objective(seen): return dict(ponder=weight*sum(d.keep.float().mean() for d in seen.decisions))
    return objective''',
     '''def wrong(weight):                                                            # asks for nothing
    return lambda seen: right(weight)(seen)''',
     '''def wrong(weight):                                                            # the mean over decisions
    @looks_at('decisions')
    def objective(seen): return {k: v/len(seen.decisions) for k, v in right(weight)(seen).items()}
    return objective''',
     '''def wrong(weight):                                                            # products
    @looks_at('decisions')
    def objective(seen):
        kept, total = 1., 0.
        for d in seen.decisions:
            kept = kept*d.keep[:, d.n_prefix:]
            total = total + kept.mean()
        return dict(ponder=weight*total)
    return objective''')
case('08a_objectives', 'check_from_then_on(from_then_on)',
     '''def wrong(objective, start):                                                  # asks for nothing
    return lambda seen: right(objective, start)(seen)''',
     'lambda objective, start: right(objective, start + 1e-6)',                       # after it
     '''def wrong(objective, start):                                                  # the other way round
    @looks_at(*needs_of(objective))
    def early(seen): return {n: v*(seen.progress < start) for n, v in losses_of(objective, seen).items()}
    return early''')
case('09_course', 'check_projections(big_params, small_params, macs_ratio)',
     '(384*3*14*14, 384*3*4*4, right[2])',                                            # no biases
     '(*right[:2], right[0]/right[1])', '(*right[:2], 1/right[2])')
case('09_course', 'check_full_passes(full_passes)',
     'lambda stages: right([{k: v for k, v in s.items() if k != "freeze"} for s in stages])',
     'lambda stages: right([{k: v for k, v in s.items() if k != "patch_drop"} for s in stages])',
     'lambda stages: sum(right([s]) for s in stages[:1])',
     'lambda stages: right([dict(s, patch_drop=(*s.get("patch_drop", ()), *[0.]*9)) for s in stages])',    # past the end of the list nothing is left out
     'lambda stages: right([{k: v for k, v in s.items() if k != "freeze" or "patch_drop" not in s} for s in stages])')    # one saving or the other
case('09_course', 'check_ridge(ridge_projection)',
     'lambda big, images, strength: fit_patch_projection(big, images)[:2]',
     'lambda big, images, strength: compose_projection(big)',                         # never moves
     'lambda big, images, strength: right(big, images, 0. if strength < 1e6 else strength)',
     'lambda big, images, strength: tuple(a + (b - a)/(1 + strength) for a, b in zip(compose_projection(big), fit_patch_projection(big, images)[:2]))',    # a blend
     '''def wrong(big, images, strength):                                             # the bias held back as well
    w0, b0 = compose_projection(big)
    x = F.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1).double()
    x1, start = torch.cat([x, torch.ones(len(x), 1).double()], 1), torch.cat([w0.flatten(1).T, b0[None]]).double()
    missed = project_patches(images, big).flatten(0, 1).double() - x1 @ start
    sol = (start + torch.linalg.solve(x1.T @ x1 + strength*torch.eye(49).double(), x1.T @ missed)).float().detach()
    return sol[:-1].T.reshape(-1, 3, 4, 4), sol[-1]''',
     'lambda big, images, strength: right(big, images, strength*64*384)')    # the mean of the squared errors
case('23_demo', 'check_apart(apart)', "{'dense', 'random'}", "{'dense', 'uniform', 'random'}", 'set()')
case('23_demo', 'check_random_band(random_band)',
     'lambda model, plan, ds, seeds: right(model, plan, ds, seeds[-1:])',             # the last seed
     'lambda model, plan, ds, seeds: right(model, plan, ds, seeds)[::-1]',
     'lambda model, plan, ds, seeds: right(model, plan, ds, range(len(seeds)))',      # other seeds
     'lambda model, plan, ds, seeds: tuple(v/len(ds) for v in right(model, plan, ds, seeds))')
case('24_cli', 'check_sweep(sweep)',
     'lambda line, option, values: right(line, option, values).drop(columns=option)',
     'lambda line, option, values: right(line, option, values[:1])',
     'lambda line, option, values: pd.DataFrame([{option: v} | record(f"{line} {option} {values[-1]}") for v in values])')    # the last value's record in every row
case('24_cli', 'check_as_json(as_json)',
     '''def wrong(line):                                                              # an error is an empty object
    try: return right(line)
    except Exception: return {}''',
     'lambda line: str(right(line))')
case('25b_experiment', 'check_refused(refused)', "{'lr', 'reductions'}", "{'lr', 'reductions', 'folder'}", "{'lr', 'docstring'}", 'set()')
case('25b_experiment', 'check_days(days)',
     'lambda e, speed, n_train, n_test: 24*right(e, speed, n_train, n_test)',
     'lambda e, speed, n_train, n_test: right(e, 1., n_train, n_test)',
     'lambda e, speed, n_train, n_test: right(e, speed, n_test, n_train)',
     'lambda e, speed, n_train, n_test: right(dataclasses.replace(e, recover={}), speed, n_train, n_test)',    # before recovery
     'lambda e, speed, n_train, n_test: right(e, speed, n_test, n_test)',
     'lambda e, speed, n_train, n_test: right(dataclasses.replace(e, methods=e.methods[:1]), speed, n_train, n_test)')
case('26_run', 'check_again(again)', "{'evaluation before', 'recovery', 'evaluation after'}", "{'evaluation after'}",
     "{'pruning', 'recovery', 'evaluation before', 'evaluation after'}")
case('26_run', 'check_speed_ups(speed_ups)',
     'lambda rows: {k: 1/v for k, v in right(rows).items()}',                         # shares of the time
     'lambda rows: {(r["method"], r["note"].get("target")): 1. for r in rows}',       # with the dense one
     'lambda rows: {m: v for (m, _), v in right(rows).items()}')
case('28_gallery', 'check_left(left)',
     'lambda patches, rate: round(patches*rate**3)', 'lambda patches, rate: right(patches, rate) - 1',
     'lambda patches, rate: math.ceil(rate*math.ceil(rate*math.ceil(rate*patches)))')    # no fused token
case('28_gallery', 'check_still(still)',
     'lambda model, image, rates, wanted: min((r for r in rates if look(model, image, r).logits.argmax() == wanted), default=None)',
     'lambda model, image, rates, wanted: max((r for r in rates if look(model, image, r).logits.argmax() == wanted), default=None)')
case('29_dense', 'check_left(left)', 'lambda k: k**-.5', 'lambda k: 1/(k + 1)', 'lambda k: .5')
case('29_dense', 'check_mean_wins(mean_wins)',
     'lambda d, middle=1.: right(d)',                                                 # about the bottom always
     'lambda d, middle=1.: loss(middle) < max(loss(middle - d), loss(middle + d))',   # better than one of them
     'lambda d, middle=1.: True',
     'lambda d, middle=1.: middle == 1 and 0 < d < 2',
     'lambda d, middle=1.: middle == 1 and right(d)')
case('34_official', 'check_margin(margin)',
     'lambda scores, k: (scores.sort(1, descending=True).values.diff(dim=1).abs().min()).item()',    # of any two neighbours
     'lambda scores, k: (scores.sort(1, descending=True).values[:, k - 1] - scores.sort(1, descending=True).values[:, k]).max().item()',
     'lambda scores, k: right(scores, k - 1 or 2)')
case('34_official', 'check_ours(ours)',
     'lambda model, keep: SlimViT(model, Policy({0: Step(score=NormScore(), count=keep)}))',         # before the first block
     'lambda model, keep: SlimViT(model, Policy({1: Step(score=NormScore(), count=min(keep + 1, 16))}))',
     'lambda model, keep: SlimViT(model, Policy({1: Step(keep=range(keep))}))')

case('notation', 'check_as_reduction(as_reduction)', 'lambda printed: printed', 'lambda printed: 1/(1 + printed)', 'lambda printed: 1 - printed')
case('notation', 'check_compound(compound)',
     'lambda rates: rates', 'lambda rates: right(rates[::-1])[::-1]', 'lambda rates: [right(rates)[-1]]*len(rates)')


# projects

case('project_three_ways', 'check_pixels(fewer_pixels)', 'lambda model, side: right(model, 24)', 'lambda model, side: right(model, max(side, 28))')
case('project_three_ways', 'check_tokens(fewer_tokens)',
     'lambda model: SlimViT(model, Policy({2: Step(score=NormScore(), count=50)})).eval()',    # too little
     'lambda model: SlimViT(model, Policy({2: Step(score=NormScore(), count=10)})).eval()')    # too much
case('project_three_ways', 'check_blocks(fewer_blocks)',
     'lambda model, gone: right(model, [i + 1 for i in gone])',                       # counted from 1
     'lambda model, gone: right(model, gone[:1])')
case('project_three_ways', 'check_table(table)',
     'lambda ways, images: [dict(r, low=-r["high"], high=-r["low"]) for r in right(ways, images)]',    # first minus second
     'lambda ways, images: [dict(r, saved=1 - r["saved"]) for r in right(ways, images)]',
     'lambda ways, images: right(dict(reversed(ways.items())), images)',
     '''def wrong(ways, images):                                                      # minus the way before
    out, pairs = right(ways, images), zip(ways.items(), list(ways.items())[1:])
    return [out[0], *[dict(r, low=p[1]["low"], high=p[1]["high"]) for r, pair in zip(out[1:], pairs) for p in [right(dict(pair), images)]]]''')
case('project_fault_finder', 'check_finder(find_fault)', 'lambda engine: None', 'lambda engine: "broken"',
     'lambda engine: None if torch.allclose(engine(net, images, {}), net(images)) else "identity"',    # one of six properties
     'lambda engine: None if torch.allclose(engine(net, images, {2: 7}), honest(net, images, {2: 7})) else "agreement"')
case('project_fault_finder', 'check_named(named)', 'dict(right, a="batch")', 'dict(right, h="identity")', 'dict(right, c="CLS")', 'dict(right, d="trace")')
case('project_own_method', 'check_scorer(Mine)', """class wrong(Scorer):                                   # the same patches for every image
    def forward(self, t): return -t.pos.float()""",
     """class wrong(Scorer):                                                         # removed patches are in the mean
    def forward(self, t): return (t.x - t.x[:, t.n_prefix:].mean(1, keepdim=True)).norm(dim=-1)""")
case('project_own_method', 'check_method(MyMethod)', """class wrong(right):
    config = Config                                                                  # no dial""", """class wrong(right):
    def plan(self, job, state, rate): return Policy({2: Step(score=Mine(), count=max(1, round(32*rate)))})    # 1 does not keep all""", """class wrong(right):
    def default(self, c): return c.keep_rate                                         # None, where nothing is given""")
case('project_own_method', 'check_worth(worth)',
     'lambda *a: [dict(g, difference=-g["difference"]) for g in right(*a)]',          # chance minus method
     'lambda *a: right(*a)[:1]')
case('project_referee', 'check_unequal(unequal)', 'lambda a, b: right(a, b) - {"macs"}', 'lambda a, b: right(a, b) | {"method"}',
     'lambda a, b: right(a, b) - {"macs"} | ({"macs"} if a["macs"] > 1.02*b["macs"] else set())',    # only where the first costs more
     'lambda a, b: right(a, b) - {"macs"} | ({"macs"} if b["macs"] > 1.02*a["macs"] else set())',
     'lambda a, b: right(a, b) - {"macs"} | ({"macs"} if abs(a["macs"] - b["macs"]) > .02*max(a["macs"], b["macs"]) else set())')
case('project_referee', 'check_ruling(ruling)',
     'lambda pair, better: "holds" if pair["difference"] > 0 else "fails"',           # no interval
     'lambda pair, better: right(pair, pair["b"])')
case('project_referee', 'check_family(family)',
     'lambda p, level=.05: [v < level for v in p]', 'lambda p, level=.05: [v < level/len(p) for v in p]',    # each alone; Bonferroni
     'lambda p, level=.05: [v <= level/(len(p) - sorted(p).index(v)) for v in p]')    # does not stop
case('project_referee', 'check_rulings(rulings)', 'dict(right, B="follows")', 'dict(right, C="follows")', 'dict(right, C="unfair")', 'dict(right, D="unfair")', 'dict(right, E="follows")')
case('project_one_decimal', 'check_rates(rates_behind)',
     'lambda printed, cost: (right(printed, cost) or (0., 0.))[::-1]', 'lambda printed, cost: right(printed, cost) or (0., 0.)')
case('project_one_decimal', 'check_slack(slack)', 'lambda printed: 10/printed', 'lambda printed: right(printed)/100')
case('project_one_decimal', 'check_unequal_by(unequal_by)',
     'lambda table, model, a, b: right(table, model, b, a)', 'lambda table, model, a, b: right(table, model, a, b)[::-1]')
case('project_own_images', 'check_folder(as_folder)',
     'lambda ds, folder: right(ds.but(targets=[(y + 1) % 10 for y in ds.targets]), folder)',      # under the wrong names
     'lambda ds, folder: right(ds.subset(range(10)), folder)', 'lambda ds, folder: right(ds, Path(folder)/"images")')
case('project_own_images', 'check_experiment(experiment)',
     'lambda data: right(data).replace("chance = true", "")', 'lambda data: right(data).replace("0.45", "0.5")')
case('project_own_images', 'check_cheapest(cheapest)', 'lambda rows, points: right(rows, points/100)',
     'lambda rows, points: right(rows, points - 1e-9)',                               # less than, or lost to rounding
     """lambda rows, points: min((r for r in rows if r["method"] != "dense" and .9 - r["top1"] <= points/100),    # chance as well
                             key=lambda r: r["macs"], default=None)""",
     'lambda rows, points: min((r for r in rows if r["method"] not in ("dense", "chance of b") and 100*(1 - r["top1"]/rows[0]["top1"]) <= points),'
     ' key=lambda r: r["macs"], default=None)')                                       # relative


### the tests

@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.set_grad_enabled(True)


def given(have, call, answer):
    "Call a check with another answer."
    wanted = answers(call)
    return eval(call, dict(have, **dict(zip(wanted, answer if len(wanted) > 1 else [answer]))))


@pytest.mark.parametrize('lesson, call', WRONG, ids=[f'{l}-{c.partition("(")[0]}' for l, c in WRONG])
def test_check_passes_the_right_answer_only(lesson, call):
    have, wanted = worked(lesson), answers(call)
    right = tuple(have[n] for n in wanted) if len(wanted) > 1 else have[wanted[0]]
    given(have, call, right)
    # the stub, in the lesson's own names where the solutions lack one
    untouched = stub(lesson, wanted)
    missing = set().union(*(names(s)[1] for s in untouched)) - have.keys()
    there = run_cells([*needed(runnable(LESSONS[lesson]), missing), *untouched], dict(have, **{n: None for n in wanted}))
    with pytest.raises(Exception) as said: eval(call, dict(have, **{n: there[n] for n in wanted}))
    assert said.type is not NameError, said.value
    for text in WRONG[lesson, call]:
        answer = made(text, have, right)
        with pytest.raises(REFUSED): given(have, call, answer), pytest.fail(f'{call} accepts {text}')
    others = {n: have.pop(n) for l, c in WRONG if l == lesson for n in answers(c) if n not in wanted}
    try: given(have, call, right)                                               # nobody waits for the other exercises
    finally: have.update(others)


def checks(source):
    "The checks that a cell defines."
    return {n.name: ast.dump(n) for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name.startswith('check_')}


@pytest.mark.parametrize('lesson', LESSONS)
def test_every_exercise_has_a_check_and_every_check_is_tried(lesson):
    text, cells = exercises(lesson)
    found = {k: v for c in cells for k, v in checks(c).items()}
    assert len(re.findall(r'^\d+\. ', text, re.M)) == len(found), 'an exercise without a check'
    assert found.keys() == {c.partition('(')[0] for l, c in WRONG if l == lesson}, 'add the check to WRONG in tests/test_checks.py'
    if not found: return
    bound = set(dir(builtins)).union(*(names(c)[0] for c in runnable(LESSONS[lesson])))
    assert set().union(*(names(c)[1] for c in cells)) <= bound, 'test_fail would take a name that is nowhere for a wrong answer'
    solved = {k: v for c in runnable(WORKED[lesson]) for k, v in checks(c).items()}
    assert {k: solved.get(k) for k in found} == found, 'the check differs from the one in the worked solutions'
    tried = [n for c in cells for n in ast.walk(ast.parse(c)) if isinstance(n, ast.For) and 'test_fail' in ast.unparse(n)]
    assert not tried, 'one test_fail for each exercise: solving the first must not break the second'
