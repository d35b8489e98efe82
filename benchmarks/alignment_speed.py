"""Speed of alignment, as ratios within one run of this file.

    python benchmarks/alignment_speed.py rounds      rollout and update: PPO and GRPO here, GRPO and RLOO of TRL
    python benchmarks/alignment_speed.py harm_head   a training step with the harm head over one without

Without a word: both. TRL has no PPO any more; RLOO and GRPO are its nearest stable trainers. All draw the same number
of responses of the same length to the same prompts from the same weights, have a frozen reference, and pass over the
responses as often, in minibatches of the same size. Compared is the processor's time, which other programs on the machine
do not lengthen.
"""

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ultrathink_model.alignment.align import make_algorithm
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.pairs import PairSplit, TokenPair, corpus_windows
from ultrathink_model.alignment.policy_run import Players, PolicyRun
from ultrathink_model.alignment.rewards import Part, Rewards
from ultrathink_model.config import Config, load_config, override_config
from ultrathink_model.data import DataManifest, TrainLoader, prepare_data
from ultrathink_model.data.safety import with_safety_rows
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model
from ultrathink_model.training.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
ALONE = RankContext(0, 0, 1, torch.device("cpu"))
MINIBATCHES, EPOCHS, GROUP, TOKENS = 2, 2, 8, 32
STEPS_PER_ROUND = MINIBATCHES * EPOCHS


class Evenness:
    """A reward that costs nothing: the share of tokens with an even number."""

    def score(self, sequences: Any) -> torch.Tensor:
        """One number for each response."""
        return (sequences.responses % 2 == 0).float().mean(1)


def benchmark_rounds(arguments: argparse.Namespace) -> None:
    """Response tokens a second of whole rounds."""
    overrides = [
        f"rlhf.ppo_batch_size={arguments.responses}",
        f"rlhf.ppo_minibatch_size={arguments.responses // MINIBATCHES}",
        f"rlhf.ppo_epochs={EPOCHS}",
        f"rlhf.group_size={GROUP}",
        f"rlhf.response_tokens={TOKENS}",
        "rlhf.ptx_weight=0",
        "rlhf.target_kl=1000",
        "rlhf.policy_learning_rate=1e-6",
    ]
    config = override_config(tiny(arguments), overrides)
    manifest = prepare_data(config)
    # No response ends early: all have the same number of tokens.
    endless = manifest.model_copy(update={"eos_id": config.model.vocab_size + 1})
    windows = [window[:32] for window, _ in zip(corpus_windows(config, manifest), range(512), strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        save_model(build_model(config), manifest.tokenizer_folder, Path(folder))
        texts = [Tokenizer.load(manifest.tokenizer_folder).decode(window) for window in windows]
        for own, peer in (("ppo", "rloo"), ("grpo", "grpo"))[: 1 if arguments.pairs == "ppo" else 2]:
            chosen = override_config(config, [f"rlhf.algorithm={own}"])
            tokens = arguments.responses * TOKENS
            ours = tokens / statistics.median(own_rounds(chosen, endless, windows, arguments.rounds))
            theirs = tokens / statistics.median(peer_rounds(peer, Path(folder), texts, arguments))
            print(
                f"{own} here {ours:,.0f} response tokens a second of the processor, {peer} of TRL {theirs:,.0f}: {ours / theirs:.2f}",
                flush=True,
            )


def own_rounds(config: Config, manifest: DataManifest, windows: list[list[int]], rounds: int) -> list[float]:
    """Seconds of each round but the first."""
    policy = build_model(config).eval()
    pairs = [TokenPair(window, [1], [2]) for window in windows]
    players = Players(
        copy.deepcopy(policy).requires_grad_(False),
        Rewards([Part("evenness", 1.0, Evenness())], is_single=True),
        PairSplit(pairs, pairs[:1]),
    )
    algorithm, head = make_algorithm(config, ALONE, players, manifest)
    learner = Learner(config, ALONE, policy, head, config.rlhf.policy_learning_rate or 0.0, 1e-3)
    run = PolicyRun(config, ALONE, manifest, learner, algorithm, players, 0)
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        rollout, measure = run.draw()
        assert rollout.sequences.response_mask.all()
        update = run.learn(rollout, measure)
        assert update.steps == STEPS_PER_ROUND
        times.append(time.process_time() - began)
    return times[1:]


def peer_rounds(algorithm: str, folder: Path, texts: list[str], arguments: argparse.Namespace) -> list[float]:
    """Seconds of each of TRL's rounds but the first."""
    from datasets import Dataset  # noqa: PLC0415 - seconds
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: PLC0415

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step % STEPS_PER_ROUND == 0:
                times.append(time.process_time())

    config_class, trainer_class = (GRPOConfig, GRPOTrainer) if algorithm == "grpo" else (RLOOConfig, RLOOTrainer)
    settings = config_class(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=arguments.responses // MINIBATCHES,
        steps_per_generation=MINIBATCHES,
        num_generations=GROUP,
        num_iterations=EPOCHS,
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        temperature=1.0,
        beta=0.05,
        learning_rate=1e-6,
        max_steps=(arguments.rounds + 2) * STEPS_PER_ROUND,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        reward_funcs=even,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        callbacks=[Clock()],
    )
    trainer.train()
    return [later - earlier for earlier, later in itertools.pairwise(times[1:])]


def benchmark_harm_head(arguments: argparse.Namespace) -> None:
    """Seconds of training steps with the head over those without, step by step in turn."""
    base = tiny(arguments)
    manifest = prepare_data(base)
    steps = {
        switch: training_step(override_config(base, [f"advanced.enable_constitutional={switch}"]), manifest)
        for switch in ("false", "true")
    }
    seconds: dict[str, list[float]] = {switch: [] for switch in steps}
    for number in range(arguments.steps + 3):
        for switch, step in steps.items():
            began = time.process_time()
            step()
            if number >= 3:
                seconds[switch].append(time.process_time() - began)
    # Sums, and not medians: only some steps have labelled rows.
    ratio = sum(seconds["true"]) / sum(seconds["false"])
    print(f"a training step with the harm head over one without, {arguments.steps} of each: {ratio:.3f}")


def training_step(config: Config, manifest: DataManifest) -> Callable[[], None]:
    """Forward, backward and optimizer step on the next batch."""
    model = build_model(config).train()
    optimizer = make_optimizer(config.training, model)
    batches = with_safety_rows(iter(TrainLoader(manifest, config)), manifest, config, 0, 1, 0)

    def step() -> None:
        for batch in next(batches):
            output = model(
                batch.input_ids,
                labels=batch.labels,
                document_ids=batch.document_ids,
                harm_labels=batch.harm_labels,
            )
            (sum(output.aux_losses.values(), output.loss_sum) / batch.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tiny(arguments: argparse.Namespace) -> Config:
    return load_config(ROOT / "configs/train_tiny.yaml", [f"data.cache_dir={arguments.data}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"rounds": benchmark_rounds, "harm_head": benchmark_harm_head}
    parser.add_argument("task", nargs="?", choices=tasks)
    parser.add_argument("--data", default="./outputs/data")
    parser.add_argument("--responses", type=int, default=64, help="of a round")
    parser.add_argument("--pairs", choices=("all", "ppo"), default="all", help="ppo: leave GRPO's pair out")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each algorithm that are timed")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    for task in [arguments.task] if arguments.task else tasks:
        tasks[task](arguments)


if __name__ == "__main__":
    main()
