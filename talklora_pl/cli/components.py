"""``python -m talklora_pl components``: all parts with their options, those of your own plugins included."""

from __future__ import annotations

from json import dumps

from talklora_pl.cli.parse import parse


def show(json: bool = False, plugins: list[str] | str = ()) -> None:  # type: ignore[assignment]
    """List all parts of an adapter with their options.

    Args:
        json: machine-readable.
        plugins: modules or .py files with components of your own.
    """
    from rich.console import Console

    from talklora_pl.cli.parts import components, components_table
    from talklora_pl.registry import import_plugins

    import_plugins(plugins)
    if json:
        print(dumps(components(), indent=1, default=str))
    else:
        # markup off: types such as list[str] are no style
        Console(markup=False).print(components_table())


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    show(**parse(verb, show, argv))
