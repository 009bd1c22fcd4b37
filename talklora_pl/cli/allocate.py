"""``python -m talklora_pl allocate``: how many experts each layer of a model deserves, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError
from talklora_pl.paths import expand


def allocate(
    base: str,
    rules: str = "alpha",
    budget: int | None = None,
    num_experts: int = 5,
    targets: list[str] | str = "all-linear",
    exclude: list[str] | str = (),  # type: ignore[assignment]
    layers: str | None = None,
    beta: float = 2.5,
    estimator: Literal["peak", "median", "hill"] = "peak",
    granularity: Literal["layer", "module"] = "layer",
    compat: Literal["official"] | None = None,
    output: str = "allocation.yaml",
    revision: str | None = None,
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm",
    no_cache: bool = False,
    plugins: list[str] | str = (),  # type: ignore[assignment]
) -> None:
    """Decide how many experts each decoder layer gets, compare rules, and write the first rule's answer for a config.

    Args:
        base: hub name, folder, .gguf file or package:NAME/FILE of the pretrained model.
        rules: one or several with commas between: alpha, uniform, mola-2468 (any digits), alphalora-mistral-7b, a YAML
            file written by this command, or any other registered rule; options as in alpha:estimator=median:beta=1.
        budget: experts summed over layers, for alpha and uniform; num_experts times the layers by default.
        num_experts: experts per layer, where no budget is given.
        targets: leaf names, a regular expression over whole module names, or all-linear.
        exclude: leaf names or a regular expression of modules to leave alone.
        layers: decoder layers, for example 0-15; all by default.
        beta: alpha: how strongly the exponent counts.
        estimator: alpha: where the eigenvalue tail starts; peak as published, median is more stable.
        granularity: alpha: one number per layer, or per target module.
        compat: alpha: official for the released rounding repair, wrong signs included.
        output: YAML file to write; the chart goes beside it as .png.
        revision: branch, tag or commit on the hub.
        task: the head of the model.
        no_cache: compute the spectra even where they are known.
        plugins: modules or .py files with rules of your own.
    """
    from rich.console import Console

    from talklora_pl.adapter.allocation import layer_targets, layers_without_targets
    from talklora_pl.allocation.alpha import Alpha
    from talklora_pl.allocation.cache import exponents
    from talklora_pl.allocation.report import Counts, figure, table, write
    from talklora_pl.allocation.short import parse_rule
    from talklora_pl.base import BaseModel, load_base
    from talklora_pl.base.weights import SafetensorsWeights
    from talklora_pl.registry import import_plugins

    import_plugins(plugins)
    alpha = Alpha(budget=budget, beta=beta, estimator=estimator, granularity=granularity, compat=compat)
    chosen = {name.strip(): parse_rule(name.strip(), alpha) for name in rules.split(",")}
    yaml_file = Path(expand(output))
    if yaml_file.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output: {output!r} should be a .yaml file.")
    if not yaml_file.parent.is_dir():
        raise UserError(f"--output: there is no folder {str(yaml_file.parent)!r}.")

    # spectra are of the layers alone, whatever the tokenizer has
    model_of = BaseModel(base, task=task, revision=revision, resize_embeddings=True)
    model = load_base(model_of, meta=True)
    decoder = layer_targets(model, targets, exclude, layers)
    if not decoder:
        raise UserError(f"--targets: {targets!r} lie outside of the numbered layers; there is nothing to allocate.")
    if layers is None and (bare := layers_without_targets(model, decoder)):
        raise UserError(
            f"--targets: {targets!r} match nothing in {len(bare)} decoder layers, the first is {bare[0]!r}. Choose "
            "targets that every layer has, or say with --layers which layers are meant."
        )
    weights = SafetensorsWeights.of(base, revision)
    if no_cache:
        weights.fingerprint = None
    average = num_experts if budget is None else max(1, round(budget / len(decoder)))
    decided: dict[str, Counts] = {}
    for name in sorted(
        chosen, key=lambda name: isinstance(chosen[name], Alpha)
    ):  # what is quick, and its errors, first
        decided[name] = chosen[name].allocate(decoder, average, weights)
    decided = {name: decided[name] for name in chosen}

    spectral = next((rule for rule in chosen.values() if isinstance(rule, Alpha)), None)
    found = None
    if spectral is not None:
        found = exponents(weights, [module for layer in decoder for module in layer.all_modules])
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit in
        console = Console(width=60 + 30 * len(chosen))
    console.print(table(decoder, decided, found, spectral.estimator if spectral else "peak"))

    first = next(iter(chosen))
    alphas = spectral.layer_alphas(decoder, weights) if spectral else None
    write(yaml_file, base, first, chosen[first], decoder, decided[first], alphas if chosen[first] is spectral else None)
    figure(decoder, decided, alphas).savefig(yaml_file.with_suffix(".png"), dpi=150)
    print(f"\nwrote {yaml_file} ({first}) and {yaml_file.with_suffix('.png')}")


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    allocate(**parse(verb, allocate, argv))
