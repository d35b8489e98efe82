"""Reading, overriding and saving a config, and the messages for what cannot be read."""

from pathlib import Path

import pytest

from ultrathink_model.config import Config, config_hash, load_config, make_config, override_config, save_config
from ultrathink_model.config.load import valid_keys
from ultrathink_model.config.profiles import CONFIG_FOLDER, PROFILES, profile_path
from ultrathink_model.errors import ConfigError

SHIPPED = sorted(CONFIG_FOLDER.glob("train_*.yaml"))


def test_every_profile_has_a_shipped_config():
    assert [profile_path(name) for name in sorted(PROFILES)] == SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["advanced.enable_moe=true"],
        ["advanced.enable_dre=true"],
        ["advanced.enable_moe=true", "advanced.enable_dre=true", "advanced.enable_rlhf=true"],
        ["distributed.enabled=true"],
    ],
    ids=lambda overrides: "+".join(o.split(".")[1].split("=")[0] for o in overrides) or "plain",
)
def test_shipped_configs_load_with_every_feature(path, overrides):
    config = load_config(path, overrides)
    assert config.output.output_dir == f"./outputs/{path.stem.removeprefix('train_')}_model"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_saved_config_loads_to_the_same_config(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert config_hash(again) == config_hash(config)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("model.hidden_size=1024", "model", "hidden_size", 1024),
        ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),
        ("training.learning_rate=0.5", "training", "learning_rate", 0.5),
        ("advanced.enable_moe=true", "advanced", "enable_moe", True),
        ("training.gradient_clipping=null", "training", "gradient_clipping", None),
        ("training.max_steps=", "training", "max_steps", None),
        ("data.dataset=dummy", "data", "dataset", "dummy"),
        ("data.dataset=a=b.txt", "data", "dataset", "a=b.txt"),
        ("data.mix_datasets=wikitext:0.3,sotu:0.7", "data", "mix_datasets", "wikitext:0.3,sotu:0.7"),
        ("training.resume=./outputs/x", "training", "resume", "./outputs/x"),
    ],
)
def test_an_override_keeps_the_type_of_its_value(override, section, key, value):
    found = getattr(getattr(make_config({}, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_takes_a_list():
    config = make_config({}, ["data.mix_datasets=[{dataset: sotu, weight: 1}, {dataset: dummy, weight: 2.5}]"])
    assert [(source.dataset, source.weight) for source in config.data.mix_datasets] == [("sotu", 1.0), ("dummy", 2.5)]


def test_a_later_override_wins_and_the_file_is_left_as_it_was(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training: {batch_size: 3}\n", encoding="utf-8")
    assert load_config(path, ["training.batch_size=4", "training.batch_size=5"]).training.batch_size == 5
    assert load_config(path).training.batch_size == 3


def test_override_config_validates_anew(tiny_config):
    assert override_config(tiny_config, ["training.batch_size=2"]).training.batch_size == 2
    with pytest.raises(ConfigError, match=r"hidden_size=30 is not a multiple of model\.num_heads=4"):
        override_config(tiny_config, ["model.hidden_size=30"])


def test_an_empty_section_takes_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training: {}\n", encoding="utf-8")
    assert load_config(path) == Config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_sise=4", r"unknown key training\.batch_sise\. Did you mean training\.batch_size\?"),
        ("trainning.batch_size=4", r"unknown key trainning\. Did you mean training\?"),
        ("model.batch_size=4", r"unknown key model\.batch_size\. Did you mean training\.batch_size\?"),
        ("training.batch_size=four", r"training\.batch_size='four' is refused: input should be a valid integer"),
        ("training.batch_size=0", r"training\.batch_size=0 is refused: .*greater than or equal to 1"),
        ("training.batch_size=2.5", r"training\.batch_size=2\.5 is refused"),
        ("training.optimizer=sgd", r"training\.optimizer='sgd' is refused: input should be 'adamw' or 'muon'"),
        ("training.batch_size", r"not of the form section\.key=value"),
        ("batch_size=4", r"not of the form section\.key=value"),
        ("data.mix_datasets.0.weight=4", r"goes deeper than section\.key"),
        ("data.dataset=[", r"the value is not YAML"),
    ],
)
def test_a_bad_override_is_refused_with_its_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        make_config({}, [override])


def test_all_mistakes_are_named_at_once(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {hiden_size: 5}\ntraining: {batch_size: x}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "is not a YAML file"),
        (b"\xff\xfe\x00model", "is not a YAML file in UTF-8"),
        (b"- a\n- b\n", "holds list, not sections"),
        (b"", "holds NoneType, not sections"),
        (b"model: 5\n", "model=5 is refused"),
    ],
    ids=["syntax", "encoding", "list", "empty", "scalar section"],
)
def test_a_file_that_is_no_config_is_refused(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_named_with_where_configs_lie(tmp_path):
    with pytest.raises(
        ConfigError, match=r"missing\.yaml: No such file or directory\. Shipped configs lie in configs/"
    ):
        load_config(tmp_path / "missing.yaml")


def test_valid_keys_hold_every_section():
    assert {key.partition(".")[0] for key in valid_keys()} == set(Config.model_fields)


def test_configs_can_not_be_changed(tiny_config):
    with pytest.raises(ValueError, match="frozen"):
        tiny_config.training.batch_size = 5


def test_the_config_package_never_imports_torch():
    import subprocess
    import sys

    code = "import sys, ultrathink_model.config, ultrathink_model.workflow; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "False"
