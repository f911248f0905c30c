"""What the tables and figures of the patch slimming paper refuse."""
import pytest, torch
from vitprune_nb.data import embedded
from vitprune_nb.errors import VitpruneError
from vitprune_nb.papers import patch_figures as figures
from vitprune_nb.papers.patch_tables import rounding_range
from vitprune_nb.vit.model import create_vit

pytestmark = pytest.mark.usefixtures('one_thread')


def few(n): return embedded('test').subset(range(n))


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    tiny = create_vit('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=4, num_classes=10)
    return figures.Subject(tiny, few(4), embedded('train').subset(range(2)), 'tiny', batch_size=4)


@pytest.mark.parametrize('call, said', [
    (lambda s: figures.Subject(s.model, few(0), s.calib), 'ds: got no images'),
    (lambda s: figures.Subject(create_vit('vit_tiny_patch16_224', depth=1, img_size=32, global_pool='avg', class_token=False), s.ds, s.calib),
     "global_pool='token'"),
    (lambda s: figures.keep_best(torch.arange(5.), 1.5), 'rate: got 1.5'),
    (lambda s: figures.keep_best(torch.arange(5.), -.1), 'rate: got -0.1'),
    (lambda s: figures.one_block_answers(s, {'x': (4, torch.ones(17).bool())}), 'block: got 4'),
    (lambda s: figures.three_blocks(2), 'n_blocks: got 2'),
    (lambda s: figures.eps_rows(s, eps=(0,)), 'eps: got 0'),
    (lambda s: figures.record_figures(s, 'nowhere.csv', ('Figure 8',)), "figures: got ['Figure 8']"),
    (lambda s: rounding_range(-1, 2), 'new, old: got (-1, 2)'),
])
def test_bad_input_is_refused(small, call, said):
    with pytest.raises(VitpruneError) as e: call(small)
    assert said in str(e.value)
