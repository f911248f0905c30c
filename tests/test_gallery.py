"""The gallery on other ViTs, other pictures and bad input."""
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitprune_nb.data import data_config, eval_transform
from vitprune_nb.errors import VitpruneError
from vitprune_nb.gallery import PHOTOS, explore, look, photo, show_gallery

pytestmark = pytest.mark.usefixtures('one_thread')


def vit(name='vit_tiny_patch16_224', **kw):
    torch.manual_seed(0)
    return timm.create_model(name, **dict(dict(img_size=64, depth=6, num_classes=4), **kw)).eval()


@pytest.mark.parametrize('kw', [{}, dict(name='deit_tiny_distilled_patch16_224'), dict(reg_tokens=2), dict(num_classes=0),
                                dict(global_pool='avg', class_token=True), dict(depth=2), dict(depth=13)])
def test_kinds_of_vits(kw):
    model = vit(**kw)
    found = look(model, 'rocket', .5)
    assert found.kept.shape == (len(model.blocks), 16) and 0 < found.macs < 1
    assert found.kept[found.places[0]].sum() == 8
    x = eval_transform(data_config(model))(photo('rocket'))[None]
    with torch.no_grad(): dense = model(x)
    dense = dense[0] if isinstance(dense, tuple) else dense
    torch.testing.assert_close(look(model, 'rocket', 1.).logits, dense[0].float(), atol=1e-5, rtol=1e-4)


def test_pictures_of_all_shapes(tmp_path):
    wide = Image.fromarray(np.arange(40*90*3, dtype=np.uint8).reshape(40, 90, 3))
    wide.save(tmp_path/'wide.png')
    for given in (wide, wide.convert('L'), wide.convert('RGBA'), tmp_path/'wide.png', str(tmp_path/'wide.png'), *PHOTOS):
        assert photo(given).size == (224, 224) and photo(given).mode == 'RGB'
    middle = np.asarray(wide.crop((25, 0, 65, 40)).resize((224, 224), Image.Resampling.LANCZOS))
    assert (np.asarray(photo(wide)) == middle).all()


def test_a_picture_of_ones_own_is_on_the_menu(tmp_path):
    Image.new('RGB', (50, 50), 'red').save(tmp_path/'mine.png')
    controls, seen = explore(vit(), tmp_path/'mine.png').children
    which = controls.children[1]
    assert which.options[0] == ('yours', tmp_path/'mine.png') and which.value == tmp_path/'mine.png'
    mine = seen.value
    which.value = 'cat'
    assert seen.value != mine
    which.value = tmp_path/'mine.png'
    assert seen.value == mine


@pytest.mark.parametrize('bad, said', [
    (dict(keep_rate=0), 'keep_rate: got 0'), (dict(keep_rate=1.5), 'keep_rate: got 1.5'), (dict(keep_rate=-.1), 'keep_rate: got -0.1'),
    (dict(keep_rate='half'), 'keep_rate: got half'), (dict(keep_rate=float('nan')), 'keep_rate: got nan'),
    (dict(image='nowhere.png'), 'photo: got nowhere.png'), (dict(image=3), 'photo: got int'), (dict(image='.'), 'photo: got .'),
    (dict(image=None), 'photo: got NoneType'), (dict(image='README.md'), 'README.md'), (dict(model=torch.nn.Linear(2, 2)), 'model'),
    (dict(model=vit(class_token=False, global_pool='avg')), 'model'),
])
def test_bad_input_is_refused(bad, said, monkeypatch):
    from conftest import ROOT
    monkeypatch.chdir(ROOT)
    given = dict(model=vit(), image='cat', keep_rate=.5) | bad
    with pytest.raises(VitpruneError, match=re.escape(said)) as error: look(**given)
    assert '\n' not in str(error.value)


def test_names_of_classes_have_to_fit():
    from vitprune_nb.gallery import show_look
    with pytest.raises(VitpruneError, match='classes: got 2 names; allowed: 4'): show_look(vit(), classes=['a', 'b'])


def test_gallery_without_merging_has_a_row_for_each_picture():
    assert len(show_gallery(vit(), photos=('cat', 'rocket')).axes) == 8
