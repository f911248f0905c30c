"""What a method says that it trains is what it trains: a row's share of training is counted from it."""
import sys

import pytest, torch

from vitprune_nb.core import set_seed
from vitprune_nb.data import embedded
from vitprune_nb.methods import base
from vitprune_nb.methods.base import METHODS, prune, read_options, training_epochs
from vitprune_nb.vit.model import create_vit

POOL = embedded('train').subset(range(0, 5000, 125))


CASES = [(n, {}) for n, m in METHODS.items() if m.trains] + [('iared', dict(starts=s)) for s in ([2, 3], 2)]

@pytest.mark.parametrize('name,given', CASES, ids=str)
def test_passes_are_counted_as_they_are_made(name, given, monkeypatch):
    set_seed(0)
    model = create_vit('deit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=10).eval()
    stages = [k for k in METHODS[name].own if k.endswith('_epochs')]
    options = dict({k: .1*2**i for i, k in enumerate(stages)}, **given, reduction=.3, batch_size=8)
    if 'calibration' in METHODS[name].options: options['calibration'] = 16
    made, fit = [], base.fit

    def counted(model, train_set, recipe, **kw):
        made.append(recipe.epochs*len(train_set))
        return fit(model, train_set, recipe, **kw)
    for module in [m for n, m in sys.modules.items() if n.startswith('vitprune_nb.methods.') and hasattr(m, 'fit')]:
        monkeypatch.setattr(module, 'fit', counted)
    torch.manual_seed(0)
    prune(name, model, POOL, **options)
    assert sum(made) == pytest.approx(training_epochs(*read_options(name, options))*len(POOL)), made
