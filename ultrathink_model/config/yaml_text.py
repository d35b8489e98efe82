"""YAML as people write it: no object of Python is made, and no key may stand twice."""

from collections.abc import Hashable
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class _EachKeyOnce(yaml.SafeLoader):
    """PyYAML's safe loader takes the last of two equal keys and says nothing, so that the first has no effect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, whose keys differ."""
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = None if key_node.tag == MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key is None:
                continue
            if key in lines:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key} stands in line {lines[key]} and again in line {line}; keep one")
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: It is none, or a mapping has a key twice.
    """
    return yaml.load(text, Loader=_EachKeyOnce)
