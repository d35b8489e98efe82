"""Hub sources: datasets of the Hugging Face hub, downloaded, streamed, or from the cache where there is no network."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from types import ModuleType
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from pydantic import BaseModel

from ultrathink_model.data.articles import join_articles
from ultrathink_model.data.document import BadRow, Row
from ultrathink_model.data.known import KnownDataset
from ultrathink_model.data.manifest import Split
from ultrathink_model.data.media_values import COLUMNS
from ultrathink_model.errors import DataError, SourceLostError

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0
# The state of a stream is kept at every so many rows; readers look ahead by less than all that are kept.
STATE_ROWS = 256
KEPT_STATES = 64


class StreamPlace(BaseModel):
    """A place in a split that is streamed.

    Attributes:
        row: Rows before it.
        state: The state of `datasets` at a row before it, or just there.
        state_row: Rows before that.
    """

    row: int
    state: dict[str, Any]
    state_row: int


class HubSource:
    """A dataset of the hub.

    Its fingerprint is made of its name, subset and text column, without asking the hub: data that was prepared once is
    found again with no network. The rows come from the hub's newest revision at the time of preparation, whatever is
    pushed while they are read.

    Args:
        name: The source's name in messages.
        known: Hub id, subset, text column and licence.
        streaming: Read rows as they are downloaded, and keep no copy.
        media: Whether the images and sounds that rows hold count.
    """

    # Images and sounds come as bytes.
    folder = None

    def __init__(self, name: str, known: KnownDataset, streaming: bool, media: bool = False) -> None:
        self.name, self.licence = name, known.licence
        self.streaming, self._media = streaming, media
        self.hub_id, self._known = known.hub_id, known
        self._states: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT_STATES)

    @property
    def has_validation(self) -> bool:
        """Whether the hub's dataset has a split named `validation`."""
        return "validation" in self._splits

    def identity(self) -> dict[str, object]:
        """What the fingerprint covers: which dataset, subset, revision and column."""
        known = self._known
        return {
            "kind": "hub",
            "id": known.hub_id,
            "subset": known.subset,
            "revision": known.revision,
            "text_column": known.text_column,
            "article_heading": known.article_heading,
        }

    def rows(self, split: Split, place: StreamPlace | None = None) -> Iterator[Row | BadRow]:
        """The rows of a split; lines are joined to articles where the dataset's rows are lines.

        Args:
            split: Which.
            place: What `place` gave for a row of it: the rows after that one are read.
        """
        rows = self._read(_undecoded(self._splits[split], self._media), f"{self._known.hub_id}:{split}", place)
        heading = self._known.article_heading
        return rows if heading is None else join_articles(rows, heading)

    def place(self, row: int) -> StreamPlace | None:
        """Where the split that is being read goes on after a row; None where it has to be read from its start.

        That is where nothing is streamed, and where several rows make one article.
        """
        state = next(((at, state) for at, state in reversed(self._states) if at <= row), None)
        if state is None or self._known.article_heading is not None:
            return None
        return StreamPlace(row=row, state=state[1], state_row=state[0])

    def _with_states(self, rows: Any, place: StreamPlace | None) -> Iterator[Mapping[str, object]]:
        """The rows of a stream from a place's state on; its state is kept now and then."""
        self._states.clear()
        first = 0
        if place is not None:
            first = place.state_row
            self._states.append((first, place.state))
            rows.load_state_dict(place.state)
        for number, row in enumerate(rows, start=first + 1):
            # The state after this row.
            if number % STATE_ROWS == 0:
                self._states.append((number, rows.state_dict()))
            yield row

    def _read(self, rows: Any, file: str, place: StreamPlace | None) -> Iterator[Row]:
        column = self._known.text_column
        if hasattr(rows, "state_dict"):
            rows = islice(self._with_states(rows, place), place.row - place.state_row if place else 0, None)
        try:
            for number, row in enumerate(rows, start=place.row + 1 if place else 1):
                if column not in row:
                    raise DataError(
                        f"{file} has no column {column!r} but {', '.join(row)}; set data.text_column to one of them."
                    )
                yield Row(
                    file,
                    number,
                    row[column],
                    **({name: row.get(name) for name in COLUMNS.values()} if self._media else {}),
                )
        except (HTTPError, OSError) as error:
            raise SourceLostError(
                f"{file}: the hub was lost while it was read ({error}); start again, which goes on from there."
            ) from None

    @property
    def revision(self) -> str | None:
        """The commit that is read; None where the local cache stands in for the hub."""
        return self._reached[0]

    @cached_property
    def _reached(self) -> tuple[str | None, str | None]:
        return _reach(self._known.hub_id, self._known.revision)

    @cached_property
    def _splits(self) -> Mapping[str, Iterable[Mapping[str, object]]]:
        # Imported here because it takes seconds, which a run whose data lies prepared should not wait for.
        import datasets  # noqa: PLC0415
        from datasets.exceptions import DatasetsError  # noqa: PLC0415

        known = self._known
        trouble = self._reached[1]
        logger.info("%s: reading %s from %s", self.name, known.hub_id, "the local cache" if trouble else "the hub")
        try:
            with _offline(datasets, trouble is not None):
                # The cache keeps whole datasets only, and does not tell revisions apart.
                found = datasets.load_dataset(
                    known.hub_id,
                    known.subset,
                    revision=None if trouble else self.revision or known.revision,
                    streaming=self.streaming and trouble is None,
                )
        except (HTTPError, OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise DataError(self._explain(trouble, error, datasets.config.HF_DATASETS_CACHE)) from None
        if "train" not in found:
            raise DataError(f"{known.hub_id} has no split `train` but {', '.join(found)}; name another dataset.")
        return found

    def _explain(self, trouble: str | None, error: Exception, cache: object) -> str:
        known = self._known
        subset = f" ({known.subset})" if known.subset else ""
        if trouble is None:
            return f"data.dataset={self.name}: {known.hub_id}{subset} cannot be loaded: {' '.join(str(error).split())}"
        return (
            f"data.dataset={self.name} cannot be had: there is no such file or folder here, {known.hub_id}{subset} is not "
            f"in the cache ({cache}), and the hub does not answer ({trouble}). Either give a "
            "local copy (data.dataset=PATH of text, JSONL, CSV or Parquet; data.mirror_dir for a folder of copies by name), or "
            "start again with a network. The built-in data.dataset=sotu needs neither."
        )


def _undecoded(rows: Any, media: bool) -> Any:
    """The same rows with images and sounds as the bytes that the hub has: we decode them ourselves, within bounds."""
    if not media or rows.features is None:
        return rows
    from datasets import Audio, Image, List  # noqa: PLC0415 - after the rows, it is imported already

    for column, kind in ((column, kind) for column in COLUMNS.values() for kind in (Image, Audio)):
        feature = rows.features.get(column)
        if isinstance(feature, kind):
            rows = rows.cast_column(column, kind(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, kind):
            rows = rows.cast_column(column, List(kind(decode=False)))
    return rows


def _reach(hub_id: str, revision: str | None) -> tuple[str | None, str | None]:
    """Asks the hub once, since `datasets` itself would try for most of a minute.

    Returns:
        The commit that the revision stands for, or None, and why the hub cannot be reached, or None.

    Raises:
        DataError: The hub answers that there is no such dataset, or that it is not for this user.
    """
    try:
        return huggingface_hub.HfApi().dataset_info(hub_id, revision=revision, timeout=REACH_SECONDS).sha, None
    except RepositoryNotFoundError:
        raise DataError(
            f"{hub_id} is neither a file or folder here nor a dataset on the hub that this user may read; correct the "
            "name, or log in with `hf auth login`."
        ) from None
    except HFValidationError:
        raise DataError(f"{hub_id} is neither a file or folder here nor a possible hub id; correct the name.") from None
    except (HTTPError, OSError) as error:
        return None, " ".join(str(error).split())


@contextmanager
def _offline(datasets: ModuleType, enabled: bool) -> Iterator[None]:
    """Makes `datasets` look into its cache only; it has no argument for that, only a switch read when imported."""
    switches = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, enabled or getattr(module, name))
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
