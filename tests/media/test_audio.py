import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from ultrathink_model.errors import MediaError
from ultrathink_model.media.audio import SILENCE, load_audio, log_mel, mel_filters

SETTINGS = SimpleNamespace(audio_sample_rate=16_000, mel_bins=80, max_audio_seconds=30.0)


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def packed(samples: np.ndarray, rate: int, form: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


def noisy(seconds: float) -> np.ndarray:
    return tone(seconds) + np.random.default_rng(0).normal(0, 0.05, round(seconds * 16_000)).astype(np.float32)


@pytest.mark.parametrize("bands", [80, 128])
@pytest.mark.parametrize("seconds", [0.05, 0.4275, 3.0])
def test_the_spectrogram_equals_whispers_feature_extractor(seconds, bands):
    samples = noisy(seconds)
    extractor = WhisperFeatureExtractor(feature_size=bands)
    settings = SimpleNamespace(**vars(SETTINGS) | {"mel_bins": bands})
    theirs = extractor(samples, sampling_rate=16_000, padding=False, return_tensors="np")["input_features"][0]
    ours = log_mel(samples, settings)
    assert ours.shape == (bands, len(samples) // 160)
    # transformers computes in float32, whose rounding the logarithm of quiet bands enlarges; it promises 1e-5 itself.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_frames_before_the_edge_equal_those_of_whisper_padded_to_thirty_seconds():
    samples = noisy(1.0)
    theirs = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    ours = log_mel(samples, SETTINGS)
    np.testing.assert_allclose(ours[:, :98], theirs[:, :98], atol=1e-4)


def test_the_filters_equal_transformers_own():
    theirs = mel_filter_bank(201, 80, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(16_000, 80), theirs, atol=1e-12)


def test_no_sound_is_the_silence_value_everywhere():
    np.testing.assert_allclose(log_mel(np.zeros(1600, np.float32), SETTINGS), SILENCE)
    assert SILENCE == -1.5


def test_another_rate_has_windows_of_the_same_length():
    settings = SimpleNamespace(**vars(SETTINGS) | {"audio_sample_rate": 8_000})
    assert log_mel(tone(0.5, 8_000), settings).shape == (80, 50)


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)])
def test_every_format_is_read(form, subtype):
    samples = load_audio(packed(tone(1.0), 16_000, form, subtype), SETTINGS)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 16_000) < 2_500  # MP3 pads to whole frames
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    assert abs(spectrum.argmax() - 440) <= 2


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 11_127])
def test_a_tone_keeps_its_pitch_and_strength_at_another_rate(rate):
    samples = load_audio(packed(tone(1.0, rate), rate), SETTINGS)
    assert abs(len(samples) - 16_000) <= 1
    expected = tone(1.0)[: len(samples)]
    np.testing.assert_allclose(samples[1000:-1000], expected[1000 : len(samples) - 1000], atol=1e-3)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    assert np.abs(load_audio(packed(tone(1.0, 48_000, 15_000), 48_000), SETTINGS)[500:-500]).max() < 1e-3


def test_channels_become_their_mean():
    both = np.stack([tone(0.1), np.zeros(1600, np.float32)], axis=1)
    np.testing.assert_allclose(load_audio(packed(both, 16_000), SETTINGS), tone(0.1) / 2, atol=1e-7)


def test_what_is_no_sound_is_refused():
    for data in (b"no sound", packed(tone(0.1), 16_000)[:20], packed(tone(0.1), 16_000, "FLAC", "PCM_16")[:30]):
        with pytest.raises(MediaError) as refused:
            load_audio(data, SETTINGS)
        assert refused.value.rule in {"sound can be read", "sound lasts at least 10 ms"}


def test_long_short_and_strange_sound_is_refused():
    for samples, rate, rule in (
        (np.zeros(31 * 8_000, np.float32), 8_000, "sound lasts at most 30 s"),
        (np.zeros(100, np.float32), 16_000, "sound lasts at least 10 ms"),
        (np.full(1600, np.nan, np.float32), 16_000, "samples are finite"),
        (np.zeros((1600, 65), np.float32), 16_000, "sound has at most 64 channels and 1000 to 384000 samples a second"),
        (np.zeros(1600, np.float32), 500, "sound has at most 64 channels and 1000 to 384000 samples a second"),
    ):
        with pytest.raises(MediaError) as refused:
            load_audio(packed(samples, rate), SETTINGS)
        assert refused.value.rule == rule


def test_hours_of_silence_in_a_small_file_are_not_unpacked():
    day = packed(np.zeros(16_000 * 3_600, np.int16), 16_000, "FLAC", "PCM_16")
    assert len(day) < 1_000_000
    with pytest.raises(MediaError, match="lasts longer"):
        load_audio(day, SETTINGS)


def test_damaged_bytes_never_raise_anything_else():
    random = np.random.default_rng(0)
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")):
        whole = np.frombuffer(packed(tone(0.2), 16_000, form, subtype), dtype=np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[random.integers(0, min(len(broken), 200), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(MediaError):
                assert np.isfinite(log_mel(load_audio(broken.tobytes(), SETTINGS), SETTINGS)).all()
