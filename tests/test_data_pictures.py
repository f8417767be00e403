"""load_image: odd EXIF, large PNG text, damaged files. One bad picture never ends a run with a traceback."""

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

import data
from conftest import run

ASCII, SHORT, RATIONAL, SLONG = 2, 3, 5, 9                              # types of EXIF values
ORIENTATION, WIDTH, X_RESOLUTION = 0x0112, 0x0100, 0x011A
ODD_TAGS = {
    "zero denominator": (X_RESOLUTION, RATIONAL, 1, struct.pack("<II", 72, 0)),
    "resolution in letters": (X_RESOLUTION, ASCII, 4, b"72 \0"),
    "negative width": (WIDTH, SLONG, 1, struct.pack("<i", -5)),
    "rational width": (WIDTH, RATIONAL, 1, struct.pack("<II", 7, 2)),
}


def exif(*tags):
    """EXIF bytes from (tag, type, count, value), written by hand as Pillow refuses to write these."""
    offset, entries, more = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for tag, kind, count, value in sorted(tags):
        if len(value) > 4:
            value, more = struct.pack("<I", offset + len(more)), more + value
        entries += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + more


@pytest.fixture
def picture(people):
    return Image.fromarray(people[0]["image"])


@pytest.mark.parametrize("name", ODD_TAGS)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_odd_exif_does_not_hide_the_orientation(name, ending, picture, tmp_path):
    turned = (ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0))
    picture.save(tmp_path / f"plain.{ending}")
    picture.save(tmp_path / f"odd.{ending}", exif=exif(turned, ODD_TAGS[name]))
    plain, odd = (np.asarray(data.load_image(tmp_path / f"{n}.{ending}")) for n in ("plain", "odd"))
    assert (odd == np.rot90(plain, -1)).all()


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is(picture, tmp_path):
    good = exif((ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0)))
    picture.save(tmp_path / "plain.jpg")
    for n, bad in enumerate([good[:-12], good[:9], b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"]):
        picture.save(tmp_path / f"{n}.jpg", exif=bad)
        odd, plain = (np.asarray(data.load_image(tmp_path / f"{name}.jpg")) for name in (n, "plain"))
        assert (odd == plain).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(orientation, picture, tmp_path):
    for ending, options in (("jpg", {}), ("png", {}), ("tif", {}), ("tif", dict(compression="tiff_lzw"))):
        tags = Image.Exif()
        tags[ORIENTATION] = orientation
        picture.save(tmp_path / f"p.{ending}", exif=tags, **options)
        want = ImageOps.exif_transpose(Image.open(tmp_path / f"p.{ending}")).convert("RGB")
        assert (np.asarray(data.load_image(tmp_path / f"p.{ending}")) == np.asarray(want)).all()


def test_a_png_with_much_text_is_a_good_picture(picture, tmp_path):
    text, xmp = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 3_000_000, zip=True)
    xmp.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    for n, options in enumerate([dict(pnginfo=text), dict(pnginfo=xmp), dict(icc_profile=bytes(3_000_000))]):
        picture.save(tmp_path / f"{n}.png", **options)
        assert (np.asarray(data.load_image(tmp_path / f"{n}.png")) == np.asarray(picture)).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_a_damaged_file_is_one_error_that_names_it(kind, picture, tmp_path):
    """Bytes are changed and files cut at random places, under a wrong ending: a picture, or an error with its name."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    buffer, rng, refused = io.BytesIO(), random.Random(0), 0
    picture.save(buffer, kind)
    for n in range(60):
        content = bytearray(buffer.getvalue())
        for _ in range(6):
            content[rng.randrange(min(len(content), 400) if n % 2 else len(content))] = rng.randrange(256)
        file = tmp_path / f"photo-{n}.jpg"
        file.write_bytes(content[:rng.randrange(len(content))] if n % 3 == 0 else content)
        try:
            assert data.load_image(file, 50).mode == "RGB"
        except ValueError as e:
            assert str(e).startswith(f"{file} cannot be read as an image")
            refused += 1
    assert refused > 5


def test_a_picture_beyond_the_bomb_limit_is_named(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="large.png cannot be read as an image .*decompression bomb"):
        data.load_image(tmp_path / "large.png")


@pytest.mark.parametrize("error", [struct.error("s"), TypeError("t"), RuntimeError("r"), ZeroDivisionError(),
                                   KeyError("k"), MemoryError()])
def test_whatever_the_decoder_raises(error, picture, tmp_path, monkeypatch):
    """The checker lists the file and goes on; so does --skip-bad, by the same function."""
    picture.save(tmp_path / "bad.png")
    picture.save(tmp_path / "good.jpg")
    picture.save(tmp_path / "fine.jpg")
    rows = ["bad.png,a man,1,train", "good.jpg,a man,2,val", "fine.jpg,a man,3,test"]
    (tmp_path / "x.csv").write_text("\n".join(["image,caption,pid,split", *rows]))

    def fail(self):
        raise error
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    assert [r["image"].name for r, _ in data.unreadable_images(data.read("csv", tmp_path, "train"))] == ["bad.png"]
    said = run("data.py", "--dataset", "csv", "--data-root", tmp_path, "--sheet", tmp_path / "s.html", code=1)
    assert f"bad.png cannot be read as an image ({str(error) or type(error).__name__})" in said and "1 wrong" in said


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_is_read_as_its_file_is(mode, tmp_path):
    """Also turned upright, as a camera's file says."""
    picture = Image.linear_gradient("L").resize((20, 30)).convert("I" if mode == "I;16" else "RGB").convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(tmp_path / "p.tiff", exif=exif)
    want = data.load_image(tmp_path / "p.tiff")
    with Image.open(tmp_path / "p.tiff") as opened:
        assert np.array_equal(data.load_image(opened), want)
    assert want.mode == "RGB" and want.size in ((20, 30), (30, 20))


def test_other_arrays_are_refused():
    for array in (np.zeros((4, 3), np.uint8), np.zeros((3, 4, 2), np.uint8), np.zeros((4, 3, 3), np.float32)):
        with pytest.raises(ValueError, match=r"a uint8 array \(H, W, 3\), not"):
            data.load_image(array)
