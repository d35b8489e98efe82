"""Model folders: `transformers` reads ours, we read theirs, and nothing is ever half written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ultrathink_model.errors import CheckpointError
from ultrathink_model.models import weight_files
from ultrathink_model.models.generation import generate
from ultrathink_model.models.hf import load_model, read_model_config, save_model
from ultrathink_model.models.model_folder import existing_folder, replaced_folder
from ultrathink_model.models.reasoning import DepthRouter
from ultrathink_model.models.transformer import Transformer

MOE = "advanced.enable_moe=true"
DRE = "advanced.enable_dre=true"
STANDARD = {
    "dense": [],
    "untied": ["model.tie_embeddings=false"],
    "window": ["model.sliding_window=5"],
    "wide heads": ["model.head_dim=16", "model.rope_theta=1000000.0", "model.norm_eps=1e-5"],
    "mixture": [MOE],
    "mixture with a window": [MOE, "model.sliding_window=5"],
    "mixture in the second block": [MOE, "moe.layer_frequency=2", "model.tie_embeddings=false"],
}
OWN = {
    "routed": [DRE],
    "routed mixture with a window": [DRE, MOE, "dre.layer_frequency=1", "model.sliding_window=7"],
    "routed and untied": [DRE, "model.tie_embeddings=false"],
    "mixture with a bias": [MOE, "moe.router_bias_rate=0.1"],
}

# Both sum the same float32 products in another order. Logits are of the order of 1, and a rounding error of 6e-8 a
# sum over a few hundred terms stays under 1e-5.
PARITY = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    """A tokenizer of 96 words, the last of which end and pad a text."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = [f"w{number}" for number in range(94)] + ["<|endoftext|>", "<|pad|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": {"content": "<|pad|>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def saved(small_model, tokenizer_folder, tmp_path):
    """`saved("model.head_dim=16", …)`: a model in evaluation mode and the folder it was saved to."""

    def save(*overrides: str) -> tuple[Transformer, Path]:
        model = with_busy_routers(small_model(*overrides)).eval()
        save_model(model, tokenizer_folder, tmp_path / "final_model")
        return model, tmp_path / "final_model"

    return save


@torch.no_grad()
def with_busy_routers(model: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_buffers():
        if name.endswith(("expert_load", "router_bias")):
            tensor.uniform_(generator=generator)
    for module in model.modules():
        if isinstance(module, DepthRouter):
            module.router.weight.normal_(0.0, 0.3, generator=generator)
            module.strengths.fill_(0.5)
            module.thresholds.copy_(torch.tensor([-0.5, 0.5, 1.5]))
    return model


def left_padding(tokens: Tensor, *lengths: int) -> Tensor:
    return torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths).unsqueeze(1)


def assert_same_function(ours: Transformer, theirs: PreTrainedModel, tokens: Tensor) -> None:
    mask = left_padding(tokens, *range(tokens.shape[1], tokens.shape[1] - 3 * tokens.shape[0], -3))
    with torch.no_grad():
        for given in (None, mask):
            expected = ours(tokens, attention_mask=given).logits
            found = theirs(tokens, attention_mask=None if given is None else given.long()).logits
            kept = slice(None) if given is None else given
            torch.testing.assert_close(found[kept], expected[kept], **PARITY)


def assert_same_state(first: Transformer, second: Transformer) -> None:
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("overrides", STANDARD.values(), ids=STANDARD.keys())
def test_transformers_loads_our_folder_with_no_code_of_ours(saved, random_tokens, overrides):
    model, folder = saved(*overrides)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is (Qwen3MoeForCausalLM if MOE in overrides else Qwen3ForCausalLM)
    assert theirs.config.tie_word_embeddings == model.config.model.tie_embeddings
    for batch, seq in ((1, 1), (2, 19), (3, 40)):
        assert_same_function(model, theirs, random_tokens(batch, seq))


@pytest.mark.parametrize("overrides", [STANDARD["window"], STANDARD["mixture"]], ids=["window", "mixture"])
def test_transformers_generates_the_same_text(saved, random_tokens, overrides):
    model, folder = saved(*overrides)
    prompts = random_tokens(3, 9) % 90
    mask = left_padding(prompts, 9, 4, 7)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    text = theirs.generate(prompts, attention_mask=mask.long(), max_new_tokens=20, do_sample=False)
    ours = generate(
        model, prompts, attention_mask=mask, max_new_tokens=20, temperature=0.0, stop_token_ids=[94], pad_token_id=95
    )
    assert torch.equal(text[:, 9:], ours.tokens[:, : text.shape[1] - 9])


def test_folder_holds_the_tokenizer_and_its_special_tokens(saved, small_config):
    model, folder = saved(MOE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w3 w5").input_ids == [3, 5]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for config in (theirs.generation_config, theirs.config):
        assert (config.eos_token_id, config.pad_token_id) == (94, 95)
    assert read_model_config(folder) == model.config
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in (folder / "README.md").read_text()


@pytest.mark.parametrize("overrides", (STANDARD | OWN).values(), ids=(STANDARD | OWN).keys())
def test_we_load_our_own_folder_bit_for_bit(saved, overrides):
    model, folder = saved(*overrides)
    assert_same_state(load_model(folder), model)


def test_given_state_is_what_is_saved(small_model, tokenizer_folder, tmp_path):
    trained, model = small_model("training.seed=1"), small_model()
    save_model(model, tokenizer_folder, tmp_path / "final_model", state=trained.state_dict())
    assert_same_state(load_model(tmp_path / "final_model"), trained)


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MIXTURE_SIZES = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
THEIRS = {
    "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "window": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=0)
    ),
    "window over no layer": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=3)
    ),
    "mixture": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MIXTURE_SIZES)),
    "mixture with a window": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **MIXTURE_SIZES, use_sliding_window=True, sliding_window=6, tie_word_embeddings=True)
    ),
    "mixture in every second block": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **MIXTURE_SIZES, decoder_sparse_step=2, rope_theta=500.0, rms_norm_eps=1e-5)
    ),
}


@pytest.mark.parametrize("build", THEIRS.values(), ids=THEIRS.keys())
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
def test_we_load_a_folder_of_transformers(tmp_path, random_tokens, build, options):
    torch.manual_seed(0)
    theirs = build().eval()
    theirs.save_pretrained(tmp_path, **options)
    assert_same_function(load_model(tmp_path).eval(), theirs, random_tokens(3, 20))


def test_half_precision_folder_is_loaded_in_float32(tmp_path):
    theirs = THEIRS["dense"]().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embedding.weight, theirs.model.embed_tokens.weight.float())


def test_large_model_is_saved_in_several_files(saved, random_tokens, monkeypatch):
    monkeypatch.setattr(weight_files, "FILE_BYTES", 20_000)
    monkeypatch.setattr(weight_files.write_weights, "__defaults__", (20_000,))
    model, folder = saved(MOE)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert_same_function(model, AutoModelForCausalLM.from_pretrained(folder), random_tokens(2, 9))
    assert_same_state(load_model(folder), model)


CLEAN_PROCESS = """
import sys

class OnlyPublicPackages:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ultrathink_model", "jaxtyping"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, OnlyPublicPackages())
import torch
from transformers import AutoModelForCausalLM

given, results, *folders = sys.argv[1:]
prompts, mask = torch.load(given)
options = {"attention_mask": mask.long(), "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = model(prompts, attention_mask=mask.long(), labels=prompts.where(mask, -100))
        last = model(prompts, attention_mask=mask.long(), logits_to_keep=1).logits
    found[folder] = {
        "logits": output.logits,
        "loss": output.loss,
        "last": last,
        "cached": model.generate(prompts, **options),
        "full": model.generate(prompts, **options, use_cache=False),
        "beams": model.generate(prompts, **options, num_beams=3),
        "full beams": model.generate(prompts, **options, num_beams=3, use_cache=False),
    }
torch.save(found, results)
"""


def test_own_architecture_runs_in_a_process_without_our_package(small_model, tokenizer_folder, random_tokens, tmp_path):
    models = {tmp_path / name: with_busy_routers(small_model(*overrides)).eval() for name, overrides in OWN.items()}
    for folder, model in models.items():
        save_model(model, tokenizer_folder, folder)
    prompts = random_tokens(3, 9)
    mask = left_padding(prompts, 9, 4, 7)
    torch.save((prompts, mask), tmp_path / "given.pt")
    command = [sys.executable, "-I", "-c", CLEAN_PROCESS, tmp_path / "given.pt", tmp_path / "results.pt", *models]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "results.pt")
    for folder, model in models.items():
        assert_same_results(model, found[str(folder)], prompts, mask)


def assert_same_results(model: Transformer, found: dict[str, Tensor], prompts: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        logits = model(prompts, attention_mask=mask).logits
    torch.testing.assert_close(found["logits"][mask], logits[mask], **PARITY)
    torch.testing.assert_close(found["last"], logits[:, -1:], **PARITY)
    targets = prompts.where(mask, -100)[:, 1:]
    expected_loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found["loss"], expected_loss)
    text = generate(model, prompts, attention_mask=mask, max_new_tokens=20, temperature=0.0).tokens
    assert torch.equal(found["cached"][:, 9:], text)
    assert torch.equal(found["full"][:, 9:], text)
    assert torch.equal(found["beams"], found["full beams"])


@pytest.mark.shapes_unchecked  # a folder's config has the attributes of ours, not its type
def test_own_architecture_loads_once_it_is_registered(saved, random_tokens, tmp_path):
    model, folder = saved(DRE)
    from ultrathink_model.models import hf_auto  # noqa: F401 - for what importing it does

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__module__ == "ultrathink_model.models.modeling_ultrathink"
    assert_same_function(model, theirs, random_tokens(2, 19))
    theirs.save_pretrained(tmp_path / "again")
    assert_same_function(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"), random_tokens(2, 19))
    assert_same_state(load_model(tmp_path / "again"), model)


def test_exported_code_runs_beside_our_package(saved, random_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    # Classes that other tests registered would be taken before the folder's code.
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(AutoModelForCausalLM._model_mapping, "_extra_content", {})
    model, folder = saved(DRE, MOE)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert_same_function(model, theirs, random_tokens(2, 19))
    tokens, labels = random_tokens(2, 19), random_tokens(2, 19, seed=1)
    model.train()(tokens, labels=labels).loss_sum.backward()
    assert model.blocks[0].feed_forward.gate_up.grad.abs().max() > 0
    with torch.enable_grad():
        theirs(tokens, labels=labels).loss.backward()


def test_failed_save_leaves_the_old_model(saved, small_model, tokenizer_folder, monkeypatch):
    model, folder = saved()
    other = small_model("training.seed=1")
    torn = {name: tensor for name, tensor in other.state_dict().items() if name != "norm.weight"}
    with pytest.raises(KeyError):
        save_model(other, tokenizer_folder, folder, state=torn)
    assert_same_state(load_model(folder), model)
    assert {path.name for path in folder.parent.iterdir()} == {"final_model", "tokenizer"}
    save_model(other, tokenizer_folder, folder)
    assert_same_state(load_model(folder), other)


def test_card_says_when_the_folder_brings_code(saved):
    for overrides in ([], [DRE]):
        card = (saved(*overrides)[1] / "README.md").read_text()
        assert ("trust_remote_code=True" in card) == bool(overrides)


def test_full_disk_is_told_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    full = pytest.raises(CheckpointError, match=r"needs [\d,]+ MiB, and [\d,]+ MiB are free")
    with full, replaced_folder(tmp_path / "final_model", 2 * free):
        pytest.fail("writing began")
    assert not list(tmp_path.iterdir())


STOPPED_PROCESS = """
import os, sys
from pathlib import Path
from ultrathink_model.models.model_folder import replaced_folder

folder, last = Path(sys.argv[1]), int(sys.argv[2])
changes = 0

def stop(event, arguments):
    global changes
    if event in ("os.rename", "shutil.rmtree", "os.rmdir", "os.remove"):
        changes += 1
        if changes == last:
            os._exit(9)

with replaced_folder(folder) as new:
    (new / "text").write_text("second")
    sys.addaudithook(stop)
"""


def test_a_whole_version_stands_wherever_the_process_is_killed(tmp_path):
    folder = tmp_path / "final_model"
    with replaced_folder(folder) as new:
        (new / "text").write_text("first")
    outcomes, in_place = [], []
    for change in range(1, 20):
        command = [sys.executable, "-c", STOPPED_PROCESS, folder, str(change)]
        code = subprocess.run(command, check=False).returncode
        in_place.append(folder.exists())
        outcomes.append((existing_folder(folder) / "text").read_text())
        with replaced_folder(folder) as new:
            (new / "text").write_text("first")
        assert [path.name for path in tmp_path.iterdir()] == ["final_model"]
        if code == 0:
            break
        assert code == 9
    assert code == 0
    assert outcomes == sorted(outcomes)  # the first version up to some change, the second one from there
    assert set(outcomes) == {"first", "second"}
    assert in_place.count(False) == 1  # between the two renames


def break_missing(folder: Path) -> None:
    shutil.rmtree(folder)


def break_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def break_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def break_config(folder: Path) -> None:
    (folder / "ultrathink.yaml").unlink()
    (folder / "config.json").write_text("{")


def break_type(folder: Path) -> None:
    (folder / "ultrathink.yaml").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_shape(folder: Path) -> None:
    config = folder / "ultrathink.yaml"
    config.write_text(config.read_text().replace("vocab_size: 96", "vocab_size: 95"))


def break_depth(folder: Path) -> None:
    config = folder / "ultrathink.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 3"))


def break_breadth(folder: Path) -> None:
    config = folder / "ultrathink.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 1"))


BREAKAGES = {
    break_missing: "does not exist; name the final_model",
    break_file: "is a file, not a folder",
    break_empty: r"config\.json: No such file",
    break_config: r"config\.json is not JSON",
    break_type: "model_type 'llama' is not one of qwen3, qwen3_moe, ultrathink",
    break_weights: r"has no model\.safetensors; pytorch_model\.bin may hold code and is not read",
    break_bytes: "not a whole safetensors file",
    break_shape: r"embedding\.weight is \(96, 32\), where its config makes \(95, 32\)",
    break_depth: r"hold no weight model\.layers\.2\.input_layernorm\.weight",
    break_breadth: r"weights that its config has no place for, model\.layers\.1\.",
}


@pytest.mark.parametrize(("break_folder", "message"), BREAKAGES.items(), ids=[b.__name__ for b in BREAKAGES])
def test_damaged_folder_is_named_with_its_remedy(saved, break_folder, message):
    _, folder = saved()
    break_folder(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_missing_file_of_the_index_is_named(tmp_path):
    THEIRS["dense"]().save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-\d+\.safetensors, which is not there"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'linear'"),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, "kinds of attention"),
    ],
    ids=str,
)
def test_architecture_that_is_not_ours_is_refused(tmp_path, settings, message):
    Qwen3ForCausalLM(Qwen3Config(**SIZES, **settings)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("settings", [{"norm_topk_prob": False}, {"mlp_only_layers": [1]}], ids=str)
def test_mixture_that_is_not_ours_is_refused(tmp_path, settings):
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **(MIXTURE_SIZES | settings))).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        read_model_config(tmp_path)


def test_model_without_a_tokenizer_is_not_saved(small_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        save_model(small_model(), tmp_path, tmp_path / "final_model")
    assert not (tmp_path / "final_model").exists()
