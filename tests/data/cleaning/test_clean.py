"""Cleaning as a user has it: whole preparations of a small corpus."""

import json

import pytest
from cleaned_texts import ALL_STAGES, content, edit, read

from ultrathink_model.config import make_config
from ultrathink_model.data.cleaning import extract
from ultrathink_model.errors import ConfigError, DataError, DependencyError


def removed(manifest):
    lines = (manifest.path / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["row"], row["part"], row["reason"]) for row in map(json.loads, lines)]


def test_text_is_repaired_normalized_and_masked(prepare, speeches):
    texts = [*speeches[:12], "schÃ¶n &amp; good", "cafe\u0301 open", "write to ann@example.org now"]
    manifest, left = prepare(
        texts,
        "cleaning.repair=true",
        "cleaning.normalization=NFC",
        "cleaning.mask_pii=true",
        "data.validation_every=15",
    )
    assert set(left) == {*speeches[:12], "schön & good", "café open", "write to <EMAIL> now"}
    assert [(part.name, part.documents, part.removed, part.counts) for part in manifest.cleaning] == [
        ("repair", 15, 0, {"changed": 1}),
        ("normalization", 15, 0, {"changed": 1}),
        ("mask_pii", 15, 0, {"masked <EMAIL>": 1}),
    ]


def test_languages_and_quality_filters_remove_with_their_reason(prepare, speeches):
    german = "Dieses Land ist groß, und wir wollen gemeinsam an seiner Zukunft arbeiten, jeden Tag und überall. " * 9
    whole = [text + "." for text in speeches]
    texts = [*whole[:12], german, "too short", "the same line of the text\n" * 60, "{ code }. It ends.\n" + whole[20]]
    manifest, left = prepare(
        texts,
        "cleaning.languages=[en]",
        "cleaning.quality_filters=[gopher_quality, gopher_repetition, c4, fineweb]",
        "data.validation_every=5",
    )
    assert {text.strip() for text in left} == {text.strip() for text in whole[:12]}
    found = {row: (part, reason) for row, part, reason in removed(manifest)}
    assert found[13] == ("languages", "language de")
    assert found[14] == ("gopher_quality", "gopher_short_doc")
    assert found[15] == ("gopher_repetition", "dup_line_frac")
    assert found[16] == ("c4", "curly_bracket")
    names = [part.name for part in manifest.cleaning]
    assert names == ["languages", "gopher_quality", "gopher_repetition", "c4", "fineweb"]
    assert sum(part.removed for part in manifest.cleaning) == len(found) == 16 - len(left)
    assert manifest.sources[0].rows == 16


def test_equal_and_nearly_equal_documents_are_kept_once(prepare, speeches):
    texts = [*speeches, speeches[3], speeches[3], edit(speeches[7], 0.05, 1), edit(speeches[9], 0.05, 2)]
    manifest, left = prepare(texts, "cleaning.exact_dedup=true", "cleaning.minhash_dedup=true")
    assert [(part.name, part.removed) for part in manifest.cleaning] == [("exact_dedup", 2), ("minhash_dedup", 2)]
    assert len(left) == len(speeches)
    assert speeches[3] in left
    assert len({row for row, _, _ in removed(manifest)} & {3 + 1, len(speeches) + 1, len(speeches) + 2}) == 2


def test_longer_shingles_and_bands_ask_for_greater_likeness(prepare, speeches):
    texts = [*speeches[:12], edit(speeches[7], 0.02, 1)]
    for settings, found in (
        ([], 1),
        # Hardly two hundred words in a row are without a change where every fiftieth has one.
        (["cleaning.minhash_ngram=200"], 0),
        # A band of sixty hashes agrees with a probability of 0.83 ** 60.
        (["cleaning.minhash_hashes=60"], 0),
    ):
        manifest, _ = prepare(texts, "cleaning.minhash_dedup=true", "cleaning.minhash_buckets=8", *settings)
        assert [part.removed for part in manifest.cleaning] == [found]


def test_of_equal_documents_the_held_out_one_is_kept(prepare, speeches):
    manifest, _ = prepare([*speeches[:9], speeches[0], *speeches[10:15]], "cleaning.exact_dedup=true")
    assert [row for row, _, _ in removed(manifest)] == [1]
    assert speeches[0] in read(manifest, "validation")


def test_training_documents_that_hold_evaluation_text_are_removed(prepare, speeches, tmp_path, caplog):
    (tmp_path / "exam.jsonl").write_text(
        json.dumps({"question": speeches[2][1000:1400], "answers": ["short", speeches[4][2000:2400]]}) + "\n"
    )
    manifest, left = prepare(
        speeches[:20],
        f"cleaning.decontaminate=['{tmp_path / 'exam.jsonl'}', validation]",
        "cleaning.decontaminate_ngram=20",
    )
    assert "1 of 3 texts" in caplog.text
    assert {(row, reason) for row, _, reason in removed(manifest)} >= {
        (3, "shared with 00_exam.jsonl"),
        (5, "shared with 00_exam.jsonl"),
    }
    assert speeches[2] not in left
    # What is held out stays.
    assert speeches[9] in left


def test_cleaning_that_is_off_changes_nothing_and_each_setting_makes_other_data(prepare, speeches):
    plain, _ = prepare(speeches[:12])
    again, _ = prepare(speeches[:12], "cleaning.minhash_buckets=14", "cleaning.decontaminate_ngram=8")
    assert again.fingerprint == plain.fingerprint
    assert plain.cleaning == []
    masked, _ = prepare(speeches[:12], "cleaning.mask_pii=true")
    assert masked.fingerprint != plain.fingerprint
    assert masked.splits == plain.splits
    assert not (masked.path / "cleaning").exists()


def test_bad_rows_are_counted_before_cleaning(prepare, speeches):
    manifest, left = prepare([*speeches[:20], 7], "cleaning.exact_dedup=true")
    assert (manifest.quarantined, manifest.sources[0].rows, len(left)) == (1, 21, 20)
    assert json.loads((manifest.path / "quarantine.jsonl").read_text())["rule"] == "text is a string"


def test_cleaning_that_leaves_nothing_is_refused_with_the_counts(prepare):
    with pytest.raises(DataError, match=r"cleaning leaves no train document \(removed: gopher_quality 12\)"):
        prepare([f"short {number}" for number in range(12)], "cleaning.quality_filters=[gopher_quality]")


def test_unknown_languages_and_missing_schedulers_are_refused(prepare, speeches):
    with pytest.raises(ConfigError, match=r"names klingon, which cannot be told; take ISO 639-1 codes among .* en "):
        prepare(speeches[:12], "cleaning.languages=[en, klingon]")
    with pytest.raises(ConfigError, match=r"data\.slurm_partition; name the partition"):
        make_config({"data": {"executor": "slurm"}})
    with pytest.raises(DependencyError, match="needs `sbatch`"):
        prepare(speeches[:12], "cleaning.repair=true", "data.executor=slurm", "data.slurm_partition=cpu")


def test_what_comes_out_does_not_depend_on_the_number_of_tasks(prepare, copies, monkeypatch, tmp_path):
    several, left = prepare(copies, *ALL_STAGES)
    monkeypatch.setattr(extract, "TASK_CHARACTERS", 10**9)
    one, left_of_one = prepare(copies, *ALL_STAGES, f"data.cache_dir={tmp_path / 'one'}")
    assert (one.cleaning, len(left_of_one)) == (several.cleaning, len(left))


def test_a_cleaning_that_failed_half_way_goes_on_with_the_tasks_that_are_left(prepare, copies, monkeypatch, tmp_path):
    from ultrathink_model.data.cleaning import clean

    def stop(data, steps, tasks, records, **others):
        ran.append(records.name)
        if records.name == "exact_find" and len(ran) < 4:
            raise KeyboardInterrupt
        return run_tasks(data, steps, tasks, records, **others)

    ran: list[str] = []
    run_tasks = clean.run_tasks
    monkeypatch.setattr(clean, "run_tasks", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(copies, *ALL_STAGES)
    finished = list((tmp_path / "data").glob(".*.part/cleaning/clean/*.jsonl"))
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    assert len(stamps) > 2

    def describe(*arguments):
        assert {path: path.stat().st_mtime_ns for path in finished} == stamps
        return describe_parts(*arguments)

    describe_parts = clean._describe
    monkeypatch.setattr(clean, "_describe", describe)
    cut, _ = prepare(copies, *ALL_STAGES)
    monkeypatch.setattr(clean, "_describe", describe_parts)
    whole, _ = prepare(copies, *ALL_STAGES, f"data.cache_dir={tmp_path / 'whole'}")
    assert content(cut) == content(whole)
