"""How strong a pull: what the forecast of closed gates refuses."""
import pytest, torch
from vitprune_nb.data import load_data
from vitprune_nb.errors import VitpruneError
from vitprune_nb.methods.vtp import PAPER
from vitprune_nb.papers.pull import gate_noise, gate_row, lambda_for, noisiest
from vitprune_nb.train.trainer import TrainConfig
from vitprune_nb.vit.model import create_vit


def noise(steps):
    quick = TrainConfig(**PAPER | dict(epochs=1, batch_size=4, dtype='fp32'))
    tiny = create_vit('test_vit', img_size=32, patch_size=8, num_classes=10)
    return gate_noise(tiny, load_data('embedded', 'train', limit=40), quick, 1., steps)


@pytest.mark.parametrize('call, text', [
    (lambda: noisiest(0., 500, 5e-5), 'l1: got 0.0; allowed: a number above 0'),
    (lambda: noisiest(.04, 90, 5e-5, .0025), 'steps: got 90; allowed: more than 95'),
    (lambda: lambda_for([1., 2.], 1., 500, 5e-5), 'share: got 1.0'),
    (lambda: lambda_for([-1.], .5, 500, 5e-5), 'one number, 0 or more'),
    (lambda: lambda_for([], .5, 500, 5e-5), 'sigma: got (0,)'),
    (lambda: lambda_for(torch.ones(2, 2), .5, 500, 5e-5), 'sigma: got (2, 2)'),
    (lambda: noise(1), 'steps: got 1'), (lambda: noise(11), 'at most 10'),
    (lambda: gate_row('.', None, None, dict(method='vtp', seed=4, schedule=dict(options={}))), 'There is no checkpoint.pt in shared/vtp-s4')])
def test_refused_by_name(call, text):
    with pytest.raises(VitpruneError) as said: call()
    assert text in str(said.value)
