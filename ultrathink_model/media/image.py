"""Images: from a file or bytes to the pixels that the model's encoder takes."""

import base64
import io
import struct
import warnings
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float32, UInt8

from ultrathink_model.errors import MediaError
from ultrathink_model.media.source import MediaSource, describe, read_bytes, require

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# A small file can claim, and even hold, gigabytes of pixels; 64 M of them are 192 MiB.
MAX_PIXELS = 2**26
BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error, OverflowError)


class ImageSettings(Protocol):
    """What of the section `multimodal` shapes an image."""

    @property
    def image_size(self) -> int:
        """Side of the square in pixels."""
        ...

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of each channel, between 0 and 1."""
        ...

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Deviation of each channel."""
        ...


def load_image(source: MediaSource, config: ImageSettings) -> UInt8[np.ndarray, "3 side side"]:
    """The middle square of an image as RGB, scaled to `image_size` with a bicubic filter.

    That is what CLIP's image processor does: the shorter side is scaled, the longer one cropped at both ends. An
    orientation that a camera noted is applied, of an animation the first frame is taken, and 16 bits are brought to 8.

    Args:
        source: A path, or a file's bytes: PNG, JPEG, WebP, GIF, BMP or TIFF.
        config: `image_size`.

    Raises:
        MediaError: It is missing, no such image, cut or damaged, or has over `MAX_PIXELS`.
        DependencyError: Pillow is not installed.
    """
    pillow = require("PIL.Image")
    data, name = read_bytes(source), describe(source)
    try:
        with warnings.catch_warnings():
            # Our own bound on the pixels is lower than the one that Pillow warns of.
            warnings.simplefilter("ignore")
            with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(f"{name} has {image.width} × {image.height}")
                return _middle_square(image, config.image_size)
    except pillow.DecompressionBombError:
        raise _too_large(f"{name} has more than {2 * pillow.MAX_IMAGE_PIXELS}") from None
    except BROKEN as error:
        formats = ", ".join(FORMATS)
        raise MediaError(f"image can be read as {formats}", f"{name}: {' '.join(str(error).split()):.200}") from None


def normalise_image(
    pixels: UInt8[np.ndarray, "*images 3 side side"], config: ImageSettings
) -> Float32[np.ndarray, "*images 3 side side"]:
    """Pixels as the encoder takes them: scaled to [0, 1], less `image_mean`, over `image_std`."""
    mean, std = np.asarray(config.image_mean, dtype=np.float32), np.asarray(config.image_std, dtype=np.float32)
    return pixels * (1 / (255 * std))[:, None, None] - (mean / std)[:, None, None]


def as_data_address(pixels: UInt8[np.ndarray, "3 side side"], longest: int) -> str:
    """An image as a `data:` address of a PNG, which a page can show without a file beside it.

    Args:
        pixels: Its pixels.
        longest: Side that it is scaled down to where it is larger.
    """
    picture = require("PIL.Image").fromarray(pixels.transpose(1, 2, 0))
    picture.thumbnail((longest, longest))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _middle_square(image: "Image", side: int) -> UInt8[np.ndarray, "3 side side"]:
    upright = require("PIL.ImageOps").exif_transpose(_eight_bits(image))
    width, height = upright.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    # Cropped while it is scaled: a strip of one pixel's height would else be scaled to gigabytes first.
    bicubic = require("PIL.Image").Resampling.BICUBIC
    square = upright.convert("RGB").resize((side, side), bicubic, box=(left, top, left + short, top + short))
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))  # (3, side, side)


def _eight_bits(image: "Image") -> "Image":
    """The image with 8 bits a channel: Pillow itself would cut 16 bits off at 255."""
    if image.mode == "F":
        raise ValueError("its pixels are floats")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    return require("PIL.Image").fromarray((np.clip(values, 0, 65_535) >> 8).astype(np.uint8))


def _too_large(found: str) -> MediaError:
    return MediaError(f"image has at most {MAX_PIXELS} pixels", f"{found} pixels")
