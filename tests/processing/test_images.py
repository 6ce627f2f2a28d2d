"""Pictures from untrusted sources: every mode upright and in RGB, every bad one refused with one line."""

import http.server
import io
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mglmm.processing import images
from mglmm.processing.images import load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def half_and_half(mode: str = "RGB", left=RED, right=BLUE) -> Image.Image:
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    width, height = image.size
    return [image.getpixel(xy) for xy in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1))]


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    image = half_and_half()
    path = tmp_path / "picture.png"
    image.save(path)
    array = np.asarray(image)
    for source in (image, path, str(path), path.read_bytes(), array, torch.from_numpy(array.copy())):
        loaded = load_image(source)
        assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), array)


def test_the_result_is_independent_of_the_source() -> None:
    image = half_and_half()
    load_image(image).paste(GREEN, (0, 0, 8, 4))
    assert image.getpixel((0, 0)) == RED


PALETTE = half_and_half().quantize(2)
PALETTE_RED = PALETTE.getpixel((0, 0))
TRANSPARENT_PALETTE = PALETTE.copy()
TRANSPARENT_PALETTE.info["transparency"] = PALETTE_RED


@pytest.mark.parametrize(
    ("image", "left", "right"),
    [
        (half_and_half("L", 0, 200), (0, 0, 0), (200, 200, 200)),
        (half_and_half("1", 0, 1), (0, 0, 0), WHITE),
        (half_and_half("LA", (0, 255), (0, 0)), (0, 0, 0), WHITE),
        (half_and_half("RGBA", (*RED, 255), (*BLUE, 0)), RED, WHITE),  # transparent: white
        (half_and_half("RGBA", (*RED, 255), (*BLUE, 51)), RED, (204, 204, 255)),  # a fifth of blue on white
        (PALETTE, RED, BLUE),
        (TRANSPARENT_PALETTE, WHITE, BLUE),
        (half_and_half("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), RED, BLUE),
        (half_and_half("YCbCr", (255, 128, 128), (0, 128, 128)), WHITE, (0, 0, 0)),
        (half_and_half("I;16", 0, 65535), (0, 0, 0), WHITE),
        (half_and_half("I", 257 * 40, 65535), (40, 40, 40), WHITE),  # 16 bits in a 32-bit mode
        (half_and_half("F", 0.0, 1.0), (0, 0, 0), WHITE),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes(image: Image.Image, left: tuple, right: tuple) -> None:
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    assert corners(loaded) == [left, right, left, right]


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (encoded(half_and_half("I;16", 0, 65535)), (0, 0, 0), WHITE),  # 16-bit PNG
        (encoded(half_and_half("I;16", 0, 65535), "TIFF"), (0, 0, 0), WHITE),
        (encoded(half_and_half("L", 0, 200), transparency=0), WHITE, (200, 200, 200)),  # tRNS of a grey PNG
        (encoded(half_and_half(), transparency=RED), WHITE, BLUE),  # tRNS of an RGB PNG
        (encoded(PALETTE, "GIF", transparency=PALETTE_RED), WHITE, BLUE),
        (encoded(half_and_half("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "TIFF"), RED, BLUE),
        (encoded(half_and_half(), "WEBP", lossless=True), RED, BLUE),
    ],
)
def test_files(data: bytes, left: tuple, right: tuple) -> None:
    loaded = load_image(data)
    assert loaded.mode == "RGB" and corners(loaded) == [left, right, left, right]


def test_cmyk_jpeg_is_not_inverted() -> None:
    loaded = load_image(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"))
    assert min(loaded.getpixel((8, 8))) > 250


UPRIGHT = Image.new("RGB", (4, 2))
for xy, colour in (((0, 0), RED), ((3, 0), GREEN), ((0, 1), BLUE), ((3, 1), WHITE)):
    UPRIGHT.putpixel(xy, colour)
STORED = {  # EXIF orientation -> how the camera stored the upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_upright(orientation: int) -> None:
    method = STORED[orientation]
    stored = UPRIGHT if method is None else UPRIGHT.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(stored, exif=exif))
    assert loaded.size == (4, 2) and corners(loaded) == [RED, GREEN, BLUE, WHITE]
    assert load_image(loaded).size == (4, 2)  # not turned a second time


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 1), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 3), 7, np.uint8), (7, 7, 7)),
        (np.full((3, 2, 5), 7, np.uint8), (7, 7, 7)),  # channels first
        (np.concatenate([np.zeros((2, 3, 3)), np.zeros((2, 3, 1))], 2).astype(np.uint8), WHITE),  # RGBA
        (np.full((2, 3, 3), 257 * 9, np.uint16), (9, 9, 9)),
        (np.full((2, 3, 3), 0.5, np.float64), (128, 128, 128)),
        (np.full((2, 3, 3), 1.0, np.float16), WHITE),
        (np.ones((2, 3), bool), WHITE),
        (torch.full((3, 2, 5), 0.5, dtype=torch.bfloat16, requires_grad=True), (128, 128, 128)),
        (np.full((2, 3, 3), 7, ">u2").astype(">u2") * 256, (7, 7, 7)),  # big endian
        (np.zeros((4, 6, 3), np.uint8)[::2, ::-1], (0, 0, 0)),  # not contiguous
    ],
)
def test_arrays(array, expected: tuple) -> None:
    loaded = load_image(array)
    assert loaded.mode == "RGB" and loaded.getpixel((0, 0)) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 3), np.int64), "must be uint8, uint16, bool or float"),
        (np.zeros((2, 3, 3), complex), "got complex128"),
        (np.full((2, 3), 255.0), r"must lie in \[0, 1\], got \[255, 255\]"),
        (np.full((2, 3), -0.1), "must lie in"),
        (np.array([[0.5, np.nan]]), "must lie in"),
        (np.zeros((2, 3, 2), np.uint8), r"got shape \(2, 3, 2\)"),
        (np.zeros((1, 3, 4, 4), np.uint8), r"got shape \(1, 3, 4, 4\)"),
        (np.zeros((0, 3), np.uint8), r"got shape \(0, 3\)"),
        (None, r"image \(NoneType\).*got shape \(\)"),
        (17, r"image \(int\)"),
        ({"path": "x.png"}, r"image \(dict\)"),
        (Image.new("RGB", (0, 4)), "it has no pixels"),
        ("/nowhere/picture.png", "image '/nowhere/picture.png' cannot be read: .*No such file"),
        ("/tmp", "image '/tmp' cannot be read: .*[Dd]irectory"),
        ("a\0b", "cannot be read: .*null"),
        (b"", "is not a picture that Pillow can read: convert it to PNG or JPEG"),
        (b"<html>not found</html>", "is not a picture"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "is not a picture",
        ),  # a program
        (encoded(Image.effect_noise((64, 64), 50))[:900], "cannot be read: .*truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "cannot be read: .*truncated"),
        ("http://", "cannot be read"),
        ("http://[bad", "cannot be read"),
    ],
)
def test_bad_sources_are_refused_in_one_line(source, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_image(source)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("image ")


def test_a_long_name_is_cut() -> None:
    with pytest.raises(ValueError) as caught:
        load_image("x" * 100_000)
    assert len(str(caught.value)) < 500


def bomb(width: int, height: int) -> bytes:
    """A PNG of some 100 bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])  # Pillow warns at the first two and refuses the last
def test_decompression_bombs_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match="more than 89,478,485 pixels and may be a decompression bomb"):
        load_image(bomb(side, side))


def test_the_limit_is_pillows_own(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(ValueError, match="more than 31 pixels"):
        load_image(half_and_half())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(half_and_half()).size == (8, 4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on the damage
def test_damaged_files_raise_nothing_else() -> None:
    """Bytes changed and cut at random: a picture or a ValueError."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    source = Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8))
    outcomes = set()
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"):
        if format not in Image.SAVE and format == "AVIF":
            continue
        options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        data = encoded(source, format, **options)
        for trial in range(40):
            broken = np.frombuffer(data, np.uint8).copy()
            broken[rng.integers(0, len(broken) if trial % 2 else min(len(broken), 200), 4)] = rng.integers(0, 256, 4)
            cut = len(broken) if trial % 3 else int(rng.integers(len(broken)))
            try:
                outcomes.add(load_image(broken[:cut].tobytes()).mode)
            except ValueError as error:
                outcomes.add(type(error).__name__)
    assert outcomes == {"RGB", "ValueError"}


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {"/picture.png": encoded(half_and_half()), "/text": b"hello", "/large": b"\0" * 5000}
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
            else:
                self.send_response(200 if self.path in pages else 404)
            body = pages.get(self.path, b"")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls(server: str, monkeypatch) -> None:
    for path in ("/picture.png", "/moved"):
        assert corners(load_image(server + path)) == [RED, BLUE, RED, BLUE]
    with pytest.raises(ValueError, match="/missing' cannot be read: download failed .404 Not Found.$"):
        load_image(server + "/missing")
    with pytest.raises(ValueError, match="/text' is not a picture"):
        load_image(server + "/text")
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 4096)
    with pytest.raises(ValueError, match="more than 0 MiB; download it yourself and pass the path"):
        load_image(server + "/large")
    with pytest.raises(ValueError, match="cannot be read: .*refused"):
        load_image("http://127.0.0.1:9/x.png")
