"""ImageNet's lesson where a notebook cannot look: a run that is killed, the command line, and costs counted another way."""
import math

import pytest
import torch
from vitprune_nb.papers import imagenet
from vitprune_nb.errors import VitpruneError
from vitprune_nb.vit.cost import model_macs
from vitprune_nb.data import data_config, embedded, eval_transform
from vitprune_nb.engine.slim import ClsAttention, Policy, SlimViT, Step
from vitprune_nb.evidence.results import read_rows
from vitprune_nb.vit.model import create_vit

WNIDS = ('n01440764', 'n02084071', 'n02121620')


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return create_vit('test_vit', img_size=32, patch_size=8, depth=3, num_classes=3)


@pytest.fixture
def subject(net):
    return imagenet.Fidelity(net, embedded('test').subset(range(0, 2000, 250)), embedded('train').subset(range(0, 5000, 625)), 'tiny')


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A folder in ImageNet's layout, as JPEG."
    root = tmp_path_factory.mktemp('imagenet')
    for split, n in (('train', 6), ('val', 4)):
        ds = embedded('train' if split == 'train' else 'test')
        for k, wnid in enumerate(WNIDS):
            (root/split/wnid).mkdir(parents=True)
            for j, i in enumerate((ds.targets == k).nonzero()[0][:n]): ds.image(i).resize((48, 40)).save(root/split/wnid/f'{wnid}_{j}.JPEG')
    return root


def points(file): return [(r['method'], r['schedule']['reduction']) for r in read_rows(file)]


def test_a_killed_run_goes_on_without_repeating_or_losing_a_point(subject, tmp_path, monkeypatch):
    file, real, calls = tmp_path/'f.csv', imagenet.fidelity_row, []

    def stop_at(n):
        def row(s, m, r, **more):
            if len(calls) == n: raise KeyboardInterrupt
            calls.append((m, r))
            return real(s, m, r, **more)
        return row

    methods, wanted = ('uniform', 'cosine', 'attention'), [(m, r) for r in (.25, .4) for m in ('uniform', 'cosine', 'attention')]
    for n in (1, 4):
        monkeypatch.setattr(imagenet, 'fidelity_row', stop_at(n))
        with pytest.raises(KeyboardInterrupt): imagenet.record_fidelity(subject, file, methods, (.25, .4))
        assert points(file) == wanted[:n]
    monkeypatch.setattr(imagenet, 'fidelity_row', stop_at(99))
    assert imagenet.record_fidelity(subject, file, methods, (.25, .4)) == 2
    assert points(file) == wanted == calls


def test_rows_of_other_images_or_another_seed_are_not_taken_for_ours(subject, net, tmp_path):
    file = tmp_path/'f.csv'
    other = imagenet.Fidelity(net, embedded('test').subset(range(1, 2000, 250)), subject.calib, 'tiny')
    seeded = imagenet.Fidelity(net, subject.ds, subject.calib, 'tiny', seed=1)
    assert [imagenet.record_fidelity(s, file, ('uniform',), (.3,)) for s in (subject, other, seeded, subject)] == [1, 1, 1, 0]


def test_features_are_the_class_token_behind_the_last_norm(net):
    ds = embedded('test').subset(range(5)).but(transform=eval_transform(data_config(net)))
    seen = []
    handle = net.norm.register_forward_hook(lambda m, a, out: seen.append(out[:, 0].detach().clone()))
    found = imagenet.features(net, ds, 2); handle.remove()
    torch.testing.assert_close(found, torch.cat(seen))
    torch.testing.assert_close(imagenet.features(SlimViT(net, Policy({}), 'packed'), ds), found, atol=1e-5, rtol=1e-5)


def test_evit_costs_what_the_engine_counts_for_it():
    net, n, steps = imagenet.backbone_shape('DeiT-S'), 197, {}
    for i in (3, 6, 9):
        k = math.ceil(.7*(n - 1)); steps[i] = Step('middle', 'fuse', score=ClsAttention(), count=k); n = k + 2
    assert imagenet.evit_macs(net, .7) == model_macs(net, Policy(steps).counts(12, 197))


def test_the_command_runs_on_an_imagenet_tree_and_resumes(tree, tmp_path, capsys):
    from safetensors.torch import save_file
    weights, out = tmp_path/'w.safetensors', tmp_path/'f.csv'
    save_file(create_vit('test_vit', img_size=64).state_dict(), weights)
    words = ['--model', 'test_vit', '--weights', weights, '--img-size', 64, '--data', tree, '--calibration', 8, '--methods', 'uniform', 'attention', '--reductions', '.3', '--out', out]
    words = list(map(str, words))
    assert imagenet.main(words) == 0 and len(read_rows(out)) == 2
    row = read_rows(out)[0]
    assert row['backbone'] == 'test_vit at 64 px' and row['images'] == 12 and row['schedule']['calibration'] == 8
    assert imagenet.main(words) == 0 and len(read_rows(out)) == 2
    assert '0 rows added' in capsys.readouterr().out


def test_photos_without_train_are_split_into_disjoint_sets(tree, tmp_path):
    (tmp_path/'photos').mkdir(); (tmp_path/'photos'/'val').symlink_to(tree/'val')
    test, calib = imagenet.fidelity_sets(tmp_path/'photos', 5)
    assert len(test) == 7 and len(calib) == 5 and not set(map(str, test.images)) & set(map(str, calib.images))
    assert len(imagenet.fidelity_sets(tmp_path/'photos', 5, 3)[0]) == 3
    with pytest.raises(VitpruneError, match='fewer than the 12 images'): imagenet.fidelity_sets(tmp_path/'photos', 12)


@pytest.mark.parametrize('words, said', [
    (['--data', 'nowhere'], 'data: got nowhere'), (['--calibration', '0'], 'calibration: got 0'), (['--images', '0'], 'images: got 0'), (['--methods', 'life'], "methods: got ['life']"), (['--methods', 'vtp'], "methods: got ['vtp']"),
    (['--reductions', '1.5'], 'reductions: got 1.5'), (['--model', 'vit_huge_nonsense'], 'model: got vit_huge_nonsense'), (['--model', 'deit_tiny_patch16_224', '--weights', 'no.pth'], 'weights: got no.pth'),
    (['--weights', 'x.pth'], 'model: got course with weights'), (['--device', 'tpu'], 'device: got tpu'), (['--out', 'README.md'], 'results: got README.md')])
def test_bad_words_get_one_sentence_and_write_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'README.md').write_text('not rows\n')
    small = [] if '--calibration' in words else ['--calibration', '4']
    assert imagenet.main([*words, *small, *(['--out', 'f.csv'] if '--out' not in words else [])]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith('imagenet: ') and said in err and '\n' not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['README.md'] and (tmp_path/'README.md').read_text() == 'not rows\n'


def test_subsets_have_the_same_classes_in_train_and_test(tree):
    train, test = imagenet.imagenet_pair(tree, 2, seed=3)
    assert train.classes == test.classes and len(train) == 12 and len(test) == 8
    assert {str(p).split('/')[-2] for p in test.images} == set(test.classes)
