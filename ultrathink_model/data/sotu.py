"""The built-in corpus: the State of the Union addresses, 1790 to 2021."""

import hashlib
import json
import lzma
from collections.abc import Iterator
from importlib import resources

from ultrathink_model.data.document import Row
from ultrathink_model.data.manifest import Split

CORPUS_FILE = "sotu.jsonl.xz"


class SotuSource:
    """233 speeches, 10.76 MB, sorted by file name; see `sotu_licence.md` beside the corpus."""

    name = "sotu"
    licence = "PDDL-1.0 and CC0-1.0 (works of the United States Government)"
    streaming = False
    has_validation = False
    folder = None

    def identity(self) -> dict[str, object]:
        """What the fingerprint covers: the packed file's hash."""
        data = (resources.files("ultrathink_model.data") / CORPUS_FILE).read_bytes()
        return {"kind": "sotu", "sha256": hashlib.sha256(data).hexdigest()}

    def rows(self, split: Split) -> Iterator[Row]:
        """The speeches in order; each line of the packed file has `file`, `year`, `president`, `party` and `text`."""
        packed = resources.files("ultrathink_model.data") / CORPUS_FILE
        with packed.open("rb") as raw, lzma.open(raw) as lines:
            for number, line in enumerate(lines, start=1):
                speech = json.loads(line)
                yield Row(speech["file"], number, speech["text"])
