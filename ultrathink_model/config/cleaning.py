"""The section `cleaning`: what is mended, masked and removed before the text is tokenized."""

from typing import Literal

from pydantic import Field

from ultrathink_model.config.section import Section

QualityFilter = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"]


class CleaningConfig(Section):
    """Cleaning of the documents, in this order; everything is off by default, and text is taken as it is."""

    repair: bool = Field(
        False,
        description="Mend text that was decoded wrongly (mojibake), HTML entities and control characters, by ftfy.",
    )
    normalization: Literal["NFC", "NFKC"] | None = Field(
        None, description="Unicode normal form of the text; NFKC also folds ligatures, widths and superscripts."
    )
    languages: list[str] = Field(
        [], description="ISO 639-1 codes of the languages that are kept, as in [en, de]; an empty list keeps all."
    )
    quality_filters: list[QualityFilter] = Field(
        [],
        description=(
            "Published filters, in this order. All count words; the stop words of `gopher_quality` are English, and "
            "count only where no other language is kept."
        ),
    )
    mask_pii: bool = Field(
        False,
        description=(
            "Put <EMAIL>, <PHONE>, <IP>, <CARD> and <ID> in place of mail addresses, phone numbers, IP addresses, "
            "payment cards and identity or account numbers, whose checksums must hold."
        ),
    )
    decontaminate: list[str] = Field(
        [],
        description=(
            "Evaluation sets (files, folders, globs; `validation` is the held-out split): training documents that share "
            "an n-gram with one are removed."
        ),
    )
    decontaminate_ngram: int = Field(13, ge=3, description="Words of a shared n-gram.")
    exact_dedup: bool = Field(False, description="Keep one of documents that are equal.")
    minhash_dedup: bool = Field(False, description="Keep one of documents that are nearly equal, found by MinHash.")
    minhash_ngram: int = Field(5, ge=1, description="Words of a shingle.")
    minhash_buckets: int = Field(
        28,
        ge=1,
        description="Bands of the MinHash; documents that agree in one of them are near-duplicates. More find more.",
    )
    minhash_hashes: int = Field(
        4,
        ge=1,
        description=(
            "Hashes of a band; more ask for greater likeness. Shingles shared by half of the documents' union are found "
            "with a probability of 84 % by 28 bands of 4."
        ),
    )

    @property
    def enabled(self) -> bool:
        """Whether any part is on."""
        parts = (self.repair, self.normalization, self.languages, self.quality_filters, self.mask_pii)
        return any((*parts, self.decontaminate, self.exact_dedup, self.minhash_dedup))
