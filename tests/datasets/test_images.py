"""`read_image` on every kind of file that users have."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from skimage import data

from lavis_kvmod.datasets.images import BadImageError, format_of, read_image

CAT = Image.fromarray(data.chelsea())  # 451 x 300, a photograph


def file(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_all_formats_give_the_photograph(tmp_path, kind):
    image = read_image(file(tmp_path, CAT, f"cat.{kind}"))
    assert image.mode == "RGB" and image.size == CAT.size
    assert abs(pixels(image) - pixels(CAT)).mean() < 12  # GIF has 256 colours


def test_bytes_and_open_files_are_read_too(tmp_path):
    path = file(tmp_path, CAT, "cat.png")
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), open(path, "rb")):
        assert read_image(source).tobytes() == CAT.tobytes()


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "tif", "gif"])
@pytest.mark.parametrize("share", [0.6, 0.95])
def test_a_truncated_file_is_an_error(tmp_path, kind, share):
    path = file(tmp_path, CAT, f"cat.{kind}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadImageError, match=rf"cat\.{kind}: not readable: "):
        read_image(path)


def test_a_truncated_file_is_an_error_also_where_lavis_lets_it_pass(tmp_path):
    """Importing LAVIS sets LOAD_TRUNCATED_IMAGES: half a photograph then comes with a grey lower half."""
    import lavis.datasets.datasets.coco_caption_datasets  # noqa: F401

    assert ImageFile.LOAD_TRUNCATED_IMAGES
    path = file(tmp_path, CAT, "cat.jpg")
    path.write_bytes(path.read_bytes()[:9000])
    Image.open(path).convert("RGB")  # no error
    with pytest.raises(BadImageError, match="truncated"):
        read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # others' setting is as it was


def test_cmyk(tmp_path):
    image = read_image(file(tmp_path, CAT.convert("CMYK"), "print.jpg", quality=95))
    assert image.mode == "RGB" and abs(pixels(image) - pixels(CAT)).mean() < 8


def test_palette(tmp_path):
    image = read_image(file(tmp_path, CAT.quantize(256), "few.png"))
    assert image.mode == "RGB" and abs(pixels(image) - pixels(CAT)).mean() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    """What is hidden under full transparency is black here, as image editors leave it."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((90, 90, 90, 255), (2, 0, 4, 2))
    if mode == "P":
        image = image.quantize(4)
    path = file(tmp_path, image.convert(mode), "icon.png")
    assert pixels(read_image(path))[0, :, 0].tolist() == [255, 255, 90, 90]


def test_half_transparent_is_half_white(tmp_path):
    path = file(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "shade.png")
    assert pixels(read_image(path))[0, 0].tolist() == [127, 127, 127]


def test_grey_with_a_transparent_level(tmp_path):
    path = file(tmp_path, Image.fromarray(np.array([[0, 7, 200]], np.uint8)), "key.png", transparency=7)
    assert pixels(read_image(path))[0, :, 0].tolist() == [0, 255, 200]


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    levels = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    path = tmp_path / f"scan.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5 7 1 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    assert pixels(read_image(path))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]


def test_16_bit_photograph_keeps_its_look(tmp_path):
    grey = data.camera()
    path = file(tmp_path, Image.fromarray(grey.astype(np.uint16) * 257), "camera.png")
    assert np.array_equal(pixels(read_image(path))[..., 0], grey)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_have_no_known_range(tmp_path, dtype):
    path = file(tmp_path, Image.fromarray(np.ones((2, 2), dtype)), "depth.tif")
    with pytest.raises(BadImageError, match="depth.tif: .*32-bit numbers .*save it as 8 or 16 bits"):
        read_image(path)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"moving.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    red, green, blue = pixels(read_image(path))[4, 4]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """A camera held otherwise stores its sensor's rows and says so: the upright picture is wanted."""
    store = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # to be turned by 270
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = CAT if orientation == 1 else CAT.transpose(store[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("photo.jpg", "photo.png"):
        image = read_image(file(tmp_path, stored, name, exif=exif))
        assert image.size == CAT.size
        assert abs(pixels(image) - pixels(CAT)).mean() < 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_costs_no_photograph(tmp_path):
    path = file(tmp_path, CAT, "photo.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert read_image(path).size == CAT.size


def test_a_single_pixel(tmp_path):
    assert pixels(read_image(file(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)), "dot.png"))).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"\x00" * 500, "not an image of a format that is read"),
        (b"<html>404</html>", "not an image of a format that is read"),
        (b"\x89PNG\r\n\x1a\n", "not "),
        (b"GIF89a", "not "),
    ],
)
def test_what_is_no_image(tmp_path, content, reason):
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=f"page.jpg: {reason}"):
        read_image(path)
    with pytest.raises(BadImageError, match=f"shard.tar, 7: {reason}"):
        read_image(content, name="shard.tar, 7")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(BadImageError, match="gone.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(BadImageError, match="not readable: .*[Dd]irectory"):
        read_image(tmp_path)


def chunk(kind, content, wrong=0):
    """A piece of a PNG; ``wrong`` spoils its check sum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


SIDE_DATA = {
    "a profile of 1.2 MB": chunk(b"iCCP", b"p\0\0" + zlib.compress(os.urandom(1_200_000))),
    "a text of 3 MB": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000)),
    "a wrong sum in a comment": chunk(b"tEXt", b"Comment\0a", wrong=1),
    "a time of two bytes": chunk(b"tIME", b"ab", wrong=1),
    "a broken orientation": chunk(b"eXIf", b"MM\0*", wrong=1),
}


@pytest.mark.parametrize("kind", SIDE_DATA)
@pytest.mark.parametrize("at_end", [False, True])
def test_broken_side_data_costs_no_pixels(tmp_path, kind, at_end):
    whole = file(tmp_path, CAT, "cat.png").read_bytes()
    place = -12 if at_end else 33  # before the end mark, or behind the header
    spoilt = whole[:place] + SIDE_DATA[kind] + whole[place:]
    assert read_image(spoilt).tobytes() == CAT.tobytes()
    (tmp_path / "spoilt.png").write_bytes(spoilt)
    assert read_image(tmp_path / "spoilt.png").tobytes() == CAT.tobytes()


@pytest.mark.parametrize("kind", SIDE_DATA)
def test_truncated_pixels_are_refused_whatever_stands_beside_them(tmp_path, kind):
    whole = file(tmp_path, CAT, "cat.png").read_bytes()
    spoilt = (whole[:33] + SIDE_DATA[kind] + whole[33:])[: len(SIDE_DATA[kind]) + len(whole) // 2]
    with pytest.raises(BadImageError):
        read_image(spoilt)
    wrong_pixels = bytearray(whole)
    wrong_pixels[len(whole) // 2] ^= 1
    with pytest.raises(BadImageError):
        read_image(bytes(wrong_pixels[:33]) + SIDE_DATA[kind] + bytes(wrong_pixels[33:]))


def test_what_is_seen_of_a_png_beside_its_pixels_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = file(tmp_path, Image.new("L", (2, 1), 7), "turned.png", transparency=7, exif=exif)
    whole = path.read_bytes()
    image = read_image(whole[:33] + SIDE_DATA["a text of 3 MB"] + whole[33:])
    assert image.size == (1, 2) and image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, 60, 0, 0, 0, 0, 0xFFFF) + b"%!PS-Adobe-3.0 EPSF-3.0\n" * 3,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"/* XPM */",
    ],
)
def test_a_format_that_is_a_program_is_not_run(tmp_path, content, monkeypatch):
    """Pillow goes by the contents: a PostScript file called photo.jpg would start Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started"))
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match="photo.jpg: not an image of a format that is read .JPEG, PNG, WEBP, "):
        read_image(path)


def test_the_format_is_told_by_the_contents(tmp_path):
    assert format_of(file(tmp_path, CAT, "cat.webp").read_bytes()) == "WEBP"
    with pytest.raises(BadImageError, match="not an image of a format that is read"):
        format_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def bomb(width, height):
    """A PNG whose header promises pixels that are not there."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 20_000, 100_000])  # just above Pillow's warning, above its error, absurd
def test_decompression_bombs_are_refused_by_their_header(tmp_path, side, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    with pytest.raises(BadImageError, match="bomb.png: refused as a decompression bomb: .*pixels"):
        read_image(path)


def test_the_limit_may_be_set(tmp_path):
    path = file(tmp_path, CAT, "cat.png")
    assert read_image(path, max_pixels=451 * 300).size == (451, 300)
    with pytest.raises(BadImageError, match="451 x 300 pixels are more than the limit of 135299"):
        read_image(path, max_pixels=451 * 300 - 1)


def test_out_of_memory_is_not_the_images_fault(tmp_path, monkeypatch):
    path = file(tmp_path, CAT, "cat.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_image(path)


def test_the_error_crosses_processes(tmp_path):
    """Workers send errors to the main process, which makes them anew from their text."""
    error = BadImageError("a.jpg: not readable")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_pillow_warns_of_names_the_file(tmp_path):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 271, 2, 100, 5000)  # a text of 100 bytes that is not there
    path = file(tmp_path, CAT, "cat.jpg", exif=exif)
    with pytest.warns(UserWarning, match=r"cat\.jpg: .*EXIF"):
        read_image(path)
