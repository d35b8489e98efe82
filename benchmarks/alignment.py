"""Alignment on real data: a reward model on people's scores, and PPO on a sentiment classifier.

    pip install --no-deps --target PACKAGES pyrit==1.1.0 vaderSentiment==3.3.2
    python benchmarks/alignment.py pairs --packages PACKAGES --model RUN/final_model --fold 0
    python benchmarks/alignment.py sentiment --packages PACKAGES --model RUN/final_model --seed 1

Both begin with a model that `train_advanced.py --config configs/train_tiny.yaml` has made. PyRIT's answers (MIT) hold
offensive text and are not printed.
"""

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.objectives import calibration_error
from ultrathink_model.alignment.pairs import PairSplit, tokenize_pairs
from ultrathink_model.alignment.reward import RewardModel
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.alignment.sequences import make_sequences
from ultrathink_model.command_line import log_to_terminal
from ultrathink_model.config import Config, load_config, override_config
from ultrathink_model.data.preferences import PreferencePair
from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.data.scored_answers import pairs_of_scores, read_scored_answers
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.models.hf import load_model
from ultrathink_model.tracking.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
FOLDS = 4
ALONE = RankContext(0, 0, 1, torch.device("cpu"))


def rank_pairs(arguments: argparse.Namespace, config: Config) -> None:
    """Share of held-out pairs ranked right, each prompt counting alike: length, TF-IDF, and the reward model."""
    files = sorted((arguments.packages / "pyrit/datasets/scorer_evals/harm").glob("*.csv"))
    answers = read_scored_answers(files, "objective", "assistant_response", "human_score")
    pairs = pairs_of_scores(answers, lower_is_better=True)
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(0).shuffle(prompts)
    held = set(prompts[arguments.fold :: FOLDS])
    print(f"fold {arguments.fold}: ", end="")
    train = [pair for pair in pairs if pair.prompt not in held]
    held_out = [pair for pair in pairs if pair.prompt in held]
    print(f"{len(answers)} answers; {len(train)} pairs to learn from, {len(held_out)} of {len(held)} prompts held out")
    weights = torch.tensor(prompt_weights(held_out))
    scores = {
        "the shorter answer": torch.tensor([float(len(p.rejected) - len(p.chosen)) for p in held_out]),
        "TF-IDF and logistic regression": tf_idf(train, held_out),
    }
    for name, gaps in scores.items():
        print(
            f"{name}: {share_right(gaps, weights):.1%} by prompt, {share_right(gaps, torch.ones(len(gaps))):.1%} by pair"
        )
    overrides = [
        f"rlhf.prompt_tokens={arguments.prompt_tokens}",
        f"rlhf.response_tokens={arguments.response_tokens}",
        f"rlhf.reward_epochs={arguments.epochs}",
        f"rlhf.reward_learning_rate={arguments.learning_rate}",
        "rlhf.reward_weighting=prompt",
        f"rlhf.reward_batch_size={arguments.batch_size}",
    ]
    config = override_config(config, overrides)
    tokenizer = Tokenizer.load(arguments.model)
    split = PairSplit(
        tokenize_pairs(train, tokenizer, config),
        tokenize_pairs(held_out, tokenizer, config),
    )
    trainer = RewardTrainer(config, load_model(arguments.model).eval(), tokenizer.pad_id, ALONE)
    model = trainer.fit(split, lambda step, steps, loss: print(f"step {step}/{steps}, loss {loss:.3f}", flush=True))
    gaps = score_gaps(model, held_out, tokenizer, config)
    print(
        f"reward model on {len(split.train)} pairs: {share_right(gaps, weights):.1%} by prompt, "
        f"{share_right(gaps, torch.ones(len(gaps))):.1%} by pair, loss {float(-F.logsigmoid(gaps).mean()):.3f}, "
        f"calibration error {calibration_error(gaps):.3f}"
    )


def score_gaps(model: RewardModel, pairs: list[PreferencePair], tokenizer: Tokenizer, config: Config) -> torch.Tensor:
    """Score of the chosen side less that of the rejected one; each answer is scored once."""
    sides = sorted({(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)})
    scores = {}
    for start in range(0, len(sides), 32):
        part = sides[start : start + 32]
        prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)][-config.rlhf.prompt_tokens :] for prompt, _ in part]
        answers = [[*tokenizer.encode(text), tokenizer.eos_id][: config.rlhf.response_tokens] for _, text in part]
        found = model.score(make_sequences(prompts, answers, tokenizer.pad_id, "cpu")) * model.record.spread
        scores |= dict(zip(part, found, strict=True))
    return torch.stack([scores[pair.prompt, pair.chosen] - scores[pair.prompt, pair.rejected] for pair in pairs])


def prompt_weights(pairs: list[PreferencePair]) -> list[float]:
    counts: dict[str, int] = defaultdict(int)
    for pair in pairs:
        counts[pair.prompt] += 1
    return [1 / counts[pair.prompt] for pair in pairs]


def share_right(gaps: torch.Tensor, weights: torch.Tensor) -> float:
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return float((right * weights).sum() / weights.sum())


def tf_idf(train: list[PreferencePair], held_out: list[PreferencePair]) -> torch.Tensor:
    """Gaps of a linear model of word pairs, each prompt counting alike."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([side for pair in train for side in (pair.chosen, pair.rejected)])

    def differences(pairs: list[PreferencePair]) -> sparse.csr_matrix:
        chosen, rejected = ([getattr(p, side) for p in pairs] for side in ("chosen", "rejected"))
        return vectorizer.transform(chosen) - vectorizer.transform(rejected)

    rows, weights = differences(train), prompt_weights(train)
    model = LogisticRegression(C=100, fit_intercept=False, max_iter=2000)
    model.fit(sparse.vstack([rows, -rows]), [1] * len(train) + [0] * len(train), sample_weight=weights * 2)
    return torch.tensor(model.decision_function(differences(held_out)))


def raise_sentiment(arguments: argparse.Namespace, config: Config) -> None:
    """PPO on VADER's compound score (-1 to 1) of a response: start, end, KL and samples."""
    overrides = [
        "advanced.enable_rlhf=true",
        f"training.seed={arguments.seed}",
        f"output.output_dir={arguments.output}/sentiment_{arguments.seed}",
        "training.resume=never",
        "rlhf.rewards=[{name: sentiment, kind: callable, source: 'sentiment:compound', weight: 2.0}]",
        "rlhf.num_pairs=160",
        "rlhf.rlhf_iterations=14",
        "rlhf.response_tokens=24",
        "evaluation.num_generations=6",
        *arguments.override,
    ]
    config = override_config(config, overrides)
    manifest = prepare_data(config)
    result = align(config, manifest=manifest, run_name=f"sentiment_{arguments.seed}", init_from=arguments.model)
    folder = Path(result.output_dir)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "rlhf/reward/sentiment" in row]
    for row in rows[::3]:
        print(f"round {row['step']}: sentiment {row['rlhf/reward/sentiment']:+.3f}, KL {row['rlhf/kl']:.2f}")
    first, last = rows[0], rows[-1]
    print(
        f"seed {arguments.seed}: sentiment {first['rlhf/reward/sentiment']:+.3f} → {last['rlhf/reward/sentiment']:+.3f} "
        f"in {len(rows)} rounds; standard deviation at the start {first['rlhf/reward_spread'] / 2:.3f} ; "
        f"KL of the kept policy {result.metrics['rlhf/kl']:.2f} nats per response"
    )
    print((folder / "samples.json").read_text(encoding="utf-8"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("pairs", "sentiment"))
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", default="./outputs/benchmark")
    parser.add_argument("--data", default="./outputs/data")
    parser.add_argument("--fold", type=int, choices=range(FOLDS), default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="folds or seeds, one after the other")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=192)
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.task is None or arguments.packages is None or arguments.model is None:
        print(__doc__)
        return
    sys.path.insert(0, str(arguments.packages))
    log_to_terminal("INFO")
    config = load_config(
        ROOT / "configs/train_tiny.yaml", [f"data.cache_dir={arguments.data}", "logging.use_mlflow=false"]
    )
    key, task, repeats = ("fold", rank_pairs, 2) if arguments.task == "pairs" else ("seed", raise_sentiment, 3)
    first = getattr(arguments, key)
    for number in range(first, first + (arguments.repeats or repeats)):
        setattr(arguments, key, number)
        task(arguments, config)


if __name__ == "__main__":
    main()
