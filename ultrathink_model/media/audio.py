"""Sound: from a file or bytes to samples, and from samples to the log-mel spectrogram that the model's encoder takes."""

import functools
import io
from typing import Protocol

import numpy as np
from jaxtyping import Float32

from ultrathink_model.errors import MediaError
from ultrathink_model.media.source import MediaSource, describe, read_bytes, require

BLOCK = 2**16
MAX_CHANNELS = 64
LEAST_RATE, GREATEST_RATE = 1_000, 384_000
LEAST_POWER = 1e-10
DYNAMIC_RANGE = 8.0
SILENCE = (np.log10(LEAST_POWER) + 4.0) / 4.0
"""The log-mel value of no sound at all, -1.5: what shorter clips of a batch are padded with."""
HIGHEST_FREQUENCY = 8_000.0


class AudioSettings(Protocol):
    """What of the section `multimodal` shapes a sound."""

    @property
    def audio_sample_rate(self) -> int:
        """Samples of a second."""
        ...

    @property
    def mel_bins(self) -> int:
        """Bands of the spectrogram."""
        ...

    @property
    def max_audio_seconds(self) -> float:
        """Length of the longest sound that is taken."""
        ...


def load_audio(source: MediaSource, config: AudioSettings) -> Float32[np.ndarray, " samples"]:
    """The samples of a sound, its channels' mean, at `audio_sample_rate`.

    Args:
        source: A path, or a file's bytes: WAV, FLAC, Ogg, MP3 and whatever else libsndfile reads.
        config: `audio_sample_rate` and `max_audio_seconds`.

    Raises:
        MediaError: It is missing, no such sound, damaged, shorter than 10 ms or longer than `max_audio_seconds`, or has
            a sample that is no number.
        DependencyError: soundfile or soxr is not installed.
    """
    samples, rate = _decode(read_bytes(source), describe(source), config.max_audio_seconds)
    if rate != config.audio_sample_rate:
        samples = require("soxr").resample(samples, rate, config.audio_sample_rate)
    if len(samples) < config.audio_sample_rate // 100:
        raise MediaError("sound lasts at least 10 ms", f"{describe(source)} has {len(samples)} samples")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _decode(data: bytes, name: str, longest: float) -> tuple[Float32[np.ndarray, " samples"], int]:
    """The mean of the channels, and the sample rate, read block by block and no further than `longest` allows."""
    soundfile = require("soundfile")
    blocks: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.channels > MAX_CHANNELS or not LEAST_RATE <= file.samplerate <= GREATEST_RATE:
                raise MediaError(
                    f"sound has at most {MAX_CHANNELS} channels and {LEAST_RATE} to {GREATEST_RATE} samples a second",
                    f"{name} has {file.channels} channels at {file.samplerate}",
                )
            bound = int(longest * file.samplerate)
            # A header can claim less than the stream holds, or more.
            while sum(map(len, blocks)) <= bound:
                block = file.read(BLOCK, dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(axis=1))
            rate = int(file.samplerate)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise MediaError("sound can be read", f"{name}: {' '.join(str(error).split()):.200}") from None
    samples = np.concatenate([np.zeros(0, dtype=np.float32), *blocks])
    if len(samples) > bound:
        raise MediaError(f"sound lasts at most {longest:g} s", f"{name} lasts longer")
    if not np.isfinite(samples).all():
        raise MediaError("samples are finite", f"{name} holds {samples[~np.isfinite(samples)][0]}")
    return samples, rate


def log_mel(samples: Float32[np.ndarray, " samples"], config: AudioSettings) -> Float32[np.ndarray, "mel frames"]:
    """The log-mel spectrogram of Whisper (Radford et al. 2022), for the length that the sound has.

    Power spectra of 25 ms Hann windows every 10 ms, in Slaney's mel bands up to 8 kHz, as log₁₀; what is 8 below the
    loudest or less is raised to that; then (x + 4) / 4. Whisper itself pads to 30 s first; its encoder's input for the
    sound's own frames is the same, but for the last one or two, which see the edge.

    Args:
        samples: At `audio_sample_rate`, 10 ms or more.
        config: `audio_sample_rate` and `mel_bins`.
    """
    rate = config.audio_sample_rate
    window, hop = rate // 40, rate // 100
    padded = np.pad(samples.astype(np.float64), window // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][: len(samples) // hop]
    spectrum = np.fft.rfft(frames * _hann(window), axis=1)
    power = spectrum.real**2 + spectrum.imag**2  # (frames, frequencies)
    bands = np.log10(np.maximum(power @ mel_filters(rate, config.mel_bins), LEAST_POWER))
    raised = np.maximum(bands, bands.max() - DYNAMIC_RANGE)
    return np.ascontiguousarray(((raised + 4.0) / 4.0).T, dtype=np.float32)


@functools.lru_cache(maxsize=4)
def mel_filters(rate: int, bands: int) -> np.ndarray:
    """Triangles over the frequencies of a 25 ms window, each of unit area (Slaney's Auditory Toolbox, 1998).

    Returns:
        Weights of (frequencies, bands).
    """
    window, top = rate // 40, min(HIGHEST_FREQUENCY, rate / 2)
    frequencies = np.linspace(0, rate // 2, window // 2 + 1)
    corners = _hertz(np.linspace(0, _mel(top), bands + 2))
    widths = np.diff(corners)
    distance = corners[None, :] - frequencies[:, None]
    rising, falling = -distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (corners[2:] - corners[:-2]))


@functools.lru_cache(maxsize=4)
def _hann(window: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


# Slaney's scale: 3 mel for 200 Hz up to 1 kHz, and 27 mel for each factor of 6.4 above.
BEND_HERTZ, BEND_MEL = 1_000.0, 15.0
MEL_PER_LOG = 27.0 / np.log(6.4)


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < BEND_HERTZ else BEND_MEL + MEL_PER_LOG * float(np.log(hertz / BEND_HERTZ))


def _hertz(mel: np.ndarray) -> np.ndarray:
    above = BEND_HERTZ * np.exp((mel - BEND_MEL) / MEL_PER_LOG)
    return np.where(mel < BEND_MEL, mel * 200 / 3, above)
