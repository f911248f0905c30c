"""What a notebook cannot show: runs that are really killed, two processes in place of one, and the course recipe from end to end."""
import os, random, re, signal, zipfile
import pytest
import torch
from conftest import start, two_processes
from train_script import PLAIN, RANDOM, run, tiny_vit, train_set
from vitprune_nb.core import autocast
from vitprune_nb.engine.plan import weights_hash
from vitprune_nb.engine.policy import NormScore, Policy, Scorer, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.errors import VitpruneError
from vitprune_nb.files import sha256
from vitprune_nb.methods.life import life_plan
from vitprune_nb.methods.life_run import life_recipe
from vitprune_nb.train.course import train_course
from vitprune_nb.train.objectives import (distillation, kl_to_teacher, looks_at, loss_and_targets, penalty, plus, ratio_loss,
                                          supervised, token_mse)
from vitprune_nb.train.recipe import TrainConfig, frozen, make_optimizer
from vitprune_nb.train.teacher import RememberedTeacher
from vitprune_nb.train.trainer import (Log, Phase, Trainer, fit, load_checkpoint, read_log, restore_trainer, run_phases, save_checkpoint,
                                       trainer_state)
from vitprune_nb.vit.model import create_vit

SCRIPT = 'train_script.py'
pytestmark = pytest.mark.usefixtures('one_thread')


def apart(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)


def test_kill_9_changes_nothing(tmp_path):
    "Killed while writing a checkpoint, then killed at a random step in the middle of an epoch, then left alone."
    out, log = tmp_path/'killed', lambda rows: [(r['step'], r['lr'], r['loss']) for r in rows]
    half = start(SCRIPT, 'random', out, 'half-write')
    half.communicate(timeout=300)
    assert half.returncode == -signal.SIGKILL
    assert load_checkpoint(out/'checkpoint.pt')['step'] == 5           # the first checkpoint is whole; of the second …
    assert len(list(out.glob('.checkpoint.pt.*.tmp'))) == 1            # … half a temporary file is left

    stop = random.choice([s for s in range(11, 46) if s % 5 and s % 12])
    second = start(SCRIPT, 'random', out)
    seen = []
    for line in second.stdout:
        seen.append(int(line.split()[1]))
        if seen[-1] == stop: os.kill(second.pid, signal.SIGKILL); break
    assert second.wait(timeout=60) == -signal.SIGKILL
    second.stdout.close()
    assert seen[0] == 6, 'resumed after the checkpoint of step 5'
    assert 0 <= stop - load_checkpoint(out/'checkpoint.pt')['step'] <= 5, f'killed at step {stop}'

    third = start(SCRIPT, 'random', out)
    third.communicate(timeout=300)
    assert third.returncode == 0 and not list(out.glob('.*.tmp'))
    whole, rows = run('random', tmp_path/'whole')
    assert apart(torch.load(out/'final.pt', weights_only=True), whole.state_dict()) == 0, f'killed at step {stop}'
    assert log(read_log(out/'log.csv')) == log(rows)


def test_what_changes_before_each_step_survives_a_kill(tmp_path):
    "Killed in the middle of an epoch while token counts shrink from step to step; then left alone."
    out = tmp_path/'killed'
    first = start(SCRIPT, 'counts', out)
    for line in first.stdout:
        if line.split()[:2] == ['step', '18']: os.kill(first.pid, signal.SIGKILL); break
    first.communicate(timeout=300)
    assert 0 < load_checkpoint(out/'checkpoint.pt')['step'] < 48
    last = start(SCRIPT, 'counts', out)
    last.communicate(timeout=300)
    assert last.returncode == 0
    whole, _ = run('counts', None)
    assert apart(torch.load(out/'final.pt', weights_only=True), whole.state_dict()) == 0
    assert whole.policy.steps[1].count == 8 and whole.mode == 'gather'


def test_before_step_sees_the_model_and_its_average():
    seen, slim = [], SlimViT(tiny_vit(), Policy({1: Step(score=NormScore(), count=8)}))
    before = slim.policy
    def hook(model, done):
        seen.append((model is slim, done))
        model.set_policy(Policy({1: Step(score=model.scorers[0], count=16 - int(16*done))}))
    tr = Trainer(slim, train_set(), TrainConfig(epochs=.34, batch_size=48, ema=.5, dtype='fp32'), before_step=hook)
    tr.one_step()
    assert seen == [(True, 0.), (False, 0.)] and slim.policy.steps[1].count == 16
    tr.close()
    slim.set_policy(before)
    seen.clear()
    fit(slim, train_set(), TrainConfig(epochs=1, batch_size=48, dtype='fp32'), before_step=hook)
    assert seen == [(True, k/4) for k in range(4)] and slim.policy is before


def test_another_before_step_may_not_resume(tmp_path):
    cfg = TrainConfig(epochs=1, batch_size=48, dtype='fp32')
    def slow(model, done): pass
    def fast(model, done): pass
    fit(tiny_vit(), train_set(), cfg, out=tmp_path/'a', before_step=slow)
    for other in (fast, None):
        with pytest.raises(VitpruneError, match='before_step'): fit(tiny_vit(), train_set(), cfg, out=tmp_path/'a', before_step=other)
    fit(tiny_vit(), train_set(), cfg, out=tmp_path/'a', before_step=slow)


@pytest.mark.parametrize('mode', ['mask', 'gather', 'packed'])
def test_another_policy_is_what_a_new_model_would_be(mode):
    "With static positions, which are buffers, and without; what cannot be followed leaves the model as it was."
    x, score = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), NormScore()
    some = [Policy({0: Step(keep=range(0, 16, 2)), 1: Step(score=score, count=3)}), Policy({1: Step('middle', 'fuse', score=score, count=5)}),
            Policy({0: Step(keep=range(4))}), Policy({})]
    net = tiny_vit().eval()
    slim = SlimViT(net, some[0], mode)
    for p in (*some, some[0]):
        assert slim.set_policy(p) is slim
        assert torch.equal(slim(x), SlimViT(net, p, mode)(x)) and [n for n, _ in slim.named_buffers()] == [n for n, _ in SlimViT(net, p, mode).named_buffers()]
    for wrong, said in ((Policy({9: Step(keep=(1,))}), 'block index 9'), (Policy({1: Step(score=NormScore(), count=3)}), 'NormScore'), ('x', 'policy')):
        with pytest.raises(VitpruneError, match=said): slim.set_policy(wrong)
        assert slim.policy is some[0]


def test_two_processes_give_the_weights_of_one(tmp_path):
    two_processes(SCRIPT, 'plain', tmp_path/'two')
    model, rows = run('plain', tmp_path/'one')
    assert apart(torch.load(tmp_path/'two/final.pt', weights_only=True), model.state_dict()) < 1e-5
    assert apart(tiny_vit().state_dict(), model.state_dict()) > 1e-3
    assert [r['loss'] for r in read_log(tmp_path/'two/log.csv')] == pytest.approx([r['loss'] for r in rows], abs=1e-4)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    cfg = TrainConfig(**dict(RANDOM, epochs=.2))
    fit(tiny_vit(), train_set(), cfg, out=tmp_path)
    file = tmp_path/'checkpoint.pt'; whole = file.read_bytes()
    for bad in (b'', b'not a checkpoint', whole[:len(whole)//2], whole[:100] + bytes(200) + whole[300:]):
        file.write_bytes(bad)
        with pytest.raises(VitpruneError, match='checkpoint: got .*; allowed: a checkpoint that this trainer wrote') as e: fit(tiny_vit(), train_set(), cfg, out=tmp_path)
        assert '\n' not in str(e.value)
        assert file.read_bytes() == bad, 'left as it was'


def test_damage_that_sends_the_reader_before_the_file_is_refused(tmp_path, monkeypatch):
    "zipfile then seeks to a negative place: the system's error says nothing about the disk. Others do, and too little memory is no damage."
    file = tmp_path/'checkpoint.pt'
    save_checkpoint(file, step=3, names=['a'])
    whole = bytearray(file.read_bytes())
    end = whole.rindex(b'PK\6\6')
    whole[end + 48:end + 56] = (len(whole)*9).to_bytes(8, 'little')        # where its table of contents begins
    file.write_bytes(whole)
    with pytest.raises(OSError, match='Invalid argument'): zipfile.ZipFile(file).testzip()
    with pytest.raises(VitpruneError, match='allowed: a checkpoint that this trainer wrote. It cannot be read'): load_checkpoint(file)
    save_checkpoint(file, step=3, names=['a'])
    for error in (OSError(5, 'Input/output error'), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")):
        def fails(*_, **__): raise error
        monkeypatch.setattr(torch, 'load', fails)
        with pytest.raises(type(error)) as e: load_checkpoint(file)
        assert e.value is error


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    cfg = dict(RANDOM, epochs=.2)
    fit(tiny_vit(), train_set(), TrainConfig(**cfg), out=tmp_path)
    with pytest.raises(VitpruneError, match='Changed: lr was 0.002 and is 0.001'): fit(tiny_vit(), train_set(), TrainConfig(**dict(cfg, lr=1e-3)), out=tmp_path)
    with pytest.raises(VitpruneError, match='on these training images'): fit(tiny_vit(), train_set().subset(range(160)), TrainConfig(**cfg), out=tmp_path)
    turned = train_set().but(targets=train_set().targets[::-1].copy())                   # the same images under other labels
    with pytest.raises(VitpruneError, match='a checkpoint of a run with the labels'): fit(tiny_vit(), turned, TrainConfig(**cfg), out=tmp_path)
    done = fit(tiny_vit(seed=1), train_set(), TrainConfig(**cfg), out=tmp_path)          # the same one: finished, so nothing is left to do
    assert done == read_log(tmp_path/'log.csv') and done[-1]['step'] == 2


def test_nan_stops_before_the_weights(tmp_path):
    calls = []
    def bad(model):
        calls.append(1)
        return model.head.weight.sum()*(float('nan') if len(calls) == 4 else 0.)
    model = tiny_vit()
    with pytest.raises(VitpruneError, match=r'training stopped at step 3: got loss nan \(broken nan\) and .*; allowed: finite ones'):
        fit(model, train_set(), TrainConfig(**dict(RANDOM, save_every=1)), out=tmp_path,
            objective=plus(supervised, penalty('broken', bad)))
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path/'checkpoint.pt')['step'] == 3


def test_an_infinite_gradient_stops_too(tmp_path):
    model = tiny_vit()
    with pytest.raises(VitpruneError, match='got loss .* and gradient norm (inf|nan)'):
        steep = lambda m: (m.head.bias - m.head.bias.detach()).abs().sqrt().sum()                     # value 0, slope infinite
        fit(model, train_set(), TrainConfig(**RANDOM), objective=plus(supervised, penalty('steep', steep)))
    assert apart(tiny_vit().state_dict(), model.state_dict()) == 0


def test_workers_and_evaluation_change_nothing():
    cfg = TrainConfig(**dict(RANDOM, epochs=.5))
    plain, watched = tiny_vit(), tiny_vit()
    fit(plain, train_set(), cfg)
    fit(watched, train_set(), cfg, test_set=train_set().subset(range(16)), workers=2)
    assert apart(plain.state_dict(), watched.state_dict()) == 0


def test_a_pruned_model_trains(tmp_path):
    from vitprune_nb.engine import slim as engine
    model = engine.SlimViT(tiny_vit(), engine.Policy({1: engine.Step(keep=tuple(range(8)))}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = fit(model, train_set(), TrainConfig(**dict(RANDOM, epochs=.3, patch_drop=())), test_set=train_set().subset(range(16)), out=tmp_path)
    assert 'top1' in rows[-1] and apart(before, model.state_dict()) > 0 and not model.training
    with pytest.raises(VitpruneError, match='patch_drop: got 0.5'): fit(model, train_set(), TrainConfig(**RANDOM))


def test_course_recipe_end_to_end(tmp_path):
    "The whole of `train_course` on a few embedded images, from random weights of the right shape."
    from safetensors.torch import load_file, save_file
    weights = tmp_path/'big.safetensors'
    save_file(create_vit('vit_small_patch14_dinov2', img_size=112, num_classes=0).state_dict(), weights)
    info = train_course(weights, 'embedded', tmp_path/'run', device='cpu', test_limit=10, epochs=.001, batch_size=8, patch_drop=(.5,))
    file = tmp_path/'run/model'/info['file']
    assert info['images'] == 10 and [r['patch_drop'] for r in info['recipe']] == [(.5,)]*2 and info['weights_sha256'] == sha256(weights)
    assert sha256(file) == info['sha256']
    model = create_vit(info['model'], **info['kwargs'])
    model.load_state_dict({k: v.float() for k, v in load_file(file).items()})


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_checkpointed_gradients_are_those_that_are_kept(dtype):
    "The backward pass computes the blocks again: with the kernel of the forward pass."
    ends = []
    for checkpointed in (False, True):
        model = tiny_vit()
        model.set_grad_checkpointing(checkpointed)
        tr = Trainer(model, train_set(), TrainConfig(**dict(RANDOM, dtype=dtype, patch_drop=(), drop_path=0.)))
        ends.append(([tr.one_step() for _ in range(2)], model.state_dict()))
    (losses, weights), (again, others) = ends
    assert losses == pytest.approx(again, abs=1e-6) and apart(weights, others) < 1e-6


class TermByTerm(Trainer):
    "The loss as it was computed before there were objectives, one term after the other."
    extra_loss = None

    def losses(self, x, y):
        mix, criterion = loss_and_targets(self.cfg, self.plain.num_classes)
        x, target = (x, y) if mix is None else mix(x, y)
        with autocast(self.acc.device, self.cfg.dtype, self.model): logits = self.model(x)
        loss = criterion(logits.float(), target)
        if self.teacher is not None:
            with torch.no_grad(), autocast(self.acc.device, self.cfg.dtype, self.teacher): t = self.teacher(x)
            loss = (1 - self.cfg.distill)*loss + self.cfg.distill*distillation(logits.float(), t.float(), self.cfg.temperature)
        return dict(loss=loss if self.extra_loss is None else loss + self.extra_loss(self.plain))


def l1(model): return 1e-3*model.head.weight.abs().sum()


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@pytest.mark.parametrize('kind', ['plain', 'mixed', 'distilled', 'penalty', 'mixed, distilled, penalty', 'pruned'])
def test_the_numbers_are_those_of_the_loss_term_by_term(kind, dtype):
    changes = dict(dtype=dtype)
    if 'mixed' not in kind: changes |= dict(mixup=0., cutmix=0.)
    if 'distilled' in kind: changes |= dict(distill=.3, temperature=2.)
    if kind == 'pruned': changes |= dict(patch_drop=())
    cfg, end = TrainConfig(**{**RANDOM, **changes}), []
    objective = plus(supervised, penalty('l1', l1)) if 'penalty' in kind else None
    for make in (Trainer, TermByTerm):
        model = tiny_vit()
        if kind == 'pruned': model = SlimViT(model, Policy({1: Step(keep=tuple(range(8)))}))
        tr = make(model, train_set(), cfg, tiny_vit(3) if cfg.distill else None, objective)
        if make is TermByTerm and 'penalty' in kind: tr.extra_loss = l1
        end.append(([tr.one_step() for _ in range(3)], model.state_dict(), tr.best_model().state_dict()))
    (losses, weights, average), (old_losses, old_weights, old_average) = end
    assert losses == old_losses and apart(weights, old_weights) == 0 and apart(average, old_average) == 0


@looks_at('tokens', 'decisions', 'teacher_tokens')
def tokens_of_a_mean(seen):
    "An objective that uses all that it may see."
    assert seen.tokens.dtype == seen.logits.dtype == seen.teacher_tokens.dtype == torch.float32
    far = (seen.tokens - seen.teacher_tokens)[:, 1:].square().mean()
    late = (seen.targets*seen.logits.log_softmax(-1)).sum(-1).mean()
    return dict(far=far, late=-late*seen.progress*seen.epoch)


def test_tokens_come_from_the_pass_that_trains():
    "One forward pass of model and teacher for each step, and tokens that give the logits."
    model, teacher, passes = tiny_vit(), tiny_vit(3), []
    for m in (model, teacher): m.blocks[1].register_forward_hook(lambda *_: passes.append(1))

    @looks_at('tokens', 'teacher_tokens')
    def check(seen):
        assert torch.allclose(seen.model.forward_head(seen.tokens), seen.logits, atol=1e-6)
        assert torch.allclose(teacher.forward_head(seen.teacher_tokens), seen.teacher_logits, atol=1e-6)
        assert seen.present is None and seen.decisions == [] and not seen.teacher_tokens.requires_grad and seen.tokens.requires_grad
        return token_mse(1.)(seen)
    tr = Trainer(model.train(), train_set(), TrainConfig(**PLAIN), teacher, check)
    tr.one_step()
    assert len(passes) == 2
    assert not model.norm._forward_hooks and not teacher.norm._forward_hooks


def test_nothing_is_kept_that_nobody_asked_for():
    def check(seen):
        assert seen.tokens is None and seen.teacher_tokens is None
        return supervised(seen)
    Trainer(tiny_vit(), train_set(), TrainConfig(**PLAIN, distill=.5), tiny_vit(3), check).one_step()


def test_a_run_with_named_losses_resumes_with_the_same_log(tmp_path):
    cfg = TrainConfig(**dict(RANDOM, patch_drop=(), epochs=1, log_every=4))
    everything = dict(teacher=tiny_vit(3), objective=plus(supervised, tokens_of_a_mean))

    def interrupt(rows):
        if rows[-1]['step'] == 8: raise KeyboardInterrupt
    whole, cut = tiny_vit(), tiny_vit()
    rows = fit(whole, train_set(), cfg, out=tmp_path/'whole', **everything)
    with pytest.raises(KeyboardInterrupt): fit(cut, train_set(), cfg, out=tmp_path/'cut', callback=interrupt, **everything)
    assert load_checkpoint(tmp_path/'cut/checkpoint.pt')['step'] == 5              # one step past a row of the log
    again = fit(tiny_vit(9), train_set(), cfg, out=tmp_path/'cut', **everything)
    keys = ('step', 'lr', 'loss', 'classification', 'far', 'late')
    assert [[r[k] for k in keys] for r in again] == [[r[k] for k in keys] for r in rows]
    assert read_log(tmp_path/'cut/log.csv') == again
    assert (tmp_path/'cut/log.csv').read_text().splitlines()[0].split(',') == [*Log.fields, 'classification', 'far', 'late']
    for r in rows: assert r['loss'] == pytest.approx(r['classification'] + r['far'] + r['late'], rel=1e-5)
    with pytest.raises(VitpruneError, match='allowed: a checkpoint of a run with the objective supervised. It was'):
        fit(tiny_vit(), train_set(), cfg, out=tmp_path/'cut')


def test_a_run_of_old_goes_on(tmp_path):
    "A folder from before losses had names: no column for them, no name in the checkpoint."
    cfg, out, log = TrainConfig(**dict(RANDOM, epochs=1, log_every=4)), tmp_path/'old', lambda rows: [(r['step'], r['loss']) for r in rows]

    def interrupt(rows):
        if rows[-1]['step'] == 8: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(tiny_vit(), train_set(), cfg, out=out, callback=interrupt)
    state = load_checkpoint(out/'checkpoint.pt')
    save_checkpoint(out/'checkpoint.pt', **{k: v for k, v in state.items() if k not in ('named', 'about')})
    lines = (out/'log.csv').read_text().splitlines()
    (out/'log.csv').write_text(''.join(','.join(l.split(',')[:len(Log.fields)]) + '\n' for l in lines))
    whole, old = tiny_vit(), tiny_vit(9)
    rows, again = fit(whole, train_set(), cfg), fit(old, train_set(), cfg, out=out)
    assert log(again) == log(rows) and apart(whole.state_dict(), old.state_dict()) == 0
    assert ['classification' in r for r in again] == [False, True, True]
    assert read_log(out/'log.csv') == again


def test_a_run_whose_checkpoint_names_its_objective_at_the_top(tmp_path):
    "As checkpoints did before they said more of a run."
    cfg, file = TrainConfig(**dict(PLAIN, epochs=.2)), tmp_path/'checkpoint.pt'
    far = plus(supervised, penalty('far', lambda m: m.head.weight.square().sum()))
    def hook(model, done): pass
    first = Trainer(tiny_vit(), train_set(), cfg, objective=far)
    state = trainer_state(first)
    about = state.pop('about')
    save_checkpoint(file, **state, objective=about['objective'], before_step=about['before_step'])
    restore_trainer(Trainer(tiny_vit(), train_set(), cfg, objective=far), file)
    for kw, said in ((dict(), 'the objective supervised. It was '), (dict(objective=far, before_step=hook), 'the function before a step hook. It was none. ')):
        with pytest.raises(VitpruneError, match=f'allowed: a checkpoint of a run with {said}'): restore_trainer(Trainer(tiny_vit(), train_set(), cfg, **kw), file)


def test_what_two_runs_do_not_share_is_shown(tmp_path):
    "Both sides of a refusal differ, however late two long descriptions part."
    file, cfg = tmp_path/'checkpoint.pt', TrainConfig(**dict(PLAIN, epochs=.2))
    keep = Policy({1: Step(keep=range(14))}), Policy({1: Step(keep=[*range(13), 15])})
    def still(*parts):
        model = tiny_vit()
        for part in parts:
            for p in model.blocks[part].parameters(): p.requires_grad_(False)
        return model
    def said(first, second):
        save_checkpoint(file, **trainer_state(Trainer(first, train_set(), cfg)))
        with pytest.raises(VitpruneError) as e: restore_trainer(Trainer(second, train_set(), cfg), file)
        return str(e.value).partition('a checkpoint of a run with ')[2].partition(' Use another')[0]
    here, there = re.fullmatch(r'the policy … (.*)\. It was … (.*)\.', said(*(SlimViT(tiny_vit(), p) for p in keep))).groups()
    assert here.startswith('15)') and there.startswith('13)')
    n = sum(1 for _ in tiny_vit().blocks[0].parameters())
    part = lambda k: f'blocks.{k}.norm1.weight … ({n})'
    assert said(still(0), still(1)) == f'the parameters that learn here. Only there: {part(1)}; only here: {part(0)}.'
    assert said(still(), still(1)) == f'the parameters that learn here. Only there: {part(1)}; only here: none.'


def test_a_teacher_that_remembers_is_the_teacher_that_it_remembers(tmp_path):
    "A run may go on with either, also from a checkpoint that took the two for different ones; another teacher is refused."
    file, cfg = tmp_path/'checkpoint.pt', TrainConfig(**dict(PLAIN, epochs=.2, distill=.5))
    kinds = dict(plain=lambda m: m, remembers=lambda m: RememberedTeacher(m, tmp_path/'said'))
    def trainer(kind, seed): return Trainer(tiny_vit(), train_set().but(transform=None), cfg, kinds[kind](tiny_vit(seed)))
    for kind in kinds:
        state = trainer_state(trainer(kind, 3))
        of_old = dict(state['about'], teacher=weights_hash(RememberedTeacher(tiny_vit(3), tmp_path/'said')))
        assert of_old['teacher'] != state['about']['teacher'] == weights_hash(tiny_vit(3))
        for about in (state['about'], of_old):
            save_checkpoint(file, **dict(state, about=about))
            for other in kinds:
                restore_trainer(trainer(other, 3), file)
                with pytest.raises(VitpruneError, match='a run with the teacher .*It was '): restore_trainer(trainer(other, 4), file)


def test_classes_are_numbered_as_the_model_numbers_them(tmp_path):
    "Images with other numbers for the same classes train and score alike, in phases too; unknown names are refused before anything is written."
    cfg, names = TrainConfig(**dict(PLAIN, epochs=.2)), list('abcdefghij')
    ds, few = train_set().but(classes=names), train_set().subset(range(20)).but(classes=names)
    turned = lambda s: s.but(classes=names[::-1], targets=9 - s.targets)
    policy = Policy({1: Step(keep=range(8))})
    def named(way):
        model = SlimViT(tiny_vit(), Policy({})) if way == 'view' else tiny_vit()      # names of its own, as after loading
        model.classes = list(names)
        return model
    phases = lambda m, a, b, out: run_phases(m, a, [Phase('p', cfg, policy=policy)], out, test_set=b)['p']
    ways = dict(fit=lambda m, a, b, out: fit(m, a, cfg, b, out), phases=phases, view=phases)
    for way, go in ways.items():
        one, other = named(way), named(way)
        rows, again = go(one, ds, few, None), go(other, turned(ds), turned(few), None)
        assert [(r['loss'], r.get('top1')) for r in rows] == [(r['loss'], r.get('top1')) for r in again]
        assert apart(one.state_dict(), other.state_dict()) == 0
        strange = lambda s: s.but(classes=[*names[:9], 'z'])
        for a, b in ((strange(ds), few), (ds, strange(few))):
            with pytest.raises(VitpruneError, match='with the class z; allowed: '): go(one, a, b, tmp_path/way)
        teacher = tiny_vit(3); teacher.classes = names[::-1]
        for who in (teacher, RememberedTeacher(teacher, tmp_path/'said')):
            for how in (dict(distill=.5), {}):
                with pytest.raises(VitpruneError, match='teacher: got a model whose classes are j, i, .*allowed: one with a, b, '):
                    fit(one, ds, TrainConfig(**dict(PLAIN, **how)), few, tmp_path/way, who, None if how else kl_to_teacher())
        assert not (tmp_path/way).exists() and apart(one.state_dict(), other.state_dict()) == 0


@pytest.mark.parametrize('objective, changes, said', [
    (None, {}, r'model: got one without a head \(num_classes=0\); allowed: a classifier, to train on labels'), (supervised, {}, 'model: got one without a head'),
    (plus(supervised, penalty('l1', lambda m: m.norm.weight.abs().sum())), {}, 'model: got one without a head'),
    (looks_at('tokens')(lambda s: dict(size=s.tokens.square().mean())), dict(mixup=.8), r'mixup, cutmix: got \(0.8, 0.0\); allowed: 0 and 0 for a model without a head'),
])
def test_a_model_without_a_head_has_no_labels_to_learn(objective, changes, said, tmp_path):
    headless = create_vit('deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    recipe = TrainConfig(**dict(PLAIN, epochs=.2, **changes))
    with pytest.raises(VitpruneError, match=said): fit(headless, train_set(), recipe, objective=objective)
    rows = fit(headless, train_set(), TrainConfig(**dict(PLAIN, epochs=.2)), objective=looks_at('tokens')(lambda s: dict(size=s.tokens.square().mean())))
    assert rows[-1]['loss'] > 0                                             # what asks for no labels trains


def wide_vit(**kwargs): return create_vit('deit_tiny_patch16_224', **{**dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10), **kwargs})


@pytest.mark.parametrize('remembers', [False, True])
@pytest.mark.parametrize('distill, change, said', [
    (.5, dict(num_classes=7), 'teacher: got a model of 7 classes; allowed: one of 10, as the model'),
    (0, dict(num_classes=7), r'teacher: got logits of shape \(16, 7\); allowed: the shape of the student, \(16, 10\)'),
    (.5, dict(img_size=48), r"teacher: got VisionTransformer and images of shape \(16, 3, 32, 32\); allowed: a model that takes these images. It says: Input height \(32\)"),
])
def test_a_teacher_that_does_not_fit(distill, change, said, remembers, tmp_path):
    teacher = wide_vit(**change)
    if remembers: teacher = RememberedTeacher(teacher, tmp_path)
    with pytest.raises(VitpruneError, match=said):
        fit(tiny_vit(), train_set(), TrainConfig(**dict(PLAIN, distill=distill)), teacher=teacher, objective=None if distill else kl_to_teacher())


@pytest.mark.parametrize('student, teacher, temperature, said', [
    ((4, 5), (1, 5), 1., r'teacher: got logits of shape \(1, 5\); allowed: the shape of the student, \(4, 5\)'), ((4, 5), (4, 1), 1., 'teacher: got'), ((4, 5), (5,), 1., 'teacher: got'),
    *(((4, 5), (4, 5), t, 'temperature: got .*; allowed: a positive number') for t in (0, 0., -1., float('nan'), None, '2', True)),
])
def test_logits_that_cannot_be_compared(student, teacher, temperature, said):
    with pytest.raises(VitpruneError, match=said): distillation(torch.zeros(student), torch.zeros(teacher), temperature)
    assert distillation(torch.zeros(4, 5), torch.zeros(4, 5), 2) == 0


@pytest.mark.parametrize('bad, said', [
    (lambda s: s.logits.sum(), 'got Tensor from .*; allowed: a dict'),
    (lambda s: {}, 'got dict from .*; allowed: a dict'),
    (lambda s: dict(a=s.logits), r"got 'a' of shape \(16, 10\)"),
    (lambda s: dict(a=1.), "got 'a' of float"),
    (lambda s: {'a,b': s.logits.sum()}, "a loss named 'a,b'"),
    (lambda s: dict(lr=s.logits.sum()), 'a loss named lr'),
    (looks_at('gradients')(lambda s: supervised(s)), "needs: got .*gradients"),
    (looks_at('teacher_tokens')(lambda s: supervised(s)), "teacher: got None"),
    (looks_at('teacher')(lambda s: supervised(s)), "teacher: got None"),
    (7, 'objective: got int; allowed: a function of a `Seen`'),
])
def test_an_objective_that_cannot_be_is_refused(bad, said):
    model = tiny_vit()
    with pytest.raises(VitpruneError, match=said): fit(model, train_set(), TrainConfig(**PLAIN), objective=bad)
    assert apart(tiny_vit().state_dict(), model.state_dict()) == 0


def test_a_teacher_that_nobody_asks_is_refused():
    with pytest.raises(VitpruneError, match='distill: got 0.0; allowed: a positive weight together with a teacher, or neither'):
        fit(tiny_vit(), train_set(), TrainConfig(**PLAIN), teacher=tiny_vit(3), objective=ratio_loss((.5,)))
    fit(tiny_vit(), train_set(), TrainConfig(**dict(PLAIN, epochs=.1)), teacher=tiny_vit(3), objective=plus(supervised, kl_to_teacher()))


def test_phases_are_runs_with_the_rest_frozen(tmp_path):
    "By hand: `fit` under `frozen`; killed in the second phase, the first is not run again."
    cfg = TrainConfig(**dict(PLAIN, epochs=.3, save_every=1))
    model, oracle = tiny_vit(), tiny_vit()
    oracle.blocks[0].requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    phases = [Phase('head', cfg, trains=lambda n: n.startswith('head.'), objective=plus(supervised, penalty('l1', l1))),
              Phase('rest', cfg, policy=Policy({1: Step(keep=tuple(range(8)))}), mode='mask')]

    def kill(rows):
        if 'l1' not in rows[-1]: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_phases(model, train_set(), phases, tmp_path, callback=kill)
    model.load_state_dict(tiny_vit(5).state_dict())
    logs = run_phases(model, train_set(), phases, tmp_path)
    with frozen(*(p for n, p in oracle.named_parameters() if not n.startswith('head.'))):
        fit(oracle, train_set(), cfg, objective=phases[0].objective)
    fit(SlimViT(oracle, phases[1].policy, 'mask'), train_set(), cfg)
    assert apart(oracle.state_dict(), model.state_dict()) == 0
    assert list(logs) == ['head', 'rest'] and logs['rest'] == read_log(tmp_path/'rest/log.csv')
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [n for n, _ in model.named_parameters() if n.startswith('blocks.0.')]
    assert not model.training and type(model.blocks[1].attn).__name__ == 'Attention'


class SoftLinear(Scorer):
    "A learned score whose soft form is a straight-through mask: 1 above 0, 0 below, with the slope of the sigmoid."
    def __init__(self, width):
        super().__init__()
        self.line = torch.nn.Linear(width, 1)

    def forward(self, t): return self.line(t.x).squeeze(-1)

    def soft_keep(self, t, scores):
        soft = scores.sigmoid()
        hard = (soft > .5).float() + soft - soft.detach()
        return torch.cat([torch.ones_like(hard[:, :t.n_prefix]), hard[:, t.n_prefix:]], 1)


def test_soft_decisions_of_the_engine_learn_a_share(tmp_path):
    "The whole loss of DynamicViT on two decisions: gradients reach both scorers, and the kept shares move to those wanted."
    torch.manual_seed(0)
    policy = Policy({1: Step(score=SoftLinear(48), count=8), 2: Step(score=SoftLinear(48), count=8)})
    model, teacher, seen = SlimViT(tiny_vit(), policy, 'mask'), tiny_vit(3), []

    @looks_at('tokens', 'decisions')
    def watch(s):
        first, second = (d.keep[:, 1:].detach() for d in s.decisions)
        assert (s.present[:, 1:] == (first*second > .5)).all() and s.present[:, 0].all()
        assert s.tokens.shape == (16, 17, 48) and s.decisions[0].keep.requires_grad
        seen.append((first.mean().item(), (first*second).mean().item()))
        return dict(nothing=s.logits.sum()*0.)
    cfg = TrainConfig(**dict(PLAIN, epochs=4, lr=3e-3, head_lr_scale=5., layer_decay=1.))
    rows = fit(model, train_set(), cfg, out=tmp_path, teacher=teacher,
               objective=plus(supervised, ratio_loss((.75, .5)), kl_to_teacher(), token_mse(), watch))
    assert {'classification', 'ratio', 'kl', 'token_mse'} <= set(rows[-1])
    assert abs(seen[-1][0] - .75) < .15 and abs(seen[-1][1] - .5) < .15, seen[::8]
    assert rows[-1]['ratio'] < rows[0]['ratio']/2


@pytest.mark.parametrize('scale', [None, 100., 0.])
def test_learned_scores_may_have_a_rate_of_their_own(scale):
    slim = SlimViT(tiny_vit(), Policy({1: Step(score=SoftLinear(48), count=8)}), 'mask')
    opt = make_optimizer(slim, TrainConfig(layer_decay=1., head_lr_scale=2., score_lr_scale=scale))
    scale_of = {id(p): g.get('lr_scale', 1.) for g in opt.param_groups for p in g['params']}
    names = {n: scale_of[id(p)] for n, p in slim.named_parameters()}
    assert len(scale_of) == len(names) == sum(len(g['params']) for g in opt.param_groups)
    scores = {v for n, v in names.items() if n.startswith('scorers')}
    assert scores == {2. if scale is None else scale}
    assert names['head.weight'] == 2. and names['blocks.0.attn.qkv.weight'] == 1.
    with pytest.raises(VitpruneError, match='score_lr_scale: got -1'): TrainConfig(score_lr_scale=-1)


def test_two_stages_of_life_regression_are_two_runs_with_one_half_frozen():
    small = dict(epochs=.3, batch_size=16, augment='none', dtype='fp32')
    first, second = life_recipe(1e-3, **small), life_recipe(1e-4, **small)
    ends = []
    for by_hand in (False, True):
        vit = tiny_vit()
        plan = life_plan(vit, .5, (1, 2))
        soft = SlimViT(vit, plan.policy(plan.score(48), 'soft'), 'mask')
        if by_hand:
            with frozen(soft.model): a = fit(soft, train_set(), first)
            with frozen(soft.scorers): b = fit(soft, train_set(), second)
        else:
            phases = Phase('predictor', first, trains=[soft.scorers]), Phase('backbone', second, trains=[soft.model])
            a, b = run_phases(soft, train_set(), phases).values()
        ends.append((soft.state_dict(), [r['loss'] for r in (*a, *b)]))
    assert apart(ends[0][0], ends[1][0]) == 0 and ends[0][1] == ends[1][1]
    assert apart(ends[0][0], SlimViT(tiny_vit(), plan.policy(plan.score(48), 'soft'), 'mask').state_dict()) > 0
