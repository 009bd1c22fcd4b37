"""Data sets as they are on the hub, with invented rows: the same folders, file types, columns and types of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CHOICES = {"text": ["on a shelf", "in the sea", "in a nest"], "label": ["A", "B", "C"]}
NUMBERED = {"text": ["ice", "steam"], "label": ["1", "2"]}  # as some of ARC

ROWS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "google/boolq": (
        "",
        "validation",
        [
            {"question": "do fish have gills", "answer": True, "passage": "Fish breathe water."},
            {"question": "is the moon a star", "answer": False, "passage": "The moon is a moon."},
        ],
    ),
    "baber/piqa": ("", "validation", [{"goal": "cool soup", "sol1": "blow on it", "sol2": "heat it", "label": 0}]),
    "lighteval/siqa": (
        "",
        "validation",
        [
            {"context": "Ann fell.", "question": "What next?", "label": "2"}
            | {"answerA": "she flew", "answerB": "she got up", "answerC": "she sang"}
        ],
    ),
    "Rowan/hellaswag": (
        "",
        "validation",
        [
            {"ind": 4, "activity_label": "Baking", "ctx_a": "A man kneads.", "ctx_b": "he", "ctx": "A man kneads. he"}
            | {"endings": ["sings.", "bakes.", "flies.", "melts."], "label": "1", "split": "val"}
        ],
    ),
    "allenai/winogrande": (
        "winogrande_xl",
        "validation",
        [
            {
                "sentence": "The cup fell off the desk as the _ was small.",
                "option1": "cup",
                "option2": "desk",
                "answer": "2",
            }
        ],
    ),
    "allenai/ai2_arc": (
        "ARC-Easy",
        "test",
        [
            {"id": "q1", "question": "Where do birds hatch?", "choices": CHOICES, "answerKey": "C"},
            {"id": "q2", "question": "What is cold?", "choices": NUMBERED, "answerKey": "1"},
        ],
    ),
    "allenai/openbookqa": (
        "main",
        "test",
        [{"id": "q", "question_stem": "Books stand", "choices": CHOICES, "answerKey": "A"}],
    ),
    "tau/commonsense_qa": (
        "",
        "validation",
        [{"id": "q", "question": "Whales live?", "question_concept": "whale", "choices": CHOICES, "answerKey": "B"}],
    ),
    "nyu-mll/glue": (
        "sst2",
        "validation",
        [
            {"sentence": f"{word} film", "label": label, "idx": i}
            for i, (word, label) in enumerate([("a fine", 1), ("a dull", 0)] * 3)
        ],
    ),
}


def write(root: Path) -> Path:
    """All of them, under their names."""
    for name, (config, split, rows) in ROWS.items():
        folder = root / name
        (folder / (config or "data")).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / (config or "data") / f"{split}-00000-of-00001.parquet")
    return root
