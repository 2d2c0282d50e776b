"""Edits in: records, the public formats, streams, named datasets and the shipped texts.

Imports neither torch nor transformers; the hub client and pyarrow are loaded only when they are needed.
"""

from __future__ import annotations

from wisecli.data.datasets import DATASETS, Dataset, Located, locate_dataset, read_dataset, resolve_dataset
from wisecli.data.formats import FORMATS, Format, map_record
from wisecli.data.pool import contexts, ordinary_prompts
from wisecli.data.records import KINDS, EditRecord, Probe, content_id
from wisecli.data.stream import Clash, EditStream, read_edits

__all__ = [
    "DATASETS",
    "FORMATS",
    "KINDS",
    "Clash",
    "Dataset",
    "EditRecord",
    "EditStream",
    "Format",
    "Located",
    "Probe",
    "content_id",
    "contexts",
    "locate_dataset",
    "map_record",
    "ordinary_prompts",
    "read_dataset",
    "read_edits",
    "resolve_dataset",
]
