"""The section `data`: what the model learns from."""

from typing import Literal

from pydantic import Field

from ultrathink_model.config.section import Section

Packing = Literal["stream", "best_fit"]
ExpertGroup = Literal["knowledge", "skill", "meta", "safety"]


class DataSource(Section):
    """One source of a mixture."""

    dataset: str = Field(min_length=1, description="A name as in `data.dataset`.")
    weight: float = Field(gt=0, description="Share of the training sequences, relative to the other weights.")
    cap: int | None = Field(
        None, ge=1, description="Most training tokens of the source that are used, a random part of it; null uses all."
    )
    expert_group: ExpertGroup | None = Field(None, description="Expert group that the source's tokens are drawn to.")


class DataConfig(Section):
    """Sources, tokenizer and loader."""

    dataset: str = Field(
        "sotu",
        min_length=1,
        description="`sotu` or `digits` (built in; `digits` has images and sound), `dummy`, a local file, folder or glob (text, Markdown, JSONL, CSV, Parquet; also .gz and .zst), a known name such as `wikitext`, or a hub id.",
    )
    dataset_config: str | None = Field(None, description="Subset of a hub dataset; null takes the known name's own.")
    text_column: str | None = Field(
        None, description="Column that holds the text; null takes the source's own, or `text`."
    )
    mix_datasets: str | list[DataSource] | None = Field(
        None, description='Several sources by weight, "wikitext:0.3,openwebtext:0.7" or a list; it replaces `dataset`.'
    )
    tokenizer_name: str = Field(
        "cl100k_base",
        min_length=1,
        description="`cl100k_base`, `gpt2`, a `tokenizer.json` or Hugging Face folder, or `train` (byte-level BPE of `model.vocab_size` on the training split).",
    )
    packing: Packing = Field(
        "stream",
        description=(
            "`stream` cuts the joined documents every `model.max_seq_length` tokens, without padding; `best_fit` cuts only "
            "longer documents and pads what no piece fits into. Neither lets a token see another document."
        ),
    )
    validation_every: int = Field(
        10, ge=2, description="Every n-th document is held out for validation where the source has no validation split."
    )
    train_samples: int | None = Field(
        None, ge=1, description="Training sequences (of `model.max_seq_length` tokens) in one epoch; null uses all."
    )
    mirror_dir: str | None = Field(
        None,
        description="Folder of local copies of hub datasets, each under its short name or hub id, read in place of the hub.",
    )
    streaming: bool = Field(
        False,
        description="Read hub datasets as a stream, as far as `train_samples` needs, instead of downloading them whole.",
    )
    executor: Literal["local", "ray", "slurm"] = Field(
        "local",
        description="Where cleaning runs: processes here, a Ray cluster (RAY_ADDRESS, or one made here), or Slurm jobs.",
    )
    executor_workers: int | None = Field(
        None, ge=1, description="Processes or jobs that clean at once; null takes the number of processors here."
    )
    slurm_partition: str | None = Field(None, description="Partition of the jobs of `executor: slurm`.")
    slurm_time: str = Field("04:00:00", min_length=1, description="Time limit of the jobs of `executor: slurm`.")
    allow_changed: bool = Field(
        False, description="Let a run go on from a checkpoint of other data; otherwise it is refused."
    )
    num_workers: int = Field(0, ge=0, description="Loader processes per rank; 0 loads in the training process.")
    cache_dir: str = Field("./outputs/data", min_length=1, description="Folder of the prepared token shards.")
    max_quarantine_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of rows that may be quarantined before preparation fails."
    )
