import re

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from ultrathink_model.config import override_config
from ultrathink_model.config.export import ExportConfig
from ultrathink_model.evaluation.result import EvaluationResult, Sample
from ultrathink_model.export.lineage import count_parameters, describe_model
from ultrathink_model.export.model_card import FileFacts, ModelCard, SourceFacts, StageFacts, render_model_card
from ultrathink_model.models.hf import read_model_config
from ultrathink_model.models.weight_files import WeightFiles
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import load_result

EVALUATION = EvaluationResult(
    metrics={
        f"eval/{task}/{measure}": value
        for task, value in (("validation", 1.5), ("bigram", 1.75), ("unigram", 2.25))
        for measure in ("loss", "perplexity", "bits_per_byte")
    },
    samples=[Sample(prompt="Fellow <b>citizens</b>", text=" say:\n```\n# not a heading\n```\n| not | a table |")],
    data_fingerprint="f",
    validation_tokens=220_340,
    validation_bytes=954_878,
)


@pytest.fixture
def card(tiny_config):
    return ModelCard(
        name="my_run | <i>: [x](y)",
        config=tiny_config,
        parameters=1_000_000,
        active_parameters=250_000,
        sources=[SourceFacts(name="a | b", licence="CC0-1.0", documents=209, bytes=9_806_324)],
        stages=[StageFacts(name="base_line", kind="pretraining", steps=550, tokens=2_252_800)],
        evaluation=EVALUATION,
    )


def test_front_matter_is_what_the_hub_reads(card):
    data = HubCard(render_model_card(card)).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.model_name == card.name
    assert {result.metric_type: result.metric_value for result in data.eval_results} == dict.fromkeys(
        ("loss", "perplexity", "bits_per_byte"), 1.5
    )


def test_licence_stands_in_the_front_matter_once_it_is_chosen(card):
    text = render_model_card(card.model_copy(update={"licence": "cc0-1.0"}))
    assert HubCard(text).data.license == "cc0-1.0"
    assert "No licence has been chosen" not in text
    assert "No licence has been chosen" in render_model_card(card)


def test_names_cannot_break_the_tables_and_samples_cannot_leave_their_fence(card):
    text = render_model_card(card)
    assert r"# my\_run \| \<i\>: \[x\](y)" in text
    assert r"| a \| b | CC0-1.0 | 209 | 9.8 MB |" in text
    assert r"| base\_line | pretraining | 550 | 2,252,800 |" in text
    fences = re.findall(r"^`{4,}(?:text)?$", text, flags=re.MULTILINE)
    assert fences == ["````text", "````"]


def test_card_names_the_model_and_its_baselines(card):
    text = render_model_card(card)
    for line in (
        "| **this model** | 1.5000 | 1.5000 | 1.50 |",
        "| Kneser–Ney bigram | 1.7500 | 1.7500 | 1.75 |",
        "| unigram | 2.2500 | 2.2500 | 2.25 |",
    ):
        assert line in text
    assert "1,000,000 parameters, of which each token meets 250,000" in text


def test_card_without_facts_says_so(tiny_config):
    text = render_model_card(ModelCard(name="bare", config=tiny_config, parameters=1, active_parameters=1))
    assert "was not evaluated" in text
    assert "| stage |" not in text
    assert not re.search(r"\n{4,}", text)
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["ultrathink"]


@pytest.mark.parametrize("needs_code", [True, False])
def test_card_tells_whether_code_must_be_trusted(card, needs_code):
    text = render_model_card(card.model_copy(update={"needs_code": needs_code}))
    assert ("trust_remote_code=True)" in text) is needs_code


def test_features_are_described(card):
    config = override_config(
        card.config, ["advanced.enable_moe=true", "moe.layer_frequency=2", "advanced.enable_dre=true"]
    )
    text = render_model_card(card.model_copy(update={"config": config}))
    assert "One block in 2 is a mixture of 8 experts" in text
    assert "0.6 passes on average" in text
    assert HubCard(text).data.tags == ["ultrathink", "mixture-of-experts", "dynamic-reasoning"]


def test_lineage_follows_the_models_that_each_run_began_from(make_run):
    baseline = make_run("baseline")
    aligned = make_run(
        "aligned", baseline, ["advanced.enable_rlhf=true", "rlhf.prompt_tokens=8", "rlhf.response_tokens=8"]
    )
    EVALUATION.save(RunFolder(aligned.parent).evaluation_file)
    card = describe_model(aligned, ExportConfig())
    assert [(stage.name, stage.kind, stage.steps) for stage in card.stages] == [
        ("baseline", "pretraining", 6),
        ("aligned", "alignment (ppo)", 6),
    ]
    assert card.name == "aligned"
    assert card.evaluation == EVALUATION
    assert [source.documents for source in card.sources] == [18]


def test_lineage_of_a_folder_that_no_run_made_is_the_folder_alone(make_run, tmp_path):
    final_model = make_run("run").rename(tmp_path / "alone")
    card = describe_model(final_model, ExportConfig())
    assert (card.name, card.evaluation) == ("alone", None)
    assert not card.stages
    assert not card.sources


def test_parameters_are_those_of_the_saved_model(make_run):
    final_model = make_run("run")
    total, active = count_parameters(read_model_config(final_model))
    assert total == active == sum(weight.numel() for weight in WeightFiles(final_model).values())


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet(make_run):
    final_model = make_run("run", overrides=["advanced.enable_moe=true"])
    config = read_model_config(final_model)
    total, active = count_parameters(config)
    moe, shape = config.moe, config.model
    width = moe.expert_hidden_size or shape.feed_forward_size // moe.moe_top_k
    idle = shape.num_layers * (moe.num_experts - moe.moe_top_k) * 3 * shape.hidden_size * width
    assert total == sum(weight.numel() for weight in WeightFiles(final_model).values())
    assert active == total - idle


def test_energy_carbon_and_cost_are_reckoned_from_the_stages(card):
    stage = StageFacts(
        name="base", kind="pretraining", steps=1, tokens=1, seconds=7200, device="NVIDIA H100", devices=4
    )
    stages = [
        stage.model_copy(update={"watts": 700.0, "price": 2.5}),
        stage.model_copy(update={"name": "untimed", "seconds": 0}),
    ]
    text = render_model_card(card.model_copy(update={"stages": stages, "carbon_intensity": 0.5}))
    assert "base: 8 hours of NVIDIA H100 (4 of them), at 700 W each" in text
    assert "5.6 kWh" in text
    assert "**2.8 kg**" in text
    assert "**$20.00**" in text
    assert "untimed:" not in text
    unpriced = stages[0].model_copy(update={"price": None})
    assert "`export.device_price` sets one" in render_model_card(card.model_copy(update={"stages": [unpriced]}))
    assert "Energy" not in render_model_card(card)


def test_other_formats_are_listed_with_the_loss_of_int8_weights(card):
    files = [
        FileFacts(format="gguf", path="gguf/model-F32.gguf", bytes=4_000_000, sha256="a"),
        FileFacts(format="gguf_int8", path="gguf/model-Q8_0.gguf", bytes=1_100_000, sha256="b", loss=1.5012),
    ]
    measured = {"files": files, "files_loss": 1.5, "files_loss_tokens": 8192}
    text = render_model_card(card.model_copy(update=measured))
    assert "| `gguf/model-F32.gguf` | gguf | 4.0 MB | 1.50000 |" in text
    assert "| `gguf/model-Q8_0.gguf` | gguf\\_int8 | 1.1 MB | 1.50120 (+0.00120) |" in text
    assert "8,192 held-out tokens" in text
    bare = render_model_card(card.model_copy(update={"files": files[:1]}))
    assert "| `gguf/model-F32.gguf` | gguf | 4.0 MB |\n" in bare
    assert "held-out tokens, each read" not in bare


def test_lineage_reckons_with_the_settings_or_the_data_sheet(make_run):
    final_model = make_run("run")
    result = load_result(final_model.parent)
    result.model_copy(update={"seconds": 60.0, "device": "NVIDIA A100-SXM4-80GB"}).save()
    sheet = describe_model(final_model, ExportConfig()).stages[0]
    assert (sheet.seconds, sheet.watts, sheet.price) == (60.0, 400, 4.10)
    settings = ExportConfig(device_watts=100, device_price=0.5, licence="mit", carbon_intensity=0.1)
    card = describe_model(final_model, settings)
    assert (card.stages[0].watts, card.stages[0].price) == (100, 0.5)
    assert (card.licence, card.carbon_intensity) == ("mit", 0.1)
