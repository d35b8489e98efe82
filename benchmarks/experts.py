"""Whether experts share the work on real text, and whether groups of them take to their sources.

    python benchmarks/experts.py balance         # 300 steps from scratch, and 300 after upcycling a dense model
    python benchmarks/experts.py groups          # two tagged sources, with and without the group loss
    python benchmarks/experts.py --size micro    # both, with a model of half the width on half the context

Loads are the last step's, in units of an expert's fair share; the router's entropy is in units of a uniform choice's.
The two sources are speeches before 1870 and after 1950, tagged to the groups knowledge and skill, half of the training
sequences each. Runs are kept in outputs/benchmarks: a cut benchmark goes on where it was.
"""

import argparse
import json
import lzma
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from small_runs import FOLDER, SIZES, folder_of, trained

from ultrathink_model.data.sotu import CORPUS_FILE
from ultrathink_model.training.result import StageResult

MIXTURE = "advanced.enable_moe=true"
ERAS: dict[str, tuple[str, Callable[[int], bool]]] = {
    "early": ("knowledge", lambda year: year < 1870),
    "late": ("skill", lambda year: year > 1950),
}


def describe(name: str, result: StageResult) -> None:
    """Prints the least and the most loaded expert of each layer, the entropy and the loss."""
    load = json.loads(folder_of(name).routing_file.read_bytes())["moe/load"]
    shares = [[share * len(row) for share in row] for row in load]
    layers = ", ".join(f"{min(row):.2f} to {max(row):.2f}" for row in shares)
    entropy = result.metrics["train/moe/entropy"]
    print(f"{name}: loads {layers} times fair, entropy {entropy:.3f}, val/loss {result.metrics['val/loss']:.4f}")


def balance(size: str, steps: int, overrides: list[str]) -> None:
    """Trains a mixture from scratch and one from a dense model, and prints how their experts are loaded."""
    settings = [*SIZES[size], MIXTURE, f"training.max_steps={steps}", "training.seed=1", *overrides]
    scratch = f"experts_scratch_{size}_{_tag(overrides)}{steps}"
    describe(scratch, trained(scratch, *settings)[0])
    dense = trained(f"dense_{size}_150_1", *SIZES[size], "training.max_steps=150", "training.seed=1")[0]
    upcycled = f"experts_upcycled_{size}_{_tag(overrides)}{steps}"
    describe(upcycled, trained(upcycled, *settings, init_from=Path(dense.final_model))[0])


def groups(size: str, steps: int, overrides: list[str]) -> None:
    """Trains on two tagged sources with the group loss and without, and prints where each source's tokens went."""
    sources = [{"dataset": str(_write_era(era)), "weight": 1, "expert_group": ERAS[era][0]} for era in ERAS]
    mixture = f"data.mix_datasets={json.dumps(sources)}"
    for setting in ([], ["moe.group_loss_weight=0"]):
        features = [*SIZES[size], MIXTURE, mixture, "data.validation_every=10"]
        run = [*features, f"training.max_steps={steps}", "training.seed=1", *overrides, *setting]
        name = f"groups_{size}_{_tag([*overrides, *setting])}{steps}"
        result, _ = trained(name, *run)
        describe(name, result)
        tables = json.loads(folder_of(name).routing_file.read_bytes())
        experts = sum(tables["groups"].values())
        for number, (group, members) in enumerate(tables["groups"].items()):
            share = tables["moe/group_share"][number][number]
            if share is not None:
                print(f"  {group}: {share:.1%} of its source's tokens, {share * experts / members:.2f} times chance")


def _write_era(era: str) -> Path:
    """A folder with the speeches of an era, one file each."""
    folder = FOLDER / "texts" / era
    folder.mkdir(parents=True, exist_ok=True)
    packed = resources.files("ultrathink_model.data") / CORPUS_FILE
    with packed.open("rb") as raw, lzma.open(raw) as lines:
        for speech in map(json.loads, lines):
            if ERAS[era][1](int(speech["year"])):
                (folder / f"{Path(speech['file']).stem}.txt").write_text(speech["text"], encoding="utf-8")
    return folder


def _tag(overrides: list[str]) -> str:
    return "".join(f"{override.rpartition('.')[2].replace('=', '_')}_" for override in overrides)


def main() -> None:
    """Trains what is missing and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["balance", "groups"], help="balance, groups, or both")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, help="steps of each run; by default 300 for balance, 150 for groups")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if "balance" in options.what:
        balance(options.size, options.steps or 300, options.override)
    if "groups" in options.what:
        groups(options.size, options.steps or 150, options.override)


if __name__ == "__main__":
    main()
