import json

import pytest
import torch
from media_rows import media_config, png, wav

from ultrathink_model.config import override_config
from ultrathink_model.data import Tokenizer, TrainLoader, prepare_data
from ultrathink_model.data.digits import Question
from ultrathink_model.evaluation.evaluate import evaluate
from ultrathink_model.evaluation.multimodal import answer_metrics, answer_questions, digit_metrics, make_prompts
from ultrathink_model.models.transformer import build_model

ANSWERS = ("alpha", "beta")
QUESTIONS = [
    *(Question("image", "say <image> it is", ANSWERS[n // 100], images=(png(n),)) for n in (0, 100)),
    *(Question("audio", "say <audio> it is", ANSWERS[n // 40], audio=(wav(n),)) for n in (0, 40)),
    *(
        Question("sum", "both <audio> and <image> are", ANSWERS[n // 100], images=(png(n),), audio=(wav(n // 25),))
        for n in (0, 100)
    ),
]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A model that has learnt six questions by heart, and their data."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "rows").mkdir()
    lines = []
    for number, question in enumerate(QUESTIONS):
        names = {"images": [], "audio": []}
        for column, suffix in (("images", "png"), ("audio", "wav")):
            for data in getattr(question, column):
                name = f"{number}.{suffix}"
                (folder / "rows" / name).write_bytes(data)
                names[column].append(name)
        lines.append(json.dumps({"text": question.text} | names))
    # Some of each, so that what is held out is learnt too, and more of the first answer: a tie would be rounding's to break.
    (folder / "rows" / "rows.jsonl").write_text("\n".join(lines * 4 + lines[::2] * 4), encoding="utf-8")
    config = media_config(folder, f"data.dataset={folder / 'rows'}", "data.packing=best_fit", "model.max_seq_length=32")
    manifest = prepare_data(config)
    torch.manual_seed(0)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = iter(TrainLoader(manifest, config))
    for _ in range(300):
        (batch,) = next(steps)
        output = model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids, media=batch.media)
        optimizer.zero_grad()
        (output.loss_sum / batch.num_tokens).backward()
        optimizer.step()
    return model.eval(), Tokenizer.load(manifest.tokenizer_folder), manifest, config


def test_a_model_that_learnt_the_questions_answers_them_and_without_media_cannot(learnt):
    model, tokenizer, _, _ = learnt
    metrics, shown = answer_metrics(model, tokenizer, QUESTIONS, batch_size=4)
    for kind in ("image", "audio", "sum"):
        assert metrics[f"eval/multimodal/{kind}_accuracy"] == 1.0
        # Both questions are the same without their media, and one answer is the likelier.
        assert metrics[f"eval/multimodal/{kind}_accuracy_withheld"] == 0.5
        assert metrics[f"eval/multimodal/{kind}_accuracy_withheld_stderr"] == pytest.approx(0.5 / 2**0.5)
    assert [answer.said for answer in shown] == [question.answer for question in QUESTIONS]
    assert all(picture.startswith("data:image/png;base64,") for answer in shown for picture in answer.pictures)
    assert [len(answer.pictures) for answer in shown] == [1, 1, 1, 1, 2, 2]


def test_answers_do_not_depend_on_their_neighbours_in_the_batch(learnt):
    model, tokenizer, _, _ = learnt
    together = answer_questions(model, tokenizer, QUESTIONS, batch_size=6)
    assert answer_questions(model, tokenizer, QUESTIONS, batch_size=1) == together


def test_prompts_equal_the_rows_that_are_learnt(learnt):
    """The same tokens, pixels and spectrograms as training sees, whatever way they came."""
    _, tokenizer, manifest, config = learnt
    ids, mask, media = make_prompts(tokenizer, QUESTIONS[4:5], config.multimodal, manifest.pad_id)
    assert mask.all()
    for step in range(4):
        for batch in list(TrainLoader(manifest, config).steps_from(step).__next__()):
            for row in range(len(batch.input_ids)):
                if batch.input_ids[row, : ids.shape[1]].equal(ids[0]) and batch.media.images is not None:
                    place = int(batch.media.image_slots[row].max()) // 16
                    if batch.media.images[place].equal(media.images[0]):
                        return
    pytest.fail("no training row begins with the prompt")


def test_the_whole_evaluation_takes_media_and_leaves_their_tokens_out(learnt):
    model, tokenizer, manifest, config = learnt
    result = evaluate(model, tokenizer, manifest, override_config(config, ["evaluation.num_generations=1"]))
    assert result.validation_tokens == manifest.splits["validation"].tokens
    assert result.metrics["eval/validation/loss"] < result.metrics["eval/bigram/loss"]
    assert result.media_answers == []


def test_questions_are_asked_only_of_data_with_digits(learnt):
    model, tokenizer, manifest, config = learnt
    source = manifest.sources[0].model_copy(update={"name": "digits"})
    renamed = manifest.model_copy(update={"sources": [source]})
    settings = config.evaluation.model_copy(update={"media_questions": 8})
    metrics, shown = digit_metrics(model, tokenizer, renamed, settings)
    assert 0 <= metrics["eval/multimodal/sum_accuracy"] < 0.5
    assert len(shown) == 18
    assert digit_metrics(model, tokenizer, manifest, settings) == ({}, [])
    none = settings.model_copy(update={"media_questions": 0})
    assert digit_metrics(model, tokenizer, renamed, none) == ({}, [])
