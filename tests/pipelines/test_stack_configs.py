"""The shipped stacks: every key is one that the component knows, nothing secret, and the local ones really import."""

from pathlib import Path

import pytest
import yaml
import zenml
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.stack.flavor import Flavor

FOLDER = Path(__file__).resolve().parents[2] / "stack_configs"
FILES = sorted(FOLDER.glob("*.yaml"))

pytestmark = [
    # passlib, which ZenML imports, imports the standard library's crypt.
    pytest.mark.filterwarnings("ignore:'crypt' is deprecated:DeprecationWarning"),
    # ZenML 0.98 reads deprecated fields of its own models.
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:zenml"),
]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def flavors():
    found = Client().list_flavors(size=500)
    return {(flavor.type, flavor.name): flavor for flavor in found.items}


def test_the_five_stacks_are_there():
    assert [path.stem for path in FILES] == ["kubernetes", "local", "local_gpu", "sagemaker", "vertex"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_stack_is_known_to_its_component(path, flavors):
    stack = read(path)
    assert stack.keys() == {"zenml_version", "stack_name", "components"}
    assert stack["zenml_version"] == zenml.__version__
    for kind, component in stack["components"].items():
        assert component.keys() == {"name", "flavor", "configuration"}
        flavor = Flavor.from_model(flavors[StackComponentType(kind), component["flavor"]])
        unknown = component["configuration"].keys() - flavor.config_class.model_fields.keys()
        assert not unknown, f"{path.name}: {kind} has no {unknown}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_stack_holds_a_secret(path):
    text = path.read_text(encoding="utf-8").lower()
    for word in ("secret_access_key", "aws_access_key_id:", "password", "token:", "private_key"):
        assert word not in text


@pytest.mark.parametrize("name", ["local", "local_gpu"])
def test_a_local_stack_imports_into_zenml(name):
    from click.testing import CliRunner
    from zenml.cli.cli import cli

    stack_name = read(FOLDER / f"{name}.yaml")["stack_name"]
    done = CliRunner().invoke(cli, ["stack", "import", stack_name, "-f", str(FOLDER / f"{name}.yaml")])
    assert done.exit_code == 0, done.output
    stack = Client().get_stack(stack_name)
    kinds = {StackComponentType.ORCHESTRATOR, StackComponentType.ARTIFACT_STORE, StackComponentType.DEPLOYER}
    assert set(stack.components) == kinds
