"""Reading pictures from untrusted sources into upright RGB."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT = 30.0


def load_image(source: Any) -> Image.Image:
    """
    An RGB picture, upright as a viewer displays it (EXIF orientation applied).

    Transparent pictures are laid on white, 16-bit ones scaled to 8 bits, CMYK and palettes converted.

    Args:
        source: `PIL.Image.Image`, path, `http(s)://` URL, encoded `bytes`, or array/tensor `(H, W)`, `(H, W, 1|3|4)` or
            `(3, H, W)`: uint8, uint16, bool, or float in [0, 1].

    Raises:
        ValueError: one line that names the picture and what to do about it.
    """
    name = f"image {str(source)[:200]!r}" if isinstance(source, str | Path) else f"image ({type(source).__name__})"
    try:
        image = _open(source)
        limit = Image.MAX_IMAGE_PIXELS  # at which Pillow itself only warns
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError
        image.load()
        image = _to_rgb(ImageOps.exif_transpose(image))
        if 0 in image.size:
            raise ValueError("it has no pixels")
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels and may be a decompression bomb: resize it first, or "
            "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that Pillow can read: convert it to PNG or JPEG") from error
    except Exception as error:  # Pillow's decoders raise almost anything on a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name} cannot be read: {reason}") from error
    return image


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str | Path | bytes):
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = _download(source)
        Image.init()
        formats = [name for name in Image.ID if name != "EPS"]  # a program that Pillow would let Ghostscript run
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
    return _from_array(np.asarray(source))


def _download(url: str) -> bytes:
    body = bytearray()
    with httpx2.stream("GET", url, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
        if not response.is_success:
            raise OSError(f"download failed ({response.status_code} {response.reason_phrase})")
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_DOWNLOAD_BYTES:
                raise OSError(f"more than {MAX_DOWNLOAD_BYTES >> 20} MiB; download it yourself and pass the path")
    return bytes(body)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an image array must be (H, W), (H, W, 1|3|4) or (3, H, W), got shape {array.shape}")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (0 <= low and high <= 1):  # NaN fails too
            raise ValueError(f"a float image array must lie in [0, 1], got [{low:g}, {high:g}]: scale it or pass uint8")
        array = (array * 255 + 0.5).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, uint16, bool or float in [0, 1], got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits in "I;16" or "I"; Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        image = _from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
