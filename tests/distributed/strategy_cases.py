"""The strategies that the tests compare, and how they are run and compared."""

import json

import pytest
import small_runs

from ultrathink_model.config import make_config, override_config
from ultrathink_model.distributed.launch import launch

BASE = make_config(
    {
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 64,
            "max_seq_length": 32,
        },
        "multimodal": {
            "image_size": 12,
            "patch_size": 4,
            "image_hidden_size": 16,
            "image_layers": 2,
            "image_heads": 2,
            "mel_bins": 6,
            "max_audio_seconds": 1,
            "audio_hidden_size": 12,
            "audio_layers": 2,
            "audio_heads": 2,
        },
        "moe": {"num_knowledge_experts": 4, "num_skill_experts": 2, "num_meta_experts": 1, "num_safety_experts": 1},
    }
)

TOLERANCE = 1e-6
# AdamW divides a gradient by its own size: of a weight that hardly has one, the rounding is a part of each step (1e-3).
WEIGHT_TOLERANCE = 1e-5
STEPS = 6

ROUTED = ["advanced.enable_moe=true", "advanced.enable_dre=true", "moe.layer_frequency=2", "model.tie_embeddings=false"]

MIXTURE = ["advanced.enable_moe=true"]  # 8 experts in both blocks
CUT = ["distributed.expert_parallel_size=2", *MIXTURE]
# Capacity is counted in the tokens of one rank, so one process drops others: it is compared over ranks alone.
CAPACITY = ["moe.expert_capacity=1"]

TENSOR = ["distributed.tensor_parallel_size=2"]
HEADS = ["model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=6"]  # 48 wide, in a stream of 32

MEDIA = ["advanced.enable_multimodal=true"]

HARM = ["advanced.enable_constitutional=true"]

# A name's second part says what is trained, whoever trains it.
STRATEGIES = {
    "ddp": ["distributed.strategy=ddp"],
    "ddp_muon": ["distributed.strategy=ddp", "training.optimizer=muon"],
    "ddp_routed": ["distributed.strategy=ddp", *ROUTED],
    "ddp_harm": ["distributed.strategy=ddp", *HARM],
    "ddp_media": ["distributed.strategy=ddp", *MEDIA],
    "ddp_mediamuon": ["distributed.strategy=ddp", "training.optimizer=muon", *MEDIA],
    "ddp_mixture": ["distributed.strategy=ddp", *MIXTURE],
    "ddp_capacity": ["distributed.strategy=ddp", *MIXTURE, *CAPACITY],
    "ddpcut_mixture": ["distributed.strategy=ddp", *CUT],
    "ddpcut_capacity": ["distributed.strategy=ddp", *CUT, *CAPACITY],
    "ddpcut_muonmixture": ["distributed.strategy=ddp", "training.optimizer=muon", *CUT],
    "fsdpcut_mixture": ["distributed.strategy=fsdp", "model.gradient_checkpointing=true", *CUT],
    "ddptp": ["distributed.strategy=ddp", *TENSOR],
    "ddptp_routed": ["distributed.strategy=ddp", *TENSOR, *ROUTED],
    "ddptp_harm": ["distributed.strategy=ddp", *TENSOR, *HARM],
    "ddptp_media": ["distributed.strategy=ddp", *TENSOR, *MEDIA],
    "ddptp_mixture": ["distributed.strategy=ddp", *TENSOR, *MIXTURE],
    "ddptp4_heads": ["distributed.strategy=ddp", "distributed.tensor_parallel_size=4", *HEADS],
    "fsdptp4_heads": ["distributed.strategy=fsdp", "distributed.tensor_parallel_size=4", *HEADS],
    "fsdptp_routed": ["distributed.strategy=fsdp", *TENSOR, *ROUTED],
    "fsdptp_media": ["distributed.strategy=fsdp", *TENSOR, *MEDIA],
    "fsdptp": ["distributed.strategy=fsdp", "model.gradient_checkpointing=true", *TENSOR],
    "fsdp": ["distributed.strategy=fsdp"],
    "fsdp_muon": ["distributed.strategy=fsdp", "training.optimizer=muon"],
    "fsdp_routed": ["distributed.strategy=fsdp", "model.gradient_checkpointing=true", *ROUTED],
    "fsdp_harm": ["distributed.strategy=fsdp", *HARM],
    "fsdp_media": ["distributed.strategy=fsdp", "model.gradient_checkpointing=true", *MEDIA],
    "fsdp_mediamuon": ["distributed.strategy=fsdp", "training.optimizer=muon", *MEDIA],
    "zero1": ["distributed.strategy=deepspeed", "distributed.zero_stage=1"],
    "zero1_routed": ["distributed.strategy=deepspeed", "distributed.zero_stage=1", *ROUTED],
    "zero2": ["distributed.strategy=deepspeed", "distributed.zero_stage=2"],
    "zero2_media": ["distributed.strategy=deepspeed", "distributed.zero_stage=2", *MEDIA],
    "zero2_routed": ["distributed.strategy=deepspeed", "distributed.zero_stage=2", *ROUTED],
    "zero3": ["distributed.strategy=deepspeed", "distributed.deepspeed_config={zero3}"],
    "zero3_harm": ["distributed.strategy=deepspeed", "distributed.deepspeed_config={zero3}", *HARM],
    "zero3_media": ["distributed.strategy=deepspeed", "distributed.deepspeed_config={zero3}", *MEDIA],
    "zero3_routed": ["distributed.strategy=deepspeed", "distributed.deepspeed_config={zero3}", *ROUTED],
}


def family(name):
    return name.partition("_")[2]


def config_of(folder, name, ranks):
    """The config of a strategy over `ranks`; the same sequences in each step as one process takes."""
    zero3 = folder / "zero3.json"
    # With these thresholds ZeRO-3 cuts the smallest weight too, and has none ready before it is needed.
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    zero3.write_text(json.dumps({"zero_optimization": settings}))
    overrides = [
        f"training.gradient_accumulation_steps={small_runs.MICRO_STEPS}",
        "training.gradient_clipping=0.5",
        *(text.format(zero3=zero3) for text in STRATEGIES[name]),
    ]
    if ranks == 1:
        overrides = [text for text in overrides if not text.startswith("distributed.")]
    else:
        overrides += ["distributed.enabled=true", f"distributed.num_processes={ranks}"]
    config = override_config(BASE, overrides)
    sequences = small_runs.GLOBAL_BATCH // small_runs.MICRO_STEPS
    shares = ranks // config.distributed.tensor_parallel_size
    return override_config(config, [f"training.batch_size={sequences // shares}"])


def run_over_two_ranks(folder, names, loads):
    """What `small_runs.run_all` saw of some strategies; `loads` are pairs of who loads and who saved."""
    configs = {name: config_of(folder, name, ranks=2) for name in names}
    return launch(small_runs.run_all, (configs, loads, STEPS, folder), configs[names[0]])


def curves_over_ranks(folder, names, ranks, steps):
    configs = {name: config_of(folder, name, ranks) for name in names}
    return launch(small_runs.curves, (configs, steps), configs[names[0]])


def run_alone(folder, names, steps=STEPS):
    """The curves and configs of one process, by what is trained."""
    configs = {family(name): config_of(folder, name, ranks=1) for name in names}
    return {"curves": {kind: small_runs.curve(config, steps) for kind, config in configs.items()}, "configs": configs}


def assert_equal_curves(run, reference):
    steps = len(run["losses"])
    assert run["losses"] == pytest.approx(reference["losses"][:steps], abs=TOLERANCE, rel=0)
    assert run["norms"] == pytest.approx(reference["norms"][:steps], abs=TOLERANCE, rel=0)


def assert_trains_alike(run, reference):
    assert_equal_curves(run, reference)
    assert max(run["norms"]) > 0.5, "nothing was clipped"
    assert run["weights"].keys() == reference["weights"].keys()
    for key, weight in reference["weights"].items():
        assert (run["weights"][key] - weight).abs().max() < WEIGHT_TOLERANCE, key
