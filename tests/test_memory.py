"""Where the memory is too small, that is said: neither the file nor the network nor the images are to blame."""
import pytest
import timm
import torch
from PIL import Image

from vitprune_nb import data, deploy
from vitprune_nb.engine import store
from vitprune_nb.engine.policy import NormScore, Policy, Step
from vitprune_nb.engine.slim import SlimViT
from vitprune_nb.vit.weights import create_vit

ALLOCATOR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
KINDS = {'Python': MemoryError(), 'PyTorch': ALLOCATOR, 'the system': OSError(12, 'Cannot allocate memory'), 'a GPU': torch.OutOfMemoryError('CUDA out of memory')}


@pytest.fixture(scope='module')
def slim():
    torch.manual_seed(0)
    vit = create_vit('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    return SlimViT(vit, Policy({1: Step(score=NormScore(), count=5)})).eval()


@pytest.fixture(scope='module')
def files(slim, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    store.save_pruned(slim, folder/'slim')
    for name in 'ab':
        (folder/'tree'/'test'/name).mkdir(parents=True)
        Image.new('RGB', (8, 8), name == 'a' and 'red' or 'blue').save(folder/'tree'/'test'/name/'1.png')
    return folder


# what is called: (where the memory ends, the call); `f` is the folder of files, `m` the pruned model
CALLS = dict(
    create_vit=((timm, 'create_model'), lambda f, m: create_vit('vit_tiny_patch16_224', depth=2)),
    pretrained=((timm, 'create_model'), lambda f, m: create_vit('vit_tiny_patch16_224', pretrained=True)),
    save_pruned=((store, '_assemble'), lambda f, m: store.save_pruned(m, f/'new')),
    runs=((SlimViT, 'forward'), lambda f, m: store.save_pruned(m, f/'new')),
    load_pruned=((store, '_assemble'), lambda f, m: store.load_pruned(f/'slim')),
    weights=(('safetensors', 'safe_open'), lambda f, m: store.load_pruned(f/'slim')),
    loaded_runs=((SlimViT, 'forward'), lambda f, m: store.load_pruned(f/'slim')),
    open_image=((data, 'as_shown'), lambda f, m: data.open_image(f/'tree'/'test'/'a'/'1.png')),
    photo=((data, 'as_shown'), lambda f, m: data.photo(Image.new('RGB', (8, 8)))),
    damaged=((data, 'as_shown'), lambda f, m: data.folder_data(f/'tree', skip_damaged=True)),
    onnx_file=(('onnxruntime', 'InferenceSession'), lambda f, m: deploy.OnnxModel(f/'slim'/'config.json')),
    onnx_export=((torch.onnx, 'export'), lambda f, m: deploy.export_onnx(m, f/'m.onnx', torch.zeros(2, 3, 32, 32))),
)


@pytest.mark.parametrize('kind', list(KINDS))
@pytest.mark.parametrize('name', list(CALLS))
def test_too_little_memory_is_called_so(monkeypatch, files, slim, name, kind):
    (place, what), call = CALLS[name]
    if isinstance(place, str): place = pytest.importorskip(place)
    if 'onnx' in name: pytest.importorskip('onnxscript')
    error, before = KINDS[kind], sorted(files.iterdir())
    def small(*args, **kw): raise error
    with monkeypatch.context() as patch:
        patch.setattr(place, what, small)
        with pytest.raises(type(error)) as said: call(files, slim)
    assert said.value is error
    assert sorted(files.iterdir()) == before


def test_an_exporter_that_wraps_its_errors(monkeypatch, files, slim):
    pytest.importorskip('onnxscript')
    def export(*args, **kw): raise RuntimeError('Failed to decompose the graph') from MemoryError()
    monkeypatch.setattr(torch.onnx, 'export', export)
    with pytest.raises(RuntimeError, match='decompose') as said: deploy.export_onnx(slim, files/'m.onnx', torch.zeros(2, 3, 32, 32))
    assert isinstance(said.value.__cause__, MemoryError)


def test_one_good_image_is_not_dropped_for_want_of_memory(monkeypatch, files):
    whole, shown = data.folder_data(files/'tree', skip_damaged=True), data.as_shown
    seen = []
    def once(im):
        seen.append(im)
        if len(seen) == 1: raise MemoryError
        return shown(im)
    monkeypatch.setattr(data, 'as_shown', once)
    with pytest.raises(MemoryError): data.folder_data(files/'tree', skip_damaged=True)
    assert data.folder_data(files/'tree', skip_damaged=True).digest == whole.digest
