"""The pipelines of cleaning, from the section `cleaning` to datatrove's steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontConfig
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)

from ultrathink_model.config.cleaning import CleaningConfig
from ultrathink_model.data.cleaning.steps import (
    Decontaminate,
    KeepLanguages,
    MaskPii,
    Normalize,
    ReadDocuments,
    RemovedLog,
    Repair,
    WriteDocuments,
)
from ultrathink_model.data.cleaning.words import WORDS


@dataclass(frozen=True)
class Stage:
    """A pipeline and the tasks that it is run in; None stands for one task for each file of documents."""

    name: str
    steps: list[PipelineStep]
    tasks: int | None = None
    light: bool = False
    """Whether several tasks may share one job, since starting a job takes longer than they do."""


@dataclass(frozen=True)
class Plan:
    """The stages in order, the folder that the last one writes to, and the parts that change or remove documents."""

    stages: list[Stage]
    result: Path
    parts: dict[str, str]
    """The name of each part by the name that datatrove counts it under."""


def plan_stages(cleaning: CleaningConfig, work: Path) -> Plan:
    """The stages that clean `work/documents`; each stage reads what the one before it wrote.

    Args:
        cleaning: What to do.
        work: Folder of the documents, the evaluation sets' n-grams and all results.
    """
    source = work / "documents"
    stages: list[Stage] = []
    parts: dict[str, str] = {}
    single = _single_steps(cleaning, work)
    if single:
        parts |= {step.name: part for part, step in single}
        stages.append(
            Stage("clean", [ReadDocuments(source), *(step for _, step in single), WriteDocuments(work / "clean")])
        )
        source = work / "clean"
    if cleaning.exact_dedup:
        stages += _exact_stages(source, work)
        parts[ExactDedupFilter.name] = "exact_dedup"
        source = work / "unique"
    if cleaning.minhash_dedup:
        stages += _minhash_stages(cleaning, source, work)
        parts[MinhashDedupFilter.name] = "minhash_dedup"
        source = work / "deduplicated"
    return Plan(stages, source, parts)


def _single_steps(cleaning: CleaningConfig, work: Path) -> list[tuple[str, PipelineStep]]:
    """The steps that look at one document at a time, in their order, each with the part that it is."""
    removed = work / "removed"
    steps: list[tuple[str, PipelineStep]] = []
    if cleaning.repair:
        steps.append(("repair", Repair()))
    if cleaning.normalization:
        steps.append(("normalization", Normalize(cleaning.normalization)))
    if cleaning.languages:
        steps.append(("languages", KeepLanguages(cleaning.languages, RemovedLog(removed, "languages"))))
    steps += [(name, _QUALITY[name](cleaning, RemovedLog(removed, name))) for name in cleaning.quality_filters]
    if cleaning.mask_pii:
        steps.append(("mask_pii", MaskPii()))
    if cleaning.decontaminate:
        config = NGramsDecontConfig(n_grams=cleaning.decontaminate_ngram)
        log = RemovedLog(removed, "decontaminate")
        step = Decontaminate(str(work / "ngrams"), config, exclusion_writer=cast("None", log), language=WORDS)
        steps.append(("decontaminate", step))
    return steps


def _gopher_quality(cleaning: CleaningConfig, log: RemovedLog) -> PipelineStep:
    english = set(cleaning.languages) <= {"en"}
    return GopherQualityFilter(min_stop_words=2 if english else None, exclusion_writer=log, language=WORDS)


_QUALITY: dict[str, Callable[[CleaningConfig, RemovedLog], PipelineStep]] = {
    "gopher_quality": _gopher_quality,
    "gopher_repetition": lambda _, log: GopherRepetitionFilter(exclusion_writer=log, language=WORDS),
    "c4": lambda _, log: C4QualityFilter(exclusion_writer=log, language=WORDS),
    "fineweb": lambda _, log: FineWebQualityFilter(exclusion_writer=log, language=WORDS),
}


def whole_text(document: Document) -> str:
    """What equal documents have in common."""
    return document.text


def held_out_first(document: Document) -> int:
    """Of equal documents the held-out one is kept, so that no training document repeats it."""
    return 2 if document.metadata["split"] == "validation" else 1


def _exact_stages(source: Path, work: Path) -> list[Stage]:
    config = ExactDedupConfig(whole_text, held_out_first)
    signatures, found = str(work / "exact_signatures"), str(work / "exact_found")
    log = RemovedLog(work / "removed", "exact_dedup")
    return [
        Stage("exact_signatures", [ReadDocuments(source), ExactDedupSignature(signatures, config)]),
        Stage("exact_find", [ExactFindDedups(signatures, found, config)], tasks=1),
        Stage(
            "exact_dedup",
            [ReadDocuments(source), ExactDedupFilter(found, config, log), WriteDocuments(work / "unique")],
        ),
    ]


def _minhash_stages(cleaning: CleaningConfig, source: Path, work: Path) -> list[Stage]:
    config = MinhashConfig(
        n_grams=cleaning.minhash_ngram,
        num_buckets=cleaning.minhash_buckets,
        hashes_per_bucket=cleaning.minhash_hashes,
    )
    signatures, pairs, clusters = (str(work / f"minhash_{name}") for name in ("signatures", "pairs", "clusters"))
    log = RemovedLog(work / "removed", "minhash_dedup")
    return [
        Stage("minhash_signatures", [ReadDocuments(source), MinhashDedupSignature(signatures, config, WORDS)]),
        Stage(
            "minhash_pairs",
            [MinhashDedupBuckets(signatures, pairs, config=config)],
            tasks=cleaning.minhash_buckets,
            light=True,
        ),
        Stage("minhash_clusters", [MinhashDedupCluster(pairs, clusters, config)], tasks=1),
        Stage(
            "minhash_dedup",
            [ReadDocuments(source), MinhashDedupFilter(clusters, log), WriteDocuments(work / "deduplicated")],
        ),
    ]
