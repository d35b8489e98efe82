import numpy as np
import pytest
import torch
from media_rows import media_config, write_rows

from ultrathink_model.config import override_config
from ultrathink_model.data import TrainLoader, ValidationLoader, prepare_data
from ultrathink_model.data.document import Medium
from ultrathink_model.data.manifest import MEDIA_FOLDER
from ultrathink_model.data.media_index import MediaIndex, MediaIndexWriter
from ultrathink_model.data.media_store import MediaStore
from ultrathink_model.errors import ConfigError
from ultrathink_model.evaluation.ngram import baseline_losses
from ultrathink_model.media.image import normalise_image


@pytest.fixture(scope="module", params=["stream", "best_fit"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    config = media_config(folder, f"data.dataset={write_rows(folder / 'rows')}", f"data.packing={request.param}")
    return config, prepare_data(config)


def take(loader, steps):
    return [step for step, _ in zip(loader, range(steps), strict=False)]


def media_of(batch):
    """Each medium's tokens of a batch, as (row, places), with what its slots lead to."""
    found = []
    if batch.media is None:
        return found
    for slots, kind in ((batch.media.image_slots, "image"), (batch.media.audio_slots, "audio")):
        if slots is not None:
            for row, place in (slots >= 0).nonzero().tolist():
                found.append((kind, row, place, int(slots[row, place])))
    return found


def test_every_medium_token_of_the_input_has_its_slot_and_no_other_token_has_one(prepared):
    config, manifest = prepared
    for split in (step for steps in take(TrainLoader(manifest, config), 7) for step in steps):
        for kind, number in manifest.media.token_ids.items():
            slots = getattr(split.media, f"{kind}_slots", None)
            expected = split.input_ids == number
            assert torch.equal(expected, torch.zeros_like(expected) if slots is None else slots >= 0)


def test_slots_lead_to_the_medium_that_stands_there(prepared):
    """By the way of the stream: the n-th token of an image is the n-th patch of that image's own pixels."""
    config, manifest = prepared
    store = MediaStore(manifest.path / MEDIA_FOLDER, manifest.media)
    pixels = {store.image(number).tobytes(): number for number in range(manifest.media.images)}
    seen = set()
    for batch in ValidationAndTrain(manifest, config):
        media = batch.media
        if media is None or media.images is None:
            continue
        numbers = [pixels[_raw(image, manifest.media)] for image in media.images]
        for row in range(len(batch.input_ids)):
            slots = media.image_slots[row]
            for number in {int(slot) // 16 for slot in slots[slots >= 0]}:
                patches = slots[(slots >= 0) & (slots // 16 == number)] % 16
                # A run is unbroken, and complete unless an end of the row cuts it.
                assert (patches.diff() == 1).all()
                seen.add((numbers[number], int(patches[0]), int(patches[-1])))
    assert {number for number, *_ in seen} == set(range(manifest.media.images))


def ValidationAndTrain(manifest, config):  # noqa: N802
    yield from ValidationLoader(manifest, config)
    for steps in take(TrainLoader(manifest, config), 8):
        yield from steps


def _raw(image, info):
    return np.rint((image.numpy() * 0.5 + 0.5) * 255).astype(np.uint8).tobytes()


def test_pixels_are_normalised_and_sounds_padded_with_silence(prepared):
    config, manifest = prepared
    store = MediaStore(manifest.path / MEDIA_FOLDER, manifest.media)
    batch = next(
        batch for batch in ValidationAndTrain(manifest, config) if batch.media and batch.media.audio is not None
    )
    media = batch.media
    assert media.audio.dtype == torch.float32
    assert media.audio.shape == (len(media.audio_frames), 16, int(media.audio_frames.max()))
    stored = [store.sound(number).astype(np.float32) for number in range(manifest.media.sounds)]
    for clip, frames in zip(media.audio.numpy(), media.audio_frames.tolist(), strict=True):
        assert (clip[:, frames:] == -1.5).all()
        assert any(np.array_equal(clip[:, :frames], sound) for sound in stored)
    image = store.image(0)
    assert np.allclose(normalise_image(image, manifest.media), image / 127.5 - 1, atol=1e-6)


def test_media_tokens_are_seen_and_never_predicted(prepared):
    config, manifest = prepared
    ids = list(manifest.media.token_ids.values())
    batches = list(ValidationLoader(manifest, config))
    assert not any(np.isin(batch.labels, ids).any() for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == manifest.splits["validation"].tokens
    assert any(np.isin(batch.input_ids, ids).any() for batch in batches)
    for found in baseline_losses(manifest).values():
        assert found.tokens == manifest.splits["validation"].tokens


def equal(first, second):
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.labels, second.labels)
    assert (first.media is None) == (second.media is None)
    for name, value in vars(first.media).items() if first.media else ():
        other = getattr(second.media, name)
        assert (value is None) == (other is None)
        assert value is None or torch.equal(value, other)


def test_neither_workers_nor_the_step_it_starts_from_change_the_batches(prepared):
    config, manifest = prepared
    whole = take(TrainLoader(manifest, config), 8)
    workers = override_config(config, ["data.num_workers=2"])
    for other in (take(TrainLoader(manifest, workers), 8), take(TrainLoader(manifest, config, first_step=3), 5)):
        for first, second in zip(whole[-len(other) :], other, strict=True):
            for one, two in zip(first, second, strict=True):
                equal(one, two)


def test_two_ranks_together_see_the_media_of_one(prepared):
    config, manifest = prepared
    halves = override_config(config, ["training.batch_size=2"])
    single = TrainLoader(manifest, config)
    ranks = [TrainLoader(manifest, halves, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(take(single, 6), *(take(rank, 6) for rank in ranks), strict=True):
        together = [image for part in parts for image in (part[0].media.images if _images(part[0]) else ())]
        assert torch.equal(torch.cat([part[0].input_ids for part in parts]), whole[0].input_ids)
        if _images(whole[0]):
            assert torch.equal(torch.stack(together), whole[0].media.images)


def _images(batch):
    return batch.media is not None and batch.media.images is not None


def test_a_batch_moves_with_its_media(prepared):
    config, manifest = prepared
    batch = next(batch for batch in ValidationAndTrain(manifest, config) if _images(batch))
    assert batch.to("meta").media.images.device.type == "meta"


def test_data_prepared_for_other_media_are_refused(prepared):
    config, manifest = prepared
    with pytest.raises(ConfigError, match=r"multimodal\.image_size=20, but the data in .* was prepared with 16"):
        TrainLoader(manifest, override_config(config, ["multimodal.image_size=20"]))
    with pytest.raises(ConfigError, match=r"enable_multimodal=False, but the data in .* was prepared with it"):
        TrainLoader(manifest, override_config(config, ["advanced.enable_multimodal=false"]))


def test_runs_are_found_however_they_are_cut(tmp_path):
    random = np.random.default_rng(0)
    writer, tokens, offset = MediaIndexWriter(tmp_path, 0), [], 0
    for number in range(50):
        gap, length = int(random.integers(0, 5)), int(random.integers(1, 9))
        tokens += [(-1, 0)] * gap + [(number, place) for place in range(length)]
        writer.add(offset + gap, Medium("image" if number % 2 else "audio", number, length))
        offset += gap + length
    writer.close()
    index = MediaIndex(tmp_path)
    for _ in range(200):
        start, stop = sorted(random.integers(0, len(tokens) + 1, 2).tolist())
        row = [(-1, 0)] * (stop - start + 3)
        for run in index.runs(start, stop, 3):
            assert run.kind == ("image" if run.number % 2 else "audio")
            for step in range(run.length):
                row[run.place + step] = (run.number, run.first + step)
        assert row[3:] == tokens[start:stop]
