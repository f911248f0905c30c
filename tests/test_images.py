"""Images from anywhere: whatever Pillow opens is read as what it shows, folders hold what their users put there, the rest is named."""
import errno, io, json, os, struct, zlib

import numpy as np
import pytest
from PIL import Image

from vitprune_nb import cli, data
from vitprune_nb.errors import VitpruneError, for_shell
from vitprune_nb.data import (as_shown, calibration, class_subset, eval_transform, folder_data, image_endings,
                              image_formats, load_data, loader, open_image)

NO_CHANGE = eval_transform(dict(input_size=(3, 16, 16), interpolation='bicubic', mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.))
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def png(width, height, depth, kind, rows, more=b''):
    "A PNG by hand, for what Pillow reads and does not write."
    def chunk(name, content):
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    head = struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0)
    more = chunk(b'tRNS', more) if more else b''
    pixels = zlib.compress(b''.join(b'\0' + r for r in rows))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + more + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def tiff(width, height, bits, photometric, pixels, sample_format=1, channels=1):
    "A little-endian, uncompressed TIFF by hand."
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, channels),
            (278, height), (279, len(pixels)), (339, sample_format)]
    entries = b''.join(struct.pack('<HHIHH', tag, 3, 1, value, 0) for tag, value in tags)
    return b'II*\0' + struct.pack('<I', 8 + len(pixels)) + pixels + struct.pack('<H', len(tags)) + entries + bytes(4)


def saved(array_or_image, form, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def shown(content, tmp_path, name='picture.png'):
    "What a file with this content is read as, (h, w, 3)."
    (tmp_path/name).write_bytes(content)
    return np.asarray(open_image(tmp_path/name))


def tree(root, content=None, **splits):
    "ImageFolder trees: tree(root, test=['cat', 'dog']); each class gets one.png and two.png."
    for split, classes in splits.items():
        for c in classes:
            folder = os.path.join(root, split, c)
            os.makedirs(folder)
            for name in ('one.png', 'two.png'):
                with open(os.path.join(folder, name), 'wb') as f: f.write(content or saved(COLOUR, 'PNG'))
    return root


# Pictures

SIXTEEN = GREY.astype(np.uint16)*257
SAME_GREY = {
    'png': saved(SIXTEEN, 'PNG'), 'tiff': saved(SIXTEEN, 'TIFF'), 'pgm': saved(SIXTEEN, 'PPM'), 'jpeg 2000': saved(SIXTEEN, 'JPEG2000', irreversible=False),
    'big-endian tiff': saved(Image.frombytes('I;16B', (16, 16), SIXTEEN.astype('>u2').tobytes()), 'TIFF'),
    'tiff whose zero is white': tiff(16, 16, 16, 0, (65535 - SIXTEEN).tobytes()),
    'png in colour': png(16, 16, 16, 2, [np.repeat(r, 3).astype('>u2').tobytes() for r in SIXTEEN]),
    'png with alpha': png(16, 16, 16, 4, [np.stack([r, np.full(16, 65535)], 1).astype('>u2').tobytes() for r in SIXTEEN]),
    'float tiff': saved(GREY/np.float32(255), 'TIFF'), 'float pfm': saved(GREY/np.float32(255), 'PPM'),
    'float tiff whose zero is white': tiff(16, 16, 32, 0, (1 - GREY/np.float32(255)).tobytes(), 3),
    'one byte': saved(GREY, 'PNG'), 'grey and alpha': saved(np.stack([GREY, np.full((16, 16), 255, np.uint8)], -1), 'PNG'),
    'palette': saved(Image.fromarray(GREY).convert('P'), 'GIF'), 'webp': saved(GREY, 'WEBP', lossless=True)}


@pytest.mark.parametrize('kind', SAME_GREY)
def test_the_same_grey_picture_gives_the_same_tensor_in_every_format(kind, tmp_path):
    (tmp_path/'eight.png').write_bytes(saved(GREY, 'PNG'))
    (tmp_path/'other.png').write_bytes(SAME_GREY[kind])
    wanted, found = (NO_CHANGE(open_image(tmp_path/name)) for name in ('eight.png', 'other.png'))
    assert wanted.shape == (3, 16, 16) and (found - wanted).abs().max() <= 1/255 + 1e-6


def test_twelve_bits_are_scaled_by_their_own_white(tmp_path):
    packed = bytes([0xff, 0xf8, 0x00, 0x00, 0x0f, 0xff])   # 4095, 2048, 0, 15 … in twelve bits each
    assert shown(tiff(4, 1, 12, 1, packed), tmp_path)[0, :, 0].tolist() == [255, 128, 0, 255]


@pytest.mark.parametrize('content', [tiff(2, 1, 32, 1, struct.pack('<2I', 0, 2**32 - 1)), saved(np.int32([[0, 70000]]), 'TIFF'),
                                     tiff(2, 1, 16, 1, struct.pack('<2h', -5, 5), 2)], ids=['unsigned', 'signed', 'signed 16'])
def test_integers_without_an_agreed_white_are_refused(content, tmp_path):
    with pytest.raises(VitpruneError, match='picture.png.*no agreed white'): shown(content, tmp_path)


@pytest.mark.parametrize('values', [[0, 255.], [-1., 1.], [0, float('nan')], [0, float('inf')]])
def test_floats_outside_0_to_1_are_refused(values, tmp_path):
    with pytest.raises(VitpruneError, match='values outside 0 to 1'): shown(saved(np.float32([values]), 'TIFF'), tmp_path)


def palette(**options):
    im = Image.new('P', (2, 1)); im.putpalette([255, 0, 0, 0, 0, 255]); im.putpixel((1, 0), 1)
    return im, options


TRANSPARENT = {   # the first pixel is red and seen through altogether, the second is blue and seen
    'RGBA': saved(np.uint8([[[255, 0, 0, 0], [0, 0, 255, 255]]]), 'PNG'),
    'RGBA in WebP': saved(np.uint8([[[255, 0, 0, 0], [0, 0, 255, 255]]]), 'WEBP', lossless=True, exact=True),
    'palette': saved(palette()[0], 'PNG', transparency=0), 'palette with bytes': saved(palette()[0], 'PNG', transparency=b'\0\xff'),
    'GIF': saved(palette()[0], 'GIF', transparency=0),
    'RGB with a key': saved(np.uint8([[[255, 0, 0], [0, 0, 255]]]), 'PNG', transparency=(255, 0, 0))}


@pytest.mark.parametrize('kind', TRANSPARENT)
def test_transparent_pixels_stand_before_white(kind, tmp_path):
    assert shown(TRANSPARENT[kind], tmp_path)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_half_transparent_and_grey_transparent_pixels(tmp_path):
    assert shown(saved(np.uint8([[[255, 0, 0, 51], [10, 20, 30, 255]]]), 'PNG'), tmp_path)[0].tolist() == [[255, 204, 204], [10, 20, 30]]
    assert shown(saved(np.uint8([[[0, 0], [7, 255]]]), 'PNG'), tmp_path)[0, :, 0].tolist() == [255, 7]
    assert shown(png(2, 1, 16, 0, [struct.pack('>2H', 257, 514)], struct.pack('>H', 257)), tmp_path)[0, :, 0].tolist() == [255, 2]
    assert shown(saved(Image.new('1', (1, 1), 1), 'PNG'), tmp_path)[0].tolist() == [[255]*3]


@pytest.mark.parametrize('mode, value, rgb', [
    ('CMYK', (0, 255, 255, 0), (255, 0, 0)), ('CMYK', (0, 0, 0, 255), (0, 0, 0)), ('YCbCr', (255, 128, 128), (255, 255, 255)),
    ('1', 0, (0, 0, 0)), ('L', 77, (77, 77, 77)), ('HSV', (0, 255, 255), (255, 0, 0)), ('I;16', 65535, (255, 255, 255)), ('F', .2, (51, 51, 51))])
def test_a_pixel_of_every_mode(mode, value, rgb):
    assert as_shown(Image.new(mode, (1, 1), value)).getpixel((0, 0)) == rgb


def test_opaque_pictures_are_what_torchvision_reads(tmp_path):
    from torchvision.datasets.folder import pil_loader
    contents = [saved(COLOUR, 'PNG'), saved(COLOUR, 'JPEG'), saved(Image.fromarray(COLOUR).convert('CMYK'), 'JPEG'), saved(GREY, 'JPEG'),
                saved(COLOUR, 'BMP'), saved(Image.fromarray(COLOUR).quantize(7), 'PNG'), saved(COLOUR, 'TIFF'), saved(COLOUR, 'WEBP')]
    for content in contents: assert (shown(content, tmp_path) == np.asarray(pil_loader(tmp_path/'picture.png'))).all()


def test_the_orientation_of_exif_data_is_not_applied_as_in_torchvision(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6   # a quarter turn
    content = saved(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), 'PNG', exif=exif)
    assert shown(content, tmp_path).shape == (2, 4, 3)


def test_the_first_picture_of_a_file_counts(tmp_path):
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue')]
    for form in ('GIF', 'TIFF', 'PNG', 'WEBP'):
        content = saved(frames[0], form, save_all=True, append_images=frames[1:], **({'lossless': True} if form == 'WEBP' else {}))
        assert shown(content, tmp_path)[0, 0].tolist() == [255, 0, 0], form


NOT_READABLE = {'no bytes': b'', 'text': b'once upon a time', 'half a PNG': saved(COLOUR, 'PNG')[:200], 'half a JPEG': saved(COLOUR, 'JPEG')[:500],
                'half a GIF': saved(GREY, 'GIF')[:300], 'half a TIFF': saved(COLOUR, 'TIFF')[:100], 'half a WebP': saved(COLOUR, 'WEBP')[:100],
                'no pixels': b'GIF89a' + bytes(7) + b'\x2c' + bytes(9) + b'\x02\x02\x44\x01\x00\x3b', 'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n',
                'a video': b'\x00\x00\x01\xb3' + bytes(90), 'a strip': saved(np.zeros((1, 1001), np.uint8), 'PNG'), 'a huge PNG': png(20_000, 20_000, 8, 0, [b'']), 'a PNG of 2^31 pixels a side': png(2**31 - 1, 2**31 - 1, 8, 2, [b''])}


@pytest.mark.parametrize('kind', NOT_READABLE)
def test_what_cannot_be_read_is_one_sentence_with_its_name(kind, tmp_path):
    with pytest.raises(VitpruneError) as e: shown(NOT_READABLE[kind], tmp_path)
    text = str(e.value)
    assert text.startswith(f'data: got {tmp_path/"picture.png"}; allowed: readable image files.') and '\n' not in text and 'skip_damaged' in text
    assert ('pixels, make it smaller' in text) == ('huge' in kind or '2^31' in kind)
    assert ('1,001×1 pixels' in text) == (kind == 'a strip')


def test_files_with_flipped_bytes_are_read_or_refused(tmp_path):
    "Decoders fail in many ways; none of them may come through."
    rng, refused = np.random.default_rng(1), 0
    for form in ('PNG', 'JPEG', 'GIF', 'TIFF', 'WEBP', 'BMP', 'JPEG2000', 'TGA', 'ICO', 'PCX', 'DDS', 'SGI', 'ICNS'):
        good = saved(Image.fromarray(COLOUR), form)
        for _ in range(25):
            bad = bytearray(good)
            for at in rng.integers(0, min(len(bad), 400), 3): bad[at] = rng.integers(256)
            try: assert shown(bytes(bad), tmp_path).shape[2] == 3
            except VitpruneError: refused += 1
    assert refused > 20


def test_no_external_program_opens_a_picture():
    assert {'PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF', 'BMP', 'PPM', 'JPEG2000'} <= set(image_formats())
    assert not {'EPS', 'MPEG', 'HDF5', 'GRIB', 'WMF'} & set(image_formats())
    assert {'.png', '.jpeg', '.tif', '.webp', '.gif', '.jp2'} <= image_endings() and '.eps' not in image_endings()


def test_large_pictures_are_read_without_a_warning_and_huge_ones_refused(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200)    # Pillow warns above 200 and stops above 400
    assert shown(saved(COLOUR, 'PNG'), tmp_path).shape == (16, 16, 3) and not recwarn.list
    with pytest.raises(VitpruneError, match='more than 400 pixels, make it smaller'): shown(saved(np.zeros((21, 20), np.uint8), 'PNG'), tmp_path)


# Folders

def test_what_a_system_keeps_in_folders_is_no_class_and_no_image(tmp_path, capsys):
    plain = folder_data(tree(tmp_path/'plain'/'photos', test=['cat', 'dog']))
    messy = tree(tmp_path/'messy'/'photos', test=['cat', 'dog', 'cat/.ipynb_checkpoints', '.ipynb_checkpoints', '__MACOSX/cat', 'dog/__MACOSX', 'dog/@eaDir/x', '$RECYCLE.BIN'])
    for name in ('cat/._one.png', 'cat/.hidden.png', '.DS_Store', 'dog/Thumbs.db', 'dog/desktop.ini', 'cat/DESKTOP.INI'): (messy/'test'/name).write_bytes(b'x')
    ds = folder_data(messy)
    assert (ds.classes, len(ds), ds.digest) == (['cat', 'dog'], 4, plain.digest)
    assert capsys.readouterr().out == ''


def test_a_hidden_folder_above_the_tree_is_the_users_own(tmp_path):
    assert len(folder_data(tree(tmp_path/'.cache'/'photos', test=['cat']))) == 2


def test_the_digest_of_an_ordinary_tree_is_what_it_always_was(tmp_path):
    import hashlib
    root, size, h = tree(tmp_path/'photos', test=['b', 'a', 'a/deeper', 'a-b']), len(saved(COLOUR, 'PNG')), hashlib.sha256()
    for name in ('a/deeper/one.png', 'a/deeper/two.png', 'a/one.png', 'a/two.png', 'a-b/one.png', 'a-b/two.png', 'b/one.png', 'b/two.png'): h.update(f'{name}\0{size}\0'.encode())
    assert folder_data(root).digest == h.hexdigest()


def test_files_that_are_no_images_are_counted_and_named(tmp_path, capsys):
    root = tree(tmp_path/'photos', test=['cat', 'dog'])
    for i in range(7): (root/'test'/'cat'/f'note{i}.txt').write_text('a cat')
    for name in ('labels.csv', 'dog/clip.mpg', 'dog/page.eps', 'dog/noending'): (root/'test'/name).write_text('x')
    assert len(folder_data(root)) == 4
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and 'left out 11 file(s)' in out and 'labels.csv, cat/note0.txt' in out and 'and 6 more' in out


def test_endings_in_capitals_and_of_every_format_count(tmp_path):
    root = tree(tmp_path/'photos', test=['cat'])
    for name, form in (('a.PNG', 'PNG'), ('b.JpEg', 'JPEG'), ('c.TIF', 'TIFF'), ('d.gif', 'GIF'), ('e.jp2', 'JPEG2000'), ('f.tga', 'TGA'), ('g.jfif', 'JPEG')):
        (root/'test'/'cat'/name).write_bytes(saved(COLOUR, form))
    ds = folder_data(root)
    assert len(ds) == 9 and all(ds.image(i).mode == 'RGB' for i in range(9))


def locked(monkeypatch, *names):
    "os.scandir that may not read folders with these names, for tests that run as root."
    real = os.scandir
    def scandir(path='.'):
        if os.path.basename(os.fspath(path)) in names: raise PermissionError(13, 'Permission denied', os.fspath(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)


@pytest.mark.parametrize('name', ['cat', 'deeper', 'test'])
def test_a_folder_that_cannot_be_read_is_named_and_not_skipped(name, tmp_path, monkeypatch):
    root = tree(tmp_path/'photos', test=['cat', 'dog', 'dog/deeper'], train=['cat', 'dog'])
    locked(monkeypatch, name)
    for skip in (False, True):
        with pytest.raises(VitpruneError, match=f'data: got .*{name}; allowed: folders that can be read'): folder_data(root, skip_damaged=skip)


def test_a_split_that_is_not_asked_for_may_be_kept_from_the_user(tmp_path, monkeypatch):
    root = tree(tmp_path/'photos', test=['cat'], train=['cat', 'dog'])
    locked(monkeypatch, 'test')
    assert len(load_data(root, 'train')) == 4
    with pytest.raises(VitpruneError, match='folders that can be read'): load_data(root, 'test')


def test_a_class_without_images_is_named_and_keeps_its_number(tmp_path, capsys):
    root = tree(tmp_path/'photos', test=['ant', 'cat'])
    (root/'test'/'bee').mkdir(); (root/'test'/'cow').mkdir(); (root/'test'/'cow'/'cow.txt').write_text('moo')
    ds = folder_data(root)
    assert ds.classes == ['ant', 'bee', 'cat', 'cow'] and ds.targets.tolist() == [0, 0, 2, 2]
    assert 'no images in 2 class folder(s): bee, cow' in capsys.readouterr().out
    assert np.bincount(calibration(ds, 2).targets, minlength=4).tolist() == [1, 0, 1, 0]
    assert len(calibration(ds, 4)) == 4 and len(load_data(root, limit=3)) == 3
    with pytest.raises(VitpruneError, match='classes: got bee, cow; allowed: classes with images'): class_subset(ds, ['bee', 'cow'])
    assert class_subset(ds, ['cat', 'bee']).targets.tolist() == [0, 0]


@pytest.mark.parametrize('build, said', [
    (lambda root: (root/'test').mkdir(parents=True), 'It holds no images'),
    (lambda root: (root/'test'/'cat').mkdir(parents=True), 'It holds no images'),
    (lambda root: tree(root, test=['.cat']), 'It holds no images'),
    (lambda root: (tree(root, test=['cat']), [os.rename(root/'test'/'cat'/n, root/'test'/n) for n in ('one.png', 'two.png')]), 'It holds one.png, two.png: no image in a class folder'),
    (lambda root: (root.mkdir(parents=True), (root/'test').write_text('x')), 'a folder that holds val/ or test/'),
    (lambda root: (root.parent.mkdir(), root.symlink_to(root)), "an existing folder")])
def test_trees_without_images_are_refused(build, said, tmp_path):
    root = tmp_path/'deep'/'photos'
    build(root)
    with pytest.raises(VitpruneError) as e: folder_data(root)
    assert said in str(e.value) and 'data: got ' in str(e.value)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_splits_with_different_classes_are_refused_by_name(split, tmp_path):
    root = tree(tmp_path/'photos', train=['cat', 'deer'], test=['cat', 'zebra'])
    with pytest.raises(VitpruneError) as e: load_data(root, split)
    assert 'deer only in train/' in str(e.value) and 'zebra only in test/' in str(e.value)
    (root/'train'/'zebra').mkdir(); (root/'test'/'deer').mkdir()
    assert [load_data(root, s).classes for s in ('train', 'test')] == [['cat', 'deer', 'zebra']]*2


def test_a_flat_val_folder_does_not_stand_in_the_way_of_training_images(tmp_path):
    root = tree(tmp_path/'photos', train=['cat', 'dog'])
    (root/'val').mkdir(); (root/'val'/'one.png').write_bytes(saved(COLOUR, 'PNG'))
    assert len(load_data(root, 'train')) == 4
    with pytest.raises(VitpruneError, match='no image in a class folder'): load_data(root, 'test')


def test_names_alike_but_for_case_are_two_classes_and_one_class_is_enough(tmp_path, capsys):
    ds = folder_data(tree(tmp_path/'letters', test=['A', 'a', 'b', 'caf\u00e9', 'cafe\u0301']))
    assert len(ds.classes) == 5 and len(ds) == 10
    out = capsys.readouterr().out
    assert 'different classes in spite of their names: A, a\n' in out and out.count('different classes') == 2
    assert folder_data(tree(tmp_path/'one', test=['all'])).classes == ['all']


def test_links_are_followed_once_and_never_in_a_circle(tmp_path):
    root = tree(tmp_path/'photos', test=['cat', 'dog'])
    tree(tmp_path, elsewhere=['more'])
    (root/'test'/'cat'/'more').symlink_to(tmp_path/'elsewhere'/'more')      # two images
    (root/'test'/'cat'/'again').symlink_to(tmp_path/'elsewhere'/'more')     # the same two
    (root/'test'/'cat'/'loop').symlink_to(root/'test'/'cat'); (root/'test'/'cat'/'up').symlink_to(root)
    (root/'test'/'dog'/'self').symlink_to('self')
    ds = folder_data(root, skip_damaged=True)
    assert np.bincount(ds.targets).tolist() == [4, 2]
    (tmp_path/'other').mkdir(); (tmp_path/'other'/'test').symlink_to(root/'test')
    assert len(folder_data(tmp_path/'other')) == 6


def spoil(root):
    (root/'test'/'cat'/'gone.png').symlink_to(root/'nowhere.png')
    os.mkfifo(root/'test'/'cat'/'pipe.png')
    (root/'test'/'dog'/'cut.png').write_bytes(saved(COLOUR, 'PNG')[:99])


def test_links_to_nowhere_pipes_and_damaged_files_are_refused_or_left_out_and_named(tmp_path, capsys):
    root = tree(tmp_path/'photos', test=['cat', 'dog'])
    spoil(root)
    with pytest.raises(VitpruneError, match='gone.png; allowed: readable image files'): folder_data(root)
    (root/'test'/'cat'/'gone.png').unlink()
    with pytest.raises(VitpruneError, match='pipe.png.*no regular file'): folder_data(root)
    ds = folder_data(root, skip_damaged=True)
    assert len(ds) == 4 and 'left out 2 damaged file(s): cat/pipe.png, dog/cut.png' in capsys.readouterr().out
    for name in ('cat/one.png', 'cat/two.png', 'dog/one.png', 'dog/two.png'): (root/'test'/name).write_bytes(b'')
    with pytest.raises(VitpruneError, match='at least one image that can be read'): folder_data(root, skip_damaged=True)


@pytest.mark.parametrize('code', ['EMFILE', 'ENFILE', 'ESTALE', 'ETIMEDOUT', 'ENOMEM'])
def test_a_file_that_no_machine_could_open_just_now_is_not_left_out(tmp_path, monkeypatch, capsys, code):
    "Too many files open, no memory, a network drive away: nothing is known of the file."
    root, why = tree(tmp_path/'photos', test=['cat', 'dog']), getattr(errno, code)
    def refuse(*args, **kw): raise OSError(why, os.strerror(why), str(root))
    whole = folder_data(root)
    with monkeypatch.context() as m:
        m.setattr(data.Image, 'open', refuse)
        for skip in (True, False):
            with pytest.raises(OSError) as said: folder_data(root, skip_damaged=skip)[0]
            assert said.value.errno == why
        assert cli.main(f'eval course --data {root} --skip-damaged --device cpu'.split()) == 2
    err = capsys.readouterr().err
    assert 'Replace' not in err and 'left out' not in err and err.count('\n') == 1
    assert len(folder_data(root, skip_damaged=True)) == len(whole)
    monkeypatch.setattr(data.os, 'stat', refuse)
    with pytest.raises(OSError): data._kept_files(root, [(root/'test/cat/one.png', 0)], True, print)


def test_a_file_that_vanishes_is_named(tmp_path):
    ds = folder_data(tree(tmp_path/'photos', test=['cat']))
    os.unlink(ds.images[0])
    with pytest.raises(VitpruneError, match='one.png.*No such file'): ds[0]


def test_a_refusal_of_a_worker_is_the_same_sentence(tmp_path):
    root = tree(tmp_path/'photos', test=['cat'])
    (root/'test'/'cat'/'two.png').write_bytes(b'no image')
    ds = folder_data(root).but(transform=NO_CHANGE)
    said = []
    for workers in (0, 1):
        with pytest.raises(VitpruneError) as e: list(loader(ds, 1, workers))
        said.append(str(e.value))
    assert said[0] == said[1] and 'two.png' in said[0]


ODD = os.fsdecode(b'caf\xe9')   # Latin-1, no UTF-8


def test_names_that_are_not_utf8_go_everywhere_that_names_go(tmp_path, capsys):
    root = os.path.join(tmp_path, ODD)
    tree(root, train=['cat', ODD], test=['cat', ODD])
    with open(os.path.join(root, 'test', ODD, ODD + '.png'), 'wb') as f: f.write(b'no image')
    with open(os.path.join(root, 'test', 'cat', ODD + '.txt'), 'wb') as f: f.write(b'no image')
    ds = folder_data(root)
    assert len(ds) == 5 and ds.digest == folder_data(root).digest
    assert json.loads(json.dumps([ds.name, *ds.classes], ensure_ascii=False).encode()) == ['caf\\udce9', 'caf\\udce9', 'cat']
    with pytest.raises(VitpruneError) as e: [ds.image(i) for i in range(5)]
    assert r'caf\udce9.png' in str(e.value) and str(e.value).encode()
    assert len(folder_data(root, skip_damaged=True)) == 4 and capsys.readouterr().out.encode()
    tree(root, train=['extra'])
    with pytest.raises(VitpruneError) as e: folder_data(root)
    assert str(e.value).encode()


def test_homes_of_nobody_and_odd_paths_are_refused():
    for path in ('~nobody_of_this_name/x', 'no\0where', 'x'*5000):
        with pytest.raises(VitpruneError, match="data: got .*'embedded', 'cifar10', 'cifar100' or a"): load_data(path)


# The command line

@pytest.fixture(scope='module')
def damaged(tmp_path_factory):
    "Ten classes in train/ and test/, with one damaged file in each."
    root = tmp_path_factory.mktemp('data')/'ten'
    for split in ('train', 'test'):
        ds = data.embedded(split)
        for k, c in enumerate(ds.classes):
            (root/split/c).mkdir(parents=True)
            for j, i in enumerate(np.flatnonzero(ds.targets == k)[:4]): ds.image(int(i)).save(root/split/c/f'{j}.png')
        (root/split/'cat'/'9.png').write_bytes(b'no image')
    return root


def said(capsys, *words):
    "Exit code, standard output and standard error of `vitprune WORDS`."
    code = cli.main(list(map(str, words)))
    return code, *capsys.readouterr()


WITH_DATA = {'eval': ['eval'], 'bench': ['bench', '--batch', 2, '--repeats', 2], 'prune': ['prune', '--method', 'uniform', '--calibration', 41, '--out', 'pruned'],
             'demo': ['demo', '--images', 10, '--calibration', 41, '--repeats', 2, '--batch', 8, '--out', 'demo']}


@pytest.mark.parametrize('command', WITH_DATA)
def test_commands_leave_damaged_files_out_where_told_to(command, damaged, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*WITH_DATA[command], '--data', damaged]
    if command not in ('bench', 'demo'):      # bench sees the first images only, and the demo balances over the classes
        code, out, err = said(capsys, *words)
        assert code == 2 and err.count('\n') == 1 and '9.png' in err and 'leave out all such files with --skip-damaged.' in err and 'skip_damaged' not in err
    if '--calibration' in words: words[words.index('--calibration') + 1] = 4
    code, out, err = said(capsys, *words, '--skip-damaged', '--json')
    record = json.loads(out.splitlines()[-1])
    assert code == 0 and 'ten/' in out and 'left out 1 damaged file(s): cat/9.png' in out
    if command == 'eval': assert record['images'] == 40


@pytest.mark.parametrize('command', ['eval', 'prune', 'bench', 'demo', 'train', 'run'])
def test_the_help_of_each_command_names_the_option(command, capsys):
    code, out, _ = said(capsys, command, '--help')
    assert code == 0 and '--skip-damaged' in out and 'open every image file first' in ' '.join(out.split())


TOML = '''data = "{data}"
{skip}
methods = ["uniform"]
reductions = [0.3]
calibration = 8
device = "cpu"
'''


@pytest.mark.parametrize('skip, words, ok', [('', [], False), ('skip_damaged = true', [], True), ('', ['--skip-damaged'], True),
                                             ('skip_damaged = "yes"', [], False)])
def test_a_run_leaves_damaged_files_out_where_its_file_or_the_command_line_say_so(skip, words, ok, damaged, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'c.toml').write_text(TOML.format(data=damaged, skip=skip))
    code, out, err = said(capsys, 'run', 'c.toml', '--out', 'r', '--json', *words)
    assert (code == 0) == ok, err
    if ok: assert 'left out 1 damaged file(s)' in out and {r['images'] for r in json.loads(out.splitlines()[-1])['rows']} == {40}
    else: assert code == 2 and err.count('\n') == 1 and 'skip_damaged=True' not in err and ('9.png' in err or 'skip_damaged: got' in err)


def test_train_leaves_damaged_files_out_where_told_to(damaged, tmp_path, monkeypatch):
    from vitprune_nb.train import course
    seen = {}
    monkeypatch.setattr(course, '_big_model', lambda weights: None)
    monkeypatch.setattr(course, '_inherit', lambda *a: (_ for _ in ()).throw(VitpruneError('far enough')))
    real = course.load_data
    def note(name, split, **options):
        seen[split] = real(name, split, **options)
        return seen[split]
    monkeypatch.setattr(course, 'load_data', note)
    (tmp_path/'w.pth').write_bytes(b'x')
    assert cli.main(['train', '--weights', str(tmp_path/'w.pth'), '--data', str(damaged), '--out', str(tmp_path/'o'), '--skip-damaged']) == 2
    assert {s: len(ds) for s, ds in seen.items()} == dict(train=40, test=40)


def test_words_of_python_become_options_on_a_command_line():
    assert for_shell('Pass skip_damaged=True.') == 'Pass --skip-damaged.' and for_shell('x == True, X=True') == 'x == True, X=True'
