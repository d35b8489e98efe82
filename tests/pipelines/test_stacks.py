"""`run.py stacks apply`: what it creates, updates, leaves alone and refuses."""

from pathlib import Path

import pytest
import yaml
from zenml.client import Client

from pipelines import stacks_command
from pipelines.stack_files import apply_stack, find_stack, read_stack_file
from ultrathink_model.errors import ConfigError

SHIPPED = Path(__file__).resolve().parents[2] / "stack_configs"
AWS = {"account": "123456789012", "sagemaker-role": "trainer", "region": "eu-central-1", "bucket": "models"}

pytestmark = [
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]


def actions(changes):
    return [change.action for change in changes]


@pytest.fixture
def edited(tmp_path):
    """Writes the SageMaker stack with changes, under names of this test's own."""

    def write(name, change=lambda content: None):
        content = yaml.safe_load((SHIPPED / "sagemaker.yaml").read_text(encoding="utf-8"))
        content["stack_name"] = f"ultrathink_{name}"
        for component in content["components"].values():
            component["name"] = f"{component['name']}_{name}"
        change(content["components"])
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def test_a_stack_is_created_once_then_left_alone_then_updated_where_it_differs(edited):
    stack = read_stack_file(edited("once"), AWS)
    assert set(actions(apply_stack(stack, dry_run=True))) == {"create"}
    with pytest.raises(ConfigError, match="not registered"):
        find_stack("once")
    assert set(actions(apply_stack(stack))) == {"create"}
    assert set(actions(apply_stack(stack))) == {"keep"}

    def change(components):
        components["orchestrator"]["configuration"]["instance_type"] = "ml.p4d.24xlarge"
        del components["orchestrator"]["configuration"]["volume_size_in_gb"]

    changed = read_stack_file(edited("once", change), AWS)
    updated = apply_stack(changed)
    (update,) = [change for change in updated if change.action != "keep"]
    assert update.what == "orchestrator ultrathink_sagemaker_once (sagemaker)"
    assert update.details == (
        "instance_type: 'ml.g5.2xlarge' -> 'ml.p4d.24xlarge'",
        "volume_size_in_gb: 200 -> 30",
    )
    assert set(actions(apply_stack(changed))) == {"keep"}
    configuration = find_stack("once").components
    orchestrator = next(parts[0] for kind, parts in configuration.items() if kind.value == "orchestrator")
    assert Client().get_stack_component("orchestrator", orchestrator.id).configuration["region"] == "eu-central-1"


def test_a_component_that_another_one_replaces_is_an_update_of_the_stack(edited):
    apply_stack(read_stack_file(edited("swap"), AWS))

    def change(components):
        components["artifact_store"]["name"] = "another_store"

    changes = apply_stack(read_stack_file(edited("swap", change), AWS))
    assert actions(changes)[-1] == "update"
    assert changes[-1].details == ("artifact_store: ultrathink_s3_swap -> another_store",)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_stack_is_accepted_once_its_blanks_are_filled_in(path):
    with_blanks = path.read_text(encoding="utf-8")
    try:
        read_stack_file(path)
    except ConfigError as error:
        names = [word.partition("=")[0] for word in str(error).rpartition("--values ")[2].split()]
        stack = read_stack_file(path, dict.fromkeys(names, "value"))
        assert "<" in with_blanks
        assert "<" not in stack.model_dump_json()
    else:
        assert path.stem in ("local", "local_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts["orchestrator"]["configuration"].update(instance_typ="ml"), "Did you mean instance_type"),
        (lambda parts: parts["orchestrator"].update(flavor="sagemakr"), "Did you mean sagemaker"),
        (
            lambda parts: parts["orchestrator"]["configuration"].update(volume_size_in_gb="big"),
            "volume_size_in_gb='big'",
        ),
        (lambda parts: parts["artifact_store"]["configuration"].update(secret="abc"), "holds a secret"),
        (lambda parts: parts.update(orchestra=parts["orchestrator"]), "components.orchestra"),
    ],
)
def test_a_mistake_in_a_stack_is_refused(change, message, edited):
    with pytest.raises(ConfigError, match=message):
        read_stack_file(edited("wrong", change), AWS)


def test_blanks_and_values_must_match(edited):
    with pytest.raises(ConfigError, match=r"leaves <region>.* open; say what they are: --values region=…"):
        read_stack_file(edited("blank"), {name: value for name, value in AWS.items() if name != "region"})
    with pytest.raises(ConfigError, match="has no <zone>"):
        read_stack_file(edited("blank"), AWS | {"zone": "a"})
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        read_stack_file(Path("nowhere.yaml"))


def test_the_command_says_what_it_does(capsys, tmp_path):
    text = (SHIPPED / "local.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("ultrathink_local", "ultrathink_mine"), encoding="utf-8")
    stacks_command.main(["apply", str(path), "--dry-run"])
    assert "nothing was changed" in capsys.readouterr().out
    stacks_command.main(["apply", str(path)])
    assert "--stack ultrathink_mine" in capsys.readouterr().out
    assert find_stack("mine").id == find_stack("ultrathink_mine").id
