"""Whether a model looks and listens: the words that it says to held-out pictures and sounds, and without them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ultrathink_model.config.evaluation import EvaluationConfig
from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.data.digits import DigitsSource, Question, QuestionKind, digit_questions
from ultrathink_model.data.document import Document, Medium
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.media_batch import Entry, pad_sounds, place_slots
from ultrathink_model.data.tokenize import encode_documents
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.evaluation.result import MediaAnswer
from ultrathink_model.media.audio import load_audio, log_mel
from ultrathink_model.media.batch import MediaBatch
from ultrathink_model.media.counts import frame_tokens, image_tokens
from ultrathink_model.media.image import as_data_address, load_image, normalise_image
from ultrathink_model.media.placeholders import cut_at_placeholders
from ultrathink_model.models.generation import generate
from ultrathink_model.models.transformer import Transformer

SHOWN = 6
"""Answers of each kind that the report shows."""
PICTURE_SIDE = 96


def digit_metrics(
    model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, settings: EvaluationConfig
) -> tuple[dict[str, float], list[MediaAnswer]]:
    """Accuracy on held-out questions of the source `digits`; empty where the data has none of it."""
    if not settings.media_questions or all(source.name != DigitsSource.name for source in manifest.sources):
        return {}, []
    asked: Counter[str] = Counter()
    questions = []
    for question in digit_questions("validation"):
        asked[question.kind] += 1
        if asked[question.kind] <= settings.media_questions:
            questions.append(question)
    return answer_metrics(model, tokenizer, questions, settings.batch_size)


def answer_metrics(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int
) -> tuple[dict[str, float], list[MediaAnswer]]:
    """How often the first word that the model writes is the answer, by kind of question.

    `eval/multimodal/<kind>_accuracy` is with the media, `…_withheld` without: there the prompt's placeholders keep their
    own embedding, so that whatever is right then was guessed.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, with the tokens of images and sounds.
        questions: Each with its answer.
        batch_size: Questions answered together.

    Returns:
        The metrics with their standard errors, and some answers to be shown.
    """
    said, withheld = (answer_questions(model, tokenizer, questions, batch_size, given) for given in (True, False))
    metrics: dict[str, float] = {}
    shown: list[MediaAnswer] = []
    for kind in get_args(QuestionKind):
        own = [number for number, question in enumerate(questions) if question.kind == kind]
        if not own:
            continue
        for name, words in (("accuracy", said), ("accuracy_withheld", withheld)):
            share = sum(words[number] == questions[number].answer for number in own) / len(own)
            metrics[f"eval/multimodal/{kind}_{name}"] = share
            metrics[f"eval/multimodal/{kind}_{name}_stderr"] = (share * (1 - share) / len(own)) ** 0.5
        shown += [_show(questions[number], said[number], withheld[number], model) for number in own[:SHOWN]]
    return metrics, shown


def answer_questions(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], batch_size: int, given: bool = True
) -> list[str]:
    """The first word that the model writes, greedily, after each question's prompt; empty where it writes none.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: What is asked.
        batch_size: Questions answered together.
        given: Whether the model gets the media; else only their placeholders.
    """
    longest = max(len(tokenizer.encode(f" {question.answer}.")) for question in questions)
    words = []
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        ids, mask, media = make_prompts(tokenizer, some, model.config.multimodal, tokenizer.pad_id)
        device = model.output_weight.device
        generation = generate(
            model,
            ids.to(device),
            attention_mask=None if mask.all() else mask.to(device),
            max_new_tokens=longest,
            temperature=0.0,
            stop_token_ids=[tokenizer.eos_id],
            pad_token_id=tokenizer.pad_id,
            media=media.to(device) if given else None,
        )
        for tokens, valid in zip(generation.tokens, generation.mask, strict=True):
            found = re.search(r"\w+", tokenizer.decode(tokens[valid].tolist()))
            words.append(found[0] if found else "")
    return words


def make_prompts(
    tokenizer: Tokenizer, questions: Sequence[Question], config: MultimodalConfig, pad_id: int
) -> tuple[Tensor, Tensor, MediaBatch]:
    """The prompts of questions, padded on the left, and their media with the slots of their tokens.

    Returns:
        Token ids and the mask of what is not padding, both of (questions, longest), and the media.
    """
    images = [
        np.stack([load_image(image, config) for image in question.images]) for question in questions if question.images
    ]
    sounds = [log_mel(load_audio(sound, config), config) for question in questions for sound in question.audio]
    rest = iter(sounds)
    documents = []
    for question in questions:
        kinds = cut_at_placeholders(question.prompt)[1]
        tokens = [
            image_tokens(config) if kind == "image" else frame_tokens(config, next(rest).shape[1]) for kind in kinds
        ]
        media = tuple(Medium(kind, 0, count) for kind, count in zip(kinds, tokens, strict=True))
        documents.append(Document("validation", question.prompt, "", 0, media))
    encoded = list(encode_documents(tokenizer, documents))
    longest = 1 + max(len(ids) for ids, _, _ in encoded)
    rows, mask = [], []
    entries: dict[str, list[Entry]] = {"image": [], "audio": []}
    for number, (document, (ids, starts, _)) in enumerate(zip(documents, encoded, strict=True)):
        before = longest - len(ids)
        rows.append([*[pad_id] * (before - 1), tokenizer.bos_id, *ids])
        mask.append([place >= before - 1 for place in range(longest)])
        for start, medium in zip(starts, document.media, strict=True):
            entries[medium.kind].append(Entry(number, before + start, 0, medium.tokens, medium.tokens))
    batch, shape = MediaBatch(), (len(rows), longest)
    if images:
        batch.images = torch.from_numpy(normalise_image(np.concatenate(images), config))
        batch.image_slots = place_slots(entries["image"], shape)
    if sounds:
        batch.audio, batch.audio_frames = pad_sounds(sounds)
        batch.audio_slots = place_slots(entries["audio"], shape)
    return torch.tensor(rows), torch.tensor(mask), batch


def _show(question: Question, said: str, withheld: str, model: Transformer) -> MediaAnswer:
    config = model.config.multimodal
    pictures = [as_data_address(load_image(image, config), PICTURE_SIDE) for image in question.images]
    pictures += [_spectrogram(sound, config) for sound in question.audio]
    return MediaAnswer(
        kind=question.kind,
        prompt=question.prompt,
        answer=question.answer,
        said=said,
        withheld=withheld,
        pictures=pictures,
    )


def _spectrogram(sound: bytes, config: MultimodalConfig) -> str:
    """A sound as a picture of its log-mel spectrogram, low frequencies below, louder is lighter."""
    bands = log_mel(load_audio(sound, config), config)
    grey = 255 * (bands - bands.min()) / max(float(np.ptp(bands)), 1e-6)
    return as_data_address(np.repeat(grey[None, ::-1].astype(np.uint8), 3, axis=0), PICTURE_SIDE)
