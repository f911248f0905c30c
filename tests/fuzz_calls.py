"""Random calls of the public functions, for fuzz.py: a call is a line of Python, most of whose arguments are fine."""
import math, sys, traceback, warnings

ODD = ['None', 'True', 'False', '-1', '0', '3', '1.5', 'nan', 'inf', '-inf', '10**30', '1e99', "''", "'x'", "'ü'", "'7'", '[]', '{}', '()', '[1, 2]', "{'a': 1}", 'object()', "b'x'", 'np.array([1., 2.])', 'np.zeros(0)',
       'torch.zeros(2, 3)', 'torch.tensor(nan)', "Path('none')", 'print', 'int', '3j', 'np.float64(.5)', 'np.int64(4)', "'a\\nb'", 'range(3)', '{1, 2}', '[None]', "'" + 'a' * 300 + "'", 'images(2)', 'model()', 'slim()', "tree('train')"]
NO_NUMBER = ['None', 'True', "'3'", 'nan', 'inf', '-inf', '[]', '{}', "''", '3j', 'object()']


class Arg:
    "An argument: values that are fine, values that must be refused, and whether any odd one may be tried."
    def __init__(self, good, bad=(), often=1., odd=True): self.good, self.bad, self.often, self.odd = good, list(bad), often, odd


def number(good, bad=(), often=.3, none=False): return Arg(good, [v for v in NO_NUMBER if not (none and v == 'None')] + list(bad), often)
def word(good, bad=(), often=.3, none=False): return Arg(good, ["'none'", "''", '3', 'True', '[]'] + ([] if none else ['None']) + list(bad), often)


def text(good, often=1.): return Arg(good, ['3', 'True', 'None', '[]'], often)


DEVICE = Arg(["'cpu'", "'auto'", "torch.device('cpu')"], ["'tpu'", "'cpu:x'", "'cuda:99'", "'mps:1'", "''", '3', 'None', '[]', "'cpu:1'", "'meta'", "torch.device('meta')"], .25)
PLACE = Arg([*DEVICE.good, 'None'], [v for v in DEVICE.bad if v != 'None'], DEVICE.often)       # None: where the model is
MODEL = Arg(['model()'] * 5, ['None', '3', "'course'", 'torch.nn.Linear(3, 3)', 'torch.nn.Identity()', 'object()', '[]'])
SET = Arg(["tree('train')"] * 4, ['None', '3', "'embedded'", 'object()', "tree('train').subset([])"])
SEED = number(['0', '7'], ['-1', '1.5', '2**32', '10**30'], .2)
DTYPE = word(["'fp32'", "'bf16'", "'auto'"], ["'int8'"], .2)
LIMIT = number(['3', '10'], ['0', '-1', '1.5'], .3, none=True)
BATCH = number(['2', '4'], ['0', '-1', '1.5'], .4)
REDUCTION = number(['.2', '.3'], ['0', '1', '-1', '1e99', '1.5'])
KEYS = word(["'entering'", "'all'", "'kept'"], none=True)
OUT = Arg(["new('p')", "'p'"], ["zoo/'uniform'", "zoo/'file'", "''", '3', '[]', 'None', "zoo/'tree'"])
FREE = Arg(["new('p')", "'p'", 'None'], ["zoo/'file'", '3', '[]'], .3)
EPOCHS = number(['.3', '1'], ['0', '-1', '1e99'], .8)
RECIPE = dict(epochs=EPOCHS, batch_size=number(['4', '6'], ['0', '-1', '1.5', '10**30'], .8), lr=number(['1e-3'], ['0', '-1'], .3), head_lr_scale=number(['1', '2.5'], ['-1'], .1), layer_decay=number(['1', '.8'], ['0', '2', '-1'], .1),
              weight_decay=number(['0', '.05'], ['-1'], .1), warmup=number(['0', '.5'], ['1', '-1'], .1), min_lr=number(['0', '1e-6'], ['-1'], .1), augment=word(["'none'", "'light'", "'deit'"], often=.2), mixup=number(['0', '.5'], ['-1'], .1),
              cutmix=number(['0', '.5'], ['-1'], .1), label_smoothing=number(['0', '.1'], ['1', '-1'], .1), patch_drop=Arg(['()', '(.5,)', '[.5, 0]'], ['3', "'x'", '(1,)', '(nan,)', "('a',)", '(True,)', '(-1,)', 'None'], .1),
              freeze=number(['0', '1', '2'], ['-1', '1.5'], .1), drop_path=number(['0', '.1'], ['1', '-1'], .1), ema=number(['0', '.9'], ['1', '-1'], .1), clip_grad=number(['0', '1'], ['-1'], .1), distill=number(['0', '.5'], ['-1', '1.5'], .05),
              temperature=number(['1', '2'], ['0', '-1'], .1), dtype=DTYPE, seed=SEED, save_every=number(['1', '200'], ['0', '1.5'], .1), log_every=number(['1', '20'], ['0', '1.5'], .1))
OPTIONS = {
    'uniform': dict(reduction=Arg(['.2', '.3'], REDUCTION.bad), keys=KEYS, calibration=number(['3', '5'], ['0', '-1', '1.5', '999'], 1.), batch_size=number(['2'], ['0', '1.5'], none=True)),
    'patch-slimming': dict(reduction=Arg(['.2', '.3'], [v for v in REDUCTION.bad if v != 'None']), keys=KEYS, step=number(['2', '.2'], ['0', '-1', '1.5'], none=True), calibration=number(['3'], ['0', '1.5', '999'], 1.)),
    'vtp': dict(ratio=number(['.1', '.3'], ['1', '-1'], 1., none=True), l1=number(['0', '1e-4'], ['-1']), gate_start=number(['1', '.1'], ['0', '-1']), rule=word(["'folded'", "'gate'", "'literal'"]),
                multiple=number(['1', '4'], ['0', '1.5', '-1']), whole_heads=Arg(['True', 'False'], ['3', "'x'", 'None', 'nan'], .3), sparse_epochs=Arg(['0', '0', '.3'], ['-1', *NO_NUMBER]), batch_size=number(['4'], ['0'], .5, none=True), lr=number(['1e-4'], ['0'], none=True)),
    'life': dict(keep_rate=Arg(['.7', '[.9, .8]', '.5'], ['0', '1.5', "'x'", '[]', 'nan', 'True', '[.5, None]', '[[]]', '{}']), stages=Arg(['[2, 4]', '(2, 4)'], ['[]', '[4, 2]', '[2, 99]', '3.5', "'x'", '[True]', '[2, 2]', '[0]', '{}'], 1.),
                 t_base=number(['1', '2'], ['-1', '1.5', '99'], .2, none=True), U=number(['1.5'], ['0', '-1']), predictor_epochs=Arg(['0', '0', '.3'], ['-1', *NO_NUMBER]), backbone_epochs=Arg(['0', '0', '.3'], ['-1', *NO_NUMBER]), batch_size=number(['4'], ['0'], .4, none=True)),
    'cosine': dict(cosine_threshold=number(['.9', '.5'], ['0', '1', '-1'], none=True), score_threshold=number(['.3', '.5'], ['0', '1', '-1'], none=True), keys=word(["'all'", "'kept'"], none=True), rounds=number(['0', '1'], ['-1', '1.5'], .2),
                   calibration=number(['3'], ['0', '1.5', '999'], 1.)),
}
STEP = dict(at=word(["'before'", "'queries'", "'middle'"]), fate=word(["'remove'", "'idle'", "'fuse'", "'merge'", "'halt'"]))
POLICY = Arg(['policy()', 'Policy({1: Step(keep=(0, 1, 2))})', "Policy({2: Step('middle', score=ClsAttention(), count=4)})", "Policy({1: Step(score=NormScore(), threshold=1.)})", 'None'],
             ['3', "'x'", '{}', "{1: Step(keep=(0,))}", 'Policy({99: Step(keep=(0,))})', 'Policy({1: Step(keep=(99,))})', 'Policy({1: Step(score=NormScore(), count=99)})'])
COUNTS = Arg(['None', '[(17, 17, 17)]*6', '[(5, 17, 5)]*6'], ['3', "'x'", '[]', '[(17,)*3]*5', '[(1, 2)]*6', '[(99,)*3]*6', '[(nan,)*3]*6', "[('a',)*3]*6", '[(-1,)*3]*6', '[None]*6', '[(True,)*3]*6'], .5)
IMAGES = Arg(['None', 'images(2)', "tree('test')"], ['3', "'x'", 'images(2)[0]', 'torch.zeros(0, 3, 32, 32)', 'torch.zeros(2, 1, 32, 32)', 'torch.zeros(2, 3, 16, 16)'], .5)
CALLS = {   # function: {argument: values}
    **{f'prune/{m}': dict(name=Arg([f"'{m}'"] * 6, ["'magic'", "''", 'None', '3', '[]']), model=MODEL, train_set=SET, seed=SEED, device=DEVICE, work=Arg(["new('w')"], ['3', "zoo/'file'", '[]'], .1), **o) for m, o in OPTIONS.items()},
    'recover': dict(model=Arg(['slim()', 'packed()', 'sliced()'], [v for v in MODEL.bad]), train_set=SET, epochs=EPOCHS, lr=number(['1e-4'], ['0', '-1']), batch_size=number(['4'], ['0', '99', '1.5'], none=True), seed=SEED, device=DEVICE, dtype=DTYPE,
                    out=FREE, recipe=Arg(['{}', 'dict(mixup=0.)', 'None'], ['3', "'x'", "dict(colour=1)", 'dict(warmup=nan)', 'dict(epochs=2)', "{3: 4}"], .3)),
    'load_pruned': dict(folder=Arg(["zoo/'uniform'", "zoo/'cut'", "zoo/'life'", "str(zoo/'planned')"] + [f"zoo/'broken/{i}'" for i in range(0, 40, 3)], ["zoo/'tree'", "'none'", "''", '3', 'None', '[]', "zoo/'file'"])),
    'load_slim': dict(folder=Arg(["zoo/'uniform'", "zoo/'life'"], ["zoo/'tree'", "'none'", "''", '3', 'None']), mode=word(["'gather'", "'packed'", "'mask'"], none=True)),
    'load_sliced': dict(folder=Arg(["zoo/'cut'", "zoo/'both'"], ["zoo/'tree'", "'none'", "''", '3', 'None'])),
    'save_pruned': dict(model=Arg(['slim()', 'sliced()', 'packed()'], ['model()', 'None', '3', "'x'"]), folder=OUT, note=Arg(["'text'", '3', '{}'], ['object()', 'torch.zeros(2)', 'print'], .3)),
    'save_slim': dict(slim=Arg(['slim()', 'packed()'], ['model()', 'None', '3']), folder=OUT, note=Arg(["'text'"], ['object()'], .3)),
    'save_sliced': dict(model=Arg(['sliced()'], ['model()', 'None', '3', 'slim()']), folder=OUT),
    'SlimViT': dict(model=MODEL, policy=POLICY, mode=word(["'gather'", "'packed'", "'mask'"], often=.5)),
    'Policy': dict(steps=Arg(['{}', 'None', '{1: Step(keep=(0,))}'], ['3', "'x'", '[1]', '{-1: Step(keep=(0,))}', '{1: 3}', "{'1': Step(keep=(0,))}", '{True: Step(keep=(0,))}', '{1.5: Step(keep=(0,))}']), name=text(["'mine'"], .3)),
    'Step/keep': dict(STEP, keep=Arg(['(0, 1)', '[3, 2]', 'range(4)', 'torch.arange(3)', 'np.arange(2)'], ['3', "'x'", "'12'", '(0, 0)', '(-1,)', '(nan,)', '(1.5,)', "('a',)", '(None,)', '(True,)', 'object()'])),
    'Step/count': dict(STEP, score=Arg(['NormScore()', 'RandomScore()'], ['3', "'x'", 'None', 'print']), count=number(['2', '5'], ['-1', '1.5', '10**30'], 1.)),
    'Step/threshold': dict(STEP, score=Arg(['NormScore()'], ['3', 'None']), threshold=number(['1.', '0', '-3.5'], [], 1.)),
    'Policy.from_dict': dict(d=Arg(['policy().to_dict()'], ['3', "'x'", 'None', '{}', '[]', "{'steps': 3, 'name': 'x'}", "{'steps': {'a': {}}, 'name': 'x'}", "{'steps': {'1': 3}, 'name': 'x'}", "{'steps': {'1': {'keep': 'x'}}, 'name': 'x'}", "{'steps': {'1': {'score': 'norm'}}, 'name': 'x'}",
                                                                    "{'steps': {'1': {'score': {'kind': 'os'}, 'count': 1}}, 'name': 'x'}", "{'steps': {'1': {'score': {'kind': 'norm', 'a': 1}, 'count': 1}}, 'name': 'x'}", "{'steps': {'1': {'keep': [0], 'colour': 1}}, 'name': 'x'}", "{'steps': {}}"])),
    'Policy.counts': dict(self=Arg(['policy()', 'Policy({1: Step(keep=(0, 1))})'], ['Policy({1: Step(score=NormScore(), threshold=1.)})', 'Policy({9: Step(keep=(0, 1))})']), n_blocks=number(['6'], ['0', '-1', '1.5'], 1.), n_tokens=number(['17'], ['0', '-1', '1.5'], 1.), n_prefix=number(['1'], ['-1', '1.5', '99'])),
    'parse_schedule': dict(value=Arg(['.7', '[1, 1, .5, .5, .5, .5]', '{2: .5}', "{'2': .5}", "write('a.json', '0.5')"], ['0', '1.5', "'x'", 'None', 'nan', 'True', '[]', '[.5]', '{9: .5}', "{'a': .5}", '{1: None}', '{1: [1]}', "'none.json'", "write('a.json', '{')", "write('a.json', '[1, 2]')", "write('a.json', '\\xff', 'latin-1')",
                           '[.5, None, 1, 1, 1, 1]', '{1.5: .5}', '{True: .5}', "Path('a.txt')"]), n_blocks=number(['6'], ['0', '-1', '1.5'], 1.)),
    'schedule_policy': dict(schedule=Arg(['.5', '{2: .5}'], ['0', "'x'", 'None', 'nan']), n_blocks=number(['6'], ['0', '-1', '1.5'], 1.), n_patches=number(['16'], ['0', '-1', '1.5'], 1.), score=Arg(['NormScore()'], ['3', 'None', "'norm'"]), **STEP),
    'pyramid': dict(n_blocks=number(['6'], ['0', '-1', '1.5'], 1.), n_patches=number(['16'], ['0', '-1', '1.5'], 1.), rates=Arg(['{2: .5}', '{2: .5, 4: .3}'], ['3', "'x'", 'None', '{9: .5}', "{2: 'x'}", '{2: 0}', '{2: nan}', '{2: 1.5}']), seed=SEED),
    'Plan': dict(method=text(["'mine'"]), model=text(["'test_vit'"]), n_patches=number(['16'], ['0', '-1', '1.5'], 1.), n_prefix=number(['1'], ['-1', '1.5'], 1.),
                 keep=Arg(['[(0, 1)]*6', '[range(16), (0,), (0,), (), (), ()]'], ['3', "'x'", 'None', '[]', '[(99,)]*6', '[(0,), (1,)]', '[(nan,)]', "[('a',)]", '[3]', '[(0, 0)]', '[(1.5,)]', '[(-1,)]', "['12']", '[(True,)]']), info=Arg(['{}', "dict(keys='all')"], ['3', "'x'", '[]', 'None'], .3)),
    'plan().slim': dict(model=Arg(['model()'] * 3, [*MODEL.bad, "create_vit('test_vit')", "create_vit('test_vit2')"]), keys=KEYS, mode=word(["'gather'", "'mask'", "'packed'"])),
    'plan().counts': dict(keys=KEYS), 'plan().policy': dict(keys=KEYS), 'plan().reduction': dict(model=MODEL, keys=KEYS), 'plan().save': dict(path=Arg(["new('plan.json')"], ["zoo/'tree'", '3', 'None', "zoo/'file'/'x'", "''"])),
    'load_plan': dict(path=Arg(["zoo/'planned'/'plan.json'"], ["zoo/'tree'", "'none'", '3', 'None', "''", "write('p.json', '{}')", "write('p.json', '[1]')", "write('p.json', '\\xff', 'latin-1')", "write('p.json', '{\"format\": 3}')", "zoo/'w.pth'", "write('p.json', '[' * 5000)"])),
    'uniform_plan': dict(model=MODEL, scores=Arg(['torch.rand(6, 17)'], ['3', "'x'", 'None', 'torch.rand(5, 17)', 'torch.rand(6, 9)', 'torch.rand(17)', 'torch.rand(6, 17)*nan', '[]']), reduction=Arg(['.2', '.3'], REDUCTION.bad), keys=word(["'entering'", "'all'", "'kept'"])),
    'ramp_plan': dict(model=MODEL, reduction=Arg(['.2', '.3'], REDUCTION.bad), keys=word(["'entering'", "'all'", "'kept'"]), seed=SEED),
    'load_data': dict(data=Arg(["zoo/'tree'", "str(zoo/'tree')", "'embedded'", 'None', "zoo/'three'", "zoo/'big pictures'"], ['3', "'none'", '[]', "zoo/'file'", "zoo/'void'", "zoo/'empty'", 'b"x"', "'\\0'", "'a\\0b'", 'True']), split=word(["'train'", "'test'"], ["'val'"], .5), limit=LIMIT, seed=SEED,
                      skip_damaged=Arg(['True', 'False'], [], .2)),
    'folder_data': dict(root=Arg(["zoo/'tree'", "str(zoo/'three')"], ['3', 'None', "'none'", "''", "zoo/'file'", "zoo/'void'"]), split=word(["'train'", "'test'"], ["'val'"], .5)),
    'cifar': dict(name=Arg(["'cifar10'"], ["'cifar'", 'None', '3', '[]']), split=word(["'train'", "'test'"], ["'val'"], 1.), root=Arg(["new('c')"], ["zoo/'file'", '3', '[]'], 1.), download=Arg(['False'])),
    'calibration': dict(ds=Arg(["tree('train')"] * 3, ['None', '3', "'x'", 'images(2)']), n=number(['3', '10'], ['0', '-1', '1.5', '999'], 1.), seed=SEED),
    'class_subset': dict(ds=Arg(["tree('train')"] * 3, ['None', '3', "'x'"]), classes=Arg(['3', "['cat', 'dog']"], ['0', '-1', '99', '1.5', "'cat'", '[]', "['zebra']", 'None', 'nan', 'True', "['cat', 'cat']", '[None]']), seed=SEED),
    'loader': dict(ds=Arg(["test_set()"], ['None', '3', "'x'"]), batch_size=BATCH, workers=number(['0'], ['-1', '1.5', '10**30'])),
    'train_transform': dict(cfg=Arg(['data_config(model())'], ['3', 'None', '{}', "'x'", "{'input_size': 3}"]), augment=word(["'none'", "'light'", "'deit'"])),
    'eval_transform': dict(cfg=Arg(['data_config(model())'], ['3', 'None', "'x'", "{'input_size': 'x'}", "{'colour': 1}"])),
    'data_config': dict(model=Arg(['model()', 'slim()'], ['None', '3', "'course'", '[]'])),
    'create_vit': dict(name=Arg(["'test_vit'"] * 4, ["'no_such'", "''", 'None', '3', '[]', "'a\\nb'", "'" + 'a' * 300 + "'"]), weights=Arg(["zoo/'w.safetensors'", "zoo/'w.pth'", 'None'], ["zoo/'cut.pth'", "zoo/'list.pth'", "zoo/'text.safetensors'", "zoo/'empty.pth'", "'none'", '3', "zoo/'tree'", '[]', "''"], .3),
                       img_size=Arg(['32', '(32, 32)', '64'], ['0', '-1', "'x'", '[]', '1.5', '7', '(32,)', 'nan'], .8), patch_size=Arg(['8', '(8, 8)'], ['0', '-1', "'x'", '[]', '1.5', '999'], .8), num_classes=Arg(['10', '0', '3'], ['-1', "'x'", '1.5', '[]'], .5),
                       depth=Arg(['2'], ['-1', "'x'", '1.5'], .1), num_heads=Arg(['2'], ['0', '-1', "'x'", '7'], .1), global_pool=Arg(["'avg'", "'token'"], ["'x'", '3'], .1), colour=Arg([], ['1'], .03), init_values=Arg(['1e-5', 'None'], ["'x'", '[]'], .1), act_layer=Arg(["'relu'"], ["'x'", '3'], .05),
                       checkpoint_path=Arg([], ["zoo/'pickled.pth'", "'none'"], .02), pretrained=Arg(['False'], ['3', "'x'"], .1)),
    'load_weights': dict(model=MODEL, file=Arg(["zoo/'w.safetensors'", "zoo/'w.pth'", "str(zoo/'wrapped.pth')", "zoo/'half.safetensors'"], ["zoo/'cut.pth'", "zoo/'cut.safetensors'", "zoo/'list.pth'", "zoo/'number.pth'", "zoo/'none.pth'", "zoo/'text.pth'", "zoo/'tensor.pth'", "zoo/'numbers.pth'", "zoo/'pickled.pth'",
                         "zoo/'flat.safetensors'", "zoo/'shape.safetensors'", "zoo/'gap.safetensors'", "zoo/'nothing.safetensors'", "zoo/'text.safetensors'", "zoo/'empty.pth'", "zoo/'folder.pth'", "'none'", '3', 'None', '[]'])),
    'capture': dict(model=MODEL, attention=Arg(['True', 'False'], [], .3)),
    'evaluate': dict(model=Arg(['model()', 'slim()', 'sliced()', 'packed()'], MODEL.bad), ds=Arg(["tree('test')"] * 3, ['None', '3', "'x'", "tree('test').subset([])"]), batch_size=BATCH, device=PLACE, dtype=DTYPE),
    'bench': dict(models=Arg(["{'a': model()}", "{'a': model(), 'b': slim()}"], ['3', 'None', '{}', '[]', "{'a': 3}", "{'a': None}", "{3: model()}"[:0] or "{'a': 'x'}"]), x=Arg(['images(2)'] * 3, ['None', '3', "'x'", 'torch.zeros(0, 3, 32, 32)', 'torch.zeros(2, 3, 16, 16)', 'torch.zeros(3)', 'images(2).int()']),
                  warmup=number(['1'], ['0', '-1', '1.5'], 1.), repeats=number(['1', '2'], ['0', '-1', '1.5'], 1.), device=DEVICE, dtype=DTYPE, threads=number(['1', '2'], ['0', '-1', '1.5'], .2, none=True)),
    'time_reduction': dict(rows=Arg(["bench({'a': model(), 'b': slim()}, images(1), 1, 1)"], ['3', 'None', '[]', '[{}]', '[3]', "'x'"]), base=Arg(["'a'"], ["'none'", '3', 'None', '[]']), macs=Arg(['None', "{'a': 2, 'b': 1}"], ['3', "{'a': 1}", '{}', "{'a': 0, 'b': 1}", "{'a': 'x', 'b': 1}"], .4)),
    'ratio_interval': dict(new=Arg(['[1., 2.]'], ['3', 'None', '[]', "['a', 'b']", '[nan, 1]', "'x'", '[1.]']), old=Arg(['[2., 3.]'], ['3', 'None', '[]', "['a', 'b']", '[0., 0.]', '[nan, 1]']), draws=number(['20'], ['0', '-1', '1.5']), seed=SEED, level=number(['.9'], ['0', '1', '-1', '1.5'])),
    'cost_of': dict(model=Arg(['model()', 'slim()', 'sliced()', 'packed()'], ['None', '3', "'x'", 'torch.nn.Linear(3, 3)', 'object()']), images=Arg(['None', 'images(2)', "tree('test')"], [], .5)),
    'counts_of': dict(model=Arg(['model()', 'slim()', 'sliced()'], ['None', '3', "'x'"]), images=Arg(['None', 'images(2)'], [], .5)),
    'model_macs': dict(model=Arg(['model()', 'sliced()'], ['None', '3', "'x'", 'torch.nn.Linear(3, 3)']), counts=COUNTS, extra=number(['0', '1e6'], ['-1'], .2)),
    'cost_table': dict(model=Arg(['model()', 'sliced()'], ['None', '3', 'torch.nn.Linear(3, 3)']), counts=COUNTS, by=word(["'part'", "'block'"])),
    'count_macs': dict(model=Arg(['model()', 'slim()', 'torch.nn.Linear(3, 3)'], ['None', '3', "'x'"]), x=Arg(['None', 'images(1)'], ['3', "'x'"], .4)),
    'cost.reduction': dict(new=number(['1', '3.5'], ['-1'], 1.), old=number(['2', '9'], ['0', '-1'], 1.)), 'cost.speed_up': dict(new=number(['1', '3.5'], ['0', '-1'], 1.), old=number(['2', '9'], ['0', '-1'], 1.)),
    'TrainConfig': RECIPE,
    'fit/config': dict(model=MODEL, train_set=SET, cfg=Arg(['TrainConfig(epochs=.3, batch_size=4)', 'TrainConfig(epochs=.3, batch_size=4, ema=.9, save_every=1)'], ['None', '3', '{}', "'x'", 'TrainConfig(batch_size=999)', 'TrainConfig(freeze=99, batch_size=4)', 'TrainConfig(distill=.5, batch_size=4)']),
                       test_set=Arg(['None', "tree('test')"], ['3', "'x'", "tree('test').subset([])"], .3), out=FREE, teacher=Arg(['None'], ['3', "'x'", 'model()'], .1), workers=number(['0'], ['-1', '1.5'], .2)),
    'read_log': dict(path=Arg(["write('l.csv', 'step,loss\\n1,2\\n')"], ["zoo/'tree'", "'none'", '3', 'None', "write('l.csv', 'step,loss\\na,2\\n')", "write('l.csv', '\\xff\\xfe', 'latin-1')"])),
    'load_checkpoint': dict(path=Arg(["zoo/'w.pth'"], ["zoo/'w.safetensors'", "zoo/'cut.pth'", "'none'", "zoo/'tree'", '3', 'None', "zoo/'pickled.pth'", "zoo/'text.pth'"])),
    'set_seed': dict(seed=Arg(['0', '7'], SEED.bad)), 'pick_device': dict(name=Arg(["'cpu'", "'auto'"], DEVICE.bad)), 'environment': dict(device=DEVICE), 'autocast': dict(device=DEVICE, dtype=Arg(["'fp32'", "'bf16'", "'auto'", 'torch.bfloat16'], ["'int8'", 'None', '3', '[]', 'torch.int8', 'nan'], .5)),
    'wilson_interval': dict(correct=number(['3'], ['-1', '99', '1.5'], 1.), n=number(['10'], ['0', '-1', '1.5'], 1.)),
    'read_options': dict(name=Arg(["'vtp'", "'uniform'", "'life'"], ["'x'", 'None', '3', '[]']), options=Arg(['dict(reduction=.3)', 'dict(reduction=.3, seed=2)'], ['None', '3', "dict(colour=1)", '[1]', "dict(rounds=1)", '{3: 4}'])),
    'read_experiment': dict(path=Arg(["config('methods = [\"uniform\"]\\n')", "config('reductions = [0.3]\\n')"], ["'none'", "zoo/'tree'", '3', 'None', "zoo/'w.pth'", "config('a = 1')", "config('seeds = [nan]')", "config('seeds = [4294967296]')", "config('recover = {epochs = \"x\"}')", "config('options = {vtp = 3}')", "config('name = \"..\"')", "config('methods = [[]]')", "config('classes = true')"]),
                            changes=Arg(['()', "['test_images=3']", "('seeds=1', 'name=x')"], ['3', "'x'", '[3]', "['x']", '[None]', "['recover.epochs=x']", "['options.vtp.l1=nan']", "['a.b=1']", "['name=..']", "['model_args=3']"], .6)),
    'parse_change': dict(text=Arg(["'a=1'", "'methods=x,y'", "'seeds=1,2'", "'a.b=c'"], ['3', 'None', "''", "'='", "'a'", "'=1'", '[]'])),
    'run_config': dict(path=Arg(["config('methods = [\"uniform\"]\\nreductions = [0.3]\\ncalibration = 3\\ntest_images = 10\\ndevice = \"cpu\"')"], ["'none'", '3', 'None', "zoo/'w.pth'", "config('name = 3')"]), data=Arg(["zoo/'tree'", "'embedded'"], ["'none'", '3', "zoo/'three'", "zoo/'void'"], .5), out=Arg(["new('r')", "'r'"], ["zoo/'file'", '3', "zoo/'tree'", '[]'], 1.),
                       weights=Arg(['None'], ["'none'", '3', "zoo/'text.pth'", "zoo/'w3.safetensors'"], .2), results=Arg(["new('r/a.csv')"], ["zoo/'file'", '3', "'x.txt'"], .2), dry_run=Arg(['True', 'False'], [], .5), changes=Arg(['()', "['seeds=1']"], ['3', "'x'", "['x']", '[None]'], .3), device=DEVICE),
    'significance': dict(model=MODEL, ds=Arg(['test_set()', 'images(2)[None]'], ['None', '3', "'x'", '[]', 'test_set().subset([])']), kind=word(["'shortcut'", "'cls'"]), batch_size=BATCH, device=PLACE),
    'top_down': dict(model=MODEL, ds=Arg(['test_set()'], ['None', '3', "'x'", '[]', 'test_set().subset([])']), eps=number(['.2', '.5'], ['0', '-1'], 1.), keys=word(["'entering'", "'all'", "'kept'"]), step=number(['4', '.3'], ['0', '-1', '1.5'], none=True), device=DEVICE, batch_size=BATCH),
    'for_budget': dict(model=MODEL, ds=Arg(['test_set()'], ['None', '3', "'x'", '[]', 'test_set().subset([])']), reduction=Arg(['.2', '.3'], REDUCTION.bad), keys=word(["'entering'", "'all'", "'kept'"]), device=DEVICE, batch_size=BATCH),
    'life_plan': dict(model=MODEL, keep_rate=Arg(['.7', '[.9, .8]'], ['0', '1.5', "'x'", '[]', 'nan', 'None', 'True']), stages=Arg(['[2, 4]', '(2, 4)'], ['[]', '[4, 2]', '[2, 99]', '3', "'x'", 'None', '[0]', '[nan]', '[True]', '[1.5]']), t_base=number(['1', '2'], ['-1', '1.5', '99'], .2, none=True)),
    'make_row': dict(method=Arg(["'dense'"], odd=False), backbone=Arg(["'m'"], odd=False), macs=number(['3', '1e9'], [], .3), colour=Arg([], ['1'], .05)),
    'read_rows': dict(path=Arg(["zoo/'tree'"], ["zoo/'tree'", "'none'", '3', 'None', "zoo/'w.pth'", "write('r.csv', 'a,b\\n1,2')", "write('r.csv', '')"])),
    'paired_difference': dict(correct_a=Arg(['np.array([True, False])'], ['3', 'None', '[]', "'x'", 'np.array([])', 'np.array([.5, nan])', 'np.array([True])']), correct_b=Arg(['np.array([True, True])'], ['3', 'None', '[]'])),
    'answers': dict(model=Arg(['model()', 'slim()'], ['None', '3']), ds=Arg(["tree('test')"], ['None', '3', "tree('test').subset([])"]), batch_size=BATCH, device=PLACE, dtype=DTYPE),
    'slim()': dict(images=Arg(['images(2)'], ['None', '3', 'images(2)[0]', 'torch.zeros(2, 3, 16, 16)', 'torch.zeros(2, 1, 32, 32)'])), 'slim().set_mode': dict(mode=Arg(["'mask'", "'packed'"], ["'x'", 'None', '3', '[]'])), 'slim().trace': dict(images=Arg(['images(2)'], ['None', '3', 'torch.zeros(2, 3, 16, 16)'])),
}


def random_call(rng, zoo):
    "(the call as text, a function that makes it, what of it must be refused)."
    name = rng.choice([*CALLS])
    args, function = CALLS[name], name.split('/')[0]
    chosen = {k: rng.choice(a.good) for k, a in args.items() if a.good and rng.random() < a.often}
    strict = []
    for _ in range(rng.choices([0, 1, 2], weights=[15, 60, 25])[0]):
        k = rng.choice([*args])
        if args[k].bad and (rng.random() < .65 or not args[k].odd): chosen[k] = rng.choice(args[k].bad)
        elif args[k].odd: chosen[k] = rng.choice(ODD)
    if name.startswith('cifar'): chosen['download'] = 'False'
    for k, v in chosen.items():
        if v in args[k].bad: strict.append(f'{k}={v}')
    text = f'{function}({", ".join(f"{k}={v}" for k, v in chosen.items())})'
    return text, lambda: make(text, zoo), ', '.join(strict)


def make(text, zoo):
    "Make the call; a context manager is entered, an iterable of batches begun."
    from pathlib import Path
    import numpy as np, torch
    from vitprune_nb import core, data, errors, files, experiment, run
    from vitprune_nb.vit import cost
    from vitprune_nb.engine import slim as engine
    from vitprune_nb.engine import macs, store
    from vitprune_nb.methods import life
    from vitprune_nb.evidence import measure
    from vitprune_nb.methods import base as methods
    from vitprune_nb.methods import patch_slimming
    from vitprune_nb.engine import plan
    from vitprune_nb.engine import policy
    from vitprune_nb.evidence import results
    from vitprune_nb.methods import significance
    from vitprune_nb.engine import channels as surgery
    from vitprune_nb.train import trainer as train
    from vitprune_nb.vit import model as vit
    here = Path.cwd()
    def write(name, content, encoding='utf-8'): (here.parent/'case'/name).write_text(content, encoding=encoding); return here.parent/'case'/name
    def model(): return vit.create_vit('test_vit', weights=zoo/'w.safetensors', img_size=32, patch_size=8, num_classes=10)
    def policy_(): return engine.Policy({1: engine.Step(keep=(0, 1, 2, 3, 5)), 3: engine.Step(keep=(1, 5))})
    def images(n): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    def tree(split): return data.load_data(zoo/'tree', split)
    def slim(): return methods.load_pruned(zoo/'uniform')
    def test_set(): return tree('test').but(transform=data.eval_transform(data.data_config(model()))).subset(range(4))
    space = {k: v for m in (cost, data, engine, experiment, life, measure, macs, methods, patch_slimming, plan, policy, results, run, significance, store, surgery, train, vit, core, errors, files) for k, v in vars(m).items() if not k.startswith('_')}
    space |= dict(torch=torch, np=np, Path=Path, nan=math.nan, inf=math.inf, zoo=zoo, new=lambda n: here/n, write=write, config=lambda t: write('c.toml', t), model=model, images=images, tree=tree, slim=slim, test_set=test_set, cost=cost,
                  policy=policy_, packed=lambda: slim().set_mode('packed'), sliced=lambda: methods.load_pruned(zoo/'cut'), plan=lambda: plan.load_plan(zoo/'planned/plan.json'))
    result = eval(text, space)
    if hasattr(result, '__enter__'): result.__enter__()
    elif type(result).__name__ == 'DataLoader': next(iter(result))


def outcome(work):
    "0: done; 2: refused; 70, with a traceback: any other exception."
    from vitprune_nb.errors import VitpruneError
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: work()
        except VitpruneError as e: print(e, file=sys.stderr); return 2
        except Exception: traceback.print_exc(); return 70
    return 0
