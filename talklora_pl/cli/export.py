"""``python -m talklora_pl export CKPT --out DIR``: the adapter folder of a checkpoint."""

from __future__ import annotations

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError


def export(
    checkpoint: str,
    out: str | None = None,
    base: str | None = None,
    license: str | None = None,
    merge: bool = False,
    push: str | None = None,
    public: bool = False,
    plugins: list[str] | str = (),  # type: ignore[assignment]
    trust_remote_code: bool = False,
) -> None:
    """Write the adapter folder of a checkpoint.

    Args:
        checkpoint: checkpoint file, or folder of a run (its best, else last).
        out: folder to write; an adapter folder is replaced.
        base: other place of the base model, which the folder will also name.
        license: of the adapter, for the model card, such as apache-2.0.
        merge: write the whole model with the adapter merged into its weights instead.
        push: OWNER/NAME on the hub, where the adapter folder is uploaded to.
        public: a repository that push creates is public.
        plugins: modules or .py files with components of your own.
        trust_remote_code: run Python code that comes with the base.
    """
    if out is None:
        raise UserError("export: --out DIR is required.")
    if merge and (push or license):
        raise UserError("export: --merge writes a model, not an adapter folder, so --push and --license do not apply.")

    from talklora_pl.export.run import export_checkpoint, merge_checkpoint
    from talklora_pl.registry import import_plugins

    import_plugins(plugins)
    if merge:
        print(f"Merged model: {merge_checkpoint(checkpoint, out, base)}")
        return
    folder = export_checkpoint(checkpoint, out, base, license, trust_remote_code)
    print(f"Adapter: {folder}")
    if push:
        from talklora_pl.adapter.hub import push_adapter

        print(f"Pushed: {push_adapter(folder, push, private=not public)}")


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    export(**parse(verb, export, argv, positional=True))
