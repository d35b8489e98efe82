"""The hub datasets that are known by a short name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownDataset:
    """What there is to know of a hub dataset before it is read.

    `article_heading` is for datasets whose rows are lines: a regular expression of the line that opens a new article,
    so that the article, and not the line, becomes the document. `revision` names the hub's own Parquet copy of a
    dataset that was published as a script, which `datasets` no longer runs.
    """

    hub_id: str
    licence: str
    subset: str | None = None
    text_column: str = "text"
    revision: str | None = None
    article_heading: str | None = None


PARQUET_COPY = "refs/convert/parquet"
WIKITEXT_HEADING = r" = [^=].* = \n?$"
WIKITEXT_LICENCE = "CC-BY-SA-3.0 and GFDL"

KNOWN_DATASETS = {
    "wikitext": KnownDataset(
        "Salesforce/wikitext", WIKITEXT_LICENCE, "wikitext-2-raw-v1", article_heading=WIKITEXT_HEADING
    ),
    "wikitext-103": KnownDataset(
        "Salesforce/wikitext", WIKITEXT_LICENCE, "wikitext-103-raw-v1", article_heading=WIKITEXT_HEADING
    ),
    "openwebtext": KnownDataset("Skylion007/openwebtext", "CC0-1.0 (packaging only)"),
    "slim-pajama": KnownDataset("cerebras/SlimPajama-627B", "Apache-2.0 (packaging; parts under their own)"),
    "pile": KnownDataset("monology/pile-uncopyrighted", "other (parts under their own)"),
    "c4": KnownDataset("allenai/c4", "ODC-BY-1.0", "en"),
    "bookcorpus": KnownDataset("bookcorpus/bookcorpus", "unknown", "plain_text", revision=PARQUET_COPY),
    "oscar": KnownDataset(
        "oscar-corpus/oscar", "CC0-1.0 (packaging only)", "unshuffled_deduplicated_en", revision=PARQUET_COPY
    ),
    "wikipedia": KnownDataset("wikimedia/wikipedia", "CC-BY-SA-3.0 and GFDL", "20231101.en"),
}
