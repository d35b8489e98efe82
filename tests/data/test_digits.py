import io
import wave

import numpy as np
import pytest
from media_rows import media_config

from ultrathink_model.data.digits import HIGH, KEYS, LOW, WORDS, digit_questions, key_tone, load_pictures
from ultrathink_model.data.sources import open_source
from ultrathink_model.errors import DependencyError


def heard(tone: bytes) -> int:
    """The digit of a key's tone, by the strongest of the row's and of the column's frequencies."""
    with wave.open(io.BytesIO(tone)) as file:
        samples, rate = np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()
    spectrum = np.abs(np.fft.rfft(samples, 4 * rate))

    def strongest(frequencies):
        around = [spectrum[round(4 * f * 0.98) : round(4 * f * 1.02)].max() for f in frequencies]
        return int(np.argmax(around))

    return {place: digit for digit, place in KEYS.items()}[strongest(LOW), strongest(HIGH)]


def test_a_tone_is_its_keys():
    random = np.random.default_rng(0)
    assert [heard(key_tone(digit, random)) for digit in range(10)] == list(range(10))


def test_each_question_is_answered_by_its_media():
    pixels, _ = load_pictures()
    assert pixels.shape == (5000, 28, 28)
    questions = digit_questions("validation")
    assert len(questions) == 3 * 500
    for question in questions[:300]:
        assert question.text.count("<image>") == len(question.images)
        assert question.text.count("<audio>") == len(question.audio)
        if question.kind == "audio":
            assert question.answer == WORDS[heard(question.audio[0])]
    answers = [question.answer for question in questions if question.kind == "image"]
    assert [answers.count(word) for word in WORDS[:10]] == [50] * 10


def test_nothing_held_out_is_learnt():
    learnt, held_out = digit_questions("train"), digit_questions("validation")
    assert len(learnt) == 3 * 4500
    for name in ("images", "audio"):
        both = [{medium for question in some for medium in getattr(question, name)} for some in (learnt, held_out)]
        assert not both[0] & both[1]
    assert digit_questions("validation") == held_out


def test_the_source_reads_as_rows_and_says_what_it_is(tmp_path, caplog):
    caplog.set_level("INFO", "ultrathink_model")
    source = open_source("digits", media_config(tmp_path).data, media=True)
    row = next(source.rows("train"))
    assert row.text.count("<image>") == len(row.images)
    assert "synthetic tones" in caplog.text
    assert source.identity() == open_source("digits", media_config(tmp_path).data).identity()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    load_pictures.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'ultrathink-model\[multimodal\]'"):
        digit_questions("train")
