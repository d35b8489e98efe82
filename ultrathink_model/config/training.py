"""The sections that say how a run trains, where it runs and what it leaves behind."""

from typing import Literal

from pydantic import Field

from ultrathink_model.config.section import Section


class TrainingConfig(Section):
    """The training loop. Batch sizes are in sequences, lengths of work in optimizer steps."""

    batch_size: int = Field(8, ge=1, description="Sequences per device and micro-step.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-steps in one optimizer step.")
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences per optimizer step over all ranks; accumulation follows from it. Null: the product of the parts.",
    )
    num_epochs: int = Field(1, ge=1, description="Passes over the training data.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps after which the run stops; null sets no bound."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Training tokens after which the run stops; null sets no bound."
    )
    max_seconds: float | None = Field(
        None, gt=0, description="Seconds of training after which the run saves and finishes; null sets no bound."
    )
    learning_rate: float = Field(
        3e-4, gt=0, description="Peak learning rate (AdamW's; Muon's is `muon_learning_rate`)."
    )
    muon_learning_rate: float = Field(
        0.02, gt=0, description="Peak learning rate of the matrices under `optimizer: muon`."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="`adamw` for all weights, or `muon` for matrices with AdamW for the rest."
    )
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay of matrices; vectors have none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's term against division by zero.")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum.")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="Shape of the learning rate after warm-up; `wsd` holds it, then falls over `decay_fraction`.",
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps over which the learning rate rises from zero.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="Share of the run over which `wsd` decays.")
    gradient_clipping: float | None = Field(
        1.0, gt=0, description="Greatest norm of the whole gradient; null clips nothing."
    )
    use_amp: bool = Field(False, description="Mixed precision: matrix products in `amp_dtype`, weights in fp32.")
    amp_dtype: Literal["bf16", "fp16"] = Field(
        "bf16", description="Number format under `use_amp`; fp16 adds a loss scaler."
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    native_kernels: bool = Field(
        True,
        description="On a CPU with a C++ compiler, in float32: operators of our own for blocks and the loss, compiled "
        "once, in seconds, and kept in the user's cache.",
    )
    loss_chunk_size: int = Field(2048, ge=1, description="Tokens whose logits are held at once in the cross-entropy.")
    z_loss_weight: float = Field(0.0, ge=0, description="Weight of the squared log-partition of the output logits.")
    seed: int = Field(42, ge=0, description="Seed of the weights, the order of the data and every draw.")
    deterministic: bool = Field(False, description="Ask for bitwise repeatable kernels, at some cost in speed.")
    resume: str = Field(
        "auto",
        description="`auto` goes on from the folder's newest valid checkpoint, `never` starts anew, a path goes on from it.",
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between checkpoints; null saves at the ends of epochs and of the run."
    )
    async_checkpoints: bool = Field(
        True, description="Write checkpoints beside training, from a copy of the state in host memory."
    )
    on_save_failure: Literal["stop", "continue"] = Field(
        "stop",
        description="When a checkpoint cannot be written (a full disk): `stop` the run, or warn and `continue` it.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that are kept.")
    keep_best: int = Field(0, ge=0, description="Checkpoints lowest in `best_metric` that are kept beside the newest.")
    best_metric: Literal["val/loss", "train/loss"] = Field(
        "val/loss", description="Figure of `keep_best`; checkpoints at steps that did not measure it do not count."
    )
    keep_every: int | None = Field(
        None, ge=1, description="Checkpoints at multiples of this many steps are kept for good; null keeps none so."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the moving average of the weights that evaluation and `final_model/` take; null takes the weights.",
    )
    first_seq_length: int | None = Field(
        None,
        ge=8,
        description="Sequence length of the first steps, which doubles up to `model.max_seq_length`; null takes that from the start.",
    )
    seq_length_steps: int = Field(
        0, ge=0, description="Optimizer steps over which `first_seq_length` grows to `model.max_seq_length`."
    )
    max_bad_steps: int = Field(
        10,
        ge=0,
        description="Bad steps in a row (loss or gradient not finite, or a spike) that are skipped before the run goes back to its last good checkpoint and passes over the batches since.",
    )
    max_rollbacks: int = Field(
        3,
        ge=0,
        description="Times that a run goes back to a checkpoint before it stops; without a checkpoint it stops.",
    )
    spike_deviations: float | None = Field(
        None,
        gt=0,
        description="A loss this many robust deviations above the median of the last 64 makes a bad step (6 is usual); null looks for none.",
    )
    gc_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between collections of Python's garbage, at the same step on all ranks; null leaves it to Python.",
    )


class DistributedConfig(Section):
    """How many processes train together, and how they share the work."""

    enabled: bool = Field(False, description="Train over several ranks.")
    launcher: Literal["torchrun", "deepspeed"] = Field(
        "torchrun", description="What starts the ranks when the command itself was started as one process."
    )
    num_processes: int | None = Field(
        None, ge=1, description="Ranks to start on this machine; null takes one per GPU, or two on a CPU."
    )
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"] | None = Field(
        None,
        description="How ranks share the work; null takes `deepspeed` under its launcher, `ddp` over ranks, else `single`.",
    )
    zero_stage: Literal[1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage, where no `deepspeed_config` names one.")
    deepspeed_config: str | None = Field(
        None, description="DeepSpeed JSON file; `auto` values are filled from this config."
    )
    cpu_offload: bool = Field(
        False, description="Keep optimizer state (ZeRO) or sharded weights (FSDP) in host memory."
    )
    expert_parallel_size: int = Field(
        1,
        ge=1,
        description="Ranks over which the experts of each mixture are cut (mesh axis `ep`), under `ddp` or `fsdp`; 1 gives every rank all experts.",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        description="Ranks over which the matrices of attention and feed-forward are cut (mesh axis `tp`), under `ddp` or `fsdp`. They see the same data, so that `training.batch_size` counts once for all of them. 1 gives every rank whole matrices.",
    )
    timeout_seconds: float = Field(
        600, gt=0, description="Seconds that a collective waits for a lost rank before the run ends."
    )
    hang_seconds: float | None = Field(
        40,
        gt=0,
        description="Seconds within a step after which a rank that does not move ends the run, with its number and its stack; at least ten times the slowest part of a step so far. Null leaves it to `timeout_seconds`.",
    )


class LoggingConfig(Section):
    """Where metrics and messages go."""

    use_mlflow: bool = Field(True, description="Track the run in MLflow as well as in `metrics.jsonl`.")
    mlflow_tracking_uri: str = Field("sqlite:///mlflow.db", description="MLflow's store.")
    mlflow_artifact_dir: str = Field("mlartifacts", description="Folder of MLflow's artifacts, for a database store.")
    experiment_name: str = Field("ultrathink", min_length=1, description="MLflow experiment.")
    log_steps: int = Field(10, ge=1, description="Optimizer steps between logged lines.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")
    system_metrics: bool = Field(True, description="Log processor, memory and GPU use to MLflow.")
    profile_steps: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="First and last step that torch.profiler records on each rank into `profile/`; null profiles none.",
    )


class OutputConfig(Section):
    """Where the run writes."""

    output_dir: str = Field("./outputs/custom_model", min_length=1, description="The run's folder.")
    remote_dir: str | None = Field(
        None,
        min_length=1,
        description="Where the run's folder is kept as well, while it runs: s3://…, gs://… or a folder. A start on a "
        "machine that lacks the folder, or holds an older one, goes on from there.",
    )
