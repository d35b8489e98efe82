"""Where a model comes from: the runs that made it, read from their folders, as the facts of its card."""

import json
from pathlib import Path

import torch

from ultrathink_model.config import Config
from ultrathink_model.config.export import ExportConfig
from ultrathink_model.data.manifest import load_manifest
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.export.model_card import ModelCard, SourceFacts, StageFacts
from ultrathink_model.models.hf import read_model_config
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.planning.hardware import device_of_driver
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import load_result

# Power of a machine that trains on its processor, which no data sheet of ours tells: a usual desktop processor's.
PROCESSOR_WATTS = 65.0


def describe_model(final_model: Path, settings: ExportConfig) -> ModelCard:
    """The card of a model folder, from the folder itself, the run that it lies in and the runs before that one.

    What is not there any more, a deleted earlier run for example, is left out of the card.

    Args:
        final_model: The model.
        settings: The licence, and what energy and cost are reckoned with.

    Raises:
        CheckpointError: The folder holds no model.
    """
    config = read_model_config(final_model)
    run = RunFolder(final_model.parent)
    record, result = run.record(), load_result(run.path)
    total, active = count_parameters(config)
    return ModelCard(
        name=record.run_name if record else final_model.name,
        config=config,
        parameters=total,
        active_parameters=active,
        licence=settings.licence,
        stages=_stages(final_model, settings),
        sources=_sources(Path(result.data_manifest)) if result else [],
        evaluation=EvaluationResult.load(run.evaluation_file) if run.evaluation_file.is_file() else None,
        carbon_intensity=settings.carbon_intensity,
        needs_code="auto_map" in json.loads((final_model / "config.json").read_text(encoding="utf-8")),
    )


def count_parameters(config: Config) -> tuple[int, int]:
    """The weights of a model, and those among them that one token meets: all but the experts it is not sent to."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(weight.numel() for weight in model.parameters())
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    experts = sum(mixture.gate_up.numel() + mixture.down.numel() for mixture in mixtures)
    moe = config.moe
    return total, total - experts + (experts // moe.num_experts * moe.moe_top_k if experts else 0)


def _stages(final_model: Path, settings: ExportConfig) -> list[StageFacts]:
    """The runs that led to a model, first one first, as far as their folders still tell."""
    stages: list[StageFacts] = []
    seen: set[Path] = set()
    folder: Path | None = final_model.resolve()
    while folder is not None and folder not in seen:
        seen.add(folder)
        record, result = RunFolder(folder.parent).record(), load_result(folder.parent)
        if record is None or result is None:
            break
        init_from = record.identity.init_from
        kind = _kind(read_model_config(folder), init_from is not None)
        known = device_of_driver(result.device)
        watts = settings.device_watts or (known.watts if known else PROCESSOR_WATTS)
        price = known.price if known and settings.device_price is None else settings.device_price
        stages.append(
            StageFacts(
                name=record.run_name,
                kind=kind,
                steps=result.steps,
                tokens=result.tokens,
                seconds=result.seconds,
                device=result.device,
                devices=result.devices,
                watts=watts,
                price=price,
            )
        )
        folder = Path(init_from) if init_from and Path(init_from).is_dir() else None
    return stages[::-1]


def _kind(config: Config, is_continued: bool) -> str:
    if config.advanced.enable_rlhf:
        return f"alignment ({config.rlhf.algorithm})"
    return "further training" if is_continued else "pretraining"


def _sources(manifest_folder: Path) -> list[SourceFacts]:
    if not manifest_folder.is_dir():
        return []
    return [
        SourceFacts(
            name=source.name,
            licence=source.licence,
            documents=source.splits["train"].documents,
            bytes=source.splits["train"].bytes,
        )
        for source in load_manifest(manifest_folder).sources
    ]
